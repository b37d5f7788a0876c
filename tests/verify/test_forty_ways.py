"""The proof is not fooled by what surgery did not put there, nor alarmed by it without a reason."""

import math
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import grl_surgery as gs


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Any = 1.0) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return -ctx.alpha * gradient, None


class Straight(torch.autograd.Function):
    """Rounds, and passes the gradient on: a Function that reverses nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Call(nn.Module):
    """One function, as a layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class InItsForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(Reverse.apply(x))


class ByHook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        if x.requires_grad:
            x.register_hook(lambda gradient: -gradient)
        return self.net(x)


class ByArithmetic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.detach() - x


def backward_hooked() -> nn.Module:
    classifier = nn.Sequential(nn.Identity(), nn.Linear(16, 2))
    classifier[0].register_full_backward_hook(lambda m, given, out: (-given[0],))
    return classifier


CANCELLING = {
    "in the classifier's forward": InItsForward,
    "a layer of the classifier": lambda: nn.Sequential(Call(Reverse.apply), nn.Linear(16, 2)),
    "behind a hidden layer": lambda: nn.Sequential(
        nn.Linear(16, 8), nn.ReLU(), Call(Reverse.apply), nn.Linear(8, 2)
    ),
    "behind the logits": lambda: nn.Sequential(nn.Linear(16, 2), Call(Reverse.apply)),
    "another strength": lambda: nn.Sequential(Call(lambda x: Reverse.apply(x, 0.1)), nn.Linear(16, 2)),
    "a hook on a tensor": ByHook,
    "arithmetic": lambda: nn.Sequential(ByArithmetic(), nn.Linear(16, 2)),
    "a backward hook of a module": backward_hooked,
    "the library's own layer": lambda: nn.Sequential(gs.GradientReversal(), nn.Linear(16, 2)),
    "the library's own function": lambda: nn.Sequential(Call(gs.reverse_gradient), nn.Linear(16, 2)),
}


def features() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 7))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("make", CANCELLING.values(), ids=CANCELLING)
def test_a_head_whose_classifier_reverses_back_fails_and_both_are_named(make: Any, mode: Any):
    net, x = features(), torch.randn(6, 8)
    m = gs.attach_domain_head(net, after="1", classifier=make(), example_inputs=x)
    report = gs.verify_flip(m, net, x, mode=mode)
    assert not report.ok
    assert "domain.reversal" in str(report.failures)
    assert "domain.classifier" in str(report.failures)


HARMLESS = {
    "plain": lambda: nn.Linear(16, 2),
    "a Function that reverses nothing": lambda: nn.Sequential(Call(Straight.apply), nn.Linear(16, 2)),
    "tanh and dropout": lambda: nn.Sequential(
        Call(torch.tanh), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 2)
    ),
    "batch norm": lambda: nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)),
    "identity": lambda: nn.Sequential(nn.Identity(), Call(lambda x: x), nn.Linear(16, 2)),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("make", HARMLESS.values(), ids=HARMLESS)
def test_a_classifier_that_reverses_nothing_is_no_alarm(make: Any, mode: Any):
    net, x = features(), torch.randn(6, 8)
    m = gs.attach_domain_head(net, after="1", classifier=make(), example_inputs=x)
    gs.verify_flip(m, net, x, mode=mode).raise_if_failed()


class Dann(nn.Module):
    """The most copied network: the coefficient is an argument of forward."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor, alpha: Any = 1.0) -> Any:
        f = self.f(x)
        return self.c(f), self.d(Reverse.apply(f, alpha))


class OnlyDomain(Dann):
    def forward(self, x: Tensor, alpha: Any = 1.0) -> Any:
        return self.d(Reverse.apply(self.f(x), alpha))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 0.1, 3])
@pytest.mark.parametrize("kind", [Dann, OnlyDomain])
def test_a_network_with_a_pasted_reversal_alone_is_proved(kind: Any, alpha: float):
    torch.manual_seed(0)
    report = gs.verify_flip(kind(), example_inputs=(torch.randn(5, 6), alpha))
    assert report.ok, report.failures
    assert report.reversals[0].coeff == pytest.approx(alpha)
    measured = {row.name: row.measured for row in report.parameters}
    assert measured["f.weight"] == ("mixed" if kind is Dann else "flipped")
    assert measured["d.weight"] == "unchanged"


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", [Dann, OnlyDomain])
def test_what_is_adopted_is_proved_with_the_coefficient_as_an_argument(kind: Any, alpha: float):
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    model = gs.adopt(kind(), (x, alpha)).model
    gs.verify_flip(model, example_inputs=(x, alpha)).raise_if_failed()


def test_a_network_without_any_reversal_proves_nothing_and_diagnoses_none():
    net, x = features(), torch.randn(6, 8)
    report = gs.verify_flip(net, example_inputs=x)
    assert report.status == "NONE"
    assert not report.ok
    assert report.verdict.startswith("there is no reversal in this network")
    assert str(gs.diagnose(net, x)).startswith("NONE")


def test_a_cut_before_a_pasted_reversal_fails():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), Call(Reverse.apply), nn.Linear(8, 2)), torch.randn(5, 6)
    m = gs.insert_grl(net, edge=("0", "1"), example_inputs=x)
    report = gs.verify_flip(m, net, x)
    assert not report.ok
    assert "cancel" in str(report.failures)


# ------------------------------------------------------------------------------------- coefficients that move


class Layer(nn.Module):
    def __init__(self, value: Any, how: str) -> None:
        super().__init__()
        if how == "buffer":
            self.register_buffer("alpha", value)
        elif how == "parameter":
            self.alpha = nn.Parameter(value, requires_grad=False)
        else:
            self.alpha = value

    def forward(self, x: Tensor) -> Tensor:
        return Reverse.apply(x, self.alpha)


COEFFICIENTS = {
    "int": (1, "attribute"),
    "float": (0.5, "attribute"),
    "whole-number tensor": (torch.tensor(1), "attribute"),
    "whole-number buffer": (torch.tensor(2), "buffer"),
    "int32 buffer": (torch.tensor(1, dtype=torch.int32), "buffer"),
    "one element": (torch.tensor([1]), "buffer"),
    "float buffer": (torch.tensor(0.5), "buffer"),
    "parameter": (torch.tensor(0.5), "parameter"),
    "one-element parameter": (torch.tensor([0.5]), "parameter"),
}


@pytest.mark.parametrize(("value", "how"), COEFFICIENTS.values(), ids=COEFFICIENTS)
def test_a_coefficient_is_adopted_under_its_name_and_proved(value: Any, how: str):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), Layer(value, how), nn.Linear(8, 2)), torch.randn(5, 6)
    model = gs.adopt(net, x).model
    assert list(model.state_dict()) == list(net.state_dict())
    gs.verify_flip(model, example_inputs=x).raise_if_failed()
    found = []
    for network in (net, model):
        network[1].alpha = nn.Parameter(torch.tensor(0.25)) if how == "parameter" else torch.tensor(0.25)
        network(x).square().sum().backward()
        found.append(network[0].weight.grad.clone())
        network.zero_grad()
    assert torch.equal(*found)


# ------------------------------------------------------------------------------------------ rows are samples


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(6, 8, batch_first=batch_first), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.rnn(x)
        return self.out(h[-1])


@pytest.mark.parametrize(("point", "steps"), [("rnn[0]", 4)])
@pytest.mark.filterwarnings("ignore:at ")
def test_a_head_that_mixes_samples_fails_with_the_layout_to_use(point: str, steps: int):
    torch.manual_seed(0)
    net, x = Recurrent(), torch.randn(steps, 4, 6)
    over_the_batch = nn.Sequential(Call(lambda value: value.mean(1)), nn.Linear(8, 2))
    m = gs.attach_domain_head(net, point, classifier=over_the_batch, pool="none", example_inputs=x)
    report = gs.verify_flip(m, net, x)
    assert not report.ok
    assert "pool='lnc'" in str(report.failures)


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.filterwarnings("ignore:at ")
def test_a_head_over_the_right_axis_passes_with_batch_statistics_too(norm: Any):
    torch.manual_seed(0)
    net, x = Recurrent(batch_first=True), torch.randn(4, 7, 6)
    m = gs.attach_domain_head(net, "rnn[0]", hidden=64, norm=norm, example_inputs=x)
    gs.verify_flip(m, net, x).raise_if_failed()


# ------------------------------------------------------------------------------ forty ways, rightly answered


class Body(nn.Module):
    """Two layers, what is done between them, and a last one."""

    def __init__(self, between: Any = None, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.between = between or (lambda self, h: h)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.tanh(self.between(self, self.a(x)))))


def cut(net: nn.Module, after: str = "a", x: Tensor | None = None) -> tuple[nn.Module, nn.Module, Tensor]:
    x = torch.randn(6, 8) if x is None else x
    return gs.insert_grl(net, after=after, example_inputs=x), net, x


def head(net: nn.Module, after: str = "a", **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    x = torch.randn(6, 8)
    return gs.attach_domain_head(net, after=after, hidden=8, example_inputs=x, **options), net, x


def by_no_grad(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        twice = 2 * h
    return twice - h


def by_hook(self: Any, h: Tensor) -> Tensor:
    h = h * 1.0
    if h.requires_grad:
        h.register_hook(torch.neg)
    return h


REVERSED_BACK = {
    "plain operations": lambda self, h: 2 * h.detach() - h,
    "plain operations with a strength": lambda self, h: 1.5 * h.detach() - 0.5 * h,
    "lerp": lambda self, h: torch.lerp(h.detach(), h, -1.0),
    "plain operations on data": lambda self, h: (h + h).data - h,
    "plain operations under no_grad": by_no_grad,
    "a function": lambda self, h: Reverse.apply(h),
    "a function with a strength": lambda self, h: Reverse.apply(h, 0.3),
    "a tensor hook": by_hook,
}


@pytest.mark.parametrize("kind", ["insert", "attach", "before"])
@pytest.mark.parametrize("between", REVERSED_BACK.values(), ids=REVERSED_BACK)
def test_what_the_network_itself_reverses_back_on_the_same_path_fails(between: Any, kind: str):
    torch.manual_seed(0)
    net = Body(between)
    m, _, x = head(net, "b") if kind == "attach" else cut(net, "a" if kind == "insert" else "b")
    report = gs.verify_flip(m, net, x)
    assert report.status == "FAILED"
    assert "cancel" in report.verdict
    assert ("grl_" in report.verdict) or ("domain.reversal" in report.verdict)


class OwnDiscriminator(nn.Module):
    """A DANN whose pasted reversal is on another path than the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a(x))
        return self.c(self.b(h)), self.d(Reverse.apply(h))


class Wrapper(nn.Module):
    """As DataParallel wraps: the network is ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Deep(nn.Module):
    """Deep supervision: three outputs of three depths while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        one = torch.tanh(self.a(x))
        two = torch.tanh(self.b(one))
        return (self.c(two), two, one) if self.training else self.c(two)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(8, 8), nn.Linear(8, 8), reentrant

    def forward(self, x: Tensor) -> Tensor:
        def twice(h: Tensor) -> Tensor:
            return torch.tanh(self.b(torch.tanh(self.b(h))))

        h = self.a(x)
        for _ in range(2):  # the same weights in two segments
            h = checkpoint(twice, h, use_reentrant=self.reentrant)
        return h


class Autocast(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x).float()


class Functional(Body):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.func.functional_call(self.b, dict(self.b.named_parameters()), (self.a(x),))
        return self.c(h)


class Vmapped(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.vmap(self.b)(torch.tanh(self.a(x))))


class UnrolledBranch(Body):
    """Takes its way by a value, which no graph shows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > -1e9 else x


class MovesItself(Body):
    """Writes into its own weights and buffers, by every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.k = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.no_grad():
            self.k.weight.mul_(0.9).add_(self.a.weight, alpha=0.1)
            self.k.bias.data.clamp_(-0.01, 0.01)
            self.mean.lerp_(h.mean(0), 0.5)
        return self.c(self.b(h + self.k(x)) - self.mean)


def hooked(kind: str) -> nn.Module:
    net = Body()
    if kind == "forward":
        net.a.register_forward_hook(lambda m, args, out: out * 2)
    elif kind == "pre":
        net.b.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    elif kind == "backward":
        net.b.register_full_backward_hook(lambda m, given, out: (given[0] * 0.5,))
    else:
        net.register_forward_hook(lambda m, args, out: out.tanh())
    return net


def in_place() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            a=nn.Linear(8, 8),
            relu=nn.ReLU(inplace=True),
            b=nn.Linear(8, 8),
            s=nn.SiLU(inplace=True),
            c=nn.Linear(8, 3),
        )
    )


def parametrized(way: Any) -> nn.Module:
    net = Body()
    way(net.a), way(net.c)
    return net


def zeros() -> nn.Module:
    net = Body()
    nn.init.zeros_(net.c.weight), nn.init.zeros_(net.b.weight)
    return net


HONEST = {
    "a pasted reversal on another path": lambda: cut(OwnDiscriminator(), "b"),
    "a pasted reversal beside a head on another path": lambda: head(OwnDiscriminator(), "b"),
    "a straight-through estimator": lambda: cut(Body(lambda self, h: Straight.apply(h))),
    "a straight-through estimator of plain operations": lambda: cut(
        Body(lambda self, h: h + (h.round() - h).detach())
    ),
    "a value detached and used": lambda: cut(Body(lambda self, h: h * torch.sigmoid(h.detach()))),
    "a stop of half the gradient": lambda: cut(Body(lambda self, h: 0.5 * h + 0.5 * h.detach())),
    "deep supervision": lambda: cut(Deep(), "b"),
    "deep supervision and a head": lambda: head(Deep(), "b"),
    "tied weights": lambda: cut(Tied(), "a"),
    "checkpointing": lambda: cut(Checkpointed(False), "a"),
    "reentrant checkpointing": lambda: cut(Checkpointed(True), "a"),
    "in place behind the cut": lambda: cut(in_place(), "a"),
    "autocast inside": lambda: cut(Autocast(), "b"),
    "a functional call": lambda: cut(Functional(), "a"),
    "a layer under vmap": lambda: cut(Vmapped(), "b"),
    "a wrapper": lambda: cut(Wrapper(Body()), "module.b"),
    "a wrapper around a wrapper": lambda: cut(Wrapper(Wrapper(Body())), "module.module.a"),
    "a way chosen by a value": lambda: cut(UnrolledBranch(), "b"),
    "a head where a way is chosen by a value": lambda: head(UnrolledBranch(), "b"),
    "weights and buffers that move themselves": lambda: cut(MovesItself(), "b"),
    "a forward hook": lambda: cut(hooked("forward"), "a"),
    "a forward pre-hook": lambda: cut(hooked("pre"), "a"),
    "a backward hook that scales": lambda: cut(hooked("backward"), "c"),
    "a hook on the root": lambda: cut(hooked("root"), "b"),
    "weight norm": lambda: cut(parametrized(nn.utils.parametrizations.weight_norm), "b"),
    "spectral norm": lambda: cut(parametrized(nn.utils.parametrizations.spectral_norm), "b"),
    "orthogonal weights": lambda: cut(parametrized(nn.utils.parametrizations.orthogonal), "b"),
    "weights of zero": lambda: cut(zeros(), "a"),
    "bfloat16": lambda: cut(Body().bfloat16(), x=torch.randn(6, 8).bfloat16()),
    "half precision": lambda: cut(Body().half(), x=torch.randn(6, 8).half()),
    "float64": lambda: cut(Body().double(), x=torch.randn(6, 8).double()),
    "one sample": lambda: cut(Body(), x=torch.randn(1, 8)),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("make", HONEST.values(), ids=HONEST)
def test_what_is_right_is_no_alarm_and_leaves_no_trace(make: Any, mode: Any):
    torch.manual_seed(0)
    m, net, x = make()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    report = gs.verify_flip(m, net, x, mode=mode)
    assert report.ok, report
    assert {row.measured for row in report.parameters} & {"flipped", "mixed"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def taken_out() -> Any:
    m, net, x = cut(Body())
    m.grl_a = nn.Identity()
    return m, net, x


def detaching() -> Any:
    m, net, x = head(Body())
    m.domain.register_forward_hook(lambda module, args, out: out.detach())
    return m, net, x


def detached_inside() -> Any:
    return head(Body(), classifier=nn.Sequential(Call(lambda x: x.detach()), nn.Linear(8, 2)))


def hook_on(kind: Any) -> Any:
    m, net, x = cut(Body())
    kind(m.grl_a)
    return m, net, x


def frozen() -> Any:
    net = Body()
    net.a.requires_grad_(False)
    return cut(net)


def disabled() -> Any:
    m, net, x = cut(Body())
    m.grl_a.coeff.fill_(-1.0)
    return m, net, x


def under_no_grad(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        return self.b(h)


DISHONEST = {
    "the reversal was exchanged for the identity": (taken_out, ""),
    "a hook detaches what the head gives": (detaching, "lost|no gradient reaches"),
    "the classifier detaches": (detached_inside, "lost|no gradient|nothing is proved"),
    "a backward hook on the reversal negates": (
        lambda: hook_on(lambda grl: grl.register_full_backward_hook(lambda m, given, out: (-given[0],))),
        "",
    ),
    "a forward hook on the reversal scales": (
        lambda: hook_on(lambda grl: grl.register_forward_hook(lambda m, args, out: out * 2)),
        "the forward differs",
    ),
    "everything upstream is frozen": (frozen, "no gradient reaches"),
    "a negative coefficient": (disabled, "must be finite and not negative"),
    "only a path without gradients behind it": (
        lambda: cut(Body(under_no_grad)),
        "no gradient reaches",
    ),
}


@pytest.mark.parametrize(("make", "words"), DISHONEST.values(), ids=DISHONEST)
def test_what_is_wrong_fails_and_is_said(make: Any, words: str):
    torch.manual_seed(0)
    m, net, x = make()
    report = gs.verify_flip(m, net, x)
    assert report.status == "FAILED", report
    assert re.search(words, "\n".join(report.failures))
    assert re.search("NOT PROVED|WRONG|DIFFERS", report.verdict)


class Schedules(nn.Module):
    """The coefficient is computed in the forward, from a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.d, self.step = nn.Linear(6, 8), nn.Linear(8, 2), 3

    def forward(self, x: Tensor) -> Tensor:
        alpha = 2.0 / (1.0 + math.exp(-self.step / 4)) - 1.0
        return self.d(Reverse.apply(self.f(x), alpha))


def test_a_schedule_inside_the_forward_is_proved_as_it_is():
    torch.manual_seed(0)
    report = gs.verify_flip(Schedules(), example_inputs=torch.randn(5, 6)).raise_if_failed()
    assert {row.name for row in report.parameters if row.measured == "flipped"} == {"f.weight", "f.bias"}
    assert report.reversals[0].coeff == pytest.approx(2.0 / (1.0 + math.exp(-0.75)) - 1.0, rel=1e-5)


def test_rows_of_a_head_on_a_root_without_a_graph_say_what_is_known():
    torch.manual_seed(0)
    m, net, x = head(UnrolledBranch(), "b")
    rows = {(row.objective, row.name): row for row in gs.verify_flip(m, net, x).parameters}
    own = next(name for _, name in rows if name.startswith("domain."))
    assert (rows["domain", own].predicted, rows["domain", own].measured) == ("unchanged", "unchanged")
    assert (rows["output", own].predicted, rows["output", own].measured) == ("unreached", "unreached")
    assert rows["domain", "c.weight"].measured == "unreached"
    assert rows["domain", "a.weight"].measured == "flipped"
