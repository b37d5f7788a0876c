"""The proof is not fooled by what surgery did not put there, nor alarmed by it without a reason."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
    assert "there is no reversal" in str(gs.verify_flip(net, example_inputs=x).failures)
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
