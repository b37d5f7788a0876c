"""Run the code blocks of Markdown files and compare what they print with what the text says they print.

    python docs/run_blocks.py README.md docs/*.md

- ```` ```python ```` blocks run in order, in one namespace per file. A ```` ```text ```` block directly
  below one is what it must print.
- In ```` ```console ```` blocks, each line ``$ grl-surgery ...`` runs in a shell; the lines below it are
  what it must print, where a line ``...`` stands for any lines. Without lines below, it only has to
  succeed. Other commands are not run.
- ```` ```python no-run ```` and ```` ```console no-run ```` blocks are counted, not run.

Everything runs in a temporary folder. Spaces at the ends of lines are not compared.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

COMMAND = "$ grl-surgery"
WIDTH = "100"
_MODULE = "blocks_of_one_text"


class BlockError(Exception):
    """A block fails, or does not print what the text says; the message begins with file and line."""


@dataclass(frozen=True)
class Block:
    """One fenced block: the words after the fence, its text, and the line number of its first line."""

    words: tuple[str, ...]
    source: str
    line: int
    follows_directly: bool

    @property
    def kind(self) -> str:
        """What the block holds: the first word after the fence, or nothing."""
        return self.words[0] if self.words else ""

    @property
    def runs(self) -> bool:
        """Whether the block is not marked ``no-run``."""
        return "no-run" not in self.words[1:]


@dataclass(frozen=True)
class Command:
    """One command of a console block and the lines shown below it."""

    text: str
    shown: tuple[str, ...]
    line: int


def blocks(markdown: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text, in order.

    Raises:
        BlockError: A fence is never closed.
    """
    fence, start, last_end = "", 0, -1
    words: tuple[str, ...] = ()
    body: list[str] = []
    lines = markdown.splitlines()
    for number, line in enumerate(lines, start=1):
        stripped = line.strip()
        opening = re.match(r"(`{3,})([^`]*)$", stripped)
        if fence and stripped == fence:
            directly = last_end >= 0 and not any(part.strip() for part in lines[last_end : start - 2])
            yield Block(words, textwrap.dedent("\n".join(body)), start, directly)
            fence, last_end = "", number
        elif fence:
            body.append(line)
        elif opening:
            fence, words, body, start = opening[1], tuple(opening[2].split()), [], number + 1
    if fence:
        raise BlockError(f"{start - 1}: this block is never closed")


def commands(block: Block) -> Iterator[Command]:
    """The commands of a console block; a command that ends with a backslash goes on in the next line."""
    pieces: list[tuple[int, list[str]]] = []
    for number, line in enumerate(block.source.splitlines(), start=block.line):
        if line.startswith("$ ") or not pieces:
            pieces.append((number, [line]))
        else:
            pieces[-1][1].append(line)
    for number, piece in pieces:
        end = next((i for i, line in enumerate(piece) if not line.endswith("\\")), len(piece) - 1)
        yield Command("\n".join(piece[: end + 1]), tuple(_trimmed(piece[end + 1 :])), number)


def run_text(markdown: str, name: str) -> Counter[str]:
    """Run the blocks of one text.

    Args:
        markdown: The text.
        name: What to call it in messages; where it is a path, tracebacks quote it.

    Returns:
        How many blocks and commands ran, were compared, and were left out.

    Raises:
        BlockError: The first block that fails.
    """
    try:
        found = list(blocks(markdown))
    except BlockError as error:
        raise BlockError(f"{name}:{error}") from None
    done: Counter[str] = Counter()
    file = Path(name).resolve()
    with _surroundings() as module:
        for block, after in itertools.zip_longest(found, found[1:]):
            if block.kind in ("python", "console") and not block.runs:
                done["blocks left out"] += 1
            elif block.kind == "python":
                printed = _run_python(block, name, file, module)
                done["python blocks"] += 1
                if after is not None and after.kind == "text" and after.follows_directly:
                    _compare(printed.splitlines(), after.source.splitlines(), name, after.line)
                    done["outputs compared"] += 1
            elif block.kind == "console":
                for command in commands(block):
                    done += _run_command(command, name)
    return done


def main(paths: Sequence[str]) -> int:
    """Run every file, print one line or one failure for each, and return the exit code."""
    failed = not paths
    if not paths:
        print("usage: run_blocks.py FILE.md ...", file=sys.stderr)
    for path in paths:
        try:
            done = run_text(Path(path).read_text(encoding="utf-8"), path)
        except (BlockError, OSError) as error:
            failed = True
            print(f"FAILED {error}", file=sys.stderr)
        else:
            print(f"{path}: " + (", ".join(f"{n} {what}" for what, n in done.items()) or "nothing to run"))
    return int(failed)


def _run_python(block: Block, name: str, file: Path, module: ModuleType) -> str:
    # The lines before the block are filled up, so that tracebacks and inspect.getsource find the right line.
    padded = "\n" * (block.line - 1) + block.source
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(padded, str(file), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        own = error.__traceback__.tb_next if error.__traceback__ else None
        shown = "".join(traceback.format_exception(error.with_traceback(own))).rstrip()
        raise BlockError(f"{name}:{block.line}: this block raises {type(error).__name__}\n{shown}") from error
    return printed.getvalue()


def _run_command(command: Command, name: str) -> Counter[str]:
    if not command.text.startswith(COMMAND):
        return Counter({"commands left out": 1})
    ended = subprocess.run(
        command.text.removeprefix("$ "),
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment(),
    )
    printed = ended.stdout.splitlines()
    if command.shown:
        _compare(printed, command.shown, name, command.line + 1, gaps=True)
    elif ended.returncode != 0:
        shown = "\n".join(printed)
        raise BlockError(f"{name}:{command.line}: this command exits with {ended.returncode}\n{shown}")
    return Counter({"commands": 1, "outputs compared": int(bool(command.shown))})


def _compare(
    printed: Sequence[str], shown: Sequence[str], name: str, line: int, *, gaps: bool = False
) -> None:
    printed, shown = _trimmed(printed), _trimmed(shown)
    if _matches(printed, shown) if gaps else printed == shown:
        return
    difference = "\n".join(difflib.unified_diff(shown, printed, "in the text", "printed", lineterm=""))
    raise BlockError(f"{name}:{line}: this is not what is printed\n{difference}")


def _matches(printed: Sequence[str], shown: Sequence[str]) -> bool:
    """Whether they are equal, each line ``...`` being as many lines as it takes."""
    pattern = "".join(r"(?:.*\n)*?" if line.strip() == "..." else re.escape(line) + r"\n" for line in shown)
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in printed)) is not None


def _trimmed(lines: Sequence[str]) -> list[str]:
    return "\n".join(line.rstrip() for line in lines).rstrip("\n").splitlines()


def _environment() -> dict[str, str]:
    """The commands of this Python come first; no colours, and one width everywhere."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": WIDTH}


@contextlib.contextmanager
def _surroundings() -> Iterator[ModuleType]:
    """A temporary folder, one width for what is printed, and a module whose classes can be pickled."""
    module = sys.modules[_MODULE] = ModuleType(_MODULE)
    before = Path.cwd()
    with mock.patch.dict(os.environ, {"COLUMNS": WIDTH}), tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield module
        finally:
            os.chdir(before)
            del sys.modules[_MODULE]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
