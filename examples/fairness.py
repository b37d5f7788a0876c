"""Fairness: a decision that does not know a protected attribute, by a reversal behind an encoder.

5,226 arrests for possession of marijuana in Toronto (scikit-lego's copy of carData's Arrests): was the person
released with a summons? The protected attribute is the colour of the skin, which is not an input; the number
of earlier police checks, employment and citizenship give it away. An adversary reads it out of the encoder,
behind a reversal. For each coefficient: how well a fresh classifier reads the colour from the encoder's
features afterwards, how much the rates of release differ, and what that costs in accuracy.

    python examples/fairness.py
    python examples/fairness.py --plot fairness.png
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklego.datasets import load_arrests
from torch import Tensor, nn
from torch.nn import functional as F

import grl_surgery as gs


class People(NamedTuple):
    """What is known of each person, whether they were released, and the protected attribute."""

    inputs: Tensor
    released: Tensor
    protected: Tensor

    def rows(self, index: Tensor) -> People:
        """The people at these places."""
        return People(*(column[index] for column in self))


class Decision(nn.Module):
    """A network like any other: it knows nothing of a reversal."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU())
        self.decide = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 1) of a release, from (B, inputs)."""
        return self.decide(self.encoder(x))


def load_people() -> tuple[People, People]:
    """Four fifths for training, one fifth for testing."""
    table = load_arrests(as_frame=True)
    numbers = torch.tensor(table[["year", "age", "checks"]].to_numpy(dtype="float32"))
    numbers = (numbers - numbers.mean(0)) / numbers.std(0)
    yes = (table[["sex", "employed", "citizen"]] == ["Male", "Yes", "Yes"]).to_numpy(dtype="float32")
    inputs = torch.cat([numbers, torch.tensor(yes)], dim=1)
    people = People(
        inputs,
        torch.tensor((table["released"] == "Yes").to_numpy()).float(),
        torch.tensor((table["colour"] == "Black").to_numpy()).long(),
    )
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    border = len(inputs) * 4 // 5
    return people.rows(order[:border]), people.rows(order[border:])


def train(people: People, coeff: float, steps: int, seed: int) -> nn.Module:
    """The network without its head again, trained with the reversal at one coefficient."""
    torch.manual_seed(seed)
    network = Decision(people.inputs.shape[1])
    m = gs.attach_domain_head(
        network,
        after="encoder",
        name="colour",
        coeff=coeff,
        hidden=32,
        dropout=0.0,
        example_inputs=people.inputs[:4],
    )
    gs.verify_flip(m, reference=network, example_inputs=people.inputs[:64]).raise_if_failed()
    optimizer = torch.optim.Adam(gs.param_groups(m, lr=2e-3, new_multiplier=3.0))
    for _ in range(steps):
        batch = people.rows(torch.randint(len(people.inputs), (256,)))
        logits, colour_logits = m(batch.inputs)
        task = F.binary_cross_entropy_with_logits(logits[:, 0], batch.released)
        loss = task + gs.domain_loss(colour_logits, batch.protected, balance=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gs.strip(m)


@torch.no_grad()
def measure(network: Decision, train_people: People, test_people: People) -> dict[str, float]:
    """What the features say about the colour, what the decisions do, and how good they are."""
    probe = LogisticRegression(class_weight="balanced", max_iter=1000)
    probe.fit(network.encoder(train_people.inputs).numpy(), train_people.protected.numpy())
    guessed = probe.predict(network.encoder(test_people.inputs).numpy())
    scores = network(test_people.inputs)[:, 0]
    # As many are released as were in the data: a threshold that is the same for everybody.
    decided = scores >= scores.quantile(1.0 - test_people.released.mean())
    rates = [decided[test_people.protected == group].float().mean().item() for group in (0, 1)]
    return {
        "colour read from features": float(balanced_accuracy_score(test_people.protected.numpy(), guessed)),
        "difference of release rates": rates[0] - rates[1],
        "AUC of the decision": float(roc_auc_score(test_people.released.numpy(), scores.numpy())),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coeffs", type=float, nargs="+", default=[0.0, 0.3, 1.0, 3.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--plot", metavar="FILE.png")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    people, held_out = load_people()
    runs = {
        coeff: [measure(train(people, coeff, args.steps, seed), people, held_out) for seed in args.seeds]
        for coeff in args.coeffs
    }
    for coeff, found in runs.items():
        means = {name: sum(run[name] for run in found) / len(found) for name in found[0]}
        print(f"coeff {coeff:<4}  " + "   ".join(f"{name} {value:.3f}" for name, value in means.items()))
    if args.plot:
        plot(runs, args.plot)


def plot(runs: dict[float, list[dict[str, float]]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(next(iter(runs.values()))[0])
    figure, axes = plt.subplots(1, len(names), figsize=(10, 3.2), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for place, found in enumerate(runs.values()):
            axis.scatter([place] * len(found), [run[name] for run in found], color="tab:blue", alpha=0.5)
        axis.plot([sum(r[name] for r in found) / len(found) for found in runs.values()], color="tab:blue")
        axis.set(
            xticks=range(len(runs)),
            xticklabels=[f"{coeff:g}" for coeff in runs],
            xlabel="coefficient",
            title=name,
        )
    axes[0].axhline(0.5, color="grey", linestyle=":")
    axes[1].axhline(0.0, color="grey", linestyle=":")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
