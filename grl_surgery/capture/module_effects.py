"""Tells whether an untraced module mutates its arguments or returns an alias of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from torch import fx, nn

from grl_surgery.capture.aliasing import VIEWING, ArgumentEffects, may_alias, mutated_args
from grl_surgery.capture.capture import trace
from grl_surgery.capture.traceable_copy import is_building_block
from grl_surgery.errors import TracingError
from grl_surgery.isolation.tensor_copy import is_scripted

__all__ = ["effects"]


# The answer for each kind of block: a deep network has dozens that are alike.
_KNOWN: dict[Any, ArgumentEffects] = {}


def effects(module: nn.Module) -> ArgumentEffects:
    """Tell what a module's forward does to its arguments; ``known`` is false where that cannot be told.

    Example:
        >>> effects(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2)))
        ArgumentEffects(overwrites=True, returns=False, known=True)
    """
    if is_building_block(module):
        in_place = getattr(module, "inplace", False) is True
        return ArgumentEffects(in_place, in_place or isinstance(module, VIEWING))
    if is_scripted(module):
        return ArgumentEffects(known=False)
    if any(isinstance(inner, fx.GraphModule) for inner in module.modules()):  # each is a class of its own
        return _in_trace(module)
    alike = _likeness(module)
    if alike not in _KNOWN:
        if len(_KNOWN) > 1000:
            _KNOWN.clear()
        _KNOWN[alike] = _in_trace(module)
    return _KNOWN[alike]


def _in_trace(module: nn.Module) -> ArgumentEffects:
    paths = {path for path, inner in module.named_modules() if not is_building_block(inner)}
    try:
        graphs = trace(module, paths, allow_untraceable=True).graphs.values()
    except TracingError:
        return ArgumentEffects(known=False)
    nodes = [node for graph in graphs for node in graph.nodes]
    returned = [value for node in nodes if node.op == "output" for value in node.all_input_nodes]

    def any_argument(values: Iterable[fx.Node]) -> bool:
        known = (may_alias(module, value, lambda _: ArgumentEffects()) for value in values)
        return any(same.op == "placeholder" for memory_of in known for same in memory_of)

    written = (value for node in nodes for value in mutated_args(module, node))
    return ArgumentEffects(any_argument(written), any_argument(returned))


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
