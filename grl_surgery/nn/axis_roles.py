"""The meaning of the axes of a feature: batch, channels, positions."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AxisRoles", "Shape"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class AxisRoles:
    """What each axis of a value is, as far as the network says.

    Args:
        letters: One letter for each axis: ``n`` the batch, ``c`` the channels, ``p`` a position, ``?`` not
            known.
        batch: Size of the batch in the example inputs, where it is known.
        grown: Shape of the value with one more sample in the batch; None where that was not seen.
    """

    letters: str
    batch: int | None = None
    grown: Shape | None = None
