"""``isinstance`` in a traced forward: the answer that the running network would give, not a proxy's."""

from __future__ import annotations

import builtins
import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from grl_surgery.links import is_size, origin
from grl_surgery.reachable import functions_of, names_in
from grl_surgery.tracer import Tracer

__all__ = ["kinds_answered"]


@contextlib.contextmanager
def kinds_answered(kinds: Iterable[type[nn.Module]]) -> Iterator[None]:
    """Answer ``isinstance`` and ``torch.is_tensor`` in these modules' forwards, and in what they call.

    To Python a traced value is a proxy, and a forward that begins with ``if isinstance(x, torch.Tensor)``
    would be traced along the wrong branch. The name is looked up in the globals of the forward's file, so
    that is where another function stands for it meanwhile.
    """
    files = {id(names): names for kind in kinds for names in _files_of(kind)}
    shadowed = [names for names in files.values() if "isinstance" not in names]
    is_tensor = torch.is_tensor
    for names in shadowed:
        names["isinstance"] = _isinstance
    torch.is_tensor = lambda value: _isinstance(value, torch.Tensor)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.is_tensor = is_tensor
        for names in shadowed:
            del names["isinstance"]


def _isinstance(value: Any, kinds: Any) -> bool:
    traced = builtins.isinstance(value, fx.Proxy) and builtins.isinstance(value.tracer, Tracer)
    asks_for_proxy = kinds is fx.Proxy or (builtins.isinstance(kinds, tuple) and fx.Proxy in kinds)
    if not traced or asks_for_proxy:
        return builtins.isinstance(value, kinds)
    return issubclass(_kind_of(value.node, value.tracer), kinds)


_FILES: weakref.WeakKeyDictionary[type, list[dict[str, Any]]] = weakref.WeakKeyDictionary()


def _files_of(kind: type[nn.Module]) -> list[dict[str, Any]]:
    """Globals of the files in which a module's forward, or something that it calls, asks for a class."""
    if kind not in _FILES:
        asking = [f for f in functions_of(kind) if "isinstance" in names_in(f.__code__)]
        _FILES[kind] = list({id(f.__globals__): f.__globals__ for f in asking}.values())
    return _FILES[kind]


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
        layer = tracer.root.get_submodule(str(node.target))
        several = isinstance(layer, _PAIRS) or getattr(layer, "return_indices", False)
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


# Layers and operations that return a tuple of tensors.
_PAIRS = (nn.RNNBase, nn.MultiheadAttention)
_SEVERAL = frozenset(
    [
        *("chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind"),
        *("topk", "kthvalue", "sort", "aminmax", "std_mean", "var_mean", "meshgrid", "broadcast_tensors"),
    ]
)
