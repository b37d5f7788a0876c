"""Surgery where the root cannot be traced: each cut inside the smallest module around it that can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from grl_surgery.cutting import apply_cuts
from grl_surgery.errors import PointNotFoundError, SurgeryError, TracingError
from grl_surgery.points import Edge, enclosing, escape, near_names, split_items, split_number
from grl_surgery.sharing import share_copy
from grl_surgery.spliced_module import Cut, SplicedModule
from grl_surgery.tracing import module_paths

__all__ = ["splice_inside"]


def splice_inside(
    base: nn.Module, cuts: Sequence[Cut], modules: Mapping[str, nn.Module], failure: TracingError
) -> nn.Module:
    """Replace modules inside ``base`` by their spliced graphs, each as small as the cuts allow.

    Args:
        base: A tree of its own; it is changed.
        cuts: What to splice in.
        modules: The modules to splice in, by name.
        failure: Why the root cannot be traced.

    Returns:
        ``base``, its root as before.

    Raises:
        TracingError: Nothing around a point can be traced.
        PointNotFoundError: There is no such point.
    """
    if any(cut.kind == "head" for cut in cuts):
        raise TracingError(
            f"a head's logits leave through the root's output, and the root cannot be traced: {failure}",
            example="insert_grl(model, after=...), and a head of your own behind it",
        )
    hosts: dict[str, list[Cut]] = {}
    for cut in cuts:
        host = _host(base, cut, failure)
        hosts.setdefault(host, []).append(cut)
    for host in sorted(hosts, key=len, reverse=True):  # a host inside another one joins it
        outer = next((other for other in hosts if host.startswith(f"{other}.")), None)
        if outer is not None:
            hosts[outer] += hosts.pop(host)
    for host, inside in hosts.items():
        parent, _, name = host.rpartition(".")
        tree, all_cuts, held = _inside(base, host, inside)
        held.update((cut.module, modules[cut.module]) for cut in inside)
        spliced = SplicedModule(tree, apply_cuts(tree, all_cuts), all_cuts, held)
        base.get_submodule(parent)._modules[name] = spliced
    return base


def _host(base: nn.Module, cut: Cut, failure: TracingError) -> str:
    """Path of the smallest module in which the cut can be made."""
    paths = module_paths(base)
    for end in cut.points:
        if enclosing(end, paths) == [""] and split_number(split_items(end)[0])[0] not in paths:
            near = near_names(end, paths)
            if not near:
                raise failure  # an operation of the root, perhaps: nobody can tell
            raise PointNotFoundError(f"there is no point {end!r} in this network", choices=near)
    around = [[paths[name] for name in enclosing(end, paths)] for end in cut.points]
    common = [path for path in around[0] if path and all(path in other for other in around)]
    spliced = [path for path in common if isinstance(base.get_submodule(path), SplicedModule)]
    reason: SurgeryError = failure
    for path in spliced[:1] or reversed(common):
        try:
            tree, all_cuts, _ = _inside(base, path, [cut])
            apply_cuts(tree, all_cuts)
        except TracingError as error:
            reason = error
        except SurgeryError as error:
            raise type(error)(f"inside {path!r}, where names start anew: {error}") from error
        else:
            return path
    raise TracingError(f"nothing around {cut.at!s} can be traced: {reason}") from reason


def _inside(
    base: nn.Module, path: str, cuts: Sequence[Cut]
) -> tuple[nn.Module, list[Cut], dict[str, nn.Module]]:
    """The module at ``path``, all cuts in it as it names them, and the modules that it holds for them."""
    prefix = f"{escape(path)}."
    here = [replace(cut, at=_relative(cut.at, prefix)) for cut in cuts]
    host = base.get_submodule(path)
    if not isinstance(host, SplicedModule):
        return share_copy(host), here, {}
    tree, held = host.taken_apart()
    return tree, [*host.cuts, *here], held


def _relative(at: str | Edge, prefix: str) -> str | Edge:
    if isinstance(at, Edge):
        return replace(at, source=at.source.removeprefix(prefix), target=at.target.removeprefix(prefix))
    return at.removeprefix(prefix)
