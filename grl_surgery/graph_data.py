"""A network's graph as plain values: nodes, edges, and the pictures that can be drawn of them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from grl_surgery.points import Edge, GraphNode

__all__ = ["ModelGraph", "drawing"]


@dataclass(frozen=True)
class ModelGraph:
    """What a network's forward does, one node for each module call and each other operation.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import grl_surgery as gs
        >>> graph = gs.graph(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), example_inputs=torch.randn(3, 4))
        >>> [str(edge) for edge in graph.edges], graph.nodes[1].shape
        (['input -> 0', '0 -> 1', '1 -> output'], (3, 8))

    Args:
        name: Class of the network.
        nodes: In the order of execution.
        edges: Every use of a value, in the order of execution.
        blocks: The modules that the graph looks into. A point lies in the blocks that its name begins with.
    """

    name: str
    nodes: tuple[GraphNode, ...]
    edges: tuple[Edge, ...]
    blocks: tuple[GraphNode, ...] = ()
    _look_deeper: Callable[[], ModelGraph] | None = field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.nodes)

    def __str__(self) -> str:
        text_tree = drawing("text_tree")
        return str(text_tree.graph_text(text_tree.GraphTree(self), _AS_WIDE_AS_NEEDED))

    def _repr_svg_(self) -> str:
        return str(drawing("svg").graph_svg(self))

    def to_dot(self) -> str:
        """The graph in the DOT language of Graphviz."""
        return str(drawing("dot").graph_dot(self))

    def to_mermaid(self) -> str:
        """The graph as a Mermaid flowchart."""
        return str(drawing("mermaid").graph_mermaid(self))

    def to_svg(self, path: str | Path) -> None:
        """Write the graph as an SVG image, as deep as it is.

        Example:
            >>> import tempfile
            >>> from torch import nn
            >>> import grl_surgery as gs
            >>> gs.graph(nn.Sequential(nn.Linear(4, 8), nn.ReLU())).to_svg(tempfile.mkdtemp() + "/net.svg")

        Args:
            path: The file to write, or to replace.

        Raises:
            ExportError: The folder does not exist.
        """
        drawing("html").write_page(path, drawing("svg").graph_svg(self))

    def to_html(self, path: str | Path) -> None:
        """Write a page that works offline: the whole network, with blocks that open by a click.

        Args:
            path: The file to write, or to replace.

        Raises:
            ExportError: The folder does not exist.
        """
        html = drawing("html")
        html.write_page(path, html.graph_page(self.whole()))

    def to_json(self) -> str:
        """The graph as JSON: ``{"name", "nodes", "edges", "blocks"}``."""
        plain = {key: [asdict(item) for item in getattr(self, key)] for key in ("nodes", "edges", "blocks")}
        return json.dumps({"name": self.name, **plain}, indent=1)

    def whole(self) -> ModelGraph:
        """Return the graph of the same network at full depth, or this graph if the network is not known."""
        return self._look_deeper() if self._look_deeper else self

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_look_deeper": None,
        }  # a graph that is stored does not take the network along

    def under(self, path: str) -> ModelGraph:
        """The part of the graph that lies in the module at ``path``."""
        nodes = tuple(n for n in self.nodes if n.name == path or n.name.startswith(f"{path}."))
        names = {node.name for node in nodes}
        edges = tuple(e for e in self.edges if {e.source, e.target} & names)
        return replace(self, nodes=nodes, edges=edges)


_AS_WIDE_AS_NEEDED = 10_000


def drawing(name: str) -> Any:
    """A module that draws; imported when a picture is asked for, as the values need none."""
    return importlib.import_module(f"grl_surgery.viz.{name}")
