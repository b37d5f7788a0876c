"""Deep-copies networks that hold results of computations, which torch's own deepcopy refuses."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from grl_surgery.errors import ExportError, one_line

__all__ = ["deep_copy"]

T = TypeVar("T")


def deep_copy(value: T) -> T:
    """``copy.deepcopy``, in which a tensor that autograd has computed becomes a constant of the same value.

    Such are the ``weight`` that ``torch.nn.utils.weight_norm`` keeps from the last forward, and what any
    other forward leaves in an attribute.

    Example:
        >>> deep_copy([torch.ones(2, requires_grad=True) * 2])
        [tensor([2., 2.])]

    Raises:
        ExportError: Something in it cannot be copied.
    """
    try:
        with _ResultsDetached():
            return copy.deepcopy(value)
    except Exception as error:  # any object may be in it
        raise ExportError(
            f"a {type(value).__name__} is written from a copy, and cannot be copied: {one_line(error)}",
            example="copy.deepcopy(m), which has to work",
        ) from error


class _ResultsDetached(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.__deepcopy__ and args[0].grad_fn is not None:
            tensor, memo = args
            return copy.deepcopy(tensor.detach(), memo)
        return function(*args, **kwargs or {})
