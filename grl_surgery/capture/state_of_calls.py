"""Finds what a called module, or a hook on it, leaves in Python for a forward that is traced through."""

from __future__ import annotations

import dis
import functools
import logging
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from grl_surgery.capture.code_inspection import functions_behind, functions_of
from grl_surgery.isolation.module_tree import modules_by_path
from grl_surgery.isolation.object_graph import slots_of

__all__ = ["attributes_left_by_a_call", "state_left_by_calls"]


def state_left_by_calls(traced: Iterable[nn.Module], called: Iterable[nn.Module]) -> str | None:
    """Name something that the forwards traced through read and that calls of other modules may write.

    A graph would keep what was there while it was made, such as an item of a list that a hook fills. What a
    module keeps in its own attributes is not looked for here: see :func:`attributes_left_by_a_call`.

    Example:
        >>> class Child(nn.Module):
        ...     def forward(self, x):
        ...         self.notes["last"] = x
        ...         return x
        >>> class Parent(nn.Module):
        ...     def forward(self, x):
        ...         return self.child(x) + self.notes["last"]
        >>> Child.__module__ = Parent.__module__ = "networks"
        >>> parent, child = Parent(), Child()
        >>> parent.notes = child.notes = {}
        >>> state_left_by_calls([parent], [child])
        'notes'

    Args:
        traced: The modules whose forwards are traced through.
        called: The modules that stay calls, each with all that lies in it.

    Returns:
        The name of an attribute or a variable; None where there is no such thing.
    """
    parts = [part for module in called for part in modules_by_path(module).values() if _may_write(part)]
    writers = [writer for part in parts for writer in _writers(part)]
    written = set[str]().union(*(writer.code.stored for writer in writers if writer.is_hook))
    if not any(writer.code.changes_contents or writer.code.stored for writer in writers):
        return None
    readers = list(traced)
    codes = [_code_of_class(kind) for kind in dict.fromkeys(map(type, readers))]
    read = frozenset[str]().union(*(code.loaded for code in codes))
    if both := written & read:
        return min(both)
    reached = ((it, part) for it in writers for _, value in it.given for part in _objects([value]))
    changed = {id(part) for it, part in reached if it.may_change(part)}
    held = [(key, value) for module in readers for key, value in vars(module).items() if key in read]
    held += [pair for code in codes for function in code.functions for pair in _variables(function)]
    return next((name for name, value in held for part in _objects([value]) if id(part) in changed), None)


def attributes_left_by_a_call(module: nn.Module) -> set[str]:
    """Names of the attributes that the code of a module's class may assign or change when it is called.

    Parameters, buffers and children are not among them.

    Example:
        >>> class Child(nn.Module):
        ...     def forward(self, x):
        ...         self.last = x
        ...         return x
        >>> Child.__module__ = "networks"
        >>> attributes_left_by_a_call(Child())
        {'last'}
    """
    if isinstance(module, torch.jit.ScriptModule) or _is_known(module):
        return set()
    code = _code_of_class(type(module))
    left = {name for name in code.stored if not name.startswith(_ENCLOSING)}
    if code.changes_contents:
        held = ((name, value) for name, value in vars(module).items() if name in code.loaded)
        left.update(name for name, value in held if name not in _STRUCTURE and next(_objects([value]), None))
    return left - module._parameters.keys() - module._buffers.keys() - module._modules.keys() - {"training"}


_STRUCTURE = frozenset(vars(nn.Module()))


class _Code(NamedTuple):
    """What some functions do: the names that they read and assign, and whether they change a container."""

    functions: tuple[FunctionType, ...]
    loaded: frozenset[str]
    stored: frozenset[str]
    changes_contents: bool


class _Writer(NamedTuple):
    """Code that runs while a module is called, and what it is given, by names in the code."""

    code: _Code
    given: tuple[tuple[str, Any], ...]
    is_method: bool = False
    is_hook: bool = False

    def may_change(self, part: Any) -> bool:
        """Whether the code may change an object that it can reach: every container, or an attribute."""
        if self.code.changes_contents or self.is_method:
            return True
        return not self.code.stored.isdisjoint(getattr(part, "__dict__", ()))


_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_KEEP_NOTHING = ("torch", __name__.partition(".")[0])


@functools.lru_cache(maxsize=4000)
def _is_of_torch(kind: Any) -> bool:
    return kind.__module__.partition(".")[0] in _KEEP_NOTHING


def _is_known(value: Any) -> bool:
    kind: Any = type(value)
    return _is_of_torch(kind)


def _may_write(module: nn.Module) -> bool:
    """Whether there is code to read: most modules are torch's own and have no hooks."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return not _is_known(module) or any(module.__dict__[kind] for kind in _HOOKS)


def _writers(module: nn.Module) -> Iterator[_Writer]:
    """Yield the code that runs when a module is called: its forward and its hooks; nothing of torch's."""
    if not _is_known(module):
        yield from _with_methods(_code_of_class(type(module)), (module,))
    for hook in [hook for kind in _HOOKS for hook in module.__dict__[kind].values()]:
        if isinstance(hook, functools.partial):
            code = _code_of(tuple(functions_behind(hook.func, type(_owner(hook.func)))))
            yield from _with_methods(
                code, (module, _owner(hook.func), *hook.args, *hook.keywords.values()), is_hook=True
            )
        elif isinstance(hook, _CALLED_BY_CODE):
            code = _code_of(tuple(functions_behind(hook, type(_owner(hook)))))
            yield from _with_methods(code, (module, _owner(hook)), is_hook=True)
        elif not _is_known(hook):
            code = _code_of(tuple(functions_behind(type(hook).__call__, type(hook))))
            yield from _with_methods(code, (module, hook), is_hook=True)


_CALLED_BY_CODE = (types.FunctionType, types.MethodType, types.BuiltinMethodType)


def _owner(function: Any) -> Any:
    return getattr(function, "__self__", None)


def _with_methods(code: _Code, owners: tuple[Any, ...], is_hook: bool = False) -> Iterator[_Writer]:
    """Yield the code with what it is given, and the methods that it calls of objects among that."""
    given = [pair for function in code.functions for pair in _variables(function)]
    given += [(name, part) for owner in owners for name, part in _attributes(owner, code.loaded)]
    # A variable of an enclosing function may be the network itself.
    modules = [value for _, value in given if isinstance(value, nn.Module)]
    given += [(name, part) for module in modules for name, part in _attributes(module, code.loaded)]
    yield _Writer(code, tuple(given), is_hook=is_hook)
    for name, value in given:
        for held in () if isinstance(value, _OPAQUE) else _objects([value]):
            if not isinstance(held, (*_CONTAINERS, torch.Tensor)):
                named = [getattr(type(held), method, None) for method in code.loaded]
                methods = tuple(it for it in named if isinstance(it, FunctionType))
                code_of_methods = _code_of(methods)
                if code_of_methods.stored or code_of_methods.changes_contents:
                    yield _Writer(code_of_methods, ((name, held),), is_method=True)


def _attributes(owner: Any, names: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """The attributes of an object that have these names, and those of its classes."""
    if isinstance(owner, _CONTAINERS):
        yield "", owner
        return
    holders = [getattr(owner, "__dict__", {}), *(vars(base) for base in type(owner).__mro__)]
    for holder in holders[:-1]:  # the last is that of ``object``
        yield from ((name, holder[name]) for name in names if name in holder)
    yield from ((slot.__name__, value) for slot, value in slots_of(owner) if slot.__name__ in names)


_CLASSES: weakref.WeakKeyDictionary[type, _Code] = weakref.WeakKeyDictionary()


def _code_of_class(kind: type[nn.Module]) -> _Code:
    if kind not in _CLASSES:
        _CLASSES[kind] = _code_of(tuple(functions_of(kind)))
    return _CLASSES[kind]


def _code_of(functions: tuple[FunctionType, ...]) -> _Code:
    codes = [_read(function.__code__) for function in functions]
    return _Code(
        functions,
        frozenset[str]().union(*(loaded for loaded, _, _ in codes)),
        frozenset[str]().union(*(stored for _, stored, _ in codes)),
        any(changes for _, _, changes in codes),
    )


@functools.lru_cache(maxsize=4000)
def _read(code: CodeType) -> tuple[frozenset[str], frozenset[str], bool]:
    """The names that a function reads and those that it assigns, and whether it may change a container."""
    names, strings = {*code.co_names}, set(_strings(code.co_consts))
    steps = list(dis.get_instructions(code))
    stored = {_name(step) for step in steps if step.opname in _ASSIGNS}
    loaded = {_name(step) for step in steps if step.opname in _READS}
    loaded |= strings if "getattr" in names else set()
    stored |= strings if names & _SETTERS else set()
    changes = any(step.opname in _CHANGES for step in steps) or any(
        name in _CHANGING_METHODS or (name.endswith("_") and not name.endswith("__")) for name in names
    )
    for inner in (value for value in code.co_consts if isinstance(value, CodeType)):
        also_loaded, also_stored, also_changes = _read(inner)
        loaded, stored, changes = loaded | also_loaded, stored | also_stored, changes or also_changes
    own = {_ENCLOSING + name for name in code.co_cellvars}  # shared with the functions inside it only
    return frozenset(loaded - own), frozenset(stored - own), changes


def _strings(constants: Iterable[Any]) -> Iterator[str]:
    """The strings among constants; names of keywords are in a tuple."""
    for value in constants:
        if isinstance(value, tuple):
            yield from _strings(value)
        elif isinstance(value, str):
            yield value


_ENCLOSING = "variable "
"""In front of the names of variables of enclosing functions, which are no attributes."""


def _name(step: dis.Instruction) -> str:
    return f"{_ENCLOSING}{step.argval}" if step.opname.endswith("_DEREF") else str(step.argval)


_ASSIGNS = frozenset({"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "STORE_DEREF"})
_READS = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_SUPER_ATTR"})
_SETTERS = frozenset({"setattr", "__setattr__", "__dict__", "vars"})
_CHANGES = frozenset({"STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"})
_CHANGING_METHODS = frozenset(
    {
        *("append", "appendleft", "extend", "extendleft", "insert", "update", "add", "setdefault", "set"),
        *("pop", "popleft", "popitem", "clear", "remove", "discard", "put", "push", "write"),
        *("__setitem__", "__setattr__", "setattr"),
    }
)


def _variables(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals and the variables of enclosing functions that a function names, with their values."""
    for name in _read(function.__code__)[0]:
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield _ENCLOSING + name, cell.cell_contents
        except ValueError:  # of a function that is still being made
            continue


_ENOUGH = 10_000
_CONTAINERS = (dict, list, set, tuple, frozenset, deque)


def _objects(roots: Iterable[Any]) -> Iterator[Any]:
    """The containers and objects among some values and all that these hold, each once."""
    waiting, seen = list(roots), set[int]()
    while waiting and len(seen) < _ENOUGH:
        value = waiting.pop()
        if isinstance(value, _OPAQUE) or id(value) in seen or not _is_state(value):
            continue
        seen.add(id(value))
        if not isinstance(value, (tuple, frozenset)):
            yield value
        if isinstance(value, torch.Tensor):
            continue
        if isinstance(value, dict):
            waiting += dict.values(value)
        elif isinstance(value, _CONTAINERS):
            waiting += value
        waiting += getattr(value, "__dict__", {}).values()
        waiting += [item for _, item in slots_of(value)]


def _is_state(value: Any) -> bool:
    """Whether it is a container, a tensor or an object of somebody's class, and no part of the language."""
    if isinstance(value, (*_CONTAINERS, torch.Tensor)):
        return True
    return type(value).__module__.partition(".")[0] not in _OF_THE_LANGUAGE


_OF_THE_LANGUAGE = frozenset({"builtins", "typing", "functools", "re", "enum", "torch", "numpy"})

_OPAQUE = (
    *(bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device),
    *(
        nn.Module,
        nn.Parameter,
        type,
        types.ModuleType,
        types.FunctionType,
        types.BuiltinFunctionType,
        types.MethodType,
    ),
    *(property, staticmethod, classmethod, functools.partial, RemovableHandle, logging.Logger),
)
