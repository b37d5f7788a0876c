"""The contexts in which a network may run; each makes a callable out of a private copy."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from grl_surgery.doctor.sandbox import Gradients, Sandbox
from grl_surgery.errors import SurgeryError
from grl_surgery.verify.experiment import objective, tensors_in

__all__ = ["CONTEXTS", "Context", "Ready"]


@dataclass(frozen=True)
class Ready:
    """What a context made of a network.

    Args:
        network: Whose parameters and buffers it uses.
        gradients: Runs it on the rig's inputs, forward and backward.
    """

    network: nn.Module
    gradients: Callable[[], Gradients]


@dataclass(frozen=True)
class Context:
    """One way to run a network.

    Args:
        name: As the table shows it.
        prepare: Makes what runs from a private network.
        tolerance: How far a gradient may be from eager mode's, as a part of what the reversal makes of it.
        needs: A package without which it is left out.
        takes_coefficient: Whether to try whether another coefficient is obeyed there.
    """

    name: str
    prepare: Callable[[Sandbox], Ready]
    tolerance: float = 0.01
    needs: str | None = None
    takes_coefficient: bool = True


def _calling(rig: Sandbox, call: Callable[..., Any], network: nn.Module | None = None) -> Ready:
    return Ready(rig.network if network is None else network, lambda: rig.gradients(call, network))


# ------------------------------------------------------------------------------------------------- contexts


def _symbolic_trace(rig: Sandbox) -> Ready:
    traced = fx.symbolic_trace(rig.network)
    return _calling(rig, traced, traced)


def _feature_extractor(rig: Sandbox) -> Ready:
    from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor

    tracer = NodePathTracer()
    graph = tracer.trace(rig.network)
    output = next(iter(reversed(graph.nodes)))
    names = [tracer.node_to_qualname[node] for node in output.all_input_nodes]
    extractor = create_feature_extractor(rig.network, dict(zip(names, names, strict=True)))
    return _calling(rig, lambda *args, **kwargs: list(extractor(*args, **kwargs).values()), extractor)


def _program(rig: Sandbox) -> torch.export.ExportedProgram:
    args, kwargs = rig.plain_inputs()
    return torch.export.export(rig.network, args, kwargs, strict=False)


def _export(rig: Sandbox) -> Ready:
    module = _program(rig).module()
    return _calling(rig, module, module)


def _export_reloaded(rig: Sandbox) -> Ready:
    file = io.BytesIO()
    torch.export.save(_program(rig), file)
    file.seek(0)
    module = torch.export.load(file).module()
    return _calling(rig, module, module)


def _compile(rig: Sandbox) -> Ready:
    torch.compiler.reset()
    return _calling(rig, torch.compile(rig.network, backend="aot_eager"))


def _per_sample(rig: Sandbox) -> Ready:
    """Gradients of one sample at a time by vmap; their sum is the gradient of the batch."""
    return Ready(rig.network, lambda: _sum_over_samples(rig))


def _sum_over_samples(rig: Sandbox) -> Gradients:
    args, kwargs = rig.plain_inputs()
    given = (*args, kwargs)
    weights = [_weights(output, rig.seed + at) for at, output in enumerate(rig.run())]
    buffers = dict(rig.network.named_buffers())

    def loss(parameters: dict[str, torch.Tensor], values: Any, weight: Any) -> torch.Tensor:
        *one, by_name = pytree.tree_map_only(torch.Tensor, lambda value: value[None], values)
        called = torch.func.functional_call(rig.network, (parameters, buffers), tuple(one), by_name)
        pairs = list(zip(tensors_in(called), weight, strict=True))
        if any(output.shape != (1, *direction.shape) for output, direction in pairs):
            raise SurgeryError("what it returns for one sample has another shape than in a batch")
        return torch.stack([(output[0] * direction).sum() for output, direction in pairs]).sum()

    dims = pytree.tree_map(lambda value: 0 if isinstance(value, torch.Tensor) else None, given)
    parameters = {name: leaf.detach() for name, leaf in rig.network.named_parameters()}
    of_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, dims, 0), randomness="different")
    return {name: gradient.sum(0) for name, gradient in of_sample(parameters, given, weights).items()}


def _weights(output: torch.Tensor, seed: int) -> torch.Tensor:
    """The direction that the objective takes for this output."""
    leaf = torch.zeros_like(output, requires_grad=True)
    scalar = objective([leaf], seed)
    assert scalar is not None
    return torch.autograd.grad(scalar, leaf)[0]


def _autocast(rig: Sandbox) -> Ready:
    device = next((leaf.device.type for leaf in rig.leaves().values()), "cpu")

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16):
            return rig.network(*args, **kwargs)

    return _calling(rig, call)


def _checkpoint(rig: Sandbox) -> Ready:
    return _calling(
        rig, lambda *args, **kwargs: checkpoint(rig.network, *args, use_reentrant=False, **kwargs)
    )


def _deepcopy(rig: Sandbox) -> Ready:
    copied = copy.deepcopy(rig.network)
    return _calling(rig, copied, copied)


CONTEXTS: tuple[Context, ...] = (
    Context("torch.fx.symbolic_trace", _symbolic_trace),
    Context("torchvision feature extractor", _feature_extractor, needs="torchvision"),
    Context("torch.export", _export),
    Context("torch.export, saved and loaded", _export_reloaded),
    Context("torch.compile", _compile),
    Context("per-sample gradients", _per_sample),
    Context("autocast to bfloat16", _autocast, tolerance=0.3),
    Context("checkpointing", _checkpoint),
    Context("copy.deepcopy", _deepcopy),
)
