"""A run in one file: the resumed run ends with the same bits, and what does not fit changes nothing."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import grl_surgery as gs


class Run:
    """A short adversarial run with dropout, momentum, a schedule and shuffled data."""

    def __init__(self, width: int = 8) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 3))
        self.model = gs.attach_domain_head(network, after="1", hidden=5, example_inputs=torch.randn(2, 4))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.schedule = gs.CoefficientScheduler(self.model, gs.schedules.dann(), 20)
        source, target = (torch.randn(n, 4) for n in (10, 7))
        self.pairs = gs.paired(
            *(DataLoader(TensorDataset(x), 4, shuffle=True, drop_last=True) for x in (source, target))
        )
        self.best = gs.validators.Best("information")
        self.losses: list[float] = []

    def train(self, steps: int) -> None:
        for step in range(steps):
            (source,), (target,) = next(self.pairs)
            noise = torch.randn(8, 4) * random.random() * float(numpy.random.rand())
            logits, domain_logits = self.model(torch.cat([source, target]) + noise)
            loss = logits[:4].square().mean() + gs.domain_loss(domain_logits, torch.arange(8) // 4)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.best.update(gs.validators.information(logits[4:]), step)
            self.losses.append(loss.item())

    def parts(self) -> dict[str, Any]:
        return {"schedule": self.schedule, "pairs": self.pairs, "best": self.best}

    def save(self, path: Path) -> None:
        gs.save_run(path, self.model, self.optimizer, **self.parts(), step=len(self.losses), note="x")

    def load(self, path: Path) -> dict[str, Any]:
        return gs.load_run(path, self.model, self.optimizer, **self.parts())


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    run = Run()
    run.train(5)
    run.save(tmp_path / "run.pt")
    run.train(6)

    resumed = Run()
    resumed.train(2)
    numpy.random.seed(5)
    random.seed(5)
    assert resumed.load(tmp_path / "run.pt") == {"step": 5, "note": "x"}
    resumed.train(6)
    assert resumed.losses[2:] == run.losses[5:]
    for name, value in run.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert resumed.schedule.coeff == run.schedule.coeff
    assert resumed.best == run.best


def test_coefficients_are_resumed_without_a_schedule(tmp_path: Path) -> None:
    run, other = Run(), Run()
    gs.reversals(run.model)["domain.reversal"].set_coeff(0.25)
    gs.save_run(tmp_path / "run.pt", run.model)
    gs.load_run(tmp_path / "run.pt", other.model)
    assert gs.reversals(other.model)["domain.reversal"].coeff.item() == 0.25


def test_the_file_is_read_without_running_code_of_it(tmp_path: Path) -> None:
    run = Run()
    run.train(1)
    run.save(tmp_path / "run.pt")
    assert torch.load(tmp_path / "run.pt", weights_only=True)["processes"][0]["parts"]["step"] == {"value": 1}


def test_a_wrapped_network_is_resumed_bare(tmp_path: Path) -> None:
    run, other = Run(), Run()
    nn.init.ones_(run.model.get_submodule("0").weight)
    gs.save_run(tmp_path / "run.pt", torch.compile(run.model, backend="eager"))
    gs.load_run(tmp_path / "run.pt", other.model)
    assert (other.model.get_submodule("0").weight == 1).all()


def test_a_write_that_fails_leaves_the_previous_run_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run()
    run.save(tmp_path / "run.pt")
    before = (tmp_path / "run.pt").read_bytes()

    def disk_full(state: object, file: Any) -> None:
        Path(file).write_bytes(b"half") if isinstance(file, Path) else None
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        with pytest.raises(gs.SurgeryError, match="No space left"):
            gs.save_run(tmp_path / "run.pt", run.model)
    assert (tmp_path / "run.pt").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


def snapshot(run: Run) -> list[Any]:
    tensors = [
        *run.model.state_dict().values(),
        *(s["momentum_buffer"] for s in run.optimizer.state.values()),
    ]
    return [*(t.clone() for t in tensors), torch.get_rng_state(), run.pairs.state_dict(), run.schedule.coeff]


def same(one: list[Any], other: list[Any]) -> bool:
    equal = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b  # noqa: E731
    return all(equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run = Run()
    run.train(3)
    path = tmp_path / "run.pt"
    run.save(path)
    other = Run(width=6)
    other.train(2)
    same_width = Run()
    same_width.train(2)
    narrow, before = snapshot(other), snapshot(same_width)

    with pytest.raises(gs.SurgeryError, match=r"0\.weight is \(8, 4\) in the file and \(6, 4\)"):
        other.load(path)
    with pytest.raises(gs.SurgeryError, match="pairs is in the file and was not given"):
        gs.load_run(path, same_width.model, same_width.optimizer, schedule=same_width.schedule, best=run.best)
    with pytest.raises(gs.SurgeryError, match="step was given, and is a plain value in the file"):
        gs.load_run(path, same_width.model, same_width.optimizer, **same_width.parts(), step=run.best)
    same_width.schedule.total_steps = 30
    with pytest.raises(gs.SurgeryError, match=r"state of schedule does not fit.*another schedule"):
        same_width.load(path)
    best = gs.validators.Best("snd")
    same_width.schedule.total_steps = 20
    with pytest.raises(gs.SurgeryError, match="state of best does not fit"):
        gs.load_run(
            path,
            same_width.model,
            same_width.optimizer,
            schedule=same_width.schedule,
            pairs=same_width.pairs,
            best=best,
        )
    assert same(snapshot(other)[:-3], narrow[:-3])
    assert same(snapshot(same_width), before)


def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path) -> None:
    class Odd:
        def state_dict(self) -> dict[str, Any]:
            return {"loop": run}

        def load_state_dict(self, state: object) -> None: ...

    run = Run()
    with pytest.raises(gs.SurgeryError, match="hook= is a Run, which has no state_dict"):
        gs.save_run(tmp_path / "run.pt", run.model, hook=run)
    with pytest.raises(gs.SurgeryError, match="state of odd= cannot be stored"):
        gs.save_run(tmp_path / "run.pt", run.model, odd=Odd())
    with pytest.raises(gs.SurgeryError, match="there is no folder"):
        gs.save_run(tmp_path / "none" / "run.pt", run.model)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    run = Run()
    run.save(tmp_path / "run.pt")
    with pytest.raises(gs.SurgeryError, match=r"there is no run .*rum\.pt.*\n.*nearest: run\.pt"):
        run.load(tmp_path / "rum.pt")
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(gs.SurgeryError, match="was not written by save_run"):
        run.load(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(gs.SurgeryError, match="cannot be read as a run"):
        run.load(tmp_path / "text.pt")


TWO = """
import sys, torch, torch.distributed as dist
from torch.utils.data import DataLoader
import grl_surgery as gs
dist.init_process_group("gloo")
def make():
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    pairs = gs.paired(*(DataLoader(list(range(n)), 2, shuffle=True) for n in (9, 6)))
    return model, pairs
model, pairs = make()
torch.manual_seed(dist.get_rank())
[next(pairs) for _ in range(3)]
gs.save_run(sys.argv[1], model, pairs=pairs, step=3)
expected = [torch.rand(1).item(), *map(str, (next(pairs) for _ in range(4)))]
other, again = make()
assert gs.load_run(sys.argv[1], other, pairs=again) == {"step": 3}
found = [torch.rand(1).item(), *map(str, (next(again) for _ in range(4)))]
assert found == expected, (found, expected)
shares = [None, None]
dist.all_gather_object(shares, found)
assert shares[0] != shares[1]
dist.destroy_process_group()
"""


def test_two_processes_resume_each_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    where = ["--rdzv-endpoint", "127.0.0.1:0", str(tmp_path / "two.py"), str(tmp_path / "run.pt")]
    done = subprocess.run([sys.executable, *launch, *where], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with pytest.raises(gs.SurgeryError, match="written by 2 processes, and 1 would read it"):
        gs.load_run(tmp_path / "run.pt", nn.Linear(2, 2))
