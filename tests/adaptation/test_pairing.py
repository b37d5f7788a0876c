"""Pairs of batches: endless, the same every time, resumed where they were left, alike for every sampler."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, WeightedRandomSampler

import grl_surgery as gs

Make = Callable[[], tuple[Iterable[Any], Iterable[Any]]]


class Noisy(Dataset):
    """Numbers, and beside each a random one, as an augmentation draws it."""

    def __init__(self, start: int, count: int) -> None:
        self.start, self.count = start, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, float]:
        return self.start + index, torch.rand(()).item()


def numbers(start: int, count: int) -> Noisy:
    return Noisy(start, count)


def shuffled() -> tuple[DataLoader, DataLoader]:
    return DataLoader(numbers(0, 10), 3, shuffle=True), DataLoader(numbers(100, 7), 3, shuffle=True)


def with_own_generators() -> tuple[DataLoader, DataLoader]:
    return tuple(
        DataLoader(numbers(start, 8), 3, shuffle=True, generator=torch.Generator().manual_seed(start))
        for start in (0, 100)
    )  # type: ignore[return-value]


def weighted() -> tuple[DataLoader, DataLoader]:
    sampler = WeightedRandomSampler(torch.arange(1.0, 11.0).tolist(), 10)
    return DataLoader(numbers(0, 10), 4, sampler=sampler), DataLoader(numbers(100, 6), 4, drop_last=True)


def distributed() -> tuple[DataLoader, DataLoader]:
    def one(start: int, count: int) -> DataLoader:
        data = numbers(start, count)
        return DataLoader(data, 2, sampler=DistributedSampler(data, num_replicas=2, rank=1))

    return one(0, 10), one(100, 6)


def with_workers() -> tuple[DataLoader, DataLoader]:
    options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "spawn"}
    return DataLoader(numbers(0, 9), 3, shuffle=True, **options), DataLoader(numbers(100, 4), 3, shuffle=True)


class Stream(IterableDataset):
    """A stream of its own length, shuffled by Python's generator."""

    def __iter__(self) -> Iterator[float]:
        yield from (random.random() for _ in range(5))


def plain_lists_and_streams() -> tuple[Iterable[Any], Iterable[Any]]:
    return [torch.tensor([1]), torch.tensor([2])], DataLoader(numbers(100, 9), 4, shuffle=True)


KINDS: list[Make] = [shuffled, with_own_generators, weighted, distributed, plain_lists_and_streams]


def indices(batch: Any) -> list[int]:
    return (batch[0] if isinstance(batch, list) else batch).tolist()


def taken(pairs: Iterator[tuple[Any, Any]], count: int) -> list[tuple[list[int], list[int]]]:
    return [(indices(source), indices(target)) for source, target in itertools.islice(pairs, count)]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_the_same_pairs_come_whatever_else_draws_random_numbers(make: Make) -> None:
    torch.manual_seed(1)
    first = taken(gs.paired(*make()), 12)
    torch.manual_seed(2)
    pairs = gs.paired(*make())
    again = []
    for _ in range(12):
        torch.rand(5)
        again += taken(pairs, 1)
    assert again == first


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("after", [0, 1, 4, 5, 11])
def test_a_run_that_is_resumed_sees_the_pairs_that_would_have_come(make: Make, after: int) -> None:
    pairs = gs.paired(*make())
    taken(pairs, after)
    state = pairs.state_dict()
    expected = taken(pairs, 9)
    resumed = gs.paired(*make())
    taken(resumed, 2)  # of a run that began before it was resumed
    resumed.load_state_dict(state)
    assert taken(resumed, 9) == expected


def test_worker_processes_are_resumed() -> None:
    pairs = gs.paired(*with_workers())
    taken(pairs, 1)
    state = pairs.state_dict()
    expected = taken(pairs, 2)
    resumed = gs.paired(*with_workers())
    resumed.load_state_dict(state)
    assert taken(resumed, 2) == expected


def test_neither_loader_is_cut_short_and_each_epoch_has_an_order_of_its_own() -> None:
    pairs = gs.paired(*shuffled())
    assert pairs.epoch_length == 4
    seen = taken(pairs, 12)
    sources = [[i for source, _ in seen[start : start + 4] for i in source] for start in (0, 4, 8)]
    targets = [[i for _, target in seen[start : start + 3] for i in target] for start in (0, 3, 6, 9)]
    assert all(sorted(epoch) == list(range(10)) for epoch in sources)
    assert all(sorted(epoch) == list(range(100, 107)) for epoch in targets)
    assert len({tuple(epoch) for epoch in sources}) == 3
    assert len({tuple(epoch) for epoch in targets}) == 4
    assert pairs.epochs == (2, 3)


def test_another_seed_is_another_order() -> None:
    assert taken(gs.paired(*shuffled(), seed=1), 4) != taken(gs.paired(*shuffled(), seed=2), 4)


def test_the_two_ranks_of_a_distributed_sampler_share_every_epoch_out() -> None:
    def rank(number: int) -> Iterator[tuple[Any, Any]]:
        data = numbers(0, 8)
        sampler = DistributedSampler(data, num_replicas=2, rank=number)
        return gs.paired(DataLoader(data, 2, sampler=sampler), [torch.tensor([0])])

    one, other = (taken(rank(number), 6) for number in (0, 1))
    for epoch in range(3):
        both = [i for pairs in (one, other) for source, _ in pairs[2 * epoch : 2 * epoch + 2] for i in source]
        assert sorted(both) == list(range(8))
    assert one[:2] != one[2:4]  # set_epoch was called


def test_ranks_without_such_a_sampler_see_different_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        seen.append(taken(gs.paired(*shuffled()), 4))
    assert seen[0] != seen[1]


def test_set_epoch_reaches_a_dataset_and_a_loader_that_have_it() -> None:
    class Told(list):
        def __init__(self, batches: list[Any]) -> None:
            super().__init__(batches)
            self.told: list[int] = []
            self.dataset = type("Data", (), {"set_epoch": lambda _, epoch: self.told.append(epoch)})()

    loader = Told([1, 2])
    list(itertools.islice(gs.paired(loader, [1]), 5))
    assert loader.told == [0, 1, 2]


def test_no_random_generator_of_the_process_moves() -> None:
    loaders = DataLoader(list(range(4)), 2, shuffle=True), DataLoader(Stream(), 2)
    pairs = gs.paired(*loaders)
    next(pairs)
    state, before, python = pairs.state_dict(), torch.get_rng_state(), random.getstate()
    gs.paired(*loaders).load_state_dict(state)
    next(gs.paired(*loaders))
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_the_state_is_plain_enough_for_a_safe_checkpoint(tmp_path: Any) -> None:
    pairs = gs.paired(*with_own_generators())
    taken(pairs, 4)
    torch.save(pairs.state_dict(), tmp_path / "pairs.pt")
    expected = taken(pairs, 4)
    resumed = gs.paired(*with_own_generators())
    resumed.load_state_dict(torch.load(tmp_path / "pairs.pt", weights_only=True))
    assert taken(resumed, 4) == expected


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    pairs = gs.paired([1, 2, 3], [1, 2])
    next(pairs)
    shorter = gs.paired([1], [1, 2])
    assert next(shorter) == (1, 1)
    taken_two = gs.paired([1, 2, 3], [1, 2])
    next(taken_two), next(taken_two)
    with pytest.raises(gs.SurgeryError, match=r"gave 2 batches of epoch 0.* and has 1 now"):
        shorter.load_state_dict(taken_two.state_dict())
    assert next(shorter) == (1, 2)
    with pytest.raises(gs.SurgeryError, match="of seed 0, and these batches are of seed 5"):
        gs.paired([1], [1], seed=5).load_state_dict(pairs.state_dict())
    with pytest.raises(gs.SurgeryError, match="expected the keys seed, source and target"):
        pairs.load_state_dict({})


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (iter([1]), [1], "source loader, a list_iterator, can be read only once"),
        ([1], 5, "target loader, a int, cannot be iterated over"),
        ([1], [], "target loader has no batch"),
    ],
)
def test_what_gives_no_batches_is_refused_by_name(source: Any, target: Any, message: str) -> None:
    with pytest.raises(gs.SurgeryError, match=message):
        next(gs.paired(source, target))


def test_a_loader_without_a_length_says_so() -> None:
    pairs = gs.paired(DataLoader(Stream(), 2), [1])
    with pytest.raises(gs.SurgeryError, match="source loader does not know its length"):
        pairs.epoch_length  # noqa: B018


def test_two_processes_draw_the_same_pairs() -> None:
    code = (
        "import torch, itertools, grl_surgery as gs\n"
        "from torch.utils.data import DataLoader\n"
        "pairs = gs.paired(*(DataLoader(list(range(n)), 4, shuffle=True) for n in (9, 6)))\n"
        "print([(s.tolist(), t.tolist()) for s, t in itertools.islice(pairs, 5)])"
    )
    run = lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: E731
    assert run().stdout == run().stdout != ""
