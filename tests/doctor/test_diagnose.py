"""find_reversals on networks whose truth is known: right and wrong reversals, and networks without one."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_networks
import torch
from pasted_variants import (
    IMAGES,
    VARIANTS,
    Bare,
    CountsInTheClass,
    Layer,
    Network,
    ReturnsItsInput,
    ReverseLayerF,
    WarmStart,
)
from torch import Tensor, nn

import grl_surgery as gs
from grl_surgery.doctor.adopt import adopt_unsurveyed
from grl_surgery.doctor.identity_probes import ratio
from grl_surgery.doctor.report import Diagnosis


@pytest.mark.parametrize("name", VARIANTS)
def test_the_verdict_is_the_one_that_is_due_on(name: str) -> None:
    variant = VARIANTS[name]
    assert tuple(row.verdict for row in find(name)) == variant.verdicts


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.factor is not None])
def test_the_factor_is_the_one_that_calculus_gives_on(name: str) -> None:
    assert find(name)[0].factor == VARIANTS[name].factor


@pytest.mark.parametrize("name", VARIANTS)
def test_what_sets_the_coefficient_is_found_on(name: str) -> None:
    assert find(name)[0].coeff_from == VARIANTS[name].coeff_from


@functools.cache
def find(name: str) -> tuple[gs.Finding, ...]:
    variant = VARIANTS[name]
    return gs.find_reversals(variant.make(), variant.inputs)


def test_there_are_at_least_fifteen_variants_of_either_kind() -> None:
    right = [name for name, variant in VARIANTS.items() if variant.verdicts == ("reverses",)]
    assert len(right) >= 15
    assert len(VARIANTS) - len(right) >= 15


# --- names


@pytest.mark.parametrize("name", ["Identity", "Dropout", "X", "BatchNorm2d"])
def test_a_reversal_is_found_under_any_name(name: str) -> None:
    function = type(name, (torch.autograd.Function,), dict(vars(ReverseLayerF)))
    layer = types.new_class(name, (Layer,))
    (row,) = gs.find_reversals(Network(layer(function, 0.5)), IMAGES)
    assert (row.verdict, row.factor) == ("reverses", -0.5)


@pytest.mark.parametrize("name", ["GradientReversal", "GRL", "RevGrad", "ReverseLayerF"])
def test_a_layer_is_no_reversal_because_of_its_name(name: str) -> None:
    layer = types.new_class(name, (nn.Identity,))
    assert gs.find_reversals(Network(layer()), IMAGES) == ()


# --- networks without one


@pytest.mark.parametrize("make", [small_networks.Net, small_networks.Residual])
def test_nothing_is_found_in_a_network_without_a_reversal(make: Any) -> None:
    images = torch.randn(2, 4 if make is small_networks.Residual else 3, 8, 8)
    assert gs.find_reversals(make(), images) == ()


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_resnet", "torchvision/squeezenet1_1"])
def test_nothing_is_found_in(name: str) -> None:
    from grl_surgery.loading.model_zoo import load_model

    loaded = load_model(name)
    assert gs.find_reversals(loaded.module, loaded.example_inputs) == ()


def test_ours_are_found_by_the_same_measurement() -> None:
    spliced = gs.insert_grl(small_networks.Net(), after="stage1", coeff=0.25)
    (row,) = gs.find_reversals(spliced, torch.randn(2, 3, 8, 8))
    assert (row.path, row.factor, row.coeff_from, row.ours) == ("grl_stage1", -0.25, "grl_stage1.coeff", True)


# --- what is said besides


def test_the_line_that_calls_the_function_is_named() -> None:
    (row,) = find("argument of forward")
    file, _, line = (row.source or "").rpartition(":")
    assert file.endswith("pasted_variants.py")
    code = (Path(__file__).parents[1] / "pasted_variants.py").read_text().splitlines()
    assert "ReverseLayerF.apply(features, alpha)" in code[int(line) - 1]


def test_where_the_gradient_dies_is_named() -> None:
    (row,) = find("softmax over one unit")
    assert "SoftmaxBackward0 in domain.1" in row.note


def test_a_number_of_the_layer_that_does_nothing_is_named() -> None:
    (row,) = find("coefficient never passed")
    assert row.remarks == ("no effect on the factor: alpha=0.2",)


def test_a_counter_that_all_instances_share_is_named() -> None:
    (row,) = find("counter of a class")
    assert row.moves
    assert "it counts in CountsInTheClass.steps, which all instances share" in row.remarks


def test_a_negative_coefficient_is_named() -> None:
    (row,) = find("lambda is -10")
    assert "the coefficient reversal.alpha is -10" in row.note


def test_every_verdict_but_the_good_one_comes_with_what_to_do() -> None:
    rows = [row for name in VARIANTS for row in find(name)]
    assert {row.verdict for row in rows if not row.fix} == {"reverses"}


# --- what is not found


class InTheForward(Network):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.classifier(features), self.domain(2 * features.detach() - features)


def test_where_nothing_is_found_the_verdict_says_what_cannot_be_found() -> None:
    found = gs.diagnose(InTheForward(), IMAGES)
    assert found.findings == ()
    assert "arithmetic such as 2 * x.detach() - x is seen in a module of its own only" in found.verdict


# --- errors


@pytest.mark.parametrize("verb", [gs.find_reversals, gs.diagnose, gs.adopt, gs.assert_flips])
@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        (torch.ones(4, 5), r"inputs of 4x5: RuntimeError: .*mat1 and mat2 shapes cannot be multiplied"),
        ("x", r"inputs of 'x': TypeError"),
        ((IMAGES, 0.5), r"inputs of 4x6, 0\.5: TypeError: .*2 positional arguments but 3 were given"),
        ((), r"inputs of nothing: TypeError: .*missing 1 required positional argument"),
    ],
)
def test_inputs_that_the_network_does_not_take_are_no_diagnosis(
    verb: Any, inputs: Any, complaint: str
) -> None:
    with pytest.raises(gs.SurgeryError, match=f"this Network does not run on {complaint}") as raised:
        verb(Network(Layer()), inputs)
    assert not isinstance(raised.value, gs.FlipError)


class InRows(nn.Module):
    """A module without weights, which fails on inputs that do not fit, as a broken reversal does on any."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 12)


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(InRows(), nn.Linear(12, 2)), nn.Sequential(Layer(), nn.Linear(6, 2))],
    ids=["in a module without weights", "behind a reversal"],
)
def test_a_reversal_is_not_blamed_for_inputs_that_do_not_fit(model: nn.Module) -> None:
    with pytest.raises(gs.SurgeryError, match="does not run on inputs of 1x5"):
        gs.find_reversals(model, torch.ones(1, 5))


def test_a_network_without_known_inputs_is_refused() -> None:
    with pytest.raises(gs.SurgeryError, match="it is not known what inputs Network takes"):
        gs.find_reversals(Network())


@pytest.mark.parametrize("verb", [gs.find_reversals, gs.diagnose, gs.adopt])
def test_what_is_no_network_is_refused(verb: Any) -> None:
    with pytest.raises(gs.SurgeryError, match=r"works on an nn\.Module; got str"):
        verb("resnet18", IMAGES)


# --- nothing is changed


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {path: module.training for path, module in model.named_modules()},
        "hooks": {
            path: [len(value) for key, value in vars(module).items() if key.endswith("hooks") and value]
            for path, module in model.named_modules()
        },
        "numbers": {
            path: {key: copy.deepcopy(value) for key, value in vars(module).items() if key[0] != "_"}
            for path, module in model.named_modules()
        },
        "classes": {path: type(module) for path, module in model.named_modules()},
    }


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, Tensor):
        assert torch.equal(before, after)
    else:
        assert before == after


@pytest.mark.parametrize("name", VARIANTS)
def test_finding_and_adopting_change_nothing_on(name: str) -> None:
    variant = VARIANTS[name]
    model = variant.make()
    random.seed(1)
    np.random.seed(1)
    before = state_of(model)
    functions = {kind: dict(vars(kind)) for kind in (ReverseLayerF, ReturnsItsInput)}
    hook, steps, modules = Tensor.register_hook, CountsInTheClass.steps, dict(vars(nn.Module))
    random_state = torch.get_rng_state(), random.getstate()
    gs.find_reversals(model, variant.inputs)
    with contextlib.suppress(gs.SurgeryError):
        adopt_unsurveyed(model, variant.inputs)
    assert_same(before, state_of(model))
    assert functions == {kind: dict(vars(kind)) for kind in functions}
    assert (Tensor.register_hook, CountsInTheClass.steps, dict(vars(nn.Module))) == (hook, steps, modules)
    assert torch.equal(random_state[0], torch.get_rng_state())
    assert random_state[1] == random.getstate()


def test_the_tensors_of_the_caller_are_not_written() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coeff = torch.tensor(0.5)
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2.0)
            self.coeff += 0.25
            return self.last(ReverseLayerF.apply(self.first(x), float(self.coeff)))

    model, images = Overwrites(), IMAGES.clone()
    (row,) = gs.find_reversals(model, images)
    assert row.moves
    assert torch.equal(images, IMAGES)
    assert float(model.coeff) == 0.5


# --- a gradient that is overwritten


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].mul_(-0.5)


class HookInPlace(nn.Module):
    def __init__(self, hook: Any) -> None:
        super().__init__()
        self.hook = hook

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        if y.requires_grad:
            y.register_hook(self.hook)
        return y


def overwrite(gradient: Tensor) -> None:
    gradient.mul_(-0.5)


def hooked_in_place() -> nn.Module:
    network = Network()
    network.features.register_full_backward_hook(lambda module, left, entered: (left[0].mul_(-0.5),))
    return network


OVERWRITING = {
    "a Function": lambda: Network(Bare(InPlace)),
    "a hook that returns it": lambda: Network(HookInPlace(lambda gradient: gradient.mul_(-0.5))),
    "a hook that returns nothing": lambda: Network(HookInPlace(overwrite)),
    "a full backward hook": hooked_in_place,
}


@pytest.mark.parametrize("name", OVERWRITING)
def test_a_reversal_that_overwrites_the_gradient_is_a_reversal(name: str) -> None:
    (row,) = gs.find_reversals(OVERWRITING[name](), IMAGES)
    assert (row.verdict, row.factor) == ("reverses", -0.5)


def test_that_it_overwrites_the_gradient_is_named() -> None:
    (row,) = gs.find_reversals(Network(Bare(InPlace)), IMAGES)
    assert row.remarks == (
        "its backward overwrites the gradient it is given, which another branch may share",
    )


# --- the measurement itself


@pytest.mark.parametrize(
    ("left", "factor"),
    [
        (lambda entered: -0.3 * entered, -0.3),
        (lambda entered: entered * 0, 0.0),
        (lambda entered: -entered * torch.tensor([[1.0], [2.0]]), (-1.0, -2.0)),
        (lambda entered: -entered * torch.tensor([[1.0, 2.0, 3.0]]), None),
        (lambda entered: -entered.clamp(-0.1, 0.1), None),
        (lambda entered: None, 0.0),
        (lambda entered: entered[:1], None),
    ],
)
def test_a_factor_is_one_number_or_one_for_each_sample(left: Any, factor: Any) -> None:
    entered = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert ratio(entered, left(entered)) == factor


def test_a_doctor_that_measures_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grl_surgery.doctor.identity_probes.ratio", lambda entered, left: 1.0)
    assert gs.find_reversals(Network(Bare(ReturnsItsInput)), IMAGES)[0].verdict != "reverses"


def test_an_empty_diagnosis_is_not_good() -> None:
    assert not Diagnosis(()).ok
    assert "hook in this network reverses a gradient" in str(Diagnosis(()))


def test_a_warm_start_moves_and_is_alive() -> None:
    (row,) = gs.find_reversals(Network(WarmStart(lo=0.1)), IMAGES)
    assert row.ok
    assert row.remarks == ("the factor moves by itself: -0.1, then -0.1045",)
