"""Saves and restores the random number generators of the host."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["GLOBAL_STATE_LOCK", "preserve_rng_state", "seed_everything"]

# The generators belong to the process, and torch.fx patches torch.nn.Module for the process while it traces:
# two threads that verify, trace or export at a time would see each other.
GLOBAL_STATE_LOCK = threading.RLock()


def seed_everything(seed: int) -> None:
    """Start torch's, Python's and numpy's own generators from a seed, so that what draws from them repeats.

    Args:
        seed: Not negative; numpy is given its last 32 bits. Numpy is left out where nothing has imported it.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed(seed % 2**32)


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[Callable[[], bool]]:
    """Put every generator on the host back; yields a function that says whether one has moved."""
    with GLOBAL_STATE_LOCK:
        yield from _kept()


def _kept() -> Iterator[Callable[[], bool]]:
    numpy: Any = sys.modules.get("numpy")
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    numpy_state = numpy and numpy.random.get_state(legacy=False)

    def moved() -> bool:
        return (
            not torch.equal(torch_state, torch.random.get_rng_state())
            or python_state != random.getstate()
            or (
                numpy
                and _numpy_position(numpy_state) != _numpy_position(numpy.random.get_state(legacy=False))
            )
        )

    try:
        yield moved
    finally:
        torch.random.set_rng_state(torch_state)
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def _numpy_position(state: Any) -> tuple[int, bytes]:
    return state["state"]["pos"], state["state"]["key"].tobytes()
