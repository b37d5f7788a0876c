"""Checks one reversal by itself: the factor at its cut, at other coefficients, with its limits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from grl_surgery.nn.adopted_reversal import AdoptedReversal
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.verify.experiment import (
    GradientPair,
    is_coefficient,
    private_copy,
)
from grl_surgery.verify.fingerprint import Fingerprint

__all__ = ["is_zero", "ratio_of", "wrong_coefficient", "wrong_factor", "wrong_passage"]


def wrong_coefficient(layer: GradientReversal) -> str:
    """Why a layer reverses nothing as things are, whatever its code does; empty if its coefficient is one."""
    if layer._suspended is not None:
        return "it is disabled at the moment, by reversal_disabled"
    if not is_coefficient(layer.coeff.abs() if layer.signed else layer.coeff):
        return f"its coefficient is {float(layer.coeff):g}; it must be finite and not negative"
    return ""


def wrong_passage(layer: GradientReversal, row: GradientPair) -> str:
    """What is wrong with one gradient that passed a reversal; empty if nothing is."""
    if row.entered is None or is_zero(row.entered):
        return ""
    if row.left is None or not torch.equal(row.left, -row.entered):
        return (
            f"the gradient that leaves is not -1 times the one that enters; {ratio_of(row.entered, row.left)}"
        )
    return wrong_factor(layer, row.entered)


def wrong_factor(layer: GradientReversal, gradient: torch.Tensor) -> str:
    """What is wrong with what a layer makes of a gradient at other coefficients; empty if nothing is."""
    for coeff in (float(layer.coeff), _ANOTHER_COEFF):
        for tried in _gradients_to_try(layer, gradient):
            found = _gradient_through(layer, coeff, tried)
            if not torch.equal(found, (_limited(layer, tried) * -torch.tensor(coeff)).to(found.dtype)):
                return f"it does not multiply by -{coeff:g}{_limits(layer)}; {ratio_of(tried, found)}"
    if isinstance(layer, AdoptedReversal):
        found = _gradient_through(layer, 1.0, gradient, _ANOTHER_COEFF)
        if not torch.equal(found, (gradient * -torch.tensor(_ANOTHER_COEFF)).to(found.dtype)):
            return f"it does not obey the coefficient that it is called with; {ratio_of(gradient, found)}"
    return ""


# A layer that ignores its coefficient is caught whatever coefficient it has.
NONE_BEFORE = "it has a gradient where the reference has none"

_ANOTHER_COEFF = 0.375


def _gradients_to_try(layer: GradientReversal, gradient: torch.Tensor) -> Iterator[torch.Tensor]:
    """The gradient, and one that is partly clipped where the layer clips."""
    yield gradient
    if layer.clip is not None:
        yield gradient * (2 * layer.clip / gradient.abs().max())


def _limited(layer: GradientReversal, gradient: torch.Tensor) -> torch.Tensor:
    """What a layer is to multiply, by the formulas of its options."""
    if layer.clip is not None:
        gradient = gradient.minimum(torch.tensor(layer.clip)).maximum(torch.tensor(-layer.clip))
    if layer.normalize:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        gradient = (gradient / torch.linalg.vector_norm(wide)).to(gradient.dtype)
    return gradient


def _limits(layer: GradientReversal) -> str:
    clipped = f" what is clipped to {layer.clip:g}" if layer.clip is not None else ""
    return clipped + (" and normalised" if layer.normalize else "")


def _gradient_through(
    layer: GradientReversal, coeff: float, gradient: torch.Tensor, *argument: float
) -> torch.Tensor:
    """What a copy of the layer with this coefficient, or called with one, makes of a gradient."""
    twin = private_copy(layer, {})
    twin._buffers["coeff"] = torch.full_like(layer.coeff, coeff)
    x = torch.zeros_like(gradient, requires_grad=True)
    (found,) = torch.autograd.grad(twin(x * 1, *argument), x, gradient)
    return found


def is_zero(gradient: torch.Tensor | Fingerprint | None) -> bool:
    """Whether a gradient is missing or zero everywhere."""
    if isinstance(gradient, Fingerprint):
        return gradient.is_zero
    return gradient is None or not bool(gradient.any())


def ratio_of(before: torch.Tensor | None, after: torch.Tensor | None) -> str:
    """How the second gradient relates to the first, in words."""
    if before is None or is_zero(before):
        return NONE_BEFORE
    if after is None:
        return "it is lost"
    if after.shape != before.shape:
        return f"its shape is {tuple(after.shape)}, not {tuple(before.shape)}"
    if not bool(torch.isfinite(after).all()):
        return "it is not finite"
    ratio = (after * before).sum() / (before * before).sum()
    return f"it is {float(ratio.real):.3g} times as large"
