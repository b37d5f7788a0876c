"""Reads from bytecode which functions a module's forward may run, and what they ask; calls nothing."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
import types
import weakref
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn

__all__ = [
    "MEMO",
    "IdentityQuestions",
    "asking_lines",
    "calls_forward_of",
    "catches_errors",
    "classes_asked",
    "compared_arguments",
    "functions_behind",
    "functions_of",
    "identity_questions",
    "memos_of",
    "method_that_calls_itself",
    "names_in",
]

MEMO = type(functools.lru_cache(bool))
"""What keeps the results of a function under ``functools.cache`` or ``functools.lru_cache``."""


def functions_of(kind: type[nn.Module]) -> list[FunctionType]:
    """The forward of a class, the methods and functions that it names, and so on; none of torch's."""
    return [found for found in _reachable(kind) if isinstance(found, FunctionType)]


def functions_behind(value: Any, kind: type) -> list[FunctionType]:
    """A function, those that it names, and so on; none of torch's.

    Args:
        value: A function, a method, or what a decorator made of one.
        kind: The class whose attributes ``self.<name>`` may mean.
    """
    found: dict[int, Any] = {}
    _collect(value, kind, found)
    return [it for it in found.values() if isinstance(it, FunctionType)]


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


@functools.lru_cache(maxsize=4000)
def classes_asked(code: CodeType) -> tuple[str, ...]:
    """The variables of a function, beside the first argument, of which its code asks what they are.

    It does so by ``type(x)``, ``callable(x)``, ``hasattr(x, ...)``, ``getattr(x, ..., default)``, and by a
    pattern of ``match`` with a class, a mapping or a sequence.
    """
    own = code.co_varnames[:1] if code.co_argcount else ()
    asked: list[str] = []
    question, loaded, defaulted = "", "", ""
    for step in dis.get_instructions(code):
        if step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            loaded = str(names[-1])
            if question == "getattr" and names[0] not in own:
                defaulted = str(names[0])
            elif question and names[0] not in own:
                asked.append(str(names[0]))
        elif step.opname.startswith("STORE_FAST_LOAD_FAST") and isinstance(step.argval, tuple):
            loaded = str(step.argval[-1])
        elif step.opname in _PATTERNS and loaded not in own:
            asked.append(loaded)
        elif step.opname.startswith("CALL"):
            asked += [defaulted] if defaulted and step.arg == 3 else []
            defaulted = ""
        if step.opname not in ("CACHE", "PUSH_NULL"):
            question = step.argval if step.opname == "LOAD_GLOBAL" and step.argval in _QUESTIONS else ""
    return tuple(asked)


_QUESTIONS = frozenset({"type", "callable", "hasattr", "getattr"})
_PATTERNS = frozenset({"MATCH_CLASS", "MATCH_MAPPING", "MATCH_SEQUENCE", "MATCH_KEYS"})


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


class IdentityQuestions(NamedTuple):
    """What a function asks with ``is``, as in ``mask is None``.

    Args:
        arguments: Arguments of the function, beside the first, of which themselves it asks.
        parts: Variables that hold a part of something else, as ``mask`` after ``mask = batch["mask"]`` or
            ``x, mask = batch``, and arguments of whose parts it asks, as ``batch`` in ``batch.mask is None``.
        calls: What it has called to get a value of which it asks, as ``norm`` in ``self.norm(x) is None``.
    """

    arguments: frozenset[str]
    parts: frozenset[str]
    calls: frozenset[str]


@functools.lru_cache(maxsize=4000)
def identity_questions(code: CodeType) -> IdentityQuestions:
    """What a function asks with ``is`` that is neither of the first argument nor made in the function.

    Of what is made in it, the dtype, the device and the layout count as well.

    Example:
        >>> def forward(self, x, batch):
        ...     y = batch["y"]
        ...     return x if x is None or y is None or self.z is None else batch
        >>> [sorted(names) for names in identity_questions(forward.__code__)]
        [['x'], ['y'], []]
    """
    arguments = {*code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]}
    own = code.co_varnames[:1]
    asked, parts, asked_parts = set[str](), set[str](), set[str]()
    kinds, asked_kinds, results, calls = set[str](), set[str](), dict[str, str](), set[str]()
    lines = {offset for offset, _ in dis.findlinestarts(code)}
    read: list[
        tuple[str, bool]
    ] = []  # variables since the last line or jump, and whether only a part of each
    unpacked, last, called = 0, "", ""
    for step in dis.get_instructions(code):
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if (step.offset in lines and not unpacked) or "JUMP" in last:
            read, called = [], ""
        if step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
            read += [(str(name), False) for name in names]
        elif step.opname in _PART_OF and read:
            read[-1] = (read[-1][0], True)
            called = str(step.argval)
            kinds |= {read[-1][0]} if called in _KINDS else set()
        elif step.opname in ("UNPACK_SEQUENCE", "UNPACK_EX"):
            unpacked = step.arg or 0
        elif step.opname.startswith("STORE_FAST"):
            is_part = unpacked or last in _PART_OF or (last.startswith("CALL") and called in _GETTERS)
            if is_part and not all(name in own for name, _ in read):
                parts.update(names)
            elif last.startswith("CALL") and called:
                results.update(dict.fromkeys(map(str, names), called))
            unpacked = max(0, unpacked - len(names))
        elif step.opname == "IS_OP" or step.opname.endswith(("_IF_NONE", "_IF_NOT_NONE")):
            asked |= {name for name, part in read if not part} - {*own}
            asked_parts |= {name for name, part in read if part} - {*own}
            asked_kinds |= kinds.intersection(name for name, _ in read) - {*own}
            calls |= {called} if last.startswith("CALL") and called else set()
            calls |= {results[name] for name, part in read if name in results and not part}
        is_none = step.opname == "LOAD_CONST" and step.argval is None
        last = step.opname if step.opname not in ("CACHE", "PRECALL") and not is_none else last
    return IdentityQuestions(
        frozenset(asked & arguments),
        frozenset((asked & parts) | (asked_parts & arguments) | asked_kinds),
        frozenset(calls),
    )


_PART_OF = frozenset({"LOAD_ATTR", "LOAD_METHOD", "BINARY_SUBSCR", "BINARY_SLICE"})
_GETTERS = frozenset({"get", "pop", "setdefault"})
_KINDS = frozenset({"dtype", "device", "layout"})


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


def method_that_calls_itself(kind: type[nn.Module]) -> str | None:
    """The name of a method by which a network calls itself, as a ``training_step`` or ``generate`` does.

    Those of torch's own classes do not count, nor do ``forward`` and ``__call__``.
    """
    if kind not in _CALLING:
        methods = {
            name: function
            for base in reversed(kind.__mro__)
            if base.__module__.partition(".")[0] not in ("torch", "builtins")
            for name, function in vars(base).items()
            if name not in ("forward", "__call__")
        }
        _CALLING[kind] = min(
            (
                name
                for name, method in methods.items()
                for function in _plain(method)
                if isinstance(function, FunctionType) and _calls_first_argument(function.__code__)
            ),
            default=None,
        )
    return _CALLING[kind]


_CALLING: weakref.WeakKeyDictionary[type, str | None] = weakref.WeakKeyDictionary()


def _calls_first_argument(code: CodeType) -> bool:
    """Whether a function calls its first argument, or the ``forward`` of that."""
    if not code.co_argcount:
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL")]
    for place, step in enumerate(steps):
        if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) or step.argval != code.co_varnames[0]:
            continue
        after = steps[place + 1]
        if after.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if after.argval in ("forward", "__call__"):
                return True
        elif _is_called(steps[place - 1], after):
            return True
    return False


def _is_called(before: dis.Instruction, after: dis.Instruction) -> bool:
    """Whether a value that is loaded between two steps is a function to call."""
    if sys.version_info >= (3, 13):
        return after.opname == "PUSH_NULL"
    if sys.version_info >= (3, 11):
        return before.opname == "PUSH_NULL"
    return after.opname not in ("STORE_ATTR", "DELETE_ATTR", "RETURN_VALUE", "CALL_FUNCTION", "CALL_METHOD")


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
    global_names = _globals_in(function.__code__)
    for name in names:
        yield function.__globals__.get(name) if name in global_names else None
        yield next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
        yield from (getattr(file, name, None) for file in own)


@functools.lru_cache(maxsize=4000)
def _globals_in(code: CodeType) -> frozenset[str]:
    """Names of globals in a function's code, and in that of the functions inside it."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return frozenset(own).union(*(_globals_in(it) for it in code.co_consts if isinstance(it, CodeType)))


@functools.lru_cache(maxsize=4000)
def catches_errors(code: CodeType) -> bool:
    """Whether a function has an ``except``, so that what it does may depend on what fails."""
    return any(step.opname in _CATCHES for step in dis.get_instructions(code))


_CATCHES = frozenset({"CHECK_EXC_MATCH", "CHECK_EG_MATCH", "JUMP_IF_NOT_EXC_MATCH"})


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # of a function that is still being made
        return False


def names_in(code: CodeType) -> set[str]:
    """Names of globals and attributes in a function's code, and in that of the functions inside it."""
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)
