"""Pictures of a graph, of what surgery changed in it, and of the proof."""

from grl_surgery.viz.diff import forward_diff, reversed_edges, spliced_parts
from grl_surgery.viz.hide_sizes import size_nodes, without
from grl_surgery.viz.text_tree import GraphTree, graph_text

__all__ = [
    "GraphTree",
    "forward_diff",
    "graph_text",
    "reversed_edges",
    "size_nodes",
    "spliced_parts",
    "without",
]
