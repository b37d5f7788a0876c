"""Pairs batches of two domains: endless, repeatable, and resumed where they were left."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grl_surgery.errors import SurgeryError, one_line
from grl_surgery.isolation.rng_state import preserve_rng_state

__all__ = ["PairedBatches", "paired"]

_CALL = "paired(DataLoader(source, 64, shuffle=True), DataLoader(target, 64, shuffle=True))"


def paired(source: Iterable[Any], target: Iterable[Any], *, seed: int = 0) -> PairedBatches:
    """Return endless pairs of batches, one of each domain; a loader that ends starts its next epoch.

    The loaders may have different lengths, and neither is cut short. The order of each epoch depends only on
    ``seed``, the process's rank and the number of the epoch. So every run gets the same pairs, whatever else
    draws random numbers. ``set_epoch`` of a loader, its sampler or its dataset is called at the
    start of each of its epochs, as DistributedSampler needs. Without such a sampler, each process of a
    distributed run draws an order of its own.

    Example:
        >>> pairs = paired(["s1", "s2", "s3"], ["t1", "t2"])
        >>> [next(pairs) for _ in range(4)]
        [('s1', 't1'), ('s2', 't2'), ('s3', 't1'), ('s1', 't2')]
        >>> pairs.epochs
        (1, 1)
        >>> state = pairs.state_dict()
        >>> again = paired(["s1", "s2", "s3"], ["t1", "t2"])
        >>> again.load_state_dict(state)
        >>> next(again)
        ('s2', 't1')

    Args:
        source: A DataLoader, or anything whose ``iter()`` gives the batches of one epoch, again and again.
        target: The same of the other domain.
        seed: Of the order. A generator that a loader has of its own keeps its own state instead.

    Returns:
        An iterator of pairs (source batch, target batch) that also has ``state_dict()`` and
        ``load_state_dict()``; :func:`grl_surgery.save_run` takes it along.

    Raises:
        SurgeryError: One of them cannot be iterated over, or only once; or, while iterating, has no batch.
    """
    return PairedBatches(source, target, seed=seed)


class PairedBatches(Iterator[tuple[Any, Any]]):
    """What :func:`paired` returns.

    Example:
        >>> pairs = PairedBatches(["s1", "s2", "s3"], ["t1", "t2"])
        >>> pairs.epoch_length
        3

    Args:
        source: As for :func:`paired`.
        target: The other domain.
        seed: Of the order.
    """

    def __init__(self, source: Iterable[Any], target: Iterable[Any], *, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise SurgeryError(f"seed is {seed!r}, but must be a whole number", example="seed=0")
        self._seed = seed
        self._sides = (_Endless("source", source, seed), _Endless("target", target, seed))

    @property
    def epochs(self) -> tuple[int, int]:
        """How many epochs of each loader were ended: the number of the one that the last batch is from."""
        source, target = self._sides
        return max(source.epoch, 0), max(target.epoch, 0)

    @property
    def epoch_length(self) -> int:
        """Number of pairs in which every batch of both loaders comes at least once.

        Raises:
            SurgeryError: A loader does not know how long it is.
        """
        return max(side.length() for side in self._sides)

    def __iter__(self) -> PairedBatches:
        return self

    def __next__(self) -> tuple[Any, Any]:
        source, target = self._sides
        return source.next(), target.next()

    def state_dict(self) -> dict[str, Any]:
        """Which pair comes next, in plain types and tensors."""
        return {"seed": self._seed, **{side.name: side.state_dict() for side in self._sides}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the pair that would have come next.

        The batches of the epoch that were handed out already are read again and dropped: that takes as long
        as reading them, and moves no random generator of the process.

        Raises:
            SurgeryError: The state is damaged, of another seed, or of a loader that was longer.
        """
        if not isinstance(state, Mapping) or not {"seed", "source", "target"} <= state.keys():
            raise SurgeryError(
                "this is not the state of paired batches: expected the keys seed, source and target",
                example="pairs.load_state_dict(pairs.state_dict())",
            )
        if state["seed"] != self._seed:
            raise SurgeryError(
                f"the state is of seed {state['seed']}, and these batches are of seed {self._seed}",
                example=f"paired(source, target, seed={state['seed']})",
            )
        resumed = [side.resumed(state[side.name]) for side in self._sides]
        for side, place in zip(self._sides, resumed, strict=True):
            side.go_to(place)


class _Endless:
    """One loader, epoch after epoch."""

    def __init__(self, name: str, loader: Iterable[Any], seed: int) -> None:
        if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
            what = "can be read only once" if isinstance(loader, Iterator) else "cannot be iterated over"
            raise SurgeryError(f"the {name} loader, a {type(loader).__name__}, {what}", example=_CALL)
        self.name, self.loader, self.seed = name, loader, seed
        self.epoch, self.taken = -1, 0  # before the first epoch
        self._batches: Iterator[Any] = iter(())
        self._generators: list[Tensor] = []

    def length(self) -> int:
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except TypeError as error:
            raise SurgeryError(
                f"the {self.name} loader does not know its length: {one_line(error)}",
                example="plan with a number of steps instead",
            ) from error

    def next(self) -> Any:
        """The next batch, of the next epoch where this one has ended."""
        for batch in self._batches:
            self.taken += 1
            return batch
        return self._begin(self.epoch + 1)

    def _begin(self, epoch: int) -> Any:
        """The first batch of an epoch."""
        for part in _parts(self.loader):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        generators = [generator.get_state() for generator in self._own_generators()]
        # A shuffling sampler draws its seed from the global generator when the first batch is asked for.
        with preserve_rng_state():
            torch.default_generator.manual_seed(self._seed_of(epoch))
            batches = iter(self.loader)
            first = next(batches, _NOTHING)
        if first is _NOTHING:
            raise SurgeryError(
                f"the {self.name} loader has no batch" + (f" in epoch {epoch}" if epoch else ""),
                example="a batch size of at most the number of samples, or drop_last=False",
            )
        self._batches, self._generators, self.epoch, self.taken = batches, generators, epoch, 1
        return first

    def _seed_of(self, epoch: int) -> int:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return zlib.crc32(f"{self.seed} {self.name} {rank} {epoch}".encode())

    def _own_generators(self) -> list[torch.Generator]:
        found = [getattr(part, "generator", None) for part in _parts(self.loader)]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def state_dict(self) -> dict[str, Any]:
        states = self._generators if self.epoch >= 0 else [g.get_state() for g in self._own_generators()]
        return {"epoch": self.epoch, "taken": self.taken, "generators": states}

    def resumed(self, state: Mapping[str, Any]) -> _Endless:
        """Another reader of the same loader, at the place of ``state``."""
        other = _Endless(self.name, self.loader, self.seed)
        epoch, taken = state["epoch"], state["taken"]
        own = self._own_generators()
        if len(own) != len(state["generators"]):
            raise SurgeryError(
                f"the {self.name} loader had {len(state['generators'])} generators of its own, "
                f"and has {len(own)} now",
                example="make the loader as it was made in the run that is resumed",
            )
        with preserve_rng_state():
            for generator, before in zip(own, state["generators"], strict=True):
                generator.set_state(before.cpu())
            if epoch >= 0:
                other._begin(epoch)
            while other.taken < taken:
                if next(other._batches, _NOTHING) is _NOTHING:
                    raise SurgeryError(
                        f"the {self.name} loader gave {taken} batches of epoch {epoch} in the run that is "
                        f"resumed, and has {other.taken} now",
                        example="the same data and the same batch size as in that run",
                    )
                other.taken += 1
        return other

    def go_to(self, other: _Endless) -> None:
        self._batches, self._generators = other._batches, other._generators
        self.epoch, self.taken = other.epoch, other.taken


_NOTHING = object()


def _parts(loader: Any) -> list[Any]:
    """The loader and what it draws from, each once: what may have a ``set_epoch`` or a generator."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = [loader, *samplers, getattr(loader, "dataset", None)]
    return list({id(part): part for part in found if part is not None}.values())
