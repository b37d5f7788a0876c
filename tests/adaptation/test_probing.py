"""Where to cut: planted truths, scikit-learn's numbers, names that surgery takes, nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import grl_surgery as gs
from grl_surgery.adaptation.probing import recorded_points


class Planted(nn.Module):
    """Inputs (class one-hot, domain, noise): ``without`` drops the domain, ``noise`` both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6, bias=False)
        self.without = nn.Linear(6, 6, bias=False)
        self.noise = nn.Linear(6, 6, bias=False)
        self.classify = nn.Linear(6, 3)
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(6))
            self.without.weight.copy_(torch.diag(torch.tensor([1.0, 1, 1, 0, 1, 1])))
            self.noise.weight.copy_(torch.diag(torch.tensor([0.0, 0, 0, 0, 1, 1])))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.noise(self.without(self.stem(x))))


def planted(domain: float, count: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    noise = torch.randn(count, 6, generator=generator) * 0.3
    noise[:, :3] += nn.functional.one_hot(labels, 3)
    noise[:, 3] += domain
    return noise, labels


def loader(domain: float, seed: int, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*planted(domain, seed=seed)), 50, **options)


@pytest.fixture
def found() -> Any:
    return gs.suggest_points(Planted(), loader(0.0, 0), loader(1.5, 1))


def test_planted_features_are_read_where_they_are_and_nowhere_else(found: Any) -> None:
    scores = {score.point: score for score in found.points}
    assert list(scores) == ["stem", "without", "noise", "classify"]
    assert scores["stem"].a_distance > 1.9
    assert scores["stem"].class_accuracy > 0.85
    assert scores["without"].class_accuracy > 0.85
    assert abs(scores["noise"].class_accuracy - 1 / 3) < 4 * scores["noise"].class_accuracy_error
    for point in ("without", "noise"):
        assert abs(scores[point].a_distance) < 4 * scores[point].a_distance_error
    assert found.recommended == "stem"
    assert found.samples == (400, 400)


def test_the_recommended_point_is_where_the_classes_are_read_and_the_domains_apart() -> None:
    # Before ``mix``, only the domain is linear in the features; the classes are a product of two of them.
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix, self.classify = nn.Identity(), Squares(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.classify(self.mix(self.stem(x)))

    class Squares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x[:, :1] * x[:, 1:2]], dim=1)

    def samples(domain: float) -> TensorDataset:
        x = torch.randn(600, 3, generator=torch.Generator().manual_seed(int(domain)))
        return TensorDataset(x + torch.tensor([0.0, 0.0, domain]), (x[:, 0] * x[:, 1] > 0).long())

    found = gs.suggest_points(Product(), DataLoader(samples(0.0), 60), DataLoader(samples(5.0), 60))
    assert {score.point: score.a_distance for score in found.points}["stem"] > 1.9
    assert found.recommended == "mix"
    assert "the classes are read as well as anywhere" in found.reason


def test_the_probe_agrees_with_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    source, target = (torch.randn(600, 20, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    target = target + 0.15
    found = gs.suggest_points(nn.Sequential(nn.Identity(), nn.Linear(20, 2)), source, target)
    held_out = torch.arange(600) // 38 % 2 == 1  # sixteen batches
    x = torch.cat([source[~held_out], target[~held_out]]).numpy()
    y = torch.arange(len(x)).ge(int((~held_out).sum())).long().numpy()
    peer = linear_model.RidgeClassifier(alpha=0.1).fit(x, y)
    errors = [
        (peer.predict(domain[held_out].numpy()) != k).mean() for k, domain in enumerate((source, target))
    ]
    score = found.points[0]
    assert score.a_distance == pytest.approx(2 * (1 - sum(errors)), abs=0.05)
    assert 0.05 < score.a_distance_error < 0.2


def test_domains_that_are_alike_give_no_point_and_the_error_bar_covers_zero() -> None:
    outside = 0
    for seed in range(20):
        found = gs.suggest_points(Planted(), planted(0.0, seed=seed)[0], planted(0.0, seed=seed + 100)[0])
        outside += abs(found.points[0].a_distance) > 2 * found.points[0].a_distance_error
    assert outside <= 4
    alike = gs.suggest_points(Planted(), planted(0.0, seed=0)[0], planted(0.0, seed=0)[0])
    assert alike.recommended is None
    assert "nothing that a domain head could remove" in str(alike)


def test_labels_of_the_target_are_never_looked_at() -> None:
    inputs, labels = planted(1.5, seed=1)
    shuffled = labels[torch.randperm(len(labels))]
    model = Planted()
    with_labels, with_wrong, without = (
        gs.suggest_points(model, loader(0.0, 0), DataLoader(data, 50))  # type: ignore[arg-type]
        for data in (TensorDataset(inputs, labels), TensorDataset(inputs, shuffled), TensorDataset(inputs))
    )
    assert with_labels == with_wrong == without


def test_without_labels_the_last_point_where_the_domains_are_apart_is_taken() -> None:
    found = gs.suggest_points(Planted(), planted(0.0)[0], planted(1.5, seed=1)[0])
    assert found.recommended == "stem"
    assert found.points[0].class_accuracy is None


class Unusual(nn.Module):
    """A tuple, a second call, a sequence with the batch second, integers, and another batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 5)
        self.ids = Argmax()
        self.windows = Unfolded()
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x))
        self.ids(x)
        sequence, _ = self.lstm(torch.stack([x, x, x]))
        self.windows(x)
        return self.out(sequence[-1])


class Argmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class Unfolded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 2)


def test_unusual_values_are_read_where_they_can_be_and_named_where_not() -> None:
    found = gs.suggest_points(Unusual(), torch.randn(40, 4), torch.randn(40, 4) + 2)
    assert [score.point for score in found.points] == ["twice#1", "twice#2", "lstm[0]", "out"]
    assert found.skipped["ids"].endswith("of torch.int64, not floating point")
    assert "no axis of the" in found.skipped["windows"]
    assert "not measured: windows" in str(found)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_every_point_of_a_timm_network_is_one_that_surgery_takes(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=3)
    images = torch.randn(8, 3, 64, 64) if name != "test_vit" else torch.randn(8, 3, 160, 160)
    found = gs.suggest_points(model, images, images + 1.0)
    assert 5 < len(found.points) <= 40
    assert found.points[-1].is_output
    assert found.recommended != found.points[-1].point
    for score in found.points:
        assert len(gs.reversals(gs.insert_grl(model, after=score.point))) == 1, score.point


def test_transformers_take_batches_by_name() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertForSequenceClassification(config)

    def batches(low: int) -> list[dict[str, Tensor]]:
        ids = torch.randint(low, low + 25, (4, 16, 7), generator=torch.Generator().manual_seed(low))
        return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i[:, 0] % 2} for i in ids]

    found = gs.suggest_points(model, batches(0), batches(25))
    assert found.recommended is not None
    assert gs.reversals(gs.insert_grl(model, after=found.recommended))
    assert found.points[0].class_accuracy is not None


def test_the_network_and_the_random_state_are_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, data = torch.get_rng_state(), torch.randn(4, 16, 4)
    state = torch.get_rng_state()
    gs.suggest_points(model, DataLoader(TensorDataset(data[0]), 4, shuffle=True), data[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    with pytest.raises(gs.SurgeryError, match="does not run on inputs of"):
        gs.suggest_points(model, torch.randn(9, 5), torch.randn(9, 5))
    assert model.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_depth_and_points_say_what_is_looked_at() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    data = torch.randn(20, 4), torch.randn(20, 4)
    names = lambda **options: [s.point for s in gs.suggest_points(model, *data, **options).points]  # noqa: E731
    assert names() == ["0.0", "0.1", "0", "1"]
    assert names(depth=1) == ["0", "1"]
    assert names(points="0.1") == ["0.1"]
    assert recorded_points(model, data[0]) == [("0", (20, 4), False), ("1", (20, 2), True)]
    with pytest.raises(gs.PointNotFoundError, match=r"(?s)name '0\.2'.*nearest: 0\.1"):
        names(points="0.2")


def test_a_table_a_dict_and_a_plot(found: Any, tmp_path: Path) -> None:
    lines = str(found).splitlines()
    assert lines[0].split() == ["point", "type", "channels", "A-distance", "class", "accuracy"]
    assert lines[1].startswith("* stem")
    assert "classify (output)" in str(found)
    plain = found.to_dict()
    assert plain["points"][0]["point"] == plain["recommended"] == "stem"
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "points.png")
    assert (tmp_path / "points.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.randn(5, 6), "source gave 5 samples, and a probe needs at least 8"),
        ([], "source gave 0 samples"),
        (3, "source is a int, which gives no batches"),
        ([("a", "b")] * 9, "a batch holds str, and no tensor"),
    ],
)
def test_data_that_cannot_be_probed_is_refused_by_name(source: Any, message: str) -> None:
    with pytest.raises(gs.SurgeryError, match=message):
        gs.suggest_points(Planted(), source, torch.randn(9, 6))


FILE = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def data():
    torch.manual_seed(1)
    labels = torch.arange(200) % 3
    source = torch.randn(200, 4) + 2 * nn.functional.one_hot(labels, 4)
    batches = list(zip(source.split(20), labels.split(20)))
    return batches, [(x + torch.tensor([0, 0, 0, 4.0]),) for x in source.split(20)]
"""


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "mine.py").write_text(FILE)
    probe = [sys.executable, "-m", "grl_surgery", "probe", "mine.py:network", *arguments]
    return subprocess.run(probe, cwd=folder, capture_output=True, text=True, check=False)


def test_the_command_prints_the_table_and_writes_json(tmp_path: Path) -> None:
    done = command(tmp_path, "--data", "mine.py:data")
    assert done.returncode == 0, done.stderr
    assert "A-distance" in done.stdout
    assert "after='" in done.stdout


def test_the_command_refuses_data_that_is_none(tmp_path: Path) -> None:
    done = command(tmp_path, "--data", "mine.py:network")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "mine.py:network returned a Sequential" in done.stderr
