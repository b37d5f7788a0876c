"""A coefficient that may be negative, by signed=True: everywhere that a coefficient is named."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reversal_contexts import PLAIN_GRADIENT, Network, gradient_at_input
from torch import Tensor, nn

import grl_surgery as gs
from grl_surgery.cli import main as cli
from grl_surgery.training.schedules import CoefficientScheduler, constant, linear

INPUTS = torch.linspace(-1, 1, 20).reshape(5, 4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def spliced(coeff: float = -0.5) -> nn.Module:
    return gs.insert_grl(network(), after="1", coeff=coeff, signed=True)


def with_head(coeff: float = -0.5) -> nn.Module:
    torch.manual_seed(1)
    words = {"hidden": 8, "dropout": 0.0, "coeff": coeff, "signed": True, "example_inputs": INPUTS}
    return gs.attach_domain_head(network(), after="1", **words)


def gradients(model: nn.Module) -> list[Tensor]:
    """Of the first layer, which is upstream of the reversal."""
    outputs = model(INPUTS)
    last = outputs[-1] if isinstance(outputs, tuple) else outputs
    return list(torch.autograd.grad(last.square().sum(), list(model.parameters())[:2]))


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# --- The layer and the function


@pytest.mark.parametrize(
    "reversal",
    [
        lambda: gs.GradientReversal(-0.5, signed=True),
        lambda: gs.GradientReversal(torch.tensor(-0.5), signed=True),
        lambda: lambda x: gs.reverse_gradient(x, -0.5, signed=True),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda net: net,
        torch.fx.symbolic_trace,
        lambda net: torch.compile(net, backend="aot_eager", fullgraph=True),
        lambda net: torch.export.export(net, (torch.ones(4, 3),)).module(),
    ],
    ids=["eager", "fx", "compile", "export"],
)
def test_a_negative_coefficient_scales_the_gradient_and_keeps_its_sign(reversal, use) -> None:
    torch.compiler.reset()
    found = gradient_at_input(use(Network(reversal())))
    torch.testing.assert_close(found, 0.5 * PLAIN_GRADIENT, rtol=0, atol=0)


def test_a_signed_layer_takes_negative_coefficients_later_and_refuses_what_is_no_number() -> None:
    layer = gs.GradientReversal(signed=True)
    for coeff in (-1.0, 0.0, 0.5, torch.tensor(-0.25)):
        layer.set_coeff(coeff)
        assert layer.coeff.item() == float(coeff)
    for coeff in (float("inf"), float("-inf"), float("nan"), torch.tensor(float("nan"))):
        with pytest.raises(gs.SurgeryError, match="it must be finite: the gradient is multiplied by -coeff"):
            layer.set_coeff(coeff)
    assert layer.coeff.item() == -0.25


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: eval(repr(layer), {"GradientReversal": gs.GradientReversal}),
    ],
    ids=["copy", "deepcopy", "pickle", "repr"],
)
def test_a_copy_of_a_signed_layer_is_signed(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    twin = duplicate(gs.GradientReversal(-0.5, signed=True))
    assert repr(twin) == "GradientReversal(coeff=-0.5, signed=True)"
    twin.set_coeff(-1.0)


def test_disabling_a_negative_reversal_gives_the_gradient_of_the_plain_network() -> None:
    model = spliced(-0.5)
    with gs.reversal_disabled(model):
        assert_equal(gradients(model), gradients(network()))
    assert_equal(gradients(model), [0.5 * each for each in gradients(network())])


# --- Surgery and proof


@pytest.mark.parametrize("make", [spliced, with_head])
def test_surgery_makes_signed_reversals_and_the_proof_holds_for_them(make) -> None:
    model = make()
    (reversal,) = gs.reversals(model).values()
    assert (reversal.coeff.item(), reversal.signed) == (-0.5, True)
    reversal.set_coeff(1.0)
    reversed_by_one = gradients(model)
    reversal.set_coeff(-0.5)
    assert_equal(gradients(model), [-0.5 * each for each in reversed_by_one])

    report = gs.verify_flip(model, network(), example_inputs=INPUTS)

    assert report.ok, str(report)
    assert [row.coeff for row in report.reversals] == [-0.5]
    assert reversal.coeff.item() == -0.5


def test_the_proof_refuses_a_negative_coefficient_of_a_layer_that_is_not_signed() -> None:
    model = gs.insert_grl(network(), after="1")
    gs.reversals(model)["grl_1"].coeff.fill_(-0.5)
    with pytest.raises(gs.FlipError, match=r"its coefficient is -0\.5; it must be finite and not negative"):
        gs.verify_flip(model, network(), example_inputs=INPUTS).raise_if_failed()


@pytest.mark.parametrize("surgery", [gs.insert_grl, gs.attach_domain_head])
def test_surgery_refuses_a_negative_coefficient_and_says_how_to_mean_it(surgery) -> None:
    with pytest.raises(gs.SurgeryError, match=r"GradientReversal\(-0\.5, signed=True\) on purpose"):
        surgery(network(), after="1", coeff=-0.5, example_inputs=INPUTS)


# --- Schedules


def test_a_linear_schedule_goes_from_minus_one_to_one_and_drives_signed_reversals() -> None:
    schedule = linear(-1.0, 1.0, signed=True)
    assert [schedule(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert repr(schedule).startswith("linear(lo=-1.0, hi=1.0, signed=True)")
    assert eval(repr(schedule)) == schedule
    model = spliced(1.0)
    scheduler = CoefficientScheduler(model, schedule, total_steps=4)
    seen = [gs.reversals(model)["grl_1"].coeff.item()]
    for _ in range(4):
        scheduler.step()
        seen.append(gs.reversals(model)["grl_1"].coeff.item())
    assert seen == [-1.0, -0.5, 0.0, 0.5, 1.0]


def test_a_run_of_a_signed_schedule_is_resumed_and_not_taken_for_an_unsigned_one() -> None:
    scheduler = CoefficientScheduler(spliced(), linear(-1.0, 1.0, signed=True), total_steps=4)
    scheduler.step()
    resumed = CoefficientScheduler(spliced(), linear(-1.0, 1.0, signed=True), total_steps=4)
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.coeff == -0.5
    unsigned = CoefficientScheduler(spliced(), linear(0.0, 1.0), total_steps=4)
    with pytest.raises(gs.SurgeryError, match=r"schedule\.signed is True in the checkpoint and None here"):
        unsigned.load_state_dict(scheduler.state_dict())


def test_a_negative_schedule_needs_signed_and_drives_no_reversal_that_is_not() -> None:
    with pytest.raises(gs.SurgeryError, match=r"lo is -1\.0"):
        linear(-1.0, 1.0)
    model = gs.insert_grl(network(), after="1", coeff=0.25)
    with pytest.raises(gs.SurgeryError, match=r"value at step 0 of 4 is -1\.0"):
        CoefficientScheduler(model, linear(-1.0, 1.0, signed=True), total_steps=4)
    assert gs.reversals(model)["grl_1"].coeff.item() == 0.25
    with pytest.raises(gs.SurgeryError, match="value is -1"):
        constant(-1.0)


# --- Files


def loaded(file: Path) -> nn.Module:
    """A program loads by itself, a checkpoint into the network, and a folder holds code to import."""
    if not file.is_dir():
        return gs.load(file, **({"model": network()} if file.suffix == ".safetensors" else {}))
    spec = importlib.util.spec_from_file_location("written_signed", file / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(network())


@pytest.mark.parametrize("coeff", [-0.5, 0.5])
@pytest.mark.parametrize("make", [spliced, with_head])
@pytest.mark.parametrize("ending", [".safetensors", ".pt2", ""])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_file_gives_a_signed_reversal_back(ending: str, make, coeff: float, tmp_path: Path) -> None:
    model = make(coeff)
    (name,) = gs.reversals(model)
    file = gs.export(model, tmp_path / f"saved{ending}", example_inputs=INPUTS)

    again = loaded(file)

    reversal = gs.reversals(again)[name]
    assert (reversal.coeff.item(), reversal.signed) == (coeff, True)
    assert_equal(gradients(again), gradients(model))
    reversal.set_coeff(-1.0)
    gs.reversals(model)[name].set_coeff(-1.0)
    assert_equal(gradients(again), gradients(model))


@pytest.mark.parametrize("ending", [".safetensors", ".pt2", ""])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_file_does_not_make_a_reversal_signed(ending: str, tmp_path: Path) -> None:
    model = gs.insert_grl(network(), after="1", coeff=0.5)
    file = gs.export(model, tmp_path / f"saved{ending}", example_inputs=INPUTS)
    again = loaded(file)
    with pytest.raises(gs.SurgeryError, match="it must be finite and not negative"):
        gs.reversals(again)["grl_1"].set_coeff(-1.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_program_for_inference_has_no_reversal_whatever_its_sign(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    operations = []
    for coeff in (-0.5, 0.5):
        file = gs.export(spliced(coeff), tmp_path / f"{coeff}.onnx", example_inputs=INPUTS)
        operations.append([node.op_type for node in onnx.load(file).graph.node])
    assert operations[0] == operations[1]
    assert "Identity" not in operations[0]


# --- What is said about a run


def test_the_metrics_of_a_negative_coefficient_say_that_the_features_help_the_head() -> None:
    model = with_head(-0.5)
    domains = torch.tensor([0, 1, 0, 1, 0])
    with gs.AdversarialMetrics(model) as metrics:
        logits = model(INPUTS)[1]
        gs.domain_loss(logits, domains).backward()
        metrics.update(logits, domains)
        report = metrics.report()
    assert (report.verdict, report.coeff) == ("undecided", -0.5)
    assert report.explanation.startswith("the coefficient is negative")
    assert report.splice_gradient > 0

    with gs.reversal_disabled(model), gs.AdversarialMetrics(model) as metrics:
        logits = model(INPUTS)[1]
        gs.domain_loss(logits, domains).backward()
        metrics.update(logits, domains)
        assert metrics.report().explanation.startswith("the reversal is disabled")


def test_the_doctor_tells_a_signed_negative_coefficient_from_a_lost_reversal() -> None:
    model = network()
    model.insert(2, gs.GradientReversal(-0.5, signed=True))
    (finding,) = gs.find_reversals(model, INPUTS)
    assert (finding.verdict, finding.factor, finding.is_silent) == ("signed, negative", 0.5, False)
    assert finding.note == "its coefficient is -0.5, as signed=True allows: the gradient keeps its sign"
    model[2].set_coeff(0.5)
    (finding,) = gs.find_reversals(model, INPUTS)
    assert (finding.verdict, finding.factor) == ("reverses", -0.5)


# --- The command line


@pytest.fixture
def script(tmp_path: Path) -> str:
    file = tmp_path / "script_of_a_network.py"
    file.write_text(
        "import torch\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))\n"
        "    return net, (torch.ones(5, 4),)\n"
    )
    return f"{file}:net"


def exit_code(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    return stopped.value.code or 0


@pytest.mark.parametrize("command", ["insert", "attach"])
def test_a_command_takes_a_negative_coefficient_with_signed(
    command: str, script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "m.safetensors")
    words = (command, script, "--after", "1", "--coeff=-0.5", "-o", file)
    assert exit_code(*words) == 2
    assert "--coeff=-0.5 --signed on purpose" in " ".join(capsys.readouterr().err.split())

    assert exit_code(*words, "--signed") == 0

    (reversal,) = gs.reversals(gs.load(file, model=network())).values()
    assert repr(reversal) == "GradientReversal(coeff=-0.5, signed=True)"


def test_verify_takes_a_negative_coefficient_with_signed_and_no_other(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("verify", script, "--after", "1", "--coeff")
    assert exit_code(*words, "-0.5") == 2
    assert exit_code(*words, "nan", "--signed") == 2
    assert "it must be finite: the gradient" in " ".join(capsys.readouterr().err.split())
    assert exit_code(*words, "-0.5", "--signed") == 0
    assert "exact" in capsys.readouterr().out
