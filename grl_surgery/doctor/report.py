"""Reports of the doctor: a diagnosis and an adoption, as tables and as plain data."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from grl_surgery.doctor.verdicts import Finding, Outcome, shown_factor
from grl_surgery.errors import FlipError
from grl_surgery.training.schedules import Schedule

__all__ = ["Adopted", "Adoption", "Diagnosis", "Left"]


class _Printed:
    """Prints as its tables, in 100 columns."""

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=100, color_system=None, legacy_windows=False)
        console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.rstrip("\n").split("\n"))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


# ----------------------------------------------------------------------------------------------- diagnosis


@dataclass(frozen=True)
class Diagnosis(_Printed):
    """Whether the reversals of a network are alive, and where they are lost.

    Example:
        >>> import torch
        >>> from grl_surgery import diagnose
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> diagnosis = diagnose(net, torch.randn(3, 4))
        >>> diagnosis.ok, diagnosis.findings
        (False, ())

    Args:
        findings: Every place that reverses, or looks as if it did.
        outcomes: What happens to those that reverse in each context; empty if none does.
        after: The same for the network that ``adopt`` makes; empty where there is nothing to adopt.
        adoption: Why there is nothing to adopt, or what adopting does, in a sentence.
    """

    findings: tuple[Finding, ...]
    outcomes: tuple[Outcome, ...] = ()
    after: tuple[Outcome, ...] = ()
    adoption: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is a reversal, and none is lost without an error."""
        return any(row.ok for row in self.findings) and not self.lost

    @property
    def lost(self) -> list[str]:
        """The reversals that are lost without an error, one sentence for each."""
        return [
            *(f"{row.where}: {row.note}" for row in self.findings if row.is_silent),
            *(f"{row.context}: {row.note or 'not reversed'}" for row in self.outcomes if row.is_silent),
        ]

    @property
    def verdict(self) -> str:
        """One sentence."""
        alive = sum(row.ok for row in self.findings)
        others = _counted(len(self.findings) - alive, "place") + " that only looks like a reversal"
        if not self.findings:
            return (
                "no module, autograd Function or hook in this network reverses a gradient; "
                "arithmetic such as 2 * x.detach() - x is seen in a module of its own only"
            )
        if not alive:
            return f"no gradient is reversed; {others}"
        lost = sum(row.is_silent for row in self.outcomes) or "none"
        contexts = _counted(len(self.outcomes), "context")
        words = f"{_counted(alive, 'reversal')} alive in eager mode, lost silently in {lost} of {contexts}"
        return words if alive == len(self.findings) else f"{words}; {others}"

    def raise_if_lost(self) -> Diagnosis:
        """Return the diagnosis if nothing is lost.

        Raises:
            FlipError: Naming what is lost, and where.
        """
        if self.ok:
            return self
        raise FlipError("\n".join([self.verdict, *(f"- {line}" for line in self.lost)]))

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain data, ready for JSON."""
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "lost": self.lost,
            "findings": [row.to_dict() for row in self.findings],
            "contexts": [asdict(row) for row in self.outcomes],
            "after_adoption": [asdict(row) for row in self.after],
            "adoption": self.adoption,
        }

    def __rich_console__(self, console: Any, options: Any) -> Any:
        mark = "[bold green]OK[/]" if self.ok else "[bold red]LOST[/]"
        yield _line(mark if self.findings else "[bold yellow]NONE[/]", self.verdict)
        if self.findings:
            yield ""
            yield _findings_table(self.findings)
            yield from _remarks(self.findings)
        if self.outcomes:
            yield ""
            yield _outcomes_table(self.outcomes, self.after)
        if self.adoption:
            yield ""
            yield _line("model = gs.adopt(model, example_inputs).model", self.adoption)


def _line(mark: str, text: str) -> Any:
    from rich.markup import escape

    return f"{mark}  {escape(text)}"


def _table(*columns: str) -> Any:
    from rich.table import Table

    return Table(*columns, box=None, pad_edge=False)


def _text(words: str, style: str = "") -> Any:
    from rich.text import Text

    return Text(words, style)


def _findings_table(findings: Sequence[Finding]) -> Any:
    table = _table("where", "factor", "coefficient", "verdict", "source")
    for row in findings:
        times = f", {row.calls} calls" if row.calls > 1 else ""
        table.add_row(
            _text(row.where + times),
            shown_factor(row.factor),
            _text("moves by itself" if row.moves else row.coeff_from or "constant"),
            _text(row.verdict, "green" if row.ok else "red"),
            _text(row.source or ""),
        )
    return table


def _remarks(findings: Sequence[Finding]) -> Iterator[Any]:
    for row in findings:
        for words in (row.note, *row.remarks):
            if words:
                yield _text(f"  {row.where}: {words}")
        if row.fix:
            yield _text(f"  to mend it: {row.fix}")


_STYLES = {"alive": "green", "LOST": "bold red", "wrong": "bold red", "frozen": "yellow", "error": "yellow"}


def _outcomes_table(outcomes: Sequence[Outcome], after: Sequence[Outcome] = ()) -> Any:
    later = {row.context: row for row in after}
    table = _table("context", "as it is", *(["adopted"] if after else []), "")
    for row in outcomes:
        then = [later[row.context]] if row.context in later else []
        cells = [_text(cell.status, _STYLES.get(cell.status, "")) for cell in (row, *then)]
        table.add_row(row.context, *cells, _text(_short(row.note or "".join(cell.note for cell in then))))
    return table


def _short(note: str, most: int = 46) -> str:
    return note if len(note) <= most else note[: most - 3].rstrip() + "..."


# ------------------------------------------------------------------------------------------------ adoption


@dataclass(frozen=True)
class Adopted:
    """One reversal that is ours now.

    Args:
        where: What was there, in the words of its finding.
        name: Its name among ``reversals(model)``.
        coeff: Its coefficient.
        follows: The name under which its coefficient can still be set; None where there is none.
        schedule: What it computed for itself, as a schedule.
        notes: What is not as it was.
    """

    where: str
    name: str
    coeff: float
    follows: str | None = None
    schedule: Schedule | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Left:
    """One place that stays as it is, and why."""

    where: str
    reason: str


@dataclass
class Adoption(_Printed):
    """A network with our reversals in place of its own, and what was proved of it.

    Example:
        >>> import torch
        >>> from grl_surgery import adopt, reversals
        >>> class Pasted(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return x.view_as(x)
        ...     @staticmethod
        ...     def backward(ctx, gradient):
        ...         return -0.5 * gradient
        >>> class Net(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return Pasted.apply(super().forward(x))
        >>> adoption = adopt(Net(4, 2), torch.randn(3, 4))
        >>> adoption.difference, reversals(adoption.model)
        (0.0, {'grl_Pasted': AdoptedReversal(coeff=0.5)})

    Args:
        model: The network.
        adopted: The reversals that were replaced.
        left: Those that were not.
        difference: The largest relative difference of a gradient before and after, in eager mode, train and
            eval; 0 is bit for bit; None where the network did not run before.
        outcomes: What happens to the reversals now in each context; empty if no gradient arrives at
            any of them.
    """

    model: nn.Module
    adopted: tuple[Adopted, ...]
    left: tuple[Left, ...]
    difference: float | None
    outcomes: tuple[Outcome, ...] = ()

    @property
    def alive_everywhere(self) -> bool:
        """Whether no context loses a reversal, freezes a coefficient or fails."""
        return bool(self.outcomes) and all(row.status == "alive" for row in self.outcomes)

    @property
    def verdict(self) -> str:
        """One sentence."""
        count = len(self.adopted)
        equal = {None: "the network did not run before", 0.0: "gradients in eager mode equal bit for bit"}
        proof = equal.get(self.difference, f"gradients in eager mode equal to {self.difference}")
        words = f"{_counted(count, 'reversal')} adopted; {proof}"
        if not self.outcomes:
            return f"{words}; no gradient arrives there, so that no context can be compared"
        alive = sum(row.status == "alive" for row in self.outcomes)
        return f"{words}; alive in {alive} of {_counted(len(self.outcomes), 'context')}"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        adopted = [
            {**vars(row), "schedule": None if row.schedule is None else repr(row.schedule)}
            for row in self.adopted
        ]
        return {
            "verdict": self.verdict,
            "adopted": adopted,
            "left": [asdict(row) for row in self.left],
            "difference": self.difference,
            "contexts": [asdict(row) for row in self.outcomes],
        }

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield _line("[bold green]OK[/]" if self.alive_everywhere else "[bold yellow]MOSTLY[/]", self.verdict)
        yield ""
        table = _table("was", "is", "coeff", "set by")
        for row in self.adopted:
            table.add_row(
                _text(row.where), _text(row.name), f"{row.coeff:g}", _text(row.follows or "set_coeff")
            )
        yield table
        for row in self.adopted:
            yield from (_text(f"  {row.name}: {note}") for note in row.notes)
        yield from (_text(f"  left as it is: {place.where}: {place.reason}") for place in self.left)
        if self.outcomes:
            yield ""
            yield _outcomes_table(self.outcomes)
