"""Stores tensors as plain numbers, and finds those that a traced forward reads beside parameters."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from grl_surgery.errors import ExportError
from grl_surgery.io.json_schema import each, field
from grl_surgery.surgery.spliced_module import SplicedModule

__all__ = ["check_gradients", "excerpt", "is_alike", "not_in_the_state", "plain_tensor", "read_tensors"]


def plain_tensor(name: str, value: Any) -> torch.Tensor:
    """A tensor as its numbers in order, in the memory of the host.

    Raises:
        ExportError: It has no such numbers: it is sparse, quantized or on the meta device, or no tensor.
    """
    try:
        if value.is_quantized:
            raise TypeError("quantized")
        plain: torch.Tensor = value.detach().cpu().resolve_conj().resolve_neg()
        return plain.contiguous()
    except Exception as error:
        raise ExportError(
            f"{name!r} is {_described(value)}, and a checkpoint holds plain tensors only",
            example="export(m, 'm.pt2')",
        ) from error


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"of type {type(value).__name__}"
    return f"a {type(value).__name__} of {value.dtype}, layout {value.layout}, on device {value.device}"


_LENGTH = 64


def excerpt(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """The shape and at most 64 of the numbers, as plain data."""
    plain = plain_tensor(name, tensor)
    flat = (torch.view_as_real(plain) if plain.is_complex() else plain).double().reshape(-1)
    return {"shape": list(tensor.shape), "values": flat[:: len(flat) // _LENGTH + 1].tolist()}


def is_alike(tensor: torch.Tensor, written: Mapping[str, Any]) -> bool:
    """Whether a tensor may be the one of an excerpt: a sine has another last bit on another machine."""
    here = excerpt("", tensor)
    values = each(field(written, "values", list), float, "'values'")
    if here["shape"] != field(written, "shape", list) or len(here["values"]) != len(values):
        return False
    found, wanted = (torch.tensor(numbers, dtype=torch.float64) for numbers in (here["values"], values))
    return torch.allclose(found, wanted, rtol=1e-3, atol=1e-5, equal_nan=True)


# ------------------------------------------------------------------------------- what a traced forward reads


def read_tensors(part: SplicedModule) -> dict[str, torch.Tensor]:
    """Return the tensors that the graphs read beside parameters and their own constants, by path."""
    traced = part.grl_traced
    paths = {str(node.target) for graph in traced.graphs.values() for node in graph.nodes if node.op == _READ}
    held = ((path, operator.attrgetter(path)(part)) for path in sorted(paths - set(traced.constants)))
    return {path: value for path, value in held if _is_plain(value)}


_READ = "get_attr"


def _is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)


def not_in_the_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those of a whole network that its state_dict does not hold."""
    kept = model.state_dict().keys()
    return {name: tensor for name, tensor in _all(model) if name not in kept}


def check_gradients(model: nn.Module) -> None:
    """Refuse a forward that reads a tensor with a gradient which nothing that is written would keep.

    Raises:
        ExportError: It is no parameter, or was computed from one.
    """
    for name, tensor in _all(model):
        if tensor.grad_fn is not None:
            raise ExportError(
                f"the forward reads {name!r}, which was computed once, from what requires a gradient; no "
                "file keeps how",
                example=f"compute it in the forward, or keep it without: self.{_last(name)} = value.detach()",
            )
        if tensor.requires_grad:
            raise ExportError(
                f"the forward reads {name!r}, which requires a gradient and is no parameter; no file keeps "
                "that",
                example=f"self.{_last(name)} = nn.Parameter(...)",
            )


def _all(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, part in model.named_modules():
        if isinstance(part, SplicedModule):
            for name, tensor in read_tensors(part).items():
                yield f"{path}.{name}" if path else name, tensor


def _last(name: str) -> str:
    return name.rpartition(".")[2]
