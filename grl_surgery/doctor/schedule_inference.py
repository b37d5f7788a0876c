"""Recognises a coefficient that rises with every forward by its values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from grl_surgery.doctor.detect import Site, observe
from grl_surgery.doctor.sandbox import Sandbox, private_runs
from grl_surgery.training.schedules import Schedule, warm_start

__all__ = ["rising"]

_FAR = 10**9


def rising(model: nn.Module, inputs: Any, site: Site, *, seed: int = 0) -> Schedule | None:
    """The warm start that a layer computes from the number of its steps, which it may count itself.

    The layer's counter is found by running it, or by trying; it is then set to chosen numbers of steps, and
    the factors measured there tell lo, hi and the rate. Three more of them have to agree.

    Returns:
        The schedule, or None where the layer has no counter or follows another rule.
    """
    path = site.finding.path
    for counter in _counters(model, inputs, site, seed):

        def coefficient(count: int, counter: str = counter) -> float:
            with private_runs(model):
                rig = Sandbox.of(model, inputs, training=True, seed=seed)
                setattr(rig.network.get_submodule(path), counter, count)
                factor = observe(rig).factors.get(site.passing.key) if site.passing else None
            return 0.0 - factor if isinstance(factor, float) else math.nan

        found = _fitted(coefficient, _numbers(model.get_submodule(path)))
        if found is not None:
            return found
    return None


def _counters(model: nn.Module, inputs: Any, site: Site, seed: int) -> list[str]:
    """The attributes that one forward makes larger by one; or those that might, where it makes none."""
    with private_runs(model):
        rig = Sandbox.of(model, inputs, training=True, seed=seed)
        before = _numbers(rig.network.get_submodule(site.finding.path))
        observe(rig)
        after = _numbers(rig.network.get_submodule(site.finding.path))
    if site.finding.moves:
        return [name for name in before if after.get(name) == before[name] + 1]
    return [name for name, value in before.items() if type(value) is int]


def _numbers(module: nn.Module) -> dict[str, float]:
    held = module.__dict__.items()
    return {name: value for name, value in held if type(value) in (int, float)}


def _fitted(coefficient: Callable[[int], float], numbers: dict[str, float]) -> Schedule | None:
    lo, hi = coefficient(0), coefficient(_FAR)
    if not (math.isfinite(lo) and math.isfinite(hi)) or lo == hi or min(lo, hi) < 0:
        return None
    at, risen = 1, 0.0
    while at < _FAR:
        risen = (coefficient(at) - lo) / (hi - lo)
        if risen > 0.2:
            break
        at *= 2
    if not 0.2 < risen < 1.0:
        return None
    rate = 2.0 * math.atanh(risen) / at
    schedule = _written(rate, lo, hi, numbers)
    expected = {count: schedule.at_step(count, _FAR) for count in (max(1, at // 2), at * 2, at * 3)}
    agrees = all(abs(coefficient(n) - value) <= 1e-4 * abs(hi - lo) for n, value in expected.items())
    return schedule if agrees else None


def _written(rate: float, lo: float, hi: float, numbers: dict[str, float]) -> Schedule:
    """With the numbers that the layer itself has, where two of them make the rate."""
    for iterations in numbers.values():
        for alpha in numbers.values():
            if iterations > 1 and alpha > 0 and abs(alpha / iterations - rate) <= 1e-4 * rate:
                return warm_start(float(alpha), float(iterations), lo, hi)
    return warm_start(float(f"{1000.0 * rate:.5g}"), 1000.0, lo, hi)
