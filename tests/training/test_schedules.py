"""Schedules against formulas written out here, and the object that applies them to a network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from grl_surgery.errors import PointNotFoundError, SurgeryError
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.training.schedules import (
    CoefficientScheduler,
    Schedule,
    check_progress,
    constant,
    dann,
    delayed,
    dual_ascent,
    linear,
    warm_start,
)

progress = st.floats(0.0, 1.0)
coefficient = st.floats(0.0, 10.0)

EVERY_SCHEDULE = [
    constant(0.3),
    linear(0.1, 0.7),
    linear(0.7, 0.0),
    dann(),
    dann(0.1, 0.5, gamma=3.0),
    warm_start(),
    warm_start(alpha=2.0, max_iters=50, lo=0.1, hi=0.3),
    delayed(0.25, dann()),
    delayed(0.3, warm_start(max_iters=7), before=0.05),
    delayed(0.5, delayed(0.5, linear(0.2, 0.4))),
]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), GradientReversal(), nn.Linear(4, 2))


def two_heads() -> nn.ModuleDict:
    heads = {name: nn.ModuleDict({"reversal": GradientReversal()}) for name in ("shallow", "deep")}
    return nn.ModuleDict({"backbone": nn.Linear(4, 4), **heads})


def coefficients(scheduler: CoefficientScheduler) -> list[float]:
    return [reversal.coeff.item() for reversal in scheduler.reversals.values()]


# ------------------------------------------------------------------------------------------- the formulas


@given(p=progress, lo=coefficient, hi=coefficient, gamma=st.floats(0.1, 50.0))
def test_dann_is_the_formula_of_the_paper_within_rounding(
    p: float, lo: float, hi: float, gamma: float
) -> None:
    # tanh(x / 2) is the same function as 2 / (1 + exp(-x)) - 1, by another route.
    expected = lo + (hi - lo) * math.tanh(gamma * p / 2)
    assert dann(lo, hi, gamma)(p) == pytest.approx(expected, abs=1e-12)


def test_dann_has_the_defaults_of_the_paper() -> None:
    for p in np.linspace(0.0, 1.0, 11):
        assert dann()(float(p)) == pytest.approx(2.0 / (1.0 + np.exp(-10.0 * p)) - 1.0, abs=1e-15)


@given(
    i=st.integers(0, 20_000),
    alpha=st.floats(0.1, 20.0),
    max_iters=st.integers(1, 5_000),
    lo=st.floats(0.0, 1.0),
    hi=st.floats(0.0, 2.0),
)
def test_warm_start_is_the_transfer_learning_librarys_at_every_iteration(
    i: int, alpha: float, max_iters: int, lo: float, hi: float
) -> None:
    theirs = 2.0 * (hi - lo) / (1.0 + np.exp(-alpha * i / max_iters)) - (hi - lo) + lo
    ours = warm_start(alpha, max_iters, lo, hi).at_step(i, total_steps=20_000)
    assert ours == pytest.approx(float(theirs), abs=1e-12)


def test_a_driven_warm_start_counts_iterations_beyond_max_iters_and_not_progress() -> None:
    model = network()
    scheduler = CoefficientScheduler(model, warm_start(alpha=1.0, max_iters=10), total_steps=40)
    for i in range(41):
        theirs = 2.0 / (1.0 + np.exp(-1.0 * i / 10)) - 1.0
        assert scheduler.coeff == pytest.approx(float(theirs), abs=1e-12)
        if i < 40:
            scheduler.step()


def test_warm_start_called_with_progress_takes_the_end_for_max_iters() -> None:
    schedule = warm_start(alpha=1.0, max_iters=1000)
    assert schedule(1.0) == schedule.at_step(1000, 5000)
    assert schedule(1.0) == pytest.approx(math.tanh(0.5), abs=1e-12)


@given(p=progress, lo=coefficient, hi=coefficient)
def test_linear_is_the_straight_line_through_both_ends(p: float, lo: float, hi: float) -> None:
    assert linear(lo, hi)(p) == pytest.approx(np.interp(p, [0.0, 1.0], [lo, hi]), abs=1e-12)
    assert linear(lo, hi)(0.0) == lo
    assert linear(lo, hi)(1.0) == hi


@given(p=progress, value=coefficient)
def test_constant_is_constant(p: float, value: float) -> None:
    assert constant(value)(p) == value


@given(p=progress, p0=st.floats(0.0, 0.99), before=coefficient)
def test_delayed_waits_and_then_runs_through_all_of_the_inner_schedule(
    p: float, p0: float, before: float
) -> None:
    expected = before if p < p0 else linear(0.2, 0.8)(np.clip((p - p0) / (1 - p0), 0.0, 1.0))
    assert delayed(p0, linear(0.2, 0.8), before=before)(p) == pytest.approx(expected, abs=1e-12)


def test_a_delayed_warm_start_counts_its_iterations_from_the_end_of_the_delay() -> None:
    schedule = delayed(0.25, warm_start(max_iters=10))
    assert [schedule.at_step(step, 40) for step in (0, 9)] == [0.0, 0.0]
    for step in range(10, 41):
        assert schedule.at_step(step, 40) == warm_start(max_iters=10).at_step(step - 10, 40)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=repr)
def test_no_schedule_leaves_the_non_negative_numbers(schedule: Schedule) -> None:
    values = [schedule(p) for p in np.linspace(0.0, 1.0, 101)]
    assert all(isinstance(value, float) and 0.0 <= value <= 1.0 for value in values)


@given(lo=coefficient, hi=coefficient, gamma=st.floats(1e-3, 1e4), p=progress)
@example(lo=0.1, hi=0.1, gamma=1.0, p=0.18)  # (1 - p) lo + p lo is 0.10000000000000002 here
def test_rounding_never_leaves_the_interval_between_both_ends(
    lo: float, hi: float, gamma: float, p: float
) -> None:
    for schedule in (dann(lo, hi, gamma), warm_start(gamma, 1000, lo, hi), linear(lo, hi)):
        assert min(lo, hi) <= schedule(p) <= max(lo, hi)


def test_linear_arrives_exactly_where_the_obvious_formula_does_not() -> None:
    lo, hi = 9.0, 0.4274950401684602
    assert lo + (hi - lo) * 1.0 != hi
    assert linear(lo, hi)(1.0) == hi


# ------------------------------------------------------------------------------------ schedules as values


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=repr)
def test_the_repr_shows_the_call_and_the_coefficient_at_start_middle_and_end(schedule: Schedule) -> None:
    call, _, comment = repr(schedule).partition("  # ")
    assert eval(call) == schedule  # the factories are in this module's globals
    for p, label in ((0.0, "p=0,"), (0.5, "p=1/2,"), (1.0, "p=1")):
        assert f"{schedule(p):.4g} at {label}" in comment


def test_the_repr_reads_as_documented() -> None:
    expected = "dann(lo=0.0, hi=1.0, gamma=10.0)  # coefficient 0 at p=0, 0.9866 at p=1/2, 0.9999 at p=1"
    assert repr(dann()) == expected


def test_a_schedule_cannot_be_changed_and_equals_its_like() -> None:
    schedule = dann()
    with pytest.raises(FrozenInstanceError, match="gamma"):
        schedule.gamma = 5.0
    assert schedule == dann()
    assert schedule != dann(gamma=9.0)


@pytest.mark.parametrize("p", [-0.01, 1.01, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("schedule", [constant(1.0), dann(), delayed(0.5, dann()), warm_start()])
def test_progress_outside_its_range_is_refused_with_its_value(schedule: Schedule, p: float) -> None:
    with pytest.raises(SurgeryError, match=rf"training progress is {p!r}, which is outside \[0, 1\]"):
        schedule(p)


@pytest.mark.parametrize("p", [None, "half", [0.5]])
def test_progress_that_is_no_number_is_refused(p: object) -> None:
    with pytest.raises(SurgeryError, match=r"must be a number in \[0, 1\], not"):
        check_progress(p)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constant(-1.0), "value is -1.0, but must be a non-negative finite number"),
        (lambda: constant(math.nan), "value is nan"),
        (lambda: linear(0.0, math.inf), "hi is inf"),
        (lambda: dann(lo=-0.1), "lo is -0.1"),
        (lambda: dann(gamma=0.0), "gamma is 0.0, but must be a positive finite number"),
        (lambda: warm_start(max_iters=0), "max_iters is 0, but must be a positive"),
        (lambda: warm_start(alpha="1"), "alpha is '1'"),
        (lambda: delayed(1.0, dann()), "the inner schedule would never begin"),
        (lambda: delayed(1.5, dann()), "training progress is 1.5"),
        (lambda: delayed(0.5, 0.3), "0.3 is not a schedule"),
        (lambda: delayed(0.5, dann(), before=-1.0), "before is -1.0"),
    ],
)
def test_an_impossible_schedule_is_refused_with_the_value(make: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        make()


# ------------------------------------------------------------------------------------------- the scheduler


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=repr)
def test_the_scheduler_sets_step_zero_at_once_and_then_every_step(schedule: Schedule) -> None:
    model = network()
    scheduler = CoefficientScheduler(model, schedule, total_steps=8)
    for step in range(9):
        expected = schedule.at_step(step, 8)
        assert scheduler.steps_done == step
        assert scheduler.coeff == expected
        assert model[1].coeff.item() == torch.tensor(expected, dtype=torch.float32).item()
        if step < 8:
            scheduler.step()


def test_at_step_k_of_n_the_coefficient_is_that_of_progress_k_over_n() -> None:
    scheduler = CoefficientScheduler(network(), dann(), total_steps=10)
    for step in range(1, 11):
        scheduler.step()
        assert scheduler.coeff == dann()(step / 10)


def test_a_plain_function_of_progress_is_a_schedule_too() -> None:
    model = network()
    scheduler = CoefficientScheduler(model, lambda p: p * p, total_steps=2)
    scheduler.step()
    assert model[1].coeff.item() == 0.25


def test_neither_forward_nor_eval_nor_backward_steps() -> None:
    model = network()
    scheduler = CoefficientScheduler(model, linear(0.5, 1.0), total_steps=4)
    for mode in (True, False):
        model.train(mode)
        model(torch.randn(2, 4)).sum().backward()
    assert model[1].coeff.item() == 0.5
    assert scheduler.steps_done == 0


def test_every_reversal_of_a_model_is_driven_by_default() -> None:
    model = two_heads()
    scheduler = CoefficientScheduler(model, linear(0.0, 1.0), total_steps=2)
    scheduler.step()
    assert list(scheduler.reversals) == ["shallow.reversal", "deep.reversal"]
    assert coefficients(scheduler) == [0.5, 0.5]


@pytest.mark.parametrize("only", ["deep", "deep.reversal", ["deep"]])
def test_a_named_reversal_is_driven_and_no_other(only: str | list[str]) -> None:
    model = two_heads()
    scheduler = CoefficientScheduler(model, constant(0.25), total_steps=2, only=only)
    assert list(scheduler.reversals) == ["deep.reversal"]
    assert model["deep"]["reversal"].coeff.item() == 0.25
    assert model["shallow"]["reversal"].coeff.item() == 1.0


def test_two_schedulers_can_drive_two_heads_of_one_model() -> None:
    model = two_heads()
    slow = CoefficientScheduler(model, linear(0.0, 0.5), total_steps=2, only="shallow")
    fast = CoefficientScheduler(model, linear(0.0, 1.0), total_steps=2, only="deep")
    slow.step()
    fast.step()
    assert coefficients(slow) + coefficients(fast) == [0.25, 0.5]


def test_a_single_reversal_or_a_mapping_of_names_can_be_driven() -> None:
    reversal = GradientReversal()
    CoefficientScheduler(reversal, constant(0.5), total_steps=1)
    assert reversal.coeff.item() == 0.5
    named = CoefficientScheduler({"layer3": reversal}, constant(0.25), total_steps=1, only="layer3")
    assert coefficients(named) == [0.25]


def test_a_wrapped_model_is_driven_like_its_inside() -> None:
    model = nn.ModuleDict({"module": two_heads()})
    scheduler = CoefficientScheduler(model, constant(0.5), total_steps=1)
    assert coefficients(scheduler) == [0.5, 0.5]


def test_stepping_past_the_end_warns_once_and_changes_nothing() -> None:
    model = network()
    scheduler = CoefficientScheduler(model, linear(0.0, 0.5), total_steps=3)
    for _ in range(3):
        scheduler.step()
    with pytest.warns(UserWarning, match="ends after 3 steps, and all of them were made"):
        scheduler.step()
    scheduler.step()  # in these tests a second warning would be an error
    assert model[1].coeff.item() == 0.5
    assert scheduler.steps_done == 3


@pytest.mark.parametrize("total", [0, -1, 2.5, True, "10"])
def test_an_impossible_number_of_steps_is_refused(total: object) -> None:
    with pytest.raises(SurgeryError, match=r"total_steps is .* but must be a whole number of at least 1"):
        CoefficientScheduler(network(), dann(), total_steps=total)


def test_a_model_without_reversals_is_refused() -> None:
    with pytest.raises(SurgeryError, match="no GradientReversal in this Linear"):
        CoefficientScheduler(nn.Linear(2, 2), dann(), total_steps=10)
    with pytest.raises(SurgeryError, match="expected a network or its reversals, got Tensor"):
        CoefficientScheduler(torch.ones(1), dann(), total_steps=10)


def test_an_unknown_name_is_refused_with_near_ones() -> None:
    with pytest.raises(
        PointNotFoundError, match=r"(?s)no reversal 'shalow.reversal'.*nearest: shallow.reversal"
    ):
        CoefficientScheduler(two_heads(), dann(), total_steps=10, only="shalow.reversal")
    with pytest.raises(SurgeryError, match=r"only=\[\] names no reversal"):
        CoefficientScheduler(two_heads(), dann(), total_steps=10, only=[])


def test_a_number_is_not_taken_for_a_schedule() -> None:
    with pytest.raises(SurgeryError, match=r"0\.3 is not a schedule, a function of the progress"):
        CoefficientScheduler(network(), 0.3, total_steps=10)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "1"])
def test_an_impossible_coefficient_of_a_users_schedule_changes_nothing(bad: object) -> None:
    model = two_heads()
    scheduler = CoefficientScheduler(
        model,
        lambda p: 0.5 if p == 0 else bad,
        total_steps=2,
    )
    with pytest.raises(SurgeryError, match="the schedule's value at step 1 of 2 is"):
        scheduler.step()
    assert coefficients(scheduler) == [0.5, 0.5]
    assert scheduler.steps_done == 0


def test_the_repr_of_a_scheduler_says_where_it_is_and_what_it_drives() -> None:
    scheduler = CoefficientScheduler(two_heads(), linear(0.0, 1.0), total_steps=4, only="deep")
    scheduler.step()
    assert repr(scheduler).startswith(
        "CoefficientScheduler(step 1 of 4, coeff 0.25, drives deep.reversal)\n  linear(lo=0.0, hi=1.0)"
    )


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=repr)
@pytest.mark.parametrize("interrupted_at", [0, 3, 8])
def test_a_resumed_run_has_exactly_the_coefficients_of_an_uninterrupted_one(
    schedule: Schedule, interrupted_at: int
) -> None:
    def run(scheduler: CoefficientScheduler, steps: int) -> list[float]:
        made = []
        for _ in range(steps):
            made += coefficients(scheduler)
            scheduler.step()
        return made + coefficients(scheduler)

    whole = run(CoefficientScheduler(network(), schedule, total_steps=8), 8)
    first = CoefficientScheduler(network(), schedule, total_steps=8)
    before = run(first, interrupted_at)
    state = json.loads(json.dumps(first.state_dict()))
    second = CoefficientScheduler(network(), schedule, total_steps=8)
    second.load_state_dict(state)
    assert second.coeff == first.coeff
    assert before[:-1] + run(second, 8 - interrupted_at) == whole


def test_the_state_survives_a_safe_torch_checkpoint(tmp_path: object) -> None:
    scheduler = CoefficientScheduler(network(), delayed(0.2, dann()), total_steps=5)
    scheduler.step()
    torch.save(scheduler.state_dict(), f"{tmp_path}/state.pt")
    assert torch.load(f"{tmp_path}/state.pt", weights_only=True) == scheduler.state_dict()


@dataclass(frozen=True)
class Square(Schedule):
    top: float = 1.0

    def at(self, p: float) -> float:
        return self.top * p * p


def own_schedule(p: float) -> float:
    return p


def other_schedule(p: float) -> float:
    return p


@pytest.mark.parametrize(
    ("saved", "present", "message"),
    [
        (dann(), linear(), "schedule is 'dann' in the checkpoint and 'linear' here"),
        (dann(gamma=10.0), dann(gamma=5.0), "schedule.gamma is 10.0 in the checkpoint and 5.0 here"),
        (dann(hi=0.3), dann(hi=0.1, lo=0.05), r"schedule.lo is 0.0 .*; schedule.hi is 0.3 .* and 0.1 here"),
        (delayed(0.1, dann()), delayed(0.1, linear()), "schedule.inner is 'dann' .* and 'linear' here"),
        (delayed(0.1, dann()), delayed(0.2, dann()), "schedule.p0 is 0.1 .* and 0.2 here"),
        (own_schedule, other_schedule, "own_schedule' in the checkpoint and .*other_schedule' here"),
        (Square(1.0), Square(2.0), "schedule.top is 1.0 .* and 2.0 here"),
    ],
)
def test_a_checkpoint_of_another_schedule_is_refused_with_the_difference(
    saved: Schedule, present: Schedule, message: str
) -> None:
    model = network()
    old = CoefficientScheduler(network(), saved, total_steps=10)
    for _ in range(4):
        old.step()
    new = CoefficientScheduler(model, present, total_steps=10)
    new.step()
    before = (new.steps_done, new.coeff, model[1].coeff.item())
    with pytest.raises(SurgeryError, match=message):
        new.load_state_dict(old.state_dict())
    assert (new.steps_done, new.coeff, model[1].coeff.item()) == before


def test_a_checkpoint_of_another_length_is_refused() -> None:
    state = CoefficientScheduler(network(), dann(), total_steps=10).state_dict()
    with pytest.raises(SurgeryError, match="total_steps is 10 in the checkpoint and 20 here"):
        CoefficientScheduler(network(), dann(), total_steps=20).load_state_dict(state)


@pytest.mark.parametrize("steps_done", [-1, 11, 2.5, None])
def test_a_damaged_checkpoint_is_refused(steps_done: object) -> None:
    scheduler = CoefficientScheduler(network(), dann(), total_steps=10)
    state = {**scheduler.state_dict(), "steps_done": steps_done}
    with pytest.raises(SurgeryError, match="the checkpoint is damaged: steps_done is"):
        scheduler.load_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"step": 3}, None])
def test_a_state_of_something_else_is_refused(state: object) -> None:
    scheduler = CoefficientScheduler(network(), dann(), total_steps=10)
    with pytest.raises(SurgeryError, match="not the state of a CoefficientScheduler"):
        scheduler.load_state_dict(state)


# ------------------------------------------------------------------------------ a coefficient that learns


def test_dual_ascent_follows_the_loss_by_its_formula_and_stays_within_its_bounds() -> None:
    layer = GradientReversal()
    scheduler = CoefficientScheduler(layer, dual_ascent(0.7, rate=0.5, start=0.1, hi=0.4), total_steps=10)
    expected = 0.1
    for loss in (0.5, 0.3, 0.1, 0.1, 0.9, 2.5, 0.6):
        assert layer.coeff.item() == pytest.approx(expected)
        scheduler.step(torch.tensor(loss, requires_grad=True))
        expected = min(max(expected + 0.5 * (0.7 - loss), 0.0), 0.4)
    assert scheduler.coeff == pytest.approx(expected)
    assert not list(layer.parameters())


def test_a_run_of_dual_ascent_is_resumed_with_its_coefficient() -> None:
    losses = [0.1 * n for n in range(10)]
    whole = CoefficientScheduler(GradientReversal(), dual_ascent(0.5, rate=0.3), total_steps=10)
    first = CoefficientScheduler(GradientReversal(), dual_ascent(0.5, rate=0.3), total_steps=10)
    for loss in losses[:4]:
        whole.step(loss)
        first.step(loss)
    resumed = CoefficientScheduler(GradientReversal(), dual_ascent(0.5, rate=0.3), total_steps=10)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for loss in losses[4:]:
        whole.step(loss)
        resumed.step(loss)
    assert resumed.coeff == whole.coeff
    assert resumed.state_dict() == whole.state_dict()


def test_a_loss_is_asked_for_and_refused_as_the_schedule_says() -> None:
    learns = CoefficientScheduler(GradientReversal(), dual_ascent(0.69), total_steps=10)
    with pytest.raises(SurgeryError, match=r"needs the domain loss\n.*step\(domain_loss"):
        learns.step()
    with pytest.raises(SurgeryError, match="the domain loss is nan"):
        learns.step(float("nan"))
    assert learns.steps_done == 0
    with pytest.raises(SurgeryError, match="dann does not read the domain loss"):
        CoefficientScheduler(GradientReversal(), dann(), total_steps=10).step(0.3)
    with pytest.raises(SurgeryError, match="no progress to delay"):
        delayed(0.5, dual_ascent(0.69))
    with pytest.raises(SurgeryError, match="depends on the domain loss"):
        dual_ascent(0.69)(0.5)
    with pytest.raises(SurgeryError, match="beyond hi"):
        dual_ascent(0.69, start=2.0)


def test_with_dual_ascent_the_domain_loss_settles_at_its_target() -> None:
    def last_losses(schedule: Callable[[float], float]) -> float:
        torch.manual_seed(0)
        domains = torch.arange(200) % 2
        x = torch.randn(200, 6) + 2.0 * domains[:, None]
        model = nn.Sequential(nn.Linear(6, 4), GradientReversal(), nn.Linear(4, 2))
        scheduler = CoefficientScheduler(model, schedule, total_steps=600)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(600):
            loss = nn.functional.cross_entropy(model(x), domains)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(*[loss] * (scheduler.schedule is not fixed))
            losses.append(loss.item())
        return sum(losses[-100:]) / 100

    fixed = constant(0.0)
    assert last_losses(fixed) < 0.2
    assert last_losses(dual_ascent(0.6, rate=0.05, hi=5.0)) == pytest.approx(0.6, abs=0.1)
