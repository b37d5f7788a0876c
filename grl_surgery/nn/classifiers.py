"""Domain classifiers: of one vector for each sample, and of the places of a feature map."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import pairwise
from numbers import Real
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.nn.pooling import (
    check_tensor,
)
from grl_surgery.validation import check_count

__all__ = [
    "DomainClassifier",
    "Norm",
    "NumDomains",
    "PatchDomainClassifier",
    "check_dropout",
    "check_features",
    "check_norm",
    "check_sizes",
    "layer_of",
    "logits_of",
    "num_logits",
    "outputs_of",
]


Norm: TypeAlias = Literal["batch", "layer"] | None


NumDomains: TypeAlias = int | Mapping[str, int]


_WELL_SET = "DomainClassifier(512, num_domains=2)"


def check_dropout(dropout: object) -> None:
    """Refuse a dropout that is not in [0, 1)."""
    if not isinstance(dropout, Real) or not 0.0 <= float(dropout) < 1.0:
        raise SurgeryError(
            f"dropout is {dropout!r}, but must be in [0, 1): at 1 nothing is left to learn from",
            example="DomainClassifier(512, dropout=0.5)",
        )


def check_norm(norm: object) -> None:
    """Refuse a norm that classifiers do not have."""
    if norm not in (None, "batch", "layer"):
        raise SurgeryError(
            f"norm={norm!r} is not known", choices=["None", "'batch'", "'layer'"], example="norm='layer'"
        )


def num_logits(num_domains: NumDomains, binary: bool = False) -> NumDomains:
    """Number of logits that tell ``num_domains`` domains apart: one each, or one for two where ``binary``.

    Example:
        >>> num_logits(3), num_logits(2, binary=True), num_logits({"site": 3, "scanner": 2})
        (3, 1, {'site': 3, 'scanner': 2})

    Raises:
        SurgeryError: Fewer than two domains without ``binary``, or more than two with it; or an attribute
            whose name cannot be one of a module.
    """
    if isinstance(num_domains, Mapping):
        check_attributes(num_domains, binary)
        return {name: _num_logits(count, binary) for name, count in num_domains.items()}
    return _num_logits(num_domains, binary)


def check_attributes(num_domains: Mapping[str, int], binary: bool) -> None:
    """Refuse attributes without names or with less than two domains."""
    if binary:
        raise SurgeryError(
            "binary=True makes one logit, and several attributes have logits for each of their domains",
            example="num_domains={'site': 3, 'scanner': 2}",
        )
    wrong = [
        n for n in num_domains if not isinstance(n, str) or not n.isidentifier() or hasattr(nn.ModuleDict, n)
    ]
    if wrong or not num_domains:
        what = f"{wrong[0]!r} cannot be the name of a module" if wrong else "it names no attribute"
        raise SurgeryError(
            f"num_domains={dict(num_domains)!r}: {what}", example="num_domains={'site': 3, 'scanner': 2}"
        )


def _num_logits(num_domains: int, binary: bool) -> int:
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


def outputs_of(make: Callable[[int], nn.Module], num_domains: NumDomains, binary: bool) -> nn.Module:
    """The last layer, or one for each attribute."""
    counts = num_logits(num_domains, binary)
    if isinstance(counts, Mapping):
        return nn.ModuleDict({name: make(count) for name, count in counts.items()})
    return make(counts)


def logits_of(layer: nn.Module, hidden: Tensor) -> Any:
    """Apply the last layer of a classifier: one linear layer, or one for each attribute."""
    if isinstance(layer, nn.ModuleDict):
        return {name: each(hidden) for name, each in layer.items()}
    return layer(hidden)


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
        >>> import torch
        >>> DomainClassifier(512)(torch.randn(8, 512)).shape
        torch.Size([8, 2])

    Args:
        in_features: Size C of the vectors.
        num_domains: Number K of domains; or a number for each of several attributes, such as ``{"site": 3,
            "scanner": 2}``, which share the hidden layers and have a last layer each.
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
        num_domains: NumDomains = 2,
        hidden: int = 1024,
        depth: int = 2,
        norm: Norm = None,
        dropout: float = 0.5,
        *,
        binary: bool = False,
    ) -> None:
        super().__init__()
        in_features, hidden, depth = check_sizes(in_features, hidden, depth)
        check_norm(norm)
        check_dropout(dropout)
        self.in_features = in_features
        widths = [in_features, *[hidden] * depth]
        norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        self.hidden = nn.Sequential(
            *(
                layer_of("linear", nn.Linear(*pair), norms[norm](hidden) if norm else None, dropout)
                for pair in pairwise(widths)
            )
        )
        self.logits = outputs_of(lambda count: nn.Linear(widths[-1], count), num_domains, binary)

    def forward(self, features: Tensor) -> Any:
        """Classify.

        Args:
            features: (B, C), floating point.

        Returns:
            Logits (B, K), or (B, 1) if binary, in the same dtype; a dict of them by attribute.

        Raises:
            ShapeError: Not a tensor of that shape.
        """
        check_features(features, self.in_features, 2, "DomainClassifier", "FeaturePool('nchw')(features)")
        return logits_of(self.logits, self.hidden(features))


class PatchDomainClassifier(nn.Module):
    """Logits of the domain at each position of a dense feature: convolutions of size 1, one map of logits.

    A position's logits depend on that position alone (unless ``norm="batch"``), as in the patch-level
    discriminators used for detection and segmentation.

    Example:
        >>> import torch
        >>> PatchDomainClassifier(256)(torch.randn(8, 256, 14, 14)).shape
        torch.Size([8, 2, 14, 14])
        >>> PatchDomainClassifier(80, dims=1)(torch.randn(8, 80, 120)).shape  # at each frame
        torch.Size([8, 2, 120])

    Args:
        in_channels: Number C of channels.
        num_domains: Number K of domains; or a number for each of several attributes, such as ``{"site": 3,
            "scanner": 2}``, which share the hidden layers and have a last layer each.
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
        num_domains: NumDomains = 2,
        hidden: int = 512,
        depth: int = 2,
        norm: Norm = None,
        dropout: float = 0.5,
        *,
        binary: bool = False,
        dims: int = 2,
    ) -> None:
        super().__init__()
        in_channels, hidden, depth = check_sizes(in_channels, hidden, depth)
        if dims not in _CONVOLUTIONS:
            raise SurgeryError(
                f"dims is {dims!r}, but a feature has 1, 2 or 3 axes of positions",
                example="PatchDomainClassifier(256, dims=3)",
            )
        check_norm(norm)
        check_dropout(dropout)
        self.in_channels = in_channels
        self.dims = dims
        widths = [in_channels, *[hidden] * depth]
        conv, batch_norm = _CONVOLUTIONS[dims]
        norms = {"batch": batch_norm, "layer": _ChannelNorm}
        self.hidden = nn.Sequential(
            *(
                layer_of("conv", conv(*pair, 1), norms[norm](hidden) if norm else None, dropout)
                for pair in pairwise(widths)
            )
        )
        self.logits = outputs_of(lambda count: conv(widths[-1], count, 1), num_domains, binary)

    def forward(self, features: Tensor) -> Any:
        """Classify each position.

        Args:
            features: (B, C, H, W), (B, C, L) or (B, C, D, H, W), as ``dims`` says, floating point.

        Returns:
            Logits (B, K, ...) with the positions of the feature, (B, 1, ...) if binary, in the same dtype; a
            dict of them by attribute.

        Raises:
            ShapeError: Not a tensor of that shape.
        """
        example = "FeaturePool('nhwc', reduction='none')(features) moves the channels of (B, H, W, C)"
        check_features(features, self.in_channels, self.dims + 2, "PatchDomainClassifier", example)
        return logits_of(self.logits, self.hidden(features))


_CONVOLUTIONS: dict[int, tuple[Any, Any]] = {
    1: (nn.Conv1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.BatchNorm3d),
}


def check_sizes(width: int, hidden: int, depth: int) -> tuple[int, int, int]:
    """Validate the width of the input and of the hidden layers, and their number."""
    return (
        check_count("the number of input features", width, example=_WELL_SET),
        check_count("hidden", hidden, example=_WELL_SET),
        check_count("depth", depth, least=0, example=_WELL_SET),
    )


def layer_of(name: str, linear: nn.Module, norm: nn.Module | None, dropout: float) -> nn.Sequential:
    """Return one hidden layer: linear, norm, ReLU, dropout."""
    parts: list[tuple[str, nn.Module]] = [(name, linear)]
    if norm is not None:
        parts.append(("norm", norm))
    return nn.Sequential(OrderedDict([*parts, ("relu", nn.ReLU()), ("dropout", nn.Dropout(dropout))]))


def check_features(features: object, width: int, rank: int, owner: str, example: str) -> None:
    """Refuse features of another width or rank than a classifier takes."""
    if not check_tensor(features, owner):
        return
    shape = tuple(features.shape)  # type: ignore[attr-defined]
    if len(shape) != rank or shape[1] != width:
        expected = ", ".join(["B", str(width), *{3: "L", 5: "DHW"}.get(rank, "HW")][:rank])
        raise ShapeError(f"{owner} expects features of shape ({expected}), got {shape}", example=example)
