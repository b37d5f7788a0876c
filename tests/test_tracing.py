"""Tracing: only as deep as asked, whole functions where they cannot be traced, and sizes that are known."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from small_networks import Modes, Net, Untraceable, image, vector
from torch import nn
from torch.utils.checkpoint import checkpoint

import grl_surgery as gs
from grl_surgery.tracing import trace


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
    assert (traced.steering, set(traced.graphs)) == (("",), {(True,), (False,)})


class Scales(nn.Module):
    """Divides by the root of a size, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x) / math.sqrt(x.shape[-1])


def test_a_function_of_math_becomes_one_operation():
    model = Scales()
    assert "sqrt" in trace(model, []).names()
    assert torch.equal(gs.insert_grl(model, after="conv")(image()), model(image()))


def test_a_function_that_cannot_be_traced_becomes_one_operation():
    model = Resamples()
    assert "resample" in trace(model, []).names()
    spliced = gs.insert_grl(model, after="conv")
    assert torch.equal(spliced(image()), model(image()))
    assert gs.verify_flip(spliced, model, image()).ok


def test_what_cannot_be_traced_stays_a_call_where_leniency_is_asked_for():
    model = nn.Sequential(Untraceable(), nn.Identity())
    assert calls(trace(model, ["0", "0.body"], lenient=True)) == ["0", "1"]
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


def test_a_module_that_is_no_part_of_the_network_is_named():
    class Borrows(nn.Module):
        def forward(self, x):
            return nn.ReLU()(x)

    with pytest.raises(gs.TracingError, match="it calls a ReLU that is not a submodule of the network"):
        gs.insert_grl(Borrows(), after="x")


def test_a_value_computed_from_a_parameter_outside_the_graph_is_not_frozen():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.parameters_in_a_list = [nn.Parameter(torch.ones(6))]

        def forward(self, x):
            return self.fc(x) * (self.parameters_in_a_list[0] * 2)

    with pytest.raises(gs.TracingError, match="computed from a parameter would be frozen"):
        gs.insert_grl(Outside(), before="fc")


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
    with pytest.raises(gs.TracingError, match="the default of its argument 'scale' is a tensor"):
        gs.insert_grl(model, before="fc")
    assert torch.equal(gs.insert_grl(model, after="fc")(vector()), model(vector()))
