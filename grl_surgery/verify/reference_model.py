"""Predicts the right gradients: the unspliced network, with tensor hooks where the reversals belong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import fx, nn
from torch._C import _are_functorch_transforms_active

from grl_surgery.capture.aliasing import hidden_writes
from grl_surgery.capture.module_effects import effects
from grl_surgery.capture.node_uses import is_size, node_uses
from grl_surgery.isolation.shared_copy import replace_submodule, share_copy
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.points import Edge
from grl_surgery.surgery.head_outputs import add_logits
from grl_surgery.surgery.insert import splice
from grl_surgery.surgery.spliced_module import Cut, SplicedModule, surgery_of

__all__ = [
    "HookReversal",
    "NoReversal",
    "cuts_by_module",
    "is_fully_traced",
    "predict",
    "predict_flow",
    "sign_label",
    "with_reversals",
    "without_adopted",
]

Factors = frozenset[int]
Flow = tuple[dict[str, Factors], dict[Edge, Factors]]  # by point, and by edge


class HookReversal(nn.Module):
    """A reversal with coefficient 1 made of a tensor hook alone, sharing no code with GradientReversal."""

    def forward(self, x: torch.Tensor, *_coeff: Any) -> torch.Tensor:
        """Copy ``x``; its gradient comes back negated."""
        y = x.clone()
        if not y.requires_grad and _are_functorch_transforms_active():
            return 2 * x.detach() - x  # under vmap a tensor takes no hook
        if y.requires_grad:
            y.register_hook(torch.neg)  # type: ignore[no-untyped-call]
        return y


class NoReversal(nn.Module):
    """The identity; unlike torch's, it can be called as a reversal can: ``grl(x=x)``."""

    def forward(self, x: torch.Tensor, *_coeff: Any) -> torch.Tensor:
        """Return ``x``."""
        return x


def cuts_by_module(model: nn.Module) -> dict[str, tuple[Cut, ...]]:
    """What was spliced into each module that was cut itself, by its path; ``""`` is the root."""
    return {path: done.cuts for path, m in model.named_modules() if (done := surgery_of(m))}


def with_reversals(model: nn.Module, reference: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """The reference with ``make()`` where the recipe of ``model`` says that there is a reversal.

    The graphs of ``model`` itself are not used: the reference is traced again and cut again. Heads are
    ``model``'s own. A reversal that the user wrote into the network is exchanged where it stands.
    """
    tree = share_copy(reference)
    for path, cuts in _innermost_first(model):
        tree = _cut_again(tree, path, model.get_submodule(path), cuts, make)
    instead: dict[int, nn.Module] = {}
    made = {
        f"{path}.{cut.module}" if path else cut.module
        for path, cuts in cuts_by_module(model).items()
        for cut in cuts
    }
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, GradientReversal) and path not in made:
            parent, _, name = path.rpartition(".")
            holder = tree.get_submodule(parent)
            holder.__dict__.pop(name, None)  # a reference may have None there
            holder._modules[name] = instead.setdefault(id(layer), make())
    return tree


def without_adopted(model: nn.Module, reference: nn.Module) -> nn.Module:
    """The reference with the identity for every reversal of its own that one of ours took the place of."""
    by_part = ((path, [c for c in cuts if c.kind == "instead"]) for path, cuts in _innermost_first(model))
    adopted = [(path, cuts) for path, cuts in by_part if cuts]
    tree = share_copy(reference) if adopted else reference
    for path, cuts in adopted:
        tree = _cut_again(tree, path, model.get_submodule(path), cuts, NoReversal)
    return tree


def _innermost_first(model: nn.Module) -> list[tuple[str, tuple[Cut, ...]]]:
    return sorted(cuts_by_module(model).items(), key=lambda item: -len(item[0]))


def _cut_again(
    tree: nn.Module, path: str, part: Any, cuts: Sequence[Cut], make: Callable[[], nn.Module]
) -> nn.Module:
    """The tree with what lies at ``path`` traced and cut as ``part`` was."""
    host = tree.get_submodule(path)
    heads = {cut.module: share_copy(part._modules[cut.module]) for cut in cuts if cut.is_head}
    spliced = splice(host, cuts, {cut.module: heads.get(cut.module) or make() for cut in cuts})
    if not path:
        return spliced
    replace_submodule(tree, host, spliced)
    return tree


# ------------------------------------------------------------------------------------------ prediction


def predict(oracle: nn.Module, objective: str = "output") -> dict[int, Factors]:
    """What the graph says of each parameter: the signs of all paths from it to an objective.

    Args:
        oracle: Result of :func:`with_reversals`.
        objective: ``output``, or the name of a head.

    Returns:
        From ``id(parameter)`` to ``{1}`` (unchanged), ``{-1}`` (flipped), both (mixed) or none (unreached).
        Empty where the graph does not show all that happens: the root is no graph, it calls a module that was
        spliced on its own, or a value is read after its memory has been overwritten by way of another one.
    """
    if not is_fully_traced(oracle):
        return {}
    if any(True for _ in hidden_writes(oracle, oracle.graph, functools.cache(effects))):
        return {}
    reversed_by, part = _goal(oracle, objective)
    known: dict[int, Factors] = {id(parameter): frozenset() for parameter in oracle.parameters()}
    for node, factors in _signs(oracle.graph, reversed_by, part).items():
        for parameter in _parameters_of(oracle, node):
            known[id(parameter)] |= factors
    return known


def is_fully_traced(oracle: nn.Module) -> TypeGuard[SplicedModule]:
    """Whether every cut is in the graph of the root, and none inside a module that it calls."""
    if not isinstance(oracle, SplicedModule) or oracle.grl_surgery.hooked:
        return False
    return not any(surgery_of(module) for module in oracle.modules() if module is not oracle)


def predict_flow(oracle: SplicedModule, graph: fx.Graph, objective: str = "output") -> Flow:
    """What any graph of the oracle says of the gradient at each point and on each edge.

    Args:
        oracle: Result of :func:`with_reversals`.
        graph: One of its graphs, however deep.
        objective: ``output``, or the name of a head.
    """
    reversed_by, part = _goal(oracle, objective)
    signs = _signs(graph, reversed_by, part)
    named = [node for node in graph.nodes if "point" in node.meta]
    edges = {
        Edge(source.meta["point"], node.meta["point"], arg): frozenset(
            _through(node, arg, signs[node], reversed_by, part)
        )
        for node in named
        for arg, source in node_uses(node)
        if "point" in source.meta
    }
    return {node.meta["point"]: signs[node] for node in named}, edges


def _goal(oracle: SplicedModule, objective: str) -> tuple[set[str], int]:
    """What reverses, and at which place the objective stands among the output and the logits of heads."""
    heads = [cut.module for cut in oracle.grl_surgery.cuts if cut.kind == "head"]
    return {cut.module for cut in oracle.grl_surgery.cuts}, ("output", *heads).index(objective)


def _signs(graph: fx.Graph, reversed_by: set[str], part: int) -> dict[fx.Node, Factors]:
    """For each node the signs of all paths from its value to one part of the output."""
    signs: dict[fx.Node, set[int]] = {node: set() for node in graph.nodes}
    for node in reversed(graph.nodes):
        if is_size(node) or (node.op == "call_method" and node.target == "detach"):
            signs[node] = set()
        for arg, source in node_uses(node):
            signs[source] |= _through(node, arg, signs[node], reversed_by, part)
    return {node: frozenset(found) for node, found in signs.items()}


def _through(node: fx.Node, arg: str, signs: Iterable[int], reversed_by: set[str], part: int) -> set[int]:
    """Signs of the paths that begin with one use of a value, from the signs of the user's own value."""
    if node.target is add_logits:  # its arguments: the output, the names of the heads, and their logits
        return {1} if arg.partition("[")[0] == str(part + 1 if part else 0) else set()
    if node.op == "output":
        return {1} if "heads" not in node.meta or arg.startswith(f"0[{part}]") else set()
    spliced = node.op == "call_module" and node.target in reversed_by
    if spliced and arg != "0":  # what conditions a head is detached
        return set()
    return {-sign if spliced else sign for sign in signs}


def _parameters_of(model: nn.Module, node: fx.Node) -> list[nn.Parameter]:
    if node.op == "call_module":
        return list(model.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value: Any = getattr(model.get_submodule(owner), name, None)
        held = value.parameters() if isinstance(value, nn.Module) else [value]
        return [tensor for tensor in held if isinstance(tensor, nn.Parameter)]
    return []


def sign_label(factors: Factors | None) -> str:
    """``flipped``, ``unchanged``, ``mixed``, ``unreached``, or ``unknown`` where nothing was predicted."""
    names: Mapping[Factors, str] = {
        frozenset({-1}): "flipped",
        frozenset({1}): "unchanged",
        frozenset({1, -1}): "mixed",
        frozenset(): "unreached",
    }
    return "unknown" if factors is None else names[factors]
