"""Colours boxes and lines by what a report predicted and measured there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from grl_surgery.points import split_number
from grl_surgery.verify.predicted_flow import FlipGraph
from grl_surgery.verify.report import FlipReport, ParameterFlip, ReversalFlip
from grl_surgery.viz.nested_boxes import Box, Line, boxes_in

__all__ = ["FACTORS", "GLYPHS", "MEANINGS", "Mark", "View", "kind_of", "views_of"]

# What stands in a box besides its colour.
GLYPHS = {
    "flipped": "−",
    "mixed": "±",
    "unchanged": "+",
    "unreached": "○",
    "no signal": "0",
    "wrong": "✗",
    "several": "…",
}
MEANINGS = {
    "flipped": "every path to the objective crosses a reversal an odd number of times",
    "mixed": "some paths cross a reversal, others do not",
    "unchanged": "the gradient is the original one",
    "unreached": "no path leads to the objective",
    "no signal": "the gradient is zero with and without the reversal, which proves nothing",
    "wrong": "the gradient is not what it should be",
    "several": "the parameters inside differ: open it",
}
FACTORS = {
    "flipped": "−1",
    "mixed": "−1 and +1",
    "unchanged": "+1",
    "unreached": "none",
    "no signal": "0",
    "wrong": "wrong",
}


@dataclass(frozen=True)
class Mark:
    """What is known of one box.

    Args:
        kind: A key of :data:`GLYPHS`, or empty where nothing is known.
        predicted: In words.
        measured: In words; empty where there is nothing to measure.
        factor: What the gradient is multiplied by, as measured, or else as predicted.
        counts: How many parameters are of which kind.
    """

    kind: str = ""
    predicted: str = ""
    measured: str = ""
    factor: str = ""
    counts: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class View:
    """One objective of one report.

    Args:
        report: The report.
        graph: Its graph, if there is one.
        objective: ``output``, or the name of a head.
        label: What tells it from the other views; empty if it is the only one.
    """

    report: FlipReport
    graph: FlipGraph | None
    objective: str
    label: str

    @cached_property
    def rows(self) -> list[ParameterFlip]:
        """The parameters under this objective."""
        return [row for row in self.report.parameters if row.objective == self.objective]

    @cached_property
    def _rows_under(self) -> Mapping[str, Sequence[ParameterFlip]]:
        """The parameters in each module, and each parameter by its own name."""
        under: dict[str, list[ParameterFlip]] = {}
        for row in self.rows:
            parts = row.name.split(".")
            for end in range(1, len(parts) + 1):
                under.setdefault(".".join(parts[:end]), []).append(row)
        return under

    @cached_property
    def _reversals(self) -> Mapping[str, ReversalFlip]:
        return {row.name: row for row in self.report.reversals}

    def box(self, box: Box) -> Mark:
        """What the report says of a box."""
        path = split_number(box.name)[0].replace("##", "#")
        if path in self._reversals:
            return _of_reversal(self._reversals[path])
        if box.kind in ("entry", "exit", "junction", "input", "output"):
            return Mark()
        rows = self._rows_under.get(path, ())
        if rows:
            return _of_parameters(rows)
        if box.kind == "block" and box.inside:
            words = {self._point(inner.name) for inner in boxes_in(box.inside)} - {""}
            return _predicted(words.pop() if len(words) == 1 else "several" if words else "")
        return _predicted(self._point(box.name))

    def line(self, line: Line) -> str:
        """Kind of the gradient that flows back over a line."""
        if self.graph is None:
            return ""
        edges = self.graph.edges.get(self.objective, {})
        words = {edges.get(edge, "") for edge in line.uses} - {""}
        reached = words - {"unreached"} or words
        return reached.pop() if len(reached) == 1 else "mixed" if reached else ""

    def _point(self, name: str) -> str:
        word = self.graph.points.get(self.objective, {}).get(name, "") if self.graph else ""
        return "" if word == "unknown" else word


def views_of(reports: Sequence[FlipReport]) -> list[View]:
    """Every objective of every report."""
    views = []
    for report in reports:
        graph = report.draw() if report.draw else None
        objectives = list(dict.fromkeys(row.objective for row in report.parameters)) or ["output"]
        for objective in objectives:
            of = [f"loss of {'the ' if objective == 'output' else ''}{objective}"] * (len(objectives) > 1)
            mode = [f"{report.mode} mode"] * (len(reports) > 1)
            views.append(View(report, graph, objective, ", ".join([*of, *mode])))
    return views


def kind_of(row: ParameterFlip) -> str:
    """The word for a parameter's colour."""
    return row.measured if row.ok else "wrong"


def _of_parameters(rows: Sequence[ParameterFlip]) -> Mark:
    counts = Counter(kind_of(row) for row in rows)
    telling = set(counts) - {"no signal"} or set(counts)
    kind = "wrong" if "wrong" in counts else telling.pop() if len(telling) == 1 else "several"
    predicted = Counter(row.predicted for row in rows)
    ordered = tuple((word, counts[word]) for word in GLYPHS if word in counts)
    notes = ", ".join(dict.fromkeys(row.note for row in rows if not row.ok))
    factor = " or ".join(FACTORS[word] for word, _ in ordered) + (f": {notes}" if notes else "")
    return Mark(kind, _in_words(predicted.items()), _in_words(ordered), factor, ordered)


def _in_words(counts: Iterable[tuple[str, int]]) -> str:
    counts = list(counts)
    total = sum(count for _, count in counts)
    if len(counts) == 1:
        return f"{counts[0][0]} ({total} parameter{'s' if total > 1 else ''})"
    return ", ".join(f"{count} {word}" for word, count in counts)


def _predicted(word: str) -> Mark:
    return Mark(word, word, "", FACTORS.get(word, "")) if word else Mark()


def _of_reversal(row: ReversalFlip) -> Mark:
    factor = f"−{row.coeff:g}"
    if row.ok:
        return Mark("", f"multiplies by {factor}", "exact, bit for bit", factor)
    return Mark("wrong", f"multiplies by {factor}", row.note, f"wrong: {row.note}")
