"""What becomes of a gradient reversal wherever a network runs: writes docs/contexts.md, fills docs/why.md.

    python docs/measure_contexts.py

The contexts are those of tests/test_reversal_contexts.py, so that the page and the tests say the same. Of the
libraries on PyPI that have a reversal, those that are installed get a column.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import logging
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import pasted_reversals  # noqa: E402
import test_reversal_contexts as contexts  # noqa: E402

COLUMNS = {
    "pasted Function, number": pasted_reversals.float_coeff,
    "pasted Function, tensor, setup_context + jvp": pasted_reversals.tensor_coeff,
    "grl_surgery": contexts.function_of_number,
    "grl_surgery, layer": contexts.layer(),
}

PEERS = {
    "pytorch-revgrad": ("pytorch_revgrad", lambda module: module.RevGrad(alpha=contexts.COEFF)),
    "torch-gradient-reversal": (
        "gradient_reversal",
        lambda module: lambda x: module.gradient_reversal(x, contexts.COEFF),
    ),
    "pytorch-adapt": ("pytorch_adapt.layers", lambda module: module.GradientReversal(weight=contexts.COEFF)),
    "skada": (
        "skada.deep.modules",
        lambda module: lambda x: module.GradientReversalLayer.apply(x, contexts.COEFF),
    ),
}
"""Where each library on PyPI has its reversal, and how to make one with the coefficient of the contexts."""

SHORT = {
    "eager": "eager",
    "fx symbolic trace": "`torch.fx.symbolic_trace`",
    "torchvision feature extractor": "torchvision's `create_feature_extractor`",
    "export not strict": "`torch.export`",
    "export saved and loaded": "`torch.export`, saved, loaded",
    "compile aot eager": "`torch.compile(fullgraph=True)`",
    "func grad": "`torch.func.grad`",
    "per sample gradients": "`vmap(grad)`, per-sample gradients",
    "forward mode": "forward-mode derivatives",
}
"""The contexts that docs/why.md shows."""

START, END = "<!-- measured by docs/measure_contexts.py -->", "<!-- end of what is measured -->"

PAGE = """# What becomes of a reversal

Each cell is one run: the reversal stands in the middle of a small network, and the gradient at its input is
compared bit for bit with the one that calculus gives. **LOST**: no error, and the gradient is not reversed.

Measured on {date} with {versions}, by `python docs/measure_contexts.py`.

{table}

The pasted forms are written out in `tests/pasted_reversals.py`. An in-place operation right behind them is an
error in eager mode already.
"""


def peers() -> dict[str, Callable[[Tensor], Tensor]]:
    """The reversals of the libraries that are installed, by name and version."""
    found = {}
    for name, (module, make) in PEERS.items():
        try:
            found[f"{name} {importlib.metadata.version(name)}"] = make(importlib.import_module(module))
        except ImportError:
            print(f"{name} is not installed and gets no column", file=sys.stderr)
    return found


def outcome(context: Callable, operation: Callable) -> str:
    """One cell of the table."""
    torch._dynamo.reset()
    try:
        gradient = context(operation)
    except Exception as error:
        return f"error: {type(error).__name__}"
    if torch.equal(gradient, contexts.REVERSED_GRADIENT):
        return "reversed"
    return "**LOST**" if torch.equal(gradient, contexts.PLAIN_GRADIENT) else "wrong"


def measure(columns: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, list[str]]:
    """Context by context, the outcome of each column."""
    rows = {}
    for context in [*contexts.CONTEXTS, contexts.compile_inductor, *contexts.CONTEXTS_OF_ONE_SAMPLE]:
        if context is contexts.anomaly_detection:  # wants pytest around it
            continue
        name = context.__name__.replace("_", " ")
        rows[name] = [outcome(context, each) for each in columns.values()]
        print(name, *rows[name], sep=" | ", flush=True)
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions() -> str:
    """What was measured with."""
    numbers = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    return ", ".join(f"{name} {number.partition('+')[0]}" for name, number in numbers.items())


def main() -> None:
    """Run every context with every form, and write the page and the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    columns = {**COLUMNS, **peers()}
    rows = measure(columns)
    whole = table(["context", *columns], [[name, *cells] for name, cells in rows.items()])
    date = datetime.date.today().isoformat()
    page = PAGE.format(date=date, versions=versions(), table=whole)
    (ROOT / "docs" / "contexts.md").write_text(page)

    shown = [place for place, name in enumerate(columns) if name != "grl_surgery, layer"]
    shown.sort(key=lambda place: list(columns)[place].startswith("grl_surgery"))
    short = [[text, *(rows[name][place] for place in shown)] for name, text in SHORT.items()]
    part = table(["where the network runs", *(list(columns)[place] for place in shown)], short)
    why = ROOT / "docs" / "why.md"
    text = why.read_text(encoding="utf-8")
    before, after = text.partition(START)[0], text.partition(END)[2]
    measured = f"Measured on {date} with {versions()}."
    why.write_text(f"{before}{START}\n\n{part}\n\n{measured}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
