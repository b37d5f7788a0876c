"""Surgery on networks by name: a sample with one of every awkward kind, the names of points, and the ledgers.

python tests/zoo/test_zoo.py     # writes golden_names.json anew
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo_work
from torch import Tensor, nn

import grl_surgery as gs
from grl_surgery.capture.capture import trace
from grl_surgery.capture.traceable_copy import is_building_block
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.zoo import shapes, structural
from grl_surgery.zoo.building import without_values
from grl_surgery.zoo.ledger import NotProved, Row, add_row, read_rows, write_rows
from grl_surgery.zoo.names import by_family, every_name, family, matching
from grl_surgery.zoo.numeric import check_numbers, smallest
from grl_surgery.zoo.paths import signs_in_autograd
from grl_surgery.zoo.places import survey
from grl_surgery.zoo.shapes import shapes_in_one_step
from grl_surgery.zoo.structural import check_structure
from grl_surgery.zoo.tiers import check, versions
from grl_surgery.zoo.workers import run_all

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import make_zoo_page  # noqa: E402

# One of each kind that once stopped some tracer, extractor or exporter: what is awkward stands behind it.
SAMPLE = {
    "timm/botnet26t_256": "relative positions, split by strings",
    "timm/cait_xxs24_224": "class attention",
    "timm/coat_tiny": "tuples through parallel blocks, modules with two paths",
    "timm/coatnet_pico_rw_224": "sizes that steer the forward",
    "timm/convit_tiny": "positions made on the fly",
    "timm/convnext_atto": "permutations",
    "timm/crossvit_9_240": "lists of tensors",
    "timm/cspresnet50": "two branches",
    "timm/davit_tiny": "pads by size",
    "timm/densenet121": "concatenations, checkpointing",
    "timm/dla34": "trees",
    "timm/efficientformer_l1": "attention biases kept between calls",
    "timm/efficientvit_b0": "multi-scale attention",
    "timm/fastvit_t8": "reparameterized branches",
    "timm/focalnet_tiny_srf": "focal modulation",
    "timm/gcvit_xxtiny": "windows",
    "timm/ghostnet_050": "ghost modules",
    "timm/halonet26t": "halo attention",
    "timm/hgnet_tiny": "concatenations in order",
    "timm/hiera_tiny_224": "a forward that unrolls",
    "timm/hrnet_w18_small": "lists assigned item by item",
    "timm/levit_128s": "a cache between calls in eval mode",
    "timm/maxvit_nano_rw_256": "grids and blocks",
    "timm/mobilenetv4_conv_small": "universal blocks",
    "timm/mvitv2_tiny": "sizes passed along",
    "timm/naflexvit_base_patch16_gap": "a dict or a tensor",
    "timm/nest_tiny": "blocks of blocks",
    "timm/nextvit_small": "two kinds of blocks",
    "timm/nfnet_l0": "weights standardized in the forward",
    "timm/pvt_v2_b0": "sizes next to features",
    "timm/res2net50_14w_8s": "a split and a chain of sums",
    "timm/selecsls42b": "a list in the forward",
    "timm/sequencer2d_s": "LSTMs",
    "timm/skresnet18": "selective kernels",
    "timm/swin_tiny_patch4_window7_224": "shifted windows, a mask in a buffer",
    "timm/tiny_vit_5m_224": "attention biases by index",
    "timm/tnt_s_patch16_224": "two streams of tokens",
    "timm/tresnet_m": "anti-aliasing",
    "timm/twins_svt_small": "a root that does not trace",
    "timm/visformer_tiny": "positions added thrice",
    "timm/volo_d1_224": "outlook attention",
    "timm/xcit_nano_12_p16_224": "Fourier positions",
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn": "a list of images and a dict of losses",
    "torchvision/googlenet": "other outputs in train mode",
    "torchvision/lraspp_mobilenet_v3_large": "a dict of outputs",
    "torchvision/quantized_mobilenet_v2": "quantization stubs",
    "torchvision/regnet_x_400mf": "widths computed with tensors",
    "torchvision/raft_small": "a loop of updates",
    "torchvision/s3d": "video",
    "torchvision/vgg11": "no join at all",
}


LONG = {
    *("timm/tnt_s_patch16_224", "timm/sequencer2d_s", "timm/hrnet_w18_small", "timm/coat_tiny"),
    *("timm/mvitv2_tiny", "timm/densenet121", "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in SAMPLE]
)
def test_each_cut_reverses_the_paths_that_are_predicted_and_no_others(name: str) -> None:
    row = check(name, "structural")
    assert row.result == "ok", row.reason
    assert {"first stage", "middle stage", "last stage", "operation"} <= set(row.places)
    assert ("edge" in row.places) is (name != "torchvision/vgg11")


def test_the_numeric_tier_compares_every_bit() -> None:
    row = check_numbers("timm/test_resnet")
    assert row.result == "ok"
    assert row.facts["flipped"] > 100
    assert row.facts["program"] == "equal"


# ------------------------------------------------------------------------------------- what it must notice


_VECTOR, _CHANNELS = torch.empty(6, device="meta"), torch.empty(4, device="meta")
LAYERS = {
    "batch_norm": lambda x: F.batch_norm(x, _CHANNELS, _CHANNELS, _CHANNELS, _CHANNELS, True),
    "batch_norm in eval": lambda x: F.batch_norm(x, _CHANNELS, _CHANNELS, _CHANNELS, _CHANNELS),
    "layer_norm": lambda x: F.layer_norm(x, (6,), _VECTOR, _VECTOR),
    "layer_norm over two": lambda x: F.layer_norm(x, (5, 6)),
    "linear": lambda x: F.linear(x[0, 0], torch.empty(3, 6, device="meta"), torch.empty(3, device="meta")),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "clamp_": lambda x: x.clone().clamp_(0, 1),
    "normal_": lambda x: x.clone().normal_(),
    **{
        name: getattr(F, name)
        for name in ("gelu", "relu", "relu6", "hardswish", "hardsigmoid", "mish", "elu")
    },
    **{name: getattr(F, name) for name in ("leaky_relu", "softplus", "hardtanh")},
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_shape_in_one_step_is_the_shape_and_the_record_that_torch_works_out(layer: str) -> None:
    dense = torch.empty(2, 4, 5, 6, device="meta")
    last = dense.to(memory_format=torch.channels_last)
    for x in (dense, last, dense.double(), dense.transpose(0, 1).contiguous().transpose(0, 1)):
        x = x.detach().requires_grad_()
        wanted = LAYERS[layer](x)
        with shapes_in_one_step():
            found = LAYERS[layer](x)
        assert _facts(found) == _facts(wanted)


def _facts(value: Tensor) -> tuple[Any, ...]:
    assert value.grad_fn is not None
    return value.shape, value.dtype, value.device, value.stride(), value.grad_fn.name()


def test_what_torch_works_out_itself_is_back_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes._KERNELS, "gelu", lambda x, **_: x.new_empty(7))
    x = torch.empty(2, 3, device="meta")
    with shapes_in_one_step():
        assert F.gelu(x).shape == (7,)
    assert F.gelu(x).shape == (2, 3)


def test_a_reversal_that_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientReversal, "forward", lambda self, x: x * 1)
    with pytest.raises(NotProved, match=r"first stage, \S+: in train mode \S+ is unchanged, not flipped"):
        check_structure("timm/test_resnet")


def test_a_reversal_at_another_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanged(model: nn.Module, places: Any, root: str) -> tuple[nn.Module, list[str]]:
        spliced, names = all_cuts(model, places, root)
        first, second = (node for node in spliced.graph.nodes if node.target in names[:2])
        first.target, second.target = second.target, first.target
        spliced.recompile()
        return spliced, names

    all_cuts = structural._all_cuts
    monkeypatch.setattr(structural, "_all_cuts", exchanged)
    with pytest.raises(NotProved, match=r"first stage, .* in train mode .* is flipped, not unchanged"):
        check_structure("timm/test_resnet")


def test_a_detached_parameter_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientReversal, "forward", lambda self, x: gs.reverse_gradient(x.detach()))
    with pytest.raises(NotProved, match="is unreached, not flipped"):
        check_structure("timm/test_resnet")


# ------------------------------------------------------------------------------- the walk through autograd


def leaf() -> torch.Tensor:
    return torch.ones(2, requires_grad=True)


def test_a_path_around_a_reversal_counts_as_well_as_the_one_through_it() -> None:
    only, both, other = leaf(), leaf(), leaf()
    x = both * 2
    reversed_ = gs.reverse_gradient(x * only)
    (found,) = signs_in_autograd([(reversed_ + x) * other], [[reversed_.grad_fn]])
    assert found == {id(only): {-1}, id(both): {1, -1}, id(other): {1}}


def test_two_reversals_are_told_apart_though_both_stand_on_the_same_path() -> None:
    first, second = leaf(), leaf()
    inner = gs.reverse_gradient(first * 1)
    outer = gs.reverse_gradient(inner * second)
    apart = signs_in_autograd([outer], [[inner.grad_fn], [outer.grad_fn]])
    assert apart == [{id(first): {-1}, id(second): {1}}, {id(first): {-1}, id(second): {-1}}]


def test_a_reversal_that_is_called_twice_on_a_path_cancels_itself() -> None:
    w = leaf()
    once = gs.reverse_gradient(w * 1)
    twice = gs.reverse_gradient(once * 1)
    assert signs_in_autograd([twice], [[once.grad_fn, twice.grad_fn]]) == [{id(w): {1}}]


def test_an_output_that_is_itself_a_parameter_is_reached() -> None:
    w = leaf()
    assert signs_in_autograd([w, w.detach()], [[]]) == [{id(w): {1}}]


# -------------------------------------------------------------------------------------------- golden names

GOLDEN = Path(__file__).with_name("golden_names.json")
NAMED = (
    "timm/resnet50",
    "timm/convnext_tiny",
    "timm/vit_base_patch16_224",
    "timm/swin_tiny_patch4_window7_224",
    "timm/efficientnet_b0",
    "timm/mobilenetv3_large_100",
    "timm/regnety_016",
    "timm/densenet121",
    "timm/deit3_small_patch16_224",
    "timm/eva02_tiny_patch14_224",
    "timm/maxvit_nano_rw_256",
    "timm/mixer_s16_224",
    "torchvision/resnet18",
    "torchvision/vgg16",
    "torchvision/googlenet",
    "torchvision/vit_b_16",
    "torchvision/swin_t",
    "torchvision/convnext_tiny",
    "torchvision/mobilenet_v2",
    "torchvision/fcn_resnet50",
)


def names_of(source: str) -> list[str]:
    """What the root does, and what happens in the first of every numbered row of modules."""
    model = without_values(source)
    later = re.compile(r"([1-9]\d+|[2-9])(\.|$)")
    traced_modules = {
        path for path, m in model.named_modules() if not is_building_block(m) and not later.search(path)
    }
    return trace(model, traced_modules, allow_untraceable=True).names()


@pytest.mark.parametrize("source", NAMED)
def test_points_are_called_what_they_were_called(source: str) -> None:
    assert names_of(source) == json.loads(GOLDEN.read_text())[source]


# ---------------------------------------------------------------------------------------- names and ledger


def test_every_network_that_the_libraries_list_is_in_a_family() -> None:
    names = every_name()
    assert len(set(names)) == len(names) > 1_400
    assert [name for members in by_family(names).values() for name in members].sort() == list(names).sort()


def test_a_pattern_that_fits_nothing_is_answered_with_near_names() -> None:
    with pytest.raises(gs.SurgeryError, match="nearest: timm/resnet50"):
        matching("timm/resnet5O")


def test_the_smallest_network_of_a_file_has_the_fewest_parameters() -> None:
    assert smallest(["timm/resnet50", "timm/test_resnet", "timm/resnet18"]) == "timm/test_resnet"


def row(name: str, **changes: Any) -> Row:
    made = Row(name, "timm/resnet", "structural", "ok", places={"edge": "a -> b"}, seconds=0.5)
    return dataclasses.replace(made, **changes)


def test_a_ledger_keeps_the_last_row_of_a_network_and_survives_an_interruption(tmp_path: Path) -> None:
    ledger = tmp_path / "zoo.jsonl"
    for each in (row("b"), row("a", result="failed", reason="why"), row("a")):
        add_row(ledger, each)
    with ledger.open("a") as file:
        file.write('{"name": "c", "fam')
    assert read_rows(ledger) == {"b": row("b"), "a": row("a")}
    write_rows(ledger, read_rows(ledger).values())
    assert [json.loads(line)["name"] for line in ledger.read_text().splitlines()] == ["a", "b"]


def test_another_file_is_no_ledger(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("one\ntwo\n")
    with pytest.raises(gs.SurgeryError, match=r"line 1 of .*notes\.txt is no row of a ledger: 'one'"):
        read_rows(file)


def test_a_failure_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structural, "survey", lambda model: 1 / 0)
    failed = check("timm/test_resnet", "structural")
    assert (failed.result, failed.reason) == ("failed", "ZeroDivisionError: division by zero")
    assert failed.versions == versions("timm/test_resnet")


# ------------------------------------------------------------------------------------------------ processes


def results(*names: str, **limits: Any) -> list[str]:
    return list(run_all(zoo_work.work, names, zoo_work.failed, **limits))


def test_a_process_is_kept_from_name_to_name() -> None:
    found = results("a", "b", "c")
    assert [text.split()[0] for text in found] == ["a", "b", "c"]
    assert len({text.split()[-1] for text in found}) == 1


def test_what_overruns_its_time_or_dies_is_a_failure_and_the_rest_goes_on() -> None:
    found = results("dies", "slow", "last", timeout=4.0)
    assert found[:2] == ["dies: the process ended with status 3", "slow: it took longer than 4 s"]
    assert found[2].startswith("last by ")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a process to a limit on its memory")
def test_what_needs_too_much_memory_is_a_failure() -> None:
    found = results("hungry", "last", memory=1.0)
    assert found[0] == "hungry: it needs more than 1 GiB of memory"
    assert found[1].startswith("last by ")


# ------------------------------------------------------------------------------------- the committed ledgers


@pytest.fixture(scope="module")
def ledgers() -> tuple[dict[str, Row], dict[str, Row]]:
    return read_rows(make_zoo_page.STRUCTURAL), read_rows(make_zoo_page.NUMERIC)


def test_the_page_is_what_the_ledgers_say(ledgers: tuple[dict[str, Row], dict[str, Row]]) -> None:
    assert (ROOT / "docs/zoo.md").read_text("utf-8") == make_zoo_page.page(*ledgers, every_name())


def test_the_headline_is_the_same_everywhere(ledgers: tuple[dict[str, Row], dict[str, Row]]) -> None:
    headline = make_zoo_page.headline(ledgers[0], every_name())
    said = {
        number
        for file in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"))
        for number in re.findall(r"[\d,]+ of [\d,]+ networks", file.read_text("utf-8"))
    }
    assert said == {headline}


def test_a_name_that_cannot_be_done_stands_in_the_ledger_with_its_reason(
    ledgers: tuple[dict[str, Row], dict[str, Row]],
) -> None:
    for tier, rows in zip(("structural", "numeric"), ledgers, strict=True):
        for each in rows.values():
            assert each.tier == tier
            assert each.family == family(each.name)
            assert (
                each.reason
                if each.result == "failed" or (each.device == "cpu" and tier == "structural")
                else True
            )


def test_a_survey_of_a_network_without_blocks_falls_back_on_its_layers() -> None:
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    assert [place.at for place in survey(network).places] == ["0", "2", "3", "1"]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({source: names_of(source) for source in NAMED}, indent=0) + "\n")
