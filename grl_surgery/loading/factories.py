"""Loads a network that the user's own code makes: ``"package.module:factory"``, ``"file.py:factory"``."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from grl_surgery.errors import SurgeryError, one_line
from grl_surgery.loading.inputs import Inputs, as_inputs
from grl_surgery.points import near_names

__all__ = ["from_factory", "no_factory_named"]

_FORMS = "package.module:factory or file.py:factory"


def from_factory(source: str, pretrained: bool) -> tuple[nn.Module, Inputs | None]:
    """Import the code that ``source`` names and call it.

    Example:
        >>> from_factory("torch.nn:Identity", pretrained=False)
        (Identity(), None)

    Args:
        source: A module's or a file's name, a colon, and the name in it: a function or class that needs no
            arguments, or a network.
        pretrained: Call it with ``pretrained=True``.

    Returns:
        The network, and its example inputs where the factory returned them.

    Raises:
        SurgeryError: Something in ``source`` does not exist, fails, or returns something else.
    """
    place, _, name = source.rpartition(":")
    file = Path(place).expanduser() if place.endswith(".py") else None
    file_module = _module_name(file.resolve()) if file else ""
    with _first_on_path(file.parent.resolve() if file else Path.cwd()):
        module = _import_file(file.resolve(), file_module) if file else _import_package(place)
        made = _call(_attribute(module, place, name), source, pretrained)
    return _module_and_inputs(made, source)


def no_factory_named(file: str) -> SurgeryError:
    """The error of a file without a name in it; its functions and classes are read, and none of it is run."""
    try:
        body = ast.parse(Path(file).expanduser().read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        body = []
    parts = [part for part in body if isinstance(part, (ast.FunctionDef, ast.ClassDef))]
    used = {name.id for part in parts for name in ast.walk(part) if isinstance(name, ast.Name)}
    whole = [part for part in parts if part.name not in used] or parts  # what is used is a part of something
    public = [f"{file}:{part.name}" for part in whole if part.name[0] != "_"]
    return SurgeryError(
        f"{file!r} is a file, and what makes the network in it is not named",
        choices=public[:_SHOWN],
        example=public[0] if public else f"{file}:factory",
    )


_SHOWN = 5


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Let the file import what lies beside it, as when Python runs it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _import_package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "?") in _parents(name)
        problem = "there is no such module" if missing else f"it fails with {one_line(error)}"
        raise SurgeryError(f"cannot import {name!r}: {problem}", example=_FORMS) from error


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _import_file(file: Path, name: str) -> ModuleType:
    if not file.is_file():
        beside = [str(entry) for entry in file.parent.glob("*.py")]
        raise SurgeryError(f"there is no file {file}", choices=near_names(str(file), beside), example=_FORMS)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script may end itself
        del sys.modules[name]
        raise SurgeryError(f"cannot import {file}: it fails with {one_line(error)}") from error
    return module


def _module_name(file: Path) -> str:
    """The file's own name, so that pickles of its classes load; never one that hides another module."""
    if file.stem in sys.modules:
        is_free = getattr(sys.modules[file.stem], "__file__", None) == str(file)
    else:
        importlib.invalidate_caches()
        spec = None if "." in file.stem else importlib.util.find_spec(file.stem)
        is_free = "." not in file.stem and (spec is None or spec.origin == str(file))
    return file.stem if is_free else f"{file.stem.replace('.', '_')}_{zlib.crc32(str(file).encode()):08x}"


def _attribute(module: ModuleType, place: str, name: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    public = {key: value for key, value in vars(module).items() if callable(value) and key[0] != "_"}
    own = [key for key, value in public.items() if getattr(value, "__module__", None) == module.__name__]
    choices = [f"{place}:{choice}" for choice in near_names(name, public) or own[:5]]
    raise SurgeryError(
        f"{place} has no {name!r}", choices=choices, example=choices[0] if choices else "file.py:factory"
    )


def _call(factory: Any, source: str, pretrained: bool) -> Any:
    if pretrained and not _takes_pretrained(factory):
        raise SurgeryError(
            f"{source} takes no argument 'pretrained', so there are no pretrained weights to ask it for",
            example="use your own weights (--checkpoint FILE, checkpoint=FILE), or leave out --pretrained",
        )
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise SurgeryError(f"{source} is a {type(factory).__name__}, not a function that returns a network")
    try:
        return factory(pretrained=True) if pretrained else factory()
    except (Exception, SystemExit) as error:
        raise SurgeryError(
            f"{source} raised {one_line(error)}",
            example="a factory takes no arguments: def factory(): return Network(classes=10)",
        ) from error


def _takes_pretrained(factory: Callable[..., Any]) -> bool:
    if isinstance(factory, nn.Module) or not callable(factory):
        return False
    parameters = inspect.signature(factory).parameters.values()
    return any(p.name == "pretrained" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _module_and_inputs(made: Any, source: str) -> tuple[nn.Module, Inputs | None]:
    if isinstance(made, nn.Module):
        return made, None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return made[0], as_inputs(made[1])
    raise SurgeryError(
        f"{source} returned a {type(made).__name__}, not a network",
        example="def factory(): return Network(), (torch.randn(2, 3, 32, 32),)",
    )
