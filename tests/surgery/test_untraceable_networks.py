"""Surgery where nothing traces: what leaves a module is reversed, and heads read values tapped inside."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import dataclass

import pytest
import torch
from small_networks import Net, Untraceable, image
from torch import nn

import grl_surgery as gs
from grl_surgery.nn.nested_reversal import reverse_nested


@dataclass
class Found:
    """What a detector returns: tensors beside things that are none."""

    boxes: torch.Tensor
    names: list[str]


class Proposals(nn.Module):
    """Nobody can trace it: it decides by values, counts its calls, and returns a structure."""

    threshold = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4, 4)
        self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        for part in self.children():
            if isinstance(part, nn.Linear) and x.sum() > -1e9:
                x = part(x)
        scores = x.sigmoid()
        for part in self.parts:
            x = part(x)
        losses = {"proposals": (scores**2).mean(), "count": len(x)}
        return Found(x, ["a"] * int((scores > self.threshold).sum())), losses

    def describe(self):
        return f"called {self.calls} times"


class Detector(nn.Module):
    """Backbone, proposals and classifier under a forward that looks at its data."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Net()
        self.body.fc = nn.Linear(4, 4)
        self.proposals = Proposals()
        self.classify = nn.Linear(4, 3)

    def forward(self, images):
        features = self.body(torch.stack(images))
        if len(features) and features.sum() > -1e9:
            found, losses = self.proposals(features)
        scores = self.classify(found.boxes)
        return {"loss": scores.square().mean(), **losses} if self.training else [{"scores": scores}]


def images():
    return [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(2)]


def gradients(model, seed=0):
    torch.manual_seed(seed)
    losses = model(images())
    losses = losses[0] if isinstance(losses, tuple) else losses
    total = losses["loss"] + losses["proposals"]
    leaves = dict(model.named_parameters())
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def test_what_leaves_a_module_that_nobody_can_trace_is_reversed_in_every_tensor():
    model = Detector()
    spliced = gs.insert_grl(model, after="proposals")
    assert type(spliced) is Detector
    plain, found = gradients(model), gradients(spliced)
    for name, gradient in plain.items():
        flipped = not name.startswith("classify")
        assert torch.equal(found[name], -gradient if flipped else gradient), name
    report = gs.verify_flip(spliced, model, (images(),))
    assert report.ok, report


@pytest.mark.parametrize(
    ("point", "loss"),
    [("proposals[1]", "proposals"), ("proposals[1][proposals]", "proposals"), ("proposals[0]", "loss")],
)
def test_one_item_of_what_leaves_it_is_reversed_and_no_other(point, loss):
    model = Detector()
    spliced = gs.insert_grl(model, after=point)
    for key in ("proposals", "loss"):
        weight = (model.body.stem.weight, spliced.body.stem.weight)
        plain, found = (
            torch.autograd.grad(m(images())[key], w)[0] for m, w in zip((model, spliced), weight, strict=True)
        )
        assert torch.equal(found, -plain if key == loss else plain)


def test_a_wrong_item_is_answered_with_those_there_are():
    spliced = gs.insert_grl(Detector(), after="proposals[0][boxed]")
    with pytest.raises(gs.ShapeError, match=r"a Found, has no item \[boxed\]\n.*\[boxes\]"):
        spliced(images())


def test_the_module_keeps_its_attributes_methods_state_and_children():
    model = Detector()
    spliced = gs.insert_grl(model, after="proposals")
    spliced(images())
    spliced(images())
    assert isinstance(spliced.proposals, Proposals)
    assert spliced.proposals.describe() == "called 2 times"
    assert (model.proposals.calls, spliced.proposals.calls) == (0, 2)
    spliced.proposals.calls = 7
    spliced(images())
    assert spliced.proposals.calls == 8
    assert list(spliced.state_dict()) == list(model.state_dict())
    spliced.proposals.parts = nn.ModuleList([nn.Identity()])
    assert spliced(images())["proposals"].isfinite()
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = spliced.proposals.nothing_like_it


def test_a_class_that_a_wrapper_derives_keeps_the_reversal():
    spliced = gs.insert_grl(Detector(), after="proposals")
    part = spliced.proposals
    part.__class__ = type("Sharded", (part.__class__,), {"shards": 2})  # as fully_shard does
    assert (part.shards, isinstance(part, Proposals)) == (2, True)
    assert gs.verify_flip(spliced, example_inputs=(images(),)).ok


def test_a_mode_set_on_one_module_reaches_its_own_forward():
    spliced = gs.attach_domain_head(Detector(), after="body.fc", hidden=32, example_inputs=(images(),))
    spliced.training = False
    output, _ = spliced(images())
    assert isinstance(output, list)
    assert set(spliced.train()(images())) == {"loss", "proposals", "count", "domain_logits"}
    assert spliced.domain.training
    assert not spliced.eval().domain.training


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deep", "pickle"],
)
def test_copies_reverse_and_call_their_heads(again):
    model = gs.insert_grl(Detector(), after="proposals")
    spliced = gs.attach_domain_head(model, after="proposals[0][boxes]", hidden=32, example_inputs=(images(),))
    twin = again(spliced).eval()
    assert torch.equal(twin(images())[1], spliced.eval()(images())[1])
    assert gs.verify_flip(twin, example_inputs=(images(),)).ok
    twin.domain.train()
    assert not spliced.domain.training
    assert list(gs.reversals(twin)) == list(gs.reversals(spliced))


def test_a_second_surgery_inside_and_at_the_same_place_adds_to_the_first():
    model = Detector()
    once = gs.insert_grl(model, after="proposals")
    twice = gs.insert_grl(once, after=["proposals", "proposals.score", "body.stage1"])
    assert len(gs.reversals(twice)) == 4
    assert gs.verify_flip(twice, model, (images(),)).ok
    plain, found = gradients(model), gradients(twice)
    assert torch.equal(
        found["proposals.parts.0.weight"], plain["proposals.parts.0.weight"]
    )  # twice: back again
    back = gs.strip(twice)
    assert type(back) is Detector
    assert type(back.proposals) is Proposals
    rest = gs.strip(twice, next(name for name in gs.reversals(twice) if "score" in name))
    assert len(gs.reversals(rest)) == 3


def test_a_module_that_was_spliced_inside_can_be_reversed_as_a_whole_as_well():
    model = Untraceable()
    spliced = gs.insert_grl(gs.insert_grl(model, after="body.stage1"), after="body")
    assert len(gs.reversals(spliced)) == 2
    assert gs.verify_flip(spliced, model, image()).ok


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("point", ["first", "script"])
def test_a_scripted_module_is_one_call_whatever_surrounds_it_and_stays_as_it_was(traceable, point):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
            self.script = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

        def forward(self, x):
            x = self.script(self.first(x))
            return self.last(x) if traceable or x.sum() > -1e9 else x

    model, x = Root(), torch.randn(5, 3)
    keys = list(model.state_dict())
    if point == "script" and not traceable:
        with pytest.raises(gs.TracingError, match="'script' is a scripted module, which the result shares"):
            gs.insert_grl(model, after=point)
        return
    spliced = gs.insert_grl(model, after=point)
    assert gs.verify_flip(spliced, model, x).ok
    for network in (model, spliced, gs.strip(spliced)):
        assert list(network.state_dict()) == keys
    flipped = [
        torch.equal(a, -b)
        for a, b in zip(
            torch.autograd.grad(spliced(x).sum(), spliced.script.parameters()),
            torch.autograd.grad(model(x).sum(), model.script.parameters()),
            strict=True,
        )
    ]
    assert all(flipped) == (point == "script")
    assert gs.attach_domain_head(model, point, example_inputs=x)(x)[1].shape == (5, 2)
    assert not traceable or gs.graph(model, example_inputs=x).nodes[2].shape == (5, 4)
    assert [type(p) for p in model.parameters()] == [nn.Parameter] * 6


def test_a_module_that_is_passed_anything_is_reversed_as_a_whole():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, **options):
            return self.fc(x) * options.get("scale", 1.0)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x, **options):
            for layer in self.layers:
                x = layer(x, **options)
            return x

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Encoder()

        def forward(self, x):
            return self.encoder(x, scale=2.0) if x.sum() > -1e9 else x

    model, x = Root(), torch.randn(2, 4)
    for point in ("encoder", "encoder.layers.0", "encoder.layers.1.fc"):
        spliced = gs.insert_grl(model, after=point)
        assert torch.equal(spliced(x), model(x))
        assert gs.verify_flip(spliced, model, x).ok


def test_modules_that_others_ask_for_more_than_their_forward_stay_what_they_are():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

        def forward(self, x):
            return self.tower(x)

        def compute_loss(self, scores):
            return scores.square().mean()

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.head = Head()

        def forward(self, x):
            for layer in self.features:
                x = layer(x) if x.sum() > -1e9 else x
            return self.head.compute_loss(self.head(x))

    model, x = Root(), torch.randn(3, 4)
    for point in ("features.0", "head.tower", "head.tower.0"):
        spliced = gs.insert_grl(model, after=point)
        assert torch.equal(spliced(x), model(x))
        assert gs.verify_flip(spliced, model, x).ok


def test_a_later_trace_of_everything_leaves_the_module_alone():
    spliced = gs.insert_grl(Detector(), after="proposals")
    network = nn.Sequential(spliced.proposals)
    names = [node.name for node in gs.graph(network, depth=None).nodes]
    assert names == ["input", "0", "output"]
    gs.insert_grl(network, after="glob:**")
    network.train().eval()
    assert type(spliced.proposals.score) is nn.Linear


def test_what_cannot_be_traced_and_is_no_module_is_an_error_that_says_what_works():
    with pytest.raises(gs.TracingError, match=r"lies inside a forward that cannot be traced(.|\n)*proposals"):
        gs.insert_grl(Detector(), after="proposals.sigmoid")
    model = Detector()
    spliced = gs.insert_grl(model, after="proposals.sigmoid", example_inputs=(images(),))
    assert gs.verify_flip(spliced, model, (images(),)).ok
    plain, found = gradients(model), gradients(spliced)
    assert torch.equal(found["classify.weight"], plain["classify.weight"])
    assert not torch.equal(found["proposals.score.weight"], plain["proposals.score.weight"])


# ------------------------------------------------------------------------------------------------- heads


def test_heads_on_an_untraceable_network_come_out_in_its_loss_dict():
    model = Detector()
    m = gs.attach_domain_head(model, after="body.stage2", name="image", hidden=32, example_inputs=(images(),))
    m = gs.attach_domain_head(
        m,
        after="proposals[0][boxes]",
        name="instance",
        condition_on="classify",
        hidden=32,
        example_inputs=(images(),),
    )
    losses = m(images())
    assert set(losses) == {"loss", "proposals", "count", "image_logits", "instance_logits"}
    assert (losses["image_logits"].shape, losses["instance_logits"].shape) == ((2, 2), (2, 2))
    for mode in ("train", "eval"):
        report = gs.verify_flip(m, model, (images(),), mode=mode)
        assert report.ok, report
    assert list(gs.strip(m).state_dict()) == list(model.state_dict())
    assert type(gs.strip(m)) is Detector
    only = gs.strip(m, "image")
    assert set(only(images())) == {"loss", "proposals", "count", "instance_logits"}
    assert torch.equal(only.eval()(images())[1], m.eval()(images())[2])


def test_a_head_reads_what_was_there_before_the_network_overwrote_it():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            return self.act(self.first(x))

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Overwrites()

        def forward(self, x):
            return self.body(x) if x.sum() > -1e9 else x

    model, x = Root(), torch.randn(5, 3)
    m = gs.attach_domain_head(model, after="body.first", hidden=32, dropout=0.0, example_inputs=x)
    assert torch.equal(m(x)[1], m.domain(model.body.first(x)))


def test_a_head_answers_once_for_each_time_that_the_forward_passes_its_point():
    class Twice(nn.Module):
        def __init__(self, times):
            super().__init__()
            self.layer, self.times = nn.Linear(3, 3), times

        def forward(self, x):
            for _ in range(self.times if x.sum() > -1e9 else 0):
                x = self.layer(x)
            return x

    model, x = Twice(2), torch.randn(2, 3)
    m = gs.attach_domain_head(model, after="layer", hidden=32, dropout=0.0, example_inputs=x)
    first = model.layer(x)
    _, logits = m(x)
    assert torch.equal(logits[0], m.domain(first))
    assert torch.equal(logits[1], m.domain(model.layer(first)))
    m.times = 0
    assert m(x)[1] is None
    with pytest.raises(gs.ShapeError, match="the forward of Twice does not come past 'layer'"):
        gs.attach_domain_head(Twice(0), after="layer", hidden=32, example_inputs=x)


def test_threads_do_not_read_each_others_values():
    m = gs.attach_domain_head(Detector(), after="body.stage2", hidden=32, example_inputs=(images(),)).eval()
    inputs = [[torch.full((3, 8, 8), float(n))] for n in range(8)]
    alone = [m(x)[1] for x in inputs]
    together: dict[int, torch.Tensor] = {}

    def run(n):
        for _ in range(20):
            together[n] = m(inputs[n])[1]

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[n], alone[n]) for n in range(len(inputs)))


def test_a_file_brings_everything_back(tmp_path):
    m = gs.attach_domain_head(Detector(), after="body.stage2", hidden=32, example_inputs=(images(),))
    m = gs.insert_grl(m, after="proposals", coeff=0.25)
    again = gs.load(gs.export(m, tmp_path / "m.safetensors", (images(),)), model=Detector())
    assert torch.equal(again.eval()(images())[1], m.eval()(images())[1])
    found = {name: float(layer.coeff) for name, layer in gs.reversals(again).items()}
    assert found == {"domain.reversal": 1.0, "grl_proposals": 0.25}
    with pytest.raises(gs.ExportError, match=r"runs as it is, so there is no graph to write as code"):
        gs.export(m, tmp_path / "folder", (images(),))


def test_the_reversal_of_a_structure_leaves_the_structure_alone():
    value = (torch.ones(2), {"a": [torch.zeros(1)], "n": 3}, Found(torch.ones(1), ["x"]), torch.arange(2))
    doubled = reverse_nested(Doubles(), value)
    assert torch.equal(doubled[0], torch.full((2,), 2.0))
    assert torch.equal(doubled[2].boxes, torch.full((1,), 2.0))
    assert doubled[3] is value[3]  # integers carry no gradient
    assert torch.equal(value[2].boxes, torch.ones(1))
    assert doubled[1]["n"] == 3


class Doubles(nn.Module):
    def forward(self, x):
        assert x.is_floating_point()
        return x * 2


class Layers(nn.ModuleDict):
    """Calls its children in order; it offers more than a forward, which a graph would not."""

    def forward(self, x):
        for layer in self.values():
            x = layer(x)
        return x


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.inner(x)


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Layers({"first": Skip(), "second": Skip()})

    def forward(self, x):
        return self.body(x) if x.sum() > -1e9 else x


def test_a_reversal_of_what_leaves_a_module_survives_a_later_cut_around_it():
    model, x = Decides(), torch.randn(3, 6)
    spliced = gs.insert_grl(model, after="body.second")
    spliced = gs.insert_grl(spliced, after="body.second.add")
    spliced = gs.insert_grl(spliced, edge=("body.first", "body.second.add"), example_inputs=x)
    assert len(gs.reversals(spliced)) == 3
    report = gs.verify_flip(spliced, model, (x,))
    assert report.ok, report
    # Two reversals in a row cancel; the third is on one of the two ways to the first block.
    assert {row.name: row.measured for row in report.parameters} == {
        "body.first.inner.weight": "mixed",
        "body.first.inner.bias": "mixed",
        "body.second.inner.weight": "unchanged",
        "body.second.inner.bias": "unchanged",
    }
