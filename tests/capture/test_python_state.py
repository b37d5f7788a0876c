"""Forwards that keep something in Python: a trace would freeze it, and must leave it as it was."""

from __future__ import annotations

import copy
import functools
import operator
import random
from collections import deque
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import grl_surgery as gs

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
CACHE: dict[int, torch.Tensor] = {}


class Net(nn.Module):
    """Two layers, and room for something kept between calls."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        self.a, self.b, self.kept = nn.Linear(6, 6), nn.Linear(6, 3), kept


class Counts(Net):
    def forward(self, x):
        self.kept = (self.kept or 0) + 1
        return self.b(self.a(x)) * min(1.0, self.kept / 10)


class Collects(Net):
    def forward(self, x):
        h = self.a(x)
        self.kept.append(h.detach().mean())
        return self.b(h) * len(self.kept)


class CountsInAnObject(Net):
    def forward(self, x):
        self.kept.calls += 1
        return self.b(self.a(x)) * self.kept.calls


class StartsOnTheFirstBatch(Net):
    def forward(self, x):
        h = self.a(x)
        if not self.kept:
            self.b.weight.data.copy_(self.b.weight / h.detach().std())
            self.kept = True
        return self.b(h)


class CachesInAGlobal(Net):
    def forward(self, x):
        h = self.a(x)
        if 6 not in CACHE:
            CACHE[6] = h.detach().mean(0)
        return self.b(h * CACHE[6])


class CachesInItsClass(Net):
    cache: ClassVar[dict[int, torch.Tensor]] = {}

    def forward(self, x):
        h = self.a(x)
        if 6 not in self.cache:
            self.cache[6] = h.detach().mean(0)
        return self.b(h * self.cache[6])


class DrawsFromTorch(Net):
    def forward(self, x):
        return self.b(self.a(x) + torch.randn(6, generator=self.kept))


class DrawsFromPython(Net):
    def forward(self, x):
        return self.b(self.a(x) * self.kept.random())


class DrawsFromNumpy(Net):
    def forward(self, x):
        return self.b(self.a(x) * float(self.kept.normal()))


NETWORKS = [
    Counts(),
    Collects([]),
    Collects(deque()),
    CountsInAnObject(SimpleNamespace(calls=0)),
    StartsOnTheFirstBatch(False),
    CachesInAGlobal(),
    CachesInItsClass(),
    DrawsFromTorch(torch.Generator()),
    DrawsFromPython(random.Random(0)),
    DrawsFromNumpy(np.random.default_rng(0)),
    DrawsFromNumpy(np.random.RandomState(0)),
]


def kept_by(model):
    """All that the forwards above keep, in a form that can be compared."""
    kept = model.kept
    if isinstance(kept, torch.Generator):
        return kept.get_state().tolist()
    if isinstance(kept, random.Random):
        return kept.getstate()
    if isinstance(kept, np.random.Generator):
        return kept.bit_generator.state
    if isinstance(kept, np.random.RandomState):
        return kept.get_state()[2]
    return copy.deepcopy((kept, CACHE, CachesInItsClass.cache))


def named(model):
    return f"{type(model).__name__}-{type(model.kept).__name__}"


@pytest.fixture(autouse=True)
def empty_caches():
    CACHE.clear()
    CachesInItsClass.cache.clear()
    yield
    CACHE.clear()
    CachesInItsClass.cache.clear()


@pytest.mark.parametrize("model", NETWORKS, ids=named)
def test_a_trace_leaves_it_as_it_was(model):
    before = kept_by(model)
    spliced = gs.insert_grl(model, before="b")
    assert not isinstance(spliced, torch.fx.GraphModule)
    assert kept_by(model) == before


@pytest.mark.parametrize("model", NETWORKS, ids=named)
def test_a_network_spliced_without_that_trace_goes_on_keeping_it(model):
    twin = copy.deepcopy(model)
    gs.insert_grl(model, after="a")
    spliced = gs.insert_grl(copy.deepcopy(model), after="a")
    for _ in range(3):
        expected = twin(X)
        CACHE.clear()
        CachesInItsClass.cache.clear()
        assert torch.equal(spliced(X), expected)
    plain, found = (torch.autograd.grad(net(X).sum(), net.a.weight)[0] for net in (twin, spliced))
    assert torch.equal(found, -plain)


class ComputesOnce(Net):
    """As LeViT does with its attention biases, and many networks with positions."""

    cache: ClassVar[dict[str, torch.Tensor]] = {}

    def forward(self, x):
        h = self.a(x)
        if "bias" not in self.kept:
            self.kept["bias"] = self.a.bias[[5, 4, 3, 2, 1, 0]]
        if "positions" not in self.cache:
            self.cache["positions"] = torch.linspace(0, 1, 6).to(h.device)
        return self.b(h * self.kept["bias"] + self.cache["positions"])


def test_what_is_kept_to_be_computed_once_is_computed_in_every_call():
    model = ComputesOnce({})
    spliced = gs.insert_grl(model, before="b")
    assert (model.kept, model.cache) == ({}, {})
    with torch.no_grad():
        assert torch.equal(spliced(X), copy.deepcopy(model)(X))
        ComputesOnce.cache.clear()
    assert gs.verify_flip(spliced, model, X).ok
    assert ComputesOnce.cache == {}


@functools.lru_cache
def positions(size):
    return torch.linspace(0, 1, size)


class AddsPositions(Net):
    def forward(self, x):
        return x + positions(x.shape[1])


@pytest.mark.parametrize("block", [*NETWORKS, AddsPositions(), ComputesOnce({})], ids=named)
@pytest.mark.parametrize(
    "look",
    [
        lambda model: gs.graph(model, example_inputs=X),
        lambda model: gs.attach_domain_head(model, "0", example_inputs=X),
        lambda model: gs.verify_flip(gs.insert_grl(model, after="0"), model, X),
        lambda model: gs.diagnose(model, X),
    ],
    ids=["graph", "attach", "verify", "diagnose"],
)
def test_nothing_that_runs_on_example_inputs_leaves_a_trace_in_it(look, block):
    model = nn.Sequential(nn.Linear(6, 6), copy.deepcopy(block))
    before = kept_by(model[1]), random.getstate(), torch.get_rng_state().tolist()
    positions.cache_clear()
    look(model)
    assert (kept_by(model[1]), random.getstate(), torch.get_rng_state().tolist()) == before
    assert positions.cache_info().currsize == 0


def test_a_property_that_is_computed_once_is_no_change():
    class Once(Net):
        @torch.jit.unused
        def unused(self):
            return None

        def forward(self, x):
            return self.b(self.a(x) * self.scale)

    from functools import cached_property

    Once.scale = cached_property(lambda self: 0.5)
    Once.scale.__set_name__(Once, "scale")
    model = Once()
    assert gs.verify_flip(gs.insert_grl(model, before="b"), model, X).ok


# --------------------------------------------------------------------------- tensors that a forward makes


class Sums(Net):
    """Adds up into a tensor that it makes, in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        total, y = torch.zeros(4, 6), self.a(x)
        self.how(total, y)
        return self.b(total + y)


@pytest.mark.parametrize("how", [operator.iadd, torch.Tensor.add_, torch.Tensor.copy_])
def test_a_tensor_made_in_the_forward_and_overwritten_is_made_anew_in_each_call(how):
    model = Sums(how)
    spliced = gs.insert_grl(model, after="a")
    for _ in range(3):
        assert torch.equal(spliced(X), model(X))
        plain, found = (torch.autograd.grad(net(X).sum(), net.a.weight)[0] for net in (model, spliced))
        assert torch.equal(found, -plain)
    assert gs.verify_flip(spliced, model, X).ok


def test_two_equal_tensors_made_in_the_forward_are_two():
    class Two(Net):
        def forward(self, x):
            first, second = torch.zeros(6), torch.zeros(3)
            third = torch.zeros(6)
            first += self.a(x).mean(0)
            second += self.b(x).mean(0)
            third += self.a(x).std(0)
            return first, second, third

    model = Two()
    spliced = gs.insert_grl(model, after="b")
    for _ in range(2):
        assert all(map(torch.equal, spliced(X), model(X)))


def test_a_tensor_handed_out_is_the_callers_own():
    class HandsOut(Net):
        def forward(self, x):
            return self.b(self.a(x)), torch.zeros(2)

    spliced = gs.insert_grl(HandsOut(), after="a")
    spliced(X)[1].add_(1)
    assert not spliced(X)[1].any()


def test_a_tensor_made_in_the_forward_that_is_only_read_is_not_copied():
    class Reads(Net):
        def forward(self, x):
            return self.b(self.a(x) * torch.arange(6))

    nodes = gs.insert_grl(Reads(), after="a").graph.nodes
    assert [node.op for node in nodes if node.op in ("get_attr", "call_function")] == [
        "get_attr",
        "call_function",
    ]


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (lambda t, y: t.__setitem__(0, y[0]), "an item of a value is assigned"),
        (lambda t, y: (y + t, t.add_(1)), "goes on writing into a tensor of its own"),
        (lambda t, y: t[:, :3].add_(y[:, :3]), "overwrites a part of a tensor of its own"),
        (lambda t, y: (t.add_(y), t.mul_(2.0)), "computes with a tensor of its own that it has overwritten"),
        (lambda t, y: (t.add_(y), y.sub_(t.view(4, 6))), "computes with a tensor of its own"),
        (lambda t, y: setattr(y, "data", y.data * 2), "assigns the data of a value"),
    ],
    ids=["item", "later", "part", "computes", "view", "data"],
)
def test_what_a_graph_would_not_repeat_is_refused(write, why):
    model = Sums(write)
    with pytest.raises(gs.TracingError, match=why):
        gs.insert_grl(model, after="add")
    spliced = gs.insert_grl(model, after="a")  # needs no trace of that forward
    assert torch.equal(spliced(X), model(X))


# ----------------------------------------------------------------------- the network's own tensors


class Follows(Net):
    """Moves its second layer towards its first, as the teachers of contrastive learning do."""

    def __init__(self, move):
        super().__init__(move)
        self.b = nn.Linear(6, 6)

    def forward(self, x):
        with torch.no_grad():
            for teacher, student in zip(self.b.parameters(), self.a.parameters(), strict=True):
                self.kept(teacher, student)
        return self.a(x) * self.b(x)


MOVES = {
    "in place": lambda k, q: k.mul_(0.9).add_(q, alpha=0.1),
    "through data": lambda k, q: k.data.lerp_(q.data, 0.1),
    "by an operator": lambda k, q: operator.iadd(k, q),
    "by items": lambda k, q: k.__setitem__(slice(1), q[:1]),
    "by assignment": lambda k, q: setattr(k, "data", k.data + q.data),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_forward_that_writes_into_parameters_does_not_while_it_is_traced(move):
    model = Follows(move)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gs.TracingError, match="it overwrites a parameter"):
        gs.insert_grl(model, after="mul")
    spliced = gs.insert_grl(model, after="a")  # needs no trace of that forward
    assert gs.verify_flip(spliced, model, X).ok
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    twin = copy.deepcopy(model)
    assert torch.equal(copy.deepcopy(spliced)(X), twin(X))
