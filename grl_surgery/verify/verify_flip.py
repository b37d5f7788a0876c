"""Proves that exactly the right gradients flip: compares the prediction with what autograd computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from grl_surgery.errors import FlipError, SurgeryError
from grl_surgery.isolation.float64 import SINGLE, widened
from grl_surgery.isolation.shared_copy import share_copy
from grl_surgery.isolation.tensor_copy import is_scripted, tensors_held, with_tensors
from grl_surgery.loading.inputs import example_inputs as known_inputs
from grl_surgery.nn.adopted_reversal import AdoptedReversal
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.surgery.insert import check_model, head_names, inner_heads, reversals, strip
from grl_surgery.validation import check_count
from grl_surgery.verify.compare import difference, same_bits
from grl_surgery.verify.experiment import (
    Experiment,
    GradientRecorder,
    Gradients,
    Run,
    Values,
    Wanted,
    coefficients,
    left_as_it_was,
    private_copy,
    repeatable,
    watching,
)
from grl_surgery.verify.fingerprint import Fingerprint, Sign, fingerprint
from grl_surgery.verify.layer_checks import (
    NONE_BEFORE,
    is_zero,
    ratio_of,
    wrong_coefficient,
    wrong_factor,
    wrong_passage,
)
from grl_surgery.verify.parameter_sample import sampled
from grl_surgery.verify.predicted_flow import flip_graph
from grl_surgery.verify.reference_model import (
    Factors,
    HookReversal,
    NoReversal,
    cuts_by_module,
    predict,
    sign_label,
    with_reversals,
    without_adopted,
)
from grl_surgery.verify.report import NO_REVERSAL, FlipReport, Kind, ParameterFlip, ReversalFlip
from grl_surgery.verify.sample_rows import mixed_rows

__all__ = ["verify_flip"]


def verify_flip(
    model: nn.Module,
    reference: nn.Module | None = None,
    example_inputs: Any = None,
    *,
    mode: Literal["train", "eval"] | None = None,
    seed: int = 0,
    budget: int | None = None,
    progress: Progress | None = None,
) -> FlipReport:
    """Prove that the spliced gradients, and no others, are reversed.

    On a copy, all coefficients are set to 1, and nothing is clipped or normalised. A reversed gradient must
    then be exactly the negative of the original, and every other gradient exactly the original. So bits are
    compared, without a tolerance. Clipping and normalising are proved at the reversal itself. A coefficient
    that is negative, infinite, nan, or disabled by ``reversal_disabled`` fails. A parameter of zeros gets
    other values on the copy, because zeros could make a gradient zero.

    With domain heads, each loss is proved by itself. The loss of the output must give every parameter its
    original gradient. The loss of a head must give upstream parameters exactly the negative of what the
    same head would give without its reversal, and the head its own gradient unchanged.

    Example:
        >>> from grl_surgery import insert_grl
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> report = verify_flip(insert_grl(net, after="1"), net, torch.randn(3, 4))
        >>> report.verdict
        '2 of 2 upstream parameters flipped, bit for bit; 2 downstream unchanged; forward identical'

    Args:
        model: A spliced network, or any network with a :class:`GradientReversal` in it.
        reference: The network without reversals, by default what ``strip(model)`` gives; one that is spliced
            itself is stripped.
        example_inputs: Arguments of forward: a tensor, a tuple, or a dict by name; by default those that timm
            or torchvision declare.
        mode: Verify in train or in eval mode; by default with the flags as they are on ``model``.
        seed: Of the random numbers that every run sees.
        budget: Prove a sample of at most so many parameters: those of the layers at the cuts, then the first
            and the last of every block. The report says that it is a sample, and what it leaves open.
        progress: Is told before each run which one it is, its number from 1, and how many there are at least.

    Returns:
        The report. Nothing that was passed in is changed, not even the random state.

    Raises:
        SurgeryError: There are no example inputs, or the reference is another network.
    """
    check_model(model, "verify_flip")
    if reference is not None:
        check_model(reference, "verify_flip")
    if not reversals(model) and not cuts_by_module(model):
        from grl_surgery.doctor.foreign_reversals import proof_of_foreign

        report = proof_of_foreign(model, example_inputs, _TRAINING.get(mode), seed)
        if report is not None:
            return report
    plain = _reference(model, reference)
    inputs = known_inputs(plain) if example_inputs is None else example_inputs
    if inputs is None:
        raise SurgeryError(
            f"it is not known what inputs {type(plain).__name__} takes",
            example="verify_flip(m, reference=model, example_inputs=(torch.randn(2, 3, 224, 224),))",
        )
    if mode not in ("train", "eval", None):
        raise SurgeryError(
            f"mode={mode!r} is not known; None keeps the network's own flags",
            choices=("train", "eval"),
            example="mode='eval'",
        )
    seed = check_count("seed", seed, least=0, example="seed=0")
    _check_same_network(model, plain)
    _check_values(model)
    if budget is not None:
        budget = check_count("budget", budget, least=1, example="budget=100")
    with repeatable():
        settings = (model, plain, inputs, mode, seed, budget, progress)
        report = _Verification(*settings).report()
        if not report.forward_identical and any(map(_keeps_results, (model, plain))):
            # One of the two may have kept from an earlier call what its own train() and eval() forget.
            with left_as_it_was(model), left_as_it_was(plain):
                fresh = _Verification(*settings, forgets=True).report()
            report = fresh if fresh.ok else report
        if all(row.note != _NO_GRADIENT for row in report.reversals):
            return report
        # The values that zeros got may have switched an activation off that is on in the network itself.
        own = _Verification(*settings, fills_zeros=False).report()
        return own if own.ok else report


def _hooked_back(model: nn.Module, flipped: Collection[str]) -> Iterator[str]:
    """Say which parameters with a reversed gradient have a hook that reverses it back.

    The runs use tensors of their own, without hooks. Hooks that run after a gradient has been stored are
    not looked at: an optimizer may step there.
    """
    from grl_surgery.doctor.identity_probes import ratio

    for name, parameter in model.named_parameters():
        hooks = list((parameter._backward_hooks or {}).values()) if name in flipped else []
        if not hooks:
            continue
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
        try:
            result = probe.clone()
            for hook in hooks:
                changed = hook(result)
                result = result if changed is None else changed
            factor = ratio(probe, result)
        except Exception:  # of the user's hook: a backward pass of the network says so
            continue
        if isinstance(factor, float) and factor < 0:
            yield (
                f"a hook on {name!r} multiplies its gradient by {factor:g}: it is reversed back; "
                "take one of the two out"
            )


Progress = Callable[[str, int, int], None]


_TRAINING: Mapping[str | None, bool | None] = {"train": True, "eval": False, None: None}


def _flags(model: nn.Module, mode: str | None) -> dict[str, bool]:
    """Mode flags as they are, or as the network's own ``train`` or ``eval`` sets them."""
    tree = model if mode is None else private_copy(model, {}).train(mode == "train")
    return {path: module.training for path, module in tree.named_modules()}


def _keeps_results(network: nn.Module) -> bool:
    """Whether a network holds what autograd has computed in a forward: a cache, a map of attention."""
    return any(tensor.grad_fn is not None for tensor in tensors_held(network))


def _moded(network: nn.Module, flags: Mapping[str, bool], *, forgets: bool = False) -> nn.Module:
    """A tree of its own with these mode flags, to be run on copies; one that forgets is set to both modes."""
    if any(map(is_scripted, network.modules())):
        return private_copy(network, flags)  # scripted modules cannot be shared
    tree = share_copy(network)
    if forgets:
        tree.train().eval()
    for path, module in tree.named_modules():
        module.training = flags.get(path, module.training)
    return tree


def _reference(model: nn.Module, given: nn.Module | None) -> nn.Module:
    """The network without reversals: stripped, or with those that the user wrote exchanged for identities."""
    network = model if given is None else given
    if cuts_by_module(network):
        return strip(network)
    return with_reversals(model, model, NoReversal) if given is None else given


def _check_same_network(model: nn.Module, reference: nn.Module) -> None:
    held = dict(model.named_parameters())
    missing = [name for name, _ in reference.named_parameters() if name not in held]
    if missing:
        raise SurgeryError(
            f"the reference is another network: the model has no parameter {missing[0]!r}",
            example="verify_flip(insert_grl(model, after='layer3'), reference=model)",
        )


def _check_values(model: nn.Module) -> None:
    """Refuse what has no numbers to compare."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise SurgeryError(
                f"{name!r} has no shape yet: its lazy module has not run",
                example="model(inputs), then verify",
            )
        if hasattr(tensor, "full_tensor"):
            raise SurgeryError(
                f"{name!r} is sharded over several processes, and a proof needs whole gradients",
                example="verify_flip(m, model, inputs), then fully_shard(m)",
            )
        if tensor.device.type == "meta":
            raise SurgeryError(
                f"{name!r} is on the meta device, where there are no numbers to compare",
                example="model.to_empty(device='cpu'), then load_state_dict",
            )


class _Verification:
    """Private copies of the networks to compare, and what came of running them."""

    def __init__(
        self,
        model: nn.Module,
        plain: nn.Module,
        inputs: Any,
        mode: str | None,
        seed: int,
        budget: int | None = None,
        progress: Progress | None = None,
        fills_zeros: bool = True,
        forgets: bool = False,
    ) -> None:
        self.forgets = forgets
        self.model, self.plain, self.mode, self.progress = model, plain, mode, progress
        self.heads = head_names(model)
        self.objectives = ("output", *self.heads)
        flags = _flags(model, mode)
        self.right_flags = flags if mode is None else {**flags, **_flags(plain, mode)}
        self.experiment = Experiment.on(model, inputs, seed, fills_zeros=fills_zeros)
        self.notes: list[str] = []
        if any(p.dtype == torch.float16 and p.device.type == "cpu" for p in model.parameters()):
            self.experiment = self.experiment.widened(SINGLE)
            self.notes.append("measured in float32: on a processor float16 is slow, and lacks operations")
        trained = [name for name, value in self.experiment.values.items() if value.requires_grad]
        if budget is not None and budget < len(trained):
            sample = sampled(model, trained, budget)
            self.experiment = self.experiment.of_sample(sample)
            self.notes.append(
                f"a sample of {len(sample)} of {len(trained)} parameters: the gradients of the other "
                f"{len(trained) - len(sample)} were not looked at, and are open"
            )
        self.runs = 0
        self.spliced = _moded(model, flags, forgets=forgets)
        for name, layer in reversals(model).items():  # a copy of one that is disabled would not be
            self.spliced.get_submodule(name)._buffers["coeff"] = layer.coeff
            if isinstance(
                layer, AdoptedReversal
            ):  # its coefficient may be an argument, which is none of ours
                self.spliced.get_submodule(name).__dict__["_obeys_argument"] = False
        self.fails_in_double = ""

    # -- the runs

    def _run(
        self, what: str, network: nn.Module, heads: Sequence[str] = (), wanted: Wanted | None = None
    ) -> Run:
        self.runs += 1
        if self.progress is not None:
            self.progress(what, self.runs, max(self.runs, 3 if self.heads else 2))
        return self.experiment.run(network, heads, wanted)

    @functools.cached_property
    def oracle(self) -> nn.Module:
        """The reference with tensor hooks where the recipe says reversal."""
        return _moded(
            with_reversals(self.model, self.plain, HookReversal), self.right_flags, forgets=self.forgets
        )

    @functools.cached_property
    def bare(self) -> nn.Module:
        """The reference with heads that have no reversal."""
        return _moded(
            with_reversals(self.model, self.plain, NoReversal), self.right_flags, forgets=self.forgets
        )

    @functools.cached_property
    def predicted(self) -> dict[str, dict[str, Factors | None]]:
        """By objective and parameter, the signs of all paths; None where no graph shows them."""
        names = [(name, id(parameter)) for name, parameter in self.oracle.named_parameters()]
        signs = {objective: predict(self.oracle, objective) for objective in self.objectives}
        return {
            at: {name: known.get(key, self._of_own_head(name, at)) for name, key in names}
            for at, known in signs.items()
        }

    def _of_own_head(self, name: str, objective: str) -> Factors | None:
        """What is known of a parameter without a graph: a head has its own gradient, and no other's."""
        head = name.partition(".")[0]
        if head not in self.heads:
            return None
        return frozenset({1} if head == objective else ())

    @functools.cached_property
    def baseline(self) -> dict[str, Gradients]:
        """Gradients without any reversal: of the reference and, for the heads, of heads without one."""
        return {"output": self.expected.gradients["output"], **self._of_bare_heads(self._signs)}

    def _of_bare_heads(self, wanted: Wanted) -> dict[str, Gradients]:
        of_heads = {name: wanted[name] for name in self.heads if wanted.get(name)}
        return (
            self._run("heads without reversal", self.bare, self.heads, of_heads).gradients if of_heads else {}
        )

    @functools.cached_property
    def _paths(self) -> dict[str, dict[str, frozenset[int]]]:
        """The signs of the paths in autograd's graph of the oracle, where no other graph shows them."""
        if all(None not in rows.values() for rows in self.predicted.values()):
            return {}
        try:
            return self.experiment.signs(self.oracle, self.heads, HookReversal)
        except Exception:  # the run of the reference, or of the oracle itself, says what fails
            return {}

    @functools.cached_property
    def _signs(self) -> dict[str, dict[str, Sign | Values]]:
        """Which bits of the gradients without reversal are compared: those that are predicted, or both."""
        return {
            at: {
                name: _SIGNS.get(rows.get(name) or self._paths.get(at, {}).get(name), "+-")
                for name in self.experiment.values
            }
            for at, rows in self.predicted.items()
        }

    @functools.cached_property
    def reference(self) -> nn.Module:
        """The reference without reversals of its own."""
        return _moded(without_adopted(self.model, self.plain), self.right_flags, forgets=self.forgets)

    @functools.cached_property
    def expected(self) -> Run:
        """The reference's run."""
        return self._run("the reference", self.reference, wanted={"output": self._signs["output"]})

    @functools.cached_property
    def right(self) -> Run:
        """The oracle's run, for gradients that several paths make or that no graph predicts."""
        return self._run("tensor hooks at the same places", self.oracle, self.heads)

    @functools.cached_property
    def actual(self) -> Run:
        """The spliced network's run."""
        return self._run("the spliced network", self.spliced, self.heads)

    def in_double(self, wanted: Wanted) -> tuple[Run, Run] | None:
        """The oracle's and the spliced network's run in float64; None if one of them fails there."""
        double = self.experiment.widened()
        try:
            return double.run(self.oracle, self.heads, wanted), double.run(self.spliced, self.heads, wanted)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            self.fails_in_double = f"; float64, which would tell this from rounding, fails: {reason[:120]}"
            return None

    def _check_runs(self) -> None:
        """Say which network it was that failed, if one does."""
        name = type(self.plain).__name__
        try:
            _ = self.expected
        except Exception as error:
            if isinstance(error, SurgeryError):
                raise
            for head in inner_heads(self.model):
                raise SurgeryError(
                    f"without the head {head!r}, whose logits its forward takes, {name} fails: {error}",
                    example=f"verify_flip(model.{head.rpartition('.')[0]}, example_inputs=...)",
                ) from error
            raise SurgeryError(
                f"{name} itself fails on these example inputs: {error}",
                example="example_inputs=(x,), with an x for which model(x) works",
            ) from error
        try:
            _ = self.actual
        except Exception as error:
            if isinstance(error, SurgeryError):
                raise
            raise FlipError(
                f"the spliced network fails where {name} runs: {type(error).__name__}: {error}"
            ) from error

    # -- the report

    def report(self) -> FlipReport:
        """Run everything, compare, and write it down."""
        with watching(reversals(self.spliced)) as watches:
            self._check_runs()
        layers = reversals(self.model)
        passed = tuple(self._reversal(name, layer, watches[name]) for name, layer in layers.items())
        reached = {
            name: watch.recorded + len(watch.transformed)
            for name, watch in watches.items()
            if watch.transformed or _is_reached(watch)
        }
        for watch in watches.values():
            watch.passages.clear()  # gradients as large as the values there
        rows = self._rows()
        different = self._difference()
        return FlipReport(
            rows,
            passed,
            not different,
            _mode(self.spliced),
            (
                *_problems(layers, reached, rows),
                *_differences(self.model, self.plain),
                *self._cancelled(all(row.ok for row in rows) and all(row.ok for row in passed)),
                *_hooked_back(self.model, {row.name for row in rows if row.measured == "flipped"}),
                *mixed_rows(self.spliced, self.experiment, self.heads),
            ),
            type(self.plain).__name__,
            different,
            tuple(self.notes),
            draw=functools.partial(
                flip_graph, self.spliced, self.oracle, self.experiment.inputs, self.objectives
            ),
        )

    def _cancelled(self, rows_are_right: bool) -> Iterator[str]:
        """Reversals whose gradient another one reverses back that no surgery put there.

        One that the reference has as well is seen here alone: both networks are alike then.
        """
        cuts = (
            (f"{path}." if path else "", cut)
            for path, cuts in cuts_by_module(self.model).items()
            for cut in cuts
        )
        spliced = {f"{prefix}{cut.module}{'.reversal' if cut.is_head else ''}" for prefix, cut in cuts}
        own = any(name not in spliced for name in reversals(self.model)) or any(
            _is_users(module) for head in self.heads for module in self.model.get_submodule(head).modules()
        )
        model, inputs = self.model, self.experiment.inputs
        if self.experiment.wider is not None:
            model, inputs = with_tensors(model, copied=self._wide), tree_map(self._wide, inputs)
        given = model, inputs, _TRAINING[self.mode], self.experiment.seed
        said = False
        if spliced and (own or self.actual.functions):
            from grl_surgery.doctor.foreign_reversals import cancelling

            for problem in cancelling(*given):
                said = True
                yield problem
        modules = (self.plain, *(self.model.get_submodule(head) for head in self.heads))
        if (
            spliced
            and rows_are_right
            and not said
            and any(_is_users(module) for root in modules for module in root.modules())
        ):
            from grl_surgery.doctor.foreign_reversals import reversed_back

            yield from reversed_back(*given, self.heads)

    def _wide(self, value: Any) -> Any:
        """A tensor in the dtype in which the proof measures."""
        if not isinstance(value, torch.Tensor):
            return value
        return widened(value.detach(), self.experiment.wider or {}).requires_grad_(value.requires_grad)

    def _difference(self) -> str:
        """What the forward does that the reference's does not, in words; empty if nothing."""
        found = difference(self.expected.output, self.actual.output) or next(self._left_otherwise(), "")
        if found or not self._remembers():
            return found
        plain = _moded(self.plain, self.right_flags, forgets=self.forgets)
        found = difference(self.experiment.second(plain), self.experiment.second(self.spliced, self.heads))
        return found and f"in a second call, {found}"

    def _left_otherwise(self) -> Iterator[str]:
        """Buffers and parameters in which the two forwards leave different values."""
        expected, actual = self.expected, self.actual
        for name, buffer in expected.buffers.items():
            if name in actual.buffers and not same_bits(buffer, actual.buffers[name]):
                yield f"it leaves other values in the buffer {name!r}"
        for name in {**expected.written, **actual.written}.keys() & expected.parameters:
            values = [run.written.get(name, self.experiment.values[name]) for run in (expected, actual)]
            if not _are_alike(*values):
                yield f"it leaves other values in the parameter {name!r}"

    def _remembers(self) -> bool:
        """Whether a forward left something that the next call may read and that has not been compared."""
        return self.expected.remembers or self.actual.remembers or any(self._constants_written())

    def _constants_written(self) -> Iterator[str]:
        """Buffers that are neither the reference's nor a head's nor a coefficient, and not what they were."""
        known = {*self.expected.buffers, *coefficients(self.spliced)}
        for name, buffer in self.spliced.named_buffers():
            added = name not in known and name.partition(".")[0] not in self.heads
            if added and not same_bits(self.experiment.copied(buffer), self.actual.buffers[name]):
                yield name

    # -- the rows: by the bits and, where those differ, by the values

    def _rows(self) -> tuple[ParameterFlip, ...]:
        """Every parameter under every objective."""
        found = self.actual.gradients
        rows = [self._row(name, at) for at in self.objectives for name in found[at]]
        judged = {(row.objective, row.name): row for row in rows}
        unclear = [row for row in rows if not row.ok and not self._is_zero_in_one(row)]
        for row in self._by_values(unclear) if unclear else ():
            judged[row.objective, row.name] = row
        return tuple(judged.values())

    def _row(self, name: str, objective: str) -> ParameterFlip:
        """One gradient against the prediction, by its bits."""
        before, after = self._bits(name, objective)
        words = sign_label(self.predicted[objective].get(name))
        measured, note = _relation(before, after)
        if measured == "no signal" and (
            words == "unreached" or (words == "unknown" and before is after is None)
        ):
            measured = "unreached"
        shape = tuple(self.experiment.values[name].shape)
        ok = measured in (words, *_SILENT)
        row = ParameterFlip(name, shape, words, measured, ok, "" if ok else note, objective)
        if _needs_hooks(row):  # then the oracle says what is right
            on_paths = self._paths.get(objective, {}).get(name, frozenset())
            same = words == "unknown" and len(on_paths) == 1 and measured == sign_label(on_paths)
            if not same:
                same = after is not None and _equals(self.right.gradients[objective].get(name), after)
            return _agreeing(row) if same else replace(row, measured="wrong", ok=False, note=_NOT_BY_HOOKS)
        return row

    def _bits(self, name: str, objective: str) -> tuple[Any, Any]:
        """The fingerprints without the reversal and with it."""
        return self.baseline[objective].get(name), self.actual.gradients[objective].get(name)

    def _is_zero_in_one(self, row: ParameterFlip) -> bool:
        is_lost = any(map(is_zero, self._bits(row.name, row.objective)))
        return is_lost and not _needs_hooks(row)

    def _by_values(self, rows: Sequence[ParameterFlip]) -> Iterator[ParameterFlip]:
        """Rows of which the bits differ; the gradients are computed again, and kept this time.

        A difference may be rounding: kernels add in another order where strides differ, and sums of several
        paths have no order. Tensor hooks change the last bits alike, and in float64 nothing is left of them.
        """
        by_hooks = [row for row in rows if _needs_hooks(row)]
        rest = [row for row in rows if not _needs_hooks(row)]
        norms: dict[tuple[str, str], float] = {}
        for row, before, after in self._with_values(rest):
            measured, note = _relation(fingerprint(before, "+-"), fingerprint(after))
            varies = measured == row.predicted
            note = "its gradient is another one in each run" if varies else note or ratio_of(before, after)
            row = replace(row, measured=measured, note=note)
            right = self.right.gradients[row.objective].get(row.name)
            if measured == "wrong" and row.predicted in _SIGN and _equals(right, fingerprint(after)):
                if float((after - _SIGN[row.predicted] * before).norm()) <= 1e-3 * float(before.norm()):
                    row = _agreeing(row)
                else:
                    norms[row.objective, row.name] = float(before.norm())
            yield row
        rounded = [*by_hooks, *(row for row in rest if (row.objective, row.name) in norms)]
        runs = self.in_double(_values_of(rounded)) if rounded else None
        for row in rounded:
            norm = norms.get((row.objective, row.name))
            found = [run.gradients[row.objective].get(row.name) for run in runs or ()]
            if found and _agree_in_double(found[0], found[1], norm):
                yield _agreeing(row)
            elif norm is None:
                yield replace(row, note=f"{row.note}{self.fails_in_double}")

    def _with_values(
        self, rows: Sequence[ParameterFlip]
    ) -> Iterator[tuple[ParameterFlip, torch.Tensor, torch.Tensor]]:
        """Rows with their gradients without the reversal and with it."""
        if not rows:
            return
        wanted = _values_of(rows)
        plain = {"output": wanted["output"]} if "output" in wanted else {}
        before = self._run("the reference", self.reference, wanted=plain).gradients | self._of_bare_heads(
            wanted
        )
        after = self._run("the spliced network", self.spliced, self.heads, wanted).gradients
        for row in rows:
            yield row, before[row.objective][row.name], after[row.objective][row.name]  # type: ignore[misc]

    def _reversal(self, name: str, layer: GradientReversal, watch: GradientRecorder) -> ReversalFlip:
        note = wrong_coefficient(layer)
        if not note and watch.transformed:
            note = wrong_factor(layer, torch.randn(watch.transformed[0]).to(layer.coeff.device))
        elif not note and not _is_reached(watch):
            note = _NO_GRADIENT
        if not note:
            note = next((note for row in watch.passages if (note := wrong_passage(layer, row))), "")
        return ReversalFlip(name, _place(self.model, name), float(layer.coeff), not note, note)


def _problems(
    layers: Mapping[str, Any], reached: Mapping[str, int], rows: Sequence[ParameterFlip]
) -> Iterator[str]:
    """What makes the proof empty; ``reached`` says how often the graph recorded those with a gradient."""
    if not layers:
        yield NO_REVERSAL
        return
    upstream = [row for row in rows if row.predicted in ("flipped", "mixed", "unknown")]
    is_alone = len(layers) == 1 and not upstream
    if is_alone or (upstream and all(row.measured in _SILENT for row in upstream)):
        yield _NOTHING_PROVED
    elif all(row.ok and row.measured in ("unchanged", *_SILENT) for row in rows):
        yield _nothing_reversed(layers, reached)


# Whose modules reverse nothing but by an autograd Function, which is seen in the graph.
_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "grl_surgery")


def _is_users(module: nn.Module) -> bool:
    """Whether a forward may hold code of the user's, or hooks run around it."""
    kind = type(module)
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return True
    return isinstance(module, torch.fx.GraphModule) or kind.__module__.partition(".")[0] not in _LIBRARIES


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NO_GRADIENT = "no gradient reaches it"
_NOTHING_PROVED = "no parameter upstream of a reversal receives a gradient, so nothing is proved"


def _nothing_reversed(layers: Mapping[str, Any], reached: Mapping[str, int]) -> str:
    """Why no parameter's gradient is reversed, though none is wrong."""
    if not reached:
        return (
            f"no gradient reaches {', '.join(layers)}: what is reversed lies in torch.no_grad or behind a "
            "detach, not on the path that these inputs take, or behind no parameter that requires a gradient"
        )
    if sum(reached.values()) == 1:
        return _NOTHING_PROVED
    return "no parameter's gradient is reversed: reversals that follow one another cancel"


def _is_reached(watch: GradientRecorder) -> bool:
    return any(not is_zero(row.entered) for row in watch.passages)


def _differences(model: nn.Module, reference: nn.Module) -> Iterator[str]:
    """Parameters and buffers that have other values than the reference's."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in (*reference.named_parameters(), *reference.named_buffers()):
        if name in held and not _are_alike(held[name], tensor):
            yield f"{name!r} has other values than in the reference"


def _are_alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first is second or same_bits(first.detach(), second.detach())


def _relation(before: Fingerprint | None, after: Fingerprint | None) -> tuple[Kind, str]:
    """How a gradient relates to the one without reversal, and what to say where that is not as predicted."""
    if is_zero(before) and is_zero(after):
        return "no signal", ""
    if after is None or is_zero(after):
        return "wrong", "its gradient is lost"
    if before is None or is_zero(before):
        return "wrong", NONE_BEFORE
    if after.negates(before):
        return "flipped", "its gradient is reversed, and should not be"
    if after.equals(before):
        return "unchanged", "its gradient is not reversed"
    return "wrong", ""


def _needs_hooks(row: ParameterFlip) -> bool:
    """Whether several paths meet there, or no graph predicts."""
    return row.predicted in ("mixed", "unknown") and row.measured not in _SILENT


def _agreeing(row: ParameterFlip) -> ParameterFlip:
    """The row, where a gradient is as it should be though it is neither flipped nor unchanged by its bits."""
    as_found = row.measured if row.measured in ("flipped", "unchanged") else "mixed"
    measured: Any = row.predicted if row.predicted in _SIGN else as_found
    return replace(row, measured=measured, ok=True, note="")


def _values_of(rows: Sequence[ParameterFlip]) -> dict[str, dict[str, Sign | Values]]:
    wanted: dict[str, dict[str, Sign | Values]] = {}
    for row in rows:
        wanted.setdefault(row.objective, {})[row.name] = "values"
    return wanted


def _equals(first: Any, second: Any) -> bool:
    return first is not None and second is not None and bool(first.equals(second))


def _agree_in_double(wanted: Any, found: Any, before: float | None) -> bool:
    """Whether a difference was rounding: in float64 it is below 1e-9, as sums in another order are.

    Where ``before`` is the norm that the gradient had in less precision, all of it was, if nothing is left.
    """
    if before is not None:
        return wanted is None or float(wanted.norm()) <= 1e-6 * before
    if wanted is None or found is None:
        return is_zero(wanted) and is_zero(found)
    return bool((wanted - found).norm() <= 1e-9 * wanted.norm())


_SILENT = ("no signal", "unreached")
_SIGN = {"flipped": -1, "unchanged": 1}
_SIGNS: Mapping[Factors | None, Sign] = {frozenset({1}): "+", frozenset({-1}): "-"}
_NOT_BY_HOOKS = "its gradient is not what tensor hooks at the same places give"


def _place(model: nn.Module, name: str) -> str:
    """Where a reversal stands, in words."""
    for path, cuts in cuts_by_module(model).items():
        for cut in cuts:
            module = f"{path}.{cut.module}" if path else cut.module
            if name == module or name.startswith(f"{module}."):
                return str(cut.within(path))
    return f"in {name.rpartition('.')[0] or 'the network'}"


def _mode(network: nn.Module) -> str:
    flags = {module.training for module in network.modules()}
    return "mixed" if len(flags) > 1 else "train" if flags.pop() else "eval"


# ------------------------------------------------------------------------------------------------ bits
