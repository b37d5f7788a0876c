"""Runs one repeatable forward and its backward passes on private copies, coefficients at 1."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch._C import _are_functorch_transforms_active
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils import _pytree as pytree

from grl_surgery.autograd_graph import nodes_below
from grl_surgery.capture.python_state import preserve_python_state
from grl_surgery.isolation.float64 import WIDE, Wider, all_in_double, widened
from grl_surgery.isolation.pytrees import dense, tensors_in
from grl_surgery.isolation.rng_state import preserve_rng_state, seed_everything
from grl_surgery.isolation.shared_copy import COMPILED
from grl_surgery.isolation.tensor_copy import (
    clone,
    is_scripted,
    own_tree,
    tensors_held,
    with_tensors,
    without_graph,
)
from grl_surgery.loading.inputs import as_arguments
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.surgery.head_outputs import split_logits
from grl_surgery.verify.compare import OutputSnapshot, same_bits, snapshot
from grl_surgery.verify.fingerprint import Fingerprint, Sign, fingerprint
from grl_surgery.verify.shared_weights import SharedWeights

__all__ = [
    "Experiment",
    "GradientPair",
    "GradientRecorder",
    "Gradients",
    "Run",
    "Values",
    "Wanted",
    "coefficients",
    "is_coefficient",
    "left_as_it_was",
    "limits_off",
    "objective",
    "private_copy",
    "repeatable",
    "tensors_in",
    "watching",
]

Gradients = dict[str, Fingerprint | torch.Tensor | None]


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
    with preserve_python_state(dict(network.named_modules())):
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
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = list(range(torch.cuda.device_count())) if started else []
    with (
        preserve_rng_state(),  # of the threads, one at a time: what is read below is nobody else's
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices),
        warnings.catch_warnings(),
        _deterministic_algorithms(),
    ):
        yield


@contextlib.contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill


# --------------------------------------------------------------------------------------------- runs

Values = Literal["values"]
Wanted = Mapping[str, Mapping[str, Sign | Values]]
"""By objective and parameter, what to keep of the gradient: fingerprints of it, or the gradient itself."""


@dataclass(frozen=True)
class Run:
    """What one network did.

    Args:
        output: What it returned, without the logits of its heads.
        gradients: Of each objective with respect to each parameter that requires a gradient: its fingerprint,
            or itself where its values are wanted, or None where there is none.
        buffers: Its buffers afterwards.
        parameters: Names of its parameters.
        written: Those of them that the forward gave other values, with these.
        remembers: Whether it left Python objects otherwise than they were.
        functions: Names of the autograd Functions in its graph that are not this library's.
    """

    output: OutputSnapshot
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
    weights: SharedWeights
    buffers: dict[str, torch.Tensor]
    changed: Callable[[], str | None]

    def __call__(self) -> Any:
        given = pytree.tree_map_only(torch.Tensor, self.experiment.copied, self.experiment.inputs)
        args, kwargs = as_arguments(given)
        seed_everything(self.experiment.seed)
        with self.weights:  # what a backward computes again writes where the forward wrote
            return self.tree(*args, **kwargs)


@dataclass
class Experiment:
    """The parameter values, the inputs and the random numbers that several networks are run on.

    Args:
        values: By parameter name. Runs share their memory; what a forward writes there is put back.
        inputs: Arguments of forward: a tensor, a tuple, or a dict by name.
        seed: Of every run, and of the objectives.
        wider: Which dtypes others stand in the place of.
    """

    values: dict[str, torch.Tensor]
    inputs: Any
    seed: int
    wider: Wider | None = None

    @classmethod
    def on(cls, network: nn.Module, inputs: Any, seed: int, *, fills_zeros: bool = True) -> Experiment:
        """Values as they are in ``network``, but random where a whole parameter is zero.

        Many networks start with a head of zeros, behind which no gradient would show anything.
        """
        generator = torch.Generator().manual_seed(seed)
        values = {}
        for name, parameter in network.named_parameters():
            value = parameter.detach()
            value = value.clone() if value.is_inference() else value
            if fills_zeros and _is_all_zero(value):
                value = (torch.randn(value.shape, generator=generator) * 0.05).to(value.device, value.dtype)
            values[name] = value.requires_grad_(parameter.requires_grad)
        return cls(values, inputs, seed)

    def widened(self, wider: Wider = WIDE) -> Experiment:
        """The same in wider dtypes, by default in float64."""
        values = {
            n: widened(v.detach(), wider).requires_grad_(v.requires_grad) for n, v in self.values.items()
        }
        return Experiment(values, self.inputs, self.seed, wider)

    def of_sample(self, names: Collection[str]) -> Experiment:
        """The same with gradients of these parameters alone."""
        values = {n: v if n in names else v.detach() for n, v in self.values.items()}
        return Experiment(values, self.inputs, self.seed, self.wider)

    def run(self, network: nn.Module, heads: Sequence[str] = (), wanted: Wanted | None = None) -> Run:
        """Forward once, and backward once for each objective: the output, and the logits of each head.

        Args:
            network: Runs on a copy, over the experiment's own values.
            heads: Names of its heads, in the order of their logits.
            wanted: What to keep of which gradients; by default the fingerprint of each of them.
        """
        with self._prepared(network) as call:
            parts = dict(zip(("output", *heads), split_logits(call(), heads, call.tree), strict=True))
            output = snapshot(parts["output"])
            nodes = list(_functions_in(tensors_in(list(parts.values()))))
            needed = dict.fromkeys(parts, None) if wanted is None else wanted
            gradients = {}
            for name in (name for name in tuple(parts) if name in needed):
                scalar = objective(tensors_in(parts.pop(name)), self.seed)
                is_last = not parts.keys() & needed.keys()
                gradients[name] = _gradients(
                    scalar, call.weights.leaves, needed[name], is_last=is_last and not nodes
                )
            remembers = call.changed() is not None
            written = call.weights.written()
        names = frozenset(call.weights.leaves)
        functions = frozenset(name for module, name in nodes if module != "torch.utils.checkpoint")
        return Run(output, gradients, call.buffers, names, written, remembers, functions)

    def second(self, network: nn.Module, heads: Sequence[str] = ()) -> OutputSnapshot:
        """What a second call returns, without the logits of heads."""
        with self._prepared(network) as call:
            call()
            value = call()
        return snapshot(split_logits(value, heads, network)[0])

    def outputs(self, network: nn.Module, inputs: Any, heads: Sequence[str]) -> list[torch.Tensor]:
        """The first tensor of the output, and the logits of each head, for other inputs."""
        other = Experiment(self.values, inputs, self.seed, self.wider)
        with other._prepared(network) as call, torch.no_grad():
            parts = split_logits(call(), heads, call.tree)
        return [tensors_in(part)[0].detach() for part in parts]

    def signs(
        self, network: nn.Module, heads: Sequence[str], kind: type[nn.Module]
    ) -> dict[str, dict[str, frozenset[int]]]:
        """By objective and parameter, the signs of all paths in autograd's own graph of one forward.

        Empty where that graph does not show every path: where a Function written in Python or a
        ``torch.func`` transform is in it.

        Args:
            network: Runs on a copy.
            heads: Names of its heads, in the order of their logits.
            kind: Class of the modules that reverse.
        """
        nodes: list[Node | None] = []
        with self._prepared(network) as call:
            for module in call.tree.modules():
                if isinstance(module, kind):
                    module.register_forward_hook(lambda m, args, out: nodes.append(out.grad_fn))
            parts = dict(zip(("output", *heads), split_logits(call(), heads), strict=True))
            outputs = {name: tensors_in(part) for name, part in parts.items()}
            if None in nodes or any(_functions_in([t for part in outputs.values() for t in part])):
                return {}
            names = {id(leaf): name for name, leaf in call.weights.leaves.items()}
            return {name: _signs_of_leaves(part, set(nodes), names) for name, part in outputs.items()}

    @contextlib.contextmanager
    def _prepared(self, network: nn.Module) -> Iterator[_Call]:
        """A network to be called, over buffers of its own; what it does to weights and objects is undone."""
        weights = SharedWeights({name: self.values[name] for name, _ in network.named_parameters()})
        buffers = {name: self.copied(buffer) for name, buffer in network.named_buffers()}
        valid = (name for name in coefficients(network) if _is_valid(network, name, buffers[name]))
        buffers.update((name, torch.ones_like(buffers[name])) for name in valid)
        tree = with_tensors(network, {**weights.leaves, **buffers}, self.copied)
        limits_off(tree)
        precision = all_in_double(self.wider) if self.wider else contextlib.nullcontext()
        try:
            with preserve_python_state(dict(tree.named_modules())) as changed, precision:
                yield _Call(self, tree, weights, buffers, changed)
        finally:
            weights.put_back()

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy for one run, in its precision."""
        return widened(clone(tensor), self.wider) if self.wider else clone(tensor)


def _is_all_zero(value: torch.Tensor) -> bool:
    if not value.numel() or value.layout != torch.strided:
        return bool(value.numel()) and not bool(value.any())
    return not bool(value[(0,) * value.dim()]) and not bool(value.any())


def _functions_in(outputs: Sequence[torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Modules and names of the autograd Functions written in Python, but for this library's."""
    for node in nodes_below([output.grad_fn for output in outputs]):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            module = getattr(type(node), "_forward_cls", type(node)).__module__
            if not module.startswith("grl_surgery."):
                yield module, type(node).__name__


def _signs_of_leaves(
    outputs: Sequence[torch.Tensor], reversing: set[Any], names: Mapping[int, str]
) -> dict[str, frozenset[int]]:
    """For each leaf that outputs depend on, the signs of the paths, each reversing node counting -1."""
    found: dict[str, frozenset[int]] = {}
    waiting: list[tuple[Any, int]] = [(t.grad_fn, 1) for t in outputs if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node, sign = waiting.pop()
        leaf = names.get(id(getattr(node, "variable", None)))
        if leaf is not None:
            found[leaf] = found.get(leaf, frozenset()) | {sign}
        after = -sign if node in reversing else sign
        new = {(following, after) for following in _following(node)} - seen
        seen |= new
        waiting += new
    return found


def objective(outputs: Sequence[torch.Tensor], seed: int) -> torch.Tensor | None:
    """A scalar that depends on every output in a direction of its own."""
    terms = []
    for place, output in enumerate(map(dense, outputs)):
        if output.requires_grad:
            generator = torch.Generator().manual_seed(seed + place)
            weight = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
            term = (output * weight).sum()
            terms.append(term.real if term.is_complex() else term)
    return sum(terms[1:], terms[0]) if terms else None


def _gradients(
    scalar: torch.Tensor | None,
    leaves: Mapping[str, torch.Tensor],
    wanted: Mapping[str, Sign | Values] | None,
    *,
    is_last: bool,
) -> Gradients:
    """Backward once; what is wanted of a gradient is taken as soon as it is there, and the gradient dropped.

    Args:
        scalar: What to differentiate; None where nothing depends on a parameter.
        leaves: By name.
        wanted: By name, what to keep; by default the fingerprints.
        is_last: Whether the graph is needed no longer.
    """
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    kinds: Mapping[str, Any] = dict.fromkeys(names, "+") if wanted is None else wanted
    found: Gradients = {name: None for name in names if name in kinds}
    arrived: list[str] = []

    def take(name: str, leaf: torch.Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        arrived.append(name)
        if name in kinds and gradient is not None:
            dense = _dense(gradient)
            found[name] = dense if kinds[name] == "values" else fingerprint(dense, kinds[name])

    if scalar is None or not names:
        return found
    hooks = [
        leaves[name].register_post_accumulate_grad_hook(functools.partial(take, name))  # type: ignore[no-untyped-call]
        for name in names
    ]
    try:
        scalar.backward(  # type: ignore[no-untyped-call]
            retain_graph=not is_last, inputs=[leaves[name] for name in names]
        )
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        arrived += [*names, *names]
    finally:
        for hook in hooks:
            hook.remove()
    if len(set(arrived)) < len(arrived):  # a backward inside the backward gives a gradient part by part
        for name in names:
            leaves[name].grad = None
        scalar.backward(retain_graph=not is_last)  # type: ignore[no-untyped-call]
        for name in names:
            take(name, leaves[name])
    return found


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    """An embedding may give its gradient as sparse entries, in any order and with repetitions."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def limits_off(tree: nn.Module) -> None:
    """Let the reversals of a private tree send back a multiple of the gradient: none clips or normalises."""
    for module in tree.modules():
        if isinstance(module, GradientReversal):
            module.clip, module.normalize = None, False


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
class GradientPair:
    """The gradient that entered and the one that left a reversal in a backward pass."""

    entered: torch.Tensor | None = None
    left: torch.Tensor | None = None


@dataclass
class GradientRecorder:
    """What became of one reversal in one run.

    Args:
        recorded: How often the graph recorded it.
        passages: The gradients that passed it.
        transformed: Shapes of what it was called with under a ``torch.func`` transform, such as vmap, where
            autograd's graph does not show it.
    """

    recorded: int = 0
    passages: list[GradientPair] = field(default_factory=list)
    transformed: list[tuple[int, ...]] = field(default_factory=list)

    def over(self, first: Node, last: Node) -> None:
        """Record what enters the first and leaves the last of the nodes that one call made."""
        self.recorded += 1
        own: list[GradientPair] = []

        def enter(gradients: Sequence[torch.Tensor | None]) -> None:
            own.append(GradientPair(None if gradients[0] is None else dense(gradients[0])))
            self.passages.append(own[-1])

        def leave(gradients: Sequence[torch.Tensor | None], _: Any) -> None:
            own[-1].left = None if gradients[0] is None else dense(gradients[0])

        first.register_prehook(enter)
        last.register_hook(leave)


@contextlib.contextmanager
def watching(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, GradientRecorder]]:
    """Record what passes each layer in every backward pass, by the layer's name."""
    watches = {name: GradientRecorder() for name in layers}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            if output.is_nested and output.layout is torch.strided:  # row by row, each with a node of its own
                watches[name].transformed.extend(tuple(row.shape) for row in output.unbind())
            elif output.grad_fn is not None:
                x = next(iter((*args, *kwargs.values())))
                watches[name].over(output.grad_fn, _last_node(x, output.grad_fn))
            elif _are_functorch_transforms_active():
                watches[name].transformed.append(tuple(output.shape))

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
