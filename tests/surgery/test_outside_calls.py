"""Networks as other people write them: what one module leaves for another, and every call of the result."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections import OrderedDict, deque

import pytest
import torch
from torch import nn

import grl_surgery as gs


class Kept(nn.Module):
    """A network whose activation keeps something, and whose forward reads what was kept."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.c = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)
        self.kept: list[torch.Tensor] = []

    def forward(self, x):
        return self.c(self.r(self.a(x))) + self.read()


class KeepsInAttribute(nn.Module):
    def forward(self, x):
        self.last = x.detach().mean()
        return x.relu()


class ChildAttribute(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.r = KeepsInAttribute()

    def read(self):
        return getattr(self.r, "last", 0.0)


class KeepsIn(nn.Module):
    def __init__(self, place) -> None:
        super().__init__()
        self.place = place

    def forward(self, x):
        self.keep(x.detach().mean())
        return x.relu()


class KeepsInDict(KeepsIn):
    def keep(self, value):
        self.place["mean"] = value


class KeepsInQueue(KeepsIn):
    def keep(self, value):
        self.place.append(value)


class KeepsInNamespace(KeepsIn):
    def keep(self, value):
        self.place.mean = value


class KeepsInTensor(KeepsIn):
    def keep(self, value):
        self.place.copy_(value)


class Bank:
    def __init__(self) -> None:
        self.value = None

    def remember(self, value):
        self.value = value

    def recall(self):
        return self.value


class KeepsInBank(KeepsIn):
    def keep(self, value):
        self.place.remember(value)


class SharedDict(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.notes = {}
        self.r = nn.Sequential(KeepsInDict(self.notes), nn.Identity())

    def read(self):
        return self.notes["mean"]


class SharedQueue(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.notes = deque(maxlen=2)
        self.r = KeepsInQueue(self.notes)

    def read(self):
        return self.notes[-1]


class SharedNamespace(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.notes = types.SimpleNamespace(mean=None)
        self.r = KeepsInNamespace(self.notes)

    def read(self):
        return self.notes.mean


class SharedTensor(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.notes = torch.zeros(())
        self.r = KeepsInTensor(self.notes)

    def read(self):
        return self.notes * 2


class SharedBank(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.bank = Bank()
        self.r = KeepsInBank(self.bank)

    def read(self):
        return self.bank.recall()


class MethodAsHook(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.r.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.kept[:] = [output.detach().mean()]

    def read(self):
        return self.kept[0]


class MethodBeforeACall(MethodAsHook):
    def __init__(self) -> None:
        Kept.__init__(self)
        self.c.register_forward_pre_hook(lambda module, args: setattr(self, "size", len(args[0])))

    def read(self):
        return self.size


class ClosureOverAList(Kept):
    def __init__(self) -> None:
        super().__init__()
        kept = self.kept
        self.r.register_forward_hook(
            lambda module, args, output: kept.__setitem__(slice(None), [output.detach()])
        )

    def read(self):
        return self.kept[0].mean()


class PartialOfAList(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.r.register_forward_hook(functools.partial(self.keep, self.kept))

    @staticmethod
    def keep(kept, module, args, output):
        kept[:] = [output.detach().mean()]

    def read(self):
        return self.kept[0]


class Collector:
    def __init__(self, network) -> None:
        self.network, self.found = network, {}

    def hook(self, module, args, output):
        self.found["mean"] = output.detach().mean()


class MethodOfACollector(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.collector = Collector(self)
        self.r.register_forward_hook(self.collector.hook)

    def read(self):
        return self.collector.found["mean"]


NETWORKS = [
    *(ChildAttribute, SharedDict, SharedQueue, SharedNamespace, SharedTensor, SharedBank, MethodAsHook),
    *(MethodBeforeACall, ClosureOverAList, PartialOfAList, MethodOfACollector),
]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("point", ["a", "r", "c"])
def test_what_a_call_leaves_for_the_forward_is_that_of_the_same_run(kind, has_run, point):
    network = kind()
    if has_run:
        network(torch.randn(3, 4))
    spliced = gs.insert_grl(network, point)
    for size in (5, 2):
        x = torch.randn(size, 4)
        torch.testing.assert_close(spliced(x), network(x), rtol=0, atol=0)
    assert gs.verify_flip(spliced, reference=network, example_inputs=torch.randn(3, 4)).ok


def test_a_collector_outside_the_network_stays_the_users():
    network = Kept()
    network.read = lambda: 0.0  # type: ignore[assignment]
    collector = Collector(network)
    network.r.register_forward_hook(collector.hook)
    x = torch.randn(3, 4)
    gs.insert_grl(network, "c")(x)
    torch.testing.assert_close(collector.found["mean"], network.a(x).relu().mean())


def test_a_child_that_keeps_what_no_traced_forward_reads_does_not_prevent_a_graph():
    class Keeps(nn.Module):
        def forward(self, x):
            self.attention = x.softmax(-1)
            return x * self.attention

    network = nn.Sequential(nn.Linear(4, 8), Keeps(), nn.Linear(8, 2))
    assert isinstance(gs.insert_grl(network, "0"), torch.fx.GraphModule)


# ------------------------------------------------------------------------------- other methods than forward


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.count = 0

    def encode(self, x):
        self.count += 1
        return self.norm(self.a(x))

    def logits(self, x, *, temperature=1.0):
        return self.c(self.encode(x)) / temperature

    def stages(self, x):
        x = self.a(x)
        yield x
        yield self.norm(x)

    def frozen(self):
        self.a.requires_grad_(False)
        return self

    def forward(self, x):
        return self.c(self.norm(self.a(x)))


def gradient(network, value):
    network.zero_grad(set_to_none=True)
    value.square().sum().backward()
    return network.a.weight.grad


@pytest.mark.parametrize(
    "call",
    [
        lambda network, x: network.encode(x),
        lambda network, x: network.logits(x, temperature=2.0),
        lambda network, x: list(network.stages(x))[-1],
    ],
)
def test_a_method_that_calls_modules_runs_with_the_reversal(call):
    network, x = Encoder(), torch.randn(6, 4)
    spliced = gs.insert_grl(network, "a", coeff=1.0)
    assert isinstance(spliced, torch.fx.GraphModule)
    expected, got = call(network.eval(), x), call(spliced.eval(), x)
    assert torch.equal(expected, got)
    assert torch.equal(gradient(network, got), -gradient(network, expected))


def test_a_method_leaves_what_it_sets_on_the_network_that_it_was_called_on():
    network, x = Encoder(), torch.randn(6, 4)
    spliced = gs.insert_grl(network, "a")
    spliced.encode(x)
    spliced.encode(x)
    assert spliced.count == 2
    assert network.count == 0
    assert spliced.norm.num_batches_tracked == 2
    assert spliced.eval().encode(x).equal(network.eval().encode(x))
    assert spliced.frozen() is spliced
    assert not spliced.a.weight.requires_grad


def test_a_method_uses_the_present_coefficient_and_the_present_weights():
    network, x = Encoder().eval(), torch.randn(6, 4)
    spliced = gs.insert_grl(network, "a")
    spliced.encode(x)
    gs.reversals(spliced)["grl_a"].set_coeff(0.5)
    spliced.load_state_dict(Encoder().state_dict(), assign=True)
    plain = gs.strip(spliced).eval()
    got, expected = spliced.encode(x), plain.encode(x)
    assert torch.equal(got, expected)
    assert torch.equal(gradient(plain, got), -0.5 * gradient(plain, expected))


def test_a_method_past_a_cut_inside_a_forward_is_refused():
    class Adds(Encoder):
        def forward(self, x):
            return self.c(self.norm(self.a(x)) + 1)

    spliced = gs.insert_grl(Adds(), "add")
    with pytest.raises(gs.SurgeryError, match=r"encode\(\) of Adds runs modules"):
        spliced.encode(torch.randn(6, 4))


def test_a_network_with_a_method_that_calls_it_keeps_its_class():
    class Trains(Encoder):
        def training_step(self, x):
            return self(x).square().sum()

    network, x = Trains().eval(), torch.randn(6, 4)
    spliced = gs.insert_grl(network, "a").eval()
    assert isinstance(spliced, Trains)
    network.training_step(x).backward()
    expected = network.a.weight.grad
    network.zero_grad(set_to_none=True)
    spliced.training_step(x).backward()
    assert torch.equal(spliced.a.weight.grad, -expected)


def test_a_network_that_answers_for_its_part_goes_on_doing_so():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.c = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.c(self.inner(x))

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    spliced = gs.insert_grl(Wrapper(), "inner")
    assert spliced.out_features == 8
    assert not hasattr(spliced, "no_such_thing")


# ------------------------------------------------------------------------------------- what a call may bring


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    mask: torch.Tensor | None = None


class TakesABatch(Encoder):
    def forward(self, batch):
        hidden = self.a(batch.x)
        return self.c(hidden if batch.mask is None else hidden * batch.mask)


class TakesADict(Encoder):
    def forward(self, batch):
        mask = batch.get("mask")
        hidden = self.a(batch["x"])
        if mask is not None:
            hidden = hidden * mask
        return self.c(hidden)


class TakesNone(Encoder):
    def forward(self, x, mask):
        hidden = self.a(x)
        return self.c(hidden if mask is None else hidden * mask)


class AsksItsPart(Encoder):
    class Part(nn.Module):
        def forward(self, x):
            return x, None

    def __init__(self) -> None:
        super().__init__()
        self.part = self.Part()

    def forward(self, x):
        hidden, weights = self.part(self.a(x))
        return self.c(hidden if weights is None else hidden * weights)


X, MASK = torch.randn(6, 4), torch.rand(6, 8)


@pytest.mark.parametrize(
    ("network", "calls"),
    [
        (TakesABatch(), [(Batch(X),), (Batch(X, MASK),)]),
        (TakesADict(), [({"x": X},), ({"x": X, "mask": MASK},)]),
        (TakesNone(), [(X, None), (X, MASK)]),
        (AsksItsPart(), [(X,)]),
    ],
)
def test_a_forward_that_asks_whether_something_is_none_gets_the_answer_of_each_call(network, calls):
    spliced = gs.insert_grl(network, "a")
    for args in calls:
        expected, got = network(*args), spliced(*args)
        assert torch.equal(expected, got)
        assert torch.equal(gradient(network, got), -gradient(network, expected))


def test_a_forward_that_asks_of_its_own_settings_still_becomes_a_graph():
    class Asks(Encoder):
        pool = None

        def forward(self, x):
            total = None
            for layer in (self.a, self.a):
                hidden = layer(x) if self.pool is None else x
                total = hidden if total is None else total + hidden
            return self.c(total)

    assert isinstance(gs.insert_grl(Asks(), "c"), torch.fx.GraphModule)


class Dotted(dict):
    __getattr__ = dict.__getitem__


class OwnInit(OrderedDict):
    def __init__(self, y, hidden) -> None:
        super().__init__(y=y, hidden=hidden)


@pytest.mark.parametrize("kind", [Dotted, OwnInit])
def test_a_mapping_of_a_class_of_its_own_keeps_its_class(kind):
    class Returns(Encoder):
        def forward(self, x):
            hidden = self.a(x)
            return kind(y=self.c(hidden), hidden=hidden)

    network = Returns()
    plain, spliced = network(X), gs.insert_grl(network, "a")(X)
    assert type(spliced) is kind
    assert list(spliced) == list(plain)
    with_head = gs.attach_domain_head(network, "a", hidden=4, example_inputs=X)(X)
    assert type(with_head) is kind
    assert list(with_head) == ["y", "hidden", "domain_logits"]


# ----------------------------------------------------------------------------- names that reverse nothing


class ReadsWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.part, self.c = nn.Embedding(9, 8), Attends(), nn.Linear(8, 3)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, ids, mask=None, bias=None):
        hidden, weights = self.part(self.words(ids) * self.scale)
        hidden = hidden if mask is None else hidden * mask[..., None]
        return self.c(hidden if bias is None else hidden + bias), weights


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        x = self.layer(x)
        return x, x.softmax(-1) if self.training else None


IDS = torch.randint(0, 9, (2, 5))


@pytest.mark.parametrize(
    ("point", "inputs", "message"),
    [
        ("ids", (IDS,), "the argument 'ids' is of int64"),
        ("mask", (IDS, torch.ones(2, 5, dtype=torch.bool)), "the argument 'mask' is of bool"),
        ("mask", {"ids": IDS, "mask": None}, "the argument 'mask' is a NoneType"),
    ],
)
def test_an_argument_through_which_no_gradient_flows_is_no_point(point, inputs, message):
    with pytest.raises(gs.ShapeError, match=message):
        gs.insert_grl(ReadsWords(), point, example_inputs=inputs)


def test_an_argument_of_floating_point_numbers_is_a_point():
    network, bias = ReadsWords(), torch.zeros(8, requires_grad=True)
    spliced = gs.insert_grl(network, "bias", example_inputs=(IDS, None, bias))
    spliced(IDS, bias=bias)[0].sum().backward()
    torch.testing.assert_close(bias.grad, -10 * network.c.weight.detach().sum(0))


def test_an_item_that_is_none_in_both_modes_is_no_point():
    class NeverAttends(ReadsWords):
        def __init__(self) -> None:
            super().__init__()
            self.part.forward = lambda x: (self.part.layer(x), None)  # type: ignore[method-assign]

    with pytest.raises(gs.ShapeError, match=r"the value after part\[1\] is no tensor of floating"):
        gs.insert_grl(NeverAttends(), "part[1]", example_inputs=IDS)


@pytest.mark.parametrize("training", [False, True])
def test_an_item_that_is_none_in_one_mode_is_a_point(training):
    spliced = gs.insert_grl(ReadsWords().train(training), "part[1]", example_inputs=IDS)
    assert list(gs.reversals(spliced)) == ["grl_part_1"]


def test_a_buffer_is_no_point():
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x):
            return self.a(x) * self.scale

    with pytest.raises(gs.ShapeError, match="'scale' is a buffer: it gets no gradient"):
        gs.insert_grl(Scales(), "scale")


class TriesAShape(Encoder):
    def forward(self, x):
        hidden = self.a(x)
        try:
            return self.c(hidden.view(5, 8))
        except RuntimeError:
            return self.c(hidden) * 2


def test_a_forward_that_goes_on_another_way_where_something_fails_does_so_in_each_call():
    network = TriesAShape()
    spliced = gs.insert_grl(network, "a")
    for size in (5, 3):
        x = torch.randn(size, 4)
        assert torch.equal(spliced(x), network(x))


def step(batch):  # a function of this file that asks; the forward below has an attribute of that name
    return None if batch.mask is None else batch.mask


def test_an_attribute_with_the_name_of_a_function_nearby_is_not_that_function():
    class Steps(Encoder):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(8, 8)

        def forward(self, x):
            return self.c(self.step(self.step(self.a(x))))

    assert list(gs.reversals(gs.insert_grl(Steps(), "step#1"))) == ["grl_step_1"]


# ---------------------------------------------------------- what a forward asks of the kinds of its values


class AsksWhetherItIsCalled(Encoder):
    def forward(self, x):
        hidden = self.a(x)
        return hidden if callable(hidden) else self.c(hidden)


class AsksForASubclass(Encoder):
    def forward(self, x):
        hidden = self.a(x)
        return self.c(hidden) if issubclass(type(hidden), torch.Tensor) else hidden


class LooksItsClassUp(Encoder):
    def forward(self, x):
        hidden = self.a(x)
        return {torch.Tensor: self.c}.get(type(hidden), nn.Identity())(hidden)


class MatchesItsClass(Encoder):
    def forward(self, x):
        match self.a(x):
            case torch.Tensor() as hidden:
                return self.c(hidden)
            case other:
                return other


class AsksInAMethod(Encoder):
    def forward(self, x):
        return self.read(self.a(x))

    def read(self, hidden):
        return self.c(hidden) if issubclass(type(hidden), torch.Tensor) else hidden


class AsksForItsDtype(Encoder):
    def forward(self, x):
        hidden = self.a(x)
        return self.c(hidden) if hidden.dtype is torch.float32 else hidden


class ReturnsNone(nn.Module):
    def forward(self, x):
        return None


class AsksWhatACallReturned(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.extra = ReturnsNone()

    def forward(self, x):
        hidden = self.a(x)
        return self.c(hidden) if self.extra(hidden) is None else hidden


class AsksWhatAVariableIs(AsksWhatACallReturned):
    def forward(self, x):
        hidden = self.a(x)
        extra = self.extra(hidden)
        if extra is not None:
            hidden = hidden + extra
        return self.c(hidden)


KINDS = [
    *(AsksWhetherItIsCalled, AsksForASubclass, LooksItsClassUp, MatchesItsClass, AsksInAMethod),
    *(AsksForItsDtype, AsksWhatACallReturned, AsksWhatAVariableIs),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", ["a", "c"])
def test_a_forward_that_asks_of_what_kind_a_value_is_gets_a_true_answer(kind, point):
    network = kind()
    spliced = gs.insert_grl(network, point)
    expected, got = network(X), spliced(X)
    assert torch.equal(expected, got)
    assert torch.equal(gradient(network, got), -gradient(network, expected))


@dataclasses.dataclass
class Counted:
    y: torch.Tensor
    count: int = 0
    more: object = dataclasses.field(init=False, default=None)

    def __post_init__(self):
        self.count += 1


def test_a_dataclass_that_is_more_than_its_fields_is_what_the_forward_made():
    class Returns(Encoder):
        def forward(self, x):
            output = Counted(self.c(self.a(x)))
            output.more = x
            return output

    output = gs.insert_grl(Returns(), "a")(X)
    assert (type(output), output.count, output.more is X) == (Counted, 1, True)


class AsksForAnAttribute(Encoder):
    def forward(self, x):
        hidden = self.a(x)
        return hidden if hasattr(hidden, "logits") else self.c(hidden)


class HasADefault(Encoder):
    def forward(self, x):
        hidden = self.a(x)
        return self.c(hidden) * getattr(hidden, "weight", 2.0)


class ReadsTheDtype(Encoder):
    def forward(self, x):
        hidden = self.a(x)
        return self.c(hidden) * (2 if str(hidden.dtype) == "torch.float32" else 1)


@pytest.mark.parametrize("kind", [AsksForAnAttribute, HasADefault, ReadsTheDtype])
@pytest.mark.parametrize("point", ["a", "c"])
def test_a_forward_that_asks_for_attributes_and_texts_gets_a_true_answer(kind, point):
    network = kind()
    spliced = gs.insert_grl(network, point)
    assert torch.equal(network(X), spliced(X))
    network.double(), spliced.double()
    assert torch.equal(network(X.double()), spliced(X.double()))


def test_a_message_about_a_size_does_not_prevent_a_graph():
    class Checks(Encoder):
        def forward(self, x):
            torch._assert(x.shape[1] == 4, f"{x.shape[1]} numbers, and 4 are expected")
            return self.c(self.a(x))

    assert isinstance(gs.insert_grl(Checks(), "a"), torch.fx.GraphModule)
