"""Whether a module that stays one call overwrites what it is given."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import fx, nn

from grl_surgery.errors import TracingError
from grl_surgery.in_place import memory, overwrites
from grl_surgery.trace_copy import is_building_block
from grl_surgery.tracing import trace

__all__ = ["overwrites_input"]

# The answer for each kind of block: a deep network has dozens that are alike.
_OVERWRITES: dict[Any, bool] = {}


def overwrites_input(module: nn.Module) -> bool:
    """Whether a module's forward overwrites something that it is given; not, where nobody can tell."""
    if is_building_block(module):
        return getattr(module, "inplace", False) is True
    if any(isinstance(inner, fx.GraphModule) for inner in module.modules()):  # each is a class of its own
        return _overwrites_in_trace(module)
    alike = _likeness(module)
    if alike not in _OVERWRITES:
        if len(_OVERWRITES) > 1000:
            _OVERWRITES.clear()
        _OVERWRITES[alike] = _overwrites_in_trace(module)
    return _OVERWRITES[alike]


def _overwrites_in_trace(module: nn.Module) -> bool:
    paths = {path for path, inner in module.named_modules() if not is_building_block(inner)}
    try:
        graphs = trace(module, paths, lenient=True).graphs.values()
    except TracingError:
        return False
    return any(
        overwrites(module, node) and any(same.op == "placeholder" for same in memory(module, node))
        for graph in graphs
        for node in graph.nodes
    )


def _likeness(module: nn.Module) -> Hashable:
    """Equal for modules that run the same code: classes, settings, modes, which parameters are there."""
    return tuple(
        (
            path,
            type(inner),
            tuple((name, tensor is None) for name, tensor in inner._parameters.items()),
            tuple((name, _setting(value)) for name, value in inner.__dict__.items() if name[0] != "_"),
        )
        for path, inner in module.named_modules()
    )


def _setting(value: Any) -> Hashable:
    """A setting as far as code can tell it: rates differ from block to block, but only being zero matters."""
    if isinstance(value, float):
        return bool(value)
    if isinstance(value, (int, str, type, type(None))):
        return value
    return tuple(value.shape) if hasattr(value, "shape") else repr(value)
