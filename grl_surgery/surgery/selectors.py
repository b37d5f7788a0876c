"""Turns what the user selects (names, patterns, classes, predicates) into names of points."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from grl_surgery import points
from grl_surgery.capture.capture import module_paths
from grl_surgery.capture.traceable_copy import is_building_block
from grl_surgery.errors import PointNotFoundError, SurgeryError
from grl_surgery.graph_data import ModelGraph
from grl_surgery.points import Edge, GraphNode
from grl_surgery.surgery.describe import describe, point_names

__all__ = ["Selector", "name_modules", "select_edges", "select_points"]

Selector: TypeAlias = (
    "str | nn.Module | GraphNode | type[nn.Module] | Callable[[GraphNode], bool] | Sequence[Selector]"
)

_FEATURE = "feature:"
"""The prefix of a selector that counts timm's features."""


def name_modules(model: nn.Module, selector: Any) -> Any:
    """The selector with the names of modules in place of modules: ``after=model.layer3``.

    Raises:
        PointNotFoundError: A module is none of this network's.
    """
    if isinstance(selector, (list, tuple)):
        return type(selector)(name_modules(model, part) for part in selector)
    if not isinstance(selector, nn.Module):
        return selector
    for path, module in model.named_modules():
        if module is selector and path:
            return points.escape(path)
    alike = [points.escape(path) for path, module in model.named_modules() if type(module) is type(selector)]
    raise PointNotFoundError(
        f"a {type(selector).__name__} was given that is not a module of this {type(model).__name__}",
        choices=alike[:5],
        example="insert_grl(model, after=model.layer3), with a module of the model that is passed",
    )


def select_points(
    model: nn.Module, selector: Selector, keyword: str, example_inputs: Any = None
) -> list[str]:
    """Names of the points that a selector stands for, in the order given, each once.

    Args:
        model: The network; not changed.
        selector: A name, ``"glob:..."``, ``"re:..."``, ``"feature:3"`` (the fourth entry of a timm network's
            ``feature_info``), a module class, a predicate on a :class:`~grl_surgery.GraphNode`, or a list
            of these.
        keyword: ``after`` or ``before``, for messages.
        example_inputs: Where a predicate looks at shapes.

    Raises:
        PointNotFoundError: A selector matches nothing.
        SurgeryError: It is none of the above.
    """
    parts = list(selector) if isinstance(selector, (list, tuple)) else [selector]
    if not parts:
        raise SurgeryError(f"{keyword}={selector!r} names no point", example=f"{keyword}='layer3'")
    paths = module_paths(model)
    names = (name for part in parts for name in _select(model, part, keyword, example_inputs, paths))
    return list(dict.fromkeys(names))


def _select(
    model: nn.Module, part: Any, keyword: str, example_inputs: Any, paths: Mapping[str, str]
) -> list[str]:
    if isinstance(part, GraphNode):
        return [part.name]
    if isinstance(part, str) and part.startswith(_FEATURE):
        return [_by_feature(model, part)]
    if isinstance(part, str) and part:
        return (
            _by_pattern(model, part, paths, example_inputs)
            if points.pattern(part)
            else [canonical(part, paths)]
        )
    if inspect.isclass(part) and issubclass(part, nn.Module):
        return _by_class(model, part, paths, example_inputs)
    if callable(part) and not isinstance(part, nn.Module) and not inspect.isclass(part):
        return _by_predicate(model, part, example_inputs)
    raise SurgeryError(
        f"{keyword}={part!r} is no point: expected a name, 'glob:...', 're:...', a module class or a "
        f"function of a graph node, got {type(part).__name__}",
        example=f"{keyword}='layer3', {keyword}='glob:layer3.*', {keyword}=torch.nn.Conv2d",
    )


def _by_feature(model: nn.Module, text: str) -> str:
    """The module that timm's ``feature_info`` lists at a place: ``feature:3``, or ``feature:-1``."""
    info = getattr(model, "feature_info", None)
    listed = [str(feature["module"]) for feature in getattr(info, "info", info) or ()]
    index = text.removeprefix(_FEATURE)
    if not listed:
        raise PointNotFoundError(
            f"{text!r} needs timm's feature_info, which this {type(model).__name__} does not have",
            example="after='layer3'",
        )
    if not index.removeprefix("-").isdecimal() or not -len(listed) <= int(index) < len(listed):
        raise PointNotFoundError(
            f"{text!r} is none of the {len(listed)} features that timm lists for this network",
            choices=[f"{_FEATURE}{place} is {module}" for place, module in enumerate(listed)],
            example=f"after='{_FEATURE}{len(listed) - 1}'",
        )
    return points.escape(listed[int(index)])


def _by_pattern(model: nn.Module, text: str, paths: Mapping[str, str], inputs: Any) -> list[str]:
    around = {real for name, real in paths.items() if points.may_enclose(text, name)}
    traced_modules = {path for path in around if not is_building_block(model.get_submodule(path))}
    names = point_names(model, traced_modules, inputs)
    expression = points.pattern(text)
    assert expression is not None
    found = [name for name in names if points.matches(expression, name) and name != "output"]
    if not found:
        raise PointNotFoundError(
            f"{text!r} matches none of the {len(names)} points in this network",
            choices=points.near_names(text.partition(":")[2], names),
            example="'glob:layer3.*' (* stays within one part of a name, ** crosses the dots)",
        )
    return found


def _by_class(model: nn.Module, kind: type[nn.Module], paths: Mapping[str, str], inputs: Any) -> list[str]:
    found = {points.escape(path): None for path, m in model.named_modules() if path and isinstance(m, kind)}
    if not found:
        present = list(dict.fromkeys(type(module).__name__ for module in model.modules()))
        raise PointNotFoundError(
            f"there is no {kind.__name__} in this {type(model).__name__}",
            choices=points.near_names(kind.__name__, present) or present[1:6],
            example="after='layer3', or a class that is there: after=torch.nn.Conv2d",
        )
    traced_modules = {parent for path in found for parent in points.enclosing(path, paths)}
    names = point_names(model, traced_modules, inputs)
    return [name for name in names if points.split_number(name)[0] in found]


def _by_predicate(model: nn.Module, predicate: Callable[[GraphNode], bool], example_inputs: Any) -> list[str]:
    everything: ModelGraph = describe(model, None, example_inputs)
    found = [node.name for node in everything.nodes if node.op != "output" and predicate(node)]
    if not found:
        raise PointNotFoundError(
            f"the predicate is true for none of the {len(everything.nodes)} points in this network",
            choices=[str(node) for node in everything.nodes[:2]],
            example="after=lambda node: node.type == 'Conv2d'",
        )
    return found


def canonical(name: str, paths: Mapping[str, str]) -> str:
    """The name with an alias of a shared module replaced by the module's first path."""
    for end in (len(name), *(i for i in range(len(name) - 1, 0, -1) if name[i] in ".#[")):
        if name[:end] in paths:
            return points.escape(paths[name[:end]]) + name[end:]
    return name


def _is_flat(selector: Any) -> bool:
    """Whether it lists names where it should list edges."""
    return isinstance(selector, (tuple, list)) and all(
        isinstance(end, str) and " -> " not in end for end in selector
    )


def select_edges(model: nn.Module, selector: Any) -> list[Edge]:
    """The edges that a selector stands for: one pair of names, an Edge, a string, or a list of these."""
    paths = module_paths(model)
    single = isinstance(selector, (str, Edge)) or (
        isinstance(selector, tuple) and len(selector) == 2 and all(isinstance(end, str) for end in selector)
    )
    if not single and (not isinstance(selector, Iterable) or not selector or _is_flat(selector)):
        points.parse_edge(selector)
    edges = (points.parse_edge(edge) for edge in ([selector] if single else selector))
    return list(
        dict.fromkeys(Edge(canonical(e.source, paths), canonical(e.target, paths), e.arg) for e in edges)
    )
