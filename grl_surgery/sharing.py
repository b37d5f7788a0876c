"""A second module tree over the same tensors: new objects, shared parameters and buffers."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

__all__ = ["share_copy"]


def share_copy(model: nn.Module, only: Iterable[nn.Module] | None = None) -> nn.Module:
    """Copy a module tree without copying a tensor.

    Every module of the copy is a new object of the same class with its own mode flag, hooks, containers and
    attributes, so that nothing done to its structure reaches the original. Parameters and buffers are the
    same tensors. Scripted modules cannot be taken apart and stay shared.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> twin = share_copy(model).eval()
        >>> twin[0].weight is model[0].weight, model[0].training
        (True, True)

    Args:
        model: Root of the tree.
        only: Copy only these modules and keep the others as they are; all of them by default.

    Returns:
        The root of the new tree.
    """
    chosen = _whole(model) if only is None else only
    modules = [module for module in chosen if not isinstance(module, torch.jit.ScriptModule)]
    copies: dict[int, Any] = {id(module): object.__new__(type(module)) for module in modules}
    for module in modules:
        twin = copies[id(module)].__dict__
        for key, value in module.__dict__.items():
            if type(value) in _ATOMS:
                twin[key] = value
            elif key in _HOOKS and not value:  # half of a module's attributes, so they are worth the haste
                twin[key] = OrderedDict()
            else:
                twin[key] = _redirect(value, copies)
    return cast(nn.Module, copies.get(id(model), model))


def _whole(model: nn.Module) -> list[nn.Module]:
    """Every module of the tree, and the original trees that spliced modules keep beside themselves."""
    found: dict[int, nn.Module] = {}
    rest: list[nn.Module | None] = [model]
    while rest:
        module = rest.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            rest += module._modules.values()
            rest.append(module.__dict__.get("_original"))
    return list(found.values())


_HOOKS = frozenset(key for key, value in nn.Module().__dict__.items() if "hooks" in key and value == {})


def _redirect(value: Any, copies: dict[int, Any]) -> Any:
    """``value`` with its containers copied, each once, and every module in it replaced by its twin."""
    kind = type(value)
    if id(value) in copies:
        return copies[id(value)]
    if kind in _DICTS:
        copied = copies[id(value)] = value.copy()
        for key, item in value.items():
            if type(item) not in _ATOMS:
                copied[key] = _redirect(item, copies)
        return copied
    if kind is list:
        copied = copies[id(value)] = []
        copied.extend(item if type(item) in _ATOMS else _redirect(item, copies) for item in value)
        return copied
    if kind is tuple:
        plain = _ATOMS.issuperset(map(type, value))
        return value if plain else tuple([_redirect(item, copies) for item in value])
    if kind is set:
        return copies.setdefault(id(value), value.copy())
    if kind is types.MethodType and id(value.__self__) in copies:
        return types.MethodType(value.__func__, copies[id(value.__self__)])
    if kind is functools.partial:
        args = [_redirect(item, copies) for item in value.args]
        return functools.partial(_redirect(value.func, copies), *args, **_redirect(value.keywords, copies))
    if getattr(value, "with_module", None) is True:
        return _redirect_hook(value, copies)
    return value


def _redirect_hook(hook: Any, copies: dict[int, Any]) -> Any:
    """torch keeps some hooks in an object with a weak reference to their module."""
    module = hook.module()
    twin = copy.copy(hook)
    twin.module = weakref.ref(copies.get(id(module), module))
    return twin


_DICTS = frozenset({dict, OrderedDict, defaultdict})
_ATOMS = frozenset(
    {bool, int, float, str, type(None), torch.Size, torch.Tensor, nn.Parameter, torch.dtype, torch.device}
)
