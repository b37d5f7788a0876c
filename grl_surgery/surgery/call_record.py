"""The record that the hooks of a network share during a call, and the children that its forward sees."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from grl_surgery.compat import is_fx_symbolic_tracing
from grl_surgery.errors import SurgeryError
from grl_surgery.isolation.pytrees import tensors_in
from grl_surgery.nn.nested_reversal import reverse_nested

__all__ = ["WITHOUT_GRADIENTS", "CallRecord", "ChildrenOfNetwork"]


class CallRecord:
    """Carries values between the hooks of one network during one call of it, kept apart by thread."""

    def __init__(self) -> None:
        self.calls: dict[int, dict[str, list[Any]]] = {}
        self.running: dict[int, list[Any]] = {}
        self.passed: dict[int, list[_Reversed]] = {}

    def values(self) -> dict[str, list[Any]]:
        """Return what the call in this thread has recorded so far, by name."""
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
            if not torch.is_grad_enabled():
                self.values()[name + WITHOUT_GRADIENTS] = []

    def reversed(self, layer: nn.Module, value: Any, items: tuple[Any, ...] = (), held: Any = ()) -> Any:
        """A value with the gradients of its tensors reversed, each noted until the call is through.

        Args:
            layer: The reversal.
            value: Nested; what is no tensor of floating point numbers passes as it is.
            items: Which item of it is meant; all by default.
            held: What the forward around holds besides, and may read afterwards.
        """
        if isinstance(value, fx.Proxy) or not self.is_open():
            return reverse_nested(layer, value, items)
        is_eager = not torch.compiler.is_compiling()
        others = {_memory(tensor) for tensor in tensors_in(held)} if is_eager else set()
        passed = self.passed.setdefault(_thread(), [])

        def reverse(tensor: Any) -> Any:
            after = layer(tensor)
            for remembered in self.values().values():  # an edge goes on behind a reversal of the same value
                if any(known is tensor for known in remembered):
                    remembered.append(after)
            if is_eager and isinstance(after, torch.Tensor) and after.grad_fn is not None:
                passed.append(_Reversed.of(layer, tensor, after, _memory(tensor) in others))
            return after

        return reverse_nested(reverse, value, items)

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
            return self.reversed(layer, value, held=value)

        new_args = tuple(changed(value, str(place)) for place, value in enumerate(args))
        return (new_args, {key: changed(value, key) for key, value in kwargs.items()}), found

    def forwards(self) -> list[Any]:
        """Return the modes that count the forwards running in this thread, the innermost last."""
        return self.running.setdefault(_thread(), [])

    def begin(self) -> None:
        """A call of the network begins."""
        self.calls[_thread()] = {}
        self.passed.pop(_thread(), None)

    def is_open(self) -> bool:
        """Whether a call of the network runs in this thread."""
        return _thread() in self.calls

    def end(self) -> dict[str, list[Any]]:
        """The call is through; returns what it recorded, and forgets it.

        Raises:
            SurgeryError: What was reversed has been overwritten behind the reversal's back.
        """
        for reversed_value in self.passed.pop(_thread(), []):
            reversed_value.refuse_lost_writes()
        return self.calls.pop(_thread(), {})

    def of_copy(self, made: dict[int, Any]) -> CallRecord:
        """The one record that all hooks of a copy of the network share."""
        twin: CallRecord = made.setdefault(id(self), CallRecord())
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"calls": {}, "running": {}, "passed": {}}  # a copy is not being called


class _Reversed(NamedTuple):
    """A tensor before and after its reversal, which lie in one memory, and where autograd had them then."""

    layer: nn.Module
    before: torch.Tensor
    after: torch.Tensor
    made_before: Any
    made_after: Any
    is_held: bool

    @classmethod
    def of(cls, layer: nn.Module, before: torch.Tensor, after: torch.Tensor, is_held: bool) -> _Reversed:
        """As they are now."""
        return cls(layer, before, after, _whole(before).grad_fn, after.grad_fn, is_held)

    def refuse_lost_writes(self) -> None:
        """Refuse a write on one side of the reversal that is read on the other, where autograd misses it.

        Raises:
            SurgeryError: There may have been one.
        """
        from_before = _whole(self.before).grad_fn is not self.made_before
        from_after = self.is_held and self.after.grad_fn is not self.made_after
        if _memory(self.before) == _memory(self.after) and (from_before or from_after):
            raise SurgeryError(
                "a reversed value was overwritten in place, and the forward holds the same memory from "
                "before the reversal, where the gradient of the write would be lost",
                example="insert_grl(model, after=...), where the value is made",
            )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that a view is a part of."""
    return tensor if tensor._base is None else tensor._base


def _memory(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's memory; a number of its own where that cannot be told."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


WITHOUT_GRADIENTS = " without gradients"


class ChildrenOfNetwork(dict[str, Any]):
    """The children of a network; its own forward sees only those that it had before surgery.

    A forward may go through all its children, as that of ``nn.Sequential`` does, or through all parameters.

    Args:
        children: What the network had.
        spliced: The reversals and heads, by name.
        record: Tells whether the network's forward runs.

    Attributes:
        needs_call: Whether the network is another one for who runs its forward past its hooks.
    """

    needs_call = False

    def __init__(
        self, children: Mapping[str, Any], spliced: Mapping[str, nn.Module], record: CallRecord
    ) -> None:
        super().__init__({**children, **spliced})
        self.spliced, self.record = frozenset(spliced), record

    def _seen(self) -> dict[str, Any]:
        hidden = self.spliced if self.record.is_open() else ()
        return {name: part for name, part in dict.items(self) if name not in hidden}

    def __getitem__(self, name: str) -> Any:
        """One module.

        Raises:
            SurgeryError: torch.fx traces the forward, past the hooks of the network itself.
        """
        if self.needs_call and is_fx_symbolic_tracing() and not self.record.is_open():
            raise SurgeryError(
                f"torch.fx calls the forward of this network and not the network, past {min(self.spliced)!r}",
                example="torch.export.export(m, inputs); or grl_surgery.graph(m)",
            )
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen())

    def __len__(self) -> int:
        return len(self._seen())

    def keys(self) -> Any:
        """Names."""
        return self._seen().keys()

    def values(self) -> Any:
        """Modules."""
        return self._seen().values()

    def items(self) -> Any:
        """Names and modules."""
        return self._seen().items()

    def __reduce__(self) -> Any:
        return dict.__new__, (type(self),), self.__dict__, None, iter(dict.items(self))


def _thread() -> int:
    # A compiled forward runs in the thread that compiles it, and torch.compile cannot ask which that is.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
