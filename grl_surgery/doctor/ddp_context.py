"""Runs a network under DistributedDataParallel in two processes, as one more context."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from grl_surgery.doctor.contexts import Context, Ready
from grl_surgery.doctor.sandbox import Gradients, Sandbox
from grl_surgery.verify.experiment import objective, tensors_in

__all__ = ["TWO_PROCESSES"]

_WORLD = 2


def _prepare(rig: Sandbox) -> Ready:
    return Ready(rig.network, lambda: _mean_gradients(rig))


TWO_PROCESSES = Context("DistributedDataParallel", _prepare, takes_coefficient=False)


def _mean_gradients(rig: Sandbox) -> Gradients:
    """What DDP leaves in ``.grad`` where both processes see the same inputs: the gradient itself."""
    file = io.BytesIO()
    torch.save((rig.network, rig.plain_inputs(), rig.seed), file)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        spawn(_run, args=(file.getvalue(), str(place), _folders(rig.network)), nprocs=_WORLD)  # type: ignore[no-untyped-call]
        found: Gradients = torch.load(place / "gradients")
    return found


def _folders(network: nn.Module) -> list[str]:
    """Where the classes of the network can be imported from."""
    files = [getattr(sys.modules.get(type(m).__module__), "__file__", None) for m in network.modules()]
    return list(dict.fromkeys(os.path.dirname(os.path.abspath(file)) for file in files if file))


def _run(rank: int, saved: bytes, folder: str, folders: list[str]) -> None:
    sys.path += [name for name in folders if name not in sys.path and "-packages" not in name]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=_WORLD)
    try:
        found = _gradients(saved)
        if rank == 0:
            torch.save(found, Path(folder) / "gradients")
    finally:
        dist.destroy_process_group()


def _gradients(saved: bytes) -> Gradients:
    # The bytes are those that the parent wrote a moment ago.
    network, (args, kwargs), seed = torch.load(io.BytesIO(saved), weights_only=False)
    wrapped = DistributedDataParallel(network)
    torch.manual_seed(seed)
    scalar: Any = objective(tensors_in(wrapped(*args, **kwargs)), seed)
    scalar.backward()
    held = {name: leaf.grad for name, leaf in network.named_parameters()}
    return {name: gradient for name, gradient in held.items() if gradient is not None}
