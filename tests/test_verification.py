"""verify_flip: what it proves, what it refuses to prove on nothing, and that it leaves no trace."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import timm
import torch
from small_networks import Constants, InPlace, Modes, Net, Shared, Tuples, Untraceable, image, vector
from torch import nn

import grl_surgery as gs
from grl_surgery.flip_report import FlipReport, ParameterFlip, ReversalFlip


def kinds(report, measured):
    return [row.name for row in report.parameters if row.measured == measured]


def test_upstream_is_flipped_and_downstream_is_unchanged():
    model = Net()
    report = gs.verify_flip(gs.insert_grl(model, after="stage1"), model, image())
    assert report.ok
    assert set(kinds(report, "flipped")) == {
        name for name, _ in model.named_parameters() if name.startswith(("stem", "stage1"))
    }
    assert set(kinds(report, "unchanged")) == {
        name for name, _ in model.named_parameters() if name.startswith(("stage2", "fc"))
    }
    assert (
        report.verdict
        == "10 of 10 upstream parameters flipped, bit for bit; 10 downstream unchanged; forward identical"
    )


def test_where_paths_meet_a_parameter_is_mixed_and_still_what_the_oracle_has():
    model = Net()
    report = gs.verify_flip(gs.insert_grl(model, edge=("stage2.0", "stage2.1.add")), model, image())
    assert report.ok
    assert "stage1.0.conv.weight" in kinds(report, "mixed")
    assert "stage2.1.conv.weight" in kinds(report, "unchanged")


@pytest.mark.parametrize("mode", ["train", "eval", None])
def test_the_mode_can_be_chosen_and_is_put_back(mode):
    model = Modes()
    model.fc.eval()
    spliced = gs.insert_grl(model, after="relu#3")
    flags = [module.training for module in (*spliced.modules(), *model.modules())]
    report = gs.verify_flip(spliced, model, vector(), mode=mode)
    assert report.ok
    assert report.mode == (mode or "mixed")
    assert [module.training for module in (*spliced.modules(), *model.modules())] == flags


def test_a_parameter_that_no_path_reaches_is_said_to_be_unreached():
    model = Modes()
    report = gs.verify_flip(gs.insert_grl(model, after="body"), model, vector(), mode="eval")
    assert kinds(report, "unreached") == ["aux.weight", "aux.bias"]


def test_a_head_of_zeros_is_given_values_so_that_something_is_proved():
    model = Net()
    nn.init.zeros_(model.fc.weight)
    report = gs.verify_flip(gs.insert_grl(model, after="stage1"), model, image())
    assert report.ok
    assert len(kinds(report, "flipped")) == 10
    assert not model.fc.weight.any()


def test_everything_upstream_frozen_proves_nothing_and_says_so():
    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("stage2", "fc")))
    report = gs.verify_flip(gs.insert_grl(model, after="stage1"), model, image())
    assert not report.ok
    with pytest.raises(gs.FlipError, match="nothing is proved"):
        report.raise_if_failed()


def test_a_network_without_a_reversal_fails():
    model = Net()
    report = gs.verify_flip(model, model, image())
    assert report.problems == ("there is no reversal in this network",)


def test_a_reversal_that_the_user_wrote_into_the_network_is_proved_against_hooks():
    class Adversarial(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.label, self.domain = (nn.Linear(6, 6) for _ in range(3))
            self.grl = gs.GradientReversal(0.5)

        def forward(self, x):
            x = torch.tanh(self.features(x))
            return self.label(x), self.domain(self.grl(x))

    report = gs.verify_flip(Adversarial(), example_inputs=vector())
    assert report.ok
    assert kinds(report, "mixed") == ["features.weight", "features.bias"]
    assert kinds(report, "unchanged") == ["label.weight", "label.bias", "domain.weight", "domain.bias"]


@pytest.mark.parametrize("make", [Tuples, InPlace, Shared])
def test_networks_with_tuples_in_place_operations_and_shared_layers_can_be_proved(make):
    model = make()
    points = [n.name for n in gs.graph(model).nodes if n.op == "call_module" and n.name != "encoder"]
    for point in points:
        assert gs.verify_flip(gs.insert_grl(model, after=point), model, vector()).ok, point


def test_a_network_whose_root_is_no_graph_is_proved_against_hooks():
    model = Untraceable()
    report = gs.verify_flip(gs.insert_grl(model, after="body.stage1"), model, image())
    assert report.ok
    assert {row.predicted for row in report.parameters} == {"unknown"}
    assert len(kinds(report, "flipped")) == 10 + 1


def test_the_coefficient_of_the_network_does_not_matter_but_must_be_obeyed():
    spliced = gs.insert_grl(Net(), after="stage1", coeff=0.3)
    report = gs.verify_flip(spliced, example_inputs=image())
    assert report.ok
    assert report.reversals[0].coeff == pytest.approx(0.3)
    assert float(gs.reversals(spliced)["grl_stage1"].coeff) == pytest.approx(0.3)


def test_inputs_are_found_from_the_networks_own_metadata():
    model = timm.create_model("test_resnet")
    assert gs.verify_flip(gs.insert_grl(model, after="layer2"), model).ok


def test_a_cache_that_holds_a_graph_neither_fails_nor_is_touched():
    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(6))
            self.fc = nn.Linear(6, 6)
            self.cache = {}

        def forward(self, x):
            if "bias" not in self.cache:
                self.cache["bias"] = self.bias * 2
            return self.fc(x) + self.cache["bias"]

    model = nn.Sequential(Caches(), nn.Linear(6, 2))
    model(vector())
    kept = model[0].cache["bias"]
    report = gs.verify_flip(gs.insert_grl(model, after="0"), model, vector())
    assert report.ok
    assert len(kinds(report, "flipped")) == 3
    assert model[0].cache["bias"] is kept


def test_nothing_that_was_passed_in_is_changed():
    model = Net()
    model.stage2.eval()
    spliced = gs.insert_grl(model, after="stage1")
    x = image().requires_grad_()
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    state = copy.deepcopy(model.state_dict())
    random_states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.no_grad():
        assert gs.verify_flip(spliced, model, x).ok
        assert not torch.is_grad_enabled()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert x.grad is None
    assert torch.equal(model.stem.weight.grad, torch.ones_like(model.stem.weight))
    assert model.stage1[0].conv.weight.grad is None
    assert not model.stage2.training
    assert torch.equal(torch.random.get_rng_state(), random_states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == random_states[1:]
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not any(m._forward_hooks for m in spliced.modules())


def test_it_can_be_called_in_inference_mode():
    spliced = gs.insert_grl(Net(), after="stage1")
    with torch.inference_mode():
        assert gs.verify_flip(spliced, example_inputs=image()).ok


def test_one_forward_and_one_backward_of_each_network_are_all_it_takes():
    model, calls = Net(), []
    model.stem.register_forward_hook(lambda *args: calls.append("forward"))
    gs.verify_flip(gs.insert_grl(model, after="stage1"), model, image())
    assert len(calls) == 2


def test_the_reference_must_be_the_same_network():
    with pytest.raises(gs.SurgeryError, match=r"another network: the model has no parameter 'body.weight'"):
        gs.verify_flip(gs.insert_grl(Net(), after="stem"), Modes(), image())


def test_without_inputs_it_says_what_to_pass():
    with pytest.raises(gs.SurgeryError, match=r"nothing says what inputs Net takes\n.*example_inputs="):
        gs.verify_flip(gs.insert_grl(Net(), after="stem"))


# ----------------------------------------------------------------------------------------------- the report


def report_of(count, **changes):
    rows = [
        ParameterFlip(f"a.very.long.name.of.a.block.{i}.weight", (64, 64, 3, 3), "mixed", "mixed", True)
        for i in range(count)
    ]
    fields = {
        "parameters": tuple(rows),
        "reversals": (ReversalFlip("grl_x", "on a -> b[0]", 0.5, True),),
        "forward_identical": True,
        "mode": "train",
    }
    return FlipReport(**{**fields, **changes})


def test_the_report_fits_a_terminal_and_shows_only_what_is_worth_a_look():
    text = str(report_of(100))
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) < 25
    assert "on a -> b[0]" in text


def test_failures_come_first_and_are_named():
    bad = ParameterFlip("fc.weight", (2, 3), "flipped", "unchanged", False, "its gradient is not reversed")
    report = report_of(3, parameters=(*report_of(3).parameters, bad))
    assert str(report).startswith("FAILED")
    assert report.notable()[0] is bad
    with pytest.raises(gs.FlipError, match=r"parameter fc.weight: its gradient is not reversed"):
        report.raise_if_failed()


def test_a_good_report_is_returned_by_raise_if_failed():
    report = report_of(1)
    assert report.raise_if_failed() is report


def test_the_report_is_plain_data():
    found = json.loads(json.dumps(report_of(1).to_dict()))
    assert found["ok"] is True
    assert found["reversals"][0]["where"] == "on a -> b[0]"
    assert found["parameters"][0]["shape"] == [64, 64, 3, 3]


def test_the_report_prints_without_colour_where_there_is_no_terminal(capsys):
    print(report_of(1))
    assert "\x1b" not in capsys.readouterr().out


def test_a_parameter_that_is_not_the_references_is_named():
    model = Net()
    spliced = copy.deepcopy(gs.insert_grl(model, after="stage1"))
    assert gs.verify_flip(spliced, model, image()).ok
    with torch.no_grad():
        spliced.stem.weight += 0.25
    report = gs.verify_flip(spliced, model, image())
    assert "'stem.weight' has other values than in the reference" in report.problems


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_can_be_proved(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.fc = nn.Linear(6, 6), kind(6, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            sequence, _ = self.body(self.first(x))
            return self.fc(sequence)

    model = Recurrent()
    report = gs.verify_flip(gs.insert_grl(model, after="body[0]"), model, torch.randn(2, 3, 6))
    assert report.ok
    assert "body.weight_hh_l0" in kinds(report, "flipped")


def test_a_checkpoint_that_runs_again_in_the_backward_pass_leaves_no_gradient_behind():
    class Checkpoints(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.body, self.first(x), use_reentrant=True)

    model = nn.Sequential(Checkpoints(), nn.Linear(6, 2))
    assert gs.verify_flip(gs.insert_grl(model, after="0"), model, vector()).ok
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_gradient_that_threads_sum_in_any_order_is_made_repeatable(mode):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = timm.create_model("mvitv2_tiny", img_size=64)
        spliced = gs.insert_grl(model, after="stages.2[0]")
        assert gs.verify_flip(spliced, model, torch.randn(2, 3, 64, 64), mode=mode).ok
    finally:
        torch.set_num_threads(threads)


def test_a_network_that_makes_tensors_and_counts_in_a_buffer_can_be_proved():
    model = Constants()
    assert gs.verify_flip(gs.insert_grl(model, after="fc"), model, vector()).ok
    assert float(model.calls) == 0


class Parted(nn.Module):
    """Batch norms behind convolutions, joined: what flows back into each is a part of a larger gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(3, 6, 3, padding=1),
                    nn.BatchNorm2d(6),
                    nn.Tanh(),
                    nn.Conv2d(6, 6, 3),
                    nn.BatchNorm2d(6),
                )
                for _ in range(3)
            ]
        )
        self.last = nn.Conv2d(18, 2, 1)

    def forward(self, x):
        return self.last(torch.cat([part(x) for part in self.parts], 1))


def test_a_gradient_that_is_rounded_in_another_order_is_compared_with_hooks_that_are_as_well():
    torch.manual_seed(0)
    model, x = Parted(), torch.randn(4, 3, 15, 15)
    spliced = gs.insert_grl(model, after="parts.1")
    report = gs.verify_flip(spliced, model, (x,))
    assert report.ok, report
    assert "parts.1.0.weight" in kinds(report, "flipped")
