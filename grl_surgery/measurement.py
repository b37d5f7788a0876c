"""One repeatable forward and its backward passes, on private copies, with every valid coefficient at 1."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils import _pytree as pytree

from grl_surgery.comparison import Form, form_of, same_bits
from grl_surgery.generators import random_state_kept, seed_everything
from grl_surgery.head_outputs import split_logits
from grl_surgery.loading.inputs import as_arguments
from grl_surgery.nested import tensors_in
from grl_surgery.other_tensors import (
    clone,
    is_scripted,
    own_tree,
    tensors_held,
    with_tensors,
    without_graph,
)
from grl_surgery.precision import all_in_double, widened
from grl_surgery.python_state import python_state_kept
from grl_surgery.reversal import GradientReversal
from grl_surgery.sharing import COMPILED

__all__ = [
    "Experiment",
    "Passage",
    "Run",
    "Watch",
    "coefficients",
    "is_coefficient",
    "left_as_it_was",
    "objective",
    "private_copy",
    "repeatable",
    "tensors_in",
    "watching",
]

Gradients = dict[str, torch.Tensor | None]


def private_copy(network: nn.Module, flags: Mapping[str, bool]) -> nn.Module:
    """A tree over the same tensors with these mode flags; what a forward left with its graph has none here.

    Only tensors that autograd has computed are exchanged, for the same values: every container stays what it
    was, with its keys and its order, and is shared by those of the copy's modules that shared it.
    """
    tree = own_tree(network, copied=without_graph)
    for path, module in tree.named_modules():
        module.training = flags.get(path, module.training)
    return tree


@contextlib.contextmanager
def left_as_it_was(network: nn.Module) -> Iterator[None]:
    """Let a user's own network run, and put back what that changes: tensors, attributes, mode flags, objects.

    A compiled call is not used inside.
    """
    modules = [module for module in network.modules() if not is_scripted(module)]
    holders = [
        (holder, dict(holder))
        for module in modules
        for holder in (module.__dict__, module._parameters, module._buffers, module._modules)
    ]
    values = [(tensor, clone(tensor)) for tensor in tensors_held(network) if not tensor.is_meta]
    with python_state_kept(dict(network.named_modules())):
        for module in modules:
            module.__dict__.pop(COMPILED, None)
        try:
            yield
        finally:
            for holder, content in holders:
                holder.clear()
                holder.update(content)
            for tensor, value in values:
                if not same_bits(tensor.detach(), value):
                    tensor.data.copy_(value)


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
        output: What it returned, without the logits of its heads.
        gradients: Gradient of each objective with respect to each parameter that requires one.
        buffers: Its buffers afterwards.
        parameters: Names of its parameters.
        written: Those of them that the forward gave other values.
        remembers: Whether it left Python objects otherwise than they were.
        functions: Names of the autograd Functions in its graph that are not this library's.
    """

    output: Form
    gradients: dict[str, Gradients]
    buffers: dict[str, torch.Tensor]
    parameters: frozenset[str]
    written: dict[str, torch.Tensor]
    remembers: bool
    functions: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Call:
    """A network that is ready to run: every call sees the same inputs and the same random numbers."""

    experiment: Experiment
    tree: nn.Module
    leaves: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    changed: Callable[[], str | None]

    def __call__(self) -> Any:
        given = pytree.tree_map_only(torch.Tensor, self.experiment.copied, self.experiment.inputs)
        args, kwargs = as_arguments(given)
        seed_everything(self.experiment.seed)
        return self.tree(*args, **kwargs)


@dataclass
class Experiment:
    """The parameter values, the inputs and the random numbers that several networks are run on.

    Args:
        values: By parameter name. Runs work on copies, since a forward may write into its parameters.
        inputs: Arguments of forward: a tensor, a tuple, or a dict by name.
        seed: Of every run, and of the objectives.
        double: Run in float64.
    """

    values: dict[str, torch.Tensor]
    inputs: Any
    seed: int
    double: bool = False
    unwritten: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def on(cls, network: nn.Module, inputs: Any, seed: int) -> Experiment:
        """Values as they are in ``network``, but random where a whole parameter is zero.

        Many networks start with a head of zeros, behind which no gradient would show anything.
        """
        generator = torch.Generator().manual_seed(seed)
        values = {}
        for name, parameter in network.named_parameters():
            value = parameter.detach()
            value = value.clone() if value.is_inference() else value
            if value.numel() and not value.any():
                value = (torch.randn(value.shape, generator=generator) * 0.05).to(value.device, value.dtype)
            values[name] = value.requires_grad_(parameter.requires_grad)
        return cls(values, inputs, seed)

    def in_double(self) -> Experiment:
        """The same in float64."""
        values = {n: widened(v.detach()).requires_grad_(v.requires_grad) for n, v in self.values.items()}
        return Experiment(values, self.inputs, self.seed, double=True)

    def run(self, network: nn.Module, heads: Sequence[str] = ()) -> Run:
        """Forward once, and backward once for the output and once for each head."""
        with self._prepared(network) as call:
            parts = dict(zip(("output", *heads), split_logits(call(), heads), strict=True))
            gradients = {name: self._gradients(part, call.leaves) for name, part in parts.items()}
            output, remembers = form_of(parts["output"]), call.changed() is not None
            functions = frozenset(_functions_in(tensors_in(list(parts.values()))))
        written = self._written(call.leaves)
        return Run(output, gradients, call.buffers, frozenset(call.leaves), written, remembers, functions)

    def second(self, network: nn.Module, heads: Sequence[str] = ()) -> Form:
        """What a second call returns, without the logits of heads."""
        with self._prepared(network) as call:
            call()
            value = call()
        return form_of(split_logits(value, heads)[0])

    def outputs(self, network: nn.Module, inputs: Any, heads: Sequence[str]) -> list[torch.Tensor]:
        """The first tensor of the output, and the logits of each head, for other inputs."""
        other = Experiment(self.values, inputs, self.seed, self.double)
        with other._prepared(network) as call, torch.no_grad():
            parts = split_logits(call(), heads)
        return [tensors_in(part)[0].detach() for part in parts]

    @contextlib.contextmanager
    def _prepared(self, network: nn.Module) -> Iterator[_Call]:
        """A network over tensors of its own, to be called; what it does to other Python objects is undone."""
        leaves = {name: self._leaf(name) for name, _ in network.named_parameters()}
        buffers = {name: self.copied(buffer) for name, buffer in network.named_buffers()}
        valid = (name for name in coefficients(network) if _is_valid(network, name, buffers[name]))
        buffers.update((name, torch.ones_like(buffers[name])) for name in valid)
        tree = with_tensors(network, {**leaves, **buffers}, self.copied)
        precision = all_in_double() if self.double else contextlib.nullcontext()
        with python_state_kept(dict(tree.named_modules())) as changed, precision:
            yield _Call(self, tree, leaves, buffers, changed)

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy for one run, in its precision."""
        return widened(clone(tensor)) if self.double else clone(tensor)

    def _leaf(self, name: str) -> torch.Tensor:
        """A leaf of the run's own, so that no ``.grad`` of anybody's is touched."""
        value = self.values[name]
        copied = self.unwritten.pop(name, None)
        return (clone(value) if copied is None else copied).requires_grad_(value.requires_grad)

    def _written(self, leaves: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What was written into the leaves; those that were not can be used again.

        A write by way of ``.data`` moves no version counter, so it is the values that tell.
        """
        written: dict[str, torch.Tensor] = {}
        for name, leaf in leaves.items():
            kept = self.unwritten if same_bits(leaf.detach(), self.values[name].detach()) else written
            kept[name] = leaf.detach()
        return written

    def _gradients(self, part: Any, leaves: Mapping[str, torch.Tensor]) -> Gradients:
        wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
        scalar = objective(tensors_in(part), self.seed)
        if scalar is None or not wanted:
            return dict.fromkeys(wanted)
        return dict(zip(wanted, _gradients(scalar, [leaves[name] for name in wanted]), strict=True))


def _functions_in(outputs: Sequence[torch.Tensor]) -> Iterator[str]:
    """Names of the autograd Functions written in Python, but for this library's and torch's checkpointing."""
    waiting: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            module = getattr(type(node), "_forward_cls", type(node)).__module__
            if not module.startswith(("grl_surgery.", "torch.utils.checkpoint")):
                yield type(node).__name__
        following = {next_node for next_node in _following(node) if next_node not in seen}
        seen |= following
        waiting += following


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


def _gradients(objective: torch.Tensor, leaves: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
    found: Sequence[torch.Tensor | None]
    try:
        found = torch.autograd.grad(objective, leaves, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        objective.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
    return [_dense(gradient) for gradient in found]


def _dense(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """An embedding may give its gradient as sparse entries, in any order and with repetitions."""
    return gradient if gradient is None or gradient.layout == torch.strided else gradient.to_dense()


def coefficients(network: nn.Module) -> list[str]:
    """Names of the coefficients among the buffers."""
    layers = (path for path, module in network.named_modules() if isinstance(module, GradientReversal))
    return [f"{path}.coeff" if path else "coeff" for path in layers]


def _is_valid(network: nn.Module, name: str, value: torch.Tensor) -> bool:
    signed = network.get_submodule(name.rpartition(".")[0]).signed
    return is_coefficient(value.abs() if signed else value)


def is_coefficient(value: torch.Tensor) -> bool:
    """Whether a coefficient is finite and not negative; -1 stands for one that is disabled."""
    return 0.0 <= float(value) < math.inf


# ------------------------------------------------------------------------------------ at the reversals


@dataclass
class Passage:
    """The gradient that entered and the one that left a reversal in a backward pass."""

    entered: torch.Tensor | None = None
    left: torch.Tensor | None = None


@dataclass
class Watch:
    """What became of one reversal in one run: how often the graph recorded it, and what passed it."""

    recorded: int = 0
    passages: list[Passage] = field(default_factory=list)

    def over(self, first: Node, last: Node) -> None:
        """Record what enters the first and leaves the last of the nodes that one call made."""
        self.recorded += 1
        own: list[Passage] = []

        def enter(gradients: Sequence[torch.Tensor | None]) -> None:
            own.append(Passage(_dense(gradients[0])))
            self.passages.append(own[-1])

        def leave(gradients: Sequence[torch.Tensor | None], _: Any) -> None:
            own[-1].left = _dense(gradients[0])

        first.register_prehook(enter)
        last.register_hook(leave)


@contextlib.contextmanager
def watching(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Watch]]:
    """Record what passes each layer in every backward pass, by the layer's name."""
    watches = {name: Watch() for name in layers}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            if output.grad_fn is not None:
                x = next(iter((*args, *kwargs.values())))
                watches[name].over(output.grad_fn, _last_node(x, output.grad_fn))

        return hook

    handles = [layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield watches
    finally:
        for handle in handles:
            handle.remove()


def _last_node(x: Any, first: Node) -> Node:
    """The node that gives ``x`` its gradient, over a chain from the first; the first where they branch.

    A subclass of Tensor puts a node of its own behind that of the reversal.
    """
    end = get_gradient_edge(x).node if isinstance(x, torch.Tensor) and x.requires_grad else None
    node: Node | None = first
    while node is not None and len(following := _following(node)) == 1:
        if following[0] is end:
            return node
        node = following[0]
    return first


def _following(node: Node) -> list[Node]:
    return [following for following, _ in node.next_functions if following is not None]
