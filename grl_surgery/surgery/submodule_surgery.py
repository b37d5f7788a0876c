"""Surgery where the root cannot become a graph: each cut in the smallest scope that holds it.

A cut at the call of a module is made there, by a hook. For a cut inside a forward, that one module becomes
a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from grl_surgery.capture.capture import module_paths
from grl_surgery.capture.observed_calls import observe
from grl_surgery.capture.python_state import preserve_python_state
from grl_surgery.capture.traceable_copy import has_forward
from grl_surgery.errors import ShapeError, SurgeryError, TracingError
from grl_surgery.isolation.pytrees import tensors_in
from grl_surgery.isolation.rng_state import preserve_rng_state
from grl_surgery.isolation.shared_copy import find_external_reference, replace_submodule
from grl_surgery.isolation.tensor_copy import with_tensors
from grl_surgery.loading.inputs import RUNNING_INPUTS, as_arguments, does_not_run
from grl_surgery.points import (
    Edge,
    enclosing,
    escape,
    match_name,
    split_items,
    split_number,
)
from grl_surgery.surgery.graph_rewrite import apply_cuts
from grl_surgery.surgery.head_outputs import split_logits
from grl_surgery.surgery.run_checks import check_by_running, clone_all
from grl_surgery.surgery.scope_checks import (
    OUTPUT,
    arguments_of,
    check_operation,
    check_points,
    is_copy_of,
    refuse_ways_past,
)
from grl_surgery.surgery.scope_hooks import hook_cuts, is_argument
from grl_surgery.surgery.spliced_module import (
    Cut,
    SplicedModule,
    disassemble,
    free_name,
)

__all__ = ["is_at_call", "shapes_by_running", "splice_inside"]

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
        if cut.operations or is_at_call(base, cut, paths):
            check_points(base, cut, paths, failure)
            at_calls.append(cut)
            continue
        try:
            check_points(base, cut, paths, failure)
            host = _host(base, cut, paths, failure)
            if not _computes_the_same(base, host, cut, modules, find_inputs):
                raise TracingError(f"a graph of {host!r} takes other branches than its forward")
            hosts.setdefault(host, []).append(cut)
        except SurgeryError as error:  # no such graph, or other names in it
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
        refuse_ways_past(base, cut, paths)
    network = base
    if root_traces:
        own = {cut.module: modules[cut.module] for cut in in_graph}
        network = SplicedModule(base, apply_cuts(base, in_graph), in_graph, own)
    network = hook_cuts(
        network, [cut for cut in cuts if cut in in_graph or cut in at_calls], at_calls, modules
    )
    doubtful = [cut for cut in at_calls if isinstance(cut.at, Edge) or cut.has_items]
    check_by_running(network, doubtful, find_inputs)
    return network


def _can_be_cut(base: nn.Module, cuts: Sequence[Cut]) -> bool:
    """Whether a graph of the root can be made that has these cuts."""
    try:
        apply_cuts(base, cuts)
    except TracingError:
        return False
    return True


def _computes_the_same(
    base: nn.Module, path: str, cut: Cut, modules: Mapping[str, nn.Module], find_inputs: Callable[[], Any]
) -> bool:
    """Whether a graph of one module with this cut does what its forward does, where inputs can tell.

    A trace cannot see that an item of what another module returns is None, and takes the wrong branch.
    """
    inputs = find_inputs()
    if inputs is None:
        return True
    twin = with_tensors(base, copied=clone_all).eval()
    calls: list[tuple[Any, Any, Any]] = []
    twin.get_submodule(path).register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    args, kwargs = as_arguments(inputs)
    with torch.no_grad(), preserve_rng_state(), preserve_python_state(dict(twin.named_modules())):
        try:
            twin(*args, **kwargs)
        except Exception:  # on these inputs it does not run at all, which is not for surgery to judge
            return True
        graph = _spliced(twin, path, [cut], modules)
        for args, kwargs, output in calls[:1]:
            try:
                again = tensors_in(graph(*args, **kwargs))
            except Exception:
                return False
            wanted = tensors_in(output)
            if [value.shape for value in again] != [value.shape for value in wanted]:
                return False
            have_values = [pair for pair in zip(again, wanted, strict=True) if not pair[1].is_meta]
            if not all(torch.allclose(*pair, equal_nan=True) for pair in have_values):
                return False
    return True


# ----------------------------------------------------------------------------- at calls and at operations


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
        name = whole if whole in known or whole in paths else match_name(whole, known, paths)
        point = known.get(name)
        if point is None or point.operation is None:
            # One of several calls of a module is known where its value is: as that argument of the operation.
            is_source = isinstance(cut.at, Edge) and end == cut.at.source and cut.at.arg
            if (split_number(str(name))[0] if is_source else name) not in paths:
                raise failure
            continue
        check_operation(base, point, cut, end)
        found.append((whole, point.path, point.operation, point.place))
    return replace(cut, operations=tuple(found))


def is_at_call(base: nn.Module, cut: Cut, paths: Mapping[str, str]) -> bool:
    """Whether a hook at the call of a module can make the cut."""
    if cut.kind in ("instead", "probe"):
        return False
    if cut.kind == "before" and cut.at == OUTPUT:
        return True
    if cut.kind == "after" and cut.at in arguments_of(base):
        return True
    return all(
        (split_items(point)[0] in paths and split_items(point)[0])
        or (cut.is_head and is_argument(base, point))
        for point in cut.points
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
    is_copy = is_copy_of(old)
    replace_submodule(base, old, _spliced(base, path, cuts, modules))
    way = find_external_reference(base, lambda module: module is old or is_copy(module))
    if way is not None:
        raise TracingError(
            f"the attribute {way!r} leads to {path!r} in a way that surgery cannot change, so that a forward "
            f"which calls it from there would go past the reversal",
            example=f"a forward that calls self.{path}, or an item of a list or a dict",
        )


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
        else "after='block', the path of a module: a cut at the output of a module needs no trace",
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
    condition, mask = (name and name.removeprefix(prefix) for name in (cut.condition, cut.mask))
    also = tuple(name.removeprefix(prefix) for name in cut.also)
    return replace(cut, at=cut.at.removeprefix(prefix), condition=condition, mask=mask, also=also)


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
    probed = splice_inside(with_tensors(base, copied=clone_all), heads, modules, failure, lambda: inputs)
    args, kwargs = as_arguments(inputs)
    try:
        with torch.no_grad(), preserve_rng_state(), preserve_python_state(dict(probed.named_modules())):
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
