"""Cuts at operations of a forward that cannot be traced: a torch function mode finds them when they run.

The mode is active only while one module's own forward runs, and not in the modules that it calls. Operations
are told apart by name and order, as they were seen in a forward on the example inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from grl_surgery.capture.observed_calls import operation_name
from grl_surgery.capture.traceable_copy import has_forward
from grl_surgery.errors import SurgeryError
from grl_surgery.nn.nested_reversal import pick
from grl_surgery.surgery.call_hooks import CallHook, RecordingHook
from grl_surgery.surgery.call_record import CallRecord

__all__ = ["OperationCut", "callees", "cut_operations"]


class OperationCut(NamedTuple):
    """One action at one operation of a forward.

    Args:
        kind: ``"after"``, ``"before"``, ``"edge"``, ``"remember"`` or ``"tap"``.
        name: Of the operation: ``"add"``.
        place: How many operations of that name the forward runs before it.
        spliced: The reversal, or the head that reads the value.
        record: Under which name a value is remembered or handed to a head.
        items: Which item of the value is meant.
        source: For an edge, what the message calls its source.
        argument: For an edge, which argument of the operation it is; empty where it does not matter.
    """

    kind: str
    name: str
    place: int
    spliced: nn.Module
    record: str = ""
    items: tuple[Any, ...] = ()
    source: str = ""
    argument: str = ""


def callees(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a forward may call: its children, and what its lists of modules hold."""
    for child in module.children():
        if not has_forward(child):
            yield from callees(child)
        elif not isinstance(child, torch.jit.ScriptModule):
            yield child


def cut_operations(host: nn.Module, cuts: Sequence[OperationCut], record: CallRecord) -> None:
    """Make cuts at operations of one module's own forward, whenever it runs.

    Args:
        host: The module; hooks are added to it and to the modules that it calls.
        cuts: What is done, at which operation.
        record: What the hooks of the network share.
    """
    spliced = [cut.spliced for cut in cuts]
    host.register_forward_pre_hook(EnterForward(record, cuts, *spliced))
    host.register_forward_hook(LeaveForward(record, *spliced), always_call=True, prepend=True)
    for child in {id(module): module for module in callees(host)}.values():
        # The hooks of others are no part of the forward: their operations are not counted either.
        child.register_forward_pre_hook(EnterCallee(record, *spliced), prepend=True)
        child.register_forward_hook(LeaveCallee(record, *spliced), always_call=True)


class _Operations(TorchFunctionMode):
    """Counts the operations of one run of one forward, and makes the cuts at some of them."""

    def __init__(
        self,
        cuts: Mapping[tuple[str, int], Sequence[OperationCut]],
        record: CallRecord,
        spliced: tuple[nn.Module, ...],
    ) -> None:
        super().__init__()
        self.cuts, self.record, self.spliced = cuts, record, spliced
        self.seen: Counter[str] = Counter()
        self.depth = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = None if self.depth else operation_name(function)
        if name is None:
            return function(*args, **kwargs)
        cuts = self.cuts.get((name, self.seen[name]), ())
        self.seen[name] += 1
        for cut in cuts:
            if cut.kind == "before":
                args, kwargs = (self.record.reversed(cut.spliced, it, held=it) for it in (args, kwargs))
            elif cut.kind == "edge":
                args, kwargs = self.reversed_on_edge(cut, args, kwargs)
        value = function(*args, **kwargs)
        for cut in cuts:  # heads first, as they have reversals of their own
            if cut.kind == "tap":
                self.record.keep_for_head(cut.record, pick(value, cut.items))
        for cut in cuts:
            if cut.kind == "after":
                value = self.record.reversed(cut.spliced, value, cut.items, held=args)
        for cut in cuts:
            if cut.kind == "remember":
                self.record.remember(cut.record, pick(value, cut.items))
        return value

    def reversed_on_edge(self, cut: OperationCut, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments, those reversed that are the remembered value itself."""
        changed, found = self.record.reverse(cut.record, cut.spliced, args, kwargs, cut.argument)
        if not found:
            raise SurgeryError(
                f"{cut.name!r} was not given the value of {cut.source!r} itself, so the reversal on that "
                "edge reverses nothing",
                example=f"after={cut.source!r}",
            )
        return changed


class EnterForward(RecordingHook):
    """Switches the mode on when the forward begins."""

    def __init__(self, record: CallRecord, cuts: Sequence[OperationCut], *spliced: nn.Module) -> None:
        super().__init__(record, *spliced)
        self.cuts = list(cuts)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Begin to count."""
        by_place: dict[tuple[str, int], list[OperationCut]] = {}
        for cut in self.cuts:
            by_place.setdefault((cut.name, cut.place), []).append(cut)
        mode = _Operations(by_place, self.record, self.spliced)
        mode.__enter__()  # type: ignore[no-untyped-call]
        self.record.forwards().append(mode)

    def redirected(self, made: dict[int, Any]) -> CallHook:
        """The same hook for a copy of the network."""
        twin: EnterForward = super().redirected(made)  # type: ignore[assignment]
        twin.cuts = [cut._replace(spliced=made.get(id(cut.spliced), cut.spliced)) for cut in self.cuts]
        return twin


class LeaveForward(RecordingHook):
    """Switches the mode off when the forward ends, or fails."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Stop counting."""
        self.record.forwards().pop().__exit__(None, None, None)


class EnterCallee(RecordingHook):
    """Marks that another module's forward runs inside the one whose operations are counted."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Go one call deeper."""
        if (mode := _of(self)) is not None:
            mode.depth += 1


class LeaveCallee(RecordingHook):
    """Marks that the other module's forward is through."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Come back."""
        if (mode := _of(self)) is not None:
            mode.depth -= 1


def _of(hook: RecordingHook) -> _Operations | None:
    """Return the mode that counts the forward around a call: others may run inside it."""
    running = (mode for mode in reversed(hook.record.forwards()) if mode.spliced == hook.spliced)
    return next(running, None)
