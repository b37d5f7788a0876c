"""Prints results on standard output, progress and complaints on standard error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from grl_surgery.cli.cli_errors import NAME, in_shell_words

__all__ = [
    "FAILED",
    "NAME",
    "REFUSED",
    "complain",
    "open_streams",
    "silence",
    "stdout",
    "working",
]

FAILED, REFUSED = 1, 2  # exit status: a check failed; the request cannot be met
_PIPE_CLOSED = 141


class _Output(Console):
    """Standard output: as wide as its lines where it is no terminal, silent once nobody reads it."""

    def __init__(self) -> None:
        fitted = sys.stdout.isatty() or "COLUMNS" in os.environ
        super().__init__(highlight=False, width=None if fitted else _UNLIMITED)

    def on_broken_pipe(self) -> None:
        """Exit as a program does that the closed pipe has ended: 1 would mean that a check failed."""
        silence()
        raise SystemExit(_PIPE_CLOSED)


_UNLIMITED = 10_000


def open_streams() -> None:
    """Give the process a stderr that goes nowhere where the shell has closed it; without a stdout, exit."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process runs
    if sys.stdout is None:
        complain("standard output is closed, and what was asked for goes there")
        raise SystemExit(REFUSED)


def silence() -> None:
    """Send what standard output still holds nowhere: Python writes it at its end, and fails again."""
    with contextlib.suppress(OSError):  # no file of the system, as under pytest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stdout() -> Console:
    """Return the console for results."""
    return _Output()


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Say what takes time, on a terminal only; what other code prints meanwhile goes to stderr."""
    with contextlib.ExitStack() as stack:
        if what and sys.stderr.isatty():
            stack.enter_context(Console(stderr=True).status(f"{what} ..."))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def complain(message: str) -> None:
    """Say what went wrong, in words of the command line."""
    say = Console(stderr=True, highlight=False)
    say.print(Text.assemble(("error: ", "bold red"), in_shell_words(message)), soft_wrap=True)
