"""A graph in the DOT language, for Graphviz and whatever else reads it."""

from __future__ import annotations

from collections.abc import Iterator

from grl_surgery.graph_data import ModelGraph
from grl_surgery.viz.nested_boxes import Box, Inside, boxes_in, nest, words_of

__all__ = ["graph_dot"]

_SHAPES = {"input": "oval", "output": "oval", "reversal": "hexagon", "head": "invtrapezium", "value": "note"}


def graph_dot(graph: ModelGraph) -> str:
    """The graph as DOT, each block as a cluster.

    Example:
        >>> from torch import nn
        >>> from grl_surgery.surgery.describe import describe
        >>> print(graph_dot(describe(nn.Sequential(nn.ReLU()))))
        digraph "Sequential" {
          node [shape=box, fontname="monospace"];
          "input" [label="input", shape=oval];
          "0" [label="0\\nReLU"];
          "output" [label="output", shape=oval];
          "input" -> "0";
          "0" -> "output";
        }
    """
    top = nest(graph)
    points = {box.name for box in boxes_in(top) if box.node and not box.inside}
    arrows = [
        f"  {_quoted(edge.source)} -> {_quoted(edge.target)};"
        for edge in graph.edges
        if edge.source in points and edge.target in points
    ]
    head = [f"digraph {_quoted(graph.name)} {{", '  node [shape=box, fontname="monospace"];']
    return "\n".join([*head, *_boxes(top, "  "), *dict.fromkeys(arrows), "}"])


def _boxes(inside: Inside, indent: str) -> Iterator[str]:
    for box in inside.boxes:
        if box.inside:
            yield f"{indent}subgraph {_quoted(f'cluster {box.name}')} {{"
            yield f"{indent}  label={_quoted(_lines(box))};"
            yield from _boxes(box.inside, f"{indent}  ")
            yield f"{indent}}}"
        elif box.node:
            shape = f", shape={_SHAPES[box.kind]}" if box.kind in _SHAPES else ""
            yield f"{indent}{_quoted(box.name)} [label={_quoted(_lines(box))}{shape}];"


def _lines(box: Box) -> str:
    return "\n".join(filter(None, words_of(box)))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\r", " ").replace("\n", "\\n")
    return f'"{escaped}"'
