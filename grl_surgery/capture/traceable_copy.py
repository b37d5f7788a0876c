"""Copies the modules that a trace runs on, so that the network itself is never touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from grl_surgery.isolation.shared_copy import share_copy

__all__ = [
    "TrainingFlagProxy",
    "has_forward",
    "is_building_block",
    "overrides_call",
    "refuse_own_call",
    "trace_copy",
]


def trace_copy(model: nn.Module, traced_modules: frozenset[str], mode: bool | None) -> nn.Module:
    """The opened modules and their children, on which the forwards run instead of on the model.

    Each flag is moved from the instance to where torch.fx sees an attribute being read. What lies inside a
    module that stays one call can be reached but is not listed: torch.fx would walk through all of it.
    """
    near = {path: model.get_submodule(path) for path in traced_modules}
    for path in traced_modules:
        near.update(_children(path, near[path]))
    copy = share_copy(model, only=list(dict.fromkeys(near.values())))
    # A scripted module is shared, not copied; it takes no part in a trace but as one call.
    near = {path: module for path, module in near.items() if not isinstance(module, torch.jit.ScriptModule)}
    for path in near:
        module = copy.get_submodule(path)
        if path and overrides_call(module):
            kind = type(module)
            module.__class__ = type(
                kind.__name__, (_UntracedCallMixin, kind), {"__module__": kind.__module__}
            )
        flag = module.__dict__.pop("training", None)
        if flag is not None:
            module._buffers["training"] = TrainingFlagProxy(path, flag if mode is None else mode)  # type: ignore[assignment]
    listed = {id(copy.get_submodule(path)) for path in traced_modules}  # perhaps under another name as well
    for path in near.keys() - traced_modules:
        module = copy.get_submodule(path)
        if not _is_list(module) and id(module) not in listed:
            module.__dict__["_modules"] = _Unlisted(module._modules)
    return copy


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

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)  # by its name: torch.fx patches it


def refuse_own_call(module: nn.Module, path: str, *, traced_modules: bool) -> None:
    """Refuse a call that the graph would make once more, or without what the class's ``__call__`` does.

    Args:
        module: The copy that is called.
        path: Its path.
        traced_modules: Whether its forward is to be traced through.
    """
    if overrides_call(module) and (traced_modules or not isinstance(module, _UntracedCallMixin)):
        raise RuntimeError(f"the class of {path!r} overrides __call__, which would be lost")


def _children(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that the forward of ``module`` may call: its children, and what its lists of modules hold."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        yield inner, child
        if _is_list(child):
            yield from _children(inner, child)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not isinstance(module, fx.GraphModule)


class _Unlisted(dict[str, Any]):
    """Children that can be looked up but are passed over when a tree is walked."""

    def items(self) -> Any:
        return ()


class TrainingFlagProxy(NamedTuple):
    """Stands for the ``training`` of the module at ``path``."""

    path: str
    value: bool
