"""Reverses the tensors inside a nested value, or picks one item out of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from grl_surgery.errors import ShapeError
from grl_surgery.isolation.pytrees import keys_of, part_of
from grl_surgery.points import near_names

__all__ = ["one_operation", "pick", "reverse_nested"]


def one_operation(function: Callable[..., Any]) -> Any:
    """Let a network that is being traced record the call, as it sees only proxies."""

    @functools.wraps(function)
    def recorded(*args: Any) -> Any:
        proxy = next((arg for arg in args if isinstance(arg, fx.Proxy)), None)
        if proxy is None:
            return function(*args)
        return proxy.tracer.create_proxy("call_function", recorded, args, {})

    return recorded


# ------------------------------------------------------------------------------- what comes out of a call


@one_operation
def reverse_nested(layer: nn.Module, value: Any, items: tuple[Any, ...] = ()) -> Any:
    """``value`` with every tensor in it passed through ``layer``, or only those of one item of it.

    What is not a tensor of floating point numbers passes as it is. Tuples, lists, mappings and objects with
    attributes are copied as far as they change; the value itself is left alone.

    Example:
        >>> losses = reverse_nested(nn.Identity(), {"a": torch.ones(2), "count": 3})
        >>> sorted(losses)
        ['a', 'count']

    Raises:
        ShapeError: There is no such item.
    """
    if items:
        return _exchanged(value, items[0], lambda item: reverse_nested(layer, item, items[1:]))
    if isinstance(value, torch.Tensor):
        return layer(value) if value.is_floating_point() or value.is_complex() else value
    for key in keys_of(value):
        value = _exchanged(value, key, lambda item: reverse_nested(layer, item))
    return value


def _exchanged(value: Any, key: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a container with one part exchanged; the same container where nothing changes."""
    key, item = _part(value, key)
    changed = change(item)
    if changed is item:
        return value
    if isinstance(value, tuple):
        parts = [changed if place == key else part for place, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    copied = copy.copy(value)
    if isinstance(value, (Mapping, list)):
        copied[key] = changed
    else:
        setattr(copied, key, changed)
    return copied


@one_operation
def pick(value: Any, items: tuple[Any, ...]) -> Any:
    """The item of ``value`` that ``items`` lead to.

    Raises:
        ShapeError: There is no such item.
    """
    for key in items:
        _, value = _part(value, key)
    return value


def _part(value: Any, key: Any) -> tuple[Any, Any]:
    """The part of a container called ``key``, which names neither tell whether '0' is a key or a place."""
    keys = keys_of(value)
    found = next((known for known in keys if str(known) == str(key)), None)
    if (
        found is None
        and type(key) is int
        and not isinstance(value, torch.Tensor)
        and -len(keys) <= key < len(keys)
    ):
        found = keys[key]  # an output of transformers answers to a position as well
    if found is None:
        names = [f"[{known}]" for known in keys]
        raise ShapeError(
            f"the value, a {type(value).__name__}, has no item [{key}]",
            choices=near_names(f"[{key}]", names) or names[:5],
        )
    return found, part_of(value, found)
