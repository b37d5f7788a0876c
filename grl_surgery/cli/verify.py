"""grl-surgery verify: prove that exactly the right gradients flip."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from grl_surgery.cli.console import FAILED, stdout, working
from grl_surgery.cli.model_args import (
    INPUTS,
    check_can_be_cut,
    check_places,
    load,
    run,
    spliced_or_as_it_is,
)
from grl_surgery.cli.options import (
    After,
    AsJson,
    Batch,
    Before,
    Checkpoint,
    InputSize,
    MadeFrom,
    Mode,
    ModelOrFile,
    OnEdge,
    Pretrained,
    Signed,
)
from grl_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from torch import nn

    from grl_surgery.loading.model_zoo import LoadedModel
    from grl_surgery.verify.report import FlipReport

__all__ = ["verify"]


def verify(
    model: ModelOrFile,
    after: After = None,
    before: Before = None,
    edge: OnEdge = None,
    coeff: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="The gradient is multiplied by minus this. [default: 1.0]",
            show_default=False,
        ),
    ] = None,
    signed: Signed = False,
    mode: Annotated[
        Mode | None, typer.Option(help="Mode to verify in. [default: train]", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all random numbers.")] = 0,
    budget: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Prove a sample of at most N parameters. [default: all]", show_default=False
        ),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write a page with the graph and the proof.", show_default=False),
    ] = None,
    input_size: InputSize = None,
    batch: Batch = 2,
    as_json: AsJson = False,
    made_from: MadeFrom = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Splice reversals in and prove that exactly the right gradients flip; exit with 1 if they do not.

    A network without any reversal is NONE, with exit status 0: there is nothing to prove.

    A model or a file that has reversals already is verified as it is, without --after.
    """
    modes = _modes(model, mode)
    check_places(model, after, before, edge, coeff, signed=signed, may_have_reversals=True)
    loaded = load(model, pretrained, checkpoint, input_size, batch, seed, made_from)
    if after or before or edge:
        check_can_be_cut(loaded)
    with working("Splicing"):
        spliced = spliced_or_as_it_is(loaded, after, before, edge, coeff, signed)
    reports = [_verify(loaded, spliced, one, seed, budget) for one in modes]
    ok = all(report.status != "FAILED" for report in reports)
    if html is not None:
        _write_page(html, reports)
    if as_json:
        found = {"model": model, "ok": ok, "reports": [report.to_dict() for report in reports]}
        stdout().out(json.dumps(found, indent=1), highlight=False)
    else:
        _print_reports(reports)
    raise typer.Exit(0 if ok else FAILED)


def _modes(model: str, mode: Mode | None) -> list[Literal["train", "eval"] | None]:
    """The modes to verify in; None for a program, which has the one that it was recorded in."""
    if model.endswith(".pt2"):
        if mode:
            raise SurgeryError(f"{model} has the mode that it was recorded in and no other: leave out --mode")
        return [None]
    return ["train", "eval"] if mode is Mode.both else [(mode or Mode.train).value]


def _write_page(path: str, reports: Sequence[FlipReport]) -> None:
    from grl_surgery.viz.report_page import write_report

    with working(f"Drawing {path}"):
        write_report(path, reports)


def _verify(
    loaded: LoadedModel,
    spliced: nn.Module,
    mode: Literal["train", "eval"] | None,
    seed: int,
    budget: int | None,
) -> FlipReport:
    from grl_surgery.verify.verify_flip import verify_flip

    if loaded.example_inputs is None:
        raise SurgeryError(f"it is not known what inputs {loaded.source} takes", example=INPUTS)
    reference = None if spliced is loaded.module else loaded.module
    try:
        with _bar(f"Verifying in {mode or 'its own'} mode") as progress:
            return verify_flip(
                spliced,
                reference,
                loaded.example_inputs,
                mode=mode,
                seed=seed,
                budget=budget,
                progress=progress,
            )
    except Exception:
        run(loaded, loaded.module)  # explains it where the network never ran on these inputs
        raise


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar of the runs, on a terminal only."""
    from rich.console import Console
    from rich.progress import Progress

    with (
        working(""),
        Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar,
    ):
        task = bar.add_task(what, total=None)
        yield lambda run, number, total: bar.update(
            task, description=f"{what}: {run}", completed=number - 1, total=total
        )


def _print_reports(reports: Sequence[FlipReport]) -> None:
    say = stdout()
    for place, report in enumerate(reports):
        if len(reports) > 1:
            say.print(Text(f"{'' if place == 0 else chr(10)}In {report.mode} mode", "bold"))
        say.print(report)
