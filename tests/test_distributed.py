"""Spliced networks on several processes: two of gloo on this machine, and 1,024 simulated ones."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reversal_contexts import world_of_one
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
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
    dist.init_process_group("fake", rank=0, world_size=1024)
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


# --- Surgery and export where the parameters are shards


@pytest.fixture
def mesh() -> Iterator[object]:
    with world_of_one() as mesh:
        yield mesh


def by_fsdp1(model: nn.Module, mesh: object) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def by_fsdp1_in_part(model: nn.Module, mesh: object) -> nn.Module:
    model.block1 = FullyShardedDataParallel(model.block1, device_id=torch.device("cpu"))
    return model


def by_fsdp2(model: nn.Module, mesh: object) -> nn.Module:
    return fully_shard(model, mesh=mesh)


def by_fsdp2_in_part(model: nn.Module, mesh: object) -> nn.Module:
    fully_shard(model.block1, mesh=mesh)
    return model


def by_tensor_parallelism(model: nn.Module, mesh: object) -> nn.Module:
    plan = {"block1.first": ColwiseParallel(), "block1.second": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


SHARDINGS = {
    by_fsdp1: r"this network is sharded \(FullyShardedDataParallel\)",
    by_fsdp1_in_part: r"'block1' is sharded \(FullyShardedDataParallel\)",
    by_fsdp2: r"this network is sharded \((DTensor|FSDPModule)\)",
    by_fsdp2_in_part: r"'block1' is sharded \((DTensor|FSDPModule)\)",
    by_tensor_parallelism: r"'block1.first' is sharded \(DTensor\)",
}


@pytest.mark.parametrize("surgery", [gs.insert_grl, gs.attach_domain_head])
@pytest.mark.parametrize("sharding", SHARDINGS)
# FSDP1 says that one process has nothing to shard, and newer versions of torch that it is the older one.
@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:.*FullyShardedDataParallel:FutureWarning")
def test_surgery_after_sharding_is_refused_by_the_name_of_what_shards(sharding, surgery, mesh) -> None:
    sharded = sharding(Blocks(), mesh)
    with pytest.raises(gs.SurgeryError, match=SHARDINGS[sharding]) as refusal:
        surgery(sharded, after="block2", example_inputs=shard(0))
    assert "splice, then shard" in str(refusal.value)
    assert f"m = {surgery.__name__}(model, ...)" in str(refusal.value)
    sharded(shard(0)).sum().backward()  # it is as it was


@pytest.mark.parametrize("ending", [".safetensors", ".pt2", ".onnx", ""])
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:.*FullyShardedDataParallel:FutureWarning")
def test_a_sharded_network_is_not_exported_and_the_error_says_how(
    sharding, ending: str, mesh, tmp_path: Path
) -> None:
    sharded = sharding(gs.insert_grl(Blocks(), after="block2"), mesh)
    with pytest.raises(gs.ExportError, match="the network is sharded") as refusal:
        gs.export(sharded, tmp_path / f"m{ending}", example_inputs=shard(0))
    assert "gather the weights" in str(refusal.value)
    assert "get_model_state_dict(m, options=StateDictOptions(full_state_dict=True))" in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:.*FullyShardedDataParallel:FutureWarning")
@pytest.mark.filterwarnings("ignore:When using ``NO_SHARD``:UserWarning")
def test_what_the_error_says_makes_a_file_of_the_trained_weights(sharding, mesh, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sharded = sharding(gs.insert_grl(Blocks(), after="block2"), mesh)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    sharded(shard(0)).square().sum().backward()
    optimizer.step()

    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    plain = gs.insert_grl(Blocks(), after="block2")
    plain.load_state_dict(state)
    file = gs.export(plain, tmp_path / "m.safetensors")

    again = gs.load(file, model=Blocks())
    assert torch.equal(again(shard(1)), sharded(shard(1)).detach())
