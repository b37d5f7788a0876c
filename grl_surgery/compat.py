"""Functions of PyTorch that not every supported version has under one name."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import _symbolic_trace
from torch.nn.modules import module as _module

__all__ = ["has_any_global_hook", "is_fx_symbolic_tracing", "is_wrapped_for_fx", "names_wrapped_for_fx"]

_GLOBAL_HOOKS = (
    *("_global_forward_hooks", "_global_forward_pre_hooks"),
    *("_global_backward_hooks", "_global_backward_pre_hooks"),
)


def has_any_global_hook() -> bool:
    """Whether hooks run around every module (``register_module_forward_hook`` and its like)."""
    return any(getattr(_module, name) for name in _GLOBAL_HOOKS)


def is_fx_symbolic_tracing() -> bool:
    """Whether torch.fx traces the forward that runs, and no compiler does."""
    if hasattr(_symbolic_trace, "is_fx_symbolic_tracing"):
        return bool(_symbolic_trace.is_fx_symbolic_tracing())
    return bool(_symbolic_trace.is_fx_tracing()) and not torch.compiler.is_compiling()  # before torch 2.9


def names_wrapped_for_fx() -> set[str]:
    """The names that ``torch.fx.wrap`` was given, in whatever file."""
    return {name for _, name in _symbolic_trace._wrapped_fns_to_patch}


def is_wrapped_for_fx(file: dict[str, Any], name: str) -> bool:
    """Whether ``torch.fx.wrap(name)`` was called in the file that has these globals."""
    return (id(file), name) in _symbolic_trace._wrapped_fns_to_patch
