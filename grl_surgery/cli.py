"""The command line: parsing and printing only. No torch at the top, so that ``--help`` answers at once."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import sys
from collections import Counter
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
    help="Splice gradient reversals into an existing network; prove that exactly the right gradients flip.",
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
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write the network: .safetensors, .pt2, .onnx, or a folder of code.",
        show_default=False,
    ),
]
ModelOrFile = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|FILE",
        help="A model as for 'graph', or a .safetensors, .pt2 or folder that export wrote.",
        show_default=False,
    ),
]
MadeFrom = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="For a FILE of a network of your own: what makes the network.",
        show_default=False,
    ),
]
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
    edges: Annotated[
        bool, typer.Option("--edges", help="List the edges instead, as --edge takes them.")
    ] = False,
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
    from grl_surgery.drawing import without

    loaded = _load(model, pretrained, checkpoint, input_size, batch)
    if train is not None:
        loaded.module.train(train)
    with _working("Tracing"):
        graphs, sizes = _graphs(loaded, under, depth or (None if find else 1))
    whole = graphs[-1]
    if find:
        graphs = [_found(graphs, find)]
    elif not (everything or as_json):
        graphs[-1] = without(whole, sizes)
    if as_json:
        _stdout().out(graphs[-1].to_json(), highlight=False)
    elif edges:
        _stdout().out(*_edge_lines(graphs[-1]), sep="\n", highlight=False)
    else:
        _print_tree(loaded, graphs, hidden=0 if find else len(whole) - len(graphs[-1]))


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
    output: Output = None,
    input_size: InputSize = None,
    batch: Batch = 2,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Splice reversals in and print where they are; -o writes the result."""
    loaded = _load(model, pretrained, checkpoint, input_size, batch)
    with _working("Splicing"):
        spliced = _splice(loaded.module, after, before, edge, coeff)
    if dry_run:
        _print_diff(spliced)
        return
    _print_reversals(loaded, spliced)
    if output:
        _write(spliced, output, loaded)


@app.command()
def attach(
    model: Model,
    after: Annotated[str, typer.Option(metavar="POINT", help="The head reads this point's value.")],
    output: Output = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="Of the head.")] = "domain",
    num_domains: Annotated[int, typer.Option("--domains", metavar="N", help="Number of domains.")] = 2,
    coeff: Coeff = 1.0,
    input_size: InputSize = None,
    batch: Batch = 2,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Attach a domain head behind a reversal and print it; -o writes the result."""
    from grl_surgery.attaching import attach_domain_head

    loaded = _load(model, pretrained, checkpoint, input_size, batch)
    with _working("Attaching"):
        spliced = attach_domain_head(
            loaded.module,
            after,
            name=name,
            num_domains=num_domains,
            coeff=coeff,
            example_inputs=loaded.example_inputs,
        )
    say = _stdout()
    say.out(f"{loaded.source}: {type(loaded.module).__name__} with a head after {after}\n", highlight=False)
    say.out(f"({name}): {spliced.get_submodule(name)}", highlight=False)
    if output:
        _write(spliced, output, loaded)


@app.command()
def verify(
    model: ModelOrFile,
    after: After = None,
    before: Before = None,
    edge: OnEdge = None,
    coeff: Coeff = 1.0,
    mode: Annotated[Mode, typer.Option(help="Mode to verify in.", show_choices=True)] = Mode.train,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all random numbers.")] = 0,
    input_size: InputSize = None,
    batch: Batch = 2,
    as_json: AsJson = False,
    made_from: MadeFrom = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Splice reversals in and prove that exactly the right gradients flip; exit with 1 if they do not.

    A model or a file that has reversals already is verified as it is, without --after.
    """
    loaded = _load(model, pretrained, checkpoint, input_size, batch, seed, made_from)
    with _working("Splicing"):
        spliced = _spliced_or_as_it_is(loaded.module, after, before, edge, coeff)
    modes: list[Literal["train", "eval"] | None] = ["train", "eval"] if mode is Mode.both else [mode.value]
    if model.endswith(".pt2"):
        modes = [None]  # a program has the mode that it was recorded in
    reports = [_verify(loaded, spliced, one, seed) for one in modes]
    ok = all(report.ok for report in reports)
    if as_json:
        found = {"model": model, "ok": ok, "reports": [report.to_dict() for report in reports]}
        _stdout().out(json.dumps(found, indent=1), highlight=False)
    else:
        _print_reports(reports)
    raise typer.Exit(0 if ok else _FAILED)


@app.command()
def export(
    model: ModelOrFile,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="FILE", help=".safetensors, .pt2, .onnx, or a folder of code."
        ),
    ],
    inference: Annotated[
        bool, typer.Option("--inference", help="A .pt2 in eval mode, without reversals and heads.")
    ] = False,
    heads: Annotated[
        list[str] | None,
        typer.Option("--head", metavar="NAME", help="Keep this head's logits. May be repeated."),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Only for batches of the example's size.")] = False,
    input_size: InputSize = None,
    batch: Batch = 2,
    made_from: MadeFrom = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Write a network, spliced or not, in another format."""
    loaded = _load(model, pretrained, checkpoint, input_size, batch, made_from=made_from)
    purpose: Literal["training", "inference"] = "inference" if inference else "training"
    _write(loaded.module, output, loaded, purpose=purpose, heads=heads or None, dynamic=not static)


@app.command()
def strip(
    model: ModelOrFile,
    after: After = None,
    before: Before = None,
    edge: OnEdge = None,
    output: Output = None,
    input_size: InputSize = None,
    batch: Batch = 2,
    made_from: MadeFrom = None,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Take reversals and heads out of a FILE, and write the network that it was with -o.

    Of a MODEL: splice reversals in, take them out again, and show that the network is the one it was.
    """
    from grl_surgery.splicing import strip as take_out

    loaded = _load(model, pretrained, checkpoint, input_size, batch, made_from=made_from)
    if _is_exported(model):
        stripped = take_out(loaded.module)
        tensors, before_it = len(stripped.state_dict()), len(loaded.module.state_dict())
        counts = f"{tensors} of {before_it} tensors"
        _stdout().out(f"{model}: {type(stripped).__name__} again, {counts}", highlight=False)
        if output:
            _write(stripped, output, loaded)
        return
    with _working("Splicing and stripping"):
        stripped = take_out(_splice(loaded.module, after, before, edge, 1.0))
        checks = _compare(loaded, stripped)
    _print_checks(checks)
    if output:
        _write(stripped, output, loaded)
    raise typer.Exit(0 if all(same for _, same, _ in checks) else _FAILED)


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
    made_from: str | None = None,
) -> LoadedModel:
    """The network, made from the same random numbers in every run, with the inputs asked for."""
    size = None if input_size is None else _parse_size(input_size)
    with _working("" if pretrained else f"Creating {source}"):  # a download draws its own progress
        import torch

        from grl_surgery.models import load_model

        torch.manual_seed(seed)
        if _is_exported(source):
            loaded = _from_file(source, made_from, pretrained or checkpoint is not None)
        else:
            loaded = load_model(source, pretrained=pretrained, checkpoint=checkpoint)
    if size is None:
        return loaded
    weight = next((p for p in loaded.module.parameters() if p.is_floating_point()), torch.empty(0))
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))
    return replace(loaded, example_inputs=(images.to(weight.device, weight.dtype),))


def _is_exported(source: str) -> bool:
    """Whether this is a file or a folder, and no name of a model."""
    return os.path.isdir(source) or os.path.splitext(source)[1] in (".safetensors", ".pt2", ".onnx")


def _from_file(path: str, made_from: str | None, has_weights: bool) -> LoadedModel:
    """The network in a file that export wrote, with example inputs for what was cut."""
    from grl_surgery.exporting import load
    from grl_surgery.models import LoadedModel, example_inputs, load_model
    from grl_surgery.spliced_module import SplicedModule
    from grl_surgery.splicing import reversals
    from grl_surgery.splicing import strip as take_out

    if has_weights:
        raise SurgeryError(
            f"{path} has weights of its own", example="leave out --pretrained and --checkpoint"
        )
    made = load_model(made_from) if made_from else None
    module = load(path, model=None if made is None else made.module)
    inputs = example_inputs(module) if made is None else made.example_inputs
    if inputs is None and reversals(module) and isinstance(module, SplicedModule):
        inputs = example_inputs(take_out(module))
    return LoadedModel(module, path, inputs)


def _write(model: nn.Module, output: str, loaded: LoadedModel, **options: Any) -> None:
    """Export, and say what was written."""
    from pathlib import Path

    from grl_surgery.exporting import export as write

    source = loaded.source if re.fullmatch(r"(timm|torchvision)/[\w.]+", loaded.source) else None
    with _working(f"Writing {output}"):
        path = write(model, output, loaded.example_inputs, source=source, **options)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    size = sum(Path(file).stat().st_size for file in files)
    _stdout().out(f"\nwrote {path}, {size:,} bytes, read back and compared", highlight=False)


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
        model = insert_grl(model, edge=[_parse_edge(line) for line in edge], coeff=coeff)
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


def _graphs(loaded: LoadedModel, under: str | None, depth: int | None) -> tuple[list[ModelGraph], set[str]]:
    """The graph asked for, behind the less deep ones that it refines; and its points that are no tensors."""
    from grl_surgery.drawing import size_nodes
    from grl_surgery.model_graph import describe

    model = loaded.module
    paths = [path for path, _ in model.named_modules() if path]
    start = _level(under, paths) if under else 0
    deepest = start + depth if depth else max((path.count(".") + 2 for path in paths), default=1)
    try:
        graphs = [
            describe(model, level, loaded.example_inputs) for level in range(max(start, 1), deepest + 1)
        ]
    except TracingError as error:
        if under is None:
            raise _with_way_in(error, model) from error
        part = model.get_submodule(under)
        graphs = [
            _inside(replace(describe(part, level), name=type(model).__name__), under)
            for level in range(1, deepest - start + 1)
        ]
    sizes = size_nodes(graphs[-1])
    if under:
        graphs = [graph.under(points.escape(under)) for graph in graphs]
    if not graphs[-1].nodes:
        raise SurgeryError(f"nothing in {under!r} is called", example="--train or --eval, for the other mode")
    return graphs, sizes


def _level(under: str, paths: Sequence[str]) -> int:
    """How deep the module called ``under`` lies: 1 for a child of the root."""
    if under in paths:
        return under.count(".") + 1
    near = points.near_names(under, paths)
    raise PointNotFoundError(
        f"there is no module {under!r} in this network",
        choices=near,
        example=f"--under {shlex.quote(near[0])}" if near else None,
    )


def _with_way_in(error: TracingError, model: nn.Module) -> TracingError:
    """The error of a root that cannot be traced, with the modules whose points can be listed anyway."""
    inner = [name for name, child in model.named_children() if any(True for _ in child.children())]
    problem = str(error).partition("\n")[0]
    if not inner:
        return TracingError(problem)
    return TracingError(
        f"{problem}; points inside its modules can be listed", choices=inner, example=f"--under {inner[0]}"
    )


def _inside(graph: ModelGraph, path: str) -> ModelGraph:
    """The graph of the module at ``path`` with the names that its points have in the whole network."""
    prefix = f"{points.escape(path)}."
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    names = {node.name for node in nodes}
    return replace(
        graph,
        nodes=tuple(replace(node, name=prefix + node.name) for node in nodes),
        edges=tuple(_prefixed(edge, prefix) for edge in graph.edges if {edge.source, edge.target} <= names),
    )


def _found(graphs: Sequence[ModelGraph], wanted: str) -> ModelGraph:
    """The points that match, at whatever depth."""
    from grl_surgery.drawing import GraphTree

    nodes = [row.node for row in GraphTree(graphs[-1], graphs[:-1]).rows]
    expression = points.pattern(wanted)
    text = wanted.lower()
    found = [
        node
        for node in nodes
        if (
            points.matches(expression, node.name)
            if expression
            else text in f"{node.name} {node.type}".lower()
        )
    ]
    if not found:
        names = [node.name for node in nodes]
        near = points.near_names(wanted, [*names, *(node.type for node in nodes)])
        raise PointNotFoundError(f"{wanted!r} matches none of the {len(names)} points", choices=near)
    kept = {node.name for node in found}
    edges: dict[points.Edge, None] = {}
    for graph in reversed(graphs):  # less deep graphs add the edges of the modules that deeper ones look into
        edges |= dict.fromkeys(edge for edge in graph.edges if {edge.source, edge.target} & kept)
        kept -= {node.name for node in graph.nodes}
    return replace(graphs[-1], nodes=tuple(found), edges=tuple(edges))


def _edge_lines(graph: ModelGraph) -> list[str]:
    """Each edge as ``--edge`` takes it; where a pair has several, the arguments that tell them apart."""
    times = Counter(map(str, graph.edges))
    return [f"{edge} (argument {edge.arg})" if times[str(edge)] > 1 else str(edge) for edge in graph.edges]


def _parse_edge(line: str) -> points.Edge:
    """An edge as ``graph --edges`` prints it."""
    match = re.fullmatch(r"(.+) \(argument (.+)\)", line.strip())
    pair = points.parse_edge(match[1] if match else line)
    return replace(pair, arg=match[2]) if match else pair


def _print_tree(loaded: LoadedModel, graphs: Sequence[ModelGraph], hidden: int) -> None:
    from grl_surgery.drawing import GraphTree

    say = _stdout()
    model = loaded.module
    elements = sum(parameter.numel() for parameter in model.parameters())
    mode = "train" if model.training else "eval"
    say.out(f"{loaded.source}: {graphs[-1].name}, {elements:,} parameters, {mode} mode\n", highlight=False)
    say.print(GraphTree(graphs[-1], graphs[:-1]))
    if hidden:
        say.out(f"\n{hidden} more with --all: operations on sizes, unused arguments", highlight=False)


# ---------------------------------------------------------------------------------------------- surgery


def _print_reversals(loaded: LoadedModel, spliced: nn.Module) -> None:
    """Every reversal with its place, its coefficient, and the edges on which it reverses the gradient."""
    from grl_surgery.drawing import reversed_edges, spliced_parts

    say = _stdout()
    parts = spliced_parts(spliced)
    count = sum(len(part.cuts) for part in parts.values())
    say.out(
        f"{loaded.source}: {type(loaded.module).__name__} with {count} reversal{'s' if count > 1 else ''}",
        highlight=False,
    )
    for path, part in parts.items():
        prefix = f"{points.escape(path)}." if path else ""
        for cut in part.cuts:
            coeff = float(part.get_submodule(cut.module).coeff)  # type: ignore[arg-type]
            at = prefix + cut.at if isinstance(cut.at, str) else _prefixed(cut.at, prefix)
            name = f"{path}.{cut.module}" if path else cut.module
            say.out(f"\n{name}  {replace(cut, at=at)}, coeff {coeff:g}", highlight=False)
            for edge in reversed_edges(part, cut):
                say.out(f"  {_prefixed(edge, prefix)}", highlight=False)


def _prefixed(edge: points.Edge, prefix: str) -> points.Edge:
    """An edge of one module's graph by its names in the whole network."""
    return replace(edge, source=prefix + edge.source, target=prefix + edge.target)


def _print_diff(spliced: nn.Module) -> None:
    from grl_surgery.drawing import forward_diff, spliced_parts

    styles = {"+": "green", "-": "red", "@": "cyan"}
    for path, part in spliced_parts(spliced).items():
        for line in forward_diff(part, path or type(part).__name__).splitlines():
            _stdout().print(Text(line, styles.get(line[:1], "")), soft_wrap=True)


def _verify(
    loaded: LoadedModel, spliced: nn.Module, mode: Literal["train", "eval"] | None, seed: int
) -> FlipReport:
    from grl_surgery.verification import verify_flip

    if loaded.example_inputs is None:
        raise SurgeryError(f"nothing says what inputs {loaded.source} takes", example=_INPUTS)
    reference = None if spliced is loaded.module else loaded.module
    try:
        with _working(f"Verifying in {mode or 'its own'} mode"):
            return verify_flip(spliced, reference, loaded.example_inputs, mode=mode, seed=seed)
    except SurgeryError:
        raise
    except Exception:
        _run(loaded, loaded.module)  # explains it where the network never ran on these inputs
        raise


_INPUTS = "--input-size 3x64x64; or a factory that returns (network, (torch.randn(2, 3, 64, 64),))"


def _run(loaded: LoadedModel, model: nn.Module) -> Any:
    """Outputs of one forward in the model's present mode, from the same random numbers every time."""
    import torch

    if loaded.example_inputs is None:
        raise SurgeryError(f"nothing says what inputs {loaded.source} takes", example=_INPUTS)
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return model(*loaded.example_inputs)
    except Exception as error:  # the network is the user's: anything can come out of it
        sizes = ", ".join("x".join(map(str, getattr(x, "shape", "?"))) for x in loaded.example_inputs)
        reason = (str(error).strip().splitlines() or [""])[0]
        raise SurgeryError(
            f"{loaded.source} does not run on inputs of {sizes}: {type(error).__name__}: {reason}",
            example=_INPUTS,
        ) from error


def _print_reports(reports: Sequence[FlipReport]) -> None:
    say = _stdout()
    for place, report in enumerate(reports):
        if len(reports) > 1:
            say.print(Text(f"{'' if place == 0 else chr(10)}In {report.mode} mode", "bold"))
        say.print(report)


Check = tuple[str, bool, str]


def _compare(loaded: LoadedModel, stripped: nn.Module) -> list[Check]:
    """What must be as it was, whether it is, and how much was compared."""
    model = loaded.module.eval()
    kept, found = model.state_dict(), stripped.state_dict()
    outputs = _run(loaded, model), _run(loaded, stripped.eval())
    return [
        ("class", type(stripped) is type(model), type(model).__name__),
        ("state_dict", list(kept) == list(found) and _identical(kept, found), f"{len(kept)} tensors"),
        ("outputs", _identical(*outputs), "in eval mode, on the example inputs"),
    ]


def _identical(expected: Any, actual: Any) -> bool:
    import torch

    try:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True


def _print_checks(checks: Sequence[Check]) -> None:
    for what, same, detail in checks:
        verdict = Text("identical", "green") if same else Text("DIFFERENT", "bold red")
        _stdout().print(Text.assemble(f"{what:<12}", verdict, f"  {detail}"), soft_wrap=True)


# -------------------------------------------------------------------------------------- the two streams


class _Output(Console):
    """Standard output: as wide as its lines where it is no terminal, silent once nobody reads it."""

    def __init__(self) -> None:
        fitted = sys.stdout.isatty() or "COLUMNS" in os.environ
        super().__init__(highlight=False, width=None if fitted else _UNLIMITED)

    def on_broken_pipe(self) -> None:
        """Exit as a program does that the closed pipe has ended: 1 would mean that a check failed."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_PIPE_CLOSED)


_UNLIMITED = 10_000


def _stdout() -> Console:
    return _Output()


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
    """Say what takes time, on a terminal only; what other code prints meanwhile goes to stderr."""
    with contextlib.ExitStack() as stack:
        if what and sys.stderr.isatty():
            stack.enter_context(Console(stderr=True).status(f"{what} ..."))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _complain(message: str) -> None:
    say = Console(stderr=True, highlight=False)
    say.print(Text.assemble(("error: ", "bold red"), _in_shell_words(message)), soft_wrap=True)


# A selector in a message, unless it is an argument of a call that is quoted whole.
_SELECTOR = re.compile(r"(?<![\w(])(?<!, )(after|before|edge)=(?:(\[[^\]]*\])|r?('[^']*'|\"[^\"]*\"))")
_EDGE = re.compile(r"(edge=)?(?:grl_surgery\.)?\bEdge\('([^']*)', '([^']*)', '([^']*)'\)")


def _in_shell_words(message: str) -> str:
    """The message with ``after='layer3'`` written as the command line takes it: ``--after layer3``."""

    def selector(match: re.Match[str]) -> str:
        keyword, several, one = match.groups()
        names = re.findall(r"'([^']*)'|\"([^\"]*)\"", several or one)
        return " ".join(f"--{keyword} {shlex.quote(single or double)}" for single, double in names)

    def edge(match: re.Match[str]) -> str:
        option, source, target, arg = match.groups()
        return ("--edge " if option else "") + shlex.quote(f"{source} -> {target} (argument {arg})")

    message = message.replace("print(grl_surgery.graph(model))", f"'{_NAME} graph MODEL'")
    message = re.sub(r"(?<![\w(])(?<!, )coeff=", "--coeff ", message)
    return _SELECTOR.sub(selector, _EDGE.sub(edge, message))
