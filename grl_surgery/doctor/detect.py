"""Finds every reversal of a network by measuring its gradient, whatever it is called."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from grl_surgery.autograd_graph import nodes_above, nodes_below
from grl_surgery.doctor.identity_probes import Factor, IdentityCall, IdentityProbe, Key, ratio, source_line
from grl_surgery.doctor.sandbox import Sandbox, private_runs
from grl_surgery.doctor.verdicts import Finding, shown_factor
from grl_surgery.errors import SurgeryError
from grl_surgery.loading.inputs import does_not_run
from grl_surgery.loading.inputs import example_inputs as known_inputs
from grl_surgery.nn.reversal import GradientReversal

__all__ = ["Observation", "Site", "examine", "first_sentence", "inputs_of", "observe"]


def inputs_of(model: nn.Module, example_inputs: Any, verb: str) -> Any:
    """The example inputs that were given or that are known."""
    inputs = known_inputs(model) if example_inputs is None else example_inputs
    if inputs is None:
        raise SurgeryError(
            f"it is not known what inputs {type(model).__name__} takes",
            example=f"{verb}(model, torch.randn(2, 3, 224, 224))",
        )
    return inputs


# ------------------------------------------------------------------------------------------- one observation


@dataclass
class Observation:
    """One forward of a private network under watch, and what was measured afterwards."""

    rig: Sandbox
    watch: IdentityProbe
    outputs: list[Tensor] = field(default_factory=list)
    failure: Exception | None = None

    @cached_property
    def factors(self) -> dict[Key, Factor | Exception]:
        """Measure what each call that passed its input on does to a gradient."""
        found: dict[Key, Factor | Exception] = {}
        for row in self.watch.passings:
            try:
                found[row.key] = row.measure()
            except Exception as error:  # a backward of the user's
                found[row.key] = error
        return found

    @cached_property
    def reached(self) -> dict[Any, None]:
        """The autograd nodes that a gradient from the outputs reaches."""
        return nodes_below([output.grad_fn for output in self.outputs])


def observe(rig: Sandbox, neutral: frozenset[Key] = frozenset()) -> Observation:
    """Run a rig's network once and record; what goes wrong is recorded as well.

    Of the calls in ``neutral``, modules and hooks pass the gradient on; Functions do so once neutralised.
    """
    for kind, path, *_ in neutral:
        if kind == "module":
            rig.take_out(path)
    watch = IdentityProbe.of(rig, neutral)
    observation = Observation(rig, watch)
    try:
        with watch.recording():
            observation.outputs = rig.run()
    except Exception as error:  # the network is the user's
        observation.failure = error
    return observation


# ------------------------------------------------------------------------------------------------ the sites


@dataclass
class Site:
    """One place in the network, with the calls behind its finding."""

    passing: IdentityCall | None
    finding: Finding
    inner: tuple[IdentityCall, ...] = ()

    @property
    def keys(self) -> frozenset[Key]:
        """The calls to neutralise for the network without this reversal."""
        rows = self.inner or ((self.passing,) if self.passing else ())
        return frozenset(row.key for row in rows)


def examine(model: nn.Module, inputs: Any, *, seed: int = 0, training: bool | None = None) -> list[Site]:
    """Find, measure and judge.

    Raises:
        SurgeryError: The network does not run on these inputs, and nothing like a reversal is to blame.
    """
    with private_runs(model) as changed:
        first = observe(Sandbox.of(model, inputs, seed=seed, training=training))
        if first.failure is not None:
            fresh = Sandbox.of(model, inputs, seed=seed, training=training)
            _raise_unless_reversal_failed(first, first.failure, fresh)
        sites = _judge(model, first)
        again = observe(first.rig) if first.failure is None else first
        later = again.factors
    return [_with_movement(site, later, changed) for site in sites]


def _judge(model: nn.Module, seen: Observation) -> list[Site]:
    flow = _Flow(seen)
    for row in seen.watch.passings:
        if row.is_backward_hook and flow.passages.get(row.enters) is not None:
            seen.factors[row.key] = flow.passages[row.enters]  # it acts in a whole backward pass only
    chosen = _chosen(seen)
    grouped: dict[tuple[Any, ...], Site] = {}
    for row in chosen:
        inner = tuple(other for other in seen.watch.passings if row.call >= 0 and row.call in other.inside)
        inner = tuple(other for other in inner if other.kind != "module" and not _is_idle(other, seen))
        finding = flow.finding(model, row, inner)
        same = (row.kind, row.path, row.name, row.source, finding.factor, finding.verdict)
        if same in grouped:
            grouped[same] = _joined(grouped[same], inner or (row,))
        else:
            grouped[same] = Site(row, finding, inner)
    sites = list(grouped.values())
    if flow.failure is not None and not any(site.finding.verdict == "fails" for site in sites):
        sites.append(Site(None, _failure(model, seen, flow.failure)))
    return sites


def _joined(site: Site, calls: tuple[IdentityCall, ...]) -> Site:
    held = site.inner or ((site.passing,) if site.passing else ())
    return Site(site.passing, replace(site.finding, calls=site.finding.calls + 1), (*held, *calls))


def _chosen(seen: Observation) -> list[IdentityCall]:
    """The passings to report: the innermost module around a reversal rather than the Function inside it."""
    rows = [row for row in seen.watch.passings if not _is_idle(row, seen)]
    modules = [row for row in rows if row.kind == "module"]
    modules = [row for row in modules if not any(row.call in other.inside for other in modules)]
    covered = {row.call for row in modules}
    return _in_order(modules, [row for row in rows if row.kind != "module" and not covered & {*row.inside}])


def _in_order(modules: Sequence[IdentityCall], others: Sequence[IdentityCall]) -> list[IdentityCall]:
    """Both in the order of the forward, as far as the calls around them tell."""
    return sorted(
        [*modules, *others], key=lambda row: row.call if row.call >= 0 else max(row.inside, default=0)
    )


def _is_idle(row: IdentityCall, seen: Observation) -> bool:
    """Whether it passes gradients on unchanged as well, and does not pretend to do anything else."""
    if seen.factors[row.key] != 1.0:
        return False
    if row.kind == "module":
        return not callable(getattr(row.own, "backward", None))
    return row.kind == "hook" or row.is_backward_hook


# ---------------------------------------------------------------------------------------- the gradient's way


class _Flow:
    """One whole backward pass: where gradients arrive, die, and go on to."""

    def __init__(self, seen: Observation) -> None:
        self.seen = seen
        self.failure = seen.failure
        self.entered: dict[Any, bool] = {}
        self.overwriting: set[Any] = set()
        self.died: list[Any] = []
        self.passages: dict[Any, Factor] = {}
        if seen.failure is None:
            self._run({row.enters for row in seen.watch.passings if row.kind == "function"})

    def _run(self, watched: set[Any]) -> None:
        handles = [
            handle for node in self.seen.reached for handle in self._follow(node, measured=node in watched)
        ]
        try:
            self.seen.rig.gradients_of(self.seen.outputs)
        except Exception as error:  # a backward of the user's
            self.failure = error
        finally:
            for handle in handles:
                handle.remove()

    def _follow(self, node: Any, *, measured: bool) -> tuple[Any, Any]:
        """Look at what arrives before the node's backward runs, which may overwrite it."""
        kept: list[Tensor] = []

        def before(entered: Sequence[Tensor | None]) -> None:
            self.entered[node] = _has_signal(entered)
            if measured and self.entered[node] and len(entered) == 1:
                kept.extend(gradient.clone() for gradient in entered if gradient is not None)

        def after(left: Sequence[Tensor | None], entered: Sequence[Tensor | None]) -> None:
            if self.entered[node] and left and not _has_signal(left):
                self.died.append(node)
            for arrived, leaves, found in zip(kept, left, entered, strict=False):
                self.passages[node] = ratio(arrived, leaves)
                if found is not None and not torch.allclose(arrived, found, rtol=0, atol=0, equal_nan=True):
                    self.overwriting.add(node)

        return node.register_prehook(before), node.register_hook(after)

    def finding(self, model: nn.Module, row: IdentityCall, inner: Sequence[IdentityCall]) -> Finding:
        """The verdict on one place."""
        factor = self.seen.factors[row.key]
        verdict, note = self._verdict(model, row, factor)
        return Finding(
            where=_where(row),
            kind=row.kind,
            path=row.path,
            name=row.name,
            factor=None if isinstance(factor, Exception) else factor,
            verdict=verdict,
            note=note,
            remarks=(_OVERWRITES,) if row.enters in self.overwriting else (),
            source=inner[0].source if inner else row.source,
            ours=isinstance(row.own, type) and issubclass(row.own, GradientReversal),
        )

    def _verdict(self, model: nn.Module, row: IdentityCall, factor: Factor | Exception) -> tuple[str, str]:
        if isinstance(factor, Exception):
            return "fails", f"in its backward: {first_sentence(factor)}"
        if self.failure is not None:
            return "fails", f"behind it: {first_sentence(self.failure)}"
        if row.enters is None:
            end = "output" if row.below else "input"
            return "detached", f"its {end} carries no gradient: detached, or computed under no_grad"
        if factor is None:
            return "no multiple", "what leaves is no multiple of the gradient that enters"
        values = factor if isinstance(factor, tuple) else (factor,)
        if all(value == 0 for value in values):
            return "factor 0", "the gradient is multiplied by 0: nothing flows back"
        if max(values) > 0:
            return _keeps(model, row, factor)
        return self._on_its_way(model, row)

    def _on_its_way(self, model: nn.Module, row: IdentityCall) -> tuple[str, str]:
        """A reversal: does a gradient arrive there, and does it get anywhere?"""
        if row.enters not in self.seen.reached:
            return "unused", "what leaves it reaches no output of the network"
        if not self.entered.get(row.enters, False):
            return "no gradient", self._where_it_dies(row)
        below = row.below or [node for node, _ in row.enters.next_functions]
        frozen = _frozen(model, self.seen.rig, nodes_below(below))
        if frozen:
            return "all frozen", f"nothing upstream of it is trained: {frozen}"
        twice = self._reversed_again(row)
        if twice is not None:
            return (
                "reversed twice",
                f"every gradient that arrives was reversed before, by {_where(twice)}",
            )
        return "reverses", ""

    def _where_it_dies(self, row: IdentityCall) -> str:
        above = nodes_above(list(self.seen.reached), row.enters)
        node = next((node for node in self.died if node in above), None)
        if node is None:
            return "no gradient arrives here"
        home = self.seen.watch.home_of.get(node)
        place = f" in {home}" if home else ""
        return f"the gradient that arrives is zero: it ends at {node.name()}{place}"

    def _reversed_again(self, row: IdentityCall) -> IdentityCall | None:
        """Another reversal that every path from the outputs to this one crosses."""
        starts = [output.grad_fn for output in self.seen.outputs]
        for other in self.seen.watch.passings:
            factor = self.seen.factors[other.key]
            negative = isinstance(factor, float) and factor < 0
            if not negative or other.enters is None or other.enters is row.enters or row.call in other.inside:
                continue
            if other.call in row.inside and other.call >= 0:
                continue
            if row.enters not in nodes_below(starts, without=other.enters):
                return other
        return None


_OVERWRITES = "its backward overwrites the gradient it is given, which another branch may share"


def _keeps(model: nn.Module, row: IdentityCall, factor: Factor) -> tuple[str, str]:
    layer = dict(model.named_modules()).get(row.path) if row.kind == "module" else None
    if isinstance(layer, GradientReversal) and layer.signed:
        return (
            "signed, negative",
            f"its coefficient is {layer.coeff.item():g}, as signed=True allows: the gradient keeps its sign",
        )
    if factor != 1.0:
        return "un-reverses", f"the gradient is multiplied by {shown_factor(factor)}: its sign is kept"
    if row.kind == "module" and callable(getattr(row.own, "backward", None)):
        return (
            "backward never called",
            "autograd calls no backward of a module; the gradient passes unchanged",
        )
    return "factor +1", "the gradient passes unchanged"


def _has_signal(gradients: Sequence[Tensor | None]) -> bool:
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def _frozen(model: nn.Module, rig: Sandbox, nodes: Iterable[Any]) -> str:
    """The parameters behind these nodes, in words, where none of them is trained; otherwise nothing."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    names = {id(leaf): name for name, leaf in rig.network.named_parameters()}
    leaves = [names.get(id(getattr(node, "variable", None))) for node in nodes]
    upstream = [name for name in leaves if name is not None]
    if not upstream or any(trained.get(name, True) for name in upstream):
        return ""
    return f"{upstream[0]} has requires_grad=False" + (
        f", and so have {len(upstream) - 1} more" if len(upstream) > 1 else ""
    )


def _where(row: IdentityCall) -> str:
    if row.kind == "module":
        return row.path or "the network itself"
    what = "a hook" if row.kind == "hook" else row.name
    if row.is_backward_hook:
        what = "a backward hook"
    return f"{what} in {row.path}" if row.path else what


def _with_movement(site: Site, later: Mapping[Key, Factor | Exception], changed: Sequence[str]) -> Site:
    """A factor that is another one at the next forward, and counters that a whole class shares."""
    now = site.finding.factor
    then = later.get(site.passing.key) if site.passing else now
    by_hook = site.passing is not None and site.passing.is_backward_hook
    if by_hook or then == now or now is None or then is None or isinstance(then, Exception):
        return site
    moves = f"the factor moves by itself: {shown_factor(now)}, then {shown_factor(then)}"
    counts = (f"it counts in {name}, which all instances share" for name in changed)
    finding = replace(site.finding, moves=True, remarks=(*site.finding.remarks, moves, *counts))
    if finding.verdict == "factor 0":
        finding = replace(finding, verdict="reverses", note="")
    return replace(site, finding=finding)


# ------------------------------------------------------------------------------------------- what goes wrong


def _raise_unless_reversal_failed(seen: Observation, error: Exception, fresh: Sandbox) -> None:
    """A forward that raised is a finding only where something like a reversal is to blame for it."""
    overwritten = "inplace" in str(error) and any(not _is_idle(row, seen) for row in seen.watch.passings)
    if overwritten or _runs_without(fresh, seen.watch.failed_in or ""):
        return
    inputs = (*fresh.args, *fresh.kwargs.values())
    raise SurgeryError(
        does_not_run(f"this {type(seen.rig.network).__name__}", inputs, error),
        example="diagnose(model, example_inputs), where model(example_inputs) runs",
    ) from error


def _runs_without(rig: Sandbox, path: str) -> bool:
    """Whether the network runs where a module passes its input on, as a reversal does."""
    module = rig.network.get_submodule(path)
    learns = any(parameter.numel() > 1 for parameter in module.parameters())
    if learns or type(module).__module__.startswith("torch."):
        return False
    rig.take_out(path)
    return observe(rig).failure is None


def _failure(model: nn.Module, seen: Observation, error: Exception) -> Finding:
    path = seen.watch.failed_in or ""
    return Finding(
        where=path or "the network itself",
        kind="module",
        path=path,
        name=type(model.get_submodule(path)).__qualname__,
        factor=None,
        verdict="fails",
        note=first_sentence(error),
        source=_line_that_failed(error),
    )


def _line_that_failed(error: Exception) -> str | None:
    """The innermost line that is the user's own, and not an installed library's."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [frame for frame in frames if "-packages" not in frame.f_code.co_filename]
    return source_line((own or frames)[-1]) if frames else None


def first_sentence(error: BaseException) -> str:
    """An error's kind and the first sentence of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].partition('. ')[0] if lines else ''}"
