"""Compares the reversals of a network in each context with eager mode."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grl_surgery.doctor.coefficient_source import CoefficientSource, homes
from grl_surgery.doctor.contexts import CONTEXTS, Context, Ready
from grl_surgery.doctor.detect import Site, examine, first_sentence, observe
from grl_surgery.doctor.identity_probes import Key
from grl_surgery.doctor.sandbox import Gradients, Sandbox, private_runs
from grl_surgery.doctor.verdicts import Outcome, Status
from grl_surgery.errors import SurgeryError

__all__ = ["eager_gradients", "survey"]

Progress = Callable[[str], None]

_COMPARABLE = ("reverses", "factor 0", "all frozen")  # a gradient arrives, and leaves as another one


def survey(
    model: nn.Module,
    inputs: Any,
    *,
    seed: int = 0,
    progress: Progress = lambda what: None,
    contexts: Sequence[Context] = CONTEXTS,
) -> list[Outcome]:
    """Run a network through the contexts, to see whether its reversals do there what they do in eager mode.

    Args:
        model: The network; not changed.
        inputs: Arguments of forward.
        seed: Of all random numbers.
        progress: Is told what is about to run.
        contexts: Which ones, behind eager mode.

    Returns:
        One outcome for each context; nothing where no gradient arrives at any reversal.
    """
    progress("eager mode")
    trained = examine(model, inputs, seed=seed, training=True)
    sites = [site for site in trained if site.finding.verdict in _COMPARABLE]
    if not sites:
        return []
    found = [Outcome("eager, train mode", "alive"), _in_eval(model, inputs, sites, seed)]
    # Without dropout and batch statistics a gradient is the same however it is computed.
    patient = _Patient(model, inputs, sites, training=found[1].status != "alive", seed=seed)
    for context in contexts:
        if context.needs is None or importlib.util.find_spec(context.needs):
            progress(context.name)
            found.append(patient.outcome(context))
    return found


def _in_eval(model: nn.Module, inputs: Any, sites: Sequence[Site], seed: int) -> Outcome:
    name = "eager, eval mode"
    try:
        evaluated = examine(model, inputs, seed=seed, training=False)
    except SurgeryError as error:  # it runs in train mode only
        return Outcome(name, "error", first_sentence(error.__cause__ or error))
    same = {(site.finding.where, site.finding.verdict) for site in evaluated}
    off = [s.finding.where for s in sites if (s.finding.where, s.finding.verdict) not in same]
    if not off:
        return Outcome(name, "alive")
    return Outcome(name, "off", f"{', '.join(off)} passes the gradient unchanged in eval mode")


@dataclass
class _Patient:
    """A network with its reversals, and the gradients that it has with and without them in eager mode."""

    model: nn.Module
    inputs: Any
    sites: Sequence[Site]
    training: bool
    seed: int

    def __post_init__(self) -> None:
        self.right = self._eager(frozenset())
        everything = frozenset(key for site in self.sites for key in site.keys)
        self.without = {"": self._eager(everything)}
        if len(self.sites) > 1:
            self.without |= {site.finding.where: self._eager(site.keys) for site in self.sites}
        self.homes = homes(self.model, self.inputs, self.sites, seed=self.seed, training=self.training)

    def _eager(
        self, neutral: frozenset[Key], change: Callable[[Sandbox], None] = lambda rig: None
    ) -> Gradients:
        with private_runs(self.model):
            rig = self._rig()
            change(rig)
            return eager_gradients(rig, neutral)

    def _rig(self) -> Sandbox:
        return Sandbox.of(self.model, self.inputs, training=self.training, seed=self.seed)

    def outcome(self, context: Context) -> Outcome:
        """Run one context and compare."""
        with private_runs(self.model):
            rig = self._rig()
            try:
                ready = context.prepare(rig)
                found = ready.gradients()
            except Exception as error:  # of the user's network, or of torch's tracers
                return Outcome(context.name, "error", first_sentence(error))
            status, note = self._compared(found, context.tolerance)
            if status == "alive":
                frozen = [home for home in self.homes if home and self._is_frozen(context, rig, ready, home)]
                if frozen:
                    was = ", ".join(f"{home} was {home.value:g}" for home in frozen)
                    return Outcome(context.name, "frozen", f"another coefficient has no effect: {was}")
        return Outcome(context.name, status, note)

    def _compared(self, found: Mapping[str, torch.Tensor], tolerance: float) -> tuple[Status, str]:
        if _close(found, self.right, self.without[""], self.right, tolerance):
            return "alive", ""
        for where, plain in self.without.items():
            if _close(found, self.right, plain, plain, tolerance):
                return "LOST", f"only {where}" if where else ""
        return "wrong", "the gradient is neither that of eager mode nor that without the reversal"

    def _is_frozen(self, context: Context, rig: Sandbox, ready: Ready, home: CoefficientSource) -> bool:
        """Whether another coefficient, set on what runs, is obeyed there."""
        if home.kind == "shared" or home.sign == 0 or not context.takes_coefficient:
            return False
        wanted = self._eager(frozenset(), lambda fresh: home.set(fresh, _OTHER))
        try:
            home.set(rig, _OTHER, ready.network)
            found = ready.gradients()
        except Exception:  # no such attribute there, or an argument that the program refuses
            return True
        return not _close(found, wanted, self.without[""], wanted, context.tolerance)


_OTHER = 0.4375


def eager_gradients(rig: Sandbox, neutral: frozenset[Key] = frozenset()) -> Gradients:
    """Gradients in eager mode, these calls passing theirs on unchanged."""
    seen = observe(rig, neutral)
    if seen.failure is not None:
        raise seen.failure
    for row in seen.watch.passings:
        if row.key in neutral and row.neutralise is not None:
            row.neutralise()
    return rig.gradients_of(seen.outputs)


def _close(
    found: Mapping[str, torch.Tensor],
    right: Gradients,
    plain: Gradients,
    wanted: Gradients,
    tolerance: float,
) -> bool:
    """Whether a gradient is the wanted one, wherever the reversal makes a difference to speak of."""
    names = [name for name in found if name in right and found[name].shape == right[name].shape]
    size = {name: _rms(right[name].double() - plain[name].double()) for name in names}
    largest = max(size.values(), default=0.0)
    speaking = [name for name in names if size[name] > 1e-4 * largest]
    return bool(speaking) and all(
        _rms(found[name].double() - wanted[name].double()) <= tolerance * size[name] for name in speaking
    )


def _rms(gradient: torch.Tensor) -> float:
    return float(gradient.abs().square().mean().sqrt()) if gradient.numel() else 0.0
