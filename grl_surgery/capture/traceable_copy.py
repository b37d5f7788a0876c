"""Copies the modules that a trace runs on: neither the network nor a class of torch is ever touched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from grl_surgery.isolation.module_tree import modules_by_path
from grl_surgery.isolation.shared_copy import COMPILED, ReferenceRemapper, copy_attributes

__all__ = [
    "HiddenAttribute",
    "TrainingFlagProxy",
    "TwinModules",
    "has_forward",
    "is_building_block",
    "overrides_call",
    "refuse_own_call",
]


class TwinModules(dict[int, nn.Module]):
    """From the id of each module of a network to its copy, which is made when it is first asked for.

    A copy has the class and the attributes of its original. What leads from it to another module of the
    network leads to that one's copy. A call of a copy, and what is read from its parameters, buffers and
    mode flag, go to two functions.

    Args:
        model: Root of the network.
        mode: The mode flag of every copy; by default each has its original's.
        call: Is called with a copy and the arguments, instead of the copy.
        read: Is given the tensor, :class:`TrainingFlagProxy` or :class:`HiddenAttribute` that is read, and
            returns what is seen of it.
        hidden: Returns which attributes of the module at a path are not to be seen.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: bool | None,
        call: Callable[..., Any],
        read: Callable[[Any], Any],
        hidden: Callable[[str, nn.Module], Iterable[str]],
    ) -> None:
        super().__init__()
        self.model, self.mode, self.call, self.read, self.hidden = model, mode, call, read, hidden
        self.originals = modules_by_path(model)
        self.paths = {id(module): path for path, module in self.originals.items()}  # the copies' join them
        self.known = frozenset(self.paths)
        self.plain_tensors: dict[torch.Tensor, str] = {}
        self.redirection = ReferenceRemapper(self)

    @property
    def root(self) -> nn.Module:
        """The copy of the network itself."""
        return self[id(self.model)]

    def path_of(self, module: nn.Module) -> str | None:
        """The path of a module of the network, or of a copy; None for any other module."""
        return self.paths.get(id(module))

    def original_of(self, twin: nn.Module) -> nn.Module:
        """What a copy was made from."""
        return self.originals[self.paths[id(twin)]]

    def __contains__(self, key: object) -> bool:
        return key in self.known

    def __missing__(self, key: int) -> nn.Module:
        path = self.paths[key]
        module = self.originals[path]
        twin: nn.Module = object.__new__(type(module))
        self[key] = twin
        self.paths[id(twin)] = path
        if isinstance(module, torch.jit.ScriptModule):  # cannot be taken apart; it is called as one operation
            twin.__dict__.update(module.__dict__)
        else:
            self.redirection.made[id(module._modules)] = _Children(self, module._modules)
            copy_attributes(module, twin, self.redirection)
            for name in self.hidden(path, module):
                twin.__dict__.pop(name, None)
                twin._buffers[name] = HiddenAttribute(path, name)  # type: ignore[assignment]
            self._watch(twin, path)
        twin.__dict__[COMPILED] = functools.partial(self.call, twin)
        return twin

    def _watch(self, twin: nn.Module, path: str) -> None:
        """Have a copy tell what is read from it."""
        if path and overrides_call(twin):
            kind = type(twin)
            twin.__class__ = type(kind.__name__, (_UntracedCallMixin, kind), {"__module__": kind.__module__})
        attributes = twin.__dict__
        flag = attributes.pop("training", None)
        if flag is not None:
            mode = flag if self.mode is None else self.mode
            attributes["_buffers"]["training"] = TrainingFlagProxy(path, mode)
        for holder in ("_parameters", "_buffers"):
            attributes[holder] = _Watched(self.read, attributes[holder])
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor):
                self.plain_tensors[value] = f"{path}.{name}" if path else name


class _Watched(dict[str, Any]):
    """Parameters or buffers: whoever reads one gets what a function makes of it."""

    def __init__(self, read: Callable[[Any], Any], held: dict[str, Any]) -> None:
        super().__init__(held)
        self.read = read

    def __getitem__(self, name: str) -> Any:
        return self.read(super().__getitem__(name))


class _Children(dict[str, Any]):
    """The children of a copied module: copies of the original's children."""

    def __init__(self, twins: TwinModules, children: dict[str, Any]) -> None:
        super().__init__(children)
        self.twins = twins

    def __getitem__(self, name: str) -> Any:
        return self._twin(super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self._twin(super().get(name, default))

    def values(self) -> Any:
        return [self._twin(child) for child in super().values()]

    def items(self) -> Any:
        return [(name, self._twin(child)) for name, child in super().items()]

    def _twin(self, child: Any) -> Any:
        return self.twins[id(child)] if id(child) in self.twins else child  # noqa: SIM401 - get makes none


def is_building_block(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers (a container is not): nobody looks inside those."""
    return type(module).__module__.startswith("torch.nn.modules") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


def has_forward(module: nn.Module) -> bool:
    """Whether somebody can call a module: nobody calls a list of modules."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return type(module).forward is not nn.Module.forward


def overrides_call(module: nn.Module) -> bool:
    """Whether calling a module does more than to run its forward and its hooks."""
    return type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule)


class _UntracedCallMixin:
    """Mixed into the class of a module whose own ``__call__`` is not traced: it runs when the result does."""

    def __init_subclass__(cls) -> None:
        """Not the user's, which may keep a list of classes."""

    __call__ = nn.Module.__call__


def refuse_own_call(module: nn.Module, path: str, *, traced_modules: bool) -> None:
    """Refuse a call that the graph would make once more, or without what the class's ``__call__`` does.

    Args:
        module: The copy that is called.
        path: Its path.
        traced_modules: Whether its forward is to be traced through.
    """
    if overrides_call(module) or (traced_modules and isinstance(module, _UntracedCallMixin)):
        raise RuntimeError(f"the class of {path!r} overrides __call__, which would be lost")


class HiddenAttribute(NamedTuple):
    """Stands for an attribute of the module at ``path``."""

    path: str
    name: str


class TrainingFlagProxy(NamedTuple):
    """Stands for the ``training`` of the module at ``path``."""

    path: str
    value: bool
