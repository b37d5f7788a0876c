"""Surgery inside a network that cannot be traced: every call of what was cut goes through the reversal."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import nn

import grl_surgery as gs
from grl_surgery.sharing import share_copy


class Stage(NamedTuple):
    block: nn.Module
    scale: float


def apply(block, x):
    return block(x)


WAYS = {
    "list": (lambda net: [net.block], lambda way, x: way[0](x)),
    "named tuple": (lambda net: Stage(net.block, 1.0), lambda way, x: way.block(x)),
    "partial": (lambda net: functools.partial(apply, net.block), apply),
    "method": (lambda net: net.block.forward, apply),
    "call": (lambda net: net.block.__call__, apply),
    "closure": (lambda net: lambda x: net.block(x), apply),
    "default": (lambda net: lambda x, block=net.block: block(x), apply),
    "second name": (lambda net: net.block, apply),
    "parent": (lambda net: [net], lambda way, x: way[0].block(x)),
}


class Net(nn.Module):
    """Decides by values, and calls its block by a way of its own."""

    def __init__(self, way="list"):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
        make, self.run = WAYS[way] if isinstance(way, str) else way
        self.way = make(self)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.last(self.run(self.way, self.first(x)))


def gradient(network, x):
    """Of the first layer's weight, upstream of the block."""
    weight = dict(network.named_parameters())["first.weight"]
    return torch.autograd.grad(network(x).sum(), weight)[0]


X = torch.randn(4, 6)


@pytest.mark.parametrize("point", ["block", "block.0"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "method"])
def test_a_block_is_reversed_by_whatever_way_it_is_called(way, point):
    model = Net(way).eval()
    plain = gradient(model, X)
    spliced = gs.insert_grl(model, after=point)
    assert torch.equal(gradient(spliced, X), -plain)
    assert torch.equal(gradient(model, X), plain)
    assert torch.equal(gradient(gs.insert_grl(spliced, after=point), X), plain)
    assert torch.equal(gradient(gs.strip(spliced), X), plain)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "method"])
def test_the_mode_of_the_result_is_its_own_by_whatever_way(way):
    model = Net(way)
    spliced = gs.insert_grl(model, after="block").eval()
    assert torch.equal(spliced(X), spliced(X))
    assert not torch.equal(model(X), model(X))
    stripped = gs.strip(spliced)
    assert not torch.equal(stripped.train()(X), stripped(X))
    assert torch.equal(spliced(X), spliced(X))


def test_a_head_reads_a_block_that_is_called_out_of_a_list():
    model = Net().eval()
    spliced = gs.attach_domain_head(model, after="block", example_inputs=X, hidden=8)
    logits = torch.autograd.grad(spliced(X)[1].sum(), spliced.first.weight, retain_graph=True)
    assert spliced(X)[1].shape == (4, 2)
    assert logits[0].abs().sum() > 0


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "way",
    [
        (lambda net: itertools.cycle([net.block]), lambda way, x: next(way)(x)),
        (lambda net: (Wrapper(net.block),), lambda way, x: way[0](x)),
        WAYS["method"],
    ],
    ids=["iterator", "module that is not registered", "bound forward"],
)
def test_a_way_past_the_reversal_is_refused_by_its_name(way):
    with pytest.raises(gs.TracingError, match="the attribute 'way' leads to 'block'"):
        gs.insert_grl(Net(way), after="block")


def test_modules_that_nobody_registered_are_no_reason_to_refuse():
    model = Net().eval()
    model.__dict__["activations"] = {"relu": nn.ReLU(), "linear": (nn.Linear(6, 6),)}
    plain = gradient(model, X)
    assert torch.equal(gradient(gs.insert_grl(model, after="block"), X), -plain)


@pytest.mark.parametrize("network", [nn.TransformerEncoderLayer(8, 2, 16), nn.MultiheadAttention(8, 2)])
def test_a_layer_whose_weights_are_only_read_is_no_point(network):
    point = "self_attn.out_proj" if hasattr(network, "self_attn") else "out_proj"
    with pytest.raises(gs.PointNotFoundError, match=f"reads the weights of '{point}' and never calls it"):
        gs.insert_grl(network, after=point)
    assert gs.reversals(gs.insert_grl(nn.TransformerEncoderLayer(8, 2, 16), after="self_attn"))


# --------------------------------------------------------------------------------- shapes by running it


class Remembers(nn.Module):
    """Its forward changes a buffer, a tensor that is none, and a parameter; and decides by values."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6, max_norm=0.5)
        self.fc = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.steps = torch.zeros(())

    def forward(self, tokens):
        if tokens.sum() > 1e9:
            return tokens
        out = self.fc(self.embed(tokens))
        self.mean.mul_(0.9).add_(out.detach().mean(0), alpha=0.1)
        self.steps += 1
        return out - self.mean


def test_attaching_a_head_changes_no_tensor_of_the_network():
    model = Remembers()
    before = copy.deepcopy([*model.state_dict().values(), model.steps])
    spliced = gs.attach_domain_head(model, after="fc", example_inputs=torch.arange(4), hidden=8)
    assert all(map(torch.equal, before, [*model.state_dict().values(), model.steps]))
    assert spliced.mean is model.mean
    spliced(torch.arange(4))
    assert model.mean.abs().sum() > 0


# ------------------------------------------------------------------------------------------ wrong names


def test_a_name_that_lies_in_no_module_is_not_found_whatever_can_be_traced():
    model = nn.Sequential(Net())
    with pytest.raises(gs.PointNotFoundError, match=r"no point '0\.blok\.0'.*\n  nearest: 0\.block"):
        gs.insert_grl(model, after="0.blok.0")


def test_an_operation_that_no_graph_shows_says_why_in_one_example():
    with pytest.raises(
        gs.TracingError, match=r"the point 0\.addmm lies inside a forward that cannot"
    ) as caught:
        gs.insert_grl(nn.Sequential(Net()), after="0.addmm")
    assert str(caught.value).count("for example") == 1
    with pytest.raises(gs.PointNotFoundError, match=r"no point '0\.addmm' in this network"):
        gs.insert_grl(nn.Sequential(Net()), after="0.addmm", example_inputs=X)


class Doubled(nn.Module):
    """Decides by values, and uses one value twice in one operation."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)

    def forward(self, x):
        h = self.first(x)
        return torch.sub(h, h * 1.0) if x.sum() > 1e9 else torch.add(h, h)


@pytest.mark.parametrize("argument", ["0", "1"])
def test_an_edge_that_names_one_of_two_equal_arguments_reverses_that_one(argument):
    model = Doubled()
    edge = gs.Edge("first", "add", argument)
    spliced = gs.insert_grl(model, edge=edge, example_inputs=X)
    assert not gradient(spliced, X).any()  # plus once and minus once


class Sums(nn.Module):
    """Decides by values, and adds twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        h = self.first(x) + x
        return self.second(h) + h


@pytest.mark.parametrize(("point", "signs"), [("add#1", (-1, 1)), ("add#2", (-1, -1))])
def test_operations_of_one_name_are_told_apart_by_their_order(point, signs):
    model = Sums()
    spliced = gs.insert_grl(model, after=point, example_inputs=X)
    for layer, sign in zip(("first", "second"), signs, strict=True):
        plain, found = (
            torch.autograd.grad(net(X).sum(), net.get_submodule(layer).weight)[0] for net in (model, spliced)
        )
        assert torch.equal(found, sign * plain), layer


class Scaled(nn.Module):
    """A residual block that does not trace alone, but does when it is called with one argument."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x, scale=None):
        return x + self.fc(x if scale is None else x * scale)


class Iterates(nn.Module):
    """Decides by values, and calls its blocks one by one."""

    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Linear(6, 6), nn.Sequential(Scaled(), Scaled())

    def forward(self, x):
        x = self.first(x) if x.sum() > -1e9 else x
        for block in self.blocks:
            x = block(x)
        return x


def test_a_cut_inside_a_container_whose_items_are_called_one_by_one_is_not_passed_by():
    model = Iterates()
    spliced = gs.insert_grl(model, after="blocks.0.add", example_inputs=X)
    assert torch.equal(gradient(spliced, X), -gradient(model, X))


def test_a_copy_that_is_called_inside_a_call_of_the_network_has_a_record_of_its_own():
    m = gs.attach_domain_head(Net().eval(), after="first", example_inputs=X, hidden=8).eval()
    twin = share_copy(m)
    expected = m(X)[1]
    m.block.register_forward_hook(lambda *_: twin(X) and None)
    assert torch.equal(m(X)[1], expected)


def test_the_logits_are_added_to_a_copy_of_what_the_network_returns():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.said = nn.Linear(6, 2), {}

        def forward(self, x):
            self.said["out"] = self.fc(x)
            return self.said

    m = gs.attach_domain_head(Keeps(), after="fc", example_inputs=X, hidden=8)
    assert set(m(X)) == {"out", "domain_logits"}
    assert set(m.said) == {"out"}


# --------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("part", ["", "block", "block.0"])
@pytest.mark.parametrize("verb", [gs.insert_grl, functools.partial(gs.attach_domain_head, example_inputs=X)])
def test_a_network_that_is_compiled_in_place_is_refused(verb, part):
    model = Net()
    model.get_submodule(part).compile(backend="eager")
    with pytest.raises(
        gs.SurgeryError, match=f"old graph: {part or 'the root'}; splice first, compile after"
    ):
        verb(model, after="block")


def test_a_result_that_is_compiled_can_be_read_verified_and_stripped():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 3))
    spliced = gs.insert_grl(model, after="1.0")
    spliced.compile(backend="eager")
    weight = model[0].weight
    plain, found = (torch.autograd.grad(m(X).sum(), weight)[0] for m in (model, spliced))
    assert torch.equal(found, -plain)
    assert gs.verify_flip(spliced, model, X).ok
    assert list(gs.reversals(spliced)) == ["grl_1_0"]
    assert torch.equal(torch.autograd.grad(gs.strip(spliced)(X).sum(), weight)[0], plain)
    with pytest.raises(gs.SurgeryError, match="splice first, compile afterwards"):
        gs.insert_grl(spliced, after="0")
