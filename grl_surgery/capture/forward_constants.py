"""Follows the tensors that a traced forward makes in Python, and guards the network's own."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from grl_surgery.capture.proxies import IN_PLACE
from grl_surgery.capture.recorded_functions import UNSEEN, traced_in

__all__ = ["MadeTensors"]


class _Made(NamedTuple):
    """A tensor, with how often it had been overwritten when its node first used it."""

    tensor: torch.Tensor
    version: int
    node: fx.Node


class MadeTensors(TorchFunctionMode):
    """The tensors that one traced forward makes: constants of its graph, until the graph overwrites one.

    While the forward is traced, what it writes into one is a node and does not happen. What it computes with
    that tensor afterwards in Python would be computed with the old content, so that this is refused. So is
    writing into the network's own parameters: that would happen, once and for all.

    Args:
        network: Root of the network.
        before_write: Is called before a tensor is overwritten in Python; its error stops the trace.
    """

    def __init__(self, network: nn.Module, before_write: Callable[[], None]) -> None:
        super().__init__()
        self.network, self.before_write = network, before_write
        self.made: dict[int, _Made] = {}
        self.overwritten: set[int] = set()  # memory, by address

    @functools.cached_property
    def own(self) -> set[int]:
        """The memory of the network's parameters and buffers."""
        tensors = itertools.chain(self.network.parameters(), self.network.buffers())
        return {tensor.untyped_storage().data_ptr() for tensor in tensors} - {0}

    def nodes(self) -> list[fx.Node]:
        """The node of each tensor, in the order of their first use."""
        return [made.node for made in self.made.values()]

    def node_of(self, tensor: torch.Tensor) -> fx.Node | None:
        """The node of a tensor that has been used before."""
        found = self.made.get(id(tensor))
        if found is None:
            self.refuse(tensor)
        return found and found.node

    def add(self, tensor: torch.Tensor, node: fx.Node) -> fx.Node:
        """A node uses a tensor for the first time."""
        self.made[id(tensor)] = _Made(tensor, _version(tensor), node)
        return node

    def note_write(self, node: fx.Node) -> None:
        """A node may overwrite one of the tensors."""
        tensor = next((made.tensor for made in self.made.values() if made.node in node.args[:1]), None)
        if tensor is not None and _overwrites(node):
            storage = tensor.untyped_storage()
            if storage.nbytes() != tensor.numel() * tensor.element_size():
                raise RuntimeError("it overwrites a part of a tensor of its own")
            self.overwritten.add(storage.data_ptr())

    def refuse(self, value: Any) -> None:
        """Raise an error if only the graph knows the present content of a tensor."""
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self.overwritten:
            raise RuntimeError("it computes with a tensor of its own that it has overwritten")

    def refuse_changes(self) -> None:
        """Raise an error if one has been overwritten in Python after a node had used it."""
        if any(_version(made.tensor) != made.version for made in self.made.values()):
            raise RuntimeError("it goes on writing into a tensor of its own that it has used before")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what goes in and what is written to, unless a node is made of the call."""
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(_PACKAGE):
            first = args[0] if args else None
            if isinstance(first, torch.Tensor) and _is_in_place(getattr(function, "__name__", "")):
                self.before_write()
                self.refuse_own(first)
            values = pytree.tree_leaves((args, kwargs)) if self.overwritten else []
            if not any(isinstance(value, fx.Proxy) for value in values):
                for value in values:
                    self.refuse(value)
        kwargs = kwargs or {}
        recorded = UNSEEN.get(function)
        if recorded is not None and (traced := traced_in((args, kwargs))) is not None:
            return traced.tracer.create_proxy("call_function", recorded, args, kwargs)
        return function(*args, **kwargs)

    def refuse_own(self, tensor: torch.Tensor) -> None:
        """Raise an error if a tensor lies in the memory of the network's own."""
        if tensor.untyped_storage().data_ptr() in self.own:
            raise RuntimeError("it overwrites a parameter or a buffer, and a graph would leave it as it is")


_PACKAGE = __name__.partition(".")[0] + "."


def _is_writing_method(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _is_in_place(name: str) -> bool:
    return _is_writing_method(name) or name in ("__set__", "__setitem__") or name.strip("_") in IN_PLACE


def _overwrites(node: fx.Node) -> bool:
    """Whether a node overwrites its first argument: by a method, or an operator as in ``x += y``."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method":
        return _is_writing_method(name)
    return name in IN_PLACE and getattr(node.target, "__module__", "") == "_operator"


def _version(tensor: torch.Tensor) -> int:
    """Return how often a tensor has been overwritten so far."""
    return 0 if tensor.is_inference() else tensor._version
