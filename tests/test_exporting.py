from __future__ import annotations

import copy
import json
import subprocess
import sys
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
from grl_surgery.files.programs import for_inference, inputs_for, record
from grl_surgery.loaded_program import check_no_program, is_program


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


@pytest.fixture(params=CASES, scope="module")
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
        [*command, "-c", hidden + code, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    from grl_surgery.files import recipe

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
    from grl_surgery.files import programs

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
    with pytest.raises(gs.ExportError, match=r"'m.pth' has an ending .* \.safetensors, \.pt2, \.onnx"):
        gs.export(m, tmp_path / "m.pth")
    with pytest.raises(gs.ExportError, match="heads= chooses outputs of a program for inference"):
        gs.export(m, tmp_path / "m.safetensors", heads=["domain"])
    with pytest.raises(gs.ExportError, match="there is no folder"):
        gs.export(m, tmp_path / "nowhere" / "m.safetensors")
    with pytest.raises(gs.ExportError, match="there is no file"):
        gs.load(tmp_path / "m.safetensors")
    with pytest.raises(gs.ExportError, match="nothing says what inputs Net takes"):
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
