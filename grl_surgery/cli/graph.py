"""grl-surgery graph: lists or draws the points of a network."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from grl_surgery import points
from grl_surgery.cli.console import stdout, working
from grl_surgery.cli.model_args import (
    INPUTS,
    check_can_be_cut,
    check_places,
    load,
    run,
    splice,
)
from grl_surgery.cli.options import (
    After,
    AsJson,
    Batch,
    Before,
    Checkpoint,
    InputSize,
    MadeFrom,
    ModelOrFile,
    OnEdge,
    Pretrained,
)
from grl_surgery.errors import PointNotFoundError, SurgeryError, TracingError

if TYPE_CHECKING:
    from torch import nn

    from grl_surgery.graph_data import ModelGraph
    from grl_surgery.loading.model_zoo import LoadedModel
    from grl_surgery.points import GraphNode

__all__ = ["print_graph"]


class Viewer(str, Enum):
    """A program that shows graphs."""

    model_explorer = "model-explorer"


def print_graph(
    model: ModelOrFile,
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
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Draw it instead: .svg, .html (blocks that open), .dot or .mmd (Mermaid).",
            show_default=False,
        ),
    ] = None,
    open_in: Annotated[
        Viewer | None,
        typer.Option(
            help="Show the exported program there; with reversals in it, coloured by what the gradient does.",
            show_default=False,
        ),
    ] = None,
    after: After = None,
    before: Before = None,
    edge: OnEdge = None,
    input_size: InputSize = None,
    batch: Batch = 2,
    made_from: MadeFrom = None,
    as_json: AsJson = False,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Print or draw the points of a network: names for --after, types, output shapes, parameters.

    With --after, --before or --edge, the network is shown with reversals there.
    """
    _check_one_view(output=output, open_in=open_in, json=as_json, edges=edges)
    write = _writer(output) if output is not None else None
    if after or before or edge:
        check_places(model, after, before, edge)
    loaded = load(model, pretrained, checkpoint, input_size, batch, made_from=made_from)
    if after or before or edge:
        check_can_be_cut(loaded)
        loaded = replace(loaded, module=splice(loaded, after, before, edge, 1.0))
    if train is not None:
        loaded.module.train(train)
    if open_in:
        _open_in_model_explorer(loaded)
        return
    levels = depth or (None if find or (output or "").endswith(".html") else 1)
    with working("Tracing"):
        graphs, sizes = _graphs(loaded, under, levels, only_deepest=bool(output and not find))
    whole = graphs[-1]
    if (input_size or ":" in model) and _has_no_shapes(whole):
        with working("Running"):
            run(loaded, loaded.module)  # says so, where the inputs do not fit
    if find:
        graphs = [_found(graphs, find)]
    elif not (everything or as_json):
        from grl_surgery.viz import without

        graphs[-1] = without(whole, sizes)
    if write:
        write(graphs[-1])
    elif as_json:
        stdout().out(graphs[-1].to_json(), highlight=False)
    elif edges:
        stdout().out(*_edge_lines(graphs[-1]), sep="\n", highlight=False)
    else:
        _print_tree(loaded, graphs, hidden=0 if find else len(whole) - len(graphs[-1]))


def _check_one_view(**views: object) -> None:
    """The network is shown in one way at a time."""
    chosen = [f"--{name.replace('_', '-')}" for name, value in views.items() if value]
    if len(chosen) > 1:
        raise SurgeryError(f"{' and '.join(chosen)} are ways to show the network: give one of them")


def _has_no_shapes(graph: ModelGraph) -> bool:
    """Whether nothing is known of the last value computed, as where forward fails on these inputs."""
    computed = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    return bool(computed) and computed[-1].shape is None


def _writer(output: str) -> Callable[[ModelGraph], None]:
    """Return the function that writes a graph into a file with this ending."""
    endings: dict[str, Callable[[ModelGraph], str]] = {
        ".svg": lambda graph: graph._repr_svg_(),
        ".html": _page,
        ".dot": lambda graph: graph.to_dot() + "\n",
        ".mmd": lambda graph: graph.to_mermaid() + "\n",
    }
    ending = os.path.splitext(output)[1]
    if ending not in endings:
        raise SurgeryError(
            f"{output!r} has no ending of a picture", choices=[*endings], example="-o network.html"
        )

    def write(graph: ModelGraph) -> None:
        from grl_surgery.viz.html import write_page

        text = endings[ending](graph)
        write_page(output, text)
        stdout().out(f"wrote {output}, {len(text.encode()):,} bytes", highlight=False)

    return write


def _page(graph: ModelGraph) -> str:
    from grl_surgery.viz.html import graph_page

    return graph_page(graph)


def _open_in_model_explorer(loaded: LoadedModel) -> None:
    from grl_surgery.viz.model_explorer import open_in_model_explorer

    if loaded.example_inputs is None:
        raise SurgeryError(f"it is not known what inputs {loaded.source} takes", example=INPUTS)
    open_in_model_explorer(loaded.module, loaded.example_inputs)


def _graphs(
    loaded: LoadedModel, under: str | None, depth: int | None, only_deepest: bool
) -> tuple[list[ModelGraph], set[str]]:
    """The graph asked for, behind the less deep ones that it refines; and its points that are no tensors."""
    from grl_surgery.surgery.describe import describe
    from grl_surgery.viz import size_nodes

    model = loaded.module
    paths = [path for path, _ in model.named_modules() if path]
    start = _level(under, paths) if under else 0
    bottom = max((path.count(".") + 2 for path in paths), default=1)
    deepest = min(start + depth, max(start + 1, bottom)) if depth else bottom
    try:
        first = deepest if only_deepest else max(start, 1)
        graphs = [describe(model, level, loaded.example_inputs) for level in range(first, deepest + 1)]
    except TracingError as error:
        if under is None:
            raise _with_way_in(error, model) from error
        part = model.get_submodule(under)
        graphs = [
            _inside(replace(describe(part, level), name=type(model).__name__), under)
            for level in range(deepest - start if only_deepest else 1, deepest - start + 1)
        ]
    sizes = size_nodes(graphs[-1])
    if under:
        graphs = [graph.under(points.escape(under)) for graph in graphs]
    if not graphs[-1].nodes:
        raise SurgeryError(f"nothing in {under!r} is called", example="--train or --eval, for the other mode")
    return graphs, sizes


def _level(under: str, paths: Sequence[str]) -> int:
    """Return how deep the module ``under`` lies: 1 for a child of the root."""
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
        edges=tuple(edge.within(prefix) for edge in graph.edges if {edge.source, edge.target} <= names),
    )


def _found(graphs: Sequence[ModelGraph], wanted: str) -> ModelGraph:
    """The points that match, at whatever depth."""
    from grl_surgery.viz import GraphTree

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
        near = _near(wanted, nodes)
        raise PointNotFoundError(
            f"{wanted!r} matches none of the {len(nodes)} points",
            choices=near,
            example=f"--find {shlex.quote(near[0])}" if near else None,
        )
    kept = {node.name for node in found}
    edges: dict[points.Edge, None] = {}
    for graph in reversed(graphs):  # less deep graphs add the edges of the modules that deeper ones look into
        edges |= dict.fromkeys(edge for edge in graph.edges if {edge.source, edge.target} & kept)
        kept -= {node.name for node in graph.nodes}
    return replace(graphs[-1], nodes=tuple(found), edges=tuple(edges), blocks=())


def _near(wanted: str, nodes: Sequence[GraphNode], n: int = 5) -> list[str]:
    """Names, parts of names and types that are spelt like what was looked for, best first."""
    spelt: dict[str, str] = {}
    for word in (
        word for node in nodes for word in (node.name, *re.split(r"[.#\[\]]", node.name), node.type)
    ):
        if word and not word.isdigit():
            spelt.setdefault(word.lower(), word)
    text = re.sub(r"^(?:glob|re):|[*?^$]", "", wanted).strip(".").lower()
    close = difflib.get_close_matches(text, spelt, n=n, cutoff=0.5)
    return [spelt[word] for word in close]


def _edge_lines(graph: ModelGraph) -> list[str]:
    """Each edge as ``--edge`` takes it; where a pair has several, the arguments that tell them apart."""
    times = Counter(map(str, graph.edges))
    return [f"{edge} (argument {edge.arg})" if times[str(edge)] > 1 else str(edge) for edge in graph.edges]


def _print_tree(loaded: LoadedModel, graphs: Sequence[ModelGraph], hidden: int) -> None:
    from grl_surgery.viz import GraphTree

    say = stdout()
    model = loaded.module
    elements = sum(parameter.numel() for parameter in model.parameters())
    mode = "train" if model.training else "eval"
    say.out(f"{loaded.source}: {graphs[-1].name}, {elements:,} parameters, {mode} mode\n", highlight=False)
    say.print(GraphTree(graphs[-1], graphs[:-1]), crop=False)
    if hidden:
        say.out(f"\n{hidden} more with --all: operations on sizes, unused arguments", highlight=False)
