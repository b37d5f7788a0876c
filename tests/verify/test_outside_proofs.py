"""The proof of networks as other people write them."""

from __future__ import annotations

import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import grl_surgery as gs


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(self.b(self.a(x) * (1 + self.draw())))


def a_generator_of(kind):
    if kind == "numpy":
        generator = np.random.default_rng(0)
        return lambda: generator.random()
    if kind == "python":
        generator = random.Random(0)
        return lambda: generator.random()
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.rand((), generator=generator).item()


@pytest.mark.parametrize("kind", ["numpy", "python", "torch"])
def test_a_generator_that_an_enclosing_function_holds_is_repeated_and_put_back(kind):
    draw = a_generator_of(kind)

    class Network(Draws):
        def draw(self):
            return draw()

    network, x = Network(), torch.randn(6, 4)
    spliced = gs.insert_grl(network, "b")
    assert gs.verify_flip(spliced, reference=network, example_inputs=x).ok
    assert draw() == a_generator_of(kind)()


class KeptBias(nn.Module):
    """Computes a bias of attention once, and again after each change of the mode, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.biases = nn.Parameter(torch.zeros(3))
        self.kept = {}

    def train(self, mode=True):
        self.kept = {}
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return x + self.biases.sum()
        if "bias" not in self.kept:
            self.kept["bias"] = self.biases.sum()
        return x + self.kept["bias"]


class KeepsItsBias(Draws):
    def __init__(self) -> None:
        super().__init__()
        self.bias = KeptBias()

    def forward(self, x):
        return self.c(self.bias(self.b(self.a(x))))


@pytest.mark.parametrize("point", ["a", "b"])
def test_what_one_network_has_kept_from_a_call_is_no_difference(point):
    network, x = KeepsItsBias().eval(), torch.randn(6, 4)
    spliced = gs.insert_grl(network, point).eval()
    spliced(x)
    kept = spliced.bias.kept["bias"]
    assert gs.verify_flip(spliced, reference=network, example_inputs=x).ok
    assert spliced.bias.kept["bias"] is kept
    assert not network.bias.kept


def test_another_forward_is_a_difference_also_where_results_are_kept():
    network, x = KeepsItsBias().eval(), torch.randn(6, 4)
    spliced = gs.insert_grl(network, "a").eval()
    network.register_forward_hook(lambda module, args, output: output * 2)
    spliced(x)
    report = gs.verify_flip(spliced, reference=network, example_inputs=x)
    assert not report.ok
    assert not report.forward_identical


def by_a_hook_on_a_value(network):
    def hook(module, args, output):
        if output.requires_grad:
            output.register_hook(torch.neg)

    network.b.register_forward_hook(hook)


def by_a_backward_hook(network):
    network.b.register_full_backward_hook(lambda module, given, arrived: (-given[0],))


def by_a_backward_pre_hook(network):
    network.c.register_full_backward_pre_hook(lambda module, arrived: (-arrived[0],))


def by_hooks_on_parameters(network):
    for parameter in network.a.parameters():
        parameter.register_hook(lambda gradient: -2 * gradient)


@pytest.mark.parametrize(
    "reverse", [by_a_hook_on_a_value, by_a_backward_hook, by_a_backward_pre_hook, by_hooks_on_parameters]
)
@pytest.mark.parametrize("users", [False, True])
def test_what_hooks_reverse_back_is_not_proved(reverse, users):
    plain = nn.Sequential(OrderedDict(a=nn.Linear(4, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3)))
    network = Undrawn() if users else plain
    reverse(network)
    spliced = gs.insert_grl(network, "a")
    report = gs.verify_flip(spliced, reference=network, example_inputs=torch.randn(6, 4))
    assert not report.ok
    assert "NOT PROVED" in report.verdict


class Undrawn(Draws):
    def draw(self):
        return 0


def test_hooks_on_parameters_that_do_not_reverse_are_no_fault():
    network = Undrawn()
    seen = []
    network.a.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    network.a.bias.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    spliced = gs.insert_grl(network, "a")
    assert gs.verify_flip(spliced, reference=network, example_inputs=torch.randn(6, 4)).ok


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(self.a(x).relu())


def gradient_of_first_layer(network, x):
    network.zero_grad(set_to_none=True)
    sum(part.square().sum() for part in network(x).unbind()).backward()
    return network.a.weight.grad


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("point", ["a", "c"])
def test_nested_tensors_are_reversed_and_proved(layout, point):
    rows = [torch.randn(2, 4), torch.randn(5, 4)]
    network, x = Nested(), torch.nested.nested_tensor(rows, layout=layout)
    spliced = gs.insert_grl(network, point)
    expected = -gradient_of_first_layer(network, x)
    assert torch.equal(gradient_of_first_layer(spliced, x), expected)
    assert gs.verify_flip(spliced, reference=network, example_inputs=x).ok
