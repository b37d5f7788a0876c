"""A module tree that holds tensors of its own: clones, leaves to differentiate by, shapes without data."""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from grl_surgery.sharing import ORIGINAL, share_copy

__all__ = ["Copy", "clone", "is_scripted", "own_tree", "with_tensors"]

Copy = Callable[[torch.Tensor], torch.Tensor]


def own_tree(network: nn.Module) -> nn.Module:
    """A tree over the same tensors, but for scripted modules, which cannot share theirs and are copied."""
    tree = share_copy(network)
    made: dict[int, Any] = {}
    for module in [module for module in tree.modules() if not is_scripted(module)]:
        original: Any = module.__dict__.get(ORIGINAL)
        if is_scripted(original):
            twin: Any = copy.deepcopy(original)
            module.__dict__[ORIGINAL] = twin
            module.__dict__.update((key, twin.__dict__[key]) for key in ("_parameters", "_buffers"))
            module._modules.update(twin._modules.items())
        else:
            scripted = {name: child for name, child in module._modules.items() if is_scripted(child)}
            module._modules.update(copy.deepcopy(scripted, made))
    return tree


def is_scripted(module: Any) -> bool:
    """Whether a module holds its parts in C++."""
    return isinstance(module, torch.jit.ScriptModule)


def clone(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a memory of their own."""
    return tensor.detach().clone()


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
    tree = own_tree(network)
    given = {} if tensors is None else tensors
    named = (*tree.named_parameters(), *tree.named_buffers())
    known: dict[int, Any] = {id(tensor): given[name] for name, tensor in named if name in given}
    known.update((id(tensor), tensor) for tensor in given.values())
    for module in tree.modules():
        _exchange_inside(module._parameters, known, copied)
        _exchange_inside(module._buffers, known, copied)
        if not is_scripted(module):
            _exchange_inside(module.__dict__, known, copied)
        if hasattr(module, "_flat_weights_names"):  # recurrent layers keep a list of their parameters
            names: Any = module._flat_weights_names
            module.__dict__["_flat_weights"] = [getattr(module, name) for name in names]
    return tree


def _exchange_inside(holder: Any, known: dict[int, Any], copied: Copy) -> None:
    """Exchange the tensors in a dict or a list, in place."""
    for key, item in list(enumerate(holder) if isinstance(holder, list) else holder.items()):
        exchanged = _exchanged(item, known, copied)
        if exchanged is not item:
            holder[key] = exchanged


def _exchanged(value: Any, known: dict[int, Any], copied: Copy) -> Any:
    """``value`` with other tensors in it; a tensor that stands in several places stays one."""
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, torch.Tensor):
        made = copied(value).requires_grad_(value.requires_grad and value.is_leaf)
        known[id(value)] = known[id(made)] = made
        return made
    if type(value) is tuple:
        parts = [_exchanged(item, known, copied) for item in value]
        return value if all(map(operator.is_, parts, value)) else tuple(parts)
    if type(value) in _COPIED and value:
        known[id(value)] = value
        _exchange_inside(value, known, copied)
    return value


# The containers of which a tree has its own.
_COPIED = (dict, OrderedDict, defaultdict, list)
