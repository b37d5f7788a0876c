"""What torch.fx does not write of a forward: keyword-only and left-out arguments, names like ``class``."""

from __future__ import annotations

import copy
import functools
import inspect
import keyword
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from grl_surgery.errors import TracingError

__all__ = ["Signature", "check_left_out", "signature", "spell_keywords"]


def check_left_out(values: Any, name: str) -> None:
    """Refuse what is passed by way of a ``*args`` or ``**kwargs`` that surgery left out."""
    if values:
        got = ", ".join(map(repr, values)) if isinstance(values, dict) else f"{len(values)} more"
        raise TracingError(
            f"surgery left {name} out of this forward, because a graph has the arguments that have names; "
            f"got {got}",
            example="insert_grl(model, ..., example_inputs={..., 'scale': 2.0}) keeps a keyword of **kwargs",
        )


class Signature(fx.graph.CodeGen):
    """Writes the line with ``def`` as the network's own forward has it.

    Args:
        positional: How many arguments come before those that are keyword-only.
        left_out: The forward's ``*args`` and ``**kwargs``, as written there; no graph has their values.
    """

    def __init__(self, positional: int, left_out: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.positional, self.left_out = positional, left_out

    def gen_fn_def(self, free_vars: list[str], *args: Any, **kwargs: Any) -> str:
        """The line with ``def``, and the checks."""
        first, rest = free_vars[: self.positional], free_vars[self.positional :]
        several = [name for name in self.left_out if not name.startswith("**")] or (["*"] if rest else [])
        keywords = [name for name in self.left_out if name.startswith("**")]
        line = super().gen_fn_def([*first, *several, *rest, *keywords], *args, **kwargs)
        checks = (f"_check_left_out({name.strip('*')}, {name!r})" for name in self.left_out)
        return "\n    ".join([line, *checks])

    def additional_globals(self) -> list[tuple[str, Any]]:
        """What the checks are called."""
        return [("_check_left_out", check_left_out)] if self.left_out else []

    def without_checks(self) -> Signature:
        """The same without what was left out: Python itself refuses it then."""
        plain = copy.copy(self)
        plain.left_out = ()
        return plain


def signature(parameters: Iterable[inspect.Parameter], positional: int) -> Signature | None:
    """What writes a forward with these parameters; None where torch.fx does it right.

    Args:
        parameters: Of the network's forward.
        positional: How many of the graph's arguments come before the keyword-only ones.
    """
    parameters = list(parameters)
    left_out = tuple(
        str(parameter.replace(annotation=parameter.empty))
        for parameter in parameters
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )
    unusual = left_out or any(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
    return Signature(positional, left_out) if unusual else None


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
