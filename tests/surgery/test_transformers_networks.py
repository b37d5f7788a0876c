"""Networks of transformers keep their class, their calls and their methods; the oracle is a plain hook."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

import grl_surgery as gs

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IDS = torch.arange(3, 15).reshape(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def bert():
    config = transformers.BertConfig(vocab_size=40, **SIZES, hidden_dropout_prob=0.1)
    return transformers.BertForSequenceClassification(config)


def vit():
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_channels=3, **SIZES)
    return transformers.ViTForImageClassification(config)


def t5():
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        **SIZES,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        layerdrop=0.0,
    )
    return transformers.Wav2Vec2ForSequenceClassification(config)


LABELS = torch.tensor([0, 1])
SOUND = torch.sin(torch.arange(800.0)).reshape(2, 400)
NETWORKS = {
    "bert": (
        bert,
        "bert.encoder.layer.0",
        {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "output_hidden_states": True},
    ),
    "vit": (vit, "vit.layernorm", {"pixel_values": torch.ones(2, 3, 16, 16), "labels": LABELS}),
    "t5": (t5, "encoder.block.0.layer.0.dropout", {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}),
    "wav2vec2": (
        wav2vec2,
        "wav2vec2.encoder.layers.0",
        {
            "input_values": SOUND,
            "attention_mask": torch.tensor([[1] * 400, [1] * 300 + [0] * 100]),
            "labels": LABELS,
            "output_hidden_states": True,
        },
    ),
}


def reversed_by_a_hook(model, point):
    """A copy of the original, in which a plain tensor hook negates the gradient of what leaves a module."""
    twin = copy.deepcopy(model)

    def negate(module, args, output):
        value = (output[0] if isinstance(output, tuple) else output).clone()
        value.register_hook(torch.neg)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    twin.get_submodule(point).register_forward_hook(negate)
    return twin


def gradients(model, inputs):
    transformers.set_seed(0)  # the masks of wav2vec 2.0 come from numpy
    model.zero_grad()
    model(**inputs).loss.backward()
    named = dict(model.named_parameters())
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_reversal_is_that_of_a_hook_on_the_original_whatever_is_passed(kind, trained):
    make, point, inputs = NETWORKS[kind]
    model = make().train(not trained)
    spliced = gs.insert_grl(model, after=point).train(trained)
    assert type(spliced) is type(model)
    assert inspect.signature(spliced.forward) == inspect.signature(model.forward)
    assert_same(
        gradients(spliced, inputs), gradients(reversed_by_a_hook(model, point).train(trained), inputs)
    )
    short = {name: value for name, value in inputs.items() if name not in ("labels", "attention_mask")}
    if kind != "t5":
        transformers.set_seed(0)
        expected = model.train(trained)(**short)
        transformers.set_seed(0)
        found = spliced(**short)
        assert type(found) is type(expected)
        assert list(found) == list(expected)
        assert torch.equal(found.logits, expected.logits)


def test_a_head_is_in_the_output_beside_the_loss_and_the_logits():
    model = bert().eval()
    _, point, inputs = NETWORKS["bert"]
    m = gs.attach_domain_head(model, after=point, hidden=64, example_inputs=inputs)
    found, expected = m(**inputs), model(**inputs)
    assert type(found) is type(expected)
    assert list(found) == [*expected, "domain_logits"]
    assert torch.equal(found.loss, expected.loss)
    assert found.domain_logits.shape == (2, 2)
    assert len(m(input_ids=IDS, return_dict=False)) == 2
    assert gs.verify_flip(m, model, {"input_ids": IDS, "attention_mask": MASK}).ok


def test_gradient_checkpointing_and_generate_work_on_the_result():
    make, point, inputs = NETWORKS["t5"]
    model = make()
    spliced = gs.insert_grl(model, after=point).train()
    expected = gradients(reversed_by_a_hook(model, point).train(), inputs)
    enable = getattr(spliced, "activation_checkpointing_enable", spliced.gradient_checkpointing_enable)
    enable()
    assert_same(gradients(spliced, inputs), expected)
    spliced.eval()
    model.eval()
    said = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(spliced.generate(IDS, **said), model.generate(IDS, **said))


@pytest.mark.parametrize(
    "where",
    [
        {"after": "bert.encoder.layer.0.attention.output.add"},
        {"edge": ("bert.encoder.layer.0", "bert.encoder.layer.1.attention.output.add")},
        {"edge": ("bert.encoder.layer.0", "bert.encoder.layer.1.attention.self.query")},
        {"before": "bert.encoder.layer.1.intermediate"},
        {"before": "output"},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_operations_and_edges_of_forwards_that_do_not_trace_are_cut(where, mode):
    model = bert()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    spliced = gs.insert_grl(model, **where, example_inputs=inputs)
    assert type(spliced) is type(model)
    report = gs.verify_flip(spliced, model, inputs, mode=mode)
    assert report.ok, report
    assert any(row.measured in ("flipped", "mixed") for row in report.parameters)


def test_a_residual_edge_is_reversed_and_the_other_is_not():
    """By calculus: the residual input of a sum is reversed, and what the block adds is not."""
    model = bert().eval()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    edge = ("bert.encoder.layer.0", "bert.encoder.layer.1.attention.output.add")
    spliced = gs.insert_grl(model, edge=edge, example_inputs=inputs)
    layer = model.bert.encoder.layer[1].attention.output

    def negated(module, args, kwargs):
        hidden, residual = args
        residual = residual.clone()
        residual.register_hook(torch.neg)
        return (hidden, residual), kwargs

    expected = copy.deepcopy(model)
    expected.bert.encoder.layer[1].attention.output.register_forward_pre_hook(negated, with_kwargs=True)
    labelled = {**inputs, "labels": LABELS}
    assert layer is model.bert.encoder.layer[1].attention.output
    assert_same(gradients(spliced, labelled), gradients(expected, labelled))


def test_a_name_that_reverses_nothing_is_refused():
    model = bert()
    with pytest.raises(gs.PointNotFoundError, match=r"a list of modules that nobody calls(.|\n)*layer\.1"):
        gs.insert_grl(model, after="bert.encoder.layer[1]")
    with pytest.raises(gs.ShapeError, match=r"has no item \[nonsense\]"):
        gs.insert_grl(model, after="bert[nonsense]")
    with pytest.raises(gs.SurgeryError, match="does not use the value after bert"):
        gs.insert_grl(model, after="bert[last_hidden_state]")
    assert list(gs.reversals(gs.insert_grl(model, after="bert[1]"))) == ["grl_bert_1"]


def test_a_module_of_the_network_names_a_point():
    model = bert()
    assert list(gs.reversals(gs.insert_grl(model, model.bert.pooler))) == ["grl_bert_pooler"]
    with pytest.raises(gs.PointNotFoundError, match="a BertPooler was given that is not a module of this"):
        gs.insert_grl(model, after=bert().bert.pooler)


def test_save_pretrained_and_back_keeps_weights(tmp_path):
    spliced = gs.insert_grl(bert(), after="bert.encoder.layer.0")
    spliced.save_pretrained(tmp_path)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(spliced.state_dict())
    assert all(map(torch.equal, again.state_dict().values(), spliced.state_dict().values()))


def test_the_trainer_runs_unchanged_with_a_head(tmp_path):
    model = bert()
    m = gs.attach_domain_head(model, "bert.encoder.layer.0", hidden=8, example_inputs={"input_ids": IDS})
    rows = [{"input_ids": IDS[n % 2], "attention_mask": MASK[n % 2], "labels": n % 2} for n in range(4)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    before = m.classifier.weight.detach().clone()
    transformers.Trainer(model=m, args=arguments, train_dataset=rows, eval_dataset=rows).train()
    assert not torch.equal(m.classifier.weight, before)


def trained_by_the_trainer(model, inputs, folder, *, checkpointed):
    """The network after two steps of the unmodified Trainer."""
    count = len(next(iter(inputs.values())))
    rows = [
        {name: value[n] for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        for n in range(count)
    ]
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=2,
        per_device_train_batch_size=count,
        learning_rate=0.01,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        gradient_checkpointing=checkpointed,
    )
    model.config.output_hidden_states = "output_hidden_states" in inputs
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_trainer_moves_a_spliced_network_as_it_moves_a_hooked_original(kind, checkpointed, tmp_path):
    make, point, inputs = NETWORKS[kind]
    torch.manual_seed(0)
    model = make()
    spliced = gs.insert_grl(copy.deepcopy(model), after=point)
    hooked = reversed_by_a_hook(model, point)
    found = trained_by_the_trainer(spliced, inputs, tmp_path, checkpointed=checkpointed)
    expected = trained_by_the_trainer(hooked, inputs, tmp_path, checkpointed=checkpointed)
    plain = trained_by_the_trainer(copy.deepcopy(model), inputs, tmp_path, checkpointed=checkpointed)
    assert_same(found, expected)
    assert any(not torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("outputs", ["with_logits", "original"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_trainer_moves_a_network_with_a_head_as_it_moves_the_original(kind, outputs, tmp_path):
    """It minimises the loss of the task alone, which a head leaves as it is."""
    make, point, inputs = NETWORKS[kind]
    torch.manual_seed(0)
    model = make()
    settings = {"hidden": 8, "dropout": 0.0, "pool": "nlc", "outputs": outputs, "example_inputs": inputs}
    m = gs.attach_domain_head(copy.deepcopy(model), after=point, **settings)
    head = {name: value.clone() for name, value in m.domain.state_dict().items()}
    found = trained_by_the_trainer(m, inputs, tmp_path, checkpointed=True)
    expected = trained_by_the_trainer(copy.deepcopy(model), inputs, tmp_path, checkpointed=True)
    assert_same({name: found[name] for name in expected}, expected)
    assert_same(m.domain.state_dict(), head)
    if kind == "t5":
        said = {"max_new_tokens": 3, "do_sample": False}
        model.load_state_dict(expected)
        assert torch.equal(m.eval().generate(IDS, **said), model.eval().generate(IDS, **said))


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_loss_of_a_head_reaches_the_network_reversed_also_with_checkpointing(kind):
    """The oracle is the head without its reversal, on what a hook catches in the original."""
    make, point, inputs = NETWORKS[kind]
    torch.manual_seed(0)
    model = make()
    m = gs.attach_domain_head(
        model, after=point, hidden=8, dropout=0.0, pool="nlc", outputs="original", example_inputs=inputs
    ).train()
    twin, head = copy.deepcopy(model).train(), copy.deepcopy(m.domain)
    head.reversal = torch.nn.Identity()
    caught = []

    def catch(module, args, output):
        value = (output[0] if isinstance(output, tuple) else output).clone()
        value.register_hook(torch.neg)
        caught.append(value)

    twin.get_submodule(point).register_forward_hook(catch)
    transformers.set_seed(0)
    twin(**inputs)
    head(caught[0]).square().sum().backward()
    enable = getattr(m, "activation_checkpointing_enable", m.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    transformers.set_seed(0)
    m(**inputs)
    m.domain.logits.square().sum().backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    found = dict(m.named_parameters())
    assert expected
    assert_same({name: found[name].grad for name in expected}, expected)
    own = {name: p.grad for name, p in head.named_parameters()}
    assert_same({name: p.grad for name, p in m.domain.named_parameters()}, own)
