"""Unsupervised domain adaptation of a CNN in one page: DANN (Ganin et al. 2016), by surgery from outside.

The source is digits with labels, the target digits blended into photographs, without labels. The same network
is trained without and with a domain head. Target labels are used only for the accuracy printed at the end.
This is the loop in its shortest form. So few steps from scratch adapt nothing yet. examples/train_dann.py has
a pretrained backbone and everything else that a real run needs.

    python examples/cnn.py
    python examples/cnn.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from digits import Domains, Examples, load_domains
from torch import Tensor, nn
from torch.nn import functional as F

import grl_surgery as gs


class Network(nn.Module):
    """A small CNN without batch norm, whose statistics would mix both domains."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 48, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.flatten = nn.Flatten()
        self.classify = nn.Sequential(nn.Linear(768, 100), nn.ReLU(), nn.Linear(100, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, 10) of images (B, 3, 28, 28)."""
        return self.classify(self.flatten(self.features(images)))


def train(
    network: nn.Module, domains: Domains, losses: Callable[..., Tensor], steps: int, coeff: float
) -> None:
    """Train in place; ``losses(output, labels, of_domain)`` says what is minimised."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    # The learning rate falls to a twentieth, so that the adversarial game comes to rest.
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    schedule = (
        gs.CoefficientScheduler(network, gs.schedules.dann(hi=coeff), steps)
        if gs.reversals(network)
        else None
    )
    of_domain = torch.arange(64) // 32
    for _ in range(steps):
        source, labels = domains.source.batch(torch.randint(len(domains.source.labels), (32,)))
        target, _ = domains.target.batch(torch.randint(len(domains.target.labels), (32,)))
        loss = losses(network(torch.cat([source, target])), labels, of_domain)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if schedule:
            schedule.step()


@torch.no_grad()
def accuracy(network: nn.Module, examples: Examples) -> float:
    """Share of the images whose digit is recognised."""
    images, labels = examples.batch(torch.arange(len(examples.labels)))
    return (network.eval()(images).argmax(dim=1) == labels).float().mean().item()


def plainly(logits: Tensor, labels: Tensor, of_domain: Tensor) -> Tensor:
    """The loss of the source's labels alone."""
    return F.cross_entropy(logits[: len(labels)], labels)


def adversarially(outputs: tuple[Tensor, Tensor], labels: Tensor, of_domain: Tensor) -> Tensor:
    """The same, and the domain loss, which reaches the features reversed."""
    logits, domain_logits = outputs
    return plainly(logits, labels, of_domain) + gs.domain_loss(domain_logits, of_domain)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--count", type=int, default=4000, help="training images of each domain")
    parser.add_argument("--coeff", type=float, default=0.3, help="where the coefficient rises to")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    domains = load_domains(count=args.count)
    images, _ = domains.source.batch(torch.arange(4))
    for seed in args.seeds:
        torch.manual_seed(seed)
        plain = Network()
        train(plain, domains, plainly, args.steps, args.coeff)
        torch.manual_seed(seed)
        network = Network()
        m = gs.attach_domain_head(
            network,
            after="flatten",
            hidden=100,
            depth=1,
            dropout=0.0,
            example_inputs=images,
        )
        print(gs.verify_flip(m, reference=network, example_inputs=images).raise_if_failed().verdict)
        train(m, domains, adversarially, args.steps, args.coeff)
        for name, trained in (("source only", plain), ("DANN", gs.strip(m))):
            source, target = accuracy(trained, domains.source_test), accuracy(trained, domains.target_test)
            print(f"seed {seed}  {name:<11}  source {source:.3f}  target {target:.3f}")


if __name__ == "__main__":
    main()
