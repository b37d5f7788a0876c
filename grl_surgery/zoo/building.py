"""Builds networks that have shapes and no values."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from grl_surgery.loading.model_zoo import load_model

__all__ = ["without_values"]


def without_values(source: str) -> nn.Module:
    """A network on the meta device, where the largest takes no memory.

    Example:
        >>> {parameter.device.type for parameter in without_values("torchvision/regnet_y_128gf").parameters()}
        {'meta'}

    Raises:
        SurgeryError: There is no such network.
    """
    try:
        with torch.device("meta"):
            return load_model(source).module
    except NotImplementedError:  # it computes its widths with tensors
        with _OnlyWeightsOnMeta():
            return load_model(source).module.to("meta")


class _OnlyWeightsOnMeta(TorchFunctionMode):
    """Makes what layers allocate on the meta device, and computes everything else."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (torch.empty, torch.ones, torch.zeros):
            given.setdefault("device", "meta")
            given["device"] = given["device"] or "meta"
        return func(*args, **given)
