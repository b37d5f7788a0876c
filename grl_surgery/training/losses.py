"""Domain loss: cross-entropy on labels for samples or their places, and the weights of CDAN+E."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor
from torch.nn import functional as F

from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.nn.pooling import check_tensor
from grl_surgery.validation import check_number

__all__ = ["domain_loss", "entropy_weights"]


def domain_loss(
    logits: Tensor,
    domains: Tensor | int,
    *,
    weights: Tensor | None = None,
    binary: bool | None = None,
    balance: bool = False,
    validate: bool = True,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy between domain logits and the domains that the samples, or their places, are from.

    Example:
        >>> logits = torch.zeros(6, 2, requires_grad=True)
        >>> domain_loss(logits, torch.tensor([0, 0, 0, 0, 1, 1])).item() == torch.tensor(2.0).log().item()
        True
        >>> loss = domain_loss(logits[:4], 0) + domain_loss(logits[4:], 1)  # one domain in each batch
        >>> frames = domain_loss(torch.zeros(2, 3, 50), torch.zeros(2, 50, dtype=torch.long))  # at each frame

    Args:
        logits: (B, K) for a softmax over K domains, (B,) or (B, 1) for one logit of domain 1 against domain
            0, or a map (B, K, ...) or (B, 1, ...), whose places count alike. Half precision is computed in
            float32.
        domains: Integers in 0 ... K - 1: (B,), one for each place (B, ...), or one integer for the whole
            batch. Or probabilities in floating point, in the shape of the logits (soft labels, mixup).
        weights: (B,), finite and not negative: the loss is the weighted mean, so that their scale does not
            matter.
        binary: Say which of both is meant, and have it checked; default: by the shape of the logits.
        balance: Count each domain that is in the batch the same, however many samples it has there: the mean
            of the domains' means.
        validate: Check the values of labels and weights. That waits for the device where they are not on the
            CPU, once per call; labels on the CPU, or one integer, are checked without. Shapes are always
            checked.
        ignore_index: Label of samples or places that do not count, such as padding. Where none counts the
            loss is zero.
        label_smoothing: Share in [0, 1) of each label that is spread over all domains (Szegedy et al. 2016).
        class_weights: (K,), how much each domain counts, as ``weight`` of torch's ``cross_entropy``.

    Returns:
        The loss, 0-d, float32 for half-precision logits and otherwise in their dtype. Without ``weights``
        and ``balance`` it is what torch's ``cross_entropy`` makes of the same arguments.

    Raises:
        ShapeError: Logits, domains or weights do not fit each other.
        SurgeryError: A label that is no domain (the message names it), weights that are negative or
            infinite, settings that do not go together, or a softmax over one logit.
    """
    num_domains = count_domains(logits, binary)
    smoothing = _check_smoothing(label_smoothing)
    if isinstance(domains, Tensor) and domains.is_floating_point():
        return _soft_loss(logits, domains, weights, balance, smoothing, class_weights, validate)
    labels = check_labels(domains, logits, num_domains, validate, ignore_index=ignore_index, places=True)
    counted = None if ignore_index is None else labels != ignore_index
    if counted is not None:
        labels = labels.where(counted, 0)
    factors = _check_class_weights(class_weights, logits, num_domains)
    losses = loss_per_place(logits, labels, smoothing, factors)
    if weights is None and not balance and counted is None and factors is None:
        return losses.mean(dim=1).mean()
    scales = _check_weights(weights, losses.new_empty(len(losses)), validate)[:, None].expand_as(losses)
    places = labels.reshape(len(labels), -1).expand_as(losses)
    if counted is not None:
        scales = scales * counted.reshape(len(labels), -1)
    if balance:
        return _mean_of_domains(losses, scales, places, num_domains)
    total = (scales if factors is None else scales * factors[places]).sum()
    return (scales * losses).sum() / total.where(total > 0, 1.0)


def _check_smoothing(value: float) -> float:
    check_number("label_smoothing", value, example="domain_loss(logits, domains, label_smoothing=0.1)")
    if value >= 1.0:
        raise SurgeryError(
            f"label_smoothing is {value!r}, but must be in [0, 1): at 1 no label says anything",
            example="domain_loss(logits, domains, label_smoothing=0.1)",
        )
    return float(value)


def _check_class_weights(class_weights: Tensor | None, logits: Tensor, num_domains: int) -> Tensor | None:
    if class_weights is None:
        return None
    example = f"domain_loss(logits, domains, class_weights=torch.ones({num_domains}))"
    check_tensor(class_weights, "domain_loss, for its class_weights,", example=example)
    if tuple(class_weights.shape) != (num_domains,):
        raise ShapeError(
            f"class_weights of shape {tuple(class_weights.shape)}: expected one for each domain, "
            f"({num_domains},)",
            example=example,
        )
    return class_weights.detach().to(logits.device, _full(logits).dtype)


def _soft_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    balance: bool,
    smoothing: float,
    class_weights: Tensor | None,
    validate: bool,
) -> Tensor:
    """Cross-entropy with probabilities; those of one logit are of domain 1."""
    single = logits.dim() == 1 or logits.shape[1] == 1
    if targets.shape != logits.shape and not (single and targets.numel() == logits.numel()):
        if targets.dim() < logits.dim():  # labels that are no integers
            check_labels(targets, logits, 2 if single else logits.shape[1])
        raise ShapeError(
            f"domain labels are integers 0 to {1 if single else logits.shape[1] - 1}, got {targets.dtype}; "
            f"probabilities have the shape of the logits, {tuple(logits.shape)}, not {tuple(targets.shape)}",
            example="domain_loss(logits, domains.long())",
        )
    if balance:
        raise SurgeryError(
            "balance=True counts samples by their domain, which soft labels do not say",
            example="domain_loss(logits, probabilities)",
        )
    if validate and not torch.compiler.is_compiling() and bool(((targets < 0) | (targets > 1)).any()):
        raise SurgeryError(
            f"soft labels are probabilities, got values from {targets.min().item()} to "
            f"{targets.max().item()}",
            example="domain_loss(logits, torch.softmax(teacher_logits, dim=1))",
        )
    maps, given = _pair_of_logits(_maps(_full(logits))), _maps(targets.to(logits.device).view_as(logits))
    given = torch.cat([1 - given, given], 1) if given.shape[1] == 1 else given
    factors = _check_class_weights(class_weights, logits, maps.shape[1])
    losses = F.cross_entropy(
        maps, given.to(maps.dtype), factors, reduction="none", label_smoothing=smoothing
    ).mean(dim=1)
    if weights is None:
        return losses.mean()
    scales = _check_weights(weights, losses, validate)
    return (scales * losses).sum() / scales.sum()


def count_domains(logits: Tensor, binary: bool | None = None) -> int:
    """Number of domains that these logits tell apart: 2 for a single logit, else the size of axis 1.

    Raises:
        ShapeError: These are no logits, or not of the kind that ``binary`` says.
        SurgeryError: A softmax over one logit is asked for.
    """
    example = "domain_loss(torch.randn(8, 2), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))"
    check_tensor(logits, "domain_loss", example=example)
    shape = tuple(logits.shape)
    if logits.dim() == 0 or logits.numel() == 0 or not logits.is_floating_point():
        raise ShapeError(
            f"domain logits of shape {shape}, {logits.dtype}: expected (B, K), floating point, not empty",
            example=example,
        )
    single = logits.dim() == 1 or shape[1] == 1
    if binary and not single:
        raise ShapeError(
            f"binary=True needs one logit per sample, (B,) or (B, 1), got {shape}",
            example="domain_loss(logits, domains), which takes (B, 2) for a softmax",
        )
    if binary is False and single:
        raise SurgeryError(
            f"a softmax over the single logit of {shape} is constant, so it trains nothing",
            example="domain_loss(logits, domains, binary=True), or a head with num_domains=2",
        )
    return 2 if single else shape[1]


def check_labels(
    domains: Tensor | int,
    logits: Tensor,
    num_domains: int,
    validate: bool = True,
    *,
    ignore_index: int | None = None,
    places: bool = False,
) -> Tensor:
    """The labels as an int64 tensor (B,) beside the logits; with ``places`` also one for each place (B, ...).

    Raises:
        ShapeError: Not one label per sample, nor one for each place where that is allowed.
        SurgeryError: Not integers, or one of them is no domain and not ``ignore_index``.
    """
    batch = logits.shape[0]
    if not isinstance(domains, Tensor):
        label = _check_label(domains, num_domains)
        return torch.full((batch,), label, dtype=torch.int64, device=logits.device)
    if domains.is_floating_point() or domains.is_complex():
        raise SurgeryError(
            f"domain labels are integers 0 to {num_domains - 1}, got {domains.dtype}",
            example="domain_loss(logits, domains.long())",
        )
    shape, dense = tuple(domains.shape), (batch, *logits.shape[2:])
    if shape != (batch,) and not (places and shape == dense):
        each = f", or one for each place, {dense}" if places and len(dense) > 1 else ""
        raise ShapeError(
            f"domain labels of shape {shape} for logits of shape {tuple(logits.shape)}: "
            f"expected one label per sample, ({batch},){each}",
            example="domain_loss(logits, domains.flatten())",
        )
    # Inside a compiled graph there are no values to look at, and looking would break it in two.
    if validate and not torch.compiler.is_compiling():
        _check_range(domains, num_domains, ignore_index)
    return domains.to(device=logits.device, dtype=torch.int64)


def _check_label(label: object, num_domains: int) -> int:
    """The label of a whole batch."""
    if not isinstance(label, (int, Integral)):  # the compiler knows int, and need not ask the other
        raise SurgeryError(
            f"domain labels are integers 0 to {num_domains - 1}, got {type(label).__name__}",
            example="domain_loss(logits, torch.tensor([0, 0, 1, 1])), or domain_loss(logits, 0)",
        )
    domain = int(label)
    if not 0 <= domain < num_domains:
        raise _no_domain(f"the label of the batch is {domain}", num_domains)
    return domain


def _check_range(domains: Tensor, num_domains: int, ignore_index: int | None = None) -> None:
    wrong = (domains < 0) | (domains >= num_domains)
    if ignore_index is not None:
        wrong = wrong & (domains != ignore_index)
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        label = int(domains[tuple(place)])
        raise _no_domain(f"domains[{', '.join(map(str, place))}] is {label}", num_domains)


def _no_domain(problem: str, num_domains: int) -> SurgeryError:
    return SurgeryError(
        f"{problem}, but the logits are of the domains 0 to {num_domains - 1}",
        example=f"a head with num_domains={num_domains + 1}, or labels below {num_domains}",
    )


def loss_per_sample(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (B,) of checked labels (B,), mean over the positions of a map."""
    return loss_per_place(logits, labels).mean(dim=1)


def loss_per_place(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy (B, places) of checked labels (B,) or (B, ...)."""
    maps = _maps(_full(logits))
    targets = labels.reshape(len(labels), -1).expand(-1, maps.shape[2])
    if maps.shape[1] == 1 and class_weights is None and not smoothing:
        return F.binary_cross_entropy_with_logits(maps[:, 0], targets.to(maps.dtype), reduction="none")
    return F.cross_entropy(
        _pair_of_logits(maps), targets, class_weights, reduction="none", label_smoothing=smoothing
    )


def _full(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _maps(logits: Tensor) -> Tensor:
    """(B, K, places) of logits of any shape."""
    if logits.dim() == 1:
        return logits.reshape(len(logits), 1, 1)
    return logits.flatten(2) if logits.dim() > 2 else logits[..., None]


def _pair_of_logits(maps: Tensor) -> Tensor:
    """Two logits instead of one that stands for domain 1: the softmax of (0, z) is the sigmoid of z."""
    return torch.cat([torch.zeros_like(maps), maps], dim=1) if maps.shape[1] == 1 else maps


def _check_weights(weights: Tensor | None, losses: Tensor, validate: bool) -> Tensor:
    if weights is None:
        return torch.ones_like(losses)
    example = "domain_loss(logits, domains, weights=entropy_weights(class_logits, domains))"
    check_tensor(weights, "domain_loss, for its weights,", example=example)
    if weights.shape != losses.shape:
        raise ShapeError(
            f"weights of shape {tuple(weights.shape)} for a batch of {len(losses)}: expected one per sample",
            example=example,
        )
    if validate and not torch.compiler.is_compiling() and not _are_weights(weights):
        raise SurgeryError(
            f"weights must not be negative, infinite or nan, and not all zero; the least is "
            f"{weights.min().item()}, their sum {weights.sum().item()}",
            example=example,
        )
    return weights.detach().to(device=losses.device, dtype=losses.dtype)


def _are_weights(weights: Tensor) -> bool:
    return bool(((weights >= 0) & weights.isfinite()).all() & (weights > 0).any())


def _mean_of_domains(losses: Tensor, weights: Tensor, labels: Tensor, num_domains: int) -> Tensor:
    """Mean over the domains that have weight of their weighted means, without a wait for the device."""
    flat = labels.flatten()
    belongs = _membership(flat, num_domains).to(losses.dtype) * weights.flatten()
    totals = belongs.sum(dim=1)
    present = totals > 0
    means = (belongs * losses.flatten()).sum(dim=1) / totals.where(present, 1.0)
    return means.sum() / present.sum().clamp_min(1)


def _membership(labels: Tensor, num_domains: int) -> Tensor:
    """(K, B), whether sample b is from domain k."""
    return torch.arange(num_domains, device=labels.device)[:, None] == labels


def entropy_weights(class_logits: Tensor, domains: Tensor | None = None) -> Tensor:
    """Weights of CDAN+E: 1 + exp(-H), H the entropy of the predicted classes, with mean 1 in each domain.

    Samples with a confident prediction count up to twice as much as others (Long et al.,
    "Conditional Adversarial Domain Adaptation", NeurIPS 2018, entropy conditioning). As in the authors' code
    they are normalised in each domain on its own; without ``domains`` it is over the whole batch, as in
    the Transfer-Learning-Library. Two differences: the entropy is computed from the logits without an epsilon
    inside the logarithm, and the weights carry no gradient, while the authors' code reverses one through
    them.

    Example:
        >>> entropy_weights(torch.tensor([[9.0, 0.0], [0.0, 0.0]]))  # sure, and not at all
        tensor([1.1426, 0.8574])

    Args:
        class_logits: (B, classes), before the softmax.
        domains: (B,), integers; None for one normalisation over the batch.

    Returns:
        (B,), without gradient, in the dtype of the logits, float32 for half precision.

    Raises:
        ShapeError: Not logits of shape (B, classes), or not one label for each sample.
    """
    example = "entropy_weights(torch.randn(4, 10), torch.tensor([0, 0, 1, 1]))"
    check_tensor(class_logits, "entropy_weights", example=example)
    if class_logits.dim() != 2 or class_logits.numel() == 0 or not class_logits.is_floating_point():
        raise ShapeError(
            f"class logits of shape {tuple(class_logits.shape)}, {class_logits.dtype}: expected "
            "(B, classes), floating point, not empty",
            example=example,
        )
    logits = class_logits.detach()
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    log_p = logits.log_softmax(dim=1)
    # A class that is ruled out has log p = -inf, and 0 x -inf is nan where the limit is 0.
    entropy = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(dim=1)
    weights = 1.0 + torch.exp(-entropy)
    if domains is None:
        return weights / weights.mean()
    check_tensor(domains, "entropy_weights, for its domains,", example=example)
    if tuple(domains.shape) != (len(weights),):
        raise ShapeError(
            f"domain labels of shape {tuple(domains.shape)}: expected one per sample, ({len(weights)},)",
            example="entropy_weights(class_logits, domains.flatten())",
        )
    same = domains.to(weights.device)[:, None] == domains.to(weights.device)
    return weights * same.sum(dim=1) / (same * weights).sum(dim=1)
