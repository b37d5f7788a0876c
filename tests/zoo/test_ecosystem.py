"""Surgery on networks of the libraries that people use: a sample, judged by an oracle of plain hooks.

A library that is not installed is skipped. What the oracle itself must notice is tested on small networks.
"""

import dataclasses
import importlib
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import grl_surgery as gs
from grl_surgery.loading import downloads
from grl_surgery.loading.libraries import split_arguments
from grl_surgery.loading.model_zoo import load_model
from grl_surgery.loading.small_configs import small_configs
from grl_surgery.loading.transformers_models import class_names
from grl_surgery.zoo import ecosystem, hooked, trials
from grl_surgery.zoo.ecosystem import (
    NetworkRow,
    is_old,
    read_network_rows,
    result_of,
    try_network,
    write_network_rows,
)
from grl_surgery.zoo.hooked import Spot, call, gradients, record, reversed_at
from grl_surgery.zoo.sources import networks_of
from grl_surgery.zoo.trials import try_everything

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import make_zoo_page  # noqa: E402

SAMPLE = {
    "transformers/BertModel": "an encoder of text",
    "transformers/BertForSequenceClassification": "a head with labels",
    "transformers/DistilBertForTokenClassification": "one label a token",
    "transformers/GPT2LMHeadModel": "a cache of keys and values, tied weights",
    "transformers/T5ForConditionalGeneration": "an encoder and a decoder",
    "transformers/ViTForImageClassification": "images",
    "transformers/SwinModel": "stages of windows",
    "transformers/ConvNextModel": "convolutions",
    "transformers/SegformerForSemanticSegmentation": "logits for each pixel",
    "transformers/Wav2Vec2Model": "waves of sound, masked at random by numpy",
    "transformers/WhisperModel": "spectra, and text that is decoded",
    "transformers/CLIPModel": "images and text",
    "transformers/LlamaForCausalLM": "rotary positions, shared keys",
    "transformers/MixtralModel": "experts",
    "transformers/MambaModel": "a state space",
    "timm/test_vit": "a graph of the root",
    "timm/test_efficientnet": "a graph with in-place activations",
    "timm/test_resnet": "a graph with sums",
    "torchvision/squeezenet1_1": "concatenations",
    "torchvision/mnasnet0_5": "batch norms",
    "monai/UNet": "skip connections, nested",
    "monai/DynUNet": "a network in a network",
    "smp/Unet": "a decoder",
    "torch_geometric/GCN": "messages in a graph",
    "torch_geometric/GraphUNet": "pooling of nodes",
    "torchaudio/Conformer?input_dim=40&num_heads=4&ffn_dim=64&num_layers=3"
    "&depthwise_conv_kernel_size=7": "lengths",
    "speechbrain/ECAPA_TDNN.ECAPA_TDNN?input_size=40&channels=[32,32,32,32,96]&lin_neurons=16": "speakers",
    "diffusers/AutoencoderTiny?encoder_block_out_channels=[16,16]&decoder_block_out_channels=[16,16]"
    "&num_encoder_blocks=[1,1]&num_decoder_blocks=[1,1]": "an autoencoder",
    "open_clip/ViT-B-32": "images and text",
    "ultralytics/yolov8n": "a list of layers by index",
}
_INSTALLED = {"smp": "segmentation_models_pytorch"}


_TRY_EACH = """
import dataclasses, json, sys
from grl_surgery.zoo.ecosystem import try_network
for source in sys.argv[1:]:
    print(json.dumps(dataclasses.asdict(try_network(source))))
"""


@pytest.mark.long
def test_every_cut_and_use_is_what_hooks_on_the_original_give() -> None:
    """In a process of its own, where autograd has started no threads: each network is tried in a fork."""
    libraries = {source: source.partition("/")[0] for source in SAMPLE}
    installed = [
        source
        for source, library in libraries.items()
        if importlib.util.find_spec(_INSTALLED.get(library, library)) is not None
    ]
    done = subprocess.run([sys.executable, "-c", _TRY_EACH, *installed], capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == len(installed), done.stderr[-2000:]
    wrong = [f"{row['name']}: {row['reason']}" for row in rows if not row["built"]]
    for row in rows:
        for role, text in row["outcomes"].items():
            may_refuse = role in ("operation", "edge")  # inside a forward that no graph has
            if not text.startswith(("ok", "skipped: ", "refused: ") if may_refuse else ("ok", "skipped: ")):
                wrong.append(f"{row['name']} {role} {row['places'].get(role, '')}: {text}")
    assert wrong == []
    for row in rows:
        assert {"early", "middle", "late", "head", "strip", "deepcopy"} <= row["outcomes"].keys(), row["name"]


# ------------------------------------------------------------------------------- what the oracle must notice


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y = y + self.second(y)
        return self.last(y)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Residual(), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x))


X = (torch.linspace(-1, 1, 12).view(3, 4),)


def signs(network: nn.Module, spot: Spot) -> dict[str, str]:
    plain = gradients(network, call(network, X))
    with reversed_at(network, spot):
        found = gradients(network, call(network, X))
    return {
        name: "kept"
        if torch.equal(found[name], plain[name])
        else "flipped"
        if torch.equal(found[name], -plain[name])
        else "mixed"
        for name in plain
    }


def test_the_oracle_reverses_what_is_before_a_module_and_nothing_else() -> None:
    torch.manual_seed(0)
    found = signs(Inner(), Spot("block.second"))
    assert found == {
        "block.first.weight": "mixed",
        "block.first.bias": "mixed",
        "block.second.weight": "flipped",
        "block.second.bias": "flipped",
        "block.last.weight": "kept",
        "block.last.bias": "kept",
        "head.weight": "kept",
        "head.bias": "kept",
    }


def test_the_oracle_reverses_one_argument_of_an_operation_or_its_result() -> None:
    torch.manual_seed(0)
    edge = signs(Inner(), Spot("block", operation="add", argument=1))
    assert (edge["block.second.weight"], edge["block.first.weight"]) == ("flipped", "mixed")
    result = signs(Inner(), Spot("block", operation="add"))
    assert (result["block.second.weight"], result["block.first.weight"]) == ("flipped", "flipped")
    assert result["block.last.weight"] == "kept"


def test_a_recording_names_operations_by_the_forward_that_they_stand_in() -> None:
    seen = record(Inner(), X)
    assert [(i.spot.path, i.spot.operation) for i in seen.operations if i.spot.operation == "add"] == [
        ("block", "add")
    ]
    assert [item.spot.path for item in seen.modules] == [
        "block.first",
        "block.second",
        "block.last",
        "block",
        "head",
    ]


def outcomes(monkeypatch: pytest.MonkeyPatch, broken: Any) -> dict[str, str]:
    monkeypatch.setattr(trials.gs, "insert_grl", broken)
    torch.manual_seed(0)
    return try_everything(Inner(), X).outcomes


def test_a_network_that_is_right_is_ok_at_every_place() -> None:
    torch.manual_seed(0)
    found = try_everything(Inner(), X)
    assert {role: text for role, text in found.outcomes.items() if text != "ok"} == {}
    assert {"early", "middle", "late", "operation", "edge", "head"} <= set(found.outcomes)


def test_a_reversal_that_is_lost_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(model: nn.Module, **keyword: Any) -> nn.Module:
        spliced = insert(model, **keyword)
        for layer in gs.reversals(spliced).values():
            layer.set_coeff(0.0)
        return spliced

    insert = gs.insert_grl
    found = outcomes(monkeypatch, lost)
    assert all("wrong" in found[role] for role in ("early", "middle", "late", "operation", "edge"))


def test_a_reversal_at_another_place_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    insert = gs.insert_grl
    found = outcomes(monkeypatch, lambda model, **keyword: insert(model, after="head"))
    assert found["early"].startswith("wrong: in train mode")


def test_a_proof_that_says_otherwise_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    verify = gs.verify_flip

    def against_another(model: nn.Module, reference: nn.Module, *rest: Any, **keyword: Any) -> Any:
        report = verify(model, reference, *rest, **keyword)
        return dataclasses.replace(report, forward_identical=False)

    monkeypatch.setattr(trials.gs, "verify_flip", against_another)
    torch.manual_seed(0)
    assert try_everything(Inner(), X).outcomes["middle"].startswith("disagrees: in train mode the proof says")


def test_an_error_and_a_refusal_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: nn.Module, **keyword: Any) -> nn.Module:
        if "edge" in keyword:
            raise gs.SurgeryError("not here")
        raise KeyError("layer")

    found = outcomes(monkeypatch, fails)
    assert found["edge"] == "refused: not here"
    assert found["early"].startswith("broken: KeyError: 'layer' (test_ecosystem.py:")


# ------------------------------------------------------------------------------------- names with arguments


def test_arguments_stand_behind_a_question_mark_as_python_or_text() -> None:
    assert split_arguments("UNet?channels=[8,16]&norm=batch&bias=False") == (
        "UNet",
        {"channels": [8, 16], "norm": "batch", "bias": False},
    )


def test_an_argument_without_a_value_is_refused_with_a_call_that_works() -> None:
    with pytest.raises(gs.SurgeryError, match=r"'spatial_dims' is no argument of UNet"):
        load_model("monai/UNet?spatial_dims") if importlib.util.find_spec("monai") else split_arguments(
            "UNet?spatial_dims"
        )


def test_a_class_of_transformers_is_small_and_takes_attributes_of_its_configuration() -> None:
    loaded = load_model("transformers/BertModel?num_hidden_layers=3")
    assert sum(p.numel() for p in loaded.module.parameters()) < 1_000_000
    assert len(loaded.module.encoder.layer) == 3  # type: ignore[union-attr, arg-type]
    assert isinstance(loaded.example_inputs, dict)
    assert loaded.module(**loaded.example_inputs).last_hidden_state.shape == (2, 9, 24)


def test_a_class_that_transformers_has_not_is_answered_with_near_ones() -> None:
    with pytest.raises(
        gs.SurgeryError, match=r"(?s)transformers has no class 'BertModle'.*nearest: transformers/BertModel"
    ) as caught:
        load_model("transformers/BertModle")
    assert "\n" in str(caught.value)


def test_an_attribute_that_a_configuration_has_not_is_refused() -> None:
    with pytest.raises(
        gs.SurgeryError, match=r"(?s)transformers/BertModel has no 'num_layer'.*num_hidden_layers"
    ):
        load_model("transformers/BertModel?num_layer=3")


def test_a_class_has_no_pretrained_weights() -> None:
    with pytest.raises(gs.SurgeryError, match="a class has no weights of its own"):
        load_model("transformers/BertModel", pretrained=True)


def test_a_hub_that_cannot_be_reached_is_said_plainly_with_a_class_that_needs_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(downloads, "_unreachable_hub", lambda: "huggingface.co: no route to host")
    with pytest.raises(
        gs.SurgeryError, match=r"(?s)configuration of 'nobody/no-such-model' is neither"
    ) as caught:
        load_model("transformers/nobody/no-such-model")
    assert "transformers/BertModel" in str(caught.value)
    assert "--pretrained" not in str(caught.value)


def test_a_module_that_uses_what_it_returns_does_not_count_as_somebody_who_does() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.logits(x)
            return logits, logits.softmax(-1)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = Router()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.router(x)[1]

    assert [item.spot.path for item in record(Experts(), X).modules] == ["router.logits"]


def test_a_library_that_is_not_installed_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    with pytest.raises(
        gs.SurgeryError, match=r"(?s)torch_geometric.*not installed.*pip install torch-geometric"
    ):
        load_model("torch_geometric/GCN")


def test_widths_are_divided_alike_so_that_heads_still_divide_them() -> None:
    config = importlib.import_module("transformers").LlamaConfig()
    small = next(small_configs(config))
    assert config.hidden_size == 4096
    assert small.hidden_size % small.num_attention_heads == 0
    assert config.intermediate_size / config.hidden_size == small.intermediate_size / small.hidden_size
    assert (small.num_hidden_layers, small.vocab_size) == (2, 256)


def test_heads_are_divided_with_the_widths_and_the_width_of_one_head_is_not() -> None:
    config = importlib.import_module("transformers").LlamaConfig(num_key_value_heads=8)
    small = list(itertools.islice(small_configs(config), 4))
    assert config.hidden_size // config.num_attention_heads == 128
    assert [each.hidden_size // each.num_attention_heads for each in small] == [8, 32, 128, 8]
    assert [each.num_attention_heads for each in small] == [4, 4, 4, 32]
    first = small[0]
    assert first.num_attention_heads // first.num_key_value_heads == 4


def test_a_default_that_every_checkpoint_sets_is_no_obstacle() -> None:
    config = importlib.import_module("transformers").EsmConfig()
    assert config.vocab_size is None
    small = next(small_configs(config))
    assert (small.vocab_size, small.pad_token_id) == (256, 0)
    assert load_model("transformers/EsmModel").example_inputs is not None


def test_the_parts_of_a_rotary_position_still_fill_one_head() -> None:
    for name in ("GlmOcrTextModel", "Qwen3VLModel"):
        assert isinstance(load_model(f"transformers/{name}").example_inputs, dict)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("DecisionTransformerModel", {"states", "actions", "rewards", "returns_to_go", "timesteps"}),
        ("AudioFlamingo3Encoder", {"input_features", "input_features_mask"}),
    ],
)
def test_arguments_that_have_a_default_and_must_be_given_are_found(name: str, arguments: set[str]) -> None:
    loaded = load_model(f"transformers/{name}")
    assert isinstance(loaded.example_inputs, dict)
    assert set(loaded.example_inputs) == arguments
    assert leaves_of(loaded.module(**loaded.example_inputs))


def test_images_of_any_size_are_given_as_patches() -> None:
    loaded = load_model("transformers/Qwen3_5VisionModel")
    assert isinstance(loaded.example_inputs, dict)
    config: Any = loaded.module.config
    wide = config.in_channels * config.temporal_patch_size * config.patch_size**2
    assert loaded.example_inputs["hidden_states"].shape == (32, wide)
    assert leaves_of(loaded.module(**loaded.example_inputs))


def leaves_of(output: Any) -> list[torch.Tensor]:
    return [value for value in hooked.leaves(output) if value.is_floating_point()]


def test_each_architecture_of_transformers_stands_in_the_ledger_once_and_every_task_somewhere() -> None:
    names = networks_of("transformers")
    assert len(names) == len(set(names))
    bases = {f"transformers/{name}" for name in class_names(tasks=False)}
    assert bases <= set(names)
    tasks = set(names) - bases
    assert 20 <= len(tasks) <= 60
    assert any("ForSequenceClassification" in name for name in tasks)
    assert any("ForConditionalGeneration" in name for name in tasks)


def test_a_network_that_is_only_built_runs_and_is_not_cut() -> None:
    row = try_network("transformers/BertModel", build_only=True)
    assert (row.built, row.outcomes, row.places) == (True, {}, {})
    assert row.parameters > 0
    assert not try_network("transformers/NoSuchModel", build_only=True).built


# --------------------------------------------------------------------------------------------------- ledger


def test_a_row_says_the_worst_that_happened() -> None:
    row = NetworkRow("a/B", "a", True, outcomes={"early": "ok", "late": "skipped: no"})
    assert result_of(row) == "ok"
    assert (
        result_of(dataclasses.replace(row, outcomes={"early": "refused: x", "edge": "wrong: y"})) == "wrong"
    )
    assert result_of(dataclasses.replace(row, built=False)) == "not built"


def test_a_ledger_is_read_as_it_was_written_also_what_was_not_built(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        NetworkRow("b/C", "b", False, "why"),
        NetworkRow("a/B", "a", True, outcomes={"early": "ok"}, seconds=1.5),
    ]
    write_network_rows(file, rows)
    assert [json.loads(line)["name"] for line in file.read_text().splitlines()] == ["a/B", "b/C"]
    assert read_network_rows(file) == {row.name: row for row in rows}


def test_a_row_of_another_state_of_the_code_is_old_and_the_page_says_how_many_there_are() -> None:
    row = try_network("transformers/NoSuchModel")
    assert not is_old(row)
    older = dataclasses.replace(row, name="transformers/Other", code="0123456789")
    assert is_old(older)
    said = "\n".join(make_zoo_page.ecosystem_lines({row.name: row, older.name: older}))
    assert "The rows are of 2 states of this library's code" in said
    assert "1 with 0123456789" in said
    assert "states of this library" not in "\n".join(make_zoo_page.ecosystem_lines({row.name: row}))


def test_a_network_that_takes_too_long_is_ended_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(_source: str) -> NetworkRow:
        while True:
            pass

    monkeypatch.setattr(ecosystem, "_row", forever)
    row = try_network("transformers/BertModel", seconds=1)
    assert (row.built, row.reason) == (False, "it took longer than 1 s")


def test_a_library_that_ends_the_process_leaves_a_row_with_what_it_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ends(_source: str) -> NetworkRow:
        raise SystemExit("no licence")

    monkeypatch.setattr(ecosystem, "_row", ends)
    row = try_network("transformers/BertModel", seconds=20)
    assert (row.built, row.reason) == (False, "SystemExit: no licence")


def test_a_network_that_is_too_large_stands_in_the_ledger_with_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ecosystem, "LARGEST", 10)
    row = try_network("transformers/BertModel", seconds=20)
    assert not row.built
    assert "parameters, more than the 10 up to which a network is tried" in row.reason


def test_an_edge_is_tried_that_the_listing_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Residual(), nn.Linear(2, 4), Residual(), nn.Linear(2, 4), Residual())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x)

    list_all = gs.graph

    def without_the_middle(*args: Any, **keyword: Any) -> Any:
        found = list_all(*args, **keyword)
        edges = [edge for edge in found.edges if not edge.target.startswith(("blocks.2.add", "add"))]
        return dataclasses.replace(found, edges=tuple(edges))

    torch.manual_seed(0)
    assert try_everything(Net(), X).places["edge"] == "blocks.2.add"
    monkeypatch.setattr(trials.gs, "graph", without_the_middle)
    found = try_everything(Net(), X)
    assert found.places["edge"] in ("blocks.0.add", "blocks.4.add")
    assert found.outcomes["edge"] == "ok"


def test_the_attributes_that_a_spliced_network_counts_in_are_put_back() -> None:
    class Counting(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.last = 0, (0, 0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.last = tuple(x.shape)
            self.seen = x.detach().mean()
            return super().forward(x) * self.calls

    torch.manual_seed(0)
    found = try_everything(Counting(), X)
    assert {role: t for role, t in found.outcomes.items() if not t.startswith(("ok", "skipped"))} == {}


def test_a_head_is_put_where_each_sample_has_a_row() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.expert, self.last = nn.Linear(4, 4), nn.Linear(2, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.last(self.expert(x.view(-1, 2)).view(x.shape))

    torch.manual_seed(0)
    found = try_everything(Tokens(), X)
    assert found.places["middle"] == "expert"
    assert found.places["head"] in ("first", "last")
    assert found.outcomes["head"] == "ok"


def test_a_network_that_cannot_be_built_is_a_row_with_the_reason() -> None:
    row = try_network("transformers/NoSuchModel")
    assert (row.built, row.library) == (False, "transformers")
    assert "transformers has no class 'NoSuchModel'" in row.reason


@pytest.fixture
def ledger() -> dict[str, NetworkRow]:
    return read_network_rows(make_zoo_page.ECOSYSTEM)


def test_nothing_in_the_committed_ledger_is_wrong_and_every_outcome_has_its_reason(
    ledger: dict[str, NetworkRow],
) -> None:
    assert ledger
    for row in ledger.values():
        assert row.built or row.reason, row.name
        assert result_of(row) != "wrong", row.name
        for text in row.outcomes.values():
            assert text == "ok" or ": " in text, row.name


def test_the_page_says_what_the_ecosystem_ledger_says(ledger: dict[str, NetworkRow]) -> None:
    page = (ROOT / "docs/zoo.md").read_text("utf-8")
    assert "\n".join(make_zoo_page.ecosystem_lines(ledger)) in page
