"""Gradient reversal as people paste it into their models: what this library has to be better than."""

from typing import Any

import torch
from torch import Tensor


class FloatCoeff(torch.autograd.Function):
    """The form of every tutorial: the coefficient is a number, the forward a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coeff: float) -> Tensor:
        ctx.coeff = coeff
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return -ctx.coeff * grads[0], None


class TensorCoeff(torch.autograd.Function):
    """The careful form: the coefficient is a tensor, and function transforms are supported."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, coeff: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return -ctx.saved_tensors[0] * grads[0], None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return -ctx.saved_tensors[0] * tangents[0]


def float_coeff(x: Tensor) -> Tensor:
    return FloatCoeff.apply(x, 0.5)


def tensor_coeff(x: Tensor) -> Tensor:
    return TensorCoeff.apply(x, torch.full((), 0.5))
