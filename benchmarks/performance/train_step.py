"""A training step of a spliced network beside the network itself and beside the same DANN written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from measuring import Call, interleaved, peak, ratio, verdict
from peers import Clone
from torch import Tensor, nn
from torch.nn import functional

import grl_surgery as gs

# network -> (arguments, where the reversal goes, the pooled feature, and what makes the logits of it)
NETWORKS: dict[str, tuple[dict[str, Any], str, str, Callable[[Any], nn.Module]]] = {
    "resnet50": ({}, "layer3", "global_pool", lambda net: net.fc),
    "vit_small_patch16_224": ({"img_size": 96}, "blocks.5", "fc_norm", lambda net: net.head),
    "convnext_tiny": ({}, "stages.2", "head.flatten", lambda net: net.head.fc),
}
BATCH, SIZE = 4, 96


class ByHand(nn.Module):
    """What one writes without this library: the feature, its logits, and the domain logits behind a GRL."""

    def __init__(
        self, net: Any, last: nn.Module, classifier: nn.Module, pool: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.net, self.last, self.classifier, self.pool = net, last, classifier, pool

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.pool(self.net.forward_features(images))
        return self.last(feature), self.classifier(Clone.apply(feature, 1.0))


def rows(rounds: int, device: str = "cpu") -> Iterator[dict[str, Any]]:
    for name in NETWORKS:
        yield _row(name, max(5, rounds // 3), device)


def _row(name: str, rounds: int, device: str) -> dict[str, Any]:
    arguments, inside, pooled, last_of = NETWORKS[name]
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, **arguments).to(device).train()
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=device)
    labels, domains = torch.arange(BATCH, device=device), torch.arange(BATCH, device=device) % 2
    spliced = gs.insert_grl(net, after=inside)
    dann = gs.attach_domain_head(net, pooled, example_inputs=images)
    by_hand = ByHand(net, last_of(net), copy.deepcopy(dann.domain.classifier), _pool(name, net))
    assert torch.equal(*(_output(m, images)[0] for m in (dann, by_hand)))
    steps = {
        "the network": _step(net, lambda out: functional.cross_entropy(out, labels)),
        "with a reversal inside": _step(spliced, lambda out: functional.cross_entropy(out, labels)),
        "DANN by hand": _step(by_hand, lambda out: _dann_loss(out, labels, domains)),
        "attach_domain_head": _step(dann, lambda out: _dann_loss(out, labels, domains)),
    }
    taken = interleaved(steps, rounds, slice_s=0.0, device=device)
    reversal = ratio(taken, "with a reversal inside", "the network")
    head = ratio(taken, "attach_domain_head", "DANN by hand")
    peaks = {}
    for step, call in steps.items():
        for model in (net, dann, by_hand):
            model.zero_grad(set_to_none=True)
        peaks[step] = peak(call)
    return {
        "case": f"{name}, {BATCH} images of {SIZE}x{SIZE}",
        "spliced_to_plain": reversal,
        "attached_to_by_hand": head,
        "peak_bytes": peaks,
        "milliseconds": {step: 1e3 * sorted(row)[len(row) // 2] for step, row in taken.items()},
        "goal": "at most 1.01; peak memory equal",
        "met": _verdict(reversal, head, peaks),
    }


def _verdict(reversal: Any, head: Any, peaks: dict[str, int]) -> str:
    # 64 KiB: the coefficient and the profiler's own; any tensor of the network is larger.
    more = max(
        peaks["with a reversal inside"] - peaks["the network"],
        peaks["attach_domain_head"] - peaks["DANN by hand"],
    )
    verdicts = [verdict(reversal, 1.01), verdict(head, 1.01), "yes" if more < 65536 else "no"]
    return max(verdicts, key=["yes", "within the noise", "no"].index)


def _pool(name: str, net: Any) -> Callable[[Tensor], Tensor]:
    return net.global_pool if name == "resnet50" else lambda x: net.forward_head(x, pre_logits=True)


def _output(model: nn.Module, images: Tensor) -> Any:
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        return twin(images)


def _dann_loss(output: tuple[Tensor, Tensor], labels: Tensor, domains: Tensor) -> Tensor:
    return functional.cross_entropy(output[0], labels) + functional.cross_entropy(output[1], domains)


def _step(model: nn.Module, loss: Callable[[Any], Tensor]) -> Call:
    """Forward, backward and update; a rate of 0, so that every step of every variant computes the same."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    device = next(model.parameters()).device
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).to(device)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model(images)).backward()
        optimizer.step()

    return run
