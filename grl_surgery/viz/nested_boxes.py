"""Nests a graph into blocks, and finds the values that flow between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from grl_surgery.graph_data import ModelGraph
from grl_surgery.points import Edge, GraphNode, parents, split_number
from grl_surgery.viz.hide_sizes import size_nodes, without

__all__ = ["Box", "Inside", "Line", "boxes_in", "nest", "shape_text", "words_of"]

BoxKind = Literal[
    "input",
    "output",
    "value",
    "operation",
    "module",
    "block",
    "reversal",
    "head",
    "entry",
    "exit",
    "junction",
]


@dataclass(eq=False)
class Box:
    """One thing that is drawn.

    Args:
        name: Of the point; for a block its path, numbered where the module is called more than once.
        label: The name as it is written inside the block around it.
        kind: What it is. An ``entry`` and an ``exit`` stand for everything that flows into and out of the
            block around them, a ``junction`` for values that several boxes use together.
        node: What the graph knows about it.
        inside: What a block consists of.
    """

    name: str
    label: str
    kind: BoxKind
    node: GraphNode | None = None
    inside: Inside | None = None


@dataclass(eq=False)
class Line:
    """A line between two boxes, and the uses of values that it stands for."""

    source: Box
    target: Box
    uses: list[Edge] = field(default_factory=list)


@dataclass(eq=False)
class Inside:
    """Boxes and the lines between them."""

    boxes: list[Box] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)


def nest(graph: ModelGraph) -> Inside:
    """The graph as boxes in boxes, without the points that are no tensors.

    Example:
        >>> from torch import nn
        >>> from grl_surgery.surgery.describe import describe
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))
        >>> top = nest(describe(net, None))
        >>> [(box.label, box.kind) for box in top.boxes]
        [('input', 'input'), ('0', 'module'), ('1', 'block'), ('output', 'output')]
        >>> [box.label for box in top.boxes[2].inside.boxes]
        ['', '1.0', '1.1', '']
    """
    return _Nesting(without(graph, size_nodes(graph))).top


def boxes_in(inside: Inside) -> Iterator[Box]:
    """Every box, each block before what it contains."""
    for box in inside.boxes:
        yield box
        if box.inside:
            yield from boxes_in(box.inside)


def shape_text(shape: tuple[int, ...] | None) -> str:
    """``2×64×56×56``; empty where there is none."""
    return "" if shape is None else "×".join(map(str, shape)) or "0-d"


def words_of(box: Box) -> tuple[str, str]:
    """Return the lines that are written in a box."""
    node = box.node
    if node is None:
        return box.label, ""
    if box.kind == "reversal":
        return box.label, f"gradient × −{node.coeff:g}"
    kind = node.type if box.kind in ("module", "block", "head") else ""
    return box.label, f"{kind}  {shape_text(node.shape)}".strip()


class _Nesting:
    """Puts each point into its blocks, then draws each use of a value through all that it enters."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.blocks = {block.name: block for block in graph.blocks}
        self.top = Inside()
        self.around: dict[str, tuple[Box, ...]] = {}  # from a point to the blocks that it lies in
        self.boxes: dict[str, Box] = {}
        self.lines: dict[tuple[Box, Box], Line] = {}
        self.entries: dict[Box, Box] = {}
        self.exits: dict[Box, Box] = {}
        self._place_points()
        for edge in graph.edges:
            self._draw(edge)
        self._learn_shapes()
        for inside in [self.top, *(box.inside for box in boxes_in(self.top) if box.inside)]:
            _join_shared(inside)

    def _place_points(self) -> None:
        spliced = [node for node in self.graph.nodes if node.role and "." not in node.name]
        aside = {node.name for node in spliced}
        ordinary = [node for node in self.graph.nodes if node.name not in aside]
        open_blocks: tuple[Box, ...] = ()
        for node in ordinary:
            paths = [path for path in parents(node.name) if path in self.blocks]
            shared = [box for box, path in zip(open_blocks, paths, strict=False) if box.name == path]
            open_blocks = tuple(shared[: _common(open_blocks, paths)])
            for path in paths[len(open_blocks) :]:
                block = Box(path, _label(path, open_blocks), "block", self.blocks[path], Inside())
                self._inside(open_blocks).boxes.append(block)
                open_blocks = (*open_blocks, block)
            self._add(node, open_blocks)
        # Where a reversal stands, a block would fall apart if order alone counted; one that is called more
        # than once is drawn once.
        for node in {node.name: node for node in spliced}.values():
            self._add(node, self._around_spliced(node))
        _number_repeated(box for box in boxes_in(self.top) if box.kind == "block")

    def _add(self, node: GraphNode, around: tuple[Box, ...]) -> None:
        box = Box(node.name, _label(node.name, around), _kind(node), node)
        self.boxes[node.name], self.around[node.name] = box, around
        self._inside(around).boxes.append(box)

    def _around_spliced(self, node: GraphNode) -> tuple[Box, ...]:
        """The blocks around both ends; around the users alone where a block would be on both sides."""
        around = self.around
        sources = [around[e.source] for e in self.graph.edges if e.target == node.name and e.source in around]
        users = [around[e.target] for e in self.graph.edges if e.source == node.name and e.target in around]
        shared = _shared_start([*sources, *users])
        left, entered = (
            {row[len(shared)] for row in rows if len(row) > len(shared)} for rows in (sources, users)
        )
        return _shared_start(users) if left & entered else shared

    def _inside(self, around: tuple[Box, ...]) -> Inside:
        inside = around[-1].inside if around else self.top
        assert inside is not None
        return inside

    def _draw(self, edge: Edge) -> None:
        """Lines for one use: out of the source's blocks, across, and into the target's."""
        out_of, into = self.around[edge.source], self.around[edge.target]
        common = len(_shared_start([out_of, into]))
        left, entered = out_of[common:], into[common:]
        for depth, block in enumerate(left):
            inner = left[depth + 1] if depth + 1 < len(left) else self.boxes[edge.source]
            self._connect(block, inner, self._port(self.exits, block, "exit"), edge)
        for depth, block in enumerate(entered):
            inner = entered[depth + 1] if depth + 1 < len(entered) else self.boxes[edge.target]
            self._connect(block, self._port(self.entries, block, "entry"), inner, edge)
        outer = out_of[common - 1] if common else None
        source = left[0] if left else self.boxes[edge.source]
        target = entered[0] if entered else self.boxes[edge.target]
        self._connect(outer, source, target, edge)

    def _learn_shapes(self) -> None:
        """A block's shape is that of the one value that leaves it."""
        for block, port in self.exits.items():
            lines = [line for line in self._inside((block,)).lines if line.target is port]
            values = {self.boxes[edge.source] for line in lines for edge in line.uses}
            node = values.pop().node if len(values) == 1 else None
            if block.node and node:
                block.node = replace(block.node, shape=node.shape)

    def _connect(self, block: Box | None, source: Box, target: Box, edge: Edge) -> None:
        if (source, target) not in self.lines:
            line = self.lines[source, target] = Line(source, target)
            self._inside((block,) if block else ()).lines.append(line)
        self.lines[source, target].uses.append(edge)

    def _port(self, ports: dict[Box, Box], block: Box, kind: Literal["entry", "exit"]) -> Box:
        if block not in ports:
            ports[block] = Box(block.name, "", kind)
            boxes = self._inside((block,)).boxes
            boxes.insert(0 if kind == "entry" else len(boxes), ports[block])
        return ports[block]


def _common(open_blocks: Sequence[Box], paths: Sequence[str]) -> int:
    """Count the open blocks that are the first of these paths."""
    count = 0
    for box, path in zip(open_blocks, paths, strict=False):
        if box.name != path:
            break
        count += 1
    return count


def _shared_start(rows: Sequence[tuple[Box, ...]]) -> tuple[Box, ...]:
    """Return the common prefix."""
    start: list[Box] = []
    for boxes in zip(*rows, strict=False):
        if any(box is not boxes[0] for box in boxes):
            break
        start.append(boxes[0])
    return tuple(start)


def _label(name: str, around: Sequence[Box]) -> str:
    """The name below the block's; a bare number takes the word before it along."""
    prefix = f"{around[-1].name}." if around else ""
    label = name[len(prefix) :] if name.startswith(prefix) else name
    if split_number(label)[0].isdigit() and prefix:
        label = f"{prefix.rstrip('.').rpartition('.')[2]}.{label}"
    return label


def _kind(node: GraphNode) -> BoxKind:
    if node.role:
        return node.role
    kinds: dict[str, BoxKind] = {
        "placeholder": "input",
        "output": "output",
        "get_attr": "value",
        "call_module": "module",
    }
    return kinds.get(node.op, "operation")


def _number_repeated(blocks: Iterable[Box]) -> None:
    """``first#1`` and ``first#2`` where a module is called more than once."""
    blocks = list(blocks)
    times, seen = Counter(block.name for block in blocks), Counter[str]()
    for block in blocks:
        path = block.name
        if times[path] > 1:
            seen[path] += 1
            block.name, block.label = f"{path}#{seen[path]}", f"{block.label}#{seen[path]}"


# ----------------------------------------------------------------------------------- values used together


_MANY = 4


def _join_shared(inside: Inside) -> None:
    """Where boxes use more and more of the same values, as in a densely connected block, collect the values.

    Each junction holds all that the one before it holds and some more, so nothing is lost, and the number of
    lines grows with the number of boxes instead of its square.
    """
    arriving: dict[Box, dict[Box, Line]] = {}
    for line in inside.lines:
        arriving.setdefault(line.target, {})[line.source] = line
    sets = {target: frozenset(lines) for target, lines in arriving.items() if len(lines) > 1}
    joined = {
        target
        for target, held in sets.items()
        if any(
            other is not target and len(more | held) >= _MANY and (held <= more or held >= more)
            for other, more in sets.items()
        )
    }
    junctions: dict[frozenset[Box], Box] = {}
    for target in [box for box in inside.boxes if box in joined]:
        held = sets[target]
        known = max((kept for kept in junctions if kept <= held), key=len, default=frozenset[Box]())
        if known != held:
            junctions[held] = _junction(inside, junctions.get(known), held - known, arriving[target])
        inside.lines = [line for line in inside.lines if line.target is not target]
        uses = [edge for line in arriving[target].values() for edge in line.uses]
        inside.lines.append(Line(junctions[held], target, uses))


def _junction(inside: Inside, before: Box | None, more: frozenset[Box], lines: dict[Box, Line]) -> Box:
    """A junction of all that ``before`` holds and the values of more boxes."""
    junction = Box("", "", "junction")
    place = inside.boxes.index(next(iter(lines.values())).target)
    inside.boxes.insert(place, junction)
    uses = [edge for source, line in lines.items() if source not in more for edge in line.uses]
    if before:
        inside.lines.append(Line(before, junction, uses))
    inside.lines += [Line(source, junction, lines[source].uses) for source in lines if source in more]
    return junction
