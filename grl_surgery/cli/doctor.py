"""grl-surgery doctor: tests whether the reversals of a network work."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from grl_surgery.cli.console import FAILED, stdout, working
from grl_surgery.cli.model_args import INPUTS, load, run
from grl_surgery.cli.options import (
    AsJson,
    Batch,
    Checkpoint,
    InputSize,
    MadeFrom,
    ModelOrFile,
    Pretrained,
)
from grl_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from grl_surgery.doctor.report import Diagnosis

__all__ = ["doctor"]


def doctor(
    model: ModelOrFile,
    ddp: Annotated[
        bool, typer.Option("--ddp", help="Also under DistributedDataParallel, in two processes.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all random numbers.")] = 0,
    input_size: InputSize = None,
    batch: Batch = 4,
    as_json: AsJson = False,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    made_from: MadeFrom = None,
) -> None:
    """Find the reversals that a network already has, and where they are lost; exit with 1 if one is.

    Any reversal counts: pasted, of another library, a layer, a function, a hook; it is found by measuring.
    If forward takes more than images, the factory returns all its arguments beside the network.
    """
    loaded = load(model, pretrained, checkpoint, input_size, batch, seed, made_from)
    if loaded.example_inputs is None:
        raise SurgeryError(f"it is not known what inputs {loaded.source} takes", example=INPUTS)
    with _progress() as progress:
        from grl_surgery.doctor.diagnose import diagnose

        try:
            diagnosis = diagnose(loaded.module, loaded.example_inputs, ddp=ddp, seed=seed, progress=progress)
        except SurgeryError:
            run(loaded, loaded.module)  # explains it where the network never ran on these inputs
            raise
    if as_json:
        stdout().out(json.dumps({"model": model, **diagnosis.to_dict()}, indent=1), highlight=False)
    else:
        stdout().print(diagnosis)
        _annotate(diagnosis)
    raise typer.Exit(0 if diagnosis.ok or not diagnosis.findings else FAILED)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Say on a terminal what runs; to a stream of its own, since the network's own is silenced meanwhile."""
    if not sys.stderr.isatty():
        with working(""):
            yield lambda what: None
        return
    console = Console(file=sys.stderr)
    with console.status("Importing ...") as status, working(""):
        yield lambda what: status.update(f"{what} ...")


def _annotate(diagnosis: Diagnosis) -> None:
    """Mark the lines of the reversals that are lost in a pull request, where GitHub runs this."""
    if os.environ.get("GITHUB_ACTIONS") != "true" or diagnosis.ok or not diagnosis.findings:
        return
    for row in diagnosis.findings:
        file, _, line = (row.source or "").rpartition(":")
        place = f" file={file},line={line}" if file else ""
        stdout().out(f"::error{place}::{row.where}: {diagnosis.verdict}", highlight=False)
