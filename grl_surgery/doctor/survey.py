"""What becomes of a network's reversals wherever it may run, compared with eager mode."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grl_surgery.doctor.coefficients import Home, homes
from grl_surgery.doctor.contexts import CONTEXTS, Context, Ready
from grl_surgery.doctor.finding import Site, examine, observe, one_line
from grl_surgery.doctor.rig import Gradients, Rig, private_runs
from grl_surgery.doctor.verdicts import Outcome, Status
from grl_surgery.doctor.watch import Key, Watch

__all__ = ["eager_gradients", "survey"]

Progress = Callable[[str], None]


def survey(
    model: nn.Module,
    inputs: Any,
    *,
    seed: int = 0,
    progress: Progress = lambda what: None,
    contexts: Sequence[Context] = CONTEXTS,
) -> list[Outcome]:
    """Run a network that reverses in eager mode through the contexts.

    Args:
        model: The network; not changed.
        inputs: Arguments of forward.
        seed: Of all random numbers.
        progress: Is told what is about to run.
        contexts: Which ones, behind eager mode.
    """
    progress("eager mode")
    trained, evaluated = (examine(model, inputs, seed=seed, training=mode) for mode in (True, False))
    sites = [site for site in trained if site.finding.ok]
    found = [Outcome("eager, train mode", "alive"), _in_eval(sites, evaluated)]
    # Without dropout and batch statistics a gradient is the same however it is computed.
    patient = _Patient(model, inputs, sites, training=found[1].status != "alive", seed=seed)
    for context in contexts:
        if context.needs is None or importlib.util.find_spec(context.needs):
            progress(context.name)
            found.append(patient.outcome(context))
    return found


def _in_eval(sites: Sequence[Site], evaluated: Sequence[Site]) -> Outcome:
    reversing = {site.finding.where for site in evaluated if site.finding.ok}
    off = [site.finding.where for site in sites if site.finding.where not in reversing]
    if not off:
        return Outcome("eager, eval mode", "alive")
    return Outcome("eager, eval mode", "off", f"{', '.join(off)} passes the gradient unchanged in eval mode")


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

    def _eager(self, neutral: frozenset[Key], change: Callable[[Rig], None] = lambda rig: None) -> Gradients:
        with private_runs(self.model):
            rig = self._rig()
            change(rig)
            return eager_gradients(rig, neutral)

    def _rig(self) -> Rig:
        return Rig.of(self.model, self.inputs, training=self.training, seed=self.seed)

    def outcome(self, context: Context) -> Outcome:
        """Run one context and compare."""
        with private_runs(self.model):
            rig = self._rig()
            try:
                ready = context.prepare(rig)
                found = ready.gradients()
            except Exception as error:  # of the user's network, or of torch's tracers
                return Outcome(context.name, "error", one_line(error))
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

    def _is_frozen(self, context: Context, rig: Rig, ready: Ready, home: Home) -> bool:
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


def eager_gradients(rig: Rig, neutral: frozenset[Key] = frozenset()) -> Gradients:
    """Gradients in eager mode, these calls passing theirs on unchanged."""
    for kind, path, *_ in neutral:
        if kind == "module":
            rig.network = _with_module(rig.network, path, _PassesOn())
    watch = Watch.of(rig, neutral)
    seen = observe(rig, watch=watch)
    if seen.failure is not None:
        raise seen.failure
    for row in watch.passings:
        if row.key in neutral and row.neutralise is not None:
            row.neutralise()
    return rig.gradients_of(seen.outputs)


class _PassesOn(nn.Module):
    """The identity, however it is called."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


def _with_module(network: nn.Module, path: str, module: nn.Module) -> nn.Module:
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    network.get_submodule(parent)._modules[name] = module
    return network


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
