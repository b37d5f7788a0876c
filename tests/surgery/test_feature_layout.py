"""Heads on features of every layout: which axis is the batch, which the channels, and what is left open."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode

import grl_surgery as gs


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM, batch_first=False, **options):
        super().__init__()
        self.embed = nn.Linear(6, 5)
        self.rnn = kind(5, 8, batch_first=batch_first, **options)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        values, _ = self.rnn(self.embed(x))
        return self.out(values)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(6, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        values, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.out(self.norm(values))


class Tokens(nn.Module):
    """Word numbers, an embedding, an encoder of either order."""

    def __init__(self, batch_first):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(8, 3)

    def forward(self, ids):
        return self.out(self.encoder(self.embed(ids)))


class Attends(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.before = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x):
        h = self.before(x)
        return self.attention(h, h, h)[0]


class Spectrogram(nn.Module):
    """Frames through a convolution and, channels last, through linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(10, 16, 3, stride=2), nn.BatchNorm1d(16), nn.GELU()
        self.project, self.out = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x):
        h = self.act(self.norm(self.conv(x))).transpose(1, 2)
        return self.out(F.relu(self.project(h)).mean(1))


class UNet(nn.Module):
    def __init__(self, conv=nn.Conv2d, up=nn.ConvTranspose2d, pool=nn.MaxPool2d):
        super().__init__()
        self.down, self.pool, self.mid = conv(1, 4, 3, padding=1), pool(2), conv(4, 6, 3, padding=1)
        self.up, self.out = up(6, 4, 2, stride=2), conv(8, 2, 1)

    def forward(self, x):
        first = F.relu(self.down(x))
        return self.out(torch.cat([first, self.up(F.relu(self.mid(self.pool(first))))], 1))


class ChannelsLast(nn.Module):
    """Blocks on (B, H, W, C), as in swin."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.norm, self.mlp, self.out = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.patches(x).permute(0, 2, 3, 1)
        h = h + self.mlp(self.norm(h))
        return self.out(h.mean((1, 2)))


class Handmade(nn.Module):
    """A layer of one's own over (B, C, L): no layer of torch says anything, but the length can vary."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 5))
        self.block = nn.Identity()

    def forward(self, x):
        return self.block(torch.einsum("ncl,dc->ndl", x, self.weight))


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    point: str
    channels: int
    vector: Callable[[Any], Tensor]  # what a head ought to classify, written by hand
    batch: int = 0  # the axis of the input


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def over(*axes):
    return lambda value: value.mean(axes)


series, frames, image, volume = randn(4, 9, 32), randn(4, 10, 24), randn(2, 3, 16, 16), randn(2, 1, 8, 8, 8)
steps, batch = randn(7, 4, 6), randn(4, 7, 6)
words = torch.arange(28).reshape(7, 4) % 20


def cnn1d():
    return nn.Sequential(
        nn.Conv1d(9, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    )


CASES = [
    *(Case(cnn1d, (series,), point, 16, over(2)) for point in "0123"),
    Case(cnn1d, (series,), "4", 16, lambda v: v),
    Case(cnn1d, (randn(9, 9, 9),), "2", 16, over(2)),
    Case(Spectrogram, (frames,), "act", 16, over(2)),
    Case(Spectrogram, (frames,), "transpose", 16, over(1)),
    Case(Spectrogram, (frames,), "project", 12, over(1)),
    Case(Spectrogram, (frames,), "relu", 12, over(1)),
    *(
        Case(Recurrent, (steps,), point, c, over(0), 1)
        for point, c in (("rnn[0]", 8), ("embed", 5), ("out", 3))
    ),
    *(
        Case(lambda: Recurrent(batch_first=True), (batch,), p, c, over(1))
        for p, c in (("rnn[0]", 8), ("out", 3))
    ),
    Case(Recurrent, (randn(4, 4, 6),), "rnn[0]", 8, over(0), 1),
    Case(lambda: Recurrent(num_layers=3), (steps,), "rnn[1][0]", 8, over(0), 1),
    Case(lambda: Recurrent(num_layers=3, batch_first=True), (batch,), "rnn[1][1]", 8, over(0)),
    Case(lambda: Recurrent(nn.GRU), (steps,), "rnn[1]", 8, over(0), 1),
    Case(lambda: Recurrent(nn.RNN, batch_first=True), (batch,), "rnn[0]", 8, over(1)),
    Case(Packed, (batch, torch.tensor([7, 3, 5, 2])), "norm", 8, over(1)),
    *(
        Case(lambda: Tokens(False), (words,), p, 8, over(0), 1)
        for p in ("embed", "encoder", "encoder.layers.0")
    ),
    *(Case(lambda: Tokens(True), (words.t(),), p, 8, over(1)) for p in ("embed", "encoder")),
    Case(lambda: Attends(False), (steps,), "attention[0]", 8, over(0), 1),
    Case(lambda: Attends(True), (batch,), "attention[0]", 8, over(1)),
    Case(UNet, (randn(2, 1, 8, 16),), "up", 4, over(2, 3)),
    Case(UNet, (randn(2, 1, 8, 16),), "cat", 8, over(2, 3)),
    Case(lambda: UNet(nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d), (volume,), "pool", 4, over(2, 3, 4)),
    Case(lambda: UNet(nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d), (volume,), "up", 4, over(2, 3, 4)),
    Case(ChannelsLast, (image,), "norm", 8, over(1, 2)),
    Case(ChannelsLast, (image,), "add", 8, over(1, 2)),
    Case(ChannelsLast, (image,), "patches", 8, over(2, 3)),
    Case(Handmade, (randn(4, 5, 9),), "block", 7, over(2)),
    Case(
        lambda: timm.create_model("test_vit"),
        (randn(2, 3, 160, 160),),
        "blocks.1",
        64,
        lambda v: v[:, 1:].mean(1),
    ),
    Case(lambda: timm.create_model("test_convnext"), (randn(2, 3, 64, 64),), "stages.2", 48, over(2, 3)),
]


def value_at(model: nn.Module, inputs: tuple[Tensor, ...], point: str) -> Any:
    """The value at a module's point by a hook; an operation's by what the case's class computes."""
    name, *items = re.findall(r"[^\[\]]+", point)
    seen: dict[str, Any] = {}
    children = dict(model.named_modules())
    if name in children:
        handle = children[name].register_forward_hook(lambda m, a, o: seen.update(value=o))
        model(*inputs)
        handle.remove()
    else:
        (x,) = inputs
        seen["value"] = {
            "transpose": lambda: model.act(model.norm(model.conv(x))).transpose(1, 2),
            "relu": lambda: F.relu(model.project(value_at(model, inputs, "transpose"))),
            "cat": lambda: torch.cat([F.relu(model.down(x)), value_at(model, inputs, "up")], 1),
            "add": lambda: (p := model.patches(x).permute(0, 2, 3, 1)) + model.mlp(model.norm(p)),
        }[name]()
    value = seen["value"]
    for item in items:
        value = value[int(item)]
    return value


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{type(c.make()).__name__}-{c.point}-{tuple(c.inputs[0].shape)}"
)
def test_the_head_reads_the_channels_and_answers_once_for_each_sample(case: Case) -> None:
    model = case.make().eval()
    m = gs.attach_domain_head(model, case.point, hidden=16, dropout=0.0, example_inputs=case.inputs).eval()
    assert m.domain.layout.channels == case.channels
    assert not m.domain.layout.ambiguous
    logits = m(*case.inputs)[1]
    vectors = case.vector(value_at(model, case.inputs, case.point))
    torch.testing.assert_close(logits, m.domain.classifier(vectors))
    x = case.inputs[0]
    size = x.shape[case.batch]
    assert logits.shape == (size, 2)
    other = x.clone()
    row = other.select(case.batch, 1)
    row.copy_(row + torch.randn_like(row) if row.is_floating_point() else (row + 1) % 20)
    changed = (m(other, *case.inputs[1:])[1] != logits).any(1)
    assert changed.tolist() == [row == 1 for row in range(size)]


def test_the_length_of_a_sequence_may_differ_from_the_one_the_head_was_sized_with() -> None:
    model = nn.Sequential(nn.Conv1d(9, 16, 5), nn.ReLU())
    m = gs.attach_domain_head(model, "1", hidden=8, example_inputs=randn(4, 9, 32))
    assert m(randn(3, 9, 100))[1].shape == (3, 2)


class Windows(nn.Module):
    """The rows of ``inner`` are pieces of samples."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(6, 8), nn.Linear(8, 2)
        self.table = nn.Embedding(5, 8)

    def forward(self, x):
        pieces = self.inner(x.reshape(-1, 6))
        positions = self.table(torch.arange(x.shape[1]))
        return self.out(pieces.reshape(len(x), -1, 8) + positions)


@pytest.mark.parametrize(
    ("point", "found"),
    [
        (
            "inner",
            r"\(20, 8\) becomes \(25, 8\) with one more sample in the batch of 4: its rows are not samples",
        ),
        ("table", r"\(5, 8\) does not change with the size of the batch"),
    ],
)
def test_a_head_whose_rows_are_not_the_batch_is_refused_at_once(point: str, found: str) -> None:
    model, x = Windows(), randn(4, 5, 6)
    with pytest.raises(gs.ShapeError, match=rf"(?s){found}.*pool='nc'"):
        gs.attach_domain_head(model, point, example_inputs=x)
    m = gs.attach_domain_head(model, "inner", pool="nc", hidden=8, example_inputs=x)
    assert m(x)[1].shape == (20, 2)


def test_a_pool_that_reads_another_axis_as_the_batch_is_refused_with_the_right_one() -> None:
    with pytest.raises(
        gs.ShapeError, match=r"(?s)pool='nlc' reads axis 0 of \(7, 4, 8\) as the batch, but axis 1.*lnc"
    ):
        gs.attach_domain_head(Recurrent(), "rnn[0]", pool="nlc", example_inputs=steps)


def test_reading_the_layout_leaves_the_network_and_the_generators_as_they_were() -> None:
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.calls = nn.Conv1d(9, 4, 3), nn.BatchNorm1d(4), 0
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.total += 1
            return F.dropout(self.norm(self.conv(x)), 0.5)

    model = Counts()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    gs.attach_domain_head(model, "norm", hidden=8, example_inputs=series)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (model.calls, float(model.total), int(model.norm.num_batches_tracked)) == (0, 0.0, 0)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class LastStep(nn.Module):
    """A classifier of one's own for sequence-first features."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 2)

    def forward(self, value):
        return self.fc(value[-1])


def test_a_classifier_of_ones_own_may_read_a_sequence_first_feature_as_it_is() -> None:
    model = Recurrent()
    m = gs.attach_domain_head(model, "rnn[0]", classifier=LastStep(), pool="none", example_inputs=steps)
    expected = m.domain.classifier.fc(value_at(model, (steps,), "rnn[0]")[-1])
    torch.testing.assert_close(m(steps)[1], expected)
    with pytest.raises(gs.ShapeError, match=r"logits of shape \(7, 2\), but this head needs \(4, 2\)"):
        gs.attach_domain_head(
            model,
            "rnn[0]",
            classifier=nn.Sequential(nn.Flatten(1), nn.LazyLinear(2)),
            pool="none",
            example_inputs=steps,
        )


class _RunsWithData(TorchFunctionMode):
    """Counts convolutions and linear layers that compute on values, and what runs on fake tensors."""

    def __init__(self):
        super().__init__()
        self.real = self.fake = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if getattr(func, "__name__", "") in ("conv2d", "linear") and tensors:
            self.fake += type(tensors[0]).__name__ == "FakeTensor"
            self.real += type(tensors[0]).__name__ != "FakeTensor" and tensors[0].device.type != "meta"
        return func(*args, **(kwargs or {}))


class Looks(nn.Module):
    """A forward that looks at values, so that it can only be run on real ones."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.second(self.first(x)) if x.mean() < 1e9 else x


def test_a_head_is_sized_without_computing_anything_and_without_slow_fake_tensors() -> None:
    with _RunsWithData() as runs:
        gs.attach_domain_head(
            timm.create_model("test_resnet"), "layer3", hidden=8, example_inputs=randn(2, 3, 32, 32)
        )
    assert (runs.real, runs.fake) == (0, 0)


def test_a_network_that_looks_at_values_runs_as_often_as_needed_and_no_further_than_the_point() -> None:
    model = Looks()
    with _RunsWithData() as runs:
        m = gs.attach_domain_head(model, "first", hidden=8, example_inputs=randn(3, 6))
    assert m.domain.layout.name == "nc"
    assert runs.real <= 2 * 3  # its shape, its axes, and one more sample
