"""Pictures of a graph, of what surgery changed in it, and of the proof."""

from grl_surgery.drawing.sizes import size_nodes, without
from grl_surgery.drawing.surgery import forward_diff, reversed_edges, spliced_parts
from grl_surgery.drawing.text import GraphTree, graph_text

__all__ = [
    "GraphTree",
    "forward_diff",
    "graph_text",
    "reversed_edges",
    "size_nodes",
    "spliced_parts",
    "without",
]
