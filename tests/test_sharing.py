"""share_copy: new objects all the way down, the same tensors, and no way back into the original."""

from __future__ import annotations

import functools
from collections import OrderedDict

import pytest
import torch
from small_networks import Net, Shared, image
from torch import nn

from grl_surgery.sharing import share_copy


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
