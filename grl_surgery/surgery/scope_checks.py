"""Refuses cuts that a hook would miss: modules that are not called, paths around a hook, in-place writes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from grl_surgery.capture.code_inspection import calls_forward_of
from grl_surgery.capture.module_effects import effects
from grl_surgery.capture.observed_calls import Observed
from grl_surgery.capture.traceable_copy import has_forward, is_building_block
from grl_surgery.capture.tracer import returns_several
from grl_surgery.errors import PointNotFoundError, ShapeError, SurgeryError, TracingError
from grl_surgery.isolation.shared_copy import find_external_reference, way_to_forward
from grl_surgery.points import (
    Edge,
    ancestors,
    enclosing,
    escape,
    near_names,
    split_items,
    split_number,
)
from grl_surgery.surgery.spliced_module import (
    Cut,
)

__all__ = [
    "OUTPUT",
    "arguments_of",
    "check_operation",
    "check_points",
    "is_copy_of",
    "refuse_overwriting",
    "refuse_ways_past",
]


OUTPUT = "output"


def check_operation(base: nn.Module, point: Observed, cut: Cut, end: str) -> None:
    """Refuse an operation that a run cannot be sure to find again, or whose value others hold."""
    is_last = end == cut.points[-1]
    if not point.is_alone:
        raise TracingError(
            f"the forward around {end!r} runs more than once, and cannot be traced to tell its runs apart",
            example=f"after={escape(point.path)!r}" if point.path else None,
        )
    overwrites = str(point.operation).endswith("_") and not str(point.operation).startswith("_")
    is_read_only = isinstance(cut.at, Edge) and cut.at.arg not in ("", "0")  # not what is overwritten
    if overwrites and (
        cut.kind in ("after", "before") or (cut.kind == "edge" and is_last and not is_read_only)
    ):
        raise SurgeryError(
            f"{end!r} overwrites a value in place, and a reversal there would hide that from whoever else "
            "reads it",
            example=f"after={escape(point.path)!r}" if point.path else None,
        )


def arguments_of(network: nn.Module) -> list[str]:
    """Arguments of forward by which a point can be called: where a module has the same name, it is meant."""
    return [name for name in inspect.signature(network.forward).parameters if name not in network._modules]


def refuse_overwriting(module: nn.Module, cut: Cut) -> None:
    """Refuse a reversal of what a module overwrites: who reads the value afterwards would get no gradient."""
    if effects(module).overwrites:
        raise SurgeryError(
            f"{type(module).__name__} overwrites its input in place, and a reversal {cut} would hide that "
            "from whoever else reads the input",
            example="after=, the point whose value it is",
        )


def check_points(base: nn.Module, cut: Cut, paths: Mapping[str, str], failure: TracingError) -> None:
    """Refuse names that cannot be of a point, without a graph that has the names of all.

    Raises:
        PointNotFoundError: There is no such module, or nobody calls it.
        TracingError: There may be such an operation of the root.
    """
    for end in cut.points:
        if end == OUTPUT or end in arguments_of(base) or cut.is_at_operation(end):
            continue
        whole, items = split_items(end)
        name, around = split_number(whole)[0], enclosing(end, paths) or [""]
        operation = name.removeprefix(f"{around[-1]}.")
        near = near_names(end, paths)
        if name not in paths and ("." in operation or (around == [""] and near)):
            raise PointNotFoundError(f"there is no point {end!r} in this network", choices=near)
        if name not in paths and around == [""]:
            raise TracingError(
                f"{end!r} is no module of this {type(base).__name__}, and operations of its own forward can "
                f"only be found by running it: {str(failure).partition(chr(10))[0]}",
                choices=[path for path in paths if path and "." not in path][:5],
                example="insert_grl(model, ..., example_inputs=x), where model(x) runs",
            )
        if name in paths:
            _check_module(base, end, name, items, paths)


def _check_module(
    base: nn.Module, end: str, name: str, items: tuple[Any, ...], paths: Mapping[str, str]
) -> None:
    """Refuse a module that nobody calls, and an item of a value that has none."""
    module = base.get_submodule(paths[name])
    parent = base.get_submodule(paths[name].rpartition(".")[0])
    children = [f"{name}.{escape(child)}" for child, _ in module.named_children()]
    if not has_forward(module):
        inside = [f"{name}.{key}" for key in items[:1] if f"{name}.{key}" in paths]
        raise PointNotFoundError(
            f"{name!r} is a {type(module).__name__}, a list of modules that nobody calls: no value comes out "
            f"of it, and {end!r} is no point",
            choices=[*inside, *(child for child in children if child not in inside)][:5],
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise TracingError(
            f"{name!r} is a scripted module, which the result shares with the original, so that no hook goes "
            "there",
            example="before=, the module that gets its value",
        )
    if (
        inspect.getattr_static(type(parent), "forward", None) is nn.MultiheadAttention.forward
        and parent is not module
    ):
        raise PointNotFoundError(
            f"{type(parent).__name__} reads the weights of {end!r} and never calls it: no value comes out "
            "of it",
            example=f"after={name.rpartition('.')[0]!r}, what leaves the layer" if "." in name else None,
        )
    if items and is_building_block(module) and not returns_several(module):
        raise ShapeError(
            f"the value of {name!r} is one tensor, which has no items", example=f"after={name!r}"
        )
    for path in ancestors(paths[name]):
        around = base.get_submodule(path)
        if calls_forward_of(cast(Any, type(around)), paths[name].rpartition(".")[2]):
            raise TracingError(
                f"{type(around).__name__} calls the forward of {name!r} itself and not the module, so a hook "
                "there would not run",
                example=f"after={escape(path)!r}" if path else None,
            )


def is_copy_of(old: nn.Module) -> Callable[[nn.Module], bool]:
    """Tells of a module whether it is another one over the same tensors."""
    kind, holdings = type(old), _holdings(old)
    return lambda module: type(module) is kind and bool(holdings[1]) and _holdings(module) == holdings


def refuse_ways_past(base: nn.Module, cut: Cut, paths: Mapping[str, str]) -> None:
    """Refuse a hook on a module that a forward may call in a way in which no hook runs.

    Raises:
        TracingError: The tree refers to what the module was copied from, or to its forward.
    """
    for end in cut.points:
        path = paths.get(split_items(end)[0])
        if not path or cut.is_at_operation(end):
            continue
        module = base.get_submodule(path)
        way = find_external_reference(base, is_copy_of(module)) or way_to_forward(base, module)
        if way is not None:
            raise TracingError(
                f"the attribute {way!r} leads to {path!r} in a way that surgery cannot change, so that a "
                "forward which calls it from there would go past the reversal",
                example=f"a forward that calls self.{path}, or an item of a list or a dict",
            )


def _holdings(module: nn.Module) -> tuple[list[type], list[int]]:
    """The classes of all its modules, and which tensors these hold."""
    tensors = (*module.parameters(), *module.buffers())
    return list(map(type, module.modules())), list(map(id, tensors))
