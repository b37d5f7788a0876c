"""Networks of other people, and their styles: gradients are those of the original under a hook of torch.

A library that is not installed is skipped.
"""

from __future__ import annotations

import copy
import os
import pickle
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import grl_surgery as gs


def reversed_by_a_hook(model: nn.Module, point: str) -> nn.Module:
    """A copy of the original, in which a plain tensor hook negates the gradient of what leaves a module."""
    twin = copy.deepcopy(model)

    def negate(_module: Any, _args: Any, output: Any) -> Any:
        value = (output[0] if isinstance(output, tuple) else output).clone()
        value.register_hook(torch.neg)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    twin.get_submodule(point).register_forward_hook(negate)
    return twin


def gradients(model: nn.Module, loss: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_reversed_as_by_a_hook(
    model: nn.Module, point: str, loss: Callable[[Any], torch.Tensor], modes: tuple[bool, ...] = (True, False)
) -> nn.Module:
    """In both modes, whichever mode surgery happened in; something is reversed, and something is not."""
    spliced: Any = None
    for trained in modes:
        spliced = gs.insert_grl(model.train(not trained), after=point).train(trained)
        plain = gradients(copy.deepcopy(model).train(trained), loss)
        expected = gradients(reversed_by_a_hook(model, point).train(trained), loss)
        assert_same(gradients(spliced, loss), expected)
        changed = [name for name in plain if not torch.equal(plain[name], expected[name])]
        assert 0 < len(changed) < len(plain)
    return spliced


# ------------------------------------------------------------------------------------- styles of forwards


class TriesOneCall(nn.Module):
    """Hands lengths to the layers that take them, as speechbrain's networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), Lengths(), nn.Linear(4, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            try:
                x = layer(x, lengths=None)
            except TypeError:
                x = layer(x)
        return x


class Lengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, lengths: Any = None) -> torch.Tensor:
        return self.layer(x).tanh()


def test_a_forward_that_tries_one_call_and_makes_another_makes_that_one_in_a_graph_too() -> None:
    torch.manual_seed(0)
    model, x = TriesOneCall(), torch.randn(3, 4)
    spliced = assert_reversed_as_by_a_hook(model, "layers.1", lambda m: m(x).square().sum())
    assert gs.verify_flip(spliced, model, x).ok
    m: Any = gs.attach_domain_head(model, "layers.1", hidden=8, example_inputs=x)
    assert m(x)[1].shape == (3, 2)


class EarlyExit(nn.Module):
    """Returns as soon as it is sure, so that no graph has its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.first, self.last = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, threshold: float = 2.0) -> torch.Tensor:
        x = self.stem(x)
        early = self.first(x)
        if early.softmax(-1).max() > threshold:
            return early
        return self.last(self.block(x)) + early


def test_an_early_exit_is_taken_as_before_and_the_late_one_is_reversed() -> None:
    torch.manual_seed(0)
    model, x = EarlyExit(), torch.randn(3, 4)
    spliced = assert_reversed_as_by_a_hook(model, "block.0", lambda m: m(x).square().sum())
    assert torch.equal(spliced(x, threshold=0.0), model(x, threshold=0.0))
    assert gs.verify_flip(spliced, model, x).ok
    m: Any = gs.attach_domain_head(model, "block", hidden=8, example_inputs=x)
    _, logits = m(x)
    assert logits.shape == (3, 2)
    assert m(x, threshold=0.0)[1] is None


class Anything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = EarlyExit()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"scores": self.inner(*args, **kwargs) * self.scale, "given": sorted(kwargs)}


@pytest.mark.parametrize("call", [lambda m, x: m(x), lambda m, x: m(x=x), lambda m, x: m(x, threshold=0.9)])
def test_a_forward_that_takes_anything_goes_on_taking_it(call: Any) -> None:
    torch.manual_seed(0)
    model, x = Anything(), torch.randn(3, 4)
    spliced = assert_reversed_as_by_a_hook(model, "inner.stem", lambda m: call(m, x)["scores"].square().sum())
    assert call(spliced, x)["given"] == call(model, x)["given"]
    m: Any = gs.attach_domain_head(model, "inner.stem", hidden=8, example_inputs=x)
    assert list(call(m, x)) == ["scores", "given", "domain_logits"]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.rnn = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.out = nn.Linear(10, 2)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(ids), lengths, batch_first=True, enforce_sorted=False
        )
        _, (hidden, _) = self.rnn(packed)
        return self.out(torch.cat([hidden[0], hidden[1]], -1))


@pytest.mark.parametrize("point", ["embed", "out"])
def test_a_packed_lstm_is_reversed_before_and_behind_it(point: str) -> None:
    torch.manual_seed(0)
    model, ids, lengths = Packed(), torch.randint(0, 20, (3, 7)), torch.tensor([7, 3, 5])

    def loss(m: Any) -> torch.Tensor:
        return m(ids, lengths).square().sum()

    twin = reversed_by_a_hook(model, point)
    spliced = gs.insert_grl(model, after=point)
    assert_same(gradients(spliced, loss), gradients(twin, loss))
    assert gs.verify_flip(spliced, model, (ids, lengths)).ok


def test_a_packed_lstm_s_own_output_is_reversed_as_a_whole() -> None:
    torch.manual_seed(0)
    model, ids, lengths = Packed(), torch.randint(0, 20, (3, 7)), torch.tensor([7, 3, 5])
    twin = copy.deepcopy(model)

    def negate(_module: Any, _args: Any, output: Any) -> Any:
        packed, states = output
        same = tuple(state.clone() for state in states)
        for state in same:
            state.register_hook(torch.neg)
        return packed, same

    twin.rnn.register_forward_hook(negate)
    spliced = gs.insert_grl(model, after="rnn[1]")

    def loss(m: Any) -> torch.Tensor:
        return m(ids, lengths).square().sum()

    assert_same(gradients(spliced, loss), gradients(twin, loss))


# -------------------------------------------------------------------- ways to run and to hold a network


def test_a_trace_that_would_lose_a_reversal_at_the_whole_network_is_refused() -> None:
    torch.manual_seed(0)
    model, x = Optional(), torch.randn(3, 4)
    for point in ({"before": "output"}, {"after": "x"}, {"edge": ("body", "head")}):
        spliced = gs.insert_grl(model, **point)
        with pytest.raises(gs.SurgeryError, match=r"(?s)torch.fx calls the forward.*torch.export.export"):
            torch.fx.symbolic_trace(spliced, concrete_args={"scale": None})
        assert spliced(x).shape == (3, 2)


def test_a_trace_keeps_a_reversal_behind_a_module() -> None:
    torch.manual_seed(0)
    model, x = Optional(), torch.randn(3, 4)
    spliced = gs.insert_grl(model, after="body")
    traced = torch.fx.symbolic_trace(spliced, concrete_args={"scale": None})

    def loss(m: Any) -> torch.Tensor:
        return m(x).square().sum()

    expected = gradients(reversed_by_a_hook(model, "body"), loss)
    found = gradients(traced, loss)
    assert_same({name: found[name] for name in expected}, expected)


class Optional(nn.Module):
    """An argument that is None if left out keeps the root from becoming a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, scale: Any = None) -> torch.Tensor:
        value = self.body(x)
        return self.head(value if scale is None else value * scale)


def test_a_forward_that_was_set_on_a_module_runs_inside_its_call() -> None:
    """As accelerate's hooks set one, which calls the forward that was there."""
    torch.manual_seed(0)
    model, x = Optional(), torch.randn(3, 4)
    body: Any = model.body
    body._old_forward = body.forward
    body.forward = lambda value: 2 * body._old_forward(value)
    expected = copy.deepcopy(Optional())
    expected.load_state_dict(model.state_dict())

    def negate(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        same = 2 * output
        same.register_hook(torch.neg)
        return same

    expected.body.register_forward_hook(negate)
    spliced = gs.insert_grl(model, after="body")

    def loss(m: Any) -> torch.Tensor:
        return m(x).square().sum()

    assert_same(gradients(spliced, loss), gradients(expected, loss))
    assert torch.equal(model(x), spliced(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated")
def test_a_scripted_module_is_cut_at_the_module_that_gets_its_value_as_the_refusal_says() -> None:
    torch.manual_seed(0)
    model, x = Optional(), torch.randn(3, 4)
    model.body = torch.jit.script(model.body)
    with pytest.raises(gs.TracingError, match=r"(?s)'body' is a scripted module.*before="):
        gs.insert_grl(model, after="body")
    spliced = gs.insert_grl(model, before="head")
    twin = Optional()
    twin.load_state_dict(model.state_dict())

    def loss(m: Any) -> torch.Tensor:
        return m(x).square().sum()

    assert_same(gradients(spliced, loss), gradients(reversed_by_a_hook(twin, "body"), loss))


class Scores(NamedTuple):
    scores: torch.Tensor
    hidden: torch.Tensor


class Named(Optional):
    def forward(self, x: torch.Tensor, scale: Any = None) -> Any:
        value = self.body(x)
        return Scores(self.head(value), value)


def test_logits_on_a_named_tuple_survive_pytrees_copies_and_pickles() -> None:
    torch.manual_seed(0)
    model, x = Named(), torch.randn(3, 4)
    m: Any = gs.attach_domain_head(model, "body", hidden=8, example_inputs=x)
    output = m(x)
    scores, hidden = output
    assert isinstance(output, Scores)
    assert output._fields == ("scores", "hidden")
    doubled = tree_map(lambda value: 2 * value, output)
    assert type(doubled) is type(output)
    assert torch.equal(doubled.scores, 2 * scores)
    assert torch.equal(doubled.domain_logits, 2 * output.domain_logits)
    plain = tree_map(torch.Tensor.detach, output)
    for again in (copy.copy(plain), copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert isinstance(again, Scores)
        assert torch.equal(again.domain_logits, plain.domain_logits)
    assert output._replace(scores=hidden).scores is hidden


def test_ddp_with_a_static_graph_hands_the_logits_of_a_named_tuple_on(one_process: None) -> None:
    torch.manual_seed(0)
    model, x = Named(), torch.randn(3, 4)
    m = gs.attach_domain_head(model, "body", hidden=8, example_inputs=x)
    parallel = nn.parallel.DistributedDataParallel(m, static_graph=True)
    for _ in range(2):
        output = parallel(x)
        (output.scores.sum() + output.domain_logits.square().sum()).backward()
    assert all(p.grad is not None for p in m.parameters())


@pytest.fixture
def one_process() -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class NamesTwice(nn.Module):
    """As open_clip's networks do: an argument is called as the module that gets it."""

    def __init__(self) -> None:
        super().__init__()
        self.pre, self.text, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, text: torch.Tensor, scale: Any = None) -> torch.Tensor:
        value = self.out(self.text(self.pre(text)))
        return value if scale is None else value * scale


class NamesTwiceInAGraph(NamesTwice):
    def forward(self, text: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.out(self.text(self.pre(text)))


@pytest.mark.parametrize("kind", [NamesTwice, NamesTwiceInAGraph])
def test_a_module_with_the_name_of_an_argument_is_the_point_of_that_name(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(3, 4)
    names = [node.name for node in gs.graph(model, example_inputs=x).nodes]
    assert "text" in names
    assert len(set(names)) == len(names)
    spliced = assert_reversed_as_by_a_hook(model, "text", lambda m: m(x).square().sum())
    assert gs.verify_flip(spliced, model, x).ok
    m: Any = gs.attach_domain_head(model, "text", hidden=8, example_inputs=x)
    assert m(x)[1].shape == (3, 2)


class CallsADropoutTwice(nn.Module):
    """As layers of transformers do; an argument that is None if left out keeps it from being traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.dropout = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        x = x + self.dropout(self.first(x))
        x = x + self.dropout(self.second(x))
        return x if mask is None else x * mask


@pytest.mark.parametrize("call", [1, 2])
def test_one_of_several_calls_of_a_module_is_told_by_the_argument_that_gets_its_value(call: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), CallsADropoutTwice(), nn.Linear(4, 2)), torch.randn(3, 4)
    edges = gs.graph(model, depth=2, example_inputs=x).edges
    edge = next(e for e in edges if (e.source, e.target) == (f"1.dropout#{call}", f"1.add#{call}"))
    spliced = gs.insert_grl(model, edge=edge, example_inputs=x)
    twin: Any = copy.deepcopy(model)
    calls = []

    def negate(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
        calls.append(output)
        if len(calls) != call:
            return None
        same = output.clone()
        same.register_hook(torch.neg)
        return same

    twin[1].dropout.register_forward_hook(negate)

    def loss(m: Any) -> torch.Tensor:
        return m(x).square().sum()

    for trained in (True, False):
        calls.clear()
        assert_same(gradients(spliced.train(trained), loss), gradients(twin.train(trained), loss))
    assert gs.verify_flip(spliced, model, x).ok


class CallsForward(nn.Module):
    """As PEFT's wrappers do: the forward of the network inside is called, and not the network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


def test_what_lies_in_a_module_whose_forward_is_called_directly_is_cut_and_that_one_is_not() -> None:
    torch.manual_seed(0)
    model, x = CallsForward(EarlyExit()), torch.randn(3, 4)
    assert_reversed_as_by_a_hook(model, "model.block", lambda m: m(x).square().sum())
    with pytest.raises(gs.TracingError, match="calls the forward of 'model' itself"):
        gs.insert_grl(model, after="model")
    around = nn.Sequential(CallsForward(CallsForward(EarlyExit())))
    with pytest.raises(gs.TracingError, match=r"calls the forward of '0.model.model' itself"):
        gs.insert_grl(around, after="0.model.model")


def test_the_proof_holds_where_values_in_the_place_of_zeros_would_switch_an_activation_off() -> None:
    """On its copy the proof gives zeros values; for a bias they may be negative."""
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1))
    x = torch.ones(3, 2)
    with torch.no_grad():
        model[0].weight.fill_(1e-3)
        model[0].bias.zero_()
    spliced = gs.insert_grl(model, after="0")
    for seed in range(12):
        assert gs.verify_flip(spliced, model, x, seed=seed).ok
    with torch.no_grad():
        model[0].weight.fill_(-1e-3)
    assert not all(gs.verify_flip(spliced, model, x, seed=seed).ok for seed in range(12))


# ------------------------------------------------------------------------------------- libraries, by name


def test_a_dynunet_with_deep_supervision_is_reversed_also_after_a_step_of_training() -> None:
    """Its list of heads' outputs holds tensors with a graph from the last forward."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    model = nets.DynUNet(
        2, 1, 2, [3, 3, 3, 3], [1, 2, 2, 2], [2, 2, 2], [4, 8, 8, 8], deep_supervision=True, deep_supr_num=2
    )
    x = torch.randn(2, 1, 32, 32)

    def loss(m: Any) -> torch.Tensor:
        return m(x).square().mean()

    spliced = gs.insert_grl(model, after="bottleneck")
    twin = reversed_by_a_hook(model, "bottleneck")
    for trained in (True, False, True):
        assert_same(gradients(spliced.train(trained), loss), gradients(twin.train(trained), loss))
    assert spliced.train()(x).shape == model.train()(x).shape == (2, 3, 2, 32, 32)
    assert gs.verify_flip(spliced, model, x).ok
    m: Any = gs.attach_domain_head(model, "bottleneck", hidden=8, example_inputs=x)
    output, logits = m.train()(x)
    assert (output.shape, logits.shape) == ((2, 3, 2, 32, 32), (2, 2))


def test_a_segresnet_is_reversed_and_gets_a_head() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    model = nets.SegResNet(spatial_dims=2, init_filters=8, in_channels=1, out_channels=2, dropout_prob=0.2)
    x = torch.randn(2, 1, 16, 16)
    spliced = assert_reversed_as_by_a_hook(model, "down_layers.2", lambda m: m(x).square().mean())
    assert gs.verify_flip(spliced, model, x).ok
    m: Any = gs.attach_domain_head(model, "down_layers.3", hidden=8, example_inputs=x)
    assert m(x)[1].shape == (2, 2)


def test_an_ecapa_is_reversed_with_lengths_and_without() -> None:
    ecapa = pytest.importorskip("speechbrain.lobes.models.ECAPA_TDNN")
    torch.manual_seed(0)
    model = ecapa.ECAPA_TDNN(12, channels=[8, 8, 8, 8, 24], lin_neurons=6, attention_channels=8)
    x, lengths = torch.randn(3, 20, 12), torch.tensor([1.0, 0.5, 0.75])
    for given in ((x,), (x, lengths)):
        spliced = assert_reversed_as_by_a_hook(model, "blocks.2", lambda m, a=given: m(*a).square().sum())
    assert gs.verify_flip(spliced, model, (x, lengths)).ok
    m: Any = gs.attach_domain_head(model, "blocks.1", hidden=8, example_inputs=(x, lengths))
    assert m(x)[1].shape == (3, 2)


def test_a_faster_rcnn_is_reversed_in_its_losses_and_detects_as_before() -> None:
    detection = pytest.importorskip("torchvision").models.detection
    torch.manual_seed(0)
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=64, num_classes=3
    )
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    targets = [
        {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([n + 1])} for n in range(2)
    ]
    point = "backbone.body.6"

    def loss(m: Any) -> torch.Tensor:
        return sum(m(images, targets).values())

    spliced = gs.insert_grl(model.eval(), after=point).train()
    assert type(spliced) is type(model)
    twin = reversed_by_a_hook(model, point).train()
    plain = gradients(copy.deepcopy(model).train(), loss)
    expected = gradients(twin, loss)
    assert_same(gradients(spliced, loss), expected)
    assert any(not torch.equal(plain[name], expected[name]) for name in plain)
    for found, wanted in zip(spliced.eval()(images), model.eval()(images), strict=True):
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_segmentation_models_save_pretrained_writes_is_read_back(tmp_path: Any) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8))
    spliced: Any = gs.insert_grl(model, after="encoder.layer2")
    spliced.save_pretrained(tmp_path)
    again = smp.from_pretrained(tmp_path)
    state, wanted = again.state_dict(), model.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_a_method_of_the_original_that_returns_itself_returns_the_spliced_network() -> None:
    class Frozen(nn.Sequential):
        def freeze(self) -> Frozen:
            super().requires_grad_(False)
            self.is_frozen = True
            return self

    model = Frozen(nn.Linear(4, 4), nn.Linear(4, 2))
    spliced: Any = gs.insert_grl(model, after="0")
    assert isinstance(spliced, torch.fx.GraphModule)
    assert spliced.freeze() is spliced
    assert spliced.is_frozen
    assert not any(p.requires_grad for p in spliced.parameters())


# -------------------------------------------------------------------------------------------------- PEFT


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertForSequenceClassification(config)


IDS = torch.arange(3, 15).reshape(2, 6)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.tensor([0, 1])}


def with_lora(model: nn.Module) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "value"], r=2, init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an old name
def test_lora_on_a_spliced_network_finds_its_targets_and_has_the_gradients_of_a_hook() -> None:
    point = "bert.encoder.layer.0"
    lora = with_lora(gs.insert_grl(bert(), after=point))
    expected = with_lora(bert())
    assert list(lora.state_dict()) == list(expected.state_dict())
    twin = reversed_by_a_hook(expected, f"base_model.model.{point}")
    found = gradients(lora, lambda m: m(**INPUTS).loss)
    assert_same(found, gradients(twin, lambda m: m(**INPUTS).loss))
    assert any("lora_A" in name and "layer.0." in name for name in found)
    plain = gradients(expected, lambda m: m(**INPUTS).loss)
    changed = {name for name in plain if not torch.equal(plain[name], found[name])}
    assert changed == {name for name in plain if ".layer.0." in name}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an old name
@pytest.mark.parametrize("outputs", ["with_logits", "original"])
def test_lora_on_a_network_with_a_head_trains_the_head_s_gradient_reversed(outputs: Any) -> None:
    head = {"hidden": 8, "dropout": 0.0, "example_inputs": {"input_ids": IDS}, "outputs": outputs}
    m: Any = gs.attach_domain_head(bert(), "bert.encoder.layer.0", pool="nlc", **head)
    lora = with_lora(m)

    def domain(network: Any) -> torch.Tensor:
        out = network(**INPUTS)
        return (out.domain_logits if outputs == "with_logits" else m.domain.logits).square().sum()

    found = gradients(lora, domain)
    with gs.reversal_disabled(lora):
        plain = gradients(lora, domain)
    upstream = {name for name in found if ".layer.0." in name}
    assert upstream
    assert all(torch.equal(found[name], -plain[name]) for name in upstream)
    assert [n for n in found if found[n].abs().max() > 0 and n not in upstream and "domain" not in n] == []


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an old name
def test_surgery_on_a_peft_network_goes_through_its_wrapper() -> None:
    model, point = with_lora(bert()), "base_model.model.bert.encoder.layer.0"
    spliced: Any = gs.insert_grl(model, after=point)
    assert type(spliced) is type(model)

    def loss(m: Any) -> torch.Tensor:
        return m(**INPUTS).loss

    assert_same(gradients(spliced, loss), gradients(reversed_by_a_hook(model, point), loss))
    with spliced.disable_adapter(), model.disable_adapter():
        spliced.eval(), model.eval()
        assert torch.equal(spliced(**INPUTS).logits, model(**INPUTS).logits)
    inputs = {name: value for name, value in INPUTS.items() if name != "labels"}
    assert gs.verify_flip(spliced, model, inputs).ok
    m: Any = gs.attach_domain_head(model, point, hidden=8, example_inputs=inputs)
    assert m(**INPUTS).domain_logits.shape == (2, 2)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an old name
def test_a_lora_that_is_merged_leaves_the_reversal_where_it_was() -> None:
    lora = with_lora(gs.insert_grl(bert(), after="bert.encoder.layer.0")).eval()
    before = lora(**INPUTS).logits
    merged: Any = lora.merge_and_unload().requires_grad_(True)
    torch.testing.assert_close(merged(**INPUTS).logits, before)
    assert list(gs.reversals(merged)) == ["grl_bert_encoder_layer_0"]
    plain = gs.strip(merged)
    found = gradients(merged, lambda m: m(**INPUTS).loss)
    expected = gradients(reversed_by_a_hook(plain, "bert.encoder.layer.0"), lambda m: m(**INPUTS).loss)
    assert_same(found, expected)
