"""Validators: how well a network does on the target, estimated without a label of the target.

Every validator takes what a network gave on held-out samples and returns one number, as its paper defines it.
For some the higher number is the better one, for others the lower: :data:`BETTER` says which, and
:class:`Best` keeps the best step of a run by it. None of them is right everywhere: compare several.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.nn.pooling import check_tensor
from grl_surgery.training.metrics import proxy_a_distance
from grl_surgery.validation import check_count, check_number

__all__ = [
    "BETTER",
    "Best",
    "a_distance",
    "controlled_risk",
    "dev",
    "entropy",
    "importance_weights",
    "information",
    "snd",
]

BETTER: Mapping[str, Literal["higher", "lower"]] = {
    "entropy": "lower",
    "information": "higher",
    "snd": "higher",
    "dev": "lower",
    "a_distance": "lower",
}
"""Which number is the better one, by the name of the validator."""


# ----------------------------------------------------------------------------------- on predictions alone


def entropy(target_logits: Tensor) -> float:
    """Mean entropy of the predicted classes: low where the network is sure of what it sees.

    Morerio et al., "Minimal-Entropy Correlation Alignment for Unsupervised Deep Domain Adaptation", ICLR
    2018, choose by it. It cannot tell a network that is sure and right from one that is sure and wrong; one
    that calls everything the same class is at its best value 0.

    Example:
        >>> round(entropy(torch.tensor([[0.0, 0.0], [99.0, 0.0]])), 4)  # ln 2 and 0
        0.3466

    Args:
        target_logits: (N, K), before the softmax, floating point.

    Returns:
        -1/N sum_i sum_k p_ik ln p_ik, from 0 to ln K; lower is better.

    Raises:
        ShapeError: Not logits of shape (N, K).
        SurgeryError: A logit is nan, or plus infinity.
    """
    return _entropies(_log_probabilities(target_logits, "entropy")).mean().item()


def information(target_logits: Tensor) -> float:
    """Mutual information of samples and predicted classes: sure of each, and of all classes taken together.

    Bridle, Heading and MacKay, "Unsupervised Classifiers, Mutual Information and 'Phantom Targets'", NeurIPS
    1991; used to adapt by Liang et al., "Do We Really Need to Access the Source Data? Source Hypothesis
    Transfer", ICML 2020. Classes of very different frequency are counted against the network.

    Example:
        >>> round(information(torch.tensor([[99.0, 0.0], [0.0, 99.0]])), 4)  # ln 2 - 0
        0.6931
        >>> information(torch.tensor([[99.0, 0.0], [99.0, 0.0]]))  # sure, and all of one class
        0.0

    Args:
        target_logits: (N, K), before the softmax, floating point.

    Returns:
        H(mean_i p_i) - mean_i H(p_i), from 0 to ln K; higher is better.

    Raises:
        ShapeError: Not logits of shape (N, K).
        SurgeryError: A logit is nan, or plus infinity.
    """
    log_p = _log_probabilities(target_logits, "information")
    mean = log_p.logsumexp(dim=0, keepdim=True) - math.log(len(log_p))
    return (_entropies(mean) - _entropies(log_p).mean()).item()


def snd(target_logits: Tensor, temperature: float = 0.05) -> float:
    """Soft neighbourhood density: high where each sample has many others near it that are predicted alike.

    Saito et al., "Tune it the Right Way: Unsupervised Validation of Domain Adaptation via Soft Neighborhood
    Density", ICCV 2021, equations 1 to 3: S_ij is the cosine of the probability vectors of samples i and j,
    P_ij = exp(S_ij / T) / sum_{k != i} exp(S_ik / T), and the density is the mean entropy of P's rows. It
    needs memory for 1,024 N numbers and time for N squared. A network that calls everything the same class is
    at its best value ln(N - 1), so compare with :func:`information`.

    Example:
        >>> round(snd(torch.zeros(5, 3)), 4)  # all alike: ln 4
        1.3863

    Args:
        target_logits: (N, K), before the softmax, floating point, N at least 3.
        temperature: T, positive.

    Returns:
        From 0 to ln(N - 1); higher is better. It depends on N: compare only what has the same samples.

    Raises:
        ShapeError: Not logits of shape (N, K), or fewer than 3 of them.
        SurgeryError: A logit is nan or plus infinity, or the temperature is no positive number.
    """
    check_number("temperature", temperature, positive=True, example="snd(target_logits, temperature=0.05)")
    log_p = _log_probabilities(target_logits, "snd")
    if len(log_p) < 3:
        raise ShapeError(
            f"snd compares each sample with at least two others, got {len(log_p)} samples",
            example="snd(torch.randn(1000, 10))",
        )
    directions = F.normalize(log_p.exp(), dim=1)
    total = 0.0
    for start in range(0, len(directions), _ROWS_AT_A_TIME):
        rows = torch.arange(start, min(start + _ROWS_AT_A_TIME, len(directions)))
        similar = directions[rows] @ directions.T / temperature
        similar[torch.arange(len(rows)), rows] = -torch.inf
        total += _entropies(similar.log_softmax(dim=1)).sum().item()
    return total / len(directions)


_ROWS_AT_A_TIME = 1024


# -------------------------------------------------------------------------------------- on both domains


def dev(
    source_features: Tensor, held_out_features: Tensor, held_out_losses: Tensor, target_features: Tensor
) -> float:
    """Deep embedded validation: the risk on the target, estimated from labelled samples of the source.

    You et al., "Towards Accurate Model Selection in Deep Unsupervised Domain Adaptation", ICML 2019,
    equations 4 to 7: the losses of held-out source samples, each weighted by how much more likely its feature
    is on the target (:func:`importance_weights`), with a control variate (:func:`controlled_risk`). Where the
    features of the domains hardly overlap, a few samples carry all the weight, and the estimate is worth
    little; look at the effective number of samples, ``w.sum() ** 2 / (w ** 2).sum()``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> train, held_out, target = (torch.randn(200, 4, generator=generator) for _ in range(3))
        >>> losses = held_out[:, 0] ** 2  # the domains are alike, so their risks are
        >>> abs(dev(train, held_out, losses, target) - losses.mean().item()) < 0.1
        True

    Args:
        source_features: (N, C), of the source; they teach what tells the domains apart.
        held_out_features: (M, C), of other samples of the source.
        held_out_losses: (M,), the loss of each of those, or whether it is misclassified.
        target_features: (L, C), of the target.

    Returns:
        The risk, in the unit of the losses; lower is better. The control variate can take it below zero.

    Raises:
        ShapeError: The sizes do not fit each other.
        SurgeryError: A feature or a loss is infinite or nan.
    """
    weights = importance_weights(source_features, target_features, held_out_features)
    return controlled_risk(held_out_losses, weights)


def importance_weights(source_features: Tensor, target_features: Tensor, features: Tensor) -> Tensor:
    """How much more likely each of ``features`` is on the target than on the source: p_T(f) / p_S(f).

    Bickel, Brueckner and Scheffer, "Discriminative Learning for Differing Training and Test Distributions",
    ICML 2007: a classifier of domains with P(source | f) and P(target | f) gives the weight
    N_S / N_T x P(target | f) / P(source | f). Here it is an L2-regularised logistic regression of
    standardised features (the authors of DEV take a small network), whose regularisation is the one of four
    with the least loss on a fifth of the samples that is held out.

    Example:
        >>> near, far = torch.randn(50, 2), torch.randn(50, 2) + 1.0
        >>> weights = importance_weights(near, far, torch.tensor([[-3.0, -3.0], [4.0, 4.0]]))
        >>> bool(weights[0] < 0.1) and bool(weights[1] > 10.0)
        True

    Args:
        source_features: (N, C), floating point, N at least 5.
        target_features: (L, C), L at least 5.
        features: (M, C), which are to be weighted.

    Returns:
        (M,), float64, on the CPU, positive.

    Raises:
        ShapeError: Not three matrices of C columns with enough rows.
        SurgeryError: A feature is infinite or nan.
    """
    sets = {"source": source_features, "target": target_features, "held-out": features}
    source, target, chosen = _check_feature_sets(sets, least=(_FOLDS, _FOLDS, 1))
    columns = torch.cat([source, target])
    mean, scale = columns.mean(dim=0), columns.std(dim=0)
    scale = scale.where(scale > 0, 1.0)
    columns, chosen = (columns - mean) / scale, (chosen - mean) / scale
    labels = torch.cat([source.new_zeros(len(source)), source.new_ones(len(target))])
    # Every fifth sample of each domain, in an order that does not depend on the one they came in.
    generator = torch.Generator().manual_seed(0)
    order = [torch.randperm(len(domain), generator=generator) for domain in (source, target)]
    held_out = torch.cat([order[0] % _FOLDS == 0, order[1] % _FOLDS == 0])
    risks = {}
    for l2 in _REGULARISATIONS:
        weights = _logistic_regression(columns[~held_out], labels[~held_out], l2)
        risks[l2] = F.binary_cross_entropy_with_logits(_scores(columns[held_out], weights), labels[held_out])
    best = min(risks, key=lambda l2: risks[l2].item())
    # The logit of the regression is ln P(target | f) / P(source | f).
    scores = _scores(chosen, _logistic_regression(columns, labels, best))
    return scores.exp() * (len(source) / len(target))


_FOLDS = 5
_REGULARISATIONS = (1e-3, 1e-2, 1e-1, 1.0)


def controlled_risk(losses: Tensor, weights: Tensor) -> float:
    """Mean of weighted losses with the control variate of DEV: mean(w l) + eta mean(w) - eta.

    You et al. 2019, equation 7, with eta = -cov(w l, w) / var(w): the weights have mean 1 in theory, and what
    their mean misses by in the sample says by how much the weighted loss is off.

    Example:
        >>> losses, weights = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 1.0])
        >>> controlled_risk(losses, weights)  # nothing to weight
        2.0
        >>> round(controlled_risk(losses, torch.tensor([0.5, 1.0, 2.0])), 4)  # 17/6 - 26/7 x 1/6
        2.2143

    Args:
        losses: (M,), M at least 2.
        weights: (M,), not negative.

    Returns:
        The risk, in the unit of the losses.

    Raises:
        ShapeError: Not two vectors of the same length.
        SurgeryError: One is infinite or nan, or a weight negative.
    """
    example = "controlled_risk(losses, importance_weights(source, target, held_out))"
    for vector in (losses, weights):
        check_tensor(vector, "controlled_risk", example=example)
    if losses.dim() != 1 or losses.shape != weights.shape or len(losses) < 2:
        raise ShapeError(
            f"losses of shape {tuple(losses.shape)} and weights of shape {tuple(weights.shape)}: expected "
            "two vectors (M,), M at least 2",
            example=example,
        )
    loss, weight = losses.detach().cpu().double(), weights.detach().cpu().double()
    if not (loss.isfinite().all() and weight.isfinite().all()) or (weight < 0).any():
        raise SurgeryError("losses and weights must be finite, and weights not negative", example=example)
    weighted = weight * loss
    centred = weight - weight.mean()
    variance = centred.square().sum()
    if variance == 0:
        return weighted.mean().item()
    eta = -((weighted - weighted.mean()) * centred).sum() / variance
    return (weighted.mean() + eta * weight.mean() - eta).item()


def a_distance(source_features: Tensor, target_features: Tensor, *, seeds: Sequence[int] = range(5)) -> float:
    """The proxy A-distance of both domains' features, mean over several ways to halve them.

    Ben-David et al., "Analysis of Representations for Domain Adaptation", NeurIPS 2006; see
    :func:`grl_surgery.proxy_a_distance`. Low where the features are alike, which is needed for a classifier
    to carry over, and not enough: features that say nothing are alike as well.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> one, other = (torch.randn(100, 8, generator=generator) for _ in range(2))
        >>> a_distance(one, other + 10.0), abs(a_distance(one, other)) < 0.5
        (2.0, True)

    Args:
        source_features: (N, C), floating point, not used in training the network.
        target_features: (M, C), of the other domain.
        seeds: One for each way to halve them.

    Returns:
        The distance, in [-2, 2]; lower is better.

    Raises:
        ShapeError: Not two matrices of C columns with at least 4 rows each.
        SurgeryError: A feature is infinite or nan, or there is no seed.
    """
    if not seeds:
        raise SurgeryError("seeds is empty", example="a_distance(source, target, seeds=range(5))")
    return sum(proxy_a_distance(source_features, target_features, seed=seed) for seed in seeds) / len(seeds)


# ----------------------------------------------------------------------------------- choosing by a validator


@dataclass
class Best:
    """The best step of a run by one validator, and whether it is time to stop.

    A number that is not finite never becomes the best one. The object has a state_dict, so that
    :func:`grl_surgery.save_run` takes it along.

    Example:
        >>> best = Best("information", patience=2)
        >>> [best.update(value, step) for step, value in enumerate([0.5, 0.9, 0.8, 0.7])]
        [True, True, False, False]
        >>> best.step, best.value, best.stop
        (1, 0.9, True)

    Args:
        validator: A name in :data:`BETTER`; or ``"higher"`` or ``"lower"`` for a number of your own.
        patience: After how many updates without a better one ``stop`` is true; None for never.

    Attributes:
        value: The best number so far; None before the first.
        step: The step that it is of.
        stop: Whether ``patience`` updates in a row were no better.

    Raises:
        SurgeryError: There is no such validator, or ``patience`` is no number of updates.
    """

    validator: str
    patience: int | None = None
    value: float | None = None
    step: int | None = None
    since: int = 0

    def __post_init__(self) -> None:
        if self.validator not in (*BETTER, "higher", "lower"):
            raise SurgeryError(
                f"there is no validator {self.validator!r}",
                choices=[*BETTER, "higher", "lower"],
                example="Best('information')",
            )
        if self.patience is not None:
            check_count("patience", self.patience, example="Best('information', patience=5)")

    @property
    def stop(self) -> bool:
        """Whether ``patience`` updates in a row were no better."""
        return self.patience is not None and self.since >= self.patience

    def update(self, value: float, step: int) -> bool:
        """Take in the number of one step; say whether it is the best so far."""
        higher = BETTER.get(self.validator, self.validator) == "higher"
        better = math.isfinite(value) and (
            self.value is None or (value > self.value if higher else value < self.value)
        )
        if better:
            self.value, self.step, self.since = float(value), int(step), 0
        else:
            self.since += 1
        return better

    def state_dict(self) -> dict[str, Any]:
        """What was best, in plain Python types."""
        return {"validator": self.validator, "value": self.value, "step": self.step, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            SurgeryError: The state is of another validator. Nothing is changed then.
        """
        theirs = state.get("validator")
        if theirs != self.validator:
            raise SurgeryError(
                f"the run was judged by {theirs!r}, and this object by {self.validator!r}",
                example=f"Best({theirs!r})",
            )
        self.value, self.step, self.since = state["value"], state["step"], state["since"]


# ---------------------------------------------------------------------------------------------- arithmetic


def _log_probabilities(logits: Tensor, owner: str) -> Tensor:
    """(N, K), float64, on the CPU."""
    example = f"{owner}(torch.randn(1000, 10))"
    check_tensor(logits, owner, example=example)
    if logits.dim() != 2 or logits.numel() == 0 or not logits.is_floating_point():
        raise ShapeError(
            f"logits of shape {tuple(logits.shape)}, {logits.dtype}: expected (N, K), floating point, "
            "not empty",
            example=example,
        )
    log_p = logits.detach().cpu().double().log_softmax(dim=1)
    if log_p.isnan().any():
        raise SurgeryError(f"{owner} got logits that are nan or plus infinity", example=example)
    return log_p


def _entropies(log_p: Tensor) -> Tensor:
    """Entropy of each row; 0 ln 0 is 0."""
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(dim=1)


def _check_feature_sets(sets: Mapping[str, Tensor], least: Sequence[int]) -> list[Tensor]:
    example = "importance_weights(source, target, held_out), each (N, C)"
    for features in sets.values():
        check_tensor(features, "importance_weights", example=example)
    shapes = [tuple(features.shape) for features in sets.values()]
    fit = all(len(s) == 2 and s[0] >= n and s[1] == shapes[0][-1] for s, n in zip(shapes, least, strict=True))
    if not fit or shapes[0][1] == 0:
        raise ShapeError(
            f"{', '.join(f'{name} features of shape {s}' for name, s in zip(sets, shapes, strict=True))}: "
            f"expected matrices with the same columns and at least {', '.join(map(str, least))} rows",
            example=example,
        )
    for name, features in sets.items():
        if not features.isfinite().all():
            raise SurgeryError(
                f"the {name} features contain inf or nan", example="features[features.isfinite().all(dim=1)]"
            )
    return [features.detach().cpu().double() for features in sets.values()]


def _scores(columns: Tensor, weights: Tensor) -> Tensor:
    return columns @ weights[:-1] + weights[-1]


def _logistic_regression(columns: Tensor, labels: Tensor, l2: float) -> Tensor:
    """Weights (C + 1,), offset last, with the least mean logistic loss + l2 / 2 |w|^2, by Newton steps."""
    padded = torch.cat([columns, columns.new_ones(len(columns), 1)], dim=1)
    penalty = columns.new_full((padded.shape[1],), l2)
    penalty[-1] = 1e-8  # the offset is free, but for what keeps the system solvable
    weights = columns.new_zeros(padded.shape[1])

    def loss(at: Tensor) -> Tensor:
        data = F.binary_cross_entropy_with_logits(padded @ at, labels)
        return data + 0.5 * (penalty * at.square()).sum()

    for _ in range(_NEWTON_STEPS):
        p = torch.sigmoid(padded @ weights)
        gradient = padded.T @ (p - labels) / len(labels) + penalty * weights
        curvature = (padded.T * (p * (1.0 - p))) @ padded / len(labels) + penalty.diag()
        step = torch.linalg.solve(curvature, gradient)
        rate = 1.0
        while loss(weights - rate * step) > loss(weights) and rate > 1e-6:
            rate *= 0.5
        weights = weights - rate * step
        if step.abs().max() < 1e-10:
            break
    return weights


_NEWTON_STEPS = 50
