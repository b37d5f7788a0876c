"""diagnose: where a reversal is alive, lost, frozen or an error, against what is known of it there."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from pasted_variants import IMAGES, VARIANTS, Bare, Layer, Network, ReverseLayerF
from torch import Tensor, nn

import grl_surgery as gs
from grl_surgery.doctor.context_survey import survey
from grl_surgery.doctor.contexts import CONTEXTS, Context, Ready
from grl_surgery.doctor.sandbox import Sandbox


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].neg_()


EAGER = {"eager, train mode": "alive", "eager, eval mode": "alive"}
COPIES = {"autocast to bfloat16": "alive", "checkpointing": "alive", "copy.deepcopy": "alive"}
RECORDED = (
    "torch.fx.symbolic_trace",
    "torchvision feature extractor",
    "torch.export",
    "torch.export, saved and loaded",
)
# As tests/reversal_contexts.py shows for the same form, with gradients known by calculus.
PASTED = {
    **EAGER,
    **dict.fromkeys(RECORDED, "LOST"),
    "torch.compile": "alive",
    "per-sample gradients": "error",
    **COPIES,
}
ALIVE = {**dict.fromkeys(PASTED, "alive")}


@functools.cache
def diagnosis(name: str) -> gs.Diagnosis:
    variant = VARIANTS[name]
    return gs.diagnose(variant.make(), variant.inputs)


def statuses(rows: tuple[object, ...]) -> dict[str, str]:
    return {row.context: row.status for row in rows}


def test_a_pasted_function_is_lost_where_the_network_is_recorded() -> None:
    found = diagnosis("function in a layer")
    assert statuses(found.outcomes) == PASTED
    assert statuses(found.after) == ALIVE
    assert not found.ok
    assert [line.partition(":")[0] for line in found.lost] == list(RECORDED)


def test_it_is_lost_in_the_same_places_where_a_forward_calls_it() -> None:
    found = diagnosis("attribute of the network")
    assert statuses(found.outcomes) == PASTED
    assert statuses(found.after) == ALIVE


def test_a_coefficient_that_a_trace_captures_is_frozen() -> None:
    found = diagnosis("arithmetic")
    assert statuses(found.outcomes) == {**ALIVE, **dict.fromkeys(RECORDED, "frozen")}
    assert statuses(found.after) == ALIVE
    assert found.ok


def test_a_layer_that_reverses_in_training_only_is_off_in_eval_mode() -> None:
    found = diagnosis("only in training")
    assert statuses(found.outcomes) == {**PASTED, "eager, eval mode": "off"}


def test_ours_is_alive_everywhere() -> None:
    model = gs.insert_grl(Network(), before="domain", coeff=0.5)
    found = gs.diagnose(model, IMAGES)
    assert statuses(found.outcomes) == ALIVE
    assert found.ok
    assert found.after == ()


@pytest.mark.parametrize("name", ["backward of a module", "np.float in the forward", "softmax over one unit"])
def test_what_reverses_nothing_is_not_surveyed(name: str) -> None:
    found = diagnosis(name)
    assert (found.outcomes, found.after, found.ok) == ((), (), False)


def test_a_backward_that_overwrites_the_gradient_is_lost_in_the_same_places() -> None:
    found = survey(Network(Bare(InPlace)), IMAGES)
    assert statuses(tuple(found)) == PASTED


def test_a_coefficient_that_starts_at_0_is_alive_once_adopted() -> None:
    found = diagnosis("warm start from zero")
    assert statuses(found.outcomes) == PASTED
    assert statuses(found.after) == ALIVE


@pytest.mark.parametrize("name", ["coefficient 0", "warm start by hand", "features frozen", "reversed twice"])
def test_the_contexts_are_compared_wherever_a_gradient_arrives_on(name: str) -> None:
    assert gs.adopt(VARIANTS[name].make(), VARIANTS[name].inputs).alive_everywhere


@pytest.mark.parametrize("name", ["logits not returned", "softmax over one unit"])
def test_where_no_gradient_arrives_no_context_is_judged_on(name: str) -> None:
    adoption = gs.adopt(VARIANTS[name].make(), VARIANTS[name].inputs)
    assert adoption.outcomes == ()
    assert not adoption.alive_everywhere
    assert "no gradient arrives there" in adoption.verdict


@pytest.mark.parametrize("coeff", [0.0, 0.5])
def test_a_reversal_that_a_context_loses_is_lost_whatever_its_coefficient(coeff: float) -> None:
    found = survey(Network(Layer(ReverseLayerF, coeff)), IMAGES, contexts=CONTEXTS[:1])
    assert found[-1].status == "LOST"


class TrainsOnly(Network):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            raise ValueError("for training only")
        return super().forward(x)


def test_a_network_that_does_not_run_in_eval_mode_is_an_error_there() -> None:
    found = survey(TrainsOnly(Layer()), IMAGES, contexts=[])
    assert (found[-1].status, found[-1].note) == ("error", "ValueError: for training only")


# --- dropout, batch norm, and more than one reversal


class Usual(Network):
    """Dropout and batch statistics, as networks have them."""

    def __init__(self) -> None:
        super().__init__(Layer(ReverseLayerF, 0.5), nn.Sequential(nn.Linear(8, 2), nn.Dropout(0.5)))
        self.features = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))


def test_dropout_and_batch_norm_do_not_disturb_the_comparison() -> None:
    found = survey(Usual(), IMAGES)
    assert statuses(tuple(found)) == PASTED


class Two(Network):
    """One reversal that is pasted, and one that is ours."""

    def __init__(self) -> None:
        super().__init__(Layer(ReverseLayerF, 0.5))
        self.ours = gs.GradientReversal(0.25)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.classifier(self.ours(features)), self.domain(self.reversal(features))


def test_of_two_reversals_the_one_that_is_lost_is_named() -> None:
    found = survey(Two(), IMAGES, contexts=CONTEXTS[:1])
    assert (found[-1].status, found[-1].note) == ("LOST", "only reversal")


# --- contexts that go wrong in known ways


def broken(factor: float) -> Context:
    """A context that multiplies every gradient."""

    def prepare(rig: Sandbox) -> Ready:
        return Ready(rig.network, lambda: {name: factor * g for name, g in rig.gradients().items()})

    return Context("broken", prepare)


@pytest.mark.parametrize(
    ("factor", "status"), [(1.0, "alive"), (0.5, "wrong"), (-1.0, "wrong"), (0.0, "wrong")]
)
def test_a_gradient_that_is_neither_is_wrong(factor: float, status: str) -> None:
    found = survey(Network(Layer(ReverseLayerF, 0.5)), IMAGES, contexts=[broken(factor)])
    assert found[-1].status == status


def test_a_context_that_raises_is_an_error_with_its_message() -> None:
    def prepare(rig: Sandbox) -> Ready:
        raise RuntimeError("no such luck. And more")

    found = survey(Network(Layer()), IMAGES, contexts=[Context("raises", prepare)])
    assert (found[-1].status, found[-1].note) == ("error", "RuntimeError: no such luck")


def test_a_context_without_its_package_is_left_out() -> None:
    context = Context("absent", broken(1.0).prepare, needs="no_such_package")
    assert len(survey(Network(Layer()), IMAGES, contexts=[context])) == 2


# --- what is printed


def test_the_table_names_each_context_once() -> None:
    lines = str(diagnosis("function in a layer")).splitlines()
    assert lines[0] == "LOST  1 reversal alive in eager mode, lost silently in 4 of 11 contexts"
    for context in PASTED:
        assert sum(line.startswith(f"{context}  ") for line in lines) == 1
    assert max(map(len, lines)) <= 100


def test_the_diagnosis_is_plain_data() -> None:
    found = diagnosis("function in a layer").to_dict()
    assert found["ok"] is False
    assert found["findings"][0]["factor"] == -0.5
    assert {row["context"]: row["status"] for row in found["contexts"]} == PASTED


def test_nothing_is_printed_or_warned_meanwhile(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        survey(Network(Layer()), IMAGES, contexts=CONTEXTS[2:3])
    assert capfd.readouterr() == ("", "")


def test_progress_is_told() -> None:
    told: list[str] = []
    survey(Network(Layer()), IMAGES, contexts=CONTEXTS[:1], progress=told.append)
    assert told == ["eager mode", "torch.fx.symbolic_trace"]


# --- in a test suite of one's own


def test_assert_flips_passes_where_every_reversal_is_alive(assert_flips: object) -> None:
    assert_flips(gs.insert_grl(Network(), before="domain"), IMAGES)


def test_assert_flips_says_what_is_lost_and_where() -> None:
    with pytest.raises(gs.FlipError, match=r"lost silently in 4 of 11(.|\n)*- torch\.export: not reversed"):
        diagnosis("function in a layer").raise_if_lost()


def test_assert_flips_fails_without_a_reversal() -> None:
    with pytest.raises(
        gs.FlipError, match="no module, autograd Function or hook in this network reverses a gradient"
    ):
        gs.assert_flips(Network(), IMAGES)


# --- processes


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_a_pasted_function_is_alive_in_two_processes() -> None:
    from grl_surgery.doctor.ddp_context import TWO_PROCESSES

    found = survey(Network(Layer()), IMAGES, contexts=[TWO_PROCESSES])
    assert (found[-1].context, found[-1].status) == ("DistributedDataParallel", "alive")
