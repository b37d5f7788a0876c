"""Fingerprints of gradients: 64 bits in place of the gradient, to compare it without keeping it."""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from typing import Literal

import torch

__all__ = ["Fingerprint", "Sign", "bits_of", "fingerprint"]

Sign = Literal["+", "-", "+-"]


@dataclass(frozen=True)
class Fingerprint:
    """A gradient's shape, dtype and bits, and whether all of it is zero.

    Args:
        shape: Of the gradient.
        dtype: Of the gradient.
        is_zero: Whether every entry is zero.
        has_nan: Whether an entry is nan, which equals nothing.
        bits: Of the gradient; None where they were not asked for.
        negated: Of -1 times the gradient; None where they were not asked for.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_zero: bool
    has_nan: bool
    bits: int | None = None
    negated: int | None = None

    def equals(self, other: Fingerprint) -> bool:
        """Whether both gradients are equal; 0.0 and -0.0 are."""
        return self.bits is not None and self._is_like(other) and self.bits == other.bits

    def negates(self, other: Fingerprint) -> bool:
        """Whether this gradient is -1 times the other, which has its negated bits."""
        return self.bits is not None and self._is_like(other) and self.bits == other.negated

    def _is_like(self, other: Fingerprint) -> bool:
        return (self.shape, self.dtype) == (other.shape, other.dtype) and not (self.has_nan or other.has_nan)


def fingerprint(gradient: torch.Tensor, sign: Sign = "+") -> Fingerprint:
    """The fingerprint of a gradient, or of -1 times it, or both.

    Example:
        >>> ours, theirs = fingerprint(torch.tensor([1.0, -2.0])), fingerprint(torch.tensor([-1.0, 2.0]), "-")
        >>> ours.negates(theirs), ours.equals(theirs)
        (True, False)

    Args:
        gradient: Any dense tensor; it is not changed.
        sign: ``"+"``, ``"-"`` or ``"+-"``: which bits to take.
    """
    numbers = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
    least, most = (float(end) for end in numbers.aminmax()) if numbers.numel() else (0.0, 0.0)
    return Fingerprint(
        tuple(gradient.shape),
        gradient.dtype,
        is_zero=least == most == 0,
        has_nan=math.isnan(least),
        bits=bits_of(numbers) if "+" in sign else None,
        negated=bits_of(numbers, negated=True) if "-" in sign else None,
    )


# -------------------------------------------------------------------------------------------------- the bits

_AT_ONCE = 1 << 15
_UNITS = {1: torch.int8, 2: torch.int16}  # all wider numbers are taken as several of 32 bits


def bits_of(numbers: torch.Tensor, *, negated: bool = False) -> int:
    """64 bits that two different tensors share with a chance below one in 2**31.

    The bits are read as whole numbers, the n-th block of them is multiplied by the n-th of fixed random odd
    numbers of 64 bits, and the blocks are added up: universal hashing (Carter and Wegman 1979). One block is
    in memory at a time. -0.0 counts as 0.0.
    """
    flat = numbers.contiguous().reshape(-1)
    total: torch.Tensor | None = None
    blocks = torch.split(flat, _AT_ONCE)
    for factor, block in zip(_factors(len(blocks)), blocks, strict=True):
        signed = torch.rsub(block, 0.0) if negated else torch.add(block, 0.0)
        units = signed.view(_UNITS.get(signed.element_size(), torch.int32))
        if total is None:
            total = torch.zeros(len(units), dtype=torch.int64, device=units.device)
        total[: len(units)].add_(units, alpha=factor)
    return 0 if total is None else int((total * _lanes(str(total.device))[: len(total)]).sum())


@functools.lru_cache(maxsize=8)
def _factors(count: int) -> list[int]:
    generator = random.Random(0)
    return [generator.getrandbits(63) | 1 for _ in range(count)]


@functools.lru_cache(maxsize=8)
def _lanes(device: str) -> torch.Tensor:
    generator = random.Random(1)
    drawn = [generator.getrandbits(63) | 1 for _ in range(2 * _AT_ONCE)]
    return torch.tensor(drawn, dtype=torch.int64, device=device)
