"""The command line: parsing and printing only. No torch at the top, so that ``--help`` answers at once."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from grl_surgery import points
from grl_surgery.errors import FlipError, PointNotFoundError, SurgeryError, TracingError

if TYPE_CHECKING:
    from torch import nn

    from grl_surgery.flip_report import FlipReport
    from grl_surgery.model_graph import ModelGraph
    from grl_surgery.models import LoadedModel

__all__ = ["app", "main"]

_NAME = "grl-surgery"
_FAILED, _REFUSED, _PIPE_CLOSED = 1, 2, 141

app = typer.Typer(
    help="Splice gradient reversals into a network that exists, and prove that exactly the right gradients flip.",
    epilog="MODEL is timm/NAME, torchvision/NAME, package.module:factory or file.py:factory. "
    "Exit status: 0 done, 1 a check failed, 2 the request cannot be met.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit; what the user can mend is one message on stderr, never a traceback.

    Args:
        argv: The arguments; by default those of the process.
    """
    try:
        typer.main.get_command(app)(args=argv, prog_name=_NAME)
    except SurgeryError as error:
        _complain(str(error))
        sys.exit(_FAILED if isinstance(error, FlipError) else _REFUSED)
    sys.exit(0)


# ---------------------------------------------------------------------------------------------- options


class Mode(str, Enum):
    """The mode to verify in."""

    train = "train"
    eval = "eval"
    both = "both"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm/NAME, torchvision/NAME, package.module:factory or file.py:factory.",
        show_default=False,
    ),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Load the library's pretrained weights.")]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="FILE", help="Load these weights, strictly.", show_default=False)
]
After = Annotated[
    list[str] | None,
    typer.Option(
        metavar="POINT",
        help="Reverse every use of this point's value: a name, 'glob:layer3.*' or 're:...'. May be repeated.",
        show_default=False,
    ),
]
Before = Annotated[
    list[str] | None,
    typer.Option(metavar="POINT", help="Reverse what flows back out of this point.", show_default=False),
]
OnEdge = Annotated[
    list[str] | None,
    typer.Option(
        "--edge", metavar="'A -> B'", help="Reverse this one use of A's value, no other.", show_default=False
    ),
]
Coeff = Annotated[float, typer.Option(metavar="NUMBER", help="The gradient is multiplied by minus this.")]
InputSize = Annotated[
    str | None,
    typer.Option(metavar="3x64x64", help="Size of one example input, without batch.", show_default=False),
]
Batch = Annotated[int, typer.Option(metavar="N", min=1, help="Inputs in a batch, with --input-size.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        _stdout().out(_NAME, importlib.metadata.version(_NAME), highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    pass


# --------------------------------------------------------------------------------------------- commands


@app.command("graph")
def print_graph(
    model: Model,
    depth: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Levels of modules to look into, counted from --under. [default: 1]",
            show_default=False,
        ),
    ] = None,
    under: Annotated[
        str | None, typer.Option(metavar="MODULE", help="Only what lies in this module.", show_default=False)
    ] = None,
    find: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Only points with this in their name or type, at any depth; or 'glob:...', 're:...'.",
            show_default=False,
        ),
    ] = None,
    edges: Annotated[bool, typer.Option("--edges", help="List the edges instead, as --edge takes them.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Show operations on sizes and unused arguments as well.")
    ] = False,
    train: Annotated[
        bool | None, typer.Option("--train/--eval", help="Mode to look at.", show_default=False)
    ] = None,
    input_size: InputSize = None,
    batch: Batch = 2,
    as_json: AsJson = False,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Print the points of a network: names for --after, types, output shapes, parameters."""
    loaded = _load(model, pretrained, checkpoint, input_size, batch)
    if train is not None:
        loaded.module.train(train)
    with _working("Tracing"):
        graphs = _graphs(loaded, under, depth or (None if find else 1))
        if find:
            graphs = [_found(graphs, find)]
    if as_json:
        _stdout().out(graphs[-1].to_json(), highlight=False)
    elif edges:
        _print_edges(graphs[-1], everything)
    else:
        _print_tree(loaded, graphs, everything=everything or bool(find))


@app.command()
def insert(
    model: Model,
    after: After = None,
    before: Before = None,
    edge: OnEdge = None,
    coeff: Coeff = 1.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print how the generated forward changes, as a diff.")
    ] = False,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Splice reversals in and print where they are; nothing is written yet."""
    loaded = _load(model, pretrained, checkpoint)
    with _working("Splicing"):
        spliced = _splice(loaded.module, after, before, edge, coeff)
    if dry_run:
        _print_diff(spliced)
    else:
        _print_reversals(loaded, spliced)


@app.command()
def verify(
    model: Model,
    after: After = None,
    before: Before = None,
    edge: OnEdge = None,
    coeff: Coeff = 1.0,
    mode: Annotated[Mode, typer.Option(help="Mode to verify in.", show_choices=True)] = Mode.train,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all random numbers.")] = 0,
    input_size: InputSize = None,
    batch: Batch = 2,
    as_json: AsJson = False,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Splice reversals in and prove that exactly the right gradients flip; exit with 1 if they do not.

    A model that has reversals already is verified as it is, without --after.
    """
    loaded = _load(model, pretrained, checkpoint, input_size, batch, seed)
    with _working("Splicing"):
        spliced = _spliced_or_as_it_is(loaded.module, after, before, edge, coeff)
    modes: list[Literal["train", "eval"]] = ["train", "eval"] if mode is Mode.both else [mode.value]  # type: ignore[list-item]
    reports = [_verify(loaded, spliced, one, seed) for one in modes]
    ok = all(report.ok for report in reports)
    if as_json:
        found = {"model": model, "ok": ok, "reports": [report.to_dict() for report in reports]}
        _stdout().out(json.dumps(found, indent=1), highlight=False)
    else:
        _print_reports(reports)
    raise typer.Exit(0 if ok else _FAILED)


@app.command()
def strip(
    model: Model,
    after: After = None,
    before: Before = None,
    edge: OnEdge = None,
    input_size: InputSize = None,
    batch: Batch = 2,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Splice reversals in, take them out again, and show that the network is the one it was."""
    from grl_surgery.splicing import strip as take_out

    loaded = _load(model, pretrained, checkpoint, input_size, batch)
    with _working("Splicing and stripping"):
        spliced = _spliced_or_as_it_is(loaded.module, after, before, edge, 1.0)
        checks = _compare(loaded, take_out(spliced))
    _print_checks(checks)
    raise typer.Exit(0 if all(same for _, same in checks) else _FAILED)


@app.command()
def demo() -> None:
    """The main job on a pretrained network and real photographs: splice, prove, strip."""
    with _working("Importing"):
        from grl_surgery.demo import run_demo
    raise typer.Exit(0 if run_demo(_stdout()) else _FAILED)


# ---------------------------------------------------------------------------------------------- loading


def _load(
    source: str,
    pretrained: bool,
    checkpoint: str | None,
    input_size: str | None = None,
    batch: int = 2,
    seed: int = 0,
) -> LoadedModel:
    """The network, made from the same random numbers in every run, with the inputs asked for."""
    size = _parse_size(input_size) if input_size else None
    with _working(f"Creating {source}"):
        import torch

        from grl_surgery.models import load_model

        torch.manual_seed(seed)
        loaded = load_model(source, pretrained=pretrained, checkpoint=checkpoint)
    if size is None:
        return loaded
    weight = next((p for p in loaded.module.parameters() if p.is_floating_point()), torch.empty(0))
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))
    return replace(loaded, example_inputs=(images.to(weight.device, weight.dtype),))


def _parse_size(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise SurgeryError(
            f"--input-size {text!r} is no size of an input, without its batch", example="--input-size 3x64x64"
        )
    return tuple(int(part) for part in text.split("x"))


def _splice(
    model: nn.Module,
    after: list[str] | None,
    before: list[str] | None,
    edge: list[str] | None,
    coeff: float,
) -> nn.Module:
    """The model with a reversal at every place named; insert_grl takes one kind of place at a time."""
    from grl_surgery.splicing import insert_grl

    if not (after or before or edge):
        raise SurgeryError(
            "nothing says where: give --after, --before or --edge",
            example="--after layer3 ('grl-surgery graph MODEL' lists the points)",
        )
    if after:
        model = insert_grl(model, after=after, coeff=coeff)
    if before:
        model = insert_grl(model, before=before, coeff=coeff)
    if edge:
        model = insert_grl(model, edge=edge, coeff=coeff)
    return model


def _spliced_or_as_it_is(
    model: nn.Module,
    after: list[str] | None,
    before: list[str] | None,
    edge: list[str] | None,
    coeff: float,
) -> nn.Module:
    """As ``_splice``, but a model that has reversals of its own needs no place named."""
    from grl_surgery.splicing import reversals

    if not (after or before or edge) and reversals(model):
        return model
    return _splice(model, after, before, edge, coeff)


# ----------------------------------------------------------------------------------------------- graphs


def _graphs(loaded: LoadedModel, under: str | None, depth: int | None) -> list[ModelGraph]:
    """The graph asked for, after the less deep ones in which the modules around its points are nodes."""
    from grl_surgery.model_graph import describe

    paths = [path for path, _ in loaded.module.named_modules() if path]
    if under is not None:
        _check_module(under, paths)
    start = under.count(".") + 1 if under else 0
    levels = depth or max((path.count(".") + 2 for path in paths), default=1)
    try:
        graphs = [
            describe(loaded.module, level, loaded.example_inputs)
            for level in range(max(start, 1), max(start + levels, 1) + (0 if depth is None else 1))
            if level <= start + levels
        ]
    except TracingError as error:
        raise error
    return [graph.under(points.escape(under)) for graph in graphs] if under else graphs


