"""Domain heads: what turns a feature into one logit per domain, behind a reversal.

Every classifier here returns logits, never probabilities: a sigmoid or a softmax at its end, followed by a
loss that applies another, trains badly, and a softmax over one logit trains nothing.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from numbers import Real
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, fx, nn

from grl_surgery.arguments import check_count, check_network
from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.feature_layout import AxisRoles
from grl_surgery.pooling import (
    FeaturePool,
    Layout,
    Masked,
    Pool,
    Reduction,
    check_tensor,
    choose_layout,
)
from grl_surgery.reversal import GradientReversal

__all__ = [
    "ConcatenationMap",
    "DomainClassifier",
    "DomainHead",
    "MultilinearMap",
    "PatchDomainClassifier",
    "RandomizedMultilinearMap",
    "build_head",
    "find_heads",
]

Norm: TypeAlias = Literal["batch", "layer"] | None
Condition: TypeAlias = Literal["auto", "multilinear", "randomized", "concatenate"]

_LARGEST_OUTER_PRODUCT = 4096
"""Up to this many products C K the paper of CDAN takes the multilinear map, beyond it the randomised one."""


_WELL_SET = "DomainClassifier(512, num_domains=2)"


def _check_dropout(dropout: object) -> None:
    if not isinstance(dropout, Real) or not 0.0 <= float(dropout) < 1.0:
        raise SurgeryError(
            f"dropout is {dropout!r}, but must be in [0, 1): at 1 nothing is left to learn from",
            example="DomainClassifier(512, dropout=0.5)",
        )


def _check_norm(norm: object) -> None:
    if norm not in (None, "batch", "layer"):
        raise SurgeryError(
            f"norm={norm!r} is not known", choices=["None", "'batch'", "'layer'"], example="norm='layer'"
        )


def num_logits(num_domains: int, binary: bool = False) -> int:
    """Number of logits that tell ``num_domains`` domains apart: one each, or one for two where ``binary``.

    Example:
        >>> num_logits(3), num_logits(2, binary=True)
        (3, 1)

    Raises:
        SurgeryError: Fewer than two domains without ``binary``, or more than two with it.
    """
    num_domains = check_count("num_domains", num_domains, example=_WELL_SET)
    if binary and num_domains > 2:
        raise SurgeryError(
            f"binary=True makes one logit, which cannot tell num_domains={num_domains} domains apart",
            example=f"DomainClassifier(512, num_domains={num_domains})",
        )
    if num_domains == 1 and not binary:
        raise SurgeryError(
            "num_domains=1: a softmax over a single logit is constant, so such a head trains nothing. Two "
            "domains are num_domains=2; binary=True makes one logit of them, for a binary loss",
            example="DomainClassifier(512, num_domains=2, binary=True)",
        )
    return 1 if binary else num_domains


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, ...), at each position on its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class DomainClassifier(nn.Module):
    """Logits of the domain from one vector per sample: ``depth`` hidden layers and a linear one.

    A hidden layer is linear, norm if any, ReLU, dropout. The defaults are the domain classifier of the DANN
    paper for its larger networks (Ganin et al. 2016: x-1024-1024-domains, dropout 0.5), with one logit per
    domain.

    Example:
        >>> DomainClassifier(512)(torch.randn(8, 512)).shape
        torch.Size([8, 2])

    Args:
        in_features: Size C of the vectors.
        num_domains: Number K of domains.
        hidden: Width of the hidden layers.
        depth: Number of hidden layers; 0 is a linear classifier.
        norm: ``"batch"``, ``"layer"`` or None. Batch norm mixes the samples, and so the domains, of a batch.
        dropout: Probability of dropping a hidden unit.
        binary: One logit for two domains instead of two; the loss is then a binary one.

    Raises:
        SurgeryError: A setting is impossible; ``num_domains=1`` without ``binary`` is.
    """

    def __init__(
        self,
        in_features: int,
        num_domains: int = 2,
        hidden: int = 1024,
        depth: int = 2,
        norm: Norm = None,
        dropout: float = 0.5,
        *,
        binary: bool = False,
    ) -> None:
        super().__init__()
        in_features, hidden, depth = _check_sizes(in_features, hidden, depth)
        _check_norm(norm)
        _check_dropout(dropout)
        self.in_features = in_features
        widths = [in_features, *[hidden] * depth]
        norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        self.hidden = nn.Sequential(
            *(
                _layer("linear", nn.Linear(*pair), norms[norm](hidden) if norm else None, dropout)
                for pair in pairwise(widths)
            )
        )
        self.logits = nn.Linear(widths[-1], num_logits(num_domains, binary))

    def forward(self, features: Tensor) -> Tensor:
        """Classify.

        Args:
            features: (B, C), floating point.

        Returns:
            Logits (B, K), or (B, 1) if binary, in the same dtype.

        Raises:
            ShapeError: Not a tensor of that shape.
        """
        _check_features(features, self.in_features, 2, "DomainClassifier", "FeaturePool('nchw')(features)")
        output: Tensor = self.logits(self.hidden(features))
        return output


class PatchDomainClassifier(nn.Module):
    """Logits of the domain at each position of a dense feature: convolutions of size 1, one map of logits.

    A position's logits depend on that position alone (unless ``norm="batch"``), as in the patch-level
    discriminators used for detection and segmentation.

    Example:
        >>> PatchDomainClassifier(256)(torch.randn(8, 256, 14, 14)).shape
        torch.Size([8, 2, 14, 14])
        >>> PatchDomainClassifier(80, dims=1)(torch.randn(8, 80, 120)).shape  # at each frame
        torch.Size([8, 2, 120])

    Args:
        in_channels: Number C of channels.
        num_domains: Number K of domains.
        hidden: Width of the hidden layers.
        depth: Number of hidden layers; 0 is a linear classifier of each position.
        norm: ``"batch"``, ``"layer"`` (over the channels of a position) or None.
        dropout: Probability of dropping a hidden unit.
        binary: One logit for two domains instead of two; the loss is then a binary one.
        dims: Number of axes that are positions: 1 for a sequence, 2 for an image, 3 for a volume or a video.

    Raises:
        SurgeryError: A setting is impossible; ``num_domains=1`` without ``binary`` is.
    """

    def __init__(
        self,
        in_channels: int,
        num_domains: int = 2,
        hidden: int = 512,
        depth: int = 2,
        norm: Norm = None,
        dropout: float = 0.5,
        *,
        binary: bool = False,
        dims: int = 2,
    ) -> None:
        super().__init__()
        in_channels, hidden, depth = _check_sizes(in_channels, hidden, depth)
        if dims not in _CONVOLUTIONS:
            raise SurgeryError(
                f"dims is {dims!r}, but a feature has 1, 2 or 3 axes of positions",
                example="PatchDomainClassifier(256, dims=3)",
            )
        _check_norm(norm)
        _check_dropout(dropout)
        self.in_channels = in_channels
        self.dims = dims
        widths = [in_channels, *[hidden] * depth]
        conv, batch_norm = _CONVOLUTIONS[dims]
        norms = {"batch": batch_norm, "layer": _ChannelNorm}
        self.hidden = nn.Sequential(
            *(
                _layer("conv", conv(*pair, 1), norms[norm](hidden) if norm else None, dropout)
                for pair in pairwise(widths)
            )
        )
        self.logits = conv(widths[-1], num_logits(num_domains, binary), 1)

    def forward(self, features: Tensor) -> Tensor:
        """Classify each position.

        Args:
            features: (B, C, H, W), (B, C, L) or (B, C, D, H, W), as ``dims`` says, floating point.

        Returns:
            Logits (B, K, ...) with the positions of the feature, (B, 1, ...) if binary, in the same dtype.

        Raises:
            ShapeError: Not a tensor of that shape.
        """
        example = "FeaturePool('nhwc', reduction='none')(features) moves the channels of (B, H, W, C)"
        _check_features(features, self.in_channels, self.dims + 2, "PatchDomainClassifier", example)
        output: Tensor = self.logits(self.hidden(features))
        return output


_CONVOLUTIONS: dict[int, tuple[Any, Any]] = {
    1: (nn.Conv1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.BatchNorm3d),
}


def _check_sizes(width: int, hidden: int, depth: int) -> tuple[int, int, int]:
    return (
        check_count("the number of input features", width, example=_WELL_SET),
        check_count("hidden", hidden, example=_WELL_SET),
        check_count("depth", depth, least=0, example=_WELL_SET),
    )


def _layer(name: str, linear: nn.Module, norm: nn.Module | None, dropout: float) -> nn.Sequential:
    parts: list[tuple[str, nn.Module]] = [(name, linear)]
    if norm is not None:
        parts.append(("norm", norm))
    return nn.Sequential(OrderedDict([*parts, ("relu", nn.ReLU()), ("dropout", nn.Dropout(dropout))]))


def _check_features(features: object, width: int, rank: int, owner: str, example: str) -> None:
    if not check_tensor(features, owner):
        return
    shape = tuple(features.shape)  # type: ignore[attr-defined]
    if len(shape) != rank or shape[1] != width:
        expected = ", ".join(["B", str(width), *{3: "L", 5: "DHW"}.get(rank, "HW")][:rank])
        raise ShapeError(f"{owner} expects features of shape ({expected}), got {shape}", example=example)


_OUT_OF_PLACE = (DomainClassifier, PatchDomainClassifier)


class MultilinearMap(nn.Module):
    """Features conditioned on the predicted classes: the outer product of both, f ⊗ softmax(g).

    The multilinear conditioning of CDAN (Long et al., "Conditional Adversarial Domain Adaptation", NeurIPS
    2018). The softmax is detached, so that the domain loss reaches the features but not the class layer.
    Column k C + c of the result is softmax(g)_k f_c, the order of the authors' code, so that weights of their
    discriminators fit.

    Example:
        >>> MultilinearMap()(torch.randn(8, 256), torch.randn(8, 10)).shape
        torch.Size([8, 2560])
    """

    def forward(self, features: Tensor, class_logits: Tensor) -> Tensor:
        """Combine.

        Args:
            features: (B, C), floating point.
            class_logits: (B, K), before the softmax.

        Returns:
            (B, C K) in the dtype of the features.

        Raises:
            ShapeError: Not two tensors of those shapes.
        """
        probabilities = _class_probabilities(features, class_logits, "MultilinearMap")
        return (probabilities.unsqueeze(2) * features.unsqueeze(1)).flatten(1)


class RandomizedMultilinearMap(nn.Module):
    """Features conditioned on the predicted classes in ``output_dim`` dimensions: (R_f f) ⊙ (R_g g) / √d.

    The randomised multilinear conditioning of CDAN (Long et al. 2018), which stands in for
    :class:`MultilinearMap` where C K would be too many: inner products are the same in expectation. The two
    matrices have independent standard normal entries, are never trained, and are buffers of the state_dict,
    since a run resumed with other ones would hand its classifier another input. The softmax is detached.

    Example:
        >>> RandomizedMultilinearMap(2048, 65)(torch.randn(8, 2048), torch.randn(8, 65)).shape
        torch.Size([8, 1024])

    Args:
        features: Size C of the features.
        classes: Number K of classes.
        output_dim: Size d of the result.
    """

    feature_matrix: Tensor
    class_matrix: Tensor

    def __init__(self, features: int, classes: int, output_dim: int = 1024) -> None:
        super().__init__()
        example = "RandomizedMultilinearMap(2048, 65, output_dim=1024)"
        features = check_count("features", features, example=example)
        classes = check_count("classes", classes, example=example)
        output_dim = check_count("output_dim", output_dim, example=example)
        self.output_dim = output_dim
        self.register_buffer("feature_matrix", torch.randn(features, output_dim))
        self.register_buffer("class_matrix", torch.randn(classes, output_dim))

    def forward(self, features: Tensor, class_logits: Tensor) -> Tensor:
        """Combine.

        Args:
            features: (B, C), floating point.
            class_logits: (B, K), before the softmax.

        Returns:
            (B, d) in the dtype of the features.

        Raises:
            ShapeError: Not two tensors of those shapes.
        """
        name = "RandomizedMultilinearMap"
        probabilities = _class_probabilities(features, class_logits, name)
        example = "RandomizedMultilinearMap(features.shape[1], class_logits.shape[1])"
        _check_features(features, self.feature_matrix.shape[0], 2, name, example)
        _check_features(class_logits, self.class_matrix.shape[0], 2, f"{name}, for its classes,", example)
        mapped = (features @ self.feature_matrix) * (probabilities @ self.class_matrix)
        return mapped / math.sqrt(self.output_dim)


class ConcatenationMap(nn.Module):
    """Features conditioned on any value by writing it beside them: (f, v), v detached.

    The conditioning of conditional adversarial networks (Mirza & Osindero 2014), for values that are no class
    logits: a regression output, an embedding, an attribute.

    Example:
        >>> ConcatenationMap()(torch.randn(8, 256), torch.randn(8, 3)).shape
        torch.Size([8, 259])
    """

    def forward(self, features: Tensor, value: Tensor) -> Tensor:
        """Combine.

        Args:
            features: (B, C), floating point.
            value: (B,) or (B, ...), whose axes after the batch are flattened.

        Returns:
            (B, C + V) in the dtype of the features.

        Raises:
            ShapeError: Not tensors of one batch.
        """
        if check_tensor(features, "ConcatenationMap") and check_tensor(value, "ConcatenationMap"):
            shapes = tuple(features.shape), tuple(value.shape)
            if len(shapes[0]) != 2 or not shapes[1] or shapes[0][0] != shapes[1][0]:
                raise ShapeError(
                    f"ConcatenationMap expects features (B, C) and a value (B, ...) of one batch, got "
                    f"{shapes[0]} and {shapes[1]}",
                    example="ConcatenationMap()(torch.randn(8, 256), torch.randn(8, 3))",
                )
        return torch.cat([features, value.detach().to(features.dtype).reshape(len(value), -1)], dim=1)


def _class_probabilities(features: Tensor, class_logits: Tensor, owner: str) -> Tensor:
    if check_tensor(features, owner) and check_tensor(class_logits, owner):
        shapes = tuple(features.shape), tuple(class_logits.shape)
        if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][0] != shapes[1][0]:
            raise ShapeError(
                f"{owner} expects features (B, C) and class logits (B, K) of one batch, got {shapes[0]} "
                f"and {shapes[1]}",
                example="MultilinearMap()(torch.randn(8, 256), torch.randn(8, 10))",
            )
    return class_logits.detach().softmax(dim=1).to(features.dtype)


class DomainHead(nn.Module):
    """A reversal, and behind it all that makes domain logits of a feature: pool, condition, classifier.

    The reversal comes first. So every path from the logits to the feature crosses it whatever follows, and
    what flows back into the network is exactly -coeff times what the same head without it would send; while
    the pool, the condition and the classifier, being behind it, learn unflipped. The class logits of a
    condition enter behind the reversal too, and detached: nothing flows back through them.

    Example:
        >>> head = DomainHead(DomainClassifier(512), pool=FeaturePool("nchw"), num_domains=2)
        >>> head(torch.randn(8, 512, 7, 7)).shape
        torch.Size([8, 2])
        >>> head.reversal.set_coeff(0.3)

    Args:
        classifier: Module from the pooled feature to logits (B, K) or a map of them (B, K, ...).
        pool: Module from the feature to (B, C); None leaves it as it is.
        condition: Module of (features (B, C), class logits (B, classes)); None for a head without one.
        num_domains: If given, the logits are checked against it.
        binary: One logit for two domains; see :func:`num_logits`.
        coeff: Initial coefficient of the reversal.
        signed: Whether it may be negative, now or later.
        layout: How the feature was read, for the record.

    Raises:
        SurgeryError: A part is not a module, or a setting is impossible.
    """

    def __init__(
        self,
        classifier: nn.Module,
        *,
        pool: nn.Module | None = None,
        condition: nn.Module | None = None,
        num_domains: int | None = None,
        binary: bool = False,
        coeff: float = 1.0,
        signed: bool = False,
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        for name, part in (("classifier", classifier), ("pool", pool), ("condition", condition)):
            if part is not None or name == "classifier":
                owner = f"DomainHead, for its {name},"
                check_network(
                    part, owner, example="DomainHead(DomainClassifier(512), pool=FeaturePool('nchw'))"
                )
        self.num_logits = None if num_domains is None else num_logits(num_domains, binary)
        self.layout = layout
        self.reversal = GradientReversal(coeff, signed=signed)
        self.pool = pool
        self.condition = condition
        self.classifier = classifier

    def __prepare_scriptable__(self) -> DomainHead:
        """Where torch.jit.script asks first: it cannot read the settings."""
        raise SurgeryError(
            "torch.jit.script cannot read a domain head; trace it instead, which keeps the reversal",
            example="torch.jit.trace(head, features)",
        )

    def forward(self, features: Tensor, class_logits: Tensor | None = None) -> Tensor:
        """Classify the domain.

        Args:
            features: The feature at the point, floating point. It may be a nested tensor, whose padding then
                counts for nothing, and of another precision than the head, in which it is then computed.
            class_logits: (B, classes), or another value to be conditioned on, for a conditional head; for a
                head with a masked pool, the mask or the lengths that the pool reads.

        Returns:
            Logits (B, K), or what the classifier makes of the feature.

        Raises:
            SurgeryError: Class logits or a mask are missing, or not wanted.
            ShapeError: The feature does not fit, or the classifier's output does not.
        """
        counts = None
        if check_tensor(features, "DomainHead") and features.is_nested:
            features, counts = _unnested(features)
        hidden = self._cast(self.reversal(features))
        if isinstance(self.pool, FeaturePool) and self.pool.masked:
            hidden, class_logits = self.pool(hidden, class_logits), None
        elif isinstance(self.pool, FeaturePool):
            padded = counts is not None and self.pool.takes_counts
            hidden = self.pool.pooled(hidden, counts) if padded else self.pool(hidden)
        elif self.pool is not None:
            hidden = self.pool(hidden.clone())
        logits: Tensor = self.classifier(self._conditioned(hidden, class_logits))
        self._check_logits(logits, features)
        return logits

    def _cast(self, hidden: Tensor) -> Tensor:
        """The feature in the precision of the head's parameters, unless autocast sees to that."""
        if not check_tensor(hidden, "DomainHead") or torch.is_autocast_enabled(hidden.device.type):
            return hidden
        own = next((p.dtype for p in self.parameters() if p.is_floating_point()), hidden.dtype)
        return hidden if hidden.dtype == own else hidden.to(own)

    def _conditioned(self, hidden: Tensor, class_logits: Tensor | None) -> Tensor:
        if self.condition is None and class_logits is None:
            # The reversal shares memory with the feature, which the network goes on to read: a foreign
            # classifier that begins with an in-place operation must not write into it.
            return hidden if isinstance(self.classifier, _OUT_OF_PLACE) else hidden.clone()
        if self.condition is None:
            raise SurgeryError(
                "this head has no condition, but was given class logits",
                example="DomainHead(classifier, condition=MultilinearMap())",
            )
        if class_logits is None:
            raise SurgeryError(
                "this head is conditioned on the predicted classes, but was given no class logits",
                example="head(features, class_logits)",
            )
        conditioned: Tensor = self.condition(hidden, class_logits)
        return conditioned

    def _check_logits(self, logits: object, features: Tensor) -> None:
        if self.num_logits is None or isinstance(logits, fx.Proxy):
            return
        if not isinstance(logits, Tensor):
            raise ShapeError(
                f"{type(self.classifier).__name__} returned {type(logits).__name__}, not a tensor of logits",
                example=f"a classifier whose forward returns (B, {self.num_logits})",
            )
        shape, batch = tuple(logits.shape), features.shape[self._batch_axis()]
        columns = 1 if len(shape) == 1 and self.num_logits == 1 else shape[1] if len(shape) > 1 else 0
        if columns != self.num_logits or shape[0] != batch:
            raise ShapeError(
                f"{type(self.classifier).__name__} returned logits of shape {shape}, but this head needs "
                f"({batch}, {self.num_logits}), one logit for each domain, or a map of them",
                example=f"a last layer nn.Linear(1024, {self.num_logits}), without a softmax",
            )

    def _batch_axis(self) -> int:
        """The axis of the feature that is the batch."""
        known = self.layout.name if self.layout else getattr(self.pool, "layout", "n")
        return str(known).index("n")

    def extra_repr(self) -> str:
        """How the feature was read."""
        return f"reads {self.layout}" if self.layout else ""


def _unnested(features: Tensor) -> tuple[Tensor, Tensor]:
    """A nested tensor as a padded one, and (B, L), 1 where a position is no padding."""
    lengths = torch.tensor([len(part) for part in features.unbind()], device=features.device)
    padded = torch.nested.to_padded_tensor(features, 0.0)
    places = torch.arange(padded.shape[1], device=padded.device)
    return padded, (places < lengths[:, None]).to(padded.dtype)


def build_head(
    shape: Sequence[int],
    num_domains: int = 2,
    *,
    classifier: nn.Module | Literal["global", "patch"] = "global",
    pool: Pool | nn.Module = "auto",
    num_features: int | None = None,
    num_prefix_tokens: int = 0,
    num_classes: int | None = None,
    axes: AxisRoles | None = None,
    masked: Masked = None,
    condition: nn.Module | Condition = "auto",
    hidden: int | None = None,
    depth: int = 2,
    norm: Norm = None,
    dropout: float = 0.5,
    binary: bool = False,
    coeff: float = 1.0,
    signed: bool = False,
) -> DomainHead:
    """Build the head that fits a feature of the given shape.

    Example:
        >>> head = build_head((8, 7, 7, 768), num_domains=3, num_features=768)
        >>> print(head.layout)
        (N, H, W, C) with C=768
        >>> head(torch.randn(8, 7, 7, 768)).shape
        torch.Size([8, 3])

    Args:
        shape: Shape of the feature, the batch first.
        num_domains: Number of domains.
        classifier: ``"global"`` for a :class:`DomainClassifier`, ``"patch"`` for a
            :class:`PatchDomainClassifier`, or a module of your own, which gets the pooled feature.
        pool: How to pool, see :data:`grl_surgery.pooling.Pool`; ``"none"`` hands over the feature as it is.
            Or a module of your own, such as ``FeaturePool("lnc", reduction="max")``.
        num_features: Width of the network's last feature, where known; settles some ambiguous layouts.
        num_prefix_tokens: Leading tokens that are left out of the mean over tokens.
        num_classes: For a conditional head: number of classes of the logits that it will be given, or size of
            the value for each sample.
        axes: What the network says of the axes of the feature; without it the shape decides.
        masked: What kind of mask the pool will be given, see :class:`~grl_surgery.pooling.FeaturePool`.
        condition: ``"multilinear"``, ``"randomized"``, ``"concatenate"`` for a value that is no class logits,
            a module of your own, or ``"auto"``: multilinear up to 4,096 products, randomised beyond, as in
            the paper. Without ``num_classes`` there is no condition.
        hidden: Width of the hidden layers; default 1,024, for a patch head 512.
        depth: Number of hidden layers.
        norm: Norm of the hidden layers.
        dropout: Dropout of the hidden layers.
        binary: One logit for two domains.
        coeff: Initial coefficient of the reversal.
        signed: Whether it may be negative, now or later.

    Returns:
        The head, on the CPU, in float32.

    Raises:
        ShapeError: The shape cannot be read as ``pool`` says, or does not fit the classifier.
        SurgeryError: Some settings are impossible, or do not go together.
    """
    if not shape:
        raise ShapeError("a head reads a feature for each sample, and this value is one number")
    own = isinstance(classifier, nn.Module)
    foreign = pool if isinstance(pool, nn.Module) else None
    name: Pool = "auto" if isinstance(pool, nn.Module) else pool
    layout = _layout(shape, foreign, name, own, num_features, axes)
    pooling = foreign or _build_pool(layout, name, classifier, num_prefix_tokens, masked)
    vectors = layout if pooling is not None or len(shape) == 2 else None
    mapping = _build_condition(condition, vectors, _pooled_width(layout, pooling), num_classes, classifier)
    body = classifier
    if not isinstance(body, nn.Module):
        make, default = _CLASSIFIERS[_check_classifier(body)]
        width = _conditioned_width(mapping, _pooled_width(layout, pooling), num_classes)
        dims = {"dims": len(layout.name) - 2} if layout and body == "patch" else {}
        size = default if hidden is None else hidden
        body = make(width, num_domains, size, depth, norm, dropout, binary=binary, **dims)
    return DomainHead(
        body,
        pool=pooling,
        condition=mapping,
        num_domains=num_domains,
        binary=binary,
        coeff=coeff,
        signed=signed,
        layout=layout,
    )


_CLASSIFIERS: dict[str, tuple[Any, int]] = {
    "global": (DomainClassifier, 1024),
    "patch": (PatchDomainClassifier, 512),
}


def _check_classifier(kind: str) -> str:
    if kind not in _CLASSIFIERS:
        raise SurgeryError(
            f"classifier={kind!r} is neither a module nor one that is known",
            choices=list(_CLASSIFIERS),
            example="classifier='global'",
        )
    return kind


def _layout(
    shape: Sequence[int],
    foreign: nn.Module | None,
    pool: Pool,
    own: bool,
    num_features: int | None,
    axes: AxisRoles | None,
) -> Layout | None:
    if isinstance(foreign, FeaturePool):
        return choose_layout(shape, foreign.layout, num_features, axes)
    if foreign is not None and not own:
        raise SurgeryError(
            f"the width of what {type(foreign).__name__} returns is not known, so a pool of your own needs a "
            "classifier of your own",
            example="pool=MyPool(), classifier=DomainClassifier(512)",
        )
    if own and (foreign is not None or pool == "none") and len(shape) != 2:
        known = axes is not None and "n" in axes.letters and "c" in axes.letters and len(shape) < 6
        return choose_layout(shape, "auto", num_features, axes) if known else None
    return choose_layout(shape, pool, num_features, axes)


def _pooled_width(layout: Layout | None, pool: nn.Module | None) -> int:
    channels = layout.channels if layout else 0
    return pool.width(channels) if isinstance(pool, FeaturePool) else channels


def _build_pool(
    layout: Layout | None,
    pool: Pool,
    classifier: nn.Module | str,
    num_prefix_tokens: int,
    masked: Masked,
) -> FeaturePool | None:
    if layout is None:
        return None
    axes = f"({', '.join(layout.name.upper())})"
    if classifier == "patch":
        if len(layout.name) < 3 or masked:
            raise ShapeError(
                "a patch head decides at every position, so it needs a feature with positions and no mask, "
                f"got {axes}{' and a mask' if masked else ''}",
                example="classifier='global'",
            )
        return FeaturePool(layout.name, reduction="none")
    if pool == "none" and layout.name != "nc" and not isinstance(classifier, nn.Module):
        raise ShapeError(
            f"pool='none' would hand {axes} to a classifier of (B, C)",
            choices=["auto", layout.name],
            example="pool='auto', or a classifier of your own",
        )
    if pool == "none":
        return None
    reduction = cast(Reduction, pool if pool in get_args(Reduction) else "mean")
    return FeaturePool(
        layout.name,
        reduction=reduction,
        num_prefix_tokens=num_prefix_tokens if reduction == "mean" else 0,
        channels=layout.channels if reduction == "attention" else None,
        masked=masked,
    )


def _build_condition(
    condition: nn.Module | Condition,
    layout: Layout | None,
    width: int,
    num_classes: int | None,
    classifier: nn.Module | str,
) -> nn.Module | None:
    if isinstance(condition, nn.Module) and isinstance(classifier, nn.Module):
        return condition
    if isinstance(condition, nn.Module):
        raise SurgeryError(
            f"the width of what {type(condition).__name__} returns is not known, so a condition of your "
            "own needs a classifier of your own",
            example="classifier=DomainClassifier(2560), condition=MyMap()",
        )
    if condition not in get_args(Condition):
        raise SurgeryError(
            f"condition={condition!r} is neither a module nor one that is known",
            choices=get_args(Condition),
            example="condition='randomized'",
        )
    if num_classes is None and condition == "auto":
        return None
    if num_classes is None:
        raise SurgeryError(
            f"condition={condition!r} needs the number of classes",
            example="num_classes=10, condition='multilinear'",
        )
    num_classes = check_count("num_classes", num_classes, example="num_classes=10")
    if layout is None or classifier == "patch":
        raise SurgeryError(
            "a condition needs one vector (B, C) per sample, which neither a patch head nor pool='none' has",
            example="classifier='global', pool='auto'",
        )
    if condition == "concatenate":
        return ConcatenationMap()
    small = width * num_classes <= _LARGEST_OUTER_PRODUCT
    if condition == "multilinear" or (condition == "auto" and small):
        return MultilinearMap()
    return RandomizedMultilinearMap(width, num_classes)


def _conditioned_width(condition: nn.Module | None, channels: int, num_classes: int | None) -> int:
    """Size of the vectors that reach the classifier; that of the pooled ones is known for one of ours."""
    if isinstance(condition, MultilinearMap):
        return channels * (num_classes or 0)
    if isinstance(condition, ConcatenationMap):
        return channels + (num_classes or 0)
    return condition.output_dim if isinstance(condition, RandomizedMultilinearMap) else channels


def find_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The domain heads in a network by module path, in the order of registration.

    A head is a :class:`DomainHead`, or what is left of one after its forward was traced into: a module
    with a reversal called ``reversal`` beside a ``classifier``.

    Example:
        >>> head = DomainHead(DomainClassifier(4))
        >>> list(find_heads(nn.ModuleDict({"backbone": nn.Linear(4, 4), "domain": head})))
        ['domain']

    Raises:
        SurgeryError: It is not a network.
    """
    check_network(model, "find_heads")
    return {name: module for name, module in model.named_modules() if _is_head(module)}


def _is_head(module: nn.Module) -> bool:
    if isinstance(module, DomainHead):
        return True
    children = dict(module.named_children())
    return isinstance(children.get("reversal"), GradientReversal) and "classifier" in children
