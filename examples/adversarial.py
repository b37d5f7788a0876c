"""Adversarial examples: with a reversal after its input, training becomes an attack.

1. A photograph is changed a little by steps that *minimise* the loss of the predicted class. The reversal
   makes the loss grow instead.
2. In training, one backward pass serves both: the weights descend, and the changes of the images ascend. The
   trained network withstands changes that a plainly trained one does not.

    python examples/adversarial.py
    python examples/adversarial.py --plot adversarial.png
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import grl_surgery as gs
from grl_surgery.cli.demo import classify, load_packaged_efficientnet_lite0, photographs


class Attacked(nn.Module):
    """Images plus a change of them that is trained, into a network. Nothing here reverses anything."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.change = nn.Parameter(torch.zeros(shape))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, K) of images (B, C, H, W) or (B, C)."""
        return self.network(images + self.change)


def against(network: nn.Module, images: Tensor) -> nn.Module:
    """The network behind a change of its input, whose gradient is reversed where it reaches the change."""
    attacked = Attacked(network, tuple(images.shape))
    m = gs.insert_grl(attacked, edge=("change", "add"))
    gs.verify_flip(m, reference=attacked, example_inputs=images).raise_if_failed()
    return m


def step_of_sign(change: nn.Parameter, size: float, limit: float) -> None:
    """Descend by the sign of the gradient (Goodfellow et al. 2015; Madry et al. 2018), within +-limit."""
    with torch.no_grad():
        change -= size * change.grad.sign()
        change.clamp_(-limit, limit)
    change.grad = None


# --------------------------------------------------------------------------------------- 1. a photograph


def attack_photograph(steps: int, limit: float) -> tuple[Tensor, Tensor, list[tuple[str, float]]]:
    """The photograph, what was added to it, and the best class before and after each step."""
    network = load_packaged_efficientnet_lite0().eval()
    image = photographs(network)["coffee"][None]
    label = network(image).argmax(dim=1)
    m = against(network, image).eval()
    best = [classify(network, image[0], top=1)[0]]
    for _ in range(steps):
        F.cross_entropy(m(image), label).backward()  # an ordinary loss, as if it were to be minimised
        step_of_sign(m.change, limit / 4, limit)
        best.append(classify(network, (image + m.change.detach())[0], top=1)[0])
    return image[0], m.change.detach()[0], best


# --------------------------------------------------------------------------------------------- 2. digits


def load() -> tuple[Tensor, Tensor]:
    """Images (1797, 64) in [0, 1], and which digit each is."""
    digits = load_digits()
    return torch.from_numpy(digits.data).float() / 16.0, torch.from_numpy(digits.target).long()


def classifier() -> nn.Module:
    """A network for 8 x 8 digits."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def train(images: Tensor, labels: Tensor, limit: float, steps: int, repeats: int = 4) -> nn.Module:
    """Train on images that change against the network by up to ``limit``; 0 trains plainly.

    Each batch is repeated, and each backward pass both improves the weights and worsens the images ("free"
    adversarial training, Shafahi et al. 2019).
    """
    torch.manual_seed(0)
    network, batch = classifier(), 128
    m = against(network, images[:batch])
    optimizer = torch.optim.Adam(m.network.parameters(), lr=1e-3)
    for step in range(steps):
        if step % repeats == 0:
            index = torch.randint(len(images), (batch,))
        optimizer.zero_grad()
        F.cross_entropy(m(images[index]), labels[index]).backward()
        optimizer.step()
        step_of_sign(m.change, limit, limit)
    return network.eval()


def accuracy(network: nn.Module, images: Tensor, labels: Tensor, limit: float, steps: int = 10) -> float:
    """Accuracy on images that were changed against this network by up to ``limit``."""
    m = against(network, images).eval()
    for _ in range(steps if limit else 0):
        F.cross_entropy(m(images), labels).backward()
        step_of_sign(m.change, limit / 4, limit)
    with torch.no_grad():
        return (m(images).argmax(dim=1) == labels).float().mean().item()


LIMITS = (0.0, 0.05, 0.1, 0.15, 0.2)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--limit", type=float, default=0.02, help="largest change of a pixel of the photograph"
    )
    parser.add_argument("--steps", type=int, default=3000, help="of training on digits")
    parser.add_argument("--plot", metavar="FILE.png")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    image, change, best = attack_photograph(steps=8, limit=args.limit)
    for step, (name, probability) in enumerate(best):
        print(f"after {step} steps: {name} {probability:.3f}")
    print("accuracy on digits that are changed by up to")
    images, labels = load()
    held_out = images[1200:], labels[1200:]
    curves = {}
    for limit in (0.0, 0.1):
        network = train(images[:1200], labels[:1200], limit, args.steps)
        curves[limit] = [accuracy(network, *held_out, limit=other) for other in LIMITS]
        found = zip(LIMITS, curves[limit], strict=True)
        print(f"trained against {limit}:  " + "   ".join(f"{other}: {value:.3f}" for other, value in found))
    if args.plot:
        plot(image, change, best, curves, args.plot)


def plot(
    image: Tensor, change: Tensor, best: list[tuple[str, float]], curves: dict[float, list[float]], path: str
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def picture(tensor: Tensor) -> Tensor:
        return ((tensor * 0.5) + 0.5).clamp(0, 1).movedim(0, -1)  # this network's normalisation, undone

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained", width_ratios=[1, 1, 1, 1.4])
    titles = [f"{best[0][0]} {best[0][1]:.2f}", "the change, 20 times", f"{best[-1][0]} {best[-1][1]:.2f}"]
    shown = [picture(image), picture(20 * change), picture(image + change)]
    for axis, title, pixels in zip(axes, titles, shown, strict=False):
        axis.imshow(pixels.numpy())
        axis.set(xticks=[], yticks=[], title=title)
    for limit, values in curves.items():
        axes[3].plot(LIMITS, values, marker="o", label=f"trained against {limit:g}")
    axes[3].set(xlabel="largest change of a pixel", ylabel="accuracy", title="digits", ylim=(0, 1.02))
    axes[3].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
