"""A reversal is one line of code until something traces, exports, transforms or compiles it: all of that, here.

Every context takes an operation, puts it into the middle of a small network and returns the gradient that comes
out at the network's input. All numbers are small multiples of powers of two, so that the gradient is known by
calculus and exact in every context.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pasted_reversals
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from grl_surgery.reversal import GradientReversal, reverse_gradient

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
    torch._dynamo.reset()


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
    with forward_ad.dual_level(), warnings.catch_warnings():
        # torch's own decompositions for forward mode are still written with torch.jit.
        warnings.filterwarnings("ignore", message="`torch.jit", category=FutureWarning)
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


@contextlib.contextmanager
def deprecated_jit() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.*` is deprecated")
        yield


def jit_trace(operation: Operation) -> Tensor:
    with deprecated_jit():
        return gradient_at_input(torch.jit.trace(Network(operation), (INPUT,)))


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
