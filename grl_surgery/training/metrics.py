"""Metrics of an adversarial run: whether the features are confused, or the head is dead."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grl_surgery.errors import PointNotFoundError, ShapeError, SurgeryError
from grl_surgery.nn.heads import find_heads
from grl_surgery.nn.pooling import check_tensor
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.points import near_names
from grl_surgery.training.losses import check_labels, count_domains, loss_per_sample
from grl_surgery.validation import check_network

__all__ = ["AdversarialMetrics", "AdversarialReport", "proxy_a_distance"]

Verdict: TypeAlias = Literal[
    "confused", "separable", "weak head", "fooled", "dead head", "cut off", "diverged", "undecided"
]

_CLOSE_TO_CHANCE = 0.05
"""How far above chance an accuracy may be, besides three standard errors, and count as chance."""

_FAR_ABOVE_CHANCE_LOSS = 1.25
"""From how many times ln K on a loss means a head that is confidently wrong."""

_SEPARABLE_DISTANCE = 0.5
"""From this proxy A-distance on (a linear error below 3/8) the features are separable after all."""


@dataclass(frozen=True)
class AdversarialReport:
    """What was measured in a window of training steps, and what it means.

    Args:
        samples: Number of samples seen from each domain.
        num_domains: Number K of domains that the logits are of.
        coeff: Coefficient of the reversal now.
        accuracy: Accuracy of the head for each domain seen.
        loss: Domain loss, each domain counting the same.
        chance_loss: ln K, the loss of a head that knows nothing.
        head_gradient: Norm of the gradient of the head's parameters, mean over the steps.
        splice_gradient: Norm of the gradient that leaves the reversal towards the features, mean over the
            steps; None where it could not be seen (inside ``torch.compile``).
        a_distance: The proxy A-distance that was given to ``report``, if any.
        verdict: One of a few words.
        explanation: What they mean here, and what to do.
    """

    samples: dict[int, int]
    num_domains: int
    coeff: float
    accuracy: dict[int, float]
    loss: float
    chance_loss: float
    head_gradient: float
    splice_gradient: float | None
    a_distance: float | None = None
    verdict: Verdict = "undecided"
    explanation: str = ""

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the domains' accuracies; 1 / K is chance."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain Python types."""
        return asdict(self)

    def __str__(self) -> str:
        each = ", ".join(f"domain {domain}: {value:.3f}" for domain, value in self.accuracy.items())
        splice = "not seen" if self.splice_gradient is None else f"{self.splice_gradient:.3g}"
        distance = (
            ""
            if self.a_distance is None
            else f"\nproxy A-distance  {self.a_distance:.3f} (0: alike, 2: apart)"
        )
        return (
            f"verdict           {self.verdict}: {self.explanation}\n"
            f"coefficient       {self.coeff:.4g}\n"
            f"domain accuracy   {each} (chance {1 / self.num_domains:.3f})\n"
            f"domain loss       {self.loss:.4f} (chance ln {self.num_domains} = {self.chance_loss:.4f})\n"
            f"gradient norms    head {self.head_gradient:.3g}, at the splice point {splice}{distance}"
        )


@dataclass
class _Window:
    """Running sums on the device, so that an update never waits for it."""

    updates: int = 0
    counts: Tensor | None = None
    correct: Tensor | None = None
    losses: Tensor | None = None
    head_gradients: list[Tensor] = field(default_factory=list)
    splice_gradients: list[Tensor] = field(default_factory=list)


class AdversarialMetrics:
    """Watches one domain head and says whether the features are confused or the head is dead.

    Both have the same loss, ln K. They differ in the gradients, and in whether the head was ever better than
    chance. A hook on the head's reversal reads the gradient there. It does not change the training, and
    ``close()`` or the end of a ``with`` block removes it. Each process of a distributed run sees its own
    samples. With a gradient scaler, the gradients are those after scaling.

    Example:
        >>> from grl_surgery import DomainClassifier, DomainHead
        >>> from grl_surgery.training.losses import domain_loss
        >>> head = DomainHead(DomainClassifier(4, hidden=8))
        >>> features, domains = torch.randn(8, 4, requires_grad=True), torch.tensor([0, 1] * 4)
        >>> with AdversarialMetrics(head) as metrics:
        ...     logits = head(features)
        ...     domain_loss(logits, domains).backward()
        ...     metrics.update(logits, domains)  # between backward() and zero_grad()
        ...     report = metrics.report()
        >>> report.samples, round(report.chance_loss, 4)
        ({0: 4, 1: 4}, 0.6931)

    Args:
        model: A network with a domain head, wrapped or not, or the head itself.
        head: Which one, where the network has several.

    Raises:
        SurgeryError: It is not a network, or has no head, or several and none was named.
        PointNotFoundError: None has that name.
    """

    def __init__(self, model: nn.Module, *, head: str | None = None) -> None:
        self._head = _choose_head(model, head)
        self._window = _Window()
        self._leaving: Tensor | None = None
        self._was_above_chance = False
        self._reversal = cast(GradientReversal, self._head.get_submodule("reversal"))
        self._handle = self._reversal.register_forward_hook(self._watch)

    def _watch(self, module: nn.Module, inputs: object, output: object) -> None:
        # A hook on a tensor inside a compiled graph would break the graph in two.
        if not torch.compiler.is_compiling() and isinstance(output, Tensor) and output.requires_grad:
            # The backward uses the coefficient of this forward, whatever is set in between.
            coeff = self._reversal.coeff.detach().clone()
            output.register_hook(partial(self._record, coeff))  # type: ignore[no-untyped-call]

    def _record(self, coeff: Tensor, gradient: Tensor) -> None:
        square = (coeff * gradient.detach().float()).square().sum()
        self._leaving = square if self._leaving is None else self._leaving + square

    @torch.no_grad()
    def update(self, domain_logits: Tensor, domains: Tensor | int) -> None:
        """Take in one training step: call it between ``backward()`` and ``zero_grad()``.

        Nothing here waits for the device, except for the check of labels that are not on the CPU.

        Args:
            domain_logits: What the head returned, as for :func:`grl_surgery.training.losses.domain_loss`.
            domains: (B,) integers, or one integer for the whole batch.

        Raises:
            SurgeryError: As :func:`grl_surgery.domain_loss`; or another number of domains than before.
        """
        num_domains = count_domains(domain_logits)
        labels = check_labels(domains, domain_logits, num_domains)
        window = self._window
        if window.counts is not None and len(window.counts) != num_domains:
            raise SurgeryError(
                f"logits of {num_domains} domains after logits of {len(window.counts)}: use one "
                "AdversarialMetrics for each head",
                example="AdversarialMetrics(model, head='domain')",
            )
        per_domain = _sums_per_domain(domain_logits, labels, num_domains)
        if window.counts is None:
            window.counts, window.correct, window.losses = (torch.zeros_like(sums) for sums in per_domain)
        for total, sums in zip((window.counts, window.correct, window.losses), per_domain, strict=True):
            total += sums  # type: ignore[operator]
        window.head_gradients.append(_gradient_norm(self._head))
        if self._leaving is not None:
            window.splice_gradients.append(self._leaving.sqrt())
        self._leaving = None
        window.updates += 1

    def report(self, a_distance: float | None = None) -> AdversarialReport:
        """Say what the updates since the last ``reset()`` mean. This waits for the device.

        Args:
            a_distance: A :func:`proxy_a_distance` of held-out features, where measured: it settles what the
                head alone cannot, whether a head at chance has lost or never learned.

        Raises:
            SurgeryError: There was no update yet.
        """
        window = self._window
        if window.counts is None or window.correct is None or window.losses is None:
            raise SurgeryError(
                "there is nothing to report: update() was not called since the start or the last reset()",
                example="metrics.update(domain_logits, domains)",
            )
        counts = window.counts.tolist()
        seen = [domain for domain, count in enumerate(counts) if count]
        accuracy = {domain: (window.correct[domain] / counts[domain]).item() for domain in seen}
        loss = sum((window.losses[domain] / counts[domain]).item() for domain in seen) / len(seen)
        measured = AdversarialReport(
            samples={domain: int(counts[domain]) for domain in seen},
            num_domains=len(counts),
            coeff=self._reversal.coeff.item(),
            accuracy=accuracy,
            loss=loss,
            chance_loss=math.log(len(counts)),
            head_gradient=_mean(window.head_gradients),
            splice_gradient=_mean(window.splice_gradients) if window.splice_gradients else None,
            a_distance=a_distance,
        )
        is_disabled = self._reversal._suspended is not None
        verdict, explanation = _judge(measured, self._was_above_chance, is_disabled)
        return replace(measured, verdict=verdict, explanation=explanation)

    def reset(self) -> None:
        """Begin a new window, such as an epoch, and remember whether the head was above chance in it."""
        if self._window.updates:
            self._was_above_chance |= _is_above_chance(self.report())
        self._window = _Window()

    def close(self) -> None:
        """Take the hook off the reversal again. What was measured stays."""
        self._handle.remove()

    def __enter__(self) -> AdversarialMetrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _choose_head(model: nn.Module, name: str | None) -> nn.Module:
    check_network(model, "AdversarialMetrics", example="AdversarialMetrics(model)")
    heads = find_heads(model)
    if not heads:
        raise SurgeryError(
            f"there is no domain head in this {type(model).__name__}",
            example="model = attach_domain_head(model, after='global_pool')",
        )
    if name is None and len(heads) > 1:
        raise SurgeryError(
            f"there are {len(heads)} domain heads: say which one to watch",
            choices=list(heads),
            example=f"head={next(iter(heads))!r}",
        )
    if name is not None and name not in heads:
        near = near_names(str(name), heads) or list(heads)
        raise PointNotFoundError(
            f"there is no domain head {name!r}",
            choices=near,
            example=f"head={near[0]!r}",
        )
    return heads[name] if name is not None else next(iter(heads.values()))


def _sums_per_domain(logits: Tensor, labels: Tensor, num_domains: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, correct samples (a map counts by its share of positions) and losses, each (K,)."""
    maps = logits.reshape(*logits.shape, *[1] * (3 - logits.dim())).flatten(2)
    predicted = (maps[:, 0] > 0).long() if maps.shape[1] == 1 else maps.argmax(dim=1)
    right = (predicted == labels[:, None]).float().mean(dim=1)
    belongs = torch.arange(num_domains, device=labels.device)[:, None] == labels
    losses = loss_per_sample(logits, labels).float()
    return belongs.sum(dim=1), (belongs * right).sum(dim=1), (belongs * losses).sum(dim=1)


def _gradient_norm(module: nn.Module) -> Tensor:
    gradients = [p.grad.detach() for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    # Of gradients that are sharded over processes (FSDP2), this is the norm of all shards only once gathered.
    return cast(Tensor, norm.full_tensor()) if hasattr(norm, "full_tensor") else norm


def _mean(norms: list[Tensor]) -> float:
    return sum(norm.item() for norm in norms) / len(norms)


def _is_above_chance(report: AdversarialReport) -> bool:
    """Whether the balanced accuracy is above chance by more than its noise and a little."""
    chance = 1.0 / report.num_domains
    variance = sum(chance * (1.0 - chance) / count for count in report.samples.values())
    error = math.sqrt(variance) / len(report.accuracy)
    return report.balanced_accuracy - chance > _CLOSE_TO_CHANCE + 3.0 * error


def _judge(report: AdversarialReport, was_above: bool, is_disabled: bool) -> tuple[Verdict, str]:
    """The verdict, the surest reasons first."""
    norms = [report.head_gradient, report.splice_gradient or 0.0, report.loss]
    if not all(math.isfinite(value) for value in norms):
        return (
            "diverged",
            "a loss or a gradient is infinite or nan; lower the learning rate or clip the gradient",
        )
    return _judge_gradients(report, is_disabled) or _judge_accuracy(report, was_above)


def _judge_gradients(report: AdversarialReport, is_disabled: bool) -> tuple[Verdict, str] | None:
    if is_disabled:
        return "undecided", "the reversal is disabled, so the features are not trained against the head"
    if report.head_gradient == 0.0:
        return "dead head", (
            "its parameters receive no gradient: it is frozen or detached, or ends in a saturated sigmoid "
            "or a softmax over one logit (or update() was not called between backward() and zero_grad())"
        )
    if report.coeff != 0 and report.splice_gradient == 0.0:
        return "cut off", "the head learns, but no gradient leaves it towards the features"
    if len(report.accuracy) < 2:
        return (
            "undecided",
            f"only domain {next(iter(report.accuracy))} was seen; update() needs samples of all",
        )
    if report.coeff < 0:
        return (
            "undecided",
            "the coefficient is negative, so the features are trained to help the head, not against it",
        )
    return None


def _judge_accuracy(report: AdversarialReport, was_above: bool) -> tuple[Verdict, str]:
    if _is_above_chance(report):
        off = ", with the coefficient at 0 as yet" if report.coeff == 0 else ""
        return "separable", f"the head tells the domains apart, so the features are not confused{off}"
    if report.loss > _FAR_ABOVE_CHANCE_LOSS * report.chance_loss:
        return "fooled", (
            "the head is confidently wrong: the features move faster than it follows; lower the coefficient "
            "or raise the head's learning rate"
        )
    if report.a_distance is not None and report.a_distance >= _SEPARABLE_DISTANCE:
        return (
            "weak head",
            "it is at chance, but a linear classifier tells the domains apart: train the head harder",
        )
    if report.a_distance is not None:
        return "confused", "neither the head nor a linear classifier tells the domains apart"
    if was_above:
        return "confused", "the head still learns, was above chance before, and is at chance now"
    return "undecided", (
        "the head is at chance and never was above it: features that are alike and a head that does not "
        "learn look the same from here; give report() a proxy_a_distance of held-out features"
    )


# ------------------------------------------------------------------------------------ proxy A-distance


def proxy_a_distance(source_features: Tensor, target_features: Tensor, *, seed: int = 0) -> float:
    """How well a linear classifier tells two sets of features apart: 2 (1 - 2 error) on held-out ones.

    0 means that it does no better than chance, 2 that it makes no error (Ben-David et al., "Analysis of
    Representations for Domain Adaptation", NeurIPS 2006; as used by Ganin et al. 2016). Half of each domain
    trains an L2-regularised logistic regression, the other half measures the error as the mean of both
    domains' errors, so that unequal numbers do not matter. Alike domains scatter around 0, and so may come
    out below it. Computed on the CPU in float64; a seed always gives the same number and touches no global
    generator.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> one, other = (torch.randn(100, 8, generator=generator) for _ in range(2))
        >>> proxy_a_distance(one, other + 10.0)
        2.0

    Args:
        source_features: (N, C), floating point, not used in training the network.
        target_features: (M, C), of the other domain.
        seed: Which halves.

    Returns:
        The distance, in [-2, 2].

    Raises:
        ShapeError: Not two matrices of C columns with at least 4 rows each.
        SurgeryError: A feature is infinite or nan.
    """
    generator = torch.Generator().manual_seed(seed)
    halves = [
        _split(features, generator) for features in _check_feature_sets(source_features, target_features)
    ]
    train, test = ([half[part] for half in halves] for part in (0, 1))
    mean, scale = torch.cat(train).mean(dim=0), torch.cat(train).std(dim=0)
    scale = scale.where(scale > 0, 1.0)
    source, target = ((features - mean) / scale for features in train)
    direction, offset = _fit_linear(source, target)
    scores = [(features - mean) / scale @ direction + offset for features in test]
    error = 0.5 * ((scores[0] > 0).double().mean() + (scores[1] <= 0).double().mean())
    return 2.0 * (1.0 - 2.0 * error.item())


def _check_feature_sets(*sets: Tensor) -> list[Tensor]:
    example = "proxy_a_distance(FeaturePool('nchw')(source), FeaturePool('nchw')(target))"
    for features in sets:
        check_tensor(features, "proxy_a_distance", example=example)
    shapes = [tuple(features.shape) for features in sets]
    if (
        any(len(shape) != 2 or shape[0] < 4 or shape[1] == 0 for shape in shapes)
        or shapes[0][1] != shapes[1][1]
    ):
        raise ShapeError(
            f"features of shapes {shapes[0]} and {shapes[1]}: expected (N, C) and (M, C), N and M at least 4",
            example=example,
        )
    sets = tuple(features.detach().cpu().double() for features in sets)
    for name, features in zip(("source", "target"), sets, strict=True):
        if not features.isfinite().all():
            raise SurgeryError(
                f"the {name} features contain inf or nan", example="features[features.isfinite().all(dim=1)]"
            )
    return list(sets)


def _split(features: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(features), generator=generator)
    half = len(features) // 2
    return features[order[:half]], features[order[half:]]


def _fit_linear(source: Tensor, target: Tensor, l2: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Logistic regression, each domain counting half: direction (C,) and offset (), positive for the target.

    Minimised is mean log(1 + exp(-y z)) + l2 / 2 |w|^2, convex, so that there is one answer.
    """
    columns = torch.cat([source, target])
    columns = torch.cat([columns, columns.new_ones(len(columns), 1)], dim=1)
    signs = torch.cat([source.new_full((len(source),), -1.0), target.new_ones(len(target))])
    shares = torch.cat([source.new_full((len(s),), 0.5 / len(s)) for s in (source, target)])
    penalty = columns.new_full((columns.shape[1],), l2)
    penalty[-1] = 0.0
    weights = columns.new_zeros(columns.shape[1])
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss_and_gradient() -> Tensor:
        # By hand, so that it works under no_grad and in inference mode.
        margins = signs * (columns @ weights)
        weights.grad = -columns.T @ (shares * signs * torch.sigmoid(-margins)) + penalty * weights
        return shares @ F.softplus(-margins) + 0.5 * (penalty * weights) @ weights

    optimizer.step(loss_and_gradient)  # type: ignore[no-untyped-call]
    return weights[:-1], weights[-1]
