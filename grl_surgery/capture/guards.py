"""Refuses forwards that a graph would change: hooks, questions about classes, arguments with a default."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from grl_surgery.capture.code_inspection import (
    catches_errors,
    classes_asked,
    compared_arguments,
    functions_of,
    identity_questions,
    names_in,
)
from grl_surgery.capture.trace_errors import GlobalHookError
from grl_surgery.compat import has_any_global_hook

__all__ = [
    "refuse_arguments",
    "refuse_hooks",
    "refuse_identity_questions",
    "refuse_narrowing",
    "refuse_questions",
    "refuse_untraceable_methods",
    "settings",
]


_NUMBERS = (int, float, complex)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


_is_grad_enabled = torch.is_grad_enabled  # a traced forward gets another answer


def settings() -> dict[str, Any]:
    """Return the settings that ``torch.no_grad()`` and its like change; no node of a graph records them."""
    backends: Any = torch.backends.cuda
    found: dict[str, Any] = {
        "grad mode": _is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "seed of the random numbers": torch.initial_seed(),
        "choice of attention kernels": (
            backends.math_sdp_enabled(),
            backends.flash_sdp_enabled(),
            backends.mem_efficient_sdp_enabled(),
            backends.cudnn_sdp_enabled(),
        ),
    }
    for device in ("cpu", "cuda"):
        enabled = torch.is_autocast_enabled(device)
        found[f"autocast on {device}"] = (enabled, enabled and torch.get_autocast_dtype(device))
    return found


def refuse_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Fail as the call itself would: a forward may try one call and make another where that fails.

    Raises:
        TypeError: The module's forward does not take these arguments.
    """
    if isinstance(module, torch.jit.ScriptModule) or module._forward_pre_hooks:
        return
    code = getattr(type(module).forward, "__code__", None)
    if code is None or (not kwargs and len(args) + 1 == code.co_argcount):
        return
    inspect.signature(module.forward).bind(*args, **kwargs)


def refuse_hooks(module: nn.Module, path: str) -> None:
    """A traced forward is not called through its module any more, so its hooks would never run."""
    held = [kind.strip("_").replace("_", " ") for kind in _HOOKS if getattr(module, kind)]
    if held:
        raise RuntimeError(f"{path!r} has {' and '.join(held)}, which would be lost")
    if has_any_global_hook():
        raise GlobalHookError(
            f"hooks run around every module (torch.nn.modules.module.register_module_...), and {path!r} "
            "would be called past them",
            path,
        )
    if "forward" in module.__dict__:
        raise RuntimeError(f"{path!r} has a forward set on the instance, which would be lost")


def refuse_questions(forward: Any) -> None:
    """Refuse a forward that asks what a trace would answer otherwise than the network that runs."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        return
    if names := compared_arguments(code):  # to a trace, arguments are never one object
        raise RuntimeError(f"it asks whether {' and '.join(names)} are the same object")
    if asked := classes_asked(code):
        raise RuntimeError(f"it asks what kind of value {asked[0]!r} is")
    if "is_grad_enabled" in names_in(code):
        raise RuntimeError("it asks whether gradients are computed, and a graph would keep the answer")


def refuse_identity_questions(
    kind: type[nn.Module], given: Collection[str], modules: Collection[str]
) -> None:
    """Refuse a forward that asks whether something that it is given is None: in a trace, nothing is.

    Args:
        kind: The class whose forward is traced through.
        given: Its arguments that the network gets from outside, whole or as parts.
        modules: Attributes that hold the network's modules: what calling one returns may be None.
    """
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    asked = {} if code is None else dict.fromkeys(sorted(identity_questions(code).arguments & {*given}))
    files = {base.__module__ for base in kind.__mro__}
    for function in functions_of(kind):
        if function.__module__ in files:
            found = identity_questions(function.__code__)
            asked.update(dict.fromkeys((*sorted(found.parts), *sorted(found.calls & {*modules}))))
    if asked:
        raise RuntimeError(f"it asks of {next(iter(asked))!r} what it is, or whether it is None")


def refuse_untraceable_methods(kind: type[nn.Module]) -> None:
    """Refuse a forward with a method that a trace would answer otherwise than a run.

    In a trace no operation fails, so that nothing is caught, and no value is what it is in a run.
    """
    methods = {id(value) for base in kind.__mro__ for value in vars(base).values()}
    for function in functions_of(kind):
        if id(function) in methods and catches_errors(function.__code__):
            raise RuntimeError(f"{function.__name__}() goes on another way where something fails")
        if id(function) in methods and (asked := classes_asked(function.__code__)):
            raise RuntimeError(f"{function.__name__}() asks what kind of value {asked[0]!r} is")


def refuse_narrowing(forward: Any, parameters: Sequence[inspect.Parameter]) -> None:
    """Refuse a forward that takes calls which a graph would not take."""
    code = getattr(forward, "__code__", None)
    plain = getattr(inspect.unwrap(forward), "__code__", None)
    if code is not plain:
        raise RuntimeError("a decorator runs around it, which a graph would lose")
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise RuntimeError(f"it takes any arguments, as {parameter!s}, and a graph has a fixed list")
        default = parameter.default
        may_stay = isinstance(default, _NUMBERS) and not isinstance(default, bool)
        if default is parameter.empty or may_stay or not _is_read(plain, parameter.name):
            continue
        raise RuntimeError(
            f"what it does may depend on its argument {parameter.name!r}, which is {default!r} if left out, "
            "and a graph would keep one way"
        )


def _is_read(code: Any, name: str) -> bool:
    """Whether a function does anything with one of its arguments."""
    if name in code.co_cellvars:
        return True
    return any(
        step.opname.startswith("LOAD_FAST")
        and name in (step.argval if isinstance(step.argval, tuple) else (step.argval,))
        for step in dis.get_instructions(code)
    )
