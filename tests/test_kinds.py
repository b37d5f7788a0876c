"""What a traced forward is told when it asks what kind of value it got, and what is opened to know that."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import ClassVar

import pytest
import torch
from small_networks import Untraceable
from torch import nn

import grl_surgery as gs
from grl_surgery.tracing import trace


def flips(spliced, model, inputs):
    """Same outputs, and the gradients that tensor hooks on the original would give."""
    assert torch.equal(spliced(*inputs), model(*inputs))
    report = gs.verify_flip(spliced, model, inputs)
    assert report.ok, report
    return report


def as_list(x):
    return x if isinstance(x, list) else [x]


class AsksInAFunction(nn.Module):
    """A batch is a list of one, as detectors and feature pyramids take it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        (y,) = as_list(x)
        return self.last(self.first(y))


class AsksForATensor(AsksInAFunction):
    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = [x]
        y = self.first(x[0])
        if not torch.is_tensor(y):
            y = y[0]
        return self.last(y)


@pytest.mark.parametrize("kind", [AsksInAFunction, AsksForATensor])
def test_an_argument_is_a_tensor_to_a_forward_that_asks(kind):
    model = kind()
    spliced = gs.insert_grl(model, after="first")
    assert [row.measured for row in flips(spliced, model, (torch.randn(3, 4),)).parameters] == [
        *("flipped", "flipped", "unchanged", "unchanged")
    ]


def test_another_kind_of_argument_than_the_trace_assumed_is_refused():
    spliced = gs.insert_grl(AsksForATensor(), after="first")
    with pytest.raises(gs.TracingError, match="surgery fixed it as a Tensor; got a list"):
        spliced([torch.randn(3, 4)])


def test_the_example_inputs_say_that_an_argument_is_a_list():
    model, given = AsksForATensor(), ([torch.randn(3, 4)],)
    spliced = gs.insert_grl(model, after="first", example_inputs=given)
    flips(spliced, model, given)
    flips(gs.insert_grl(spliced, after="last"), model, given)  # the second surgery still knows
    with pytest.raises(gs.TracingError, match="fixed it as a list; got a Tensor"):
        spliced(torch.randn(3, 4))


class Masks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, mask=None):
        x = self.a(x)
        return self.b(x if mask is None else x * mask)


class NeedsMask(Masks):
    def forward(self, x, mask):
        return super().forward(x, mask)


def test_an_argument_that_one_surgery_kept_is_kept_by_the_next_and_by_strip():
    model, inputs = Masks(), (torch.randn(3, 4), torch.rand(3, 4))
    spliced = gs.insert_grl(gs.insert_grl(model, after="a", example_inputs=inputs), after="b")
    flips(spliced, model, inputs)
    flips(gs.strip(spliced, ["grl_b"]), model, inputs)


@pytest.mark.parametrize("kind", [Masks, NeedsMask])
@pytest.mark.parametrize("mask", [None, torch.rand(3, 4)], ids=["none", "mask"])
def test_an_argument_that_the_example_inputs_fill_is_fixed_as_none_or_as_a_tensor(kind, mask):
    model, x = kind(), torch.randn(3, 4)
    spliced = gs.insert_grl(model, after="a", example_inputs=(x, mask))
    for result in (spliced, gs.insert_grl(spliced, after="b")):
        assert torch.equal(result(x, mask), model(x, mask))
        other = x if mask is None else None
        if kind is Masks or mask is None:
            with pytest.raises(gs.TracingError, match=r"'mask' .*steers .* surgery fixed it"):
                result(x, other)
        if kind is Masks and mask is not None:
            with pytest.raises(gs.TracingError, match="fixed it as a Tensor; got a NoneType"):
                result(x)


def test_graphs_and_heads_keep_the_arguments_that_the_example_inputs_fill():
    model, inputs = Masks(), (torch.randn(3, 4), torch.rand(3, 4))
    assert [(node.name, node.shape) for node in gs.graph(model, example_inputs=inputs).nodes][3:] == [
        ("mul", (3, 4)),
        ("b", (3, 4)),
        ("output", (3, 4)),
    ]
    for given in (inputs, dict(zip(("x", "mask"), inputs, strict=True))):
        m = gs.attach_domain_head(model, after="mul", example_inputs=given)
        assert gs.verify_flip(m, model, given).ok


def test_a_proof_knows_which_arguments_the_surgery_kept():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.of_mask = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x, mask=None):
            x = self.a(x)
            return self.b(x if mask is None else x * self.of_mask(mask))

    model, inputs = Masked(), (torch.randn(3, 4), torch.rand(3, 4))
    flips(gs.insert_grl(model, after="of_mask", example_inputs=inputs), model, inputs)


class Noted:
    """Where no trace looks for what a forward changes."""

    answers: ClassVar[list[bool]] = []


class Answers(nn.Module):
    """Asks for the class of everything that a forward meets, and writes the answers down."""

    kinds = (torch.Tensor, nn.Parameter, tuple, list, dict, int, float, torch.Size, torch.dtype, Iterable)

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.lstm, self.pool = (
            nn.Linear(4, 4),
            nn.LSTM(4, 4),
            nn.MaxPool1d(2, return_indices=True),
        )
        self.attention = nn.MultiheadAttention(4, 2)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        y = self.linear(x)
        values = [x, y, y + 1, y[0], y.shape, y.shape[0], y.shape[1:], y.size(), y.size(0), y.stride()]
        values += [
            y.dim(),
            y.shape[0] // 2,
            y.shape[0] / 2,
            y.dtype,
            y.chunk(2),
            y.chunk(2)[0],
            [y],
            {"y": y},
        ]
        values += [self.linear.weight, self.scale, self.lstm(y), self.lstm(y)[0], self.pool(y)]
        values += [self.attention(y, y, y), y.topk(2), torch.split(y, 1)]
        Noted.answers.extend(isinstance(value, kind) for value in values for kind in self.kinds)
        return y


def test_every_answer_is_the_one_that_the_running_network_would_get():
    model = Answers()
    Noted.answers.clear()
    model(torch.randn(3, 2, 4))
    eager = list(Noted.answers)
    Noted.answers.clear()
    trace(model, [""])
    assert eager == Noted.answers


class Block(nn.Module):
    """Takes a tensor or a list and returns a list, as the blocks of SelecSLS do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(4, 4)

    def forward(self, x):
        if not isinstance(x, list):
            x = [x, x]
        return [self.conv(x[0]) + x[1], x[0]]


class Fused(nn.Module):
    """Assigns to the items of a list that it is given, as the branches of HRNet do."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        for place in range(len(x)):
            x[place] = self.convs[place](x[place])
        return sum(x)


def test_a_module_whose_value_is_asked_about_is_traced_through_as_well():
    model = nn.Sequential(Block(), Block(), Fused())
    x = torch.randn(3, 4)
    flips(gs.insert_grl(model, after="1.add"), model, (x,))
    flips(gs.insert_grl(model, after="2.convs.1"), model, (x,))
    assert trace(model, ["2"]).opened == {"", "0", "1", "2"}
    assert trace(model, [""]).opened == {""}  # nobody asks


class Reaches(nn.Module):
    """Calls a block that lies three levels down, past modules that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({"deep": nn.Sequential(nn.Sequential(Block()))})
        self.last = Block()

    def forward(self, x):
        return self.last(self.stages["deep"][0][0](x))[0]


def test_a_block_is_opened_wherever_it_lies_and_the_network_is_not_touched():
    model, x = Reaches(), torch.randn(3, 4)
    before = [list(vars(module).items()) for module in model.modules()]
    flips(gs.insert_grl(model, after="last.conv"), model, (x,))
    assert [list(vars(module).items()) for module in model.modules()] == before
    assert all("training" not in module._buffers for module in model.modules())


def test_a_value_that_nobody_can_know_is_not_guessed():
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.block = Untraceable(), Block()

        def forward(self, x):
            return self.block(self.inner(x))[0]

    model = Asks()
    with pytest.raises(gs.TracingError, match=r"'block' .* looks into the value of 'inner', whose forward"):
        gs.insert_grl(model, edge=("inner", "block.add"))
    assert trace(model, ["", "block"], lenient=True).opened == {""}


def test_no_isinstance_of_ours_is_left_in_a_file():
    here = vars(sys.modules[__name__])
    gs.insert_grl(AsksForATensor(), after="first")
    with pytest.raises(gs.TracingError):
        gs.insert_grl(Untraceable(), after="add")
    assert "isinstance" not in here
    assert "isinstance" not in vars(sys.modules[Untraceable.__module__])
    assert torch.is_tensor.__module__ == "torch"


# -------------------------------------------------------------------------- other questions about a value


class Asks(nn.Module):
    """Asks of a value what only the value can tell, and goes on accordingly."""

    def __init__(self, question) -> None:
        super().__init__()
        self.a, self.c, self.question = nn.Linear(6, 6), nn.Linear(6, 3), question

    def forward(self, x):
        return self.c(self.question(self.a(x)))


def caught(h):
    try:
        return h / int(h.shape[0])
    except TypeError:
        return h


def iterates(h):
    try:
        return sum(row.mean() for row in h) + h
    except Exception:
        return h


QUESTIONS = {
    "a dtype in a set": lambda h: h * 2 if h.dtype in {torch.float32, torch.float64} else h,
    "a size in a dict": lambda h: h * {6: 0.5}.get(h.shape[-1], 1.0),
    "a class": lambda h: h * 2 if type(h) is torch.Tensor else h,
    "a class among several": lambda h: (
        h * 2 if isinstance(type(h), type) and type(h) in (torch.Tensor,) else h
    ),
    "a number, with the error caught": caught,
    "the items, with the error caught": iterates,
    "an attribute that it may have": lambda h: getattr(h, "last_hidden_state", h * 2),
    "the grad mode": lambda h: h * 2 if torch.is_grad_enabled() else h,
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_a_forward_goes_on_as_it_would_without_surgery(question):
    model, x = Asks(question), torch.randn(4, 6)
    spliced = gs.insert_grl(model, after="a")
    flips(spliced, model, (x,))
    with torch.no_grad():
        assert torch.equal(spliced(x), model(x))


def test_a_forward_that_asks_whether_two_arguments_are_one_stays_a_call():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, q, kv):
            return self.query(q) if q is kv else self.query(q) + self.key(kv)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.attend = nn.Linear(6, 6), Attends()

        def forward(self, x):
            h = self.a(x)
            return self.attend(h, h)

    model, x = Calls(), torch.randn(4, 6)
    flips(gs.insert_grl(model, after="a"), model, (x,))
    flips(gs.insert_grl(model, after="attend.query"), model, (x,))
    with pytest.raises(gs.TracingError, match="whether q and kv are the same object"):
        gs.insert_grl(model, after="attend.add")


def forks(h):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42)
        return h + torch.randn_like(h)


def chooses_a_kernel(h):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return nn.functional.scaled_dot_product_attention(h[None], h[None], h[None])[0]


@pytest.mark.parametrize("question", [forks, chooses_a_kernel])
def test_a_part_that_runs_under_settings_of_its_own_keeps_them(question):
    model, x = Asks(question), torch.randn(64, 6)
    before = torch.get_rng_state()
    flips(gs.insert_grl(model, after="a"), model, (x,))
    assert torch.equal(torch.get_rng_state(), before)
