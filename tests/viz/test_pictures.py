"""Boxes, lines, SVG, DOT and Mermaid: nothing is lost, nothing overlaps, nothing from a model is markup."""

from __future__ import annotations

import itertools
import pickle
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import Net, Repeated, image
from torch import nn

import grl_surgery as gs
from grl_surgery.graph_data import ModelGraph
from grl_surgery.points import Edge, GraphNode
from grl_surgery.surgery.describe import describe
from grl_surgery.viz.hide_sizes import size_nodes
from grl_surgery.viz.layout import Layout, lay_out
from grl_surgery.viz.nested_boxes import Box, Inside, Line, boxes_in, nest
from grl_surgery.viz.svg import graph_svg, size_of

HOSTILE = "\"]-->&lt;<script>alert('1')</script>`#;%\\"


class Dense(nn.Module):
    """Each layer takes the values of all layers before it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 * (place + 1), 4) for place in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for layer in self.layers:
            values.append(layer(torch.cat(values, 1)))
        return torch.cat(values, 1)


class Twice(nn.Module):
    """Calls its body twice, with something between."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.body(x).exp())


class Downsampled(nn.Module):
    """Its shortcut runs before its main path."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.main = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.short(x) + self.main(x)


def chain(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(*blocks)


def insides(top: Inside) -> list[Inside]:
    return [top, *(box.inside for box in boxes_in(top) if box.inside)]


def hostile_graph() -> ModelGraph:
    nodes = (GraphNode(HOSTILE, "call_module", HOSTILE, (1,)), GraphNode("end", "call_function", "subgraph"))
    return ModelGraph(HOSTILE, nodes, (Edge(HOSTILE, "end", "0"),))


# --- boxes in boxes ------------------------------------------------------------------------------------


def test_each_point_lies_in_the_blocks_that_its_name_says() -> None:
    top = nest(describe(Net(), None, image()))
    assert [box.label for box in top.boxes] == [
        *("x", "stem", "relu", "stage1", "stage2", "mean", "fc", "output")
    ]
    stage = next(box for box in top.boxes if box.label == "stage1")
    assert stage.inside
    assert [(box.name, box.kind) for box in stage.inside.boxes] == [
        ("stage1", "entry"),
        ("stage1.0", "block"),
        ("stage1.1", "block"),
        ("stage1", "exit"),
    ]


def test_every_point_but_sizes_is_drawn_once() -> None:
    graph = describe(Net(), None, image())
    drawn = [box.name for box in boxes_in(nest(graph)) if box.node and not box.inside]
    assert sorted(drawn) == sorted({node.name for node in graph.nodes} - size_nodes(graph))


def test_a_module_that_is_called_twice_is_drawn_twice() -> None:
    boxes = nest(describe(Twice(), None, torch.randn(2, 4))).boxes
    assert [box.name for box in boxes if box.kind == "block"] == ["body#1", "body#2"]


def test_a_reversal_stands_in_the_block_around_both_its_ends_and_does_not_break_it_in_two() -> None:
    network = chain(nn.Linear(4, 4), Downsampled())
    inside_block = nest(gs.graph(gs.insert_grl(network, before="1.main"), 3, torch.randn(2, 4)))
    outside = nest(gs.graph(gs.insert_grl(network, edge=("0", "1.main")), 3, torch.randn(2, 4)))
    for top in (inside_block, outside):
        assert [box.kind for box in boxes_in(top)].count("reversal") == 1
        assert [box.name for box in boxes_in(top) if box.kind == "block"] == ["1"]


def test_a_reversal_of_two_values_is_drawn_once_and_lines_still_run_down() -> None:
    spliced = gs.insert_grl(Net(), before="stage2.0.add")
    top = nest(gs.graph(spliced, None, image()))
    (reversal,) = (box for box in boxes_in(top) if box.kind == "reversal")
    block = next(box for box in boxes_in(top) if box.name == "stage2.0")
    assert block.inside
    assert reversal in block.inside.boxes
    for inside in insides(top):
        rows = lay_out(inside, size_of).rows
        assert all(rows[line.source] < rows[line.target] for line in inside.lines)


@pytest.mark.parametrize(
    "network", [Net(), Twice(), chain(Dense(6), nn.ReLU())], ids=["net", "twice", "dense"]
)
def test_a_line_arrives_at_each_point_for_every_value_that_it_uses(network: nn.Module) -> None:
    graph = describe(network, None, image() if isinstance(network, Net) else torch.randn(2, 4))
    top = nest(graph)
    hidden = size_nodes(graph)
    arriving: dict[str, set[Edge]] = {}
    for inside in insides(top):
        for line in inside.lines:
            if line.target.node and not line.target.inside:
                arriving.setdefault(line.target.name, set()).update(line.uses)
    wanted = {edge for edge in graph.edges if not {edge.source, edge.target} & hidden}
    assert {edge for name, edges in arriving.items() for edge in edges if edge.target == name} == wanted


def test_lines_in_a_dense_block_grow_with_its_layers_and_not_with_their_square() -> None:
    lines = [len(nest(describe(Dense(layers), None, torch.randn(2, 4))).lines) for layers in (10, 20, 40)]
    assert lines[1] - lines[0] <= 50
    assert lines[2] - lines[1] == 2 * (lines[1] - lines[0])


def test_a_block_has_the_shape_of_the_value_that_leaves_it() -> None:
    blocks = [box for box in boxes_in(nest(describe(Net(), None, image()))) if box.kind == "block"]
    assert {box.node.shape for box in blocks if box.node} == {(2, 4, 8, 8)}


# --- places --------------------------------------------------------------------------------------------


def overlaps(places: Layout, inside: Inside, sizes: dict[Box, tuple[float, float]]) -> Iterator[str]:
    for one, other in itertools.combinations(inside.boxes, 2):
        across = abs(places.centers[one][0] - places.centers[other][0])
        down = abs(places.centers[one][1] - places.centers[other][1])
        apart = [(sizes[one][axis] + sizes[other][axis]) / 2 for axis in (0, 1)]
        if across < apart[0] - 1e-6 and down < apart[1] - 1e-6:
            yield f"{one.name} and {other.name}"
    for line, bends in places.bends.items():
        for x, row in bends:
            for box in inside.boxes:
                if places.rows[box] == row and abs(places.centers[box][0] - x) < sizes[box][0] / 2:
                    yield f"the line from {line.source.name} and {box.name}"


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Inside, dict[Box, tuple[float, float]]]:
    count = draw(st.integers(1, 14))
    boxes = [Box(str(place), str(place), "module") for place in range(count)]
    pairs = draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=30))
    lines = [Line(boxes[a], boxes[b]) for a, b in sorted(pairs) if a < b]
    sizes = {box: (draw(st.floats(8, 300)), draw(st.floats(8, 90))) for box in boxes}
    return Inside(boxes, lines), sizes


@given(graphs())
@settings(max_examples=150, deadline=None)
def test_no_box_lies_on_another_or_on_a_line_and_every_line_runs_down(
    drawn: tuple[Inside, dict[Box, tuple[float, float]]],
) -> None:
    inside, sizes = drawn
    places = lay_out(inside, sizes.__getitem__)
    assert not list(overlaps(places, inside, sizes))
    assert all(places.rows[line.source] < places.rows[line.target] for line in inside.lines)
    for box, (x, y) in places.centers.items():
        assert x - sizes[box][0] / 2 >= -1e-6
        assert x + sizes[box][0] / 2 <= places.size[0] + 1e-6
        assert y - sizes[box][1] / 2 >= -1e-6
        assert y + sizes[box][1] / 2 <= places.size[1] + 1e-6


def test_a_chain_beside_a_shortcut_is_straight() -> None:
    block = next(box for box in boxes_in(nest(describe(Net(), None, image()))) if box.name == "stage1.0")
    assert block.inside
    places = lay_out(block.inside, size_of)
    across = {round(places.centers[box][0], 1) for box in block.inside.boxes}
    assert len(across) == 1
    (bends,) = (bends for bends in places.bends.values() if bends)
    assert len({x for x, _ in bends}) == 1


# --- SVG, DOT, Mermaid ---------------------------------------------------------------------------------


def test_the_svg_is_well_formed_and_names_every_point() -> None:
    spliced = gs.attach_domain_head(
        gs.insert_grl(Net(), after="stage1"), after="stage2", example_inputs=image()
    )
    graph = gs.graph(spliced, None, image())
    root = ElementTree.fromstring(graph_svg(graph))
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    shown = {title.split("  ")[0] for title in titles}
    assert {node.name for node in graph.nodes} - size_nodes(graph) <= shown
    kinds = [element.get("class") for element in root.iter("{http://www.w3.org/2000/svg}g")]
    assert kinds.count("box reversal") == 1
    assert kinds.count("box head") == 1


def test_a_notebook_gets_the_svg() -> None:
    graph = gs.graph(Repeated())
    assert ElementTree.fromstring(graph._repr_svg_()).tag.endswith("svg")


def test_no_name_becomes_markup_in_an_svg() -> None:
    root = ElementTree.fromstring(graph_svg(hostile_graph()))
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))
    assert HOSTILE in "".join(root.itertext())


def test_dot_holds_every_point_and_every_pair_of_an_edge() -> None:
    graph = describe(Net(), None, image())
    text = graph.to_dot()
    hidden = size_nodes(graph)
    pairs = {(edge.source, edge.target) for edge in graph.edges if not {edge.source, edge.target} & hidden}
    assert set(re.findall(r'^  "(.*)" -> "(.*)";$', text, re.MULTILINE)) == pairs
    assert len(re.findall(r"subgraph \"cluster ", text)) == 6


@pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz is not installed")
@pytest.mark.parametrize("graph", [hostile_graph(), describe(Net(), None, image())], ids=["hostile", "net"])
def test_graphviz_reads_the_dot(graph: ModelGraph) -> None:
    drawn = subprocess.run(
        ["dot", "-Tplain"], input=graph.to_dot(), capture_output=True, text=True, check=True
    )
    assert drawn.stderr == ""
    assert drawn.stdout.count("\nnode ") == len(graph) - len(size_nodes(graph))


def test_mermaid_holds_every_point_and_no_markup() -> None:
    graph = describe(Net(), None, image())
    text = graph.to_mermaid()
    assert len(re.findall(r"^ +n\d+[\[({]", text, re.MULTILINE)) == len(graph) - len(size_nodes(graph))
    assert text.count("subgraph ") == text.count(" end") == 6
    label = re.search(r'n0\["(.*)"\]', hostile_graph().to_mermaid())
    assert label
    assert not re.search(r"[<>\"`&]|#(?!\d+;)", label[1].replace("<br>", ""))


# --- the methods of a graph ----------------------------------------------------------------------------


def test_a_graph_prints_as_a_tree_with_its_blocks() -> None:
    lines = str(gs.graph(Net(), 2, image())).splitlines()
    elements = sum(parameter.numel() for parameter in Net().stage1.parameters())
    assert lines[4].split() == ["stage1", "Sequential", str(elements)]
    assert lines[5].startswith("├ stage1.0")
    assert str(gs.graph(Net(), 1, image())).splitlines()[1].split() == ["x", "input", "2x3x8x8"]


def test_a_page_shows_the_whole_network_however_deep_the_graph_is(tmp_path: Path) -> None:
    gs.graph(Net(), 1, image()).to_html(tmp_path / "net.html")
    page = (tmp_path / "net.html").read_text("utf-8")
    assert "stage2.1.conv" in page


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    graph = gs.graph(Net(), 1, image())
    graph.to_svg(tmp_path / "net.svg")
    assert ElementTree.parse(tmp_path / "net.svg").getroot().tag.endswith("svg")
    with pytest.raises(gs.ExportError, match="there is no folder"):
        graph.to_svg(tmp_path / "missing" / "net.svg")
    assert [file.name for file in tmp_path.iterdir()] == ["net.svg"]


def test_a_graph_that_is_stored_does_not_take_the_network_along() -> None:
    network = chain(nn.Linear(300, 300))
    graph = gs.graph(network)
    stored = pickle.dumps(graph)
    assert len(stored) < 3000
    assert pickle.loads(stored) == graph
    assert pickle.loads(stored).whole() == graph
