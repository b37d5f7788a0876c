"""Adds the logits of heads to what a network returns, or leaves them on the heads, and reads them again."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree  # torch has no other name for it
from torch import fx, nn

from grl_surgery.isolation.object_graph import remake
from grl_surgery.nn.nested_reversal import one_operation

__all__ = ["LOGITS", "add_logits", "heads_that_keep", "split_logits"]

LOGITS = "_logits"
"""The suffix that makes the name of a head the name of its logits: ``domain_logits``."""


@fx.has_side_effect
@one_operation
def add_logits(output: Any, names: Sequence[Any], *logits: Any) -> Any:
    """What a network returns, with the logits of those heads that are named.

    A head that stands in the list itself, instead of its name, keeps its logits, and the output is without.

    A mapping, a dataclass, a named tuple or another object with attributes keeps its class and gains
    ``<head>_logits``. A tensor, a tuple, a list or None becomes the first item of a tuple, before the logits.

    Example:
        >>> sorted(add_logits({"out": 1}, ["domain"], 2))
        ['domain_logits', 'out']
        >>> add_logits(1, ["domain"], 2)
        (1, 2)

    Args:
        output: What the network returns without its heads.
        names: For each head its name, or the head itself, which then keeps its logits.
        *logits: The logits of each head.
    """
    pairs = list(zip(names, logits, strict=True))
    for head, value in pairs:
        if not isinstance(head, str):
            head.keep_logits(value)
    named = [pair for pair in pairs if isinstance(pair[0], str)]
    return _extended(output, named) if named else output


def _extended(output: Any, named: Sequence[tuple[str, Any]]) -> Any:
    if isinstance(output, Mapping):
        extended = _copied(output)
        for name, value in named:
            extended[name + LOGITS] = value
        return extended
    if _is_plain(output):
        return (output, *(value for _, value in named))
    extended = _with_attributes(output)
    for name, value in named:
        object.__setattr__(extended, name + LOGITS, value)
    return extended


def heads_that_keep(network: nn.Module) -> list[str]:
    """Names of the heads of a network that keep their logits, in the order attached."""
    done = network.__dict__.get("grl_surgery")
    return [cut.module for cut in done.cuts if cut.is_head and cut.keeps_logits] if done else []


def split_logits(output: Any, names: Sequence[str], network: nn.Module | None = None) -> tuple[Any, ...]:
    """The output without the logits, and the logits of each head: the inverse of :func:`add_logits`.

    Example:
        >>> split_logits({"out": 1, "domain_logits": 2}, ["domain"])
        ({'out': 1}, 2)

    Args:
        output: What the network has returned.
        names: Names of its heads, in the order attached.
        network: That has run, where some of its heads keep their logits.
    """
    kept = [] if network is None else [name for name in heads_that_keep(network) if name in names]
    plain, *returned = _split(output, [name for name in names if name not in kept])
    logits = iter(returned)
    held: Any = network
    return plain, *(held._modules[n].kept_logits if n in kept else next(logits) for n in names)


def _split(output: Any, names: Sequence[str]) -> tuple[Any, ...]:
    if not names:
        return (output,)
    if isinstance(output, Mapping):
        is_of_transformers = hasattr(type(output), "__dataclass_fields__")
        plain: Any = copy.copy(output) if is_of_transformers else _copied(output)
        return plain, *(_pop(plain, name + LOGITS) for name in names)
    if _is_plain(output):
        return tuple(output)
    logits = [getattr(output, name + LOGITS) for name in names]
    kind = type(output)
    if issubclass(kind, tuple):
        return kind.__mro__[1](*output), *logits
    plain = copy.copy(output)
    for name in names:
        object.__delattr__(plain, name + LOGITS)
    return plain, *logits


def _copied(output: Any) -> Any:
    if hasattr(
        type(output), "__dataclass_fields__"
    ):  # an output of transformers, which torch.compile makes by its class
        kind: Any = type(output)
        return kind(**output)
    if type(output) in (dict, OrderedDict):
        return output.copy()
    if isinstance(output, dict):  # its copy() may be a plain dict, and copy.copy() may call its __init__
        return remake(output, lambda item: item, lambda twin: twin, lambda key: key)
    return copy.copy(output)


def _is_plain(output: Any) -> bool:
    """Whether nothing can be added to a value under a name."""
    if isinstance(output, tuple):
        return not hasattr(output, "_fields")
    return isinstance(output, (torch.Tensor, list, type(None), bool, int, float, str)) or not hasattr(
        output, "__dict__"
    )


def _with_attributes(output: Any) -> Any:
    """A copy of an object that takes another attribute; of a named tuple, one of a class derived from its."""
    if isinstance(output, tuple):
        return _open_class(type(output))(*output)
    return copy.copy(output)


class _FieldName(str):
    """The name of a field. Where names are plain text, pytrees keep the fields and nothing else."""


@functools.cache
def _open_class(kind: Any) -> Any:
    """A class derived from that of a named tuple: its instances take attributes and keep them in pytrees."""
    own = {
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "_fields": tuple(map(_FieldName, kind._fields)),
        "__reduce__": lambda value: (_with, (kind, tuple(value), value.__dict__)),
    }
    made = type(kind.__name__, (kind,), own)
    pytree.register_pytree_node(
        made,
        lambda value: ([*value, *value.__dict__.values()], (kind, tuple(value.__dict__))),
        lambda values, context: _unflattened(list(values), *context),
    )
    return made


def _unflattened(values: list[Any], kind: Any, names: Sequence[str]) -> Any:
    count = len(kind._fields)
    return _with(kind, values[:count], dict(zip(names, values[count:], strict=True)))


def _with(kind: Any, fields: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    made = _open_class(kind)(*fields)
    made.__dict__.update(attributes)
    return made


def _pop(mapping: Any, key: str) -> Any:
    value = mapping[key]
    # An output of transformers refuses to lose a key, and has it as an attribute as well.
    base = next((base for base in (OrderedDict, dict) if isinstance(mapping, base)), type(mapping))
    base.__delitem__(mapping, key)
    getattr(mapping, "__dict__", {}).pop(key, None)
    return value
