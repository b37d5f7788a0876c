"""Validators: hand-written numbers, closed forms, and pytorch-adapt's implementations where it has one."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import grl_surgery as gs
from grl_surgery.adaptation import validators

LN2 = math.log(2.0)


def domain(count: int, shift: float = 0.0, seed: int = 0) -> Tensor:
    """(count, 3), unit normal around ``shift`` in the first column."""
    features = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return features + torch.tensor([shift, 0.0, 0.0])


# ------------------------------------------------------------------------------------ on predictions alone


def test_entropy_of_probabilities_written_by_hand() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    expected = (1.5 * LN2 + math.log(3.0)) / 2
    assert validators.entropy(p.log()) == pytest.approx(expected, abs=1e-6)


def test_a_class_that_is_ruled_out_adds_nothing() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert validators.entropy(logits) == pytest.approx(LN2)
    assert validators.information(logits) == pytest.approx(0.0, abs=1e-12)


def test_information_written_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]])

    def h(q: float) -> float:
        return -q * math.log(q) - (1 - q) * math.log(1 - q)

    assert validators.information(p.log()) == pytest.approx(h(0.6) - (h(0.9) + h(0.3)) / 2, abs=1e-6)


def test_soft_neighbourhood_density_written_out_with_loops() -> None:
    logits = torch.randn(7, 4)
    p = logits.double().softmax(1).tolist()
    norms = [math.sqrt(sum(x * x for x in row)) for row in p]
    total = 0.0
    for i in range(7):
        others = [j for j in range(7) if j != i]
        cosines = [sum(a * b for a, b in zip(p[i], p[j], strict=True)) / norms[i] / norms[j] for j in others]
        powers = [math.exp(cosine / 0.05) for cosine in cosines]
        total -= sum(x / sum(powers) * math.log(x / sum(powers)) for x in powers)
    assert validators.snd(logits) == pytest.approx(total / 7, rel=1e-9)


def test_soft_neighbourhood_density_is_the_same_in_one_piece_and_in_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.randn(50, 4)
    whole = validators.snd(logits)
    monkeypatch.setattr(validators, "_ROWS_AT_A_TIME", 7)
    assert validators.snd(logits) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("of", [validators.entropy, validators.information, validators.snd])
def test_half_precision_and_gradients_are_taken_as_they_are(of: Callable[[Tensor], float]) -> None:
    logits = (8 * torch.randn(20, 5)).round() / 8  # exact in half precision
    assert of(logits.half().requires_grad_()) == pytest.approx(of(logits), rel=1e-12)


# ------------------------------------------------------------------------------------------ against a peer


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    """pytorch-adapt, which no environment of ours has by default: `make bench` says how it is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("pytorch_adapt.validators", exc_type=ImportError)


def test_predictions_are_judged_as_pytorch_adapt_judges_them(peer: ModuleType) -> None:
    logits = 3 * torch.randn(300, 6, dtype=torch.float64)
    given = {"logits": logits, "preds": logits.softmax(1)}
    theirs = {name: getattr(peer, name)(layer="logits") for name in ("EntropyValidator", "IMValidator")}
    assert validators.entropy(logits) == pytest.approx(-theirs["EntropyValidator"](target_train=given))
    assert validators.information(logits) == pytest.approx(
        theirs["IMValidator"](target_train=given), rel=1e-5
    )
    assert validators.snd(logits) == pytest.approx(peer.SNDValidator()(target_train=given), rel=1e-5)


def test_the_controlled_risk_is_pytorch_adapts(peer: ModuleType) -> None:
    from pytorch_adapt.validators.deep_embedded_validator import get_dev_risk

    losses, weights = torch.rand(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    theirs = get_dev_risk(weights[:, None], losses[:, None], None)
    assert validators.controlled_risk(losses, weights) == pytest.approx(float(theirs), rel=1e-12)


# ----------------------------------------------------------------------------------------- on both domains


def test_importance_weights_are_the_ratio_of_the_densities() -> None:
    # Normal densities with the same variance, 1 apart: p_T / p_S = exp(x - 1/2) in the first column.
    weights = validators.importance_weights(domain(4000), domain(2000, 1.0, seed=1), domain(500, seed=2))
    assert (weights / torch.exp(domain(500, seed=2)[:, 0].double() - 0.5)).log().abs().median() < 0.1
    assert weights.mean().item() == pytest.approx(1.0, abs=0.15)


def test_the_estimated_risk_is_near_the_one_on_the_target() -> None:
    train, held_out, target = domain(2000), domain(2000, seed=1), domain(2000, 0.7, seed=2)
    losses = held_out[:, 0].sigmoid()  # more on the target than on the source
    truth, naive = target[:, 0].sigmoid().mean().item(), losses.mean().item()
    estimated = validators.dev(train, held_out, losses, target)
    assert abs(estimated - truth) < 0.15 * abs(naive - truth)


def test_a_control_variate_takes_noise_away() -> None:
    generator = torch.Generator().manual_seed(0)
    plain, controlled = [], []
    for _ in range(200):
        weights = torch.empty(40).exponential_(generator=generator)
        losses = 1.0 + 0.1 * torch.rand(40, generator=generator)
        plain.append((weights * losses).mean().item())
        controlled.append(validators.controlled_risk(losses, weights))
    assert torch.tensor(controlled).std() < 0.3 * torch.tensor(plain).std()
    assert sum(controlled) / 200 == pytest.approx(1.05, abs=0.02)


def test_the_a_distance_is_a_mean_over_halves() -> None:
    one, other = domain(100), domain(80, 1.0, seed=1)
    each = [gs.proxy_a_distance(one, other, seed=seed) for seed in (3, 4)]
    assert validators.a_distance(one, other, seeds=[3, 4]) == pytest.approx(sum(each) / 2)


def test_nothing_draws_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    validators.dev(domain(50), domain(50, seed=1), torch.ones(50), domain(50, seed=2))
    validators.a_distance(domain(50), domain(50, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------- choosing by a validator


@pytest.mark.parametrize(
    ("validator", "values", "step"),
    [("information", [1.0, 3.0, 2.0], 1), ("entropy", [1.0, 0.5, math.nan], 1), ("lower", [0.0, -1.0], 1)],
)
def test_the_best_step_is_the_one_with_the_better_number(
    validator: str, values: list[float], step: int
) -> None:
    best = validators.Best(validator)
    for place, value in enumerate(values):
        best.update(value, place)
    assert (best.step, best.value, best.stop) == (step, values[step], False)


def test_patience_ends_where_the_last_better_number_is_long_ago_also_after_a_resumption() -> None:
    best = validators.Best("snd", patience=3)
    for step, value in enumerate([1.0, 0.9, math.nan]):
        best.update(value, step)
    resumed = validators.Best("snd", patience=3)
    resumed.load_state_dict(best.state_dict())
    assert not resumed.stop
    assert not resumed.update(0.8, 3)
    assert resumed.stop
    assert resumed.update(2.0, 4)
    assert not resumed.stop


def test_every_validator_says_which_number_is_better_and_is_right_about_it() -> None:
    def head(scale: float) -> Tensor:
        return scale * torch.eye(3).repeat(20, 1)

    better, worse = head(9.0), head(0.3)
    near, far, from_source = domain(90, seed=1), domain(90, 3.0, seed=1), domain(90)
    good: dict[str, tuple[Any, ...]] = {
        "entropy": (better,),
        "information": (better,),
        "snd": (better,),
        "dev": (from_source, from_source, torch.full((90,), 0.1), near),
        "a_distance": (from_source, near),
    }
    bad = {
        **dict.fromkeys(("entropy", "information"), (worse,)),
        "snd": (9.0 * torch.eye(30).repeat(2, 1),),  # as many samples, each with one neighbour
        "dev": (from_source, from_source, torch.full((90,), 0.9), near),
        "a_distance": (from_source, far),
    }
    assert good.keys() == bad.keys() == validators.BETTER.keys()
    for name, arguments in good.items():
        validate = getattr(validators, name)
        sign = 1.0 if validators.BETTER[name] == "higher" else -1.0
        assert sign * validate(*arguments) > sign * validate(*bad[name]), name


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: validators.entropy(torch.zeros(5)), r"logits of shape \(5,\).*\(N, K\)"),
        (lambda: validators.information(torch.zeros(5, 2).long()), "torch.int64.*floating point"),
        (lambda: validators.snd(torch.zeros(2, 3)), "got 2 samples"),
        (lambda: validators.snd(torch.zeros(5, 3), temperature=0.0), "temperature is 0.0"),
        (lambda: validators.entropy(torch.full((2, 2), torch.nan)), "nan or plus infinity"),
        (
            lambda: validators.dev(domain(9), domain(9)[:, :2], torch.zeros(9), domain(9)),
            r"held-out features of shape \(9, 2\)",
        ),
        (lambda: validators.importance_weights(domain(4), domain(9), domain(9)), "at least 5, 5, 1 rows"),
        (lambda: validators.controlled_risk(torch.zeros(3), torch.zeros(4)), "two vectors"),
        (lambda: validators.controlled_risk(torch.zeros(3), -torch.ones(3)), "weights not negative"),
        (lambda: validators.a_distance(domain(9), domain(9), seeds=[]), "seeds is empty"),
        (lambda: validators.Best("sdn"), "no validator 'sdn'"),
        (lambda: validators.Best("snd", patience=0), "patience is 0"),
        (lambda: validators.Best("snd").load_state_dict({"validator": "dev"}), "judged by 'dev'"),
    ],
)
def test_what_cannot_be_judged_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(gs.SurgeryError, match=message):
        call()


def test_a_fresh_process_has_them_by_the_packages_name() -> None:
    code = "import torch, grl_surgery as gs; print(gs.validators.entropy(torch.zeros(2, 2)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(LN2)
