"""verify_flip: what it proves, what it refuses to prove on nothing, and that it leaves no trace."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import timm
import torch
from small_networks import Constants, InPlace, Modes, Net, Shared, Tuples, Untraceable, image, vector
from torch import nn

import grl_surgery as gs
from grl_surgery.verify.compare import difference, snapshot
from grl_surgery.verify.report import FlipReport, ParameterFlip, ReversalFlip
from grl_surgery.verify.verify_flip import _Verification


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


class Adversarial(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.label, self.domain = (nn.Linear(6, 6) for _ in range(3))
        self.grl = gs.GradientReversal(0.5)

    def forward(self, x):
        x = torch.tanh(self.features(x))
        return self.label(x), self.domain(self.grl(x))


def test_a_reversal_that_the_user_wrote_into_the_network_is_proved_against_hooks():
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
    assert len(kinds(report, "flipped")) == 2
    assert kinds(report, "no signal") == ["0.bias"]  # what the network reads is the value in its cache
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


def test_one_forward_and_one_backward_of_each_network_are_all_it_takes(monkeypatch):
    model, calls = timm.create_model("test_resnet"), 0
    forward = nn.Conv2d.forward

    def counted(layer, x):
        nonlocal calls  # a list would be put back
        calls += layer.in_channels == 3
        return forward(layer, x)

    spliced = gs.insert_grl(model, after="layer2")
    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    gs.verify_flip(spliced, model, torch.randn(2, 3, 32, 32)).raise_if_failed()
    assert calls == 2


def test_code_of_the_users_is_run_once_more_to_see_what_reverses_back():
    model, calls = Net(), []
    model.stem.register_forward_hook(lambda *args: calls.append("forward"))
    gs.verify_flip(gs.insert_grl(model, after="stage1"), model, image()).raise_if_failed()
    assert len(calls) == 3


def test_the_reference_must_be_the_same_network():
    with pytest.raises(gs.SurgeryError, match=r"another network: the model has no parameter 'body.weight'"):
        gs.verify_flip(gs.insert_grl(Net(), after="stem"), Modes(), image())


def test_without_inputs_it_says_what_to_pass():
    with pytest.raises(gs.SurgeryError, match=r"it is not known what inputs Net takes\n.*example_inputs="):
        gs.verify_flip(gs.insert_grl(Net(), after="stem"))


# ------------------------------------------------------------------- a forward that writes into parameters


class Writes(nn.Module):
    """A momentum encoder, or a layer that keeps its weights small: a way to write into `k`."""

    def __init__(self, way):
        super().__init__()
        self.q, self.k, self.way = nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False), way

    def forward(self, x):
        q, k = self.q.weight, self.k.weight
        with torch.no_grad():
            if self.way == "in place":
                k.mul_(0.9).add_(q, alpha=0.1)
            elif self.way == "by way of its data":
                k.data.clamp_(-0.1, 0.1)
            elif self.way == "with new data":
                k.data = k.data * 0.9 + q.data * 0.1
            elif self.way == "unread":
                k.mul_(0.5)
            elif self.way == "and fails":
                k.zero_()
                raise RuntimeError("too far")
        return self.q(x) if self.way in ("unread", "not at all") else self.q(x) * torch.tanh(self.k(x))


@pytest.mark.parametrize("way", ["in place", "by way of its data", "with new data"])
def test_what_a_forward_writes_into_parameters_is_seen_by_every_run_and_by_nobody_else(way):
    model = nn.Sequential(nn.Linear(6, 6), Writes(way), nn.Linear(6, 2))
    spliced = gs.insert_grl(model, after="0")
    before, memory = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    gs.verify_flip(spliced, model, vector()).raise_if_failed()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == memory


def test_a_forward_that_writes_and_then_fails_leaves_the_parameters_alone():
    model = nn.Sequential(nn.Linear(6, 6), Writes("and fails"), nn.Linear(6, 2))
    before = model[1].k.weight.clone()
    with pytest.raises(gs.SurgeryError, match="Sequential itself fails on these example inputs: too far"):
        gs.verify_flip(gs.insert_grl(model, after="0"), model, vector())
    assert torch.equal(model[1].k.weight, before)


def test_an_embedding_that_keeps_its_norm_is_as_it_was():
    model = nn.Sequential(nn.Embedding(10, 6, max_norm=0.5), nn.Linear(6, 2))
    before = model[0].weight.clone()
    gs.verify_flip(gs.insert_grl(model, after="0"), model, torch.arange(4)).raise_if_failed()
    assert torch.equal(model[0].weight, before)


def test_a_network_that_does_not_write_what_the_reference_writes_is_rejected():
    model = nn.Sequential(nn.Linear(6, 6), Writes("unread"), nn.Linear(6, 2))
    spliced = gs.insert_grl(model, after="0")
    assert gs.verify_flip(spliced, model, vector()).ok
    spliced.get_submodule("1").way = "not at all"
    assert gs.verify_flip(spliced, model, vector()).failures == [
        "the forward differs from the reference: it leaves other values in the parameter '1.k.weight'"
    ]


def test_what_else_a_forward_changes_is_put_back():
    class Keeps(nn.Module):
        cache: ClassVar = {}

        def __init__(self):
            super().__init__()
            self.mean, self.calls = torch.zeros(6), []
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, x):
            self.mean.add_(x.detach().mean(0))
            self.calls.append(len(self.cache))
            self.cache[len(self.cache)] = self.mean
            return x * self.mean + torch.randn(6, generator=self.generator)

    model = nn.Sequential(nn.Linear(6, 6), Keeps(), nn.Linear(6, 2))
    state = model[1].generator.get_state()
    gs.verify_flip(gs.insert_grl(model, after="0"), model, vector()).raise_if_failed()
    assert (model[1].mean.tolist(), model[1].calls, Keeps.cache) == ([0.0] * 6, [], {})
    assert torch.equal(model[1].generator.get_state(), state)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is:FutureWarning")
def test_a_scripted_part_keeps_its_own_tensors_and_its_mode():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))
    model = nn.Sequential(nn.Linear(6, 6), scripted, nn.Linear(6, 2))
    gs.verify_flip(gs.insert_grl(model, after="0"), model, vector(), mode="eval").raise_if_failed()
    assert model[1].training
    gs.verify_flip(gs.insert_grl(model, after="0"), model, vector()).raise_if_failed()
    assert int(model[1][1].num_batches_tracked) == 0
    model(vector()).sum().backward()
    assert model[1][0].weight.grad is not None


# ------------------------------------------------------------------------- what comes out, all but the bits


class Pair(NamedTuple):
    logits: torch.Tensor
    count: int


@dataclass
class Outcome:
    logits: torch.Tensor
    count: int


class Found:
    def __init__(self, logits, count):
        self.logits, self.count = logits, count


class Returns(nn.Module):
    """What becomes of the logits is told from outside."""

    def __init__(self, make, layers=None):
        super().__init__()
        self.make = make
        self.first, self.fc = layers or (nn.Linear(6, 6), nn.Linear(6, 2))

    def forward(self, x):
        return self.make(self.fc(self.first(x)))


def verified(makes, wanted):
    """A network that makes one thing of its logits, beside a reference that makes another."""
    model = Returns(makes)
    reference = Returns(wanted, (model.first, model.fc))
    return gs.verify_flip(gs.insert_grl(model, after="first"), reference, vector())


SAME = [
    lambda y: y,
    lambda y: (y, None, 3, "a", float("nan"), [True, -0.0], y.shape),
    lambda y: {"a": y, 1: [y, {"b": y.float()}]},
    lambda y: OrderedDict(a=y),
    lambda y: Pair(y, 1),
    lambda y: Outcome(y, 1),
    lambda y: Found(y, 1),
    lambda y: [Found([y, y], float("nan"))],
]


@pytest.mark.parametrize("make", SAME)
def test_every_kind_of_output_can_be_proved(make):
    report = verified(make, make).raise_if_failed()
    assert kinds(report, "flipped") == ["first.weight", "first.bias"]


@pytest.mark.parametrize(
    ("makes", "wanted", "said"),
    [
        (lambda y: (y, None), lambda y: y, r"output is tuple\(2\), and Tensor\(4x2, float32, cpu\)"),
        (lambda y: [y], lambda y: (y,), r"output is list\(1\), and tuple\(1\)"),
        (lambda y: (y, None), lambda y: (y, 0), r"output\[1\] is None, and 0"),
        (lambda y: (y, 3), lambda y: (y, 3.0), r"output\[1\] is 3, and 3\.0"),
        (lambda y: (y, True), lambda y: (y, 1), r"output\[1\] is True, and 1"),
        (lambda y: (y, 0.0), lambda y: (y, -0.0), r"output\[1\] is 0\.0, and -0\.0"),
        (lambda y: (y, "b"), lambda y: (y, "a"), r"output\[1\] is 'b', and 'a'"),
        (lambda y: {"b": y}, lambda y: {"a": y}, r"output is dict\('b'\), and dict\('a'\)"),
        (lambda y: {"a": y}, lambda y: OrderedDict(a=y), r"output is dict\('a'\), and OrderedDict\('a'\)"),
        (lambda y: Pair(y, 1), lambda y: (y, 1), r"output is Pair\(2\), and tuple\(2\)"),
        (
            lambda y: Found(y, 1),
            lambda y: Outcome(y, 1),
            r"output is Found\('logits', 'count'\), and Outcome",
        ),
        (lambda y: [Found(y, 1)], lambda y: [Found(y, 2)], r"output\[0\]\.count is 1, and 2"),
        (lambda y: (y, y > 0), lambda y: (y, (y > 0).int()), r"output\[1\] is Tensor\(4x2, bool, cpu\), and"),
        (lambda y: y.view(8), lambda y: y, r"output is Tensor\(8, float32, cpu\), and Tensor\(4x2"),
        (lambda y: {"a": y + 1}, lambda y: {"a": y}, r"output\['a'\] has other values than"),
        (lambda y: (y, np.zeros(2)), lambda y: (y, np.ones(2)), r"output\[1\] has other values than"),
    ],
)
def test_an_output_of_another_structure_is_rejected_and_said_where(makes, wanted, said):
    report = verified(makes, wanted)
    assert not report.forward_identical
    with pytest.raises(
        gs.FlipError, match=f"the forward differs from the reference: {said}.* in the reference"
    ):
        report.raise_if_failed()
    assert report.difference in " ".join(str(report).split())


def test_with_a_head_it_is_still_the_output_that_is_compared():
    model = Returns(lambda y: {"a": y, "n": 1})
    spliced = gs.attach_domain_head(model, after="first", example_inputs=vector())
    assert gs.verify_flip(spliced, model, vector()).ok
    other = Returns(lambda y: {"a": y, "n": 2}, (model.first, model.fc))
    assert gs.verify_flip(spliced, other, vector()).difference == "output['n'] is 1, and 2 in the reference"


def test_a_spliced_network_that_fails_where_the_reference_runs_is_said_to():
    with pytest.raises(gs.FlipError, match="the spliced network fails where Returns runs: RuntimeError: "):
        verified(lambda y: y.view(5), lambda y: y)


# ------------------------------------------------------------------ what the next call of a forward may read


class Counts(nn.Module):
    """Grows with every call, in Python."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * min(1.0, self.calls / 10)


class Frozen(nn.Module):
    """The same in its first call."""

    def forward(self, x):
        return x * 0.1


def test_a_count_in_python_is_proved_where_it_goes_on():
    model = nn.Sequential(nn.Linear(6, 6), Counts(), nn.Linear(6, 2))
    gs.verify_flip(gs.insert_grl(model, after="0"), model, vector()).raise_if_failed()
    assert model[1].calls == 0


def test_a_count_in_python_that_stands_still_is_rejected():
    model = nn.Sequential(nn.Linear(6, 6), Counts(), nn.Linear(6, 2))
    spliced = gs.insert_grl(nn.Sequential(model[0], Frozen(), model[2]), after="0")
    report = gs.verify_flip(spliced, model, vector())
    assert report.difference == "in a second call, output has other values than in the reference"
    assert all(row.ok for row in report.parameters)


# ------------------------------------------------------------ compiled, sparse, of less than double precision


def test_a_network_that_was_compiled_in_place_is_proved_and_stays_compiled():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    spliced = gs.insert_grl(model, after="1")
    for network in (spliced, model):
        network.compile(backend="eager")
        network(vector())
    calls = spliced._compiled_call_impl, model._compiled_call_impl
    gs.verify_flip(spliced, model, vector()).raise_if_failed()
    assert (spliced._compiled_call_impl, model._compiled_call_impl) == calls
    assert None not in calls


def test_sparse_gradients_are_compared_by_what_they_add_up_to():
    model = nn.Sequential(nn.Embedding(10, 6, sparse=True), nn.Linear(6, 2))
    report = gs.verify_flip(gs.insert_grl(model, after="0"), model, torch.tensor([3, 1, 3]))
    assert report.raise_if_failed()
    assert kinds(report, "flipped") == ["0.weight"]


GLOBAL = torch.ones(6)


class Mixed(nn.Module):
    """Two paths meet, one of them reversed, and something on the way asks for float32."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.first, self.body, self.fc = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return torch.tanh(self.body(self.way(self.first(x)))) + self.fc(self.first(x))


def in_double(way):
    """What the verifier runs in float64 where gradients differ in their last bits."""
    model = Mixed(way)
    spliced = gs.insert_grl(model, after="body")
    return _Verification(spliced, model, vector(), None, 0)


@pytest.mark.parametrize(
    "way",
    [
        lambda x: x + torch.ones(6, dtype=torch.float32),
        lambda x: x * torch.ones(6),
        lambda x: x.float(),
        lambda x: x.half().float(),
        lambda x: x.to(torch.float32),
        lambda x: x.to("cpu", torch.float32),
        lambda x: nn.functional.softmax(x, -1, dtype=torch.float32),
        lambda x: torch.cat([x, torch.zeros(4, 6, dtype=torch.float32)])[:4],
    ],
)
def test_a_forward_that_asks_for_single_precision_runs_in_double(way):
    rows = dict.fromkeys(("first.weight", "body.weight", "fc.bias"), "values")
    oracle, spliced = in_double(way).in_double({"output": rows})
    assert {gradient.dtype for gradient in spliced.gradients["output"].values()} == {torch.float64}
    for name, gradient in oracle.gradients["output"].items():
        torch.testing.assert_close(spliced.gradients["output"][name], gradient, rtol=1e-12, atol=0)
    assert torch.get_default_dtype() == torch.float32
    assert torch.ones(2).float().dtype == torch.float32


def test_where_float64_is_needed_and_fails_the_report_says_so():
    model = Mixed(lambda x: x.type("torch.FloatTensor"))
    spliced = gs.insert_grl(model, after="body")
    spliced.body.register_full_backward_hook(lambda module, inner, outer: (inner[0] * (1 + 1e-6),))
    report = gs.verify_flip(spliced, model, vector())
    assert {row.name for row in report.parameters if not row.ok} == {"first.weight", "first.bias"}
    with pytest.raises(gs.FlipError, match=r"what tensor hooks .* give; float64, .*, fails: .*same dtype"):
        report.raise_if_failed()


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


# ---------------------------------------------------------------------------------- reversals that cancel


def two_layers():
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))


def in_the_network(first, second):
    return nn.Sequential(nn.Linear(6, 8), first, second, nn.Linear(8, 2))


def spliced_twice():
    return gs.insert_grl(gs.insert_grl(two_layers(), after="0"), before="1")


ONE = gs.GradientReversal()


@pytest.mark.parametrize(
    "network",
    [in_the_network(gs.GradientReversal(), gs.GradientReversal()), in_the_network(ONE, ONE), spliced_twice()],
    ids=["two layers", "one layer twice", "spliced twice"],
)
def test_reversals_that_cancel_are_no_proof(network):
    report = gs.verify_flip(network, example_inputs=torch.randn(4, 6))
    assert not report.ok
    assert "reversals that follow one another cancel" in str(report)


def test_three_reversals_in_a_row_are_one():
    network = in_the_network(
        nn.Sequential(gs.GradientReversal(), gs.GradientReversal()), gs.GradientReversal()
    )
    assert gs.verify_flip(network, example_inputs=torch.randn(4, 6)).ok


# ----------------------------------------------------------------------------- reversals that reverse nothing


def verdict_on(network, reference=None):
    report = gs.verify_flip(network, reference, torch.randn(4, 6))
    return report.problems, [row.note for row in report.reversals]


class Cuts(nn.Module):
    """Its reversal is not where gradients pass, or has nothing to reverse."""

    def __init__(self, way):
        super().__init__()
        self.first, self.grl, self.fc, self.way = nn.Linear(6, 6), gs.GradientReversal(), nn.Linear(6, 2), way

    def forward(self, x):
        if self.way == "no grad":
            with torch.no_grad():
                return self.fc(self.grl(self.first(x)))
        if self.way == "detached before":
            return self.fc(self.grl(self.first(x).detach()))
        if self.way == "detached behind":
            return self.fc(self.grl(self.first(x)).detach())
        if self.way == "without parameters":
            return self.fc(self.first(x) + self.grl(x.requires_grad_()))
        if self.way == "times zero":
            return self.fc(self.grl(self.first(x) * 0))
        return self.fc(self.first(x))  # another path


@pytest.mark.parametrize("way", ["detached before", "detached behind", "without parameters", "another path"])
def test_a_reversal_that_no_gradient_reaches_is_named_with_the_likely_reasons(way):
    (problem,), notes = verdict_on(Cuts(way))
    assert problem.startswith("no gradient reaches grl: ")
    assert all(reason in problem for reason in ("no_grad", "detach", "path", "no parameter"))
    assert notes == ["no gradient reaches it"]


@pytest.mark.parametrize("way", ["no grad", "times zero"])
def test_a_single_reversal_does_not_cancel(way):
    (problem,), _ = verdict_on(Cuts(way))
    assert problem == "no parameter upstream of a reversal receives a gradient, so nothing is proved"


def test_reversals_that_cancel_are_told_from_one_that_no_gradient_reaches():
    class Both(Cuts):
        def __init__(self):
            super().__init__("another path")
            self.more = nn.Sequential(gs.GradientReversal(), gs.GradientReversal())

        def forward(self, x):
            return self.more(super().forward(x))

    (problem,), notes = verdict_on(Both())
    assert problem == "no parameter's gradient is reversed: reversals that follow one another cancel"
    assert sorted(notes) == ["", "", "no gradient reaches it"]


@pytest.mark.parametrize("coeff", [-1.0, -0.5, float("inf"), float("nan")])
def test_a_coefficient_that_is_none_is_named(coeff):
    spliced = gs.insert_grl(two_layers(), after="0")
    spliced.get_submodule("grl_0").coeff.fill_(coeff)
    report = gs.verify_flip(spliced, example_inputs=torch.randn(4, 6))
    assert not kinds(report, "flipped")
    assert report.failures[0] == (
        f"reversal grl_0 (after 0): its coefficient is {coeff:g}; it must be finite and not negative"
    )


@pytest.mark.parametrize("coeff", [0.0, 0.3, 1e30])
def test_every_other_coefficient_can_be_proved(coeff):
    model = two_layers()
    assert gs.verify_flip(gs.insert_grl(model, after="0", coeff=coeff), model, torch.randn(4, 6)).ok


@pytest.mark.parametrize("network", [gs.insert_grl(two_layers(), after="0"), Adversarial()])
def test_nothing_is_flipped_while_reversals_are_disabled(network):
    x = torch.randn(4, 6)
    with gs.reversal_disabled(network):
        report = gs.verify_flip(network, example_inputs=x)
    assert [row.note for row in report.reversals] == ["it is disabled at the moment, by reversal_disabled"]
    assert not kinds(report, "flipped") + kinds(report, "mixed")
    assert gs.verify_flip(network, example_inputs=x).ok


# -------------------------------------------------------------------------- tensors of a class of their own


class Marked(torch.Tensor):
    """Every operation gives another one, by way of a view that autograd records."""


class Marks(nn.Module):
    def forward(self, x):
        return x.as_subclass(Marked)


@pytest.mark.parametrize("coeff", [1.0, 0.3])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_subclass_of_tensor_can_be_what_goes_in(coeff, requires_grad):
    model, x = two_layers(), torch.randn(4, 6).as_subclass(Marked).requires_grad_(requires_grad)
    gs.verify_flip(gs.insert_grl(model, after="0", coeff=coeff), model, x).raise_if_failed()


def test_a_subclass_of_tensor_can_be_made_on_the_way():
    model = nn.Sequential(nn.Linear(6, 6), Marks(), nn.Tanh(), nn.Linear(6, 2))
    for point in "012":
        gs.verify_flip(gs.insert_grl(model, after=point), model, torch.randn(4, 6)).raise_if_failed()


def test_with_a_subclass_of_tensor_a_sign_that_is_kept_is_seen():
    class KeepsTheSign(gs.GradientReversal):
        def forward(self, x):
            return x * 1.0

    model = two_layers()
    spliced = gs.insert_grl(model, after="0")
    spliced.grl_0 = KeepsTheSign()
    report = gs.verify_flip(spliced, model, torch.randn(4, 6).as_subclass(Marked))
    assert "it is 1 times as large" in report.reversals[0].note


def test_a_reversal_can_be_called_by_keyword():
    class ByKeyword(Adversarial):
        def forward(self, x):
            x = torch.tanh(self.features(x))
            return self.label(x), self.domain(self.grl(x=x))

    gs.verify_flip(ByKeyword(), example_inputs=vector()).raise_if_failed()


# -------------------------------------------------------------------------------- references with reversals


def inner():
    return gs.insert_grl(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), after="0")


@pytest.mark.parametrize("after", ["0", "1", "2"])
def test_what_was_spliced_before_can_be_the_reference(after):
    big = nn.Sequential(nn.Linear(6, 6), inner(), nn.Linear(6, 2))
    spliced = gs.insert_grl(big, after=after)
    reports = [gs.verify_flip(spliced, reference, vector()) for reference in (None, big, spliced)]
    assert reports[0].ok
    assert reports[0] == reports[1] == reports[2]


def test_a_network_with_a_head_can_be_the_reference():
    model = two_layers()
    first = gs.attach_domain_head(model, after="0", example_inputs=torch.randn(4, 6))
    second = gs.insert_grl(first, after="1")
    report = gs.verify_flip(second, first, torch.randn(4, 6)).raise_if_failed()
    assert report.network == "Sequential"


def test_a_spliced_reference_must_still_be_the_same_network():
    with pytest.raises(gs.SurgeryError, match="another network: the model has no parameter"):
        gs.verify_flip(gs.insert_grl(Net(), after="stem"), inner(), image())


# --------------------------------------------------------------------------------------- a process of its own


def test_printing_a_report_for_the_first_time_draws_no_random_number():
    program = """
import random, sys
from grl_surgery.verify.compare import difference, snapshot
from grl_surgery.verify.report import FlipReport
assert "rich.style" not in sys.modules
state = random.getstate()
str(FlipReport((), (), True, "train"))
assert "rich.style" in sys.modules
assert random.getstate() == state
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_outputs_of_two_classes_of_one_name_differ():
    first, second = (namedtuple("Pair", "logits count") for _ in range(2))
    assert difference(snapshot(first(1, 2)), snapshot(first(1, 2))) == ""
    assert difference(snapshot(first(1, 2)), snapshot(second(1, 2))).startswith(
        "output is Pair(2), and Pair(2)"
    )
