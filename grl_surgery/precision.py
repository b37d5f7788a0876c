"""Running a network in float64 throughout, also where its forward asks for less."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["all_in_double", "widened"]

WIDE = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
_LOWERING = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64 or complex128; one that holds no such numbers as it is."""
    return tensor.to(WIDE.get(tensor.dtype, tensor.dtype))


@contextlib.contextmanager
def all_in_double() -> Iterator[None]:
    """Let what is made without a dtype, and what is made or cast with a smaller one, be float64.

    ``x.float()`` or ``torch.ones(3, dtype=torch.float32)`` in a forward would otherwise meet parameters in
    float64, and fail or round.

    Example:
        >>> with all_in_double():
        ...     found = torch.ones(2), torch.ones(2, dtype=torch.float32), torch.ones(2).half()
        >>> {tensor.dtype for tensor in found}
        {torch.float64}
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widening():
            yield
    finally:
        torch.set_default_dtype(default)


class _Widening(TorchFunctionMode):
    """Every call of torch's with wider dtypes among its arguments."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = {name: _wide(value) for name, value in (kwargs or {}).items()}
        call = torch.Tensor.double if func in _LOWERING else func
        return call(*map(_wide, args), **named)


def _wide(value: Any) -> Any:
    return WIDE.get(value, value) if isinstance(value, torch.dtype) else value
