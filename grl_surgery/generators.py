"""The random number generators of the host, and putting them back."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["random_state_kept"]


@contextlib.contextmanager
def random_state_kept() -> Iterator[Callable[[], bool]]:
    """Put every generator on the host back; yields a function that says whether one has moved."""
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
