"""``isinstance`` and ``type`` in a traced forward: what the running network would answer, not a proxy."""

from __future__ import annotations

import builtins
import contextlib
import os
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from grl_surgery.function_calls import MAKERS
from grl_surgery.links import is_size, origin
from grl_surgery.reachable import functions_held, functions_of, names_in
from grl_surgery.tracer import TORCH, Tracer, returns_several

__all__ = ["kinds_answered"]


@contextlib.contextmanager
def kinds_answered(modules: Collection[nn.Module]) -> Iterator[None]:
    """Answer ``isinstance``, ``type`` and ``torch.is_tensor`` in modules' forwards, and in what they call.

    To Python a traced value is a proxy, and a forward that begins with ``if isinstance(x, torch.Tensor)``
    would be traced along the wrong branch. The name is looked up in the globals of the forward's file, so
    that is where another function stands for it meanwhile. So it is with what makes a tensor of sizes
    (:data:`~grl_surgery.function_calls.MAKERS`).
    """
    held = (_asking(functions_held(module)) for module in modules)
    by_class = (_files_of(kind) for kind in dict.fromkeys(map(type, modules)))
    asked = {(id(names), name): names for found in (*held, *by_class) for names, name in found}
    shadowed = [(names, name, names.get(name, _MISSING)) for (_, name), names in asked.items()]
    is_tensor, is_grad_enabled = torch.is_tensor, torch.is_grad_enabled
    for names, name, _ in shadowed:
        names[name] = _ANSWERS[_meant(names, name)]
    torch.is_tensor = lambda value: _isinstance(value, torch.Tensor)  # type: ignore[assignment]
    torch.is_grad_enabled = _grad_mode_asked(is_grad_enabled)
    try:
        yield
    finally:
        torch.is_tensor, torch.is_grad_enabled = is_tensor, is_grad_enabled
        for names, name, meant in shadowed:
            if meant is _MISSING:  # a builtin
                del names[name]
            else:
                names[name] = meant


def _isinstance(value: Any, kinds: Any) -> bool:
    traced = builtins.isinstance(value, fx.Proxy) and builtins.isinstance(value.tracer, Tracer)
    asks_for_proxy = kinds is fx.Proxy or (builtins.isinstance(kinds, tuple) and fx.Proxy in kinds)
    if not traced or asks_for_proxy:
        return builtins.isinstance(value, kinds)
    return issubclass(_kind_of(value.node, value.tracer), kinds)


class _Asked(type):
    """Makes a class that stands for ``type``, as a function and as a class."""

    def __call__(cls, value: Any, *rest: Any) -> Any:
        traced = builtins.isinstance(value, fx.Proxy) and builtins.isinstance(value.tracer, Tracer)
        return _kind_of(value.node, value.tracer) if traced else type(value, *rest)

    def __instancecheck__(cls, value: Any) -> bool:
        return builtins.isinstance(value, type)


_ANSWERS = {isinstance: _isinstance, type: _Asked("type", (), {}), **MAKERS}
_MISSING = object()


def _grad_mode_asked(is_grad_enabled: Callable[[], bool]) -> Callable[[], bool]:
    thread = threading.get_ident()

    def answer() -> bool:
        asking = sys._getframe(1).f_code.co_filename
        if threading.get_ident() == thread and not asking.startswith((TORCH, _PACKAGE)):
            raise RuntimeError("it asks whether gradients are computed, and a graph would keep the answer")
        return is_grad_enabled()

    return answer


_PACKAGE = os.path.dirname(__file__) + os.sep
_FILES: weakref.WeakKeyDictionary[type, list[tuple[dict[str, Any], str]]] = weakref.WeakKeyDictionary()


def _files_of(kind: type[nn.Module]) -> list[tuple[dict[str, Any], str]]:
    """Globals of the files of a module's forward and of what it calls, with each name that gets an answer."""
    if kind not in _FILES:
        _FILES[kind] = _asking(functions_of(kind))
    return [(names, name) for names, name in _FILES[kind] if _meant(names, name) in _ANSWERS]


def _asking(functions: Iterable[FunctionType]) -> list[tuple[dict[str, Any], str]]:
    named = ((f.__globals__, name) for f in functions for name in names_in(f.__code__))
    return [(names, name) for names, name in named if _meant(names, name) in _ANSWERS]


def _meant(names: dict[str, Any], name: str) -> Any:
    """What a name in a file stands for; None where that is nothing that could get an answer."""
    meant = names.get(name, getattr(builtins, name, None))
    return meant if type(meant) in _KINDS_OF_ANSWERED else None


_KINDS_OF_ANSWERED = frozenset(map(type, _ANSWERS))  # others need not be hashable


# ------------------------------------------------------------------------------------------- the answer


def _kind_of(node: fx.Node, tracer: Tracer) -> type:
    """The class of a value when the network runs.

    What a module returns that stayed one call is not known: it is traced through as well
    (:class:`~grl_surgery.tracer.Unseen`).
    """
    node = origin(node)
    if is_size(node):
        return _kind_of_size(node)
    if node.op == "placeholder":
        return tracer.kind_of_argument(node)
    if node.op == "get_attr":
        return node.meta.get("kind", torch.Tensor)  # type: ignore[no-any-return]
    tracer.look_into(node)
    if node.op == "call_module":
        several = returns_several(tracer.root.get_submodule(str(node.target)))
    else:
        several = getattr(node.target, "__name__", node.target) in _SEVERAL
    return tuple if several else torch.Tensor


def _kind_of_size(node: fx.Node) -> type:
    name = str(node.args[1]) if node.target is getattr else str(getattr(node.target, "__name__", node.target))
    if name == "shape" or (name == "size" and len(node.args) + len(node.kwargs) == 1):
        return torch.Size
    if name in ("dtype", "device", "layout"):
        return {"dtype": torch.dtype, "device": torch.device, "layout": torch.layout}[name]
    if name in ("requires_grad", "is_cuda"):
        return bool
    if name == "getitem" and isinstance(node.args[1], slice):
        return _kind_of_size(origin(node.args[0]))  # type: ignore[arg-type]
    return tuple if name == "stride" else float if name == "truediv" else int


# Operations that return a tuple of tensors.
_SEVERAL = frozenset(
    [
        *("chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind"),
        *("topk", "kthvalue", "sort", "aminmax", "std_mean", "var_mean", "meshgrid", "broadcast_tensors"),
    ]
)
