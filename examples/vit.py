"""A vision transformer: a domain head on the mean of its patch tokens, and the metrics of a run.

Domain 0 are photographs, domain 1 the same ones in grey with noise; each image is a random crop.

    python examples/vit.py
    python examples/vit.py --network vit_tiny_patch16_224 --size 224
"""

from __future__ import annotations

import argparse

import timm
import torch
from skimage import data
from torch import Tensor, nn

import grl_surgery as gs


def crops(count: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crops (2 x count, 3, size, size) of three photographs, which photograph each is, and its domain."""
    pictures = [
        torch.from_numpy(getattr(data, name)()).movedim(-1, 0) for name in ("astronaut", "chelsea", "coffee")
    ]
    which = torch.randint(len(pictures), (2 * count,))
    images = []
    for place in which.tolist():
        picture = pictures[place].float() / 127.5 - 1.0
        top, left = (int(torch.randint(length - size + 1, ())) for length in picture.shape[1:])
        images.append(picture[:, top : top + size, left : left + size])
    batch = torch.stack(images)
    grey = batch[count:].mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    batch[count:] = grey + 0.3 * torch.randn_like(grey)
    return batch, which, torch.arange(2 * count) // count


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", default="test_vit", help="a vision transformer of timm")
    parser.add_argument("--size", type=int, default=160, help="of its images")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = timm.create_model(args.network, num_classes=3, img_size=args.size)
    m = gs.attach_domain_head(model, after="norm", hidden=64, depth=1, dropout=0.0)
    print(m.domain.layout, "->", m.domain.pool)
    print(gs.verify_flip(m, reference=model).raise_if_failed().verdict)

    optimizer = torch.optim.Adam(gs.param_groups(m, lr=5e-4, new_multiplier=10.0))
    schedule = gs.CoefficientScheduler(m, gs.schedules.dann(hi=0.1), args.steps)
    m.train()
    with gs.AdversarialMetrics(m) as metrics:
        for step in range(1, args.steps + 1):
            images, which, domains = crops(8, args.size)
            logits, domain_logits = m(images)
            task = nn.functional.cross_entropy(logits[:8], which[:8])  # labels of domain 0 only
            optimizer.zero_grad()
            (task + gs.domain_loss(domain_logits, domains)).backward()
            metrics.update(domain_logits, domains)
            optimizer.step()
            schedule.step()
            if step % 20 == 0 or step == args.steps:
                print(f"--- step {step}, task loss {task.item():.3f}\n{metrics.report()}")
                metrics.reset()


if __name__ == "__main__":
    main()
