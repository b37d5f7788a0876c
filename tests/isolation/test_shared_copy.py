"""share_copy: new objects all the way down, the same tensors, and no way back into the original."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
import weakref
from collections import OrderedDict, deque
from typing import Any, NamedTuple

import pytest
import torch
from small_networks import Net, Shared, image
from torch import nn

from grl_surgery.isolation.shared_copy import COMPILED, find_external_reference, replace_submodule, share_copy
from grl_surgery.nn.reversal import GradientReversal, reversal_disabled


class Tangled(nn.Module):
    """Refers to its own parts from everywhere but the registry of submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.listed = [self.fc, {"inner": (self.fc, 3)}]
        self.bound = self.helper
        self.partial = functools.partial(self.helper, scale=2.0)
        self.kept = nn.ParameterList([nn.Parameter(torch.ones(2))])
        object.__setattr__(self, "hidden", (self.fc,))

    def helper(self, x, scale=1.0):
        return self.fc(x) * scale

    def forward(self, x):
        return self.bound(x) + self.partial(x) + self.listed[1]["inner"][0](x)


def test_every_module_is_a_new_object_of_the_same_class_over_the_same_tensors():
    model = Net()
    twin = share_copy(model)
    for ours, theirs in zip(twin.modules(), model.modules(), strict=True):
        assert ours is not theirs
        assert type(ours) is type(theirs)
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(twin.buffers(), model.buffers(), strict=True))
    assert torch.equal(twin.eval()(image()), model.eval()(image()))


def test_a_module_under_two_names_stays_one_module():
    twin = share_copy(Shared())
    assert twin.a is twin.b


def test_references_that_are_no_submodules_point_into_the_copy():
    model = Tangled()
    twin = share_copy(model)
    assert twin.listed[0] is twin.fc
    assert twin.listed[1]["inner"][0] is twin.fc
    assert twin.hidden[0] is twin.fc
    assert twin.bound.__self__ is twin
    assert twin.partial.func.__self__ is twin
    assert model.listed[0] is model.fc
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), model(x))


def test_changing_the_copy_leaves_the_original_alone():
    model = Tangled()
    twin = share_copy(model)
    twin.eval()
    twin.listed[1]["more"] = 1
    twin.fc.register_forward_hook(lambda *args: None)
    twin.fc.register_state_dict_pre_hook(lambda *args: None)
    twin.extra = nn.Identity()
    del twin.kept
    assert all(module.training for module in model.modules())
    assert model.listed[1] == {"inner": (model.fc, 3)}
    assert not model.fc._forward_hooks
    assert not model.fc._state_dict_pre_hooks
    assert not hasattr(model, "extra")
    assert len(model.kept) == 1


def test_hooks_come_along_and_those_that_know_their_module_know_the_copy():
    model, seen = nn.Linear(2, 2), []
    model.register_forward_hook(lambda module, *args: seen.append(module))
    model.register_load_state_dict_pre_hook(lambda module, *args: seen.append(module))
    twin = share_copy(model)
    twin(torch.zeros(1, 2))
    twin.load_state_dict(model.state_dict())
    assert seen == [twin, twin]
    del model
    twin.load_state_dict(twin.state_dict())


def test_only_the_modules_asked_for_are_copied():
    model = Net()
    twin = share_copy(model, only=[model, model.stage1])
    assert twin.stage1 is not model.stage1
    assert twin.stage1[0] is model.stage1[0]
    assert twin.stage2 is model.stage2


@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")
def test_scripted_modules_stay_shared():
    model = nn.Sequential(torch.jit.freeze(torch.jit.script(nn.ReLU().eval())))
    assert share_copy(model)[0] is model[0]


def test_torch_still_keeps_its_modules_state_where_this_library_looks_for_it():
    held = nn.Module().__dict__
    assert {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"} <= held.keys()
    hooks = [key for key in held if key.endswith("hooks")]
    assert len(hooks) >= 8
    assert all(type(held[key]) in (dict, OrderedDict) for key in hooks)
    graph = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    assert graph.graph is graph.__dict__["_graph"]


# ------------------------------------------------------------- whatever leads to a module, leads to its copy


class Pair(NamedTuple):
    part: Any
    scale: float


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    part: Any


class Runner:
    """Holds a module, and itself."""

    def __init__(self, part: Any) -> None:
        self.part, self.me, self.cache = part, self, {}


class Registry(dict[Any, Any]):
    """A container of the user's."""


WAYS = {
    "named tuple": lambda fc: (Pair(fc, 2.0), lambda way: way.part),
    "frozen dataclass with slots": lambda fc: (Frozen(fc), lambda way: way.part),
    "deque": lambda fc: (deque([fc], maxlen=3), lambda way: way[0]),
    "namespace": lambda fc: (types.SimpleNamespace(part=fc), lambda way: way.part),
    "set": lambda fc: ({fc}, lambda way: next(iter(way))),
    "key": lambda fc: ({fc: 1}, lambda way: next(iter(way))),
    "dict of the user's": lambda fc: (Registry(part=fc), lambda way: way["part"]),
    "object": lambda fc: (Runner(fc), lambda way: way.me.part),
    "method of an object": lambda fc: (Runner([fc]).part.__getitem__, lambda way: way(0)),
    "closure": lambda fc: (lambda: fc, lambda way: way()),
    "default": lambda fc: (lambda part=fc: part, lambda way: way()),
    "closure over a closure": lambda fc: ((lambda get: lambda: get())(lambda: fc), lambda way: way()),
    "weak reference": lambda fc: (weakref.ref(fc), lambda way: way()),
    "weak proxy": lambda fc: (weakref.proxy(fc), lambda way: way.forward.__self__),
    "weak set": lambda fc: (weakref.WeakSet([fc]), lambda way: next(iter(way))),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_copy_finds_its_own_module_by_every_way_that_there_is(name):
    model = nn.Sequential(nn.Linear(4, 4))
    way, follow = WAYS[name](model[0])
    model.__dict__["way"] = way
    twin = share_copy(model)
    assert follow(twin.way) is twin[0]
    assert follow(model.way) is model[0]
    assert model.way is way
    assert type(twin.way) is type(way)


@pytest.mark.parametrize("name", WAYS)
def test_a_module_is_exchanged_in_every_way_that_there_is(name):
    model = nn.Sequential(nn.Linear(4, 4))
    model.__dict__["way"], follow = WAYS[name](model[0])
    tree, new = share_copy(model), nn.Identity()
    replace_submodule(tree, tree[0], new)
    assert follow(tree.way) is tree[0] is new
    assert find_external_reference(tree, lambda module: isinstance(module, nn.Linear)) is None


def test_what_leads_to_no_module_stays_the_same_object():
    model = nn.Linear(2, 2)
    model.settings, model.scale = Runner(3.0), lambda x: x * 2
    model.buffer_of_mine = [torch.ones(2)]
    twin = share_copy(model)
    assert twin.settings is model.settings
    assert twin.scale is model.scale
    assert twin.buffer_of_mine[0] is model.buffer_of_mine[0]


def test_functions_that_share_a_variable_share_it_in_the_copy():
    model, calls = nn.Linear(2, 2), 0

    def count():
        nonlocal calls
        calls += 1
        return model, calls

    def counted():
        return model, calls

    model.__dict__.update(count=count, counted=counted)
    twin = share_copy(model)
    assert twin.count()[0] is twin
    assert twin.counted() == (twin, 1)
    assert model.counted() == (model, 1)


def test_a_way_that_cannot_be_made_anew_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    model.turns = itertools.cycle([model[0]])
    assert find_external_reference(share_copy(model), lambda module: module is model[0]) == "turns"


def test_what_a_hook_collects_stays_the_users():
    model, seen = nn.Sequential(nn.Linear(2, 2)), {}
    model[0].register_forward_hook(lambda module, args, output: seen.update({module: output}))
    model(torch.zeros(1, 2))
    twin = share_copy(model)
    twin(torch.zeros(1, 2))
    assert list(seen) == [model[0], twin[0]]


def test_a_hook_that_knows_a_module_knows_the_copy():
    model, called = nn.Sequential(nn.Linear(2, 2)), []

    def hook(*args):
        called.append(model)

    model[0].register_forward_hook(hook)
    twin = share_copy(model)
    twin(torch.zeros(1, 2))
    assert called == [twin]


def test_a_handle_removes_the_hook_of_its_own_tree():
    model = nn.Sequential(nn.Linear(2, 2))
    model.handles = [model[0].register_forward_hook(lambda *args: None)]
    twin = share_copy(model)
    twin.handles[0].remove()
    assert (len(twin[0]._forward_hooks), len(model[0]._forward_hooks)) == (0, 1)
    again = share_copy(model)
    model.handles[0].remove()
    assert (len(again[0]._forward_hooks), len(model[0]._forward_hooks)) == (1, 0)


@pytest.mark.parametrize("first", ["copy", "original"])
def test_a_lazy_network_and_its_copy_are_both_initialised_by_the_first_run(first):
    model, x = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()).eval(), torch.randn(4, 6)
    twin = share_copy(model)
    networks = [twin, model] if first == "copy" else [model, twin]
    expected = networks[0](x)
    for network in networks * 2:
        assert torch.equal(network(x), expected)
        assert type(network[0]) is nn.Linear
        assert network[0].in_features == 6


def test_attributes_in_slots_come_along():
    class Slotted(nn.Module):
        __slots__ = ("parts", "scale", "unset")

    model = Slotted()
    model.fc = nn.Linear(2, 2)
    object.__setattr__(model, "scale", 3)
    object.__setattr__(model, "parts", [model.fc])
    twin = share_copy(model)
    assert twin.scale == 3
    assert twin.parts == [twin.fc]
    assert not hasattr(twin, "unset")


def test_a_copy_of_a_compiled_network_runs_its_own_forward():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval(), torch.randn(2, 4)
    model.compile(backend="eager")
    assert COMPILED in model.__dict__  # where torch keeps the call
    twin = share_copy(model).train()
    assert not torch.equal(twin(x), model(x))
    assert COMPILED not in twin.__dict__


def test_a_copy_of_a_disabled_reversal_shares_the_coefficient_that_counts():
    model = nn.Sequential(GradientReversal(0.5))
    coefficient = model[0].coeff
    with reversal_disabled(model):
        twin = share_copy(model)
        assert twin[0].coeff is coefficient
        assert model[0].coeff.item() == -1
    assert model[0].coeff is coefficient
    with reversal_disabled(model):
        assert repr(twin[0]) == "GradientReversal(coeff=0.5)"
