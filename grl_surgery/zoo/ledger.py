"""The ledger: one line of JSON for each network, written as soon as its result is known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from grl_surgery.errors import SurgeryError

__all__ = ["NotProved", "Row", "add_row", "read_rows", "replace_text", "write_rows"]


class NotProved(Exception):
    """What does not hold of a network, and where."""


@dataclass(frozen=True)
class Row:
    """What came of one network in one tier.

    Args:
        name: As ``load_model`` takes it.
        family: The file that defines it.
        tier: ``structural`` or ``numeric``.
        result: ``ok`` or ``failed``.
        reason: Why it failed; or what a reader has to know, such as that the forward does not run on meta.
        points: Number of points of the network, at all depths.
        root: ``traced``; or ``inside``, where only modules in the network can be traced.
        places: What was cut, by role.
        mode: The modes in which it was run.
        device: Where the forward ran: ``meta`` or ``cpu``.
        splice_ms: Median time of one ``insert_grl``, in milliseconds.
        seconds: Time of everything.
        facts: What only one tier measures.
        versions: Of torch and of the network's library, by which it was measured.
    """

    name: str
    family: str
    tier: Literal["structural", "numeric"]
    result: Literal["ok", "failed"]
    reason: str = ""
    points: int = 0
    root: str = ""
    places: dict[str, str] = field(default_factory=dict)
    mode: str = "train, eval"
    device: str = "meta"
    splice_ms: float = 0.0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    versions: str = ""


def read_rows(path: str | os.PathLike[str]) -> dict[str, Row]:
    """The rows of a ledger by name, the last one where a name has several; none where there is no file.

    A last line that an interruption cut short is left out.

    Raises:
        SurgeryError: A line is no row.
    """
    file = Path(path)
    rows: dict[str, Row] = {}
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    known = {item.name for item in fields(Row)}
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            row = Row(**{key: value for key, value in values.items() if key in known})
        except (ValueError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise SurgeryError(f"line {number} of {file} is no row of a ledger: {line[:60]!r}") from error
        rows[row.name] = row
    return rows


def add_row(path: str | os.PathLike[str], row: Row) -> None:
    """Append a row."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(_line(row))


def write_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write a ledger anew, sorted by name, one row a network."""
    replace_text(path, "".join(map(_line, sorted(rows, key=lambda row: row.name))))


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file beside the old one, and then in its place."""
    file = Path(path)
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(text, "utf-8")
    beside.replace(file)


def _line(row: Row) -> str:
    return json.dumps({key: value for key, value in asdict(row).items() if value not in ("", {})}) + "\n"
