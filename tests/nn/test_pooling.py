"""Pools that know padding, heads with them, and logits at every place, in every format."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grl_surgery as gs

LENGTHS = [6, 2, 4]


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


def by_hand(pool: gs.FeaturePool, sequence: Tensor) -> Tensor:
    """What a pool makes of one sequence (L, C) without padding."""
    if pool.reduction == "mean":
        return sequence.mean(0)
    if pool.reduction == "max":
        return sequence.max(0).values
    if pool.reduction == "last":
        return sequence[-1]
    if pool.reduction == "statistics":
        return torch.cat([sequence.mean(0), sequence.std(0, correction=0)])
    scores = torch.exp(sequence @ pool.score.weight[0] + pool.score.bias)
    return (scores[:, None] * sequence).sum(0) / scores.sum()


@pytest.mark.parametrize("layout", ["nlc", "ncl", "lnc"])
@pytest.mark.parametrize("reduction", ["mean", "max", "last", "statistics", "attention"])
@pytest.mark.parametrize("kind", ["mask", "truths", "lengths", "padding", "broadcast", "none"])
def test_padding_changes_neither_the_result_nor_a_gradient(layout: Any, reduction: Any, kind: str) -> None:
    masked = {"padding": "padding", "none": None}.get(kind, "valid")
    pool = gs.FeaturePool(layout, reduction=reduction, channels=5, masked=masked)
    lengths = [6, 6, 6] if kind == "none" else LENGTHS
    valid = torch.arange(6) < torch.tensor(lengths)[:, None]
    second = {
        "mask": (valid.long(),),
        "truths": (valid,),
        "lengths": (torch.tensor(lengths),),
        "padding": (~valid,),
        "broadcast": (valid[:, None, None],),
        "none": (),
    }[kind]
    x = torch.randn(3, 6, 5).masked_fill(~valid[..., None], float("nan")).requires_grad_()
    pooled = pool(torch.einsum(f"nlc->{layout}", x), *second)
    expected = torch.stack([by_hand(pool, row[:length]) for row, length in zip(x, lengths, strict=True)])
    torch.testing.assert_close(pooled, expected)
    (found,) = torch.autograd.grad(pooled.square().sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(found, wanted)
    assert found[~valid].abs().sum() == 0


def test_a_mask_from_before_strided_layers_is_read_at_the_same_relative_place() -> None:
    x = torch.randn(2, 4, 3)
    samples = torch.arange(40) < torch.tensor([40, 20])[:, None]
    pooled = gs.FeaturePool("nlc", masked="valid")(x, samples)
    torch.testing.assert_close(pooled, torch.stack([x[0].mean(0), x[1, :2].mean(0)]))


def test_statistics_of_a_constant_channel_send_back_no_nan() -> None:
    x = torch.ones(2, 4, 3, requires_grad=True)
    gs.FeaturePool("nlc", reduction="statistics")(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gs.FeaturePool("nchw", masked="valid"), "reads no positions of a sequence"),
        (lambda: gs.FeaturePool("nlc", reduction="attention"), "channels is None"),
        (lambda: gs.FeaturePool("nchw", reduction="last"), "only a sequence has a last position"),
        (lambda: gs.FeaturePool("nlc", masked="valid")(torch.ones(2, 3, 4)), "masked='valid' got no mask"),
        (lambda: gs.FeaturePool("nlc")(torch.ones(2, 3, 4), torch.ones(2, 3)), "masked=None got a mask"),
        (
            lambda: gs.FeaturePool("nlc", masked="valid")(torch.ones(2, 3, 4), torch.ones(5, 3)),
            r"a mask of shape \(5, 3\) for 2 sequences of length 3: expected \(2, 3\), or lengths \(2,\)",
        ),
    ],
)
def test_a_pool_that_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(gs.SurgeryError, match=message):
        make()


class Reader(nn.Module):
    """A text network that is told what is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(20, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.embed(ids)))
        weights = attention_mask[..., None].to(hidden.dtype)
        return self.out((hidden * weights).sum(1) / weights.sum(1))


def exported_and_loaded(m: nn.Module, model: nn.Module, inputs: Any, suffix: str, folder: Path) -> nn.Module:
    """The network after a round through a file, or through the code that a folder holds."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    path = gs.export(m, folder / ("written" if suffix == "folder" else f"m{suffix}"), inputs)
    if suffix == "folder":
        spec = importlib.util.spec_from_file_location("written", path / "model.py")
        written = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(written)
        return written.load(fresh).eval()
    return (gs.load(path) if suffix == ".pt2" else gs.load(path, model=fresh)).eval()


def text() -> tuple[Tensor, Tensor]:
    return torch.arange(18).reshape(3, 6), (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()


@pytest.mark.parametrize("pool", ["auto", "max", "statistics", "attention", "last"])
@pytest.mark.parametrize("suffix", ["", ".pt2", ".safetensors", "folder"])
def test_a_head_that_reads_the_networks_own_mask_survives_every_format(
    pool: Any, suffix: str, tmp_path
) -> None:
    model, (ids, mask) = Reader().eval(), text()
    m = gs.attach_domain_head(
        model, "tanh", pool=pool, mask="attention_mask", hidden=8, dropout=0.0, example_inputs=(ids, mask)
    ).eval()
    if suffix:
        again = exported_and_loaded(m, model, (ids, mask), suffix, tmp_path)
        torch.testing.assert_close(again(ids, mask), m(ids, mask))
        return
    other = torch.where(mask.bool(), ids, (ids + 7) % 20)  # other words where there is padding
    assert torch.equal(m(other, mask)[1], m(ids, mask)[1])
    assert not torch.equal(m((ids + 7) % 20, mask)[1], m(ids, mask)[1])
    hidden = torch.tanh(model.mix(model.embed(ids)))
    vectors = [by_hand(m.domain.pool, row[:length]) for row, length in zip(hidden, LENGTHS, strict=True)]
    torch.testing.assert_close(m(ids, mask)[1], m.domain.classifier(torch.stack(vectors)))
    assert gs.verify_flip(m, model, (ids, mask)).ok
    assert gs.strip(m).state_dict().keys() == model.state_dict().keys()


def test_a_mask_and_a_padding_are_one_thing() -> None:
    with pytest.raises(gs.SurgeryError, match="are one thing with opposite meanings"):
        gs.attach_domain_head(
            Reader(), "tanh", mask="attention_mask", padding="attention_mask", example_inputs=text()
        )


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("suffix", [".pt2", ".safetensors", "folder"])
def test_a_head_at_every_place_of_a_sequence_an_image_and_a_volume(dims: int, suffix: str, tmp_path) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model, x = nn.Sequential(conv(2, 6, 3, padding=1), nn.ReLU()).eval(), torch.randn(2, 2, *(5, 4, 3)[:dims])
    m = gs.attach_domain_head(
        model, "1", classifier="patch", num_domains=3, hidden=8, norm="batch", dropout=0.0, example_inputs=x
    ).eval()
    logits = m(x)[1]
    assert logits.shape == (2, 3, *x.shape[2:])
    flat = gs.DomainClassifier(6, 3, hidden=8, norm="batch").eval()
    weights = {key: w.flatten(1) if w.dim() > 2 else w for key, w in m.domain.classifier.state_dict().items()}
    flat.load_state_dict({key.replace("conv", "linear"): w for key, w in weights.items()})
    rows = model(x).movedim(1, -1).reshape(-1, 6)
    torch.testing.assert_close(logits.movedim(1, -1).reshape(-1, 3), flat(rows))
    assert gs.verify_flip(m, model, x).ok
    again = exported_and_loaded(m, model, x, suffix, tmp_path)
    torch.testing.assert_close(again(x), m(x))


def test_a_head_at_every_step_of_a_sequence_first_network_answers_batch_first() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    model, x = Net(), torch.randn(7, 4, 6)
    m = gs.attach_domain_head(model, "rnn[0]", classifier="patch", hidden=8, example_inputs=x).eval()
    logits = m(x)[1]
    assert logits.shape == (4, 2, 7)
    torch.testing.assert_close(logits[:, :, 5], m.domain.classifier(model(x)[5][:, :, None])[:, :, 0])
    labels = torch.randint(2, (4, 7))
    expected = nn.functional.cross_entropy(logits.transpose(1, 2).reshape(-1, 2), labels.flatten())
    torch.testing.assert_close(gs.domain_loss(logits, labels), expected)


@pytest.mark.parametrize("suffix", ["", ".safetensors", "folder"])
def test_a_head_may_be_conditioned_on_a_regression_output(suffix: str, tmp_path) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).eval()
    x = torch.randn(4, 5)
    m = gs.attach_domain_head(
        model, "1", condition_on="2", condition="concatenate", hidden=8, dropout=0.0, example_inputs=x
    ).eval()
    feature = model[1](model[0](x))
    torch.testing.assert_close(m(x)[1], m.domain.classifier(torch.cat([feature, model[2](feature)], 1)))
    report = gs.verify_flip(m, model, x)
    assert report.ok
    reached = {row.name: row.measured for row in report.parameters if row.objective == "domain"}
    assert reached["2.weight"] == "unreached"
    if suffix:
        again = exported_and_loaded(m, model, x, suffix, tmp_path)
        torch.testing.assert_close(again(x), m(x))


# ------------------------------------------------------------------------- what arrives decides


def test_a_feature_of_half_precision_is_classified_in_the_precision_of_the_head() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).bfloat16())

    model, x = Half(), torch.randn(4, 5)
    m = gs.attach_domain_head(model, "second", hidden=8, dropout=0.0, example_inputs=x)
    torch.testing.assert_close(m(x)[1], m.domain.classifier(model(x).float()))


def test_a_head_works_inside_autocast_in_its_precision() -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)), torch.randn(4, 5)
    m = gs.attach_domain_head(model, "0", hidden=8, norm="layer", dropout=0.0, example_inputs=x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = m(x)[1], m.domain.classifier(model[0](x))
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_the_padding_of_a_nested_tensor_counts_for_nothing() -> None:
    parts = [torch.randn(length, 8, requires_grad=True) for length in (5, 2, 3)]
    head = gs.DomainHead(gs.DomainClassifier(8, hidden=4), pool=gs.FeaturePool("nlc")).eval()
    logits = head(torch.nested.as_nested_tensor(parts))
    expected = head.classifier(torch.stack([part.mean(0) for part in parts]))
    torch.testing.assert_close(logits, expected)
    found = torch.autograd.grad(logits.sum(), parts, retain_graph=True)
    wanted = torch.autograd.grad(expected.sum(), parts)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, -b)


@pytest.mark.parametrize("training", [True, False])
def test_a_head_inside_torchs_transformer_reads_what_its_fast_path_hands_it(training: bool) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.encoder(self.embed(ids), src_key_padding_mask=ids == 0).mean(1)

    model, ids = Text().train(training), torch.arange(1, 19).reshape(3, 6) % 20
    ids[:, 5], ids[1, 3:] = 0, 0
    m = gs.attach_domain_head(model, "encoder.layers.0", hidden=8, dropout=0.0, example_inputs=ids)
    assert (m.domain.layout.name, m.domain.layout.channels) == ("nlc", 8)
    assert m(ids)[1].shape == (3, 2)
    assert gs.verify_flip(m, model, ids).ok
    with torch.no_grad():
        m.eval()(ids)


# ------------------------------------------------------------------------------------ own classifiers


def test_the_lazy_layers_of_a_classifier_get_their_size_before_the_first_step() -> None:
    mine = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Linear(8, 2))
    model, x = nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU()), torch.randn(4, 3, 9)
    m = gs.attach_domain_head(model, "1", classifier=mine, example_inputs=x)
    assert m.domain.classifier[0].in_features == 6
    assert int(m.domain.classifier[1].num_batches_tracked) == 0
    assert all(module.training for module in m.domain.classifier)
    assert gs.verify_flip(m, model, x).ok
    optimizer = torch.optim.SGD(gs.param_groups(m, 0.1))
    gs.domain_loss(m(x)[1], 0).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        (nn.Linear(7, 2), r"value at '1', of shape \(4, 6, 7\): Linear reads 7 features, .* shape \(4, 6\)"),
        (
            nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(9), nn.Linear(8, 2)),
            r"its layer '1', BatchNorm1d, reads 9 features, and gets a tensor of shape \(4, 8\)",
        ),
        (nn.Linear(6, 5), r"logits of shape \(4, 5\), but this head needs \(4, 2\)"),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused_by_its_layer(mine: nn.Module, message: str) -> None:
    model, x = nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU()), torch.randn(4, 3, 9)
    with pytest.raises(gs.ShapeError, match=message):
        gs.attach_domain_head(model, "1", classifier=copy.deepcopy(mine), example_inputs=x)


@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Softmax(1)])
def test_a_classifier_that_ends_in_probabilities_is_told_so(last: nn.Module) -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh()), torch.randn(4, 5)
    mine = nn.Sequential(nn.Linear(6, 2), last)
    with pytest.warns(UserWarning, match=f"ends in a {type(last).__name__.lower()}: a loss on logits"):
        gs.attach_domain_head(model, "1", classifier=mine, example_inputs=x)
