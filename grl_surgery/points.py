"""Names of points and edges: their grammar, patterns, and near names. Imports no torch.

A module call is named by its module path (``layer3.0.conv2``); any other operation by the path of the
module whose forward contains it and the operation (``layer3.0.add``). Things that share a name are
numbered in the order of execution (``layer1.0.relu#1``, ``layer1.0.relu#2``). Arithmetic of sizes is
counted apart (``layer1.0.size_mul``). One item of a value is
written behind it (``encoder[0]``, ``backbone[out]``). A ``#`` that the user put into a module's name is
doubled, so that no two names can collide.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from grl_surgery.errors import AmbiguousPointError, PointNotFoundError, SurgeryError

__all__ = ["Edge", "GraphNode", "near_names"]

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Edge:
    """One use of a value: ``source`` is passed to ``target`` as its argument ``arg``.

    Example:
        >>> str(Edge("layer2", "layer3.0.conv1", "0"))
        'layer2 -> layer3.0.conv1'

    Args:
        source: Name of the node whose value is used.
        target: Name of the node that uses it.
        arg: Which argument: ``"0"`` for the first, ``"mask"`` for a keyword, ``"0[1]"`` for the second item
            of a list that is the first. Empty where it does not matter.
    """

    source: str
    target: str
    arg: str = ""

    def within(self, prefix: str) -> Edge:
        """Return the same edge with ``prefix`` in front of both names."""
        return replace(self, source=prefix + self.source, target=prefix + self.target)

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@dataclass(frozen=True)
class GraphNode:
    """One line of a network's forward.

    Example:
        >>> GraphNode("layer1.0.conv1", "call_module", "Conv2d", (2, 64, 8, 8), 36864).type
        'Conv2d'

    Args:
        name: The point's name, to be used in ``after=`` and ``before=``.
        op: As in torch.fx: placeholder, get_attr, call_module, call_function, call_method or output.
        type: Class of a module call (``"Bottleneck"``), otherwise the operation (``"add"``).
        shape: Shape of its output, or None where it is not a tensor or not known.
        parameters: Number of parameters of a module call, counted in elements.
        role: ``reversal`` or ``head`` where surgery put it there, or where it is a GradientReversal.
        coeff: Coefficient of a reversal.
    """

    name: str
    op: str
    type: str
    shape: tuple[int, ...] | None = None
    parameters: int = 0
    role: Literal["", "reversal", "head"] = ""
    coeff: float | None = None


# ------------------------------------------------------------------------------------------------ names

_ITEM = re.compile(r"(?s)(.+?)((?:\[[^\[\]]+\])+)$")
_NUMBER = re.compile(r"(?s)(.*(?<!#)(?:##)*)#(\d+)$")
_TORCHVISION = re.compile(r"(?s)(.+)_(\d+)$")


def escape(path: str) -> str:
    """Module path as it stands in a name: a ``#`` of the user's is doubled."""
    return path.replace("#", "##")


def split_number(name: str) -> tuple[str, int | None]:
    """``"relu#2"`` to ``("relu", 2)``; a name without a number comes back with None."""
    match = _NUMBER.match(name)
    return (match[1], int(match[2])) if match else (name, None)


def split_items(name: str) -> tuple[str, tuple[int | str, ...]]:
    """``"encoder[0]"`` to ``("encoder", (0,))``; keys are integers where they look like one."""
    match = _ITEM.match(name)
    if not match:
        return name, ()
    keys = (key.strip("'\"") for key in re.findall(r"\[([^\[\]]+)\]", match[2]))
    return match[1], tuple(int(key) if re.fullmatch(r"-?\d+", key) else key for key in keys)


def number(sequences: Sequence[Sequence[tuple[str, Hashable]]]) -> list[list[str]]:
    """Give every element of each sequence a unique name by numbering those that repeat.

    The sequences are the executions of one network in different modes; what they have in common gets the
    same name in all of them.

    Example:
        >>> number([[("conv", 1), ("relu", 2), ("relu", 3)], [("conv", 1), ("relu", 3)]])
        [['conv', 'relu#1', 'relu#2'], ['conv', 'relu#2']]

    Args:
        sequences: For each element its name so far, and where it stands in the source, which tells the
            elements of two sequences apart that share a name.
    """
    merged = list(sequences[0])
    places = [list(range(len(merged)))]
    for sequence in sequences[1:]:
        merged, old, new = _merge(merged, sequence)
        places = [[old[place] for place in row] for row in places] + [new]
    total, seen = Counter(base for base, _ in merged), Counter[str]()
    names = []
    for base, _ in merged:
        seen[base] += 1
        names.append(base if total[base] == 1 else f"{base}#{seen[base]}")
    return [[names[place] for place in row] for row in places]


def _merge(first: Sequence[T], second: Sequence[T]) -> tuple[list[T], list[int], list[int]]:
    """Shortest sequence that contains both in order, and where each element of each went."""
    merged: list[T] = []
    old, new = [0] * len(first), [0] * len(second)
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        for i in range(i1, i2):
            old[i] = len(merged)
            if tag == "equal":
                new[j1 + i - i1] = len(merged)
            merged.append(first[i])
        for j in range(j1, j2) if tag != "equal" else ():
            new[j] = len(merged)
            merged.append(second[j])
    return merged, old, new


def near_names(name: str, choices: Iterable[str], n: int = 5) -> list[str]:
    """The choices that ``name`` was probably meant to be, best first.

    Example:
        >>> near_names("layr3", ["conv1", "layer2", "layer3"])
        ['layer3', 'layer2']
    """
    unique = list(dict.fromkeys(choices))
    close = difflib.get_close_matches(name, unique, n=n, cutoff=0.6)
    tail = name.rpartition(".")[2]
    holding = [choice for choice in unique if tail and tail in re.split(r"[.#\[\]]", choice)]
    return list(dict.fromkeys([*close, *holding]))[:n]


def match_name(name: str, names: Iterable[str], others: Iterable[str] = ()) -> str:
    """The one of ``names`` that ``name`` stands for.

    Args:
        name: As the user typed it; torchvision's ``relu_1`` is taken for ``relu#2``.
        names: All names in the traced graph.
        others: Names that are valid elsewhere, offered where nothing matches.

    Raises:
        AmbiguousPointError: Several calls share this name.
        PointNotFoundError: None has it.
    """
    known = list(dict.fromkeys(names))
    if name in known:
        return name
    numbered = [candidate for candidate in known if split_number(candidate)[0] == name]
    if numbered:
        raise AmbiguousPointError(
            f"{name!r} is called {len(numbered)} times, so the name alone does not say which call",
            choices=numbered,
            example=f"after={numbered[0]!r}, or all of them: after={numbered[:3]!r}",
        )
    alias = _TORCHVISION.match(name)
    if alias and f"{alias[1]}#{int(alias[2]) + 1}" in known:
        return f"{alias[1]}#{int(alias[2]) + 1}"
    others = list(others)
    if name in others:
        raise PointNotFoundError(
            f"{name!r} is a module of this network, but no forward that was traced calls it",
            choices=near_names(name, known),
        )
    near = near_names(name, [*known, *others])
    raise PointNotFoundError(
        f"there is no point {name!r} in this network",
        choices=near,
        example=f"after={near[0]!r}" if near else "print(grl_surgery.graph(model)) lists the points",
    )


# --------------------------------------------------------------------------------------------- patterns


def pattern(text: str) -> re.Pattern[str] | None:
    """The regular expression of a ``glob:`` or ``re:`` selector; None for a plain name.

    In a glob ``*`` and ``?`` stay within one part of a name, and ``**`` crosses the dots.
    """
    if text.startswith("re:"):
        try:
            return re.compile(text[3:])
        except re.error as error:
            raise SurgeryError(
                f"{text!r} is not a regular expression: {error}", example=r"after=r're:layer3\.\d+'"
            ) from error
    return re.compile(_glob(text[5:])) if text.startswith("glob:") else None


def matches(expression: re.Pattern[str], name: str) -> bool:
    """Whether the whole name matches, with or without its number."""
    return bool(expression.fullmatch(name) or expression.fullmatch(split_number(name)[0]))


def _glob(text: str) -> str:
    parts = re.split(r"(\*\*|\*|\?)", text)
    wild = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return "".join(wild.get(part, re.escape(part)) for part in parts)


def may_enclose(text: str, path: str) -> bool:
    """Whether the selector ``text`` can match something inside the module called ``path``."""
    if not text.startswith("glob:"):
        return True
    wanted = text[5:].split(".")
    for depth, part in enumerate(path.split(".") if path else []):
        if depth >= len(wanted):
            return False
        if "**" in wanted[depth]:
            return True
        if not re.fullmatch(_glob(wanted[depth]), part):
            return False
    return len(wanted) > (path.count(".") + 1 if path else 0)


# --------------------------------------------------------------------------------------------- enclosing


def ancestors(path: str) -> list[str]:
    """Paths of the modules that contain ``path``, the root first: ``"a.b.c"`` gives ``"", "a", "a.b"``."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(len(parts))] if path else []


def enclosing(name: str, modules: Mapping[str, Any]) -> list[str]:
    """Paths of the modules whose forwards must be traced for ``name`` to show up in the graph."""
    base = split_number(split_items(name)[0])[0]
    if base in modules:
        return ancestors(base)
    parent = base.rpartition(".")[0]
    while parent not in modules:
        parent = parent.rpartition(".")[0]
    return [*ancestors(parent), parent]


def parents(name: str) -> list[str]:
    """Paths of the modules around a point, the outermost first; dots in the keys of items are not theirs.

    Example:
        >>> parents("layer3.0.conv1#2")
        ['layer3', 'layer3.0']
    """
    parts = re.findall(r"(?:\[[^\[\]]*\]|[^.\[])+", name)
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def parse_edge(edge: Any) -> Edge:
    """An :class:`Edge` from a pair of names, an Edge, or ``"source -> target"``."""
    if isinstance(edge, Edge):
        return edge
    if isinstance(edge, str) and " -> " in edge:
        source, _, target = edge.partition(" -> ")
        return Edge(source.strip(), target.strip())
    if isinstance(edge, (tuple, list)) and len(edge) == 2 and all(isinstance(end, str) for end in edge):
        return Edge(*edge)
    raise SurgeryError(
        f"{edge!r} is not an edge: expected two names, an Edge, or 'source -> target'",
        example="edge=('layer2', 'layer3.0.conv1')",
    )
