"""Cuts at the calls of modules: forward hooks that reverse a value, or hand it to a head.

No forward is traced for them. A module keeps its class, its signature and its methods, and the hooks are
plain objects, so that the network pickles and copies like any other.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from grl_surgery.errors import SurgeryError
from grl_surgery.isolation.shared_copy import RedirectedHook
from grl_surgery.nn.nested_reversal import pick, reverse_nested
from grl_surgery.surgery.call_record import WITHOUT_GRADIENTS, CallRecord
from grl_surgery.surgery.head_outputs import add_logits

__all__ = [
    "BeginCall",
    "CallHeads",
    "CallHook",
    "EndCall",
    "RememberOutput",
    "ReverseArgument",
    "ReverseEdge",
    "ReverseInputs",
    "ReverseOutput",
    "TapArgument",
    "TapOutput",
    "remove_call_hooks",
]


class CallHook(RedirectedHook):
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


class ReverseOutput(RecordingHook):
    """Reverses what a module returns: every floating point tensor in it, or one item."""

    def __init__(self, layer: nn.Module, record: CallRecord, items: tuple[Any, ...] = ()) -> None:
        super().__init__(record, layer)
        self.items = items

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output with its gradient reversed."""
        return self.record.reversed(self.spliced[0], output, self.items, held=args)


class ReverseInputs(RecordingHook):
    """Reverses what a module is called with: every floating point tensor among its arguments."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments with their gradients reversed."""
        return tuple(self.record.reversed(self.spliced[0], given, held=given) for given in (args, kwargs))


class ReverseArgument(CallHook):
    """Reverses one argument of a network's forward, however the caller passes it."""

    def __init__(self, layer: nn.Module, name: str, items: tuple[Any, ...] = ()) -> None:
        super().__init__(layer)
        self.name, self.items = name, items

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Return the arguments with the gradient of one of them reversed."""
        if self.name in kwargs:
            return args, {**kwargs, self.name: reverse_nested(self.spliced[0], kwargs[self.name], self.items)}
        place = list(inspect.signature(type(module).forward).parameters).index(self.name) - 1
        if place >= len(args):
            return None
        changed = reverse_nested(self.spliced[0], args[place], self.items)
        return (*args[:place], changed, *args[place + 1 :]), kwargs


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


class TapArgument(RecordingHook):
    """Hands an argument of the network's forward to a head, however the caller passes it."""

    def __init__(
        self, head: nn.Module, record: CallRecord, name: str, argument: str, items: tuple[Any, ...]
    ) -> None:
        super().__init__(record, head)
        self.name, self.argument, self.items = name, argument, items

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep the value; the default of an argument that is not passed."""
        parameters = inspect.signature(type(module).forward).parameters
        place = list(parameters).index(self.argument) - 1
        if self.argument in kwargs:
            value = kwargs[self.argument]
        else:
            value = args[place] if place < len(args) else parameters[self.argument].default
        self.record.keep_for_head(self.name, pick(value, self.items) if self.items else value)


class CallHeads(RecordingHook):
    """Calls the heads when the network has run, and adds their logits to what it returned.

    Args:
        record: What the hooks share.
        names: Names of the heads.
        inputs: How many values each head reads in one call.
        keeping: Which heads keep their logits.
        *heads: The heads.
    """

    def __init__(
        self,
        record: CallRecord,
        names: Sequence[str],
        inputs: Sequence[int],
        keeping: Sequence[bool],
        *heads: Any,
    ) -> None:
        super().__init__(record, *heads)
        self.names, self.inputs, self.keeping = tuple(names), tuple(inputs), tuple(keeping)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output with the logits of each head that does not keep them."""
        recorded = self.record.end()
        logits = [
            self.logits(name, head, count, recorded)
            for name, head, count in zip(self.names, self.spliced, self.inputs, strict=True)
        ]
        named = zip(self.names, self.spliced, self.keeping, strict=True)
        return add_logits(output, [head if keeps else name for name, head, keeps in named], *logits)

    def logits(self, name: str, head: nn.Module, count: int, recorded: Mapping[str, Sequence[Any]]) -> Any:
        """The logits of one head: None where the forward did not pass its point, one for each pass else."""
        if head.training and torch.is_grad_enabled() and name + WITHOUT_GRADIENTS in recorded:
            raise SurgeryError(
                f"what the head {name!r} reads was computed without gradients, so its loss would not reach "
                "the network: in torch.no_grad(), or in a checkpoint that is reentrant",
                example="gradient_checkpointing_enable({'use_reentrant': False}); checkpoint(..., "
                "use_reentrant=False)",
            )
        keys = [name, *(f"{name}.{place}" for place in range(1, count))]
        found = [head(*row) for row in zip(*(recorded.get(key, []) for key in keys), strict=False)]
        return found[0] if len(found) == 1 else tuple(found) or None
