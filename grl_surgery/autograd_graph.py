"""Walks the graph that autograd records: which nodes a gradient reaches, and which reach a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["nodes_above", "nodes_below"]


def nodes_below(start: Sequence[Any], without: Any = None) -> dict[Any, None]:
    """Return the nodes that a gradient starting at these reaches, these included, except through ``without``.

    Args:
        start: Nodes; None, as of a tensor without a graph, is passed over.
        without: A node at which the gradient stops.
    """
    found: dict[Any, None] = {}
    rest = [node for node in start if node is not None]
    while rest:
        node = rest.pop()
        if node not in found and node is not without:
            found[node] = None
            rest += [below for below, _ in node.next_functions if below is not None]
    return found


def nodes_above(nodes: Sequence[Any], target: Any) -> set[Any]:
    """Return the nodes from which a gradient reaches the target."""
    users: dict[Any, list[Any]] = {}
    for node in nodes:
        for below, _ in node.next_functions:
            users.setdefault(below, []).append(node)
    found: set[Any] = set()
    rest = [target]
    while rest:
        for user in users.get(rest.pop(), ()):
            if user not in found:
                found.add(user)
                rest.append(user)
    return found
