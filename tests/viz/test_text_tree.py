from __future__ import annotations

import io

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch import nn

from grl_surgery.graph_data import ModelGraph
from grl_surgery.points import Edge, GraphNode
from grl_surgery.surgery.describe import describe
from grl_surgery.surgery.insert import insert_grl
from grl_surgery.surgery.spliced_module import SplicedModule
from grl_surgery.viz import GraphTree, forward_diff, graph_text, reversed_edges, size_nodes, without


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.fc(x)) + x


class Nested(nn.Module):
    """Calls ``first`` twice with something between, and works with sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(Block(), Block())
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = self.first(x.view(x.shape[0] // 1, -1))
        x = self.first(x.exp())
        return {"a.b": self.heads[0](x), "c": self.heads[1](x)}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.block(x))


def _tree(model: nn.Module, depth: int) -> GraphTree:
    graphs = [describe(model, level, torch.randn(2, 4)) for level in range(1, depth + 1)]
    return GraphTree(without(graphs[-1], size_nodes(graphs[-1])), graphs[:-1])


def _spliced(model: nn.Module, **selectors: object) -> SplicedModule:
    spliced = insert_grl(model, **selectors)  # type: ignore[arg-type]
    assert isinstance(spliced, SplicedModule)
    return spliced


# --- tree -------------------------------------------------------------------------------------------


def test_modules_are_nested_in_the_order_of_execution_with_aligned_columns() -> None:
    assert graph_text(_tree(Nested(), 3)) == "\n".join(
        [
            "point              type        output  parameters",
            "x                  input       2x4",
            "view               view        2x4",
            "first#1            Sequential  2x4             40",
            "├ first.0#1        Block       2x4             20",
            "│ ├ first.0.fc#1   Linear      2x4             20",
            "│ ├ first.0.act#1  ReLU        2x4",
            "│ └ first.0.add#1  add         2x4",
            "└ first.1#1        Block       2x4             20",
            "  ├ first.1.fc#1   Linear      2x4             20",
            "  ├ first.1.act#1  ReLU        2x4",
            "  └ first.1.add#1  add         2x4",
            "exp                exp         2x4",
            "first#2            Sequential  2x4             40",
            "├ first.0#2        Block       2x4             20",
            "│ ├ first.0.fc#2   Linear      2x4             20",
            "│ ├ first.0.act#2  ReLU        2x4",
            "│ └ first.0.add#2  add         2x4",
            "└ first.1#2        Block       2x4             20",
            "  ├ first.1.fc#2   Linear      2x4             20",
            "  ├ first.1.act#2  ReLU        2x4",
            "  └ first.1.add#2  add         2x4",
            "heads.0            Linear      2x2             10",
            "heads.1            Linear      2x2             10",
            "output             output",
        ]
    )


def test_every_name_in_the_tree_is_a_point() -> None:
    model = Nested()
    names = [row.node.name for row in _tree(model, 3).rows if row.node.name not in ("x", "output")]
    assert len(names) == 22
    for name in names:
        insert_grl(model, after=name)


def test_two_calls_in_a_row_share_a_branch_that_says_so() -> None:
    assert graph_text(_tree(Twice(), 2)).splitlines()[2:5] == [
        "block        Sequential, 2 calls",
        "├ block.0#1  Linear               2x4             20",
        "└ block.0#2  Linear               2x4             20",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_console_or_wrapped(width: int) -> None:
    lines = graph_text(_tree(Nested(), 3), width).splitlines()
    assert len(lines) == 25
    assert all(cell_len(line) <= width for line in lines)


def test_a_console_narrower_than_the_names_cuts_no_name() -> None:
    wide, narrow = (graph_text(_tree(Nested(), 3), width) for width in (200, 20))
    names = lambda text: [line.strip("│├└ ").split()[0] for line in text.splitlines()]  # noqa: E731
    assert names(narrow) == names(wide)


def test_where_space_is_short_types_are_shortened_and_names_are_not() -> None:
    node = GraphNode(
        "encoder.stage_with_a_name.1", "call_module", "AVeryLongNameOfAClass", (2, 64, 7, 7), 1234
    )
    tree = GraphTree(ModelGraph("Net", (node,), ()))
    assert graph_text(tree, 80).endswith(
        "encoder.stage_with_a_name.1  AVeryLongNameOfAClass  2x64x7x7       1,234"
    )
    assert graph_text(tree, 61).endswith("encoder.stage_with_a_name.1  AVeryLong…  2x64x7x7       1,234")
    assert graph_text(tree, 50).replace("\n", "").count("encoder.stage_with_a_name.1") == 1


def test_a_wide_character_counts_as_two_columns() -> None:
    nodes = (
        GraphNode("層", "call_module", "Linear", (1,), 7),
        GraphNode("ab", "call_module", "Linear", (1,), 7),
    )
    lines = graph_text(GraphTree(ModelGraph("Net", nodes, ()))).splitlines()
    assert len({cell_len(line) for line in lines}) == 1


def test_guides_are_ascii_where_the_output_is() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=60, color_system=None)
    console.print(_tree(Nested(), 3))
    console.file.flush()
    text = raw.getvalue().decode("ascii")
    assert "|- first.0#1" in text
    assert "   `- first.1.add#2" in text


def test_dots_in_the_key_of_an_item_are_no_levels() -> None:
    nodes = (GraphNode("net[a.b]", "call_function", "getitem", (2,)),)
    around = ModelGraph("Net", (GraphNode("net[a", "call_module", "Linear"),), ())
    assert [row.level for row in GraphTree(ModelGraph("Net", nodes, ()), [around]).rows] == [0]


# --- what is no tensor ------------------------------------------------------------------------------


def test_sizes_what_is_computed_from_them_and_unused_arguments_are_no_points() -> None:
    graph = describe(Nested(), 1, torch.randn(2, 4))
    assert size_nodes(graph) == {"mask", "shape", "shape[0]", "size_floordiv"}
    shown = without(graph, size_nodes(graph))
    assert [node.name for node in shown.nodes][:3] == ["x", "view", "first#1"]
    assert Edge("x", "view", "0") in shown.edges
    assert not any(edge.source == "size_floordiv" for edge in shown.edges)


def test_sizes_are_found_without_shapes_and_tensors_are_not_taken_for_them() -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = x.size(0) * 2
            return x.new_zeros(n, 1) + (x + x)[0]

    assert size_nodes(describe(Net())) == {"size", "size_mul"}


# --- surgery ----------------------------------------------------------------------------------------


def test_the_diff_holds_the_lines_that_surgery_changed_and_no_others() -> None:
    diff = forward_diff(_spliced(Nested(), after="first.1.fc#1"), "Nested").splitlines()
    changed = [line for line in diff[3:] if line[0] in "+-"]
    assert diff[:2] == ["--- Nested", "+++ Nested, spliced"]
    assert [line.split(" = ")[0].strip("+- ") for line in changed] == [
        "first_1_act",
        "grl_first_1_fc_1",
        "first_1_act",
    ]
    assert not any("None" in line for line in changed)


def test_the_diff_is_of_the_present_mode() -> None:
    class ByMode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fc(x)
            return x.exp() if self.training else x.sin()

    def operations(spliced: SplicedModule) -> set[str]:
        return {name for name in ("exp", "sin") if f".{name}()" in forward_diff(spliced)}

    model = ByMode()
    assert operations(_spliced(model, after="fc")) == {"exp"}
    assert operations(_spliced(model.eval(), after="fc")) == {"sin"}
    spliced = _spliced(ByMode(), after="fc")
    spliced.eval()
    assert operations(spliced) == {"sin"}


@pytest.mark.parametrize(
    ("selector", "edges"),
    [
        ({"after": "first.0#1"}, ["first.0#1 -> first.1.fc#1", "first.0#1 -> first.1.add#1"]),
        ({"before": "first.1.add#1"}, ["first.1.act#1 -> first.1.add#1", "first.0#1 -> first.1.add#1"]),
        ({"edge": "first.0#1 -> first.1.add#1"}, ["first.0#1 -> first.1.add#1"]),
    ],
)
def test_the_edges_of_a_reversal_are_those_that_it_cuts(selector: dict[str, str], edges: list[str]) -> None:
    # Opened by a second cut, so that every edge is seen between the same operations.
    spliced = _spliced(insert_grl(Nested(), after="first.1.fc#2"), **selector)
    found = [str(edge) for edge in reversed_edges(spliced, spliced.grl_surgery.cuts[-1])]
    assert sorted(e.replace("first.0.add#1", "first.0#1") for e in found) == sorted(edges)


def test_the_edges_behind_an_item_of_a_value_end_in_the_users_of_the_whole() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.lstm(x)

    spliced = _spliced(Net(), after="lstm[0]")
    assert [str(edge) for edge in reversed_edges(spliced, spliced.grl_surgery.cuts[0])] == [
        "lstm[0] -> output"
    ]
