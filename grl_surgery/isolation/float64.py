"""Runs a network in float64 throughout, also where its forward asks for less."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["SINGLE", "WIDE", "Wider", "all_in_double", "widened"]

WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
SINGLE = {torch.float16: torch.float32}
"""For a processor that has few kernels for half precision, and slow ones."""

Wider = Mapping[torch.dtype, torch.dtype]

_CASTS: Mapping[Any, torch.dtype] = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
}


def widened(tensor: torch.Tensor, wider: Wider = WIDE) -> torch.Tensor:
    """The tensor in float64 or complex128, or what ``wider`` says; one of no such dtype as it is."""
    return tensor.to(wider.get(tensor.dtype, tensor.dtype))


@contextlib.contextmanager
def all_in_double(wider: Wider = WIDE) -> Iterator[None]:
    """Let what is made without a dtype, and what is made or cast with a smaller one, be float64.

    ``x.float()`` or ``torch.ones(3, dtype=torch.float32)`` in a forward would otherwise meet parameters in
    float64, and fail or round.

    Example:
        >>> with all_in_double():
        ...     found = torch.ones(2), torch.ones(2, dtype=torch.float32), torch.ones(2).half()
        >>> {tensor.dtype for tensor in found}
        {torch.float64}

    Args:
        wider: Which dtype stands in the place of which.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(wider.get(default, default))
    try:
        with _Widening(wider):
            yield
    finally:
        torch.set_default_dtype(default)


class _Widening(TorchFunctionMode):
    """Every call of torch's with wider dtypes among its arguments."""

    def __init__(self, wider: Wider) -> None:
        super().__init__()
        self.wider = wider

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if _CASTS.get(func) in self.wider:
            return args[0].to(self.wider[_CASTS[func]])
        named = {name: self._wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(self._wide, args), **named)

    def _wide(self, value: Any) -> Any:
        return self.wider.get(value, value) if isinstance(value, torch.dtype) else value
