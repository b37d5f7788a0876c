"""Networks with a gradient reversal as people write it, right and wrong, each with the verdict that is due.

Written for this collection after what public issues and the documentation of other libraries describe. Names
mean nothing here: the one that is called GradientReversal reverses nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function

IMAGES = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Features, a classifier, and a domain head behind whatever is to be a reversal."""

    def __init__(self, reversal: nn.Module | None = None, head: nn.Module | None = None) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.classifier = nn.Linear(8, 3)
        self.reversal = reversal or nn.Identity()
        self.domain = head or nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.classifier(features), self.domain(self.reversal(features))


# --- Functions


class ReverseLayerF(Function):
    """The form of most tutorials."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].neg() * ctx.alpha, None


class ReturnsItsInput(Function):
    """Said to keep backward from being called, and does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


class TimesOne(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coeff: float) -> Tensor:
        ctx.coeff = coeff
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return -ctx.coeff * grads[0], None


class SavedTensor(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, alpha = ctx.saved_tensors
        return -alpha * grads[0], None


class WithContext(Function):
    """The newer form of a Function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, coeff: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.coeff = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return -ctx.coeff * grads[0], None


class ForgetsTheSign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coeff: float) -> Tensor:
        ctx.coeff = coeff
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.coeff * grads[0], None


class FloatOfNumpy(Function):
    """Its backward fails: numpy has no ``float`` any more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, progress: float) -> Tensor:
        ctx.progress = progress
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return -np.float(ctx.progress) * grads[0], None  # type: ignore[attr-defined]


class OneForEachSample(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coeff: Tensor) -> Tensor:
        ctx.save_for_backward(coeff)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (coeff,) = ctx.saved_tensors
        return -coeff[:, None] * grads[0], None


class ClipsTheGradient(Function):
    """Reverses, but not by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0].clamp(-0.01, 0.01)


class CoefficientOfTheClass(Function):
    """Read when the backward runs: two networks in one process have one coefficient."""

    strength = 0.7

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -CoefficientOfTheClass.strength * grads[0]


# --- layers


class Layer(nn.Module):
    """A Function in a module; the coefficient is a number that a trace captures."""

    def __init__(self, function: Any = ReverseLayerF, alpha: Any = 0.5) -> None:
        super().__init__()
        self.function, self.alpha = function, alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.alpha)


class Bare(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class InBuffer(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([weight]))

    def forward(self, x: Tensor) -> Tensor:
        return SavedTensor.apply(x, self.weight)


class InParameter(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return SavedTensor.apply(x, self.weight)


class GradientReversal(nn.Module):
    """Its ``backward`` is a method that nobody calls."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def backward(self, gradient: Tensor) -> Tensor:
        return -gradient


class NeverPassed(nn.Module):
    """Computes a coefficient and reverses with 1."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = 0.2

    def forward(self, x: Tensor) -> Tensor:
        coeff = 2.0 * self.alpha  # noqa: F841
        return ReverseLayerF.apply(x, 1.0)


class OnlyInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ReverseLayerF.apply(x, 1.0) if self.training else x


class ByHook(nn.Module):
    def __init__(self, coeff: float) -> None:
        super().__init__()
        self.coeff = coeff

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        if y.requires_grad:
            y.register_hook(lambda gradient: -self.coeff * gradient)
        return y


class ByArithmetic(nn.Module):
    """No Function at all."""

    def __init__(self, coeff: float) -> None:
        super().__init__()
        self.coeff = coeff

    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * (1.0 + self.coeff) - x * self.coeff


class WarmStart(nn.Module):
    """The Transfer-Learning-Library's warm start: the coefficient rises from lo to hi along a sigmoid.

    With every forward; or, without ``auto_step``, where the training loop calls ``step()``.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        lo: float = 0.0,
        hi: float = 1.0,
        max_iters: int = 100,
        auto_step: bool = True,
    ) -> None:
        super().__init__()
        self.alpha, self.lo, self.hi, self.max_iters = alpha, lo, hi, max_iters
        self.auto_step = auto_step
        self.iter_num = 0

    def step(self) -> None:
        self.iter_num += 1

    def forward(self, x: Tensor) -> Tensor:
        span = self.hi - self.lo
        sigmoid = 1.0 / (1.0 + np.exp(-self.alpha * self.iter_num / self.max_iters))
        coeff = float(2.0 * span * sigmoid - span + self.lo)
        if self.auto_step:
            self.step()
        return ReverseLayerF.apply(x, coeff)


class OptionalCoefficient(nn.Module):
    """The Transfer-Learning-Library's plain layer: the coefficient is an argument with a default."""

    def forward(self, x: Tensor, coeff: float = 1.0) -> Tensor:
        return ReverseLayerF.apply(x, coeff)


class CountsInTheClass(nn.Module):
    """Every instance, and every evaluation, moves the coefficient of all."""

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        CountsInTheClass.steps += 1
        return ReverseLayerF.apply(x, min(1.0, CountsInTheClass.steps / 8))


class OldNumpy(nn.Module):
    """Fails in the forward: ``np.float`` was taken out of numpy."""

    def forward(self, x: Tensor) -> Tensor:
        return ReverseLayerF.apply(x, np.float(1.0))  # type: ignore[attr-defined]


# --- networks that call a Function in their own forward


class AlphaIsAnArgument(Network):
    def forward(self, x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.classifier(features), self.domain(ReverseLayerF.apply(features, alpha))


class AlphaIsAnAttribute(Network):
    def __init__(self) -> None:
        super().__init__()
        self.strength = 0.25

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.classifier(features), self.domain(ReverseLayerF.apply(features, self.strength))


class Detached(Network):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.classifier(features), self.domain(ReverseLayerF.apply(features.detach(), 1.0))


class Unused(Network):
    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        self.domain(ReverseLayerF.apply(features, 1.0))
        return self.classifier(features)


class ThenDetached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ReverseLayerF.apply(x, 1.0).detach()


class HookInForward(Network):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        reversed_features = features.clone()
        reversed_features.register_hook(lambda gradient: -0.5 * gradient)
        return self.classifier(features), self.domain(reversed_features)


class Twice(Network):
    """Reversed when it leaves the features and again when it enters the head."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        reversed_once = ReverseLayerF.apply(features, 1.0)
        return self.classifier(features), self.domain(TimesOne.apply(reversed_once, 1.0))


class OnLogits(Network):
    """A different head for each domain, each behind the same layer."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.features(x)
        return self.classifier(features), self.domain(self.reversal(features)), self.reversal(features)


def frozen() -> nn.Module:
    network = Network(Layer())
    network.features.requires_grad_(False)
    return network


def hooked_features() -> nn.Module:
    """A full backward hook on the features: the classifier's gradient is reversed as well."""
    network = Network()
    network.features.register_full_backward_hook(lambda module, left, entered: (-2.0 * left[0],))
    return network


def hooked() -> nn.Module:
    """A full backward hook on a layer that does nothing."""
    network = Network()
    network.reversal.register_full_backward_hook(lambda module, left, entered: (-left[0],))
    return network


# --- the collection


@dataclass(frozen=True)
class Variant:
    """A network, and what is true of it.

    Args:
        make: Makes it.
        verdicts: Due, in the order of the forward.
        factor: Of the first finding, by calculus.
        inputs: Arguments of forward.
        coeff_from: What sets the coefficient.
        adopted: Whether a GradientReversal can stand in its place.
    """

    make: Callable[[], nn.Module]
    verdicts: tuple[str, ...]
    factor: Any = None
    inputs: Any = field(default_factory=lambda: (IMAGES,))
    coeff_from: str | None = None
    adopted: bool = False


def layer(make: Callable[[], nn.Module], *verdicts: str, **truth: Any) -> Variant:
    return Variant(lambda: Network(make()), verdicts, **truth)


def right(make: Callable[[], nn.Module], factor: Any, coeff_from: str | None = None, **truth: Any) -> Variant:
    return layer(make, "reverses", factor=factor, coeff_from=coeff_from, **{"adopted": True, **truth})


VARIANTS: dict[str, Variant] = {
    # right in eager mode
    "function in a layer": right(lambda: Layer(ReverseLayerF, 0.5), -0.5, "reversal.alpha"),
    "forward returns its input": right(lambda: Bare(ReturnsItsInput), -1.0),
    "forward times one": right(lambda: Layer(TimesOne, 0.3), -0.3, "reversal.alpha"),
    "coefficient a plain tensor": right(
        lambda: Layer(SavedTensor, torch.tensor(0.25)), -0.25, "reversal.alpha"
    ),
    "coefficient a buffer": right(lambda: InBuffer(0.75), -0.75, "reversal.weight"),
    "coefficient a parameter": right(lambda: InParameter(0.75), -0.75, "reversal.weight"),
    "setup_context": right(lambda: Layer(WithContext, 2.0), -2.0, "reversal.alpha"),
    "hook on a tensor": right(lambda: ByHook(0.5), -0.5, "reversal.coeff"),
    "full backward hook": Variant(hooked, ("reverses",), -1.0, adopted=True),
    "full backward hook on a layer that does something": Variant(hooked_features, ("reverses",), -2.0),
    "hook in a forward": Variant(HookInForward, ("reverses",), -0.5),
    "arithmetic": right(lambda: ByArithmetic(0.5), -0.5, "reversal.coeff"),
    "optional coefficient": right(OptionalCoefficient, -1.0),
    "warm start": right(lambda: WarmStart(lo=0.1), -0.1),
    "warm start from zero": right(WarmStart, 0.0),
    "warm start by hand": layer(
        lambda: WarmStart(auto_step=False), "factor 0", factor=0.0, coeff_from="reversal.lo", adopted=True
    ),
    "argument of forward": Variant(
        AlphaIsAnArgument, ("reverses",), -0.5, (IMAGES, 0.5), "argument 1 of forward", adopted=True
    ),
    "attribute of the network": Variant(
        AlphaIsAnAttribute, ("reverses",), -0.25, coeff_from="strength", adopted=True
    ),
    "two calls of one layer": Variant(
        lambda: OnLogits(Layer(ReverseLayerF, 0.5)),
        ("reverses",),
        -0.5,
        coeff_from="reversal.alpha",
        adopted=True,
    ),
    "only in training": right(OnlyInTraining, -1.0, adopted=False),
    # right, with a remark
    "coefficient never passed": right(NeverPassed, -1.0),
    "coefficient of a class": right(
        lambda: Bare(CoefficientOfTheClass), -0.7, "CoefficientOfTheClass.strength"
    ),
    "counter of a class": right(CountsInTheClass, None, adopted=False),
    "one coefficient for each sample": right(
        lambda: Layer(OneForEachSample, torch.tensor([0.1, 0.2, 0.3, 0.4])),
        (-0.1, -0.2, -0.3, -0.4),
        adopted=False,
    ),
    # wrong
    "backward of a module": layer(GradientReversal, "backward never called", factor=1.0),
    "np.float in the forward": layer(OldNumpy, "fails"),
    "np.float in the backward": layer(lambda: Layer(FloatOfNumpy, 0.5), "fails"),
    "lambda is -10": layer(
        lambda: Layer(ReverseLayerF, -10.0), "un-reverses", factor=10.0, coeff_from="reversal.alpha"
    ),
    "sign forgotten": layer(
        lambda: Layer(ForgetsTheSign, 1.0), "factor +1", factor=1.0, coeff_from="reversal.alpha"
    ),
    "coefficient 0": layer(
        lambda: Layer(ReverseLayerF, 0.0), "factor 0", factor=0.0, coeff_from="reversal.alpha", adopted=True
    ),
    "gradient clipped": layer(lambda: Bare(ClipsTheGradient), "no multiple"),
    "input detached": Variant(Detached, ("detached",)),
    "output detached": layer(ThenDetached, "detached", factor=0.0),
    "logits not returned": Variant(Unused, ("unused",), -1.0, adopted=True),
    "softmax over one unit": Variant(
        lambda: Network(Layer(), nn.Sequential(nn.Linear(8, 1), nn.Softmax(dim=1))),
        ("no gradient",),
        -0.5,
        coeff_from="reversal.alpha",
        adopted=True,
    ),
    "features frozen": Variant(frozen, ("all frozen",), -0.5, coeff_from="reversal.alpha", adopted=True),
    "reversed twice": Variant(Twice, ("reversed twice", "reverses"), -1.0, adopted=True),
    "in-place operation behind it": Variant(
        lambda: nn.Sequential(nn.Linear(6, 8), Layer(), nn.ReLU(inplace=True), nn.Linear(8, 2)),
        ("fails",),
        -0.5,
        coeff_from="1.alpha",
        adopted=True,
    ),
    "in-place operation on what another branch reads": Variant(
        lambda: Network(Layer(), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 2))),
        ("fails",),
        -0.5,
        coeff_from="reversal.alpha",
    ),
}
