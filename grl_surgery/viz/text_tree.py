"""A network's graph as a tree of text."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions
from rich.text import Text

from grl_surgery.graph_data import ModelGraph
from grl_surgery.points import GraphNode, parents, split_number

__all__ = ["GraphTree", "Row", "graph_text"]


@dataclass(frozen=True)
class GraphTree:
    """A graph to be printed with rich: one line for each point, nested by module, in aligned columns.

    No line is wrapped here. Names are always whole, so that they can be copied; where the console is too
    narrow, types lose their end.

    Example:
        >>> from torch import nn
        >>> from grl_surgery.surgery.describe import describe
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> print(graph_text(GraphTree(describe(net))))
        point   type    output  parameters
        input   input
        0       Linear                  40
        1       ReLU
        output  output

    Args:
        graph: What to print.
        around: Graphs of the same network that are less deep: the modules that ``graph`` looks into are
            single nodes there, and head their branches here. Without them, the graph's own blocks do.
    """

    graph: ModelGraph
    around: Sequence[ModelGraph] = ()

    @property
    def rows(self) -> list[Row]:
        """The lines, in the order of execution, each module before what it contains."""
        outer = [node for graph in self.around for node in graph.nodes] or self.graph.blocks
        return _nested(self.graph.nodes, outer)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        rows = self.rows
        guides = _ASCII_GUIDES if options.ascii_only else _GUIDES
        ellipsis = "..." if options.ascii_only else "…"
        points = [guide + row.node.name for guide, row in zip(_guides(rows, guides), rows, strict=True)]
        types = [_WORDS.get(row.node.type, row.node.type) for row in rows]
        shapes = ["x".join(map(str, row.node.shape or ())) for row in rows]
        counts = [f"{row.node.parameters:,}" if row.node.parameters else "" for row in rows]
        columns = [["point", *points], ["type", *types], ["output", *shapes], ["parameters", *counts]]
        widths = _fit([max(map(cell_len, column)) for column in columns], options.max_width)
        for place, cells in enumerate(zip(*columns, strict=True)):
            styles = ("dim",) * 4 if place == 0 else (_name_style(rows[place - 1]), "cyan", "", "green")
            yield _line(
                [_shorten(cell, width, ellipsis) for cell, width in zip(cells, widths, strict=True)],
                widths,
                styles,
            )


@dataclass(frozen=True)
class Row:
    """One line of the tree.

    Args:
        node: What it shows.
        level: How many shown modules it lies in.
        is_branch: Whether it is a module that the graph looks into.
    """

    node: GraphNode
    level: int
    is_branch: bool = False


def graph_text(tree: GraphTree, width: int = 100) -> str:
    """The tree as plain text in ``width`` columns."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(tree, crop=False)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined, no-any-return]


def _nested(nodes: Sequence[GraphNode], outer: Sequence[GraphNode]) -> list[Row]:
    """The nodes as rows, with a row for each known module in front of what lies in it."""
    calls: dict[str, dict[str, GraphNode]] = {}
    for node in outer:
        calls.setdefault(split_number(node.name)[0], {})[node.name] = node
    present = {node.name for node in nodes}
    rows: list[Row] = []
    open_paths: list[str] = []
    for node in nodes:
        around = [path for path in parents(node.name) if path in calls and path not in present]
        common = sum(1 for _ in _alike(open_paths, around))
        for level, path in enumerate(around[common:], start=common):
            rows.append(Row(GraphNode(path, "", ""), level, is_branch=True))
        rows.append(Row(node, len(around)))
        open_paths = around
    return _with_calls(rows, calls)


def _alike(first: Iterable[str], second: Iterable[str]) -> Iterator[str]:
    """Return the common prefix."""
    for one, other in zip(first, second, strict=False):
        if one != other:
            return
        yield one


def _with_calls(rows: Sequence[Row], calls: dict[str, dict[str, GraphNode]]) -> list[Row]:
    """Fill the branches in from the calls of their modules, the n-th branch from the n-th call."""
    branches = Counter(row.node.name for row in rows if row.is_branch)
    seen: Counter[str] = Counter()
    filled = []
    for row in rows:
        if row.is_branch:
            path = row.node.name
            made = list(calls[path].values())
            if len(made) == 1 and branches[path] > 1:  # known as a block, not by its calls
                row = replace(row, node=replace(made[0], name=f"{path}#{seen[path] + 1}"))
            elif branches[path] == len(made):
                row = replace(row, node=made[seen[path]])
            else:  # two calls in a row look like one
                row = replace(row, node=replace(row.node, type=f"{made[0].type}, {len(made)} calls"))
            seen[path] += 1
        filled.append(row)
    return filled


# torch.fx's words for what is no operation.
_WORDS = {"placeholder": "input", "get_attr": "attribute"}

# What stands in front of a row: below an open branch, below a closed one, for a child, for the last child.
_GUIDES = ("│ ", "  ", "├ ", "└ ")
_ASCII_GUIDES = ("|  ", "   ", "|- ", "`- ")


def _guides(rows: Sequence[Row], guides: tuple[str, str, str, str]) -> list[str]:
    """The lines in front of each row that tie it to its branch; the outermost rows have none."""
    line, gap, child, last = guides
    drawn: list[str] = []
    goes_on: dict[int, bool] = {}  # by level: whether a later row is a child of the same branch
    for row in reversed(rows):
        bars = "".join(line if goes_on.get(level) else gap for level in range(1, row.level))
        drawn.append(bars + (child if goes_on.get(row.level) else last) if row.level else "")
        goes_on = {level: later for level, later in goes_on.items() if level < row.level}
        goes_on[row.level] = True
    return drawn[::-1]


def _name_style(row: Row) -> str:
    return "bold" if row.node.op == "call_module" else ""


_GAP = 2
_LEAST_TYPE = 10


def _fit(widths: Sequence[int], total: int) -> list[int]:
    """Column widths that fit where types can give way far enough."""
    point, kind, *rest = widths
    excess = max(0, sum(widths) + _GAP * (len(widths) - 1) - total)
    return [point, min(kind, max(_LEAST_TYPE, kind - excess)), *rest]


def _shorten(text: str, width: int, ellipsis: str) -> str:
    """``text`` without its end where it is wider than ``width``."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - len(ellipsis)) + ellipsis


def _line(cells: Sequence[str], widths: Sequence[int], styles: Sequence[str]) -> Text:
    """One line: all columns to the left but the last, which is a number."""
    line = Text(no_wrap=True, overflow="ignore")
    for cell, width, style in zip(cells[:-1], widths, styles, strict=False):
        line.append(cell, style)
        line.append(" " * (width - cell_len(cell) + _GAP))
    line.append(cells[-1].rjust(widths[-1]), styles[-1])
    line.rstrip()
    return line
