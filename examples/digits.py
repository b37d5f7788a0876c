"""Two domains of digits: plain ones, and the same blended into photographs, the recipe of MNIST -> MNIST-M.

A target image is |patch - digit|, channel by channel, where the patch is a random crop of a photograph: the
digit inverts whatever is behind it. Everything here comes out of installed packages (scikit-learn's digits,
scikit-image's and scikit-learn's photographs), or, with ``data="mnist"``, out of torchvision's MNIST.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Domains", "Examples", "Stream", "load_domains"]

SIZE = 28
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "china.jpg", "flower.jpg")
OTHERS = ("camera", "rocket", "stereo_motorcycle")


class Examples(NamedTuple):
    """Images of one domain with their labels.

    Args:
        images: (N, 3, 28, 28) or (N, 1, 28, 28), uint8.
        labels: (N,), int64.
    """

    images: Tensor
    labels: Tensor

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 28, 28), float32, each without its own mean; labels (B,)."""
        images = self.images[index].float().div_(255.0)
        images = images - images.mean(dim=(1, 2, 3), keepdim=True)
        return images.expand(-1, 3, -1, -1), self.labels[index]


class Domains(NamedTuple):
    """Both domains. The digits and the parts of photographs in the tests occur in no training image."""

    source: Examples
    target: Examples
    source_test: Examples
    target_test: Examples


class Stream:
    """Endless minibatches of indices: every index once per epoch, each epoch in a new order.

    It has a random generator of its own and can be saved in the middle of an epoch, so that a resumed run
    sees the batches that the interrupted one would have seen.

    Example:
        >>> stream = Stream(count=10, batch=4, seed=0)
        >>> first = stream.next()
        >>> state = stream.state_dict()
        >>> second = stream.next()
        >>> stream.load_state_dict(state)
        >>> bool((stream.next() == second).all())
        True
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        if batch > count:
            raise ValueError(f"a batch of {batch} out of {count} examples")
        self._generator = torch.Generator().manual_seed(seed)
        self._count, self._batch = count, batch
        self._order, self._position = torch.randperm(count, generator=self._generator), 0

    def next(self) -> Tensor:
        """The indices (B,) of the next batch; the last incomplete one of an epoch is left out."""
        if self._position + self._batch > self._count:
            self._order, self._position = torch.randperm(self._count, generator=self._generator), 0
        self._position += self._batch
        return self._order[self._position - self._batch : self._position]

    def state_dict(self) -> dict[str, Any]:
        """The order of the epoch, the place in it, and the generator of the epochs to come."""
        return {
            "order": self._order.clone(),
            "position": self._position,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where ``state`` was taken."""
        self._order, self._position = state["order"].clone(), state["position"]
        self._generator.set_state(state["generator"])


def load_domains(
    data: Literal["digits", "mnist"] = "digits",
    *,
    backgrounds: Literal["photographs", "others"] = "photographs",
    count: int = 8000,
    root: str | Path = "data",
    seed: int = 0,
) -> Domains:
    """Make both domains. They are datasets, not draws: the same arguments always give the same images.

    Args:
        data: ``"digits"``: scikit-learn's 1,797 handwritten digits, 1,297 of them for training, enlarged to
            28 x 28 and varied by small random affine maps; ``"mnist"``: MNIST, downloaded into ``root``.
        backgrounds: ``"photographs"``; or ``"others"``, other photographs: another target, to try
            settings on without looking at the labels of the one that is reported.
        count: Number of training images of each domain; a quarter as many are for testing.
        root: Where torchvision keeps MNIST.
        seed: Of everything that is random.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = _mnist(Path(root), generator) if data == "mnist" else _digits()
    pictures = _pictures(PHOTOGRAPHS if backgrounds == "photographs" else OTHERS)
    parts = {}
    for part, (images, labels), amount in (("train", train, count), ("test", test, count // 4)):
        for domain in ("source", "target"):
            chosen = torch.randint(len(images), (amount,), generator=generator)
            strokes = images[chosen] if data == "mnist" else _varied(images[chosen], generator)
            if domain == "target":
                strokes = (_patches(pictures, part, amount, generator) - strokes).abs()
            parts[domain, part] = (strokes * 255).round().to(torch.uint8), labels[chosen]
    return Domains(*(Examples(*parts[d, p]) for p in ("train", "test") for d in ("source", "target")))


def _digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().div(16.0)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    # 8 x 8 pixels become 20 x 20 in a frame of 28 x 28, which is how MNIST frames its digits.
    large = F.interpolate(images, size=(20, 20), mode="bicubic", align_corners=False).clamp(0, 1)
    framed = F.pad(large, (4, 4, 4, 4))
    # The order in the package goes by writer: the last ones are other people's digits.
    return (framed[:-500], labels[:-500]), (framed[-500:], labels[-500:])


def _mnist(root: Path, generator: torch.Generator) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from torchvision.datasets import MNIST

    try:
        sets = [MNIST(str(root), train=train, download=True) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise SystemExit(
            f"--data mnist: MNIST is not in {root} and could not be downloaded ({error}).\n"
            "Where there is a network, run this again; or copy MNIST's four files into "
            f"{root / 'MNIST/raw'}; or use --data digits, which needs no network."
        ) from error
    return tuple((s.data[:, None].float() / 255.0, s.targets.long()) for s in sets)  # type: ignore[return-value]


def _varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, 1, 28, 28) turned by up to 10 degrees, scaled, sheared and shifted a little."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, shear, scale = uniform(math.pi / 18), uniform(0.1), 1.0 + uniform(0.1)
    shift_x, shift_y = uniform(3 / SIZE), uniform(3 / SIZE)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    top = torch.stack([cos, -sin + shear * cos, shift_x], dim=1)
    bottom = torch.stack([sin, cos + shear * sin, shift_y], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _pictures(names: tuple[str, ...]) -> list[Tensor]:
    """Photographs as (3, H, W) in [0, 1], at most 400 pixels high, so that a patch shows some structure."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    def read(name: str) -> Any:
        if name.endswith(".jpg"):
            return load_sample_image(name)
        return data.stereo_motorcycle()[0] if name == "stereo_motorcycle" else getattr(data, name)()

    pictures = [torch.from_numpy(read(name).copy()).float() / 255.0 for name in names]
    images = [
        (picture[..., None] if picture.dim() == 2 else picture)[..., :3].movedim(-1, 0)
        for picture in pictures
    ]
    return [_at_most(image, 400).expand(3, -1, -1) for image in images]


def _at_most(image: Tensor, height: int) -> Tensor:
    if image.shape[1] <= height:
        return image
    size = (height, round(image.shape[2] * height / image.shape[1]))
    return F.interpolate(image[None], size=size, mode="area")[0]


def _patches(pictures: list[Tensor], part: str, count: int, generator: torch.Generator) -> Tensor:
    """Random crops (B, 3, 28, 28): in training of the left 70% of each picture, in tests of the rest."""
    patches = []
    for which in torch.randint(len(pictures), (count,), generator=generator).tolist():
        border = int(pictures[which].shape[2] * 0.7)
        area = pictures[which][..., :border] if part == "train" else pictures[which][..., border:]
        top = int(torch.randint(area.shape[1] - SIZE + 1, (), generator=generator))
        left = int(torch.randint(area.shape[2] - SIZE + 1, (), generator=generator))
        patches.append(area[:, top : top + SIZE, left : left + SIZE])
    return torch.stack(patches)
