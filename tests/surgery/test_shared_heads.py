"""One head at several calls, several label sets, and conditions on any value together with a mask."""

from __future__ import annotations

import copy

import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import grl_surgery as gs


class Siamese(nn.Module):
    """One extractor, called on both inputs."""

    def __init__(self):
        super().__init__()
        self.encoder, self.out = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(16, 2)

    def forward(self, left, right):
        return self.out(torch.cat([self.encoder(left), self.encoder(right)], 1))


class Untraceable(Siamese):
    def forward(self, left, right):
        if left.sum() > 1e9:
            return left
        return super().forward(left, right)


class TwoTowers(nn.Module):
    """A student and a teacher."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, left, right):
        student, teacher = self.student(left), self.teacher(right)
        return (student - teacher).square().mean(1) if left.sum() < 1e9 else left


def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)


def attach(model, after, **options):
    return gs.attach_domain_head(
        model, after, example_inputs=pair(), **{"hidden": 8, "dropout": 0.0, **options}
    )


CASES = [
    (Siamese, ["encoder#1", "encoder#2"], [("encoder", 0), ("encoder", 1)]),
    (Untraceable, "encoder", [("encoder", 0), ("encoder", 1)]),
    (TwoTowers, ["student", "teacher"], [("student", 0), ("teacher", 1)]),
]


@pytest.mark.parametrize(("make", "after", "read"), CASES)
def test_one_head_reads_each_call_with_one_set_of_weights_and_is_proved(make, after, read) -> None:
    model = make().eval()
    m = attach(model, after).eval()
    output, logits = m(*pair())
    assert torch.equal(output, model(*pair()))
    features = [model.get_submodule(name)(pair()[place]) for name, place in read]
    assert all(map(torch.equal, logits, map(m.domain.classifier, features)))
    assert list(gs.reversals(m)) == ["domain.reversal"]
    assert [key for key in m.state_dict() if key not in model.state_dict()] == [
        f"domain.{key}" for key in m.domain.state_dict()
    ]
    domains = torch.tensor([0, 0, 1, 1])
    parameters = [*model.parameters(), *m.domain.parameters()]
    plain = sum(F.cross_entropy(m.domain.classifier(feature), domains) for feature in features)
    expected = torch.autograd.grad(plain, parameters, allow_unused=True)
    found = torch.autograd.grad(
        sum(F.cross_entropy(row, domains) for row in logits), parameters, allow_unused=True
    )
    count = len(list(model.parameters()))
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, -b if place < count else b)
    assert gs.verify_flip(m, model, pair()).ok


@pytest.mark.parametrize(("make", "after", "read"), CASES)
@pytest.mark.parametrize("file", ["m.safetensors", "m.pt2", "folder"])
def test_one_head_at_several_calls_comes_back_from_a_file(make, after, read, file, tmp_path) -> None:
    if file != "m.safetensors" and make is not Siamese:
        pytest.skip("no program holds a forward that looks at values")
    m = attach(make().eval(), after).eval()
    path = gs.export(m, tmp_path / file, pair())
    again = gs.load(path, **({} if file == "m.pt2" else {"model": make})).eval()
    output, logits = again(*pair())
    assert torch.equal(output, m(*pair())[0])
    assert all(map(torch.equal, logits, m(*pair())[1]))
    assert gs.verify_flip(again, example_inputs=pair()).ok
    if file != "m.pt2":
        assert len(gs.strip(again).state_dict()) == len(make().state_dict())


def test_one_head_at_several_calls_is_a_program_of_onnx_with_its_logits(tmp_path) -> None:
    m = attach(Siamese().eval(), ["encoder#1", "encoder#2"]).eval()
    path = gs.export(m, tmp_path / "m.onnx", pair(), heads="domain")
    session = onnxruntime.InferenceSession(str(path))
    names = [row.name for row in session.get_inputs()]
    found = session.run(None, dict(zip(names, (x.numpy() for x in pair()), strict=True)))
    expected = [m(*pair())[0], *m(*pair())[1]]
    assert len(found) == 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, atol=1e-5, rtol=1e-4)


def test_further_surgery_copies_and_stripping_keep_a_head_at_several_calls() -> None:
    m = attach(Siamese(), ["encoder#1", "encoder#2"]).eval()
    twin = copy.deepcopy(m)
    more = gs.insert_grl(attach(m, "encoder#1", name="first"), "out").eval()
    assert all(map(torch.equal, twin(*pair())[1], more(*pair())[1]))
    assert gs.verify_flip(more, example_inputs=pair()).ok
    assert len(gs.strip(more, "domain")(*pair())) == 2
    with pytest.raises(gs.SurgeryError, match="one head cannot read values with different axes"):
        gs.attach_domain_head(
            nn.Sequential(nn.Conv1d(2, 4, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
            ["0", "2"],
            example_inputs=torch.randn(2, 2, 5),
        )


# ------------------------------------------------------------------------------------ conditions and masks


class Reader(nn.Module):
    """Tokens, classes, a regression output of one number, and an embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(20, 6), nn.Linear(6, 6)
        self.classes, self.age, self.style = nn.Linear(6, 3), nn.Linear(6, 1), nn.Linear(6, 4)

    def forward(self, ids, attention_mask=None, group=None):
        hidden = self.mix(self.embed(ids)).tanh()
        first = hidden[:, 0]
        return self.classes(first), self.age(first).flatten(), self.style(first)


class UntraceableReader(Reader):
    def forward(self, ids, attention_mask=None, group=None):
        if ids.sum() < 0:
            return ids
        return super().forward(ids, attention_mask, group)


def text():
    ids = torch.tensor([[3, 4, 5, 0, 0], [1, 2, 0, 0, 0], [6, 7, 8, 9, 1]])
    return {"ids": ids, "attention_mask": (ids != 0).long(), "group": torch.tensor([0.0, 1.0, 2.0])}


@pytest.mark.parametrize("make", [Reader, UntraceableReader])
@pytest.mark.parametrize(
    ("condition_on", "combined"),
    [
        ("classes", lambda f, v: torch.einsum("bk,bc->bkc", v["classes"].softmax(1), f).flatten(1)),
        ("age", lambda f, v: torch.cat([f, v["age"]], 1)),
        ("group", lambda f, v: torch.cat([f, text()["group"][:, None]], 1)),
    ],
)
def test_a_head_reads_a_mask_and_a_condition_together(make, condition_on, combined) -> None:
    model = make().eval()
    m = gs.attach_domain_head(
        model,
        "mix",
        mask="attention_mask",
        condition_on=condition_on,
        hidden=8,
        dropout=0.0,
        example_inputs=text(),
    ).eval()
    values = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, y, n=name: values.update({n: y}))
        for name in ("mix", "classes", "age")
    ]
    model(**text())
    for handle in handles:
        handle.remove()
    count = text()["attention_mask"][..., None].float()
    mean = (values["mix"] * count).sum(1) / count.sum(1)
    expected = m.domain.classifier(combined(mean, values))
    torch.testing.assert_close(m(**text())[-1], expected)
    assert gs.verify_flip(m, model, text()).ok
    whole = {"ids": text()["ids"], "group": text()["group"]}  # without a mask, every position counts
    model(**whole)
    logits = m(**whole)[-1]
    assert logits.shape == (3, 2)
    torch.testing.assert_close(
        m.domain.condition(values["mix"].mean(1), {**values, "group": whole["group"]}[condition_on]).shape,
        combined(values["mix"].mean(1), values).shape,
    )


@pytest.mark.parametrize("file", ["m.safetensors", "m.pt2", "folder"])
def test_a_head_with_a_mask_and_a_condition_comes_back_from_a_file(file, tmp_path) -> None:
    m = gs.attach_domain_head(
        Reader().eval(), "mix", mask="attention_mask", condition_on="classes", hidden=8, example_inputs=text()
    ).eval()
    path = gs.export(m, tmp_path / file, text())
    again = gs.load(path, **({} if file == "m.pt2" else {"model": Reader})).eval()
    assert torch.equal(again(**text())[-1], m(**text())[-1])


@pytest.mark.parametrize("make", [Reader, UntraceableReader])
def test_a_head_is_conditioned_on_an_embedding_by_concatenation(make) -> None:
    model = make().eval()
    m = gs.attach_domain_head(
        model, "mix", condition_on="style", condition="concatenate", hidden=8, example_inputs=text()
    ).eval()
    first = model.mix(model.embed(text()["ids"]))
    style = model.style(first.tanh()[:, 0])
    expected = m.domain.classifier(torch.cat([first.mean(1), style], 1))
    torch.testing.assert_close(m(**text())[-1], expected)
    assert gs.verify_flip(m, model, text()).ok


# ------------------------------------------------------------------- lazy layers, nested tensors, autocast


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.LazyLinear(3)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.out(self.act(self.norm(self.conv(x))).flatten(1))


class LazyAndUntraceable(Lazy):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("make", [Lazy, LazyAndUntraceable])
def test_a_head_is_sized_for_a_network_whose_layers_have_no_size_yet(make) -> None:
    model, x = make(), torch.randn(2, 3, 6, 6)
    m = gs.attach_domain_head(model, "act", hidden=8, example_inputs=x)
    assert all(nn.parameter.is_lazy(parameter) for parameter in model.parameters())
    assert m.domain.layout.name == "nchw"
    output, logits = m(x)
    assert (output.shape, logits.shape) == ((2, 3), (2, 2))
    assert gs.verify_flip(m, example_inputs=x).ok
    with pytest.raises(gs.ShapeError, match="which has lazy layers, does not run on inputs of"):
        gs.attach_domain_head(make(), "act", example_inputs=torch.randn(2, 6))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("reduction", ["mean", "max", "statistics", "last"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_classified_as_its_parts_are_and_its_gradient_is_reversed(
    layout, reduction
) -> None:
    parts = [torch.randn(3, 6), torch.randn(5, 6)]
    pool = gs.FeaturePool("nlc", reduction=reduction)
    head = gs.DomainHead(gs.DomainClassifier(pool.width(6), hidden=8, dropout=0.0), pool=pool).eval()
    given, plain = ([part.clone().requires_grad_() for part in parts] for _ in range(2))
    logits = head(torch.nested.as_nested_tensor(given, layout=layout))
    expected = torch.cat([head.classifier(pool(part[None])) for part in plain])
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(given, plain, strict=True):
        torch.testing.assert_close(a.grad, -b.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("inside", [False, True])
def test_a_head_takes_every_precision_inside_and_outside_of_autocast(dtype, inside) -> None:
    head = gs.DomainHead(gs.DomainClassifier(6, hidden=8, dropout=0.0), pool=gs.FeaturePool("nlc"))
    x = torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
        logits = head(x)
    assert logits.dtype == (torch.bfloat16 if inside else torch.float32)
    expected = head.classifier(x.detach().float().mean(1))
    torch.testing.assert_close(logits.float(), expected, atol=2e-2, rtol=2e-2)
    (gradient,) = torch.autograd.grad(logits.float().square().sum(), x)
    assert gradient.dtype == dtype
    assert gradient.abs().sum() > 0


def test_a_head_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        head = gs.DomainHead(gs.DomainClassifier(6, hidden=8), pool=gs.FeaturePool("nlc"), num_domains=2)
        assert head(torch.empty(2, 5, 6)).shape == (2, 2)


# --------------------------------------------------------------------------------------- several attributes

ATTRIBUTES = {"site": 3, "scanner": 2}


@pytest.mark.parametrize("classifier", ["global", "patch"])
def test_attributes_share_the_hidden_layers_and_each_has_logits_of_its_own(classifier) -> None:
    model, x = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 1)).eval(), torch.randn(3, 2, 9)
    m = gs.attach_domain_head(
        model,
        "1",
        num_domains=ATTRIBUTES,
        classifier=classifier,
        name="origin",
        hidden=8,
        dropout=0.0,
        example_inputs=x,
    ).eval()
    output, logits = m(x)
    assert torch.equal(output, model(x))
    feature = model[:2](x)
    hidden = m.origin.classifier.hidden(feature.mean(2) if classifier == "global" else feature)
    for name, count in ATTRIBUTES.items():
        assert logits[name].shape == (3, count, *([7] if classifier == "patch" else []))
        torch.testing.assert_close(logits[name], m.origin.classifier.logits[name](hidden))
    labels = {"site": torch.tensor([0, 1, 2]), "scanner": torch.tensor([0, 0, 1])}
    loss = sum(gs.domain_loss(logits[name], labels[name]) for name in ATTRIBUTES)
    plain = sum(gs.domain_loss(m.origin.classifier.logits[name](hidden), labels[name]) for name in ATTRIBUTES)
    (found,) = torch.autograd.grad(loss, model[0].weight)
    torch.testing.assert_close(found, -torch.autograd.grad(plain, model[0].weight)[0])
    assert gs.verify_flip(m, model, x).ok


@pytest.mark.parametrize("file", ["m.safetensors", "m.pt2", "folder", "m.onnx"])
@pytest.mark.parametrize("classifier", ["global", "patch"])
def test_a_head_of_several_attributes_comes_back_from_a_file(file, classifier, tmp_path) -> None:
    def make():
        return nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 1)).eval()

    x = torch.randn(3, 2, 9)
    m = gs.attach_domain_head(
        make(), "1", num_domains=ATTRIBUTES, classifier=classifier, hidden=8, example_inputs=x
    ).eval()
    expected = m(x)[1]
    if file == "m.onnx":
        path = gs.export(m, tmp_path / file, x, heads="domain")
        session = onnxruntime.InferenceSession(str(path))
        _, *found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for a, b in zip(found, expected.values(), strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, atol=1e-5, rtol=1e-4)
        return
    path = gs.export(m, tmp_path / file, x)
    again = gs.load(path, **({} if file == "m.pt2" else {"model": make})).eval()
    assert list(again(x)[1]) == list(ATTRIBUTES)
    assert all(torch.equal(again(x)[1][name], expected[name]) for name in ATTRIBUTES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_domains": {}}, "it names no attribute"),
        ({"num_domains": {"a.b": 2}}, "'a.b' cannot be the name of a module"),
        ({"num_domains": {"keys": 2}}, "'keys' cannot be the name of a module"),
        ({"num_domains": {"site": 1}}, "num_domains=1"),
        ({"num_domains": ATTRIBUTES, "binary": True}, "several attributes have logits for each"),
        ({"num_domains": ATTRIBUTES, "kind": "mdd", "num_classes": 3}, "is for kind='dann'"),
        ({"num_domains": ATTRIBUTES, "classifier": nn.Linear(6, 5)}, "returned no dict, but this head needs"),
    ],
)
def test_attributes_that_cannot_be_are_refused(options, message) -> None:
    with pytest.raises(gs.SurgeryError, match=message):
        gs.attach_domain_head(
            nn.Sequential(nn.Linear(4, 6)), "0", example_inputs=torch.randn(2, 4), **options
        )
