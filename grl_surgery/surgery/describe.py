"""Describes a network as a graph of plain values: the points that can be cut, with shapes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from grl_surgery.capture.capture import Trace, module_paths, trace
from grl_surgery.capture.node_names import operation
from grl_surgery.capture.node_uses import boundary, node_uses, skip_boundaries
from grl_surgery.capture.observed_calls import observe
from grl_surgery.capture.python_state import preserve_python_state
from grl_surgery.capture.traceable_copy import has_forward, is_building_block
from grl_surgery.errors import PointNotFoundError, ShapeError, SurgeryError, TracingError
from grl_surgery.graph_data import ModelGraph
from grl_surgery.isolation.rng_state import preserve_rng_state
from grl_surgery.isolation.shared_copy import share_copy
from grl_surgery.isolation.tensor_copy import Copy, clone, on_meta, runs_slowly_on_meta, with_tensors
from grl_surgery.loading.inputs import RUNNING_INPUTS, as_arguments, does_not_run
from grl_surgery.loading.inputs import example_inputs as known_inputs
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.points import Edge, GraphNode, ancestors, escape, parents
from grl_surgery.surgery.graph_rewrite import apply_cuts, retrace
from grl_surgery.surgery.spliced_module import Cut, SplicedModule, surgery_of
from grl_surgery.validation import check_network

__all__ = ["bind_inputs", "describe", "edges_into", "graph_of", "quiet"]


def describe(model: nn.Module, depth: int | None = 1, example_inputs: Any = None) -> ModelGraph:
    """The graph of a network, with shapes where example inputs are known.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> [node.name for node in describe(net).nodes]
        ['input', '0', '1', 'output']

    Args:
        model: The network; not changed.
        depth: 1 shows what the network's own forward does, 2 what happens in its children as well, and so
            on; None goes all the way down. A module whose forward cannot be traced stays one node; where that
            is the network itself, the graph lists the modules, each of which can be cut at its call.
        example_inputs: Arguments of forward, to learn shapes from; by default those that timm or
            torchvision declare for this network. Nothing is computed: shapes are propagated symbolically.
            Where the network's own forward cannot be traced, it runs once on them.

    Raises:
        SurgeryError: ``depth`` is not a positive number.
    """
    check_network(model, "graph")
    if depth is not None and (not isinstance(depth, int) or depth < 1):
        raise SurgeryError(
            f"depth must be 1 or more, or None for all levels; got {depth!r}", example="depth=2"
        )
    original = model.grl_original if isinstance(model, SplicedModule) else model
    inputs = example_inputs if example_inputs is not None else known_inputs(original)
    found = _traced(model, depth, inputs)
    if found is None:
        described = describe_modules(model, depth, inputs)
    else:
        graph, constants = found
        shapes = {} if inputs is None else _shapes(model, graph, constants, bind_inputs(graph, inputs))[0]
        named = [node for node in graph.nodes if "point" in node.meta and node.target is not boundary]
        described = ModelGraph(
            type(model).__name__,
            tuple(_describe_node(model, node, shapes.get(node)) for node in named),
            tuple(edge for node in named for edge in edges_into(node)),
            tuple(_blocks(model, [node.meta["point"] for node in named])),
        )
    if depth is not None:
        deeper = functools.partial(describe, model, None, inputs)
        object.__setattr__(described, "_look_deeper", deeper)
    return described


def _traced(
    model: nn.Module, depth: int | None, inputs: Any
) -> tuple[fx.Graph, dict[str, torch.Tensor]] | None:
    """The graph as deep as asked for; None where a forward cannot be traced, and where a run shows more."""
    if isinstance(model, SplicedModule) and depth == 1:
        return model.graph, {}
    try:
        traced, wanted = _trace_to(model, depth, inputs)
    except TracingError:
        return None
    closed = {path for path in wanted - traced.traced_modules if has_forward(model.get_submodule(path))}
    if closed and inputs is not None and not isinstance(model, SplicedModule):
        return None
    return _present(model, traced), traced.constants


def describe_modules(model: nn.Module, depth: int | None, inputs: Any) -> ModelGraph:
    """The modules of a network whose forward cannot be traced: what can be cut at their calls.

    Args:
        model: The network; not changed.
        depth: As for :func:`describe`.
        inputs: Arguments of forward, on which the network runs once for the order of the calls, the shapes
            and the edges; None lists the modules in the order of the tree.
    """
    paths = [path for path, _ in model.named_modules() if path and _is_shown(model, path, depth)]
    seen = None if inputs is None else observe(model, inputs)
    if seen is None:
        nodes = [_describe_module(model, path, escape(path)) for path in paths]
        return ModelGraph(type(model).__name__, tuple(nodes), (), tuple(_blocks(model, paths)))
    around = {"", *(path for path in paths if depth is None or _levels(model, path) < depth - 1)}
    shown = [point for point in seen if (point.path in (around if point.operation else paths))]
    nodes = [
        replace(
            GraphNode(point.name, "call_function", point.operation)
            if point.operation
            else _describe_module(model, point.path, point.name),
            shape=point.shape,
        )
        for point in shown
    ]
    names = [node.name for node in nodes]
    edges = (Edge(source, point.name, arg) for point in shown for arg, source in point.sources)
    return ModelGraph(
        type(model).__name__,
        tuple(nodes),
        tuple(edge for edge in edges if edge.source in names),
        tuple(_blocks(model, names)),
    )


def _is_shown(model: nn.Module, path: str, depth: int | None) -> bool:
    """Whether a module is called, and not deeper than asked for."""
    is_inside_layer = any(is_building_block(model.get_submodule(around)) for around in ancestors(path)[1:])
    return (
        has_forward(model.get_submodule(path))
        and not is_inside_layer
        and (depth is None or _levels(model, path) < depth)
    )


def _levels(model: nn.Module, path: str) -> int:
    """Count the forwards around the call of a module, beside the network's own."""
    return sum(has_forward(model.get_submodule(outer)) for outer in ancestors(path)[1:])


def edges_into(node: fx.Node) -> list[Edge]:
    """The edges that end in ``node``; where it is the mark of a traced module, those into that module."""
    arg = node.meta.get("arg")
    return [
        Edge(skip_boundaries(source).meta["point"], node.meta["point"], arg or place)
        for place, source in node_uses(node)
        if "point" in skip_boundaries(source).meta
    ]


def point_names(model: nn.Module, traced_modules: Collection[str], inputs: Any = None) -> list[str]:
    """Names of the points in some modules' forwards, as far as a trace, or a run on inputs, can tell.

    Args:
        model: The network; not changed.
        traced_modules: Paths of the modules to look into.
        inputs: Arguments of forward; without them, forwards that cannot be traced show the modules in them.
    """
    names: list[str] = []
    with contextlib.suppress(TracingError):
        traced = trace(model, traced_modules, given=names_of(model, inputs), allow_untraceable=True)
        names = traced.names()
        if traced.traced_modules >= {
            path for path in traced_modules if has_forward(model.get_submodule(path))
        }:
            return names
    return list(dict.fromkeys([*names, *(node.name for node in describe_modules(model, None, inputs).nodes)]))


def graph_of(
    model: nn.Module, depth: int | None, inputs: Any = None
) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """The graph that the present mode runs, to be looked at, and the constants in it.

    Args:
        model: The network.
        depth: As for :func:`describe`.
        inputs: Arguments of forward; of those that have a default, only these are in the graph.

    Raises:
        TracingError: The network's own forward cannot be traced.
    """
    if isinstance(model, SplicedModule) and depth == 1:
        return model.graph, {}
    traced, _ = _trace_to(model, depth, inputs)
    return _present(model, traced), traced.constants


def _trace_to(model: nn.Module, depth: int | None, inputs: Any) -> tuple[Trace, set[str]]:
    """A trace as deep as asked for, where that is possible, and the modules that were to be looked into."""
    paths = [path for path, module in model.named_modules() if path and not is_building_block(module)]
    traced_modules = {path for path in paths if depth is None or path.count(".") + 1 < depth}
    given = names_of(model, inputs)
    if isinstance(model, SplicedModule):
        return retrace(model, traced_modules, given), traced_modules
    return trace(model, traced_modules, given=given, allow_untraceable=True), traced_modules


def _present(model: nn.Module, traced: Trace) -> fx.Graph:
    """The graph of the mode in which the network is."""
    flags = tuple(model.get_submodule(path).training for path in traced.mode_dependent)
    return traced.graphs.get(flags) or next(iter(traced.graphs.values()))


def names_of(model: nn.Module, inputs: Any) -> set[str]:
    """Names of the arguments of forward that example inputs fill."""
    if inputs is None:
        return set()
    args, kwargs = as_arguments(inputs)
    return {*list(inspect.signature(model.forward).parameters)[: len(args)], *kwargs}


def _describe_node(model: nn.Module, node: fx.Node, shape: tuple[int, ...] | None) -> GraphNode:
    name = node.meta["point"]
    if node.op == "call_module":
        return replace(_describe_module(model, str(node.target), name), shape=shape)
    kind = operation(node) if node.op.startswith("call_") else node.op
    return GraphNode(name, node.op, kind, shape)


def _describe_module(model: nn.Module, path: str, name: str) -> GraphNode:
    module = model.get_submodule(path)
    elements = sum(parameter.numel() for parameter in module.parameters())
    done = surgery_of(model)
    heads = [cut.module for cut in done.cuts if cut.is_head] if done else []
    role: Literal["", "head", "reversal"] = "head" if path in heads else ""
    coeff = None
    if isinstance(module, GradientReversal):
        role, coeff = "reversal", float(module.coeff)
    return GraphNode(name, "call_module", type(module).__name__, None, elements, role, coeff)


def _blocks(model: nn.Module, names: Sequence[str]) -> Iterator[GraphNode]:
    """The modules that these points lie in; a list of modules is none, because it has no forward."""
    paths = module_paths(model)
    for path in dict.fromkeys(path for name in names for path in parents(name)):
        module = model.get_submodule(paths[path]) if path in paths else None
        if module is not None and has_forward(module):
            yield _describe_module(model, paths[path], path)


# --------------------------------------------------------------------------------------------- shapes


def bind_inputs(graph: fx.Graph, example_inputs: Any) -> list[Any]:
    """Values for the graph's placeholders, in order: from one tensor, a tuple, or a dict by name.

    Raises:
        SurgeryError: More than the forward takes, a name that it does not have, or one missing.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = [str(node.target) for node in placeholders]
    if isinstance(example_inputs, dict):
        given = dict(example_inputs)
    else:
        values = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
        given = dict(zip(names, values, strict=False))
        if len(values) > len(names):
            raise SurgeryError(
                f"{len(values)} example inputs were passed; forward takes {len(names)}: {', '.join(names)}"
            )
    unknown = [name for name in given if name not in names]
    missing = [str(node.target) for node in placeholders if not node.args and node.target not in given]
    if unknown or missing:
        raise SurgeryError(
            f"example_inputs {'have no ' + repr(missing[0]) if missing else 'name ' + repr(unknown[0])}: "
            f"the forward takes {', '.join(names)}",
            example=f"example_inputs={{{names[0]!r}: torch.randn(...)}}" if names else None,
        )
    return [given.get(str(node.target), *node.args) for node in placeholders]


def _shapes(
    model: nn.Module,
    graph: fx.Graph,
    constants: dict[str, torch.Tensor],
    inputs: list[Any],
    wanted: Sequence[fx.Node | None] = (),
) -> tuple[dict[fx.Node, tuple[int, ...]], Exception | None]:
    """Output shapes of as many nodes as can be run on tensors without data, and why the others cannot."""
    if wanted and not runs_slowly_on_meta(model):
        with _nothing_kept(model):
            shapes, failure = _recorded(model, graph, constants, inputs, on_meta, wanted)
        if shapes.keys() >= set(wanted):
            return shapes, failure
    with _nothing_kept(model), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return _recorded(model, graph, constants, inputs, _without_data(mode), wanted)


def _recorded(
    model: nn.Module,
    graph: fx.Graph,
    constants: dict[str, torch.Tensor],
    inputs: list[Any],
    copied: Copy,
    wanted: Sequence[fx.Node | None] = (),
) -> tuple[dict[fx.Node, tuple[int, ...]], Exception | None]:
    """Output shapes of as many nodes as can be run on copies of all tensors, and why the others cannot.

    The run ends where those of the wanted ones are known, if some are wanted.
    """
    recorder, failure = None, None
    try:
        tree = with_tensors(model, copied=copied)
        for name, tensor in constants.items():
            tree.register_buffer(name, copied(tensor))
        recorder = _ShapeRecorder(tree, graph, wanted)
        recorder.run(*pytree.tree_map_only(torch.Tensor, copied, inputs))
    except Exception as error:  # a lazy module has no shapes yet, code that looks at values sees none
        failure = error
    return recorder.shapes if recorder else {}, failure


def shapes_at(
    model: nn.Module,
    cuts: Sequence[Cut],
    modules: Mapping[str, nn.Module],
    points: Sequence[str],
    example_inputs: Any,
) -> list[tuple[int, ...]]:
    """Shapes of the values at some points of a network in which some cuts are made already.

    The network runs on tensors without data; where its code looks at values, on copies of the real ones.

    Raises:
        ShapeError: A value is no tensor, or the network cannot run on these inputs.
        PointNotFoundError, AmbiguousPointError, TracingError: As in :func:`apply_cuts`.
    """
    tree = share_copy(model)
    probes = [Cut("probe", point, f"_probe_{place}") for place, point in enumerate(points)]
    given = names_of(model, example_inputs)
    try:
        traced = apply_cuts(tree, [*cuts, *probes], given=given, allow_untraceable=True)
    except PointNotFoundError as error:  # of what could be traced
        raise TracingError(str(error)) from error
    tree._modules.update(modules)
    tree._modules.update((probe.module, nn.Identity()) for probe in probes)
    found = [(graph, _called(graph, probes)) for graph in traced.graphs.values()]  # one mode may lack a point
    graph, nodes = next((row for row in found if None not in row[1]), found[0])
    if None in nodes:  # such as an item by another key than the one by which the forward reads it
        unread = points[nodes.index(None)]
        raise TracingError(f"no graph of {type(model).__name__} computes {unread!r}")
    inputs = bind_inputs(graph, example_inputs)
    shapes, failure = _shapes(tree, graph, traced.constants, inputs, nodes)
    if failure and not shapes.keys() >= set(nodes):
        with _nothing_kept(tree):
            shapes, failure = _recorded(tree, graph, traced.constants, inputs, clone)
    point = next((point for point, node in zip(points, nodes, strict=True) if node not in shapes), None)
    if point is not None and failure:
        what = does_not_run(f"this {type(model).__name__}", example_inputs, failure)
        raise ShapeError(what, example=RUNNING_INPUTS) from failure
    if point is not None:
        example = f"one item of it, as in after='{point}[0]'"
        raise ShapeError(f"the value of {point!r} is not one tensor", example=example)
    return [shapes[node] for node in nodes if node]


def _called(graph: fx.Graph, probes: Sequence[Cut]) -> list[fx.Node | None]:
    calls = {node.target: node for node in graph.nodes if node.op == "call_module"}
    return [calls.get(probe.module) for probe in probes]


def check_runs(module: nn.Module, shapes: Sequence[tuple[int, ...]]) -> None:
    """Run a module on inputs of these shapes that hold no data, for the checks in its forward.

    Raises:
        SurgeryError: Whatever the module's own checks raise, or that it cannot run.
    """
    with _nothing_kept(module), torch.device("meta"):
        parameter = next(module.parameters(), torch.empty(0))
        inputs = [torch.empty(shape, dtype=parameter.dtype) for shape in shapes]
        try:
            with_tensors(module, copied=on_meta)(*inputs)
        except SurgeryError:
            raise
        except Exception as error:
            raise ShapeError(
                f"{type(module).__name__} cannot run on {' and '.join(map(str, shapes))}: {error}"
            ) from error


@contextlib.contextmanager
def _nothing_kept(model: nn.Module) -> Iterator[None]:
    """Let a run leave nothing behind: no graph, no warning, nothing in a cache of the model's code."""
    with preserve_rng_state(), preserve_python_state(dict(model.named_modules())), quiet(), torch.no_grad():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings and the tracebacks that it logs of what fails, which is caught here."""
    log = logging.getLogger(FakeTensorMode.__module__)
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def _without_data(mode: FakeTensorMode) -> Copy:
    """Makes of a tensor one that has a shape only."""
    return functools.partial(mode.from_tensor, static_shapes=True)


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and keeps the shape of each tensor in it."""

    def __init__(self, module: nn.Module, graph: fx.Graph, wanted: Sequence[fx.Node | None] = ()) -> None:
        super().__init__(module, graph=graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.wanted = set(wanted)

    def run_node(self, n: fx.Node) -> Any:
        if self.wanted and self.shapes.keys() >= self.wanted:
            raise _AllKnownError
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


class _AllKnownError(Exception):
    """Ends a run of which nothing more is needed."""
