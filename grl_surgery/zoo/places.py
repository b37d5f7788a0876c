"""Chooses where to cut an unknown network: three stages, an operation, an edge into a join."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn

from grl_surgery.capture.capture import around_aliases, module_paths, trace
from grl_surgery.capture.node_names import operation
from grl_surgery.capture.node_uses import boundary, node_uses, skip_boundaries
from grl_surgery.capture.traceable_copy import is_building_block
from grl_surgery.errors import TracingError
from grl_surgery.points import Edge, escape, split_number

__all__ = ["Place", "Survey", "survey"]

Role = Literal["first stage", "middle stage", "last stage", "operation", "edge"]


@dataclass(frozen=True)
class Place:
    """One cut to try.

    Args:
        role: What it stands for.
        at: A point to splice after, or an edge.
    """

    role: Role
    at: str | Edge

    @property
    def keyword(self) -> dict[str, str | Edge]:
        """The argument of ``insert_grl``."""
        return {"edge" if isinstance(self.at, Edge) else "after": self.at}


@dataclass(frozen=True)
class Survey:
    """What a network offers.

    Args:
        points: Number of points seen: two levels of modules, and blocks of the middle stage all the way down.
        root: ``traced``; or ``inside``, where the stages lie in modules that can be, and around them is one
            that cannot.
        places: The cuts to try.
    """

    points: int
    root: Literal["traced", "inside"]
    places: tuple[Place, ...]


@dataclass(frozen=True)
class _Step:
    """One step of the execution: a value that a reversal could follow."""

    name: str
    region: str
    kind: Literal["stage", "layer", "operation"]
    edges: tuple[Edge, ...] = ()


@dataclass(frozen=True)
class _Region:
    """A module that can be traced, as deep as it was asked for."""

    path: str
    names: list[str]
    closed: set[str]  # paths of modules that cannot be
    steps: list[_Step]
    items: dict[str, str]  # of modules that return several tensors, the first one: "[0]"


def survey(model: nn.Module) -> Survey:
    """Trace a network, and choose.

    Stages are modules that hold parameters and other modules, at most two levels below the root; where there
    are none, single layers. The operation and the join lie in the middle stage if it has any.

    Raises:
        TracingError: Nothing in it can be traced.
    """
    regions = {region.path: region for region in _regions(model, "")}
    steps = [step for region in regions.values() for step in region.steps]
    if len(regions) > 1:  # no graph shows the order of what lies in several
        order = {path: place for place, path in enumerate(module_paths(model))}
        steps.sort(key=lambda step: order.get(split_number(step.name)[0], len(order)))
    stages = _stages(steps)
    if not stages:
        raise TracingError("nothing in this network can be traced")
    chosen = stages[0], stages[len(stages) // 2], stages[-1]
    middle = chosen[1]
    names = [step.name for step in chosen]
    items = {}
    for step in {step.region: step for step in chosen}.values():
        regions[step.region] = _region(model, step.region, middle.name, names)
        items.update(regions[step.region].items)
    if not any(step.edges for step in regions[middle.region].steps):
        regions[middle.region] = _region(model, middle.region, None)
    places = _choose(chosen, items, regions[middle.region].steps)
    points = sum(len(region.names) for region in regions.values())
    root: Literal["traced", "inside"] = "traced" if {step.region for step in chosen} == {""} else "inside"
    return Survey(points, root, tuple(places))


# ------------------------------------------------------------------------------------------- what there is


def _regions(model: nn.Module, path: str) -> Iterator[_Region]:
    """The module at ``path``, two levels deep; the modules in what cannot be traced of it."""
    closed = {path}
    with contextlib.suppress(TracingError):
        region = _region(model, path, "")
        yield region
        closed = region.closed
    for outer in sorted(closed):
        for name, child in model.get_submodule(outer).named_children():
            if not is_building_block(child):
                yield from _regions(model, f"{outer}.{name}" if outer else name)


def _region(model: nn.Module, path: str, down: str | None, also: Sequence[str] = ()) -> _Region:
    """Trace the module at ``path`` two levels deep, the one called ``down`` all the way; None is all.

    Of the modules called ``also``, what they return is looked at.
    """
    module = model.get_submodule(path)
    if type(module).forward is nn.ModuleList.forward:
        raise TracingError(f"{path!r} is a list of modules, which nobody calls")
    prefix = f"{escape(path)}." if path else ""
    inside, *others = (name.removeprefix(prefix) for name in (down or "", *also))
    traced_modules = {
        name
        for name, child in module.named_modules()
        if not is_building_block(child)
        and (down is None or "." not in name or (inside and _within(name, inside)) or name in others)
    }
    paths = module_paths(module)
    names = {name for name in paths if name.rpartition(".")[0] in traced_modules}
    traced_modules |= {paths[around] for around in around_aliases(paths, names)}
    traced = trace(module, traced_modules, allow_untraceable=True)
    graph = _common(list(traced.graphs.values()))
    used = _used(graph)
    items: dict[str, str] = {}
    for node in used:
        for name, item in _first_item(node, used):
            items.setdefault(prefix + name, item)
    closed = {f"{path}.{name}" if path else name for name in traced_modules - traced.traced_modules}
    return _Region(path, traced.names(), closed, list(_steps(module, path, prefix, used)), items)


def _used(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes, in order, on which what the graph returns depends."""
    used: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or not used.isdisjoint(node.users):
            used.add(node)
    return dict.fromkeys(node for node in graph.nodes if node in used)


def _first_item(node: fx.Node, used: Collection[fx.Node]) -> Iterator[tuple[str, str]]:
    """The first of several tensors that a module returns and somebody uses, by its mark or by the use."""
    if node.op != "call_module" and node.meta.get("boundary") != "out":
        return
    if node.meta.get("items"):
        yield node.meta["point"], "".join(f"[{key}]" for key in node.meta["items"])
        return
    keys = [user.args[1] for user in _users(node) if user in used and user.target is operator.getitem]
    yield from ((node.meta["point"], f"[{key}]") for key in keys[:1] if isinstance(key, (int, str)))


def _users(node: fx.Node) -> Iterator[fx.Node]:
    """Who uses the value, behind the marks that it passes."""
    for user in node.users:
        yield from _users(user) if user.target is boundary else [user]


def _within(name: str, stage: str) -> bool:
    """Whether a module encloses the stage, or lies in it; of numbered blocks, the first two suffice."""
    if not name.startswith(f"{stage}."):
        return name == stage or stage.startswith(f"{name}.")
    return all(int(part) < 2 for part in name.removeprefix(stage).split(".") if part.isdigit())


def _common(graphs: Sequence[fx.Graph]) -> fx.Graph:
    """The first graph; what the others have not is marked."""
    first, *others = graphs
    for other in others:
        names = {node.meta.get("point") for node in other.nodes}
        for node in first.nodes:
            if node.meta.get("point") not in names:
                node.meta["only_here"] = True
    return first


def _steps(module: nn.Module, path: str, prefix: str, nodes: Iterable[fx.Node]) -> Iterator[_Step]:
    features: set[fx.Node] = set()
    for node in nodes:
        if not _carries_features(node, features):
            continue
        features.add(node)
        if "point" not in node.meta or "only_here" in node.meta or node.meta.get("items"):
            continue
        kind = _kind(module, node)
        if kind is not None:
            edges = tuple(_joined(node, prefix, features)) if kind == "operation" else ()
            yield _Step(prefix + node.meta["point"], path, kind, edges)


def _carries_features(node: fx.Node, features: set[fx.Node]) -> bool:
    """Whether the value was computed by layers, in floating point: whether a gradient flows through it."""
    if node.op == "call_module":
        return bool(node.all_input_nodes)
    if node.op not in ("call_function", "call_method"):
        return False
    kept = node.target is boundary or operation(node) in _KEPT
    return kept and not features.isdisjoint(node.all_input_nodes)


def _kind(root: nn.Module, node: fx.Node) -> Literal["stage", "layer", "operation"] | None:
    if node.op in ("call_function", "call_method") and node.target is not boundary:
        return "operation" if operation(node) in _OPERATIONS else None
    if node.target is boundary and node.meta["boundary"] == "in":
        return None
    name = str(node.meta["base"].replace("##", "#") if node.target is boundary else node.target)
    module = root.get_submodule(name)
    if not any(parameter.is_floating_point() for parameter in module.parameters()):
        return None
    return "layer" if is_building_block(module) else "stage"


def _joined(node: fx.Node, prefix: str, features: set[fx.Node]) -> Iterator[Edge]:
    """The edges into an operation that joins several features; nothing for any other operation."""
    if operation(node) in _JOINS and len(features.intersection(node.all_input_nodes)) > 1:
        for arg, source in node_uses(node):
            if source in features:
                yield Edge(prefix + skip_boundaries(source).meta["point"], prefix + node.meta["point"], arg)


# Results of these are floating point where an argument is; the first ones are the more telling.
_OPERATIONS = (
    "add",
    "iadd",
    "mul",
    "imul",
    "cat",
    "matmul",
    "scaled_dot_product_attention",
    "relu",
    "gelu",
    "silu",
    "sigmoid",
    "softmax",
    "truediv",
    "sub",
    "mean",
    "stack",
    "permute",
    "transpose",
    "flatten",
    "reshape",
    "view",
)
_JOINS = frozenset([*_OPERATIONS[:7], "sub", "stack"])
_KEPT = frozenset([*_OPERATIONS, "getitem", "chunk", "split", "unbind", "dropout", "contiguous", "to"])


# ------------------------------------------------------------------------------------------------- choice


def _choose(stages: Sequence[_Step], items: Mapping[str, str], steps: Sequence[_Step]) -> Iterator[Place]:
    """The three stages; an operation and an edge, in the middle stage if it has them."""
    roles: tuple[Role, ...] = ("first stage", "middle stage", "last stage")
    for role, step in zip(roles, stages, strict=True):
        yield Place(role, step.name + items.get(step.name, ""))
    taken = {step.name for step in stages}
    inside = [step for step in steps if step.name.startswith(f"{stages[1].name}.")]
    ordered = [*inside, *steps]
    single = [step for step in ordered if step.name not in taken and step.kind != "stage"]
    operations = [step for step in single if step.kind == "operation" and "." in step.name]
    for step in (operations or single)[:1]:
        yield Place("operation", step.name)
    for step in [step for step in ordered if step.edges][:1]:
        yield Place("edge", step.edges[-1])


def _stages(steps: Sequence[_Step]) -> list[_Step]:
    """The deepest modules at most two levels down; single layers where these are fewer than three."""
    named = {step.name: step for step in steps if step.kind == "stage"}
    stages = [step for name, step in named.items() if not any(n.startswith(f"{name}.") for n in named)]
    layers = [step for step in steps if step.kind == "layer"]
    return stages if len(stages) >= 3 else layers if len(layers) >= 3 else stages or layers or list(steps)
