"""Time of insert_grl beside torchvision's create_feature_extractor, as ratios of interleaved runs.

    python benchmarks/surgery_speed.py [--rounds 7] [--json FILE]

Both are given the same network (on the meta device: neither computes anything) and the same point, in turn.
In each round insert_grl is called as often as takes about as long as one call of the other, so that both
meet the same noise and cold caches; the ratio is taken round by round, the median reported with its range.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

import grl_surgery as gs

# network -> (our point, the same one in torchvision's names)
NETWORKS = {
    "resnet50": ("layer3", "layer3"),
    "vit_base_patch16_224": ("blocks.5", "blocks.5"),
    "convnext_tiny": ("stages.2", "stages.2"),
    "efficientnet_b0": ("blocks.4", "blocks.4"),
    "swin_tiny_patch4_window7_224": ("layers.2", "layers.2"),
    "densenet121": ("features.denseblock3", "features.denseblock3"),
    "mobilenetv3_large_100": ("blocks.4", "blocks.4"),
}


def seconds(call: Callable[[], Any], times: int = 1) -> float:
    """Mean time of a call, without garbage collection, as timeit measures."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times
    finally:
        gc.enable()


def measure(name: str, rounds: int) -> dict[str, Any]:
    with torch.device("meta"):
        model = timm.create_model(name)
    ours, theirs = NETWORKS[name]
    node = last_node_in(model, theirs)
    insert = functools.partial(gs.insert_grl, model, after=ours)
    extract = functools.partial(create_feature_extractor, model, [node], suppress_diff_warning=True)
    times = max(1, round(seconds(extract) / seconds(insert, 3)))
    pairs = [(seconds(insert, times), seconds(extract)) for _ in range(rounds)]
    ratios = [b / a for a, b in pairs]
    return {
        "network": name,
        "calls_of_insert_grl_in_a_round": times,
        "insert_grl_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "create_feature_extractor_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def last_node_in(model: torch.nn.Module, path: str) -> str:
    """torchvision names the operations inside a block, so the block's output is its last operation."""
    names, _ = torchvision.models.feature_extraction.get_graph_node_names(model, suppress_diff_warning=True)
    return [name for name in names if name == path or name.startswith(f"{path}.")][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    print(f"{'network':32}{'insert_grl':>12}{'extractor':>12}{'ratio':>8}   range")
    for name in NETWORKS:
        row = measure(name, options.rounds)
        rows.append(row)
        print(
            f"{name:32}{row['insert_grl_ms']:9.1f} ms{row['create_feature_extractor_ms']:9.1f} ms"
            f"{row['ratio']:8.1f}   {row['lowest']:.1f} to {row['highest']:.1f}"
        )
    if options.json:
        versions = {package.__name__: package.__version__ for package in (torch, torchvision, timm)}
        options.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
