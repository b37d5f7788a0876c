"""The operation in eager mode, forward and backward, beside each peer and beside the least it could cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from measuring import Call, Spread, allocated, interleaved, ratio, verdict
from peers import ours, peers
from torch import Tensor

SHAPES = {(64, 256): 16, (64, 2048): 16, (32, 1024, 14, 14): 1}  # and how often it stands behind itself
DTYPES = (torch.float32, torch.bfloat16)
OURS = "grl_surgery layer"
FLOOR = "view_as and mul"


def rows(rounds: int, device: str = "cpu") -> Iterator[dict[str, Any]]:
    for shape, depth in SHAPES.items():
        for dtype in DTYPES:
            yield _time(shape, dtype, depth, rounds, device)
    yield from _memory(device)


def _time(shape: tuple[int, ...], dtype: torch.dtype, depth: int, rounds: int, device: str) -> dict[str, Any]:
    x = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) * 1).contiguous()
    grad = torch.randn(shape, dtype=dtype, device=device)
    rivals = peers(device)
    reversals = {**ours(device), **rivals}
    calls = {name: _there_and_back(reversal.call, x, grad, depth) for name, reversal in reversals.items()}
    calls[FLOOR] = _floor(x, grad, depth)
    forwards = {name: _there(reversal.call, x, depth) for name, reversal in reversals.items()}
    large = x.numel() > 1_000_000
    # Short slices, and many of them: two neighbours in a round meet the same neighbours on the machine.
    times = max(5, rounds // 2) if large else rounds * 20
    taken = interleaved(calls, times, slice_s=3e-4, device=device)
    forward = interleaved(forwards, times // 4, slice_s=3e-4, device=device)
    fastest = min(rivals, key=lambda name: Spread.of(taken[name]).median)
    by_peer = {name: ratio(taken, OURS, name) for name in (*rivals, "grl_surgery function", FLOOR)}
    met = verdict(by_peer[fastest], 1.0)
    if large:
        met = _worst(met, verdict(by_peer[FLOOR], 1.3))
    return {
        "case": f"{shape} {str(dtype).removeprefix('torch.')}",
        "depth": depth,
        "fastest_peer": fastest,
        "ratio_to_fastest_peer": by_peer[fastest],
        "ratio_to_floor": by_peer[FLOOR],
        "ratio_to_each": by_peer,
        "microseconds": {name: 1e6 * Spread.of(row).median / depth for name, row in taken.items()},
        "forward_microseconds": {name: 1e6 * Spread.of(row).median / depth for name, row in forward.items()},
        "goal": "at most 1.00 of the fastest peer" + ("; at most 1.3 of the floor" if large else ""),
        "met": met,
    }


def _worst(*verdicts: str) -> str:
    return max(verdicts, key=["yes", "within the noise", "no"].index)


def _there(call: Any, x: Tensor, depth: int) -> Call:
    def run() -> Tensor:
        y = x
        for _ in range(depth):
            y = call(y)
        return y

    return run


def _there_and_back(call: Any, x: Tensor, grad: Tensor, depth: int) -> Call:
    forward = _there(call, x, depth)
    return lambda: torch.autograd.grad(forward(), x, grad)


def _floor(x: Tensor, grad: Tensor, depth: int) -> Call:
    """What nobody can undercut: a view that autograd knows of, and one multiplication of the gradient."""
    views = _there_and_back(lambda y: y.view_as(y), x, grad, depth)
    factor = torch.tensor(-0.5, device=x.device)

    def run() -> None:
        views()
        scaled = grad
        for _ in range(depth):
            scaled = scaled * factor

    return run


def _memory(device: str) -> Iterator[dict[str, Any]]:
    """Bytes asked for by one forward and by one backward, counted by torch's own profiler."""
    shape = (32, 1024, 14, 14)
    x = torch.randn(shape, device=device, requires_grad=True) * 1
    grad = torch.randn(shape, device=device)
    found = {}
    for name, reversal in {**ours(device), **peers(device)}.items():
        forward = allocated(lambda call=reversal.call: call(x))
        y = reversal.call(x)
        backward = allocated(lambda y=y: torch.autograd.grad(y, x, grad, retain_graph=True))
        found[name] = (forward, backward)
    gradient = grad.numel() * grad.element_size()
    forward, backward = found[OURS]
    yield {
        "case": f"memory, {shape} float32",
        "gradient_bytes": gradient,
        "bytes_forward_and_backward": found,
        "goal": "nothing of the value's size forward, one gradient-sized buffer backward",
        "met": "yes" if forward <= 8 and backward <= gradient + 8 else "no",
    }
