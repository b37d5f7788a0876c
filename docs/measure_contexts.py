"""Measures where a gradient reversal is lost: writes docs/contexts.md, fills the table of docs/why.md.

    python docs/measure_contexts.py

The contexts are those of tests/reversal_contexts.py, so that the page and the tests say the same. Each row of
this library's columns is a process of its own; each other column is one process, which starts again where it
dies. Of the libraries on PyPI that have a reversal, those that are installed get a column. A context whose
library is not installed gets no row.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import reversal_contexts as contexts  # noqa: E402
from fresh_processes import Parent  # noqa: E402

OURS = {"grl_surgery": "contexts.function_of_number", "grl_surgery, layer": "contexts.layer()"}

OTHERS = {
    "pasted Function, number": "pasted_reversals.float_coeff",
    "pasted Function, tensor, setup_context + jvp": "pasted_reversals.tensor_coeff",
}

PEERS = {
    "pytorch-revgrad": "peer_reversals.pytorch_revgrad()",
    "torch-gradient-reversal": "peer_reversals.torch_gradient_reversal()",
    "pytorch-adapt": "peer_reversals.pytorch_adapt()",
    "skada": "peer_reversals.skada()",
}
"""Each library on PyPI that has a reversal, and what makes one with the coefficient of the contexts."""

SHORT = {
    "eager": "eager",
    "fx symbolic trace": "`torch.fx.symbolic_trace`",
    "torchvision feature extractor": "torchvision's `create_feature_extractor`",
    "export not strict": "`torch.export`",
    "export saved and loaded": "`torch.export`, saved, loaded",
    "compile inductor": "`torch.compile(fullgraph=True)`",
    "func grad": "`torch.func.grad`",
    "per sample gradients": "`vmap(grad)`, per-sample gradients",
    "forward mode": "forward-mode derivatives",
}
"""The contexts that docs/why.md shows."""

START, END = "<!-- measured by docs/measure_contexts.py -->", "<!-- end of what is measured -->"

PAGE = """# Where reversals are lost

Each row is a way to run a network, each column a way to write the reversal. A small network with a reversal
in its middle is run, and the gradient at the reversal's input is compared with the right one, bit for bit.
**LOST** means that there is no error and the gradient is not reversed.

Measured on {date} with
{versions},
by `python docs/measure_contexts.py`.
For this library's columns, each row ran in a new process. Each other column ran in one process. The tests run
every row as the first call of a process and as a later one, in processes that import torch, grl_surgery,
timm, torchvision, transformers or lightning first.

{table}

`tests/pasted_reversals.py` contains the pasted forms, and `tests/reversal_contexts.py` the contexts. An
in-place operation right after a pasted form is an error even in eager mode.

{rest}"""

REST = "## Beside the table"
"""The part of the page that is written by hand begins here."""

PROGRAM = """
import reversal_contexts as contexts, pasted_reversals, peer_reversals, torch
if __name__ == "__main__":
    for name in {names}:
        for operation in {operations}:
            torch.compiler.reset()
            print(contexts.outcome(getattr(contexts, name), eval(operation)), flush=True)
"""


def measure(
    names: Sequence[str], operations: Sequence[str], parent: Parent, folder: Path
) -> dict[str, list[str]]:
    """Context by context, the outcome of each operation; all in one process, as long as it lives."""
    names, rows = list(names), {}
    while names:
        program = PROGRAM.format(names=names, operations=list(operations))
        cells = parent.run(program, folder, TORCHINDUCTOR_CACHE_DIR=str(folder / "cache")).stdout.splitlines()
        done = len(cells) // len(operations)
        for place in range(done):
            rows[names[place]] = cells[place * len(operations) : (place + 1) * len(operations)]
        if done < len(names):
            rows[names[done]] = ["error: the process dies"] * len(operations)
        names = names[done + 1 :]
    return rows


def installed(names: Sequence[str]) -> dict[str, str]:
    """Of these distributions those that are installed, with their versions."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed", file=sys.stderr)
    return found


def all_rows() -> dict[str, dict[str, str]]:
    """Context by context, the outcome of each column."""
    peers = installed(list(PEERS))
    others = {**OTHERS, **{f"{name} {version}": PEERS[name] for name, version in peers.items()}}
    every = [
        *contexts.CONTEXTS,
        *contexts.CONTEXTS_OF_ONE_SAMPLE,
        *contexts.INDUCTOR_CONTEXTS,
        *contexts.COSTLY_CONTEXTS,
    ]
    packages = installed(sorted({name for context in every for name in contexts.packages_of(context)}))
    names = [
        context.__name__
        for context in every
        if all(name in packages for name in contexts.packages_of(context))
    ]
    rows: dict[str, dict[str, str]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as folder, Parent("import torch, grl_surgery as gs") as parent:
        for name in names:
            (cells,) = measure([name], list(OURS.values()), parent, Path(folder)).values()
            rows[name] |= dict(zip(OURS, cells, strict=True))
            print(name, *cells, sep=" | ", flush=True)
        for column, operation in others.items():
            for name, (cell,) in measure(names, [operation], parent, Path(folder)).items():
                rows[name][column] = cell
            print(column, *(rows[name][column] for name in names), sep=" | ", flush=True)
    order = [*OTHERS, *OURS, *(column for column in others if column not in OTHERS)]
    return {
        name.replace("_", " "): {column: marked(row[column]) for column in order}
        for name, row in rows.items()
    }


def marked(cell: str) -> str:
    """A loss stands out."""
    return "**LOST**" if cell == "LOST" else cell


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions() -> str:
    """What was measured with."""
    names = ["torch", "torchvision", "accelerate", "opacus", "captum", "peft", "torchao"]
    numbers = {"Python": platform.python_version(), **installed(names)}
    return ", ".join(f"{name} {number.partition('+')[0]}" for name, number in numbers.items())


def main() -> None:
    """Run every context with every form, and write the page and the table."""
    rows = all_rows()
    columns = list(next(iter(rows.values())))
    whole = table(["context", *columns], [[name, *row.values()] for name, row in rows.items()])
    date = datetime.date.today().isoformat()
    page = ROOT / "docs" / "contexts.md"
    by_hand = REST + page.read_text(encoding="utf-8").partition(REST)[2]
    text = PAGE.format(date=date, versions=versions(), table=whole, rest=by_hand)
    page.write_text(text, encoding="utf-8")

    shown = [column for column in columns if column != "grl_surgery, layer"]
    shown.sort(key=lambda column: column.startswith("grl_surgery"))
    short = [[text, *(rows[name][column] for column in shown)] for name, text in SHORT.items()]
    part = table(["where the network runs", *shown], short)
    why = ROOT / "docs" / "why.md"
    text = why.read_text(encoding="utf-8")
    before, after = text.partition(START)[0], text.partition(END)[2]
    measured = f"Measured on {date} with {versions()}."
    why.write_text(f"{before}{START}\n\n{part}\n\n{measured}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
