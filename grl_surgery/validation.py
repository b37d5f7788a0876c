"""Validates and normalises user arguments; raises SurgeryError with a working example."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real

from torch import nn

from grl_surgery.errors import SurgeryError

__all__ = ["check_count", "check_names", "check_network", "check_number"]


def check_network(value: object, owner: str, *, example: str | None = None) -> None:
    """Refuse what is not a module.

    Args:
        value: What was given.
        owner: The function that got it, as it is called.
        example: A call that works, where it is not the function on a network.

    Raises:
        SurgeryError: With what it is instead.
    """
    if not isinstance(value, nn.Module):
        raise SurgeryError(
            f"{owner} works on an nn.Module; got {type(value).__name__}: {str(value)[:60]!r}",
            example=example or f"{owner}(timm.create_model('resnet18'), ...)",
        )


def check_names(argument: str, value: str | Iterable[str], *, example: str) -> list[str]:
    """One name, or several, as a list of them.

    Example:
        >>> check_names("new", "fc", example="new='fc'")
        ['fc']

    Raises:
        SurgeryError: It is neither.
    """
    names = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    for name in names:
        if not isinstance(name, str):
            raise SurgeryError(
                f"{argument}= takes a name or a list of names, got {type(name).__name__}", example=example
            )
    return names


def check_count(name: str, value: object, *, least: int = 1, example: str) -> int:
    """A whole number of at least ``least`` (numpy's included) as an int.

    Example:
        >>> check_count("depth", 0, least=0, example="depth=2")
        0

    Raises:
        SurgeryError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise SurgeryError(
            f"{name} is {value!r}, but must be a whole number of at least {least}", example=example
        )
    return int(value)


def check_number(name: str, value: object, *, positive: bool = False, example: str) -> None:
    """Refuse what is not a number, or is negative, infinite or nan; where ``positive``, zero too.

    Raises:
        SurgeryError: With what it is.
    """
    number = float(value) if isinstance(value, Real) else math.nan
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        kind = "positive" if positive else "non-negative"
        raise SurgeryError(f"{name} is {value!r}, but must be a {kind} finite number", example=example)
