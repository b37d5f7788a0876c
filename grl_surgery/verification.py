"""Proof that exactly the right gradients flip: what the graph predicts against what autograd measures."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from grl_surgery.errors import SurgeryError
from grl_surgery.flip_report import FlipReport, ParameterFlip, ReversalFlip
from grl_surgery.inputs import example_inputs as known_inputs
from grl_surgery.oracle import HookReversal, in_words, predict, recipes, with_reversals
from grl_surgery.reversal import GradientReversal
from grl_surgery.sharing import share_copy
from grl_surgery.splicing import check_model, reversals, strip
from grl_surgery.tracing import random_state_kept

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
    every other one is exactly the original, so bits can be compared and no tolerance is needed. A parameter
    that starts at zero gets values on that copy, so that no gradient is zero for that reason alone.

    Example:
        >>> from grl_surgery import insert_grl
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> report = verify_flip(insert_grl(net, after="1"), net, torch.randn(3, 4))
        >>> report.verdict
        '2 of 2 upstream parameters flipped, bit for bit; 2 downstream unchanged; forward identical'

    Args:
        model: A spliced network, or any network with a :class:`GradientReversal` in it.
        reference: The network without reversals; by default what ``strip(model)`` gives.
        example_inputs: Arguments of forward: a tensor, a tuple, or a dict by name; by default those that timm
            or torchvision declare.
        mode: Verify in train or in eval mode; by default with the flags as they are on ``model``.
        seed: Of the random numbers that both runs see.

    Returns:
        The report. Nothing that was passed in is changed, not even the random state.

    Raises:
        SurgeryError: There are no example inputs, or the reference is another network.
    """
    check_model(model, "verify_flip")
    plain = _reference(model) if reference is None else reference
    check_model(plain, "verify_flip")
    inputs = known_inputs(plain) if example_inputs is None else example_inputs
    if inputs is None:
        raise SurgeryError(
            f"nothing says what inputs {type(plain).__name__} takes",
            example="verify_flip(m, reference=model, example_inputs=(torch.randn(2, 3, 224, 224),))",
        )
    with _repeatable(seed):
        return _Verification(_private(model, model, mode), _private(plain, model, mode), inputs, seed).report(model)


def _reference(model: nn.Module) -> nn.Module:
    """The network without reversals: stripped, or with those that the user wrote exchanged for identities."""
    return strip(model) if recipes(model) else with_reversals(model, model, nn.Identity)


def _private(network: nn.Module, flags_of: nn.Module, mode: str | None) -> nn.Module:
    """A tree of our own with the mode flags to verify in and without graphs that a cache kept alive."""
    tree = share_copy(network)
    flags = {path: module.training for path, module in flags_of.named_modules()}
    tree.train(mode == "train") if mode else None
    for path, module in tree.named_modules():
        module.training = flags.get(path, module.training) if mode is None else module.training
        for value in module.__dict__.values():
            if type(value) in (dict, list) and any(_has_graph(v) for v in _values(value)):
                value.clear()
    return tree


def _values(container: Any) -> Sequence[Any]:
    return list(container.values()) if isinstance(container, dict) else container


def _has_graph(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.grad_fn is not None


@contextlib.contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """Grad mode on, deterministic algorithms, and every generator put back afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        random_state_kept(),
        torch.random.fork_rng(devices),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill


# ------------------------------------------------------------------------------------------- one run


@dataclass
class _Run:
    """Outputs, gradients by parameter name, and buffers after one forward and backward."""

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


def _tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in a nested output, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return _tensors(vars(value)) if hasattr(value, "__dataclass_fields__") else []


def _objective(outputs: Sequence[torch.Tensor], seed: int) -> torch.Tensor | None:
    """A scalar that depends on every output in a direction of its own."""
    terms = []
    for place, output in enumerate(outputs):
        if output.requires_grad:
            generator = torch.Generator().manual_seed(seed + place)
            weight = torch.randn(output.shape, generator=generator, dtype=torch.float32)
            term = (output * weight.to(output.device, output.dtype)).sum()
            terms.append(term.real if term.is_complex() else term)
    return sum(terms[1:], terms[0]) if terms else None


class _Verification:
    """Two private networks, the values that both run on, and the comparison."""

    def __init__(self, spliced: nn.Module, plain: nn.Module, inputs: Any, seed: int) -> None:
        self.spliced, self.plain, self.inputs, self.seed = spliced, plain, inputs, seed
        self.values = {name: self._value(name, p) for name, p in spliced.named_parameters()}
        missing = [name for name, _ in plain.named_parameters() if name not in self.values]
        if missing:
            raise SurgeryError(
                f"the reference is another network: the model has no parameter {missing[0]!r}",
                example="verify_flip(insert_grl(model, after='layer3'), reference=model)",
            )

    def _value(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        value = parameter.detach()
        if value.numel() and not value.any():
            generator = torch.Generator().manual_seed(self.seed + len(name))
            noise = torch.randn(value.shape, generator=generator) * 0.05
            value = noise.to(value.device, value.dtype)
        return value.requires_grad_(parameter.requires_grad)

    def run(self, network: nn.Module, dtype: torch.dtype | None = None) -> _Run:
        """One forward and backward; ``dtype`` computes in another precision."""

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            copied = tensor.detach().clone()
            return copied.to(dtype) if dtype and copied.is_floating_point() else copied

        names = [name for name, _ in network.named_parameters()]
        leaves = {name: self.values[name] for name in names}
        if dtype:
            leaves = {n: convert(v).requires_grad_(v.requires_grad) for n, v in leaves.items()}
        buffers = {name: convert(buffer) for name, buffer in network.named_buffers()}
        for path, module in network.named_modules():
            if isinstance(module, GradientReversal):
                name = f"{path}.coeff" if path else "coeff"
                buffers[name] = torch.ones_like(buffers[name])
        given = pytree.tree_map_only(torch.Tensor, convert, self.inputs)
        torch.manual_seed(self.seed)
        args, kwargs = _as_call(given)
        outputs = _tensors(functional_call(network, {**leaves, **buffers}, args, kwargs))
        objective = _objective(outputs, self.seed)
        wanted = [name for name in names if leaves[name].requires_grad]
        found: Sequence[torch.Tensor | None] = [None] * len(wanted)
        if objective is not None and wanted:
            found = torch.autograd.grad(objective, [leaves[name] for name in wanted], allow_unused=True)
        return _Run([o.detach() for o in outputs], dict(zip(wanted, found, strict=True)), buffers)

    # -- comparison

    def report(self, model: nn.Module) -> FlipReport:
        """Run, compare, and write it down."""
        expected = self.run(self.plain)
        with _watching(self.spliced) as passed:
            actual = self.run(self.spliced)
        oracle = with_reversals(model, self.plain, HookReversal)
        for path, module in oracle.named_modules():
            module.training = self._flag(path, module.training)
        predicted = self._by_name(oracle)
        right: _Run | None = None
        rows = []
        for name, gradient in actual.gradients.items():
            factors = predicted.get(name)
            row = self._compare(name, factors, expected.gradients.get(name), gradient)
            if not row.ok and (factors is None or len(factors) == 2):
                right = right or self.run(oracle)
                row = self._compare_with_oracle(row, right, gradient, oracle)
            rows.append(row)
        return FlipReport(
            tuple(rows),
            tuple(self._reversal(model, name, layer, passed) for name, layer in reversals(model).items()),
            _same_outputs(expected, actual),
            _mode(self.spliced),
            tuple(self._problems(model, rows)),
        )

    def _flag(self, path: str, default: bool) -> bool:
        try:
            return self.spliced.get_submodule(path).training
        except AttributeError:
            return default

    def _by_name(self, oracle: nn.Module) -> dict[str, frozenset[int]]:
        known = predict(oracle)
        return {name: known[id(p)] for name, p in oracle.named_parameters() if id(p) in known}

    def _compare(
        self,
        name: str,
        factors: frozenset[int] | None,
        before: torch.Tensor | None,
        after: torch.Tensor | None,
    ) -> ParameterFlip:
        """One gradient against the prediction, by its bits."""
        shape, words = tuple(self.values[name].shape), in_words(factors)
        zero_before, zero_after = _is_zero(before), _is_zero(after)
        if zero_before and zero_after:
            reached = factors is None or bool(factors)
            return ParameterFlip(name, shape, words, "no signal" if reached else "unreached", True)
        if zero_after:
            return ParameterFlip(name, shape, words, "wrong", False, "its gradient is lost")
        assert after is not None
        if before is not None and torch.equal(after, -before):
            measured, note = "flipped", "its gradient is reversed, and should not be"
        elif before is not None and torch.equal(after, before):
            measured, note = "unchanged", "its gradient is not reversed"
        else:
            measured, note = "wrong", _ratio(before, after)
        ok = words == measured
        return ParameterFlip(name, shape, words, measured, ok, "" if ok else note)  # type: ignore[arg-type]

    def _compare_with_oracle(
        self, row: ParameterFlip, right: _Run, gradient: torch.Tensor | None, oracle: nn.Module
    ) -> ParameterFlip:
        """A gradient that several paths make, or that no graph predicts: it must be what the oracle has."""
        wanted = right.gradients.get(row.name)
        same = wanted is not None and gradient is not None and torch.equal(wanted, gradient)
        measured = "mixed" if row.measured == "wrong" else row.measured
        if same or self._same_in_double(row.name, oracle):
            return ParameterFlip(row.name, row.shape, row.predicted, measured, True)  # type: ignore[arg-type]
        note = "its gradient is not what tensor hooks at the same places give"
        return ParameterFlip(row.name, row.shape, row.predicted, "wrong", False, note)

    def _same_in_double(self, name: str, oracle: nn.Module) -> bool:
        """Sums in another order differ in their last bits; in float64 that difference is below 1e-9."""
        if not hasattr(self, "_double"):
            self._double = self.run(oracle, torch.float64), self.run(self.spliced, torch.float64)
        wanted, found = (run.gradients.get(name) for run in self._double)
        if wanted is None or found is None:
            return _is_zero(wanted) and _is_zero(found)
        return bool((wanted - found).norm() <= 1e-9 * wanted.norm())

    def _reversal(
        self, model: nn.Module, name: str, layer: GradientReversal, passed: Mapping[str, list[_Passage]]
    ) -> ReversalFlip:
        coeff = float(layer.coeff)
        place = _place(model, name)
        rows = [row for row in passed.get(name, []) if row.entered is not None]
        if not rows:
            return ReversalFlip(name, place, coeff, False, "no gradient reaches it")
        for row in rows:
            assert row.entered is not None
            if _is_zero(row.entered):
                return ReversalFlip(name, place, coeff, False, "the gradient that reaches it is zero")
            if row.left is None or not torch.equal(row.left, -row.entered):
                note = f"the gradient that leaves is not -1 times the one that enters, {_ratio(row.entered, row.left)}"
                return ReversalFlip(name, place, coeff, False, note)
            if not _obeys(layer, row.entered):
                return ReversalFlip(name, place, coeff, False, f"it does not multiply by -{coeff:g}")
        return ReversalFlip(name, place, coeff, True)

    def _problems(self, model: nn.Module, rows: Sequence[ParameterFlip]) -> Iterator[str]:
        if not reversals(model):
            yield "there is no reversal in this network"
        upstream = [row for row in rows if row.predicted in ("flipped", "mixed", "unknown")]
        if upstream and all(row.measured == "no signal" for row in upstream):
            yield "no parameter upstream of a reversal receives a gradient, so nothing is proved"


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _mode(network: nn.Module) -> str:
    flags = {module.training for module in network.modules()}
    return "mixed" if len(flags) > 1 else "train" if flags.pop() else "eval"


# ----------------------------------------------------------------------------------- at the reversal itself


@dataclass
class _Passage:
    """The gradient that entered and the one that left a reversal in the backward pass."""

    entered: torch.Tensor | None = None
    left: torch.Tensor | None = None


@contextlib.contextmanager
def _watching(network: nn.Module) -> Iterator[dict[str, list[_Passage]]]:
    """Record the gradients at the autograd node that each reversal makes."""
    passed: dict[str, list[_Passage]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            row = _Passage()
            passed.setdefault(name, []).append(row)
            if output.grad_fn is not None:
                output.grad_fn.register_hook(lambda left, entered: note(row, left, entered))

        return hook

    def note(row: _Passage, left: Any, entered: Any) -> None:
        row.entered, row.left = entered[0], left[0]

    handles = [layer.register_forward_hook(watch(name)) for name, layer in reversals(network).items()]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def _obeys(layer: GradientReversal, gradient: torch.Tensor) -> bool:
    """Whether the layer, with the coefficient it has, turns this gradient into -coeff times it."""
    x = torch.zeros_like(gradient, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x * 1), x, gradient)
    return torch.equal(found, (gradient * -layer.coeff).to(gradient.dtype))


def _place(model: nn.Module, name: str) -> str:
    path, _, module = name.rpartition(".")
    cuts = recipes(model).get(path, ())
    return next((str(cut) for cut in cuts if cut.module == module), f"in {path or 'the network'}")


# ----------------------------------------------------------------------------------------- bits


def _is_zero(gradient: torch.Tensor | None) -> bool:
    return gradient is None or not bool(gradient.any())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, in which nan equals itself and -0.0 differs from 0.0."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return flat.reshape(-1).view(torch.uint8) if flat.numel() else flat.reshape(-1).to(torch.uint8)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    alike = first.shape == second.shape and first.dtype == second.dtype
    return alike and torch.equal(_bits(first), _bits(second))


def _same_outputs(expected: _Run, actual: _Run) -> bool:
    """Whether both runs gave the same outputs and left the same buffers."""
    pairs = [*zip(expected.outputs, actual.outputs, strict=False)]
    kept = [(buffer, actual.buffers[n]) for n, buffer in expected.buffers.items() if n in actual.buffers]
    same_number = len(expected.outputs) == len(actual.outputs)
    return same_number and all(_same_bits(first, second) for first, second in (*pairs, *kept))


def _ratio(before: torch.Tensor | None, after: torch.Tensor | None) -> str:
    """How the second gradient relates to the first, in words."""
    if before is None or _is_zero(before):
        return "it has a gradient where the reference has none"
    if after is None:
        return "but lost"
    if not bool(torch.isfinite(after).all()):
        return "it is not finite"
    ratio = float((after * before).sum() / (before * before).sum())
    return f"but {ratio:.3g} times"
