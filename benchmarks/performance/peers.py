"""The reversals that install from PyPI, and the two forms that tutorials print, behind one signature."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import grl_surgery as gs

PACKAGES = {
    "pytorch-revgrad": "pytorch-revgrad",
    "torch-gradient-reversal": "torch-gradient-reversal",
    "pytorch-adapt": "pytorch-adapt",
}


@dataclass
class Reversal:
    """One way of writing it: what is called, and how its coefficient is changed."""

    call: Callable[[Tensor], Tensor]
    set_coeff: Callable[[float], None]


class TimesOne(torch.autograd.Function):
    """The first tutorial's: the forward multiplies by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coeff: float = 1.0) -> Tensor:
        ctx.coeff = coeff
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].neg() * ctx.coeff, None


class Clone(torch.autograd.Function):
    """The second tutorial's: the forward copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coeff: float = 1.0) -> Tensor:
        ctx.coeff = coeff
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].neg() * ctx.coeff, None


class WithNumber(nn.Module):
    """A layer around a function of a tensor and a number, as both tutorials have it."""

    def __init__(self, function: Callable[[Tensor, float], Tensor], coeff: float) -> None:
        super().__init__()
        self.function, self.coeff = function, coeff

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.coeff)

    def set_coeff(self, coeff: float) -> None:
        self.coeff = coeff


def _with_number(function: Callable[[Tensor, float], Tensor]) -> Reversal:
    held = [0.5]
    return Reversal(lambda x: function(x, held[0]), lambda coeff: held.__setitem__(0, coeff))


def _layer(layer: Any, set_coeff: Callable[[float], Any]) -> Reversal:
    return Reversal(layer, set_coeff)


def ours(device: str = "cpu") -> dict[str, Reversal]:
    layer = gs.GradientReversal(0.5).to(device)
    return {
        "grl_surgery layer": _layer(layer, layer.set_coeff),
        "grl_surgery function": _with_number(gs.reverse_gradient),
    }


def peers(device: str = "cpu") -> dict[str, Reversal]:
    """Every peer, each as its own documentation uses it, with the coefficient 0.5."""
    from gradient_reversal import GradientReversalLayer
    from pytorch_revgrad import RevGrad

    _let_old_torchmetrics_be_imported()
    from pytorch_adapt.layers import GradientReversal

    revgrad = RevGrad(0.5)
    revgrad._alpha = revgrad._alpha.to(device)
    library = GradientReversalLayer(0.5).to(device)
    adapt = GradientReversal(0.5).to(device)
    second = WithNumber(Clone.apply, 0.5)
    return {
        "pytorch-revgrad": _layer(revgrad, revgrad._alpha.fill_),
        "torch-gradient-reversal": _layer(library, library.set_alpha),
        "pytorch-adapt": _layer(adapt, adapt.update_weight),
        "tutorial 1, function": _with_number(TimesOne.apply),
        "tutorial 2, function": _with_number(Clone.apply),
        "tutorial 2, module": _layer(second, second.set_coeff),
    }


def _let_old_torchmetrics_be_imported() -> None:
    """pytorch-adapt pins a torchmetrics that asks setuptools for a module that it no longer has."""
    with contextlib.suppress(ImportError):
        import pkg_resources  # noqa: F401

        return
    stand_in: Any = types.ModuleType("pkg_resources")
    stand_in.DistributionNotFound = importlib.metadata.PackageNotFoundError
    stand_in.get_distribution = importlib.metadata.distribution
    sys.modules["pkg_resources"] = stand_in


def versions() -> dict[str, str]:
    names = ["torch", "torchvision", "timm", *PACKAGES.values()]
    return {name: importlib.metadata.version(name) for name in names}
