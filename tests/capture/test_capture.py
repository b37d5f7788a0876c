"""Tracing: only as deep as asked, whole functions where they cannot be traced, and sizes that are known."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from small_networks import Modes, Net, Untraceable, image, vector
from torch import nn, ones
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from torch.utils.checkpoint import checkpoint

import grl_surgery as gs
from grl_surgery.capture.capture import trace


def resample(x, size):
    """Decides by a size, which no trace can follow."""
    if x.shape[-1] == size:
        return x
    return nn.functional.interpolate(x, size=size)


class Resamples(nn.Module):
    """As vision transformers do with their position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.embedding = nn.Parameter(torch.ones(1, 4, 8, 8))

    def forward(self, x):
        assert self.embedding.shape[1] == 4
        assert self.embedding.size(0) == 1
        assert self.embedding.numel() == 256
        return resample(self.conv(x) + self.embedding, 8)


def calls(traced):
    (graph,) = traced.graphs.values()
    return [str(node.target) for node in graph.nodes if node.op == "call_module"]


def test_only_the_forwards_that_enclose_the_point_are_traced():
    model = Net()
    assert calls(trace(model, [])) == ["stem", "stage1", "stage2", "fc"]
    assert calls(trace(model, ["stage1"])) == ["stem", "stage1.0", "stage1.1", "stage2", "fc"]


def test_a_network_that_does_not_look_at_its_mode_has_one_graph_and_one_that_does_has_two():
    assert len(trace(Net(), []).graphs) == 1
    traced = trace(Modes(), [])
    assert (traced.mode_dependent, set(traced.graphs)) == (("",), {(True,), (False,)})


class Scales(nn.Module):
    """Divides by the root of a size, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x) / math.sqrt(x.shape[-1])


def test_a_function_of_math_becomes_one_operation():
    model = Scales()
    assert "size_sqrt" in trace(model, []).names()
    assert torch.equal(gs.insert_grl(model, after="conv")(image()), model(image()))


def test_a_function_that_cannot_be_traced_becomes_one_operation():
    model = Resamples()
    assert "resample" in trace(model, []).names()
    spliced = gs.insert_grl(model, after="conv")
    assert torch.equal(spliced(image()), model(image()))
    assert gs.verify_flip(spliced, model, image()).ok


def test_what_cannot_be_traced_stays_a_call_where_leniency_is_asked_for():
    model = nn.Sequential(Untraceable(), nn.Identity())
    assert calls(trace(model, ["0", "0.body"], allow_untraceable=True)) == ["0", "1"]
    with pytest.raises(gs.TracingError, match=r"the forward of '0' \(Untraceable\) cannot be traced"):
        trace(model, ["0"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_is_reversed_where_it_is_traced(reentrant):
    class Checkpoints(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.fc = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.fc(checkpoint(self.body, self.first(x), use_reentrant=reentrant))

    model = Checkpoints()
    spliced = gs.insert_grl(model, before="fc")
    report = gs.verify_flip(spliced, model, vector())
    assert report.ok, report
    flipped = [row.name for row in report.parameters if row.measured == "flipped"]
    assert flipped == ["first.weight", "first.bias", "body.weight", "body.bias"]


def test_a_module_that_is_no_part_of_the_network_is_called_as_it_is():
    class Borrows(nn.Module):
        def forward(self, x):
            return nn.ReLU()(x)

    with pytest.raises(gs.TracingError, match="it calls a ReLU that is not a submodule of the network"):
        trace(Borrows(), [])
    model, x = nn.Sequential(nn.Linear(6, 6), Borrows(), nn.Linear(6, 2)), vector()
    assert gs.verify_flip(gs.insert_grl(model, before="1"), model, x).ok


def test_a_value_computed_from_a_parameter_outside_the_graph_is_not_frozen():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.parameters_in_a_list = [nn.Parameter(torch.ones(6))]

        def forward(self, x):
            return self.fc(x) * (self.parameters_in_a_list[0] * 2)

    spliced = gs.insert_grl(Outside(), before="fc")
    spliced(vector()).sum().backward()
    assert spliced.parameters_in_a_list[0].grad is not None


def test_tracing_leaves_torch_as_it_was():
    before = (nn.Module.__call__, nn.Module.__getattr__, torch.autograd.Function.apply)
    functions = {kind: kind.__dict__.get("forward") for kind in type.__subclasses__(torch.autograd.Function)}
    trace(Net(), ["stage1"])
    with pytest.raises(gs.TracingError):
        trace(Untraceable(), [])
    assert before == (nn.Module.__call__, nn.Module.__getattr__, torch.autograd.Function.apply)
    assert all(kind.__dict__.get("forward") is forward for kind, forward in functions.items())


def test_the_result_has_the_signature_of_the_original():
    from small_networks import KeywordOnly

    spliced = gs.insert_grl(KeywordOnly(), after="fc")
    kinds = {name: p.kind.name for name, p in inspect.signature(spliced.forward).parameters.items()}
    original = inspect.signature(KeywordOnly().forward).parameters
    assert kinds == {name: p.kind.name for name, p in original.items()}


def test_a_tensor_as_a_default_stays_what_it_is():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x, scale=torch.full((), 2.0)):  # noqa: B008
            return self.fc(x) * scale

    model = Scaled()
    for where in ({"before": "fc"}, {"after": "fc"}):
        spliced = gs.insert_grl(model, **where)
        assert torch.equal(spliced(vector()), model(vector()))
        assert torch.equal(spliced(vector(), torch.tensor(3.0)), model(vector(), torch.tensor(3.0)))


# ------------------------------------------------------------------------- tensors made of traced sizes


class Makes(nn.Module):
    """Adds a tensor that it makes for the value between its layers."""

    def __init__(self, make):
        super().__init__()
        self.a, self.b, self.make = nn.Linear(6, 5), nn.Linear(5, 2), make
        self.plain = torch.arange(50.0)

    def forward(self, x):
        h = self.a(x)
        return self.b(h + self.make(self, h))


def masked(module, h):
    length = h.size(0)
    return (h @ h.T).masked_fill(torch.triu(ones(length, length), 1).bool(), 0.0) @ h


MADE = {
    "ones": lambda m, h: torch.ones(h.size(0), h.size(1)),
    "zeros": lambda m, h: torch.zeros(h.size(0), 5, dtype=torch.float64, device=h.device).float(),
    "zeros of a shape": lambda m, h: torch.zeros(h.shape) + torch.zeros(size=h.shape),
    "empty": lambda m, h: torch.empty(h.size(0), 5).fill_(2.0),
    "rand": lambda m, h: torch.rand(h.size(0), 5) < 0.5,
    "randn": lambda m, h: torch.randn(h.size(0), 5),
    "full": lambda m, h: torch.full((h.size(0), 1), 2.0),
    "full of a size": lambda m, h: torch.full((1,), h.size(0)),
    "arange": lambda m, h: torch.arange(h.size(0))[:, None],
    "linspace": lambda m, h: torch.linspace(0, 1, h.size(0))[:, None],
    "eye": lambda m, h: torch.eye(h.size(0), 5),
    "new_zeros": lambda m, h: h.new_zeros(h.size(0), 5),
    "scalar_tensor": lambda m, h: torch.scalar_tensor(h.size(0)),
    "as_tensor": lambda m, h: torch.as_tensor(h.size(0)),
    "asarray": lambda m, h: torch.asarray(h.size(0)),
    "tensor": lambda m, h: torch.tensor(h.size(0)),
    "tensor of several": lambda m, h: torch.tensor([[h.size(0)], [1]], dtype=torch.float64).float().sum(),
    "a part": lambda m, h: m.plain[: h.size(0), None],
    "imported": masked,
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_tensor_made_of_sizes_follows_the_input(make):
    model = Makes(make)
    spliced = gs.insert_grl(model, before="b")
    for rows in (4, 7):
        x = torch.randn(rows, 6)
        results, slopes = [], []
        for net in (model, spliced):
            torch.manual_seed(rows)
            results.append(net(x))
            slopes.append(torch.autograd.grad(results[-1].sum(), net.a.weight)[0])
        assert torch.equal(*results)
        assert torch.equal(slopes[0], -slopes[1])


def test_nothing_in_torch_or_in_the_users_file_is_another_while_a_forward_is_traced():
    before = (torch, ones, torch.ones, torch.tensor, isinstance)
    seen = []

    def look(module, h):
        seen.append((globals()["torch"], ones, torch.ones, torch.tensor, isinstance))
        return torch.zeros(5)

    gs.insert_grl(Makes(look), before="b")
    assert seen
    assert all(found == before for found in seen)


def test_a_tensor_of_a_shape_that_is_spread_out_is_made_by_the_forward_itself():
    model, x = Makes(lambda m, h: torch.zeros(*h.shape)), vector()
    assert gs.verify_flip(gs.insert_grl(model, before="b"), model, x).ok


def test_a_forward_that_draws_from_a_generator_of_its_own_goes_on_drawing():
    def draw(module, h):
        return torch.rand(h.size(0), 5, generator=torch.Generator())

    model, x = Makes(draw), vector()
    assert gs.verify_flip(gs.insert_grl(model, before="b"), model, x).ok


# ------------------------------------------------------------------------------------- defaults


def with_default(default, use):
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x, opts=default):
            return self.b(self.a(x)) * use(opts)

    return Optional()


@pytest.mark.parametrize(
    ("default", "use", "other"),
    [
        ({}, lambda opts: opts.get("k", 1), {"k": 5}),
        ({"k": [2, 3]}, lambda opts: opts["k"][1], {"k": [2, 4]}),
        ([1, 2], lambda opts: opts[1], [1, 2.5]),
        ([True], lambda opts: 3 if opts[0] is True else 4, [1]),
    ],
)
def test_an_argument_with_a_default_stays_an_argument(default, use, other):
    model = with_default(default, use)
    spliced = gs.insert_grl(model, edge=("a", "b"))
    x = vector()
    assert torch.equal(spliced(x), model(x))
    assert torch.equal(spliced(x, opts=type(default)(default)), model(x))
    assert gs.graph(model, example_inputs=x)
    assert torch.equal(spliced(x, opts=other), model(x, opts=other))


def count(opts):
    opts["n"] = opts.get("n", 0) + 1
    return opts["n"]


def test_surgery_does_not_change_a_default_that_the_forward_changes():
    kept = {}
    model = with_default(kept, count)
    gs.insert_grl(model, edge=("a", "b"))
    assert kept == {}


@pytest.mark.parametrize(
    "default", [{1, 2}, {"scale": torch.ones(2)}, len], ids=["set", "tensor", "function"]
)
def test_a_default_that_no_code_can_spell_is_no_obstacle(default):
    model, x = with_default(default, lambda opts: 1), vector()
    spliced = gs.insert_grl(model, edge=("a", "b"))
    assert torch.equal(spliced(x), model(x))
    assert inspect.signature(spliced.forward) == inspect.signature(model.forward)


# ------------------------------------------------------------------------------------- hooks on every module

REGISTER = {
    "forward": register_module_forward_hook,
    "forward pre": register_module_forward_pre_hook,
    "backward": register_module_full_backward_hook,
    "backward pre": register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER)
def test_a_hook_on_every_module_is_not_lost_where_one_would_be_traced_through(register):
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 2))
    handle = register(lambda *_: None)
    try:
        for where in ({"after": "1.0"}, {"edge": ("1.0", "1.1")}):
            with pytest.raises(gs.SurgeryError, match=r"hooks run around every module.*'1' would be"):
                gs.insert_grl(model, **where)
    finally:
        handle.remove()
    assert gs.verify_flip(gs.insert_grl(model, after="1.0"), model, vector()).ok


def test_a_hook_on_every_module_runs_around_what_stays_a_call():
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 2))
    handle = register_module_forward_hook(lambda module, _, y: y * 2 if type(module) is nn.Tanh else None)
    try:
        spliced, x = gs.insert_grl(model, after="0"), vector()
        assert torch.equal(spliced(x), model(x))
        doubled = model[2](2 * model[1][0](model[0](x)).tanh())
        assert torch.equal(spliced(x), doubled)
    finally:
        handle.remove()
