"""verify_flip beside one training step of the same network on the same inputs."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import timm
import torch
from measuring import Call, interleaved, ratio, verdict
from torch import nn

import grl_surgery as gs

NETWORKS: dict[str, tuple[dict[str, Any], str]] = {
    "resnet50": ({}, "layer3"),
    "vit_small_patch16_224": ({"img_size": 96}, "blocks.5"),
    "convnext_tiny": ({}, "stages.2"),
}
BATCH, SIZE = 4, 96


def rows(rounds: int, device: str = "cpu") -> Iterator[dict[str, Any]]:
    for name, (arguments, point) in NETWORKS.items():
        torch.manual_seed(0)
        net = timm.create_model(name, **arguments).to(device).train()
        images = torch.randn(BATCH, 3, SIZE, SIZE, device=device)
        spliced = gs.insert_grl(net, after=point)
        assert gs.verify_flip(spliced, net, images).ok
        calls = {
            "train step": _step(spliced, images),
            "verify_flip": functools.partial(gs.verify_flip, spliced, net, images),
        }
        taken = interleaved(calls, max(3, rounds // 6), slice_s=0.0, device=device)
        steps = ratio(taken, "verify_flip", "train step")
        yield {
            "case": f"{name}, {BATCH} images of {SIZE}x{SIZE}",
            "steps": steps,
            "milliseconds": {call: 1e3 * statistics.median(row) for call, row in taken.items()},
            "goal": "at most 3 steps",
            "met": verdict(steps, 3.0),
        }


def _step(model: nn.Module, images: torch.Tensor) -> Call:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(images).square().mean().backward()
        optimizer.step()

    return run
