"""What must stay cheap, counted: calls, copies, bytes, kernels, graphs. Nothing here looks at a clock.

Each of these has failed on a version broken for the purpose, which the comment above it names.
"""

import functools
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import Net, image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import grl_surgery as gs
from grl_surgery.capture.module_effects import effects
from grl_surgery.surgery import graph_rewrite as cutting

BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "performance"


def python_calls(call: Callable[[], Any]) -> int:
    """How many functions a call enters, in Python and in C: no clock, no noise."""
    call()  # what happens once only is not counted
    entered = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event in ("call", "c_call")

    before, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()  # a collection calls whoever asked to be told of it
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
        if collecting:
            gc.enable()
    return entered


class Operators(TorchDispatchMode):
    """Names of the operators that ran, and the results that have memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.made: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        result = func(*args, **(kwargs or {}))
        self.names.append(func.__name__.partition(".")[0])
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.made[result.untyped_storage().data_ptr()] = result.untyped_storage().nbytes()
        return result


# --- the operation


@pytest.fixture
def value() -> Tensor:
    return torch.randn(32, 64, requires_grad=True) * 1


# Broken: x.clone() instead of x.detach() in the forward.
def test_a_forward_allocates_no_more_than_its_coefficient(value: Tensor) -> None:
    layer = gs.GradientReversal(0.5)
    with Operators() as forward:
        out = layer(value)
    assert out.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    assert sum(forward.made.values()) == layer.coeff.nbytes


# Broken: -grad * coeff, which is two buffers.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_is_one_multiplication_into_one_buffer_of_the_gradients_size(dtype: torch.dtype) -> None:
    value = torch.randn(32, 64, dtype=dtype, requires_grad=True) * 1
    out, grad = gs.GradientReversal(0.5)(value), torch.ones(32, 64, dtype=dtype)
    with Operators() as backward:
        torch.autograd.grad(out, value, grad)
    assert [name for name in backward.names if name != "detach"] == ["mul"]
    assert list(backward.made.values()) == [grad.nbytes]


# Broken: the autograd function that torch.func asks for, whose signature torch binds at each call: 132 calls.
def test_a_call_of_the_layer_enters_few_functions(value: Tensor) -> None:
    layer = gs.GradientReversal(0.5)
    bare = python_calls(lambda: nn.Identity()(value))
    assert python_calls(lambda: layer(value)) - bare < 40


# Broken: a coefficient kept as a number, read with item() in the forward.
def test_the_coefficient_is_never_read_by_the_host(value: Tensor) -> None:
    layer = gs.GradientReversal(0.5)
    with Operators() as both:
        torch.autograd.grad(layer(value), value, torch.ones(32, 64))
        layer.set_coeff(0.25)
    assert "_local_scalar_dense" not in both.names


# --- a training step


def operators_of_a_step(model: nn.Module, images: Tensor) -> list[str]:
    with Operators() as ran:
        model(images).square().sum().backward()
    return ran.names


# Broken: the clone again.
def test_a_training_step_of_a_spliced_network_runs_the_operators_of_the_plain_one_and_two_more() -> None:
    torch.manual_seed(0)
    net, images = Net(), image()
    point = "stage1"
    plain = operators_of_a_step(net, images)
    net.zero_grad()
    spliced = operators_of_a_step(gs.insert_grl(net, after=point), images)
    more = list(spliced)
    for name in plain:
        more.remove(name)
    assert sorted(name for name in more if name not in ("detach", "alias")) == ["mul", "neg"]


# --- surgery


class Deep(nn.Module):
    """Many blocks, each with something inside."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def calls_of_surgery(blocks: int, points: int) -> int:
    model = Deep(blocks)
    names = [f"blocks.{place}" for place in range(points)]
    return python_calls(lambda: gs.insert_grl(model, after=names))


# Broken: the modules of the network listed again for every point: 3.7 times.
def test_a_hundred_points_in_one_call_cost_less_than_three_times_one() -> None:
    assert calls_of_surgery(128, 100) < 3 * calls_of_surgery(128, 1)


# Broken: all cuts written out for every cut.
def test_the_cost_of_points_is_linear() -> None:
    few, some, many = (calls_of_surgery(128, points) for points in (20, 60, 100))
    assert many - some < 1.1 * (some - few)


# Broken: the modules of the network listed again for each module.
def test_the_cost_of_surgery_is_linear_in_the_depth() -> None:
    small, medium, large = (calls_of_surgery(blocks, 1) for blocks in (20, 60, 100))
    assert large - medium < 1.1 * (medium - small)


# Broken: every block traced through, which is what torch.fx.symbolic_trace does.
def test_blocks_that_hold_no_point_are_not_traced() -> None:
    model = Deep(50)
    spliced = gs.insert_grl(model, after="blocks.3.0")
    assert sum(node.op == "call_module" for node in spliced.graph.nodes) == 50 + 1 + 1


class Dense(nn.Module):
    """Every block reads what all blocks before it have returned."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joins(nn.Linear(2, 2)) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for block in self.blocks:
            found.append(block(found))
        return found[-1]


class Joins(nn.Sequential):
    """A block of a list of tensors."""

    def forward(self, found: list[Tensor]) -> Tensor:
        return self[0](sum(found))


# Broken: every block that could overwrite what another one reads asked for: twenty traces.
def test_what_a_block_does_to_its_arguments_is_asked_where_it_matters_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(cutting, "effects", lambda module: asked.append(module) or effects(module))
    gs.insert_grl(Dense(20), after="blocks.7")
    assert len(asked) == 1


# --- verification


# Broken: a verifier that runs every network twice. Code of the user is run forward once more.
def test_a_verification_computes_no_more_than_two_training_steps_and_a_forward() -> None:
    net, images = Net(), image()
    point = "stage1"
    spliced = gs.insert_grl(net, after=point)
    with FlopCounterMode(display=False) as step:
        spliced(images).sum().backward()
    with FlopCounterMode(display=False) as verification:
        assert gs.verify_flip(spliced, net, images).ok
    assert 0 < verification.get_total_flops() <= 2.5 * step.get_total_flops()


# --- starting


@functools.cache
def imported_by(code: str) -> frozenset[str]:
    """Modules that a fresh interpreter has after running this."""
    script = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return frozenset(done.stdout.split())


def top_level(modules: frozenset[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} - {"grl_surgery", "__main__"}


# Broken: `import torch` at the top of a command.
def test_the_command_line_imports_no_torch_before_it_is_needed() -> None:
    assert "torch" not in top_level(imported_by("import grl_surgery.cli.main"))


# Broken: `import timm` at the top of a module.
def test_the_main_verbs_import_nothing_that_torch_has_not() -> None:
    torch_alone = top_level(imported_by("import torch"))
    verbs = imported_by(
        "import torch, grl_surgery as gs; gs.insert_grl, gs.verify_flip, gs.attach_domain_head"
    )
    assert top_level(verbs) - torch_alone <= set(sys.stdlib_module_names)
    assert "torch._inductor" not in verbs - imported_by("import torch")
    assert "torch._dynamo" not in verbs - imported_by("import torch")


# --- the page


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report

    yield report
    sys.modules.pop("report")


# Broken: a figure in the page changed by hand.
def test_the_page_holds_the_figures_that_were_measured(report: Any) -> None:
    page = report.PAGE.read_text()
    measured = page.partition(report.BEGIN)[2].partition(report.END)[0].strip()
    assert measured == report.table(report.load())


# Broken: a row taken out of the results.
def test_every_row_was_measured(report: Any) -> None:
    rows = json.loads(report.RESULTS.read_text())["rows"]
    assert list(rows) == list(report.TITLES)
    verdicts = {row["met"] for measured in rows.values() for row in measured}
    assert verdicts <= {"yes", "within the noise", "no", ""}
