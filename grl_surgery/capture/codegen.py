"""Writes forwards that torch.fx cannot: keyword-only arguments, names like ``class``."""

from __future__ import annotations

import functools
import inspect
import keyword
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

__all__ = ["Signature", "signature", "spell_keywords"]


class Signature(fx.graph.CodeGen):
    """Writes the line with ``def`` as the network's own forward has it.

    Args:
        positional: How many arguments come before those that are keyword-only.
    """

    def __init__(self, positional: int) -> None:
        super().__init__()
        self.positional = positional

    def gen_fn_def(self, free_vars: list[str], *args: Any, **kwargs: Any) -> str:
        """The line with ``def``."""
        first, rest = free_vars[: self.positional], free_vars[self.positional :]
        return super().gen_fn_def([*first, "*", *rest], *args, **kwargs)


def signature(parameters: Iterable[inspect.Parameter], positional: int) -> Signature | None:
    """Return the code generator for a forward with these parameters; None where torch.fx does it right.

    Args:
        parameters: Of the network's forward.
        positional: How many of the graph's arguments come before the keyword-only ones.
    """
    is_unusual = any(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
    return Signature(positional) if is_unusual else None


def spell_keywords(graph: fx.Graph) -> None:
    """Have the code say ``getattr(self.heads, "class")``; torch.fx would write what Python cannot parse."""
    targets = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    spelled = {
        re.escape(_spelled(target, str.isidentifier)) + r"(?!\w)": _spelled(target, _is_name)
        for target in sorted(targets)
        if any(keyword.iskeyword(part) for part in target.split("."))
    }
    if spelled:
        graph.on_generate_code(lambda _: functools.partial(_respelled, spelled))


def _is_name(part: str) -> bool:
    return part.isidentifier() and not keyword.iskeyword(part)


def _spelled(target: str, is_name: Any) -> str:
    """The path as code."""
    code = "self"
    for part in target.split("."):
        code = f"{code}.{part}" if is_name(part) else f'getattr({code}, "{part}")'
    return code


def _respelled(spelled: Mapping[str, str], body: list[str]) -> list[str]:
    for written, right in spelled.items():
        body = [re.sub(written, lambda _: right, line) for line in body]  # noqa: B023
    return body
