"""Surgery on forwards that overwrite their values: what is computed, and where the gradient goes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same_gradients, gradients, names
from torch import nn

import grl_surgery as gs
from grl_surgery.capture.aliasing import _VIEWS, _VIEWS_OF_SEVERAL
from grl_surgery.capture.capture import trace


class Pair(NamedTuple):
    left: Any
    right: Any


class Layers(nn.Module):
    """Two linear layers for forwards that subclasses write."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)


class Augmented(Layers):
    """``x += y`` while something else still refers to x."""

    def forward(self, x):
        x = self.a(x)
        same = x
        x += 1.0
        return self.b(x) * same


class AsStatement(Layers):
    """An in-place method whose result nobody takes."""

    def forward(self, x):
        x = self.a(x)
        x.mul_(2.0)
        return self.b(x)


class ThroughAView(Layers):
    """A view is overwritten, and the whole is read again."""

    def forward(self, x):
        x = self.a(x)
        x.view(-1).mul_(2.0)
        return x * 3.0


class Overwriting(nn.Module):
    """A block that overwrites what it is given."""

    def forward(self, x):
        return torch.tanh(x.mul_(2.0))


class BlockOverwrites(Layers):
    """The block's argument is read again behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Overwriting()

    def forward(self, x):
        x = self.a(x)
        return self.block(x) + self.b(x)


@pytest.fixture
def x():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [Augmented, AsStatement, ThroughAView, BlockOverwrites])
def test_what_is_overwritten_is_seen_by_every_variable_that_means_it(make, x):
    model = make()
    spliced = gs.insert_grl(model, after="a")
    assert torch.equal(spliced(x), model(x))
    plain, found = gradients(model, x), gradients(spliced, x)
    assert torch.equal(found["a.weight"], -plain["a.weight"])
    assert gs.verify_flip(spliced, model, x).ok


def test_an_augmented_assignment_is_named_like_the_operation(x):
    assert names(Augmented()) == ["x", "a", "add", "b", "mul", "output"]


def test_a_value_is_read_from_the_operation_that_overwrote_it(x):
    model = AsStatement()
    spliced = gs.insert_grl(model, after="mul_")
    assert torch.equal(gradients(spliced, x)["a.weight"], -gradients(model, x)["a.weight"])
    edges = {str(edge) for edge in gs.graph(model).edges}
    assert edges == {"x -> a", "a -> mul_", "mul_ -> b", "b -> output"}


def test_whoever_means_an_overwritten_value_is_behind_a_reversal_of_the_result(x):
    model = Augmented()
    found = gradients(gs.insert_grl(model, after="add"), x)
    assert torch.equal(found["a.weight"], -gradients(model, x)["a.weight"])


class AsksForInPlace(Layers):
    """A function that overwrites because it is asked to, and whose result nobody takes."""

    def forward(self, x):
        x = self.a(x)
        F.relu(x, inplace=True)
        return self.b(x)


def test_a_function_that_is_asked_to_overwrite_is_followed(x):
    model = AsksForInPlace()
    found = gradients(gs.insert_grl(model, after="relu"), x)
    assert torch.equal(found["a.weight"], -gradients(model, x)["a.weight"])


class ThroughAFlatView(Layers):
    def forward(self, x):
        x = self.a(x)
        x.flatten().mul_(2.0)
        return x * 3.0


@pytest.mark.parametrize(
    ("model", "keywords"),
    [
        (ThroughAView(), {"after": "view"}),
        (ThroughAView(), {"edge": ("a", "view")}),
        (ThroughAFlatView(), {"after": "flatten"}),
        (ThroughAFlatView(), {"edge": ("a", "flatten")}),
    ],
)
def test_a_reversal_between_a_view_that_is_overwritten_and_the_whole_is_refused(model, keywords):
    with pytest.raises(gs.SurgeryError, match=r"'mul_' overwrites in place what 'a' reads again afterwards"):
        gs.insert_grl(model, **keywords)


def test_a_reversal_on_the_way_into_a_block_that_overwrites_a_shared_argument_is_refused():
    with pytest.raises(gs.SurgeryError, match=r"'block' overwrites in place what 'a' reads again afterwards"):
        gs.insert_grl(BlockOverwrites(), before="block")


class Doubles(nn.Module):
    """Overwrites its second argument, then reads the first, which may be the same tensor."""

    def forward(self, a, b):
        b.add_(b)
        return torch.relu(a)


class TwiceTheSame(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.block = nn.Linear(6, 6), Doubles()

    def forward(self, x):
        y = self.linear(x)
        return self.block(y, y)


@pytest.mark.parametrize("arg", ["0", "1"])
def test_a_reversal_on_one_of_two_ways_into_a_block_that_overwrites_one_of_them_is_refused(x, arg):
    model = TwiceTheSame()
    with pytest.raises(gs.SurgeryError, match=r"'block' overwrites in place what 'linear' reads again"):
        gs.insert_grl(model, edge=gs.Edge("linear", "block", arg))
    both = gs.insert_grl(model, after="linear")
    wanted = -gradients(model, x)["linear.weight"]
    assert torch.equal(gradients(both, x)["linear.weight"], wanted)


class MayReturnItsArgument(nn.Module):
    """A dropout: in eval mode its result is its argument."""

    def forward(self, x):
        return torch.dropout(x, 0.5, self.training)


class Squares(nn.Module):
    def forward(self, x):
        return x * x


class BlockResultOverwritten(Layers):
    """What the block returns is overwritten, and what it was given is read again."""

    def __init__(self, block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        x = self.a(x)
        y = self.block(x)
        y.mul_(2.0)
        return self.b(x) + y


@pytest.mark.parametrize("block", [MayReturnItsArgument(), nn.AlphaDropout()])
def test_a_reversal_of_a_result_that_may_be_the_argument_is_refused_where_it_would_be_lost(x, block):
    model = BlockResultOverwritten(block).eval()
    for keywords in ({"after": "block"}, {"before": "block"}):
        with pytest.raises(
            gs.SurgeryError, match=r"'mul_' overwrites in place what 'a' reads again afterwards"
        ):
            gs.insert_grl(model, **keywords)
    around = gs.insert_grl(model, after="a")
    assert torch.equal(gradients(around, x)["a.weight"], -gradients(model, x)["a.weight"])


class Passes(nn.Module):
    """Returns what it was given, in a named tuple and in a dict."""

    def forward(self, x):
        return Pair(x, {"same": x})


class PassedOn(Layers):
    """One tensor by three names; the first is overwritten, the second may be read again."""

    def __init__(self, read_again) -> None:
        super().__init__()
        self.block, self.read_again = Passes(), read_again

    def forward(self, x):
        x = self.a(x)
        pair = self.block(x)
        y = pair[0].mul_(2.0)
        return pair[1]["same"] * 3.0 if self.read_again else self.b(y)


@pytest.mark.parametrize("keywords", [{"edge": ("block[0]", "mul_")}, {"after": "mul_"}])
def test_a_block_may_return_its_argument_in_a_container(x, keywords):
    model = PassedOn(read_again=True)
    with pytest.raises(gs.SurgeryError) as error:
        gs.insert_grl(model, **keywords)
    assert "'mul_' overwrites in place what 'block' reads again afterwards" in str(error.value)
    assert "after='a', which reverses both" in str(error.value)
    assert gs.verify_flip(gs.insert_grl(model, after="a"), model, x).ok


def test_what_a_block_passes_on_and_nobody_reads_again_is_proved(x):
    model = PassedOn(read_again=False)
    assert gs.verify_flip(gs.insert_grl(model, after="mul_"), model, x).ok


def test_a_result_that_is_a_tensor_of_its_own_may_be_overwritten_behind_a_reversal(x):
    model = BlockResultOverwritten(Squares())
    spliced = gs.insert_grl(model, after="block")
    assert torch.equal(spliced(x), model(x))
    assert gs.verify_flip(spliced, model, x).ok


def test_a_reversal_elsewhere_in_a_network_with_views_that_are_overwritten_is_proved(x):
    class Longer(ThroughAView):
        def forward(self, x):
            return self.b(super().forward(x))

    model = Longer()
    spliced = gs.insert_grl(model, after="b")
    plain, found = gradients(model, x), gradients(spliced, x)
    assert_same_gradients(found, {name: -gradient for name, gradient in plain.items()})
    assert gs.verify_flip(spliced, model, x).ok


class Touched(Layers):
    """A function gets a value, its result is left alone, and the value is read again."""

    def __init__(self, touch: Callable[[Any], Any]) -> None:
        super().__init__()
        self.touch = touch

    def forward(self, x):
        h = self.a(x) * 1.0
        self.touch(h)
        return self.b(h)


VIEWS = {
    "T": lambda h: h.T,
    "mH": lambda h: h.mH,
    "real": lambda h: h.real,
    "data": lambda h: h.data,
    "t": lambda h: torch.t(input=h),
    "ravel": lambda h: h.ravel(),
    "cpu": lambda h: h.cpu(),
    "float": lambda h: h.float(),
    "type": lambda h: h.type(torch.float32),
    "pos": lambda h: +h,
    "adjoint": lambda h: h.adjoint(),
    "broadcast_to": lambda h: h.broadcast_to(4, 6),
    "hsplit": lambda h: torch.hsplit(h, 2)[0],
    "broadcast_tensors": lambda h: torch.broadcast_tensors(torch.ones(6), h)[1],
    "atleast_2d": lambda h: torch.atleast_2d(h),
    "einsum": lambda h: torch.einsum("ij->ji", h),
    "sum_to_size": lambda h: h.sum_to_size(4, 6),
    "to_dense": lambda h: h.to_dense(),
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.5, training=False),
    "view": lambda h: torch.ops.aten.view.default(h, [-1]),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_no_reversal_comes_between_a_view_that_is_overwritten_and_the_whole(view):
    model = Touched(lambda h: view(h).mul_(3.0))
    viewed = next(edge for edge in gs.graph(model).edges if edge.source == "mul")
    for keywords in (
        {"edge": viewed},
        {"after": viewed.target + "[1]" * ("tensors" in viewed.target)},
        {"before": "mul_"},
    ):
        with pytest.raises(gs.SurgeryError, match=r"'mul_' overwrites in place what 'mul' reads again"):
            gs.insert_grl(model, **keywords)


def aliasing_operators() -> set[str]:
    """By their schemas, the operators of which a result may lie in the memory of an argument."""
    schemas = (schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::"))
    aliased = (
        schema.name.removeprefix("aten::")
        for schema in schemas
        if any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
    )
    places = (torch, torch.Tensor, F)
    return {name for name in aliased if name[0] != "_" and any(hasattr(place, name) for place in places)}


def methods_that_return_their_memory() -> set[str]:
    """Tried on small tensors: attributes and methods whose result lies in the memory of the tensor."""
    found = set()
    for h in (torch.ones(2, 2), torch.ones(2, 2, 2), torch.ones(2, dtype=torch.complex64)):
        for name in (name for name in dir(h) if name[0] != "_" and name[-1] != "_"):
            for args in ((), (0,), (0, 0), (1,), (0, 0, 1), (h.shape,), (h,), (h.dtype,)):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        value = getattr(h, name)
                        value = value(*args) if callable(value) else value
                        parts = value if isinstance(value, (tuple, list)) else [value]
                        if any(part.untyped_storage().data_ptr() == h.data_ptr() for part in parts):
                            found.add(name)
                    except Exception:
                        continue
    return found


def test_every_operator_that_may_return_the_memory_of_an_argument_is_known():
    missing = (aliasing_operators() | methods_that_return_their_memory()) - _VIEWS - _VIEWS_OF_SEVERAL
    attributes, internal = {"H", "T", "data"}, {"index", "module_load", "new"}
    assert missing <= attributes | internal  # an attribute is a getattr in a graph


class Overwrites(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2.0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2.0


@torch.library.custom_op("grl_surgery_tests::halve_", mutates_args={"x"})
def halve(scale: float, x: torch.Tensor) -> None:
    x.mul_(scale)


@pytest.mark.parametrize(
    ("touch", "point"),
    [
        (lambda h: torch._foreach_mul_([h], 2.0), "_foreach_mul_"),
        (Overwrites.apply, "Overwrites"),
        (lambda h: halve(0.5, h), "halve_.default"),
        (lambda h: nn.init.constant_(h, 1.0), "constant_"),
        (lambda h: torch.mul(h.detach(), 2.0, out=h.detach()), "mul#2"),
    ],
    ids=["foreach", "mark_dirty", "custom_op", "init", "out"],
)
def test_what_overwrites_without_returning_it_is_seen(x, touch, point):
    model = Touched(touch)
    source = "detach#2" if point == "mul#2" else "mul#1" if "mul#1" in names(model) else "mul"
    for keywords in ({"after": point}, {"edge": (source, point)}):
        with pytest.raises(gs.SurgeryError, match=rf"'{point}' overwrites in place what"):
            gs.insert_grl(model, **keywords)
    spliced = gs.insert_grl(model, after="a")
    assert torch.equal(spliced(x), model(x))
    assert torch.equal(gradients(spliced, x)["a.weight"], -gradients(model, x)["a.weight"])


class OverwritesTheSecond(nn.Module):
    def forward(self, a, b):
        b.mul_(2.0)
        return a + b


def test_a_reversal_on_the_way_into_a_block_that_overwrites_its_second_argument_is_refused():
    class Model(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.block = OverwritesTheSecond()

        def forward(self, x):
            x = self.a(x)
            return self.block(self.b(x), x) * x

    with pytest.raises(gs.SurgeryError, match=r"'block' overwrites in place what 'a' reads again"):
        gs.insert_grl(Model(), edge=("a", "block"))


def test_a_logical_operator_overwrites_nothing(x):
    class Masked(Layers):
        def forward(self, x):
            positive, small = x > 0, x < 0.5
            both = positive & small
            either = positive | small
            return self.a(x) * positive + self.b(x) * both + either + small

    model = Masked()
    assert torch.equal(gs.insert_grl(model, after="a")(x), model(x))


# ------------------------------------------------------------------------- what else only shows when it runs


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_a_forward_that_changes_torchs_settings_for_a_part_of_itself_is_not_traced(context):
    class Switches(Layers):
        def forward(self, x):
            with context():
                y = self.a(x)
            return self.b(y + x)

    with pytest.raises(gs.TracingError, match=r"part of it runs under another (grad|inference|autocast)"):
        trace(Switches(), [])


def test_a_setting_of_the_caller_is_none_of_the_forwards():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trace(Augmented(), [])


def test_a_name_means_the_same_call_in_both_modes():
    class Branches(Layers):
        def forward(self, x):
            if self.training:
                return torch.relu(self.a(x))
            return torch.relu(self.b(x) * 2)

    model = Branches()
    in_train, in_eval = names(model.train()), names(model.eval())
    assert in_train == ["x", "a", "relu#1", "output"]
    assert in_eval == ["x", "b", "mul", "relu#2", "output"]


def test_a_functional_of_torch_is_told_apart_by_its_line_too():
    class Branches(Layers):
        def forward(self, x):
            if self.training:
                return F.relu(self.a(x), inplace=True)
            return F.relu(x, inplace=True) * 2

    model = Branches()
    assert names(model.train()) == ["x", "a", "relu#1", "output"]
    assert names(model.eval()) == ["x", "relu#2", "mul", "output"]


def test_a_parameter_is_one_thing_wherever_each_mode_reads_it_first():
    class Branches(Layers):
        def forward(self, x):
            y = x if self.training else x * self.a.weight
            return torch.tanh(self.b.weight * y) * self.a.weight

    model = Branches()
    assert "a.weight" in names(model.train())
    assert "a.weight" in names(model.eval())
    spliced = gs.insert_grl(model, after="a.weight")
    x = torch.randn(6, 6)
    for mode in (True, False):
        plain, found = gradients(model.train(mode), x), gradients(spliced.train(mode), x)
        assert torch.equal(found["a.weight"], -plain["a.weight"])
        assert torch.equal(found["b.weight"], plain["b.weight"])


class Two(Layers):
    """A block that returns two values."""

    def forward(self, x):
        return torch.tanh(self.a(x)), torch.sigmoid(self.b(x))


class CallsTwice(nn.Module):
    """Items of two calls of one block."""

    def __init__(self) -> None:
        super().__init__()
        self.two = Two()

    def forward(self, x):
        left, right = self.two(x)
        return self.two(left * right)[0] + right


def test_an_item_is_named_after_the_call_however_deep_the_trace_goes(x):
    model = CallsTwice()
    assert "two#1[1]" in names(model)
    alone = gs.insert_grl(model, after="two#1[1]")
    deeper = gs.insert_grl(gs.insert_grl(model, after="two.sigmoid#2"), after="two#1[1]")
    assert_same_gradients(gradients(deeper, x), gradients(alone, x))
    edge = ("two#1[1]", "mul")
    alone = gs.insert_grl(model, edge=edge)
    deeper = gs.insert_grl(gs.insert_grl(model, after="two.sigmoid#2"), edge=edge)
    assert_same_gradients(gradients(deeper, x), gradients(alone, x))


class TakesADict(nn.Module):
    """A block that takes a dict."""

    def forward(self, pair):
        return torch.tanh(pair["left"]) * pair["right"]


class PassesADict(Layers):
    """Calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TakesADict()

    def forward(self, x):
        x = self.a(x)
        return self.block({"left": x, "right": x})


def test_an_argument_is_called_the_same_however_deep_the_trace_goes(x):
    model = PassesADict()
    edge = gs.Edge("a", "block", "0[left]")
    alone = gs.insert_grl(model, edge=edge)
    deeper = gs.insert_grl(gs.insert_grl(model, after="block.mul"), edge=edge)
    alone = gs.insert_grl(alone, after="block")
    assert_same_gradients(gradients(deeper, x), gradients(alone, x))
    arguments = {
        edge.arg for depth in (1, 2) for edge in gs.graph(model, depth).edges if edge.target == "block"
    }
    assert arguments == {"0[left]", "0[right]"}


def test_an_edge_that_one_mode_lacks_is_cut_in_the_other(x):
    class Chooses(Layers):
        def forward(self, x):
            first, second = torch.tanh(x), torch.sigmoid(x * 2)
            return self.b(self.a(first if self.training else second))

    model = Chooses()
    spliced = gs.insert_grl(model, edge=("tanh", "a"))
    leaf = x.clone().requires_grad_()
    for training, sign in ((True, -1), (False, 1)):
        plain, found = (torch.autograd.grad(m.train(training)(leaf).sum(), leaf)[0] for m in (model, spliced))
        assert torch.equal(found, sign * plain)
    with pytest.raises(gs.PointNotFoundError, match="'b' does not use the value of 'tanh'"):
        gs.insert_grl(model, edge=("tanh", "b"))


def test_an_edge_that_no_mode_has_is_refused_though_one_mode_lacks_its_end():
    class Chooses(Layers):
        def forward(self, x):
            return torch.tanh(self.a(x)) if self.training else self.b(x)

    with pytest.raises(gs.PointNotFoundError, match="'tanh' does not use the value of 'x'"):
        gs.insert_grl(Chooses(), edge=("x", "tanh"))


def test_a_reversal_before_a_block_that_overwrites_an_argument_read_again_afterwards_is_refused():
    class Overwrites(nn.Module):
        def forward(self, first, second):
            return first.add_(second)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.block = nn.Linear(6, 6), Overwrites()

        def forward(self, x):
            return self.block(x, self.linear(x)) + x

    with pytest.raises(gs.SurgeryError, match="'block' overwrites in place what 'x' reads again afterwards"):
        gs.insert_grl(Twice(), before="block")


def test_a_reversal_after_an_overwritten_item_of_a_block_that_returns_one_tensor_twice_is_refused():
    class Twice(nn.Module):
        def forward(self, x):
            x = x * 2.0
            return x, x

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.block = nn.Linear(6, 6), Twice()

        def forward(self, x):
            first, second = self.block(self.linear(x))
            return torch.relu_(first) + second

    with pytest.raises(gs.SurgeryError, match=r"'relu_?' overwrites in place what 'block\[1\]' reads again"):
        gs.insert_grl(Root(), after="relu_")
    model, x = Root(), torch.randn(4, 6)
    assert gs.verify_flip(gs.insert_grl(model, after="add"), model, x).ok
    assert gs.verify_flip(gs.insert_grl(model, after="linear"), model, x).ok


def test_a_reversal_after_the_overwriting_of_what_a_block_has_handed_on_is_refused():
    class HandsOn(nn.Module):
        def forward(self, x):
            return {"twice": x * 2.0, "same": x}

    class Root(Layers):
        def __init__(self):
            super().__init__()
            self.block = HandsOn()

        def forward(self, x):
            x = self.a(x)
            kept = self.block(x)["same"]
            return self.b(torch.relu_(x)) + kept

    with pytest.raises(gs.SurgeryError, match=r"'relu_?' overwrites in place what .* reads again afterwards"):
        gs.insert_grl(Root(), after="relu_")
    assert gs.verify_flip(gs.insert_grl(Root(), after="a"), example_inputs=torch.randn(4, 6)).ok


def test_a_head_can_read_what_the_network_does_not_use():
    class Unused(Layers):
        def forward(self, x):
            torch.tanh(self.a(x))
            return self.b(x)

    model, x = Unused(), torch.randn(4, 6)
    m = gs.attach_domain_head(model, "tanh", example_inputs=x, dropout=0.0)
    assert torch.equal(m(x)[1], m.domain.classifier(torch.tanh(model.a(x))))
    with pytest.raises(gs.SurgeryError, match="nothing uses the value after tanh"):
        gs.insert_grl(model, after="tanh")


@pytest.mark.parametrize("inside", [[], ["block.lin"]], ids=["closed", "opened"])
def test_a_reversal_before_a_block_that_hands_its_input_on_is_refused_if_that_is_overwritten_then(inside):
    class HandsOn(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x):
            return self.lin(x), x

    class Root(Layers):
        def __init__(self):
            super().__init__()
            self.block = HandsOn()

        def forward(self, x):
            x = self.a(x)
            change, same = self.block(x)
            x.add_(change.detach())
            return self.b(same)

    spliced = Root()
    for point in inside:
        spliced = gs.insert_grl(spliced, after=point)
    with pytest.raises(gs.SurgeryError, match=r"'add_' overwrites in place what .* reads again afterwards"):
        gs.insert_grl(spliced, before="block")
    report = gs.verify_flip(gs.insert_grl(spliced, after="a"), example_inputs=torch.randn(4, 6))
    assert report.forward_identical
    assert all(row.ok for row in report.parameters)
