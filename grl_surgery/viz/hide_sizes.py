"""Hides the points of a graph that are sizes and not tensors."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import replace

from grl_surgery.graph_data import ModelGraph

__all__ = ["size_nodes", "without"]

_READS = frozenset({"shape", "size", "dim", "ndim", "numel", "dtype", "device", "stride", "is_cuda", "len"})
_ARITHMETIC = frozenset({*dir(operator), "int", "float", "min", "max", "round", "ceil", "floor", "sqrt"})


def size_nodes(graph: ModelGraph) -> set[str]:
    """Names of the points where nothing can be cut: sizes, what is computed from them, unused arguments.

    Example:
        >>> from grl_surgery.points import Edge, GraphNode
        >>> nodes = (GraphNode("x", "placeholder", "placeholder"), GraphNode("size", "call_method", "size"))
        >>> size_nodes(ModelGraph("Net", nodes, (Edge("x", "size", "0"),)))
        {'size'}
    """
    sources: dict[str, list[str]] = {}
    for edge in graph.edges:
        sources.setdefault(edge.target, []).append(edge.source)
    used = {edge.source for edge in graph.edges}
    found: set[str] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and node.shape is None and used and node.name not in used:
            found.add(node.name)
        if node.op not in ("call_function", "call_method") or node.shape is not None:
            continue
        computed = node.type in _ARITHMETIC and node.name in sources and found.issuperset(sources[node.name])
        if node.type in _READS or node.type == "_assert" or computed:
            found.add(node.name)
    return found


def without(graph: ModelGraph, names: Collection[str]) -> ModelGraph:
    """The graph without these points and the edges at them."""
    nodes = tuple(node for node in graph.nodes if node.name not in names)
    edges = tuple(edge for edge in graph.edges if edge.source not in names and edge.target not in names)
    return replace(graph, nodes=nodes, edges=edges)
