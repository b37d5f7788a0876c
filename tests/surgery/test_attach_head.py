"""attach_domain_head: sizes, outputs, each objective on its own, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from small_networks import Containers, Modes, Net, Tuples, Untraceable, image, vector
from torch import nn

import grl_surgery as gs


def attach(model, after, **options):
    options.setdefault("example_inputs", image() if type(model).__name__ == "Net" else vector())
    options.setdefault("hidden", 8)
    return gs.attach_domain_head(model, after, **options)


def test_the_output_comes_first_and_then_the_logits_in_the_order_attached():
    m = attach(Net(), "mean")
    m = attach(m, "stage1", name="early", num_domains=3, coeff=0.25)
    output, domain, early = m.eval()(image())
    assert (output.shape, domain.shape, early.shape) == ((2, 3), (2, 2), (2, 3))
    assert {name: float(layer.coeff) for name, layer in gs.reversals(m).items()} == {
        "early.reversal": 0.25,
        "domain.reversal": 1.0,
    }


def test_the_networks_output_and_the_gradient_of_its_own_loss_are_untouched():
    model, x = Net().eval(), image()
    m = attach(model, "stage1")
    assert torch.equal(m(x)[0], model(x))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(m(x)[0].square().sum(), list(model.parameters()))
    assert all(map(torch.equal, found, expected))


def test_the_domain_loss_reaches_the_backbone_as_the_exact_negative():
    model, x = Net().eval(), image()
    m = attach(model, "stage1", dropout=0.0)
    domains = torch.tensor([0, 1])
    backbone = [p for name, p in model.named_parameters() if name.startswith(("stem", "stage1"))]
    head = list(m.domain.classifier.parameters())
    found = torch.autograd.grad(F.cross_entropy(m(x)[1], domains), [*backbone, *head])
    feature = model.stage1(F.relu(model.stem(x)))
    expected = torch.autograd.grad(
        F.cross_entropy(m.domain.classifier(feature.mean((2, 3))), domains), [*backbone, *head]
    )
    for a, b in zip(found[: len(backbone)], expected, strict=False):
        assert torch.equal(a, -b)
    for a, b in zip(found[len(backbone) :], expected[len(backbone) :], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "point", "layout"),
    [
        ("test_resnet", "layer3", "nchw"),
        ("test_resnet", "global_pool", "nc"),
        ("test_vit", "blocks.2", "nlc"),
        ("test_convnext", "stages.1", "nchw"),
        ("swin_tiny_patch4_window7_224", "layers.0", "nhwc"),
    ],
)
def test_the_head_is_sized_from_the_feature_and_every_objective_is_proved(name, point, layout):
    size = {"img_size": 64, "window_size": 4} if name.startswith("swin") else {}
    model = timm.create_model(name, **size)
    m = gs.attach_domain_head(model, after=point, hidden=32, dropout=0.0)
    assert m.domain.layout.name == layout
    for mode in ("train", "eval"):
        report = gs.verify_flip(m, model, mode=mode)
        assert report.ok, report
        by = {(row.objective, row.measured) for row in report.parameters}
        assert {("domain", "flipped"), ("domain", "unchanged"), ("output", "unchanged")} <= by
        assert ("output", "flipped") not in by


def test_a_conditional_head_reads_the_class_logits_and_sends_nothing_back_through_them():
    model = Net()
    m = attach(model, "mean", condition_on="fc")
    report = gs.verify_flip(m, model, image())
    assert report.ok
    fc = {
        row.measured for row in report.parameters if row.name.startswith("fc") and row.objective == "domain"
    }
    assert fc == {"unreached"}
    randomized = attach(model, "mean", condition_on="fc", condition="randomized")
    assert any("condition" in key for key in randomized.state_dict())


def test_a_head_of_the_users_own_may_overwrite_its_input():
    class Rude(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(x.relu_().mean((2, 3)))

    model, x = Net().eval(), image()
    m = attach(model, "stage1", classifier=Rude(), pool="none")
    assert torch.equal(m(x)[0], model(x))
    assert gs.verify_flip(m, model, x).ok


class Overwrites(nn.Module):
    """``fc``, and then something that changes the memory of its value."""

    def __init__(self, block=None):
        super().__init__()
        self.fc, self.out, self.block = nn.Linear(6, 6), nn.Linear(6, 2), block

    def forward(self, x):
        return self.out(self.block(self.fc(x)))


class ByAView(Overwrites):
    def forward(self, x):
        h = self.fc(x)
        h.view(-1).mul_(3.0)
        return self.out(h)


class Untraced(Overwrites):
    def forward(self, x):
        return self.out(self.block(self.fc(x))) if x.sum() > -1e9 else x


class Tripled(nn.Module):
    def forward(self, x):
        return x.mul_(3.0) if x.sum() > -1e9 else x


@pytest.mark.parametrize(
    "model",
    [
        Overwrites(nn.ReLU(inplace=True)),
        Overwrites(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6))),
        Overwrites(nn.Sequential(nn.Identity(), nn.Sequential(nn.Dropout(0.0), nn.ReLU(inplace=True)))),
        Overwrites(Tripled()),
        ByAView(),
        Untraced(nn.ReLU(inplace=True)),
        Untraced(Tripled()),
    ],
    ids=lambda model: f"{type(model).__name__}-{type(model.block).__name__}",
)
def test_a_network_that_overwrites_the_feature_later_does_not_disturb_the_head(model):
    m = attach(model, "fc", dropout=0.0).eval()
    feature = model.fc(vector())
    assert torch.equal(m(vector())[1], m.domain.classifier(feature))
    expected = torch.autograd.grad(m.domain.classifier(feature).sum(), model.fc.weight)[0]
    assert torch.equal(torch.autograd.grad(m(vector())[1].sum(), model.fc.weight)[0], -expected)
    assert gs.verify_flip(m, model, vector()).ok


def test_a_feature_that_nothing_overwrites_is_not_copied():
    m = attach(Overwrites(nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))), "fc")
    assert "clone" not in m.code


@pytest.mark.parametrize("kind", [Overwrites, Untraced])
def test_a_head_and_a_reversal_at_one_point_do_not_cancel_in_either_order(kind):
    model, x = kind(nn.Tanh()), vector()
    reversed_first = attach(gs.insert_grl(model, after="fc"), "fc", dropout=0.0)
    head_first = gs.insert_grl(attach(model, "fc", dropout=0.0), after="fc")
    for m in (reversed_first, head_first):
        task, logits = m(x)
        found = [torch.autograd.grad(y.sum(), model.fc.weight, retain_graph=True)[0] for y in (task, logits)]
        plain = [y.sum() for y in (model(x), m.domain.classifier(model.fc(x)))]
        expected = [-torch.autograd.grad(y, model.fc.weight)[0] for y in plain]
        assert all(map(torch.equal, found, expected))
        assert gs.verify_flip(m, model, x).ok


def test_shapes_come_from_a_real_forward_where_code_looks_at_values():
    class Cuts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(6), nn.Linear(6, 2)

        @staticmethod
        def longest(lengths):
            return lengths.max().item()

        def forward(self, x, lengths):
            return self.fc(self.norm(x)[: self.longest(lengths)])

    model, inputs = Cuts(), (torch.randn(4, 6), torch.tensor([3, 2]))
    m = attach(model, "norm", example_inputs=inputs)
    assert int(model.norm.num_batches_tracked) == 0
    assert [value.shape for value in m.eval()(*inputs)] == [(3, 2), (4, 2)]
    m = attach(model, "fc", example_inputs=inputs)
    assert int(model.norm.num_batches_tracked) == 0
    assert [value.shape for value in m.eval()(*inputs)] == [(3, 2), (3, 2)]
    with pytest.raises(gs.ShapeError, match=r"this Cuts does not run on inputs of 4x5, 2: .*running_mean"):
        attach(model, "norm", example_inputs=(torch.randn(4, 5), inputs[1]))


def test_a_head_that_ends_in_a_softmax_over_one_unit_fails_for_want_of_signal():
    dead = nn.Sequential(nn.Linear(4, 1), nn.Softmax(1))
    with pytest.warns(UserWarning, match="the classifier Sequential ends in a softmax: a loss on logits"):
        m = attach(Net(), "mean", classifier=dead, binary=True)
    report = gs.verify_flip(m, example_inputs=image())
    assert not report.ok
    assert "no gradient reaches it" in report.reversals[0].note


@pytest.mark.parametrize(
    ("make", "point"), [(Tuples, "encoder[0]"), (Containers, "layers.1"), (Modes, "body")]
)
def test_networks_that_return_tuples_and_dicts_or_differ_by_mode_keep_their_output(make, point):
    model = make()
    m = attach(model, point)
    for mode in ("train", "eval"):
        report = gs.verify_flip(m, model, vector(), mode=mode)
        assert report.ok, report
    output, plain = m(vector()), model(vector())
    if isinstance(plain, dict):
        assert type(output) is type(plain)
        assert {*output} == {*plain, "domain_logits"}
        assert output["domain_logits"].shape == (4, 2)
    elif hasattr(plain, "_fields"):
        assert isinstance(output, type(plain))
        assert len(output) == len(plain)
        assert output.domain_logits.shape == (4, 2)
    else:
        assert type(output[0]) is type(plain)
        assert output[1].shape == (4, 2)


def test_heads_are_part_of_the_state_and_are_stripped_by_name():
    model = Net()
    m = attach(attach(model, "mean"), "stage1", name="early")
    new = [key for key in m.state_dict() if key not in model.state_dict()]
    assert {key.split(".")[0] for key in new} == {"domain", "early"}
    assert list(m.state_dict())[: len(model.state_dict())] == list(model.state_dict())
    one = gs.strip(m, "early").eval()
    assert torch.equal(one(image())[1], m.eval()(image())[1])
    assert list(gs.strip(m).state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_network_with_heads_compute_the_same(copied):
    m = attach(attach(Net(), "mean", condition_on="fc"), "stage1", name="early").eval()
    twin = copied(m)
    assert all(map(torch.equal, twin(image()), m(image())))
    assert len(gs.insert_grl(twin, after="stem")(image())) == 3


def test_a_layout_that_the_network_leaves_open_is_assumed_aloud_and_can_be_chosen():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(6, 8))

        def forward(self, x):
            return torch.einsum("nab,ak,bl->nkl", x, self.left, self.right)

    x = torch.randn(2, 5, 6)
    with pytest.warns(UserWarning, match=r"at 'einsum', assumed nlc; pool='ncl' would read C=7; pool="):
        attach(Mixes(), "einsum", example_inputs=x)
    assert attach(Mixes(), "einsum", example_inputs=x, pool="ncl").domain.layout.channels == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"after": ["stem", "fc"]}, "one head cannot read values with different axes: 'stem' .*, 'fc' "),
        ({"after": "glob:s*"}, r"a head reads one point, and .* stands for"),
        ({"after": "stage3"}, "no point 'stage3'"),
        ({"after": "mean", "name": "fc"}, r"already has an attribute 'fc'\n.*name='fc_2'"),
        ({"after": "mean", "name": "a.b"}, "cannot be an attribute"),
        ({"after": "mean", "num_domains": 1}, "num_domains=1"),
        ({"after": "mean", "coeff": -1.0}, "coeff"),
        ({"after": "mean", "pool": "nchw"}, "needs a feature with 4 axes"),
        ({"after": "mean", "condition_on": "stage1"}, r"has the shape \(2, 4, 8, 8\), not \(B, classes\)"),
        ({"after": "mean", "condition_on": "nowhere"}, "no point 'nowhere'"),
        (
            {"after": "mean", "example_inputs": torch.randn(2, 5, 8, 8)},
            r"this Net does not run on inputs of 2x5x8x8: RuntimeError: .* to have 3 channels",
        ),
        (
            {"after": "mean", "example_inputs": (image(), 1)},
            "2 example inputs were passed; forward takes 1: x",
        ),
    ],
)
def test_a_bad_call_is_refused_and_attaches_nothing(options, message):
    model = Net()
    keys = list(model.state_dict())
    after = options.pop("after")
    with pytest.raises(gs.SurgeryError, match=message):
        attach(model, after, **options)
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "domain")


def test_a_tuple_at_the_point_is_refused_before_anything_runs():
    with pytest.raises(gs.ShapeError, match=r"the value of 'encoder' is not one tensor"):
        attach(Tuples(), "encoder")


def test_without_inputs_the_head_cannot_be_sized():
    with pytest.raises(gs.SurgeryError, match="the head cannot be sized"):
        gs.attach_domain_head(Net(), "mean")


def test_an_untraceable_root_returns_its_output_and_the_logits():
    m = attach(Untraceable(), "body.stage1", example_inputs=image())
    output, logits = m.eval()(image())
    assert torch.equal(output, gs.strip(m)(image()))
    assert logits.shape == (2, 2)


def test_a_forward_around_a_network_with_a_head_keeps_its_logits(tmp_path):
    class TakesApart(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            logits, _ = self.network(x)
            return logits.softmax(-1)

    model = TakesApart(attach(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), "0"))
    with pytest.raises(gs.SurgeryError, match=r"without the head 'network.domain', .* TakesApart fails"):
        gs.verify_flip(model, example_inputs=vector())
    with pytest.raises(gs.ExportError, match=r"export\(model.network, 'm.onnx'\)"):
        gs.export(model, tmp_path / "m.onnx", vector())
    assert list(tmp_path.iterdir()) == []
    assert gs.verify_flip(model.network, example_inputs=vector()).ok


def test_the_weights_of_a_head_follow_the_seed_and_leave_the_generators_alone():
    model = Net()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = attach(model, "mean").domain.classifier.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    again = attach(model, "mean").domain.classifier.state_dict()
    other = attach(model, "mean", name="other").other.classifier.state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_a_classifier_with_the_wrong_number_of_logits_is_refused_before_it_is_attached():
    with pytest.raises(gs.ShapeError, match=r"logits of shape \(2, 5\), but this head needs \(2, 2\)"):
        attach(Net(), "mean", classifier=nn.Linear(4, 5))
    with pytest.raises(gs.ShapeError, match="cannot run on"):
        attach(Net(), "mean", classifier=nn.Linear(7, 2))
