"""Parameter groups and learning rates: every parameter once, and the formula of the paper."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from grl_surgery.errors import PointNotFoundError, SurgeryError
from grl_surgery.nn.classifiers import DomainClassifier
from grl_surgery.nn.head_building import build_head
from grl_surgery.nn.heads import DomainHead
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.training.optimization import check_partition, dann_lr, param_groups


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------- parameter groups


def model_with_heads() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "stem": nn.Linear(4, 4),
            "fc": nn.Linear(4, 3),
            "shallow": DomainHead(DomainClassifier(4, hidden=8, depth=1)),
            "deep": build_head((2, 4), num_classes=3, condition="randomized", hidden=8),
        }
    )


def named(groups: list[dict[str, Any]], model: nn.Module) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_heads_are_new_and_the_rest_is_backbone() -> None:
    model = model_with_heads()
    groups = param_groups(model, lr=0.01)
    found = named(groups, model)
    assert found["backbone"] == {"stem.weight", "stem.bias", "fc.weight", "fc.bias"}
    assert found["new"] == {name for name, _ in model.named_parameters()} - found["backbone"]
    assert [group["lr"] for group in groups] == [0.01, 0.1]
    assert param_groups(model, lr=0.01, new_multiplier=2.0)[1]["lr"] == 0.02


@pytest.mark.parametrize("new", ["fc", ["fc"], ["fc.weight", "fc.bias"], ["fc", "fc.weight"]])
def test_named_layers_are_new_as_well(new: str | list[str]) -> None:
    model = model_with_heads()
    found = named(param_groups(model, lr=0.01, new=new), model)
    assert found["backbone"] == {"stem.weight", "stem.bias"}


def test_a_name_does_not_stand_for_another_that_begins_alike() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)})
    assert named(param_groups(model, lr=1.0, new="fc"), model)["new"] == {"fc.weight", "fc.bias"}


def test_the_groups_train_with_an_optimizer() -> None:
    model = model_with_heads()
    optimizer = torch.optim.SGD(param_groups(model, lr=0.5), momentum=0.9)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    moved = {
        name: (old - new).mean().item()
        for old, (name, new) in zip(before, model.named_parameters(), strict=True)
    }
    for name, step in moved.items():
        assert step == pytest.approx(5.0 if name.startswith(("shallow", "deep")) else 0.5, rel=1e-5)


def test_frozen_parameters_are_left_out_and_an_empty_group_too() -> None:
    model = model_with_heads()
    model["stem"].requires_grad_(False)
    assert named(param_groups(model, lr=0.01), model)["backbone"] == {"fc.weight", "fc.bias"}
    model["fc"].requires_grad_(False)
    assert [group["name"] for group in param_groups(model, lr=0.01)] == ["new"]


def test_a_shared_parameter_is_there_once_and_the_backbones_unless_named() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 2)})
    model["tied"] = nn.ModuleList([model["fc"]])
    model["domain"] = DomainHead(model["fc"])
    model["other"] = DomainHead(nn.Linear(4, 2))
    groups = param_groups(model, lr=0.01)
    assert [len(group["params"]) for group in groups] == [2, 2]
    assert named(groups, model)["backbone"] == {"fc.weight", "fc.bias"}
    assert len(param_groups(model, lr=0.01, new="tied")[0]["params"]) == 4


def test_a_spliced_reversal_alone_makes_nothing_new() -> None:
    model = nn.ModuleDict({"reversal": GradientReversal(), "stem": nn.Linear(4, 4)})
    with pytest.raises(SurgeryError, match=r"there is no domain head in this ModuleDict and no new= layer"):
        param_groups(model, lr=0.01)


def test_an_unknown_new_layer_is_refused_with_near_names() -> None:
    with pytest.raises(PointNotFoundError, match=r"(?s)new='fcc' names no module.*nearest: fc"):
        param_groups(model_with_heads(), lr=0.01, new="fcc")
    with pytest.raises(PointNotFoundError, match=r"new='' names no module"):
        param_groups(model_with_heads(), lr=0.01, new="")


@pytest.mark.parametrize("lr", [0.0, -0.1, math.nan, math.inf])
def test_an_impossible_learning_rate_is_refused(lr: float) -> None:
    with pytest.raises(SurgeryError, match=r"lr is .* must be a positive finite number"):
        param_groups(model_with_heads(), lr=lr)
    with pytest.raises(SurgeryError, match=r"new_multiplier is"):
        param_groups(model_with_heads(), lr=0.1, new_multiplier=lr)


def test_a_model_that_is_frozen_altogether_is_refused() -> None:
    with pytest.raises(SurgeryError, match=r"none is trainable"):
        param_groups(model_with_heads().requires_grad_(False), lr=0.01)


def test_groups_that_are_no_partition_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    weight, bias, frozen, _ = model.parameters()
    check_partition([[weight], [bias]], model)
    with pytest.raises(SurgeryError, match=r"0.bias is in 0 groups"):
        check_partition([[weight]], model)
    with pytest.raises(SurgeryError, match=r"0.weight is in 2 groups"):
        check_partition([[weight, bias], [weight]], model)
    for stranger in (frozen, nn.Parameter(torch.ones(1))):
        with pytest.raises(SurgeryError, match=r"frozen or not the model's"):
            check_partition([[weight, bias, stranger]], model)


# ------------------------------------------------------------------------------------------- learning rate


@given(p=st.floats(0.0, 1.0))
def test_dann_lr_is_the_formula_of_the_paper(p: float) -> None:
    assert dann_lr(p) == pytest.approx(math.exp(math.log(0.01) - 0.75 * math.log1p(10.0 * p)), rel=1e-12)
    assert dann_lr(p, 0.1, 5.0, 0.5) == pytest.approx(0.1 / math.sqrt(1.0 + 5.0 * p), rel=1e-12)


def test_dann_lr_refuses_progress_outside_its_range() -> None:
    with pytest.raises(SurgeryError, match=r"training progress is 1\.5, which is outside \[0, 1\]"):
        dann_lr(1.5)


def test_the_learning_rate_of_dann_goes_straight_into_lambda_lr() -> None:
    slow, fast = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [slow], "lr": 0.01}, {"params": [fast], "lr": 0.1}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, dann_lr(total_steps=4))
    for step in range(6):  # two steps beyond the last
        factor = (1 + 10 * min(step / 4, 1.0)) ** -0.75
        assert scheduler.get_last_lr() == pytest.approx([0.01 * factor, 0.1 * factor])
        optimizer.step()
        scheduler.step()
    resumed = torch.optim.lr_scheduler.LambdaLR(optimizer, dann_lr(total_steps=4))
    resumed.load_state_dict(pickle.loads(pickle.dumps(scheduler.state_dict())))


@pytest.mark.parametrize("arguments", [{}, {"p": 0.5, "total_steps": 4}, {"lr0": 0.1, "total_steps": 4}])
def test_dann_lr_takes_either_progress_or_a_number_of_steps(arguments: dict[str, Any]) -> None:
    with pytest.raises(SurgeryError, match="takes the progress p, or total_steps"):
        dann_lr(**arguments)
