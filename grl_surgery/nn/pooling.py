"""Pools: layers that turn a feature of a given layout into one vector for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, fx, nn

from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.nn.axis_roles import AxisRoles
from grl_surgery.validation import check_count

__all__ = ["FeaturePool", "Layout", "LayoutName", "Pool", "check_tensor", "infer_layout"]

LayoutName: TypeAlias = Literal["nc", "nlc", "ncl", "lnc", "nchw", "nhwc", "ncthw", "nthwc", "ncdhw", "ndhwc"]
"""Axes in order: n batch, c channels, h and w the image, d depth, t time, l tokens or the positions of a
sequence; in ``lnc`` the layers of a recurrent network's hidden state as well."""

Pool: TypeAlias = (
    Literal["auto", "none", "class_token", "mean", "max", "attention", "statistics", "last"] | LayoutName
)
"""How to pool: a layout is averaged over its positions; ``auto`` and ``mean`` read the layout off the network
and average; ``max``, ``attention``, ``statistics``, ``class_token`` and ``last`` reduce otherwise, see
:class:`FeaturePool`; ``none`` leaves the feature alone."""

Reduction: TypeAlias = Literal["mean", "max", "attention", "statistics", "class_token", "last", "none"]
Masked: TypeAlias = Literal["valid", "padding"] | None

_BY_RANK: dict[int, tuple[LayoutName, ...]] = {
    2: ("nc",),
    3: ("nlc", "ncl", "lnc"),
    4: ("nchw", "nhwc"),
    5: ("ncthw", "nthwc", "ncdhw", "ndhwc"),
}
_GUESSED: dict[int, tuple[LayoutName, ...]] = {
    **_BY_RANK,
    3: ("nlc", "ncl"),
    5: ("ncthw", "nthwc"),
}
"""What a shape alone may be taken for."""

_POSITIONS = ("", "l", "hw", "dhw", "thw")


def is_layout(name: str) -> bool:
    """Whether the letters are those of a layout: n and c once each, and the positions in order.

    Example:
        >>> is_layout("lnc"), is_layout("hwnc"), is_layout("nwhc")
        (True, True, False)
    """
    rest = name.replace("n", "", 1).replace("c", "", 1)
    return len(name) == len(rest) + 2 and rest in _POSITIONS


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
    candidates = _GUESSED[len(sizes)]
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
    other = next(name for name in _GUESSED[len(sizes)] if name != chosen)
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

    A ``masked`` pool is called with a second value that says which positions count. The other positions
    affect neither the result nor a gradient.

    Example:
        >>> import torch
        >>> FeaturePool("nhwc")(torch.ones(2, 7, 7, 96)).shape
        torch.Size([2, 96])
        >>> FeaturePool("nlc", reduction="class_token")(torch.ones(2, 197, 192)).shape
        torch.Size([2, 192])
        >>> pool = FeaturePool("lnc", reduction="max", masked="valid")
        >>> pool(torch.ones(9, 2, 64), torch.tensor([9, 4])).shape
        torch.Size([2, 64])

    Args:
        layout: What the axes mean; :func:`infer_layout` finds it.
        reduction: ``"mean"`` or ``"max"`` over all positions; ``"statistics"`` the mean and the standard
            deviation, (B, 2 C), as the x-vectors of Snyder et al. (ICASSP 2018) do; ``"attention"`` a mean
            whose weights are learned, softmax over positions of a linear score (self-attentive pooling,
            Safari et al., Interspeech 2020, eq. 3); ``"class_token"`` the first token; ``"last"`` the last
            one, the last that counts where it is masked; or ``"none"``, which only moves the batch to axis 0
            and the channels to axis 1: (B, H, W, C) to (B, C, H, W).
        num_prefix_tokens: Leading tokens that the mean leaves out (``model.num_prefix_tokens`` in timm: a
            class token and registers, where the feature has them). Tokens only.
        channels: Size C, which ``"attention"`` needs for its weights.
        masked: ``"valid"``: the second value is a mask (B, L), nonzero where a position counts, or lengths
            (B,); ``"padding"``: a mask (B, L) that is nonzero where it does not, as torch's
            ``key_padding_mask``. A mask of another length than the feature's, as before strided convolutions,
            is read at the same relative place.

    Raises:
        SurgeryError: These settings do not go together.
    """

    def __init__(
        self,
        layout: LayoutName,
        *,
        reduction: Reduction = "mean",
        num_prefix_tokens: int = 0,
        channels: int | None = None,
        masked: Masked = None,
    ) -> None:
        super().__init__()
        if not isinstance(layout, str) or not is_layout(layout):
            _check_choice("layout", layout, get_args(LayoutName))
        _check_choice("reduction", reduction, get_args(Reduction))
        tokens = layout in ("nlc", "lnc")
        if not tokens and (reduction == "class_token" or num_prefix_tokens):
            raise SurgeryError(
                f"only tokens (B, N, C) have a class token or prefix tokens, not the layout {layout!r}",
                choices=["nlc", "lnc"],
                example="FeaturePool('nlc', reduction='class_token')",
            )
        if reduction == "last" and "l" not in layout:
            raise SurgeryError(
                f"only a sequence has a last position, not the layout {layout!r}",
                choices=["nlc", "ncl", "lnc"],
                example="FeaturePool('nlc', reduction='last')",
            )
        if num_prefix_tokens < 0 or (num_prefix_tokens and reduction != "mean"):
            raise SurgeryError(
                f"num_prefix_tokens={num_prefix_tokens} does not go with reduction={reduction!r}: it is the "
                "number of leading tokens that a mean leaves out",
                example="FeaturePool('nlc', num_prefix_tokens=1)",
            )
        if masked not in (None, "valid", "padding"):
            _check_choice("masked", masked, ("valid", "padding"))
        if masked and ("l" not in layout or reduction in ("class_token", "none")):
            raise SurgeryError(
                f"reduction={reduction!r} of {layout!r} reads no positions of a sequence, which a mask tells "
                "apart",
                example="FeaturePool('nlc', reduction='mean', masked='valid')",
            )
        self.layout = layout
        self.reduction = reduction
        self.num_prefix_tokens = num_prefix_tokens
        self.channels = channels
        self.masked = masked
        if reduction == "attention":
            example = "FeaturePool('nlc', reduction='attention', channels=768)"
            self.score = nn.Linear(check_count("channels", channels, example=example), 1)

    def width(self, channels: int) -> int:
        """Size of the vectors that it makes of features with this many channels."""
        return 2 * channels if self.reduction == "statistics" else channels

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool ``features``.

        Args:
            features: As the layout says, for instance (B, C, H, W), floating point.
            mask: Where it is masked: (B, L), or lengths (B,).

        Returns:
            (B, C) in the same dtype, (B, 2 C) of statistics; with ``reduction="none"`` the positions are
            still there.

        Raises:
            ShapeError: Not a tensor of this layout, nothing to average over, or a mask that does not fit.
            SurgeryError: A mask is missing, or not wanted.
        """
        if check_tensor(features, "FeaturePool"):
            self._check_shape(features)
        if (mask is None) == bool(self.masked):
            raise SurgeryError(
                f"a pool with masked={self.masked!r} got {'no mask' if mask is None else 'a mask'}",
                example="FeaturePool('nlc', masked='valid')(features, mask)",
            )
        return self.pooled(features, None if mask is None else self._counts(features, mask))

    def unmasked(self, features: Tensor, counts: Tensor | None = None) -> Tensor:
        """Pool without a mask, as the layout says; where padding can be left out, by ``counts`` (B, L)."""
        if check_tensor(features, "FeaturePool"):
            self._check_shape(features)
        takes_counts = "l" in self.layout and self.reduction not in ("class_token", "none")
        return self.pooled(features, counts if takes_counts else None)

    def pooled(self, features: Tensor, counts: Tensor | None) -> Tensor:
        """Pool where only the positions count whose entry in (B, L) is not zero; None for all of them."""
        if self.reduction == "none":
            return _channels_first(features, self.layout)
        if self.reduction == "class_token":
            return features.select(self.layout.index("l"), 0)
        if counts is None and self.reduction == "last":
            return features.select(self.layout.index("l"), -1)
        axes = [axis for axis, letter in enumerate(self.layout) if letter not in "nc"]
        if self.num_prefix_tokens:
            (axis,) = axes
            start = self.num_prefix_tokens
            features = features.narrow(axis, start, features.shape[axis] - start)
        if not axes:
            return (
                torch.cat([features, torch.zeros_like(features)], 1)
                if self.reduction == "statistics"
                else features
            )
        if counts is None and self.reduction == "mean":
            return features.mean(dim=axes)
        if counts is None and self.reduction == "max":
            return features.amax(dim=axes)
        values = _channels_first(features, self.layout).flatten(2)
        return self._weighted(values, counts if counts is None else self._without_prefix(counts))

    def _counts(self, features: Tensor, mask: Tensor) -> Tensor:
        """(B, L), 1 where a position of the feature counts and 0 elsewhere."""
        batch, length = (features.shape[self.layout.index(letter)] for letter in "nl")
        places = torch.arange(length, device=features.device)
        if mask.dim() == 1 and mask.shape[0] == batch and mask.dtype != torch.bool:
            return (places < mask.to(features.device)[:, None]).to(features.dtype)
        if mask.dim() > 2 and mask.numel() == mask.shape[0] * mask.shape[-1]:
            mask = mask.reshape(mask.shape[0], -1)  # (B, 1, 1, L), as attention layers broadcast it
        if tuple(mask.shape) == (length, batch) and length != batch:
            mask = mask.t()
        if mask.dim() != 2 or mask.shape[0] != batch:
            raise ShapeError(
                f"a mask of shape {tuple(mask.shape)} for {batch} sequences of length {length}: expected "
                f"({batch}, {length}), or lengths ({batch},)",
                example="FeaturePool('nlc', masked='valid')(features, ids != 0)",
            )
        counts = (mask != 0).to(features.device)
        if self.masked == "padding":
            counts = ~counts
        if counts.shape[1] != length:
            counts = counts[:, places * counts.shape[1] // length]
        return counts.to(features.dtype)

    def _without_prefix(self, counts: Tensor) -> Tensor:
        return counts[:, self.num_prefix_tokens :]

    def _weighted(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """Reduce (B, C, L) by weights (B, L) of ones and zeros."""
        if weights is not None:  # what padding holds may be anything, nan as well
            values = values.masked_fill(weights[:, None] == 0, 0.0)
        if self.reduction == "last":
            assert weights is not None
            places = torch.arange(values.shape[2], device=values.device)
            last = (places * weights.long()).amax(1)
            return values.gather(2, last[:, None, None].expand(-1, values.shape[1], 1)).squeeze(2)
        if self.reduction == "max":
            assert weights is not None
            lowest = torch.finfo(values.dtype).min
            return values.masked_fill(weights[:, None] == 0, lowest).amax(2)
        if self.reduction == "attention":
            scores: Tensor = self.score(values.transpose(1, 2)).squeeze(2)
            if weights is not None:
                scores = scores.masked_fill(weights == 0, torch.finfo(scores.dtype).min)
            return (values * scores.softmax(1).to(values.dtype)[:, None]).sum(2)
        if weights is None:
            mean, variance = values.mean(2), values.var(2, correction=0)
        else:
            share = (weights / weights.sum(1, keepdim=True).clamp_min(1.0))[:, None]
            mean = (values * share).sum(2)
            if self.reduction == "mean":
                return mean
            variance = ((values - mean[:, :, None]).square() * share).sum(2)
        # The root of zero has an infinite slope: a channel that is constant would send nan back.
        return torch.cat([mean, variance.clamp_min(_LEAST_VARIANCE).sqrt()], 1)

    def _check_shape(self, features: Tensor) -> None:
        shape = tuple(features.shape)
        if len(shape) != len(self.layout):
            raise ShapeError(
                f"pooling ({', '.join(self.layout.upper())}) got a feature of shape {shape}",
                choices=_BY_RANK.get(len(shape), ()),
                example=f"FeaturePool({_BY_RANK.get(len(shape), ('nchw',))[0]!r})",
            )
        if 0 in [size for size, letter in zip(shape, self.layout, strict=True) if letter != "n"]:
            raise ShapeError(
                f"a feature of shape {shape} has no elements to pool", example="torch.ones(2, 512, 7, 7)"
            )
        tokens = shape[self.layout.index("l")] if self.num_prefix_tokens else 0
        if self.num_prefix_tokens >= tokens and self.num_prefix_tokens:
            raise ShapeError(
                f"num_prefix_tokens={self.num_prefix_tokens} leaves none of the {tokens} tokens of {shape}",
                example="FeaturePool('nlc', num_prefix_tokens=1)",
            )

    def extra_repr(self) -> str:
        """The settings, as they were given."""
        prefix = f", num_prefix_tokens={self.num_prefix_tokens}" if self.num_prefix_tokens else ""
        channels = f", channels={self.channels}" if self.channels else ""
        masked = f", masked={self.masked!r}" if self.masked else ""
        return f"{self.layout!r}, reduction={self.reduction!r}{prefix}{channels}{masked}"


_LEAST_VARIANCE = 1e-6


def _channels_first(features: Tensor, layout: str) -> Tensor:
    """(B, C, positions) of a feature of any layout."""
    return features.movedim((layout.index("n"), layout.index("c")), (0, 1))


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SurgeryError(
            f"{name}={value!r} is not known", choices=list(choices), example=f"{name}={choices[0]!r}"
        )


def choose_layout(
    shape: Sequence[int],
    pool: Pool = "auto",
    num_features: int | None = None,
    axes: AxisRoles | None = None,
) -> Layout:
    """The layout of a feature of this shape as ``pool`` or the network says, or as :func:`infer_layout` does.

    Example:
        >>> from grl_surgery.nn.axis_roles import AxisRoles
        >>> choose_layout((7, 4, 64), axes=AxisRoles("pnc", 4, (7, 5, 64)))
        Layout(name='lnc', channels=64, assumption='')

    Args:
        shape: Shape of the feature.
        pool: How it is to be pooled; a layout among these is taken at its word.
        num_features: Width of the network's last feature, where known.
        axes: What the network says of the axes.

    Raises:
        ShapeError: ``pool`` cannot be the layout of this shape, or no axis is the batch.
    """
    _check_choice("pool", pool, get_args(get_args(Pool)[0]) + get_args(LayoutName))
    sizes = _check_shape(shape)
    if pool in get_args(LayoutName) or pool == "class_token":
        name = "nlc" if pool == "class_token" else cast(LayoutName, pool)
        if pool == "class_token" and axes is not None and axes.letters.find("n") == 1:
            name = "lnc"
        if len(name) != len(sizes):
            raise ShapeError(
                f"pool={pool!r} needs a feature with {len(name)} axes ({', '.join(name.upper())}), "
                f"got {sizes}",
                choices=["auto", *_BY_RANK[len(sizes)]],
                example=f"pool={_BY_RANK[len(sizes)][0]!r}",
            )
        _check_batch(name, sizes, axes)
        return Layout(name, sizes[name.index("c")])
    if axes is None:
        return infer_layout(sizes, num_features)
    return _read_layout(sizes, axes, num_features)


def _read_layout(sizes: tuple[int, ...], axes: AxisRoles, num_features: int | None) -> Layout:
    """The layout whose axes the network named, what it left open as the shape suggests."""
    letters = axes.letters
    if axes.grown is not None and "n" not in letters:
        raise _not_the_batch(sizes, axes)
    rest = "".join(letter for letter in letters if letter in "p?")
    if "n" in letters and "c" in letters:
        return _named(letters, sizes)
    if "n" in letters and len(rest) == len(letters) - 1:
        batch = letters.index("n")
        inferred = infer_layout((sizes[batch], *sizes[:batch], *sizes[batch + 1 :]), num_features)
        order = [letter for letter in inferred.name if letter != "n"]
        found = "".join([*order[:batch], "n", *order[batch:]])
        if is_layout(found):
            return Layout(cast(LayoutName, found), inferred.channels, inferred.assumption)
    return infer_layout(sizes, num_features)


def _named(letters: str, sizes: tuple[int, ...]) -> Layout:
    """The layout of which the batch and the channels are known; the others are positions in order."""
    places = iter({0: "", 1: "l", 2: "hw", 3: "dhw"}[len(letters) - 2])
    name = "".join(letter if letter in "nc" else next(places) for letter in letters)
    return Layout(cast(LayoutName, name), sizes[letters.index("c")])


def _check_batch(name: str, sizes: tuple[int, ...], axes: AxisRoles | None) -> None:
    """Refuse a layout whose batch is another axis than the one that was seen to grow with the batch."""
    if axes is None or axes.grown is None or axes.batch is None:
        return
    grows = [axis for axis, (a, b) in enumerate(zip(sizes, axes.grown, strict=True)) if a != b]
    if len(grows) != 1 or axes.letters[grows[0]] != "n" or grows[0] == name.index("n"):
        return
    right = [known for known in _BY_RANK[len(sizes)] if known.index("n") == grows[0]]
    raise ShapeError(
        f"pool={name!r} reads axis {name.index('n')} of {sizes} as the batch, but axis {grows[0]} grows with "
        "the batch of the example inputs",
        choices=right,
        example=f"pool={right[0]!r}" if right else "pool='auto'",
    )


def _not_the_batch(sizes: tuple[int, ...], axes: AxisRoles) -> ShapeError:
    grown = axes.grown
    assert grown is not None
    if grown == sizes:
        found = "does not change with the size of the batch, so it has no row for each sample"
    else:
        found = f"becomes {grown} with one more sample in the batch of {axes.batch}: its rows are not samples"
    name = _BY_RANK[len(sizes)][0]
    return ShapeError(
        f"the value of shape {sizes} {found}",
        example=f"pool={name!r}, if each row is to be classified by itself and gets a label of its own",
    )
