"""Names a node of a traced graph by its operation, and finds the line of code that it comes from."""

from __future__ import annotations

import os
import sys
from types import FrameType

import torch
from torch import fx

from grl_surgery.capture.proxies import IN_PLACE

__all__ = ["TORCH", "is_item", "line_of_forward", "operation"]


def is_item(node: fx.Node) -> bool:
    """Whether the node picks one item, by a constant key, out of another node's value."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "getitem":
        return False
    source, key = (*node.args, None, None)[:2]
    return isinstance(source, fx.Node) and type(key) in (int, str) and "base" in source.meta


def operation(node: fx.Node) -> str:
    """Name an operation: ``add``, also for ``+=``; a read of an attribute by the attribute."""
    if node.op == "call_method":
        return str(node.target)
    name = str(getattr(node.target, "__name__", None) or type(node.target).__name__)
    if name == "getattr" and len(node.args) > 1:
        return str(node.args[1])
    if name in IN_PLACE and getattr(node.target, "__module__", "") == "_operator":
        return name[1:]
    return name.strip("_") if name.startswith("__") else name


TORCH = os.path.dirname(torch.__file__) + os.sep


_LAYERS = os.path.join(TORCH, "nn", "modules")  # whose forwards are traced like anybody's


_HERE = os.path.dirname(__file__) + os.sep


_OURS = ("tracer", "proxies", "forward_constants", "recorded_functions", "traceable_copy")


_MACHINERY = (TORCH, *(f"{_HERE}{name}.py" for name in _OURS))


def line_of_forward() -> tuple[str, int]:
    """The line of the network's code that is being traced."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_machinery(frame.f_code.co_filename):
        frame = frame.f_back
    return (frame.f_code.co_filename, frame.f_lineno) if frame else ("", 0)


def _is_machinery(file: str) -> bool:
    return file.startswith(_MACHINERY) and not file.startswith(_LAYERS)
