"""Reversals that no surgery put there: in a network that was spliced, or alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from grl_surgery.doctor.finding import Site, examine, inputs_of
from grl_surgery.doctor.rig import Gradients, Rig, private_runs
from grl_surgery.doctor.survey import eager_gradients
from grl_surgery.errors import SurgeryError
from grl_surgery.flip_report import FlipReport, ParameterFlip, ReversalFlip
from grl_surgery.splicing import reversals

__all__ = ["cancelling", "proof_of_foreign"]


def cancelling(model: nn.Module, inputs: Any, training: bool | None, seed: int) -> Iterator[str]:
    """Say which reversals every gradient crosses that another one has reversed before.

    Only pairs count of which one is no layer that surgery spliced.

    Args:
        model: A spliced network; it is not changed.
        inputs: Arguments of forward.
        training: The mode; None for the flags as they are.
        seed: Of all random numbers.
    """
    try:
        sites = examine(model, inputs, seed=seed, training=training)
    except SurgeryError:
        return
    ours = set(reversals(model))
    for site in sites:
        if site.finding.verdict == "reversed twice":
            other = site.finding.note.rpartition(", by ")[2]
            pair = [_layer(name, ours) for name in (site.finding.where, other)]
            if not (set(pair) <= ours and not any(_is_inside(name, ours) for name in pair)):
                yield (
                    f"{site.finding.where} and {other} cancel: what arrives behind both is the gradient "
                    "as it was; take one of the two out"
                )


def _layer(name: str, ours: set[str]) -> str:
    """The layer of ours whose own Function it is that was found; another name as it is."""
    around = name.rpartition(" in ")[2]
    return around if around in ours else name


def _is_inside(name: str, ours: set[str]) -> bool:
    """Whether a layer stands in a head that has a reversal of its own."""
    head = name.partition(".")[0]
    return f"{head}.reversal" in ours and name != f"{head}.reversal"


def proof_of_foreign(
    model: nn.Module, example_inputs: Any, training: bool | None, seed: int
) -> FlipReport | None:
    """Prove the reversals of a network that has none of ours; None where it has no other either.

    The gradients are compared with those of the same network in which what reverses passes them on
    unchanged.

    Args:
        model: Any network; it is not changed.
        example_inputs: Arguments of forward, or None for those that are known.
        training: The mode; None for the flags as they are.
        seed: Of all random numbers.
    """
    try:
        inputs = inputs_of(model, example_inputs, "verify_flip")
        found = examine(model, inputs, seed=seed, training=training)
    except SurgeryError:
        return None
    sites = [site for site in found if site.finding.verdict not in ("no multiple", "factor +1")]
    if not sites:
        return None
    keys = frozenset(key for site in sites for key in site.keys)

    def gradients(without: Any) -> Gradients:
        with private_runs(model):
            return eager_gradients(Rig.of(model, inputs, training=training, seed=seed), without)

    try:
        before, after = gradients(keys), gradients(frozenset())
    except Exception:  # of the user's network: the findings say what failed
        before, after = {}, {}
    factors = {site.finding.factor for site in sites}
    rows = tuple(_row(name, tensor, before, after, factors) for name, tensor in model.named_parameters())
    flags = {module.training if training is None else training for module in model.modules()}
    is_flipped = any(row.measured in ("flipped", "mixed") for row in rows)
    nothing = () if is_flipped else ("no parameter's gradient is reversed",)
    mode = "mixed" if len(flags) > 1 else "train" if flags.pop() else "eval"
    return FlipReport(rows, tuple(map(_reversal, sites)), True, mode, nothing, type(model).__name__)


def _reversal(site: Site) -> ReversalFlip:
    finding = site.finding
    coeff = abs(finding.factor) if isinstance(finding.factor, float) else float("nan")
    note = "" if finding.ok else f"{finding.verdict}: {finding.note}"
    return ReversalFlip(finding.where, finding.source or "", coeff, finding.ok, note)


def _row(
    name: str,
    parameter: nn.Parameter,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    factors: set[Any],
) -> ParameterFlip:
    shape = tuple(parameter.shape)
    old, new = before.get(name), after.get(name)
    if old is None or new is None or not (old.any() or new.any()):
        return ParameterFlip(name, shape, "unknown", "no signal", True)
    if torch.equal(old, new):
        return ParameterFlip(name, shape, "unknown", "unchanged", True)
    scale = float(old.abs().max()) or 1.0
    for factor in factors:
        if (
            isinstance(factor, float)
            and float((new - factor * old).abs().max()) <= 1e-5 * abs(factor) * scale
        ):
            return ParameterFlip(name, shape, "unknown", "flipped", True)
    return ParameterFlip(name, shape, "unknown", "mixed", True)
