"""A graph as a Mermaid flowchart, which many wikis and code hosts draw from the text of a page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from grl_surgery.graph_data import ModelGraph
from grl_surgery.viz.nested_boxes import Box, Inside, boxes_in, nest, words_of

__all__ = ["graph_mermaid"]

# What stands around the label of a box.
_FORMS = {
    "input": ("([", "])"),
    "output": ("([", "])"),
    "reversal": ("{{", "}}"),
    "head": ("[\\", "/]"),
    "operation": ("(", ")"),
}


def graph_mermaid(graph: ModelGraph) -> str:
    """The graph as a flowchart, each block as a subgraph.

    Mermaid draws no more than 500 edges unless it is told otherwise (``maxEdges``): keep the depth low.

    Example:
        >>> from torch import nn
        >>> from grl_surgery.surgery.describe import describe
        >>> print(graph_mermaid(describe(nn.Sequential(nn.ReLU()))))
        flowchart TB
          n0(["input"])
          n1["0<br>ReLU"]
          n2(["output"])
          n0 --> n1
          n1 --> n2
    """
    top = nest(graph)
    ids = {box: f"n{index}" for index, box in enumerate(boxes_in(top))}
    points = {box.name: ids[box] for box in ids if box.node and not box.inside}
    arrows = [
        f"  {points[edge.source]} --> {points[edge.target]}"
        for edge in graph.edges
        if edge.source in points and edge.target in points
    ]
    return "\n".join(["flowchart TB", *_boxes(top, ids, "  "), *dict.fromkeys(arrows)])


def _boxes(inside: Inside, ids: Mapping[Box, str], indent: str) -> Iterator[str]:
    for box in inside.boxes:
        if box.inside:
            yield f'{indent}subgraph {ids[box]}["{_escaped("  ".join(words_of(box)))}"]'
            yield from _boxes(box.inside, ids, f"{indent}  ")
            yield f"{indent}end"
        elif box.node:
            left, right = _FORMS.get(box.kind, ("[", "]"))
            yield f'{indent}{ids[box]}{left}"{_label(box)}"{right}'


def _label(box: Box) -> str:
    return "<br>".join(_escaped(part) for part in words_of(box) if part)


def _escaped(text: str) -> str:
    """Everything that Mermaid or HTML could take for markup, as a character code."""
    return re.sub(r"[^\w .,:()\[\]×−-]", lambda match: f"#{ord(match[0])};", text)
