"""One self-contained page: a graph whose blocks open and close, and a table that is searched and sorted.

The page asks nothing of any network, and its security policy forbids that anything does. Names come from
models that strangers wrote: everything is escaped, and only the script of this package may run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from grl_surgery.graph_data import ModelGraph
from grl_surgery.io.atomic_write import write_file
from grl_surgery.points import GraphNode
from grl_surgery.viz.gradient_colors import GLYPHS, MEANINGS, Mark, View
from grl_surgery.viz.layout import ROW_GAP, lay_out
from grl_surgery.viz.nested_boxes import Box, Inside, Line, boxes_in, nest, shape_text
from grl_surgery.viz.svg import (
    HEADER,
    PAD,
    box_svg,
    frame_svg,
    line_path,
    line_svg,
    size_of,
    title_width,
)

__all__ = ["Column", "Picture", "graph_page", "legend", "page", "table", "write_page"]


# ------------------------------------------------------------------------------------------ picture


class Picture:
    """A graph as SVG that the page's script can open and close, and the numbers that it needs for that."""

    def __init__(self, graph: ModelGraph, views: Sequence[View] = ()) -> None:
        self.top = nest(graph)
        self.views = views
        self.boxes = list(boxes_in(self.top))
        self.places = {box: index for index, box in enumerate(self.boxes)}
        self.by_name = {box.name: index for box, index in self.places.items() if box.node}
        self.box_data: list[dict[str, Any]] = [{} for _ in self.boxes]
        self.line_data: list[dict[str, Any]] = []
        self.insides: dict[int, str] = {}  # by block: a browser reads a page faster without what is not shown
        body, (width, height) = self._inside(self.top, None)
        self.svg = (
            f'<svg class="picture" id="picture" width="{width + 2 * PAD:.0f}" '
            f'height="{height + 2 * PAD:.0f}" viewBox="0 0 {width + 2 * PAD:.1f} {height + 2 * PAD:.1f}">'
            f'<g id="top" role="tree" aria-label="{escape(graph.name)}" '
            f'transform="translate({PAD:g} {PAD:g})">{body}</g></svg>'
        )

    def data(self) -> dict[str, Any]:
        """Return the data for the page's script."""
        return {
            "boxes": self.box_data,
            "lines": self.line_data,
            "insides": self.insides,
            "glyphs": GLYPHS,
            "geometry": {"gap": ROW_GAP, "pad": PAD, "header": HEADER},
            "open": [self.places[box] for box in _opened_first(self.top)],
        }

    def _inside(self, inside: Inside, block: Box | None) -> tuple[str, tuple[float, float]]:
        places = lay_out(inside, size_of)
        owner = self.places[block] if block else -1
        parts = []
        for line in inside.lines:
            kinds = [view.line(line) for view in self.views]
            number = len(self.line_data)
            self.line_data.append(
                {
                    "in": owner,
                    "from": self.places[line.source],
                    "to": self.places[line.target],
                    "bends": [[round(x, 1), row] for x, row in places.bends[line]],
                    "name": _uses(line),
                    "kinds": kinds,
                }
            )
            kind = f' id="l{number}"' + (f' data-kind="{kinds[0]}"' if kinds and kinds[0] else "")
            parts.append(line_svg(line_path(line, places, size_of), kind))
        for box in inside.boxes:
            x, y = places.centers[box]
            marks = [view.box(box) for view in self.views]
            self.box_data[self.places[box]] = _facts(box, owner, x, places.rows[box], marks)
            parts.append(self._box(box, x, y, marks[0] if marks else None))
        return "".join(parts), places.size

    def _box(self, box: Box, x: float, y: float, mark: Mark | None) -> str:
        number = self.places[box]
        attributes = f'class="box {box.kind}" id="b{number}" transform="translate({x:.1f} {y:.1f})"'
        if box.node is None:
            return f"<g {attributes}>{box_svg(box)}</g>"
        attributes += f' role="treeitem" tabindex="-1" aria-label="{escape(_spoken(box, mark))}"'
        if mark and mark.kind:
            attributes += f' data-kind="{mark.kind}"' + ' data-measured=""' * bool(mark.measured)
        if not box.inside:
            return f"<g {attributes}>{box_svg(box, mark)}</g>"
        self.insides[number], _ = self._inside(box.inside, box)
        return (
            f'<g {attributes} aria-expanded="false"><g class="closed">{box_svg(box, mark)}</g>'
            f'<g class="opened">{frame_svg(box, 0, 0)}<g class="inside" role="group"></g></g></g>'
        )


def _facts(box: Box, owner: int, x: float, row: int, marks: Sequence[Mark]) -> dict[str, Any]:
    """Place, size and description of one box."""
    width, height = size_of(box)
    facts: dict[str, Any] = {
        "in": owner,
        "x": round(x, 1),
        "w": width,
        "h": height,
        "row": row,
        "kind": box.kind,
    }
    if box.inside:
        facts["title"] = round(title_width(box), 1)
    if box.node:
        node = box.node
        facts["name"] = box.name
        about = {
            "type": _type_of(node),
            "output": shape_text(node.shape),
            "parameters": f"{node.parameters:,}" if node.parameters else "",
        }
        facts["about"] = {key: value for key, value in about.items() if value}
        facts["marks"] = [[mark.kind, mark.predicted, mark.measured, mark.factor] for mark in marks]
    return facts


def _uses(line: Line, most: int = 4) -> str:
    shown = [str(edge).replace("->", "→") for edge in line.uses[:most]]
    return "; ".join([*shown, *([f"and {len(line.uses) - most} more"] if len(line.uses) > most else [])])


def _spoken(box: Box, mark: Mark | None) -> str:
    assert box.node
    facts = [box.name, box.node.type, shape_text(box.node.shape), mark.kind if mark else ""]
    return ", ".join(fact for fact in facts if fact)


def _opened_first(top: Inside) -> list[Box]:
    """The blocks that are open at first: those around surgery; or some, where there is little else."""
    blocks = [(box, box.inside) for box in boxes_in(top) if box.inside]
    around = [box for box, inside in blocks if any(inner.role for inner in _nodes(inside))]
    if around or len(top.boxes) > _FEW:
        return around
    return [box for box, inside in blocks if box in top.boxes and _FEW // 2 < len(inside.boxes) < 4 * _FEW]


_FEW = 8


def _nodes(inside: Inside) -> list[GraphNode]:
    return [box.node for box in boxes_in(inside) if box.node]


def _type_of(node: GraphNode) -> str:
    return {"placeholder": "input", "get_attr": "parameter or buffer"}.get(node.op, node.type)


# --------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        title: Its heading.
        is_number: Whether its values are sorted as numbers.
    """

    title: str
    is_number: bool = False


Cell = tuple[str, Any]  # HTML, and the value to sort by


def table(columns: Sequence[Column], rows: Sequence[tuple[str, Sequence[Cell]]], caption: str) -> str:
    """A table that the script searches and sorts; each row comes with attributes of its own."""
    head = "".join(
        f'<th scope="col" aria-sort="none"{" class=number" if column.is_number else ""}>'
        f'<button type="button">{escape(column.title)}</button></th>'
        for column in columns
    )
    body = "".join(
        f"<tr{attributes}>"
        + "".join(
            f'<td{" class=number" if column.is_number else ""} data-value="{escape(str(value))}">{html}</td>'
            for column, (html, value) in zip(columns, cells, strict=True)
        )
        + "</tr>"
        for attributes, cells in rows
    )
    return (
        f'<section class="rows"><div class="bar"><h2>{escape(caption)}</h2><label class="search">Search '
        '<input type="search" id="search" autocomplete="off" spellcheck="false"></label>'
        f'<output id="found">{len(rows)} of {len(rows)}</output></div>'
        f'<div class="scroll"><table id="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div></section>"
    )


# ---------------------------------------------------------------------------------------------- page


def page(title: str, lead: str, picture: Picture | None, rows: str) -> str:
    """The whole page.

    Args:
        title: Of the page, not escaped yet.
        lead: HTML above the picture.
        picture: The graph, if there is one.
        rows: HTML of the table.
    """
    here = files(__package__)
    style = "".join(here.joinpath(name).read_text("utf-8") for name in ("picture.css", "page.css"))
    script = here.joinpath("page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    data = json.dumps(picture.data() if picture else {}, separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{lead}\n{_figure(picture)}\n{rows}\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n'
        "</body>\n</html>\n"
    )


def _figure(picture: Picture | None) -> str:
    if picture is None:
        return '<p class="note">This network cannot be traced, so there is no picture of it.</p>'
    labels = [view.label for view in picture.views]
    options = "".join(
        f'<option value="{index}">{escape(label)}</option>' for index, label in enumerate(labels)
    )
    choice = f'<label>Gradient of <select id="view">{options}</select></label>' if len(labels) > 1 else ""
    buttons = {
        "open-all": "Open all",
        "close-all": "Close all",
        "smaller": "−",
        "larger": "+",
        "fit": "Fit",
    }
    spoken = {"smaller": "Zoom out", "larger": "Zoom in", "fit": "Fit to width"}
    drawn = "".join(
        f'<button type="button" id="{key}"'
        + (f' aria-label="{spoken[key]}" title="{spoken[key]}"' if key in spoken else "")
        + f">{text}</button>"
        for key, text in buttons.items()
    )
    return (
        f'<section class="graph"><div class="bar"><h2>Graph</h2>{choice}{drawn}'
        f'<p class="note">{_HOW}</p></div>'
        f'<div class="sides"><div class="canvas" id="canvas">{picture.svg}</div>'
        '<aside id="details" aria-live="polite" hidden></aside></div></section>'
    )


_HOW = (
    "Point at a box, or choose one with a click or the arrow keys. A block opens and closes with a click, "
    "Enter, or the keys → and ←."
)


def legend(kinds: Sequence[str]) -> str:
    """Return the legend of colours and signs."""
    entries = "".join(
        f'<li title="{escape(MEANINGS[kind])}"><span class="sign" data-kind="{kind}">{GLYPHS[kind]}</span>'
        f"<b>{kind}</b></li>"
        for kind in GLYPHS
        if kind in kinds
    )
    note = '<li class="note">sign in a band: measured; sign alone: predicted</li>' * bool(entries)
    return f'<ul class="legend" aria-label="Legend">{entries}{note}</ul>'


def graph_page(graph: ModelGraph) -> str:
    """A page with a graph and the table of its points."""
    picture = Picture(graph)
    columns = [Column("point"), Column("type"), Column("output"), Column("parameters", True)]
    rows = []
    for box in picture.boxes:
        if node := box.node:
            link = f'<a href="#b{picture.places[box]}">{escape(box.name)}</a>'
            kind, shape = _type_of(node), shape_text(node.shape)
            count = (f"{node.parameters:,}" if node.parameters else "", node.parameters)
            rows.append(("", [(link, box.name), (escape(kind), kind), (shape, shape), count]))
    elements = sum(box.node.parameters for box in picture.top.boxes if box.node)
    lead = f"<header><h1>{escape(graph.name)}</h1><p>{len(rows)} points, {elements:,} parameters</p></header>"
    return page(graph.name, lead, picture, table(columns, rows, "Points"))


def write_page(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""

    def write(file: Path) -> None:
        file.write_text(text, "utf-8")

    write_file(Path(path), write, lambda file: None)
