"""What only a CUDA device can show: replayed CUDA graphs, and the backward's share of the memory's speed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from measuring import Spread, interleaved, ratio, verdict

import grl_surgery as gs

SHAPE = (32, 1024, 14, 14)


def rows(rounds: int, device: str = "cpu") -> Iterator[dict[str, Any]]:
    if device == "cuda":
        yield _replayed()
        yield from (_bandwidth(dtype, rounds) for dtype in (torch.float32, torch.bfloat16))


def _replayed() -> dict[str, Any]:
    """A forward and backward captured once and replayed while the coefficient changes."""
    layer = gs.GradientReversal(1.0).cuda()
    x = torch.ones(64, 256, device="cuda", requires_grad=True)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad((layer(x * 2) * 3).sum(), x)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradient()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradient()
    wrong = 0
    for step in range(100):
        coeff = (step + 1) / 128
        layer.set_coeff(coeff)
        graph.replay()
        wrong += not torch.equal(found, torch.full_like(found, -6 * coeff))
    return {
        "case": "a CUDA graph replayed with 100 coefficients",
        "wrong": wrong,
        "goal": "every gradient right",
        "met": "yes" if wrong == 0 else "no",
    }


def _bandwidth(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """The backward reads and writes as many bytes as a copy does."""
    grad = torch.randn(SHAPE, dtype=dtype, device="cuda")
    x = torch.randn(SHAPE, dtype=dtype, device="cuda", requires_grad=True) * 1
    y = gs.GradientReversal(0.5).cuda()(x)
    target = torch.empty_like(grad)
    calls = {
        "copy": lambda: target.copy_(grad),
        "backward": lambda: torch.autograd.grad(y, x, grad, retain_graph=True),
    }
    taken = interleaved(calls, rounds, slice_s=5e-3, device="cuda")
    fraction = ratio(taken, "copy", "backward")
    slower = Spread(*(1 / part for part in (fraction.median, fraction.high, fraction.low)))
    return {
        "case": f"the backward's share of copy bandwidth, {str(dtype).removeprefix('torch.')}",
        "fraction": fraction,
        "gigabytes_per_second": 2 * grad.nbytes / Spread.of(taken["backward"]).median / 1e9,
        "goal": "at least 0.90",
        "met": verdict(slower, 1 / 0.9),
    }
