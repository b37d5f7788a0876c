"""Running a network on the user's own weights: what is written into them is copied first and put back."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grl_surgery.isolation.tensor_copy import clone
from grl_surgery.verify.compare import same_bits

__all__ = ["SharedWeights"]


class SharedWeights(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, what writes into one of these weights is preceded by a copy of them.

    Args:
        weights: Tensors by name. A leaf over the same memory is made of each; one whose memory cannot be
            watched, as that of a subclass of Tensor, is copied at once.

    Attributes:
        leaves: What to run a network on, by name.
    """

    supports_higher_order_operators = True

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = weights
        self.leaves: dict[str, torch.Tensor] = {}
        self._watched: dict[int, torch.UntypedStorage] = {}
        self._kept: dict[int, torch.UntypedStorage] = {}
        for name, value in weights.items():
            if type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided:
                leaf, storage = value.data, value.untyped_storage()
                self._watched[storage.data_ptr()] = storage
            else:
                leaf = clone(value)
            self.leaves[name] = leaf.requires_grad_(value.requires_grad)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        for place, name in _written_by(func):
            for tensor in _tensors(args[place] if place < len(args) else given.get(name)):
                self._keep(tensor)
        return func(*args, **given)

    def _keep(self, tensor: torch.Tensor) -> None:
        if tensor.layout == torch.strided and type(tensor) is not torch.Tensor:
            tensor = tensor.detach()
        address = _address(tensor)
        if address in self._watched and address not in self._kept:
            self._kept[address] = self._watched[address].clone()  # type: ignore[no-untyped-call]

    def written(self) -> dict[str, torch.Tensor]:
        """A copy of each weight that has other values than it had, by name."""
        return dict(self._written())

    def _written(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, leaf in self.leaves.items():
            value = self.weights[name]
            own = _address(value)
            if own not in self._watched or _address(leaf) != own:
                before: torch.Tensor = value.detach()
            elif own in self._kept:
                before = torch.empty(0, dtype=value.dtype, device=value.device).set_(
                    self._kept[own], value.storage_offset(), value.size(), value.stride()
                )
            else:
                continue
            if not same_bits(leaf.detach(), before):
                yield name, clone(leaf)

    def put_back(self) -> None:
        """Give the weights the values back that they had."""
        for address, values in self._kept.items():
            self._watched[address].copy_(values)
        self._kept.clear()


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # it has no memory of its own
        return 0


@functools.cache
def _written_by(func: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that an operation writes into."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return (value,)
    return (
        [item for item in value if isinstance(item, torch.Tensor)] if isinstance(value, (list, tuple)) else ()
    )
