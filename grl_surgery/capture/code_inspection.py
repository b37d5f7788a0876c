"""Reads from bytecode which functions a module's forward may run, and what they ask; calls nothing."""

from __future__ import annotations

import dis
import functools
import itertools
import types
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

__all__ = [
    "MEMO",
    "asking_lines",
    "calls_forward_of",
    "classes_asked",
    "compared_arguments",
    "functions_of",
    "memos_of",
    "names_in",
]

MEMO = type(functools.lru_cache(bool))
"""What keeps the results of a function under ``functools.cache`` or ``functools.lru_cache``."""


def functions_of(kind: type[nn.Module]) -> list[FunctionType]:
    """The forward of a class, the methods and functions that it names, and so on; none of torch's."""
    return [found for found in _reachable(kind) if isinstance(found, FunctionType)]


def memos_of(kind: type[nn.Module]) -> list[Any]:
    """Return those of these functions that keep their results, by ``functools.lru_cache``."""
    return [found for found in _reachable(kind) if isinstance(found, MEMO)]


def _reachable(kind: type[nn.Module]) -> list[Any]:
    found: dict[int, Any] = {}
    _collect(kind.forward, kind, found)
    return list(found.values())


@functools.lru_cache(maxsize=1000)
def asking_lines(code: CodeType) -> frozenset[int]:
    """The lines of a function that call ``isinstance``."""
    lines: set[int] = set()
    starts = dict(dis.findlinestarts(code))
    line: int | None = code.co_firstlineno
    for step in dis.get_instructions(code):
        line = starts.get(step.offset, line)
        if line is not None and step.opname == "LOAD_GLOBAL" and step.argval == "isinstance":
            lines.add(line)
    return frozenset(lines)


@functools.lru_cache(maxsize=1000)
def classes_asked(code: CodeType) -> tuple[str, ...]:
    """The arguments of a function, beside the first, whose ``type(...)`` its code asks for."""
    arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    asked: list[str] = []
    asks = False
    for step in dis.get_instructions(code):
        if asks and step.opname.startswith("LOAD_FAST") and step.argval in arguments:
            asked.append(step.argval)
        asks = step.opname == "LOAD_GLOBAL" and step.argval == "type"
    return tuple(asked)


@functools.lru_cache(maxsize=1000)
def compared_arguments(code: CodeType) -> tuple[str, ...]:
    """The first two arguments of a function of which its code asks whether they are the same object."""
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    read: tuple[str, ...] = ()  # just before
    for step in dis.get_instructions(code):
        if step.opname.startswith("LOAD_FAST"):
            read += step.argval if isinstance(step.argval, tuple) else (step.argval,)
            continue
        if step.opname == "IS_OP" and len(read) > 1 and set(read[-2:]) <= set(arguments):
            return read[-2:]
        read = ()
    return ()


@functools.lru_cache(maxsize=1000)
def calls_forward_of(kind: Any, child: str) -> bool:
    """Whether the code of a class calls ``<...>.<child>.forward(...)``, past the module's hooks."""
    return any(_calls_forward(function.__code__, child) for function in functions_of(kind))


def _calls_forward(code: CodeType, child: str) -> bool:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL")]
    return any(
        step.argval == "forward" and before.argval == child and before.opname.startswith("LOAD_ATTR")
        for before, step in itertools.pairwise(steps)
        if step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD"))
    )


def _collect(value: Any, kind: type, found: dict[int, Any]) -> None:
    for function in _plain(value):
        if id(function) in found or str(function.__module__).partition(".")[0] == "torch":
            continue
        found[id(function)] = function
        if isinstance(function, MEMO):  # its function comes next
            continue
        held = (cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
        for named in (*_named_values(function, kind), *held):
            _collect(named, kind, found)


def _plain(value: Any) -> Iterator[Any]:
    """The functions behind a method, a property, a partial or a decorator, and what keeps their results."""
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.partial):
        value = value.func
    value = getattr(value, "__func__", value)
    while isinstance(value, (FunctionType, MEMO)):
        yield value
        value = getattr(value, "__wrapped__", None)


def _named_values(function: FunctionType, kind: type) -> Iterator[Any]:
    """Yield the values behind the names in a function's code: class attributes, globals, modules' parts."""
    names = names_in(function.__code__)
    files = [value for name in names if isinstance(value := function.__globals__.get(name), ModuleType)]
    own = [file for file in files if file.__name__.partition(".")[0] not in ("torch", "math", "operator")]
    for name in names:
        yield function.__globals__.get(name)
        yield next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
        yield from (getattr(file, name, None) for file in own)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # of a function that is still being made
        return False


def names_in(code: CodeType) -> set[str]:
    """Names of globals and attributes in a function's code, and in that of the functions inside it."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)
