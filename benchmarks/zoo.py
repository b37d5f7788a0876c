"""Surgery on every network by name: splice at the first, a middle and the last stage, and strip again.

    python benchmarks/zoo.py [--json FILE] [--only PATTERN]

Networks are built on the meta device, so this is structural: it shows what can be traced, cut, and put back,
with the original's keys. Gradients are proved on real tensors in tests/test_networks.py.
"""

from __future__ import annotations

import argparse
import fnmatch
import inspect
import json
import logging
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

import grl_surgery as gs


def build(source: str) -> nn.Module:
    library, _, name = source.partition("/")
    with torch.device("meta"):
        if library == "timm":
            return timm.create_model(name)
        builder = torchvision.models.get_model_builder(name)
        has_backbone = "weights_backbone" in inspect.signature(builder).parameters
        return builder(weights=None, **({"weights_backbone": None} if has_backbone else {}))


def stages(model: nn.Module) -> list[str]:
    """First, middle and last module call of the network's own forward; of its children, if that is opaque."""
    try:
        calls = [node.name for node in gs.graph(model).nodes if node.op == "call_module"]
    except gs.TracingError:
        calls = [f"{a}.{b}" for a, child in model.named_children() for b, _ in child.named_children()]
    return list(dict.fromkeys([calls[0], calls[len(calls) // 2], calls[-1]]))


def examine(source: str) -> dict[str, Any]:
    row: dict[str, Any] = {"network": source, "root": "traced", "spliced": 0, "failed": {}}
    try:
        model = build(source)
    except Exception as error:
        return {**row, "root": "not built", "failed": {"": f"{type(error).__name__}: {error}"[:200]}}
    keys = list(model.state_dict())
    for mode in (True, False):
        model.train(mode)
        for point in stages(model):
            try:
                start = time.perf_counter()
                spliced = gs.insert_grl(model, after=point)
                row.setdefault("ms", []).append(1e3 * (time.perf_counter() - start))
                assert len(gs.reversals(spliced)) == 1
                assert list(spliced.state_dict()) == keys
                assert list(gs.strip(spliced).state_dict()) == keys
            except Exception as error:
                row["failed"][f"{point} ({'train' if mode else 'eval'})"] = str(error).split("\n")[0][:200]
            else:
                row["spliced"] += 1
                row["root"] = "traced" if isinstance(spliced, torch.fx.GraphModule) else "inside"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="*", help="names to examine, such as 'timm/vit_*'")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    names = [f"timm/{n}" for n in timm.list_models()]
    names += [f"torchvision/{n}" for n in torchvision.models.list_models()]
    rows = []
    for name in fnmatch.filter(names, options.only):
        rows.append(examine(name))
        if rows[-1]["failed"]:
            print(name, rows[-1]["failed"], flush=True)
    times = sorted(ms for row in rows for ms in row.pop("ms", []))
    summary = {
        "networks": len(rows),
        "without a failure": sum(not row["failed"] for row in rows),
        "root": dict(Counter(row["root"] for row in rows)),
        "splices": sum(row["spliced"] for row in rows),
        "median ms": round(times[len(times) // 2], 2) if times else None,
        "versions": {p.__name__: p.__version__ for p in (torch, torchvision, timm)},
    }
    print(json.dumps(summary, indent=1))  # a failure names the point and the reason
    if options.json:
        failed = [row for row in rows if row["failed"]]
        options.json.write_text(json.dumps({"summary": summary, "failed": failed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
