"""Schedules of the coefficient: functions of the training progress, and the object that applies one.

A schedule is a function of the progress p in [0, 1], or of the domain loss. Nothing here steps by itself: not
in a forward, not in eval, not behind a hook. The coefficient changes where the training loop calls ``step()``
and nowhere else.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor, nn

from grl_surgery.errors import PointNotFoundError, SurgeryError
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.points import near_names
from grl_surgery.validation import check_count, check_names, check_number

__all__ = [
    "CoefficientScheduler",
    "Schedule",
    "check_progress",
    "check_schedule",
    "constant",
    "dann",
    "delayed",
    "dual_ascent",
    "linear",
    "warm_start",
]


def check_progress(p: object) -> float:
    """Return the training progress ``p`` as a float, or refuse it where it is outside [0, 1].

    Example:
        >>> check_progress(0.25)
        0.25

    Raises:
        SurgeryError: ``p`` is not a number, is nan, or is outside [0, 1].
    """
    if not isinstance(p, (Real, Tensor)) or (isinstance(p, Tensor) and p.numel() != 1):
        raise SurgeryError(
            f"training progress must be a number in [0, 1], not {p!r}", example="dann()(step / total_steps)"
        )
    progress = float(p)
    if not 0.0 <= progress <= 1.0:
        raise SurgeryError(
            f"training progress is {progress!r}, which is outside [0, 1]: 0 is the start, 1 the end",
            example="dann()(step / total_steps)",
        )
    return progress


def check_schedule(schedule: object) -> None:
    """Refuse what is no function of the progress, or makes one and was not called.

    Raises:
        SurgeryError: With what to write instead.
    """
    if not callable(schedule):
        raise SurgeryError(
            f"{schedule!r} is not a schedule, a function of the progress p", example="dann(hi=0.3)"
        )
    if any(schedule is factory for factory in (constant, linear, dann, warm_start, delayed, dual_ascent)):
        name = _type_name(schedule).rpartition(".")[2]
        raise SurgeryError(
            f"{name} makes a schedule and is not one itself: call it",
            example={"constant": "constant(0.3)", "dual_ascent": "dual_ascent(0.69)"}.get(
                name, "dann(hi=0.3)"
            ),
        )


_check_number = partial(check_number, example="dann(hi=0.3)")


def _magnitude(value: Any) -> Any:
    return abs(value) if isinstance(value, Real) else value


def _clamp(value: float, lo: float, hi: float) -> float:
    """``value`` within its bounds: the last rounding must not turn a coefficient of 0 negative."""
    return min(max(value, min(lo, hi)), max(lo, hi))


class Schedule(ABC):
    """A function of training progress: ``schedule(p)`` is the coefficient, p in [0, 1].

    Its repr shows where it leads. Subclass it (as a frozen dataclass, so that a checkpoint can tell it from
    another) and define ``at``; any plain function of p works in a :class:`CoefficientScheduler` as well.

    Example:
        >>> linear(0.0, 0.5)
        linear(lo=0.0, hi=0.5)  # coefficient 0 at p=0, 0.25 at p=1/2, 0.5 at p=1
    """

    @abstractmethod
    def at(self, p: float) -> float:
        """Coefficient at progress ``p``, which has been checked to be in [0, 1]."""

    def at_step(self, step: float, total_steps: float) -> float:
        """Coefficient at step ``step`` of ``total_steps``: that of the progress ``step / total_steps``."""
        return self(_progress(step, total_steps))

    def __call__(self, p: float) -> float:
        """Coefficient at progress ``p``."""
        return self.at(check_progress(p))

    def __repr__(self) -> str:
        start, middle, end = (f"{self(p):.4g}" for p in (0.0, 0.5, 1.0))
        return f"{_describe(self)}  # coefficient {start} at p=0, {middle} at p=1/2, {end} at p=1"


@dataclass(frozen=True, repr=False)
class _Constant(Schedule):
    value: float

    def __post_init__(self) -> None:
        _check_number("value", self.value)

    def at(self, p: float) -> float:
        return float(self.value)


@dataclass(frozen=True, repr=False)
class _Linear(Schedule):
    lo: float
    hi: float
    signed: bool = False

    def __post_init__(self) -> None:
        for name, value in (("lo", self.lo), ("hi", self.hi)):
            _check_number(name, _magnitude(value) if self.signed else value)

    def at(self, p: float) -> float:
        return _clamp((1.0 - p) * self.lo + p * self.hi, self.lo, self.hi)


@dataclass(frozen=True, repr=False)
class _Dann(Schedule):
    lo: float
    hi: float
    gamma: float

    def __post_init__(self) -> None:
        _check_number("lo", self.lo)
        _check_number("hi", self.hi)
        _check_number("gamma", self.gamma, positive=True)

    def at(self, p: float) -> float:
        rise = 2.0 / (1.0 + math.exp(-self.gamma * p)) - 1.0
        return _clamp(self.lo + (self.hi - self.lo) * rise, self.lo, self.hi)


@dataclass(frozen=True, repr=False)
class _WarmStart(Schedule):
    alpha: float
    max_iters: float
    lo: float
    hi: float

    def __post_init__(self) -> None:
        _check_number("alpha", self.alpha, positive=True)
        _check_number("max_iters", self.max_iters, positive=True)
        _check_number("lo", self.lo)
        _check_number("hi", self.hi)

    def at(self, p: float) -> float:
        return self.at_step(p * self.max_iters, self.max_iters)

    def at_step(self, step: float, total_steps: float) -> float:
        span = self.hi - self.lo
        value = 2.0 * span / (1.0 + math.exp(-self.alpha * step / self.max_iters)) - span + self.lo
        return _clamp(value, self.lo, self.hi)


@dataclass(frozen=True, repr=False)
class _Delayed(Schedule):
    p0: float
    inner: Callable[[float], float]
    before: float

    def __post_init__(self) -> None:
        _check_number("before", self.before)
        check_number("p0", self.p0, example="delayed(0.5, dann())")
        if check_progress(self.p0) == 1.0:
            raise SurgeryError(
                "p0 is 1.0: the inner schedule would never begin", example="delayed(0.5, dann())"
            )
        check_schedule(self.inner)
        if isinstance(self.inner, _DualAscent):
            raise SurgeryError(
                "a coefficient that follows the domain loss has no progress to delay",
                example="dual_ascent(0.69, rate=0.001), which begins at 0 and rises slowly",
            )

    def at(self, p: float) -> float:
        if p < self.p0:
            return float(self.before)
        return self.inner((p - self.p0) / (1.0 - self.p0))

    def at_step(self, step: float, total_steps: float) -> float:
        start = self.p0 * total_steps
        if step < start:
            return float(self.before)
        return _at_step(self.inner, step - start, total_steps - start)


@dataclass(frozen=True, repr=False)
class _DualAscent(Schedule):
    target: float
    rate: float
    start: float
    hi: float

    def __post_init__(self) -> None:
        _check_number("target", self.target, positive=True)
        _check_number("rate", self.rate, positive=True)
        _check_number("start", self.start)
        _check_number("hi", self.hi, positive=True)
        if self.start > self.hi:
            raise SurgeryError(
                f"start is {self.start!r}, beyond hi={self.hi!r}",
                example="dual_ascent(0.69, start=0.1, hi=1.0)",
            )

    def at(self, p: float) -> float:
        if p:
            raise SurgeryError(
                f"the coefficient at progress {p:.4g} depends on the domain loss until then",
                example="scheduler.step(loss), with a CoefficientScheduler of this schedule",
            )
        return float(self.start)

    def after(self, coeff: float, loss: float) -> float:
        """Coefficient after a step with this loss."""
        return _clamp(coeff + self.rate * (self.target - loss), 0.0, self.hi)

    def __repr__(self) -> str:
        return f"{_describe(self)}  # coefficient {self.start:.4g} at first, then by the domain loss"


def constant(value: float) -> Schedule:
    """The same coefficient throughout.

    Example:
        >>> constant(0.3)(0.7)
        0.3

    Args:
        value: The coefficient.

    Raises:
        SurgeryError: It is no finite number, or negative.
    """
    return _Constant(value)


def linear(lo: float = 0.0, hi: float = 1.0, *, signed: bool = False) -> Schedule:
    """From ``lo`` at p = 0 in a straight line to ``hi`` at p = 1; falling where ``hi`` is the smaller one.

    Example:
        >>> linear(0.0, 0.5)(0.5)
        0.25

    Args:
        lo: Coefficient at the start.
        hi: Coefficient at the end.
        signed: Whether they may be negative; then every reversal that is driven must be signed as well.

    Raises:
        SurgeryError: One is no finite number, or negative where ``signed`` is not set.
    """
    return _Linear(lo, hi, signed)


def dann(lo: float = 0.0, hi: float = 1.0, gamma: float = 10.0) -> Schedule:
    """The schedule of DANN: lo + (hi - lo) (2 / (1 + exp(-gamma p)) - 1).

    Ganin & Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", 2015, and Ganin et al.,
    "Domain-Adversarial Training of Neural Networks", 2016 (lambda_p in the section on experiments), with
    lo = 0, hi = 1 and gamma = 10. It tends to ``hi`` without reaching it: 0.99991 hi at p = 1.

    Example:
        >>> dann()
        dann(lo=0.0, hi=1.0, gamma=10.0)  # coefficient 0 at p=0, 0.9866 at p=1/2, 0.9999 at p=1
        >>> round(dann(hi=0.3)(0.5), 6)
        0.295984

    Args:
        lo: Coefficient at the start.
        hi: What it tends to.
        gamma: How fast; positive.

    Raises:
        SurgeryError: One is no finite number, or negative.
    """
    return _Dann(lo, hi, gamma)


def warm_start(alpha: float = 1.0, max_iters: float = 1000.0, lo: float = 0.0, hi: float = 1.0) -> Schedule:
    """The Transfer-Learning-Library's warm start: 2 (hi - lo) / (1 + exp(-alpha i / N)) - (hi - lo) + lo.

    Here i is the number of iterations made and N = ``max_iters``: the formula of that library's
    ``WarmStartGradientReverseLayer``. It counts iterations, not progress, and goes on rising after N of
    them; at N it has reached only lo + 0.462 (hi - lo) with alpha = 1. So in a
    :class:`CoefficientScheduler` the coefficient at step i is the formula at i, whatever ``total_steps`` is,
    while called with a progress, p = 1 stands for iteration N.

    Example:
        >>> round(warm_start(alpha=1.0, max_iters=1000)(1.0), 6)
        0.462117
        >>> round(warm_start(alpha=1.0, max_iters=1000).at_step(5000, total_steps=20000), 6)
        0.986614

    Args:
        alpha: How fast it rises; positive.
        max_iters: The number N of iterations; positive.
        lo: Coefficient at the start.
        hi: What it tends to.

    Raises:
        SurgeryError: One is no finite number, or negative.
    """
    return _WarmStart(alpha, max_iters, lo, hi)


def delayed(p0: float, inner: Callable[[float], float], *, before: float = 0.0) -> Schedule:
    """``before`` until progress ``p0``, then all of ``inner`` in what is left: inner((p - p0) / (1 - p0)).

    With ``before=0`` the domain head learns from the first step, but nothing flows back into the features
    until ``p0``. A :func:`warm_start` inside counts its iterations from ``p0`` on.

    Example:
        >>> schedule = delayed(0.2, linear(0.0, 1.0))
        >>> [round(schedule(p), 6) for p in (0.0, 0.2, 0.6, 1.0)]
        [0.0, 0.0, 0.5, 1.0]

    Args:
        p0: Progress in [0, 1) at which ``inner`` begins.
        inner: A schedule, or any function of the progress.
        before: Coefficient until then.

    Raises:
        SurgeryError: ``p0`` is outside its range, ``before`` is no coefficient, or ``inner`` no schedule.
    """
    return _Delayed(p0, inner, before)


def dual_ascent(target: float, rate: float = 0.01, *, start: float = 0.0, hi: float = 1.0) -> Schedule:
    """A coefficient that learns from the domain loss: c <- c + rate (target - loss), kept in [0, ``hi``].

    The coefficient is the Lagrange multiplier of the constraint that the domain loss is at least ``target``,
    and each step is one of gradient ascent on the dual, as in Song et al., "Learning Controllable Fair
    Representations" (AISTATS 2019). While the head tells the domains apart, its loss is below the target and
    the coefficient rises; once it cannot, the coefficient falls again. It is no parameter: no optimizer sees
    it, and a checkpoint of the scheduler holds it.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 4), GradientReversal(), nn.Linear(4, 2))
        >>> scheduler = CoefficientScheduler(model, dual_ascent(0.69, rate=0.5), total_steps=100)
        >>> scheduler.step(0.29)
        >>> round(scheduler.coeff, 6)
        0.2

    Args:
        target: The loss that the head is to have; ``math.log(num_domains)`` is that of a head that knows
            nothing.
        rate: Step of the ascent; positive.
        start: Coefficient of the first step.
        hi: The largest coefficient.

    Raises:
        SurgeryError: One is no finite number, or negative.
    """
    return _DualAscent(target, rate, start, hi)


def _at_step(schedule: Callable[[float], float], step: float, total_steps: float) -> float:
    if isinstance(schedule, Schedule):
        return schedule.at_step(step, total_steps)
    return schedule(_progress(step, total_steps))


def _progress(step: float, total_steps: float) -> float:
    check_number("total_steps", total_steps, positive=True, example="dann().at_step(5, total_steps=1000)")
    return step / total_steps


def _type_name(schedule: object) -> str:
    if isinstance(schedule, Schedule):
        name = type(schedule).__qualname__
        return _FACTORY.get(type(schedule), name)
    named = schedule if hasattr(schedule, "__qualname__") else type(schedule)
    return f"{named.__module__}.{named.__qualname__}"


_FACTORY: dict[type, str] = {
    _Constant: "constant",
    _Linear: "linear",
    _Dann: "dann",
    _WarmStart: "warm_start",
    _Delayed: "delayed",
    _DualAscent: "dual_ascent",
}


def _parameters(schedule: object) -> dict[str, Any]:
    if not is_dataclass(schedule):
        return {}
    values = {field.name: getattr(schedule, field.name) for field in fields(schedule)}
    if values.get("signed") is False:  # so that it is the schedule that older checkpoints name
        del values["signed"]
    return values


def _describe(schedule: object) -> str:
    """The call that makes this schedule."""
    inner = (
        f"{name}={_describe(value) if callable(value) else repr(value)}"
        for name, value in _parameters(schedule).items()
    )
    return f"{_type_name(schedule)}({', '.join(inner)})" if is_dataclass(schedule) else _type_name(schedule)


def _fingerprint(schedule: object) -> dict[str, Any]:
    """What tells one schedule from another, in the plain types that any checkpoint format can hold."""
    values = {
        name: _fingerprint(value) if callable(value) else value
        for name, value in _parameters(schedule).items()
    }
    return {"type": _type_name(schedule), **values}


def _differences(theirs: object, ours: object, path: str) -> list[str]:
    """Every place where two descriptions differ, in words."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        if theirs.get("type") != ours.get("type"):
            return [f"{path} is {theirs.get('type')!r} in the checkpoint and {ours.get('type')!r} here"]
        found = []
        for key in dict.fromkeys([*theirs, *ours]):
            found += _differences(theirs.get(key), ours.get(key), f"{path}.{key}")
        return found
    return [] if theirs == ours else [f"{path} is {theirs!r} in the checkpoint and {ours!r} here"]


class CoefficientScheduler:
    """Drives the coefficient of every reversal of a network, or of the named ones, by a schedule.

    The coefficient of step 0 is set at once, and that of step k after the k-th call of ``step()``; a run of
    n training steps, each followed by ``step()``, needs ``total_steps=n``. Several of these can drive
    different reversals of one network.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 4), GradientReversal(), nn.Linear(4, 2))
        >>> scheduler = CoefficientScheduler(model, linear(0.0, 1.0), total_steps=4)
        >>> for _ in range(4):  # in a real run: forward, backward, optimizer.step()
        ...     scheduler.step()
        >>> model[1].coeff.item()
        1.0

    Args:
        target: A network (wrapped or not), a single reversal, or the mapping of names to reversals that
            ``grl_surgery.reversals(model)`` returns.
        schedule: Function of the progress p in [0, 1]: one of this module, or your own.
        total_steps: Number of training steps from p = 0 to p = 1.
        only: Name, or names, of the reversals to drive; a module's name stands for the reversals inside it,
            so that ``only="domain"`` is the head called ``domain``. Default: all of them.

    Raises:
        SurgeryError: No reversal to drive, an impossible ``total_steps`` or an impossible coefficient.
        PointNotFoundError: ``only`` names no reversal.
    """

    def __init__(
        self,
        target: nn.Module | Mapping[str, GradientReversal],
        schedule: Callable[[float], float],
        total_steps: int,
        *,
        only: str | Sequence[str] | None = None,
    ) -> None:
        check_schedule(schedule)
        self.schedule = schedule
        self.total_steps = check_count(
            "total_steps",
            total_steps,
            example="CoefficientScheduler(model, dann(), total_steps=epochs * len(loader))",
        )
        self._reversals = _select(_find(target), only)
        self._warned = False
        self._move_to(0)

    @property
    def reversals(self) -> dict[str, GradientReversal]:
        """The reversals that this object drives, by name."""
        return dict(self._reversals)

    @property
    def steps_done(self) -> int:
        """Number of times that ``step()`` was called, in this run and in those it resumes."""
        return self._steps_done

    @property
    def coeff(self) -> float:
        """The coefficient set last, before its rounding to the float32 of the reversal's buffer."""
        return self._coeff

    def step(self, loss: float | Tensor | None = None) -> None:
        """Set the coefficient of the next training step.

        After all ``total_steps`` steps it warns once, and the coefficient stays as it is.

        Args:
            loss: The domain loss of the step that was made, for :func:`dual_ascent`, and for no other
                schedule. Reading it waits for its device.

        Raises:
            SurgeryError: A loss is missing, or not wanted, or no finite number.
        """
        self._check_loss(loss)
        if self._steps_done < self.total_steps:
            self._move_to(self._steps_done + 1, loss)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"the schedule ends after {self.total_steps} steps, and all of them were made: the "
                f"coefficient stays at {self._coeff:.4g} from now on; a longer run needs more total_steps",
                stacklevel=2,
            )

    def _check_loss(self, loss: float | Tensor | None) -> None:
        if isinstance(self.schedule, _DualAscent) == (loss is not None):
            return
        verb = "needs" if loss is None else "does not read"
        raise SurgeryError(
            f"{_type_name(self.schedule)} {verb} the domain loss",
            example="scheduler.step()"
            if loss is not None
            else "scheduler.step(domain_loss(logits, domains))",
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands and of which schedule, in plain Python types."""
        learned = {"coeff": self._coeff} if isinstance(self.schedule, _DualAscent) else {}
        return {
            "schedule": _fingerprint(self.schedule),
            "total_steps": self.total_steps,
            "steps_done": self._steps_done,
            **learned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the run that wrote ``state`` stood, with exactly its coefficients.

        Names of reversals are not compared, so that a run may be resumed wrapped in another way.

        Raises:
            SurgeryError: The state is of another schedule or is damaged. Nothing is changed then.
        """
        ours = self.state_dict()
        if not isinstance(state, Mapping) or not ours.keys() <= state.keys():
            raise SurgeryError(
                f"this is not the state of a CoefficientScheduler: expected {sorted(ours)}, got "
                f"{sorted(state) if isinstance(state, Mapping) else state!r}",
                example="scheduler.load_state_dict(torch.load(path)['coefficient'])",
            )
        found = [
            *_differences(state["schedule"], ours["schedule"], "schedule"),
            *_differences(state["total_steps"], ours["total_steps"], "total_steps"),
        ]
        if found:
            raise SurgeryError(
                f"the checkpoint belongs to another schedule: {'; '.join(found)}",
                example="build the scheduler with the checkpoint's values, or start without load_state_dict",
            )
        steps_done = state["steps_done"]
        if not isinstance(steps_done, int) or not 0 <= steps_done <= self.total_steps:
            raise SurgeryError(
                f"the checkpoint is damaged: steps_done is {steps_done!r}, expected 0 to {self.total_steps}"
            )
        if "coeff" in ours:
            _check_number("the checkpoint's coefficient", state["coeff"])
            self._set(steps_done, _clamp(state["coeff"], 0.0, self.schedule.hi))  # type: ignore[attr-defined]
        else:
            self._move_to(steps_done)

    def _move_to(self, step: int, loss: float | Tensor | None = None) -> None:
        """Compute first, then change: an error leaves everything as it was."""
        if loss is None:
            coeff = _at_step(self.schedule, step, self.total_steps)
        else:
            value = float(loss.detach() if isinstance(loss, Tensor) else loss)
            _check_number("the domain loss", value)
            coeff = self.schedule.after(self._coeff, value)  # type: ignore[attr-defined]
        self._set(step, coeff)

    def _set(self, step: int, coeff: float) -> None:
        signed = all(layer.signed for layer in self._reversals.values())
        _check_number(
            f"the schedule's value at step {step} of {self.total_steps}",
            _magnitude(coeff) if signed else coeff,
        )
        for reversal in self._reversals.values():
            reversal.set_coeff(coeff)
        self._steps_done, self._coeff = step, float(coeff)

    def __repr__(self) -> str:
        return (
            f"CoefficientScheduler(step {self._steps_done} of {self.total_steps}, coeff {self._coeff:.4g}, "
            f"drives {', '.join(name or 'the reversal' for name in self._reversals)})\n  {self.schedule!r}"
        )


def _find(target: nn.Module | Mapping[str, GradientReversal]) -> dict[str, GradientReversal]:
    if isinstance(target, Mapping):
        named = {name: _check_reversal(name, layer) for name, layer in target.items()}
    elif isinstance(target, nn.Module):
        named = {name: m for name, m in target.named_modules() if isinstance(m, GradientReversal)}
    else:
        raise SurgeryError(
            f"expected a network or its reversals, got {type(target).__name__}",
            example="CoefficientScheduler(model, dann(), total_steps=1000)",
        )
    if not named:
        raise SurgeryError(
            f"there is no GradientReversal in this {type(target).__name__}, so no coefficient to drive",
            example="model = insert_grl(model, after='layer3')",
        )
    return named


def _check_reversal(name: object, layer: object) -> GradientReversal:
    if not isinstance(layer, GradientReversal):
        raise SurgeryError(
            f"{name!r} is no GradientReversal but of type {type(layer).__name__}",
            example="CoefficientScheduler(reversals(model), dann(), total_steps=1000)",
        )
    return layer


def _select(
    named: dict[str, GradientReversal], only: str | Sequence[str] | None
) -> dict[str, GradientReversal]:
    if only is None:
        return named
    chosen: set[str] = set()
    for want in check_names("only", only, example=f"only={next(iter(named))!r}"):
        matching = {name for name in named if name == want or name.startswith(f"{want}.")}
        if not matching:
            near = near_names(want, named) or list(named)[:5]
            raise PointNotFoundError(
                f"there is no reversal {want!r} to drive", choices=near, example=f"only={near[0]!r}"
            )
        chosen |= matching
    if not chosen:
        raise SurgeryError("only=[] names no reversal", choices=list(named)[:5], example="only=None for all")
    return {name: reversal for name, reversal in named.items() if name in chosen}
