"""Surgery where the root cannot be traced: each cut inside the smallest module around it that can."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from grl_surgery.cutting import apply_cuts
from grl_surgery.errors import PointNotFoundError, ShapeError, SurgeryError, TracingError
from grl_surgery.generators import random_state_kept
from grl_surgery.loading.inputs import RUNNING_INPUTS, as_arguments, does_not_run
from grl_surgery.other_tensors import with_tensors
from grl_surgery.points import Edge, enclosing, escape, near_names, split_items, split_number
from grl_surgery.python_state import python_state_kept
from grl_surgery.sharing import exchange, way_to
from grl_surgery.spliced_module import Cut, SplicedModule, free_name, taken_apart
from grl_surgery.tracing import module_paths

__all__ = ["shapes_by_running", "splice_inside"]

Shape = tuple[int, ...]


def splice_inside(
    base: nn.Module,
    cuts: Sequence[Cut],
    modules: Mapping[str, nn.Module],
    failure: TracingError,
    given: Mapping[str, type] | None = None,
) -> nn.Module:
    """Replace modules inside ``base`` by their spliced graphs, each as small as the cuts allow.

    Where the root can be traced and only something in it cannot, the cuts outside of that are made in a graph
    of the root, which calls what was replaced.

    Args:
        base: A tree of its own; it is changed.
        cuts: What to splice in.
        modules: The modules to splice in, by name.
        failure: Why the root cannot be traced as deep as the cuts need.
        given: Arguments of the root's forward that stay arguments though they have a default.

    Returns:
        ``base``, its root as before where nothing of its own is cut; with heads, a network that calls it and
        then the heads, on values that are tapped inside.

    Raises:
        TracingError: Nothing around a point can be traced.
        PointNotFoundError: There is no such point.
    """
    heads = [replace(cut, kind="tapped") for cut in cuts if cut.is_head]
    inner = [cut for cut in cuts if not cut.is_head] + [tap for head in heads for tap in _taps(head)]
    hosts: dict[str, list[Cut]] = {}
    root_can = not heads and _can_be_cut(base, [], given)
    outer = [cut for cut in inner if root_can and _can_be_cut(base, [cut], given)]
    for cut in inner:
        if cut not in outer:
            hosts.setdefault(_host(base, cut, failure), []).append(cut)
    for host in sorted(hosts, key=len, reverse=True):  # a host inside another one joins it
        around = next((other for other in hosts if host.startswith(f"{other}.")), None)
        if around is not None and not all(_is_output_of(around, cut) for cut in hosts[around]):
            hosts[around] += hosts.pop(host)
    for host in sorted(hosts, key=len, reverse=True):
        _replace(base, host, hosts[host], modules)
    if outer:
        own = {cut.module: modules[cut.module] for cut in outer}
        return SplicedModule(base, apply_cuts(base, outer, given=given), outer, own)
    if not heads:
        return base
    called = {head.module: modules[head.module] for head in heads}
    return SplicedModule(base, apply_cuts(base, heads), heads, called)


def _can_be_cut(base: nn.Module, cuts: Sequence[Cut], given: Mapping[str, type] | None) -> bool:
    """Whether a graph of the root can be made that has these cuts."""
    try:
        apply_cuts(base, cuts, given=given)
    except TracingError:
        return False
    return True


def _spliced(base: nn.Module, path: str, cuts: Sequence[Cut], modules: Mapping[str, nn.Module]) -> nn.Module:
    """The graph of the module at ``path`` with what was spliced in before and these cuts."""
    tree, made, held = _inside(base, path)
    for cut in cuts:
        here = _from_inside(cut, path)
        if cut.kind != "tap":
            here = replace(here, module=free_name(cut.module, held, tree))
            held[here.module] = modules[cut.module]
        made.append(here)
    return SplicedModule(tree, apply_cuts(tree, made, given=_arguments(base, path)), made, held)


def _replace(base: nn.Module, path: str, cuts: Sequence[Cut], modules: Mapping[str, nn.Module]) -> None:
    """Put the spliced graph of the module at ``path`` wherever the tree refers to that module.

    Raises:
        TracingError: The tree refers to it in a way that cannot be changed, and might call it past the cuts.
    """
    old = base.get_submodule(path)
    kind, holdings = type(old), _holdings(old)
    exchange(base, old, _spliced(base, path, cuts, modules))

    def is_old(module: nn.Module) -> bool:
        """Whether it is what was replaced, or what that was copied from."""
        return module is old or (type(module) is kind and bool(holdings[1]) and _holdings(module) == holdings)

    way = way_to(base, is_old)
    if way is not None:
        raise TracingError(
            f"the attribute {way!r} leads to {path!r} in a way that surgery cannot change, so that a forward "
            f"which calls it from there would go past the reversal",
            example=f"a forward that calls self.{path}, or an item of a list or a dict",
        )


def _holdings(module: nn.Module) -> tuple[list[type], list[int]]:
    """The classes of all its modules, and which tensors these hold."""
    tensors = (*module.parameters(), *module.buffers())
    return list(map(type, module.modules())), list(map(id, tensors))


def _taps(head: Cut) -> Iterator[Cut]:
    """What hands the values that a head reads out of the inside."""
    yield Cut("tap", head.at, head.module)
    if head.condition:
        yield Cut("tap", head.condition, f"{head.module}.condition")


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
    probed = splice_inside(with_tensors(base, copied=_clone), heads, modules, failure)
    args, kwargs = as_arguments(inputs)
    try:
        with torch.no_grad(), random_state_kept(), python_state_kept(dict(probed.named_modules())):
            _, *values = probed.eval()(*args, **kwargs)
    except SurgeryError:
        raise
    except Exception as error:  # the network is the user's: anything can come out of it
        what = does_not_run(f"in eval mode, this {type(base).__name__}", inputs, error)
        raise ShapeError(what, example=RUNNING_INPUTS) from error
    for point, value in zip(points, values, strict=True):
        if not isinstance(value, torch.Tensor):
            raise ShapeError(
                f"the value of {point!r} is a {type(value).__name__}, not one tensor",
                example=f"one item of it, as in after='{point}[0]'",
            )
    return [tuple(value.shape) for value in values]


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    whole = isinstance(tensor, nn.Parameter) or nn.parameter.is_lazy(tensor)
    return copy.deepcopy(tensor) if whole else tensor.detach().clone()


def _check_points(base: nn.Module, cut: Cut, paths: Mapping[str, str], failure: TracingError) -> None:
    """Refuse names that cannot be of a point, without a graph that has the names of all.

    Raises:
        PointNotFoundError: There is no such module, or nobody calls it.
        TracingError: There may be such an operation of the root.
    """
    for end in cut.points:
        name, around = split_number(split_items(end)[0])[0], enclosing(end, paths) or [""]
        operation = name.removeprefix(f"{around[-1]}.")
        near = near_names(end, paths)
        if name not in paths and ("." in operation or (around == [""] and near)):
            raise PointNotFoundError(f"there is no point {end!r} in this network", choices=near)
        if name not in paths and around == [""]:
            raise failure
        kind = base.get_submodule(paths[around[-1]]).__class__
        if name in paths and getattr(kind, "forward", None) is nn.MultiheadAttention.forward:
            raise PointNotFoundError(
                f"{kind.__name__} reads the weights of {end!r} and never calls it: no value comes out of it",
                example=f"after={around[-1]!r}, what leaves the layer" if around[-1] else None,
            )


def _host(base: nn.Module, cut: Cut, failure: TracingError) -> str:
    """Path of the smallest module in which the cut can be made."""
    paths = module_paths(base)
    _check_points(base, cut, paths, failure)
    around = [[paths[name] for name in enclosing(end, paths)] for end in cut.points]
    common = [path for path in around[0] if path and all(path in other for other in around)]
    opaque = [path for path in common if _is_opaque(base.get_submodule(path))]
    inside = common[common.index(opaque[-1]) + 1 :] or opaque[-1:] if opaque else common
    spliced = [path for path in inside if _is_graph(base.get_submodule(path))]
    reason: SurgeryError = failure
    whole = _module_at(cut, paths)
    innermost_first = spliced[:1] or inside[::-1]
    for path in sorted(innermost_first, key=lambda path: _takes_anything(base, path)):
        if whole and (_takes_anything(base, path) or _offers_more(base.get_submodule(path))):
            break
        try:
            tree, made, _ = _inside(base, path)
            apply_cuts(tree, [*made, _from_inside(cut, path)], given=_arguments(base, path))
        except TracingError as error:
            reason = error
        except SurgeryError as error:
            raise type(error)(f"inside {path!r}, where names start anew: {error}") from error
        else:
            return path
    if whole:
        return whole  # its forward runs as it is, and what leaves it is reversed
    raise TracingError(
        f"nothing around {cut.at!s} can be traced: {str(reason).partition(chr(10))[0]}",
        example="after='block', the path of a module: what leaves a module needs no trace",
    ) from reason


def _takes_anything(base: nn.Module, path: str) -> bool:
    """Whether a forward has ``*args`` or ``**kwargs``: a graph has none, whatever is passed there."""
    parameters = inspect.signature(base.get_submodule(path).forward).parameters.values()
    return any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _offers_more(module: nn.Module) -> bool:
    """Whether others may ask a module for more than its forward, which is all that a graph has."""
    if _is_graph(module):
        return False
    kinds = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    offered = {name for kind in kinds for name, value in vars(kind).items() if callable(value)}
    return isinstance(module, nn.Sequential) or any(n[0] != "_" for n in offered - {"forward"})


def _is_opaque(module: nn.Module) -> bool:
    return isinstance(module, SplicedModule) and module.grl_surgery.is_opaque


def _is_graph(module: nn.Module) -> bool:
    return isinstance(module, SplicedModule) and not module.grl_surgery.is_opaque


def _module_at(cut: Cut, paths: Mapping[str, str]) -> str | None:
    """Path of the module whose output the cut is about, if it is about one."""
    if isinstance(cut.at, Edge) or cut.kind not in ("after", "tap"):
        return None
    return paths.get(split_items(cut.at)[0])


def _is_output_of(path: str, cut: Cut) -> bool:
    return isinstance(cut.at, str) and split_items(cut.at)[0] == escape(path)


def _inside(base: nn.Module, path: str) -> tuple[nn.Module, list[Cut], dict[str, nn.Module]]:
    """The module at ``path`` as it was, the cuts that it has already, and what they spliced in."""
    host = base.get_submodule(path)
    if not isinstance(host, SplicedModule):
        return host, [], {}
    tree, held = taken_apart(host)
    return tree, list(host.grl_surgery.cuts), held


def _arguments(base: nn.Module, path: str) -> dict[str, type]:
    """The arguments that an earlier surgery on the module at ``path`` kept."""
    host = base.get_submodule(path)
    return host.grl_surgery.arguments if isinstance(host, SplicedModule) else {}


def _from_inside(cut: Cut, path: str) -> Cut:
    """The cut as the module at ``path`` names it."""
    return replace(cut, at=_relative(cut.at, escape(path)))


def _relative(at: str | Edge, path: str) -> str | Edge:
    """A place as the module at ``path`` names it; its own output is ``""``."""
    if isinstance(at, Edge):
        source, target = (end.removeprefix(f"{path}.") for end in (at.source, at.target))
        return replace(at, source=source, target=target)
    whole, _ = split_items(at)
    return at[len(path) :] if whole == path else at.removeprefix(f"{path}.")
