"""Replaces the reversals of other code by ours, in place, and proves that the gradients are as before."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from grl_surgery.capture.capture import trace
from grl_surgery.capture.recorded_functions import FunctionCall
from grl_surgery.doctor.coefficient_source import CoefficientSource, homes
from grl_surgery.doctor.context_survey import eager_gradients, survey
from grl_surgery.doctor.detect import Site, examine, first_sentence, inputs_of
from grl_surgery.doctor.report import Adopted, Adoption, Left
from grl_surgery.doctor.sandbox import Gradients, Sandbox, private_runs
from grl_surgery.doctor.schedule_inference import rising
from grl_surgery.doctor.verdicts import Finding
from grl_surgery.errors import FlipError, SurgeryError, TracingError
from grl_surgery.isolation.shared_copy import replace_submodule, share_copy
from grl_surgery.nn.adopted_reversal import AdoptedReversal
from grl_surgery.points import escape
from grl_surgery.surgery.insert import check_model, splice
from grl_surgery.surgery.spliced_module import Cut, disassemble
from grl_surgery.training.schedules import Schedule

__all__ = ["adopt", "adopt_unsurveyed"]


def adopt(model: nn.Module, example_inputs: Any = None, *, seed: int = 0) -> Adoption:
    """Replace the reversals of a network by ours, which are not lost in traces and exports.

    A layer is replaced by an :class:`AdoptedReversal` at the same path, whose coefficient has the name and
    the state_dict key of the old one's. A Function that a forward calls is replaced in the graph of that
    forward. A layer that counts its own forwards becomes a constant and a schedule to drive it with.

    Example:
        >>> import torch
        >>> class Pasted(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return x.view_as(x)
        ...     @staticmethod
        ...     def backward(ctx, gradient):
        ...         return -gradient
        >>> class Net(nn.Sequential):
        ...     def forward(self, x):
        ...         return self[1](Pasted.apply(self[0](x)))
        >>> adoption = adopt(Net(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(3, 4))
        >>> adoption.alive_everywhere
        True

    Args:
        model: Any network. It is not changed; the result shares its parameters.
        example_inputs: As for ``find_reversals``.
        seed: Of all random numbers.

    Returns:
        The report; ``.model`` is the network.

    Raises:
        SurgeryError: There is nothing to adopt, and the message says what was found instead; or the network
            does not run on the example inputs.
        FlipError: The gradients are not what they were.
    """
    check_model(model, "adopt")
    inputs = inputs_of(model, example_inputs, "adopt")
    adoption = adopt_unsurveyed(model, inputs, seed=seed)
    adoption.outcomes += tuple(survey(adoption.model, inputs, seed=seed))
    return adoption


def adopt_unsurveyed(model: nn.Module, inputs: Any, *, seed: int = 0) -> Adoption:
    """The same, without the run through the contexts."""
    sites = [site for site in examine(model, inputs, seed=seed, training=True) if not site.finding.ours]
    work = _Work(model, inputs, seed)
    for site, home in zip(sites, homes(model, inputs, sites, seed=seed, training=True), strict=True):
        work.adopt(site, home)
    if not work.done:
        raise SurgeryError(
            f"there is nothing to adopt in this {type(model).__name__}"
            + "".join(f"\n  {left.where}: {left.reason}" for left in work.left),
            example="insert_grl(model, after='layer3')",
        )
    return Adoption(work.model, tuple(work.done), tuple(work.left), work.difference)


# ------------------------------------------------------------------------------------------------ the work


@dataclass
class _Work:
    """The network so far; each replacement is kept only if the gradients stay what they were."""

    original: nn.Module
    inputs: Any
    seed: int
    done: list[Adopted] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    difference: float | None = 0.0

    def __post_init__(self) -> None:
        self.model = share_copy(self.original)
        self.before = {mode: self._gradients(self.original, mode) for mode in (True, False)}
        if all(isinstance(found, Exception) for found in self.before.values()):
            self.difference = None

    def adopt(self, site: Site, home: CoefficientSource | None) -> None:
        """Replace one reversal, or write down why not."""
        reason = _obstacle(site.finding)
        if reason:
            self.left.append(Left(site.finding.where, reason))
            return
        schedule = None
        if site.finding.kind == "module":
            schedule = rising(self.original, self.inputs, site, seed=self.seed)
        if site.finding.moves and schedule is None:
            reason = "its coefficient moves by itself, and not as gs.schedules.warm_start does"
            self.left.append(Left(site.finding.where, reason))
            return
        home = None if schedule else home
        try:
            candidate, names = self._replaced(site, home)
            self._check(candidate)
        except Exception as error:  # a forward of the user's, or a trace of it
            self.left.append(Left(site.finding.where, first_sentence(error)))
            return
        self.model = candidate
        self.done += [_adopted(site, home, name, schedule) for name in names]

    def _replaced(self, site: Site, home: CoefficientSource | None) -> tuple[nn.Module, list[str]]:
        if site.finding.kind == "module":
            return _with_layer(self.model, site, home), [site.finding.path]
        if site.finding.kind == "function":
            return _with_calls(self.model, site, self.inputs)
        raise SurgeryError("a hook in a forward: write gs.reverse_gradient(x, coeff) there instead")

    def _check(self, candidate: nn.Module) -> None:
        """Compare with the gradients before, in train and in eval mode."""
        for mode, before in self.before.items():
            after = self._gradients(candidate, mode)
            if isinstance(after, Exception):
                raise after
            if isinstance(before, Exception):
                continue
            difference = _difference(before, after)
            if difference > 1e-5:
                word = "train" if mode else "eval"
                raise FlipError(f"in {word} mode the gradients would differ by {difference:.1e}")
            self.difference = max(self.difference or 0.0, difference)

    def _gradients(self, model: nn.Module, training: bool) -> Gradients | Exception:
        with private_runs(self.original):
            try:
                return eager_gradients(Sandbox.of(model, self.inputs, training=training, seed=self.seed))
            except Exception as error:  # the network is the user's
                return error


def _obstacle(finding: Finding) -> str:
    """Why a place cannot be adopted; empty if nothing speaks against it."""
    factor = finding.factor
    if isinstance(factor, tuple):
        return "one coefficient for each sample: call gs.reverse_gradient(x, coeff) with a (B,) tensor"
    if factor is None or factor > 0:
        return f"{finding.verdict}: {finding.fix}"
    if finding.verdict == "detached":
        return f"detached: {finding.fix}"
    return ""


def _difference(before: Gradients, after: Gradients) -> float:
    """The largest relative difference of any parameter's gradient; 0 if they are equal bit for bit."""
    worst = 0.0
    for name in before.keys() & after.keys():
        size = float(before[name].abs().max()) if before[name].numel() else 0.0
        apart = (before[name] - after[name]).abs().max() if before[name].numel() else 0.0
        worst = max(worst, float(apart) / size if size else float(apart))
    return worst


# ------------------------------------------------------------------------------------------------- layers


def _with_layer(model: nn.Module, site: Site, home: CoefficientSource | None) -> nn.Module:
    """A copy with a layer of ours at the same path, and at every other path of the same layer."""
    tree = share_copy(model)
    old = tree.get_submodule(site.finding.path)
    new = _layer_like(old, _coeff(site), home, site)
    if old is tree:
        return new
    replace_submodule(tree, old, new)
    return tree


def _layer_like(old: nn.Module, coeff: float, home: CoefficientSource | None, site: Site) -> AdoptedReversal:
    alias = home.name if home and _is_own(home, site) else ""
    held = getattr(old, alias, None) if alias else None
    shape = held.shape if isinstance(held, torch.Tensor) else None
    saved = alias in old.state_dict()
    device = next((tensor.device for tensor in (*old.parameters(), *old.buffers())), None)
    value = float(home.value) if home and alias else coeff
    new = AdoptedReversal(value, alias=alias, saved_as=shape, in_state=saved)
    return new.to(device).train(old.training)


def _coeff(site: Site) -> float:
    assert isinstance(site.finding.factor, float)
    return abs(site.finding.factor)  # it is not positive, and -0.0 is no coefficient


def _is_own(home: CoefficientSource, site: Site) -> bool:
    """Whether the coefficient is the layer's own number, and the factor minus that."""
    own = home.kind in ("attribute", "buffer", "parameter") and home.holder == site.finding.path
    return own and site.finding.kind == "module" and home.sign == -1


# ------------------------------------------------------------------------------------ Functions in a forward


def _with_calls(model: nn.Module, site: Site, inputs: Any) -> tuple[nn.Module, list[str]]:
    """A copy in which the forward that calls a Function is a graph that calls a layer of ours instead."""
    base, cuts, modules = disassemble(model)
    assert site.passing is not None
    points = _points(base, site)
    numbers = sorted(key[3] for key in site.keys)
    if numbers and numbers[-1] >= len(points):
        raise SurgeryError("its call is not to be seen in the graph of that forward")
    names = []
    for at in numbers:
        name = _free_name(base, modules, points[at])
        modules[name] = AdoptedReversal(_coeff(site)).train(base.training)
        cuts.append(Cut("instead", points[at], name))
        names.append(name)
    return splice(base, cuts, modules), names


def _points(base: nn.Module, site: Site) -> list[str]:
    """Names of the calls of that Function, or operator, in that module's forward."""
    try:
        return _points_inside(base, "", site)
    except TracingError as error:
        reason = error
    for host in reversed(_around(site.finding.path)):  # as surgery does where the root cannot be traced
        try:
            return _points_inside(base, host, site)
        except TracingError as error:
            reason = error
    raise reason


def _points_inside(base: nn.Module, host: str, site: Site) -> list[str]:
    """The same, tracing only what lies in the module called ``host``."""
    assert site.passing is not None
    own, path = site.passing.own, site.finding.path
    inside = path[len(host) :].lstrip(".")
    traced = trace(base.get_submodule(host), {"", *_around(inside)}, allow_untraceable=True)
    nodes = [node for graph in list(traced.graphs.values())[:1] for node in graph.nodes]
    calls = [node.meta["point"] for node in nodes if "point" in node.meta and _calls(node, own)]
    prefix = f"{escape(host)}." if host else ""
    return [prefix + name for name in calls if name.rpartition(".")[0] == escape(inside)]


def _around(path: str) -> list[str]:
    """The modules around the one at ``path``, outermost first, and itself."""
    parts = path.split(".") if path else []
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _calls(node: fx.Node, own: Any) -> bool:
    if isinstance(node.target, FunctionCall):
        return node.target.kind is own
    operator = isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    # torch names the Function behind an operator after it.
    return operator and re.sub(r"\W+", "_", str(node.target)) in own.__name__


def _free_name(base: nn.Module, modules: dict[str, nn.Module], point: str) -> str:
    name = "grl_" + re.sub(r"\W+", "_", point).strip("_")
    taken = [name, *(f"{name}_{count}" for count in range(2, 1000))]
    return next(free for free in taken if free not in modules and not hasattr(base, free))


# ---------------------------------------------------------------------------------------------- the report


def _adopted(site: Site, home: CoefficientSource | None, name: str, schedule: Schedule | None) -> Adopted:
    coeff = _coeff(site)
    notes: list[str] = []
    follows = home is not None and (_is_own(home, site) or home.kind == "argument")
    if home is not None and not follows:
        notes.append(f"{home} is not read any more: set reversals(model)[{name!r}].set_coeff(...)")
    if home is not None and home.kind == "parameter" and follows:
        notes.append(f"{home} is no parameter any more; its key in the state_dict is kept")
    methods = _methods(site)
    if methods:
        notes.append(f"it has no {', '.join(methods)} any more: set_coeff(...)")
    if schedule is not None:
        notes.append(
            f"it does not count steps any more: gs.CoefficientScheduler(model, {_call(schedule)}, ...)"
        )
    return Adopted(site.finding.where, name, coeff, str(home) if follows else None, schedule, tuple(notes))


def _methods(site: Site) -> list[str]:
    """List the methods of the old layer besides its forward."""
    own = site.passing.own if site.passing and site.finding.kind == "module" else object
    public = (name for name, value in vars(own).items() if callable(value) and name[0] != "_")
    return [f"{name}()" for name in public if name not in ("forward", "backward", "extra_repr")]


def _call(schedule: Schedule) -> str:
    return f"gs.schedules.{repr(schedule).partition('  #')[0]}"
