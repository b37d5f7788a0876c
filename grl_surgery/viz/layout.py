"""Places boxes and lines: rows from top to bottom in the order in which values flow.

The steps of Sugiyama, Tagawa and Toda (1981): each box goes into the first row below everything that it
uses; the order in a row follows the neighbours' average place; then boxes move towards their neighbours as
far as the order allows, which is a regression with an order constraint, solved by pooling adjacent violators.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from grl_surgery.viz.nested_boxes import Box, Inside, Line

__all__ = ["COLUMN_GAP", "ROW_GAP", "Layout", "lay_out"]

ROW_GAP = 24.0  # between two rows
COLUMN_GAP = 18.0  # between two boxes in a row
_LANE = 20.0  # width of a line that passes a row
_ROOM = 48.0  # that a block may waste to have its entry in the middle
_SWEEPS = 6

Size = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """The places of everything inside one block; (0, 0) is its upper left corner.

    Args:
        size: Width and height of the whole.
        centers: Middle of each box.
        rows: Row of each box.
        bounds: Top and bottom of each row.
        bends: For each line, where it passes the rows between its ends: x and the row.
    """

    size: Size
    centers: Mapping[Box, tuple[float, float]]
    rows: Mapping[Box, int]
    bounds: Sequence[tuple[float, float]]
    bends: Mapping[Line, Sequence[tuple[float, int]]]


class _Lane:
    """Where the lines from one box pass a row."""


_Item = Box | _Lane


def lay_out(inside: Inside, size_of: Callable[[Box], Size]) -> Layout:
    """Places for all boxes and lines inside a block."""
    sizes = {box: size_of(box) for box in inside.boxes}
    rows_of = _rows(inside)
    table, lanes = _table(inside, rows_of)
    above, below = _neighbours(inside, rows_of, lanes)
    table = _ordered(table, above, below)
    widths = {item: sizes[item][0] if isinstance(item, Box) else _LANE for row in table for item in row}
    x = _columns(table, above, below, widths)
    bounds = _bounds(inside, sizes, rows_of, len(table))
    left = min((x[item] - widths[item] / 2 for row in table for item in row), default=0.0)
    right = max((x[item] + widths[item] / 2 for row in table for item in row), default=0.0)
    entry = next((x[box] for box in inside.boxes if box.kind == "entry"), (left + right) / 2)
    if abs(left + right - 2 * entry) <= _ROOM:  # the line from outside goes straight on
        left, right = min(left, 2 * entry - right), max(right, 2 * entry - left)
    return Layout(
        (right - left, bounds[-1][1] if bounds else 0.0),
        {box: (x[box] - left, sum(bounds[rows_of[box]]) / 2) for box in inside.boxes},
        rows_of,
        bounds,
        {
            line: [
                (x[lanes[line.source, row]] - left, row)
                for row in range(rows_of[line.source] + 1, rows_of[line.target])
            ]
            for line in inside.lines
        },
    )


# -------------------------------------------------------------------------------------------- rows


def _rows(inside: Inside) -> dict[Box, int]:
    """The row of each box: below all that it uses; what uses nothing stands right above its first user."""
    users: dict[Box, list[Box]] = {box: [] for box in inside.boxes}
    missing = dict.fromkeys(inside.boxes, 0)
    for line in inside.lines:
        users[line.source].append(line.target)
        missing[line.target] += 1
    sources = [box for box, count in missing.items() if not count]
    rows = dict.fromkeys(inside.boxes, 0)
    ready = list(sources)
    for box in ready:  # grows while it is read
        for user in users[box]:
            rows[user] = max(rows[user], rows[box] + 1)
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    for box in sources:
        if users[box] and box.kind not in ("entry", "input"):
            rows[box] = min(rows[user] for user in users[box]) - 1
    last = max(rows.values(), default=0)
    return {box: last if box.kind in ("exit", "output") else row for box, row in rows.items()}


Lanes = dict[tuple[Box, int], _Lane]


def _table(inside: Inside, rows_of: Mapping[Box, int]) -> tuple[list[list[_Item]], Lanes]:
    """Everything in each row; the lines out of one box share their lanes."""
    table: list[list[_Item]] = [[] for _ in range(max(rows_of.values(), default=-1) + 1)]
    for box in inside.boxes:
        table[rows_of[box]].append(box)
    lanes: Lanes = {}
    for line in inside.lines:
        for row in range(rows_of[line.source] + 1, rows_of[line.target]):
            if (line.source, row) not in lanes:
                lanes[line.source, row] = _Lane()
                table[row].append(lanes[line.source, row])
    return table, lanes


Neighbours = dict[_Item, dict[_Item, int]]


def _neighbours(inside: Inside, rows_of: Mapping[Box, int], lanes: Lanes) -> tuple[Neighbours, Neighbours]:
    """What each item is tied to in the row above and in the row below, and how strongly.

    Long lines should be straight, and so should chains of boxes; a long line and a box need not be aligned.
    """
    items: list[_Item] = [*inside.boxes, *lanes.values()]
    above: Neighbours = {item: {} for item in items}
    below: Neighbours = {item: {} for item in items}
    for line in inside.lines:
        passed = [lanes[line.source, row] for row in range(rows_of[line.source] + 1, rows_of[line.target])]
        path: list[_Item] = [line.source, *passed, line.target]
        for upper, lower in itertools.pairwise(path):
            kinds = isinstance(upper, _Lane) + isinstance(lower, _Lane)
            above[lower][upper] = below[upper][lower] = (3, 1, 8)[kinds]
    return above, below


# ------------------------------------------------------------------------------------------- order


def _ordered(table: list[list[_Item]], above: Neighbours, below: Neighbours) -> list[list[_Item]]:
    """The rows with their items in the order that crosses the fewest lines of all that were tried."""
    best, fewest = table, _crossings(table, below)
    for sweep in range(_SWEEPS):
        if not fewest:
            break
        ties = above if sweep % 2 == 0 else below
        table = [list(row) for row in table]
        place: dict[_Item, float] = {}
        for row in table if sweep % 2 == 0 else reversed(table):
            now = {item: float(index) for index, item in enumerate(row)}
            row.sort(key=lambda item: _average([place[n] for n in ties[item] if n in place], now[item]))
            place.update((item, index / max(len(row) - 1, 1)) for index, item in enumerate(row))
        count = _crossings(table, below)
        if count < fewest:
            best, fewest = table, count
    _swap_neighbours(best, above, below)
    return best


def _swap_neighbours(table: Sequence[list[_Item]], above: Neighbours, below: Neighbours) -> None:
    """Exchange items that stand side by side where that crosses fewer lines, until none is left."""
    for _ in range(_SWEEPS):
        swapped = False
        for index, row in enumerate(table):
            near = [(above, table[index - 1] if index else []), (below, [*table, []][index + 1])]
            places = [(ties, {item: place for place, item in enumerate(other)}) for ties, other in near]
            for left in range(len(row) - 1):
                pair = row[left], row[left + 1]
                ends = [[sorted(place[n] for n in ties[item]) for item in pair] for ties, place in places]
                if sum(_inversions(a, b) - _inversions(b, a) for a, b in ends) > 0:
                    row[left : left + 2] = reversed(pair)
                    swapped = True
        if not swapped:
            return


def _inversions(left: Sequence[int], right: Sequence[int]) -> int:
    """Count the lines to ``left`` that cross lines to ``right``."""
    return sum(bisect.bisect_left(right, end) for end in left)


def _average(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _crossings(table: Sequence[Sequence[_Item]], below: Neighbours) -> int:
    """Count the pairs of lines that cross between neighbouring rows."""
    total = 0
    for row, following in itertools.pairwise(table):
        place = {item: index for index, item in enumerate(following)}
        seen: list[int] = []
        for item in row:
            ends = sorted(place[user] for user in below[item])
            total += sum(len(seen) - bisect.bisect_right(seen, end) for end in ends)
            for end in ends:
                bisect.insort(seen, end)
    return total


# ----------------------------------------------------------------------------------------- columns


def _columns(
    table: Sequence[Sequence[_Item]], above: Neighbours, below: Neighbours, widths: Mapping[_Item, float]
) -> dict[_Item, float]:
    """The x of everything: near its neighbours, in order, without overlap."""
    x: dict[_Item, float] = {}
    for row in table:
        x.update(zip(row, _spread(row, [0.0] * len(row), [1.0] * len(row), widths), strict=True))
    both = {item: {**above[item], **below[item]} for item in above}
    for ties in (*(above, below) * _SWEEPS, both, both):
        for row in reversed(table) if ties is below else table:
            wanted = [_weighted_median([(x[n], w) for n, w in ties[item].items()], x[item]) for item in row]
            weights = [1.0 if isinstance(item, Box) else _GIVES_WAY for item in row]
            x.update(zip(row, _spread(row, wanted, weights, widths), strict=True))
    _straighten(table, above, below, widths, x)
    return x


_GIVES_WAY = 1e-4  # what a line that passes weighs beside a box


def _straighten(
    table: Sequence[Sequence[_Item]],
    above: Neighbours,
    below: Neighbours,
    widths: Mapping[_Item, float],
    x: dict[_Item, float],
) -> None:
    """Make chains of boxes vertical, then long lines, where there is room for that."""
    beside = {
        item: (left, right)
        for row in table
        for left, item, right in zip([None, *row], row, [*row[1:], None], strict=False)
    }

    def room(item: _Item) -> tuple[float, float]:
        left, right = beside[item]
        low = x[left] + (widths[left] + widths[item]) / 2 + _gap(left, item) if left else -math.inf
        high = x[right] - (widths[right] + widths[item]) / 2 - _gap(item, right) if right else math.inf
        return low, high

    for kind in (Box, _Lane):
        for chain in _chains(table, above, below, kind):
            low, high = max(room(item)[0] for item in chain), min(room(item)[1] for item in chain)
            if low <= high:
                middle = sum(x[item] for item in chain) / len(chain)
                x.update(dict.fromkeys(chain, min(max(middle, low), high)))


def _chains(
    table: Sequence[Sequence[_Item]], above: Neighbours, below: Neighbours, kind: type
) -> Iterator[list[_Item]]:
    """Runs of items of one kind, each the next one's closest tie and the other way round."""
    seen: set[_Item] = set()
    for item in (item for row in table for item in row if isinstance(item, kind)):
        chain: list[_Item] = []
        following: _Item | None = item
        while following and isinstance(following, kind) and following not in seen:
            seen.add(following)
            chain.append(following)
            after = _closest(below[following])
            following = after if after and _closest(above[after]) is following else None
        if len(chain) > 1 or (chain and kind is _Lane):
            yield chain


def _closest(ties: Mapping[_Item, int]) -> _Item | None:
    """The item with the strongest tie; None where two are equally strong."""
    strongest = [item for item, weight in ties.items() if weight == max(ties.values())]
    return strongest[0] if len(strongest) == 1 else None


def _weighted_median(values: list[tuple[float, int]], otherwise: float) -> float:
    """The middle value; halfway between two where the weights on both sides are equal."""
    if not values:
        return otherwise
    values.sort()
    half, passed = sum(weight for _, weight in values) / 2, 0
    for index, (value, weight) in enumerate(values):
        passed += weight
        if passed == half:
            return (value + values[index + 1][0]) / 2
        if passed > half:
            return value
    return otherwise


def _spread(
    row: Sequence[_Item], wanted: Sequence[float], weights: Sequence[float], widths: Mapping[_Item, float]
) -> list[float]:
    """As near to the wanted places as the widths allow, in the given order."""
    offsets = [0.0]
    for left, right in itertools.pairwise(row):
        offsets.append(offsets[-1] + (widths[left] + widths[right]) / 2 + _gap(left, right))
    pools: list[tuple[float, float, int]] = []  # place, weight, count
    for goal, offset, weight in zip(wanted, offsets, weights, strict=False):
        place, total, count = goal - offset, weight, 1
        while pools and pools[-1][0] > place:
            other, more, members = pools.pop()
            place = (place * total + other * more) / (total + more)
            total, count = total + more, count + members
        pools.append((place, total, count))
    places = [place for place, _, count in pools for _ in range(count)]
    return [place + offset for place, offset in zip(places, offsets, strict=False)]


def _gap(left: _Item, right: _Item) -> float:
    return COLUMN_GAP if isinstance(left, Box) and isinstance(right, Box) else 0.0


def _bounds(
    inside: Inside, sizes: Mapping[Box, Size], rows_of: Mapping[Box, int], count: int
) -> list[tuple[float, float]]:
    """Top and bottom of each row, which is as high as its highest box."""
    heights = [0.0] * count
    for box in inside.boxes:
        heights[rows_of[box]] = max(heights[rows_of[box]], sizes[box][1])
    bounds, top = [], 0.0
    for height in heights:
        bounds.append((top, top + height))
        top += height + ROW_GAP
    return bounds
