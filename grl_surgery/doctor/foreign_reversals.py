"""Finds and judges the reversals that no surgery put into a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from grl_surgery.autograd_graph import nodes_below
from grl_surgery.doctor.context_survey import eager_gradients
from grl_surgery.doctor.detect import Site, examine, inputs_of
from grl_surgery.doctor.identity_probes import IdentityCall, IdentityProbe, ratio
from grl_surgery.doctor.sandbox import Gradients, Sandbox, private_runs
from grl_surgery.errors import SurgeryError
from grl_surgery.isolation.pytrees import tensors_in
from grl_surgery.isolation.rng_state import seed_everything
from grl_surgery.surgery.head_outputs import split_logits
from grl_surgery.surgery.insert import reversals
from grl_surgery.verify.report import FlipReport, ParameterFlip, ReversalFlip

__all__ = ["cancelling", "proof_of_foreign", "reversed_back"]


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


@dataclass
class _Arithmetic:
    """A value that equals an earlier one and sends it its gradient back reversed, by plain operations."""

    path: str
    factor: float
    node: Any


class _Operations(TorchFunctionMode):
    """Finds results of operations that have the value of an earlier result of the same shape.

    ``2 * x.detach() - x`` is ``x``, and its gradient is -1 times what arrives. Whatever does so takes a value
    of that shape out of the graph first; only then is anything compared.
    """

    def __init__(self, path: Callable[[], str]) -> None:
        super().__init__()
        self.path = path
        self.seen: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.detached: set[Any] = set()
        self.found: list[_Arithmetic] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel() > 1:
            kind = output.shape, output.dtype
            if output.requires_grad and output.grad_fn is not None:
                total = output.detach().sum()
                if kind in self.detached:
                    self._compare(output, total, self.seen.get(kind, ()))
                self.seen.setdefault(kind, []).append((output, total))
            elif any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
                self.detached.add(kind)
        return output

    def _compare(self, output: torch.Tensor, total: torch.Tensor, earlier: Any) -> None:
        for value, its_total in earlier:
            if output is value or not torch.allclose(total, its_total, rtol=1e-3, atol=1e-3):
                continue
            if not torch.allclose(output.detach(), value.detach(), rtol=1e-5, atol=1e-7):
                continue
            probe = torch.ones_like(output)
            (back,) = torch.autograd.grad(output, value, probe, retain_graph=True, allow_unused=True)
            factor = None if back is None else ratio(probe, back)
            by_function = isinstance(output.grad_fn, torch.autograd.function.BackwardCFunction)
            if isinstance(factor, float) and factor < 0 and not by_function:  # those are seen as such
                self.found.append(_Arithmetic(self.path(), factor, output.grad_fn))
                return


def reversed_back(
    model: nn.Module, inputs: Any, training: bool | None, seed: int, heads: Sequence[str]
) -> Iterator[str]:
    """Say which of our reversals another one follows on every path to the output, or to a head's logits.

    Others are autograd Functions, hooks, modules, and plain operations as in ``2 * x.detach() - x``.

    Args:
        model: A spliced network; it is not changed.
        inputs: Arguments of forward.
        training: The mode; None for the flags as they are.
        seed: Of all random numbers.
        heads: Names of its heads, in the order of their logits.
    """
    ours = set(reversals(model))
    with private_runs(model):
        rig = Sandbox.of(model, inputs, training=training, seed=seed)
        for path in ours:  # they pass gradients on unchanged, so that a factor below 0 is another's
            rig.network.get_submodule(path)._buffers["coeff"] = torch.tensor(-1.0)
        probe = IdentityProbe.of(rig)
        operations = _Operations(lambda: probe.running[-1][1] if probe.running else "")
        try:
            with probe.recording(), operations:
                args, kwargs = rig.fresh_inputs()
                seed_everything(seed)
                returned = rig.network(*args, **kwargs)
            parts = split_logits(returned, heads)
        except Exception:  # of the user's network; the proof has run it already
            return
        ends = [[t.grad_fn for t in tensors_in(part) if t.grad_fn is not None] for part in parts]
        mine = {row.path: row.enters for row in probe.passings if row.kind == "module" and row.path in ours}
        theirs: list[tuple[str, str, Any]] = []
        for row in probe.passings:
            is_ours = row.path in ours or row.is_backward_hook or row.enters is None
            if not is_ours and _is_negative(row):
                theirs.append((row.path, "a hook" if row.kind == "hook" else row.name, row.enters))
        theirs += [(one.path, "plain operations", one.node) for one in operations.found]
        for name, node in mine.items():
            for path, what, other in theirs:
                if other not in mine.values() and _cancel(ends, node, other):
                    yield (
                        f"{name} and {what} in {path or 'the forward of the network'} cancel: what arrives "
                        "behind both is reversed twice; take one of the two out"
                    )
                    break


def _is_negative(row: IdentityCall) -> bool:
    try:
        factor = row.measure()
    except Exception:  # a backward of the user's
        return False
    return isinstance(factor, float) and factor < 0


def _cancel(ends: Sequence[Sequence[Any]], first: Any, second: Any) -> bool:
    """Whether, for an objective, every gradient that arrives at one of two nodes has crossed the other."""
    return any(_is_between(end, first, second) or _is_between(end, second, first) for end in ends)


def _is_between(ends: Sequence[Any], first: Any, second: Any) -> bool:
    """Whether every gradient that arrives at the second node has crossed the first."""
    return second in nodes_below(ends) and second not in nodes_below(ends, without=first)


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
            return eager_gradients(Sandbox.of(model, inputs, training=training, seed=seed), without)

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
