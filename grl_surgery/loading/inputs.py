"""Finds an input that a network accepts, from what the network or its library says about itself."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from grl_surgery.errors import SurgeryError, one_line

__all__ = ["Inputs", "as_arguments", "as_inputs", "does_not_run", "example_inputs"]

Inputs = tuple[Any, ...] | dict[str, Any]
"""Arguments of forward: by position, or by name."""
RUNNING_INPUTS = "example_inputs=x, where model(x) runs"

# Batch norm in train mode needs more than one value per channel.
BATCH = 2


def example_inputs(model: nn.Module) -> Inputs | None:
    """Arguments that ``model`` accepts, the same at every call; None where nothing says which.

    An attribute (or method without arguments) ``example_inputs`` of the model is used as it is. Otherwise
    the shapes come from timm's or torchvision's metadata, for a batch of two, on the device and with the
    dtype of the model's parameters; a network of transformers has ``dummy_inputs``. The global random state
    is not touched.

    Example:
        >>> import timm
        >>> [tuple(x.shape) for x in example_inputs(timm.create_model("test_vit"))]
        [(2, 3, 160, 160)]

    Args:
        model: A network of timm or torchvision, or one that has the attribute ``example_inputs``.

    Returns:
        A tuple to call the model with, or a dict by name: tensors, or what torchvision's detection models
        take (a list of images and a list of targets, which train mode needs).

    Raises:
        SurgeryError: The model's own ``example_inputs`` is not a tensor, tuple, list or mapping.
    """
    own = getattr(model, "example_inputs", None)
    if own is not None:
        return as_inputs(own() if callable(own) else own)
    size = _timm_size(model)
    if size is not None:
        return _images(model, size)
    return _torchvision_inputs(model) or _dummy_inputs(model)


def _dummy_inputs(model: nn.Module) -> Inputs | None:
    """The dummy inputs of a network of transformers, where its forward has arguments of these names."""
    dummy = getattr(model, "dummy_inputs", None)
    if not isinstance(dummy, Mapping) or not all(isinstance(x, torch.Tensor) for x in dummy.values()):
        return None
    if not dummy.keys() <= inspect.signature(model.forward).parameters.keys():
        return None
    parameter = next(model.parameters(), torch.empty(0))
    return {name: tensor.to(parameter.device) for name, tensor in dummy.items()}


def as_inputs(value: object) -> Inputs:
    """One tensor, or several in a tuple or list, as the tuple to call a model with; in a mapping, by name.

    Example:
        >>> len(as_inputs(torch.zeros(2, 3)))
        1

    Raises:
        SurgeryError: ``value`` is something else.
    """
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, (tuple, list)):
        return tuple(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise SurgeryError(
        f"example inputs are a tensor, a tuple of them or a dict by name, not {type(value).__name__}",
        example="model.example_inputs = (torch.randn(2, 3, 224, 224),)",
    )


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as arguments of forward, by position and by name.

    Example:
        >>> as_arguments({"x": 1}), as_arguments((1, 2)), as_arguments([1, 2])
        (((), {'x': 1}), ((1, 2), {}), (([1, 2],), {}))
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def does_not_run(what: str, inputs: Any, error: Exception) -> str:
    """What to say where a forward fails on example inputs.

    Example:
        >>> does_not_run("this Net", torch.zeros(2, 3), RuntimeError("shapes cannot be multiplied"))
        'this Net does not run on inputs of 2x3: RuntimeError: shapes cannot be multiplied'
    """
    args, kwargs = as_arguments(inputs)
    sizes = ", ".join(map(_size, (*args, *kwargs.values()))) or "nothing"
    return f"{what} does not run on inputs of {sizes}: {one_line(error)}"


def _size(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_size, value))}]"
    if not isinstance(value, torch.Tensor):
        return reprlib.repr(value)
    if value.is_nested:
        return f"{value.size(0)} nested"
    return "x".join(map(str, value.shape)) or "one number"


def _timm_size(model: nn.Module) -> tuple[int, ...] | None:
    """(C, H, W) of a timm model as it was built, which may differ from what its weights were trained at."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, Mapping) or not config.get("input_size"):
        return None
    channels, *size = config["input_size"]
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return (
        getattr(model, "in_chans", None) or _channels_read(model, config) or channels,
        *(built_for or size),
    )


def _channels_read(model: nn.Module, config: Mapping[str, Any]) -> int | None:
    """The channels that the first layer reads: an older timm says them nowhere else."""
    return getattr(dict(model.named_modules()).get(str(config.get("first_conv"))), "in_channels", None)


def _torchvision_inputs(model: nn.Module) -> tuple[Any, ...] | None:
    """By the model's class: torchvision keeps its metadata with the weights, not with the model."""
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    package, _, kind = name.rpartition(".")
    if not package.startswith("torchvision.models."):
        return None
    if package.startswith("torchvision.models.detection."):
        return _detection(model)
    if kind == "VisionTransformer":
        size: Any = model.image_size
        return _images(model, (3, size, size))
    if kind == "RAFT":
        return _images(model, (3, 128, 128), count=2)
    return _images(model, _TORCHVISION_SIZES.get(kind, (3, 224, 224)))


# Segmentation networks are trained at 520 x 520 and accept any size: the default keeps them fast.
_TORCHVISION_SIZES: dict[str, tuple[int, ...]] = {
    "Inception3": (3, 299, 299),
    "QuantizableInception3": (3, 299, 299),
    "VideoResNet": (3, 8, 112, 112),
    "SwinTransformer3d": (3, 8, 112, 112),
    "S3D": (3, 16, 224, 224),
    "MViT": (3, 16, 224, 224),
}


def _images(model: nn.Module, size: tuple[int, ...], *, count: int = 1) -> tuple[torch.Tensor, ...]:
    generator = _generator()
    drawn = [torch.randn(BATCH, *size, generator=generator, device="cpu") for _ in range(count)]
    return tuple(_like_parameters(model, value) for value in drawn)


def _detection(model: nn.Module) -> tuple[Any, ...]:
    generator = _generator()
    images = [
        _like_parameters(model, torch.rand(3, 224, 224, generator=generator, device="cpu"))
        for _ in range(BATCH)
    ]
    return images, [_target(model, image) for image in images]


def _target(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """One labelled box, with a mask and keypoints where the model learns them."""
    target = {
        "boxes": image.new_tensor([[40.0, 30.0, 180.0, 200.0]]),
        "labels": torch.ones(1, dtype=torch.int64, device=image.device),
    }
    heads = getattr(model, "roi_heads", None)
    if getattr(heads, "mask_head", None) is not None:
        target["masks"] = torch.ones(1, *image.shape[1:], dtype=torch.uint8, device=image.device)
    if getattr(heads, "keypoint_head", None) is not None:
        target["keypoints"] = image.new_tensor([[[100.0, 100.0, 1.0]] * 17])
    return target


def _generator() -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(0)


def _like_parameters(model: nn.Module, value: torch.Tensor) -> torch.Tensor:
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    return value if weight is None else value.to(weight.device, weight.dtype)
