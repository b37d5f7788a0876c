"""Makes cuts at the calls of modules and at operations, by hooks on a network of its own class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from grl_surgery.capture.capture import module_paths
from grl_surgery.points import (
    Edge,
    split_items,
    split_number,
)
from grl_surgery.surgery.call_hooks import (
    BeginCall,
    CallHeads,
    EndCall,
    RememberOutput,
    ReverseArgument,
    ReverseEdge,
    ReverseInputs,
    ReverseOutput,
    TapArgument,
    TapOutput,
)
from grl_surgery.surgery.call_record import CallRecord, ChildrenOfNetwork
from grl_surgery.surgery.operations import OperationCut, cut_operations
from grl_surgery.surgery.scope_checks import (
    OUTPUT,
    arguments_of,
    refuse_overwriting,
)
from grl_surgery.surgery.spliced_module import (
    Cut,
    SplicedModule,
    Surgery,
    surgery_of,
)

__all__ = ["hook_cuts", "is_argument"]


def hook_cuts(
    network: nn.Module, cuts: Sequence[Cut], at_calls: Sequence[Cut], modules: Mapping[str, nn.Module]
) -> nn.Module:
    """Make cuts at the calls of modules of ``network``, which is changed."""
    if not at_calls:
        return network
    record = CallRecord()
    heads = [cut for cut in at_calls if cut.is_head]
    others = [cut for cut in at_calls if not cut.is_head]
    own = {cut.module: modules[cut.module] for cut in at_calls}
    if isinstance(network, SplicedModule):
        network._modules.update(own)
    else:
        children = ChildrenOfNetwork(network._modules, own, record)
        children.needs_call = any(_is_around_the_call(network, cut) for cut in at_calls)
        network.__dict__["_modules"] = children
    for head in heads:  # before any reversal, as they have reversals of their own
        _hook_taps(network, head, modules[head.module], record)
    for cut in at_calls:
        if not cut.is_head:
            _hook_reversal(network, cut, modules[cut.module], record)
    for cut in others:  # after all reversals, so that what is remembered is what the forward gets
        if isinstance(cut.at, Edge):
            _hook_source(network, cut, modules[cut.module], record)
    _hook_whole_call(network, heads, [modules[cut.module] for cut in (*heads, *others)], record)
    _hook_operations(network, at_calls, modules, record)
    hooked = frozenset(cut.module for cut in at_calls)
    done = surgery_of(network)
    network.__dict__["grl_surgery"] = Surgery(tuple(cuts), done.traced if done else None, hooked)
    return network


def _is_around_the_call(network: nn.Module, cut: Cut) -> bool:
    """Whether hooks of the network itself make the cut, or begin and end what they remember for it."""
    if cut.is_head or isinstance(cut.at, Edge):
        return True
    return cut.at == OUTPUT or cut.at in arguments_of(network) or any(not row[1] for row in cut.operations)


def _hook_reversal(network: nn.Module, cut: Cut, layer: nn.Module, record: CallRecord) -> None:
    if isinstance(cut.at, Edge) and cut.is_at_operation(cut.at.target):
        return
    if isinstance(cut.at, Edge):
        target, _ = _module_at(network, cut.at.target)
        refuse_overwriting(target, cut)
        hook = ReverseEdge(layer, record, cut.module, cut.at.source, cut.at.target, cut.at.arg)
        target.register_forward_pre_hook(hook, with_kwargs=True)
    elif cut.is_at_operation(cut.at):
        return
    elif cut.kind == "before" and cut.at != OUTPUT:
        target, _ = _module_at(network, cut.at)
        refuse_overwriting(target, cut)
        target.register_forward_pre_hook(ReverseInputs(record, layer), with_kwargs=True)
    elif cut.at in arguments_of(network):
        network.register_forward_pre_hook(ReverseArgument(layer, cut.at), with_kwargs=True)
    else:
        module, items = _module_at(network, cut.at)
        module.register_forward_hook(ReverseOutput(layer, record, items))


def _hook_taps(network: nn.Module, head: Cut, module: nn.Module, record: CallRecord) -> None:
    """Hand the values that a head reads out of the calls of modules."""
    for place, name in _read_by(head):
        if not head.is_at_operation(place) and not is_argument(network, place):
            source, items = _module_at(network, place)
            source.register_forward_hook(TapOutput(module, record, name, items))


def _read_by(head: Cut) -> list[tuple[str, str]]:
    """The points that a head reads, and under which name the value of each is recorded."""
    names = [head.module, *(f"{head.module}.{place}" for place in range(1, len(head.calls[0])))]
    return [(point, name) for call in head.calls for point, name in zip(call, names, strict=False)]


def is_argument(network: nn.Module, point: str) -> bool:
    """Whether a point is an argument of the network, and no module of that name."""
    name = split_items(point)[0]
    return name in arguments_of(network) and name not in module_paths(network)


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
    for head, module in zip(heads, spliced, strict=False):
        for place, name in _read_by(head):
            if is_argument(network, place) and not head.is_at_operation(place):
                tap = TapArgument(module, record, name, *split_items(place))
                network.register_forward_pre_hook(tap, with_kwargs=True)
    if heads:
        names, inputs = [head.module for head in heads], [len(head.calls[0]) for head in heads]
        keeping = [head.keeps_logits for head in heads]
        network.register_forward_hook(CallHeads(record, names, inputs, keeping, *spliced[: len(heads)]))
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
    """List what a cut does, at which point, and under which name a value is recorded for it."""
    if isinstance(cut.at, Edge):
        return [(cut.at.source, "remember", cut.module), (cut.at.target, "edge", cut.module)]
    if not cut.is_head:
        return [(cut.at, cut.kind, cut.module)]
    return [(point, "tap", name) for point, name in _read_by(cut)]


def _module_at(network: nn.Module, point: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """The module whose output a point is, and which item of it."""
    name, items = split_items(point)
    if name == OUTPUT:
        return network, items
    paths = module_paths(network)
    return network.get_submodule(paths[name if name in paths else split_number(name)[0]]), items
