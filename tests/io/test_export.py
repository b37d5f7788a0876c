from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import small_networks
import timm
import torch
import torchvision
from timm.utils import ModelEmaV3
from torch import nn

import grl_surgery as gs
from grl_surgery.io.programs import for_inference, inputs_for, record
from grl_surgery.surgery.exported_program import check_no_program, is_program


@dataclass
class Case:
    """A network, where a reversal and a head go, and what it takes."""

    make: Callable[[], nn.Module]
    after: str
    head: str
    inputs: torch.Tensor
    sourced: bool = True

    def spliced(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        model = self.make()
        m = gs.insert_grl(model, after=self.after, coeff=0.3)
        return model, gs.attach_domain_head(
            m, after=self.head, hidden=16, dropout=0.1, example_inputs=self.inputs
        )


def images(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


def tiny_swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        depths=(1, 1, 2, 1),
        embed_dim=24,
        num_heads=(1, 2, 2, 4),
    )


CASES = {
    "cnn": Case(lambda: timm.create_model("test_resnet", num_classes=7), "layer2", "global_pool", images(32)),
    "vit": Case(lambda: timm.create_model("test_vit"), "blocks.1", "norm", images(160)),
    "swin": Case(tiny_swin, "layers.1", "norm", images(56), sourced=False),
    "torchvision": Case(
        lambda: torchvision.models.resnet18(num_classes=5), "layer3.0.conv2", "avgpool", images(32)
    ),
}


LONG = {"swin", "torchvision"}


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in CASES], scope="module"
)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def outputs_and_gradients(m: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    m = copy.deepcopy(m)
    torch.manual_seed(1)
    outputs = m(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(y.square().sum() for y in outputs).backward()
    return [*outputs, *(p.grad for _, p in sorted(m.named_parameters()) if p.grad is not None)]


def assert_same_bits(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def in_a_fresh_process(code: str, *arguments: Any, isolated: bool = False) -> str:
    """What a Python prints that knows nothing of this one; ``isolated`` also hides the package from it."""
    hidden = "import sys\nsys.modules['grl_surgery'] = None\n" if isolated else "import sys\n"
    old_timm = "ignore:`torch.jit.interface` is deprecated:FutureWarning"
    command = [sys.executable, "-W", "error", "-W", old_timm, *(["-I"] if isolated else [])]
    done = subprocess.run(
        [*command, "-c", hidden + code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------ what networks hold


class Holds(nn.Module):
    """A network with something in it, made by ``init`` and used by ``middle``."""

    def __init__(
        self, init: Callable[[Any], Any], middle: Callable[[Any, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(6, 6), nn.Linear(6, 6)
        init(self)
        self.__dict__["middle"] = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.middle(self, self.a(x)))


def with_layer(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Holds(lambda net: net.add_module("b", layer()), lambda net, x: net.b(x))


def with_buffer(tensor: Callable[[], Any], persistent: bool = True) -> Callable[[], nn.Module]:
    return lambda: Holds(
        lambda net: net.register_buffer("t", tensor(), persistent), lambda net, x: (x * net.t).real
    )


def with_attribute(value: Callable[[], Any], read: Callable[[Any], Any] = lambda net: net.t) -> Any:
    return lambda: Holds(lambda net: net.__dict__.update(t=value()), lambda net, x: x * read(net))


def cached_result() -> nn.Module:
    """As a forward leaves one behind; it is not read."""
    return Holds(lambda net: setattr(net, "last", net.a.weight * 2), lambda net, x: x.relu())


def infinite_tensor() -> nn.Module:
    return Holds(
        lambda net: setattr(net, "t", torch.tensor([0.1, float("inf")] * 3)),
        lambda net, x: torch.minimum(x, net.t),
    )


def tied_by_a_view() -> nn.Module:
    return Holds(lambda net: setattr(net.c, "weight", nn.Parameter(net.a.weight.data.t())), lambda net, x: x)


HELD = {
    "old weight_norm": with_layer(lambda: nn.utils.weight_norm(nn.Linear(6, 6))),
    "old spectral_norm": with_layer(lambda: nn.utils.spectral_norm(nn.Linear(6, 6))),
    "weight_norm": with_layer(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))),
    "spectral_norm": with_layer(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))),
    "cached result": cached_result,
    "plain tensor": with_attribute(lambda: torch.randn(6)),
    "infinite tensor": infinite_tensor,
    "list of tensors": with_attribute(lambda: [torch.randn(6)], lambda net: net.t[0]),
    "tied by a view": tied_by_a_view,
    "complex": with_buffer(lambda: torch.randn(6, dtype=torch.complex64)),
    "complex, not saved": with_buffer(lambda: torch.randn(6, dtype=torch.complex64), persistent=False),
    "bfloat16": with_buffer(lambda: torch.randn(6).bfloat16()),
    "number": with_buffer(lambda: torch.tensor(3.5)),
}


def bits(m: nn.Module) -> list[torch.Tensor]:
    """Output and gradients in eval mode; a network that keeps results cannot be copied for it."""
    y = m.eval()(small_networks.vector())
    parameters = [p for _, p in sorted(m.named_parameters())]
    return [y, *torch.autograd.grad(y.square().sum(), parameters)]


def made_by_its_code(folder: Path, network: nn.Module) -> nn.Module:
    spec = importlib.util.spec_from_file_location("written", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(network)


def read_again(path: Path, network: Callable[[], nn.Module]) -> nn.Module:
    if path.is_dir():
        return made_by_its_code(path, network())
    return gs.load(path, model=None if path.suffix == ".pt2" else network)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", ["m.safetensors", "m.pt2", "folder"])
@pytest.mark.parametrize("held", HELD)
def test_what_a_network_holds_comes_back_with_the_same_bits(held: str, name: str, tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return HELD[held]()

    m = gs.insert_grl(network(), after="a", coeff=0.3)
    with torch.no_grad():
        m.a.bias.add_(1)
    path = gs.export(m.eval(), tmp_path / name, small_networks.vector())
    assert_same_bits(bits(m), bits(read_again(path, network)))


def test_a_network_that_keeps_results_is_written_as_onnx(tmp_path: Path) -> None:
    assert gs.export(cached_result(), tmp_path / "m.onnx", small_networks.vector()).is_file()


def test_conjugated_tensors_are_written_as_their_values(tmp_path: Path) -> None:
    values = torch.randn(6, dtype=torch.complex64)
    make = with_buffer(lambda: values.clone().conj())
    again = gs.load(gs.export(gs.insert_grl(make(), after="a"), tmp_path / "m.safetensors"), model=make)
    assert torch.equal(again.t, values.conj())


NOT_WRITTEN: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "sparse": (with_buffer(lambda: torch.eye(6).to_sparse()), "m.safetensors", "'t' is a .*sparse_coo"),
    "meta": (with_buffer(lambda: torch.ones(6, device="meta")), "m.safetensors", "'t' is a .* device meta"),
    "expanded": (
        with_buffer(lambda: torch.ones(1).expand(6)),
        "m.safetensors",
        r"into 't'.*single memory location(.|\n)*register_buffer\('t'",
    ),
    "lock": (with_attribute(threading.Lock, lambda net: 2), "m.safetensors", "cannot be copied: .*lock"),
    "gradient": (
        with_attribute(lambda: torch.ones(6, requires_grad=True)),
        "m.pt2",
        r"reads 't', which requires a gradient and is no parameter(.|\n)*self.t = nn.Parameter",
    ),
    "result": (
        with_attribute(lambda: torch.ones(6, requires_grad=True) * 2),
        "m.safetensors",
        "reads 't', which was computed once",
    ),
    "large": (
        with_attribute(lambda: torch.randn(12, 1, 6)),
        "folder",
        r"reads 't', a tensor of shape \(12, 1, 6\)(.|\n)*self.register_buffer\('t'",
    ),
}


@pytest.mark.parametrize("held", NOT_WRITTEN)
def test_what_a_format_cannot_hold_is_refused_with_its_name(held: str, tmp_path: Path) -> None:
    make, name, message = NOT_WRITTEN[held]
    with pytest.raises(gs.ExportError, match=message):
        gs.export(gs.insert_grl(make(), after="a"), tmp_path / name, small_networks.vector())
    assert not list(tmp_path.iterdir())


def test_a_network_with_other_values_outside_of_its_state_is_refused(tmp_path: Path) -> None:
    make = with_attribute(lambda: torch.randn(6))
    path = gs.export(gs.insert_grl(make(), after="a"), tmp_path / "m.safetensors")
    with pytest.raises(gs.ExportError, match=r"reads 't', which is not in the state_dict.*other values"):
        gs.load(path, model=make)


def test_inputs_on_which_a_network_does_not_run_are_refused_with_its_error(tmp_path: Path) -> None:
    m = gs.insert_grl(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), after="0")
    with pytest.raises(gs.ExportError, match=r"does not run on the example inputs: RuntimeError: .*shapes"):
        gs.export(m, tmp_path / "folder", torch.randn(4, 99))


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt2", "folder"])
def test_a_disabled_reversal_is_written_with_the_coefficient_to_come_back(name: str, tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    m = gs.insert_grl(network(), after="0", coeff=0.3).eval()
    with gs.reversal_disabled(m):
        path = gs.export(m, tmp_path / name, small_networks.vector())
        assert m.grl_0.coeff == -1
    assert_same_bits(bits(m), bits(read_again(path, network)))


class Scales(nn.Module):
    """Holds a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.t, self.inner = torch.randn(6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.t


@pytest.mark.parametrize(("make", "after"), [(Scales, "inner"), (lambda: nn.Sequential(Scales()), "0.inner")])
def test_the_code_of_a_folder_keeps_the_values_of_a_tensor_that_is_no_buffer(
    make: Callable[[], nn.Module], after: str, tmp_path: Path
) -> None:
    m = gs.insert_grl(make(), after=after).eval()
    folder = gs.export(m, tmp_path / "folder", small_networks.vector())
    assert_same_bits(bits(m), bits(made_by_its_code(folder, make())))


def test_the_code_of_a_folder_freezes_what_was_frozen(tmp_path: Path) -> None:
    m = gs.insert_grl(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), after="0")
    m.get_parameter("0.bias").requires_grad_(False)
    folder = gs.export(m, tmp_path / "folder", small_networks.vector())
    again = made_by_its_code(folder, nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    assert [p.requires_grad for p in again.parameters()] == [True, False]


# ------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back_with_the_same_bits_in_outputs_and_gradients(
    case: Case, tmp_path: Path
) -> None:
    model, m = case.spliced()
    gs.reversals(m)["domain.reversal"].set_coeff(1 / 3)
    path = gs.export(m, tmp_path / "m.safetensors")
    again = gs.load(path, model=None if case.sourced else model)
    assert again.state_dict().keys() == m.state_dict().keys()
    assert again.training == m.training
    assert_same_bits(outputs_and_gradients(m, case.inputs), outputs_and_gradients(again, case.inputs))
    assert gs.verify_flip(again, model, case.inputs).ok
    assert str(gs.strip(again)) == str(model)


def test_a_checkpoint_is_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    _, m = CASES["cnn"].spliced()
    path = gs.export(m.eval(), tmp_path / "m.safetensors")
    torch.save({"x": CASES["cnn"].inputs, "y": m(CASES["cnn"].inputs)[0]}, tmp_path / "io.pt")
    printed = in_a_fresh_process(
        "import torch, grl_surgery as gs\n"
        "io = torch.load(sys.argv[2])\n"
        "m = gs.load(sys.argv[1])\n"
        "print(torch.equal(m(io['x'])[0], io['y']), gs.verify_flip(m, example_inputs=io['x']).ok)",
        path,
        tmp_path / "io.pt",
    )
    assert printed == "True True\n"


def test_a_checkpoint_loads_strictly_into_a_stock_network(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    path = gs.export(gs.insert_grl(model, after="layer2"), tmp_path / "m.safetensors")
    from grl_surgery.loading.checkpoints import load_checkpoint

    stock = timm.create_model("test_resnet")
    load_checkpoint(stock, path)
    assert torch.equal(stock.fc.weight, model.fc.weight)


def test_modes_frozen_parameters_and_dtypes_come_back(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet").bfloat16().eval()
    model.layer1.train()
    model.conv1.requires_grad_(False)
    m = gs.insert_grl(model, after="layer2", coeff=0.1)
    again = gs.load(gs.export(m, tmp_path / "m.safetensors"))
    assert [x.training for x in again.modules()] == [x.training for x in m.modules()]
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in m.parameters()]
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(gs.reversals(again)["grl_layer2"].coeff, gs.reversals(m)["grl_layer2"].coeff)


def test_surgery_inside_a_network_that_does_not_trace_comes_back(tmp_path: Path) -> None:
    net = small_networks.Untraceable()
    m = gs.insert_grl(net, after="body.stage1")
    again = gs.load(gs.export(m, tmp_path / "m.safetensors"), model=small_networks.Untraceable)
    assert type(again) is small_networks.Untraceable
    assert gs.verify_flip(again, net, small_networks.image()).ok


@pytest.mark.parametrize(
    ("network", "points"),
    [
        (small_networks.Modes, {"after": "body"}),
        (small_networks.Shared, {"after": "a#1"}),
        (small_networks.Colliding, {"edge": ("block", "add#1")}),
        (small_networks.Containers, {"before": "layers.2"}),
        (small_networks.Tuples, {"after": "encoder[0]"}),
    ],
)
def test_every_kind_of_cut_is_replayed(
    network: type[nn.Module], points: dict[str, Any], tmp_path: Path
) -> None:
    net = network()
    try:
        m = gs.insert_grl(net, **points)
    except gs.PointNotFoundError:
        m = gs.insert_grl(net, edge=gs.graph(net).edges[-2])
    path = gs.export(m, tmp_path / "m.safetensors")
    again = gs.load(path, model=net)
    assert again.grl_surgery.cuts == m.grl_surgery.cuts
    assert again.code == m.code
    assert gs.verify_flip(again, net, small_networks.vector()).ok


def test_the_network_given_for_a_checkpoint_is_not_changed(tmp_path: Path) -> None:
    net = small_networks.Net()
    path = gs.export(gs.insert_grl(net, after="stage1"), tmp_path / "m.safetensors")
    other = small_networks.Net().eval()
    before = copy.deepcopy(other.state_dict())
    again = gs.load(path, model=other)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    assert not other.training
    assert torch.equal(again.fc.weight, net.fc.weight)


def test_a_network_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    path = gs.export(gs.insert_grl(small_networks.Net(), after="stage1"), tmp_path / "m.safetensors")
    with pytest.raises(
        gs.ExportError, match=r"does not say how to make the small_networks.Net(.|\n)*model=Net"
    ):
        gs.load(path)


def test_a_head_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    net = small_networks.Net()
    m = gs.attach_domain_head(
        net, "fc", classifier=nn.Sequential(nn.Linear(3, 2)), example_inputs=small_networks.image()
    )
    path = gs.export(m, tmp_path / "m.safetensors")
    with pytest.raises(gs.ExportError, match=r"the head 'domain' .* has parts of your own"):
        gs.load(path, model=net)
    again = gs.load(path, model=net, heads={"domain": m.domain})
    assert torch.equal(again.domain.classifier[0].weight, m.domain.classifier[0].weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"classifier": "patch", "norm": "layer", "depth": 1},
        {"num_domains": 3, "norm": "batch", "dropout": 0.0},
        {"binary": True, "depth": 0},
    ],
)
def test_every_setting_of_a_head_comes_back(settings: dict[str, Any], tmp_path: Path) -> None:
    net = small_networks.Net()
    point = "stage1" if settings.get("classifier") else "fc"
    m = gs.attach_domain_head(net, point, hidden=8, example_inputs=small_networks.image(), **settings)
    again = gs.load(gs.export(m, tmp_path / "m.safetensors"), model=net)
    assert str(again.domain) == str(m.domain)
    x = small_networks.image()
    assert_same_bits(outputs_and_gradients(m, x), outputs_and_gradients(again, x))


@pytest.mark.parametrize("condition", ["multilinear", "randomized"])
def test_conditional_heads_come_back(condition: Any, tmp_path: Path) -> None:
    net = small_networks.Net()
    m = gs.attach_domain_head(
        net, "stage2", condition_on="fc", condition=condition, hidden=8, example_inputs=small_networks.image()
    )
    again = gs.load(gs.export(m, tmp_path / "m.safetensors"), model=net)
    x = small_networks.image()
    assert_same_bits(outputs_and_gradients(m, x), outputs_and_gradients(again, x))


def test_another_model_is_refused_with_the_difference_named(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    path = gs.export(gs.insert_grl(model, after="layer2"), tmp_path / "m.safetensors")
    changed = timm.create_model("test_resnet", act_layer=nn.SiLU)
    with pytest.raises(gs.ExportError, match=r"ReLU(.|\n)*here: .*SiLU"):
        gs.load(path, model=changed)


def test_another_graph_is_refused_with_the_difference_named(tmp_path: Path) -> None:
    class Changed(small_networks.Net):
        def forward(self, x):
            return self.fc(self.stage2(self.stage1(torch.tanh(self.stem(x)))).mean((2, 3)))

    Changed.__module__, Changed.__qualname__ = small_networks.Net.__module__, small_networks.Net.__qualname__
    path = gs.export(gs.insert_grl(small_networks.Net(), after="stage1"), tmp_path / "m.safetensors")
    with pytest.raises(gs.ExportError, match=r"in the file: .*relu(.|\n)*here: .*tanh"):
        gs.load(path, model=Changed())


def test_another_version_with_the_same_graph_is_a_warning_and_else_named_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model("test_resnet")
    path = gs.export(gs.insert_grl(model, after="layer2"), tmp_path / "m.safetensors")
    from grl_surgery.io import recipe

    versions = {**recipe._versions(), "timm": "9.9"}
    monkeypatch.setattr(recipe, "_versions", lambda: versions)
    with pytest.warns(UserWarning, match=r"timm .* in the file, 9.9 here.*a last bit may differ"):
        gs.load(path)
    with pytest.raises(gs.ExportError, match=r"differently here .*timm .* in the file, 9.9 here"):
        gs.load(path, model=timm.create_model("test_resnet", act_layer=nn.SiLU))


def test_what_would_not_come_back_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    m = gs.insert_grl(model, after="layer2")
    with pytest.raises(gs.ExportError, match="what was written does not load again"):
        gs.export(m, tmp_path / "m.safetensors", source="timm/test_vit")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------- programs for training


def test_a_training_program_keeps_a_reversal_that_verifies(case: Case, tmp_path: Path) -> None:
    _, m = case.spliced()
    path = gs.export(m, tmp_path / "m.pt2", case.inputs)
    again = gs.load(path)
    assert set(gs.reversals(again)) == set(gs.reversals(m))
    coefficients = {name: float(layer.coeff) for name, layer in gs.reversals(again).items()}
    assert coefficients == {name: float(layer.coeff) for name, layer in gs.reversals(m).items()}
    report = gs.verify_flip(again)
    assert report.ok, report.failures
    assert all(row.ok for row in report.reversals)
    assert again(torch.cat([case.inputs] * 3))[1].shape[0] == 6


def test_the_gradients_of_a_training_program_are_those_of_the_network(tmp_path: Path) -> None:
    _, m = CASES["cnn"].spliced()
    m.domain.eval()  # without dropout
    again = gs.load(gs.export(m, tmp_path / "m.pt2", CASES["cnn"].inputs))
    expected, found = (outputs_and_gradients(x, CASES["cnn"].inputs) for x in (m, again))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gs.reversals(again)["grl_layer2"].set_coeff(0.0)
    gs.reversals(m)["grl_layer2"].set_coeff(0.0)
    expected, found = (outputs_and_gradients(x, CASES["cnn"].inputs) for x in (m, again))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_training_program_verifies_in_a_fresh_process(tmp_path: Path) -> None:
    _, m = CASES["cnn"].spliced()
    path = gs.export(m, tmp_path / "m.pt2", CASES["cnn"].inputs)
    code = "import grl_surgery as gs\nprint(gs.verify_flip(gs.load(sys.argv[1])).ok)"
    assert in_a_fresh_process(code, path) == "True\n"


def test_a_program_that_is_decomposed_still_reverses() -> None:
    model, m = CASES["cnn"].spliced()
    m.eval()  # torch decomposes a batch norm in train mode into one without a gradient
    program = record(m, inputs_for(m, CASES["cnn"].inputs)).run_decompositions()
    with_reversal = program.module()
    x = CASES["cnn"].inputs
    gradient = torch.autograd.grad(with_reversal(x)[0].sum(), with_reversal.get_parameter("conv1.0.weight"))[
        0
    ]
    reference = copy.deepcopy(model).eval()
    reference(x).sum().backward()
    torch.testing.assert_close(gradient, reference.conv1[0].weight.grad * -0.3, rtol=1e-3, atol=1e-6)


def test_tied_parameters_stay_tied_in_a_program(tmp_path: Path) -> None:
    m = gs.insert_grl(small_networks.Shared(), after="a#1")
    again = gs.load(gs.export(m, tmp_path / "m.pt2", small_networks.vector()))
    assert again.a.weight is again.b.weight
    assert gs.verify_flip(again).ok


def test_a_program_of_the_present_mode_is_recorded(tmp_path: Path) -> None:
    m = gs.insert_grl(small_networks.Modes(), after="body").eval()
    again = gs.load(gs.export(m, tmp_path / "m.pt2", small_networks.vector()))
    assert torch.equal(again(small_networks.vector()), m(small_networks.vector()))
    assert gs.verify_flip(again.eval(), mode="eval").mode == "eval"
    with pytest.raises(gs.SurgeryError, match="was recorded in eval mode and has no other"):
        again.train()


def test_a_pasted_reversal_that_export_would_lose_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grl_surgery.io import programs

    m = gs.insert_grl(small_networks.Net(), after="stage1")
    x = small_networks.image()
    lossy = lambda model, *rest: record(programs.for_inference(model), *rest)  # noqa: E731
    monkeypatch.setattr(programs, "record", lossy)
    with pytest.raises(gs.ExportError, match="the reversal 'grl_stage1' is not in the program"):
        gs.export(m, tmp_path / "m.pt2", x)
    assert not list(tmp_path.iterdir())


def test_one_batch_size_can_be_asked_for(tmp_path: Path) -> None:
    m = gs.insert_grl(small_networks.Net(), after="stage1")
    again = gs.load(gs.export(m, tmp_path / "m.pt2", small_networks.image(), dynamic=False))
    with pytest.raises(Exception, match=r"(?i)expected|guard"):
        again(small_networks.image(5))


# ---------------------------------------------------------------------------------- programs for inference


def test_an_inference_program_is_the_original_network(case: Case, tmp_path: Path) -> None:
    model, m = case.spliced()
    path = gs.export(m, tmp_path / "m.pt2", case.inputs, purpose="inference")
    again = gs.load(path)
    assert not gs.reversals(again)
    assert m.training
    with torch.no_grad():
        assert torch.equal(again(case.inputs), model.eval()(case.inputs))
        assert again(torch.cat([case.inputs] * 2)[:3]).shape[0] == 3


def test_an_inference_program_loads_where_this_package_is_not_installed(tmp_path: Path) -> None:
    model, m = CASES["cnn"].spliced()
    x = CASES["cnn"].inputs
    path = gs.export(m, tmp_path / "m.pt2", x, purpose="inference", heads=["domain"])
    torch.save({"x": x, "y": model.eval()(x), "d": m.eval()(x)[1]}, tmp_path / "io.pt")
    printed = in_a_fresh_process(
        "import torch\nio = torch.load(sys.argv[2])\n"
        "y, d = torch.export.load(sys.argv[1]).module()(io['x'])\n"
        "print(torch.equal(y, io['y']), torch.equal(d, io['d']))",
        path,
        tmp_path / "io.pt",
        isolated=True,
    )
    assert printed == "True True\n"


def test_onnx_has_no_node_more_than_the_original_networks_own_export(case: Case, tmp_path: Path) -> None:
    model, m = case.spliced()
    path = gs.export(m, tmp_path / "m.onnx", case.inputs)
    model.eval()
    own = torch.onnx.export(record(model, ((case.inputs,), {}), "inference"), dynamo=True, verbose=False)
    assert len(onnx.load(str(path)).graph.node) <= len(own.model_proto.graph.node)
    session = onnxruntime.InferenceSession(str(path))
    assert [row.name for row in session.get_outputs()] == ["output"]
    for batch in (1, 5):
        x = torch.cat([case.inputs] * 3)[:batch]
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-4)


def test_onnx_renames_a_head_that_is_called_as_an_input_or_the_output(tmp_path: Path) -> None:
    m, x = small_networks.Net(), small_networks.image()
    for name in ("x", "output"):
        m = gs.attach_domain_head(m, "stage1", name=name, hidden=8, example_inputs=x)
    path = gs.export(m, tmp_path / "m.onnx", x, heads=["x", "output"])
    session = onnxruntime.InferenceSession(str(path))
    assert [row.name for row in session.get_outputs()] == ["output", "x_logits", "output_logits"]


def test_onnx_keeps_the_heads_asked_for_under_their_names(tmp_path: Path) -> None:
    net = small_networks.Net()
    x = small_networks.image()
    m = gs.attach_domain_head(net, "stage1", name="camera", hidden=8, example_inputs=x)
    m = gs.attach_domain_head(m, "stage2", name="weather", num_domains=3, hidden=8, example_inputs=x)
    path = gs.export(m, tmp_path / "m.onnx", x, heads=["weather"])
    session = onnxruntime.InferenceSession(str(path))
    assert [row.name for row in session.get_outputs()] == ["output", "weather"]
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    output, _, weather = m.eval()(x)
    torch.testing.assert_close([torch.from_numpy(y) for y in found], [output, weather], rtol=1e-4, atol=1e-4)
    with pytest.raises(gs.ExportError, match=r"no head 'wether'(.|\n)*weather"):
        gs.export(m, path, x, heads=["wether"])
    with pytest.raises(gs.ExportError, match="is for ONNX Runtime"):
        gs.load(path)


def test_stripping_one_head_of_two_leaves_the_other_in_the_inference_network() -> None:
    net = small_networks.Net()
    x = small_networks.image()
    m = gs.attach_domain_head(net, "stage1", name="one", hidden=8, example_inputs=x)
    m = gs.attach_domain_head(m, "stage2", name="two", hidden=8, example_inputs=x)
    kept = for_inference(m, ["one"])
    assert not gs.reversals(kept)
    assert_same_bits(list(kept(x)), [*m.eval()(x)[:2]])


# ------------------------------------------------------------------------------------------------- folders


def test_a_folder_holds_code_that_is_the_network(case: Case, tmp_path: Path) -> None:
    model, m = case.spliced()
    if not isinstance(m, torch.fx.GraphModule):
        with pytest.raises(gs.ExportError, match="runs as it is, so there is no graph to write as code"):
            gs.export(m, tmp_path / "spliced", case.inputs)
        return
    folder = gs.export(m, tmp_path / "spliced", case.inputs)
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.py",
        "model.safetensors",
    ]
    again = gs.load(folder, model=None if case.sourced else model)
    assert_same_bits(outputs_and_gradients(m, case.inputs), outputs_and_gradients(again, case.inputs))
    assert json.loads((folder / "config.json").read_text())["verification"]["ok"]
    assert "upstream parameters flipped, bit for bit" in (folder / "README.md").read_text()


def test_the_code_of_a_folder_is_importable_and_trains(tmp_path: Path) -> None:
    _, m = CASES["cnn"].spliced()
    folder = gs.export(m, tmp_path / "spliced", CASES["cnn"].inputs)
    code = (
        "import torch, grl_surgery as gs\nsys.path.insert(0, sys.argv[1])\nimport model\n"
        "m = model.load()\nreference = gs.load(sys.argv[1])\n"
        "x = torch.randn(2, 3, 32, 32)\n"
        "for net in (m, reference):\n    torch.manual_seed(0)\n    sum(y.sum() for y in net(x)).backward()\n"
        "print(type(m).__name__, all(torch.equal(p.grad, q.grad) for p, q in zip(m.parameters(), "
        "reference.parameters()) if q.grad is not None))"
    )
    assert in_a_fresh_process(code, folder) == "SplicedResNet True\n"


def test_the_code_of_a_folder_reads_as_code_that_a_person_wrote(tmp_path: Path) -> None:
    m = gs.insert_grl(torchvision.models.resnet18(), after="layer3.0.conv2")
    text = (gs.export(m, tmp_path / "spliced", images(32)) / "model.py").read_text()
    assert "layer3_0_conv2 = self.layer3[0].conv2(layer3_0_relu)" in text
    assert "grl_layer3_0_conv2 = self.grl_layer3_0_conv2(layer3_0_conv2)" in text
    assert "getattr(" not in text
    assert "slice(" not in text
    assert "= None" not in text


def test_a_network_of_several_modes_has_code_for_each(tmp_path: Path) -> None:
    net = small_networks.Modes()
    m = gs.insert_grl(net, after="body")
    folder = gs.export(m, tmp_path / "spliced", small_networks.vector())
    text = (folder / "model.py").read_text()
    assert "def forward_1(self, x)" in text
    assert "def forward_2(self, x)" in text
    assert "def load(network: nn.Module)" in text


# ----------------------------------------------------------------------------------------------- the chain


def test_the_flip_holds_after_each_step_of_a_chain(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    x = images(32)
    m = gs.insert_grl(model, after="layer2")
    steps = {"spliced": m, "deepcopy": copy.deepcopy(m)}
    steps["EMA"] = ModelEmaV3(steps["deepcopy"]).module
    compiled = torch.compile(steps["EMA"], backend="aot_eager")
    compiled.train()
    compiled(x).sum().backward()
    signs = [torch.sign(p.grad.sum()) for p in list(steps["EMA"].parameters())[:1]]
    assert signs
    steps["compiled"] = compiled._orig_mod
    steps["checkpoint"] = gs.load(gs.export(steps["compiled"], tmp_path / "m.safetensors"))
    steps["program"] = gs.load(gs.export(steps["checkpoint"], tmp_path / "m.pt2", x))
    for name, network in steps.items():
        report = gs.verify_flip(network, example_inputs=x)
        assert report.ok, f"{name}: {report.failures}"
        assert len(report.reversals) == 1, name


# ----------------------------------------------------------------------------------------------- arguments


def test_an_ending_that_is_no_format_is_answered_with_those_that_are(tmp_path: Path) -> None:
    m = gs.insert_grl(small_networks.Net(), after="stage1")
    with pytest.raises(gs.ExportError, match=r"'m.pth' has an unknown ending.* \.safetensors, \.pt2, \.onnx"):
        gs.export(m, tmp_path / "m.pth")
    with pytest.raises(gs.ExportError, match="heads= chooses outputs of a program for inference"):
        gs.export(m, tmp_path / "m.safetensors", heads=["domain"])
    with pytest.raises(gs.ExportError, match="there is no folder"):
        gs.export(m, tmp_path / "nowhere" / "m.safetensors")
    with pytest.raises(gs.ExportError, match="there is no file"):
        gs.load(tmp_path / "m.safetensors")
    with pytest.raises(gs.ExportError, match="it is not known what inputs Net takes"):
        gs.export(m, tmp_path / "m.pt2")
    with pytest.raises(gs.ExportError, match="purpose='deploy' is not known"):
        gs.export(m, tmp_path / "m.pt2", purpose="deploy")
    with pytest.raises(gs.SurgeryError, match=r"export works on an nn\.Module"):
        gs.export("m", tmp_path / "m.pt2")


def test_exporting_changes_nothing_in_the_network(tmp_path: Path) -> None:
    m = gs.insert_grl(timm.create_model("test_resnet"), after="layer2")
    before = copy.deepcopy(m.state_dict())
    state = torch.get_rng_state()
    for name in ("m.safetensors", "m.pt2", "folder"):
        gs.export(m, tmp_path / name, images(32))
    assert all(torch.equal(before[key], value) for key, value in m.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert m.training
    assert all(p.grad is None for p in m.parameters())


class Assigns(nn.Module):
    """Writes into the list that it is given, as the branches of HRNet do."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        for place, conv in enumerate(self.convs):
            features[place] = conv(features[place])
        return features[0] * features[1]


class InFloat32(nn.Module):
    """Leaves autocast for a part of itself, as the linear attention of EfficientViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.linear(x.float())


class Branches(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(4, 4), first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.second([self.first(x), x.tanh()])


@pytest.mark.parametrize("first", [nn.Linear(4, 4), InFloat32()])
def test_blocks_that_assign_to_lists_and_leave_autocast_are_recorded(
    first: nn.Module, tmp_path: Path
) -> None:
    x = torch.randn(3, 4)
    model = Branches(first, Assigns())
    spliced = gs.insert_grl(model, after="stem")
    gs.export(spliced, tmp_path / "m.pt2", example_inputs=(x,))
    again = gs.load(tmp_path / "m.pt2")
    assert torch.equal(again(x), model(x))
    assert gs.verify_flip(again, example_inputs=(x,)).ok


# ------------------------------------------------------------------------------- nothing does nothing


@pytest.mark.parametrize(
    ("name", "choices", "reason"),
    [
        ("m.safetensors", {"purpose": "bogus"}, "purpose='bogus' is not known"),
        ("m.safetensors", {"purpose": "inference"}, "always keeps reversals"),
        ("folder", {"purpose": "inference"}, "always keeps reversals"),
        ("m.onnx", {"purpose": "training"}, "always has no reversals"),
        ("folder", {"dynamic": False}, "a folder is none"),
        ("m.pt2", {"source": "timm/resnet18"}, "is complete without"),
        ("m.safetensors", {"options": 3}, "are names and values"),
        ("m.onnx", {"heads": 3}, "takes a name or a list of names"),
        ("", {}, "is no name of a file"),
        (None, {}, "got NoneType"),
    ],
)
def test_a_choice_that_the_format_does_not_know_is_refused(
    name: str | None, choices: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    m = gs.insert_grl(small_networks.Net(), after="stage1")
    with pytest.raises(gs.SurgeryError, match=reason):
        gs.export(m, name, small_networks.image(), **choices)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [{"model": "timm/resnet18"}, {"model": 3}, {"heads": 3}, {"path": None}])
def test_what_is_no_path_network_or_head_is_refused_by_load(given: dict[str, Any]) -> None:
    with pytest.raises(gs.ExportError, match=f"got {type(next(iter(given.values()))).__name__}"):
        gs.load(**{"path": "m.safetensors", **given})


def test_one_head_may_be_named_without_a_list(tmp_path: Path) -> None:
    _, m = CASES["cnn"].spliced()
    path = gs.export(m, tmp_path / "m.onnx", CASES["cnn"].inputs, heads="domain")
    assert [row.name for row in onnxruntime.InferenceSession(path).get_outputs()] == ["output", "domain"]


@pytest.mark.parametrize("name", ["m.pt2", "m.onnx"])
def test_one_example_records_any_batch_size(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    path = gs.export(gs.insert_grl(model, after="0"), tmp_path / name, torch.randn(1, 6))
    for batch in (1, 7):
        x = torch.randn(batch, 6)
        if name == "m.onnx":
            found = onnxruntime.InferenceSession(path).run(None, {"input": x.numpy()})[0]
        else:
            found = gs.load(path)(x).detach().numpy()
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach())


def test_a_program_that_was_read_is_known_and_only_copied(tmp_path: Path) -> None:
    x = small_networks.image()
    m = gs.insert_grl(small_networks.Net(), after="stage1")
    program = gs.load(gs.export(m, tmp_path / "m.pt2", x))
    assert is_program(copy.deepcopy(program))
    assert not is_program(m)
    with pytest.raises(gs.SurgeryError, match="cannot be cut or stripped"):
        check_no_program(program, "strip")
    for name in ("m.safetensors", "m.onnx", "folder"):
        with pytest.raises(gs.ExportError, match="a program is complete"):
            gs.export(program, tmp_path / name, x)
    assert gs.reversals(gs.load(gs.export(program, tmp_path / "again.pt2", x)))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_program_of_two_batches_takes_any_two_of_one_size(by_name: bool, tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(3, 8)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(y)

    given: Any = {"x": torch.randn(2, 4), "y": torch.randn(2, 3)}
    given = given if by_name else tuple(given.values())
    m = gs.insert_grl(Two(), after="a", example_inputs=given)
    program = gs.load(gs.export(m, tmp_path / "two.pt2", given))
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    found = program(x=x, y=y) if by_name else program(x, y)
    assert torch.equal(found, m(x, y))
    assert gs.verify_flip(program).ok
    with pytest.raises((AssertionError, RuntimeError)):
        program(x=x, y=y[:3]) if by_name else program(x, y[:3])
