"""grl-surgery new: the script that it writes runs as it stands, adapts nothing by magic, and is resumed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grl_surgery as gs
from grl_surgery.adaptation.script import training_script

FACTORY = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *pool)
    return nn.Sequential(body, nn.Linear(4, 5)), (torch.randn(2, 3, 8, 8),)
"""


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def write(folder: Path, *arguments: str) -> Path:
    (folder / "mine.py").write_text(FACTORY)
    done = python(folder, "-m", "grl_surgery", "new", *arguments)
    assert done.returncode == 0, done.stderr
    script = folder / "train.py"
    assert script.read_text().count("STEPS, BATCH") == 1
    # The same script in two sizes: the second is what a test has time for.
    script.write_text(script.read_text().replace("= 2000, 32,", "= 8, 16,").replace(", 100\n", ", 4\n", 1))
    return script


@pytest.mark.parametrize(
    ("recipe", "trainer"),
    [
        ("dann", "plain"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("cdan", "plain"), ("fairness", "plain"), ("dann", "accelerate"))
        ),
    ],
)
def test_the_script_runs_and_a_run_that_was_stopped_ends_with_the_same_bits(
    recipe: str, trainer: str, tmp_path: Path
) -> None:
    if trainer == "accelerate":
        pytest.importorskip("accelerate")
    script = write(tmp_path, recipe, "mine.py:network", "--trainer", trainer)
    whole = python(tmp_path, script.name)
    assert whole.returncode == 0, whole.stderr
    assert "flipped, bit for bit" in whole.stdout.splitlines()[0]
    assert re.search(r"step 8  task \d\.\d+  .*domain loss .*coeff 1\.000", whole.stdout)
    expected = torch.load(tmp_path / "run.pt", weights_only=True)
    weights = torch.load(tmp_path / "best.pt", weights_only=True)
    assert set(weights) == {k for k in expected["model"] if not k.startswith(("domain", "group"))}
    (tmp_path / "run.pt").unlink()

    assert python(tmp_path, script.name, "--until", "4").returncode == 0
    resumed = python(tmp_path, script.name, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "step 4 " not in resumed.stdout
    assert resumed.stdout.splitlines()[-2:] == whole.stdout.splitlines()[-2:]
    found = torch.load(tmp_path / "run.pt", weights_only=True)
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name


def test_batch_norms_keep_their_statistics(tmp_path: Path) -> None:
    script = write(tmp_path, "dann", "mine.py:network")
    assert python(tmp_path, script.name).returncode == 0
    state = torch.load(tmp_path / "run.pt", weights_only=True)["model"]
    assert torch.equal(state["0.1.running_mean"], torch.zeros(4))
    assert state["0.1.num_batches_tracked"] == 0


@pytest.mark.parametrize("recipe", ["dann", "cdan", "fairness"])
@pytest.mark.parametrize("trainer", ["plain", "accelerate"])
def test_the_script_is_short_and_readable(recipe: str, trainer: str) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    text = training_script("mine.py:network", network, (torch.zeros(2, 4),), recipe=recipe, trainer=trainer)  # type: ignore[arg-type]
    compile(text, "train.py", "exec")
    assert "$" not in text
    assert max(map(len, text.splitlines())) <= 120
    assert len([line for line in text.splitlines() if line.strip()]) <= 95


def test_timm_and_torchvision_are_made_with_the_number_of_classes(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet")
    text = training_script("timm/test_resnet", model, (torch.zeros(2, 3, 64, 64),))
    assert 'timm.create_model("test_resnet", pretrained=False, num_classes=CLASSES)' in text
    (after,) = re.findall(r"after='(\S+)'", text)
    assert len(gs.reversals(gs.insert_grl(model, after=after))) == 1
    assert "CLASSES, EVERY = 2000, 32, 1e-3, 1.0, 1000, 100" in text


def test_what_cannot_be_written_is_refused_and_an_edited_script_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY)
    (tmp_path / "train.py").write_text("edited")
    done = python(tmp_path, "-m", "grl_surgery", "new", "dann", "mine.py:network")
    assert done.returncode == 2
    assert "train.py exists, and is not replaced" in done.stderr
    assert (tmp_path / "train.py").read_text() == "edited"
    two = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(gs.SurgeryError, match="networks of one tensor, and x:y takes 2 arguments"):
        training_script("x:y", two, (torch.zeros(2, 2), torch.zeros(2, 2)))
    with pytest.raises(gs.SurgeryError, match=r"returns \(2, 4, 6, 6\)"):
        training_script("x:y", torch.nn.Conv2d(3, 4, 3), (torch.zeros(2, 3, 8, 8),))
    with pytest.raises(gs.SurgeryError, match="no recipe 'dan'"):
        training_script("x:y", two, (torch.zeros(2, 2),), recipe="dan")  # type: ignore[arg-type]
