"""Surgery inside a network that cannot be traced: every call of what was cut goes through the reversal."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from oracles import assert_same_gradients, gradients, names, reversed_at
from small_networks import Net as Plain
from small_networks import image, vector
from torch import nn

import grl_surgery as gs
from grl_surgery.isolation.shared_copy import share_copy


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
    with pytest.raises(gs.SurgeryError, match=f"old code: {part or 'the root'}; splice first, compile after"):
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


# ------------------------------------------------------------------ forwards that go through their children


class Chain(nn.Module):
    """Calls all its children, and weighs all its parameters; not to be traced."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, scale=None):
        if scale is not None:
            x = x * scale
        for child in self.children():
            x = child(x)
        return x, sum(parameter.square().sum() for parameter in self.parameters())


class Listed(nn.Sequential):
    """A container with a forward of its own, like the feature networks of timm."""

    def forward(self, x):
        found = []
        for child in self:
            x = child(x[0] if isinstance(x, tuple) else x)
            found.append(x)
        return found


@pytest.mark.parametrize("make", [Chain, lambda: Listed(nn.Linear(6, 6), nn.Linear(6, 6))])
def test_a_forward_that_goes_through_its_children_does_not_come_past_what_was_spliced_in(make):
    model, x = make(), vector()
    path = next(iter(dict(model.named_children())))
    spliced = gs.insert_grl(model, after=path)
    assert type(spliced) is type(model)
    assert_same_gradients(gradients(spliced, x), reversed_at(model, path, x))
    with_head = gs.attach_domain_head(spliced, after=path, example_inputs=x)
    outputs, logits = with_head(x)
    assert logits.shape == (len(x), 2)
    assert all(map(torch.equal, outputs, model(x)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_a_copy_of_such_a_network_hides_what_was_spliced_in_as_well(copied):
    model, x = Chain(), vector()
    spliced = gs.attach_domain_head(gs.insert_grl(model, after="first"), after="second", example_inputs=x)
    spliced.eval()  # a head draws random numbers in training
    twin = copied(spliced)
    assert list(twin.state_dict()) == list(spliced.state_dict())
    outputs, logits = twin(x)
    assert all(map(torch.equal, (*outputs, logits), (*spliced(x)[0], spliced(x)[1])))
    assert list(gs.strip(twin).state_dict()) == list(model.state_dict())


def test_an_item_that_a_value_does_not_have_is_refused_where_inputs_are_known():
    for name in ("stage1[0]", "stage1[nonsense]"):
        with pytest.raises(gs.ShapeError, match=r"a Tensor, has no item \[(0|nonsense)\]"):
            gs.insert_grl(Plain(), after=name, example_inputs=image())


class Overwrites(nn.Module):
    """Holds a value beside a flat view of it, and overwrites one of the two; not to be traced."""

    def __init__(self, overwritten):
        super().__init__()
        self.first, self.flat, self.last = nn.Linear(6, 6), nn.Flatten(), nn.Linear(6, 2)
        self.overwritten = overwritten

    def forward(self, x, scale=None):
        whole = self.first(x if scale is None else x * scale)
        flat = self.flat(whole)
        if self.overwritten == "flat":
            flat.mul_(3.0)
        if self.overwritten == "whole":
            whole.mul_(3.0)
        return self.last(whole) + self.last(flat)


@pytest.mark.parametrize("where", [{"after": "flat"}, {"before": "flat"}, {"edge": ("first", "flat")}])
@pytest.mark.parametrize("overwritten", ["flat", "whole"])
def test_a_value_that_is_overwritten_past_its_reversal_is_refused(where, overwritten):
    spliced = gs.insert_grl(Overwrites(overwritten), **where)
    with pytest.raises(gs.SurgeryError, match="overwritten in place"):
        spliced(vector())
    with torch.no_grad():
        assert torch.equal(spliced(vector()), gs.strip(spliced)(vector()))


@pytest.mark.parametrize("path", ["first", "flat"])
def test_a_value_that_nobody_overwrites_is_reversed_beside_the_value_it_is_a_view_of(path):
    model, x = Overwrites("nothing"), vector()
    assert_same_gradients(gradients(gs.insert_grl(model, after=path), x), reversed_at(model, path, x))


def test_a_reversed_value_that_is_overwritten_and_held_by_nobody_else_stays_reversed():
    model, x = Overwrites("whole"), vector()
    assert_same_gradients(gradients(gs.insert_grl(model, after="first"), x), reversed_at(model, "first", x))


class Arithmetic(nn.Module):
    """Counts with sizes and with tensors, by operators and by methods, in place and not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        h = self.linear(x)
        rows = x.shape[0] * 2
        h = h.view(rows // 2, 6) * 2.0
        total = h + 1
        total += h
        total = total.add_(h) / 3
        total /= 2
        return -(total - h) * rows


class Around(nn.Module):
    """Has a block, and cannot be traced itself."""

    def __init__(self):
        super().__init__()
        self.block = Arithmetic()

    def forward(self, x, scale=None):
        return self.block(x if scale is None else x * scale)


def test_an_operation_has_the_same_name_in_a_trace_and_in_a_run():
    traced = [name for name in names(Arithmetic()) if "size_" not in name]
    run = [node.name for node in gs.graph(Around(), depth=None, example_inputs=vector()).nodes]
    of_block = [name.removeprefix("block.") for name in run if name.startswith("block.")]
    operations = ("add", "mul", "sub", "truediv", "neg", "view", "linear")
    assert [n for n in traced if n.startswith(operations)] == [
        n for n in of_block if n.startswith(operations)
    ]


@pytest.mark.parametrize("name", ["mul#1", "add#1", "truediv#1", "sub", "neg", "mul#2"])
def test_a_name_out_of_a_run_cuts_at_that_operation_where_the_block_is_traced(name):
    x = vector()
    inside, around = gs.insert_grl(Arithmetic(), after=name), gs.insert_grl(Around(), after=f"block.{name}")
    expected = {f"block.{key}": value for key, value in gradients(inside, x).items()}
    assert_same_gradients(gradients(around, x), expected)


class Passes(nn.Module):
    """Adds to a value what its last layer makes of it; the value leaves two modules at once."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.last = nn.Linear(6, 6)

    def forward(self, x, scale=None):
        h = self.block(x if scale is None else x * scale)
        return self.last(h) + h


def test_an_edge_that_begins_inside_a_reversed_module_goes_on_behind_that_reversal():
    model, x = Passes(), vector()
    spliced = gs.insert_grl(gs.insert_grl(model, after="block"), edge=("block.1", "add"), example_inputs=x)
    model.zero_grad()
    h = model.block(x)
    flipped = h.detach().requires_grad_()
    twice = h.detach().requires_grad_()
    generator = torch.Generator().manual_seed(7)
    ((model.last(flipped) + twice) * torch.randn(4, 6, generator=generator)).sum().backward()
    h.backward(-flipped.grad + twice.grad)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_same_gradients(gradients(spliced, x), expected)


# ------------------------------------------------------------------- what a trace cannot see, and a run can


class _MayReturnNone(nn.Module):
    def __init__(self, is_last: bool) -> None:
        super().__init__()
        self.linear, self.is_last = nn.Linear(4, 4), is_last

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        y = self.linear(x).tanh()
        return None if self.is_last else y, y


class _Sums(nn.Module):
    """For a trace every item is something; a run knows that the last layer returns None."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_MayReturnNone(False), _MayReturnNone(True)])
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: Any = 0.0
        for layer in self.layers:
            residual, skip = layer(x)
            if residual is not None:
                x = x + residual
            total = total + skip
        return self.out(total)


class _AroundSums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.sums = nn.Linear(4, 4), _Sums()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = -x if x.sum() > 1e9 else x
        return self.sums(self.first(x))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_operation_is_cut_where_a_run_goes_and_a_trace_goes_elsewhere(place: int) -> None:
    torch.manual_seed(0)
    model, x = _AroundSums(), torch.randn(2, 4)
    spliced = gs.insert_grl(model, after=f"sums.add#{place + 1}", example_inputs=x)
    found = torch.autograd.grad(spliced(x).sum(), list(spliced.parameters()))

    layers, out = model.sums.layers, model.sums.out  # the same by hand, with the reversal in one place
    sums: list[torch.Tensor] = []

    def added(one: Any, other: torch.Tensor) -> torch.Tensor:
        value = one + other
        sums.append(value)
        return 2 * value.detach() - value if len(sums) == place + 1 else value

    y = model.first(x)
    residual, skip = layers[0](y)
    y = added(y, residual)
    total = added(0.0, skip)
    total = added(total, layers[1](y)[1])
    wanted = torch.autograd.grad(out(total).sum(), list(model.parameters()))
    assert all(torch.allclose(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_head_reads_an_item_by_another_key_than_the_forward_around_it_uses() -> None:
    class Output(dict[str, torch.Tensor]):
        def __getitem__(self, key: Any) -> torch.Tensor:
            return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)

    @dataclass
    class Result:
        task: torch.Tensor

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> Output:
            return Output(state=self.linear(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.out = Encoder(), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> Result:
            return Result(task=self.out(self.encoder(x)[0]))

    x, model = torch.randn(3, 4), Net()
    m = gs.attach_domain_head(model, "encoder[state]", num_domains=2, dropout=0.0, example_inputs=x)
    output = m(x)
    assert torch.equal(output.task, model(x).task)
    head = m.get_submodule("domain")
    assert torch.equal(output.domain_logits, head(model.encoder(x)["state"]))
