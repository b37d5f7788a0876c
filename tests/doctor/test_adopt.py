"""adopt: the same gradients, the same keys, a coefficient that still answers to its name, alive elsewhere."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from pasted_variants import (
    IMAGES,
    VARIANTS,
    AlphaIsAnArgument,
    AlphaIsAnAttribute,
    Bare,
    InBuffer,
    InParameter,
    Layer,
    Network,
    OptionalCoefficient,
    ReturnsItsInput,
    ReverseLayerF,
    WarmStart,
)
from torch import Tensor, nn

import grl_surgery as gs
from grl_surgery.doctor.adopt import adopt_unsurveyed
from grl_surgery.nn.adopted_reversal import AdoptedReversal

ADOPTED = [name for name, variant in VARIANTS.items() if variant.adopted]
LEFT = [name for name, variant in VARIANTS.items() if not variant.adopted]


def gradients(model: nn.Module, inputs: Any) -> dict[str, Tensor | None]:
    """By plain backward, with no code of the doctor's."""
    model = copy.deepcopy(model)
    outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(3)
    sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_gradients(first: nn.Module, second: nn.Module, inputs: Any, **tolerance: float) -> None:
    before, after = gradients(first, inputs), gradients(second, inputs)
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        if gradient is None:
            assert after[name] is None
        else:
            torch.testing.assert_close(after[name], gradient, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("name", [name for name in ADOPTED if VARIANTS[name].verdicts[-1] != "fails"])
def test_the_gradients_stay_what_they_were_on(name: str) -> None:
    model = VARIANTS[name].make()
    adoption = adopt_unsurveyed(model, VARIANTS[name].inputs)
    rounding = {"rtol": 1e-5, "atol": 1e-6} if name == "arithmetic" else {}
    assert_same_gradients(model, adoption.model, VARIANTS[name].inputs, **rounding)
    assert (adoption.difference == 0.0) is not bool(rounding)


@pytest.mark.parametrize("name", ADOPTED)
def test_the_keys_stay_what_they_were_on(name: str) -> None:
    model = VARIANTS[name].make()
    adopted = adopt_unsurveyed(model, VARIANTS[name].inputs).model
    before, after = model.state_dict(), adopted.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0)
    adopted.load_state_dict(before)
    model.load_state_dict(after)


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_adopted_is_left_with_the_reason(name: str) -> None:
    with pytest.raises(gs.SurgeryError, match=r"there is nothing to adopt in this \w+(\n  .+: .+)+"):
        adopt_unsurveyed(VARIANTS[name].make(), VARIANTS[name].inputs)


def test_a_network_that_failed_runs_after_adoption() -> None:
    variant = VARIANTS["in-place operation behind it"]
    with pytest.raises(RuntimeError, match="modified inplace"):
        variant.make()(*variant.inputs).sum().backward()
    adoption = adopt_unsurveyed(variant.make(), variant.inputs)
    adoption.model(*variant.inputs).sum().backward()
    assert adoption.difference is None
    assert "the network did not run before" in adoption.verdict


def test_it_is_alive_everywhere() -> None:
    adoption = gs.adopt(Network(Layer()), IMAGES)
    assert adoption.alive_everywhere
    assert str(adoption).startswith("OK  1 reversal adopted; gradients in eager mode equal bit for bit")


def test_a_network_with_nothing_but_ours_has_nothing_to_adopt() -> None:
    model = gs.insert_grl(Network(), before="domain")
    with pytest.raises(gs.SurgeryError, match="there is nothing to adopt"):
        gs.adopt(model, IMAGES)


# --- the coefficient under its old name


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda: Layer(ReverseLayerF, 0.5), "alpha"),
        (lambda: InBuffer(0.5), "weight"),
        (lambda: InParameter(0.5), "weight"),
    ],
)
def test_the_coefficient_is_read_and_set_under_its_old_name(layer: Any, name: str) -> None:
    model = Network(layer())
    adopted = adopt_unsurveyed(model, IMAGES).model
    for network in (model, adopted):
        old = getattr(network.reversal, name)
        if isinstance(old, Tensor):
            with torch.no_grad():
                old.fill_(0.125)
        else:
            setattr(network.reversal, name, 0.125)
    assert float(adopted.reversal.coeff) == 0.125
    assert_same_gradients(model, adopted, IMAGES)


def test_an_assignment_inside_the_tensor_reaches_the_coefficient() -> None:
    adopted = adopt_unsurveyed(Network(InBuffer(0.5)), IMAGES).model
    adopted.reversal.weight[0] = 0.75
    assert float(adopted.reversal.coeff) == 0.75


def test_a_checkpoint_sets_the_coefficient() -> None:
    adopted = adopt_unsurveyed(Network(InBuffer(0.5)), IMAGES).model
    adopted.load_state_dict(Network(InBuffer(0.25)).state_dict())
    assert float(adopted.reversal.coeff) == 0.25


def test_a_checkpoint_without_the_coefficient_is_refused() -> None:
    adopted = adopt_unsurveyed(Network(InBuffer(0.5)), IMAGES).model
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "reversal.weight"'):
        adopted.load_state_dict(Network().state_dict())


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(saved(model), weights_only=False),
        lambda model: model.to(torch.float64).to(torch.float32),
    ],
)
def test_a_copy_keeps_name_key_and_coefficient(again: Any) -> None:
    adopted = again(adopt_unsurveyed(Network(InBuffer(0.5)), IMAGES).model)
    adopted.reversal.weight = torch.tensor([0.375])
    assert float(adopted.reversal.coeff) == 0.375
    assert adopted.state_dict()["reversal.weight"] == torch.tensor([0.375])


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_a_negative_coefficient_is_refused_under_the_old_name_too() -> None:
    adopted = adopt_unsurveyed(Network(Layer()), IMAGES).model
    with pytest.raises(gs.SurgeryError, match="must be finite and not negative"):
        adopted.reversal.alpha = -1.0


def test_an_argument_of_forward_stays_the_coefficient() -> None:
    model = AlphaIsAnArgument()
    adopted = adopt_unsurveyed(model, (IMAGES, 0.5)).model
    for coeff in (0.0, 0.5, 2.0):
        assert_same_gradients(model, adopted, (IMAGES, coeff))


def test_a_coefficient_that_the_layer_is_called_with_counts() -> None:
    layer = adopt_unsurveyed(Network(OptionalCoefficient()), IMAGES).model.reversal
    x = torch.ones(2, requires_grad=True)
    assert torch.autograd.grad(layer(x, 0.25).sum(), x)[0].tolist() == [-0.25, -0.25]
    with gs.reversal_disabled(layer):
        assert torch.autograd.grad(layer(x, 0.25).sum(), x)[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["attribute of the network", "coefficient of a class"])
def test_a_name_that_is_not_read_any_more_is_said(name: str) -> None:
    (row,) = adopt_unsurveyed(VARIANTS[name].make(), VARIANTS[name].inputs).adopted
    assert row.follows is None
    assert "is not read any more: set reversals(model)" in row.notes[0]


# --- the result is a network like any other


def test_a_call_in_a_forward_becomes_a_layer_that_surgery_knows() -> None:
    model = AlphaIsAnAttribute()
    adopted = adopt_unsurveyed(model, IMAGES).model
    (name,) = gs.reversals(adopted)
    gs.reversals(adopted)[name].set_coeff(1.0)
    model.strength = 1.0
    assert_same_gradients(model, adopted, IMAGES)
    assert type(gs.strip(adopted)) is AlphaIsAnAttribute
    twice = gs.insert_grl(adopted, after="features")
    assert set(gs.reversals(twice)) == {name, "grl_features"}
    assert gs.verify_flip(adopted, example_inputs=(IMAGES,)).ok


def test_an_adopted_layer_is_verified_like_ours() -> None:
    adopted = adopt_unsurveyed(Network(Bare(ReturnsItsInput)), IMAGES).model
    assert gs.verify_flip(adopted, example_inputs=(IMAGES,)).ok


class Inner(nn.Module):
    """Only this part can be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return ReverseLayerF.apply(torch.tanh(x), 0.5) * 2.0


class Loops(Network):
    def __init__(self) -> None:
        super().__init__(Inner())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x) if bool(x.sum() != 0) else super().forward(-x)


class Calls(Network):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.classifier(features), self.domain(ReverseLayerF.apply(features, 1.0))


@pytest.mark.parametrize("model", [Calls(), Loops()], ids=lambda model: type(model).__name__)
def test_the_reference_of_a_proof_does_not_reverse_where_the_adopted_call_did(model: nn.Module) -> None:
    adopted = adopt_unsurveyed(model, IMAGES).model
    for layer in gs.reversals(adopted).values():
        layer.set_coeff(1.0)
    gs.verify_flip(adopted, example_inputs=(IMAGES,)).raise_if_failed()
    assert len(gs.reversals(gs.insert_grl(adopted, after="classifier"))) == 2


def test_a_layer_that_is_used_under_two_names_is_replaced_under_both() -> None:
    model = Network(Layer())
    model.again = model.reversal
    adopted = adopt_unsurveyed(model, IMAGES).model
    assert adopted.again is adopted.reversal
    assert isinstance(adopted.again, AdoptedReversal)


def test_a_network_that_is_a_reversal_is_replaced_itself() -> None:
    adopted = adopt_unsurveyed(Layer(), IMAGES).model
    assert adopted.alpha == 0.5


def test_where_the_root_cannot_be_traced_the_part_with_the_call_is() -> None:
    model = Loops()
    adoption = adopt_unsurveyed(model, IMAGES)
    assert type(adoption.model) is Loops
    assert_same_gradients(model, adoption.model, IMAGES)


# --- warm starts


def coefficients(layer: nn.Module, steps: int) -> list[float]:
    x = torch.ones(1, requires_grad=True)
    return [-float(torch.autograd.grad(layer(x), x)[0]) for _ in range(steps)]


@pytest.mark.parametrize(
    "settings", [{}, {"alpha": 10.0, "max_iters": 40}, {"lo": 0.25, "hi": 0.75}, {"lo": 1.0, "hi": 0.5}]
)
def test_a_warm_start_becomes_the_same_numbers_by_a_schedule(settings: dict[str, Any]) -> None:
    adoption = adopt_unsurveyed(Network(WarmStart(**settings)), IMAGES)
    (row,) = adoption.adopted
    assert row.schedule is not None
    scheduler = gs.CoefficientScheduler(adoption.model, row.schedule, total_steps=60)
    for expected in coefficients(WarmStart(**settings), 60):
        assert float(adoption.model.reversal.coeff) == pytest.approx(expected, abs=1e-5)
        scheduler.step()


def test_a_warm_start_that_the_training_loop_steps_is_one_too() -> None:
    (row,) = adopt_unsurveyed(Network(WarmStart(auto_step=False)), IMAGES).adopted
    assert "warm_start(alpha=1.0, max_iters=100.0, lo=0.0, hi=1.0)" in repr(row.schedule)
    assert row.notes[0] == "it has no step() any more: set_coeff(...)"
    assert "gs.CoefficientScheduler(model, gs.schedules.warm_start(" in row.notes[1]


class Linearly(WarmStart):
    def forward(self, x: Tensor) -> Tensor:
        self.iter_num += 1
        return ReverseLayerF.apply(x, min(1.0, self.iter_num / 100))


def test_another_rule_is_no_warm_start() -> None:
    with pytest.raises(gs.SurgeryError, match=r"moves by itself, and not as gs\.schedules\.warm_start does"):
        adopt_unsurveyed(Network(Linearly()), IMAGES)


# --- a proof that can fail


def test_an_adoption_that_would_change_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grl_surgery.doctor.adopt._coeff", lambda site: 0.25)
    with pytest.raises(gs.SurgeryError, match=r"FlipError: in train mode the gradients would differ by"):
        adopt_unsurveyed(Network(Bare(ReturnsItsInput)), IMAGES)
