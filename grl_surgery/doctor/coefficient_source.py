"""Finds where a coefficient lives: the number whose change changes the factor of the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from grl_surgery.doctor.detect import Site, observe
from grl_surgery.doctor.sandbox import Sandbox, private_runs, shared_holders
from grl_surgery.loading.inputs import as_arguments

__all__ = ["CoefficientSource", "homes", "with_coefficients"]


@dataclass(frozen=True)
class CoefficientSource:
    """A number that the factor follows.

    Args:
        kind: A plain attribute of a module, a buffer, a parameter, something that a class or a file holds, or
            an argument of the network's forward.
        holder: Path of the module, name of the class or file, or place of the argument.
        name: Of the attribute; empty for an argument.
        value: What it is now.
        sign: -1 where the factor is minus the number, 1 where it is the number, 0 where it follows in
            another way.
    """

    kind: Literal["attribute", "buffer", "parameter", "shared", "argument"]
    holder: str
    name: str
    value: float
    sign: int = 0

    def __str__(self) -> str:
        if self.kind == "argument":
            return f"argument {self.holder} of forward"
        return f"{self.holder}.{self.name}" if self.holder else self.name

    def set(self, rig: Sandbox, number: float, network: nn.Module | None = None) -> None:
        """Write another number there, in a private network; what is shared is put back by the caller."""
        if self.kind == "argument":
            rig.args, rig.kwargs = _with_argument(rig, self.holder, number)
        elif self.kind == "shared":
            holder = shared_holders(rig.network)[self.holder]
            setattr(holder, self.name, _like(getattr(holder, self.name), number))
        else:
            module = (rig.network if network is None else network).get_submodule(self.holder)
            held = getattr(module, self.name)
            if isinstance(held, torch.Tensor) and not held.is_floating_point():
                setattr(module, self.name, _like(held, number))  # a whole number would round it
            elif isinstance(held, torch.Tensor):
                with torch.no_grad():
                    held.fill_(number)
            else:
                setattr(module, self.name, number)


def with_coefficients(model: nn.Module, inputs: Any, sites: Sequence[Site], **how: Any) -> list[Site]:
    """The same sites, each saying what sets its coefficient."""
    found = homes(model, inputs, sites, **how)
    return [_told(model, site, home) for site, home in zip(sites, found, strict=True)]


def _told(model: nn.Module, site: Site, home: CoefficientSource | None) -> Site:
    if home is None:
        return _without_effect(model, site)
    finding = replace(site.finding, coeff_from=str(home))
    if finding.verdict == "un-reverses" and home.value < 0:
        note = f"the coefficient {home} is {home.value:g}, so {finding.note}"
        finding = replace(finding, note=note)
    if home.kind == "shared":
        finding = replace(finding, remarks=(*finding.remarks, f"{home} is shared by all instances"))
    return replace(site, finding=finding)


def _without_effect(model: nn.Module, site: Site) -> Site:
    """A layer with numbers of which none is a coefficient: perhaps one was meant to be."""
    finding = site.finding
    if finding.kind != "module" or finding.moves or not isinstance(finding.factor, float):
        return site
    numbers = [f"{home.name}={home.value:g}" for home in _numbers_of(model, finding.path)]
    if not numbers:
        return site
    remark = f"no effect on the factor: {', '.join(numbers)}"
    return replace(site, finding=replace(finding, remarks=(*finding.remarks, remark)))


def homes(
    model: nn.Module, inputs: Any, sites: Sequence[Site], *, seed: int = 0, training: bool | None = None
) -> list[CoefficientSource | None]:
    """For each site the number that its factor follows; None where nothing that was tried changes it."""
    return [_home(model, inputs, site, seed, training) for site in sites]


def _home(
    model: nn.Module, inputs: Any, site: Site, seed: int, training: bool | None
) -> CoefficientSource | None:
    factor = site.finding.factor
    if site.passing is None or site.finding.moves or not isinstance(factor, float):
        return None
    for candidate in _candidates(model, inputs, site, factor):
        with private_runs(model):
            rig = Sandbox.of(model, inputs, seed=seed, training=training)
            candidate.set(rig, _OTHER)
            found = observe(rig).factors.get(site.passing.key)
        if isinstance(found, float) and found != factor:
            ratio = found / _OTHER
            same = factor == 0 or abs(ratio - factor / (candidate.value or 1)) < 1e-4
            return replace(candidate, sign=round(ratio) if same and abs(abs(ratio) - 1) < 1e-4 else 0)
    return None


_OTHER = 0.4375  # exact in every dtype, and no coefficient that anybody chooses


def _candidates(model: nn.Module, inputs: Any, site: Site, factor: float) -> Iterator[CoefficientSource]:
    """Numbers that may be the coefficient: those equal to the factor but for the sign come first.

    Of a module that is the reversal itself, every number is tried; elsewhere only equal ones.
    """
    owners = _owners(site)
    inside = [home for path in owners for home in _numbers_of(model, path)]
    equal = [home for home in inside if _equal(home, factor)]
    own = [home for home in inside if home.holder == owners[0] and site.finding.kind == "module"]
    yield from equal
    yield from (home for home in _numbers_shared(model) if _equal(home, factor))
    yield from (home for home in _numbers_among(inputs) if _equal(home, factor))
    yield from (home for home in own if home not in equal)


def _owners(site: Site) -> list[str]:
    """The module of the site and those around it, innermost first."""
    parts = site.finding.path.split(".") if site.finding.path else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _equal(home: CoefficientSource, factor: float) -> bool:
    return abs(abs(home.value) - abs(factor)) <= 1e-5 * abs(factor)


def _numbers_of(model: nn.Module, path: str) -> Iterator[CoefficientSource]:
    module = model.get_submodule(path)
    for name, value in module.__dict__.items():
        if _is_number(value):
            yield CoefficientSource("attribute", path, name, float(value))
    for name, buffer in module._buffers.items():
        if buffer is not None and _is_number(buffer):
            yield CoefficientSource("buffer", path, name, float(buffer))
    for name, parameter in module._parameters.items():
        if parameter is not None and _is_number(parameter):
            yield CoefficientSource("parameter", path, name, float(parameter.detach()))


def _numbers_shared(model: nn.Module) -> Iterator[CoefficientSource]:
    for label, holder in shared_holders(model).items():
        for name, value in vars(holder).items():
            if _is_number(value) and not name.startswith("__"):
                yield CoefficientSource("shared", label, name, float(value))


def _numbers_among(inputs: Any) -> Iterator[CoefficientSource]:
    args, kwargs = as_arguments(inputs)
    for place, value in (*enumerate(args), *kwargs.items()):
        if _is_number(value):
            yield CoefficientSource("argument", str(place), "", float(value))


def _with_argument(rig: Sandbox, place: str, number: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if place in rig.kwargs:
        return rig.args, {**rig.kwargs, place: _like(rig.kwargs[place], number)}
    at = int(place)
    return (*rig.args[:at], _like(rig.args[at], number), *rig.args[at + 1 :]), rig.kwargs


def _like(value: Any, number: float) -> Any:
    if not isinstance(value, torch.Tensor):
        return number
    dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
    return torch.full_like(value, number, dtype=dtype)


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        is_number = not value.is_complex() and value.dtype is not torch.bool
        return value.numel() == 1 and is_number and not value.is_meta
    return isinstance(value, (int, float)) and not isinstance(value, bool)
