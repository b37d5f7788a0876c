"""What a proof may cost beside a training step, in bytes and in passes; nothing here looks at a clock.

Each of these has failed on a version broken for the purpose, which the comment above it names.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import grl_surgery as gs
from grl_surgery.verify.fingerprint import fingerprint
from grl_surgery.verify.shared_weights import SharedWeights


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that a call holds at a time, beyond what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def passes(call: Callable[[], Any], operation: str) -> int:
    """How often autograd ran the backward of an operation."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    name = f"autograd::engine::evaluate_function: {operation}"
    return sum(event.count for event in profiled.key_averages() if event.key == name)


def deep(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 4))


# batches in which the weights are all of it, half of it, and next to nothing
SHAPES = {"weights": (512, 4), "both": (256, 256), "values": (32, 4096)}


# Broken: the gradients themselves wanted in place of their fingerprints; weights cloned for every run.
@pytest.mark.parametrize("kind", ["reversal", "edge of two paths", "head"])
@pytest.mark.parametrize(("width", "batch"), SHAPES.values(), ids=SHAPES)
def test_a_proof_holds_at_most_half_as_much_again_as_a_step(width: int, batch: int, kind: str) -> None:
    net, x = deep(width), torch.randn(batch, width)
    if kind == "head":
        m: Any = gs.attach_domain_head(net, "7", hidden=16, example_inputs=x)
    else:
        m = gs.insert_grl(net, after="7")

    def step() -> None:
        found = m(x)
        sum(part.square().mean() for part in (found if kind == "head" else (found,))).backward()
        m.zero_grad(set_to_none=True)

    def proof() -> None:
        assert gs.verify_flip(m, net, x).ok

    step(), proof()
    assert peak(proof) <= 1.5 * peak(step)


# Broken: the oracle run though nothing is mixed; the bare heads' output differentiated as well.
@pytest.mark.parametrize(("kind", "most"), [("reversal", 2), ("head", 4)])
def test_each_network_is_differentiated_once_for_each_objective(kind: str, most: int) -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)), torch.randn(2, 3, 8, 8)
    m = (
        gs.attach_domain_head(net, "1", hidden=8, example_inputs=x)
        if kind == "head"
        else gs.insert_grl(net, "1")
    )
    counted = passes(lambda: gs.verify_flip(m, net, x).raise_if_failed(), "ConvolutionBackward0")
    assert counted == (2 if kind == "reversal" else 4) <= most


# Broken: names outside the sample left among the leaves.
def test_a_sample_differentiates_by_no_other_parameter_and_says_what_is_open() -> None:
    net, x = deep(16), torch.randn(4, 16)
    m = gs.insert_grl(net, after="8")
    report = gs.verify_flip(m, net, x, budget=4).raise_if_failed()
    names = [row.name for row in report.parameters]
    assert names == ["0.weight", "0.bias", "8.weight", "8.bias"]
    assert "a sample of 4 of 18 parameters" in report.verdict
    assert "the other 14 were not looked at" in str(report)
    assert gs.verify_flip(m, net, x, budget=18).notes == ()
    with pytest.raises(gs.SurgeryError, match="budget"):
        gs.verify_flip(m, net, x, budget=0)


def test_each_run_is_announced_before_it_begins() -> None:
    net, x, told = deep(16), torch.randn(4, 16), []
    m = gs.attach_domain_head(net, "7", hidden=16, example_inputs=x)
    gs.verify_flip(m, net, x, progress=lambda *run: told.append(run))
    assert [number for _, number, _ in told] == [1, 2, 3]
    assert {total for *_, total in told} == {3}


def test_half_precision_on_a_processor_is_proved_in_single_and_says_so() -> None:
    net, x = deep(16).half(), torch.randn(4, 16).half()
    seen: list[torch.dtype] = []
    net[3].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    report = gs.verify_flip(gs.insert_grl(net, after="7"), net, x).raise_if_failed()
    assert set(seen) == {torch.float32}
    assert "measured in float32" in report.verdict
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float16}


# ------------------------------------------------------------------------------------- bits of a gradient


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
@pytest.mark.parametrize("size", [1, 7, 2**15 + 1, 3 * 2**15])
def test_a_fingerprint_tells_every_small_difference(dtype: torch.dtype, size: int) -> None:
    gradient = torch.randn(size, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(dtype)
    ours = fingerprint(gradient, "+-")
    assert fingerprint(gradient.clone()).equals(ours)
    assert fingerprint(-gradient).negates(ours)
    assert not fingerprint(-gradient).equals(ours)
    places = torch.arange(size)
    changes = [places == 0, places == size - 1, places % 2 == 1, places % 2**15 == 0]
    for chosen in [change for change in changes if change.any()]:
        other = torch.where(chosen, -gradient, gradient)  # signs alone, in even numbers too
        assert not fingerprint(other).equals(ours)
    if size > 7:
        assert not fingerprint(gradient.roll(2**15)).equals(ours)
        assert not fingerprint(gradient.flip(0)).equals(ours)


def test_zeros_have_no_sign_and_nan_equals_nothing() -> None:
    zero, nan = torch.tensor([0.0, -0.0, 1.0]), torch.tensor([float("nan"), 1.0])
    assert fingerprint(-zero.neg().neg()).negates(fingerprint(zero, "-"))
    assert fingerprint(torch.tensor([-0.0, 0.0, 1.0])).equals(fingerprint(zero))
    assert not fingerprint(nan).equals(fingerprint(nan))
    assert fingerprint(torch.zeros(3)).is_zero
    assert fingerprint(torch.zeros(0)).is_zero


# ------------------------------------------------------------------------------------- the network's weights


# Broken: put_back leaves out what was kept.
def test_weights_are_shared_until_something_writes_into_them() -> None:
    weights = {"a": torch.randn(3, requires_grad=True), "b": torch.randn(3), "c": torch.randn(3)}
    values = {name: weight.detach().clone() for name, weight in weights.items()}
    shared = SharedWeights(weights)
    assert all(leaf.data_ptr() == weights[name].data_ptr() for name, leaf in shared.leaves.items())
    with shared, torch.no_grad():
        shared.leaves["a"].mul_(2)
        shared.leaves["b"].data[1:] = 7.0
        torch._foreach_add_([shared.leaves["b"]], 1.0)
        shared.leaves["c"] + 1
    written = shared.written()
    assert written.keys() == {"a", "b"}
    assert torch.equal(written["a"], values["a"] * 2)
    shared.put_back()
    assert all(torch.equal(weight, values[name]) for name, weight in weights.items())


def test_a_forward_that_fails_half_way_leaves_the_weights_as_they_were() -> None:
    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.zero_()
            raise RuntimeError("half way")

    net = nn.Sequential(nn.Linear(4, 4), Fails(4, 4))
    before = net[1].weight.detach().clone()
    with pytest.raises(gs.SurgeryError, match="half way"):
        gs.verify_flip(gs.insert_grl(net, after="0"), net, torch.randn(2, 4))
    assert torch.equal(net[1].weight, before)
