"""A graph as SVG: boxes in rows, and blocks as frames around their parts."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from importlib.resources import files

from rich.cells import cell_len

from grl_surgery.graph_data import ModelGraph
from grl_surgery.viz.gradient_colors import GLYPHS, Mark
from grl_surgery.viz.layout import Layout, lay_out
from grl_surgery.viz.nested_boxes import Box, Inside, Line, nest, shape_text, words_of

__all__ = [
    "HEADER",
    "PAD",
    "box_svg",
    "frame_svg",
    "graph_svg",
    "line_path",
    "line_svg",
    "size_of",
    "title_width",
]

_CHARACTER = 7.25  # width of a character of the first line, and of the second
_SMALL = 6.35
_BAND = 18.0  # where the glyph stands
HEADER = 28.0  # of a frame
PAD = 12.0  # between a frame and what is in it
_LONGEST = 34  # characters in a line


def graph_svg(graph: ModelGraph) -> str:
    """The graph as one SVG image, every block that it looks into open.

    Example:
        >>> from torch import nn
        >>> from grl_surgery.surgery.describe import describe
        >>> graph_svg(describe(nn.Sequential(nn.Linear(4, 8), nn.ReLU())))[:35]
        '<svg xmlns="http://www.w3.org/2000/'
    """
    body, (width, height) = _inside_svg(nest(graph))
    width, height = width + 2 * PAD, height + 2 * PAD
    style = files(__package__).joinpath("picture.css").read_text("utf-8")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" role="img" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.1f} {height:.1f}">'
        f"<title>{escape(graph.name)}</title><style>{style}</style>"
        f'<rect class="page" width="100%" height="100%"/>'
        f'<g transform="translate({PAD:g} {PAD:g})">{body}</g></svg>\n'
    )


def _inside_svg(inside: Inside) -> tuple[str, tuple[float, float]]:
    """Everything inside a block, and how much room it takes."""
    opened = {box: _inside_svg(box.inside) for box in inside.boxes if box.inside}

    def size(box: Box) -> tuple[float, float]:
        if box not in opened:
            return size_of(box)
        width, height = opened[box][1]
        return max(width + 2 * PAD, title_width(box)), height + HEADER + PAD

    places = lay_out(inside, size)
    parts = [line_svg(line_path(line, places, size)) for line in inside.lines]
    for box in inside.boxes:
        x, y = places.centers[box]
        drawn = box_svg(box)
        if box in opened:
            width, height = size(box)
            body, (inner, _) = opened[box]
            drawn = (
                f'{frame_svg(box, width, height)}<g transform="translate({-inner / 2:.1f} '
                f'{HEADER - height / 2:.1f})">{body}</g>'
            )
        parts.append(
            f'<g class="box {box.kind}" transform="translate({x:.1f} {y:.1f})">'
            f"<title>{escape(_described(box))}</title>{drawn}</g>"
        )
    return "".join(parts), places.size


def _described(box: Box) -> str:
    if box.kind in ("entry", "exit"):
        return f"{'into' if box.kind == 'entry' else 'out of'} {box.name}"
    if box.node is None:
        return "values used together"
    facts = [box.name, box.node.type, shape_text(box.node.shape)]
    return "  ".join([*facts, f"{box.node.parameters:,} parameters"] if box.node.parameters else facts)


# ------------------------------------------------------------------------------------------- boxes


def size_of(box: Box) -> tuple[float, float]:
    """Width and height of a box that is not open."""
    if box.kind in ("entry", "exit", "junction"):
        return (9.0, 9.0)
    name_text, detail_text = words_of(box)
    name, detail = cell_len(_shortened(name_text)), cell_len(_shortened(detail_text))
    if _is_small(box):
        width = name * _CHARACTER + (detail + 1) * _SMALL * bool(detail)
        return (width + 2 * _BAND + 8, 24.0)
    edge = 30.0 if box.kind in ("reversal", "head", "block") else 16.0
    return (max(name * _CHARACTER, detail * _SMALL) + _BAND + edge, 42.0 if box.kind != "module" else 38.0)


def _is_small(box: Box) -> bool:
    return box.kind in ("operation", "input", "output", "value")


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]}…{text[-(_LONGEST // 2 - 1) :]}"


def box_svg(box: Box, mark: Mark | None = None) -> str:
    """A box that is not open, around (0, 0)."""
    width, height = size_of(box)
    if box.kind in ("entry", "exit", "junction"):
        return f'<circle class="dot" r="{width / 2 - 1:g}"/>'
    outline = _outline(box, width, height)
    shadow = f'<g class="below" transform="translate(3 3)">{outline}</g>' if box.kind == "block" else ""
    if mark is None or box.kind in ("input", "output"):
        return shadow + outline + _words(box)
    if box.kind in ("reversal", "head"):
        return outline + _words(box) + _mark_svg(box, mark, width, height)
    words = f'<g transform="translate({_BAND / 2 - 2:g} 0)">{_words(box)}</g>'
    return shadow + outline + words + _mark_svg(box, mark, width, height)


def _outline(box: Box, width: float, height: float) -> str:
    x, y = width / 2, height / 2
    if box.kind == "reversal":  # a hexagon
        points = f"{-x:g},0 {12 - x:g},{-y:g} {x - 12:g},{-y:g} {x:g},0 {x - 12:g},{y:g} {12 - x:g},{y:g}"
        return f'<polygon class="shape" points="{points}"/>'
    if box.kind == "head":  # narrower towards what it decides
        points = f"{-x:g},{-y:g} {x:g},{-y:g} {x - 12:g},{y:g} {12 - x:g},{y:g}"
        return f'<polygon class="shape" points="{points}"/>'
    corner = {"input": y, "output": y, "operation": 5, "value": 0}.get(box.kind, 4)
    return (
        f'<rect class="shape" x="{-x:g}" y="{-y:g}" width="{width:g}" height="{height:g}" rx="{corner:g}"/>'
    )


def _words(box: Box) -> str:
    name_text, detail_text = words_of(box)
    name, detail = escape(_shortened(name_text)), escape(_shortened(detail_text))
    if _is_small(box):
        second = f'<tspan class="detail" dx="{_SMALL:g}">{detail}</tspan>' if detail else ""
        return f'<text class="name" y="4">{name}{second}</text>'
    below = f'<text class="detail" y="12">{detail}</text>' if detail else ""
    return f'<text class="name" y="{-3 if detail else 4}">{name}</text>{below}'


def _mark_svg(box: Box, mark: Mark, width: float, height: float) -> str:
    """The sign at the left of a box that says what its colour says."""
    slanted = box.kind in ("reversal", "head")
    x, wide = -width / 2 + 8 * slanted, _BAND - 4
    band = f'<rect x="{x:g}" y="{-height / 2:g}" width="{wide:g}" height="{height:g}"/>' * (not slanted)
    glyph = GLYPHS.get(mark.kind, "")
    return f'<g class="mark">{band}<text x="{x + wide / 2:g}" y="4.5">{glyph}</text></g>'


def title_width(box: Box) -> float:
    """Return the width that a frame needs for its title."""
    name_text, detail_text = words_of(box)
    name, detail = cell_len(_shortened(name_text)), cell_len(_shortened(detail_text))
    return name * _CHARACTER + (detail + 1) * _SMALL + 2 * PAD + _BAND


def frame_svg(box: Box, width: float, height: float) -> str:
    """The frame and the title of an open block, around (0, 0)."""
    name_text, detail_text = words_of(box)
    x, y = -width / 2, -height / 2
    return (
        f'<rect class="frame" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="7"/>'
        f'<text class="title" x="{x + PAD:.1f}" y="{y + 18:.1f}">{escape(_shortened(name_text))}'
        f'<tspan class="detail" dx="{_SMALL:g}">{escape(_shortened(detail_text))}</tspan></text>'
    )


# ------------------------------------------------------------------------------------------- lines


def line_path(line: Line, places: Layout, size: Callable[[Box], tuple[float, float]]) -> tuple[str, str]:
    """The way of a line, straight through rows and curved between them, and its tip."""
    (x, y), (end, below) = places.centers[line.source], places.centers[line.target]
    top = below - size(line.target)[1] / 2
    bounds = places.bounds
    way = f"M{x:.1f},{y + size(line.source)[1] / 2:.1f}"
    y = bounds[places.rows[line.source]][1]
    way += f"V{y:.1f}"
    stops = [(at, *bounds[row]) for at, row in places.bends[line]]
    for at, start, stop in [*stops, (end, bounds[places.rows[line.target]][0], top)]:
        middle = (y + start) / 2
        way += f"C{x:.1f},{middle:.1f} {at:.1f},{middle:.1f} {at:.1f},{start:.1f}V{stop:.1f}"
        x, y = at, stop
    tip = "" if line.target.kind in ("junction", "exit") else f"M{end - 3.5:.1f},{top - 6:.1f}h7l-3.5,6z"
    return way, tip


def line_svg(path: tuple[str, str], attributes: str = "") -> str:
    """A line with its tip."""
    way, tip = path
    tip = f'<path class="tip" d="{tip}"/>' if tip else ""
    return f'<g class="line"{attributes}><path class="way" d="{way}"/>{tip}</g>'
