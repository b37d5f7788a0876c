"""The doctor on the reversals that other libraries publish; each test is skipped without its library."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pasted_variants import IMAGES, Network
from torch import Tensor, nn

import grl_surgery as gs
from grl_surgery.doctor.adopt import adopt_unsurveyed
from grl_surgery.doctor.context_survey import survey
from grl_surgery.doctor.contexts import CONTEXTS

# What these libraries warn of themselves is theirs.
pytestmark = pytest.mark.filterwarnings("default")


def pytorch_adapt(coeff: float) -> nn.Module:
    return Network(pytest.importorskip("pytorch_adapt.layers", exc_type=ImportError).GradientReversal(coeff))


def pytorch_revgrad(coeff: float) -> nn.Module:
    return Network(pytest.importorskip("pytorch_revgrad").RevGrad(coeff))


def torch_gradient_reversal(coeff: float) -> nn.Module:
    return Network(pytest.importorskip("gradient_reversal").GradientReversalLayer(coeff))


class CallsTheOperator(Network):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        reverse = pytest.importorskip("gradient_reversal").gradient_reversal
        return self.classifier(features), self.domain(reverse(features, 0.5))


def torch_gradient_reversal_function(coeff: float) -> nn.Module:
    pytest.importorskip("gradient_reversal")
    return CallsTheOperator()


def skada(coeff: float) -> nn.Module:
    modules = pytest.importorskip("skada.deep.modules")
    return Network(nn.Identity(), modules.DomainClassifier(8, 2, alpha=coeff))


RECORDED = ("torch.fx.symbolic_trace", "torchvision feature extractor")
EXPORTED = ("torch.export", "torch.export, saved and loaded")

# From the library's reversal to where it is found, its coefficient, and what it is where it is not alive.
PEERS: dict[Any, tuple[str, str | None, dict[str, str]]] = {
    pytorch_adapt: (
        "reversal",
        "reversal.weight",
        dict.fromkeys(RECORDED, "error") | dict.fromkeys(EXPORTED, "LOST"),
    ),
    pytorch_revgrad: ("reversal", "reversal._alpha", dict.fromkeys((*RECORDED, *EXPORTED), "LOST")),
    torch_gradient_reversal: (
        "reversal",
        "reversal.alpha",
        dict.fromkeys(RECORDED, "frozen") | dict.fromkeys(EXPORTED, "error"),
    ),
    torch_gradient_reversal_function: ("", None, {}),
    skada: ("domain", "domain.alpha", dict.fromkeys((*RECORDED, *EXPORTED), "LOST")),
}


@pytest.mark.parametrize("make", PEERS, ids=lambda make: make.__name__)
def test_it_is_found_with_its_coefficient(make: Any) -> None:
    path, coeff_from, _ = PEERS[make]
    (row,) = gs.find_reversals(make(0.5), IMAGES)
    assert (row.verdict, row.factor, row.path, row.coeff_from) == ("reverses", -0.5, path, coeff_from)


@pytest.mark.parametrize("make", PEERS, ids=lambda make: make.__name__)
def test_it_is_lost_where_it_is_known_to_be_and_nowhere_once_adopted(make: Any) -> None:
    contexts = [context for context in CONTEXTS if context.name != "torch.compile"]  # alive, and slow to show
    before = survey(make(0.5), IMAGES, contexts=contexts)
    after = survey(adopt_unsurveyed(make(0.5), IMAGES).model, IMAGES, contexts=contexts)
    unhealthy = {row.context: row.status for row in before if row.status != "alive"}
    assert unhealthy == {**PEERS[make][2], "per-sample gradients": "error"}
    # skada's head squeezes its output, so that one sample has no batch dimension left.
    expected = {"per-sample gradients": "error"} if make is skada else {}
    assert {row.context: row.status for row in after if row.status != "alive"} == expected


@pytest.mark.parametrize("make", PEERS, ids=lambda make: make.__name__)
def test_adopted_it_has_the_same_gradients_and_keys(make: Any) -> None:
    model = make(0.5)
    adoption = adopt_unsurveyed(model, IMAGES)
    assert adoption.difference == 0.0
    assert adoption.model.state_dict().keys() == model.state_dict().keys()
    adoption.model.load_state_dict(copy.deepcopy(model.state_dict()))
    before, after = (gradients(network) for network in (model, adoption.model))
    assert all(torch.equal(before[name], after[name]) for name in before)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    classes, domains = model(IMAGES)
    model.zero_grad()
    (classes.square().sum() + domains.exp().sum()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_its_own_way_to_change_the_coefficient_still_works() -> None:
    adopted = adopt_unsurveyed(pytorch_revgrad(0.5), IMAGES).model
    adopted.reversal._alpha = torch.tensor(0.25)
    assert float(adopted.reversal.coeff) == 0.25
    adopted = adopt_unsurveyed(torch_gradient_reversal(0.5), IMAGES).model
    adopted.reversal.alpha.fill_(0.25)
    assert float(adopted.reversal.coeff) == 0.25


def test_the_default_domain_classifier_of_skada_passes_no_gradient() -> None:
    """One unit and a softmax: its output is 1 whatever comes in."""
    modules = pytest.importorskip("skada.deep.modules")
    (row,) = gs.find_reversals(Network(nn.Identity(), modules.DomainClassifier(8)), IMAGES)
    assert row.verdict == "no gradient"
    assert "it ends at SoftmaxBackward0 in domain.classifier.4" in row.note
