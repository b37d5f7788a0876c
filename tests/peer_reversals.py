"""Reversals of other libraries, each with the coefficient of tests/reversal_contexts.py."""

from __future__ import annotations

from functools import partial

from reversal_contexts import COEFF, Operation
from torch import Tensor


def pytorch_revgrad() -> Operation:
    from pytorch_revgrad import RevGrad

    return RevGrad(alpha=COEFF)


def torch_gradient_reversal() -> Operation:
    from gradient_reversal import gradient_reversal

    return partial(_called, gradient_reversal)


def _called(function: object, x: Tensor) -> Tensor:
    return function(x, COEFF)


def pytorch_adapt() -> Operation:
    from pytorch_adapt.layers import GradientReversal

    return GradientReversal(weight=COEFF)


def skada() -> Operation:
    return _skada


def _skada(x: Tensor) -> Tensor:
    from skada.deep.modules import GradientReversalLayer

    return GradientReversalLayer.apply(x, COEFF)
