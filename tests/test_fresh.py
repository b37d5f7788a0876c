"""What a user's first lines do, each in a process that imported nothing else before.

The other tests share a process in which something has always been imported, compiled or registered already.
Each program here prints what it found; what it should find is written beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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

FIRST = {
    "torch first": "import torch, grl_surgery as gs",
    "grl_surgery first": "import grl_surgery as gs, torch",
    "timm first": "import timm, torch, grl_surgery as gs",
    "torchvision first": "import torchvision, torch, grl_surgery as gs",
    "transformers first": "import transformers, grl_surgery as gs, torch",
}


def run(first: str, code: str, folder: Path, **environment: str) -> list[str]:
    """The lines that a program prints in a process with caches of its own."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", f"{first}\n{code}"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **settings, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


COMPILE = NETWORK + "print(verdict(torch.compile(net, fullgraph=True)))"


@pytest.mark.parametrize("first", ["torch first", "grl_surgery first"])
def test_the_first_compilation_of_a_process_reverses_with_a_cold_and_a_warm_cache(
    first: str, tmp_path: Path
) -> None:
    assert run(FIRST[first], COMPILE, tmp_path) == ["reversed"]
    if first == "torch first":
        assert run(FIRST[first], COMPILE, tmp_path) == ["reversed"]


@pytest.mark.parametrize("first", FIRST)
def test_the_operator_is_registered_whatever_is_imported_first(first: str, tmp_path: Path) -> None:
    for name in {"timm", "torchvision", "transformers"} & set(first.split()):
        pytest.importorskip(name)
    assert run(FIRST[first], "print(hasattr(torch.ops.grl_surgery, 'reverse_gradient'))", tmp_path) == [
        "True"
    ]


def test_whoever_only_looks_for_torch_changes_nothing(tmp_path: Path) -> None:
    code = """
import importlib.util, sys
before = len(sys.meta_path)
importlib.util.find_spec("torch")
print("torch" in sys.modules, len(sys.meta_path) == before)
import torch
print(hasattr(torch.ops.grl_surgery, "reverse_gradient"), len(sys.meta_path) == before - 1)
"""
    assert run("import grl_surgery", code, tmp_path) == ["False True", "True True"]


def test_programs_load_where_nothing_of_the_library_was_used(tmp_path: Path) -> None:
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
    run(FIRST["torch first"], make, tmp_path)
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
    for first in ("import torch, grl_surgery", "import grl_surgery, torch"):
        assert run(first, load, tmp_path) == ["reversed", "reversed reversed", "reversed"]


def test_no_decomposition_table_loses_the_reversal_and_none_is_written_to(tmp_path: Path) -> None:
    code = (
        NETWORK
        + """
net[2] = torch.nn.Identity()  # torch's own table turns tanh into a primitive that has no gradient
plain = network(torch.nn.Identity())
plain[2] = torch.nn.Identity()
expected = -0.5 * gradient(plain)
program = torch.export.export(net, (X,))
tables = {
    "none": None,
    "empty": {},
    "default": torch.export.default_decompositions(),
    "core": torch._decomp.core_aten_decompositions(),
    "all": torch._decomp.decomposition_table,
}
print({verdict(program.run_decompositions(table).module()) for table in tables.values()})
torch.compile(net, backend="aot_eager")(X)
ours = torch.ops.grl_surgery.reverse_gradient.default
print([name for name, table in tables.items() if table and ours in table])
"""
    )
    assert run(FIRST["torch first"], code, tmp_path) == ["{'reversed'}", "[]"]


def test_a_backend_that_records_the_forward_alone_keeps_the_reversal(tmp_path: Path) -> None:
    code = (
        NETWORK
        + """
from torch.fx.experimental.proxy_tensor import make_fx
print(verdict(torch.compile(net, backend=lambda graph, inputs: make_fx(graph)(*inputs))))
"""
    )
    assert run(FIRST["torch first"], code, tmp_path) == ["reversed"]


def test_numbers_set_inside_a_compiled_step_compile_two_graphs_at_most(tmp_path: Path) -> None:
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
    assert run(FIRST["torch first"], code, tmp_path) == ["True"]


def test_onnx_sees_an_identity_in_its_older_exporter(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    code = (
        NETWORK
        + """
torch.onnx.export(net.eval(), (X,), "net.onnx", dynamo=False)
import onnx
print([node.op_type for node in onnx.load("net.onnx").graph.node])
"""
    )
    assert run(FIRST["grl_surgery first"], code, tmp_path) == ["['Gemm', 'Identity', 'Tanh', 'Gemm']"]


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


def test_the_coefficient_survives_sharding_and_distributed_checkpoints(tmp_path: Path) -> None:
    assert run(FIRST["torch first"], NETWORK + LOADERS, tmp_path) == ["reversed", "reversed", "reversed []"]


def test_the_coefficient_survives_transformers_and_accelerate(tmp_path: Path) -> None:
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
    assert run(FIRST["torch first"], code, tmp_path) == ["GradientReversal(coeff=0.5)"] * 4


def test_each_network_of_an_ensemble_has_its_own_coefficient(tmp_path: Path) -> None:
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
    assert run(FIRST["torch first"], code, tmp_path) == ["True True"]


def test_surgery_and_sharding_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
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
    assert run(FIRST["torch first"], code, tmp_path) == ["True", "True", "True"]


def test_what_is_spliced_inside_inference_mode_trains_afterwards(tmp_path: Path) -> None:
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
    assert run(FIRST["grl_surgery first"], code, tmp_path) == ["False", "True"]


def test_scripting_a_spliced_network_says_to_trace_it(tmp_path: Path) -> None:
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
    assert run(FIRST["torch first"], code, tmp_path) == ["reversed", "True", "True"]


def test_the_version_is_known(tmp_path: Path) -> None:
    assert run("import grl_surgery", "print(grl_surgery.__version__.split('.')[0].isdigit())", tmp_path) == [
        "True"
    ]
