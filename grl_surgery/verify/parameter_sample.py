"""Chooses the parameters of a sample, for a proof of a network that is too large to prove whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from grl_surgery.verify.reference_model import cuts_by_module

__all__ = ["sampled"]


def sampled(model: nn.Module, names: Sequence[str], budget: int) -> list[str]:
    """At most so many names: of the layers at the cuts, then the first and the last of every block.

    A block is what has a number in its path, as ``layer3.5`` has, and otherwise a child of the root.

    Example:
        >>> net = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)))
        >>> sampled(net, [name for name, _ in net.named_parameters()], 4)
        ['0.0.weight', '0.1.bias', '2.0.weight', '2.1.bias']

    Args:
        model: The spliced network.
        names: Of the parameters to choose from, in order.
        budget: The most to choose.
    """
    at_cuts = [name for name in names if any(_is_at(name, point) for point in _points(model))]
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(_block(name), []).append(name)
    ends = [dict.fromkeys((block[0], block[-1])) for block in blocks.values()]
    first = [name for pair in _from_both_ends(ends) for name in pair if name not in at_cuts]
    chosen = set([*at_cuts, *first][:budget])
    return [name for name in names if name in chosen]


def _points(model: nn.Module) -> Iterator[str]:
    for path, cuts in cuts_by_module(model).items():
        for cut in cuts:
            yield from (f"{path}.{point}" if path else point for point in cut.points)


def _is_at(name: str, point: str) -> bool:
    """Whether a parameter belongs to the layer that a point is the call of."""
    layer = name.rpartition(".")[0]
    return layer == point.partition("#")[0].partition("[")[0]


def _block(name: str) -> str:
    parts = name.split(".")[:-1] or [name]
    numbers = [place for place, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1] if numbers else parts[:1])


def _from_both_ends(blocks: Sequence[dict[str, None]]) -> Iterator[dict[str, None]]:
    """The first, the last, the second, the last but one, and so on."""
    left, right = 0, len(blocks) - 1
    while left <= right:
        yield blocks[left]
        if left < right:
            yield blocks[right]
        left, right = left + 1, right - 1
