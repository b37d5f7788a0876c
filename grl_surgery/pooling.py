"""What the axes of a feature mean, and how a feature of any layout becomes one vector per sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

from torch import Tensor, fx, nn

from grl_surgery.errors import ShapeError, SurgeryError

__all__ = ["FeaturePool", "Layout", "LayoutName", "Pool", "check_tensor", "infer_layout"]

LayoutName: TypeAlias = Literal["nc", "nlc", "ncl", "nchw", "nhwc", "ncthw", "nthwc"]
"""Axes in order: n batch, c channels, h and w the image, t time, l tokens or the positions of a sequence."""

Pool: TypeAlias = Literal["auto", "none", "class_token", "nc", "nlc", "ncl", "nchw", "nhwc", "ncthw", "nthwc"]
"""How to pool: a layout is averaged over its positions, ``auto`` infers the layout, ``class_token`` takes the
first token of ``nlc``, ``none`` leaves the feature alone."""

Reduction: TypeAlias = Literal["mean", "class_token", "none"]

_BY_RANK: dict[int, tuple[LayoutName, ...]] = {
    2: ("nc",),
    3: ("nlc", "ncl"),
    4: ("nchw", "nhwc"),
    5: ("ncthw", "nthwc"),
}


_ONE_TENSOR = "a point whose value is one tensor, or one item of it: after='encoder[0]'"


def check_tensor(value: object, owner: str, *, example: str = _ONE_TENSOR) -> bool:
    """Whether ``value`` is a tensor whose shape can be read now: False while torch.fx traces.

    Args:
        value: What was given.
        owner: The function or module that got it.
        example: A call that works, where the value is not one at a point of a network.

    Raises:
        ShapeError: It is something else altogether.
    """
    if isinstance(value, fx.Proxy):  # its shape is unknown until the traced graph runs
        return False
    if not isinstance(value, Tensor):
        raise ShapeError(f"{owner} works on a tensor, got {type(value).__name__}", example=example)
    return True


@dataclass(frozen=True)
class Layout:
    """What the axes of a feature mean.

    Args:
        name: The axes in order, such as ``"nchw"``.
        channels: Size of the channel axis.
        assumption: What was assumed where the shape alone does not decide; empty where it does.
    """

    name: LayoutName
    channels: int
    assumption: str = ""

    @property
    def ambiguous(self) -> bool:
        """Whether another reading of the same shape is possible."""
        return bool(self.assumption)

    def __str__(self) -> str:
        axes = f"({', '.join(self.name.upper())}) with C={self.channels}"
        return f"{axes}; {self.assumption}" if self.assumption else axes


def infer_layout(shape: Sequence[int], num_features: int | None = None) -> Layout:
    """Say what the axes of a feature of this shape mean, and what had to be assumed for it.

    Two axes are a vector per sample. Otherwise the axis whose size is ``num_features`` holds the channels, if
    only one has it. Failing that, three axes are taken for tokens (B, N, C), and four or five for
    channels-first, unless only the channels-last reading makes the image square. The result says so where
    another reading remains possible.

    Example:
        >>> infer_layout((8, 7, 7, 768), num_features=768)
        Layout(name='nhwc', channels=768, assumption='')
        >>> print(infer_layout((8, 56, 56, 96)))
        (N, H, W, C) with C=96; assumed nhwc, whose image is square; pool='nchw' would read C=56

    Args:
        shape: Shape of the feature, the batch first.
        num_features: Width of the network's last feature, where known (``model.num_features`` in timm).

    Raises:
        ShapeError: The shape has fewer than two or more than five axes, or one of size zero.
    """
    sizes = _check_shape(shape)
    candidates = _BY_RANK[len(sizes)]
    if len(candidates) == 1:
        return Layout(candidates[0], sizes[1])
    exact = [name for name in candidates if sizes[name.index("c")] == num_features]
    if len(exact) == 1:
        return Layout(exact[0], sizes[exact[0].index("c")])
    square = [name for name in candidates if _is_square(name, sizes)]
    chosen = square[0] if len(square) == 1 else candidates[0]
    certain = square == [candidates[0]]
    return Layout(
        chosen, sizes[chosen.index("c")], "" if certain else _assumption(chosen, sizes, bool(square))
    )


def _assumption(chosen: LayoutName, sizes: tuple[int, ...], by_square: bool) -> str:
    other = next(name for name in _BY_RANK[len(sizes)] if name != chosen)
    reason = ", whose image is square" if by_square and _is_square(chosen, sizes) else ""
    return f"assumed {chosen}{reason}; pool={other!r} would read C={sizes[other.index('c')]}"


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape)
    if len(sizes) not in _BY_RANK:
        raise ShapeError(
            f"a feature of shape {sizes} has {len(sizes)} axes: a head can be sized for 2 to 5 of them",
            example="after='global_pool', whose value is (B, C); or pool='none' with a module of your own",
        )
    if 0 in sizes:
        raise ShapeError(
            f"a feature of shape {sizes} has no elements, so there is nothing to pool or to classify",
            example="infer_layout((8, 512, 7, 7))",
        )
    return sizes


def _is_square(name: LayoutName, sizes: tuple[int, ...]) -> bool:
    return "h" in name and sizes[name.index("h")] == sizes[name.index("w")]


class FeaturePool(nn.Module):
    """One vector per sample out of a feature of the given layout: (B, ..., C, ...) to (B, C).

    Example:
        >>> import torch
        >>> FeaturePool("nhwc")(torch.ones(2, 7, 7, 96)).shape
        torch.Size([2, 96])
        >>> FeaturePool("nlc", reduction="class_token")(torch.ones(2, 197, 192)).shape
        torch.Size([2, 192])

    Args:
        layout: What the axes mean; :func:`infer_layout` finds it.
        reduction: ``"mean"`` over all positions, ``"class_token"`` the first token, or ``"none"``, which only
            moves the channels to axis 1: (B, H, W, C) to (B, C, H, W).
        num_prefix_tokens: Leading tokens that the mean leaves out (``model.num_prefix_tokens`` in timm: a
            class token and registers, where the feature has them). Tokens only.

    Raises:
        SurgeryError: These settings do not go together.
    """

    def __init__(
        self, layout: LayoutName, *, reduction: Reduction = "mean", num_prefix_tokens: int = 0
    ) -> None:
        super().__init__()
        _check_choice("layout", layout, get_args(LayoutName))
        _check_choice("reduction", reduction, get_args(Reduction))
        if layout != "nlc" and (reduction == "class_token" or num_prefix_tokens):
            raise SurgeryError(
                f"only tokens (B, N, C) have a class token or prefix tokens, not the layout {layout!r}",
                choices=["nlc"],
                example="FeaturePool('nlc', reduction='class_token')",
            )
        if num_prefix_tokens < 0 or (num_prefix_tokens and reduction != "mean"):
            raise SurgeryError(
                f"num_prefix_tokens={num_prefix_tokens} does not go with reduction={reduction!r}: it is the "
                "number of leading tokens that a mean leaves out",
                example="FeaturePool('nlc', num_prefix_tokens=1)",
            )
        self.layout = layout
        self.reduction = reduction
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, features: Tensor) -> Tensor:
        """Pool ``features``.

        Args:
            features: As the layout says, for instance (B, C, H, W), floating point.

        Returns:
            (B, C) in the same dtype; with ``reduction="none"`` the positions are still there.

        Raises:
            ShapeError: Not a tensor of this layout, or nothing to average over.
        """
        if check_tensor(features, "FeaturePool"):
            self._check_shape(features)
        if self.reduction == "class_token":
            return features[:, 0]
        if self.reduction == "none":
            return features.movedim(self.layout.index("c"), 1)
        positions = [axis for axis, letter in enumerate(self.layout) if letter not in "nc"]
        if self.num_prefix_tokens:
            features = features[:, self.num_prefix_tokens :]
        return features.mean(dim=positions) if positions else features

    def _check_shape(self, features: Tensor) -> None:
        shape = tuple(features.shape)
        if len(shape) != len(self.layout):
            raise ShapeError(
                f"pooling ({', '.join(self.layout.upper())}) got a feature of shape {shape}",
                choices=_BY_RANK.get(len(shape), ()),
                example=f"FeaturePool({_BY_RANK.get(len(shape), ('nchw',))[0]!r})",
            )
        if 0 in shape[1:]:
            raise ShapeError(
                f"a feature of shape {shape} has no elements to pool", example="torch.ones(2, 512, 7, 7)"
            )
        if self.num_prefix_tokens >= shape[1] and self.num_prefix_tokens:
            raise ShapeError(
                f"num_prefix_tokens={self.num_prefix_tokens} leaves none of the {shape[1]} tokens of {shape}",
                example="FeaturePool('nlc', num_prefix_tokens=1)",
            )

    def extra_repr(self) -> str:
        """The settings, as they were given."""
        prefix = f", num_prefix_tokens={self.num_prefix_tokens}" if self.num_prefix_tokens else ""
        return f"{self.layout!r}, reduction={self.reduction!r}{prefix}"


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SurgeryError(
            f"{name}={value!r} is not known", choices=list(choices), example=f"{name}={choices[0]!r}"
        )


def choose_layout(shape: Sequence[int], pool: Pool = "auto", num_features: int | None = None) -> Layout:
    """The layout of a feature of this shape as ``pool`` reads it, or as :func:`infer_layout` does.

    Raises:
        ShapeError: ``pool`` cannot be the layout of this shape.
    """
    _check_choice("pool", pool, get_args(Pool))
    if pool in ("auto", "none"):
        return infer_layout(shape, num_features)
    sizes = _check_shape(shape)
    name = "nlc" if pool == "class_token" else cast(LayoutName, pool)
    if len(name) != len(sizes):
        raise ShapeError(
            f"pool={pool!r} needs a feature with {len(name)} axes ({', '.join(name.upper())}), got {sizes}",
            choices=["auto", *_BY_RANK[len(sizes)]],
            example=f"pool={_BY_RANK[len(sizes)][0]!r}",
        )
    return Layout(name, sizes[name.index("c")])
