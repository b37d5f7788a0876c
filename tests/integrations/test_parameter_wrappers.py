"""Libraries that wrap a network's layers: adapters, fake quantisation, gradients of each sample."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import grl_surgery as gs

# What these libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

INPUTS = torch.linspace(-1, 1, 20).reshape(5, 4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = OrderedDict(body=nn.Linear(4, 8), act=nn.Tanh(), mid=nn.Linear(8, 8), fc=nn.Linear(8, 3))
    return nn.Sequential(layers)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(INPUTS).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def with_adapters(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["body", "fc"], r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def test_adapters_of_a_spliced_network_get_the_reversed_gradient() -> None:
    plain, spliced = with_adapters(network()), with_adapters(gs.insert_grl(network(), after="act", coeff=0.5))
    expected, found = gradients(plain), gradients(spliced)
    assert found.keys() == expected.keys()
    assert len(expected) == 4
    for name, gradient in found.items():
        factor = -0.5 if ".body." in name else 1.0
        assert torch.equal(gradient, factor * expected[name]), name
    assert list(gs.reversals(spliced)) == ["base_model.model.grl_act"]


@pytest.mark.parametrize("after", ["act", "body"])
def test_a_network_with_adapters_is_cut_like_any_other(after: str) -> None:
    adapted = with_adapters(network())
    expected = gradients(adapted)
    spliced = gs.insert_grl(adapted, after=f"base_model.model.{after}", coeff=0.5)
    found = gradients(spliced)
    assert type(spliced) is type(adapted)
    assert torch.equal(spliced(INPUTS), adapted(INPUTS))
    for name, gradient in found.items():
        factor = -0.5 if ".body." in name else 1.0
        assert torch.equal(gradient, factor * expected[name]), name
    assert gs.verify_flip(spliced, adapted, example_inputs=INPUTS).ok


def test_a_head_on_a_network_with_adapters_trains_the_adapters_against_it() -> None:
    adapted = with_adapters(network())
    words = {"hidden": 8, "dropout": 0.0, "example_inputs": INPUTS}
    headed = gs.attach_domain_head(adapted, after="base_model.model.act", **words)
    adapter = headed.get_parameter("base_model.model.body.lora_A.default.weight")
    loss = gs.domain_loss(headed(INPUTS)[1], torch.tensor([0, 1, 0, 1, 0]))
    (reversed_gradient,) = torch.autograd.grad(loss, adapter)
    with gs.reversal_disabled(headed):
        loss = gs.domain_loss(headed(INPUTS)[1], torch.tensor([0, 1, 0, 1, 0]))
        (gradient,) = torch.autograd.grad(loss, adapter)
    assert gradient.any()
    assert torch.equal(reversed_gradient, -gradient)


def prepared_for_quantisation(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    qat = pytest.importorskip("torchao.quantization.qat")
    base = quantization.IntxWeightOnlyConfig(torch.int8)
    quantization.quantize_(model, qat.QATConfig(base, step="prepare"))
    return model


def test_quantisation_aware_training_keeps_the_reversal_whichever_comes_first() -> None:
    plain = prepared_for_quantisation(network())
    assert type(plain.body) is not nn.Linear
    spliced_first = prepared_for_quantisation(gs.insert_grl(network(), after="act", coeff=0.5))
    spliced_last = gs.insert_grl(prepared_for_quantisation(network()), after="act", coeff=0.5)
    expected = gradients(plain)
    for found in (gradients(spliced_first), gradients(spliced_last)):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert torch.equal(gradient, (-0.5 if "body" in name else 1.0) * expected[name]), name


def test_gradients_of_each_sample_are_reversed_in_a_spliced_network() -> None:
    opacus = pytest.importorskip("opacus")
    plain, spliced = (
        opacus.GradSampleModule(model, loss_reduction="sum")
        for model in (network(), gs.insert_grl(network(), after="act", coeff=0.5))
    )
    gradients(plain), gradients(spliced)
    expected = {name: p.grad_sample for name, p in plain.named_parameters()}
    for name, parameter in spliced.named_parameters():
        assert parameter.grad_sample.shape == (5, *parameter.shape)
        assert torch.equal(parameter.grad_sample, (-0.5 if "body" in name else 1.0) * expected[name]), name
