"""The proof as a page: the verdict, the graph coloured by what the gradient does, every parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from grl_surgery.verify.report import FlipReport, ParameterFlip
from grl_surgery.viz.gradient_colors import FACTORS, GLYPHS, View, kind_of, views_of
from grl_surgery.viz.html import Column, Picture, legend, page, table, write_page
from grl_surgery.viz.nested_boxes import shape_text

__all__ = ["report_page", "write_report"]


def write_report(path: str | Path, reports: Sequence[FlipReport]) -> None:
    """Write the page of one report, or of the reports of one network in several modes."""
    write_page(path, report_page(reports))


def report_page(reports: Sequence[FlipReport]) -> str:
    """The page as HTML."""
    views = views_of(reports)
    graph = next((view.graph for view in views if view.graph), None)
    picture = Picture(graph.graph, views) if graph else None
    kinds = {kind_of(row) for view in views for row in view.rows}
    if picture:
        kinds |= {mark[0] for box in picture.box_data for mark in box.get("marks", ())}
    title = reports[0].network or "Network"
    lead = (
        f"<header><h1>{escape(title)}</h1>{''.join(_verdict(report, len(reports) > 1) for report in reports)}"
        f"{_reversals(reports)}{legend([*kinds])}</header>"
    )
    return page(f"{title}: {_status(reports)}", lead, picture, _table(views, picture))


def _status(reports: Sequence[FlipReport]) -> str:
    return "OK" if all(report.ok for report in reports) else "FAILED"


def _verdict(report: FlipReport, names_mode: bool) -> str:
    """The sentence, and what is wrong with the network as a whole."""
    status = "OK" if report.ok else "FAILED"
    mode = f"In {escape(report.mode)} mode: " if names_mode else ""
    problems = "".join(f"<li>{escape(problem)}</li>" for problem in report.complaints)
    return (
        f'<p class="verdict {status.lower()}"><strong>{status}</strong> {mode}{escape(report.verdict)}</p>'
        + (f'<ul class="problems">{problems}</ul>' if problems else "")
    )


def _reversals(reports: Sequence[FlipReport]) -> str:
    rows = "".join(
        f"<tr><td>{escape(row.name)}</td><td>{escape(row.where)}</td><td>−{row.coeff:g}</td>"
        + (f"<td>{escape(report.mode)}</td>" if len(reports) > 1 else "")
        + f"<td{'' if row.ok else ' class=failed'}>{'exact' if row.ok else '✗ ' + escape(row.note)}</td></tr>"
        for report in reports
        for row in report.reversals
    )
    mode = "<th>mode</th>" if len(reports) > 1 else ""
    return (
        '<table class="reversals"><thead><tr><th>reversal</th><th>where</th><th>factor</th>'
        f"{mode}<th>measured</th></tr></thead><tbody>{rows}</tbody></table>"
        if rows
        else ""
    )


_COLUMNS = [
    Column("parameter"),
    Column("shape", True),
    Column("predicted"),
    Column("measured"),
    Column("factor"),
    Column("note"),
]


def _table(views: Sequence[View], picture: Picture | None) -> str:
    several = len(views) > 1
    columns = [*_COLUMNS, Column("gradient of")] if several else _COLUMNS
    rows = []
    for view in views:
        for row in view.rows:
            kind = kind_of(row)
            sign = f'<span class="sign" data-kind="{kind}">{GLYPHS[kind]}</span>'
            shape = shape_text(row.shape)
            cells = [
                (_link(row, picture), row.name),
                (shape, math.prod(row.shape)),
                (escape(row.predicted), row.predicted),
                (f"{sign}{escape(row.measured)}", f"{list(GLYPHS).index(kind)}"),
                (FACTORS[kind], FACTORS[kind]),
                (escape(row.note), row.note),
            ]
            more = [(escape(view.label), view.label)] if several else []
            rows.append(("" if row.ok else ' class="failed"', [*cells, *more]))
    return table(columns, rows, "Parameters")


def _link(row: ParameterFlip, picture: Picture | None) -> str:
    """The parameter's name, as a link to the box that it is drawn in."""
    parts = row.name.replace("#", "##").split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    found = (picture.by_name.get(name, picture.by_name.get(f"{name}#1")) for name in names if picture)
    place = next((place for place in found if place is not None), None)
    name = escape(row.name)
    return name if place is None else f'<a href="#b{place}">{name}</a>'
