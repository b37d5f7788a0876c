"""Ratios of interleaved runs: the one way of taking time here; and bytes, counted."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]


class Spread(NamedTuple):
    """A median and the range that holds eight of ten runs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), tenths[0], tenths[-1])


def keep_freed_memory() -> None:
    """Ask the C library not to hand freed memory back to the system, as a device's allocator does not either.

    Otherwise a buffer at the end of the heap is taken anew page by page, whoever happens to have it.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_MMAP_THRESHOLD, 2**25)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def interleaved(
    calls: Mapping[str, Call], rounds: int, slice_s: float = 2e-3, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of one call of each, round by round, so that all meet the same noise.

    Each gets about ``slice_s`` in a round (one call at least); another one begins each round.
    """
    clock = _device_clock if device == "cuda" else _host_clock
    times = {name: max(1, round(slice_s / max(1e-9, _warm(call, clock)))) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for names in _rotations(list(calls), rounds):
        gc.collect(0)
        gc.disable()  # as timeit does
        try:
            for name in names:
                taken[name].append(clock(calls[name], times[name]))
        finally:
            gc.enable()
    return taken


def _warm(call: Call, clock: Callable[[Call, int], float]) -> float:
    call()
    return min(clock(call, 1) for _ in range(2))


def _rotations(names: list[str], rounds: int) -> Iterator[list[str]]:
    for turn in range(rounds):
        start = turn % len(names)
        yield names[start:] + names[:start]


def _host_clock(call: Call, times: int) -> float:
    # Processor time: what other programs take of a shared machine is not ours. Nothing here waits.
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


def _device_clock(call: Call, times: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def ratio(taken: Mapping[str, Sequence[float]], ours: str, other: str) -> Spread:
    """How many times as long ``ours`` takes, round by round."""
    return Spread.of([a / b for a, b in zip(taken[ours], taken[other], strict=True)])


def allocated(call: Call) -> int:
    """Bytes that a call asks the allocator for, whether or not it keeps them."""
    return sum(size for size in _allocations(call) if size > 0)


def peak(call: Call) -> int:
    """The most bytes that a call holds at a time, beyond what was held before."""
    held = most = 0
    for size in _allocations(call):
        held += size
        most = max(most, held)
    return most


def _allocations(call: Call) -> list[int]:
    """Every allocation (positive) and release (negative) in order, as torch's allocators report them."""
    from torch.profiler import ProfilerActivity, profile

    on_device = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    gc.collect()
    with (
        _nothing_on_stderr(),
        profile(activities=[ProfilerActivity.CPU, *on_device], profile_memory=True) as profiled,
    ):
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@contextlib.contextmanager
def _nothing_on_stderr() -> Iterator[None]:
    """The profiler's own log is written by C++."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def verdict(value: Spread, limit: float) -> str:
    """Whether a ratio keeps its limit; within the noise where its range does and its median nearly."""
    if value.median <= limit:
        return "yes"
    return "within the noise" if value.low <= limit and value.median <= 1.03 * limit else "no"
