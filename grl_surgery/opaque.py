"""Calls that no graph looks into: reversing what comes out of one, and values handed out of the inside."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx, nn

from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.nested import keys_of, part_of
from grl_surgery.points import near_names
from grl_surgery.trace_copy import overrides_call

__all__ = ["call", "call_and_collect", "opaque_graph", "pick", "reverse_each", "tap"]


def opaque_graph(collected: Sequence[str] = ()) -> fx.Graph:
    """A graph that calls the network's own forward as one operation.

    Args:
        collected: Names of the taps inside whose values come out of the call beside its output.
    """
    graph = fx.Graph()
    args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    for node, name in ((args, "args"), (kwargs, "kwargs")):
        node.meta.update(point=name, base=name)
    called = (graph.create_node("get_attr", "grl_whole"), args, kwargs)
    if collected:
        values = graph.call_function(call_and_collect, (*called, list(collected)))
        value, *taps = (graph.call_function(operator.getitem, (values, n)) for n in range(len(collected) + 1))
        for node, name in zip(taps, collected, strict=True):
            node.meta["tap"] = name
    else:
        value = graph.call_function(call, called)
    graph.output(value).meta.update(point="output", base="output")
    return graph


def call(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The network's own forward; hooks on the network are run by whoever stands in its place."""
    run = network if overrides_call(network) else network.forward
    return run(*args, **kwargs)


def _one_operation(function: Callable[..., Any]) -> Any:
    """Let an enclosing network that is being traced record the call, as it sees only proxies."""

    @functools.wraps(function)
    def recorded(*args: Any) -> Any:
        proxy = next((arg for arg in args if isinstance(arg, fx.Proxy)), None)
        if proxy is None:
            return function(*args)
        return proxy.tracer.create_proxy("call_function", recorded, args, {})

    return recorded


# ------------------------------------------------------------------------------- what comes out of a call


@_one_operation
def reverse_each(layer: nn.Module, value: Any, items: tuple[Any, ...] = ()) -> Any:
    """``value`` with every tensor in it passed through ``layer``, or only those of one item of it.

    What is not a tensor of floating point numbers passes as it is. Tuples, lists, mappings and objects with
    attributes are copied as far as they change; the value itself is left alone.

    Example:
        >>> losses = reverse_each(nn.Identity(), {"a": torch.ones(2), "count": 3})
        >>> sorted(losses)
        ['a', 'count']

    Raises:
        ShapeError: There is no such item.
    """
    if items:
        return _exchanged(value, items[0], lambda item: reverse_each(layer, item, items[1:]))
    if isinstance(value, torch.Tensor):
        return layer(value) if value.is_floating_point() or value.is_complex() else value
    for key in keys_of(value):
        value = _exchanged(value, key, lambda item: reverse_each(layer, item))
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


@_one_operation
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
    if found is None:
        names = [f"[{known}]" for known in keys]
        raise ShapeError(
            f"the value, a {type(value).__name__}, has no item [{key}]",
            choices=near_names(f"[{key}]", names) or names[:5],
        )
    return found, part_of(value, found)


# ------------------------------------------------------------------------------ what is handed out of one

# Of the call that is running in this thread; no module keeps anything between two calls.
_RUNNING: ContextVar[dict[str, list[Any]] | None] = ContextVar("grl_surgery_taps", default=None)


@fx.has_side_effect
@_one_operation
def tap(value: Any, name: str) -> None:
    """Hand ``value`` to the :func:`call_and_collect` that is running; without one, do nothing.

    It is read when the forward is through, which may overwrite it until then.
    """
    collected = _RUNNING.get()
    if collected is not None:
        kept = value.clone() if isinstance(value, torch.Tensor) else value
        collected.setdefault(name, []).append(kept)


def call_and_collect(
    network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[Any, ...]:
    """The network's own forward: its output, then the value of each tap.

    Raises:
        SurgeryError: A tap was passed never in this forward, or more than once.
    """
    collected: dict[str, list[Any]] = {}
    token = _RUNNING.set(collected)
    try:
        output = call(network, args, kwargs)
    finally:
        _RUNNING.reset(token)
    for name in names:
        times = len(collected.get(name, ()))
        if times != 1:
            raise SurgeryError(
                f"the forward of {type(network).__name__} came {times} times past the point that the head "
                f"{name.partition('.')[0]!r} reads, and the head can be called once",
                example="a point that every forward passes once, such as after='backbone.body.layer4'",
            )
    return (output, *(collected[name][0] for name in names))
