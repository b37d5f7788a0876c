"""MNIST -> MNIST-M with the paper's network: source only, adapted, and trained on the target's labels.

    python benchmarks/adaptation                        # one seed of each recipe
    python benchmarks/adaptation --seeds 0 1 2 3 4 --recipes source dann cdan target --json adapt.json

The recipe is that of Ganin et al. 2016: batches of 64 + 64, SGD with momentum 0.9, the learning rate and the
coefficient by their schedules, the head behind the convolutions. A label of the target is looked at only for
the accuracies that are printed; the step that is reported as chosen is chosen by ``gs.validators``.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from mnist_m import Batches, Domains, Images, load_domains
from torch import Tensor, nn
from torch.nn import functional as F

import grl_surgery as gs

RECIPES = ("source", "dann", "cdan", "target")
BATCH = 64
AVERAGING = 0.995
"""Beside the weights, their running mean is tested: an adversarial game circles around its solution."""
TESTED_MEANWHILE = 2000
"""Images of each test set that are looked at before the last step."""


class PaperNetwork(nn.Module):
    """The network of the DANN paper for MNIST."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 48, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.flatten = nn.Flatten()
        self.classify = nn.Sequential(
            nn.Linear(768, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, 10) of images (B, 3, 28, 28)."""
        return self.classify(self.flatten(self.features(images)))


def build(recipe: str, examples: Tensor) -> tuple[nn.Module, nn.Module]:
    """The network, and what is trained: with a head where the recipe is adversarial, proved first."""
    network = PaperNetwork()
    if recipe in ("source", "target"):
        return network, network
    condition = {"condition_on": "classify"} if recipe == "cdan" else {}
    m = gs.attach_domain_head(
        network,
        after="flatten",
        hidden=100,
        depth=1,
        dropout=0.0,
        example_inputs=examples,
        **condition,
    )
    print("  " + gs.verify_flip(m, reference=network, example_inputs=examples).raise_if_failed().verdict)
    return network, m


def losses(recipe: str, m: nn.Module, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """What one step minimises."""
    if recipe in ("source", "target"):
        images, labels = source if recipe == "source" else target
        return F.cross_entropy(m(images), labels)
    (images, labels), (unlabelled, _) = source, target
    of_domain = torch.arange(2 * BATCH) // BATCH
    logits, domain_logits = m(torch.cat([images, unlabelled]))
    weights = gs.entropy_weights(logits, of_domain) if recipe == "cdan" else None
    task = F.cross_entropy(logits[: len(labels)], labels)
    return task + gs.domain_loss(domain_logits, of_domain, weights=weights)


def run(recipe: str, seed: int, steps: int, every: int, hi: float, domains: Domains) -> dict[str, Any]:
    """Train once; accuracies and validators at every ``every`` steps."""
    torch.manual_seed(seed)
    print(f"{recipe}, seed {seed}, {steps} steps", flush=True)
    network, m = build(recipe, domains.source.inputs(slice(0, 4)))
    mean = {name: value.detach().clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: gs.dann_lr(min(step / steps, 1.0), lr0=1.0)
    )
    coefficient = gs.CoefficientScheduler(m, gs.schedules.dann(hi=hi), steps) if gs.reversals(m) else None
    pairs = gs.paired(Batches(domains.source, BATCH), Batches(domains.target, BATCH), seed=seed)
    curve: list[dict[str, float]] = []
    seconds = 0.0
    for step, (source, target) in enumerate(itertools.islice(pairs, steps), 1):
        start = time.perf_counter()
        loss = losses(recipe, m, source, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if coefficient is not None:
            coefficient.step()
        keep = min(AVERAGING, step / (step + 10))
        for name, value in network.state_dict().items():
            mean[name].lerp_(value, 1.0 - keep)
        seconds += time.perf_counter() - start
        if step % every == 0 or step == steps:
            count = None if step == steps else TESTED_MEANWHILE
            curve.append({"step": step, "loss": loss.item(), **judge(network, mean, domains, count)})
            shown = ("target", "target_mean", "information", "snd", "entropy", "dev", "a_distance")
            print(
                f"  step {step:5d}  " + "  ".join(f"{name} {curve[-1][name]:.3f}" for name in shown),
                flush=True,
            )
    return {"recipe": recipe, "seed": seed, "seconds_per_step": seconds / steps, "curve": curve}


@torch.no_grad()
def judge(
    network: nn.Module, mean: dict[str, Tensor], domains: Domains, count: int | None
) -> dict[str, float]:
    """Accuracy on both tests, of the weights and of their mean, and the validators' numbers of the mean."""
    now = {name: value.clone() for name, value in network.state_dict().items()}
    tests = {"source": domains.source_test, "target": domains.target_test}
    found = {name: accuracy(network, images.part(slice(count))) for name, images in tests.items()}
    network.load_state_dict(mean)
    found |= {f"{name}_mean": accuracy(network, images.part(slice(count))) for name, images in tests.items()}
    (ours, our_logits), (theirs, their_logits) = (
        outputs(network, images) for images in (domains.source_held_out, domains.target_held_out)
    )
    half = len(ours) // 2
    wrong = (our_logits[half:].argmax(1) != domains.source_held_out.labels[half:]).double()
    found |= {
        "entropy": gs.validators.entropy(their_logits),
        "information": gs.validators.information(their_logits),
        "snd": gs.validators.snd(their_logits),
        "dev": gs.validators.dev(ours[:half], ours[half:], wrong, theirs),
        "a_distance": gs.validators.a_distance(ours, theirs, seeds=[0]),
    }
    network.load_state_dict(now)
    return found


def outputs(network: PaperNetwork | nn.Module, images: Images) -> tuple[Tensor, Tensor]:
    """What the last layer is given (N, 100), and the logits (N, 10)."""
    features: list[Tensor] = []
    hook = network.get_submodule("classify.3").register_forward_hook(
        lambda module, inputs, output: features.append(output)
    )
    chunks = [network(images.inputs(chunk)) for chunk in torch.arange(len(images.labels)).split(500)]
    hook.remove()
    return torch.cat(features), torch.cat(chunks)


def accuracy(network: nn.Module, images: Images) -> float:
    """Share of the digits that are recognised."""
    right = [
        (network(images.inputs(chunk)).argmax(1) == images.labels[chunk]).sum()
        for chunk in torch.arange(len(images.labels)).split(500)
    ]
    return sum(map(int, right)) / len(images.labels)


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for and store every figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["source", "dann", "target"])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=500, help="steps between two tests")
    parser.add_argument("--hi", type=float, default=1.0, help="where the coefficient rises to")
    parser.add_argument("--data", type=Path, default=Path("build/mnist"), help="where MNIST's files lie")
    parser.add_argument("--json", type=Path, help="where to store the figures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    domains = load_domains(options.data)
    results = [
        run(recipe, seed, options.steps, options.every, options.hi, domains)
        for seed in options.seeds
        for recipe in options.recipes
    ]
    machine = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "settings": {"steps": options.steps, "hi": options.hi, "batch": BATCH},
    }
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    for result in results:
        last = result["curve"][-1]
        print(
            f"{result['recipe']:<7} seed {result['seed']}  source {last['source']:.4f}  target "
            f"{last['target']:.4f} (mean weights {last['target_mean']:.4f})  "
            f"{1e3 * result['seconds_per_step']:.1f} ms per step"
        )


if __name__ == "__main__":
    main()
