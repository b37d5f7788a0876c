"""What a report says of each box and line, and what the command line draws."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_surgeries import Small
from rich.cells import cell_len
from small_networks import Net, Untraceable, image
from torch import nn

import grl_surgery as gs
from grl_surgery.cli import main as cli
from grl_surgery.io.programs import inputs_for, record
from grl_surgery.viz import model_explorer as explorer
from grl_surgery.viz.gradient_colors import views_of
from grl_surgery.viz.nested_boxes import boxes_in, nest
from grl_surgery.viz.report_page import report_page

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def signs_of_all_paths(graph: gs.ModelGraph, point: str) -> set[int]:
    """Follows every path from a point to the output, one by one."""
    roles = {node.name: node.role for node in graph.nodes}
    if point == "output":
        return {1}
    users = [edge.target for edge in graph.edges if edge.source == point]
    return {
        sign * (-1 if roles[user] == "reversal" else 1)
        for user in users
        for sign in signs_of_all_paths(graph, user)
    }


@pytest.mark.parametrize(
    "where", [{"after": "stem"}, {"edge": ("stem", "left")}, {"before": "norm"}], ids=str
)
def test_the_gradient_predicted_at_each_point_is_that_of_all_its_paths(where: dict[str, Any]) -> None:
    network = Small()
    report = gs.verify_flip(gs.insert_grl(network, **where), network, IMAGES)
    assert report.draw
    flips = report.draw()
    assert flips
    words = {frozenset({1}): "unchanged", frozenset({-1}): "flipped", frozenset({1, -1}): "mixed"}
    found = {name: word for name, word in flips.points["output"].items() if name != "output"}
    assert found == {name: words[frozenset(signs_of_all_paths(flips.graph, name))] for name in found}
    assert len(found) > 10


def test_the_gradient_on_the_edge_into_a_reversal_is_flipped_and_behind_it_is_not() -> None:
    network = Small()
    report = gs.verify_flip(gs.insert_grl(network, after="norm"), network, IMAGES)
    assert report.draw
    flips = report.draw()
    assert flips
    words = {str(edge): word for edge, word in flips.edges["output"].items() if "grl" in str(edge)}
    assert words == {"norm -> grl_norm": "flipped", "grl_norm -> mean": "unchanged"}


def test_a_block_is_marked_by_its_parameters() -> None:
    network = Net()
    report = gs.verify_flip(gs.insert_grl(network, after="stage1.0"), network, image())
    (view,) = views_of([report])
    assert view.graph
    marks = {box.name: view.box(box) for box in boxes_in(nest(view.graph.graph)) if box.node}
    count = {
        name: sum(row.name.startswith(f"{name}.") for row in report.parameters) for name in ("stem", "stage1")
    }
    assert marks["stem"].measured == f"flipped ({count['stem']} parameters)"
    assert marks["stage1"].kind == "several"
    assert dict(marks["stage1"].counts) == {
        "flipped": count["stage1"] // 2,
        "unchanged": count["stage1"] // 2,
    }
    assert (marks["relu"].predicted, marks["relu"].measured) == ("flipped", "")
    assert marks["grl_stage1_0"].measured == "exact, bit for bit"


def test_a_network_whose_root_cannot_be_traced_is_drawn_by_its_parts() -> None:
    network = Untraceable()
    page = report_page([gs.verify_flip(gs.insert_grl(network, after="body.stage1"), network, image())])
    assert "grl_body_stage1" in page
    assert 'id="picture"' in page


def test_a_report_that_is_stored_or_plain_data_does_not_take_the_network_along() -> None:
    network = Small()
    report = gs.verify_flip(gs.insert_grl(network, after="stem"), network, IMAGES)
    assert "draw" not in json.loads(json.dumps(report.to_dict()))
    assert report.__getstate__()["draw"] is None


# --- the command line ----------------------------------------------------------------------------------


@pytest.fixture
def networks(tmp_path: Path) -> str:
    file = tmp_path / f"networks_of_{tmp_path.name}.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "class Block(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a_layer_with_a_long_name = nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        return self.a_layer_with_a_long_name(x) + x\n"
        "def net():\n"
        "    return nn.Sequential(Block(), Block(), nn.Linear(4, 2)), torch.randn(3, 4)\n"
    )
    return f"{file}:net"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    printed = capsys.readouterr()
    return stopped.value.code or 0, printed.out, printed.err  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("ending", "begins"),
    [("svg", "<svg "), ("html", "<!doctype html>"), ("dot", "digraph"), ("mmd", "flowchart TB")],
)
def test_the_ending_says_what_is_drawn(
    capsys: pytest.CaptureFixture[str], networks: str, tmp_path: Path, ending: str, begins: str
) -> None:
    file = tmp_path / f"net.{ending}"
    code, out, _ = run(capsys, "graph", networks, "--after", "0", "--depth", "2", "-o", str(file))
    assert (code, out) == (0, f"wrote {file}, {file.stat().st_size:,} bytes\n")
    text = file.read_text("utf-8")
    assert text.startswith(begins)
    assert "grl_0" in text
    assert "a_layer_with_a_long_name" in text


def test_another_ending_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = run(capsys, "graph", "no/network", "-o", str(tmp_path / "net.png"))
    assert (code, out) == (2, "")
    assert ".svg, .html, .dot, .mmd" in err


def test_verify_writes_the_page_also_when_it_fails(
    capsys: pytest.CaptureFixture[str], networks: str, tmp_path: Path
) -> None:
    file = tmp_path / "proof.html"
    code, out, _ = run(capsys, "verify", networks, "--after", "0", "--mode", "both", "--html", str(file))
    assert code == 0
    page = file.read_text("utf-8")
    assert page.count("<strong>OK</strong>") == 2
    assert out.splitlines()[1].removeprefix("OK  ") in page


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "words",
    [("graph",), ("graph", "--depth", "2"), ("graph", "--find", "long"), ("verify", "--after", "0")],
    ids=" ".join,
)
def test_no_line_is_wider_than_the_terminal(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    networks: str,
    words: Sequence[str],
    width: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = run(capsys, words[0], networks, *words[1:])
    lines = out.splitlines()
    assert code == 0
    assert [line for line in lines[2 * (words[0] == "graph") :] if cell_len(line) > width] == []


# --- Model Explorer ------------------------------------------------------------------------------------


def test_without_model_explorer_one_line_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, networks: str
) -> None:
    monkeypatch.setitem(sys.modules, "model_explorer", None)
    code, out, err = run(capsys, "graph", networks, "--open-in", "model-explorer")
    assert (code, out) == (2, "")
    assert err.splitlines() == ["error: Model Explorer is not installed: pip install ai-edge-model-explorer"]


def test_model_explorer_gets_the_program_and_both_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Config:
        def add_model_from_pytorch(self, name: str, exported_program: torch.export.ExportedProgram) -> None:
            given["name"], given["program"] = name, exported_program

        def add_node_data(self, name: str, node_data: Any) -> None:
            given[name] = node_data.results

    viewer: Any = types.ModuleType("model_explorer")
    builder: Any = types.ModuleType("model_explorer.node_data_builder")
    viewer.config, viewer.visualize_from_config = Config, lambda config: given.update(shown=config)
    builder.NodeDataResult = lambda value, bgColor, textColor: value
    builder.GraphNodeData = lambda results: types.SimpleNamespace(results=results)
    monkeypatch.setitem(sys.modules, "model_explorer", viewer)
    monkeypatch.setitem(sys.modules, "model_explorer.node_data_builder", builder)

    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    explorer.open_in_model_explorer(gs.insert_grl(network, after="1"), (torch.randn(3, 4),))

    assert isinstance(given["shown"], Config)
    nodes = {node.name for node in given["program"].graph.nodes}
    for factors in (given["predicted"], given["measured"]):
        assert set(factors) <= nodes
        assert factors["p_0_weight"] == "flipped (−1)"
        assert factors["p_2_weight"] == "unchanged (+1)"


def test_the_overlay_tells_a_reversal_that_was_lost() -> None:
    class Keeps(gs.GradientReversal):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 1

    network = nn.Sequential(nn.Linear(4, 8), Keeps(), nn.Linear(8, 2))
    inputs = (torch.randn(3, 4),)
    (view,) = views_of([gs.verify_flip(network, example_inputs=inputs)])
    measured = explorer.overlays(view, record(network, inputs_for(network, inputs), dynamic=False))[
        "measured"
    ]
    assert measured["p_0_weight"][0] == "wrong"
