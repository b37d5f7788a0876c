"""A reversal is one line of code until something traces, exports, transforms or compiles it.

The contexts themselves are in tests/reversal_contexts.py. Here all run in one process; tests/test_fresh.py
runs each in a process that ran nothing before.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pasted_reversals
import pytest
import torch
from fresh_processes import Parent, Result
from reversal_contexts import (
    COEFF,
    CONTEXTS,
    CONTEXTS_OF_ONE_SAMPLE,
    INPUT,
    PLAIN_GRADIENT,
    REVERSED_GRADIENT,
    WEIGHT,
    Context,
    Network,
    Operation,
    compile_aot_eager,
    eager,
    export_decomposed,
    export_decomposed_by_all_of_torchs_tables,
    export_not_strict,
    export_saved_and_loaded,
    export_strict,
    forward_mode,
    func_grad,
    func_jacfwd,
    function_of_number,
    fx_symbolic_trace,
    gradient_at_input,
    layer,
    make_fx_of_forward,
    packages_of,
    per_sample_gradients,
    torchvision_feature_extractor,
)
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx

from grl_surgery.errors import SurgeryError
from grl_surgery.nn.reversal import GradientReversal, reversal_disabled, reverse_gradient

# One context is torch.jit.trace itself, and torch's forward mode is still written with torch.jit.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is deprecated")


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch.compiler.reset()


def measured(context: Context, operation: Operation) -> Tensor:
    for package in packages_of(context):
        pytest.importorskip(package)
    return context(operation)


def test_anomaly_detection_sees_nothing_wrong() -> None:
    with (
        pytest.warns(UserWarning, match="Anomaly Detection has been enabled"),
        torch.autograd.detect_anomaly(),
    ):
        torch.testing.assert_close(eager(layer()), REVERSED_GRADIENT, rtol=0, atol=0)


def function_of_tensor(x: Tensor) -> Tensor:
    return reverse_gradient(x, torch.full((), COEFF))


def function_of_samples(x: Tensor) -> Tensor:
    return reverse_gradient(x, torch.full((x.shape[0],), COEFF))


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
def test_the_gradient_is_reversed_in(context: Context, reversal: str) -> None:
    if context is export_decomposed_by_all_of_torchs_tables and reversal == "in_place":
        pytest.skip("torch's tables make of relu a primitive that has no gradient")
    torch.testing.assert_close(measured(context, REVERSALS[reversal]()), REVERSED_GRADIENT, rtol=0, atol=0)


@pytest.mark.parametrize("reversal", sorted(set(REVERSALS) - {"samples"}))
@pytest.mark.parametrize("context", CONTEXTS_OF_ONE_SAMPLE, ids=lambda context: context.__name__)
def test_the_gradient_of_one_sample_is_reversed_in(context: Context, reversal: str) -> None:
    torch.testing.assert_close(measured(context, REVERSALS[reversal]()), REVERSED_GRADIENT, rtol=0, atol=0)


@pytest.mark.parametrize("context", CONTEXTS + CONTEXTS_OF_ONE_SAMPLE, ids=lambda context: context.__name__)
def test_without_a_reversal_the_gradient_is_the_plain_one_in(context: Context) -> None:
    # torch's tables make of clone a primitive that has no gradient
    is_primitive = context is export_decomposed_by_all_of_torchs_tables
    plain = nn.Identity() if is_primitive else torch.clone
    torch.testing.assert_close(measured(context, plain), PLAIN_GRADIENT, rtol=0, atol=0)


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
def test_a_pasted_reversal_is_lost_without_a_word_in(context: Context, pasted: Operation) -> None:
    torch.testing.assert_close(measured(context, pasted), PLAIN_GRADIENT, rtol=0, atol=0)


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
def test_a_pasted_reversal_is_an_error_in(context: Context, pasted: Operation, complaint: str) -> None:
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


BUILT_BY_INDUCTOR = """
model = torch.nn.Sequential(
    torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3), {operation}, torch.nn.Linear(3, 2)
)
torch.compile(model, fullgraph=True)(torch.ones(4, 3)).sum().backward()
"""


@pytest.fixture(scope="module")
def plain_and_reversed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The code of the forward and of the backward that Inductor logs, without a reversal and with one."""
    folder = tmp_path_factory.mktemp("inductor")
    # A graph out of the cache would have no code to look at, and might be an old one.
    settings = {
        "TORCH_LOGS": "output_code",
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
    }
    with Parent("import torch, grl_surgery as gs", TORCHINDUCTOR_CACHE_DIR=str(folder), **settings) as parent:
        return [
            written_code(parent.run(BUILT_BY_INDUCTOR.format(operation=operation), folder))
            for operation in ("torch.nn.Identity()", "gs.GradientReversal(0.5)")
        ]


def written_code(result: Result) -> list[str]:
    assert result.code == 0, result.stderr[-3000:]
    lines = [line.partition("[__output_code]")[2] for line in result.stderr.splitlines()]
    _, *found = re.split(r"^ Output code:", "\n".join(line for line in lines if line), flags=re.MULTILINE)
    assert len(found) == 2
    return found


def kernels(code: str) -> list[str]:
    return re.findall(r"r'''(.*?)'''", code, flags=re.DOTALL)


def calls(code: str) -> list[str]:
    return re.findall(r"((?:cpp_fused|extern_kernels|torch\.ops)[\w.]*)\(", code)


def test_inductor_generates_no_code_for_the_forward_of_a_reversal(plain_and_reversed: Any) -> None:
    (plain, _), (code, _) = plain_and_reversed
    assert calls(plain)
    assert kernels(code) == kernels(plain)
    assert calls(code) == calls(plain)


def test_inductor_fuses_the_reversal_of_the_gradient(plain_and_reversed: Any) -> None:
    (_, plain), (_, code) = plain_and_reversed
    assert "grl_surgery" not in code
    # The one thing that may be new is the kernel that multiplies; it replaces none and calls nothing outside.
    assert [call for call in calls(code) if "cpp" not in call] == [
        call for call in calls(plain) if "cpp" not in call
    ]
    assert len(calls(code)) <= len(calls(plain)) + 1


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
