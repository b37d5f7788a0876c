"""Domain-adversarial training (DANN, Ganin et al. 2016) on digits, by surgery on a network from outside.

Digits with labels are the source; the same kind of digits blended into photographs, without labels, the
target. Three ways to train the same network are compared on test images of the target: ``source`` (what you
get for nothing), ``dann``, and ``target`` (on the target's labels: what could be had at best).

    python examples/train_dann.py                                    # one seed, three modes, a few minutes
    python examples/train_dann.py --seeds 0 1 2 3 4 --plot dann.png --json dann.json
    python examples/train_dann.py --checkpoint run.pt                # interrupt it as you like, then
    python examples/train_dann.py --checkpoint run.pt --resume       # ... the same result
    torchrun --nproc-per-node 2 examples/train_dann.py --parallel ddp

Only the accuracies that are printed ever look at a label of the target; nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from digits import Domains, Examples, Stream, load_domains
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import grl_surgery as gs
from grl_surgery.training.losses import domain_loss
from grl_surgery.training.metrics import AdversarialMetrics, proxy_a_distance
from grl_surgery.training.optimization import param_groups
from grl_surgery.training.schedules import CoefficientScheduler, dann

MODES = ("source", "dann", "target")
AVERAGING = 0.99
"""The weights that are tested are a running mean over about 1 / (1 - AVERAGING) steps, in every mode: an
adversarial game circles around its solution rather than settling on it."""


# ------------------------------------------------------------------------------------------------ networks


class PaperNetwork(nn.Module):
    """The network of the DANN paper for MNIST, without batch norm. There is no reversal in it."""

    feature, fresh = "flatten", "fc3"

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 5)
        self.conv2 = nn.Conv2d(32, 48, 5)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(48 * 4 * 4, 100)
        self.fc2 = nn.Linear(100, 100)
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, 10) of images (B, 3, 28, 28)."""
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(self.flatten(x)))
        return self.fc3(F.relu(self.fc2(x)))


class PretrainedNetwork(nn.Module):
    """timm's EfficientNet-Lite0 with ImageNet weights, for small images."""

    feature, fresh = "body.global_pool", "body.classifier"

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        from grl_surgery.cli.demo import load_packaged_efficientnet_lite0

        self.body = load_packaged_efficientnet_lite0()
        self.body.reset_classifier(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (B, 10) of images (B, 3, 28, 28)."""
        return self.body(F.interpolate(images * 2.0, size=(64, 64), mode="bilinear"))


BACKBONES = {"efficientnet_lite0": PretrainedNetwork, "paper": PaperNetwork}
DEFAULTS = {
    "efficientnet_lite0": {
        "steps": 450,
        "lr": 2e-4,
        "head_multiplier": 10.0,
        "hi": 1.0,
        "hidden": 1024,
        "depth": 2,
        "dropout": 0.5,
    },
    "paper": {
        "steps": 1500,
        "lr": 1e-3,
        "head_multiplier": 1.0,
        "hi": 0.3,
        "hidden": 100,
        "depth": 1,
        "dropout": 0.0,
    },
}
"""Chosen on another target, digits in other photographs, whose labels the reported ones do not share."""


def set_train_mode(model: nn.Module) -> None:
    """Train mode, but batch norms keep their statistics: those of a batch would mix two domains."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


# -------------------------------------------------------------------------------------------- one training


class Run:
    """One training from start to end: what it consists of, one step of it, and how to save it in between."""

    def __init__(self, mode: str, seed: int, args: argparse.Namespace, domains: Domains) -> None:
        self.mode, self.seed, self.args, self.domains = mode, seed, args, domains
        self.step, self.seconds, self.curve = 0, 0.0, []
        rank = int(os.environ.get("RANK", 0))
        torch.manual_seed(seed)
        network = BACKBONES[args.backbone]().to(args.device)
        if args.parallel != "fsdp":  # which takes contiguous parameters only
            network = network.to(memory_format=torch.channels_last)
        self.scheduler: CoefficientScheduler | None = None
        if mode == "dann":
            self.model = gs.attach_domain_head(
                network,
                after=network.feature,
                hidden=args.hidden,
                depth=args.depth,
                dropout=args.dropout,
                example_inputs=self._probe(),
            )
            self.scheduler = CoefficientScheduler(self.model, dann(hi=args.hi), args.steps)
        else:
            self.model = network
        set_train_mode(self.model)
        if mode == "dann":
            report = gs.verify_flip(self.model, reference=network, example_inputs=self._probe())
            say(f"  verify_flip: {'OK' if report.ok else 'FAILED'}: {report.verdict}")
            report.raise_if_failed()
        self.network = distributed(self.model, args)
        # After the wrapping, which may exchange parameters for shards of them.
        groups = param_groups(self.model, args.lr, args.head_multiplier, new=network.fresh)
        self.optimizer = torch.optim.Adam(groups)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.device = next(self.network.parameters()).device
        self.mean = [parameter.detach().clone() for parameter in self.network.parameters()]
        # Each process of a distributed run draws its own batches and its own dropout.
        torch.manual_seed(seed + 7919 * rank)
        self.streams = [
            Stream(len(part.labels), args.batch, seed=2 * (seed + 7919 * rank) + place)
            for place, part in enumerate((domains.source, domains.target))
        ]

    def _probe(self) -> Tensor:
        return self.domains.source.batch(torch.arange(4))[0].contiguous().to(self.args.device)

    # -- training

    def losses(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss of one step and, where there is a head, its logits and their domains."""
        source, target = self.streams
        if self.mode != "dann":
            images, labels = (
                self.domains.target.batch(target.next())
                if self.mode == "target"
                else self.domains.source.batch(source.next())
            )
            logits = self.network(images.to(self.device))
            return F.cross_entropy(logits.float(), labels.to(self.device)), None, None
        images, labels = self.domains.source.batch(source.next())
        unlabelled, _ = self.domains.target.batch(target.next())
        both = self._channels_last(torch.cat([images, unlabelled]))
        of_domain = torch.arange(len(both)).ge(len(images)).long()
        logits, domain_logits = self.network(both)
        task = F.cross_entropy(logits[: len(images)].float(), labels.to(self.device))
        return task + domain_loss(domain_logits, of_domain), domain_logits, of_domain

    def train_step(self, metrics: AdversarialMetrics | None) -> None:
        """One step of the optimizer, and of the coefficient."""
        args, progress = self.args, self.step / self.args.steps
        # Constant for the first half, then down to a twentieth: the last steps average the game out.
        factor = 1.0 if progress < 0.5 else 1.0 - 0.95 * (2.0 * progress - 1.0)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.autocast):
            loss, domain_logits, of_domain = self.losses()
        self.optimizer.zero_grad()
        loss.backward()
        if args.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), args.clip)
        if metrics is not None and domain_logits is not None and of_domain is not None:
            metrics.update(domain_logits, of_domain)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        keep = min(AVERAGING, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for mean, parameter in zip(self.mean, self.network.parameters(), strict=True):
                mean.lerp_(parameter.detach(), 1.0 - keep)
        self.step += 1

    def _channels_last(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last).to(self.device)

    # -- testing

    @contextlib.contextmanager
    def tested_weights(self) -> Iterator[nn.Module]:
        """The network in eval mode with the averaged weights, then everything as it was."""
        parameters = list(self.network.parameters())
        current = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, mean in zip(parameters, self.mean, strict=True):
                parameter.copy_(mean)
            self.network.eval()
            try:
                yield self.network
            finally:
                set_train_mode(self.network)
                for parameter, value in zip(parameters, current, strict=True):
                    parameter.copy_(value)

    def test(self, examples: Examples, count: int | None = None) -> tuple[float, float, Tensor]:
        """Accuracy; mutual information of images and predictions, which needs no label; features (N, C)."""
        labels = examples.labels[:count]
        features: list[Tensor] = []
        point = self.model.get_submodule(BACKBONES[self.args.backbone].feature)
        hook = point.register_forward_hook(
            lambda module, inputs, output: features.append(output.flatten(1).float().cpu())
        )
        with self.tested_weights() as network:
            outputs = [
                network(self._channels_last(examples.batch(chunk)[0]))
                for chunk in torch.arange(len(labels)).split(500)
            ]
        hook.remove()
        logits = torch.cat([output[0] if isinstance(output, tuple) else output for output in outputs]).cpu()
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        p = logits.double().softmax(1)
        information = (_entropy(p.mean(0)) - _entropy(p).mean()).item()
        return accuracy, information, torch.cat(features)

    def result(self) -> dict[str, Any]:
        """What is reported of a finished run."""
        source, _, source_features = self.test(self.domains.source_test)
        target, information, target_features = self.test(self.domains.target_test)
        digest = hashlib.sha256()
        for parameter in self.network.parameters():
            full = parameter.detach()
            full = full.full_tensor() if hasattr(full, "full_tensor") else full
            digest.update(full.cpu().contiguous().numpy().tobytes())
        return {
            "mode": self.mode,
            "seed": self.seed,
            "source_accuracy": source,
            "target_accuracy": target,
            "information": information,
            "a_distance": proxy_a_distance(source_features, target_features),
            "seconds": self.seconds,
            "digest": digest.hexdigest(),
            "curve": self.curve,
            "features": torch.stack([source_features[:400], target_features[:400]]),
        }

    # -- saving

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on."""
        return {
            "mode": self.mode,
            "seed": self.seed,
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "model": self.model.state_dict(),
            "mean": self.mean,
            "optimizer": self.optimizer.state_dict(),
            "coefficient": self.scheduler and self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "random_of_gpus": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "streams": [stream.state_dict() for stream in self.streams],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["coefficient"])
        for mean, saved in zip(self.mean, state["mean"], strict=True):
            mean.copy_(saved)
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(saved)
        torch.set_rng_state(state["random"].cpu())
        if state["random_of_gpus"]:
            torch.cuda.set_rng_state_all([s.cpu() for s in state["random_of_gpus"]])


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp_min(1e-12).log()).sum(-1)


def distributed(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model for one process, or for all that torchrun started."""
    if args.parallel == "none":
        return model
    from accelerate import Accelerator

    if args.parallel == "ddp":
        network: nn.Module = Accelerator(cpu=args.device == "cpu").prepare(model)
    else:
        # On CPUs, Accelerate ignores its FSDP plugin without a word and takes DDP.
        mesh = init_device_mesh(torch.device(args.device).type, (dist.get_world_size(),))
        # Spliced blocks keep their class, so that a policy by class finds them as before.
        for module in model.modules():
            if type(module).__name__ in _SHARDED:
                fully_shard(module, mesh=mesh)
        # By default the root keeps its parameters whole after a forward; they are read between the steps.
        network = fully_shard(model, mesh=mesh, reshard_after_forward=True)
    say(f"  {dist.get_world_size()} processes, {type(network).__name__}")
    return network


_SHARDED = ("InvertedResidual", "DepthwiseSeparableConv", "DomainHead")
"""Classes of the blocks that are gathered as one each."""


# --------------------------------------------------------------------------------------------- checkpoints


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint such that at every moment there is a whole one: the old or the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    # The new name is on the disk only once the directory is.
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint of a run with the same settings."""
    if not path.exists():
        raise SystemExit(f"--resume: there is no checkpoint {path}; start without --resume")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    differing = [key for key in settings if state["settings"].get(key) != settings[key]]
    if differing:
        shown = "; ".join(f"--{k} was {state['settings'].get(k)}, is {settings[k]}" for k in differing)
        raise SystemExit(f"--resume: {path} belongs to a run with other settings: {shown}")
    return state


class Interruption:
    """Remembers that SIGTERM arrived, for the loop to save and stop between two steps."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True


# ------------------------------------------------------------------------------------------------ all runs


def train(run: Run, args: argparse.Namespace, interruption: Interruption, save: Any) -> bool:
    """Train to the end; False where SIGTERM came first."""
    watch = AdversarialMetrics(run.model) if run.mode == "dann" else contextlib.nullcontext()
    with watch as metrics:
        since = time.perf_counter()
        while run.step < args.steps:
            run.train_step(metrics)
            if run.step % args.eval_every == 0 or run.step == args.steps:
                accuracy, information, _ = run.test(run.domains.target_test, args.eval_count)
                run.curve.append([run.step, accuracy, information])
                line = f"  step {run.step:5d}  target {accuracy:.3f}  information {information:.2f}"
                if metrics is not None:
                    report = metrics.report()
                    line += f"  domain loss {report.loss:.3f}  {report.verdict}"
                    metrics.reset()
                say(line)
            stop = interruption.requested
            if stop or run.step % args.save_every == 0:
                run.seconds += time.perf_counter() - since
                since = time.perf_counter()
                save(run)
            if stop:
                return False
        run.seconds += time.perf_counter() - since
    return True


def train_all(args: argparse.Namespace, interruption: Interruption) -> list[dict[str, Any]]:
    """Every mode with every seed, from the beginning or from a checkpoint."""
    if args.parallel != "none":
        from accelerate import Accelerator

        args.device = str(Accelerator(cpu=args.device == "cpu").device)
    settings = {key: getattr(args, key) for key in _SETTINGS}
    domains = load_domains(args.data, count=args.count, root=args.root)
    results: list[dict[str, Any]] = []
    resumed: dict[str, Any] | None = None
    if args.resume:
        state = load_checkpoint(args.checkpoint, settings)
        results, resumed = state["results"], state["run"]
    done = {(result["mode"], result["seed"]) for result in results}

    def save(run: Run | None) -> None:
        if args.checkpoint and int(os.environ.get("RANK", 0)) == 0:
            state = {"settings": settings, "results": results, "run": run and run.state_dict()}
            save_atomically(state, args.checkpoint)

    for seed in args.seeds:
        for mode in args.modes:
            if (mode, seed) in done:
                continue
            say(f"{mode}, seed {seed}")
            run = Run(mode, seed, args, domains)
            if resumed is not None and (resumed["mode"], resumed["seed"]) == (mode, seed):
                run.load_state_dict(resumed)
                say(f"  resumed at step {run.step}")
            if not train(run, args, interruption, save):
                say(f"SIGTERM: stopped at step {run.step}" + _how_to_go_on(args))
                raise SystemExit(128 + signal.SIGTERM)
            results.append(run.result())
            save(None)
            say(f"  {results[-1]['seconds']:.0f} s, parameters sha256:{results[-1]['digest'][:16]}")
    return results


def _how_to_go_on(args: argparse.Namespace) -> str:
    return f" and saved; go on with --checkpoint {args.checkpoint} --resume" if args.checkpoint else ""


def say(text: str) -> None:
    """Print, once for all processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


# -------------------------------------------------------------------------------------------- the results


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table in Markdown, and the part of the gap that DANN closes."""
    modes = [mode for mode in MODES if any(result["mode"] == mode for result in results)]
    seeds = sorted({result["seed"] for result in results})
    found = {(r["mode"], r["seed"]): 100.0 * r["target_accuracy"] for r in results}
    rows = [["trained", *(f"seed {seed}" for seed in seeds), "mean ± std"]]
    rows.append(["---", *("---:" for _ in seeds), "---:"])
    for mode in modes:
        rows.append([mode, *_cells([found[mode, seed] for seed in seeds], "{:.1f}")])
    if set(modes) == set(MODES):
        low, middle, high = ([found[mode, seed] for seed in seeds] for mode in MODES)
        parts = [100 * (b - a) / (c - a) if c != a else math.nan for a, b, c in zip(low, middle, high)]  # noqa: B905
        rows.append(["gap closed, %", *_cells(parts, "{:.0f}")])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if set(modes) == set(MODES):
        a, b, c = (sum(values) / len(values) for values in (low, middle, high))
        lines.append(
            f"\nGap closed between the means: {100 * (b - a) / (c - a) if c != a else math.nan:.1f}%"
        )
    return "\n".join(lines)


def _cells(values: Sequence[float], form: str) -> list[str]:
    numbers = torch.tensor(values, dtype=torch.float64)
    spread = numbers.std().item() if len(values) > 1 else 0.0
    return [*(form.format(v) for v in values), f"{form.format(numbers.mean().item())} ± {spread:.1f}"]


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """The three curves, and the features of both domains before and after, in two dimensions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, before, after) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    names = {"source": "source only", "dann": "DANN", "target": "trained on target"}
    colours = {"source": "#c44e52", "dann": "#4c72b0", "target": "#55a868"}
    for mode, name in names.items():
        runs = [torch.tensor(r["curve"], dtype=torch.float64) for r in results if r["mode"] == mode]
        if runs:
            steps, values = runs[0][:, 0], torch.stack([run[:, 1] for run in runs]) * 100
            curves.plot(steps, values.mean(0), color=colours[mode], label=f"{name}, mean of {len(runs)}")
            curves.fill_between(
                steps, values.amin(0), values.amax(0), color=colours[mode], alpha=0.2, linewidth=0
            )
    curves.set(xlabel="training step", ylabel="accuracy on the target, %", title="Digits in photographs")
    curves.legend(loc="lower right", frameon=False)
    curves.grid(alpha=0.3)
    for axes, mode, title in ((before, "source", "trained on the source only"), (after, "dann", "DANN")):
        _project(axes, next((r for r in results if r["mode"] == mode), None), title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _project(axes: Any, result: dict[str, Any] | None, title: str) -> None:
    from sklearn.manifold import TSNE

    axes.set(xticks=[], yticks=[], title=f"Features, {title}")
    if result is None:
        return
    features = result["features"]
    flat = features.flatten(0, 1).numpy()
    points = TSNE(init="pca", random_state=0, perplexity=30).fit_transform(flat).reshape(2, -1, 2)
    for place, (name, colour) in enumerate((("source", "#8c8c8c"), ("target", "#dd8452"))):
        axes.scatter(*points[place].T, s=9, color=colour, label=name, alpha=0.8, linewidths=0)
    axes.legend(loc="upper right", frameon=True, markerscale=2)
    axes.set_xlabel(f"t-SNE, seed {result['seed']}; proxy A-distance {result['a_distance']:.2f}")


# -------------------------------------------------------------------------------------------- command line

# What a checkpoint must agree on with the run that resumes it.
_SETTINGS = (
    *("data", "modes", "seeds", "steps", "batch", "count", "hi", "lr", "head_multiplier"),
    *("hidden", "depth", "dropout", "clip", "autocast", "backbone", "eval_every", "eval_count"),
    *("parallel", "device"),
)


def _by_backbone(name: str) -> str:
    return "default " + ", ".join(f"{values[name]:g} ({key})" for key, values in DEFAULTS.items())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=("digits", "mnist"), default="digits", help="digits needs no network")
    add("--root", type=Path, default=Path("data"), help="where MNIST is kept")
    add("--count", type=int, default=8000, help="training images of each domain")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--seeds", nargs="+", type=int, default=[0])
    add("--steps", type=int, help=_by_backbone("steps"))
    add("--batch", type=int, default=32, help="images of each domain in a batch")
    add("--hi", type=float, help="coefficient that the reversal rises to; " + _by_backbone("hi"))
    add("--lr", type=float, help="learning rate; " + _by_backbone("lr"))
    add("--head-multiplier", type=float, help="new layers, times --lr; " + _by_backbone("head_multiplier"))
    add("--hidden", type=int, help="width of the head; " + _by_backbone("hidden"))
    add("--depth", type=int, help="hidden layers of the head; " + _by_backbone("depth"))
    add("--dropout", type=float, help="of the head; " + _by_backbone("dropout"))
    add("--clip", type=float, default=0.0, help="largest norm of the gradient; 0: no clipping")
    add("--autocast", action="store_true", help="forward in bfloat16")
    add("--backbone", choices=tuple(BACKBONES), default="efficientnet_lite0")
    add("--device", default="cpu", help="cpu or cuda")
    add("--parallel", choices=("none", "ddp", "fsdp"), default="none", help="under torchrun")
    add("--eval-every", type=int, default=50)
    add("--eval-count", type=int, default=500, help="test images for the curves; the table is of all")
    add("--checkpoint", type=Path, help="file to save to, and on SIGTERM")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from --checkpoint")
    add("--json", type=Path, help="write the results there")
    add("--plot", type=Path, help="write the picture there")
    args = parser.parse_args(arguments)
    for name, value in DEFAULTS[args.backbone].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint FILE")
    if args.checkpoint and args.parallel != "none":
        parser.error("--checkpoint holds the random state of one process only: use --parallel none")
    for name in ("steps", "batch", "count", "eval_every", "eval_count", "save_every", "hidden", "depth"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.batch > args.count:
        parser.error(f"--batch {args.batch} is larger than --count {args.count}")
    if not args.hi >= 0 or not args.clip >= 0 or not args.lr > 0:
        parser.error("--hi and --clip must not be negative, and --lr must be positive")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the table, and write what was asked for."""
    args = parse(arguments)
    with Interruption() as interruption:
        results = train_all(args, interruption)
    say("\n" + table(results))
    if int(os.environ.get("RANK", 0)) == 0:
        if args.json:
            plain = [{key: r[key] for key in r if key != "features"} for r in results]
            about = {"python": platform.python_version(), "torch": torch.__version__}
            args.json.write_text(json.dumps({"versions": about, "results": plain}, indent=1))
        if args.plot:
            plot(results, args.plot)
    if args.parallel != "none":
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
