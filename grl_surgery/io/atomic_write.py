"""Writes files that appear whole or not at all: written beside their place, read back, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from grl_surgery.errors import ExportError

__all__ = ["write_file", "write_folder"]

Step = Callable[[Path], None]


def write_file(path: Path, write: Step, check: Step) -> None:
    """Write a file under another name in the same folder, check it, and only then give it its name.

    At every moment ``path`` is what it was before, whole, or the new file, whole. A link stays a link, and
    the file that it leads to is replaced; a file that is replaced hands its permissions on.

    Example:
        >>> path = Path(tempfile.mkdtemp(), "a.txt")
        >>> write_file(path, lambda file: None if file.write_text("new") else None, lambda file: None)
        >>> path.read_text()
        'new'

    Args:
        path: The final name.
        write: Writes the file that it is given.
        check: Reads it back, and raises if it is not good.

    Raises:
        ExportError: The folder does not exist, a folder has that name, or the system refuses to write.
    """
    place = _checked_place(path)
    if path.is_dir():
        raise ExportError(
            f"{path} is a folder, and a file is to be written",
            example=f"a name in it: {str(path / f'model{path.suffix}')!r}",
        )
    with _said_where(path), _temporary_folder(place) as folder:
        draft = folder / path.name
        write(draft)
        _to_disk(draft)
        check(draft)
        _set_mode(draft, place)
        os.replace(draft, place)
        _to_disk(place.parent)


def write_folder(path: Path, write: Step, check: Step, foreign: Callable[[Path], Sequence[str]]) -> None:
    """Write a folder of files as :func:`write_file` writes one.

    A folder cannot be replaced in one step: the previous one is renamed to ``.NAME.previous``, and removed
    when the new one has its name. If the machine stops between the two, it is there, whole.

    Args:
        path: The final name.
        write: Writes the files into the folder that it is given.
        check: Reads them back, and raises if they are not good.
        foreign: The names of what would be lost with an existing folder, which it may not be.

    Raises:
        ExportError: Something else has that name or lies in the folder, or the system refuses to write.
    """
    place = _checked_place(path)
    for existing in (path, _previous(place)):
        _check_replaceable(existing, foreign)
    with _said_where(path), _temporary_folder(place) as folder:
        draft = folder / path.name
        draft.mkdir()
        write(draft)
        for file in [*sorted(draft.iterdir()), draft]:
            _to_disk(file)
        check(draft)
        for file in [*sorted(draft.iterdir()), draft]:
            _set_mode(file, place / file.relative_to(draft))
        _exchange(draft, place)
        _to_disk(place.parent)


def _check_replaceable(path: Path, foreign: Callable[[Path], Sequence[str]]) -> None:
    if not path.exists():
        return
    lost = foreign(path) if path.is_dir() else [path.name]
    if lost:
        others = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise ExportError(
            f"{path} is not replaced, which would lose what export did not write or what was changed since: "
            f"{', '.join(lost[:_SHOWN])}{others}",
            example=f"another name: {f'{path}-spliced'!r}",
        )


_SHOWN = 5


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _exchange(draft: Path, path: Path) -> None:
    previous = _previous(path)
    if previous.exists():  # left by a machine that stopped here
        if path.exists():
            shutil.rmtree(previous)
        else:
            os.rename(previous, path)
    if path.exists():
        os.rename(path, previous)
    try:
        os.rename(draft, path)
    except BaseException:
        if previous.exists():
            os.rename(previous, path)
        raise
    if previous.exists():
        shutil.rmtree(previous)


def _checked_place(path: Path) -> Path:
    """Return the file that ``path`` names, behind all links; refuse one whose folder does not exist."""
    if not path.name:
        raise ExportError(f"{str(path)!r} is no name of a file", example="'model.safetensors'")
    place = Path(os.path.realpath(path))
    if not place.parent.is_dir():
        folder = place.parent if path.is_symlink() else path.parent
        raise ExportError(
            f"there is no folder {str(folder)!r} to write {path.name!r} into",
            example=f"{path.name!r}, or make the folder first",
        )
    return place


def _set_mode(draft: Path, replaced: Path) -> None:
    """The permissions of what is replaced, or those of any new file: safetensors writes private ones."""
    if replaced.exists():
        shutil.copymode(replaced, draft)
    elif draft.is_file():
        fresh = draft.with_name(f"{draft.name}.mode")
        fresh.touch()
        shutil.copymode(fresh, draft)
        fresh.unlink()


@contextlib.contextmanager
def _said_where(path: Path) -> Iterator[None]:
    """Say of what the system refuses (a full disk, a read-only folder) what it means for this file."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written: {error.strerror or error}; an older file is unchanged",
            example=f"another folder: {os.path.join(tempfile.gettempdir(), path.name)!r}",
        ) from error


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """In the file system of ``path``, or renaming would be copying; gone afterwards in any case."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows has no handle for a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
