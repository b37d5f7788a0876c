"""Surgery where the root cannot become a graph: each cut in the smallest scope that holds it.

A cut at the call of a module is made there, by a hook. For a cut inside a forward, that one module becomes
a graph.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from grl_surgery.call_hooks import (
    BeginCall,
    CallHeads,
    CallRecord,
    EndCall,
    RememberOutput,
    ReverseArgument,
    ReverseEdge,
    ReverseInputs,
    ReverseOutput,
    TapOutput,
)
from grl_surgery.cutting import apply_cuts
from grl_surgery.effects import effects
from grl_surgery.errors import PointNotFoundError, ShapeError, SurgeryError, TracingError
from grl_surgery.generators import random_state_kept
from grl_surgery.head_outputs import split_logits
from grl_surgery.loading.inputs import RUNNING_INPUTS, as_arguments, does_not_run
from grl_surgery.nested import tensors_in
from grl_surgery.observed_calls import Observed, observe
from grl_surgery.operations import OperationCut, cut_operations
from grl_surgery.other_tensors import with_tensors
from grl_surgery.points import (
    Edge,
    ancestors,
    enclosing,
    escape,
    match_name,
    near_names,
    split_items,
    split_number,
)
from grl_surgery.python_state import python_state_kept
from grl_surgery.reachable import calls_forward_of
from grl_surgery.sharing import exchange, way_to, way_to_forward
from grl_surgery.spliced_module import (
    Cut,
    SplicedModule,
    Surgery,
    disassemble,
    free_name,
    surgery_of,
)
from grl_surgery.trace_copy import has_forward, is_building_block
from grl_surgery.tracer import returns_several
from grl_surgery.tracing import module_paths

__all__ = ["shapes_by_running", "splice_inside"]

Shape = tuple[int, ...]


def splice_inside(
    base: nn.Module,
    cuts: Sequence[Cut],
    modules: Mapping[str, nn.Module],
    failure: TracingError,
    find_inputs: Callable[[], Any] = lambda: None,
) -> nn.Module:
    """Make each cut in the smallest scope: in the root's graph, at the call of a module, in one forward.

    Args:
        base: A tree of its own; it is changed.
        cuts: What to splice in.
        modules: The modules to splice in, by name.
        failure: Why the root cannot be traced as deep as the cuts need.
        find_inputs: Returns arguments of forward, or None where none are known. The network runs on them
            where a cut is at an operation of a forward that cannot be traced.

    Returns:
        A graph of the root where the root's own forward can be traced; otherwise ``base``, of its own class.

    Raises:
        TracingError: A cut lies inside a forward that cannot be traced.
        PointNotFoundError: There is no such point.
    """
    paths = module_paths(base)
    cuts = list(cuts)
    root_traces = _can_be_cut(base, [])
    in_graph = [cut for cut in cuts if root_traces and _can_be_cut(base, [cut])]
    if any(cut.is_head and cut not in in_graph for cut in cuts):  # their order is that of the logits
        in_graph = [cut for cut in in_graph if not cut.is_head]
    rest = [cut for cut in cuts if cut not in in_graph]
    at_calls: list[Cut] = []
    hosts: dict[str, list[Cut]] = {}
    for cut in rest:
        if cut.operations or _is_at_call(base, cut, paths):
            _check_points(base, cut, paths, failure)
            at_calls.append(cut)
            continue
        try:
            _check_points(base, cut, paths, failure)
            hosts.setdefault(_host(base, cut, paths, failure), []).append(cut)
        except (TracingError, PointNotFoundError) as error:
            found = _at_operations(base, cut, find_inputs, error)
            cuts[cuts.index(cut)] = found
            at_calls.append(found)
    for host in sorted(hosts, key=len, reverse=True):  # a host inside another one joins it
        around = next((other for other in hosts if host.startswith(f"{other}.")), None)
        if around is not None:
            hosts[around] += hosts.pop(host)
    for host, made in hosts.items():  # what is traced through is not called, so that a hook would not run
        inside = [cut for cut in at_calls if all(end.startswith(f"{escape(host)}.") for end in cut.points)]
        made += [cut for cut in inside if not cut.is_head]
        at_calls = [cut for cut in at_calls if cut not in made]
    for host in sorted(hosts, key=len, reverse=True):
        _replace(base, host, hosts[host], modules)
    for cut in at_calls:
        _refuse_ways_past(base, cut, paths)
    network = base
    if root_traces:
        own = {cut.module: modules[cut.module] for cut in in_graph}
        network = SplicedModule(base, apply_cuts(base, in_graph), in_graph, own)
    network = _hook(network, [cut for cut in cuts if cut in in_graph or cut in at_calls], at_calls, modules)
    doubtful = [c for c in at_calls if isinstance(c.at, Edge) or any(split_items(p)[1] for p in c.points)]
    if doubtful and (inputs := find_inputs()) is not None:
        _check_by_running(network, doubtful, inputs)
    return network


def _check_by_running(network: nn.Module, cuts: Sequence[Cut], inputs: Any) -> None:
    """Refuse an item that a value does not have, an edge that is not there, and what nothing uses.

    Raises:
        ShapeError: There is no such item.
        SurgeryError: There is no such edge, or the network does not use the value.
    """
    twin = with_tensors(network, copied=_clone)
    passed: dict[str, list[Any]] = {cut.module: [] for cut in cuts}
    for name, outputs in passed.items():
        twin.get_submodule(name).register_forward_hook(lambda _, __, value, kept=outputs: kept.append(value))
    args, kwargs = as_arguments(inputs)
    try:
        with torch.enable_grad(), random_state_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = twin(*args, **kwargs)
    except SurgeryError:
        raise
    except Exception:  # on these inputs it does not run at all, which is not for surgery to judge
        return
    used = _nodes_behind(tensors_in(output))
    for cut in cuts:
        nodes = [v.grad_fn for v in passed[cut.module] if isinstance(v, torch.Tensor) and v.grad_fn]
        if nodes and not any(node in used for node in nodes) and not cut.is_head:
            raise SurgeryError(
                f"the network does not use the value {cut}, so a reversal there would have no effect",
                choices=[point for point in module_paths(network) if point == split_items(str(cut.at))[0]],
            )


def _nodes_behind(values: Sequence[torch.Tensor]) -> set[Any]:
    """Every node of autograd's graph that the gradients of these values would reach."""
    waiting = [value.grad_fn for value in values if value.grad_fn is not None]
    seen: set[Any] = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen


def _can_be_cut(base: nn.Module, cuts: Sequence[Cut]) -> bool:
    """Whether a graph of the root can be made that has these cuts."""
    try:
        apply_cuts(base, cuts)
    except TracingError:
        return False
    return True


# ------------------------------------------------------------------------------------ at calls of modules


def _hook(
    network: nn.Module, cuts: Sequence[Cut], at_calls: Sequence[Cut], modules: Mapping[str, nn.Module]
) -> nn.Module:
    """Make cuts at the calls of modules of ``network``, which is changed."""
    if not at_calls:
        return network
    if isinstance(network, _ENUMERATING):
        raise TracingError(
            f"the forward of {type(network).__name__} calls all its children, so nothing can be spliced in "
            "beside them",
            example="insert_grl(model.block, ...), with a module inside it",
        )
    record = CallRecord()
    heads = [cut for cut in at_calls if cut.is_head]
    edges = [cut for cut in at_calls if isinstance(cut.at, Edge)]
    for cut in at_calls:
        network._modules[cut.module] = modules[cut.module]
    for head in heads:  # before any reversal, as they have reversals of their own
        _hook_taps(network, head, modules[head.module], record)
    for cut in at_calls:
        if not cut.is_head:
            _hook_reversal(network, cut, modules[cut.module], record)
    for cut in edges:  # after all reversals, so that what is remembered is what the forward gets
        _hook_source(network, cut, modules[cut.module], record)
    if heads or edges:
        _hook_whole_call(network, heads, [modules[cut.module] for cut in (*heads, *edges)], record)
    _hook_operations(network, at_calls, modules, record)
    hooked = frozenset(cut.module for cut in at_calls)
    done = surgery_of(network)
    network.__dict__["grl_surgery"] = Surgery(tuple(cuts), done.traced if done else None, hooked)
    return network


_ENUMERATING = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_OUTPUT = "output"


def _hook_reversal(network: nn.Module, cut: Cut, layer: nn.Module, record: CallRecord) -> None:
    if isinstance(cut.at, Edge) and cut.is_at_operation(cut.at.target):
        return
    if isinstance(cut.at, Edge):
        target, _ = _module_at(network, cut.at.target)
        _refuse_overwriting(target, cut)
        hook = ReverseEdge(layer, record, cut.module, cut.at.source, cut.at.target, cut.at.arg)
        target.register_forward_pre_hook(hook, with_kwargs=True)
    elif cut.is_at_operation(cut.at):
        return
    elif cut.kind == "before" and cut.at != _OUTPUT:
        target, _ = _module_at(network, cut.at)
        _refuse_overwriting(target, cut)
        target.register_forward_pre_hook(ReverseInputs(layer), with_kwargs=True)
    elif cut.at in _arguments(network):
        network.register_forward_pre_hook(ReverseArgument(layer, cut.at), with_kwargs=True)
    else:
        module, items = _module_at(network, cut.at)
        module.register_forward_hook(ReverseOutput(layer, items))


def _hook_taps(network: nn.Module, head: Cut, module: nn.Module, record: CallRecord) -> None:
    """Hand the values that a head reads out of the calls of modules."""
    for place, name in ((head.at, head.module), (head.condition, f"{head.module}.condition")):
        if isinstance(place, str) and not head.is_at_operation(place):
            source, items = _module_at(network, place)
            source.register_forward_hook(TapOutput(module, record, name, items))


def _hook_source(network: nn.Module, cut: Cut, layer: nn.Module, record: CallRecord) -> None:
    """Remember what the module returns at which an edge begins."""
    assert isinstance(cut.at, Edge)
    if not cut.is_at_operation(cut.at.source):
        source, items = _module_at(network, cut.at.source)
        source.register_forward_hook(RememberOutput(layer, record, cut.module, items))


def _hook_whole_call(
    network: nn.Module, heads: Sequence[Cut], spliced: Sequence[nn.Module], record: CallRecord
) -> None:
    """Begin a record with every call of the network, and call the heads at its end."""
    network.register_forward_pre_hook(BeginCall(record, *spliced))
    if heads:
        names, conditions = [head.module for head in heads], [bool(head.condition) for head in heads]
        network.register_forward_hook(CallHeads(record, names, conditions, *spliced[: len(heads)]))
    network.register_forward_hook(EndCall(record, *spliced), always_call=True)


def _hook_operations(
    network: nn.Module, cuts: Sequence[Cut], modules: Mapping[str, nn.Module], record: CallRecord
) -> None:
    """Make those parts of cuts that are at operations, host by host, in the order of the cuts."""
    by_host: dict[str, list[OperationCut]] = {}
    for cut in cuts:
        places = {point: (host, name, place) for point, host, name, place in cut.operations}
        for point, kind, key in _parts_of(cut):
            whole, items = split_items(point)
            if whole in places:
                host, name, place = places[whole]
                source, argument = (cut.at.source, cut.at.arg) if isinstance(cut.at, Edge) else ("", "")
                done = OperationCut(kind, name, place, modules[cut.module], key, items, source, argument)
                by_host.setdefault(host, []).append(done)
    for host, done_there in by_host.items():
        cut_operations(network.get_submodule(host), done_there, record)


def _parts_of(cut: Cut) -> list[tuple[str, str, str]]:
    """What a cut does, at which point, and under which name a value is recorded for it."""
    if isinstance(cut.at, Edge):
        return [(cut.at.source, "remember", cut.module), (cut.at.target, "edge", cut.module)]
    if not cut.is_head:
        return [(cut.at, cut.kind, cut.module)]
    condition = [(cut.condition, "tap", f"{cut.module}.condition")] if cut.condition else []
    return [(cut.at, "tap", cut.module), *condition]


def _at_operations(base: nn.Module, cut: Cut, find_inputs: Callable[[], Any], failure: SurgeryError) -> Cut:
    """The cut with where its operations are, as seen in a forward in each mode.

    Raises:
        SurgeryError: There is no such point, or no inputs to find it with, or a run may not find it again.
    """
    inputs = None if cut.kind in ("instead", "probe") else find_inputs()
    if inputs is None:
        raise failure
    paths = module_paths(base)
    seen = observe(base, inputs)
    if seen is None:
        raise failure
    known = {point.name: point for point in seen}
    found: list[tuple[str, str, str, int]] = []
    for end in cut.points:
        whole = split_items(end)[0]
        name = whole if whole in known or whole in paths else _in_place_name(whole, known)
        name = name or match_name(whole, known, paths)
        point = known.get(name)
        if point is None or point.operation is None:
            if name not in paths:
                raise failure
            continue
        _check_operation(base, point, cut, end)
        found.append((whole, point.path, point.operation, point.place))
    return replace(cut, operations=tuple(found))


def _in_place_name(name: str, known: Mapping[str, Observed]) -> str | None:
    """What a run calls the ``x += y`` that a trace calls ``add``: torch says ``add_`` of it."""
    base, number = split_number(name)
    path, _, operation = base.rpartition(".")
    written = _WRITTEN.get(operation)
    beside = [
        point for point in known.values() if point.operation == operation and escape(point.path) == path
    ]
    if written is None or beside:
        return None
    renamed = f"{path}.{written}" if path else written
    found = renamed if number is None else f"{renamed}#{number}"
    return found if found in known else None


_WRITTEN = {"add": "add_", "sub": "sub_", "mul": "mul_", "truediv": "div_"}


def _check_operation(base: nn.Module, point: Observed, cut: Cut, end: str) -> None:
    """Refuse an operation that a run cannot be sure to find again, or whose value others hold."""
    is_last = end == cut.points[-1]
    if not point.is_alone:
        raise TracingError(
            f"the forward around {end!r} runs more than once, and cannot be traced to tell its runs apart",
            example=f"after={escape(point.path)!r}" if point.path else None,
        )
    overwrites = str(point.operation).endswith("_") and not str(point.operation).startswith("_")
    is_read_only = isinstance(cut.at, Edge) and cut.at.arg not in ("", "0")  # not what is overwritten
    if overwrites and (
        cut.kind in ("after", "before") or (cut.kind == "edge" and is_last and not is_read_only)
    ):
        raise SurgeryError(
            f"{end!r} overwrites a value in place, and a reversal there would hide that from whoever else "
            "reads it",
            example=f"after={escape(point.path)!r}" if point.path else None,
        )


def _module_at(network: nn.Module, point: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """The module whose output a point is, and which item of it."""
    name, items = split_items(point)
    if name == _OUTPUT:
        return network, items
    return network.get_submodule(module_paths(network)[name]), items


def _arguments(network: nn.Module) -> list[str]:
    return list(inspect.signature(network.forward).parameters)


def _is_at_call(base: nn.Module, cut: Cut, paths: Mapping[str, str]) -> bool:
    """Whether a hook at the call of a module can make the cut."""
    if cut.kind in ("instead", "probe"):
        return False
    if cut.kind == "before" and cut.at == _OUTPUT:
        return True
    if cut.kind == "after" and cut.at in _arguments(base) and cut.at not in paths:
        return True
    return all(split_items(point)[0] in paths and split_items(point)[0] for point in cut.points)


def _refuse_overwriting(module: nn.Module, cut: Cut) -> None:
    """Refuse a reversal of what a module overwrites: who reads the value afterwards would get no gradient."""
    if effects(module).overwrites:
        raise SurgeryError(
            f"{type(module).__name__} overwrites its input in place, and a reversal {cut} would hide that "
            "from whoever else reads the input",
            example="after=, the point whose value it is",
        )


def _check_points(base: nn.Module, cut: Cut, paths: Mapping[str, str], failure: TracingError) -> None:
    """Refuse names that cannot be of a point, without a graph that has the names of all.

    Raises:
        PointNotFoundError: There is no such module, or nobody calls it.
        TracingError: There may be such an operation of the root.
    """
    for end in cut.points:
        if end == _OUTPUT or end in _arguments(base) or cut.is_at_operation(end):
            continue
        whole, items = split_items(end)
        name, around = split_number(whole)[0], enclosing(end, paths) or [""]
        operation = name.removeprefix(f"{around[-1]}.")
        near = near_names(end, paths)
        if name not in paths and ("." in operation or (around == [""] and near)):
            raise PointNotFoundError(f"there is no point {end!r} in this network", choices=near)
        if name not in paths and around == [""]:
            raise TracingError(
                f"{end!r} is no module of this {type(base).__name__}, and operations of its own forward can "
                f"only be found by running it: {str(failure).partition(chr(10))[0]}",
                choices=[path for path in paths if path and "." not in path][:5],
                example="insert_grl(model, ..., example_inputs=x), where model(x) runs",
            )
        if name in paths:
            _check_module(base, end, name, items, paths)


def _check_module(
    base: nn.Module, end: str, name: str, items: tuple[Any, ...], paths: Mapping[str, str]
) -> None:
    """Refuse a module that nobody calls, and an item of a value that has none."""
    module = base.get_submodule(paths[name])
    parent = base.get_submodule(paths[name].rpartition(".")[0])
    children = [f"{name}.{escape(child)}" for child, _ in module.named_children()]
    if not has_forward(module):
        inside = [f"{name}.{key}" for key in items[:1] if f"{name}.{key}" in paths]
        raise PointNotFoundError(
            f"{name!r} is a {type(module).__name__}, a list of modules that nobody calls: no value comes out "
            f"of it, and {end!r} is no point",
            choices=[*inside, *(child for child in children if child not in inside)][:5],
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise TracingError(
            f"{name!r} is a scripted module, which the result shares with the original, so that no hook goes "
            "there",
            example="before=, the module that gets its value",
        )
    if (
        inspect.getattr_static(type(parent), "forward", None) is nn.MultiheadAttention.forward
        and parent is not module
    ):
        raise PointNotFoundError(
            f"{type(parent).__name__} reads the weights of {end!r} and never calls it: no value comes out "
            "of it",
            example=f"after={name.rpartition('.')[0]!r}, what leaves the layer" if "." in name else None,
        )
    if items and is_building_block(module) and not returns_several(module):
        raise ShapeError(
            f"the value of {name!r} is one tensor, which has no items", example=f"after={name!r}"
        )
    for path in ancestors(paths[name]):
        around = base.get_submodule(path)
        if calls_forward_of(
            cast(Any, type(around)), paths[name].removeprefix(f"{path}." if path else "").split(".")[0]
        ):
            raise TracingError(
                f"{type(around).__name__} calls the forward of {name!r} itself and not the module, so a hook "
                "there would not run",
                example=f"after={escape(path)!r}" if path else None,
            )


# --------------------------------------------------------------------------------- inside one forward


def _spliced(base: nn.Module, path: str, cuts: Sequence[Cut], modules: Mapping[str, nn.Module]) -> nn.Module:
    """The graph of the module at ``path`` with what was spliced in before and these cuts."""
    tree, made, held = _inside(base, path)
    for cut in cuts:
        here = _from_inside(cut, path)
        here = replace(here, module=free_name(cut.module, held, tree))
        held[here.module] = modules[cut.module]
        made.append(here)
    return SplicedModule(tree, apply_cuts(tree, made), made, held)


def _replace(base: nn.Module, path: str, cuts: Sequence[Cut], modules: Mapping[str, nn.Module]) -> None:
    """Put the spliced graph of the module at ``path`` wherever the tree refers to that module.

    Raises:
        TracingError: The tree refers to it in a way that cannot be changed, and might call it past the cuts.
    """
    old = base.get_submodule(path)
    is_copy = _is_copy_of(old)
    exchange(base, old, _spliced(base, path, cuts, modules))
    way = way_to(base, lambda module: module is old or is_copy(module))
    if way is not None:
        raise TracingError(
            f"the attribute {way!r} leads to {path!r} in a way that surgery cannot change, so that a forward "
            f"which calls it from there would go past the reversal",
            example=f"a forward that calls self.{path}, or an item of a list or a dict",
        )


def _is_copy_of(old: nn.Module) -> Callable[[nn.Module], bool]:
    """Tells of a module whether it is another one over the same tensors."""
    kind, holdings = type(old), _holdings(old)
    return lambda module: type(module) is kind and bool(holdings[1]) and _holdings(module) == holdings


def _refuse_ways_past(base: nn.Module, cut: Cut, paths: Mapping[str, str]) -> None:
    """Refuse a hook on a module that a forward may call in a way in which no hook runs.

    Raises:
        TracingError: The tree refers to what the module was copied from, or to its forward.
    """
    for end in cut.points:
        path = paths.get(split_items(end)[0])
        if not path or cut.is_at_operation(end):
            continue
        module = base.get_submodule(path)
        way = way_to(base, _is_copy_of(module)) or way_to_forward(base, module)
        if way is not None:
            raise TracingError(
                f"the attribute {way!r} leads to {path!r} in a way that surgery cannot change, so that a "
                "forward which calls it from there would go past the reversal",
                example=f"a forward that calls self.{path}, or an item of a list or a dict",
            )


def _holdings(module: nn.Module) -> tuple[list[type], list[int]]:
    """The classes of all its modules, and which tensors these hold."""
    tensors = (*module.parameters(), *module.buffers())
    return list(map(type, module.modules())), list(map(id, tensors))


def _host(base: nn.Module, cut: Cut, paths: Mapping[str, str], failure: TracingError) -> str:
    """Path of the smallest module in whose graph the cut can be made."""
    around = [[paths[name] for name in enclosing(end, paths)] for end in cut.points]
    common = [path for path in around[0] if path and all(path in other for other in around)]
    # Whoever goes through the items of a container calls them past a graph of the whole.
    common = [path for path in common if not hasattr(type(base.get_submodule(path)), "__iter__")]
    spliced = [path for path in common if isinstance(base.get_submodule(path), SplicedModule)]
    reason: SurgeryError = failure
    for path in spliced[:1] or common[::-1]:
        try:
            tree, made, _ = _inside(base, path)
            apply_cuts(tree, [*made, _from_inside(cut, path)])
        except TracingError as error:
            reason = error
        except SurgeryError as error:
            raise type(error)(f"inside {path!r}, where names start anew: {error}") from error
        else:
            return path
    ends = [path for path in common[::-1] if has_forward(base.get_submodule(path))]
    raise TracingError(
        f"the point {cut.at!s} lies inside a forward that cannot be traced: "
        f"{str(reason).partition(chr(10))[0]}",
        choices=[escape(path) for path in ends[:3]],
        example=f"after={escape(ends[0])!r}, what leaves the module around it"
        if ends
        else "after='block', the path of a module: what leaves a module needs no trace",
    ) from reason


def _inside(base: nn.Module, path: str) -> tuple[nn.Module, list[Cut], dict[str, nn.Module]]:
    """The module at ``path`` as it was, the cuts that it has already, and what they spliced in."""
    host = base.get_submodule(path)
    return disassemble(host) if isinstance(host, SplicedModule) else (host, [], {})


def _from_inside(cut: Cut, path: str) -> Cut:
    """The cut as the module at ``path`` names it."""
    prefix = f"{escape(path)}."
    if isinstance(cut.at, Edge):
        source, target = (end.removeprefix(prefix) for end in (cut.at.source, cut.at.target))
        return replace(cut, at=replace(cut.at, source=source, target=target))
    condition = cut.condition.removeprefix(prefix) if cut.condition else None
    return replace(cut, at=cut.at.removeprefix(prefix), condition=condition)


# --------------------------------------------------------------------------------------------- shapes


def shapes_by_running(
    base: nn.Module, points: Sequence[str], inputs: Any, failure: TracingError
) -> list[Shape]:
    """Shapes of the values at some points, from a forward in eval mode: no graph of the root can tell.

    Raises:
        ShapeError: A value is no tensor, or the network cannot run on these inputs.
        PointNotFoundError, TracingError: As for :func:`splice_inside`.
    """
    heads = [Cut("head", point, f"probe_{place}") for place, point in enumerate(points)]
    names = [cut.module for cut in heads]
    modules = {name: nn.Identity() for name in names}
    probed = splice_inside(with_tensors(base, copied=_clone), heads, modules, failure, lambda: inputs)
    args, kwargs = as_arguments(inputs)
    try:
        with torch.no_grad(), random_state_kept(), python_state_kept(dict(probed.named_modules())):
            _, *values = split_logits(probed.eval()(*args, **kwargs), names)
    except SurgeryError:
        raise
    except Exception as error:  # the network is the user's: anything can come out of it
        what = does_not_run(f"in eval mode, this {type(base).__name__}", inputs, error)
        raise ShapeError(what, example=RUNNING_INPUTS) from error
    values = [value[0] if isinstance(value, tuple) and value else value for value in values]  # each call
    for point, value in zip(points, values, strict=True):
        if value is None:
            raise ShapeError(
                f"on these inputs the forward of {type(base).__name__} does not come past {point!r}",
                example="example_inputs=x, for which it does",
            )
        if not isinstance(value, torch.Tensor):
            raise ShapeError(
                f"the value of {point!r} is a {type(value).__name__}, not one tensor",
                example=f"one item of it, as in after='{point}[0]'",
            )
    # The sizes of a nested tensor are those that it has once it is padded.
    return [tuple((value.to_padded_tensor(0.0) if value.is_nested else value).shape) for value in values]


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    whole = isinstance(tensor, nn.Parameter) or nn.parameter.is_lazy(tensor)
    return copy.deepcopy(tensor) if whole else tensor.detach().clone()
