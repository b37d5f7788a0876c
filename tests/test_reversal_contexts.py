"""A reversal is one line of code until something traces, exports, transforms or compiles it.

Every context takes an operation, puts it into the middle of a small network and returns the gradient that
comes out at the input of the network. All numbers are small multiples of powers of two, so that the gradient
is known by calculus and exact in every context.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pasted_reversals
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from grl_surgery.errors import SurgeryError
from grl_surgery.reversal import GradientReversal, reversal_disabled, reverse_gradient

# One context is torch.jit.trace itself, and torch's forward mode is still written with torch.jit.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated")

Operation = Callable[[Tensor], Tensor]

INPUT = torch.tensor([[0.5, -1.0, 2.0], [1.5, 3.0, -0.25], [-2.0, 0.75, 1.0], [4.0, -0.5, 1.25]])
WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, -1.0], [0.25, 2.0, -4.0], [-1.0, 0.5, 2.0]])
COEFF = 0.5

PLAIN_GRADIENT = 2 * INPUT * WEIGHT
REVERSED_GRADIENT = -COEFF * PLAIN_GRADIENT


class Network(nn.Module):
    """f(x) = operation(x * x) * weight, whose gradient without a reversal is 2 * x * weight."""

    def __init__(self, operation: Operation, weight: Tensor = WEIGHT) -> None:
        super().__init__()
        self.operation = operation
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x * x) * self.weight


def objective(operation: Operation) -> Callable[[Tensor], Tensor]:
    network = Network(operation)
    return lambda x: network(x).sum()


def gradient_at_input(function: Callable[[Tensor], Tensor]) -> Tensor:
    x = INPUT.clone().requires_grad_()
    function(x).sum().backward()
    return x.grad


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch.compiler.reset()


# --- Contexts


def eager(operation: Operation) -> Tensor:
    return gradient_at_input(Network(operation))


def fx_symbolic_trace(operation: Operation) -> Tensor:
    return gradient_at_input(torch.fx.symbolic_trace(Network(operation)))


def torchvision_feature_extractor(operation: Operation) -> Tensor:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    extractor = extraction.create_feature_extractor(Network(operation), {"mul_1": "out"})
    return gradient_at_input(lambda x: extractor(x)["out"])


def exported(operation: Operation, *, strict: bool) -> torch.export.ExportedProgram:
    return torch.export.export(Network(operation), (INPUT,), strict=strict)


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def export_strict(operation: Operation) -> Tensor:
    return gradient_at_input(exported(operation, strict=True).module())


def export_not_strict(operation: Operation) -> Tensor:
    return gradient_at_input(exported(operation, strict=False).module())


def export_saved_and_loaded(operation: Operation) -> Tensor:
    return gradient_at_input(saved_and_loaded(exported(operation, strict=False)).module())


def export_decomposed(operation: Operation) -> Tensor:
    return gradient_at_input(exported(operation, strict=False).run_decompositions().module())


def export_decomposed_saved_and_loaded(operation: Operation) -> Tensor:
    return gradient_at_input(
        saved_and_loaded(exported(operation, strict=False).run_decompositions()).module()
    )


def export_then_func_grad(operation: Operation) -> Tensor:
    module = saved_and_loaded(exported(operation, strict=False)).module()
    return torch.func.grad(lambda x: module(x).sum())(INPUT)


def export_then_forward_ad(operation: Operation) -> Tensor:
    return derivative_by_forward_ad(exported(operation, strict=False).module())


def export_then_compile(operation: Operation) -> Tensor:
    module = exported(operation, strict=False).module()
    return gradient_at_input(torch.compile(module, backend="aot_eager", fullgraph=True))


def compile_aot_eager(operation: Operation) -> Tensor:
    return gradient_at_input(torch.compile(Network(operation), backend="aot_eager", fullgraph=True))


def compile_inductor(operation: Operation) -> Tensor:
    return gradient_at_input(torch.compile(Network(operation), fullgraph=True))


def compile_func_grad(operation: Operation) -> Tensor:
    gradient = torch.func.grad(objective(operation))
    return torch.compile(gradient, backend="aot_eager", fullgraph=True)(INPUT)


def compile_per_sample_gradients(operation: Operation) -> Tensor:
    return torch.compile(per_sample_gradient(operation), backend="aot_eager", fullgraph=True)(INPUT, WEIGHT)


def compile_checkpoint(operation: Operation) -> Tensor:
    network = Network(operation)
    return gradient_at_input(
        torch.compile(
            lambda x: checkpoint(network, x, use_reentrant=False), backend="aot_eager", fullgraph=True
        )
    )


def func_grad(operation: Operation) -> Tensor:
    return torch.func.grad(objective(operation))(INPUT)


def func_jacfwd(operation: Operation) -> Tensor:
    return torch.func.jacfwd(objective(operation))(INPUT)


def per_sample_gradient(operation: Operation) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.func.vmap(torch.func.grad(lambda x, weight: (operation(x * x) * weight).sum()))


def per_sample_gradients(operation: Operation) -> Tensor:
    return per_sample_gradient(operation)(INPUT, WEIGHT)


def derivative_by_forward_ad(function: Callable[[Tensor], Tensor]) -> Tensor:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(INPUT.clone(), torch.ones_like(INPUT))
        return forward_ad.unpack_dual(function(x)).tangent


def forward_mode(operation: Operation) -> Tensor:
    return derivative_by_forward_ad(Network(operation))


def make_fx_of_forward(operation: Operation) -> Tensor:
    return gradient_at_input(make_fx(Network(operation))(INPUT))


def make_fx_before_dispatch(operation: Operation) -> Tensor:
    return gradient_at_input(make_fx(Network(operation), pre_dispatch=True)(INPUT))


def make_fx_of_gradient(operation: Operation) -> Tensor:
    return make_fx(torch.func.grad(objective(operation)))(INPUT)(INPUT)


def aot_module(operation: Operation) -> Tensor:
    compiling = pytest.importorskip("functorch.compile")
    return gradient_at_input(compiling.aot_module(Network(operation), compiling.nop))


def jit_trace(operation: Operation) -> Tensor:
    return gradient_at_input(torch.jit.trace(Network(operation), (INPUT,)))


def jit_trace_saved_and_loaded(operation: Operation) -> Tensor:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Network(operation), (INPUT,)), file)
    file.seek(0)
    return gradient_at_input(torch.jit.load(file))


def checkpoint_reentrant(operation: Operation) -> Tensor:
    return gradient_at_input(lambda x: checkpoint(Network(operation), x, use_reentrant=True))


def checkpoint_not_reentrant(operation: Operation) -> Tensor:
    return gradient_at_input(lambda x: checkpoint(Network(operation), x, use_reentrant=False))


class Tagged(torch.Tensor):
    """A subclass by name only, handled by __torch_function__."""


class Wrapped(torch.Tensor):
    """A subclass that holds its values in another tensor, handled by __torch_dispatch__."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapped":
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, strides=inner.stride()
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrap = lambda value: value.inner if isinstance(value, cls) else value  # noqa: E731
        out = func(*map(unwrap, args), **(kwargs or {}))
        return cls(out) if isinstance(out, Tensor) else out


def subclass_by_name(operation: Operation) -> Tensor:
    return gradient_at_input(lambda x: Network(operation)(x.as_subclass(Tagged)))


def subclass_that_wraps(operation: Operation) -> Tensor:
    x = Wrapped(INPUT).requires_grad_()
    (gradient,) = torch.autograd.grad(Network(operation)(x), x, grad_outputs=Wrapped(torch.ones_like(INPUT)))
    return gradient.inner


def autocast(operation: Operation) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return gradient_at_input(Network(operation))


def anomaly_detection(operation: Operation) -> Tensor:
    with (
        pytest.warns(UserWarning, match="Anomaly Detection has been enabled"),
        torch.autograd.detect_anomaly(),
    ):
        return gradient_at_input(Network(operation))


CONTEXTS = [
    eager,
    fx_symbolic_trace,
    torchvision_feature_extractor,
    export_strict,
    export_not_strict,
    export_saved_and_loaded,
    export_decomposed,
    export_decomposed_saved_and_loaded,
    export_then_func_grad,
    export_then_forward_ad,
    export_then_compile,
    compile_aot_eager,
    compile_func_grad,
    compile_checkpoint,
    func_grad,
    func_jacfwd,
    forward_mode,
    make_fx_of_forward,
    make_fx_before_dispatch,
    make_fx_of_gradient,
    aot_module,
    jit_trace,
    jit_trace_saved_and_loaded,
    checkpoint_reentrant,
    checkpoint_not_reentrant,
    subclass_by_name,
    subclass_that_wraps,
    autocast,
    anomaly_detection,
]

# In these the operation sees one sample at a time.
CONTEXTS_OF_ONE_SAMPLE = [per_sample_gradients, compile_per_sample_gradients]


def function_of_number(x: Tensor) -> Tensor:
    return reverse_gradient(x, COEFF)


def function_of_tensor(x: Tensor) -> Tensor:
    return reverse_gradient(x, torch.full((), COEFF))


def function_of_samples(x: Tensor) -> Tensor:
    return reverse_gradient(x, torch.full((4,), COEFF))


def layer() -> Operation:
    return GradientReversal(COEFF)


def layer_then_in_place() -> Operation:
    return nn.Sequential(GradientReversal(COEFF), nn.ReLU(inplace=True))


REVERSALS = {
    "number": lambda: function_of_number,
    "tensor": lambda: function_of_tensor,
    "samples": lambda: function_of_samples,
    "layer": layer,
    "in_place": layer_then_in_place,
}


@pytest.mark.parametrize("reversal", REVERSALS)
@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.__name__)
def test_the_gradient_is_reversed_in(context: Callable[[Operation], Tensor], reversal: str) -> None:
    torch.testing.assert_close(context(REVERSALS[reversal]()), REVERSED_GRADIENT, rtol=0, atol=0)


@pytest.mark.parametrize("reversal", sorted(set(REVERSALS) - {"samples"}))
@pytest.mark.parametrize("context", CONTEXTS_OF_ONE_SAMPLE, ids=lambda context: context.__name__)
def test_the_gradient_of_one_sample_is_reversed_in(
    context: Callable[[Operation], Tensor], reversal: str
) -> None:
    torch.testing.assert_close(context(REVERSALS[reversal]()), REVERSED_GRADIENT, rtol=0, atol=0)


@pytest.mark.parametrize("context", CONTEXTS + CONTEXTS_OF_ONE_SAMPLE, ids=lambda context: context.__name__)
def test_without_a_reversal_the_gradient_is_the_plain_one_in(context: Callable[[Operation], Tensor]) -> None:
    torch.testing.assert_close(context(torch.clone), PLAIN_GRADIENT, rtol=0, atol=0)


# --- What becomes of a reversal that is pasted into the model. It shows that the tests above can fail.

LOST_BY_RECORDING = [
    fx_symbolic_trace,
    torchvision_feature_extractor,
    export_strict,
    export_not_strict,
    export_saved_and_loaded,
    export_decomposed,
    make_fx_of_forward,
]
PASTED = [pasted_reversals.float_coeff, pasted_reversals.tensor_coeff]


@pytest.mark.parametrize("pasted", PASTED, ids=lambda pasted: pasted.__name__)
@pytest.mark.parametrize("context", LOST_BY_RECORDING, ids=lambda context: context.__name__)
def test_a_pasted_reversal_is_lost_without_a_word_in(
    context: Callable[[Operation], Tensor], pasted: Operation
) -> None:
    torch.testing.assert_close(context(pasted), PLAIN_GRADIENT, rtol=0, atol=0)


@pytest.mark.parametrize("pasted", PASTED, ids=lambda pasted: pasted.__name__)
def test_a_pasted_reversal_works_in_plain_execution(pasted: Operation) -> None:
    torch.testing.assert_close(eager(pasted), REVERSED_GRADIENT, rtol=0, atol=0)


def pasted_then_in_place(x: Tensor) -> Tensor:
    return pasted_reversals.tensor_coeff(x).relu_()


@pytest.mark.parametrize(
    ("context", "pasted", "complaint"),
    [
        (eager, pasted_then_in_place, "is a view and is being modified inplace"),
        (func_grad, pasted_reversals.float_coeff, "must override the setup_context"),
        (per_sample_gradients, pasted_reversals.float_coeff, "must override the setup_context"),
        (forward_mode, pasted_reversals.float_coeff, "must implement the jvp function"),
        (compile_aot_eager, pasted_reversals.tensor_coeff, "custom `?jvp"),
    ],
    ids=lambda value: getattr(value, "__name__", "") or None,
)
def test_a_pasted_reversal_is_an_error_in(
    context: Callable[[Operation], Tensor], pasted: Operation, complaint: str
) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=complaint):
        context(pasted)


# --- The coefficient stays adjustable


def reversed_by(coeff: float) -> Tensor:
    return -coeff * PLAIN_GRADIENT


class Counter:
    """The backend of torch that runs compiled graphs as they are, and how many it was given."""

    def __init__(self) -> None:
        self.frame_count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.frame_count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def compiled_and_counted(model: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], Counter]:
    counter = Counter()
    return torch.compile(model, backend=counter, fullgraph=True), counter


def test_a_coefficient_that_changes_a_hundred_times_compiles_one_graph() -> None:
    layer = GradientReversal()
    compiled, counter = compiled_and_counted(Network(layer))
    for step in range(100):
        layer.set_coeff(step / 64)
        torch.testing.assert_close(gradient_at_input(compiled), reversed_by(step / 64), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_a_coefficient_written_straight_into_the_buffer_is_obeyed_by_a_compiled_graph() -> None:
    layer = GradientReversal()
    compiled, counter = compiled_and_counted(Network(layer))
    for coeff in (1.0, 0.25):
        layer.coeff.fill_(coeff)
        torch.testing.assert_close(gradient_at_input(compiled), reversed_by(coeff), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_a_number_that_changes_compiles_no_more_than_two_graphs() -> None:
    compiled, counter = compiled_and_counted(lambda x, coeff: reverse_gradient(x * x, coeff) * WEIGHT)
    for step in range(6):
        coeff = (step + 1) / 8
        gradient = gradient_at_input(lambda x, coeff=coeff: compiled(x, coeff))
        torch.testing.assert_close(gradient, reversed_by(coeff), rtol=0, atol=0)
    assert counter.frame_count <= 2


def test_disabling_and_enabling_compiles_nothing_new() -> None:
    layer = GradientReversal(COEFF)
    network = Network(layer)
    compiled, counter = compiled_and_counted(network)
    for _ in range(3):
        torch.testing.assert_close(gradient_at_input(compiled), REVERSED_GRADIENT, rtol=0, atol=0)
        with reversal_disabled(network):
            torch.testing.assert_close(gradient_at_input(compiled), PLAIN_GRADIENT, rtol=0, atol=0)
    assert counter.frame_count == 1


def test_a_compiled_forward_that_ran_disabled_is_not_reversed_by_a_later_backward() -> None:
    network = Network(GradientReversal(COEFF))
    compiled, _ = compiled_and_counted(network)
    x = INPUT.clone().requires_grad_()
    with reversal_disabled(network):
        out = compiled(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, PLAIN_GRADIENT, rtol=0, atol=0)


def test_changing_the_coefficient_between_a_compiled_forward_and_its_backward_is_an_error() -> None:
    layer = GradientReversal()
    compiled, _ = compiled_and_counted(Network(layer))
    out = compiled(INPUT.clone().requires_grad_())
    layer.set_coeff(0.25)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_batches_of_many_sizes_with_a_coefficient_each_compile_no_more_than_two_graphs() -> None:
    compiled, counter = compiled_and_counted(lambda x, coeff: reverse_gradient(x * x, coeff))
    for size in range(2, 7):
        x, coeff = torch.ones(size, 3, requires_grad=True), torch.arange(float(size))
        (gradient,) = torch.autograd.grad(compiled(x, coeff).sum(), x)
        torch.testing.assert_close(gradient, -2 * coeff[:, None].expand(size, 3), rtol=0, atol=0)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("record", [torch.fx.symbolic_trace, lambda model: exported_module(model)])
def test_the_coefficient_of_a_recorded_layer_can_be_set(record: Callable[[nn.Module], nn.Module]) -> None:
    recorded = record(Network(GradientReversal(COEFF)))
    recorded.get_buffer("operation.coeff").fill_(0.25)
    torch.testing.assert_close(gradient_at_input(recorded), reversed_by(0.25), rtol=0, atol=0)


def exported_module(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (INPUT,)).module()


def test_a_stock_tracer_leaves_exactly_one_node_for_a_reversal() -> None:
    graph = torch.fx.symbolic_trace(Network(GradientReversal(COEFF))).graph
    assert [node.op for node in graph.nodes if node.target is reverse_gradient] == ["call_function"]
    assert len(graph.nodes) == 7  # x, x * x, coeff, the reversal, weight, the product, output


def test_disabling_refuses_a_model_whose_layers_were_traced_away() -> None:
    model = nn.Sequential(nn.Identity(), torch.fx.symbolic_trace(Network(GradientReversal())))
    with (
        pytest.raises(SurgeryError, match=r"cannot disable 'reverse_gradient' in '1'"),
        reversal_disabled(model),
    ):
        pass


@pytest.mark.parametrize("record", [torch.fx.symbolic_trace, exported_module])
def test_a_recorded_reversal_of_a_tuple_says_what_to_choose(record: Callable[[nn.Module], nn.Module]) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = GradientReversal()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x, x))

    with pytest.raises(Exception, match="its input is a tuple of 2; choose one item"):
        record(Pair())


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_negative_number_is_refused_by_compiled_code(fullgraph: bool) -> None:
    compiled = torch.compile(lambda x: reverse_gradient(x, -1.0), backend="aot_eager", fullgraph=fullgraph)
    # With fullgraph torch raises an error of its own, before 2.15 without the words of ours.
    refusal = RuntimeError if fullgraph else SurgeryError
    with pytest.raises(refusal) as caught:
        compiled(INPUT)
    if not fullgraph or torch.__version__ >= "2.15":
        assert "a negative one un-reverses it" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_compiled_and_plain_execution_agree_to_the_last_bit(dtype: torch.dtype) -> None:
    x, upstream = torch.randn(4, 3, dtype=dtype, requires_grad=True), torch.randn(4, 3, dtype=dtype)
    for coeff in (0.3, torch.tensor(0.3), torch.tensor([0.1, 0.2, 0.3, 0.7])):
        plain = reverse_gradient(x * 2, coeff)
        compiled = torch.compile(lambda x, c: reverse_gradient(x * 2, c), backend="aot_eager", fullgraph=True)
        (expected,) = torch.autograd.grad(plain, x, upstream)
        (measured,) = torch.autograd.grad(compiled(x, coeff), x, upstream)
        torch.testing.assert_close(measured, expected, rtol=0, atol=0)


# --- The operator

OPERATOR = torch.ops.grl_surgery.reverse_gradient.default


# torch looks for gradients on every tensor that its check copies.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "bfloat16"])
@pytest.mark.parametrize("coeff_shape", [(), (2, 1, 1, 1)])
def test_the_operator_satisfies_torch(coeff_shape: tuple[int, ...], layout: str, requires_grad: bool) -> None:
    x = {
        "contiguous": torch.randn(2, 3, 4, 4),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.randn(2, 3, 1, 1).expand(2, 3, 4, 4),
        "bfloat16": torch.randn(2, 3, 4, 4, dtype=torch.bfloat16),
    }[layout]
    arguments = (x.requires_grad_(requires_grad), torch.full(coeff_shape, COEFF))
    assert set(torch.library.opcheck(OPERATOR, arguments).values()) == {"SUCCESS"}
    result = OPERATOR(*arguments)
    assert result.data_ptr() != x.data_ptr()
    assert result.stride() == torch.empty_like(x).stride()


def through_operator(x: Tensor) -> Tensor:
    return OPERATOR(x, torch.full((), COEFF))


def test_the_operator_reverses_for_the_autograd_engine() -> None:
    torch.testing.assert_close(eager(through_operator), REVERSED_GRADIENT, rtol=0, atol=0)
    torch.testing.assert_close(forward_mode(through_operator), REVERSED_GRADIENT, rtol=0, atol=0)


@pytest.mark.parametrize(
    "transform", [func_grad, func_jacfwd, per_sample_gradients], ids=lambda context: context.__name__
)
def test_the_operator_reverses_under_function_transforms(transform: Callable[[Operation], Tensor]) -> None:
    torch.testing.assert_close(transform(through_operator), REVERSED_GRADIENT, rtol=0, atol=0)


def test_the_operator_takes_a_coefficient_per_vmapped_sample() -> None:
    coeff = torch.tensor([0.0, 0.5, 1.0, 2.0])
    gradient = torch.func.grad(lambda x, coeff: (OPERATOR(x * x, coeff)).sum())
    per_sample = torch.func.vmap(gradient)(INPUT, coeff)
    torch.testing.assert_close(per_sample, -coeff[:, None] * 2 * INPUT, rtol=0, atol=0)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_keeps_the_reversal(pre_dispatch: bool) -> None:
    graph = make_fx(Network(function_of_number), pre_dispatch=pre_dispatch)(INPUT).graph
    assert sum(node.target is OPERATOR for node in graph.nodes) == 1


def test_a_vmap_inside_an_exported_model_keeps_the_reversal() -> None:
    model = nn.Module()
    model.forward = torch.func.vmap(lambda row: reverse_gradient(row * row, COEFF))
    recorded = torch.export.export(model, (INPUT,), strict=False).module()
    torch.testing.assert_close(gradient_at_input(recorded), -COEFF * 2 * INPUT, rtol=0, atol=0)


# --- Inductor


def built_by_inductor(operation: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Returns the code of the forward and of the backward, and the gradients of the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), operation, nn.Linear(3, 2))
    # Private, but only what reads the code: the compilation is a user's. A graph out of the cache
    # would have no code to look at, and might be an old one.
    from torch._inductor.utils import run_and_get_code

    compiled = torch.compile(model, fullgraph=True)
    with torch.compiler.config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
        _, code = run_and_get_code(lambda: compiled(INPUT).sum().backward())
    return code, [parameter.grad for parameter in model.parameters()]


@pytest.fixture(scope="module")
def plain_and_reversed() -> Any:
    return built_by_inductor(nn.Identity()), built_by_inductor(GradientReversal(COEFF))


def kernels(code: str) -> list[str]:
    return re.findall(r"r'''(.*?)'''", code, flags=re.DOTALL)


def calls(code: str) -> list[str]:
    return re.findall(r"((?:cpp_fused|extern_kernels|torch\.ops)[\w.]*)\(", code)


def test_inductor_generates_no_code_for_the_forward_of_a_reversal(plain_and_reversed: Any) -> None:
    ((plain, _), _), ((code, _), _) = plain_and_reversed
    assert calls(plain)
    assert kernels(code) == kernels(plain)
    assert calls(code) == calls(plain)


def test_inductor_fuses_the_reversal_of_the_gradient(plain_and_reversed: Any) -> None:
    ((_, plain), _), ((_, code), _) = plain_and_reversed
    assert "grl_surgery" not in code
    # The one thing that may be new is the kernel that multiplies; it replaces none and calls nothing outside.
    assert [call for call in calls(code) if "cpp" not in call] == [
        call for call in calls(plain) if "cpp" not in call
    ]
    assert len(calls(code)) <= len(calls(plain)) + 1


def test_inductor_reverses_the_gradient(plain_and_reversed: Any) -> None:
    (_, plain), (_, gradients) = plain_and_reversed
    for before, after in zip(plain[:4], gradients[:4], strict=True):
        assert before.count_nonzero()
        torch.testing.assert_close(after, -COEFF * before, rtol=0, atol=0)
    for before, after in zip(plain[4:], gradients[4:], strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


# --- Distributed tensors


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    distributed = pytest.importorskip("torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def gradient_of_distributed_tensor(function: Callable[[Tensor], Tensor], mesh: Any, placement: Any) -> Tensor:
    x = distribute_tensor(INPUT, mesh, [placement]).requires_grad_()
    function(x).sum().backward()
    assert x.grad.placements == (placement,)
    return x.grad.to_local()


PLACEMENTS = [Shard(0), Shard(1), Replicate()]


def squared_then_reversed(x: Tensor) -> Tensor:
    return reverse_gradient(x * x, COEFF)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_a_distributed_tensor_is_reversed(mesh: Any, placement: Any) -> None:
    gradient = gradient_of_distributed_tensor(squared_then_reversed, mesh, placement)
    torch.testing.assert_close(gradient, -COEFF * 2 * INPUT, rtol=0, atol=0)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_a_compiled_distributed_tensor_is_reversed(mesh: Any, placement: Any) -> None:
    compiled = torch.compile(squared_then_reversed, backend="aot_eager", fullgraph=True)
    gradient = gradient_of_distributed_tensor(compiled, mesh, placement)
    torch.testing.assert_close(gradient, -COEFF * 2 * INPUT, rtol=0, atol=0)
