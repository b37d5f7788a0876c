"""Looks into nested values: the containers that reversing, measuring and comparing agree on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import nn

__all__ = ["PLAIN", "dense", "keys_of", "part_of", "parts_of", "tensors_in"]

# Values that are compared as they are, and that have no parts.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)


def keys_of(value: Any) -> list[Any]:
    """List the names of a value's parts: keys of a mapping, places in a sequence, names of attributes.

    Of an object's attributes those count that are plain values, tensors, sequences, mappings or dataclasses:
    anything else would lead out of the value, as to the network that made it.

    Example:
        >>> keys_of({"a": 1}), keys_of((torch.ones(2), None)), keys_of(torch.ones(2))
        (['a'], [0, 1], [])
    """
    if isinstance(value, (torch.Tensor, *PLAIN)):
        return []
    if isinstance(value, Mapping):
        return list(value)
    if isinstance(value, (tuple, list)):
        return list(range(len(value)))
    if isinstance(value, (type, nn.Module)):
        return []
    if dataclasses.is_dataclass(value):
        return [entry.name for entry in dataclasses.fields(value)]
    return [name for name, item in getattr(value, "__dict__", {}).items() if _is_part(item)]


def _is_part(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, tuple, list, Mapping, *PLAIN)) or dataclasses.is_dataclass(value)


def part_of(value: Any, key: Any) -> Any:
    """The part of a value called ``key``, one of :func:`keys_of`."""
    return value[key] if isinstance(value, (Mapping, tuple, list)) else getattr(value, key)


def parts_of(value: Any, at: str = "output") -> Iterator[tuple[str, Any]]:
    """A value and everything in it, each container before its parts, with where it is.

    Example:
        >>> [at for at, _ in parts_of({"logits": [1, 2]})]
        ['output', "output['logits']", "output['logits'][0]", "output['logits'][1]"]
    """
    yield at, value
    by_index = isinstance(value, (Mapping, tuple, list))
    for key in keys_of(value):
        yield from parts_of(part_of(value, key), f"{at}[{key!r}]" if by_index else f"{at}.{key}")


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in a nested value, in a fixed order."""
    return [part for _, part in parts_of(value) if isinstance(part, torch.Tensor)]


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a nested tensor in one of the usual kind, which can be compared; any other as it is."""
    if not tensor.is_nested:
        return tensor
    return torch.cat([part.flatten() for part in tensor.unbind()])
