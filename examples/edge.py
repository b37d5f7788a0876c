"""Reversal on one edge: a block's residual branch gets the reversed gradient, its shortcut the plain one.

In a residual network, one use of a value is reversed and the other is not. The report says which parameters
are flipped, mixed or unchanged. Then the network takes a few steps of training.

    python examples/edge.py
    python examples/edge.py --network resnet50
"""

from __future__ import annotations

import argparse
from collections import Counter

import timm
import torch
from torch.nn import functional as F

import grl_surgery as gs


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="resnet18", help="a residual network of timm")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = timm.create_model(args.network, num_classes=10)
    branch = ("layer2", "layer3.0.conv1")
    m = gs.insert_grl(model, edge=branch, coeff=1.0)
    report = gs.verify_flip(m, reference=model, example_inputs=torch.randn(2, 3, 64, 64)).raise_if_failed()
    print(report.verdict)
    parts: dict[str, Counter[str]] = {}
    for row in report.parameters:
        parts.setdefault(row.name.split(".")[0], Counter())[row.measured] += 1
    for part, kinds in parts.items():
        print(f"{part:<8}", ", ".join(f"{count} {kind}" for kind, count in kinds.items()))

    optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    for step in range(args.steps):
        loss = F.cross_entropy(m(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}  loss {loss.item():.4f}")
    print("without the reversal again:", type(gs.strip(m)).__name__)


if __name__ == "__main__":
    main()
