"""The table of wrong calls: each says exactly what docs/errors.md promises, and changes nothing."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_input import TABLE, complaint_of, hooked, raised_by
from oracles import assert_untouched, gradients, snapshot
from small_networks import Net, image
from torch import nn

import grl_surgery as gs

ROOT = Path(__file__).parents[1]
CALLS = [row for row in TABLE if not row.call.startswith("grl-surgery")]
MAKES_SOMETHING = re.compile(r"\b[A-Z]\w*\(|randn|quantised|scripted")
COMMANDS = [row for row in TABLE if row.call.startswith("grl-surgery")]


@pytest.mark.parametrize("row", CALLS, ids=[row.call for row in CALLS])
def test_a_wrong_call_says_what_is_wrong_and_changes_nothing(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Net()
    model.stage1.eval()
    before, patched = snapshot(model), nn.Module.__call__
    error = raised_by(row.call, model)
    assert (type(error).__name__, str(error)) == (row.error, row.message)
    if MAKES_SOMETHING.search(row.call):  # and draws its weights
        torch.random.set_rng_state(before["random"])
    assert_untouched(model, before)
    assert nn.Module.__call__ is patched
    assert torch.is_grad_enabled()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("row", COMMANDS, ids=[row.call for row in COMMANDS])
def test_a_wrong_command_says_what_is_wrong_and_writes_nothing(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert complaint_of(row.call) == (row.error, row.message)
    assert {path.name for path in tmp_path.iterdir()} <= {"nets.py", "__pycache__"}


def test_there_are_sixty_cases_and_no_two_are_alike():
    assert len({row.call for row in TABLE}) == len(TABLE) >= 60


def test_every_error_is_one_of_this_library_or_an_interruption():
    raised = {row.error for row in TABLE if not row.error.isdigit()}
    assert all(issubclass(getattr(gs, name), gs.SurgeryError) for name in raised - {"KeyboardInterrupt"})


def test_the_page_of_errors_is_made_from_the_table():
    text = runpy.run_path(str(ROOT / "docs" / "write_errors.py"))["page"]()
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == text, "run docs/write_errors.py"


# --------------------------------------------------------------------------- what looks wrong and is not


@pytest.mark.parametrize(
    "make",
    [
        lambda: Net().to("meta"),
        lambda: Net().requires_grad_(False),
        lambda: Net().half(),
        lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2)),
    ],
    ids=["meta", "frozen", "half", "lazy"],
)
def test_surgery_needs_no_values(make):
    model = make()
    point = "0" if isinstance(model, nn.Sequential) else "stem"
    assert len(gs.reversals(gs.insert_grl(model, after=point))) == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_surgery_without_gradients_gives_a_network_with_gradients(context):
    model, x = Net(), image()
    with context():
        spliced = gs.insert_grl(model, after="stage1")
        report = gs.verify_flip(spliced, model, x)
    assert report.ok
    plain, found = gradients(model, x), gradients(spliced, x)
    assert torch.equal(found["stem.weight"], -plain["stem.weight"])


@pytest.mark.parametrize(
    ("make", "same"),
    [
        (lambda number: gs.DomainClassifier(number(8)).in_features, 8),
        (lambda number: gs.domain_loss(torch.eye(2), number(1)), gs.domain_loss(torch.eye(2), 1)),
        (
            lambda number: gs.CoefficientScheduler(gs.GradientReversal(), abs, number(9)).state_dict()[
                "total_steps"
            ],
            9,
        ),
    ],
    ids=["a size", "a label", "a number of steps"],
)
def test_a_whole_number_of_numpy_is_one(make, same):
    made = make(np.int64)
    assert (made, type(made)) == (same, type(same))


def test_the_largest_number_of_float32_is_a_coefficient():
    largest = torch.finfo(torch.float32).max
    layer = gs.GradientReversal(largest)
    assert layer.coeff == largest
    for too_large in (math.nextafter(largest, math.inf), torch.tensor(1e39, dtype=torch.float64), 10**400):
        with pytest.raises(gs.SurgeryError, match=r"float32, where it would be infinite"):
            layer.set_coeff(too_large)
    assert layer.coeff == largest
    assert gs.reverse_gradient(torch.ones(1, dtype=torch.float64), 1e300) == 1


def test_a_learning_rate_may_be_a_tensor():
    model = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    (group,) = gs.param_groups(model, lr=torch.tensor(0.5), new="fc")
    assert group["lr"] == 5.0


def test_after_an_interrupted_verification_the_next_one_passes():
    model = hooked(Net())
    spliced = gs.insert_grl(model, after="stem")
    with pytest.raises(KeyboardInterrupt):
        gs.verify_flip(spliced, example_inputs=image())
    for network in (model, spliced):
        network.fc._forward_hooks.clear()
    assert gs.verify_flip(spliced, model, image()).ok
    assert not torch.are_deterministic_algorithms_enabled()
