"""Spliced networks on several processes: two of gloo on this machine, and 1,024 simulated ones."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import grl_surgery as gs

WORLD = 2


class Block(nn.Module):
    """What a wrapping policy looks for by its class."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Blocks(nn.Module):
    """No buffers: whatever is broadcast is not the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2, self.block3 = Block(), Block(), Block()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block3(self.block2(self.block1(x))))


def network(*, reversed: bool = True) -> nn.Module:
    """The same weights in every process; without a reversal, the same head behind an identity."""
    torch.manual_seed(0)
    model = gs.attach_domain_head(Blocks(), "block2", hidden=8, dropout=0.0, example_inputs=torch.zeros(2, 8))
    if not reversed:
        model.domain.reversal = nn.Identity()
    return model


def shard(rank: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 + rank))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    output, domains = model(x)
    return output.square().mean() + domains.square().mean()


def gradients_of_one_process(model: nn.Module) -> dict[str, Tensor]:
    """Mean over the shards of what each gives alone."""
    found = []
    for rank in range(WORLD):
        alone = copy.deepcopy(model)
        loss(alone, shard(rank)).backward()
        found.append({name: parameter.grad for name, parameter in alone.named_parameters()})
    return {name: (found[0][name] + found[1][name]) / WORLD for name in found[0]}


def in_processes(check: Callable[[int], None]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_start, args=(check, port), nprocs=WORLD)


def _start(rank: int, check: Callable[[int], None], port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        check(rank)
    finally:
        dist.destroy_process_group()


def check_ddp(rank: int) -> None:
    model = network()
    expected = gradients_of_one_process(model)
    wrapped = DistributedDataParallel(model)
    assert not wrapped.will_sync_module_buffers()
    loss(wrapped, shard(rank)).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
    assert gs.verify_flip(wrapped.module, example_inputs=shard(0)).ok


def check_fsdp(rank: int) -> None:
    model = network()
    expected = gradients_of_one_process(model)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert len(blocks) == 3
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    loss(model, shard(rank)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], msg=name)


def test_under_ddp_every_gradient_is_the_exact_mean_and_nothing_is_broadcast() -> None:
    in_processes(check_ddp)


def test_under_fsdp_blocks_are_found_by_class_and_gradients_are_those_of_one_process() -> None:
    in_processes(check_fsdp)


@pytest.fixture
def thousand_ranks():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1024)
    yield
    dist.destroy_process_group()


def collectives(model: nn.Module) -> dict[object, int]:
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        fully_shard(block)
    fully_shard(model)
    with CommDebugMode() as counted:
        loss(model, shard(0)).backward()
    return dict(counted.get_comm_counts())


# The mode that counts puts hooks on every module, whose outputs are views.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_a_reversal_adds_no_collective_on_1024_ranks(thousand_ranks) -> None:
    with_reversal, without = collectives(network()), collectives(network(reversed=False))
    assert sum(without.values()) > 0
    assert with_reversal == without
