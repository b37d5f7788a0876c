"""Proof that exactly the right gradients flip: what the graph predicts against what autograd measures."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from grl_surgery.arguments import check_count
from grl_surgery.comparison import difference, same_bits
from grl_surgery.doctor.adopted_reversal import AdoptedReversal
from grl_surgery.errors import FlipError, SurgeryError
from grl_surgery.flip_graph import flip_graph
from grl_surgery.flip_report import FlipReport, ParameterFlip, ReversalFlip
from grl_surgery.loading.inputs import example_inputs as known_inputs
from grl_surgery.measurement import (
    Experiment,
    Passage,
    Run,
    Watch,
    coefficients,
    is_coefficient,
    private_copy,
    repeatable,
    watching,
)
from grl_surgery.oracle import (
    Factors,
    HookReversal,
    NoReversal,
    in_words,
    predict,
    recipes,
    with_reversals,
    without_adopted,
)
from grl_surgery.reversal import GradientReversal
from grl_surgery.sample_rows import mixed_rows
from grl_surgery.splicing import check_model, head_names, inner_heads, reversals, strip

__all__ = ["verify_flip"]


def verify_flip(
    model: nn.Module,
    reference: nn.Module | None = None,
    example_inputs: Any = None,
    *,
    mode: Literal["train", "eval"] | None = None,
    seed: int = 0,
) -> FlipReport:
    """Prove that the spliced gradients, and no others, are reversed.

    Coefficients are set to 1 on a copy: then a reversed gradient is the exact negative of the original and
    every other one is exactly the original, so bits can be compared and no tolerance is needed. One that is
    negative, infinite or nan, or that ``reversal_disabled`` has put aside, stays as it is, and fails. A
    parameter that starts at zero gets values on that copy, so that no gradient is zero for that reason alone.

    With domain heads, each objective is proved on its own: the output gives every parameter its original
    gradient, and each head's logits give what is upstream the exact negative of what the same head would
    give without its reversal, and the head itself its own gradient unflipped.

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

    Returns:
        The report. Nothing that was passed in is changed, not even the random state.

    Raises:
        SurgeryError: There are no example inputs, or the reference is another network.
    """
    check_model(model, "verify_flip")
    if reference is not None:
        check_model(reference, "verify_flip")
    if not reversals(model) and not recipes(model):
        from grl_surgery.doctor.foreign import proof_of_foreign

        report = proof_of_foreign(model, example_inputs, _TRAINING.get(mode), seed)
        if report is not None:
            return report
    plain = _reference(model, reference)
    inputs = known_inputs(plain) if example_inputs is None else example_inputs
    if inputs is None:
        raise SurgeryError(
            f"nothing says what inputs {type(plain).__name__} takes",
            example="verify_flip(m, reference=model, example_inputs=(torch.randn(2, 3, 224, 224),))",
        )
    if mode not in ("train", "eval", None):
        raise SurgeryError(
            f"mode={mode!r} is none of 'train', 'eval' and None for the flags as they are",
            example="mode='eval'",
        )
    seed = check_count("seed", seed, least=0, example="seed=0")
    _check_same_network(model, plain)
    _check_values(model)
    with repeatable():
        return _Verification(model, plain, inputs, mode, seed).report()


_TRAINING: Mapping[str | None, bool | None] = {"train": True, "eval": False, None: None}


def _flags(model: nn.Module, mode: str | None) -> dict[str, bool]:
    """Mode flags as they are, or as the network's own ``train`` or ``eval`` sets them."""
    tree = model if mode is None else private_copy(model, {}).train(mode == "train")
    return {path: module.training for path, module in tree.named_modules()}


def _reference(model: nn.Module, given: nn.Module | None) -> nn.Module:
    """The network without reversals: stripped, or with those that the user wrote exchanged for identities."""
    network = model if given is None else given
    if recipes(network):
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
        if tensor.device.type == "meta":
            raise SurgeryError(
                f"{name!r} is on the meta device, where there are no numbers to compare",
                example="model.to_empty(device='cpu'), then load_state_dict",
            )


class _Verification:
    """Private copies of the networks to compare, and what came of running them."""

    def __init__(self, model: nn.Module, plain: nn.Module, inputs: Any, mode: str | None, seed: int) -> None:
        self.model, self.plain, self.mode = model, plain, mode
        self.heads = head_names(model)
        flags = _flags(model, mode)
        self.right_flags = flags if mode is None else {**flags, **_flags(plain, mode)}
        self.experiment = Experiment.on(model, inputs, seed)
        self.spliced = private_copy(model, flags)
        for name, layer in reversals(model).items():  # a copy of one that is disabled would not be
            self.spliced.get_submodule(name)._buffers["coeff"] = layer.coeff
            if isinstance(
                layer, AdoptedReversal
            ):  # its coefficient may be an argument, which is none of ours
                self.spliced.get_submodule(name).__dict__["_obeys_argument"] = False
        self.fails_in_double = ""

    # -- the runs

    @functools.cached_property
    def oracle(self) -> nn.Module:
        """The reference with tensor hooks where the recipe says reversal."""
        return private_copy(with_reversals(self.model, self.plain, HookReversal), self.right_flags)

    @functools.cached_property
    def baseline(self) -> dict[str, dict[str, torch.Tensor | None]]:
        """Gradients without any reversal: of the reference and, for the heads, of heads without one."""
        found = {"output": self.expected.gradients["output"]}
        if self.heads:
            bare = private_copy(with_reversals(self.model, self.plain, NoReversal), self.right_flags)
            run = self.experiment.run(bare, self.heads)
            found.update((head, run.gradients[head]) for head in self.heads)
        return found

    @functools.cached_property
    def expected(self) -> Run:
        """The reference's run, without reversals of its own."""
        plain = without_adopted(self.model, self.plain)
        return self.experiment.run(private_copy(plain, self.right_flags))

    @functools.cached_property
    def right(self) -> Run:
        """The oracle's run, for gradients that several paths make or that no graph predicts."""
        return self.experiment.run(self.oracle, self.heads)

    @functools.cached_property
    def actual(self) -> Run:
        """The spliced network's run."""
        return self.experiment.run(self.spliced, self.heads)

    @functools.cached_property
    def in_double(self) -> tuple[Run, Run] | None:
        """The oracle's and the spliced network's run in float64; None if one of them fails there."""
        double = self.experiment.in_double()
        try:
            return double.run(self.oracle, self.heads), double.run(self.spliced, self.heads)
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
        objectives = ("output", *self.heads)
        rows = [row for name in objectives for row in self._rows(name, self.actual.gradients[name])]
        layers = reversals(self.model)
        different = self._difference()
        return FlipReport(
            tuple(rows),
            tuple(self._reversal(name, layer, watches[name]) for name, layer in layers.items()),
            not different,
            _mode(self.spliced),
            (
                *_problems(watches, rows),
                *_differences(self.model, self.plain),
                *self._cancelled(),
                *mixed_rows(self.spliced, self.experiment, self.heads),
            ),
            type(self.plain).__name__,
            different,
            functools.partial(flip_graph, self.spliced, self.oracle, self.experiment.inputs, objectives),
        )

    def _cancelled(self) -> Iterator[str]:
        """Reversals whose gradient another one reverses back that no surgery put there."""
        cuts = (
            (f"{path}." if path else "", cut) for path, cuts in recipes(self.model).items() for cut in cuts
        )
        spliced = {f"{prefix}{cut.module}{'.reversal' if cut.is_head else ''}" for prefix, cut in cuts}
        own = any(name not in spliced for name in reversals(self.model)) or any(
            type(module).__module__.partition(".")[0] not in _LIBRARIES
            for head in self.heads
            for module in self.model.get_submodule(head).modules()
        )
        if spliced and (own or self.actual.functions):
            from grl_surgery.doctor.foreign import cancelling

            yield from cancelling(
                self.model, self.experiment.inputs, _TRAINING[self.mode], self.experiment.seed
            )

    def _difference(self) -> str:
        """What the forward does that the reference's does not, in words; empty if nothing."""
        found = difference(self.expected.output, self.actual.output) or next(self._left_otherwise(), "")
        if found or not self._remembers():
            return found
        plain = private_copy(self.plain, self.right_flags)
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
            if added and not same_bits(buffer.detach(), self.actual.buffers[name]):
                yield name

    def _rows(self, objective: str, gradients: Mapping[str, torch.Tensor | None]) -> Iterator[ParameterFlip]:
        known = predict(self.oracle, objective)
        predicted = {name: known.get(id(p)) for name, p in self.oracle.named_parameters()}
        for name, after in gradients.items():
            factors = predicted.get(name)
            before = self.baseline[objective].get(name)
            row = self._row(name, objective, factors, before, after)
            if (factors is None or len(factors) > 1) and row.measured != "no signal":
                row = self._row_by_oracle(row, after)
            elif factors and row.measured == "wrong" and self._is_rounded(row, factors, before, after):
                row = replace(row, measured=row.predicted, ok=True, note="")  # type: ignore[arg-type]
            yield row

    def _row(
        self,
        name: str,
        objective: str,
        factors: Factors | None,
        before: torch.Tensor | None,
        after: torch.Tensor | None,
    ) -> ParameterFlip:
        """One gradient against the prediction, by its bits."""
        words = in_words(factors)
        measured, note = _relation(before, after)
        if measured == "no signal" and words == "unreached":
            measured = "unreached"
        ok = measured in (words, "no signal")
        shape = tuple(self.experiment.values[name].shape)
        return ParameterFlip(name, shape, words, measured, ok, "" if ok else note, objective)

    def _row_by_oracle(self, row: ParameterFlip, gradient: torch.Tensor | None) -> ParameterFlip:
        """The same where several paths meet, or where no graph predicts: the oracle says what is right."""
        wanted = self.right.gradients[row.objective].get(row.name)
        same = wanted is not None and gradient is not None and torch.equal(wanted, gradient)
        if same or self._same_in_double(row):
            measured = "mixed" if row.measured == "wrong" else row.measured
            return ParameterFlip(row.name, row.shape, row.predicted, measured, True, "", row.objective)
        note = f"its gradient is not what tensor hooks at the same places give{self.fails_in_double}"
        return ParameterFlip(row.name, row.shape, row.predicted, "wrong", False, note, row.objective)

    def _is_rounded(
        self, row: ParameterFlip, factors: Factors, before: torch.Tensor | None, after: torch.Tensor | None
    ) -> bool:
        """Whether the gradient is as predicted but for its last bits, which tensor hooks change alike.

        A reversed gradient may have other strides than it had, and kernels then add in another order. Where
        in float64 nothing is left of a gradient, all of it was rounding.
        """
        wanted = self.right.gradients[row.objective].get(row.name)
        if before is None or after is None or wanted is None or not torch.equal(wanted, after):
            return False
        (sign,) = factors
        return bool((after - sign * before).norm() <= 1e-3 * before.norm() or self._vanishes(row, before))

    def _vanishes(self, row: ParameterFlip, before: torch.Tensor) -> bool:
        """Whether nothing is left of a gradient in float64."""
        if self.in_double is None:
            return False
        exact = self.in_double[0].gradients[row.objective].get(row.name)
        return exact is None or bool(exact.norm() <= 1e-6 * before.norm())

    def _same_in_double(self, row: ParameterFlip) -> bool:
        """Sums in another order differ in their last bits; in float64 that difference is below 1e-9."""
        if self.in_double is None:
            return False
        wanted, found = (run.gradients[row.objective].get(row.name) for run in self.in_double)
        if wanted is None or found is None:
            return _is_zero(wanted) and _is_zero(found)
        return bool((wanted - found).norm() <= 1e-9 * wanted.norm())

    def _reversal(self, name: str, layer: GradientReversal, watch: Watch) -> ReversalFlip:
        note = _wrong_coefficient(layer)
        if not note and not _is_reached(watch):
            note = "no gradient reaches it"
        if not note:
            note = next((note for row in watch.passages if (note := _wrong_passage(layer, row))), "")
        return ReversalFlip(name, _place(self.model, name), float(layer.coeff), not note, note)


def _problems(watches: Mapping[str, Watch], rows: Sequence[ParameterFlip]) -> Iterator[str]:
    if not watches:
        yield "there is no reversal in this network"
        return
    upstream = [row for row in rows if row.predicted in ("flipped", "mixed", "unknown")]
    is_alone = len(watches) == 1 and not upstream
    if is_alone or (upstream and all(row.measured == "no signal" for row in upstream)):
        yield _NOTHING_PROVED
    elif all(row.ok and row.measured in ("unchanged", "no signal") for row in rows):
        yield _nothing_reversed(watches)


# Whose modules reverse nothing but by an autograd Function, which is seen in the graph.
_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "grl_surgery")
_NOTHING_PROVED = "no parameter upstream of a reversal receives a gradient, so nothing is proved"


def _nothing_reversed(watches: Mapping[str, Watch]) -> str:
    """Why no parameter's gradient is reversed, though none is wrong."""
    reached = [watch for watch in watches.values() if _is_reached(watch)]
    if not reached:
        return (
            f"no gradient reaches {', '.join(watches)}: what is reversed lies in torch.no_grad or behind a "
            "detach, not on the path that these inputs take, or behind no parameter that requires a gradient"
        )
    if sum(watch.recorded for watch in reached) == 1:
        return _NOTHING_PROVED
    return "no parameter's gradient is reversed: reversals that follow one another cancel"


def _is_reached(watch: Watch) -> bool:
    return any(not _is_zero(row.entered) for row in watch.passages)


def _differences(model: nn.Module, reference: nn.Module) -> Iterator[str]:
    """Parameters and buffers that have other values than the reference's."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in (*reference.named_parameters(), *reference.named_buffers()):
        if name in held and not _are_alike(held[name], tensor):
            yield f"{name!r} has other values than in the reference"


def _are_alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first is second or same_bits(first.detach(), second.detach())


def _relation(before: torch.Tensor | None, after: torch.Tensor | None) -> tuple[Any, str]:
    """How a gradient relates to the one without reversal, and what to say where that is not as predicted."""
    if _is_zero(before) and _is_zero(after):
        return "no signal", ""
    if _is_zero(after) or after is None:
        return "wrong", "its gradient is lost"
    if before is not None and torch.equal(after, -before):
        return "flipped", "its gradient is reversed, and should not be"
    if before is not None and torch.equal(after, before):
        return "unchanged", "its gradient is not reversed"
    return "wrong", _ratio(before, after)


def _wrong_coefficient(layer: GradientReversal) -> str:
    """Why a layer reverses nothing as things are, whatever its code does; empty if its coefficient is one."""
    if layer._suspended is not None:
        return "it is disabled at the moment, by reversal_disabled"
    if not is_coefficient(layer.coeff.abs() if layer.signed else layer.coeff):
        return f"its coefficient is {float(layer.coeff):g}; it must be finite and not negative"
    return ""


def _wrong_passage(layer: GradientReversal, row: Passage) -> str:
    """What is wrong with one gradient that passed a reversal; empty if nothing is."""
    if row.entered is None or _is_zero(row.entered):
        return ""
    if row.left is None or not torch.equal(row.left, -row.entered):
        return (
            f"the gradient that leaves is not -1 times the one that enters; {_ratio(row.entered, row.left)}"
        )
    for coeff in (float(layer.coeff), _ANOTHER_COEFF):
        found = _gradient_through(layer, coeff, row.entered)
        if not torch.equal(found, (row.entered * -torch.tensor(coeff)).to(found.dtype)):
            return f"it does not multiply by -{coeff:g}; {_ratio(row.entered, found)}"
    if isinstance(layer, AdoptedReversal):
        found = _gradient_through(layer, 1.0, row.entered, _ANOTHER_COEFF)
        if not torch.equal(found, (row.entered * -torch.tensor(_ANOTHER_COEFF)).to(found.dtype)):
            return f"it does not obey the coefficient that it is called with; {_ratio(row.entered, found)}"
    return ""


# A layer that ignores its coefficient is caught whatever coefficient it has.
_ANOTHER_COEFF = 0.375


def _gradient_through(
    layer: GradientReversal, coeff: float, gradient: torch.Tensor, *argument: float
) -> torch.Tensor:
    """What a copy of the layer with this coefficient, or called with one, makes of a gradient."""
    twin = private_copy(layer, {})
    twin._buffers["coeff"] = torch.full_like(layer.coeff, coeff)
    x = torch.zeros_like(gradient, requires_grad=True)
    (found,) = torch.autograd.grad(twin(x * 1, *argument), x, gradient)
    return found


def _place(model: nn.Module, name: str) -> str:
    """Where a reversal stands, in words."""
    for path, cuts in recipes(model).items():
        for cut in cuts:
            module = f"{path}.{cut.module}" if path else cut.module
            if name == module or name.startswith(f"{module}."):
                return str(cut.within(path))
    return f"in {name.rpartition('.')[0] or 'the network'}"


def _mode(network: nn.Module) -> str:
    flags = {module.training for module in network.modules()}
    return "mixed" if len(flags) > 1 else "train" if flags.pop() else "eval"


# ------------------------------------------------------------------------------------------------ bits


def _is_zero(gradient: torch.Tensor | None) -> bool:
    return gradient is None or not bool(gradient.any())


def _ratio(before: torch.Tensor | None, after: torch.Tensor | None) -> str:
    """How the second gradient relates to the first, in words."""
    if before is None or _is_zero(before):
        return "it has a gradient where the reference has none"
    if after is None:
        return "it is lost"
    if after.shape != before.shape:
        return f"its shape is {tuple(after.shape)}, not {tuple(before.shape)}"
    if not bool(torch.isfinite(after).all()):
        return "it is not finite"
    ratio = (after * before).sum() / (before * before).sum()
    return f"it is {float(ratio.real):.3g} times as large"
