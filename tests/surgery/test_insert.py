"""insert_grl, reversals and strip, against eager hooks that know neither torch.fx nor this library."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
from typing import NamedTuple

import pytest
import torch
from oracles import assert_same_gradients, assert_untouched, gradients, names, reversed_at, snapshot
from small_networks import (
    Colliding,
    Constants,
    Containers,
    DrawsInPython,
    InPlace,
    KeepsFrozen,
    KeywordOnly,
    Modes,
    Net,
    Ordered,
    Pair,
    Pasted,
    Repeated,
    Residual,
    Shared,
    Tuples,
    Untraceable,
    image,
    vector,
)
from torch import nn

import grl_surgery as gs

# ------------------------------------------------------------------------------------------- where to cut


@pytest.mark.parametrize("path", ["stem", "stage1", "stage1.0", "stage1.1.conv", "stage2.0.norm", "fc"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_after_a_module_equals_a_hook_on_its_output(path, training):
    model, x = Net().train(training), image()
    spliced = gs.insert_grl(model, after=path)
    assert_same_gradients(gradients(spliced, x), reversed_at(model, path, x))


def test_before_a_module_equals_after_what_feeds_it():
    model, x = Net(), image()
    found = gradients(gs.insert_grl(model, before="stage2"), x)
    assert_same_gradients(found, reversed_at(model, "stage1", x))


def test_an_edge_into_a_sum_is_reversed_and_the_other_edge_is_not():
    model, x = Net(), image()
    plain = gradients(model, x)
    by_norm = gradients(gs.insert_grl(model, edge=("stage2.1.norm", "stage2.1.add")), x)
    assert torch.equal(by_norm["stage2.1.conv.weight"], -plain["stage2.1.conv.weight"])
    assert not torch.equal(by_norm["stage2.0.conv.weight"], -plain["stage2.0.conv.weight"])
    by_input = gradients(gs.insert_grl(model, edge="stage2.0 -> stage2.1.add"), x)
    assert torch.equal(by_input["stage2.1.conv.weight"], plain["stage2.1.conv.weight"])
    both = {name: by_norm[name] + by_input[name] for name in plain if name.startswith("stage1.")}
    assert all(gradient.abs().max() < 1e-5 for gradient in both.values())


def test_the_two_arguments_of_a_sum_with_itself_are_told_apart_by_the_edge():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            x = self.fc(x)
            return x + x

    model, x = Doubled(), vector()
    with pytest.raises(
        gs.AmbiguousPointError, match=r"'add' uses 'fc' 2 times.*\n.*Edge\('fc', 'add', '0'\)"
    ):
        gs.insert_grl(model, edge=("fc", "add"))
    edge = next(edge for edge in gs.graph(model).edges if edge.target == "add" and edge.arg == "1")
    assert all(not gradient.any() for gradient in gradients(gs.insert_grl(model, edge=edge), x).values())


@pytest.mark.parametrize(
    ("selector", "count"),
    [
        (["stem", "fc"], 2),
        (["stem", "stem"], 1),
        ("glob:stage1.*", 2),
        ("glob:stage?.*.add", 4),
        ("glob:**.norm", 4),
        (r"re:stage\d", 2),
        (Residual, 4),
        (nn.Conv2d, 5),
        (lambda node: node.type == "add", 4),
        (["stem", "glob:stage1.*", Residual], 5),
    ],
    ids=[
        "list",
        "twice",
        "children",
        "operations",
        "deep",
        "regex",
        "class",
        "torch class",
        "predicate",
        "mixed",
    ],
)
def test_points_are_selected_by_lists_patterns_classes_and_predicates(selector, count):
    model, x = Net().eval(), image()
    spliced = gs.insert_grl(model, after=selector)
    assert len(gs.reversals(spliced)) == count
    assert torch.equal(spliced(x), model(x))
    assert gs.verify_flip(spliced, model, x).ok


def test_a_predicate_can_look_at_shapes():
    spliced = gs.insert_grl(Net(), after=lambda node: node.shape == (2, 3), example_inputs=image())
    assert list(gs.reversals(spliced)) == ["grl_fc"]


def test_after_a_parameter_is_after_every_use_of_it_also_inside_the_layer_that_holds_it():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(torch.tanh(nn.functional.linear(x, self.layer.weight)))

    model, x = Tied(), vector()
    plain, found = gradients(model, x), gradients(gs.insert_grl(model, after="layer.weight"), x)
    assert torch.equal(found["layer.weight"], -plain["layer.weight"])
    assert torch.equal(found["layer.bias"], plain["layer.bias"])


def test_one_item_of_a_tuple_is_reversed_for_those_who_take_it_and_those_who_take_the_whole():
    model, x = Tuples(), vector()
    plain = gradients(model, x)
    spliced = gs.insert_grl(model, after="encoder[1]")
    assert type(spliced(x)) is Pair
    found = gradients(spliced, x)
    assert torch.equal(found["encoder.b.weight"], -plain["encoder.b.weight"])
    assert torch.equal(found["encoder.a.weight"], plain["encoder.a.weight"])


def test_an_item_of_a_traced_module_that_returns_a_tuple_can_be_chosen():
    model, x = Tuples(), vector()
    spliced = gs.insert_grl(gs.insert_grl(model, after="encoder.a"), after="encoder[1]")
    plain, found = gradients(model, x), gradients(spliced, x)
    assert torch.equal(found["encoder.b.weight"], -plain["encoder.b.weight"])
    with pytest.raises(gs.ShapeError, match=r"'encoder' is made of 2 tensors: choose one\n.*encoder\[0\]"):
        gs.insert_grl(spliced, after="encoder")


def test_a_whole_tuple_is_refused_when_the_network_runs():
    with pytest.raises(gs.ShapeError, match="tuple"):
        gs.insert_grl(Tuples(), after="encoder")(vector())


def test_a_size_is_no_point():
    class Reshapes(nn.Module):
        def forward(self, x):
            return x.view(x.size(0), -1)

    with pytest.raises(gs.ShapeError, match="is a size"):
        gs.insert_grl(Reshapes(), after="size")


def test_a_dict_of_modules_and_a_dict_as_output_work():
    model, x = Containers(), vector()
    spliced = gs.insert_grl(model, after=["layers.1", "heads.left"])
    plain, found = gradients(model, x), gradients(spliced, x)
    assert list(spliced(x)) == ["left", "right"]
    assert torch.equal(found["heads.left.weight"], -plain["heads.left.weight"])
    assert torch.equal(found["heads.right.weight"], plain["heads.right.weight"])


def test_the_class_of_a_returned_mapping_is_kept():
    model, x = Ordered(), vector()
    assert type(gs.insert_grl(model, after="fc")(x)) is type(model(x))


# -------------------------------------------------------------------------------------------------- names


def test_modules_called_like_operations_numbers_and_torchvisions_suffix_keep_apart():
    model, x = Colliding(), vector()
    assert names(model) == ["x", "block_1", "block", "add#1", "odd##1", "add#2", "add#3", "output"]
    for path in ("block_1", "block", "odd#1"):
        spliced = gs.insert_grl(model, after=path.replace("#", "##"))
        assert_same_gradients(gradients(spliced, x), reversed_at(model, path, x))


def test_repeated_calls_are_numbered_and_the_bare_name_lists_them():
    model, x = Repeated(), vector()
    assert "act#3" in names(model)
    with pytest.raises(gs.AmbiguousPointError, match="nearest: act#1, act#2, act#3"):
        gs.insert_grl(model, after="act")
    plain, found = gradients(model, x), gradients(gs.insert_grl(model, after="act#2"), x)
    assert torch.equal(found["second.weight"], -plain["second.weight"])
    assert torch.equal(found["third.weight"], plain["third.weight"])
    assert torch.equal(
        gradients(gs.insert_grl(model, after="relu_1"), x)["third.weight"], -plain["third.weight"]
    )


def test_a_module_shared_under_two_names_is_one_module_called_twice():
    model = Shared()
    assert names(model)[1:5] == ["a#1", "tanh#1", "a#2", "tanh#2"]
    with pytest.raises(gs.AmbiguousPointError, match="nearest: a#1, a#2"):
        gs.insert_grl(model, after="b")
    spliced = gs.insert_grl(model, after="b#1")
    assert spliced.a is spliced.b
    assert gs.verify_flip(spliced, model, vector()).ok


def test_a_block_in_a_list_that_has_another_name_as_well_can_be_cut_inside():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Repeated()])
            self.alias = self.layers[0]

        def forward(self, x):
            return self.alias(self.layers[0](x))

    model, x = Aliased(), vector()
    spliced = gs.insert_grl(model, after="alias.first#1")
    assert list(gs.reversals(spliced)) == ["grl_layers_0_first_1"]
    assert gs.verify_flip(spliced, model, x).ok


def test_names_are_the_same_in_train_and_in_eval_and_on_the_result():
    model = Modes()
    in_train, in_eval = names(model.train()), names(model.eval())
    assert "relu#3" in in_train
    assert set(in_eval) < set(in_train)
    spliced = gs.insert_grl(model, after="relu#3")
    assert set(names(spliced)) - {"grl_relu_3"} == set(in_eval)
    assert set(names(spliced.train())) - {"grl_relu_3"} == set(in_train)


# --------------------------------------------------------------------------------- the original, the result


@pytest.mark.parametrize(
    "keywords",
    [
        {"after": "stage1.0.conv"},
        {"after": "nowhere"},
        {"after": "stage1", "coeff": -1.0},
        {"edge": ("stem", "fc")},
        {"after": ["stem", "nowhere"]},
    ],
    ids=["done", "no such point", "bad coefficient", "no such edge", "half of a list"],
)
def test_the_original_is_untouched_also_when_the_call_fails(keywords):
    model = Net()
    model.stage1.eval()
    model.fc.register_forward_hook(lambda *args: None)
    before = snapshot(model)
    try:
        spliced = gs.insert_grl(model, **keywords)
    except gs.SurgeryError:
        pass
    else:
        spliced.eval()
        spliced.stage2.register_forward_hook(lambda *args: None)
        spliced.new = nn.Identity()
    assert_untouched(model, before)


def test_tracing_that_fails_half_way_leaves_no_proxy_behind():
    class Stores(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.last = None

        def forward(self, x):
            self.last = self.fc(x)
            return self.last if self.last.sum() > 0 else x

    model = Stores()
    with pytest.raises(gs.TracingError, match=r"the forward of the root \(Stores\) cannot be traced"):
        gs.insert_grl(model, after="sum")
    assert model.last is None


def test_parameters_are_shared_and_checkpoints_load_both_ways():
    model = Net()
    spliced = gs.insert_grl(model, after="stage1.0.conv")
    assert list(spliced.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(spliced.parameters(), model.parameters(), strict=True))
    spliced.load_state_dict(Net().state_dict(), strict=True)
    Net().load_state_dict(spliced.state_dict(), strict=True)


def test_blocks_keep_their_class_and_the_network_its_attributes():
    spliced = gs.insert_grl(Net(), after="stage1.0.conv")
    assert isinstance(spliced, torch.fx.GraphModule)
    assert isinstance(spliced.stage1[0], Residual)
    assert spliced.num_features == 4


def test_unused_modules_and_parameters_stay():
    model = Net()
    model.unused = nn.Linear(2, 2)
    model.token = nn.Parameter(torch.zeros(2))
    spliced = gs.insert_grl(model, after="stem")
    assert list(spliced.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize(
    ("make", "point", "x"),
    [(Net, "stage1.0.add", image()), (Modes, "relu#3", vector()), (Constants, "fc", vector())],
    ids=["net", "two graphs", "constant"],
)
def test_copies_and_pickles_compute_the_same_and_can_be_cut_again(copied, make, point, x):
    spliced = gs.insert_grl(make(), after=point, coeff=0.5)
    twin = copied(spliced)
    for training in (True, False):
        assert_same_gradients(gradients(twin.train(training), x), gradients(spliced.train(training), x))
    assert names(twin) == names(spliced)
    assert float(next(iter(gs.reversals(twin).values())).coeff) == 0.5
    assert len(gs.reversals(gs.insert_grl(twin, after=names(make())[-2]))) == 2


def test_train_and_eval_do_what_the_original_does():
    model, x = Modes(), vector()
    spliced = gs.insert_grl(model, after="body")
    for training in (True, False, True):
        model.train(training), spliced.train(training)
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        assert torch.equal(spliced(x), expected)
    assert [m.training for m in gs.insert_grl(model.eval(), after="body").modules()].count(True) == 0


def test_a_mode_that_was_not_traced_is_refused_and_not_guessed():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(x) if self.training else x

    model = nn.Sequential(Part(), Part())
    spliced = gs.insert_grl(model, after=["0.fc", "1.fc"])
    assert "fc" in dict(spliced.get_submodule("0").named_children())
    getattr(spliced, "0").eval()
    with pytest.raises(gs.TracingError, match=r"no graph for 0.training=False, 1.training=True"):
        spliced(vector())


def test_a_networks_own_train_method_is_obeyed():
    spliced = gs.insert_grl(KeepsFrozen(), after="frozen")
    assert not spliced.train().frozen.training
    assert spliced.fc.training


def test_an_in_place_consumer_neither_raises_nor_changes_what_others_see():
    model, x = InPlace(), vector()
    plain = gradients(model, x)
    for keywords in ({"after": "a"}, {"edge": ("a", "act")}):
        spliced = gs.insert_grl(model, **keywords)
        assert torch.equal(spliced(x), model(x))
        found = gradients(spliced, x)
        assert torch.equal(found["a.weight"], -plain["a.weight"])
        assert torch.equal(found["b.weight"], plain["b.weight"])


def test_a_tensor_made_by_the_forward_moves_with_the_network_and_is_no_state():
    model = Constants().double()
    spliced = gs.insert_grl(model, after="fc")
    assert list(spliced.state_dict()) == list(model.state_dict())
    moved = dict(copy.deepcopy(spliced).to("meta").named_buffers())
    assert moved.pop("grl_fc.coeff").device.type == "cpu"
    assert moved
    assert all(buffer.device.type == "meta" for buffer in moved.values())
    calls = float(model.calls)
    spliced(vector().double())
    assert float(spliced.calls) == calls + 1


def sequential():
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


def test_surgery_on_a_disabled_network_keeps_the_coefficients_and_is_not_disabled():
    model, x = sequential(), vector()
    plain = gradients(model, x)["0.weight"]
    spliced = gs.insert_grl(model, after="1", coeff=0.5)
    with gs.reversal_disabled(spliced):
        twice = gs.insert_grl(spliced, after="2", coeff=0.25)
        made = {
            "copied": copy.copy(spliced),
            "stripped": gs.strip(twice, "grl_2"),
            "attached": gs.attach_domain_head(spliced, after="0", example_inputs=(x,)),
        }
        assert torch.equal(gradients(spliced, x)["0.weight"], plain)
        assert torch.equal(gradients(twice, x)["0.weight"], plain * 0.125)
        assert torch.equal(gradients(made["copied"], x)["0.weight"], plain * -0.5)
    for network in (spliced, *made.values()):
        assert gs.reversals(network)["grl_1"].coeff is gs.reversals(spliced)["grl_1"].coeff
    assert torch.equal(gradients(made["stripped"], x)["0.weight"], plain * -0.5)
    assert gs.verify_flip(made["attached"], model, (x,)).ok


def test_a_program_written_while_disabled_reverses(tmp_path):
    model, x = sequential(), vector()
    spliced = gs.insert_grl(model, after="1", coeff=0.5)
    with gs.reversal_disabled(spliced):
        gs.export(spliced, tmp_path / "m.pt2", example_inputs=(x,))
    found = gradients(gs.load(tmp_path / "m.pt2"), x)["0.weight"]
    assert torch.equal(found, gradients(model, x)["0.weight"] * -0.5)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"condition_on": "2", "condition": "randomized"},
        {"classifier": nn.Linear(6, 2)},
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_head_goes_where_the_network_is_and_not_to_the_default_device(keywords, device):
    model, x = sequential().to(device), vector().to(device)

    def attached():
        torch.manual_seed(0)
        return gs.attach_domain_head(model, after="1", example_inputs=(x,), **copy.deepcopy(keywords))

    expected = attached()
    with torch.device("meta"):
        found = attached()
    for ours, theirs in zip(expected.state_dict().values(), found.state_dict().values(), strict=True):
        assert ours.device.type == theirs.device.type == device
        assert device == "meta" or torch.equal(ours, theirs)


@pytest.mark.parametrize(("make", "point"), [(sequential, "1"), (Untraceable, "body.stage1")])
def test_a_reversal_has_a_coefficient_whatever_the_default_device_is(make, point):
    model = make()
    with torch.device("meta"):
        spliced = gs.insert_grl(model, after=point, coeff=0.5)
        gs.insert_grl(spliced, after=point)
        gs.strip(spliced)
    (layer,) = gs.reversals(spliced).values()
    assert torch.equal(layer.coeff, torch.tensor(0.5))
    assert {tensor.device.type for tensor in (*spliced.parameters(), *spliced.buffers())} == {"cpu"}


def test_a_network_made_on_meta_reverses_once_it_is_loaded():
    plain, x = sequential(), vector()
    with torch.device("meta"):
        model = sequential()
    spliced = gs.insert_grl(model, after="1", coeff=0.5).to_empty(device="cpu")
    spliced.load_state_dict(plain.state_dict())
    assert torch.equal(gradients(spliced, x)["0.weight"], gradients(plain, x)["0.weight"] * -0.5)


# --------------------------------------------------------------------------------------- forward's arguments


def test_keyword_only_arguments_keep_their_places_and_numbers_stay_arguments():
    model, x = KeywordOnly(), vector()
    spliced = gs.insert_grl(model, after="fc")
    assert torch.equal(spliced(x, shift=1.0), model(x, shift=1.0))
    assert torch.equal(spliced(x, 3.0, shift=x), model(x, 3.0, shift=x))
    with pytest.raises(TypeError, match="positional argument"):
        spliced(x, 3.0, x)


@pytest.mark.parametrize("options", [{}, {"double": True}, {"mask": vector()}])
@pytest.mark.parametrize("mode", [True, False])
def test_a_spliced_network_takes_every_call_that_the_original_takes(options, mode):
    model, x = KeywordOnly().train(mode), vector()
    spliced = gs.insert_grl(model, after="fc")
    assert inspect.signature(spliced.forward) == inspect.signature(model.forward)
    assert torch.equal(spliced(x, shift=1.0, **options), model(x, shift=1.0, **options))
    plain = torch.autograd.grad(model(x, shift=1.0, **options).sum(), model.fc.weight)
    found = torch.autograd.grad(spliced(x, shift=1.0, **options).sum(), spliced.fc.weight)
    assert torch.equal(found[0], -plain[0])


# ------------------------------------------------------------------------------ what cannot be traced


def test_where_the_root_does_not_trace_the_smallest_module_around_the_point_is_cut():
    model, x = Untraceable(), image()
    spliced = gs.insert_grl(model, after="body.stage1.0.conv")
    assert type(spliced) is Untraceable
    assert type(spliced.body) is Net
    assert type(spliced.body.stage1[0]) is Residual
    assert list(gs.reversals(spliced)) == ["grl_body_stage1_0_conv"]
    assert_same_gradients(gradients(spliced, x), reversed_at(model, "body.stage1.0.conv", x))
    assert gs.verify_flip(spliced, model, x).ok
    again = gs.insert_grl(spliced, after="body.stage1")
    assert len(gs.reversals(again)) == 2
    stripped = gs.strip(again)
    assert type(stripped.body.stage1[0]) is Residual
    assert list(stripped.state_dict()) == list(model.state_dict())


def test_a_wrong_name_under_an_untraceable_root_is_still_a_wrong_name():
    with pytest.raises(gs.PointNotFoundError, match=r"stage3"):
        gs.insert_grl(Untraceable(), after="body.stage3")
    with pytest.raises(gs.PointNotFoundError, match="nearest: body"):
        gs.insert_grl(Untraceable(), after="bdy")


def test_the_call_of_a_module_can_be_cut_on_either_side_where_nothing_traces():
    model, x = Untraceable(), image()
    spliced = gs.insert_grl(model, before="body")
    assert gs.verify_flip(spliced, model, x, mode="train").forward_identical


def test_a_graph_is_refused_with_the_line_that_stands_in_the_way():
    spliced = gs.insert_grl(Untraceable(), after="body")
    with pytest.raises(gs.TracingError, match=r"control flow \(.*small_networks\.py, line \d+\)"):
        gs.graph_module(spliced)


def test_a_forward_that_assigns_to_its_module_is_cut_at_calls():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.fc(x)

    for keywords in ({"before": "fc"}, {"after": "fc"}):
        model = gs.insert_grl(Counts(), **keywords)
        model(vector())
        assert model.calls == 1


def test_a_forward_that_draws_in_python_is_not_frozen():
    model = nn.Sequential(DrawsInPython(), nn.Linear(6, 2))
    spliced = gs.insert_grl(model, before="0.fc")
    assert len({spliced(torch.ones(2, 6)).sum().item() for _ in range(8)}) > 1


class DrawsInTorch(nn.Module):
    """Makes noise of its own, which a trace would freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x + torch.rand(6))


@pytest.mark.parametrize("block", [DrawsInPython, DrawsInTorch])
def test_surgery_on_a_forward_that_draws_has_drawn_nothing(block):
    before = torch.random.get_rng_state(), random.getstate()
    model = nn.Sequential(block(), nn.Linear(6, 2))
    torch.random.set_rng_state(before[0])  # the weights were drawn
    gs.insert_grl(model, before="0.fc")
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_what_cannot_be_traced_is_one_call_in_a_graph_of_the_rest():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), DrawsInPython())
    assert names(model, depth=None) == ["input", "0.0", "0.1", "1", "output"]


def test_before_a_call_what_it_takes_twice_is_reversed_once():
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            x = self.fc(x)
            return torch.mul(x, x)

    spliced = gs.insert_grl(Doubles(), before="mul")
    assert [node.target for node in spliced.graph.nodes].count("grl_mul") == 1


class TakesAMask(nn.Module):
    """Attention over what is no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids, mask):
        values = self.embed(ids)
        return self.attention(values, values, values, key_padding_mask=mask)[0]


class HidesPadding(TakesAMask):
    def forward(self, ids):
        values = self.embed(ids)
        return self.attention(values, values, values, key_padding_mask=ids == 0)[0]


class Scales(nn.Module):
    def forward(self, x, factor, pair):
        return x * factor + pair[0] * pair[1]["other"]


class TakesAnything(nn.Module):
    """A block that is given numbers, and tensors in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scales = nn.Linear(6, 6), Scales()

    def forward(self, x, factor, pair):
        return self.scales(self.linear(x), factor, pair)


class Stacked(nn.Module):
    """The second layer starts in the state in which the first one ended."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(6, 6), nn.LSTM(6, 6)

    def forward(self, x):
        y, state = self.first(x)
        return self.second(y, state)[0]


IDS = torch.tensor([[1, 2, 0], [3, 0, 0]])


@pytest.mark.parametrize(
    ("model", "point", "inputs"),
    [
        (HidesPadding(), "attention", (IDS,)),
        (TakesAMask(), "attention", (IDS, IDS == 0)),
        (TakesAMask(), "attention", (IDS, (IDS == 0) * -9.0)),
        (TakesAMask(), "attention", (IDS, None)),
        (TakesAnything(), "scales", (vector(), 3, (torch.ones(6), {"other": torch.arange(6)}))),
        (Stacked(), "second", (torch.randn(3, 2, 6),)),
    ],
    ids=["computed", "bool", "float", "none", "anything", "state"],
)
def test_before_a_call_what_has_no_gradient_goes_in_as_it_is(model, point, inputs):
    spliced = gs.insert_grl(model, before=point)
    assert torch.equal(spliced(*inputs), model(*inputs))
    plain, found = gradients(model, *inputs), gradients(spliced, *inputs)
    inside = {name for name in plain if name.startswith(point)}
    assert_same_gradients(found, {n: g if n in inside else -g for n, g in plain.items()})
    assert gs.verify_flip(spliced, model, inputs).ok
    assert torch.equal(pickle.loads(pickle.dumps(spliced))(*inputs), model(*inputs))


def test_before_a_call_every_float_in_a_container_is_reversed():
    x, other = vector(), torch.ones(6, requires_grad=True)
    spliced = gs.insert_grl(TakesAnything(), before="scales")
    spliced(x, 2.0, (other, {"other": torch.arange(6)})).sum().backward()
    assert torch.equal(other.grad, -torch.arange(6.0) * len(x))


def test_an_edge_behind_a_value_that_may_have_no_gradient_is_found():
    spliced = gs.insert_grl(gs.insert_grl(TakesAMask(), before="attention"), edge=("mask", "attention"))
    assert spliced(IDS, (IDS == 0) * -9.0).shape == (2, 3, 8)


@pytest.mark.parametrize(
    ("model", "keywords", "message"),
    [
        (HidesPadding(), {"after": "eq"}, r"'eq' is of integers or truth values.*\n.*edge=\('embed', 'atten"),
        (HidesPadding(), {"edge": ("eq", "attention")}, r"'eq' is of integers or truth values"),
        (
            Stacked(),
            {"after": "first[1]"},
            r"'first\[1\]' is a tuple of 2 tensors.*\n.*after='first\[1\]\[0\]'",
        ),
        (Stacked(), {"edge": ("first[1]", "second")}, r"'first\[1\]' is a tuple of 2 tensors"),
    ],
)
def test_a_value_that_is_known_to_have_no_gradient_is_refused_with_one_that_has(model, keywords, message):
    with pytest.raises(gs.ShapeError, match=message):
        gs.insert_grl(model, **keywords)


def test_before_a_call_that_takes_no_float_there_is_nothing_to_reverse():
    class Not(nn.Module):
        def forward(self, x):
            return (~(x > 0)) * x

    with pytest.raises(gs.ShapeError, match="what flows into 'invert' is of integers or truth values"):
        gs.insert_grl(Not(), before="invert")


def test_a_spliced_graph_holds_the_networks_own_operations_and_the_reversal_only():
    spliced = gs.insert_grl(Net(), after="stage2.0.conv")
    assert "boundary" not in spliced.code


def test_arguments_stand_first_in_the_graph_also_behind_a_reversal_of_one():
    class Sum(nn.Module):
        def forward(self, x, y):
            return torch.tanh(x) + y

    operations = [node.op for node in gs.insert_grl(Sum(), after="x").graph.nodes]
    assert operations == [
        "placeholder",
        "placeholder",
        "call_module",
        "call_function",
        "call_function",
        "output",
    ]


def test_a_pasted_function_keeps_its_backward_through_the_trace():
    model, x = Pasted(), vector()
    assert "PastedFunction" in names(model)
    spliced = gs.insert_grl(model, after="out")
    plain, found = gradients(model, x), gradients(pickle.loads(pickle.dumps(spliced)), x)
    assert all(torch.equal(found[name], -plain[name]) for name in plain)
    found = gradients(gs.insert_grl(model, edge=("tanh", "PastedFunction")), x)
    assert torch.equal(found["features.weight"], -plain["features.weight"])


def test_hooks_that_a_trace_would_lose_go_on_running_beside_a_reversal_on_an_edge():
    model, x, seen = Net(), image(), []
    model.stage1[0].register_forward_hook(lambda *args: seen.append("block"))
    with pytest.raises(gs.SurgeryError, match="was not called with the output of 'stem' itself"):
        gs.insert_grl(model, edge=("stem", "stage1.0.conv"), example_inputs=x)
    spliced = gs.insert_grl(model, edge=("relu", "stage1.0.conv"), example_inputs=x)
    assert gs.verify_flip(spliced, model, x).ok
    seen.clear()
    spliced(x)
    assert seen == ["block"]


def test_hooks_inside_go_on_running():
    model, x, seen = Net(), image(), []
    model.stage1.register_forward_hook(lambda *args: seen.append("stage"))
    model.stage1[0].register_forward_hook(lambda *args: seen.append("block"))
    spliced = gs.insert_grl(model, after="stage1.0.conv")
    spliced(x)
    assert seen == ["block", "stage"]
    assert gs.verify_flip(spliced, model, x).ok


def test_hooks_on_the_root_go_on_running():
    model, seen = Net(), []
    model.register_forward_hook(lambda *args: seen.append("hook"))
    gs.insert_grl(model, after="stage1.0.conv")(image())
    assert seen == ["hook"]


# ----------------------------------------------------------------------------------------------- bad calls


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "exactly one of after, before and edge; got none"),
        ({"after": "fc", "before": "fc"}, "got after and before"),
        ({"after": []}, r"after=\[\] names no point"),
        ({"after": 3}, "after=3 is no point.*got int"),
        ({"after": nn.LSTM}, "there is no LSTM in this Net"),
        ({"after": int}, "is no point"),
        ({"after": "glob:stage9.*"}, "matches none of the"),
        ({"after": lambda node: False}, "true for none of the"),
        ({"after": "output"}, "nothing comes after the output"),
        ({"before": "x"}, "nothing flows into 'x'"),
        ({"edge": ("stem", "nowhere")}, "no point 'nowhere'"),
        ({"edge": ("stem", "fc")}, r"'fc' does not use the value of 'stem'\n  nearest: mean -> fc"),
        ({"edge": gs.Edge("mean", "fc", "7")}, "does not use the value of 'mean' as '7'"),
        ({"edge": []}, "is not an edge"),
        ({"after": "fc", "coeff": float("nan")}, "coeff is nan"),
        ({"after": "fc", "coeff": -0.1}, "un-reverses"),
    ],
)
def test_a_bad_call_says_what_is_wrong_and_what_would_be_right(keywords, message):
    with pytest.raises(gs.SurgeryError, match=message):
        gs.insert_grl(Net(), **keywords)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "works on an nn.Module; got int"),
        ("timm/resnet18", "got str"),
        (nn.DataParallel(Net()), "wrapped in DataParallel"),
        (torch.compile(Net()), "wrapped in OptimizedModule"),
    ],
    ids=["number", "string", "data parallel", "compiled"],
)
def test_what_is_no_plain_network_is_refused(model, message):
    with pytest.raises(gs.SurgeryError, match=message):
        gs.insert_grl(model, after="fc")


# ---------------------------------------------------------------------------------- reading and taking out


def test_reversals_are_listed_in_the_order_of_the_graph():
    spliced = gs.insert_grl(Net(), after=["fc", "stage1", "stem"])
    assert list(gs.reversals(spliced)) == ["grl_stem", "grl_stage1", "grl_fc"]


def test_two_reversals_at_one_point_have_two_names_and_cancel():
    model, x = Net(), image()
    spliced = gs.insert_grl(gs.insert_grl(model, after="stage1"), after="stage1")
    assert list(gs.reversals(spliced)) == ["grl_stage1_2", "grl_stage1"]
    assert_same_gradients(gradients(spliced, x), gradients(model, x))


def test_strip_gives_the_original_network_back():
    model, x = Net(), image()
    spliced = gs.insert_grl(model, after=["stem", "stage1.0.conv"])
    stripped = gs.strip(spliced)
    assert type(stripped) is Net
    assert [type(module) for module in stripped.modules()] == [type(module) for module in model.modules()]
    assert_same_gradients(gradients(stripped, x), gradients(model, x))
    assert len(gs.reversals(spliced)) == 2


def test_strip_can_take_out_one_of_two():
    model, x = Net(), image()
    spliced = gs.insert_grl(model, after=["stem", "stage1"])
    assert_same_gradients(gradients(gs.strip(spliced, "grl_stem"), x), reversed_at(model, "stage1", x))


def test_strip_refuses_what_is_not_there():
    with pytest.raises(gs.SurgeryError, match="not spliced"):
        gs.strip(Net())
    with pytest.raises(gs.SurgeryError, match=r"no 'grl_stm' to strip\n  nearest: grl_stem"):
        gs.strip(gs.insert_grl(Net(), after="stem"), "grl_stm")


def test_a_new_coefficient_scales_the_gradient():
    model, x = Net(), image()
    spliced = gs.insert_grl(model, after="stage1")
    gs.reversals(spliced)["grl_stage1"].set_coeff(0.25)
    plain, found = gradients(model, x), gradients(spliced, x)
    assert torch.equal(found["stem.weight"], -0.25 * plain["stem.weight"])


def test_a_compiled_network_reverses_with_one_graph_while_the_coefficient_changes():
    model, x = Net().eval(), image()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    spliced = gs.insert_grl(model, after="stage1.0.conv")
    compiled = torch.compile(spliced, backend=counter, fullgraph=True)
    plain = gradients(model, x)["stem.weight"]
    for coeff in (0.5, 0.25, 2.0):
        gs.reversals(spliced)["grl_stage1_0_conv"].set_coeff(coeff)
        eager = gradients(spliced, x)["stem.weight"]
        torch.testing.assert_close(gradients(compiled, x)["_orig_mod.stem.weight"], eager)
    assert not torch.allclose(eager, plain)
    assert counter.frame_count == 1


def test_a_field_of_a_named_tuple_is_the_same_point_when_its_block_is_opened():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return Fields(x, self.fc(x))

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            fields = self.block(x)
            return fields[0] * 3 + fields.second

    model, x = Root(), vector()
    for cuts in (["block[1]", "block.fc"], ["block.fc", "block[1]"], ["block[0]", "block.fc"]):
        spliced = model
        for point in cuts:
            spliced = gs.insert_grl(spliced, after=point)
        found, plain = (torch.autograd.grad(m(x).sum(), m.block.fc.weight)[0] for m in (spliced, model))
        assert torch.equal(found, plain if "block[1]" in cuts else -plain)  # reversed twice, or once


class Fields(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class PassesOn(nn.Module):
    """Stochastic depth that is switched off returns what it was given."""

    def forward(self, x):
        return x


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.drop = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), PassesOn()

    def forward(self, x):
        return x + self.drop(self.mix(x))


def test_an_edge_is_found_behind_a_module_that_passes_its_input_on():
    model, x = Skips(), vector()
    edges = [str(edge) for edge in gs.graph(model, depth=None).edges]
    assert "mix.1 -> add" in edges
    spliced = gs.insert_grl(model, edge="mix.1 -> add")
    assert gs.verify_flip(spliced, model, (x,)).ok
    other = gs.insert_grl(model, edge="drop -> add")
    assert_same_gradients(gradients(spliced, x), gradients(other, x))
    with pytest.raises(gs.PointNotFoundError, match=r"'add' does not use the value of 'mix.0'"):
        gs.insert_grl(model, edge="mix.0 -> add")


class SharedDeep(nn.Module):
    """One encoding that two blocks call, and that the root holds under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoding = Skips()
        self.blocks = nn.ModuleList([Caller(self.encoding), Caller(self.encoding)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Caller(nn.Module):
    def __init__(self, encoding) -> None:
        super().__init__()
        self.encoding = encoding

    def forward(self, x):
        return self.encoding(x) * 2


def test_calls_of_a_shared_module_are_numbered_alike_however_deep_the_trace():
    model, x = SharedDeep(), vector()
    assert "encoding.add#1" in names(model, depth=None)
    for point in ("encoding#2", "encoding.add#1"):
        assert gs.verify_flip(gs.insert_grl(model, after=point), model, (x,)).ok
    with pytest.raises(gs.AmbiguousPointError, match="called 2 times"):
        gs.insert_grl(model, after="encoding")


class PartlyTraceable(nn.Module):
    """The root can be traced; its encoder, which looks at values, cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.fc = Untraceable(), nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(self.encoder(x).exp())


@pytest.mark.parametrize("points", [["exp", "encoder.body.stage1"], ["encoder.body.stage1", "exp"]])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_cut_of_the_root_and_one_in_a_part_that_cannot_be_traced_go_together(points, at_once):
    model, x = PartlyTraceable().eval(), image()
    spliced = model
    for group in [points] if at_once else [[point] for point in points]:
        spliced = gs.insert_grl(spliced, after=group)
    assert len(gs.reversals(spliced)) == 2
    assert gs.verify_flip(spliced, model, (x,)).ok
    assert type(gs.strip(spliced)) is PartlyTraceable
    rest = gs.strip(spliced, ["grl_exp"])
    assert gs.verify_flip(rest, model, (x,)).ok
    assert list(gs.reversals(rest)) != list(gs.reversals(spliced))
