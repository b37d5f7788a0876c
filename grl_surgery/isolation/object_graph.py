"""Walks through Python objects, and copies those that refer to an object that was replaced."""

from __future__ import annotations

import contextlib
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["base_of", "explore", "remake", "slots_of"]

_CAN_BE_MADE = (
    *(dict, OrderedDict, defaultdict, list, set, deque, tuple, frozenset, types.SimpleNamespace, object),
)


def base_of(value: Any) -> Any:
    """The class of Python's own that holds the content of a value."""
    return next(base for base in type(value).__mro__ if base in _CAN_BE_MADE)


def slots_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """The attributes that live outside of ``__dict__``: what sets each, and its value."""
    for kind in type(value).__mro__:
        for slot in kind.__dict__.values() if "__slots__" in kind.__dict__ else ():
            if type(slot) is types.MemberDescriptorType:
                with contextlib.suppress(AttributeError):  # it was never set
                    yield slot, slot.__get__(value)


def explore(
    value: Any,
    parts: Callable[[Any], Iterable[Any]],
    is_target: Callable[[Any, Any], bool],
    is_followed: Callable[[Any, Any], bool],
    known: dict[int, bool],
) -> dict[int, Any]:
    """Find out for a value, and for all that it refers to, whether it leads to a target.

    Args:
        value: Where to begin.
        parts: What a value refers to.
        is_target: Of a part and of what refers to it, whether it is a target.
        is_followed: Of the same two, whether to look into the part.
        known: The answers by id; filled.

    Returns:
        What was looked at, to be kept alive for as long as the ids count.
    """
    users: dict[int, list[int]] = {}
    leading: list[int] = []
    seen: dict[int, Any] = {id(value): value}
    waiting = [value]
    while waiting:
        item = waiting.pop()
        for part in parts(item):
            users.setdefault(id(part), []).append(id(item))
            if is_target(part, item) or known.get(id(part)):
                leading.append(id(part))
            elif id(part) not in seen and id(part) not in known and is_followed(part, item):
                seen[id(part)] = part
                waiting.append(part)
    known.update(dict.fromkeys(seen, False))
    while leading:
        for user in users.get(leading.pop(), ()):
            if not known[user]:
                known[user] = True
                leading.append(user)
    return seen


def remake(
    value: Any, of: Callable[[Any], Any], made: Callable[[Any], Any], key_of: Callable[[Any], Any]
) -> Any:
    """An object of the same class, made without its ``__init__``, of what stands in for its parts.

    Args:
        value: An object, or a container of a class of its own.
        of: What stands in for a part.
        made: Is told the new object before its parts are made, which may lead back to it.
        key_of: What stands in for the key of a mapping.

    Returns:
        The new object; the value itself where its content is held in C.
    """
    kind, base = type(value), base_of(value)
    is_fixed = base in (tuple, frozenset)
    try:
        twin = base.__new__(kind, *([map(of, base.__iter__(value))] if is_fixed else ()))
    except TypeError:
        return value
    made(twin)
    if issubclass(base, dict):
        for key, item in base.items(value):
            base.__setitem__(twin, key_of(key), of(item))
    elif base in (list, set, deque):
        more = (value.maxlen,) if base is deque else ()
        base.__init__(twin, map(of, base.__iter__(value)), *more)
    if isinstance(value, defaultdict):
        twin.default_factory = of(value.default_factory)
    if type(held := getattr(value, "__dict__", None)) is dict:
        twin.__dict__.update((key, of(item)) for key, item in held.items())
    for slot, item in slots_of(value):
        slot.__set__(twin, of(item))
    return twin
