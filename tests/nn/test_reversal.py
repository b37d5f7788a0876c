"""What a gradient reversal is, in plain execution."""

import copy
import io
import math
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from grl_surgery.errors import ShapeError, SurgeryError
from grl_surgery.nn.reversal import GradientReversal, reversal_disabled, reverse_gradient

# torch's forward mode is still written with torch.jit.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

ALL_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.view(torch.uint8).equal(b.view(torch.uint8))


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor | None = None) -> Tensor:
    x = x.detach().clone().requires_grad_()
    out = function(x)
    return torch.autograd.grad(out, x, torch.ones_like(out) if upstream is None else upstream)[0]


# --- Forward


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_the_forward_is_the_identity_to_the_last_bit(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 2
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, tiny, -tiny, 1 / 3], dtype=dtype)
    for coeff in (0.7, torch.tensor(0.7), torch.full((8,), 0.7)):
        assert same_bits(reverse_gradient(x, coeff), x)
        assert same_bits(torch.ops.grl_surgery.reverse_gradient(x, torch.tensor(0.7)), x)


def test_the_forward_copies_nothing() -> None:
    leaf = torch.ones(3, requires_grad=True)
    for x in (torch.ones(3), leaf, leaf * 1):
        assert reverse_gradient(x).data_ptr() == x.data_ptr()


def test_an_in_place_op_on_the_result_is_seen_through_the_input() -> None:
    x = torch.ones(2, requires_grad=True) * 1
    reverse_gradient(x).mul_(3)
    assert x.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_kept(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=memory_format).requires_grad_()
    out = GradientReversal()(x * 1)
    assert out.stride() == x.stride()
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(x))
    assert grad.stride() == x.stride()


def test_a_result_without_grad_needs_no_graph() -> None:
    assert not reverse_gradient(torch.ones(2)).requires_grad
    with torch.no_grad():
        assert not reverse_gradient(torch.ones(2, requires_grad=True)).requires_grad
    with torch.inference_mode():
        assert reverse_gradient(torch.ones(2)).tolist() == [1.0, 1.0]


def test_an_empty_tensor_passes() -> None:
    assert gradient(reverse_gradient, torch.empty(0, 3)).shape == (0, 3)


# --- Backward


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_the_gradient_is_one_multiplication_in_its_own_dtype(dtype: torch.dtype) -> None:
    x, upstream = torch.randn(4, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    coeffs = torch.tensor([0.0, 0.3, 1.0, 7.0])
    for coeff, factor in [
        (0.3, -0.3),
        (coeffs[1], -coeffs[1]),
        (coeffs, -coeffs[:, None]),
    ]:
        grad = gradient(lambda x, coeff=coeff: reverse_gradient(x, coeff), x, upstream)
        assert same_bits(grad, (upstream * factor).to(dtype))


def test_the_gradient_with_coefficient_one_is_the_negated_gradient_without_reversal() -> None:
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), GradientReversal(), nn.Linear(8, 2), nn.LogSoftmax(1))
    plain = nn.Sequential(*(nn.Identity() if isinstance(m, GradientReversal) else m for m in network))
    x = torch.randn(5, 3)
    expected = torch.autograd.grad(plain(x).square().sum(), list(network.parameters()))
    measured = torch.autograd.grad(network(x).square().sum(), list(network.parameters()))
    for before, after in zip(expected[:2], measured[:2], strict=True):
        assert same_bits(after, -before)
    for before, after in zip(expected[2:], measured[2:], strict=True):
        assert same_bits(after, before)


def test_only_the_path_through_the_reversal_is_reversed() -> None:
    grad = gradient(lambda x: reverse_gradient(x * 2, 0.25) + x * 8, torch.ones(2))
    assert grad.tolist() == [7.5, 7.5]


def test_two_reversals_multiply() -> None:
    grad = gradient(lambda x: reverse_gradient(reverse_gradient(x, 0.5), 0.25), torch.ones(2))
    assert grad.tolist() == [0.125, 0.125]


def test_the_second_derivative_goes_through_both_reversals() -> None:
    # The first derivative of r(x)**3 is -3c x**2 in value; the reversal inside acts again on the way back.
    x = torch.tensor([2.0], requires_grad=True)
    (first,) = torch.autograd.grad(reverse_gradient(x * 1, 0.5) ** 3, x, create_graph=True)
    assert first.tolist() == [-0.5 * 3 * 4.0]
    (second,) = torch.autograd.grad(first, x)
    assert second.tolist() == [(-0.5) ** 2 * 6 * 2.0]


@pytest.mark.parametrize("coeff", [0.3, torch.tensor(0.3), torch.tensor([0.1, 0.2])])
def test_the_derivative_of_the_gradient_is_the_gradient_rule_itself(coeff: float | Tensor) -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    upstream = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda upstream: torch.autograd.grad(
            reverse_gradient(x.requires_grad_() * 1, coeff), x, upstream, create_graph=True
        )[0],
        upstream,
    )


@forward_mode
def test_the_coefficient_receives_no_gradient() -> None:
    x, coeff = torch.ones(2, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    reverse_gradient(x * 1, coeff).sum().backward()
    assert coeff.grad is None
    assert torch.func.grad(lambda coeff: reverse_gradient(x.detach(), coeff).sum())(coeff) == 0
    _, tangent = torch.func.jvp(
        lambda coeff: reverse_gradient(x.detach(), coeff), (coeff.detach(),), (torch.ones(()),)
    )
    assert tangent.tolist() == [0.0, 0.0]


def test_each_sample_has_its_own_coefficient() -> None:
    coeff = torch.tensor([0.0, 0.5, 2.0])
    grad = gradient(lambda x: reverse_gradient(x * 1, coeff), torch.ones(3, 2, 4))
    assert torch.equal(grad, -coeff[:, None, None].expand(3, 2, 4))


def unmapped(value: Tensor, dim: int | None) -> list[Tensor]:
    return [value] * 3 if dim is None else list(value.unbind(dim))


def reversed_square(x: Tensor, coeff: Tensor) -> Tensor:
    """The gradient of r(x)**2 by calculus."""
    return -2 * x * coeff.reshape(-1, *[1] * (x.dim() - 1)) if coeff.dim() else -2 * x * coeff


IN_DIMS = [(0, 0), (1, 0), (None, 0), (0, None)]


@pytest.mark.parametrize("in_dims", IN_DIMS)
def test_a_mapped_gradient_maps_input_and_coefficient_alike(in_dims: tuple[int | None, int | None]) -> None:
    x, coeff = torch.randn(3, 3, 3), torch.tensor([0.0, 0.5, 2.0])
    rule = torch.func.grad(lambda x, coeff: reverse_gradient(x * 1, coeff).square().sum())
    mapped = torch.func.vmap(rule, in_dims=in_dims)(x, coeff)
    for one, a, c in zip(mapped, unmapped(x, in_dims[0]), unmapped(coeff, in_dims[1]), strict=True):
        assert torch.equal(one, reversed_square(a, c))


@pytest.mark.parametrize(
    "reverse",
    [
        reverse_gradient,
        lambda x, coeff: torch.ops.grl_surgery.reverse_gradient(x, coeff[:, None] if coeff.dim() else coeff),
    ],
    ids=["function", "operator"],
)
@pytest.mark.parametrize("in_dims", IN_DIMS)
def test_the_gradient_of_a_map_maps_input_and_coefficient_alike(
    in_dims: tuple[int | None, int | None], reverse: Callable[[Tensor, Tensor], Tensor]
) -> None:
    coeff = torch.tensor([0.0, 0.5, 2.0])
    x = torch.randn(3, 3, 3) if in_dims[0] is not None else torch.randn(3, 3)
    mapped = torch.func.vmap(reverse, in_dims=in_dims)
    measured = gradient(lambda x: mapped(x * 1, coeff).square(), x)
    expected = list(map(reversed_square, unmapped(x, in_dims[0]), unmapped(coeff, in_dims[1])))
    if in_dims[0] is None:
        torch.testing.assert_close(measured, sum(expected))
    else:
        assert torch.equal(measured, torch.stack(expected, in_dims[0]))


def test_nested_vmap_maps_a_coefficient_per_sample_of_each_batch() -> None:
    x, coeff = torch.randn(2, 3, 4), torch.arange(6.0).reshape(2, 3)
    rule = torch.func.grad(lambda x, coeff: reverse_gradient(x * 1, coeff).sum())
    inner_by_shape = torch.func.vmap(rule)(x, coeff)
    inner_by_vmap = torch.func.vmap(torch.func.vmap(rule))(x, coeff)
    expected = -coeff[..., None].expand(2, 3, 4)
    assert torch.equal(inner_by_shape, expected)
    assert torch.equal(inner_by_vmap, expected)


@forward_mode
def test_a_hessian_crosses_the_reversal_twice() -> None:
    hessian = torch.func.hessian(lambda x: (reverse_gradient(x * 1, 0.5) ** 3).sum())(
        torch.tensor([1.0, 2.0])
    )
    assert torch.equal(hessian, torch.diag(0.25 * 6 * torch.tensor([1.0, 2.0])))


@forward_mode
def test_forward_mode_directly_on_a_leaf_scales_the_tangent() -> None:
    leaf = torch.ones(2, requires_grad=True)
    with forward_ad.dual_level():
        out = reverse_gradient(forward_ad.make_dual(leaf, torch.ones(2)), 0.5)
        assert forward_ad.unpack_dual(out).tangent.tolist() == [-0.5, -0.5]


@forward_mode
def test_a_tangent_keeps_its_dtype_under_a_coefficient_per_sample() -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    _, tangent = torch.func.jvp(lambda x: reverse_gradient(x, torch.full((2,), 0.5)), (x,), (x,))
    assert tangent.dtype == torch.bfloat16


def test_a_gradient_that_nobody_asks_for_is_not_computed() -> None:
    x = torch.ones(2, requires_grad=True)
    unused = reverse_gradient(x * 1)
    assert torch.autograd.grad(x.sum() + 0 * unused.detach().sum(), x)[0].tolist() == [1.0, 1.0]


# --- In place


@pytest.mark.parametrize("coeff", [0.5, torch.tensor(0.5), torch.full((2,), 0.5)])
def test_an_in_place_op_may_follow(coeff: float | Tensor) -> None:
    x = torch.tensor([3.0, -3.0])
    grad = gradient(lambda x: torch.relu_(reverse_gradient(x * 2, coeff)), x)
    assert grad.tolist() == [-1.0, -0.0]


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(4), lambda x: x[0]])
def test_an_in_place_op_never_overwrites_a_leaf(view: Callable[[Tensor], Tensor]) -> None:
    leaf = torch.randn(2, 2, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        reverse_gradient(view(leaf)).mul_(2)
    assert torch.equal(leaf, before)


def test_a_transform_never_overwrites_the_input_of_a_reversal() -> None:
    x = torch.tensor([3.0, -3.0])
    for transformed in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f))):
        grad = transformed(lambda x: reverse_gradient(x, 0.5).relu_().sum())(x)
        assert grad.tolist() == [-0.5, -0.0]
    assert x.tolist() == [3.0, -3.0]


def test_an_in_place_op_that_spoils_what_autograd_saved_is_still_an_error() -> None:
    x = torch.ones(2, requires_grad=True)
    out = reverse_gradient(x.exp()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- The layer


def test_the_coefficient_is_a_buffer_and_not_in_the_state_dict() -> None:
    layer = GradientReversal(0.3)
    assert dict(layer.named_buffers())["coeff"] is layer.coeff
    assert (layer.coeff.dtype, layer.coeff.shape) == (torch.float32, ())
    assert not layer.state_dict()
    assert not list(layer.parameters())


@pytest.mark.parametrize(
    "change", [GradientReversal.set_coeff, lambda layer, coeff: layer.coeff.fill_(coeff)]
)
def test_whatever_changes_the_buffer_is_obeyed(change: Callable[[GradientReversal, float], None]) -> None:
    layer = GradientReversal()
    for coeff in (0.25, 0.0, 4.0):
        change(layer, coeff)
        assert gradient(layer, torch.ones(1)).item() == -coeff


def test_the_coefficient_is_set_in_place() -> None:
    layer = GradientReversal()
    buffer = layer.coeff
    for coeff in (0.25, 1, torch.tensor(0.5), torch.tensor(0.75, dtype=torch.float64, requires_grad=True)):
        layer.set_coeff(coeff)
        assert layer.coeff is buffer
        assert buffer.item() == torch.as_tensor(coeff).detach().item()
        assert not buffer.requires_grad


def test_a_coefficient_set_after_the_forward_does_not_reach_the_backward() -> None:
    layer = GradientReversal(0.5)
    x = torch.ones(1, requires_grad=True)
    out = layer(x)
    layer.set_coeff(0.25)
    out.backward()
    assert x.grad.item() == -0.5


def test_a_tensor_given_to_the_constructor_is_copied() -> None:
    coeff = torch.tensor(0.5, dtype=torch.float64)
    layer = GradientReversal(coeff)
    coeff.fill_(0.25)
    assert layer.coeff.item() == 0.5
    assert layer.coeff.dtype == torch.float32


@pytest.mark.parametrize("coeff", [0.3, 1.0, 0.0, 1 / 3, 1e-20, 123456.789, 2**24])
def test_the_repr_rebuilds_the_layer(coeff: float) -> None:
    layer = GradientReversal(coeff)
    assert eval(repr(layer)).coeff.equal(layer.coeff)
    assert len(repr(layer)) <= len("GradientReversal(coeff=0.33333334)") + 4


class ShowsItself(GradientReversal):
    """Remembers its repr while its forward is recorded, with buffers that have no values."""

    shown = ""

    def forward(self, x: Tensor) -> Tensor:
        ShowsItself.shown = repr(self)
        return super().forward(x)


def test_the_repr_of_a_layer_with_no_value_does_not_fail() -> None:
    torch.export.export(ShowsItself(), (torch.ones(2),), strict=False)
    assert ShowsItself.shown == "ShowsItself(coeff=?)"


def test_the_meta_device_carries_shapes() -> None:
    assert GradientReversal().to("meta")(torch.ones(2, 3, device="meta")).shape == (2, 3)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
@pytest.mark.parametrize("disabled", [False, True])
def test_a_copy_reverses_and_is_not_disabled_along(
    duplicate: Callable[[GradientReversal], GradientReversal], disabled: bool
) -> None:
    layer = GradientReversal(0.5)
    if disabled:
        with reversal_disabled(layer):
            twin = duplicate(layer)
            assert gradient(twin, torch.ones(1)).item() == -0.5
    else:
        twin = duplicate(layer)
        with reversal_disabled(layer):
            assert gradient(twin, torch.ones(1)).item() == -0.5
    assert gradient(twin, torch.ones(1)).item() == -0.5
    assert gradient(layer, torch.ones(1)).item() == -0.5


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_deep_copy_has_a_coefficient_of_its_own(
    duplicate: Callable[[GradientReversal], GradientReversal],
) -> None:
    layer = GradientReversal(0.5)
    duplicate(layer).set_coeff(0.25)
    assert layer.coeff.item() == 0.5


def test_a_state_dict_survives_safe_loading() -> None:
    model = nn.Sequential(nn.Linear(2, 2), GradientReversal())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {"0.weight", "0.bias"}
    model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_still_reverses(dtype: torch.dtype) -> None:
    layer = GradientReversal(0.5).to(dtype)
    assert gradient(layer, torch.ones(2, dtype=dtype)).tolist() == [-0.5, -0.5]
    assert repr(layer) == "GradientReversal(coeff=0.5)"


# --- Disabling


def test_a_disabled_reversal_is_the_identity_for_the_gradient() -> None:
    model = nn.Sequential(GradientReversal(0.5), nn.Linear(3, 3), GradientReversal(0.25))
    plain = model[1]
    x = torch.randn(2, 3)
    with reversal_disabled(model):
        assert same_bits(gradient(model, x), gradient(plain, x))
        assert model(x).equal(plain(x))
    assert same_bits(gradient(model, x), gradient(plain, x) * 0.125)


def test_what_counts_is_where_the_forward_ran() -> None:
    layer = GradientReversal(0.5)
    inside, outside = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    out_before = layer(outside)
    with reversal_disabled(layer):
        out = layer(inside)
        out_before.backward()
    out.backward()
    assert (inside.grad.item(), outside.grad.item()) == (1.0, -0.5)


def test_an_exception_enables_again() -> None:
    layer = GradientReversal(0.5)
    with pytest.raises(ZeroDivisionError, match="division by zero"), reversal_disabled(layer):
        1 / 0  # noqa: B018
    assert gradient(layer, torch.ones(1)).item() == -0.5


def test_contexts_nest() -> None:
    layer, other = GradientReversal(0.5), GradientReversal(0.25)
    with reversal_disabled(layer):
        with reversal_disabled(nn.ModuleList([layer, other, layer])):
            assert gradient(other, gradient(layer, torch.ones(1))).item() == 1
        assert gradient(layer, torch.ones(1)).item() == 1
        assert gradient(other, torch.ones(1)).item() == -0.25
    assert gradient(layer, torch.ones(1)).item() == -0.5


def test_the_same_buffer_is_back_afterwards() -> None:
    layer = GradientReversal(0.5)
    buffer = layer.coeff
    with reversal_disabled(layer):
        assert layer.coeff is not buffer
    assert layer.coeff is buffer
    assert "coeff" not in layer.state_dict()


def test_setting_a_coefficient_while_disabled_takes_effect_afterwards() -> None:
    layer = GradientReversal(0.5)
    with reversal_disabled(layer):
        layer.set_coeff(0.25)
        assert gradient(layer, torch.ones(1)).item() == 1
        assert layer.coeff.item() == -1
    assert gradient(layer, torch.ones(1)).item() == -0.25


def test_the_repr_of_a_disabled_layer_says_so() -> None:
    layer = GradientReversal(0.5)
    with reversal_disabled(layer):
        assert repr(layer) == "GradientReversal(coeff=0.5, disabled)"
    assert repr(layer) == "GradientReversal(coeff=0.5)"


def test_a_model_moved_while_disabled_comes_back_where_it_was_moved_to() -> None:
    layer = GradientReversal(0.5)
    with reversal_disabled(layer):
        layer.to("meta", torch.float64).to_empty(device="cpu")
        assert layer.coeff.item() == -1
    assert (layer.coeff.device.type, layer.coeff.dtype, layer.coeff.item()) == ("cpu", torch.float32, 0.5)


# --- What is refused


@pytest.mark.parametrize("coeff", [-1.0, -1e-9, -1, math.nan, math.inf])
@pytest.mark.parametrize(
    "use", [GradientReversal, GradientReversal().set_coeff, lambda c: reverse_gradient(torch.ones(2), c)]
)
def test_a_coefficient_that_does_not_reverse_is_refused(use: Callable[[float], object], coeff: float) -> None:
    with pytest.raises(SurgeryError, match=f"coeff is {coeff}; it must be finite and not negative"):
        use(coeff)


@pytest.mark.parametrize("use", [GradientReversal, GradientReversal().set_coeff])
def test_a_layer_refuses_a_tensor_with_a_value_that_does_not_reverse(use: Callable[[Tensor], object]) -> None:
    with pytest.raises(SurgeryError, match=r"coeff is -1\.0"):
        use(torch.tensor(-1.0))
    with pytest.raises(ShapeError, match=r"a layer has one coefficient; this one has shape \(2,\)"):
        use(torch.ones(2))


def test_the_function_never_reads_the_value_of_a_tensor() -> None:
    # On the meta device there is no value: reading one would fail, as it would stall a real device.
    out = reverse_gradient(torch.ones(2, device="meta"), torch.tensor(1.0, device="meta"))
    assert out.device.type == "meta"


@pytest.mark.parametrize("coeff", ["1", None, 1j])
def test_a_coefficient_that_is_no_number_is_refused(coeff: object) -> None:
    with pytest.raises(SurgeryError, match=f"coeff is of type {type(coeff).__name__}; it must be a number"):
        reverse_gradient(torch.ones(2), coeff)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_coefficient_tensor_that_is_not_real_floating_point_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(SurgeryError, match=f"coeff has dtype {dtype}; it must be floating point"):
        reverse_gradient(torch.ones(2), torch.ones((), dtype=dtype))


@pytest.mark.parametrize(
    ("x_shape", "coeff_shape"),
    [((4, 3), (3,)), ((4, 3), (4, 2)), ((4, 3), (1,)), ((), (1,)), ((4, 3, 2), (4, 3))],
)
def test_a_coefficient_of_another_shape_is_refused(
    x_shape: tuple[int, ...], coeff_shape: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeError, match="one number for each sample along the first dimension"):
        reverse_gradient(torch.ones(x_shape), torch.ones(coeff_shape))


@pytest.mark.parametrize(
    ("value", "description"),
    [
        ((torch.ones(1), torch.ones(1)), "its input is a tuple of 2; choose one item"),
        ([torch.ones(1)], "its input is a list of 1; choose one item"),
        ({"features": torch.ones(1), "mask": None}, "its input is a dict with keys 'features', 'mask'"),
        (None, "its input is None"),
        (3, "its input is of type int"),
    ],
)
def test_an_input_that_is_no_tensor_is_described(value: object, description: str) -> None:
    with pytest.raises(ShapeError, match=description) as refusal:
        GradientReversal()(value)
    assert "after='encoder[0]'" in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_an_input_that_cannot_have_a_gradient_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ShapeError, match=f"its input has dtype {dtype}"):
        GradientReversal()(torch.ones(2, dtype=dtype))


# --- Cost


def test_importing_does_not_load_a_compiler() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import grl_surgery.nn.reversal; "
        "print([m for m in set(sys.modules) - before if m.startswith(('torch._inductor', 'torch._dynamo'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_backward_of_a_layer_is_a_single_kernel() -> None:
    x, upstream = torch.ones(64, requires_grad=True), torch.ones(64)
    out = GradientReversal(0.5)(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(out, x, upstream)
    kernels = [event.name for event in profile.events() if event.name.startswith("aten::")]
    # Tensor.to looks at the dtype and does nothing.
    assert [name for name in kernels if name != "aten::to"] == ["aten::mul"]


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_casting_a_network_does_not_round_the_coefficient(cast) -> None:
    layer = GradientReversal(0.3)
    cast(nn.Sequential(layer))
    assert layer.coeff.dtype == torch.float32
    assert torch.equal(layer.coeff, torch.tensor(0.3))


def made_on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(2, 2), GradientReversal(0.3))


@pytest.mark.parametrize(
    "make",
    [
        made_on_meta,
        lambda: made_on_meta().half(),
        lambda: nn.Sequential(nn.Linear(2, 2), GradientReversal(0.3)),
        lambda: nn.Sequential(nn.Linear(2, 2), GradientReversal(0.3)).to("meta"),
    ],
)
def test_the_coefficient_survives_the_way_over_the_meta_device_and_memory_without_values(make) -> None:
    model = make()
    assert repr(model[1]) == "GradientReversal(coeff=0.3)"
    model.to_empty(device="cpu")
    assert torch.equal(model[1].coeff, torch.tensor(0.3))
    model[1].set_coeff(0.25)
    assert gradient(model[1], torch.ones(1)).item() == -0.25


def test_a_coefficient_without_a_value_is_refused() -> None:
    nothing = torch.tensor(0.5, device="meta")
    for use in (GradientReversal, GradientReversal().set_coeff):
        with pytest.raises(SurgeryError, match="coeff is on the meta device, where it has no value"):
            use(nothing)


def test_a_compiled_layer_is_copied_and_pickled_without_what_was_compiled() -> None:
    layer = GradientReversal(0.5)
    layer.compile(backend="eager")
    for twin in (copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._compiled_call_impl is None
        assert gradient(twin, torch.ones(1)).item() == -0.5
