"""Copies a module tree with tensors of its own: clones, leaves, or tensors without data."""

from __future__ import annotations

import copy
import functools
import logging
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from grl_surgery.isolation.object_graph import base_of, explore, remake, slots_of
from grl_surgery.isolation.shared_copy import ORIGINAL, share_copy

__all__ = [
    "Copy",
    "clone",
    "is_scripted",
    "own_tree",
    "tensors_held",
    "with_tensors",
    "without_graph",
]

Copy = Callable[[torch.Tensor], torch.Tensor]


def own_tree(network: nn.Module, copied: Copy | None = None) -> nn.Module:
    """A tree over the same tensors, but for scripted modules, which cannot share theirs and are copied.

    Its containers are its own, each once, wherever the network refers to it: also from an object, which is
    made anew then.

    Args:
        network: What to make another tree of.
        copied: Makes what the tree holds in place of each tensor; by default they stay.
    """
    made: dict[int, Any] = {}
    tree = _shared_tree(network, made)
    _Exchange(made, copied).inside_tree(tree)
    return tree


def _shared_tree(network: nn.Module, made: dict[int, Any]) -> nn.Module:
    """A tree over the same tensors, with copies of scripted modules; ``made`` is told of its containers."""
    tree = share_copy(network, made=made)
    scripts: dict[int, Any] = {}
    for module in [module for module in tree.modules() if not is_scripted(module)]:
        original: Any = module.__dict__.get(ORIGINAL)
        if is_scripted(original):
            twin: Any = copy.deepcopy(original)
            module.__dict__[ORIGINAL] = twin
            module.__dict__.update((key, twin.__dict__[key]) for key in ("_parameters", "_buffers"))
            module._modules.update(twin._modules.items())
        else:
            scripted = {name: child for name, child in module._modules.items() if is_scripted(child)}
            module._modules.update(copy.deepcopy(scripted, scripts))
    return tree


def is_scripted(module: Any) -> bool:
    """Whether a module holds its parts in C++."""
    return isinstance(module, torch.jit.ScriptModule)


def clone(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a memory of their own."""
    return tensor.detach().clone()


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape, strides and dtype, without values: on the meta device, on which all runs fastest."""
    return tensor.detach().to("meta")


def runs_slowly_on_meta(network: nn.Module) -> bool:
    """Whether it has a layer that torch runs step by step there, and at once on its fake tensors."""
    return any(isinstance(module, nn.RNNBase) for module in network.modules())


def without_graph(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, or one over the same memory where autograd has computed it."""
    return tensor if tensor.grad_fn is None else tensor.detach()


def with_tensors(
    network: nn.Module,
    tensors: Mapping[str, torch.Tensor] | None = None,
    copied: Copy = clone,
) -> nn.Module:
    """A tree that holds other tensors for good, so that nothing that its forward does reaches the network's.

    Args:
        network: What to make another tree of.
        tensors: Parameters and buffers of the new tree, by name.
        copied: Makes what the new tree holds in place of all other tensors, each once.
    """
    made: dict[int, Any] = {}
    tree = _shared_tree(network, made)
    given = {} if tensors is None else tensors
    named = (*tree.named_parameters(), *tree.named_buffers())
    known: dict[int, Any] = {id(tensor): given[name] for name, tensor in named if name in given}
    known.update((id(tensor), tensor) for tensor in given.values())

    def copy_of(tensor: torch.Tensor) -> torch.Tensor:
        return copied(tensor).requires_grad_(tensor.requires_grad and tensor.is_leaf)

    _Exchange(made | known, copy_of).inside_tree(tree)
    for module in tree.modules():
        if hasattr(module, "_flat_weights_names"):  # recurrent layers keep a list of their parameters
            names: Any = module._flat_weights_names
            module.__dict__["_flat_weights"] = [getattr(module, name) for name in names]
    return tree


def tensors_held(network: nn.Module) -> list[torch.Tensor]:
    """Every tensor that a network's modules hold, each once: parameters, buffers, and those in attributes."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    _Exchange({}, keep).inside_tree(network)
    return found


# ------------------------------------------------------------------------------------- what tensors are in


class _Exchange:
    """Puts other tensors into the places of a tree's, wherever a module holds them.

    Containers that the tree owns are filled in place. What it shares with the network (an object, a
    container of another class, whatever is inside those) is made anew where it leads to something else now,
    each once, so that what was the same stays the same.

    Args:
        known: What to put in the place of tensors and containers, by their ids.
        copied: Makes what stands in the place of all other tensors; by default they stay.
    """

    def __init__(self, known: dict[int, Any], copied: Copy | None) -> None:
        self.known = known
        self.copied = copied
        self.owned: dict[int, Any] = {}
        self.leading: dict[int, bool] = {}
        self.alive: list[Any] = []  # what is known by its id

    def inside_tree(self, tree: nn.Module) -> None:
        """Exchange what the modules of a tree hold; scripted ones have parameters and buffers only."""
        holders: list[Any] = []
        for module in tree.modules():
            holders += [module._parameters, module._buffers]
            if not is_scripted(module):
                holders.append(module.__dict__)
        for holder in holders:
            self.owned.update((id(part), part) for part in (holder, *_own_containers(holder)))
        for holder in list(self.owned.values()):
            for key, item in list(enumerate(holder) if isinstance(holder, list) else holder.items()):
                if not isinstance(item, _ENDS) and id(item) not in self.owned:
                    exchanged = self.of(item)
                    if exchanged is not item:
                        holder[key] = exchanged

    def of(self, value: Any) -> Any:
        """Return what stands in for a value: the value itself, unless it leads to something else."""
        if id(value) in self.known:
            return self.known[id(value)]
        if isinstance(value, torch.Tensor):
            return self._made(value, value if self.copied is None else self.copied(value))
        return self._anew(value) if self._leads(value) else value

    def _is_other(self, value: Any) -> bool:
        is_one = id(value) in self.known or isinstance(value, torch.Tensor)
        return is_one and self.of(value) is not value

    def _leads(self, value: Any) -> bool:
        """Whether a value refers to something that another stands in the place of, over however many."""
        if isinstance(value, _ENDS) or id(value) in self.owned:
            return False
        if id(value) not in self.leading:
            self._explore(value)
        return self.leading[id(value)]

    def _explore(self, value: Any) -> None:
        seen = explore(value, _parts, lambda part, _: self._is_other(part), self._is_followed, self.leading)
        self.alive.append(seen)

    def _is_followed(self, part: Any, _: Any) -> bool:
        return not isinstance(part, torch.Tensor) and id(part) not in self.owned

    def _anew(self, value: Any) -> Any:
        """An object of the same class, made without its ``__init__``, of what stands in its parts' places."""
        if isinstance(value, functools.partial):
            keywords = {key: self.of(item) for key, item in value.keywords.items()}
            return self._made(value, functools.partial(value.func, *map(self.of, value.args), **keywords))
        return remake(value, self.of, lambda twin: self._made(value, twin), lambda key: key)

    def _made(self, value: Any, twin: Any) -> Any:
        self.known[id(value)] = self.known[id(twin)] = twin
        self.alive += [value, twin]
        return twin


def _own_containers(holder: Any) -> Iterator[Any]:
    """The plain containers in a module's dict, which are the tree's own, each before its parts."""
    waiting, seen = [holder], {id(holder)}
    while waiting:
        item = waiting.pop()
        for part in item.values() if hasattr(item, "values") else item:  # a scripted module's is no dict
            if type(part) in (*_FILLED, tuple) and id(part) not in seen:
                seen.add(id(part))
                waiting.append(part)
                if type(part) is not tuple:
                    yield part


def _parts(value: Any) -> list[Any]:
    """List what an object holds: items of a container, attributes, arguments of a partial call."""
    if isinstance(value, functools.partial):
        held = [*value.args, *value.keywords.values()]
    else:
        base = base_of(value)
        items = [] if base in (object, types.SimpleNamespace) else base.__iter__(value)
        attributes = getattr(value, "__dict__", {}).values()
        held = [*(base.values(value) if issubclass(base, dict) else items), *attributes]
        held += [item for _, item in slots_of(value)]
    return [part for part in held if not isinstance(part, _ENDS)]


# The containers of which a tree has its own, to be filled in place.
_FILLED = (dict, OrderedDict, defaultdict, list)
# What holds no tensors of a network, or is no part of its state.
_ENDS = (
    *(bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device, Enum, type),
    *(nn.Module, fx.Graph, fx.Node, torch.Generator, logging.Logger, types.ModuleType),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, weakref.ref, RemovableHandle),
)
