"""The report of a verification: what was predicted, what was measured, and the verdict."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grl_surgery.errors import FlipError
from grl_surgery.graph_data import drawing
from grl_surgery.isolation.rng_state import preserve_rng_state

if TYPE_CHECKING:
    from grl_surgery.verify.predicted_flow import FlipGraph

__all__ = ["NO_REVERSAL", "FlipReport", "ParameterFlip", "ReversalFlip"]

Kind = Literal["flipped", "unchanged", "mixed", "unreached", "no signal", "wrong"]


NO_REVERSAL = "there is no reversal in this network"
"""What a report says of a network that has none."""

GLOSSARY = {
    "mixed": "paths with and without a reversal lead to it, and their gradients add up.",
    "unreached": "no path leads from it to this objective.",
    "no signal": "its gradient is zero with and without the reversal, which proves nothing.",
    "unknown": "no graph shows it; the same network with tensor hooks says what is right.",
}
"""What the words in a report mean, a sentence for each."""


@dataclass(frozen=True)
class ParameterFlip:
    """One parameter under one objective.

    Example:
        >>> ParameterFlip("0.weight", (8, 4), predicted="flipped", measured="unchanged", ok=False).measured
        'unchanged'

    Args:
        name: As in ``named_parameters()``.
        shape: Of the parameter.
        predicted: What the graph says: flipped, unchanged, mixed, unreached; or unknown, where the parameter
            lies outside the graph; then it is compared with the oracle only.
        measured: What autograd did. ``no signal``: the gradient is zero with and without the reversal, which
            proves nothing. ``wrong``: neither the prediction nor the oracle.
        ok: Whether the two agree.
        note: What is wrong, in words.
        objective: ``output``, or the name of a head.
    """

    name: str
    shape: tuple[int, ...]
    predicted: str
    measured: Kind
    ok: bool
    note: str = ""
    objective: str = "output"


@dataclass(frozen=True)
class ReversalFlip:
    """One reversal.

    Example:
        >>> print(ReversalFlip("grl_layer3", "after layer3", 1.0, ok=False, note="it is disabled").note)
        it is disabled

    Args:
        name: As in ``reversals(model)``.
        where: The point or edge it stands at.
        coeff: Its coefficient when it was verified.
        ok: Whether the gradient that leaves is -coeff times the one that enters, bit for bit, and not zero;
            and the coefficient is finite, not negative and not disabled.
        note: What is wrong, in words.
    """

    name: str
    where: str
    coeff: float
    ok: bool
    note: str = ""


@dataclass(frozen=True)
class FlipReport:
    """Whether exactly the right gradients flip.

    Example:
        >>> import torch
        >>> from grl_surgery import insert_grl, verify_flip
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> report = verify_flip(insert_grl(net, after="0"), example_inputs=torch.randn(3, 4))
        >>> report.ok, [row.name for row in report.parameters if row.measured == "flipped"]
        (True, ['0.weight', '0.bias'])

    Args:
        parameters: Every parameter, under every objective.
        reversals: Every reversal.
        forward_identical: Whether each output equals the reference's, bit for bit.
        mode: ``train``, ``eval`` or ``mixed``, as the network was verified.
        problems: Failures of the network as a whole, not of one parameter or reversal.
        network: Class of the network.
        difference: Where the forward differs, and how, in words; empty if it is identical.
        notes: Remarks: that the proof is of a sample, or the precision in which it was measured.
        draw: Makes the graph that :meth:`to_html` shows; it keeps the network alive, and is not stored.
    """

    parameters: tuple[ParameterFlip, ...]
    reversals: tuple[ReversalFlip, ...]
    forward_identical: bool
    mode: str
    problems: tuple[str, ...] = field(default=())
    network: str = ""
    difference: str = ""
    notes: tuple[str, ...] = field(default=())
    draw: Callable[[], FlipGraph | None] | None = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return not self.failures

    @property
    def status(self) -> Literal["OK", "FAILED", "NONE"]:
        """``OK``, ``FAILED``, or ``NONE`` where there is no reversal, so that there is nothing to prove."""
        if not self.reversals and self.problems == (NO_REVERSAL,) and len(self.failures) == 1:
            return "NONE"
        return "OK" if self.ok else "FAILED"

    @property
    def failures(self) -> list[str]:
        """All failures, one sentence for each."""
        return [
            *self.complaints,
            *(f"reversal {row.name} ({row.where}): {row.note}" for row in self.reversals if not row.ok),
            *(f"parameter {row.name}: {row.note}" for row in self.parameters if not row.ok),
        ]

    @property
    def complaints(self) -> list[str]:
        """The failures of the network as a whole, one sentence for each."""
        where = f": {self.difference}" if self.difference else ""
        differs = [] if self.forward_identical else [f"the forward differs from the reference{where}"]
        return [*self.problems, *differs]

    @property
    def verdict(self) -> str:
        """One sentence with the counts."""
        upstream = [row for row in self.parameters if "flipped" in (row.predicted, row.measured)]
        total = sum(row.measured != "no signal" for row in upstream)
        flipped = sum(row.measured == "flipped" and row.ok for row in upstream)
        count = Counter(row.measured for row in self.parameters if row.ok)
        counted = {
            f"{flipped} of {total} upstream parameters flipped, bit for bit": total,
            f"{count['mixed']} mixed as the paths say": count["mixed"],
            f"{count['unchanged']} downstream unchanged": count["unchanged"],
            f"{count['unreached']} unreached": count["unreached"],
            f"{count['no signal']} without signal": count["no signal"],
            f"{sum(not row.ok for row in self.parameters)} WRONG": not all(row.ok for row in self.parameters),
        }
        forward = "forward identical" if self.forward_identical else "forward DIFFERS"
        told = [text for text, present in counted.items() if present] + [forward]
        wrong = sum(not row.ok for row in self.reversals)
        if wrong:
            told.append(f"{wrong} of {len(self.reversals)} reversals WRONG")
        if self.problems:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            told.insert(0, f"{'' if self.status == 'NONE' else 'NOT PROVED: '}{self.problems[0]}{more}")
        return "; ".join([*told, *(note.partition(":")[0] for note in self.notes)])

    def raise_if_failed(self) -> FlipReport:
        """Return the report if everything is proved.

        Raises:
            FlipError: Naming what did not flip as it should.
        """
        if self.ok:
            return self
        shown = self.failures[:8]
        more = len(self.failures) - len(shown)
        lines = [self.verdict, *(f"- {line}" for line in shown), *([f"- and {more} more"] if more else [])]
        raise FlipError("\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        plain = asdict(replace(self, draw=None))
        del plain["draw"]
        return {"ok": self.ok, "status": self.status, "verdict": self.verdict, **plain}

    def to_html(self, path: str | Path) -> None:
        """Write one page that needs no network: the graph, coloured by what the gradient does, and a table.

        Example:
            >>> import tempfile, torch
            >>> import grl_surgery as gs
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
            >>> report = gs.verify_flip(gs.insert_grl(net, after="1"), net, torch.randn(3, 4))
            >>> report.to_html(tempfile.mkdtemp() + "/report.html")

        Args:
            path: The file to write, or to replace.

        Raises:
            ExportError: The folder does not exist.
        """
        drawing("report_page").write_report(path, [self])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "draw": None}  # the network is not stored along with its report

    def notable(self, most: int = 12) -> list[ParameterFlip]:
        """Return the parameters to look at first: wrong, then mixed, then without signal."""
        return self._worth_looking_at()[:most]

    def _worth_looking_at(self) -> list[ParameterFlip]:
        ranks = {"wrong": 0, "mixed": 2, "no signal": 3}
        rows = [row for row in self.parameters if not row.ok or row.measured in ranks]
        return sorted(rows, key=lambda row: 0 if not row.ok else ranks[row.measured])

    def __str__(self) -> str:
        """The verdict, the reversals, and only the parameters worth looking at, in 100 columns."""
        with preserve_rng_state():  # rich draws random numbers when it is imported
            from rich.console import Console

            console = Console(file=io.StringIO(), width=100, color_system=None, legacy_windows=False)
            console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.rstrip("\n").split("\n"))

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.markup import escape
        from rich.table import Table

        colour = {"OK": "green", "FAILED": "red", "NONE": "yellow"}[self.status]
        yield f"[bold {colour}]{self.status}[/]  {escape(self.verdict)}"
        said_already = 1 if self.problems else 0
        for complaint in self.complaints[said_already:]:
            yield f"[red]{escape(complaint)}[/]"
        yield from map(escape, self.notes)
        table = Table("reversal", "where", "coeff", "flip", box=None, pad_edge=False, title_justify="left")
        for row in self.reversals:
            table.add_row(row.name, escape(row.where), f"{row.coeff:g}", "exact" if row.ok else row.note)
        yield ""
        yield table
        rows = self.notable()
        if rows:
            details = Table("parameter", "shape", "predicted", "measured", "", box=None, pad_edge=False)
            for item in rows:
                shape = "x".join(map(str, item.shape)) or "0-d"
                details.add_row(item.name, shape, item.predicted, item.measured, escape(item.note))
            yield ""
            yield details
            more = len(self._worth_looking_at()) - len(rows)
            if more:
                yield f"and {more} more: report.parameters has them all"
            words = {word for row in rows for word in (row.predicted, row.measured)}
            yield ""
            yield from (f"{word}: {meaning}" for word, meaning in GLOSSARY.items() if word in words)
