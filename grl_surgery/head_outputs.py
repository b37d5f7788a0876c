"""How the logits of heads are added to what a network returns, and how they are taken out again."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from grl_surgery.opaque import one_operation

__all__ = ["LOGITS", "add_logits", "split_logits"]

LOGITS = "_logits"
"""What follows the name of a head in the name of its logits: ``domain_logits``."""


@fx.has_side_effect
@one_operation
def add_logits(output: Any, names: Sequence[str], *logits: Any) -> Any:
    """What a network returns, with the logits of its heads.

    A mapping, a dataclass, a named tuple or another object with attributes keeps its class and gains
    ``<head>_logits``. A tensor, a tuple, a list or None becomes the first item of a tuple, before the logits.

    Example:
        >>> sorted(add_logits({"out": 1}, ["domain"], 2))
        ['domain_logits', 'out']
        >>> add_logits(1, ["domain"], 2)
        (1, 2)

    Args:
        output: What the network returns without its heads.
        names: Names of the heads.
        *logits: The logits of each head.
    """
    if isinstance(output, Mapping):
        extended = _copied(output)
        for name, value in zip(names, logits, strict=True):
            extended[name + LOGITS] = value
        return extended
    if _is_plain(output):
        return (output, *logits)
    extended = _with_attributes(output)
    for name, value in zip(names, logits, strict=True):
        object.__setattr__(extended, name + LOGITS, value)
    return extended


def split_logits(output: Any, names: Sequence[str]) -> tuple[Any, ...]:
    """The output without the logits, and the logits of each head: the inverse of :func:`add_logits`.

    Example:
        >>> split_logits({"out": 1, "domain_logits": 2}, ["domain"])
        ({'out': 1}, 2)
    """
    if not names:
        return (output,)
    if isinstance(output, Mapping):
        plain: Any = copy.copy(output)
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
    return output.copy() if isinstance(output, dict) else copy.copy(output)


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


@functools.cache
def _open_class(kind: type) -> Any:
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _pop(mapping: Any, key: str) -> Any:
    value = mapping[key]
    # An output of transformers refuses to lose a key, and has it as an attribute as well.
    base = next((base for base in (OrderedDict, dict) if isinstance(mapping, base)), type(mapping))
    base.__delitem__(mapping, key)
    getattr(mapping, "__dict__", {}).pop(key, None)
    return value
