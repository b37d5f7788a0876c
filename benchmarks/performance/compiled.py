"""The same under torch.compile: kernels in the generated code, and graphs while the coefficient changes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from peers import Reversal, ours, peers
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

CHANGES = 1000


def rows(rounds: int, device: str = "cpu") -> Iterator[dict[str, Any]]:
    yield _kernels(device)
    yield _schedule(device)


# --- kernels


def _kernels(device: str) -> dict[str, Any]:
    identity = _count_kernels(lambda x: x, device)
    found = {name: _count_kernels(r.call, device) for name, r in {**ours(device), **peers(device)}.items()}
    added = {
        name: count if isinstance(count, str) else [count[0] - identity[0], count[1] - identity[1]]
        for name, count in found.items()
    }
    return {
        "case": "kernels that the reversal adds to the forward and to the backward of a small network",
        "without": identity,
        "added": added,
        "goal": "none forward, none backward: the multiplication is fused",
        "met": "yes" if added["grl_surgery layer"] == [0, 0] else "no",
    }


def _count_kernels(operation: Callable[[Tensor], Tensor], device: str) -> Any:
    """Kernels in the generated code of tanh, the operation, sine: pointwise on both sides, so that a
    multiplication can be fused."""
    torch._dynamo.reset()
    x = torch.randn(64, 256, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: operation(torch.tanh(x)).sin().sum(), fullgraph=True)
    try:
        with (
            inductor_config.patch(fx_graph_cache=False),
            functorch_config.patch(enable_autograd_cache=False),
        ):
            _, code = run_and_get_code(lambda: compiled(x).backward())
    except Exception as error:  # what a peer's code raises is the finding
        return f"error: {type(error).__name__}"
    forward, backward = code
    return [len(_kernels_called(forward)), len(_kernels_called(backward))]


def _kernels_called(code: str) -> list[str]:
    """Calls of generated kernels, of library kernels and of operators, in the body of the graph."""
    body = code.partition("def call(")[2]
    return re.findall(r"((?:cpp_fused\w*|triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.[\w.]+))\(", body)


# --- a schedule


def _schedule(device: str) -> dict[str, Any]:
    found = {name: _count_graphs(r, device) for name, r in {**ours(device), **peers(device)}.items()}
    layer = found["grl_surgery layer"]
    return {
        "case": f"{CHANGES:,} coefficients, one after the other",
        "graphs_and_breaks": found,
        "goal": "one graph, no break",
        "met": "yes" if layer == {"graphs": 1, "breaks": 0, "wrong": 0} else "no",
    }


def _count_graphs(reversal: Reversal, device: str) -> dict[str, Any]:
    """Graphs, breaks and wrong gradients while the coefficient rises; torch's own limits as they are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    network = torch.compile(lambda x: reversal.call(x * 2) * 3, backend=counter)
    x = torch.ones(4, 8, device=device, requires_grad=True)
    wrong = 0
    with _quiet():
        for step in range(CHANGES):
            coeff = (step + 1) / 1024
            reversal.set_coeff(coeff)
            try:
                (grad,) = torch.autograd.grad(network(x).sum(), x)
            except Exception as error:  # what a peer's code raises is the finding
                return {"graphs": counter.frame_count, "breaks": _breaks(), "error": type(error).__name__}
            wrong += not torch.allclose(grad, torch.full_like(grad, -6 * coeff))
    return {"graphs": counter.frame_count, "breaks": _breaks(), "wrong": wrong}


def _breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch says so at length when it gives up compiling something again."""
    import logging

    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
