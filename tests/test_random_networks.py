"""Random networks cut at random places, against an interpreter that knows nothing of this library."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture.providers import HypothesisProvider
from oracles import snapshot
from plain_interpreter import Interpreter, Reversal
from random_networks import BATCH, SHAPES, Block, blocks, build, set_modes, source_of
from torch import nn
from torch.utils import _pytree as pytree

import grl_surgery as gs
from grl_surgery.surgery.head_outputs import split_logits


@dataclass
class Case:
    """A network, how it is set up, and where it is to be cut."""

    block: Block
    training: bool
    dtype: torch.dtype
    seed: int
    frozen: int
    strided: bool
    kind: str
    picks: list[int]
    coeffs: list[float]
    head: int | None
    head_first: bool

    def network(self) -> nn.Module:
        module = build(self.block, self.seed, self.dtype)
        set_modes(module, self.block, self.training)
        for number, parameter in enumerate(module.parameters()):
            parameter.requires_grad_(self.frozen == 0 or (number + self.frozen) % 3 != 0)
        return module

    def inputs(self) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(self.seed)
        return tuple(self._input(kind, generator) for kind in self.block.takes)

    def _input(self, kind: str, generator: torch.Generator) -> torch.Tensor:
        shape = (BATCH, *SHAPES[kind])
        if kind == "ids":
            return torch.randint(5, shape, generator=generator)
        x = torch.randn(shape, generator=generator, dtype=self.dtype)
        return x.to(memory_format=torch.channels_last) if kind == "img" and self.strided else x

    def given(self, x: torch.Tensor) -> torch.Tensor:
        """What the network is given: no leaf, so that it may be overwritten, and perhaps with gaps."""
        if not x.is_floating_point():
            return x.clone()
        if not self.strided or x.dim() == 4:
            return x * 1
        return torch.stack([x, x], -1)[..., 0]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    first = draw(st.sampled_from(["vec", "img", "tok", "ids"]))
    rest = draw(st.lists(st.sampled_from(["vec", "half", "img", "tok", "ids"]), max_size=2))
    return Case(
        block=draw(blocks((first, *rest))),
        training=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float64, torch.float64, torch.float32])),
        seed=draw(st.integers(0, 3)),
        frozen=draw(st.integers(0, 3)),
        strided=draw(st.booleans()),
        kind=draw(st.sampled_from(["after", "after", "edge", "before"])),
        picks=draw(st.lists(st.integers(0, 2**16), min_size=1, max_size=3)),
        coeffs=draw(st.lists(st.sampled_from([1.0, 0.5, 0.25, 2.0, 0.0]), min_size=3, max_size=3)),
        head=draw(st.none() | st.integers(0, 2**16)),
        head_first=draw(st.booleans()),
    )


def outputs_and_gradients(case: Case, network: Any, run: Any) -> tuple[Any, dict[str, Any]]:
    """What a network returns and the gradient of a random objective, for each parameter and input."""
    inputs, seed = case.inputs(), case.seed
    leaves = {f"input {i}": x for i, x in enumerate(inputs) if x.is_floating_point()}
    for x in leaves.values():
        x.requires_grad_()
    leaves |= {name: p for name, p in network.named_parameters() if p.requires_grad}
    torch.manual_seed(seed)
    result = run(*map(case.given, inputs))
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for tensor in pytree.tree_leaves(result):
        weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
        if tensor.requires_grad:
            terms.append((tensor * weight).sum())
    if not terms:
        return result, dict.fromkeys(leaves)
    found = torch.autograd.grad(sum(terms), list(leaves.values()), allow_unused=True)
    return result, dict(zip(leaves, found, strict=True))


def places_to_cut(case: Case, interpreter: Interpreter) -> list[dict[str, Any]]:
    """Arguments of insert_grl for every place of the wanted kind that a reversal can stand at."""
    if case.kind == "after":
        points = points_outside_layers(interpreter)
        used = [name for name, is_used in points.items() if is_used]
        return [{"after": name} for name in (used * 5 + list(points))]
    if case.kind == "before":
        return [{"before": name} for name, mixed in interpreter.ends.items() if not mixed]
    return [
        {"edge": gs.Edge(source, target, arg)}
        for sources, target, arg in interpreter.edges
        for source in sources
        if arg
    ]


def points_outside_layers(interpreter: Interpreter) -> dict[str, bool]:
    """After a parameter is after all uses of it: a layer that is called as well has another one inside."""
    points = interpreter.points.items()
    return {name: is_used for name, is_used in points if name.rpartition(".")[0] not in interpreter.layers}


def as_reversal(keywords: dict[str, Any], coeff: float) -> Reversal:
    ((kind, at),) = keywords.items()
    if kind == "edge":
        return Reversal("edge", at.source, coeff, at.target, at.arg)
    return Reversal(kind, at, coeff)


def assert_close(found: dict[str, Any], expected: dict[str, Any], dtype: torch.dtype) -> None:
    """Equal up to the order of sums; a lost gradient is no gradient."""
    present = [g for g in expected.values() if g is not None]
    scale = max((float(g.abs().max()) for g in present), default=1.0)
    tolerance = (1e-4 if dtype == torch.float32 else 1e-11) * max(scale, 1.0)
    for name, wanted in expected.items():
        gradient = found[name]
        if wanted is None or gradient is None:
            lost = wanted if gradient is None else gradient
            assert lost is None or not lost.any(), f"{name}: {gradient} and not {wanted}"
        else:
            assert (gradient - wanted).abs().max() <= tolerance, f"{name}: {gradient} and not {wanted}"


def assert_same_bits(found: Any, expected: Any) -> None:
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for first, second in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
        assert first.stride() == second.stride()


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """What happens inside changes nothing about the model, nor the random state."""
    before = snapshot(model)
    yield
    after = snapshot(model)
    assert all(map(torch.equal, after.pop("tensors"), before.pop("tensors")))
    assert torch.equal(after.pop("random"), before.pop("random"))
    assert after == before


class Reads(nn.Module):
    """A head that anything can be given to, whatever its shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.sum(), x.square().sum()]).expand(BATCH, 2)


def insert_all(
    case: Case, model: nn.Module, cuts: list[dict[str, Any]], coeffs: list[float], tapped: str
) -> nn.Module:
    if tapped and case.head_first:
        model = attach(case, model, tapped)
    for keywords, coeff in zip(cuts, coeffs, strict=True):
        model = gs.insert_grl(model, **keywords, coeff=coeff)
    return attach(case, model, tapped) if tapped and not case.head_first else model


def attach(case: Case, model: nn.Module, tapped: str) -> nn.Module:
    given = tuple(map(case.given, case.inputs()))
    return gs.attach_domain_head(model, tapped, classifier=Reads(), pool="none", example_inputs=given)


def check(case: Case) -> str:
    """Everything that must hold of one case; returns what kind of case it turned out to be."""
    model, inputs = case.network(), case.inputs()
    twin = copy.deepcopy(model)
    try:
        expected, plain = outputs_and_gradients(case, twin, twin)
    except RuntimeError:  # it overwrites what autograd needs, or views what has other strides
        return "invalid"
    buffers = [buffer.clone() for buffer in twin.buffers()]

    twin = copy.deepcopy(model)
    interpreter = Interpreter(case.block, twin)
    result, gradients = outputs_and_gradients(case, twin, interpreter.run)
    for first, second in zip(pytree.tree_leaves(result), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(first, second, msg="the interpreter is wrong")
    assert_close(gradients, plain, case.dtype)

    places = places_to_cut(case, interpreter)
    if not places:
        return "no place"
    cuts = list({str(places[pick % len(places)]): places[pick % len(places)] for pick in case.picks}.values())
    coeffs = case.coeffs[: len(cuts)]
    points = [name for name in points_outside_layers(interpreter) if name in interpreter.features]
    tapped = "" if case.head is None or not points else points[case.head % len(points)]
    note(f"{cuts} with {coeffs}, a head at {tapped!r}")

    with untouched(model):
        try:
            spliced = insert_all(case, model, cuts, coeffs, tapped)
        except gs.SurgeryError as error:
            if "overwrites in place what" in str(error):
                return "refused"
            if "cannot be called in every mode" in str(error):
                return "a head in one mode only"
            assert "nothing uses the value" in str(error), error  # noqa: PT017
            assert any(not interpreter.points[cut["after"]] for cut in cuts)
            return "unused"
    assert list(spliced.state_dict()) == list(model.state_dict())

    spliced_twin = copy.deepcopy(spliced)
    try:
        apart = lambda *inputs: split_logits(spliced_twin(*inputs), ["domain"])  # noqa: E731
        result, gradients = outputs_and_gradients(case, spliced_twin, apart if tapped else spliced_twin)
    except RuntimeError as error:  # on the way to a value that the network itself does not differentiate
        assert tapped, error  # noqa: PT017
        assert "inplace" in str(error), error  # noqa: PT017
        return "invalid with a head there"
    assert_same_bits(result[0] if tapped else result, expected)
    own = [b for name, b in spliced_twin.named_buffers() if "grl_" not in name and "_constant" not in name]
    assert all(map(torch.equal, own, buffers))

    twin = copy.deepcopy(model)
    reversals = [as_reversal(keywords, coeff) for keywords, coeff in zip(cuts, coeffs, strict=True)]
    oracle = Interpreter(case.block, twin, reversals, tapped)
    with_head = lambda *inputs: (oracle.run(*inputs), spliced.domain(oracle.tap))  # noqa: E731
    right, wanted = outputs_and_gradients(case, twin, with_head if tapped else oracle.run)
    assert_close(gradients, wanted, case.dtype)
    if tapped:
        torch.testing.assert_close(result[1], right[1])

    with untouched(model), untouched(spliced):
        try:
            report = gs.verify_flip(spliced, model, tuple(map(case.given, inputs)))
        except gs.SurgeryError as error:  # torch computes attention otherwise where inputs need no gradient
            assert "itself fails" in str(error), error  # noqa: PT017
            assert "modified by an inplace operation" in str(error), error  # noqa: PT017
            return "invalid"
    silent = all(not g.any() for g in plain.values() if g is not None)
    if not report.ok and not silent:
        assert all(row.ok for row in report.parameters), report
        assert report.forward_identical, report
        notes = {row.note for row in report.reversals if not row.ok}
        assert notes <= {"no gradient reaches it"}, report

    with untouched(model), untouched(spliced):
        stripped = gs.strip(spliced)
    assert [type(module) for module in stripped.modules()] == [type(module) for module in model.modules()]
    assert list(stripped.state_dict()) == list(model.state_dict())
    twin = copy.deepcopy(stripped)
    result, gradients = outputs_and_gradients(case, twin, twin)
    assert_same_bits(result, expected)
    assert all(map(_equal, gradients.values(), plain.values()))

    for training in (not case.training, case.training):  # what the original does in the other mode
        first, second = copy.deepcopy(model).train(training), copy.deepcopy(spliced).train(training)
        torch.manual_seed(1)
        try:
            expected = first(*map(case.given, inputs))
        except RuntimeError:
            continue
        torch.manual_seed(1)
        result = second(*map(case.given, inputs))
        assert_same_bits(split_logits(result, ["domain"])[0] if tapped else result, expected)
    return "checked"


def _equal(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


@pytest.fixture(autouse=True)
def examples_that_hang_on_nothing_else(monkeypatch):
    """Hypothesis also draws constants out of whatever modules other tests have loaded in this process."""
    monkeypatch.setattr(HypothesisProvider, "_maybe_draw_constant", lambda *_, **__: None)


ALIKE = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False)


@settings(ALIKE, max_examples=100)
@given(cases())
def test_a_random_network_cut_at_random_places_is_what_the_interpreter_says(case):
    note(source_of(case.block))
    assume(check(case) != "invalid")


@pytest.mark.long
@settings(ALIKE, max_examples=300)
@given(cases())
def test_three_hundred_random_networks_are_what_the_interpreter_says(case):
    note(source_of(case.block))
    assume(check(case) != "invalid")
