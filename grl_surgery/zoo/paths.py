"""Reads the paths that a gradient takes off the graph that autograd has recorded."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["recorded_nodes", "signs_in_autograd"]

Factors = frozenset[int]


def signs_in_autograd(
    outputs: Iterable[torch.Tensor], reversals: Sequence[Iterable[Any]]
) -> list[dict[int, Factors]]:
    """For each reversal on its own, the signs of all paths from each leaf to the outputs.

    Nothing is computed: the nodes are followed from the outputs to the leaves, each after all that lead to
    it. It knows nothing of torch.fx, and runs on the meta device too.

    Example:
        >>> w = torch.ones(1, requires_grad=True)
        >>> branch = w * 2
        >>> found = signs_in_autograd([branch + w], [[branch.grad_fn]])
        >>> sorted(found[0][id(w)])
        [-1, 1]

    Args:
        outputs: Tensors that the objective is made of.
        reversals: For each reversal, the autograd nodes that it made.

    Returns:
        For each reversal, from the ``id`` of every leaf that is reached to ``{1}``, ``{-1}`` or both.
    """
    count = len(reversals)
    plus = (1 << count) - 1
    turned: dict[Any, int] = {}  # node -> the reversals it belongs to, as bits
    for place, nodes in enumerate(reversals):
        for node in nodes:
            turned[node] = turned.get(node, 0) | 1 << place
    starts = [y.grad_fn if y.grad_fn is not None else _leaf(y) for y in outputs if y.requires_grad]
    arrived: dict[Any, int] = Counter(dict.fromkeys(starts, plus))
    leaves: dict[int, int] = {}
    for node in _in_order(starts):
        # bit i: reached with sign +, as far as reversal i is concerned; bit i + count: with sign -
        paths = _swapped(arrived[node], turned.get(node, 0), count)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = leaves.get(id(variable), 0) | paths
        for source, _ in node.next_functions:
            if source is not None:
                arrived[source] = arrived.get(source, 0) | paths
    return [
        {leaf: _factors(paths >> place & 1, paths >> place + count & 1) for leaf, paths in leaves.items()}
        for place in range(count)
    ]


def _leaf(tensor: torch.Tensor) -> Any:
    """The node that accumulates the gradient of a leaf."""
    return tensor.view_as(tensor).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


def _in_order(starts: Sequence[Any]) -> Iterator[Any]:
    """Every node behind all nodes that lead to it."""
    waiting: Counter[Any] = Counter()
    seen, stack = set(starts), list(starts)
    while stack:
        for source, _ in stack.pop().next_functions:
            if source is not None:
                waiting[source] += 1
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
    ready = [node for node in dict.fromkeys(starts) if not waiting[node]]
    while ready:
        node = ready.pop()
        yield node
        for source, _ in node.next_functions:
            if source is not None:
                waiting[source] -= 1
                if not waiting[source]:
                    ready.append(source)


def _swapped(paths: int, turned: int, count: int) -> int:
    """The bits with plus and minus exchanged for the reversals in ``turned``."""
    plus, minus = paths & turned, paths >> count & turned
    return paths & ~(turned | turned << count) | minus | plus << count


def _factors(plus: int, minus: int) -> Factors:
    return frozenset([*([1] if plus else []), *([-1] if minus else [])])


@contextlib.contextmanager
def recorded_nodes(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Any]]]:
    """The autograd nodes that each layer makes while the context lasts, by the layer's name."""
    nodes: dict[str, list[Any]] = {name: [] for name in layers}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if output.grad_fn is not None:
                nodes[name].append(output.grad_fn)

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield nodes
    finally:
        for handle in handles:
            handle.remove()
