"""What becomes of a gradient reversal wherever a network may run: writes docs/contexts.md.

    python docs/measure_contexts.py

The contexts are those of tests/test_reversal_contexts.py, so that the page and the tests say the same.
"""

from __future__ import annotations

import datetime
import logging
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision

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

PAGE = """# What becomes of a reversal

Each cell is one run: the reversal stands in the middle of a small network, and the gradient at its input is
compared bit for bit with the one that calculus gives. **LOST**: no error, and the gradient is not reversed.

Measured on {date} with Python {python}, torch {torch}, torchvision {torchvision}, by
`python docs/measure_contexts.py`.

{table}

The pasted forms are written out in `tests/pasted_reversals.py`. An in-place operation right behind them is an
error in eager mode already.
"""


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


def main() -> None:
    """Run every context with every form, and write the page."""
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    rows = [["context", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    everything = [*contexts.CONTEXTS, contexts.compile_inductor, *contexts.CONTEXTS_OF_ONE_SAMPLE]
    for context in everything:
        if context is contexts.anomaly_detection:  # wants pytest around it
            continue
        rows.append(
            [context.__name__.replace("_", " "), *(outcome(context, each) for each in COLUMNS.values())]
        )
        print(*rows[-1], sep=" | ", flush=True)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    page = PAGE.format(
        date=datetime.date.today().isoformat(),
        python=platform.python_version(),
        torch=torch.__version__.partition("+")[0],
        torchvision=torchvision.__version__.partition("+")[0],
        table=table,
    )
    (ROOT / "docs" / "contexts.md").write_text(page)


if __name__ == "__main__":
    main()
