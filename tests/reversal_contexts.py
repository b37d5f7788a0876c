"""Where a reversal may run: each context is a function, and imports what a user of it would import.

Every context takes an operation, puts it into the middle of a small network and returns the gradient that
comes out at the input of the network. All numbers are small multiples of powers of two, so that the gradient
is known by calculus and exact in every context.

The tests run each context in a process that ran nothing before, and in one that ran many others;
docs/measure_contexts.py makes the table of docs/contexts.md of them.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Operation = Callable[[Tensor], Tensor]
Context = Callable[[Operation], Tensor]

INPUT = torch.tensor([[0.5, -1.0, 2.0], [1.5, 3.0, -0.25], [-2.0, 0.75, 1.0], [4.0, -0.5, 1.25]])
WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, -1.0], [0.25, 2.0, -4.0], [-1.0, 0.5, 2.0]])
COEFF = 0.5

PLAIN_GRADIENT = 2 * INPUT * WEIGHT
REVERSED_GRADIENT = -COEFF * PLAIN_GRADIENT


def needs(*packages: str) -> Callable[[Context], Context]:
    """Names the packages without which a context cannot run."""

    def mark(context: Context) -> Context:
        context.packages = packages  # type: ignore[attr-defined]
        return context

    return mark


def packages_of(context: Context) -> tuple[str, ...]:
    return getattr(context, "packages", ())


class Network(nn.Module):
    """f(x) = operation(x * x) * weight, whose gradient without a reversal is 2 * x * weight."""

    def __init__(self, operation: Operation, weight: Tensor = WEIGHT) -> None:
        super().__init__()
        self.operation = operation
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x * x) * self.weight


class NetworkWithParameters(nn.Module):
    """The same behind a linear layer that changes nothing, for what wraps or replaces parameters."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.linear, self.rest = nn.Linear(3, 3), Network(operation)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(3))
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.linear(x))


class Rows(nn.Module):
    """The same for any number of rows: the weights come with the input."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.operation(x * x) * weight


def objective(operation: Operation) -> Callable[[Tensor], Tensor]:
    network = Network(operation)
    return lambda x: network(x).sum()


def gradient_at_input(function: Callable[[Tensor], Tensor]) -> Tensor:
    x = INPUT.clone().requires_grad_()
    function(x).sum().backward()
    return x.grad


class Call(nn.Module):
    """An operation that may be a function, as a module."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)


def between_linear_layers(operation: Operation) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), Call(operation), nn.Linear(8, 2))


def beside_no_operation(gradient: Context, operation: Operation) -> Tensor:
    """The gradient in units of the one without an operation, for networks that round."""
    return gradient(operation) / gradient(nn.Identity()) * PLAIN_GRADIENT


# --- Plain execution, recorders and transforms


def eager(operation: Operation) -> Tensor:
    return gradient_at_input(Network(operation))


def fx_symbolic_trace(operation: Operation) -> Tensor:
    return gradient_at_input(torch.fx.symbolic_trace(Network(operation)))


@needs("torchvision")
def torchvision_feature_extractor(operation: Operation) -> Tensor:
    from torchvision.models.feature_extraction import create_feature_extractor

    extractor = create_feature_extractor(Network(operation), {"mul_1": "out"})
    return gradient_at_input(lambda x: extractor(x)["out"])


def exported(operation: Operation, *, strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(Network(operation), (INPUT,), strict=strict)


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def export_strict(operation: Operation) -> Tensor:
    return gradient_at_input(exported(operation, strict=True).module())


def export_not_strict(operation: Operation) -> Tensor:
    return gradient_at_input(exported(operation).module())


def export_saved_and_loaded(operation: Operation) -> Tensor:
    return gradient_at_input(saved_and_loaded(exported(operation)).module())


def export_dynamic_shapes(operation: Operation) -> Tensor:
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        Rows(operation), (INPUT[:2], WEIGHT[:2]), dynamic_shapes={"x": {0: rows}, "weight": {0: rows}}
    )
    return gradient_at_input(lambda x: program.module()(x, WEIGHT))


def export_decomposed(operation: Operation) -> Tensor:
    return gradient_at_input(exported(operation).run_decompositions().module())


def export_decomposed_by_an_empty_table(operation: Operation) -> Tensor:
    return gradient_at_input(exported(operation).run_decompositions({}).module())


def export_decomposed_by_the_core_table(operation: Operation) -> Tensor:
    table = torch._decomp.core_aten_decompositions()
    return gradient_at_input(exported(operation).run_decompositions(table).module())


def export_decomposed_by_all_of_torchs_tables(operation: Operation) -> Tensor:
    # They turn a product into a primitive that has no gradient; linear layers stay what they are.
    def gradient(operation: Operation) -> Tensor:
        program = torch.export.export(between_linear_layers(operation), (INPUT,))
        return gradient_at_input(program.run_decompositions(torch._decomp.decomposition_table).module())

    return beside_no_operation(gradient, operation)


def export_decomposed_saved_and_loaded(operation: Operation) -> Tensor:
    return gradient_at_input(saved_and_loaded(exported(operation).run_decompositions()).module())


def export_then_func_grad(operation: Operation) -> Tensor:
    module = saved_and_loaded(exported(operation)).module()
    return torch.func.grad(lambda x: module(x).sum())(INPUT)


def export_then_forward_ad(operation: Operation) -> Tensor:
    return derivative_by_forward_ad(exported(operation).module())


def export_then_compile(operation: Operation) -> Tensor:
    module = exported(operation).module()
    return gradient_at_input(torch.compile(module, backend="aot_eager", fullgraph=True))


def compile_aot_eager(operation: Operation) -> Tensor:
    return gradient_at_input(torch.compile(Network(operation), backend="aot_eager", fullgraph=True))


def compile_inductor(operation: Operation) -> Tensor:
    return gradient_at_input(torch.compile(Network(operation), fullgraph=True))


def compile_inductor_dynamic_shapes(operation: Operation) -> Tensor:
    compiled = torch.compile(Rows(operation), dynamic=True, fullgraph=True)
    compiled(INPUT[:2].clone().requires_grad_(), WEIGHT[:2]).sum().backward()
    return gradient_at_input(lambda x: compiled(x, WEIGHT))


def compile_inductor_reduce_overhead(operation: Operation) -> Tensor:
    return gradient_at_input(torch.compile(Network(operation), mode="reduce-overhead", fullgraph=True))


def compile_inductor_max_autotune_no_cudagraphs(operation: Operation) -> Tensor:
    compiled = torch.compile(Network(operation), mode="max-autotune-no-cudagraphs", fullgraph=True)
    return gradient_at_input(compiled)


def compile_inductor_from_saved_artifacts(operation: Operation) -> Tensor:
    network = Network(operation)
    gradient_at_input(torch.compile(network, fullgraph=True))
    artifacts = torch.compiler.save_cache_artifacts()
    torch.compiler.reset()
    if artifacts is not None:  # None where nothing was compiled anew
        torch.compiler.load_cache_artifacts(artifacts[0])
    return gradient_at_input(torch.compile(network, fullgraph=True))


def compile_regions(operation: Operation) -> Tensor:
    network = nn.Sequential(nn.Identity(), Network(operation), nn.Identity())
    network[1].compile(backend="aot_eager", fullgraph=True)
    return gradient_at_input(network)


def compile_under_a_stance(operation: Operation) -> Tensor:
    compiled = torch.compile(Network(operation), backend="aot_eager", fullgraph=True)
    gradient_at_input(compiled)
    with torch.compiler.set_stance("force_eager"):
        eagerly = gradient_at_input(compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        again = gradient_at_input(compiled)
    assert torch.equal(eagerly, again)
    return again


def compiled_autograd(operation: Operation) -> Tensor:
    network, x = Network(operation), INPUT.clone().requires_grad_()

    @torch.compile(backend="aot_eager")
    def step() -> None:
        network(x).sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        step()
    return x.grad


def compile_func_grad(operation: Operation) -> Tensor:
    gradient = torch.func.grad(objective(operation))
    return torch.compile(gradient, backend="aot_eager", fullgraph=True)(INPUT)


def compile_per_sample_gradients(operation: Operation) -> Tensor:
    return torch.compile(per_sample_gradient(operation), backend="aot_eager", fullgraph=True)(INPUT, WEIGHT)


def compile_checkpoint(operation: Operation) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    network = Network(operation)
    return gradient_at_input(
        torch.compile(
            lambda x: checkpoint(network, x, use_reentrant=False), backend="aot_eager", fullgraph=True
        )
    )


def compile_by_a_backend_that_exports(operation: Operation) -> Tensor:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> nn.Module:
        return torch.export.export(graph, tuple(each.detach() for each in inputs)).module()

    return gradient_at_input(torch.compile(Network(operation), backend=backend))


def compile_by_a_backend_that_exports_and_decomposes(operation: Operation) -> Tensor:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> nn.Module:
        program = torch.export.export(graph, tuple(each.detach() for each in inputs))
        return program.run_decompositions().module()

    return gradient_at_input(torch.compile(Network(operation), backend=backend))


def compile_by_a_backend_that_records_the_forward(operation: Operation) -> Tensor:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> nn.Module:
        from torch.fx.experimental.proxy_tensor import make_fx

        return make_fx(graph)(*inputs)

    return gradient_at_input(torch.compile(Network(operation), backend=backend))


def func_grad(operation: Operation) -> Tensor:
    return torch.func.grad(objective(operation))(INPUT)


def func_jacfwd(operation: Operation) -> Tensor:
    return torch.func.jacfwd(objective(operation))(INPUT)


def functional_call_with_buffers(operation: Operation) -> Tensor:
    network = Network(operation)
    state = {name: value.clone() for name, value in [*network.named_parameters(), *network.named_buffers()]}
    return gradient_at_input(lambda x: torch.func.functional_call(network, state, (x,)))


def stack_module_state(operation: Operation) -> Tensor:
    networks = [Network(operation) for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(networks)

    def loss(x: Tensor, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(networks[0], (parameters, buffers), (x,)).sum()

    both = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(INPUT, parameters, buffers)
    assert torch.equal(both[0], both[1])
    return both[0]


def per_sample_gradient(operation: Operation) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.func.vmap(torch.func.grad(lambda x, weight: (operation(x * x) * weight).sum()))


def per_sample_gradients(operation: Operation) -> Tensor:
    return per_sample_gradient(operation)(INPUT, WEIGHT)


def derivative_by_forward_ad(function: Callable[[Tensor], Tensor]) -> Tensor:
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        x = forward_ad.make_dual(INPUT.clone(), torch.ones_like(INPUT))
        return forward_ad.unpack_dual(function(x)).tangent


def forward_mode(operation: Operation) -> Tensor:
    return derivative_by_forward_ad(Network(operation))


def make_fx_of_forward(operation: Operation) -> Tensor:
    from torch.fx.experimental.proxy_tensor import make_fx

    return gradient_at_input(make_fx(Network(operation))(INPUT))


def make_fx_before_dispatch(operation: Operation) -> Tensor:
    from torch.fx.experimental.proxy_tensor import make_fx

    return gradient_at_input(make_fx(Network(operation), pre_dispatch=True)(INPUT))


def make_fx_of_gradient(operation: Operation) -> Tensor:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(torch.func.grad(objective(operation)))(INPUT)(INPUT)


def aot_module(operation: Operation) -> Tensor:
    import functorch.compile

    return gradient_at_input(functorch.compile.aot_module(Network(operation), functorch.compile.nop))


def jit_trace(operation: Operation) -> Tensor:
    return gradient_at_input(torch.jit.trace(Network(operation), (INPUT,)))


def jit_trace_saved_and_loaded(operation: Operation) -> Tensor:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Network(operation), (INPUT,)), file)
    file.seek(0)
    return gradient_at_input(torch.jit.load(file))


def checkpoint_reentrant(operation: Operation) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    return gradient_at_input(lambda x: checkpoint(Network(operation), x, use_reentrant=True))


def checkpoint_not_reentrant(operation: Operation) -> Tensor:
    from torch.utils.checkpoint import checkpoint

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


# --- Copies, files and processes


def state_dict_loaded_by_weights_only(operation: Operation) -> Tensor:
    file = io.BytesIO()
    network = NetworkWithParameters(operation)
    torch.save(network.state_dict(), file)
    file.seek(0)
    network.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=True)
    return gradient_at_input(network)


@needs("cloudpickle")
def cloudpickled(operation: Operation) -> Tensor:
    import cloudpickle

    return gradient_at_input(cloudpickle.loads(cloudpickle.dumps(Network(operation))))


def gradient_into(rank: int, network: nn.Module, gradient: Tensor) -> None:
    gradient.copy_(gradient_at_input(network))


def mp_spawn(operation: Operation) -> Tensor:
    import torch.multiprocessing

    gradient = torch.zeros_like(INPUT).share_memory_()
    torch.multiprocessing.spawn(gradient_into, (Network(operation), gradient))
    return gradient


@contextmanager
def world_of_one() -> Iterator[Any]:
    """A mesh of this process alone; the collectives are those of many."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def ddp_static_graph(operation: Operation) -> Tensor:
    from torch.nn.parallel import DistributedDataParallel

    with world_of_one():
        wrapped = DistributedDataParallel(NetworkWithParameters(operation), static_graph=True)
        gradient_at_input(wrapped)
        return gradient_at_input(wrapped)


def ddp_no_sync(operation: Operation) -> Tensor:
    from torch.nn.parallel import DistributedDataParallel

    with world_of_one():
        wrapped = DistributedDataParallel(NetworkWithParameters(operation))
        with wrapped.no_sync():
            silent = gradient_at_input(wrapped)
        assert torch.equal(silent, gradient_at_input(wrapped))
        return silent


def fsdp1(operation: Operation) -> Tensor:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with world_of_one():
        wrapped = FullyShardedDataParallel(NetworkWithParameters(operation), device_id=torch.device("cpu"))
        return gradient_at_input(wrapped)


def fsdp2(operation: Operation) -> Tensor:
    from torch.distributed.fsdp import fully_shard

    with world_of_one() as mesh:
        return gradient_at_input(fully_shard(NetworkWithParameters(operation), mesh=mesh))


def tensor_parallel(operation: Operation) -> Tensor:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    with world_of_one() as mesh:
        network = NetworkWithParameters(operation)
        return gradient_at_input(parallelize_module(network, mesh, {"linear": ColwiseParallel()}))


def pipeline_parallel(operation: Operation) -> Tensor:
    from torch.distributed.pipelining import SplitPoint, pipeline

    network = NetworkWithParameters(operation)
    pipe = pipeline(network, mb_args=(INPUT,), split_spec={"rest": SplitPoint.BEGINNING})
    first, second = (pipe.get_stage_module(stage) for stage in range(2))
    return gradient_at_input(lambda x: second(first(x)))


# --- Other libraries


@needs("accelerate")
def accelerate(operation: Operation) -> Tensor:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    network = NetworkWithParameters(operation)
    network, _ = accelerator.prepare(network, torch.optim.SGD(network.parameters()))
    x = INPUT.clone().requires_grad_()
    accelerator.backward(network(x).sum())
    return x.grad


@needs("opacus")
def opacus_per_sample_gradients(operation: Operation) -> Tensor:
    from opacus import GradSampleModule

    network = GradSampleModule(NetworkWithParameters(operation), loss_reduction="sum")
    network(INPUT).sum().backward()
    return network.linear.bias.grad_sample


@needs("captum")
def captum_saliency(operation: Operation) -> Tensor:
    from captum.attr import Saliency

    network = Network(operation)
    return Saliency(lambda x: network(x).sum(1)).attribute(INPUT, abs=False).detach()


@needs("peft")
def peft_lora(operation: Operation) -> Tensor:
    from peft import LoraConfig, get_peft_model

    network = get_peft_model(NetworkWithParameters(operation), LoraConfig(target_modules=["linear"]))
    return gradient_at_input(network)


@needs("torchao")
def torchao_qat(operation: Operation) -> Tensor:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.qat import QATConfig

    def gradient(operation: Operation) -> Tensor:
        network = between_linear_layers(operation)
        quantize_(network, QATConfig(IntxWeightOnlyConfig(torch.int8), step="prepare"))
        assert type(network[0]) is not nn.Linear
        return gradient_at_input(network)

    return beside_no_operation(gradient, operation)


CONTEXTS: list[Context] = [
    eager,
    fx_symbolic_trace,
    torchvision_feature_extractor,
    export_strict,
    export_not_strict,
    export_dynamic_shapes,
    export_saved_and_loaded,
    export_decomposed,
    export_decomposed_by_an_empty_table,
    export_decomposed_by_the_core_table,
    export_decomposed_by_all_of_torchs_tables,
    export_decomposed_saved_and_loaded,
    export_then_func_grad,
    export_then_forward_ad,
    export_then_compile,
    compile_aot_eager,
    compile_regions,
    compile_under_a_stance,
    compile_func_grad,
    compile_checkpoint,
    compiled_autograd,
    compile_by_a_backend_that_exports,
    compile_by_a_backend_that_exports_and_decomposes,
    compile_by_a_backend_that_records_the_forward,
    func_grad,
    func_jacfwd,
    functional_call_with_buffers,
    stack_module_state,
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
    state_dict_loaded_by_weights_only,
    cloudpickled,
]

# In these the operation sees one sample at a time.
CONTEXTS_OF_ONE_SAMPLE: list[Context] = [per_sample_gradients, compile_per_sample_gradients]

# These generate code and compile it.
INDUCTOR_CONTEXTS: list[Context] = [
    compile_inductor,
    compile_inductor_dynamic_shapes,
    compile_inductor_reduce_overhead,
    compile_inductor_max_autotune_no_cudagraphs,
    compile_inductor_from_saved_artifacts,
]

# These start processes, groups of them, or large libraries.
COSTLY_CONTEXTS: list[Context] = [
    mp_spawn,
    ddp_static_graph,
    ddp_no_sync,
    fsdp1,
    fsdp2,
    tensor_parallel,
    pipeline_parallel,
    accelerate,
    opacus_per_sample_gradients,
    captum_saliency,
    peft_lora,
    torchao_qat,
]


# --- Reversals of this library


def function_of_number(x: Tensor) -> Tensor:
    from grl_surgery import reverse_gradient

    return reverse_gradient(x, COEFF)


def layer() -> nn.Module:
    from grl_surgery import GradientReversal

    return GradientReversal(COEFF)


def outcome(context: Context, operation: Operation) -> str:
    """What becomes of the operation: reversed, LOST (no error), wrong, or the error's name."""
    try:
        gradient = context(operation)
    except Exception as error:
        return f"error: {type(error).__name__}"
    if torch.equal(gradient, REVERSED_GRADIENT):
        return "reversed"
    return "LOST" if torch.equal(gradient, PLAIN_GRADIENT) else "wrong"
