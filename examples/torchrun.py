"""Several processes: a spliced network under DistributedDataParallel, with the coefficient of one schedule.

    torchrun --nproc-per-node 2 examples/torchrun.py

Each process trains on its part of every batch. At the end, the gradients of the last step are compared with
those of one process that sees the whole batch.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import grl_surgery as gs


def batch(step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """32 images, labels and domains, the same in every process; the second domain is the negative."""
    generator = torch.Generator().manual_seed(step)
    index = torch.randint(len(images), (32,), generator=generator)
    domains = torch.arange(32) % 2
    return (images[index] - domains[:, None].float()).abs(), labels[index], domains


def loss_of(network: nn.Module, images: Tensor, labels: Tensor, domains: Tensor) -> Tensor:
    """Labels of domain 0 only, domains of all."""
    logits, domain_logits = network(images)
    task = F.cross_entropy(logits[domains == 0], labels[domains == 0])
    return task + gs.domain_loss(domain_logits, domains)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(arguments)
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    digits = load_digits()
    images, labels = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)

    # Splice and verify first, then wrap.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    m = gs.attach_domain_head(network, after="1", hidden=64, dropout=0.0, example_inputs=images[:2])
    gs.verify_flip(m, reference=network, example_inputs=images[:4]).raise_if_failed()
    wrapped = DistributedDataParallel(m)
    optimizer = torch.optim.SGD(gs.param_groups(wrapped, lr=0.01), momentum=0.9)
    schedule = gs.CoefficientScheduler(wrapped, gs.schedules.dann(), args.steps)
    for step in range(args.steps):
        mine = [part.chunk(count)[rank] for part in batch(step, images, labels)]
        before = copy.deepcopy(m) if step == args.steps - 1 else None
        optimizer.zero_grad()
        loss_of(wrapped, *mine).backward()
        if before is not None:
            before.zero_grad()
            loss_of(before, *batch(step, images, labels)).backward()
        optimizer.step()
        schedule.step()

    pairs = zip(m.parameters(), before.parameters(), strict=True)
    same = all(torch.allclose(one.grad, other.grad, atol=1e-6) for one, other in pairs)
    coefficients: list[float] = [0.0] * count
    dist.all_gather_object(coefficients, gs.reversals(m)["domain.reversal"].coeff.item())
    if rank == 0:
        print(f"{count} processes, {type(wrapped).__name__}")
        print(f"gradients equal to one process with the whole batch: {same}")
        print(f"coefficients equal on all processes: {len(set(coefficients)) == 1}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
