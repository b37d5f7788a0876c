"""Reverses a gradient in plain execution: the rule, and the autograd functions around it."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

__all__ = [
    "PLAIN",
    "GradientRule",
    "TransformedReversal",
    "batch_first",
    "factor_of",
    "reversed_alias",
    "vmapped",
]


_AliasKind = Literal["detached", "view", "copied"]


@dataclass(frozen=True)
class GradientRule:
    """What becomes of a gradient: clipped, normalised, multiplied by minus the coefficient.

    Of the first `vmapped` dimensions each entry is normalised on its own.
    """

    clip: float | None = None
    normalize: bool = False
    vmapped: int = 0

    def __call__(self, grad: Tensor, factor: float | Tensor) -> Tensor:
        """Returns the gradient that leaves, for a factor of minus the coefficient."""
        limited = grad if self.clip is None else grad.clamp(-self.clip, self.clip)
        if self.normalize:
            wide = torch.promote_types(grad.dtype, torch.float32)
            dims = list(range(self.vmapped, grad.dim()))
            norm = (
                torch.linalg.vector_norm(limited.to(wide), dim=dims, keepdim=True) if dims else limited.abs()
            )
            limited = (limited / norm.clamp_min(torch.finfo(wide).tiny)).to(grad.dtype)
        # One coefficient per sample promotes a gradient of half precision; a 0-d tensor or a number does not.
        scaled = limited * factor
        return scaled if scaled.dtype == grad.dtype else scaled.to(grad.dtype)


PLAIN = GradientRule()


def reversed_alias(x: Tensor, coeff: float | Tensor, rule: GradientRule) -> Tensor:
    """Returns `x` over the same memory; what flows back through it goes by the rule."""
    function: Any = TransformedReversal if _are_functorch_transforms_active() else _Reversal
    return cast(Tensor, function.apply(x, coeff, _alias_kind(x), rule))


class _Reversal(torch.autograd.Function):
    """The gradient rule, and a forward that copies nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, coeff: float | Tensor, alias_kind: _AliasKind, rule: GradientRule
    ) -> Tensor:
        # Negated now, so that a new value in the buffer neither changes nor invalidates a backward to come.
        ctx.factor = -coeff
        ctx.rule = rule
        return x.detach() if alias_kind == "detached" else _alias(x, alias_kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.rule(grad, ctx.factor), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return cast(Tensor, ctx.rule(tangents[0], ctx.factor))


class TransformedReversal(torch.autograd.Function):
    """The same for `torch.func` transforms, which ask for this form; it takes five times as long to call."""

    @staticmethod
    def forward(x: Tensor, coeff: float | Tensor, alias_kind: _AliasKind, rule: GradientRule) -> Tensor:
        """Returns an alias of `x`, of the given kind."""
        return _alias(x, alias_kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the rule and minus the coefficient."""
        factor, ctx.rule = -inputs[1], inputs[-1]
        if isinstance(factor, Tensor):
            ctx.save_for_backward(factor)
            ctx.save_for_forward(factor)
        else:
            ctx.factor = factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradient of `x`, and none for the rest."""
        return ctx.rule(grads[0], factor_of(ctx)), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        """Returns the tangent, by the same rule."""
        return cast(Tensor, ctx.rule(tangents[0], factor_of(ctx)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Reverses each of a batch, which is the first dimension of the output."""
        x, coeff = batch_first(info.batch_size, in_dims, *inputs[:2])
        return cast(Tensor, TransformedReversal.apply(x, coeff, inputs[2], vmapped(inputs[3]))), 0


def _alias(x: Tensor, kind: _AliasKind) -> Tensor:
    # Autograd does not take a detached alias for a view, so that an in-place operation may follow. Where that
    # would overwrite a leaf behind its back, it gets the view, and refuses the operation.
    if kind == "detached":
        return x.detach()
    return x.view_as(x) if kind == "view" else x.clone()


def factor_of(ctx: Any) -> float | Tensor:
    """Returns minus the coefficient of the forward."""
    saved = ctx.saved_tensors  # Read once: a checkpointed forward gives them out only once.
    return cast(float | Tensor, saved[0] if saved else ctx.factor)


def vmapped(rule: GradientRule) -> GradientRule:
    """Returns the rule for one dimension more in front."""
    return GradientRule(rule.clip, rule.normalize, rule.vmapped + 1) if rule.normalize else rule


def batch_first(
    batch_size: int, in_dims: tuple[int | None, ...], x: Tensor, coeff: float | Tensor
) -> tuple[Tensor, float | Tensor]:
    """Returns both with the vmapped dimension first, still broadcastable against each other."""
    x_dim, coeff_dim = in_dims[:2]
    # Each of the batch has memory of its own, which an operation behind the reversal may overwrite.
    x = x.expand(batch_size, *x.shape).contiguous() if x_dim is None else x.movedim(x_dim, 0)
    if isinstance(coeff, Tensor) and coeff_dim is not None:
        coeff = coeff.movedim(coeff_dim, 0)
        coeff = coeff.reshape(batch_size, *[1] * (x.dim() - coeff.dim()), *coeff.shape[1:])
    return x, coeff


def _alias_kind(x: Tensor) -> _AliasKind:
    """Returns how the output may share the memory of `x` with no in-place operation going unnoticed."""
    base = x if x._base is None else x._base
    if not (base.is_leaf and base.requires_grad and torch.is_grad_enabled()):
        return "detached"
    # What a transform wraps forgets that it is a view, and in forward mode a view needs a view for a tangent.
    if _are_functorch_transforms_active() or _has_tangent(x):
        return "copied"
    return "view"


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
