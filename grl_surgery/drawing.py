"""A network's graph as a tree of text, and what surgery changed in its forward."""

from __future__ import annotations

import difflib
import io
import operator
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions
from rich.text import Text
from torch import fx, nn

from grl_surgery.cutting import apply_cuts, modules_to_open
from grl_surgery.links import links
from grl_surgery.model_graph import ModelGraph
from grl_surgery.points import Edge, GraphNode, split_number
from grl_surgery.spliced_module import Cut, SplicedModule

__all__ = [
    "GraphTree",
    "forward_diff",
    "graph_text",
    "reversed_edges",
    "size_nodes",
    "spliced_parts",
    "without",
]


# ------------------------------------------------------------------------------------------------- tree


@dataclass(frozen=True)
class GraphTree:
    """A graph to be printed with rich: one line for each point, nested by module, in aligned columns.

    No line is wrapped. Where the console is too narrow, types are shortened, and names only if that is not
    enough.

    Example:
        >>> from grl_surgery.model_graph import describe
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
            single nodes there, and head their branches here.
    """

    graph: ModelGraph
    around: Sequence[ModelGraph] = ()

    @property
    def rows(self) -> list[Row]:
        """The lines, in the order of execution, each module before what it contains."""
        return _nested(self.graph.nodes, [node for outer in self.around for node in outer.nodes])

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
    console.print(tree)
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
        parents = [path for path in _parents(node.name) if path in calls and path not in present]
        common = sum(1 for _ in _alike(open_paths, parents))
        for level, path in enumerate(parents[common:], start=common):
            rows.append(Row(GraphNode(path, "", ""), level, is_branch=True))
        rows.append(Row(node, len(parents)))
        open_paths = parents
    return _with_calls(rows, calls)


def _parents(name: str) -> list[str]:
    """Paths of the modules around a point, the outermost first; dots in the keys of items are not theirs."""
    parts = re.findall(r"(?:\[[^\[\]]*\]|[^.\[])+", name)
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _alike(first: Iterable[str], second: Iterable[str]) -> Iterator[str]:
    """What both begin with."""
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
            if branches[path] == len(made):
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
_LEAST_POINT = 12


def _fit(widths: Sequence[int], total: int) -> list[int]:
    """Column widths that fit: types give way first, then points."""
    point, kind, *rest = widths
    excess = sum(widths) + _GAP * (len(widths) - 1) - total
    narrower = min(kind, max(_LEAST_TYPE, kind - max(0, excess)))
    excess -= kind - narrower
    return [min(point, max(_LEAST_POINT, point - max(0, excess))), narrower, *rest]


def _shorten(text: str, width: int, ellipsis: str) -> str:
    """``text`` with its middle left out where it is wider than ``width``."""
    if cell_len(text) <= width:
        return text
    kept = width - len(ellipsis)
    end = text[-(kept // 2) :] if kept > 1 else ""
    return set_cell_size(text, kept - cell_len(end)) + ellipsis + end


def _line(cells: Sequence[str], widths: Sequence[int], styles: Sequence[str]) -> Text:
    """One line: all columns to the left but the last, which is a number."""
    line = Text(no_wrap=True, overflow="ignore")
    for cell, width, style in zip(cells[:-1], widths, styles, strict=False):
        line.append(cell, style)
        line.append(" " * (width - cell_len(cell) + _GAP))
    line.append(cells[-1].rjust(widths[-1]), styles[-1])
    line.rstrip()
    return line


# ------------------------------------------------------------------------------------- what is no tensor

_READS = frozenset({"shape", "size", "dim", "ndim", "numel", "dtype", "device", "stride", "is_cuda", "len"})
_ARITHMETIC = frozenset({*dir(operator), "int", "float", "min", "max", "round", "ceil", "floor", "sqrt"})


def size_nodes(graph: ModelGraph) -> set[str]:
    """Names of the points where nothing can be cut: sizes, what is computed from them, unused arguments.

    Example:
        >>> nodes = (GraphNode("x", "placeholder", "placeholder"), GraphNode("size", "call_method", "size"))
        >>> size_nodes(ModelGraph("Net", nodes, (Edge("x", "size", "0"),)))
        {'size'}
    """
    sources: dict[str, list[str]] = {}
    for edge in graph.edges:
        sources.setdefault(edge.target, []).append(edge.source)
    used = {edge.source for edge in graph.edges}
    found: set[str] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and node.shape is None and used and node.name not in used:
            found.add(node.name)
        if node.op not in ("call_function", "call_method") or node.shape is not None:
            continue
        computed = node.type in _ARITHMETIC and node.name in sources and found.issuperset(sources[node.name])
        if node.type in _READS or node.type == "_assert" or computed:
            found.add(node.name)
    return found


def without(graph: ModelGraph, names: Collection[str]) -> ModelGraph:
    """The graph without these points and the edges at them."""
    nodes = tuple(node for node in graph.nodes if node.name not in names)
    edges = tuple(edge for edge in graph.edges if edge.source not in names and edge.target not in names)
    return replace(graph, nodes=nodes, edges=edges)


# ------------------------------------------------------------------------------------------- the surgery


def spliced_parts(model: nn.Module) -> dict[str, SplicedModule]:
    """The modules of a network that are graphs with something spliced in, by path; the root's is ``""``."""
    return {path: part for path, part in model.named_modules() if isinstance(part, SplicedModule)}


def reversed_edges(part: SplicedModule, cut: Cut) -> list[Edge]:
    """The edges of the original's graph, in its present mode, whose gradient one cut reverses.

    Example:
        >>> from grl_surgery.splicing import insert_grl
        >>> spliced = insert_grl(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), after="0")
        >>> [str(edge) for edge in reversed_edges(spliced, spliced.cuts[0])]
        ['0 -> 1']
    """
    calls = [node for node in part.graph.nodes if node.op == "call_module" and node.target == cut.module]
    return [
        Edge(source.meta.get("point", str(cut.at)), target)
        for call in calls
        for _, source in links(call)
        for target in _points_that_use(call)
    ]


def _points_that_use(node: fx.Node) -> Iterator[str]:
    """Names of the users of a value; what surgery put between has none."""
    for user in node.users:
        if "point" in user.meta:
            yield user.meta["point"]
        else:
            yield from _points_that_use(user)


def forward_diff(part: SplicedModule, name: str = "forward") -> str:
    """The lines of the generated forward, in the present mode, that surgery changed, as a unified diff.

    Example:
        >>> from grl_surgery.splicing import insert_grl
        >>> spliced = insert_grl(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), after="0")
        >>> print(forward_diff(spliced).splitlines()[-3])
        +    grl_0 = self.grl_0(_0)
    """
    original, _ = part.taken_apart()
    plain = apply_cuts(original, [], opened=modules_to_open(original, part.cuts))
    flags = tuple(original.get_submodule(path).training for path in plain.steering)
    before = plain.graphs.get(flags) or next(iter(plain.graphs.values()))
    lines = difflib.unified_diff(
        _forward_lines(before), _forward_lines(part.graph), name, f"{name}, spliced", lineterm="", n=2
    )
    return "\n".join(lines)


def _forward_lines(graph: fx.Graph) -> list[str]:
    """The code of a forward, without the statements that only release memory."""
    code = graph.python_code(root_module="self").src
    return [re.sub(r";  \w+ = (\w+ = )*None", "", line).rstrip() for line in code.strip().splitlines()]
