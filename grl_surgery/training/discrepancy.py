"""Losses of the heads that compare a source with a target: margin disparity, and Wasserstein distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.nn.pooling import check_tensor
from grl_surgery.training.losses import check_labels
from grl_surgery.validation import check_number

__all__ = ["GradientPenalty", "mdd_loss", "wasserstein_loss"]

_SOURCE, _TARGET = 0, 1


def mdd_loss(
    logits: Tensor,
    class_logits: Tensor,
    domains: Tensor | int,
    *,
    margin: float = 4.0,
    validate: bool = True,
) -> Tensor:
    """Loss of a head of ``kind="mdd"``: minus the margin disparity discrepancy of both domains.

    margin mean_s[-log p'_y(x)] + mean_t[-log(1 - p'_y(x))], where p' is the softmax of the head's logits and
    y the class that the network itself predicts (Zhang et al., "Bridging Theory and Algorithm for Domain
    Adaptation", ICML 2019, section 5; ``margin`` is their gamma = exp rho). On the source the head is to
    agree with the network, on the target to disagree; the features, behind the reversal, learn to prevent
    that.

    Example:
        >>> logits = torch.zeros(4, 3)
        >>> loss = mdd_loss(logits, torch.eye(4, 3), torch.tensor([0, 0, 1, 1]), margin=2.0)
        >>> torch.allclose(loss, 2.0 * torch.tensor(3.0).log() - torch.tensor(2 / 3).log())
        True

    Args:
        logits: (B, K) of the head.
        class_logits: (B, K) of the network; no gradient flows into them.
        domains: (B,), 0 for a sample of the source and 1 for one of the target; or one of both for the whole
            batch. A domain without a sample adds nothing.
        margin: Weight of the source; positive. The paper tries 1 to 4.
        validate: Check the values of labels, as :func:`domain_loss` does.

    Returns:
        The loss, 0-d, float32 for half-precision logits.

    Raises:
        ShapeError: Not two tensors (B, K) with at least two classes, or labels that do not fit.
        SurgeryError: A label is neither 0 nor 1, or ``margin`` is not positive.
    """
    example = "mdd_loss(domain_logits, class_logits, domains)"
    check_number("margin", margin, positive=True, example=f"{example[:-1]}, margin=4.0)")
    for name, value in (("logits", logits), ("class_logits", class_logits)):
        check_tensor(value, f"mdd_loss, for its {name},", example=example)
    if logits.dim() != 2 or logits.shape[1] < 2 or logits.shape != class_logits.shape:
        raise ShapeError(
            f"mdd_loss compares logits of shape {tuple(logits.shape)} with class logits of shape "
            f"{tuple(class_logits.shape)}; both are (B, K), K classes of the task",
            example="attach_domain_head(model, 'global_pool', kind='mdd', num_classes=10)",
        )
    labels = check_labels(domains, logits, 2, validate)
    full = _full(logits)
    predicted = class_logits.detach().argmax(dim=1)
    agree = F.cross_entropy(full, predicted, reduction="none")
    # log(1 - p_y) as the difference of two sums of exponentials keeps its digits where p_y is close to 1.
    others = full.scatter(1, predicted[:, None], -torch.inf).logsumexp(dim=1)
    disagree = full.logsumexp(dim=1) - others
    return margin * _mean_of(agree, labels == _SOURCE) + _mean_of(disagree, labels == _TARGET)


def wasserstein_loss(scores: Tensor, domains: Tensor | int, *, validate: bool = True) -> Tensor:
    """Loss of a head of ``kind="wdgrl"``: minus the critic's estimate of the Wasserstein-1 distance.

    mean_t f(x) - mean_s f(x): minus L_wd of Shen et al., "Wasserstein Distance Guided Representation Learning
    for Domain Adaptation" (AAAI 2018, eq. 2). The critic makes it small, and the features, behind the
    reversal, large. The estimate is one only while :class:`GradientPenalty` is added.

    Example:
        >>> wasserstein_loss(torch.tensor([[3.0], [1.0], [0.5]]), torch.tensor([0, 0, 1]))
        tensor(-1.5000)

    Args:
        scores: (B, 1) or (B,) of the head.
        domains: (B,), 0 for a sample of the source and 1 for one of the target; or one of both for the whole
            batch. A domain without a sample adds nothing.
        validate: Check the values of labels, as :func:`domain_loss` does.

    Returns:
        The loss, 0-d, float32 for half-precision scores.

    Raises:
        ShapeError: Not one score for each sample, or labels that do not fit.
        SurgeryError: A label is neither 0 nor 1.
    """
    check_tensor(scores, "wasserstein_loss", example="wasserstein_loss(domain_logits, domains)")
    if scores.dim() == 0 or scores.numel() != scores.shape[0]:
        raise ShapeError(
            f"wasserstein_loss got scores of shape {tuple(scores.shape)}; a critic gives one for each sample",
            example="attach_domain_head(model, 'global_pool', kind='wdgrl')",
        )
    labels = check_labels(domains, scores, 2, validate)
    flat = _full(scores).flatten()
    return _mean_of(flat, labels == _TARGET) - _mean_of(flat, labels == _SOURCE)


class GradientPenalty:
    """How far the slope of a critic is from 1: mean of (||grad f(h)|| - 1)^2 (Shen et al. 2018, eq. 3).

    The points h are the features that the critic read in the last forward, and random points on the lines
    between pairs of a source and a target feature. They are detached: the penalty trains the critic and not
    the network, as in the paper, where it is left out of the features' step. From the moment that it is
    made, it keeps the last features of the head, by a hook on the classifier.

    Example:
        >>> from grl_surgery.nn.head_building import build_head
        >>> head, domains = build_head((4, 8), kind="wdgrl", hidden=16), torch.tensor([0, 0, 1, 1])
        >>> penalty = GradientPenalty(head)
        >>> scores = head(torch.randn(4, 8))
        >>> loss = wasserstein_loss(scores, domains) + 10.0 * penalty(domains)

    Args:
        head: The head, such as ``m.domain``.

    Raises:
        SurgeryError: It is not a domain head.
    """

    def __init__(self, head: nn.Module) -> None:
        classifier = getattr(head, "classifier", None)
        if not isinstance(classifier, nn.Module):
            raise SurgeryError(
                f"GradientPenalty needs the head, whose classifier is the critic; got {type(head).__name__}",
                example="GradientPenalty(m.domain)",
            )
        self._classifier = classifier
        self._features: Tensor | None = None
        self._paused = False
        self._hook = classifier.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any) -> None:
        if not self._paused:
            self._features = args[0].detach()

    def remove(self) -> None:
        """Take the hook away, and forget the features."""
        self._hook.remove()
        self._features = None

    def __call__(self, domains: Tensor | int, *, validate: bool = True) -> Tensor:
        """The penalty at the features of the last forward.

        Args:
            domains: (B,), 0 for a sample of the source and 1 for one of the target; or one of both for the
                whole batch, which then has no lines between them.
            validate: Check the values of labels, as :func:`domain_loss` does.

        Returns:
            The penalty, 0-d.

        Raises:
            ShapeError: Not one label for each sample of the last forward.
            SurgeryError: The head has not run, or a label is neither 0 nor 1.
        """
        if self._features is None:
            raise SurgeryError(
                "the head has not run since the penalty was made, so there are no features to take it at",
                example="penalty = GradientPenalty(m.domain); output, scores = m(x); penalty(domains)",
            )
        labels = check_labels(domains, self._features, 2, validate)
        source, target = (self._features[labels == domain] for domain in (_SOURCE, _TARGET))
        points = torch.cat([self._features, _between(source, target)]).requires_grad_()
        self._paused = True
        try:
            with torch.enable_grad():
                scores = self._classifier(points)
                (slopes,) = torch.autograd.grad(scores.sum(), points, create_graph=True)
        finally:
            self._paused = False
        distance: Tensor = torch.linalg.vector_norm(slopes.flatten(1), dim=1) - 1.0
        return distance.square().mean()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_features": None}


def _between(source: Tensor, target: Tensor) -> Tensor:
    """A random point on the line between each of some random pairs."""
    count = min(len(source), len(target))
    first, second = (part[torch.randperm(len(part), device=part.device)[:count]] for part in (source, target))
    share = torch.rand(count, *[1] * (source.dim() - 1), device=source.device, dtype=source.dtype)
    return first + share * (second - first)


def _mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of those that count; zero where none does."""
    return values.where(counted, 0.0).sum() / counted.sum().clamp_min(1)


def _full(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
