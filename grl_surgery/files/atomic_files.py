"""Files that appear whole or not at all: written beside their place, read back, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from grl_surgery.errors import ExportError

__all__ = ["write_file", "write_folder"]

Step = Callable[[Path], None]


def write_file(path: Path, write: Step, check: Step) -> None:
    """Write a file under another name in the same folder, check it, and only then give it its name.

    At every moment ``path`` is what it was before, whole, or the new file, whole.

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
    _check_parent(path)
    if path.is_dir():
        raise ExportError(f"{path} is a folder, and a file is to be written", example=f"{path}/model.pt2")
    with _said_where(path), _temporary_folder(path) as folder:
        draft = folder / path.name
        write(draft)
        _to_disk(draft)
        check(draft)
        os.replace(draft, path)
        _to_disk(path.parent)


def write_folder(path: Path, write: Step, check: Step, is_ours: Callable[[Path], bool]) -> None:
    """Write a folder of files as :func:`write_file` writes one.

    A folder cannot be replaced in one step: the previous one is renamed to ``.NAME.previous``, and removed
    when the new one has its name. If the machine stops between the two, it is there, whole.

    Args:
        path: The final name.
        write: Writes the files into the folder that it is given.
        check: Reads them back, and raises if they are not good.
        is_ours: Whether an existing folder may be replaced.

    Raises:
        ExportError: Something else has that name, or the system refuses to write.
    """
    _check_parent(path)
    if path.exists() and not (path.is_dir() and (is_ours(path) or not any(path.iterdir()))):
        raise ExportError(
            f"{path} exists and was not written by export, so it is not replaced", example=f"{path}-spliced"
        )
    with _said_where(path), _temporary_folder(path) as folder:
        draft = folder / path.name
        draft.mkdir()
        write(draft)
        for file in [*sorted(draft.iterdir()), draft]:
            _to_disk(file)
        check(draft)
        _exchange(draft, path)
        _to_disk(path.parent)


def _exchange(draft: Path, path: Path) -> None:
    previous = path.with_name(f".{path.name}.previous")
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


def _check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise ExportError(
            f"there is no folder {str(path.parent)!r} to write {path.name!r} into",
            example=f"export(m, {path.name!r}), or make the folder first",
        )


@contextlib.contextmanager
def _said_where(path: Path) -> Iterator[None]:
    """Say of what the system refuses (a full disk, a read-only folder) what it means for this file."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written: {error.strerror or error}; what was there before is as it was",
            example=f"export(m, {os.path.join(tempfile.gettempdir(), path.name)!r})",
        ) from error


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """In the same file system as ``path``, or renaming would be copying; gone afterwards in any case."""
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
