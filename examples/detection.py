"""Domain-adaptive Faster R-CNN (Chen et al. 2018), by surgery on torchvision's from outside.

A detector cannot be traced: what it computes depends on what it finds. It returns losses in train mode and
boxes in eval mode. Two domain heads are attached: one reads the backbone's feature map, position by position,
the other the feature vector of every box. Their logits are added to the dict of losses.

    python examples/detection.py

Digits on black with boxes are the source, digits in photographs without boxes the target.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from digits import PHOTOGRAPHS, Stream, load_domains
from skimage import data
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou

import grl_surgery as gs

Targets = list[dict[str, Tensor]]
SIZE = 56


class Backbone(nn.Sequential):
    """A feature map (B, 32, H/8, W/8)."""

    out_channels = 32

    def __init__(self) -> None:
        widths = (3, 16, 32, 32)
        pairs = itertools.pairwise(widths)
        super().__init__(*(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in pairs))


def detector() -> FasterRCNN:
    """Faster R-CNN for one class, small enough for a CPU. There is no reversal in it."""
    return FasterRCNN(
        Backbone(),
        num_classes=2,
        min_size=SIZE,
        max_size=SIZE,
        rpn_anchor_generator=AnchorGenerator(((24,),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=3, sampling_ratio=2),
        rpn_pre_nms_top_n_train=50,
        rpn_post_nms_top_n_train=20,
        box_batch_size_per_image=16,
    )


def adaptive(network: nn.Module, coeff: float = 0.1) -> nn.Module:
    """The detector with both heads: in train mode their logits stand in the dict of losses."""
    images = [torch.rand(3, SIZE, SIZE)] * 2
    m = gs.attach_domain_head(
        network,
        after="backbone.2",
        classifier="patch",
        name="image_domain",
        hidden=32,
        coeff=coeff,
        example_inputs=(images,),
    )
    return gs.attach_domain_head(
        m,
        after="roi_heads.box_head",
        pool="nc",  # one label for each box
        name="box_domain",
        hidden=64,
        coeff=coeff,
        example_inputs=(images,),
    )


def losses(m: nn.Module, images: list[Tensor], targets: Targets, domain: int) -> dict[str, Tensor]:
    """Losses of one domain's images; those of the detector only for the source, whose boxes are known."""
    found = m(images, targets)
    image_logits, box_logits = (found.pop(f"{name}_logits") for name in ("image_domain", "box_domain"))
    of_images = torch.full((len(image_logits),), domain)
    of_boxes = torch.full((len(box_logits),), domain)
    return {
        **(found if domain == 0 else {}),
        "image_domain": gs.domain_loss(image_logits, of_images),
        "box_domain": gs.domain_loss(box_logits, of_boxes),
    }


def train_step(
    m: nn.Module, optimizer: torch.optim.Optimizer, source: tuple[list[Tensor], Targets], target: list[Tensor]
) -> dict[str, float]:
    """One step on labelled images of the source and unlabelled ones of the target."""
    nothing: Targets = [{"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.long)}] * len(
        target
    )
    parts = [losses(m, *source, domain=0), losses(m, target, nothing, domain=1)]
    optimizer.zero_grad()
    sum(loss for part in parts for loss in part.values()).backward()
    optimizer.step()
    return {name: loss.item() for part in parts for name, loss in part.items()}


# ---------------------------------------------------------------------------------------------------- data


def scenes(
    digits: Tensor, photographs: list[Tensor], generator: torch.Generator
) -> tuple[list[Tensor], Targets]:
    """Each digit (1, 28, 28) somewhere in an image (3, 56, 56), and the box around it."""
    images, targets = [], []
    for digit in digits:
        image = torch.zeros(3, SIZE, SIZE)
        if photographs:
            picture = photographs[int(torch.randint(len(photographs), (), generator=generator))]
            top, left = (int(torch.randint(n - SIZE, (), generator=generator)) for n in picture.shape[1:])
            image = picture[:, top : top + SIZE, left : left + SIZE].clone()
        y, x = torch.randint(SIZE - 28, (2,), generator=generator).tolist()
        image[:, y : y + 28, x : x + 28] = (image[:, y : y + 28, x : x + 28] - digit).abs()
        images.append(image)
        rows, columns = (digit[0] > 0.2).nonzero(as_tuple=True)
        box = [x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1]
        targets.append({"boxes": torch.tensor([box]).float(), "labels": torch.tensor([1])})
    return images, targets


def found(network: nn.Module, images: list[Tensor], targets: Targets) -> float:
    """Share of the images whose surest box overlaps the true one by more than half."""
    with torch.no_grad():
        boxes = [result["boxes"][:1] for result in network.eval()(images)]
    hits = [len(b) and float(box_iou(b, t["boxes"])) > 0.5 for b, t in zip(boxes, targets, strict=True)]
    return sum(map(bool, hits)) / len(hits)


def pictures() -> list[Tensor]:
    """The photographs as (3, H, W) in [0, 1]."""
    arrays = [load_sample_image(n) if n.endswith(".jpg") else getattr(data, n)() for n in PHOTOGRAPHS]
    return [torch.from_numpy(array.copy()).float().movedim(-1, 0) / 255 for array in arrays]


# ---------------------------------------------------------------------------------------------------- main


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--coeff", type=float, default=0.1, help="0 trains on the source alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    plain = load_domains(count=800).source
    strokes = plain.images[:, :1].float() / 255
    source = scenes(strokes[:400], [], generator)
    target = scenes(strokes[400:700], pictures(), generator)
    test = scenes(strokes[700:], pictures(), generator)

    network = detector()
    m = adaptive(network, args.coeff)
    report = gs.verify_flip(m, reference=network, example_inputs=(source[0][:2], source[1][:2]), mode="train")
    print(report.raise_if_failed().verdict)

    optimizer = torch.optim.Adam(m.parameters(), lr=1e-3)
    first, second = Stream(400, 8, args.seed), Stream(300, 8, args.seed + 1)
    m.train()
    for step in range(1, args.steps + 1):
        a, b = first.next().tolist(), second.next().tolist()
        batch = [source[0][i] for i in a], [source[1][i] for i in a]
        found_losses = train_step(m, optimizer, batch, [target[0][i] for i in b])
        if step % 50 == 0:
            print(step, "  ".join(f"{name} {value:.3f}" for name, value in found_losses.items()), flush=True)
    trained = gs.strip(m)
    print(
        f"digits found: source {found(trained, *(part[:100] for part in source)):.2f}, "
        f"target {found(trained, *test):.2f}"
    )


if __name__ == "__main__":
    main()
