"""A private copy is the network: whatever a forward has left behind, copies and files compute the same."""

import copy
import random
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import grl_surgery as gs
from grl_surgery.verify.experiment import private_copy


@dataclass
class Remembered:
    scale: float = 2.0
    last: Any = None
    more: dict[str, Any] = field(default_factory=dict)


class Slotted:
    __slots__ = ("last", "scale")

    def __init__(self) -> None:
        self.scale, self.last = 2.0, None


class Registry(dict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise AssertionError("nothing but the network's own forward reads items here")


class Keeps(nn.Module):
    """Keeps what it computed beside a setting that it reads; `read` and `keep` know where."""

    def __init__(self, memory: Any, read: Any, keep: Any) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 3)
        self.memory, self.read, self.keep = memory, read, keep

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) * self.read(self.memory)
        self.keep(self.memory, y)
        return self.c(torch.relu(y))


def keep_in_list(memory: list[Any], y: Tensor) -> None:
    memory[1:] = [y]


def keep_in_deque(memory: deque[Any], y: Tensor) -> None:
    memory.append(y)
    if len(memory) > 2:
        del memory[1]


MEMORIES = {
    "dict": ({"scale": 2.0}, lambda m: m.get("scale", 1.0), lambda m, y: m.update(last=y)),
    "ordered dict": (OrderedDict(scale=2.0), lambda m: m.get("scale", 1.0), lambda m, y: m.update(last=y)),
    "subclass of dict": (Registry(scale=2.0), lambda m: m.get("scale", 1.0), lambda m, y: m.update(last=y)),
    "list": ([2.0], lambda m: m[0] if m else 1.0, keep_in_list),
    "nested": (
        {"scale": 2.0, "by layer": {"a": []}},
        lambda m: m.get("scale", 1.0),
        lambda m, y: m["by layer"].__setitem__("a", [y]),
    ),
    "tuple": (
        {"pair": (2.0, None)},
        lambda m: m["pair"][0] if m else 1.0,
        lambda m, y: m.update(pair=(m["pair"][0], y)),
    ),
    "dataclass": (Remembered(), lambda m: m.scale, lambda m, y: setattr(m, "last", y)),
    "dict in a dataclass": (Remembered(), lambda m: m.scale, lambda m, y: m.more.update(last=y)),
    "slots": (Slotted(), lambda m: m.scale, lambda m, y: setattr(m, "last", y)),
    "namespace": (SimpleNamespace(scale=2.0), lambda m: m.scale, lambda m, y: setattr(m, "last", y)),
    "deque": (deque([2.0]), lambda m: m[0] if m else 1.0, keep_in_deque),
    "distribution": (
        {"scale": 2.0},
        lambda m: m.get("scale", 1.0),
        lambda m, y: m.update(last=torch.distributions.Normal(y, 1.0, validate_args=False)),
    ),
}


@pytest.fixture(params=MEMORIES)
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network and the spliced one, after one training step of each."""
    torch.manual_seed(0)
    memory, read, keep = MEMORIES[request.param]
    net, x = Keeps(copy.deepcopy(memory), read, keep).eval(), torch.randn(3, 4)
    m = gs.insert_grl(net, after="a", example_inputs=x).eval()
    for network in (net, m):
        network(x).square().sum().backward()
    return net, m, x


def state_of(network: nn.Module) -> str:
    memory: Any = network.memory
    held = {name: getattr(memory, name) for name in getattr(memory, "__slots__", ())}
    return repr((memory, held, getattr(memory, "__dict__", None)))


def test_a_copy_computes_what_the_network_computes_after_a_step(trained):
    net, m, x = trained
    before = state_of(m)
    for network in (net, m):
        expected = network(x)
        twin = private_copy(network, {})
        assert torch.equal(twin(x), expected)
        assert type(twin.memory) is type(network.memory)
    net(x), m(x)
    assert len(state_of(m)) == len(before)


def test_every_file_computes_what_the_users_network_computes_after_a_step(trained, tmp_path: Path):
    net, m, x = trained
    expected = net(x).detach()
    before = state_of(m)
    for name, purpose in (("m.pt2", "training"), ("p.pt2", "inference"), ("m.onnx", None)):
        gs.export(m, tmp_path / name, x, **({"purpose": purpose} if purpose else {}))
        assert state_of(m) == before
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected)
    torch.testing.assert_close(gs.load(tmp_path / "m.pt2")(x), expected)
    torch.testing.assert_close(torch.export.load(tmp_path / "p.pt2").module()(x), expected)
    gs.export(m, tmp_path / "m.safetensors")
    torch.testing.assert_close(gs.load(tmp_path / "m.safetensors", model=net)(x), expected)


def test_the_proof_holds_after_a_step_and_changes_nothing(trained):
    net, m, x = trained
    before = state_of(m), state_of(net)
    report = gs.verify_flip(m, net, x).raise_if_failed()
    assert {row.name for row in report.parameters if row.measured == "flipped"} == {"a.weight", "a.bias"}
    assert (state_of(m), state_of(net)) == before


class Skip(nn.Module):
    """Writes into a list that its parent reads, as deep supervision does in MONAI's DynUNet."""

    def __init__(self, heads: list[Any]) -> None:
        super().__init__()
        self.heads = heads
        self.layer, self.supervised = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.heads[0] = self.supervised(y)
        return y


class DeeplySupervised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)
        self.heads = [torch.rand(1)]
        self.skip = Skip(self.heads)

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc(self.skip(self.a(x)))
        return torch.stack([out, *self.heads], 1) if self.training else out


@pytest.mark.parametrize("point", ["a", "skip", "skip.layer"])
def test_a_list_that_two_modules_share_is_shared_in_the_copy(point: str):
    torch.manual_seed(0)
    net, x = DeeplySupervised().train(), torch.randn(3, 4)
    net(x)
    m = gs.insert_grl(net, after=point, example_inputs=x)
    twin: Any = private_copy(net, {})
    assert twin.heads is twin.skip.heads
    assert twin.heads is not net.heads
    assert torch.equal(twin(x), net(x))
    gs.verify_flip(m, net, x).raise_if_failed()


class Context:
    """Refers to a list that a module holds as well."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values


class ReadsThroughAnObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 8), nn.Linear(8, 3)
        self.values: list[Any] = [1.0]
        self.context = Context(self.values)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.values[0] = y.mean()
        return self.c(y * self.context.values[0])


def test_a_list_that_an_object_refers_to_is_the_list_of_the_copy():
    torch.manual_seed(0)
    net, x = ReadsThroughAnObject(), torch.randn(3, 4)
    net(x)
    twin: Any = private_copy(net, {})
    assert twin.context.values is twin.values
    assert twin.values is not net.values
    other = torch.randn(3, 4)
    assert torch.equal(twin(other), net(other))


def test_a_copy_holds_nothing_of_the_graph_and_the_network_keeps_its_own():
    net, x = DeeplySupervised().train(), torch.randn(3, 4)
    net(x).sum().backward()
    kept = net.heads[0]
    twin: Any = private_copy(net, {})
    assert twin.heads[0].grad_fn is None
    assert net.heads[0] is kept
    assert kept.grad_fn is not None


def test_a_view_that_is_kept_follows_its_parameter_in_the_copy():
    net: Any = nn.Linear(4, 4)
    net.first = net.weight[:1]
    twin: Any = private_copy(net, {})
    with torch.no_grad():
        net.weight.fill_(7.0)
    assert twin.first.eq(7.0).all()


def test_an_export_leaves_the_users_objects_as_they_were(tmp_path: Path):
    memory, read, keep = MEMORIES["dataclass"]
    net, x = Keeps(copy.deepcopy(memory), read, keep), torch.randn(3, 4)
    m = gs.insert_grl(net, after="a", example_inputs=x)
    gs.export(m, tmp_path / "m.pt2", x)
    assert net.memory.last is None
    assert m.memory.last is None


class Norms(nn.Module):
    """Counts its calls, and has batch statistics: state of three kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.calls, self.mean = 0, torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        self.calls += 1
        self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return self.c(y)


def test_the_users_network_that_runs_for_comparison_is_left_as_it_was(tmp_path: Path):
    net, x = Norms().train(), torch.randn(6, 4)
    m = gs.insert_grl(net, after="a", example_inputs=x)
    m(x)
    before = copy.deepcopy({**m.state_dict(), "mean": m.mean}), m.calls, [c.training for c in m.modules()]
    gs.export(m, tmp_path / "m.pt2", x, purpose="inference")
    after = {**m.state_dict(), "mean": m.mean}, m.calls, [c.training for c in m.modules()]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert after[1:] == before[1:]


# ------------------------------------------------------------------------------------------ random numbers

DRAWS = {
    "numpy": np.random.rand,
    "numpy, one mask for each sample": lambda: torch.from_numpy(np.random.rand(2, 1)).float(),
    "random": random.random,
    "torch": lambda: torch.rand(()).item(),
    "a coin of Python's": lambda: 1.0 if random.random() < 0.5 else 3.0,
}


class Draws(nn.Module):
    """Draws while it trains, as SpecAugment, teacher forcing and mixup do."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.a, self.b, self.draw = nn.Linear(4, 4), nn.Linear(4, 2), draw

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            h = h * self.draw()
        return self.b(h)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_a_forward_draws_repeats_and_the_generators_are_put_back(draw: Any):
    net, x = Draws(draw).train(), torch.randn(2, 4)
    m = gs.insert_grl(net, after="a", example_inputs=x)
    states = random.getstate(), repr(np.random.get_state()), torch.random.get_rng_state()
    for seed in (0, 3, 2**40):
        gs.verify_flip(m, net, x, seed=seed).raise_if_failed()
    assert (random.getstate(), repr(np.random.get_state())) == states[:2]
    assert torch.equal(torch.random.get_rng_state(), states[2])
