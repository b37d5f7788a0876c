"""Inputs for a network of the zoo: what its library declares, or as small as it accepts."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from grl_surgery.errors import SurgeryError
from grl_surgery.loading.inputs import example_inputs
from grl_surgery.loading.model_zoo import load_model
from grl_surgery.verify.experiment import private_copy

__all__ = ["declared_inputs", "on_smallest_inputs"]

# torchvision's detection models scale every image to 800 pixels, look at thousands of boxes, and return none
# of which they are less than 5% sure, as all are before training: no gradient would flow in eval mode.
_PIXELS, _BOXES = 96, 40
# Pixels to try, besides the network's own size. Where nothing is left of an image, nothing is proved.
_SIZES = (64, 96, 112, 128, 160, 192, 224, 256)


def declared_inputs(model: nn.Module) -> tuple[Any, ...]:
    """What the library itself declares, for a batch of two; a detection model is made lighter.

    Raises:
        SurgeryError: Nothing says what the network takes.
    """
    _make_light(model)
    inputs = example_inputs(model)
    if not isinstance(inputs, tuple):
        raise SurgeryError(f"it is not known what inputs {type(model).__name__} takes")
    return inputs


def _make_light(model: Any) -> None:
    """Let a detection model scale images to few pixels, look at few boxes, and return all of them."""
    transform, rpn = getattr(model, "transform", None), getattr(model, "rpn", None)
    if transform is None:
        return
    if not getattr(transform, "fixed_size", None):
        transform.min_size, transform.max_size = (_PIXELS,), 2 * _PIXELS
    if rpn is not None:
        rpn._post_nms_top_n = dict.fromkeys(rpn._post_nms_top_n, _BOXES)
    holder = model if rpn is None else model.roi_heads
    holder.score_thresh = 0.0
    if hasattr(model, "topk_candidates"):
        model.topk_candidates = _BOXES


def on_smallest_inputs(source: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A network of the zoo, and the smallest square images on which it runs in train and in eval mode.

    A network that takes images of one size only is built for another size, where it can be.

    Raises:
        SurgeryError: There is no such network, or nothing says what it takes.
    """
    model = load_model(source).module
    inputs = declared_inputs(model)
    if not all(isinstance(value, torch.Tensor) and value.dim() in (4, 5) for value in inputs):
        return model, inputs
    sizes = [size for size in _SIZES if size < inputs[0].shape[-1]]
    for size in sizes:
        smaller = _cropped(inputs, size)
        if _runs(model, smaller):
            return model, smaller
    for size in sizes if _is_of_one_size(model) else ():
        smaller = _cropped(inputs, size)
        for built in _built_for(source, size):
            if _runs(built, smaller):
                return built, smaller
    return model, inputs


def _is_of_one_size(model: nn.Module) -> bool:
    """Whether its library has such networks: detection models scale the images that they are given."""
    return not hasattr(model, "transform")


def _cropped(inputs: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    return tuple(value[..., :size, :size].contiguous() for value in inputs)


def _built_for(source: str, size: int) -> Iterator[nn.Module]:
    """The network for images of that size, if its builder takes a size, under one name or another."""
    library, _, name = source.partition("/")
    build = importlib.import_module("timm").create_model
    words: dict[str, Any] = {"img_size": size}
    if library == "torchvision":
        build = importlib.import_module("torchvision.models").get_model
        words = {"image_size": size, "input_size": (size, size), "spatial_size": (size, size)}
    for word, value in words.items():
        with contextlib.suppress(Exception):  # it takes no size, or not this one
            yield build(name, **{word: value})


def _runs(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    copied = private_copy(model, {})
    try:
        with torch.no_grad():
            for mode in (True, False):
                copied.train(mode)(*inputs)
    except Exception:
        return False
    return True
