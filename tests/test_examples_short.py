"""Every example runs as it stands, here with few steps, and says what its page shows."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

for package in ("timm", "sklearn", "skimage", "matplotlib"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).parent.parent / "examples"
HERE = {"cnn", "cdan", "vit", "edge", "fairness", "disentangle", "adversarial", "export", "torchrun"}
ELSEWHERE = {"digits", "train_dann", "detection"}
"""Run by other tests."""


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example as a module, on one thread, with the global generator as it was afterwards."""
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield importlib.import_module(request.param)
    torch.set_num_threads(threads)


def test_every_example_is_run_by_some_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= HERE | ELSEWHERE


SMALL_CNN = ["--steps", "3", "--count", "64"]


@pytest.mark.parametrize(
    ("example", "arguments", "says"),
    [
        ("cnn", SMALL_CNN, ["4 of 4 upstream parameters flipped, bit for bit", "seed 0  DANN"]),
        ("cdan", SMALL_CNN, ["6 of 6 upstream parameters flipped, bit for bit", "seed 0  CDAN+E"]),
        ("vit", ["--steps", "2"], ["78 of 78 upstream parameters flipped", "verdict"]),
        ("edge", ["--steps", "1", "--network", "test_resnet"], ["mixed as the paths say", "ResNet"]),
        ("export", ["--network", "test_efficientnet"], ["inference.pt2", "outputs equal, bit for bit"]),
    ],
    indirect=["example"],
)
def test_an_example_runs(
    example: ModuleType, arguments: list[str], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    example.main(arguments)
    printed = capsys.readouterr().out
    for words in says:
        assert words in printed


@pytest.mark.parametrize(
    ("example", "arguments", "says"),
    [
        ("fairness", ["--coeffs", "0", "1", "--seeds", "0", "--steps", "5"], "AUC of the decision"),
        ("disentangle", ["--steps", "5", "--seeds", "0", "1"], "style, by 10 neighbours"),
        ("adversarial", ["--steps", "8"], "after 0 steps: espresso 0.95"),
    ],
    indirect=["example"],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_an_example_with_a_figure_runs_and_draws_it(
    example: ModuleType,
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if example.__name__ == "fairness":
        pytest.importorskip("sklego")
    example.main([*arguments, "--plot", str(tmp_path / "figure.png")])
    assert says in capsys.readouterr().out
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("example", ["adversarial"], indirect=True)
def test_the_attack_changes_no_pixel_by_more_than_the_limit_and_changes_the_class(
    example: ModuleType,
) -> None:
    _, change, best = example.attack_photograph(steps=3, limit=0.02)
    assert 0 < change.abs().max() <= 0.02
    assert best[0][0] == "espresso"
    assert best[-1][0] != "espresso"


def test_the_torchrun_example_agrees_with_one_process() -> None:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
    ]
    script = ["--rdzv-endpoint", "127.0.0.1:0", str(EXAMPLES / "torchrun.py"), "--steps", "3"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *script], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # What docs/tutorials/many_gpus.md shows.
    assert done.stdout.splitlines() == [
        "2 processes, DistributedDataParallel",
        "gradients equal to one process with the whole batch: True",
        "coefficients equal on all processes: True",
    ]
