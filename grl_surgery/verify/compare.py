"""Compares the outputs of two forwards: every bit, and the structure around the bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grl_surgery.isolation.pytrees import PLAIN, keys_of, parts_of

__all__ = ["OutputSnapshot", "difference", "same_bits", "snapshot"]


@dataclass(frozen=True)
class Container:
    """What a value is apart from its parts; for an array of numpy's, with its bytes."""

    kind: type
    keys: list[Any]
    content: Any = None


# From each place in a nested value to what is there: a tensor, a plain value, or a container.
OutputSnapshot = dict[str, Any]


def snapshot(value: Any) -> OutputSnapshot:
    """A nested value taken apart: its tensors are copies without a graph, and nothing else is kept alive."""
    found: OutputSnapshot = {}
    for at, part in parts_of(value):
        if isinstance(part, torch.Tensor) and part.is_nested:
            rows = part.detach().unbind()
            found[at] = Container(type(part), list(range(len(rows))))
            found.update((f"{at}[{place}]", row.clone()) for place, row in enumerate(rows))
        else:
            found[at] = _form(part)
    return found


def _form(part: Any) -> Any:
    if isinstance(part, torch.Tensor):
        return part.detach().clone()
    if isinstance(part, PLAIN):
        return part
    if hasattr(part, "tobytes"):
        return Container(type(part), [part.dtype, part.shape], part.tobytes())
    return Container(type(part), keys_of(part))


def difference(expected: OutputSnapshot, actual: OutputSnapshot) -> str:
    """Where two values differ first, and how, in words; empty if they are the same.

    Example:
        >>> difference(snapshot((3, None)), snapshot((3, "a")))
        "output[1] is 'a', and None in the reference"
    """
    for at, wanted in expected.items():  # each container before its parts, so that the places are the same
        found = actual[at]
        if _kind(wanted) is not _kind(found) or _in_words(wanted) != _in_words(found):
            return f"{at} is {_in_words(found)[:80]}, and {_in_words(wanted)[:80]} in the reference"
        if not _same_content(wanted, found):
            return f"{at} has other values than in the reference"
    return ""


def _kind(part: Any) -> type:
    kind = part.kind if isinstance(part, Container) else type(part)
    return torch.Tensor if kind is nn.Parameter else kind


def _in_words(part: Any) -> str:
    """All of a part but the content of a tensor; nan is like nan, and -0.0 is not like 0.0."""
    name = _kind(part).__name__
    if isinstance(part, torch.Tensor):
        shape = "x".join(map(str, part.shape)) or "0-d"
        return f"{name}({shape}, {str(part.dtype).removeprefix('torch.')}, {part.device})"
    if isinstance(part, Container):
        in_order = issubclass(part.kind, (tuple, list))
        return f"{name}({len(part.keys) if in_order else ', '.join(map(repr, part.keys))})"
    return repr(part)


def _same_content(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return same_bits(first, second)
    return not isinstance(first, Container) or first.content == second.content


# ------------------------------------------------------------------------------------------------ bits

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal bit by bit, so that nan equals itself and -0.0 differs from 0.0."""
    alike = first.shape == second.shape and first.dtype == second.dtype and first.device == second.device
    if not alike or first.layout != second.layout:
        return False
    if first.layout != torch.strided:
        pairs = zip(_dense_parts(first), _dense_parts(second), strict=True)
        return all(same_bits(one, other) for one, other in pairs)
    return torch.equal(_as_integers(first), _as_integers(second))


def _dense_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Where the entries of a sparse tensor are, and which."""
    if tensor.is_mkldnn:
        return (tensor.to_dense(),)
    entries = tensor.to_sparse().coalesce()
    return entries.indices(), entries.values()


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    numbers = tensor.int_repr() if tensor.is_quantized else tensor.resolve_conj().resolve_neg()
    plain = numbers.contiguous().reshape(-1)
    return plain.view(_INTEGERS.get(plain.element_size(), torch.int64))
