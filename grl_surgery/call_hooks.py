"""Cuts at the calls of modules: forward hooks that reverse a value, or hand it to a head.

No forward is traced for them. A module keeps its class, its signature and its methods, and the hooks are
plain objects, so that the network pickles and copies like any other.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from grl_surgery.errors import SurgeryError
from grl_surgery.head_outputs import add_logits
from grl_surgery.nested import tensors_in
from grl_surgery.opaque import pick, reverse_each

__all__ = [
    "BeginCall",
    "CallHeads",
    "CallHook",
    "CallRecord",
    "EndCall",
    "RememberOutput",
    "ReverseArgument",
    "ReverseEdge",
    "ReverseInputs",
    "ReverseOutput",
    "TapOutput",
    "remove_call_hooks",
]


class CallHook:
    """A hook of this library on a module's forward.

    Args:
        spliced: The reversals or heads that the hook calls.
    """

    def __init__(self, *spliced: nn.Module) -> None:
        self.spliced = spliced

    def redirected(self, made: dict[int, Any]) -> CallHook:
        """The same hook for a copy of the network.

        Args:
            made: From the id of an object of the network to its copy; what is shared between hooks is added.
        """
        twin = copy.copy(self)
        twin.spliced = tuple(made.get(id(module), module) for module in self.spliced)
        return twin


def remove_call_hooks(network: nn.Module, spliced: Iterable[nn.Module]) -> None:
    """Remove the hooks, everywhere in a network, that call one of these reversals or heads."""
    ours = {id(module) for module in spliced}
    for module in network.modules():
        for key in _HOOKS:
            hooks = module.__dict__[key]
            for number, hook in list(hooks.items()):
                if isinstance(hook, CallHook) and any(id(it) in ours for it in hook.spliced):
                    del hooks[number]
                    for options in _OPTIONS:
                        module.__dict__[options].pop(number, None)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OPTIONS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


# ---------------------------------------------------------------------------------------------- reversals


class ReverseOutput(CallHook):
    """Reverses what a module returns: every floating point tensor in it, or one item."""

    def __init__(self, layer: nn.Module, items: tuple[Any, ...] = ()) -> None:
        super().__init__(layer)
        self.items = items

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output with its gradient reversed."""
        return reverse_each(self.spliced[0], output, self.items)


class ReverseInputs(CallHook):
    """Reverses what a module is called with: every floating point tensor among its arguments."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments with their gradients reversed."""
        return reverse_each(self.spliced[0], args), reverse_each(self.spliced[0], kwargs)


class ReverseArgument(CallHook):
    """Reverses one argument of a network's forward, however the caller passes it."""

    def __init__(self, layer: nn.Module, name: str, items: tuple[Any, ...] = ()) -> None:
        super().__init__(layer)
        self.name, self.items = name, items

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments with the gradient of one of them reversed."""
        if self.name in kwargs:
            return args, {**kwargs, self.name: reverse_each(self.spliced[0], kwargs[self.name], self.items)}
        place = list(inspect.signature(type(module).forward).parameters).index(self.name) - 1
        if place >= len(args):
            return None
        changed = reverse_each(self.spliced[0], args[place], self.items)
        return (*args[:place], changed, *args[place + 1 :]), kwargs


class RecordingHook(CallHook):
    """A hook that shares a record with the other hooks of its network."""

    def __init__(self, record: CallRecord, *spliced: nn.Module) -> None:
        super().__init__(*spliced)
        self.record = record

    def redirected(self, made: dict[int, Any]) -> CallHook:
        """The same hook for a copy of the network, with the record of the copy."""
        twin: RecordingHook = super().redirected(made)  # type: ignore[assignment]
        twin.record = self.record.of_copy(made)
        return twin


class RememberOutput(RecordingHook):
    """Remembers what a module returned, for the reversal on an edge that begins there."""

    def __init__(self, layer: nn.Module, record: CallRecord, name: str, items: tuple[Any, ...]) -> None:
        super().__init__(record, layer)
        self.name, self.items = name, items

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the tensors of the output until the network's forward is through."""
        self.record.remember(self.name, pick(output, self.items))


class ReverseEdge(RecordingHook):
    """Reverses those arguments of a module that another module returned."""

    def __init__(
        self, layer: nn.Module, record: CallRecord, name: str, source: str, target: str, argument: str
    ) -> None:
        super().__init__(record, layer)
        self.name, self.argument = name, argument
        self.source, self.target = source, target

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments, those reversed that are the other module's output itself.

        Raises:
            SurgeryError: None of them is.
        """
        changed, found = self.record.reverse(self.name, self.spliced[0], args, kwargs, self.argument)
        if not found:
            raise SurgeryError(
                f"{self.target!r} was not called with the output of {self.source!r} itself, so the reversal "
                "on that edge reverses nothing",
                example=f"before={self.target!r}, or after={self.source!r}",
            )
        return changed


# ------------------------------------------------------------------------------------------------- heads


class CallRecord:
    """What the hooks of one network pass to each other during one call of it, kept apart by thread."""

    def __init__(self) -> None:
        self.calls: dict[int, dict[str, list[Any]]] = {}
        self.running: dict[int, list[Any]] = {}

    def values(self) -> dict[str, list[Any]]:
        """What the call that runs in this thread has recorded so far, by name."""
        return self.calls.setdefault(_thread(), {})

    def remember(self, name: str, value: Any) -> None:
        """Keep the tensors of a value themselves, to know them again where an edge ends."""
        self.values().setdefault(name, []).extend(tensors_in(value))

    def keep_for_head(self, name: str, value: Any) -> None:
        """Keep a copy of a value, which the forward may overwrite, for a head that is called at the end.

        Where no call of the network runs, somebody calls a part of it, or a checkpointed part runs again.
        """
        if self.is_open():
            kept = value.clone() if isinstance(value, torch.Tensor) else value
            self.values().setdefault(name, []).append(kept)

    def reverse(
        self, name: str, layer: nn.Module, args: Any, kwargs: Any, argument: str = ""
    ) -> tuple[tuple[Any, Any], int]:
        """The arguments of a call, those reversed that are a remembered value itself, and how many were.

        Args:
            name: Under which name the value was remembered.
            layer: The reversal.
            args: By position; lists and tuples are looked into.
            kwargs: By name.
            argument: Which argument is meant: ``"0"``, ``"mask"``, ``"0[1]"``; any where it is empty.
        """
        remembered = self.values().get(name, [])
        found = 0

        def changed(value: Any, place: str) -> Any:
            nonlocal found
            if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
                return type(value)([changed(item, f"{place}[{n}]") for n, item in enumerate(value)])
            if not isinstance(value, torch.Tensor) or not any(value is known for known in remembered):
                return value
            if argument and argument != place:
                return value
            found += 1
            return layer(value)

        new_args = tuple(changed(value, str(place)) for place, value in enumerate(args))
        return (new_args, {key: changed(value, key) for key, value in kwargs.items()}), found

    def forwards(self) -> list[Any]:
        """What counts the operations of the forwards that run in this thread, the innermost last."""
        return self.running.setdefault(_thread(), [])

    def begin(self) -> None:
        """A call of the network begins."""
        self.calls[_thread()] = {}

    def is_open(self) -> bool:
        """Whether a call of the network runs in this thread."""
        return _thread() in self.calls

    def end(self) -> dict[str, list[Any]]:
        """The call is through; returns what it recorded, and forgets it."""
        return self.calls.pop(_thread(), {})

    def of_copy(self, made: dict[int, Any]) -> CallRecord:
        """The one record that all hooks of a copy of the network share."""
        twin: CallRecord = made.setdefault(id(self), CallRecord())
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"calls": {}, "running": {}}  # a copy is not being called


def _thread() -> int:
    # A compiled forward runs in the thread that compiles it, and torch.compile cannot ask which that is.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class BeginCall(RecordingHook):
    """Marks where a call of the network begins."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Open the record."""
        self.record.begin()


class EndCall(RecordingHook):
    """Marks where a call of the network ends, whether or not it fails."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Close the record, if it is still open."""
        self.record.end()


class TapOutput(RecordingHook):
    """Hands what a module returns to a head, which is called when the whole network has run."""

    def __init__(self, head: nn.Module, record: CallRecord, name: str, items: tuple[Any, ...]) -> None:
        super().__init__(record, head)
        self.name, self.items = name, items

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep a copy of the value, which the forward may overwrite afterwards."""
        value = pick(output, self.items)
        if isinstance(value, fx.Proxy) and not self.record.is_open():
            raise SurgeryError(
                f"torch.fx traces past the head that reads {self.name!r}: it calls forward, not the network",
                example="torch.export.export(m, inputs); or gs.graph(m)",
            )
        self.record.keep_for_head(self.name, value)


class CallHeads(RecordingHook):
    """Calls the heads when the network has run, and adds their logits to what it returned."""

    def __init__(
        self, record: CallRecord, names: Sequence[str], conditions: Sequence[bool], *heads: Any
    ) -> None:
        super().__init__(record, *heads)
        self.names, self.conditions = tuple(names), tuple(conditions)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output with the logits of each head."""
        recorded = self.record.end()
        logits = [
            self.logits(name, head, has_condition, recorded)
            for name, head, has_condition in zip(self.names, self.spliced, self.conditions, strict=True)
        ]
        return add_logits(output, self.names, *logits)

    def logits(
        self, name: str, head: nn.Module, has_condition: bool, recorded: Mapping[str, Sequence[Any]]
    ) -> Any:
        """The logits of one head: None where the forward did not pass its point, one for each pass else."""
        values = recorded.get(name, [])
        if not has_condition:
            found = [head(value) for value in values]
        else:
            found = [head(*pair) for pair in zip(values, recorded.get(f"{name}.condition", []), strict=False)]
        return found[0] if len(found) == 1 else tuple(found) or None
