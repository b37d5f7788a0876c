"""insert_grl beside torchvision's create_feature_extractor and torch.fx.symbolic_trace; and how it grows."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import timm
import torch
from measuring import Spread, interleaved, ratio, verdict
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import grl_surgery as gs

NETWORKS = {  # and the point: the end of the middle of the network
    "resnet50": "layer3",
    "vit_base_patch16_224": "blocks.5",
    "convnext_tiny": "stages.2",
    "efficientnet_b0": "blocks.4",
    "swin_tiny_patch4_window7_224": "layers.2",
    "densenet121": "features.denseblock3",
    "mobilenetv3_large_100": "blocks.4",
}
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
COUNTS = (1, 10, 25, 50, 100)


def rows(rounds: int, device: str = "cpu") -> Iterator[dict[str, Any]]:
    for name in NETWORKS:
        yield _beside_others(name, max(3, rounds // 3))
    yield _with_depth(rounds)
    yield _with_points(rounds)
    yield _with_points_inside_blocks(rounds)


def _on_meta(name: str) -> nn.Module:
    """Neither computes anything, so no memory is needed."""
    with torch.device("meta"):
        return timm.create_model(name)


def _beside_others(name: str, rounds: int) -> dict[str, Any]:
    model, point = _on_meta(name), NETWORKS[name]
    calls = {
        "insert_grl": functools.partial(gs.insert_grl, model, after=point),
        "create_feature_extractor": functools.partial(
            create_feature_extractor, model, [_last_node_in(model, point)], suppress_diff_warning=True
        ),
        "fx.symbolic_trace": functools.partial(_traced, model),
    }
    if not calls["fx.symbolic_trace"]():
        del calls["fx.symbolic_trace"]
    taken = interleaved(calls, rounds, slice_s=0.05)
    ratios = {other: ratio(taken, other, "insert_grl") for other in calls if other != "insert_grl"}
    return {
        "case": name,
        "times_as_long": ratios,
        "milliseconds": {call: 1e3 * statistics.median(row) for call, row in taken.items()},
        "goal": "create_feature_extractor takes at least ten times as long",
        "met": verdict(ratio(taken, "insert_grl", "create_feature_extractor"), 0.1),
    }


def _traced(model: nn.Module) -> fx.GraphModule | None:
    try:
        return fx.symbolic_trace(model)
    except Exception:  # what cannot be traced says so in many ways
        return None


def _last_node_in(model: nn.Module, path: str) -> str:
    """torchvision names the operations inside a block, so the block's output is its last operation."""
    names, _ = get_graph_node_names(model, suppress_diff_warning=True)
    return [name for name in names if name == path or name.startswith(f"{path}.")][-1]


def _with_depth(rounds: int) -> dict[str, Any]:
    models = {name: _on_meta(name) for name in DEPTHS}
    calls = {name: functools.partial(gs.insert_grl, model, after="layer3") for name, model in models.items()}
    taken = interleaved(calls, rounds, slice_s=0.02)
    sizes = {name: len(list(model.modules())) for name, model in models.items()}
    growth = ratio(taken, DEPTHS[-1], DEPTHS[0])
    return {
        "case": f"{DEPTHS[0]} ({sizes[DEPTHS[0]]} modules) to {DEPTHS[-1]} ({sizes[DEPTHS[-1]]})",
        "modules": sizes,
        "milliseconds": {name: 1e3 * statistics.median(row) for name, row in taken.items()},
        "growth": growth,
        "goal": "grows no faster than the number of modules",
        "met": "yes" if growth.median <= sizes[DEPTHS[-1]] / sizes[DEPTHS[0]] else "no",
    }


def _with_points(rounds: int) -> dict[str, Any]:
    """Points at one depth: densenet201 has 98 dense layers, all called by the blocks that hold them."""
    model = _on_meta("densenet201")
    layers = [name for name, module in model.named_modules() if type(module).__name__ == "DenseLayer"]
    layers += ["features.transition1", "features.transition2"]
    growth, milliseconds = _growth(model, layers, rounds)
    return {
        "case": "1 to 100 points in one call, at one depth (densenet201)",
        "milliseconds": milliseconds,
        "growth": growth,
        "goal": "100 points at most 3 times one",
        "met": "yes" if growth.median <= 3 else "no",
    }


def _with_points_inside_blocks(rounds: int) -> dict[str, Any]:
    """Two points inside each of 50 blocks: the blocks have to be traced as well."""
    model = _on_meta("resnet152")
    names = (name for name, _ in model.named_modules() if name.startswith("layer"))
    convs = [name for name in names if name.endswith(("conv1", "conv2"))]
    growth, milliseconds = _growth(model, convs, max(3, rounds // 3))
    everything = interleaved(
        {
            "insert_grl": functools.partial(gs.insert_grl, model, after=convs[:100]),
            "fx.symbolic_trace": functools.partial(fx.symbolic_trace, model),
        },
        max(3, rounds // 3),
        slice_s=0.02,
    )
    return {
        "case": "1 to 100 points in one call, inside 50 blocks (resnet152)",
        "milliseconds": milliseconds,
        "growth": growth,
        "to_symbolic_trace": ratio(everything, "insert_grl", "fx.symbolic_trace"),
        "goal": "100 points at most 3 times one",
        "met": "yes" if growth.median <= 3 else "no",
    }


def _growth(model: nn.Module, points: list[str], rounds: int) -> tuple[Spread, dict[int, float]]:
    middle = points[len(points) // 2 :][:1]
    chosen = {count: middle if count == 1 else points[:count] for count in COUNTS}
    assert len(chosen[100]) == 100
    calls = {
        str(count): functools.partial(gs.insert_grl, model, after=names) for count, names in chosen.items()
    }
    taken = interleaved(calls, rounds, slice_s=0.02)
    return ratio(taken, "100", "1"), {int(n): 1e3 * statistics.median(row) for n, row in taken.items()}
