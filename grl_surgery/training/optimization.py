"""What the optimizer of an adversarial run needs: parameter groups, and the learning rate of DANN."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor, nn

from grl_surgery.errors import PointNotFoundError, SurgeryError
from grl_surgery.nn.heads import find_heads
from grl_surgery.points import near_names
from grl_surgery.training.schedules import check_progress
from grl_surgery.validation import check_count, check_names, check_network, check_number

__all__ = ["dann_lr", "param_groups"]


def param_groups(
    model: nn.Module, lr: float | Tensor, new_multiplier: float = 10.0, *, new: str | Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: the pretrained backbone, and new layers with a higher rate.

    New layers are the domain heads and the layers named in ``new``. Frozen parameters are left out. Each
    other parameter is in exactly one group. One that a head shares with the backbone belongs to the backbone,
    unless ``new`` names it. Empty groups are left out.

    Example:
        >>> import torch
        >>> from grl_surgery import DomainClassifier, DomainHead
        >>> model = nn.ModuleDict({"stem": nn.Linear(4, 4), "domain": DomainHead(DomainClassifier(4))})
        >>> groups = param_groups(model, lr=0.01)
        >>> [(group["name"], group["lr"], len(group["params"])) for group in groups]
        [('backbone', 0.01, 2), ('new', 0.1, 6)]
        >>> optimizer = torch.optim.SGD(groups, momentum=0.9)

    Args:
        model: A network with domain heads, wrapped or not.
        lr: Learning rate of the backbone.
        new_multiplier: How many times that of the new layers is (10 in the authors' code of DANN and CDAN).
        new: Names of further modules or parameters that are new, such as a fresh ``"fc"``.

    Raises:
        SurgeryError: It is not a network, nothing is new, nothing is trainable, or a learning rate is
            impossible.
        PointNotFoundError: ``new`` names no parameter.
    """
    check_network(model, "param_groups", example="param_groups(model, lr=0.01)")
    # Optimizers take a learning rate that is a tensor as well.
    check_number("lr", float(lr) if isinstance(lr, Tensor) else lr, positive=True, example="lr=0.01")
    check_number("new_multiplier", new_multiplier, positive=True, example="new_multiplier=10.0")
    prefixes = check_names("new", new, example="param_groups(model, lr=0.01, new='fc')")
    names = _names_by_parameter(model)
    _check_names(prefixes, [name for group in names.values() for name in group])
    heads = list(find_heads(model))
    if not heads and not prefixes:
        raise SurgeryError(
            f"there is no domain head in this {type(model).__name__} and no new= layer, so no layer is new",
            example="attach_domain_head(model, after='global_pool'), or param_groups(model, lr, new='fc')",
        )
    fresh: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter, known_as in names.items():
        if not parameter.requires_grad:
            continue
        named = any(is_inside(name, prefixes) for name in known_as)
        (fresh if named or all(is_inside(name, heads) for name in known_as) else rest).append(parameter)
    rates = {"backbone": (rest, lr), "new": (fresh, lr * new_multiplier)}
    check_partition((rest, fresh), model)
    return [{"name": name, "params": params, "lr": rate} for name, (params, rate) in rates.items() if params]


def check_partition(groups: Iterable[Iterable[nn.Parameter]], model: nn.Module) -> None:
    """Check that each trainable parameter of ``model`` is in exactly one of the groups, and nothing else is.

    Raises:
        SurgeryError: One is missing, is there twice, or is frozen or foreign.
    """
    placed = Counter(id(parameter) for group in groups for parameter in group)
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    problems = [f"{name} is in {n} groups" for i, name in trainable.items() if (n := placed[i]) != 1]
    if placed.keys() - trainable.keys():
        problems.append("a group holds a parameter that is frozen or not the model's")
    if problems or not trainable:
        raise SurgeryError(
            f"every trainable parameter belongs into exactly one group: "
            f"{'; '.join(problems) or 'none is trainable'}",
            example="param_groups(model, lr=0.01)",
        )


def _names_by_parameter(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def is_inside(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a path is one of these prefixes, or below one; the empty prefix is the root."""
    return any(prefix == "" or name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _check_names(prefixes: Sequence[str], names: Sequence[str]) -> None:
    for prefix in prefixes:
        if not prefix or not any(is_inside(name, [prefix]) for name in names):
            modules = [name.rpartition(".")[0] for name in names]
            near = near_names(prefix, [*modules, *names])
            raise PointNotFoundError(
                f"new={prefix!r} names no module with parameters and no parameter",
                choices=near,
                example=f"param_groups(model, lr, new={near[0]!r})" if near else "param_groups(model, lr)",
            )


@overload
def dann_lr(
    p: float, lr0: float = 0.01, alpha: float = 10.0, beta: float = 0.75, *, total_steps: None = None
) -> float: ...


@overload
def dann_lr(
    p: None = None, lr0: None = None, alpha: float = 10.0, beta: float = 0.75, *, total_steps: int
) -> Callable[[int], float]: ...


def dann_lr(
    p: float | None = None,
    lr0: float | None = None,
    alpha: float = 10.0,
    beta: float = 0.75,
    *,
    total_steps: int | None = None,
) -> float | Callable[[int], float]:
    """The learning rate of DANN at progress p: lr0 / (1 + alpha p) ** beta.

    Ganin et al., "Domain-Adversarial Training of Neural Networks", 2016 (mu_p in the section on experiments).
    With ``total_steps`` instead of ``p`` it is the function that ``torch.optim.lr_scheduler.LambdaLR`` wants:
    from the number of steps made to the factor of each group's own learning rate.

    Example:
        >>> [round(dann_lr(p), 6) for p in (0.0, 0.5, 1.0)]
        [0.01, 0.002608, 0.001656]
        >>> import torch
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, dann_lr(total_steps=1000))
        >>> scheduler.get_last_lr()
        [0.1]

    Args:
        p: Training progress in [0, 1].
        lr0: Learning rate at the start, 0.01 by default; with ``total_steps`` it is the optimizer's.
        alpha: How soon it falls.
        beta: How far it falls.
        total_steps: Number of training steps; a step beyond has the factor of the last one.

    Raises:
        SurgeryError: ``p`` is outside [0, 1], another number is negative, or both of ``p`` and
            ``total_steps`` are given, or none.
    """
    given = 0.01 if lr0 is None else lr0
    for name, value in (("lr0", given), ("alpha", alpha), ("beta", beta)):
        check_number(name, value, example="dann_lr(0.5, lr0=0.01, alpha=10.0, beta=0.75)")
    if (p is None) == (total_steps is None) or (total_steps is not None and lr0 is not None):
        raise SurgeryError(
            "dann_lr takes the progress p, or total_steps for the factors of LambdaLR, whose optimizer has "
            "the learning rate already",
            example="dann_lr(0.5, lr0=0.01), or LambdaLR(optimizer, dann_lr(total_steps=1000))",
        )
    if total_steps is not None:
        steps = check_count("total_steps", total_steps, example="dann_lr(total_steps=epochs * len(loader))")
        return _DannFactor(steps, alpha, beta)
    return float(given / (1.0 + alpha * check_progress(p)) ** beta)


@dataclass(frozen=True)
class _DannFactor:
    """The factor of the learning rate after some steps."""

    total_steps: int
    alpha: float
    beta: float

    def __call__(self, step: int) -> float:
        return dann_lr(min(step / self.total_steps, 1.0), 1.0, self.alpha, self.beta)
