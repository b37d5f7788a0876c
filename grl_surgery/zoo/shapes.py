"""What layers return on the meta device, in one step each.

torch works out the shape of a normalisation there by the whole formula, operation after operation: a batch
norm takes two milliseconds, and such formulas took a quarter of a sweep over every network.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["shapes_in_one_step"]


@contextlib.contextmanager
def shapes_in_one_step() -> Iterator[None]:
    """Let the meta device answer for normalisations, activations and initialisations without their formulas.

    What autograd records stays the same, because it records the layer before the device is asked.

    Example:
        >>> with shapes_in_one_step():
        ...     torch.nn.functional.gelu(torch.empty(2, 3, device="meta")).shape
        torch.Size([2, 3])
    """
    library_of: Any = torch.library.Library  # it has no types
    library = library_of("aten", "IMPL", "Meta")  # gone with the last reference to it
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, kernel in _KERNELS.items():
            library.impl(name, kernel)
    yield


def _like(input: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(input)


def _itself(input: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return input


def _batch_norm(
    input: torch.Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *_: Any
) -> Any:
    channels = input.shape[1] if training else 0
    return torch.empty_like(input), input.new_empty(channels), input.new_empty(channels)


def _layer_norm(input: torch.Tensor, normalized: list[int], *_: Any) -> Any:
    kept = [*input.shape[: -len(normalized)], *(1 for _ in normalized)]
    return input.new_empty(input.shape), input.new_empty(kept), input.new_empty(kept)


def _addmm(bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor, **_: Any) -> torch.Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


_KERNELS = {
    "addmm": _addmm,
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    **dict.fromkeys(("gelu", "relu", "hardswish", "hardsigmoid", "hardtanh", "mish", "elu"), _like),
    **dict.fromkeys(("leaky_relu", "softplus", "_safe_softmax"), _like),
    **dict.fromkeys(("clamp_", "normal_", "uniform_", "erfinv_"), _itself),
}
