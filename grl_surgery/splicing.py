"""The verbs of surgery: insert_grl puts reversals in, strip takes them out; both leave the argument alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from grl_surgery.arguments import check_names, check_network
from grl_surgery.cutting import apply_cuts
from grl_surgery.errors import SurgeryError, TracingError
from grl_surgery.loaded_program import check_no_program
from grl_surgery.model_graph import arguments_kept
from grl_surgery.points import Edge, ancestors, near_names
from grl_surgery.reversal import GradientReversal
from grl_surgery.scoped import splice_inside
from grl_surgery.selection import Selector, select_edges, select_points
from grl_surgery.sharing import COMPILED, exchange, share_copy
from grl_surgery.spliced_module import Cut, SplicedModule, free_name, taken_apart

__all__ = ["head_names", "insert_grl", "reversals", "strip"]


def insert_grl(
    model: nn.Module,
    *,
    after: Selector | None = None,
    before: Selector | None = None,
    edge: Any = None,
    coeff: float | torch.Tensor = 1.0,
    example_inputs: Any = None,
) -> nn.Module:
    """Splice a gradient reversal into a network, at a point or on one edge.

    The forward is unchanged; the gradient that passes the point is multiplied by ``-coeff``.
    ``print(graph(model))`` lists the names.

    The result shares parameters and buffers with ``model``, which is not changed itself: move or cast
    ``model`` before surgery, or the result, and not ``model`` afterwards, where torch would leave the buffers
    of the result behind. A result that is a ``GraphModule`` takes those of ``model`` along.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> spliced = insert_grl(net, after="1", coeff=0.5)
        >>> reversals(spliced)
        {'grl_1': GradientReversal(coeff=0.5)}

    Args:
        model: Any network; or the result of an earlier call.
        after: Reverse every use of the value of this point. A name, a list of names, ``"glob:layer3.*"``,
            ``"re:..."``, ``"feature:3"`` as timm's ``feature_info`` counts, a module class, or a function of
            a :class:`GraphNode`.
        before: Reverse what flows back out of this point: every tensor that it uses.
        edge: Reverse one use and no other: ``("layer2", "layer3.0.conv1")``, the same as
            ``"layer2 -> layer3.0.conv1"``; an :class:`Edge` out of ``graph(model).edges``; or a list.
        coeff: Non-negative; 0-d if it is a tensor. Every reversal can be set on its own afterwards.
        example_inputs: Arguments of forward: a tensor, a tuple, or a dict by name. Only needed where a
            predicate looks at shapes, or to keep an optional argument of forward an argument.

    Returns:
        A ``torch.fx.GraphModule`` with the original's state_dict keys. Where the network's own forward
        cannot be traced, a network of the original's class, in which the smallest module around the points
        that can be traced is replaced by its graph.

    Raises:
        PointNotFoundError: A selector matches nothing.
        AmbiguousPointError: A name stands for several calls.
        ShapeError: The value there is a size or a tuple.
        TracingError: Nothing around the point can be traced.
        SurgeryError: Not exactly one of after, before and edge, or a coefficient that is not valid.
    """
    keyword, selector = _only_one(after=after, before=before, edge=edge)
    layer = GradientReversal(coeff)
    check_model(model, "insert_grl")
    check_no_program(model, "insert_grl")
    base, cuts, modules = patient(model)
    if keyword == "edge":
        places: Sequence[str | Edge] = select_edges(base, selector)
    else:
        places = select_points(base, selector, keyword, example_inputs)
    for place in places:
        name = _free_name(base, modules, place)
        modules[name] = on_same_device(GradientReversal(layer.coeff.clone()), base)
        cuts.append(Cut(keyword, place, name))  # type: ignore[arg-type]
    return splice(base, cuts, modules, arguments_kept(model, example_inputs))


def _only_one(**selectors: Any) -> tuple[str, Any]:
    """The one keyword that was given, and its value."""
    given = {keyword: value for keyword, value in selectors.items() if value is not None}
    if len(given) != 1:
        raise SurgeryError(
            f"give exactly one of after, before and edge; got {' and '.join(given) or 'none of them'}",
            example="insert_grl(model, after='layer3')",
        )
    return next(iter(given.items()))


def check_model(model: Any, verb: str) -> None:
    """Refuse what is not a network, or is one inside a wrapper that surgery would cut off.

    Raises:
        SurgeryError: With what to pass instead.
    """
    check_network(model, verb)
    inner = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
    kind = type(model).__name__
    if kind in inner:
        raise SurgeryError(
            f"this network is wrapped in {kind}, which would go on running the old graph: splice, then wrap",
            example=f"{verb}(model.{inner[kind]}, ...)",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise SurgeryError(f"{verb} cannot cut a scripted network: pass the nn.Module that it was made from")
    compiled = [path or "the root" for path, m in model.named_modules() if m.__dict__.get(COMPILED)]
    if compiled and verb in _CUTS:
        raise SurgeryError(
            f"part of this network is compiled in place, which would go on running the old graph: "
            f"{', '.join(compiled[:3])}{' ...' if compiled[3:] else ''}; splice first, compile afterwards",
            example=f"m = {verb}(model, ...), with a model that is not compiled; then m.compile()",
        )


_CUTS = frozenset({"insert_grl", "attach_domain_head", "adopt"})
"""The verbs that give a network another graph; the others only read it, or take something out."""


def patient(model: nn.Module) -> tuple[nn.Module, list[Cut], dict[str, nn.Module]]:
    """A tree to operate on, over the same tensors, and what was spliced into it before."""
    if not isinstance(model, SplicedModule):
        return share_copy(model), [], {}
    tree, modules = taken_apart(model)
    if not model.grl_surgery.is_opaque:
        return tree, list(model.grl_surgery.cuts), modules
    cuts = [replace(cut, kind="head") for cut in model.grl_surgery.cuts]  # with taps to be made again
    return _strip_inside(tree, "", [cut.module for cut in cuts]), cuts, modules


def on_same_device(layer: nn.Module, model: nn.Module) -> nn.Module:
    """The new layer on the device and in the mode of the network that it goes into."""
    return layer.to(device_of(model)).train(model.training)


def device_of(model: nn.Module) -> torch.device:
    """Where a network's tensors are; of one that has none, the host."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _free_name(model: nn.Module, modules: Mapping[str, nn.Module], place: str | Edge) -> str:
    """An attribute for a reversal that says where it is: ``grl_layer3_0_conv1``."""
    name = "grl_" + re.sub(r"\W+", "_", place.target if isinstance(place, Edge) else place).strip("_")
    return free_name(name, modules, model)


def splice(
    base: nn.Module,
    cuts: Sequence[Cut],
    modules: Mapping[str, nn.Module],
    given: Mapping[str, type] | None = None,
) -> nn.Module:
    """The spliced network: as one graph if the root can be traced, else within the smallest modules."""
    try:
        return SplicedModule(base, apply_cuts(base, cuts, given=given), cuts, modules)
    except TracingError as error:
        return splice_inside(base, cuts, modules, error, given)


# ------------------------------------------------------------------------------------------ reading, undoing


def reversals(model: nn.Module) -> dict[str, GradientReversal]:
    """Every gradient reversal in a network by its module path, in the order of the graph.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> reversals(insert_grl(net, after=["1", "0"]))
        {'grl_0': GradientReversal(coeff=1.0), 'grl_1': GradientReversal(coeff=1.0)}

    Raises:
        SurgeryError: It is not a network.
    """
    check_network(model, "reversals", example="reversals(insert_grl(model, after='layer3'))")
    found = {path: m for path, m in model.named_modules() if isinstance(m, GradientReversal)}
    nodes = model.graph.nodes if isinstance(model, SplicedModule) else ()
    order = {str(node.target): place for place, node in reversed(list(enumerate(nodes)))}

    def place(path: str) -> int:
        return min((order[part] for part in (*ancestors(path), path) if part in order), default=-1)

    return {path: found[path] for path in sorted(found, key=place)}


def head_names(model: nn.Module) -> list[str]:
    """Names of the domain heads, in the order attached: the order of their logits in the output."""
    cuts = model.grl_surgery.cuts if isinstance(model, SplicedModule) else ()
    return [cut.module for cut in cuts if cut.is_head]


def inner_heads(model: nn.Module) -> list[str]:
    """Paths of the heads whose logits go to a forward around them, and not to whoever calls the network."""
    inside = ((path, part) for path, part in model.named_modules() if path)
    return [f"{path}.{name}" for path, part in inside for name in head_names(part)]


def strip(model: nn.Module, names: Sequence[str] | str | None = None) -> nn.Module:
    """Take reversals and heads out again.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> type(strip(insert_grl(net, after="0"))).__name__
        'Sequential'

    Args:
        model: A spliced network; it is not changed.
        names: Only these of ``reversals(model)`` or of the heads; all by default.

    Returns:
        The network without them, over the same tensors. With nothing left in it, it is of the original's
        class with the original's keys. Where a forward of yours calls a network with a head and takes the
        logits apart, strip that network instead: it would get one value less.

    Raises:
        SurgeryError: There is nothing to take out, or no such name.
    """
    check_model(model, "strip")
    check_no_program(model, "strip")
    wanted = None if names is None else check_names("names", names, example="strip(m, 'domain')")
    present = _spliced_names(model)
    unknown = [name for name in wanted or () if name not in present]
    if not present:
        raise SurgeryError(
            f"this {type(model).__name__} is not spliced, so there is nothing to strip",
            example="strip(insert_grl(model, after='layer3'))",
        )
    if unknown:
        raise SurgeryError(
            f"there is no {unknown[0]!r} to strip", choices=near_names(unknown[0], present) or present
        )
    return _strip(model, "", present if wanted is None else wanted)


def _spliced_names(model: nn.Module) -> list[str]:
    return [
        f"{path}.{cut.module}" if path else cut.module
        for path, module in model.named_modules()
        if isinstance(module, SplicedModule)
        for cut in module.grl_surgery.cuts
        if cut.kind != "tap"
    ]


def _strip(model: nn.Module, prefix: str, names: Sequence[str]) -> nn.Module:
    if not isinstance(model, SplicedModule):
        return _strip_inside(share_copy(model), prefix, names)
    tree, modules = taken_apart(model)
    tree = _strip_inside(tree, prefix, names)
    rest = [cut for cut in model.grl_surgery.cuts if not _is_named(cut, prefix, names)]
    kept = {cut.module: modules[cut.module] for cut in rest if cut.kind != "tap"}
    if not rest:
        return tree
    return SplicedModule(tree, apply_cuts(tree, rest, given=model.grl_surgery.arguments), rest, kept)


def _strip_inside(tree: nn.Module, prefix: str, names: Sequence[str]) -> nn.Module:
    """Strip the modules of a tree, which is changed; each takes care of what lies inside it."""
    parts = {path: part for path, part in tree.named_modules() if isinstance(part, SplicedModule)}
    for path, part in parts.items():
        if not any(path.startswith(f"{other}.") for other in parts):
            exchange(tree, part, _strip(part, f"{prefix}{path}.", names))
    return tree


def _is_named(cut: Cut, prefix: str, names: Sequence[str]) -> bool:
    """Whether a cut is to go; a tap goes with the head that reads it."""
    return (cut.module.partition(".")[0] if cut.kind == "tap" else prefix + cut.module) in names
