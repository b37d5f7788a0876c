"""Thirty networks: the head that is made by itself reads the channels and keeps the batch.

The oracle knows the two axes by hand. It perturbs one sample and one channel of the value at the point, and
looks at what the classifier gets.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import grl_surgery as gs


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    point: str
    batch: int  # the axis of the value at the point that is the batch
    channels: int  # the one that holds the channels
    samples: int  # how many samples there are


def noise(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))


def words(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(1, 30, shape, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------- written as in research


class M5(nn.Module):
    """A waveform network: (B, 1, T)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(1, 8, 16, stride=4), nn.BatchNorm1d(8)
        self.conv2, self.bn2 = nn.Conv1d(8, 12, 3), nn.BatchNorm1d(12)
        self.pool, self.fc = nn.MaxPool1d(4), nn.Linear(12, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool1d(x, x.shape[-1]).permute(0, 2, 1)
        return F.log_softmax(self.fc(x), dim=2).squeeze(1)


class TCN(nn.Module):
    """Dilated residual blocks over a time series (B, T, sensors)."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Conv1d(9, 16, 1)
        self.blocks = nn.ModuleList(nn.Conv1d(16, 16, 3, padding=2**n, dilation=2**n) for n in range(3))
        self.out = nn.Linear(16, 6)

    def forward(self, x):
        h = self.lift(x.transpose(1, 2))
        for block in self.blocks:
            h = h + torch.relu(block(h))
        return self.out(h[:, :, -1])


class EEGNet(nn.Module):
    """(B, electrodes, T), as an image of one channel inside."""

    def __init__(self):
        super().__init__()
        self.temporal = nn.Conv2d(1, 4, (1, 15), padding=(0, 7), bias=False)
        self.spatial = nn.Conv2d(4, 8, (6, 1), groups=4, bias=False)
        self.norm, self.pool = nn.BatchNorm2d(8), nn.AvgPool2d((1, 4))
        self.out = nn.LazyLinear(3)

    def forward(self, x):
        h = self.spatial(self.temporal(x[:, None]))
        return self.out(self.pool(F.elu(self.norm(h))).flatten(1))


def eegnet() -> nn.Module:
    model = EEGNet()
    model(torch.randn(2, 6, 64))
    return model


class ConvRecurrent(nn.Module):
    """Spectrogram, convolution, LSTM, as speech networks do it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Hardtanh())
        self.rnn, self.out = nn.LSTM(4 * 10, 12, bidirectional=True, batch_first=True), nn.Linear(24, 9)

    def forward(self, spectrogram):
        h = self.conv(spectrogram)
        b, c, f, t = h.shape
        h, _ = self.rnn(h.permute(0, 3, 1, 2).reshape(b, t, c * f))
        return self.out(h).log_softmax(-1)


class SequenceFirst(nn.Module):
    """torch's own default order: (T, B, C)."""

    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(30, 7), kind(7, 10, num_layers=2), nn.Linear(10, 4)

    def forward(self, ids):
        return self.out(self.rnn(self.embed(ids))[0][-1])


class LastHidden(nn.Module):
    """Classifies the last hidden state (layers, B, C)."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(5, 10, num_layers=2, batch_first=True), nn.Linear(10, 4)

    def forward(self, x):
        _, hidden = self.rnn(x)
        return self.out(hidden[-1])


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.norm, self.out = nn.LSTM(5, 8, batch_first=True), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        values, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.out(self.norm(values).mean(1))


class Translator(nn.Module):
    """nn.Transformer, sequence first."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(30, 8), nn.Embedding(30, 8)
        self.transformer, self.out = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0), nn.Linear(8, 30)

    def forward(self, source, target):
        return self.out(self.transformer(self.source(source), self.target(target)))


class PatchSeries(nn.Module):
    """Patches of a time series as tokens, channel by channel (B, V, L)."""

    def __init__(self):
        super().__init__()
        self.patch, self.position = nn.Linear(8, 12), nn.Parameter(torch.randn(4, 12))
        self.encoder = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, dropout=0.0)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        tokens = self.patch(x.mean(1).unfold(1, 8, 8)) + self.position
        return self.out(self.encoder(tokens).mean(1))


class Perceives(nn.Module):
    """Attention by hand, as in a notebook."""

    def __init__(self):
        super().__init__()
        self.qkv, self.project, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        h = (q @ k.transpose(-2, -1) / 2.0).softmax(-1) @ v
        return self.out(self.norm(x + self.project(h.transpose(1, 2).reshape(b, n, c))).mean(1))


class GraphConv(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.lin = nn.Linear(width, out)

    def forward(self, x, edges):
        return torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]) @ self.lin.weight.t() + self.lin.bias


class MeanOfGraph(nn.Module):
    def forward(self, x, batch, graphs):
        total = x.new_zeros(graphs, x.shape[1]).index_add(0, batch, x)
        return total / torch.bincount(batch, minlength=graphs)[:, None]


class GCN(nn.Module):
    """Nodes of several graphs in one table, and a vector that says which graph each is of."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.readout = GraphConv(5, 7), GraphConv(7, 6), MeanOfGraph()
        self.out = nn.Linear(6, 2)

    def forward(self, x, edges, batch):
        h = torch.relu(self.conv2(torch.relu(self.conv1(x, edges)), edges))
        return self.out(self.readout(h, batch, int(batch.max()) + 1))


def graphs() -> tuple[Tensor, Tensor, Tensor]:
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [1, 0, 3, 2, 5, 4, 6]])
    return noise(7, 5)(), edges, torch.tensor([0, 0, 1, 1, 1, 2, 2])


class PointCloud(nn.Module):
    """Shared layers over points (B, 3, N) and the largest over them."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 12, 1))
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        return self.out(self.mlp(x).max(2)[0])


class UNet(nn.Module):
    def __init__(self, dims):
        super().__init__()
        conv, up = getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")
        self.down, self.pool = conv(1, 4, 3, padding=1), getattr(nn, f"MaxPool{dims}d")(2)
        self.middle, self.up, self.out = conv(4, 6, 3, padding=1), up(6, 4, 2, stride=2), conv(8, 2, 1)

    def forward(self, x):
        first = F.relu(self.down(x))
        middle = F.relu(self.middle(self.pool(first)))
        return self.out(torch.cat([first, self.up(middle)], 1))


class Yolo(nn.Module):
    """A grid of boxes."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.1), nn.Conv2d(8, 12, 3, 2, 1)
        )
        self.detect = nn.Conv2d(12, 2 * 7, 1)

    def forward(self, x):
        h = self.detect(self.backbone(x))
        return h.view(x.shape[0], 2, 7, *h.shape[2:]).permute(0, 1, 3, 4, 2)


class VoxelNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4), nn.PReLU(), nn.Conv3d(4, 6, 3, 2)
        )
        self.pool, self.out = nn.AdaptiveAvgPool3d(1), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.pool(self.features(x)).flatten(1))


class VideoLSTM(nn.Module):
    """Frames through a CNN, then in time: (B, T, 3, H, W)."""

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.rnn, self.out = nn.LSTM(6, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, clips):
        b, t = clips.shape[:2]
        frames = self.cnn(clips.flatten(0, 1)).view(b, t, -1)
        return self.out(self.rnn(frames)[0][:, -1])


# -------------------------------------------------------------------------------------------- of libraries


def small(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        kind = getattr(transformers, f"{name}Config")
        return getattr(transformers, f"{name}Model")(kind(**settings))

    return make


TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
}
SPEECH = {
    **{key: value for key, value in TEXT.items() if key != "vocab_size"},
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 12,
}

CASES = {
    "cnn 1-D: waveforms": Case(M5, noise(3, 1, 200), "bn2", 0, 1, 3),
    "cnn 1-D: series": Case(TCN, noise(3, 40, 9), "blocks.2", 0, 1, 3),
    "cnn 1-D: point clouds": Case(PointCloud, noise(3, 3, 20), "mlp", 0, 1, 3),
    "cnn 2-D: eeg": Case(eegnet, noise(3, 6, 64), "norm", 0, 1, 3),
    "cnn 2-D: timm resnet": Case(
        lambda: timm.create_model("test_resnet"), noise(3, 3, 32, 32), "layer3", 0, 1, 3
    ),
    "cnn 2-D: timm efficientnet": Case(
        lambda: timm.create_model("test_efficientnet"), noise(3, 3, 32, 32), "blocks.2", 0, 1, 3
    ),
    "cnn 2-D: shufflenet": Case(
        lambda: torchvision.models.shufflenet_v2_x0_5(), noise(3, 3, 32, 32), "stage3", 0, 1, 3
    ),
    "cnn 2-D: mobilenet, pooled": Case(
        lambda: torchvision.models.mobilenet_v3_small(), noise(3, 3, 32, 32), "avgpool", 0, 1, 3
    ),
    "cnn 3-D: volumes": Case(VoxelNet, noise(3, 1, 9, 9, 9), "features", 0, 1, 3),
    "cnn 3-D: torchvision video": Case(
        lambda: torchvision.models.video.r3d_18(), noise(2, 3, 4, 16, 16), "layer1", 0, 1, 2
    ),
    "rnn: batch first, behind a cnn": Case(ConvRecurrent, noise(3, 1, 20, 16), "rnn[0]", 0, 2, 3),
    "rnn: sequence first": Case(SequenceFirst, words(9, 4), "rnn[0]", 1, 2, 4),
    "rnn: sequence first, gru": Case(lambda: SequenceFirst(nn.GRU), words(4, 4), "rnn[0]", 1, 2, 4),
    "rnn: hidden state": Case(LastHidden, noise(4, 9, 5), "rnn[1]", 1, 2, 4),
    "rnn: packed": Case(Packed, lambda: (noise(3, 7, 5)(), torch.tensor([7, 3, 5])), "norm", 0, 2, 3),
    "rnn: video": Case(VideoLSTM, noise(3, 4, 3, 12, 12), "rnn[0]", 0, 2, 3),
    "transformer, text: bert": Case(small("Bert", **TEXT), words(3, 9), "encoder[0]", 0, 2, 3),
    "transformer, text: distilbert": Case(
        small("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=40),
        words(3, 9),
        "embeddings",
        0,
        2,
        3,
    ),
    "transformer, text: gpt2": Case(
        small("GPT2", n_embd=16, n_layer=2, n_head=2, vocab_size=40), words(3, 9), "ln_f", 0, 2, 3
    ),
    "transformer, text: sequence first": Case(
        Translator, lambda: (words(7, 4)(), words(5, 4)()), "transformer", 1, 2, 4
    ),
    "transformer, series": Case(PatchSeries, noise(3, 2, 32), "encoder", 0, 2, 3),
    "transformer, by hand": Case(Perceives, noise(3, 6, 8), "norm", 0, 2, 3),
    "transformer, vision: timm vit": Case(
        lambda: timm.create_model("test_vit"), noise(3, 3, 160, 160), "blocks.2", 0, 2, 3
    ),
    "transformer, vision: timm swin": Case(
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1, 1), embed_dim=24
        ),
        noise(2, 3, 56, 56),
        "layers.1",
        0,
        3,
        2,
    ),
    "transformer, vision: torchvision vit": Case(
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5),
        noise(3, 3, 32, 32),
        "encoder",
        0,
        2,
        3,
    ),
    "transformer, vision: torchvision swin": Case(
        lambda: torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4], num_classes=5),
        noise(2, 3, 32, 32),
        "features",
        0,
        3,
        2,
    ),
    "transformer, audio: wav2vec2": Case(small("Wav2Vec2", **SPEECH), noise(3, 400), "encoder[0]", 0, 2, 3),
    "transformer, audio: hubert, before": Case(
        small("Hubert", **SPEECH), noise(3, 400), "feature_extractor", 0, 1, 3
    ),
    "transformer, audio: spectrograms": Case(
        small("AST", **TEXT, num_mel_bins=32, max_length=64, patch_size=16),
        noise(3, 64, 32),
        "layernorm",
        0,
        2,
        3,
    ),
    "gnn: graphs": Case(GCN, graphs, "readout", 0, 1, 3),
    "detector: grid": Case(Yolo, noise(3, 3, 32, 32), "backbone", 0, 1, 3),
    "detector: retinanet": Case(
        lambda: torchvision.models.detection.retinanet_resnet50_fpn(
            weights=None, weights_backbone=None, min_size=64, max_size=64
        ),
        lambda: ([noise(3, 64, 64)() for _ in range(3)],),
        "backbone.body.layer2",
        0,
        1,
        3,
    ),
    "detector: ssd": Case(
        lambda: torchvision.models.detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None
        ),
        lambda: ([noise(3, 64, 64)() for _ in range(2)],),
        "backbone.features.0",
        0,
        1,
        2,
    ),
    "u-net 1-D": Case(lambda: UNet(1), noise(3, 1, 32), "middle", 0, 1, 3),
    "u-net 2-D": Case(lambda: UNet(2), noise(3, 1, 16, 16), "up", 0, 1, 3),
    "u-net 3-D": Case(lambda: UNet(3), noise(3, 1, 8, 8, 8), "cat", 0, 1, 3),
    "segmentation: lraspp": Case(
        lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None
        ),
        noise(2, 3, 64, 64),
        "backbone.16",
        0,
        1,
        2,
    ),
}


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


class Seen:
    """What a head was called with, what its classifier got, and what it answered."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        head.register_forward_hook(lambda _, args, output: self.keep(args[0], output))
        head.classifier.register_forward_pre_hook(lambda _, args: setattr(self, "vector", args[0].detach()))

    def keep(self, feature: Tensor, logits: Tensor) -> None:
        self.feature, self.logits = feature.detach().clone(), logits.detach()

    def at(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.head(feature)
        return self.vector, self.logits


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # of torch's, where nn.Transformer is made
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_head_that_is_made_by_itself_reads_the_channels_and_keeps_the_batch(case: Case) -> None:
    model, inputs = case.make().eval(), case.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left open
        m = gs.attach_domain_head(model, case.point, hidden=8, example_inputs=inputs).eval()
    seen = Seen(m.domain)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad():
        m(*given)
    feature = seen.feature
    vector, logits = seen.at(feature)
    assert vector.shape == (case.samples, feature.shape[case.channels])
    assert logits.shape == (case.samples, 2)
    for sample in range(case.samples):  # one sample changes its own row, and nothing else
        changed = feature.clone()
        changed.select(case.batch, sample).add_(torch.randn_like(changed.select(case.batch, sample)))
        other, _ = seen.at(changed)
        rows = (other != vector).any(1)
        assert rows.nonzero().flatten().tolist() == [sample]
    for channel in {0, feature.shape[case.channels] // 2, feature.shape[case.channels] - 1}:
        changed = feature.clone()
        changed.select(case.channels, channel).add_(1.0)
        other, _ = seen.at(changed)
        expected = vector.clone()
        expected[:, channel] += 1.0
        torch.testing.assert_close(other, expected, atol=1e-4, rtol=1e-4)


def test_there_are_thirty_networks_of_every_kind() -> None:
    assert len(CASES) >= 30
    kinds = {name.partition(":")[0] for name in CASES}
    assert kinds >= {"cnn 1-D", "cnn 2-D", "cnn 3-D", "transformer, text", "transformer, vision"}
    assert kinds >= {"transformer, audio", "rnn", "gnn", "detector", "u-net 1-D", "u-net 2-D", "u-net 3-D"}
