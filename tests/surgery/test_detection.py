"""Domain-adaptive detection: heads on torchvision's detectors, whose root nobody can trace."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import detection as torchvision_detection

import grl_surgery as gs

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import detection

COEFF = 0.25


def images(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, detection.SIZE, detection.SIZE, generator=generator) for _ in range(count)]


def targets(count=2):
    return [{"boxes": torch.tensor([[8.0, 8.0, 36.0, 36.0]]), "labels": torch.tensor([1])}] * count


def adapted():
    torch.manual_seed(0)
    network = detection.detector()
    m = detection.adaptive(network, COEFF)
    for head in (m.image_domain, m.box_domain):
        head.eval()  # without dropout, so that the oracle below draws the same random numbers
    return network, m


def total_loss(m, domain=0):
    torch.manual_seed(1)
    return sum(detection.losses(m, images(), targets(), domain).values())


class ByHand(nn.Module):
    """The same heads called by hand on what hooks see, reversed by a tensor hook."""

    def __init__(self, network, m):
        super().__init__()
        self.network, self.heads = network, (m.image_domain, m.box_domain)
        self.seen = {}
        for path in ("backbone.2", "roi_heads.box_head"):
            network.get_submodule(path).register_forward_hook(
                lambda module, args, output, path=path: self.seen.__setitem__(path, output.clone())
            )

    def forward(self, *args):
        output = self.network(*args)
        logits = []
        for head, path in zip(self.heads, ("backbone.2", "roi_heads.box_head"), strict=True):
            feature = self.seen[path]
            feature.register_hook(lambda gradient: -COEFF * gradient)
            logits.append(head.classifier(feature))
        return {**output, "image_domain_logits": logits[0], "box_domain_logits": logits[1]}


def test_an_adaptive_faster_rcnn_has_the_gradients_of_one_made_by_hand():
    network, m = adapted()
    leaves = dict(network.named_parameters())
    for domain in (0, 1):
        found = torch.autograd.grad(total_loss(m, domain), list(leaves.values()), allow_unused=True)
        right = torch.autograd.grad(
            total_loss(ByHand(network, m), domain), list(leaves.values()), allow_unused=True
        )
        for name, mine, wanted in zip(leaves, found, right, strict=True):
            assert (mine is None) == (wanted is None), name
            assert mine is None or torch.equal(mine, wanted), name


def test_one_step_moves_the_detector_and_both_heads():
    network, m = adapted()
    before = {name: p.detach().clone() for name, p in m.named_parameters()}
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    losses = detection.train_step(m, optimizer, (images(), targets()), images(seed=5))
    assert {"loss_classifier", "loss_objectness", "image_domain", "box_domain"} <= set(losses)
    moved = {name.split(".")[0] for name, p in m.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"backbone", "rpn", "roi_heads", "image_domain", "box_domain"}
    assert list(gs.strip(m).state_dict()) == list(network.state_dict())
    assert all(a is b for a, b in zip(gs.strip(m).parameters(), network.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_each_objective_is_proved(mode):
    network, m = adapted()
    inputs = (images(), targets()) if mode == "train" else (images(),)
    report = gs.verify_flip(m, reference=network, example_inputs=inputs, mode=mode)
    assert report.ok, report
    assert {row.objective for row in report.parameters} == {"output", "image_domain", "box_domain"}
    flipped = {row.name for row in report.parameters if row.measured == "flipped"}
    assert {name for name, _ in network.backbone.named_parameters("backbone")} <= flipped


def test_without_heads_a_detector_keeps_its_class_and_can_be_cut_anywhere():
    network = detection.detector()
    for point in ("backbone", "backbone.1", "rpn", "rpn.head", "roi_heads", "roi_heads.box_head.fc6"):
        spliced = gs.insert_grl(network, after=point)
        assert type(spliced) is torchvision_detection.FasterRCNN
        report = gs.verify_flip(spliced, network, (images(), targets()), mode="train")
        assert report.ok, f"{point}: {report}"
