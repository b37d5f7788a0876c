"""What a user's first lines do, each in a process that imported nothing else before, and used nothing.

The other tests share a process in which something has always been imported, compiled or registered already.
Each program here prints what it found; what it should find is written beside it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import reversal_contexts
from fresh_processes import Parent
from reversal_contexts import Context, eager, packages_of

After = Callable[[str], Parent]
ROOT = Path(__file__).parents[1]

ORDERS = {
    "torch first": "import torch, grl_surgery as gs",
    "grl_surgery first": "import grl_surgery as gs, torch",
    "timm first": "import timm, torch, grl_surgery as gs",
    "torchvision first": "import torchvision, torch, grl_surgery as gs",
    "transformers first": "import transformers, grl_surgery as gs, torch",
    "lightning first": "import lightning, torch, grl_surgery as gs",
}


def skip_where_absent(order: str) -> None:
    library = order.partition(" ")[0]
    if library not in ("torch", "grl_surgery"):
        pytest.importorskip(library)


@pytest.fixture(scope="module")
def after() -> Iterator[After]:
    """The process that has run some imports; programs of one order share it."""
    parents: dict[str, Parent] = {}

    def parent(imports: str) -> Parent:
        if imports not in parents:
            parents[imports] = Parent(imports)
        return parents[imports]

    yield parent
    for each in parents.values():
        each.close()


# --- Every context

SHARED = [*reversal_contexts.CONTEXTS, *reversal_contexts.CONTEXTS_OF_ONE_SAMPLE]
INDUCTOR = reversal_contexts.INDUCTOR_CONTEXTS
COSTLY = reversal_contexts.COSTLY_CONTEXTS


def programs(order: str) -> list[tuple[Context, ...]]:
    """The contexts that run in each process; over all orders, each is the first of a process once.

    What comes second in a process is a later call. Inductor is in each order.
    """
    place, orders = list(ORDERS).index(order), len(ORDERS)
    of_inductor = [INDUCTOR[number % len(INDUCTOR)] for number in (place, place + 1)]
    pairs = zip(SHARED, [*SHARED[1:], SHARED[0]], strict=True)
    runs = [tuple(of_inductor), *list(pairs)[place::orders]]
    return [*runs, *((context, eager, context) for context in COSTLY[place::orders])]


def test_each_context_is_the_first_call_of_a_process_in_one_order_and_a_later_one_in_another() -> None:
    runs = [run for order in ORDERS for run in programs(order)]
    assert {run[0] for run in runs} == {*SHARED, *INDUCTOR, *COSTLY}
    assert {context for run in runs for context in run[1:]} == {*SHARED, *INDUCTOR, *COSTLY}


EVERYWHERE = """
import reversal_contexts as contexts
if __name__ == "__main__":  # a spawned process imports this file
    for name in {names}:
        print(contexts.outcome(getattr(contexts, name), contexts.layer()))
"""


def is_installed(context: Context) -> bool:
    return all(importlib.util.find_spec(package) for package in packages_of(context))


@pytest.fixture(scope="session")
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cold for the order that comes first, in whichever worker, and warm for the others."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "inductor"


def run_each(parent: Parent, contexts: tuple[Context, ...], folder: Path, cache: Path) -> dict[str, str]:
    names = [context.__name__ for context in contexts if is_installed(context)]
    lines = parent.lines(EVERYWHERE.format(names=names), folder, TORCHINDUCTOR_CACHE_DIR=str(cache))
    assert len(lines) == len(names)
    return {f"{' then '.join(names[: place + 1])}": line for place, line in enumerate(lines)}


@pytest.mark.parametrize("order", ORDERS)
def test_the_gradient_is_reversed_by_the_first_call_of_a_process_and_by_a_later_one(
    order: str, after: After, inductor_cache: Path, tmp_path: Path
) -> None:
    skip_where_absent(order)
    is_registered = "print(hasattr(torch.ops.grl_surgery, 'reverse_gradient'))"
    assert after(ORDERS[order]).lines(is_registered, tmp_path) == ["True"]
    found = {}
    for contexts in programs(order):
        found |= run_each(after(ORDERS[order]), contexts, tmp_path, inductor_cache)
    assert {names: outcome for names, outcome in found.items() if outcome != "reversed"} == {}
    assert len(found) > 2 * len(programs(order)) - 6  # those whose package is absent are left out


def table_of(page: str, first_cell: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, by the names of its columns."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    begin = next(place for place, row in enumerate(rows) if row[0] == first_cell)
    return [
        dict(zip(rows[begin], row, strict=True)) for row in rows[begin + 2 :] if len(row) == len(rows[begin])
    ]


def test_the_page_of_contexts_has_every_context_and_none_where_ours_is_not_reversed() -> None:
    rows = table_of("docs/contexts.md", "context")
    everything = [*SHARED, *INDUCTOR, *COSTLY]
    assert {row["context"] for row in rows} == {each.__name__.replace("_", " ") for each in everything}
    for row in rows:
        assert (row["grl_surgery"], row["grl_surgery, layer"]) == ("reversed", "reversed"), row["context"]


IN_README = {
    "eager": "eager",
    "`torch.fx.symbolic_trace`": "fx symbolic trace",
    "torchvision's `create_feature_extractor`": "torchvision feature extractor",
    "`torch.export`": "export not strict",
    "`torch.export`, saved, loaded": "export saved and loaded",
    "`torch.compile(fullgraph=True)`": "compile inductor",
    "`torch.func.grad`": "func grad",
    "`vmap(grad)`, per-sample gradients": "per sample gradients",
}


def test_the_readme_says_what_the_page_of_contexts_says() -> None:
    measured = {row["context"]: row for row in table_of("docs/contexts.md", "context")}
    shown = table_of("README.md", "where the network runs")
    assert [row["where the network runs"] for row in shown] == list(IN_README)
    for row in shown:
        context = measured[IN_README[row.pop("where the network runs")]]
        for column, cell in row.items():
            of_page = context["pasted Function, number" if column == "pasted Function" else column]
            assert cell.split(" ", 1)[1].split(":")[0] == of_page.split(":")[0], (context["context"], column)


@pytest.mark.parametrize(
    "context",
    [context for context in SHARED + COSTLY if packages_of(context)],
    ids=lambda context: context.__name__,
)
def test_a_context_is_left_out_where_a_package_is_absent(context: Context) -> None:
    """The summary of a run names them."""
    for package in packages_of(context):
        pytest.importorskip(package)
    assert is_installed(context)


NETWORK = """
import warnings; warnings.simplefilter("ignore")
def network(layer):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), layer, torch.nn.Tanh(), torch.nn.Linear(4, 2))
def gradient(model):
    x = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    model(x).sum().backward()
    return x.grad
X = torch.ones(3, 4)
net = network(gs.GradientReversal(0.5))
expected = -0.5 * gradient(network(torch.nn.Identity()))
def verdict(model):
    return "reversed" if torch.allclose(gradient(model), expected) else "LOST"
"""


def test_whoever_only_looks_for_torch_changes_nothing(after: After, tmp_path: Path) -> None:
    code = """
import importlib.util, sys
before = len(sys.meta_path)
importlib.util.find_spec("torch")
print("torch" in sys.modules, len(sys.meta_path) == before)
import torch
print(hasattr(torch.ops.grl_surgery, "reverse_gradient"), len(sys.meta_path) == before - 1)
"""
    assert after("import grl_surgery").lines(code, tmp_path) == ["False True", "True True"]


def test_programs_load_where_nothing_of_the_library_was_used(after: After, tmp_path: Path) -> None:
    make = (
        NETWORK
        + """
torch.export.save(torch.export.export(net, (X,)), "net.pt2")
torch.jit.trace(net, X).save("net.ts")
torch.jit.script(net).save("scripted.ts")
traced = torch.fx.symbolic_trace(net)
torch.save(traced, "net.pt")
"""
    )
    after(ORDERS["torch first"]).lines(make, tmp_path)
    load = (
        NETWORK.partition("net = ")[0]
        + """
expected = -0.5 * gradient(network(torch.nn.Identity()))
def verdict(model):
    return "reversed" if torch.allclose(gradient(model), expected) else "LOST"
print(verdict(torch.export.load("net.pt2").module()))
print(verdict(torch.jit.load("net.ts")), verdict(torch.jit.load("scripted.ts")))
print(verdict(torch.load("net.pt", weights_only=False)))
"""
    )
    for first in ("torch first", "grl_surgery first"):
        assert after(ORDERS[first]).lines(load, tmp_path) == ["reversed", "reversed reversed", "reversed"]


def test_no_decomposition_table_is_written_to(after: After, tmp_path: Path) -> None:
    """What they do to a reversal is among the contexts."""
    code = (
        NETWORK
        + """
torch.compile(net, backend="aot_eager")(X)
torch.export.export(net, (X,)).run_decompositions()
tables = {
    "default": torch.export.default_decompositions(),
    "core": torch._decomp.core_aten_decompositions(),
    "all": torch._decomp.decomposition_table,
}
ours = torch.ops.grl_surgery.reverse_gradient.default
print([name for name, table in tables.items() if ours in table])
"""
    )
    assert after(ORDERS["torch first"]).lines(code, tmp_path) == ["[]"]


def test_a_package_of_aot_inductor_runs_without_this_library(
    after: After, inductor_cache: Path, tmp_path: Path
) -> None:
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(inductor_cache)}
    make = (
        NETWORK
        + """
with torch.no_grad():
    program = torch.export.export(net, (X,))
torch._inductor.aoti_compile_and_package(program, package_path="net.pt2")
torch.save(net(X).detach(), "expected.pt")
"""
    )
    after(ORDERS["torch first"]).lines(make, tmp_path, **cache)
    load = """
import sys
package = torch._inductor.aoti_load_package("net.pt2")
print(torch.allclose(package(torch.ones(3, 4)), torch.load("expected.pt")))
print("grl_surgery" in sys.modules, hasattr(torch.ops.grl_surgery, "reverse_gradient"))
"""
    assert after("import torch").lines(load, tmp_path, **cache) == ["True", "False False"]


def test_numbers_set_inside_a_compiled_step_compile_two_graphs_at_most(after: After, tmp_path: Path) -> None:
    code = """
layer, graphs = gs.GradientReversal(), []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
def step(x, k):
    layer.set_coeff(k)
    return layer(x * x).sum()
compiled = torch.compile(step, backend=backend, fullgraph=True)
for k in range(1, 9):
    x = torch.ones(3, requires_grad=True)
    compiled(x, k / 16).backward()
    assert torch.equal(x.grad, torch.full((3,), -k / 8))
print(len(graphs) <= 2)
"""
    assert after(ORDERS["torch first"]).lines(code, tmp_path) == ["True"]


def test_onnx_sees_an_identity_in_its_older_exporter(after: After, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    code = (
        NETWORK
        + """
torch.onnx.export(net.eval(), (X,), "net.onnx", dynamo=False)
import onnx
print([node.op_type for node in onnx.load("net.onnx").graph.node])
"""
    )
    assert after(ORDERS["grl_surgery first"]).lines(code, tmp_path) == [
        "['Gemm', 'Identity', 'Tanh', 'Gemm']"
    ]


LOADERS = """
import copy
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with torch.device("meta"):
    deferred = fully_shard(network(gs.GradientReversal(0.5)))
deferred.to_empty(device="cpu")
set_model_state_dict(deferred, net.state_dict(), options=StateDictOptions(full_state_dict=True))
print(verdict(deferred))
wrapped = torch.nn.parallel.DistributedDataParallel(network(gs.GradientReversal(0.5)))
set_model_state_dict(wrapped, get_model_state_dict(wrapped), options=StateDictOptions(strict=True))
print(verdict(wrapped))
net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
print(verdict(net), [key for key in net.state_dict() if "coeff" in key])
"""


def test_the_coefficient_survives_sharding_and_distributed_checkpoints(after: After, tmp_path: Path) -> None:
    assert after(ORDERS["torch first"]).lines(NETWORK + LOADERS, tmp_path) == [
        "reversed",
        "reversed",
        "reversed []",
    ]


def test_the_coefficient_survives_transformers_and_accelerate(after: After, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    code = """
import accelerate
from transformers import PretrainedConfig, PreTrainedModel
class Model(PreTrainedModel):
    config_class = PretrainedConfig
    def __init__(self, config):
        super().__init__(config)
        self.a, self.grl = torch.nn.Linear(2, 2), gs.GradientReversal(0.5)
        self.post_init()
    def forward(self, x):
        return self.grl(self.a(x))
Model(PretrainedConfig()).save_pretrained("saved")
for options in ({}, {"device_map": "cpu"}):
    junk = [torch.full((), 7e8) for _ in range(64)]; del junk
    print(Model.from_pretrained("saved", **options).grl)
with accelerate.init_empty_weights(include_buffers=True):
    model = Model(PretrainedConfig())
print(model.grl)
model = accelerate.cpu_offload(Model(PretrainedConfig()), offload_buffers=True)
model(torch.ones(1, 2))
print(model.grl)
"""
    assert after(ORDERS["torch first"]).lines(code, tmp_path) == ["GradientReversal(coeff=0.5)"] * 4


def test_each_network_of_an_ensemble_has_its_own_coefficient(after: After, tmp_path: Path) -> None:
    code = (
        NETWORK
        + """
import copy
from torch.func import functional_call, grad, stack_module_state, vmap
networks = [network(gs.GradientReversal(coeff)) for coeff in (0.5, 0.25)]
parameters, buffers = stack_module_state(networks)
base = copy.deepcopy(networks[0]).to("meta")
one = grad(lambda x, p, b: functional_call(base, (p, b), (x,)).sum())
found = vmap(one, in_dims=(None, 0, 0))(torch.linspace(-1, 1, 12).reshape(3, 4), parameters, buffers)
print(torch.allclose(found[0], expected), torch.allclose(found[1], expected / 2))
"""
    )
    assert after(ORDERS["torch first"]).lines(code, tmp_path) == ["True True"]


def test_surgery_and_sharding_in_the_wrong_order_are_refused(after: After, tmp_path: Path) -> None:
    code = """
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
fully_shard(net)
for surgery in (gs.insert_grl, gs.attach_domain_head):
    try:
        surgery(net, after="0")
    except gs.SurgeryError as error:
        print("splice, then shard" in str(error))
spliced = gs.insert_grl(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)), after="0")
try:
    gs.export(fully_shard(spliced), "sharded.safetensors")
except gs.ExportError as error:
    print("gather the weights" in str(error))
"""
    assert after(ORDERS["torch first"]).lines(code, tmp_path) == ["True", "True", "True"]


def test_what_is_spliced_inside_inference_mode_trains_afterwards(after: After, tmp_path: Path) -> None:
    code = """
net, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)), torch.randn(4, 4)
with torch.inference_mode():
    head = gs.attach_domain_head(net, "1", hidden=8, example_inputs=x)
    spliced = gs.insert_grl(net, after="0")
    layer = gs.GradientReversal()
made = [*head.parameters(), *head.buffers(), *spliced.buffers(), *layer.buffers()]
print(any(tensor.is_inference() for tensor in made))
gs.domain_loss(head(x)[1], torch.tensor([0, 1, 0, 1])).backward()
spliced(x).sum().backward()
print(all(parameter.grad is not None for parameter in head.parameters()))
"""
    assert after(ORDERS["grl_surgery first"]).lines(code, tmp_path) == ["False", "True"]


def test_scripting_a_spliced_network_says_to_trace_it(after: After, tmp_path: Path) -> None:
    code = (
        NETWORK
        + """
print(verdict(torch.jit.script(net)))
for model in (
    gs.insert_grl(network(torch.nn.Identity()), after="0"),
    gs.attach_domain_head(network(torch.nn.Identity()), after="0", example_inputs=X),
):
    try:
        torch.jit.script(model)
    except gs.SurgeryError as error:
        print("torch.jit.trace(m, example_inputs)" in str(error))
"""
    )
    assert after(ORDERS["torch first"]).lines(code, tmp_path) == ["reversed", "True", "True"]


def test_the_version_is_known(after: After, tmp_path: Path) -> None:
    assert after("import grl_surgery").lines(
        "print(grl_surgery.__version__.split('.')[0].isdigit())", tmp_path
    ) == ["True"]
