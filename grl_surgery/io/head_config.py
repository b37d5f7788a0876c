"""Stores domain heads as plain data, and builds them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from grl_surgery.errors import ExportError
from grl_surgery.io.json_schema import field, optional
from grl_surgery.nn.classifiers import DomainClassifier, NumDomains, PatchDomainClassifier
from grl_surgery.nn.conditions import ConcatenationMap, MultilinearMap, RandomizedMultilinearMap
from grl_surgery.nn.heads import DomainHead
from grl_surgery.nn.pooling import FeaturePool, Layout, is_layout

__all__ = ["describe_head", "rebuild_head"]

Settings = dict[str, Any]

_CLASSIFIERS: dict[str, type[DomainClassifier] | type[PatchDomainClassifier]] = {
    "global": DomainClassifier,
    "patch": PatchDomainClassifier,
}


def describe_head(head: nn.Module) -> Settings | None:
    """The settings that build the head again; None where a part of it is a module of the user's own.

    Example:
        >>> describe_head(DomainHead(DomainClassifier(4), num_domains=2))["classifier"]["hidden"]
        1024
    """
    if type(head) is not DomainHead:
        return None
    try:
        settings = {
            "classifier": _classifier(head.classifier),
            "pool": None if head.pool is None else _pool(head.pool),
            "condition": None if head.condition is None else _condition(head.condition),
            "num_logits": _plain(head.num_logits),
            "layout": None
            if head.layout is None
            else {
                "name": head.layout.name,
                "channels": head.layout.channels,
                "assumption": head.layout.assumption,
            },
        }
        same = _form(rebuild_head(settings)) == _form(head)
    except (ExportError, AttributeError, KeyError, ValueError):
        return None
    return settings if same else None


def rebuild_head(settings: Mapping[str, Any]) -> DomainHead:
    """The head with these settings, its weights random.

    Raises:
        ExportError: A setting is missing, of another type, or not known.
        SurgeryError: The settings do not go together.
    """
    pool, condition = optional(settings, "pool", dict), optional(settings, "condition", dict)
    logits = _counts(settings, "num_logits")
    return DomainHead(
        _build_classifier(field(settings, "classifier", dict)),
        pool=None if pool is None else _build_pool(pool),
        condition=None if condition is None else _build_condition(condition),
        num_domains=2 if logits == 1 else logits,
        binary=logits == 1,
        layout=_build_layout(optional(settings, "layout", dict)),
    )


def _form(head: nn.Module) -> str:
    """All that shows of a head but its coefficient, which is kept with all the others."""
    return "\n".join(line for line in repr(head).splitlines() if "GradientReversal" not in line)


def _classifier(module: nn.Module) -> Settings:
    kind = (
        next(name for name, known in _CLASSIFIERS.items() if type(module) is known)
        if type(module) in _CLASSIFIERS.values()
        else None
    )
    if kind is None:
        raise ExportError(f"{type(module).__name__} is a module of your own")
    logits: Any = module.logits
    patch = kind == "patch"
    layers: Any = module.hidden
    norm = getattr(layers[0], "norm", None) if len(layers) else None
    dims = {"dims": module.dims} if patch and module.dims != 2 else {}
    return {
        "kind": kind,
        **dims,
        "width": module.in_channels if patch else module.in_features,
        "logits": {name: _sizes(layer)[1] for name, layer in logits.items()}
        if isinstance(logits, nn.ModuleDict)
        else _sizes(logits)[1],
        "hidden": _sizes(next(iter(logits.values())) if isinstance(logits, nn.ModuleDict) else logits)[0],
        "depth": len(layers),
        "norm": None if norm is None else "batch" if isinstance(norm, _BATCH_NORMS) else "layer",
        "dropout": layers[0].dropout.p if len(layers) else 0.0,
    }


def _sizes(layer: Any) -> tuple[int, int]:
    """Size of what a last layer reads, and number of its logits."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _plain(counts: NumDomains | None) -> int | dict[str, int] | None:
    return dict(counts) if isinstance(counts, Mapping) else counts


def _counts(settings: Mapping[str, Any], name: str) -> NumDomains | None:
    """One number, or one for each attribute."""
    value = settings.get(name)
    if isinstance(value, Mapping) and all(type(count) is int for count in value.values()):
        return {str(key): count for key, count in value.items()}
    return optional(settings, name, int)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _build_classifier(settings: Mapping[str, Any]) -> nn.Module:
    kind, norm = field(settings, "kind", str), optional(settings, "norm", str)
    if kind not in _CLASSIFIERS or norm not in (None, "batch", "layer"):
        raise ExportError(f"there is no classifier of kind {kind!r} with the norm {norm!r}")
    logits = _counts(settings, "logits")
    if logits is None:
        raise ExportError("a classifier has no number of logits")
    dims = optional(settings, "dims", int)
    more: dict[str, Any] = {} if dims is None else {"dims": dims}
    return _CLASSIFIERS[kind](
        field(settings, "width", int),
        2 if logits == 1 else logits,
        field(settings, "hidden", int),
        field(settings, "depth", int),
        norm,  # type: ignore[arg-type]
        float(field(settings, "dropout", float)),
        binary=logits == 1,
        **more,
    )


def _pool(module: nn.Module) -> Settings:
    if type(module) is not FeaturePool:
        raise ExportError(f"{type(module).__name__} is a module of your own")
    return {
        "layout": module.layout,
        "reduction": module.reduction,
        "num_prefix_tokens": module.num_prefix_tokens,
        **({"channels": module.channels} if module.channels else {}),
        **({"masked": module.masked} if module.masked else {}),
    }


def _build_pool(settings: Mapping[str, Any]) -> FeaturePool:
    return FeaturePool(
        field(settings, "layout", str),  # type: ignore[arg-type]
        reduction=field(settings, "reduction", str),  # type: ignore[arg-type]
        num_prefix_tokens=field(settings, "num_prefix_tokens", int),
        channels=optional(settings, "channels", int),
        masked=optional(settings, "masked", str),  # type: ignore[arg-type]
    )


def _condition(module: nn.Module) -> Settings:
    if type(module) is MultilinearMap:
        return {"kind": "multilinear"}
    if type(module) is ConcatenationMap:
        return {"kind": "concatenate"}
    if type(module) is RandomizedMultilinearMap:
        features, dim = module.feature_matrix.shape
        classes = module.class_matrix.shape[0]
        return {"kind": "randomized", "features": features, "classes": classes, "output_dim": dim}
    raise ExportError(f"{type(module).__name__} is a module of your own")


def _build_condition(settings: Mapping[str, Any]) -> nn.Module:
    kind = field(settings, "kind", str)
    if kind == "multilinear":
        return MultilinearMap()
    if kind == "concatenate":
        return ConcatenationMap()
    if kind == "randomized":
        sizes = [field(settings, name, int) for name in ("features", "classes", "output_dim")]
        return RandomizedMultilinearMap(*sizes)
    raise ExportError(f"there is no condition of kind {kind!r}")


def _build_layout(settings: Mapping[str, Any] | None) -> Layout | None:
    if settings is None:
        return None
    name = field(settings, "name", str)
    if not is_layout(name):
        raise ExportError(f"there is no layout {name!r}")
    assumption = field(settings, "assumption", str)
    return Layout(name, field(settings, "channels", int), assumption)  # type: ignore[arg-type]
