"""Runs a private copy of a network, so that what the user passed in is read and never written."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from grl_surgery.capture.python_state import preserve_python_state
from grl_surgery.capture.recorded_functions import function_classes
from grl_surgery.isolation.rng_state import seed_everything
from grl_surgery.isolation.tensor_copy import with_tensors
from grl_surgery.loading.inputs import as_arguments
from grl_surgery.verify.experiment import (
    Experiment,
    limits_off,
    objective,
    private_copy,
    repeatable,
    tensors_in,
)

__all__ = ["Gradients", "Sandbox", "private_runs", "shared_holders"]

Gradients = dict[str, torch.Tensor]


@dataclass
class Sandbox:
    """A private network, its inputs, and the leaves whose gradients are looked at.

    Every parameter and every floating point input requires grad here, so that a frozen network shows its
    gradients as well.

    Args:
        network: A tree of its own with tensors of its own.
        args: Positional arguments of forward.
        kwargs: Arguments of forward by name.
        inputs: The floating point inputs that the arguments are copies of, by a name for each.
        seed: Of the random numbers of every run.
    """

    network: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, *, training: bool | None = None, seed: int = 0) -> Sandbox:
        """A rig for ``model``, its mode flags as they are or as its own ``train(training)`` sets them."""
        moded = model if training is None else private_copy(model, {}).train(training)
        tree = private_copy(model, {path: module.training for path, module in moded.named_modules()})
        limits_off(tree)
        for module in tree.modules():
            for name, value in module.__dict__.items():
                if type(value) is torch.Tensor:  # some keep their coefficient or a counter so
                    module.__dict__[name] = value.detach().clone()
        tensors: dict[str, torch.Tensor] = {name: b.detach().clone() for name, b in tree.named_buffers()}
        for name, value in Experiment.on(tree, inputs, seed).values.items():
            moves = value.is_floating_point() or value.is_complex()
            tensors[name] = nn.Parameter(value.detach().clone(), requires_grad=moves)
        rig = cls(with_tensors(tree, tensors), (), {}, seed=seed)
        rig.args, rig.kwargs = as_arguments(pytree.tree_map_only(torch.Tensor, rig._input, inputs))
        return rig

    def _input(self, tensor: torch.Tensor) -> torch.Tensor:
        copied = tensor.detach().clone()
        if not copied.is_floating_point():
            return copied
        self.inputs[f"input {len(self.inputs)}"] = leaf = copied.requires_grad_()
        return leaf

    def take_out(self, path: str) -> None:
        """Put the identity in place of a module."""
        parent, _, name = path.rpartition(".")
        if path:
            self.network.get_submodule(parent)._modules[name] = _PassesOn()
        else:
            self.network = _PassesOn()

    def fresh_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments once more: no leaves, since a forward may overwrite what it is given."""
        return pytree.tree_map_only(torch.Tensor, torch.clone, (self.args, self.kwargs))  # type: ignore[no-any-return]

    def plain_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments without a gradient, for what traces or exports."""
        detached: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor.detach().clone()  # noqa: E731
        return pytree.tree_map_only(torch.Tensor, detached, (self.args, self.kwargs))  # type: ignore[no-any-return]

    def leaves(self, network: nn.Module | None = None) -> dict[str, torch.Tensor]:
        """Parameters of the network (or of what was made from it) and inputs, by name."""
        named = (self.network if network is None else network).named_parameters()
        return {**{name: leaf for name, leaf in named if leaf.requires_grad}, **self.inputs}

    def run(self, function: Callable[..., Any] | None = None) -> list[torch.Tensor]:
        """Every tensor that one forward returns."""
        args, kwargs = self.fresh_inputs()
        seed_everything(self.seed)
        return tensors_in((self.network if function is None else function)(*args, **kwargs))

    def gradients(
        self, function: Callable[..., Any] | None = None, network: nn.Module | None = None
    ) -> Gradients:
        """One forward and one backward: the gradient of every leaf."""
        return self.gradients_of(self.run(function), network)

    def gradients_of(self, outputs: list[torch.Tensor], network: nn.Module | None = None) -> Gradients:
        """The gradient of every leaf; zeros where none arrives."""
        leaves = self.leaves(network)
        scalar = objective(outputs, self.seed)
        if scalar is None:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        found = torch.autograd.grad(scalar, list(leaves.values()), retain_graph=True, allow_unused=True)
        pairs = zip(leaves.items(), found, strict=True)
        return {name: torch.zeros_like(leaf) if g is None else g.detach() for (name, leaf), g in pairs}


class _PassesOn(nn.Module):
    """The identity, however it is called."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


# -------------------------------------------------------------------------- what all instances have in common


@contextlib.contextmanager
def private_runs(model: nn.Module) -> Iterator[list[str]]:
    """Run a network repeatably and silently, and put everything back that its instances share.

    Yields:
        A list that is filled in the end: the names of class attributes and globals that were changed.
    """
    with (
        repeatable(),  # of the threads, one at a time: the level below is nobody else's
        preserve_python_state(dict(model.named_modules())),
        _shared_state_kept(model) as changed,
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),  # torch.export prints the graph that it gave up on
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield changed
        finally:
            logging.disable(level)


@contextlib.contextmanager
def _shared_state_kept(model: nn.Module) -> Iterator[list[str]]:
    """Put class attributes and global numbers back that a forward or a backward changes."""
    holders = shared_holders(model)
    before = {label: _values(holder) for label, holder in holders.items()}
    changed: list[str] = []
    try:
        yield changed
    finally:
        for label, holder in holders.items():
            changed += [f"{label}.{name}" for name in _put_back(holder, before[label])]


def shared_holders(model: nn.Module) -> dict[str, Any]:
    """The user's own classes behind a network and behind autograd Functions, and the files they stand in."""
    classes = {kind: None for module in model.modules() for kind in type(module).__mro__}
    classes |= dict.fromkeys(function_classes())
    own = [kind for kind in classes if not _is_library(kind.__module__)]
    files = dict.fromkeys(kind.__module__ for kind in own)
    holders: dict[str, Any] = {kind.__qualname__: kind for kind in own}
    return holders | {name: sys.modules[name] for name in files if name in sys.modules}


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "builtins", "grl_surgery", "abc", "typing", "collections")


_PLAIN = (bool, int, float, str, type(None), list, dict, torch.Tensor)


def _values(holder: Any) -> dict[str, tuple[Any, Any]]:
    """The content of a holder, and a copy of it."""
    plain = {name: value for name, value in vars(holder).items() if type(value) in _PLAIN}
    return {name: (value, _copied(value)) for name, value in plain.items() if not name.startswith("__")}


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _put_back(holder: Any, before: dict[str, tuple[Any, Any]]) -> list[str]:
    """Restore one holder; returns the names of what had another value."""
    now = vars(holder)
    changed = [name for name, (_, was) in before.items() if name not in now or not _equal(now[name], was)]
    for name in changed:
        value, was = before[name]
        _fill(value, was)
        setattr(holder, name, value)
    added = [name for name in _values(holder) if name not in before] if isinstance(holder, type) else []
    for name in added:
        delattr(holder, name)
    return changed + added


def _fill(value: Any, was: Any) -> None:
    """Give an object its content back: others may hold the same object."""
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            value.copy_(was)
    elif isinstance(value, list):
        value[:] = was
    elif isinstance(value, dict):
        value.clear()
        value.update(was)


def _equal(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(first[key] is second[key] for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
    return bool(first == second)
