"""Writes a training script for one network, to be read and edited."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Template
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from grl_surgery.adaptation.probing import recorded_points
from grl_surgery.errors import SurgeryError
from grl_surgery.points import near_names

__all__ = ["Recipe", "Trainer", "training_script"]

Recipe: TypeAlias = Literal["dann", "cdan", "fairness"]
Trainer: TypeAlias = Literal["plain", "accelerate"]

_SCRIPT = '''\
"""$title: $source.

Written by `grl-surgery new`; it is yours to edit.

    $run $file              # train; the weights that the validator likes best are in best.pt
    $run $file --resume     # go on after an interruption: the result is the same to the last bit
"""
import argparse

import torch
$imports
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import grl_surgery as gs

STEPS, BATCH, LR, CLIP, CLASSES, EVERY = 2000, $batch, 1e-3, 1.0, $classes, 100


def datasets():
    """EDIT: $data_words; here random numbers."""
    inputs, labels = $inputs, torch.randint(CLASSES, ($count,))
    return TensorDataset(inputs, labels), TensorDataset($shifted, labels)


def train_mode(model):
    """Train mode, but batch norms keep their statistics: those of a batch would mix both domains."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--until", type=int, default=STEPS, help="stop after this step, to be resumed")
    options = parser.parse_args()
    torch.manual_seed(0)
    $device
    network = $network
    split = [random_split(data, [0.9, 0.1], torch.Generator().manual_seed(0)) for data in datasets()]
    pairs = gs.paired(*(DataLoader(train, BATCH, shuffle=True, drop_last=True) for train, _ in split))
    held_out = [DataLoader(test, BATCH) for _, test in split]

    # The head, and the proof that its loss reaches the network reversed, and nothing else is changed.
    train_mode(network)
    example = next(iter(held_out[0]))[0]
    m = gs.attach_domain_head(network, after=$after, name="$name",$condition example_inputs=example)
    print(gs.verify_flip(m, reference=network, example_inputs=example).raise_if_failed().verdict)
    groups = gs.param_groups($to_device, lr=LR)
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4)$prepare
    rate = lambda step: gs.dann_lr(min(step / STEPS, 1.0), lr0=1.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    coefficient = gs.CoefficientScheduler(m, gs.schedules.dann(hi=1.0), STEPS)
    best, first = gs.validators.Best("$validator"), 0
    run = {"rates": rates, "coefficient": coefficient, "pairs": pairs, "best": best}
    if options.resume:
        first = gs.load_run("run.pt", m, optimizer, **run)["step"]

    metrics = gs.AdversarialMetrics(m)
    of_domain = torch.arange(2 * BATCH, device=device) // BATCH
    for step in range(first + 1, options.until + 1):
        (source, labels), (target, $target_labels) = next(pairs)
        logits, domain_logits = m(torch.cat([source, target]).to(device))
        task = $task
        loss = task + gs.domain_loss(domain_logits, of_domain$weights)
        optimizer.zero_grad()
        $backward
        $clip
        metrics.update(domain_logits, of_domain)
        optimizer.step()
        rates.step()
        coefficient.step()
        if step % EVERY == 0 or step == options.until:
            report = metrics.report()
            value = validate(m, held_out, device)
            print(f"step {step}  task {task.item():.3f}  $validator_words {value:.4f}  "
                  f"domain loss {report.loss:.3f} (chance {report.chance_loss:.3f})  "
                  f"head {report.balanced_accuracy:.3f}  coeff {report.coeff:.3f}  {report.verdict}")
            metrics.reset()
            if best.update(value, step)$on_main:
                torch.save(gs.strip($unwrapped).state_dict(), "best.pt")
            gs.save_run("run.pt", m, optimizer, **run, step=step)
    print(f"best by $validator_words: step {best.step}, {best.value:.4f}")


@torch.no_grad()
def validate(m, held_out, device):
    """$validate_words"""
    m.eval()
$validate
    train_mode(m)
    return value


if __name__ == "__main__":
    main()
'''

_ON_TARGET = """\
    logits = torch.cat([m(inputs.to(device))[0] for inputs, *_ in held_out[1]])
    value = gs.validators.information(logits)"""
_ON_BOTH = """\
    batches = [batch for loader in held_out for batch in loader]
    logits = torch.cat([m(inputs.to(device))[0] for inputs, _ in batches]).cpu()
    value = F.cross_entropy(logits, torch.cat([labels for _, labels in batches])).item()"""

_UNLABELLED = {
    "data_words": "return datasets of (input, label): source, and target (its labels are unused)",
    "target_labels": "*_",
    "task": "F.cross_entropy(logits[:BATCH], labels.to(device))",
    "validator": "information",
    "validator_words": "information",
    "validate_words": "Mutual information of held-out target samples and their classes, without a label.",
    "validate": _ON_TARGET,
    "name": "domain",
    "condition": "",
    "weights": "",
}
_RECIPES: Mapping[Recipe, Mapping[str, str]] = {
    "dann": {**_UNLABELLED, "title": "Domain-adversarial training (Ganin et al. 2016)"},
    "cdan": {
        **_UNLABELLED,
        "title": "Conditional domain-adversarial training (CDAN+E, Long et al. 2018)",
        "weights": ", weights=gs.entropy_weights(logits, of_domain)",
    },
    "fairness": {
        **_UNLABELLED,
        "title": "Training against what tells two groups apart (fairness)",
        "data_words": "return one dataset of (input, label) for each of the two groups",
        "target_labels": "more",
        "task": "F.cross_entropy(logits, torch.cat([labels, more]).to(device))",
        "validator": "lower",
        "validator_words": "held-out loss",
        "validate_words": "Loss of the task on held-out samples of both groups.",
        "validate": _ON_BOTH,
        "name": "group",
    },
}

_TRAINERS: Mapping[Trainer, Mapping[str, str]] = {
    "plain": {
        "run": "python",
        "device": "device = torch.accelerator.current_accelerator(check_available=True) or 'cpu'",
        "to_device": "m.to(device)",
        "prepare": "",
        "backward": "loss.backward()",
        "clip": "torch.nn.utils.clip_grad_norm_(m.parameters(), CLIP)",
        "on_main": "",
        "unwrapped": "m",
    },
    "accelerate": {
        "run": "accelerate launch",
        "device": "accelerator = accelerate.Accelerator()\n    device = accelerator.device",
        "to_device": "m",
        "prepare": "\n    m, optimizer = accelerator.prepare(m, optimizer)",
        "backward": "accelerator.backward(loss)",
        "clip": "accelerator.clip_grad_norm_(m.parameters(), CLIP)",
        "on_main": " and accelerator.is_main_process",
        "unwrapped": "accelerator.unwrap_model(m)",
    },
}


@dataclass(frozen=True)
class _Found:
    """What one forward says of a network."""

    after: str
    output: str | None
    classes: int


def training_script(
    source: str,
    model: nn.Module,
    inputs: Any,
    *,
    recipe: Recipe = "dann",
    trainer: Trainer = "plain",
    after: str | None = None,
    file: str = "train.py",
) -> str:
    """A script that trains ``model`` adversarially, as text; as it stands it runs on random numbers.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> script = training_script("mine.py:network", network, (torch.randn(2, 4),))
        >>> "gs.attach_domain_head(network, after='1'" in script, "CLASSES, EVERY = 2000, 32" in script
        (True, True)

    Args:
        source: What makes the network, as :func:`grl_surgery.loading.model_zoo.load_model` takes it.
        model: That network, which returns class logits (B, K).
        inputs: Its example inputs: one tensor.
        recipe: What is trained against what.
        trainer: Who runs the loop.
        after: The point for the head; by default the last module before the one that returns the logits.
        file: What the script is going to be called.

    Returns:
        The text of the script.

    Raises:
        SurgeryError: There is no such recipe or trainer, or the network takes or returns something else.
    """
    for name, value, known in (("recipe", recipe, get_args(Recipe)), ("trainer", trainer, get_args(Trainer))):
        if value not in known:
            near = near_names(value, known) or [*known]
            raise SurgeryError(f"there is no {name} {value!r}", choices=near, example=f"{name}={near[0]!r}")
    example = _one_tensor(source, inputs)
    found = _look_at(model, example, after)
    words = {**_RECIPES[recipe], **_TRAINERS[trainer]}
    if recipe == "cdan":
        if found.output is None:
            raise SurgeryError(
                "CDAN conditions its head on the class logits, and no module of this network returns them",
                example="a network that ends in a module, such as nn.Linear",
            )
        words["condition"] = f" condition_on={found.output!r},"
    make, imports = _maker(source)
    imports += ["import accelerate"] if trainer == "accelerate" else []
    shape = ", ".join(map(str, example.shape[1:]))
    count = 320
    floating = example.is_floating_point()
    high = 2 if floating else max(2, int(example.max()) + 1)
    return Template(_SCRIPT).substitute(
        words,
        source=source,
        file=file,
        imports="\n".join(sorted(imports)),
        network=make,
        after=repr(found.after),
        classes=found.classes,
        batch=32,
        count=count,
        inputs=f"torch.randn({count}, {shape})" if floating else f"torch.randint({high}, ({count}, {shape}))",
        shifted="1.0 - inputs" if floating else f"{high - 1} - inputs",
    )


def _one_tensor(source: str, inputs: Any) -> Tensor:
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    values = list(values) if isinstance(values, (tuple, list)) else [values]
    if isinstance(inputs, Mapping) or len(values) != 1 or not isinstance(values[0], Tensor):
        kinds = "nothing that is known" if inputs is None else f"{len(values)} arguments"
        raise SurgeryError(
            f"the script is for networks of one tensor, and {source} takes {kinds}",
            example="a factory that returns (network, (torch.randn(2, 3, 64, 64),))",
        )
    return values[0]


def _look_at(model: nn.Module, example: Tensor, after: str | None) -> _Found:
    rows = recorded_points(model, example)
    outputs = [name for name, _, is_output in rows if is_output]
    inner = [name for name, _, is_output in rows if not is_output]
    was_training = model.training
    with torch.no_grad():
        try:
            logits = model.eval()(example)
        finally:
            model.train(was_training)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SurgeryError(
            f"the script is for networks that return class logits (B, K), and this one returns {what}",
            example="a factory whose forward returns the logits",
        )
    if after is None and not inner:
        raise SurgeryError("this network calls no module before its output", example="--after POINT")
    return _Found(after or inner[-1], outputs[-1] if outputs else None, logits.shape[1])


def _maker(source: str) -> tuple[str, list[str]]:
    """The expression that makes the network, and what it imports."""
    library, _, name = source.partition("/")
    if library == "timm" and re.fullmatch(r"[\w.]+", name):
        return f'timm.create_model("{name}", pretrained=False, num_classes=CLASSES)', ["import timm"]
    if library == "torchvision" and re.fullmatch(r"\w+", name):
        made = f'torchvision.models.get_model("{name}", weights=None, num_classes=CLASSES)'
        return made, ["import torchvision"]
    return f"load_model({source!r}).module", ["from grl_surgery.loading.model_zoo import load_model"]
