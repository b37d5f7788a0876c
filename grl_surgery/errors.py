"""The errors of this library: each says the problem, the nearest valid choices, and a call that works."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AmbiguousPointError",
    "ExportError",
    "FlipError",
    "PointNotFoundError",
    "ShapeError",
    "SurgeryError",
    "TracingError",
    "one_line",
]


class SurgeryError(ValueError):
    """Base class of every error that this library raises on purpose.

    Example:
        >>> print(SurgeryError("no point 'layr3'", choices=["layer3"], example="after='layer3'"))
        no point 'layr3'
          nearest: layer3
          for example: after='layer3'

    Args:
        problem: What failed, with the actual value, and where.
        choices: The nearest valid choices, best first.
        example: A call that works.
    """

    def __init__(self, problem: str, *, choices: Sequence[str] = (), example: str | None = None) -> None:
        lines = [problem]
        if choices:
            lines.append(f"  nearest: {', '.join(choices)}")
        if example:
            lines.append(f"  for example: {example}")
        super().__init__("\n".join(lines))


class PointNotFoundError(SurgeryError):
    """A selector matches nothing in the network."""


class AmbiguousPointError(SurgeryError):
    """A name stands for more than one place in the network."""


class TracingError(SurgeryError):
    """The forward that encloses a point cannot be turned into a graph."""


class ShapeError(SurgeryError):
    """The value at a point is not a tensor that this operation can work on."""


class FlipError(SurgeryError):
    """Verification found a gradient that is not what the surgery promised."""


class ExportError(SurgeryError):
    """A network cannot be written to, or read from, a file as asked."""


def one_line(error: BaseException) -> str:
    """An error's kind and the first line of its message, to quote in a message of our own.

    Example:
        >>> one_line(OSError("disk full\\nsecond line"))
        'OSError: disk full'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
