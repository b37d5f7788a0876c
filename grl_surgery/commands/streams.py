"""The two streams: results on standard output, progress and complaints on standard error."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

__all__ = ["FAILED", "NAME", "REFUSED", "complain", "in_shell_words", "stdout", "working"]

NAME = "grl-surgery"
FAILED, REFUSED = 1, 2  # exit status: a check failed; the request cannot be met
_PIPE_CLOSED = 141


class _Output(Console):
    """Standard output: as wide as its lines where it is no terminal, silent once nobody reads it."""

    def __init__(self) -> None:
        fitted = sys.stdout.isatty() or "COLUMNS" in os.environ
        super().__init__(highlight=False, width=None if fitted else _UNLIMITED)

    def on_broken_pipe(self) -> None:
        """Exit as a program does that the closed pipe has ended: 1 would mean that a check failed."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_PIPE_CLOSED)


_UNLIMITED = 10_000


def stdout() -> Console:
    """Where results go."""
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


# A selector in a message, unless it is an argument of a call that is quoted whole.
_SELECTOR = re.compile(r"(?<![\w(])(?<!, )(after|before|edge)=(?:(\[[^\]]*\])|r?('[^']*'|\"[^\"]*\"))")
_EDGE = re.compile(r"(edge=)?(?:grl_surgery\.)?\bEdge\('([^']*)', '([^']*)', '([^']*)'\)")


def in_shell_words(message: str) -> str:
    """The message with ``after='layer3'`` written as the command line takes it: ``--after layer3``."""

    def selector(match: re.Match[str]) -> str:
        keyword, several, one = match.groups()
        names = re.findall(r"'([^']*)'|\"([^\"]*)\"", several or one)
        return " ".join(f"--{keyword} {shlex.quote(single or double)}" for single, double in names)

    def edge(match: re.Match[str]) -> str:
        option, source, target, arg = match.groups()
        return ("--edge " if option else "") + shlex.quote(f"{source} -> {target} (argument {arg})")

    message = message.replace("print(grl_surgery.graph(model))", f"'{NAME} graph MODEL'")
    message = re.sub(r"(?<![\w(])(?<!, )coeff=", "--coeff ", message)
    return _SELECTOR.sub(selector, _EDGE.sub(edge, message))
