"""Notices and restores Python objects that a forward changes while it is traced."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from grl_surgery.capture.code_inspection import MEMO, functions_of, memos_of, names_in
from grl_surgery.capture.node_uses import is_size
from grl_surgery.isolation.object_graph import slots_of
from grl_surgery.isolation.tensor_copy import is_scripted

__all__ = ["preserve_python_state"]


@contextlib.contextmanager
def preserve_python_state(modules: Mapping[str, nn.Module]) -> Iterator[Callable[[], str | None]]:
    """Put back what the forwards of these modules change in Python: a cache, a counter, a generator.

    Watched are the modules' attributes, what these hold, and the containers and generators among the
    attributes of their classes and the globals and variables that their code names. What a function under
    ``functools.lru_cache`` has kept of its results it forgets.

    Args:
        modules: By their paths; copies, whose own attributes are not put back.

    Returns:
        A function that says what has been changed by now, or None.
    """
    ours = {path: module for path, module in modules.items() if not is_scripted(module)}
    own = [
        (path, kind, holder, dict(holder))
        for path, module in ours.items()
        for kind, holder in _holders(module)
    ]
    kept = _StateSnapshot()
    for path, module in ours.items():
        for name, value in vars(module).items():
            if name not in _EVERY_MODULE_HAS:
                kept.watch(value, f"{path}.{name}" if path else name)
    for kind in dict.fromkeys(map(type, ours.values())):
        for where, value in _shared(kind):
            kept.watch(value, where)

    def changed() -> str | None:
        for path, kind, holder, before in own:
            for name in _assigned(kind, holder, before):
                where = f"{path}.{name}" if path else name
                return f"it assigns self.{name}, and a graph would leave {where!r} as it is"
        moved = kept.changed()
        return moved and f"it changes {moved!r}, and a graph would leave it as it is"

    try:
        yield changed
    finally:
        kept.put_back()


_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))


def _holders(module: nn.Module) -> Iterator[tuple[type, dict[str, Any]]]:
    """The dicts in which a module keeps what is assigned to it."""
    for holder in (vars(module), module._parameters, module._buffers, module._modules):
        yield type(module), holder


def _assigned(kind: type, holder: dict[str, Any], before: dict[str, Any]) -> Iterator[str]:
    """Names whose values are not what they were; a cached property has only been read."""
    for name in holder.keys() | before.keys():
        value, old = dict.get(holder, name, _MISSING), before.get(name, _MISSING)
        if _same(value, old) or name.startswith("_constant_"):
            continue
        if isinstance(value, fx.Proxy) or not isinstance(
            getattr(kind, name, None), functools.cached_property
        ):
            yield name


_MISSING = object()
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def _same(first: Any, second: Any) -> bool:
    return first is second or (type(first) is type(second) and type(first) in _PLAIN and first == second)


_SHARED: weakref.WeakKeyDictionary[type, list[tuple[str, Mapping[str, Any]]]] = weakref.WeakKeyDictionary()


def _shared(kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """The containers and generators of a class and of its code, by their names in the code.

    They are attributes, globals, defaults of arguments, and variables of enclosing functions.
    """
    if kind not in _SHARED:
        classes = [
            vars(base) for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module
        ]
        functions = functions_of(kind)
        code = [(names_in(function.__code__), function.__globals__) for function in functions]
        names = set[str]().union(*(names for names, _ in code))
        defaults = [(set(held), held) for held in map(_defaults, functions)]
        cells = [(set(function.__code__.co_freevars), _Cells(function)) for function in functions]
        places = [*((names, held) for held in classes), *code, *defaults, *cells]
        _SHARED[kind] = [
            (name, held)
            for names, held in places
            for name in names
            if not isinstance(held.get(name, 0), _OPAQUE)
        ]
        _SHARED[kind] += [(memo.__name__, {memo.__name__: memo}) for memo in memos_of(kind)]
    for name, held in _SHARED[kind]:
        value = held.get(name)
        if isinstance(value, _CONTAINERS) or _is_generator(value):
            yield name, value


class _Cells(Mapping[str, Any]):
    """The variables of enclosing functions that a function uses, as they are now."""

    def __init__(self, function: types.FunctionType) -> None:
        self.cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def __getitem__(self, name: str) -> Any:
        """The value of a variable; one that has none yet is missing."""
        try:
            return self.cells[name].cell_contents
        except ValueError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    """The defaults of a function's arguments, by their names."""
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    last = zip(reversed(positional), reversed(function.__defaults__ or ()), strict=False)
    return {**dict(last), **(function.__kwdefaults__ or {})}


# ------------------------------------------------------------------------------------ containers, generators

_CONTAINERS = (dict, list, set, deque, MEMO)
_OPAQUE = (
    *(*_PLAIN, torch.Tensor, torch.Size, torch.dtype, torch.device, nn.Module, fx.Graph, logging.Logger),
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, property),
)
_ENOUGH = 10_000  # objects to look at: more are a vocabulary, and no state of a network


class _StateSnapshot:
    """Objects, with what they held at first."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[str, Any, Any]] = {}

    def watch(self, value: Any, where: str) -> None:
        """Remember what ``value`` holds, and what that holds in turn."""
        rest = [value]
        while rest and len(self.held) < _ENOUGH:
            value = rest.pop()
            if not isinstance(value, _OPAQUE) and id(value) not in self.held:
                content = _content(value)
                self.held[id(value)] = (where, value, content)
                if not (_is_generator(value) or isinstance(value, MEMO)):
                    rest += content.values() if isinstance(content, dict) else content

    def changed(self) -> str | None:
        """Say where an object has changed, unless it only keeps a value that is computed once."""
        for where, value, content in self.held.values():
            if _differs(value, content) and not _is_memo(value, content):
                return where
        return None

    def put_back(self) -> None:
        """Make everything hold again what it held."""
        for _, value, content in self.held.values():
            if _differs(value, content):
                _put_back(value, content)


def _is_generator(value: Any) -> bool:
    return isinstance(value, (torch.Generator, random.Random)) or (
        type(value).__module__.startswith("numpy.random")
        and (hasattr(value, "get_state") or hasattr(value, "bit_generator"))
    )


def _content(value: Any) -> Any:
    """Return what an object holds, as a dict, a list or a set; of a generator its state."""
    if isinstance(value, MEMO):
        return value.cache_info().misses
    if isinstance(value, random.Random):
        return value.getstate()
    if _is_generator(value):
        return value.get_state() if hasattr(value, "get_state") else value.bit_generator.state
    if isinstance(value, dict):
        return dict(_kind_of_dict(value).items(value))
    if isinstance(value, (set, frozenset)):
        return set(value)
    if isinstance(value, (list, tuple, deque)):
        return list(value)
    return {**getattr(value, "__dict__", {}), **{slot.__name__: item for slot, item in slots_of(value)}}


def _kind_of_dict(value: dict[Any, Any]) -> Any:
    """The class whose methods read and write what a dict holds; those of a subclass may do anything else."""
    return OrderedDict if isinstance(value, OrderedDict) else dict


def _differs(value: Any, content: Any) -> bool:
    now = _content(value)
    if isinstance(value, MEMO):
        return bool(now != content)
    if isinstance(content, torch.Tensor):
        return not torch.equal(now, content)
    if _is_generator(value):
        return repr(now) != repr(content)
    if isinstance(content, dict):
        return list(now) != list(content) or not all(map(_same, now.values(), content.values()))
    if isinstance(content, set):
        return bool(now != content)
    return len(now) != len(content) or not all(map(_same, now, content))


def _is_memo(value: Any, content: Any) -> bool:
    """Whether a dict got nothing but new values that do not depend on what the network is given.

    The graph computes them in every run, which gives the same.
    """
    if not isinstance(value, dict):
        return isinstance(value, MEMO)
    now = _content(value)
    added = [item for key, item in now.items() if key not in content]
    kept = all(_same(now.get(key, _MISSING), item) for key, item in content.items())
    return kept and all(isinstance(item, fx.Proxy) and not _is_from_inputs(item.node) for item in added)


def _is_from_inputs(node: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    rest = [node]
    while rest:
        node = rest.pop()
        if node.op == "placeholder":
            return True
        if node not in seen and not is_size(node):
            seen.add(node)
            rest += node.all_input_nodes
    return False


def _put_back(value: Any, content: Any) -> None:
    if isinstance(value, MEMO):
        value.cache_clear()
    elif isinstance(value, random.Random):
        value.setstate(content)
    elif _is_generator(value) and hasattr(value, "set_state"):
        value.set_state(content)
    elif _is_generator(value):
        value.bit_generator.state = content
    elif isinstance(value, (list, deque)):
        value.clear()
        value.extend(content)
    elif isinstance(value, (dict, set)):
        base: Any = set if isinstance(value, set) else _kind_of_dict(value)
        base.clear(value)
        base.update(value, content)
    else:
        now = _content(value)
        for name in now.keys() - content.keys():
            object.__delattr__(value, name)
        for name, item in content.items():
            if now.get(name, _MISSING) is not item:
                object.__setattr__(value, name, item)
