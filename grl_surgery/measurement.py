"""One repeatable forward and its backward passes, on private copies, with every coefficient at 1."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from grl_surgery.generators import random_state_kept
from grl_surgery.loading.inputs import as_arguments
from grl_surgery.reversal import GradientReversal
from grl_surgery.sharing import share_copy

__all__ = [
    "Experiment",
    "Passage",
    "Run",
    "objective",
    "private_copy",
    "repeatable",
    "tensors_in",
    "watching",
    "with_tensors",
]

Gradients = dict[str, torch.Tensor | None]


def private_copy(network: nn.Module, flags: Mapping[str, bool]) -> nn.Module:
    """A tree over the same tensors with these mode flags, and without graphs that a cache kept alive."""
    tree = share_copy(network)
    for path, module in tree.named_modules():
        module.training = flags.get(path, module.training)
        for value in module.__dict__.values():
            if type(value) in (dict, list) and any(_has_graph(item) for item in _items(value)):
                value.clear()
    return tree


def _items(container: Any) -> Sequence[Any]:
    return list(container.values()) if isinstance(container, dict) else container


def _has_graph(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.grad_fn is not None


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Grad mode on and deterministic algorithms; settings and generators are put back afterwards."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if started else []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        random_state_kept(),
        torch.random.fork_rng(devices),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            memory.fill_uninitialized_memory = fill


# --------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """What one network did.

    Args:
        outputs: Every tensor that it returned, by objective.
        gradients: Gradient of each objective with respect to each parameter that requires one.
        buffers: Its buffers afterwards.
    """

    outputs: dict[str, list[torch.Tensor]]
    gradients: dict[str, Gradients]
    buffers: dict[str, torch.Tensor]


@dataclass
class Experiment:
    """The parameter values, the inputs and the random numbers that several networks are run on.

    Args:
        values: By parameter name; leaves of their own, so that no ``.grad`` of anybody's is touched.
        inputs: Arguments of forward: a tensor, a tuple, or a dict by name.
        seed: Of every run, and of the objectives.
    """

    values: dict[str, torch.Tensor]
    inputs: Any
    seed: int
    dtype: torch.dtype | None = field(default=None)

    @classmethod
    def on(cls, network: nn.Module, inputs: Any, seed: int) -> Experiment:
        """Values as they are in ``network``, but random where a whole parameter is zero.

        Many networks start with a head of zeros, behind which no gradient would show anything.
        """
        generator = torch.Generator().manual_seed(seed)
        values = {}
        for name, parameter in network.named_parameters():
            value = parameter.detach()
            if value.numel() and not value.any():
                value = (torch.randn(value.shape, generator=generator) * 0.05).to(value.device, value.dtype)
            values[name] = value.requires_grad_(parameter.requires_grad)
        return cls(values, inputs, seed)

    def in_double(self) -> Experiment:
        """The same in float64."""
        return Experiment(self.values, self.inputs, self.seed, torch.float64)

    def run(self, network: nn.Module, heads: Sequence[str] = ()) -> Run:
        """Forward once, and backward once for the output and once for each head."""
        names = [name for name, _ in network.named_parameters()]
        leaves = {name: self._leaf(self.values[name]) for name in names}
        buffers = {name: self._copy(buffer) for name, buffer in network.named_buffers()}
        buffers.update((name, torch.ones_like(buffers[name])) for name in _coefficients(network))
        given = pytree.tree_map_only(torch.Tensor, self._copy, self.inputs)
        args, kwargs = as_arguments(given)
        torch.manual_seed(self.seed)
        value = with_tensors(network, {**leaves, **buffers})(*args, **kwargs)
        parts = dict(zip(("output", *heads), value if heads else (value,), strict=True))
        outputs = {name: tensors_in(part) for name, part in parts.items()}
        gradients = {name: self._gradients(tensors, leaves) for name, tensors in outputs.items()}
        detached = {name: [tensor.detach() for tensor in tensors] for name, tensors in outputs.items()}
        return Run(detached, gradients, buffers)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        copied = tensor.detach().clone()
        return copied.to(self.dtype) if self.dtype and copied.is_floating_point() else copied

    def _leaf(self, value: torch.Tensor) -> torch.Tensor:
        return self._copy(value).requires_grad_(value.requires_grad) if self.dtype else value

    def _gradients(self, outputs: Sequence[torch.Tensor], leaves: Mapping[str, torch.Tensor]) -> Gradients:
        wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
        scalar = objective(outputs, self.seed)
        if scalar is None or not wanted:
            return dict.fromkeys(wanted)
        return dict(zip(wanted, _gradients(scalar, [leaves[name] for name in wanted]), strict=True))


def objective(outputs: Sequence[torch.Tensor], seed: int) -> torch.Tensor | None:
    """A scalar that depends on every output in a direction of its own."""
    terms = []
    for place, output in enumerate(outputs):
        if output.requires_grad:
            generator = torch.Generator().manual_seed(seed + place)
            weight = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
            term = (output * weight).sum()
            terms.append(term.real if term.is_complex() else term)
    return sum(terms[1:], terms[0]) if terms else None


def with_tensors(network: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A tree that holds these tensors for good: a checkpointed forward runs again in the backward pass."""
    tree = share_copy(network)
    named = (*tree.named_parameters(), *tree.named_buffers())
    exchanged = {id(tensor): tensors[name] for name, tensor in named}
    for module in tree.modules():
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    holder[name] = exchanged[id(tensor)]  # type: ignore[assignment]
        if hasattr(module, "_flat_weights_names"):  # recurrent layers keep a list of their parameters
            names: Any = module._flat_weights_names
            module.__dict__["_flat_weights"] = [getattr(module, name) for name in names]
    return tree


def _gradients(objective: torch.Tensor, leaves: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
    try:
        return torch.autograd.grad(objective, leaves, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
    objective.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


def _coefficients(network: nn.Module) -> list[str]:
    layers = (path for path, module in network.named_modules() if isinstance(module, GradientReversal))
    return [f"{path}.coeff" if path else "coeff" for path in layers]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in a nested output, in a fixed order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return tensors_in(vars(value)) if hasattr(value, "__dataclass_fields__") else []


# ------------------------------------------------------------------------------------ at the reversals


@dataclass
class Passage:
    """The gradient that entered and the one that left a reversal in a backward pass."""

    entered: torch.Tensor | None = None
    left: torch.Tensor | None = None


@contextlib.contextmanager
def watching(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Passage]]]:
    """Record what passes the autograd node that each layer makes, by the layer's name."""
    passed: dict[str, list[Passage]] = {name: [] for name in layers}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if output.grad_fn is not None:
                output.grad_fn.register_hook(
                    lambda left, entered: passed[name].append(Passage(entered[0], left[0]))
                )

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()
