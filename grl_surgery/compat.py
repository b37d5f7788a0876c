"""Functions of PyTorch that not every supported version has under one name."""

from __future__ import annotations

import torch
from torch.fx import _symbolic_trace
from torch.nn.modules import module as _module

__all__ = ["has_any_global_hook", "is_fx_symbolic_tracing"]

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
