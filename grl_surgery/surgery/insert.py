"""insert_grl puts reversals into a network, strip takes them out; neither changes its argument."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grl_surgery.capture.node_names import TORCH
from grl_surgery.errors import SurgeryError, TracingError
from grl_surgery.isolation.module_tree import modules_by_path
from grl_surgery.isolation.shared_copy import COMPILED, replace_submodule
from grl_surgery.loading.inputs import example_inputs as known_inputs
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.points import Edge, ancestors, near_names
from grl_surgery.surgery.exported_program import check_no_program
from grl_surgery.surgery.graph_rewrite import apply_cuts
from grl_surgery.surgery.head_outputs import heads_that_keep
from grl_surgery.surgery.run_checks import check_arguments, check_by_running
from grl_surgery.surgery.selectors import Selector, name_modules, select_edges, select_points
from grl_surgery.surgery.spliced_module import Cut, SplicedModule, disassemble, free_name, surgery_of
from grl_surgery.surgery.submodule_surgery import splice_inside
from grl_surgery.validation import check_names, check_network

_LIBRARY = os.path.dirname(os.path.dirname(__file__)) + os.sep

__all__ = ["graph_module", "head_names", "insert_grl", "reversals", "strip"]


@torch.inference_mode(False)
def insert_grl(
    model: nn.Module,
    after: Selector | None = None,
    *,
    before: Selector | None = None,
    edge: Any = None,
    coeff: float | torch.Tensor = 1.0,
    signed: bool = False,
    clip: float | None = None,
    normalize: bool = False,
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
            ``"re:..."``, ``"feature:3"`` as timm's ``feature_info`` counts, a module of the network, a module
            class, or a function of a :class:`GraphNode`.
        before: Reverse what flows back out of this point: every tensor that it uses.
        edge: Reverse one use and no other: ``("layer2", "layer3.0.conv1")``, the same as
            ``"layer2 -> layer3.0.conv1"``; an :class:`Edge` out of ``graph(model).edges``; or a list.
        coeff: Non-negative; 0-d if it is a tensor. Every reversal can be set on its own afterwards.
        signed: Whether coefficients may be negative, now or later.
        clip: Clamp each entry of the gradient to [-clip, clip] first; see :func:`reverse_gradient`.
        normalize: Divide the gradient by its norm first; see :func:`reverse_gradient`.
        example_inputs: Arguments of forward: a tensor, a tuple, or a dict by name. Needed for a function of
            a node that looks at shapes, and for an operation or edge in a forward that cannot be traced.

    Returns:
        A network with the original's state_dict keys that takes every call the original takes. It is a
        ``torch.fx.GraphModule`` where the forwards around the points can be traced without losing anything,
        and otherwise a network of the original's class.

    Raises:
        PointNotFoundError: A selector matches nothing.
        AmbiguousPointError: A name stands for several calls.
        ShapeError: The value there is a size or a tuple.
        TracingError: Nothing around the point can be traced.
        SurgeryError: Not exactly one of after, before and edge, or a coefficient that is not valid.
    """
    keyword, selector = _only_one(after=after, before=before, edge=edge)
    options: Any = {"signed": signed, "clip": clip, "normalize": normalize}
    layer = GradientReversal(coeff, **options)
    check_model(model, "insert_grl")
    check_no_program(model, "insert_grl")
    selector = name_modules(model, selector)
    base, cuts, modules = disassemble(model)
    if keyword == "edge":
        places: Sequence[str | Edge] = select_edges(base, selector)
    else:
        places = select_points(base, selector, keyword, example_inputs)
    for place in places:
        name = _free_name(base, modules, place)
        modules[name] = on_same_device(GradientReversal(layer.coeff.clone(), **options), base)
        cuts.append(Cut(keyword, place, name))  # type: ignore[arg-type]
    return splice(base, cuts, modules, lambda: inputs_of(base, example_inputs))


def inputs_of(model: nn.Module, example_inputs: Any) -> Any:
    """The example inputs that were given, or those that are known for this network; None without either."""
    return known_inputs(model) if example_inputs is None else example_inputs


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
            f"this network is wrapped in {kind}, which would run the old network: cut first, then wrap",
            example=f"{verb}(model.{inner[kind]}, ...)",
        )
    modules = modules_by_path(model)
    if verb in _CUTS:
        _check_not_sharded(modules, verb)
    if isinstance(model, torch.jit.ScriptModule):
        raise SurgeryError(f"{verb} cannot cut a scripted network: pass the nn.Module that it was made from")
    compiled = [path or "the root" for path, module in modules.items() if module.__dict__.get(COMPILED)]
    if compiled and verb in _CUTS:
        raise SurgeryError(
            f"part of this network is compiled in place and would run the old code: "
            f"{', '.join(compiled[:3])}{' ...' if compiled[3:] else ''}; splice first, compile afterwards",
            example=f"m = {verb}(model, ...), with a model that is not compiled; then m.compile()",
        )


def _check_not_sharded(modules: Mapping[str, nn.Module], verb: str) -> None:
    for path, module in modules.items():
        kinds = {type(module), *map(type, module._parameters.values())}
        sharded = set[str]().union(*map(_sharding_classes, kinds))
        if sharded:
            raise SurgeryError(
                f"{repr(path) if path else 'this network'} is sharded ({min(sharded)}), and what gathers its "
                "parameters would go on serving the old graph: splice, then shard",
                example=f"m = {verb}(model, ...), with a model that is not sharded; then fully_shard(m)",
            )


@functools.cache
def _sharding_classes(kind: Any) -> frozenset[str]:
    """Those of a class's bases that shard; by name, since importing them takes seconds."""
    return _SHARDING.intersection(base.__name__ for base in kind.__mro__)


_SHARDING = frozenset({"FSDPModule", "FullyShardedDataParallel", "DTensor"})

_CUTS = frozenset({"insert_grl", "attach_domain_head", "adopt"})
"""The verbs that give a network another graph; the others only read it, or take something out."""


def on_same_device(layer: nn.Module, model: nn.Module) -> nn.Module:
    """The new layer on the device and in the mode of the network that it goes into."""
    return layer.to(device_of(model)).train(model.training)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a network's tensors; the host for a network that has none."""
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
    find_inputs: Callable[[], Any] = lambda: None,
) -> nn.Module:
    """The spliced network: as one graph if the root can be traced, else each cut in the smallest scope.

    Args:
        base: A tree of its own; it becomes part of the result.
        cuts: What to splice in, in order.
        modules: The reversals and heads, by the names that the cuts give them.
        find_inputs: Returns arguments of forward, or None where none are known; called where the network has
            to run.
    """
    if not cuts:
        return base
    check_arguments(base, cuts, find_inputs)
    try:
        network: nn.Module = SplicedModule(base, apply_cuts(base, cuts), cuts, modules)
    except TracingError as error:
        return splice_inside(base, cuts, modules, error, find_inputs)
    check_by_running(network, [cut for cut in cuts if cut.has_items], find_inputs)
    return network


def graph_module(model: nn.Module) -> SplicedModule:
    """The same spliced network as a graph, for what needs one.

    Surgery returns a graph by itself wherever that loses nothing.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph_module(insert_grl(net, after="1")).graph.find_nodes(op="call_module", target="grl_1")
        [grl_1]

    Args:
        model: A result of surgery; not changed.

    Raises:
        SurgeryError: It is not spliced.
        TracingError: A forward around a point cannot be traced, or a graph would take fewer calls than it.
            The message says which line of which file stands in the way.
    """
    check_model(model, "graph_module")
    if isinstance(model, SplicedModule) and not model.grl_surgery.hooked:
        return model
    tree, cuts, modules = disassemble(model)
    if not cuts:
        raise SurgeryError(
            f"this {type(model).__name__} is not spliced", example="graph_module(insert_grl(model, 'layer3'))"
        )
    try:
        return SplicedModule(tree, apply_cuts(tree, cuts), cuts, modules)
    except TracingError as error:
        raise TracingError(f"{str(error).partition(chr(10))[0]} ({line_in_the_way(error, tree)})") from error


def line_in_the_way(error: BaseException, model: nn.Module) -> str:
    """The last line of the network's own code on the way to an error; else where its forward begins."""
    frames = traceback.extract_tb(error.__cause__.__traceback__ if error.__cause__ else None)
    own = [frame for frame in frames if not frame.filename.startswith((TORCH, _LIBRARY))]
    if own:
        return f"{own[-1].filename}, line {own[-1].lineno}"
    code = inspect.unwrap(type(model).forward).__code__
    return f"{code.co_filename}, line {code.co_firstlineno}"


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
    done = surgery_of(model)
    return [cut.module for cut in done.cuts if cut.is_head] if done else []


def inner_heads(model: nn.Module) -> list[str]:
    """Paths of the heads whose logits go to a forward around them, and not to whoever calls the network."""
    inside = ((path, part) for path, part in model.named_modules() if path)
    found = ((path, part, name) for path, part in inside for name in head_names(part))
    return [f"{path}.{name}" for path, part, name in found if name not in heads_that_keep(part)]


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
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if (done := surgery_of(module))
        for name in done.names
    ]


def _strip(model: nn.Module, prefix: str, names: Sequence[str]) -> nn.Module:
    tree, cuts, modules = disassemble(model)
    parts = {path: part for path, part in tree.named_modules() if path and surgery_of(part)}
    for path, part in parts.items():
        if not any(path.startswith(f"{other}.") for other in parts):  # it takes care of what lies inside it
            replace_submodule(tree, part, _strip(part, f"{prefix}{path}.", names))
    rest = [cut for cut in cuts if prefix + cut.module not in names]
    return splice(tree, rest, {cut.module: modules[cut.module] for cut in rest})
