"""Reads JSON that may be damaged or hostile: every value is checked for the type asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from grl_surgery.errors import ExportError

__all__ = ["each", "field", "optional", "parse_object"]

T = TypeVar("T")


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """The JSON object in ``text``.

    Example:
        >>> parse_object('{"format": 1}', "the recipe")
        {'format': 1}

    Raises:
        ExportError: It is no JSON, or no object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{what} is not JSON: {type(error).__name__}: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ExportError(f"{what} is a {type(value).__name__}, not an object")
    return value


def field(data: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """``data[key]``, which has to be there and of this type.

    Example:
        >>> field({"format": 1}, "format", int)
        1

    Raises:
        ExportError: It is missing or of another type; True is no number.
    """
    value = data.get(key)
    if type(value) is not kind and not (kind is float and type(value) is int):
        found = "is missing" if key not in data else f"is {repr(value)[:60]}, not {_ARTICLES[kind]}"
        raise ExportError(f"{key!r} {found}")
    return value  # type: ignore[return-value]


def optional(data: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    """As :func:`field`, but None where it is null or missing."""
    return None if data.get(key) is None else field(data, key, kind)


def each(values: list[Any], kind: type[T], what: str) -> list[T]:
    """The list, if every item is of this type.

    Raises:
        ExportError: One is not.
    """
    wrong = [value for value in values if type(value) is not kind]
    if wrong:
        raise ExportError(f"{what} holds {repr(wrong[0])[:60]}, not {_ARTICLES[kind]}")
    return values


_ARTICLES: Mapping[Callable[..., Any], str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
