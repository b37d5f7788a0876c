"""Builds a domain head for a feature: pool, condition and classifier chosen by layout and kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, cast, get_args

from torch import nn

from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.nn.axis_roles import AxisRoles
from grl_surgery.nn.classifiers import (
    DomainClassifier,
    Norm,
    NumDomains,
    PatchDomainClassifier,
)
from grl_surgery.nn.conditions import ConcatenationMap, MultilinearMap, RandomizedMultilinearMap
from grl_surgery.nn.heads import DomainHead
from grl_surgery.nn.pooling import (
    FeaturePool,
    Layout,
    Masked,
    Pool,
    Reduction,
    choose_layout,
)
from grl_surgery.validation import check_count

__all__ = ["Condition", "Kind", "build_head"]


Condition: TypeAlias = Literal["auto", "multilinear", "randomized", "concatenate"]


Kind: TypeAlias = Literal["dann", "mdd", "wdgrl"]


_LARGEST_OUTER_PRODUCT = 4096
"""Up to this many products C K the paper of CDAN takes the multilinear map, beyond it the randomised one."""


def build_head(
    shape: Sequence[int],
    num_domains: NumDomains = 2,
    *,
    kind: Kind = "dann",
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
    dropout: float | None = None,
    binary: bool = False,
    coeff: float = 1.0,
    signed: bool = False,
    clip: float | None = None,
    normalize: bool = False,
) -> DomainHead:
    """Build the head that fits a feature of the given shape.

    Example:
        >>> import torch
        >>> head = build_head((8, 7, 7, 768), num_domains=3, num_features=768)
        >>> print(head.layout)
        (N, H, W, C) with C=768
        >>> head(torch.randn(8, 7, 7, 768)).shape
        torch.Size([8, 3])

    Args:
        shape: Shape of the feature, the batch first.
        num_domains: Number of domains; or a number for each of several attributes.
        kind: ``"dann"``: logits of the domains. ``"mdd"``: logits of the classes of the task, ``num_classes``
            of them, the auxiliary classifier f' of Zhang et al., "Bridging Theory and Algorithm for Domain
            Adaptation" (ICML 2019). ``"wdgrl"``: one score, the critic f_w of Shen et al., "Wasserstein
            Distance Guided Representation Learning for Domain Adaptation" (AAAI 2018).
        classifier: ``"global"`` for a :class:`DomainClassifier`, ``"patch"`` for a
            :class:`PatchDomainClassifier`, or a module of your own, which gets the pooled feature.
        pool: How to pool, see :data:`grl_surgery.nn.pooling.Pool`; ``"none"`` hands over the feature as it
            is. Or a module of your own, such as ``FeaturePool("lnc", reduction="max")``.
        num_features: Width of the network's last feature, where known; settles some ambiguous layouts.
        num_prefix_tokens: Leading tokens that are left out of the mean over tokens.
        num_classes: For a conditional head: number of classes of the logits that it will be given, or size of
            the value for each sample. For ``kind="mdd"``: number of its logits.
        axes: What the network says of the axes of the feature; without it the shape decides.
        masked: What kind of mask the pool will be given, see :class:`~grl_surgery.nn.pooling.FeaturePool`.
        condition: ``"multilinear"``, ``"randomized"``, ``"concatenate"`` for a value that is no class logits,
            a module of your own, or ``"auto"``: multilinear up to 4,096 products, randomised beyond, as in
            the paper. Without ``num_classes`` there is no condition.
        hidden: Width of the hidden layers; default 1,024, for a patch head 512.
        depth: Number of hidden layers.
        norm: Norm of the hidden layers.
        dropout: Dropout of the hidden layers: 0.5 by default, none for a critic.
        binary: One logit for two domains.
        coeff: Initial coefficient of the reversal.
        signed: Whether it may be negative, now or later.
        clip: As for :class:`GradientReversal`.
        normalize: As for :class:`GradientReversal`.

    Returns:
        The head, on the CPU, in float32.

    Raises:
        ShapeError: The shape cannot be read as ``pool`` says, or does not fit the classifier.
        SurgeryError: Some settings are impossible, or do not go together.
    """
    if not shape:
        raise ShapeError("a head reads a feature for each sample, and this value is one number")
    num_domains, binary = _logits_of_kind(kind, num_domains, binary, num_classes)
    if kind != "dann":
        _check_fits_kind(kind, classifier, norm)
    if kind == "mdd":
        num_classes = None
    dropout = (0.0 if kind == "wdgrl" else 0.5) if dropout is None else dropout
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
        clip=clip,
        normalize=normalize,
        layout=layout,
    )


def _logits_of_kind(
    kind: str, num_domains: NumDomains, binary: bool, num_classes: int | None
) -> tuple[NumDomains, bool]:
    """How many things the logits tell apart, and whether one logit does it."""
    if kind not in get_args(Kind):
        raise SurgeryError(f"kind={kind!r} is not known", choices=get_args(Kind), example="kind='mdd'")
    if kind == "dann":
        return num_domains, binary
    if num_domains != 2 or binary:
        setting = f"num_domains={num_domains!r}" if num_domains != 2 else "binary=True"
        raise SurgeryError(
            f"kind={kind!r} compares a source with a target, and {setting} is for kind='dann'",
            example=f"kind={kind!r}, without {setting.partition('=')[0]}=",
        )
    if kind == "wdgrl":
        return 2, True
    if num_classes is None:
        raise SurgeryError(
            "kind='mdd' is a second classifier of the task, and needs its number of classes",
            example="kind='mdd', num_classes=10",
        )
    return check_count("num_classes", num_classes, least=2, example="kind='mdd', num_classes=10"), False


def _check_fits_kind(kind: str, classifier: object, norm: Norm) -> None:
    if classifier == "patch":
        raise SurgeryError(
            f"kind={kind!r} makes one decision for each sample, and classifier='patch' one at each position",
            example=f"kind={kind!r}, classifier='global'",
        )
    if kind == "wdgrl" and norm == "batch":
        raise SurgeryError(
            "a critic's gradient is penalised for each sample, and norm='batch' mixes the samples of a batch",
            example="kind='wdgrl', norm='layer'",
        )


_CLASSIFIERS: dict[str, tuple[Any, int]] = {
    "global": (DomainClassifier, 1024),
    "patch": (PatchDomainClassifier, 512),
}


def _check_classifier(kind: str) -> str:
    if kind not in _CLASSIFIERS:
        raise SurgeryError(
            f"classifier={kind!r} is neither a module nor a known name",
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
            f"condition={condition!r} is neither a module nor a known name",
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
