"""Feature disentanglement: one code for which digit it is, another for how it is written, by one reversal.

An autoencoder of scikit-learn's handwritten digits has two codes. A classifier reads the digit from the
first; a second one, behind a reversal, must not be able to read it from the other. So the second keeps only
what the first lacks: slant, stroke width, size. Exchanging codes between two digits then writes the one in
the other's hand.

Every seed divides the images anew into two thirds to train on and one to measure on; printed are the mean
over the seeds, and the least and the most.

    python examples/disentangle.py
    python examples/disentangle.py --plot disentangle.png
"""

from __future__ import annotations

import argparse
from statistics import mean

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional as F

import grl_surgery as gs

CONTENT, STYLE = 8, 6


class Noise(nn.Module):
    """Noise in training: a code that is blurred cannot hide a digit in its last decimals."""

    def forward(self, code: Tensor) -> Tensor:
        """The code (B, C), blurred while training."""
        return code + 0.3 * torch.randn_like(code) if self.training else code


def code_of(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(128, width), nn.BatchNorm1d(width, affine=False), Noise())


class Autoencoder(nn.Module):
    """Two codes of one image, a classifier on the first, and a decoder of both."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        self.content = code_of(CONTENT)
        self.style = code_of(STYLE)
        self.classify = nn.Linear(CONTENT, 10)
        self.decoder = nn.Sequential(
            nn.Linear(CONTENT + STYLE, 128),
            nn.ReLU(),
            nn.Linear(128, 256),
            nn.ReLU(),
            nn.Linear(256, 64),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 64) again, and class logits (B, 10)."""
        hidden = self.body(images)
        content, style = self.content(hidden), self.style(hidden)
        return self.decoder(torch.cat([content, style], dim=1)), self.classify(content)

    def codes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Content (B, 8) and style (B, 6)."""
        hidden = self.body(images)
        return self.content(hidden), self.style(hidden)


def load(seed: int) -> tuple[Tensor, Tensor]:
    """Images (1797, 64) in [0, 1] and which digit each is, in an order of the seed's."""
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(digits.data).float()[order] / 16.0, torch.from_numpy(digits.target).long()[order]


def train(images: Tensor, labels: Tensor, coeff: float, steps: int, seed: int) -> nn.Module:
    """The autoencoder without the adversary again."""
    torch.manual_seed(seed)
    network = Autoencoder()
    m = gs.attach_domain_head(
        network,
        after="style",
        num_domains=10,
        name="adversary",
        coeff=coeff,
        hidden=128,
        dropout=0.0,
        example_inputs=images[:4],
    )
    gs.verify_flip(m, reference=network, example_inputs=images[:32]).raise_if_failed()
    optimizer = torch.optim.Adam(gs.param_groups(m, lr=1e-3, new_multiplier=3.0), betas=(0.5, 0.99))
    for _ in range(steps):
        index = torch.randint(len(images), (128,))
        (again, logits), digit_in_style = m(images[index])
        # The decoder's error is summed over pixels, as a likelihood is.
        error = F.mse_loss(again, images[index]) * 64
        loss = error + F.cross_entropy(logits, labels[index]) + gs.domain_loss(digit_in_style, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gs.strip(m).eval()


@torch.no_grad()
def measure(network: Autoencoder, images: Tensor, labels: Tensor) -> dict[str, float]:
    """How well fresh classifiers read the digit from each code, on digits that were held out."""
    border = len(images) * 2 // 3
    probes = {"a linear probe": LogisticRegression(max_iter=2000), "10 neighbours": KNeighborsClassifier(10)}
    found = {}
    for name, code in zip(("content", "style"), network.codes(images), strict=True):
        for kind, probe in probes.items():
            probe.fit(code[:border], labels[:border])
            found[f"{name}, by {kind}"] = float(probe.score(code[border:], labels[border:]))
    found["error per pixel"] = F.mse_loss(network(images[border:])[0], images[border:]).sqrt().item()
    return found


@torch.no_grad()
def swap(network: Autoencoder, images: Tensor) -> Tensor:
    """(N, N, 64): row by row the digit of one image in the hand of each other."""
    content, style = network.codes(images)
    count = len(images)
    both = torch.cat([content.repeat_interleave(count, 0), style.repeat(count, 1)], dim=1)
    return network.decoder(both).reshape(count, count, -1)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coeffs", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--plot", metavar="FILE.png")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    networks = {}
    for coeff in args.coeffs:
        rows = []
        for seed in args.seeds:
            images, labels = load(seed)
            border = len(images) * 2 // 3
            network = train(images[:border], labels[:border], coeff, args.steps, seed)
            rows.append(measure(network, images, labels))
            networks.setdefault(coeff, network)
        print(f"coeff {coeff}, {len(rows)} seeds")
        for name in rows[0]:
            values = [row[name] for row in rows]
            print(f"  {name:<27} {mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    if args.plot:
        images, labels = load(args.seeds[0])
        border = len(images) * 2 // 3
        plot(networks, images[border:], labels[border:], args.plot)


def plot(networks: dict[float, nn.Module], images: Tensor, labels: Tensor, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # One image of each of eight digits.
    chosen = images[torch.stack([(labels == digit).nonzero()[digit, 0] for digit in range(8)])]
    figure, axes = plt.subplots(
        1, len(networks), figsize=(4.6 * len(networks), 5), layout="constrained", squeeze=False
    )
    for axis, (coeff, network) in zip(axes[0], networks.items(), strict=True):
        rows = torch.cat([chosen[:, None], swap(network, chosen)], dim=1)
        top = torch.cat([torch.zeros(1, 64), chosen])[None]
        tiles = F.pad(torch.cat([top, rows]).reshape(9, 9, 8, 8), (1, 1, 1, 1))
        picture = tiles.permute(0, 2, 1, 3).reshape(90, 90)
        axis.imshow((1 - picture).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.axhline(9.5, color="tab:orange")
        axis.axvline(9.5, color="tab:orange")
        axis.set(xticks=[], yticks=[], title=f"coefficient {coeff:g}", xlabel="hand of", ylabel="digit of")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
