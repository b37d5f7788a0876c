"""Edits traced graphs: a network and a list of cuts give the spliced graphs."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx, nn

from grl_surgery.capture.aliasing import overwritten_later, refuse_lost_writes, refuse_unseen_reads
from grl_surgery.capture.capture import Trace, around_aliases, module_paths, trace
from grl_surgery.capture.gradient_flow import is_computed_from_floats, is_integral, is_state
from grl_surgery.capture.module_effects import effects
from grl_surgery.capture.node_uses import boundary, is_size, node_uses, rewrite, skip_boundaries
from grl_surgery.capture.traceable_copy import is_building_block
from grl_surgery.capture.tracer import returns_several
from grl_surgery.errors import (
    AmbiguousPointError,
    PointNotFoundError,
    ShapeError,
    SurgeryError,
    TracingError,
)
from grl_surgery.nn.nested_reversal import pick, reverse_nested
from grl_surgery.points import (
    Edge,
    ancestors,
    enclosing,
    match_name,
    near_names,
    split_items,
    split_number,
)
from grl_surgery.surgery.head_outputs import add_logits
from grl_surgery.surgery.spliced_module import Cut, SplicedModule, disassemble, refuse_as_graph

__all__ = ["apply_cuts", "modules_to_open", "replace_item", "retrace"]


def modules_to_open(model: nn.Module, cuts: Sequence[Cut]) -> set[str]:
    """Paths of the modules whose forwards enclose the cuts: all that has to be traced."""
    paths = module_paths(model)
    points = {point for cut in cuts for point in cut.points}
    wanted = {path for point in points for path in enclosing(point, paths)}
    bases = {split_number(split_items(point)[0])[0] for point in points}
    return {paths[path] for path in wanted | around_aliases(paths, wanted | (bases & paths.keys()))}


def apply_cuts(
    model: nn.Module,
    cuts: Sequence[Cut],
    *,
    traced_modules: Collection[str] = (),
    given: Collection[str] = (),
    allow_untraceable: bool = False,
) -> Trace:
    """Trace a network as deep as the cuts need and make them, in order.

    Args:
        model: The network; not changed.
        cuts: What to splice in. The network must not hold the modules that they name: a forward that calls
            all children, as Sequential's does, would call them too.
        traced_modules: Modules to trace through besides those that enclose a cut.
        given: Arguments of the root's forward that are passed, where the graph is only looked at.
        allow_untraceable: For a graph that is only looked at; see :func:`trace`.

    Returns:
        The trace, its graphs edited.

    Raises:
        PointNotFoundError, AmbiguousPointError: A cut names no place, or more than one.
        ShapeError: The value there is a size, or a tuple of which one item must be chosen.
        TracingError: A forward that encloses a cut cannot be traced.
    """
    refuse_as_graph(model)
    traced = trace(
        model,
        modules_to_open(model, cuts) | set(traced_modules),
        given=given,
        allow_untraceable=allow_untraceable,
    )
    _refuse_handed_over(model, traced, cuts)
    names = dict.fromkeys(traced.names())
    for cut in cuts:
        try:
            changed = _cut_each(model, traced.graphs.values(), cut, names)
        except PointNotFoundError as error:
            deeper = _before_target(model, traced, cut) - set(traced_modules)
            if not deeper:
                raise
            try:
                return apply_cuts(
                    model,
                    cuts,
                    traced_modules={*traced_modules, *deeper},
                    given=given,
                    allow_untraceable=allow_untraceable,
                )
            except (PointNotFoundError, TracingError):
                raise error from None
        if changed == 0 and cut.kind != "probe":
            for graph in traced.graphs.values():
                refuse_unseen_reads(model, graph, str(cut.at), effects)
            raise SurgeryError(
                f"nothing uses the value {cut}, so a reversal there would have no effect",
                choices=near_names(str(cut.at), names),
            )
        names[cut.module] = None
    reversals = {cut.module for cut in cuts if cut.kind in ("after", "before", "edge")}
    once = functools.cache(effects)  # a block of a dense network is asked about with each of its inputs
    for graph in traced.graphs.values():
        refuse_lost_writes(model, graph, reversals, once)
        _erase_boundaries(graph)
        graph.lint()
    return traced


def _refuse_handed_over(model: nn.Module, traced: Trace, cuts: Sequence[Cut]) -> None:
    """A function that stayed one operation calls the modules it is handed, and the graph does not show it."""
    ends = {split_number(split_items(point)[0])[0] for cut in cuts for point in cut.points}
    around = {path for end in ends for path in (*ancestors(end), end)}
    for graph in traced.graphs.values():
        for node in graph.nodes:
            if node.op == "get_attr" and node.target in around and _is_module(model, str(node.target)):
                raise TracingError(f"{str(node.target)!r} is handed to a function that cannot be traced")


def _is_module(model: nn.Module, path: str) -> bool:
    return any(path == name for name, _ in model.named_modules())


def _cut_each(model: nn.Module, graphs: Iterable[fx.Graph], cut: Cut, names: Collection[str]) -> int:
    """Make one cut in the graphs of all modes; an edge need not be there in each."""
    changed, missing = 0, None
    for graph in graphs:
        try:
            changed += _cut(model, graph, cut, names)
        except PointNotFoundError as error:
            missing = error
    if missing is not None and not changed:
        raise missing
    return changed


def _before_target(model: nn.Module, traced: Trace, cut: Cut) -> set[str]:
    """Modules in one call from which an edge's target gets values: one that passes its input on hides it."""
    if not isinstance(cut.at, Edge):
        return set()
    nodes = [node for graph in traced.graphs.values() for node in _named(graph, cut.at.target)]
    sources = (_whole(source) for node in nodes for _, source in node_uses(node))
    called = {str(source.target) for source in sources if source.op == "call_module"} - {cut.module}
    return {path for path in called if not is_building_block(model.get_submodule(path))}


def _whole(value: fx.Node) -> fx.Node:
    """Return the node that computed a value, behind marks; for an item, the node of the whole."""
    value = skip_boundaries(value)
    while value.target is operator.getitem and isinstance(value.args[0], fx.Node):
        value = skip_boundaries(value.args[0])
    return value


def retrace(model: SplicedModule, traced_modules: Collection[str], given: Collection[str] = ()) -> Trace:
    """The graphs of a spliced network again, to be looked at, traced deeper where that is possible."""
    original, _, _ = disassemble(model)
    traced_modules = {path for path, _ in original.named_modules()} & set(traced_modules)
    return apply_cuts(
        original,
        model.grl_surgery.in_graph,
        traced_modules=traced_modules,
        given=given,
        allow_untraceable=True,
    )


def _cut(model: nn.Module, graph: fx.Graph, cut: Cut, names: Collection[str]) -> int:
    """Make one cut in one graph; returns how many uses of a value it changed."""
    if isinstance(cut.at, Edge):
        known = dict.fromkeys([*names, *(name for node in graph.nodes for name in _names_of(node))])
        source, target = (_find(model, end, known) for end in (cut.at.source, cut.at.target))
        slot = _edge_slot(graph, cut.at, source, target)
        make = functools.partial(_reversed_on_edge, model, graph, cut.module, cut.at.source, cut.at.target)
        return _reverse_uses(graph, [slot] if slot else [], make)
    if cut.kind == "before":
        name = _find(model, cut.at, names)
        return _cut_before(model, graph, _named(graph, name), cut.module, name)
    if cut.kind == "head":
        return _attach(model, graph, cut, names)
    if cut.kind == "instead":
        return _replace(graph, _named(graph, _find(model, cut.at, names)), cut.module)
    return sum(_cut_after(model, graph, *value, cut) for value in _values(model, graph, cut.at, names))


def _named(graph: fx.Graph, name: str) -> list[fx.Node]:
    return [node for node in graph.nodes if node.meta.get("point") == name]


def _find(model: nn.Module, name: str, names: Collection[str]) -> str:
    if name in names:
        return name
    others = [path for path in module_paths(model) if not path.startswith("grl_")]
    return match_name(name, names, others)


def _replace(graph: fx.Graph, nodes: Sequence[fx.Node], module: str) -> int:
    """Call the module where the network calls something else: on its value, and a computed coefficient."""
    for node in nodes:
        values = [arg for arg in node.args if isinstance(arg, fx.Node)]
        with graph.inserting_before(node):
            call = _call(graph, module, *values[:2])
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    return len(nodes)


# ------------------------------------------------------------------------------------------- after a point


def _values(
    model: nn.Module, graph: fx.Graph, name: str, names: Collection[str]
) -> Iterator[tuple[fx.Node, tuple[Any, ...]]]:
    """The nodes that hold the value called ``name``, and which of its items is meant."""
    whole, items = split_items(name)
    if items and name in names and whole not in names:
        whole, items = name, ()
    nodes = _named(graph, _find(model, whole, names))
    leaving = [node for node in nodes if node.meta.get("boundary") == "out"]
    if leaving and leaving[0].meta["items"] and not items:
        choices = [name + "".join(f"[{key}]" for key in node.meta["items"]) for node in leaving]
        raise ShapeError(
            f"the value of {name!r} is made of {len(leaving)} tensors: choose one",
            choices=choices,
            example=f"after={choices[0]!r}",
        )
    for node in leaving or [node for node in nodes if "boundary" not in node.meta]:
        if node.op == "output":
            raise SurgeryError("nothing comes after the output", example="before='output'")
        if is_size(node):
            raise ShapeError(f"the value of {name!r} is a size, not a tensor: no gradient flows through it")
        held = node.meta.get("items", ())
        if held == items[: len(held)]:
            yield from _item_takers(node, items[len(held) :])


def _item_takers(node: fx.Node, items: tuple[Any, ...]) -> Iterator[tuple[fx.Node, tuple[Any, ...]]]:
    """Yield the nodes that take an item where nobody takes the whole; otherwise the value and the item.

    An item of a mapping may be taken by its place, ``output[0]``, and be cut by its name: that is the item
    of the whole.
    """
    taken = [user for user in node.users if user.target is operator.getitem and user.args[0] is node]
    same = [user for user in taken if len(items) == 1 and user.args[1] == items[0]]
    alike = len(items) == 1 and all(type(user.args[1]) is type(items[0]) for user in taken)
    if len(taken) == len(node.users) and (same or alike):
        yield from ((user, ()) for user in same)
    else:
        yield node, items


def _cut_after(model: nn.Module, graph: fx.Graph, value: fx.Node, items: tuple[Any, ...], cut: Cut) -> int:
    if items:
        _refuse_no_items(model, value, str(cut.at))
    else:
        _refuse_no_tensor(model, value, str(cut.at))
    users = [user for user in value.users if "for_head" not in user.meta]  # heads have reversals of their own
    with _inserting_after(graph, value):
        holders = _pick(graph, value, items)
        changed = _call(graph, cut.module, holders[-1])
        for holder, key in zip(reversed(holders[:-1]), reversed(items), strict=True):
            changed = graph.call_function(replace_item, (holder, key, changed))
    for user in users:
        user.replace_input_with(value, changed)
    return len(users)


def _pick(graph: fx.Graph, value: fx.Node, items: Sequence[Any]) -> list[fx.Node]:
    """The value, its item, that item's item and so on."""
    holders = [value]
    for key in items:
        holders.append(graph.call_function(pick, (holders[-1], (key,))))
    return holders


def replace_item(value: Any, key: Any, item: Any) -> Any:
    """``value`` with one item exchanged; the tuple, list or mapping itself is not changed.

    Example:
        >>> replace_item(("a", "b"), 1, "c")
        ('a', 'c')

    Raises:
        ShapeError: The value is one tensor, and autograd does not see what is written into a copy of it.
    """
    if isinstance(value, torch.Tensor):
        raise ShapeError(f"a reversal of [{key}] found one tensor there, which has no items")
    if isinstance(value, tuple):
        items = list(value)
        items[key] = item
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    changed = copy.copy(value)
    # An output of a transformers model is a mapping by name that also answers to a position.
    by_position = isinstance(value, Mapping) and isinstance(key, int) and key not in value
    changed[list(value)[key] if by_position else key] = item
    return changed


def _call(graph: fx.Graph, module: str, *values: fx.Node) -> fx.Node:
    """A call of a spliced module, which is a point as well."""
    node = graph.call_module(module, values)
    node.meta.update(point=module, base=module, spliced=True)
    return node


def _inserting_after(graph: fx.Graph, node: fx.Node) -> AbstractContextManager[None]:
    """Insert behind the node, in the order of insertion; behind all arguments of forward if it is one."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return graph.inserting_before(node.next)


# ------------------------------------------------------------------------------------------------- heads


def _attach(model: nn.Module, graph: fx.Graph, cut: Cut, names: Collection[str]) -> int:
    """Call a head on a value, and append its logits to what the network returns.

    It is called last, so that its dropout draws no random number that the network would have drawn.
    """
    calls = []
    for places in cut.calls:
        values = [value for place in places for value in _values(model, graph, place, names)]
        if len(values) != len(places):
            raise SurgeryError(
                f"the head {cut.module!r} cannot be called in every mode, because "
                f"{' and '.join(map(repr, places))} {'is' if len(places) == 1 else 'are'} not computed in "
                "train and in eval mode alike"
            )
        calls.append([_for_head(model, graph, value, items) for value, items in values])
    return _call_head(model, graph, cut, calls)


def _call_head(model: nn.Module, graph: fx.Graph, cut: Cut, calls: Sequence[Sequence[fx.Node]]) -> int:
    output: Any = next(iter(reversed(graph.nodes)))
    with graph.inserting_before(output):
        made = [_call(graph, cut.module, *inputs) for inputs in calls]
        name: Any = graph.create_node("get_attr", cut.module) if cut.keeps_logits else cut.module
    for call in made:
        call.meta["for_head"] = True
    logits: Any = made[0] if len(made) == 1 else tuple(made)
    (returned,) = output.args
    value: Any = returned
    names: Any = []
    others: list[Any] = []
    heads = output.meta.pop("heads", 0)
    if isinstance(returned, fx.Node) and returned.target is add_logits:
        value, names, *others = returned.args
    elif heads:
        value, *others = returned
        names = [str((other[0] if isinstance(other, tuple) else other).target) for other in others]
    if not cut.keeps_logits and (heads or (not others and _is_flat(model, returned))):
        output.args = ((value, *others, logits),)
        output.meta["heads"] = heads + 1
        return 1
    with graph.inserting_before(output):
        output.args = (graph.call_function(add_logits, (value, [*names, name], *others, logits)),)
    if others and not heads:
        graph.erase_node(returned)
    return 1


def _is_flat(model: nn.Module, returned: Any) -> bool:
    """Whether it is certain that a network returns a tensor, a tuple or a list: nothing with names."""
    if not isinstance(returned, fx.Node):
        return not isinstance(returned, dict) and not hasattr(returned, "_fields")
    value = skip_boundaries(returned)
    while value.meta.get("spliced"):
        value = skip_boundaries(value.args[0])  # type: ignore[arg-type]
    if value.op == "call_module":
        return is_building_block(model.get_submodule(str(value.target)))
    return value.op in ("call_method", "get_attr") or (
        value.op == "call_function"
        and not isinstance(value.target, type)
        and value.target is not reverse_nested
    )


def _for_head(model: nn.Module, graph: fx.Graph, value: fx.Node, items: Sequence[Any]) -> fx.Node:
    """The value for a head to read: a copy, where the network may overwrite it before the head has."""
    overwritten = overwritten_later(model, value, effects)
    node = _picked_for_head(graph, value, items)
    if not overwritten:
        return node
    with _inserting_after(graph, node):
        copy = graph.call_method("clone", (node,))
    copy.meta["for_head"] = True
    return copy


def _picked_for_head(graph: fx.Graph, value: fx.Node, items: Sequence[Any]) -> fx.Node:
    with _inserting_after(graph, value):
        _, *picked = _pick(graph, value, items)
    for node in picked:
        node.meta["for_head"] = True
    return picked[-1] if picked else value


# -------------------------------------------------------------------------- before a point, and on one edge

Slot = tuple[fx.Node, str]  # a node, and which of its arguments


def _cut_before(model: nn.Module, graph: fx.Graph, nodes: Sequence[fx.Node], module: str, name: str) -> int:
    entering = [node for node in nodes if node.meta.get("boundary", "in") == "in"]
    uses = [
        (node, arg, source) for node in entering for arg, source in node_uses(node) if not is_size(source)
    ]
    floating = [(node, arg, source) for node, arg, source in uses if not is_integral(source)]
    if nodes and not uses:
        raise SurgeryError(f"nothing flows into {name!r}", example=f"after={name!r}")
    if nodes and not floating:
        raise ShapeError(
            f"what flows into {name!r} is of integers or truth values: it has no gradient",
            example=f"after={name!r}",
        )
    alone = len({source for _, _, source in floating}) == 1
    make_reversed = functools.partial(_reversed_before, model, graph, module, alone)
    return _reverse_uses(graph, [(node, arg) for node, arg, _ in floating], make_reversed)


def _reversed_before(model: nn.Module, graph: fx.Graph, module: str, alone: bool, value: fx.Node) -> fx.Node:
    """The value reversed, or as much of it as is of floating point where nobody can tell before it runs."""
    if is_state(model, value):
        items = [graph.call_function(operator.getitem, (value, place)) for place in range(2)]
        return graph.call_function(tuple, ([_call(graph, module, item) for item in items],))
    if alone or is_computed_from_floats(model, value):
        return _call(graph, module, value)
    return graph.call_function(reverse_nested, (graph.create_node("get_attr", module), value))


def _reversed_on_edge(
    model: nn.Module, graph: fx.Graph, module: str, name: str, target: str, value: fx.Node
) -> fx.Node:
    _refuse_no_tensor(model, value, name, target)
    return _call(graph, module, value)


def _edge_slot(graph: fx.Graph, edge: Edge, source: str, target: str) -> Slot | None:
    """Find where in the graph the edge ends; None where this graph has no such node."""
    nodes = [n for n in graph.nodes if n.meta.get("point") == target and n.meta.get("boundary") != "out"]
    arriving = [
        (node, arg, node.meta.get("arg") or arg, _names_behind(value))
        for node in nodes
        for arg, value in node_uses(node)
    ]
    found = [(node, arg, shown) for node, arg, shown, behind in arriving if source in behind]
    if edge.arg:
        found = [row for row in found if row[2] == edge.arg]
    if len(found) > 1:
        raise AmbiguousPointError(
            f"{target!r} uses {source!r} {len(found)} times, so the pair of names does not say which use",
            choices=[f"Edge({source!r}, {target!r}, {shown!r})" for _, _, shown in found],
            example=f"edge=grl_surgery.Edge({source!r}, {target!r}, {found[0][2]!r})",
        )
    if nodes and not found:
        ends = [f"{behind[-1]} -> {target}" for *_, behind in arriving if behind]
        raise PointNotFoundError(
            f"{target!r} does not use the value of {source!r}" + (f" as {edge.arg!r}" if edge.arg else ""),
            choices=near_names(str(edge), ends) or ends[:5],
            example=f"edge={ends[0]!r}" if ends else None,
        )
    return found[0][:2] if found else None


def _names_behind(value: fx.Node) -> list[str]:
    """Names of all points whose value this is: marks and spliced modules pass it through."""
    names = _names_of(value)
    while value.target in (boundary, reverse_nested) or value.meta.get("spliced"):
        value = value.args[value.target is reverse_nested]  # type: ignore[assignment]
        names += _names_of(value)
    return names


def _names_of(value: fx.Node) -> list[str]:
    """Its point, and as which item of a traced module's value it leaves that module."""
    if "point" not in value.meta:
        return []
    items = value.meta.get("items", ()) if value.meta.get("boundary") == "out" else ()
    return [value.meta["point"] + "".join(f"[{key}]" for key in items)]


def _reverse_uses(graph: fx.Graph, slots: Sequence[Slot], make_reversed: Callable[[fx.Node], fx.Node]) -> int:
    """Exchange the values of these uses for reversed ones, each made once."""
    made: dict[fx.Node, fx.Node] = {}
    for user, arg in slots:

        def change(place: str, source: fx.Node, user: fx.Node = user, arg: str = arg) -> fx.Node:
            if place != arg:
                return source
            if source not in made:
                with graph.inserting_before(user):
                    made[source] = make_reversed(source)
            return made[source]

        rewrite(user, change)
    return len(slots)


def _erase_boundaries(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        node.meta.pop("read_as", None)
        if node.target is boundary:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _refuse_no_items(model: nn.Module, value: fx.Node, name: str) -> None:
    """Refuse a reversal of an item of what is one tensor, where torch's own layer computes it."""
    if value.op != "call_module" or value.meta.get("spliced"):
        return
    module = model.get_submodule(str(value.target))
    if is_building_block(module) and not returns_several(module):
        whole = split_items(name)[0]
        raise ShapeError(
            f"the value of {whole!r} is one tensor, which has no items", example=f"after={whole!r}"
        )


def _refuse_no_tensor(model: nn.Module, value: fx.Node, name: str, target: str | None = None) -> None:
    """Refuse a reversal of integers, truth values or the state of an LSTM before the network runs.

    Raises:
        ShapeError: With what to reverse instead.
    """
    if is_state(model, value):
        raise ShapeError(
            f"the value of {name!r} is a tuple of 2 tensors: choose one", example=f"after='{name}[0]'"
        )
    if value.op == "get_attr" and not _may_get_a_gradient(model, str(value.target)):
        raise ShapeError(
            f"{name!r} is a buffer: it gets no gradient, so a reversal of it would have no effect",
            example="after='block', the path of a module that reads it",
        )
    if is_integral(value):
        users = [user for user in value.users if target in (None, user.meta.get("point"))]
        beside = (
            f"edge={(_names_of(source)[-1], user.meta['point'])!r}"
            for user in users
            if "point" in user.meta
            for _, source in node_uses(user)
            if _names_of(source) and not is_size(source) and not is_integral(source)
        )
        raise ShapeError(
            f"the value of {name!r} is of integers or truth values: no gradient flows through it",
            example=next(beside, None),
        )


def _may_get_a_gradient(model: nn.Module, name: str) -> bool:
    """Whether a tensor of the network is a parameter, or a buffer that was told to require a gradient."""
    path, _, attribute = name.rpartition(".")
    tensor = model.get_submodule(path)._buffers.get(attribute)
    return tensor is None or tensor.requires_grad
