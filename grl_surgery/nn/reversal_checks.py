"""Refuses inputs and coefficients that a reversal cannot take, each with the value that was given."""

import math
import numbers
from typing import cast

import torch
from torch import Tensor

from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.nn.reversal_operator import is_recording

__all__ = ["broadcastable", "check_clip", "check_input", "check_number", "check_scalar"]


def check_input(x: object) -> None:
    """Refuses what is no tensor that can have a gradient."""
    if not isinstance(x, Tensor):
        raise ShapeError(
            f"a gradient reversal takes one tensor; its input is {_described(x)}; choose one item",
            example="after='encoder[0]'",
        )
    if not (x.is_floating_point() or x.is_complex()):
        raise ShapeError(
            f"a gradient reversal takes a tensor that can have a gradient; its input has dtype {x.dtype}; "
            "choose a point where the values are floating point"
        )


def _described(value: object) -> str:
    if isinstance(value, dict):
        return f"a {type(value).__name__} with keys {', '.join(map(repr, value)) or 'none'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"of type {type(value).__name__}"


def check_number(coeff: object, signed: bool = False) -> None:
    """Refuses a coefficient that is no finite number, or negative where that was not asked for."""
    if not isinstance(coeff, (int, float, torch.SymFloat, numbers.Real)):
        raise SurgeryError(
            f"coeff is of type {type(coeff).__name__}; it must be a number or a tensor", example="coeff=0.5"
        )
    # Compared, so that a compiler may keep the number symbolic; nan fails every comparison.
    if not (-math.inf if signed else 0.0) <= cast(float, coeff) < math.inf or coeff == -math.inf:
        raise SurgeryError(
            f"coeff is {coeff}; it must be finite{'' if signed else ' and not negative'}: the gradient is "
            "multiplied by -coeff, so that a negative one un-reverses it, and infinity or nan destroys it",
            example="coeff=0.5" if signed else "coeff=0.5, or GradientReversal(-0.5, signed=True) on purpose",
        )


def _check_float32(coeff: float, signed: bool) -> None:
    check_number(coeff, signed)
    if abs(coeff) > _LARGEST:
        raise SurgeryError(
            f"coeff is {str(coeff)[:40]}; a layer keeps it in float32, where it would be infinite",
            example="coeff=0.5",
        )


_LARGEST = torch.finfo(torch.float32).max


def check_clip(clip: object, x: Tensor | None = None) -> None:
    """Refuses a bound that is no positive number, or an input that cannot be clamped."""
    if isinstance(clip, bool) or not isinstance(clip, numbers.Real) or not 0.0 < float(clip) < math.inf:
        raise SurgeryError(
            f"clip is {clip!r}; it must be a positive number: each entry of the gradient is clamped to "
            "[-clip, clip]",
            example="GradientReversal(clip=0.5)",
        )
    if x is not None and x.is_complex():
        raise ShapeError(
            f"clip={clip!r} clamps real numbers, and the input has dtype {x.dtype}",
            example="reverse_gradient(torch.view_as_real(x), clip=0.5)",
        )


def check_scalar(coeff: float | Tensor, signed: bool) -> None:
    """Refuses a coefficient that a layer cannot keep: one number, in float32."""
    if not isinstance(coeff, Tensor):
        _check_float32(coeff, signed)
        return
    _check_coeff_dtype(coeff)
    if coeff.dim() != 0:
        raise ShapeError(
            f"a layer has one coefficient; this one has shape {tuple(coeff.shape)}; for one per sample, call "
            "the function",
            example="reverse_gradient(x, coeff)",
        )
    if coeff.device.type == "meta":
        raise SurgeryError("coeff is on the meta device, where it has no value", example="coeff=0.5")
    # Reading from another device would make the host wait for it; a subclass may hold no value at all.
    if type(coeff) is Tensor and coeff.device.type == "cpu" and not is_recording():
        _check_float32(coeff.detach().item(), signed)


def _check_coeff_dtype(coeff: Tensor) -> None:
    if not coeff.is_floating_point():
        raise SurgeryError(
            f"coeff has dtype {coeff.dtype}; it must be floating point", example="coeff.float()"
        )


def broadcastable(coeff: Tensor, x: Tensor) -> Tensor:
    """Returns `coeff` in a shape that broadcasts against `x`: (), (B, 1, ..., 1), or one for each place."""
    _check_coeff_dtype(coeff)
    if coeff.dim() == 0:
        return coeff
    if coeff.dim() == x.dim() and _fits(coeff, x):
        return coeff
    if coeff.dim() != 1 or x.dim() == 0 or not _same_length(coeff, x):
        raise ShapeError(
            f"coeff has shape {tuple(coeff.shape)} and the input {tuple(x.shape)}; a coefficient is a "
            "number, a 0-d tensor, a tensor with one number for each sample along the first dimension, or one"
            " that broadcasts against the input",
            example="reverse_gradient(x, torch.ones(x.shape[0]))",
        )
    return coeff.reshape(-1, *[1] * (x.dim() - 1))


def _fits(coeff: Tensor, x: Tensor) -> bool:
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return coeff.dim() > 1
    if coeff.dim() == 1:  # one number for all samples would be a number
        return coeff.shape[0] == x.shape[0]
    return all(a in (1, b) for a, b in zip(coeff.shape, x.shape, strict=True))


def _same_length(coeff: Tensor, x: Tensor) -> bool:
    # torch.jit.trace would warn that it cannot record a comparison.
    return torch.jit.is_tracing() or coeff.shape[0] == x.shape[0]  # type: ignore[attr-defined, no-untyped-call]
