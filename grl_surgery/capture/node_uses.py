"""Lists and rewrites which node of a graph uses which other node, as what argument."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

__all__ = ["boundary", "is_size", "node_uses", "rewrite", "size_class", "skip_boundaries"]

Change = Callable[[str, fx.Node], fx.Node]


def boundary(value: Any) -> Any:
    """Marks in a graph where a value enters or leaves a traced module; taken out before the graph runs."""
    return value


def node_uses(node: fx.Node) -> list[tuple[str, fx.Node]]:
    """Every use that ``node`` makes of another node's value: ``("0", source)``, ``("0[1]", source)``."""
    found: list[tuple[str, fx.Node]] = []

    def note(arg: str, source: fx.Node) -> fx.Node:
        found.append((arg, source))
        return source

    _rewritten(node, note)
    return found


def rewrite(node: fx.Node, change: Change) -> None:
    """Replace every use that ``node`` makes of another value by what ``change(arg, source)`` returns."""
    args, kwargs = _rewritten(node, change)
    node.args, node.kwargs = args, kwargs


def _rewritten(node: fx.Node, change: Change) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = tuple(_walk(value, str(index), change) for index, value in enumerate(node.args))
    return args, {key: _walk(value, key, change) for key, value in node.kwargs.items()}


def _walk(value: Any, arg: str, change: Change) -> Any:
    if isinstance(value, fx.Node):
        return change(arg, value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_walk(item, f"{arg}[{index}]", change) for index, item in enumerate(value)))
    if isinstance(value, (tuple, list)):
        return type(value)(_walk(item, f"{arg}[{index}]", change) for index, item in enumerate(value))
    if isinstance(value, dict):
        return {key: _walk(item, f"{arg}[{key}]", change) for key, item in value.items()}
    if isinstance(value, slice):
        ends = ((name, getattr(value, name)) for name in ("start", "stop", "step"))
        return slice(*(_walk(end, f"{arg}[{name}]", change) for name, end in ends))
    return value


def skip_boundaries(node: fx.Node) -> fx.Node:
    """The node that computed the value, behind the marks where it entered and left modules."""
    while node.target is boundary:
        node = node.args[0]  # type: ignore[assignment]
    return node


_SIZE_METHODS = frozenset({"size", "dim", "numel", "ndimension", "stride", "element_size"})
_SIZE_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout"})


def is_size(node: fx.Node) -> bool:
    """Whether the value is a size, a dtype or a number made of these: nothing a gradient flows through."""
    node = skip_boundaries(node)
    if node.op == "call_method":
        return node.target in _SIZE_METHODS
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in _SIZE_ATTRIBUTES
    if node.target is operator.getitem:
        return is_size(node.args[0])  # type: ignore[arg-type]
    if getattr(node.target, "__module__", "") in ("_operator", "builtins", "math"):
        sources = node.all_input_nodes
        return node.target is len or (bool(sources) and all(is_size(source) for source in sources))
    return False


def size_class(node: fx.Node) -> type:
    """The class of a value of which :func:`is_size` is true."""
    node = skip_boundaries(node)
    name = str(node.args[1]) if node.target is getattr else str(getattr(node.target, "__name__", node.target))
    if name == "shape" or (name == "size" and len(node.args) + len(node.kwargs) == 1):
        return torch.Size
    if name in ("dtype", "device", "layout"):
        return {"dtype": torch.dtype, "device": torch.device, "layout": torch.layout}[name]
    if name in ("requires_grad", "is_cuda"):
        return bool
    if name == "getitem" and isinstance(node.args[1], slice):
        return size_class(node.args[0])  # type: ignore[arg-type]
    return tuple if name == "stride" else float if name == "truediv" else int
