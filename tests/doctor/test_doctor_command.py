"""grl-surgery doctor, as a shell and as GitHub see it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grl_surgery.cli import main as cli

NETWORKS = """
import torch
from torch import nn
import grl_surgery as gs
import pasted_variants as variants


def pasted():
    return variants.Network(variants.Layer()), (variants.IMAGES,)


def none():
    return variants.Network(variants.GradientReversal()), (variants.IMAGES,)


def ours():
    return gs.insert_grl(variants.Network(), before="domain"), (variants.IMAGES,)


def unknown():
    return variants.Network()
"""


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    Path("networks_of_the_doctor.py").write_text(NETWORKS)
    sys.modules.pop("networks_of_the_doctor", None)
    return "networks_of_the_doctor.py"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *arguments])
    return int(ended.value.code or 0)


def test_a_reversal_that_is_lost_is_exit_status_1(
    networks: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert run(f"{networks}:pasted") == 1
    printed = capsys.readouterr()
    assert "LOST  1 reversal alive in eager mode, lost silently in 4 of 11 contexts" in printed.out
    assert "model = gs.adopt(model, example_inputs).model" in printed.out
    assert "::error file=pasted_variants.py,line=" in printed.out
    assert printed.err == ""


def test_a_reversal_that_is_alive_is_exit_status_0(networks: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{networks}:ours") == 0
    assert capsys.readouterr().out.startswith("OK  1 reversal alive in eager mode, lost silently in none")


def test_json_is_all_that_is_printed(networks: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{networks}:none", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["ok"]) == (f"{networks}:none", False)
    assert found["findings"][0]["verdict"] == "backward never called"
    assert found["findings"][0]["fix"] == "put gs.GradientReversal() in its place"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (":unknown", "it is not known what inputs networks_of_the_doctor.py:unknown takes"),
        (":pastd", "has no 'pastd'"),
        ("", "for example: networks_of_the_doctor.py:"),
    ],
)
def test_a_request_that_cannot_be_met_is_exit_status_2(
    networks: str, source: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(networks + source) == 2
    assert complaint in capsys.readouterr().err


def test_inputs_that_do_not_fit_are_exit_status_2(networks: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{networks}:pasted", "--input-size", "5") == 2
    complaint = f"{networks}:pasted does not run on inputs of 4x5: RuntimeError: "
    assert complaint in capsys.readouterr().err


def test_pytest_finds_the_fixture_in_a_project_that_uses_it(tmp_path: Path) -> None:
    (tmp_path / "test_of_a_project.py").write_text(
        "import torch\n"
        "def test_alive(assert_flips):\n"
        "    assert_flips(torch.nn.Linear(2, 2), torch.ones(2, 2))\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1
    assert (
        "FlipError: no module, autograd Function or hook in this network reverses a gradient" in ended.stdout
    )
