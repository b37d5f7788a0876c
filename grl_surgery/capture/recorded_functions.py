"""Records calls that torch.fx misses in a forward: an autograd.Function, ``torch.as_tensor(n)``."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

__all__ = ["UNSEEN", "FunctionCall", "function_classes", "recording_autograd_functions", "traced_in"]


class FunctionCall:
    """A call of an autograd.Function, with what torch.fx needs to write it down under the function's name."""

    def __init__(self, kind: type[torch.autograd.Function]) -> None:
        self.kind = kind
        self.__name__ = self.__qualname__ = kind.__name__
        self.__module__ = __name__  # under a name of torch's own it would be taken for the class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the function."""
        return self.kind.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionCall) and other.kind is self.kind

    def __hash__(self) -> int:
        return hash(self.kind)


@contextlib.contextmanager
def recording_autograd_functions(tracer: fx.Tracer) -> Iterator[None]:
    """Record a call of an autograd.Function as one operation: traced into, it would lose its backward.

    ``apply`` is a built-in that may have been looked up long ago; the forward is looked up at each call.
    """
    held = [
        (kind, name, kind.__dict__[name])
        for kind in function_classes()
        if not kind.__module__.startswith(_BEHIND_OPERATORS)
        for name in ("forward", "setup_context")
        if name in kind.__dict__
    ]
    for kind, name, original in held:
        setattr(kind, name, staticmethod(_recording(tracer, kind, name, original.__get__(None, kind))))
    try:
        yield
    finally:
        for kind, name, original in held:
            setattr(kind, name, original)


# No forward calls these by themselves, and there are hundreds.
_BEHIND_OPERATORS = (
    "torch._",
    "torch.nn.utils._",
    "torch.nested._",
    "torch.distributed.tensor.",
    "grl_surgery.nn.reversal",
)


def function_classes(
    kind: type[torch.autograd.Function] = torch.autograd.Function,
) -> Iterator[type[torch.autograd.Function]]:
    """Every class of autograd Functions that there is in this process."""
    for subclass in type.__subclasses__(kind):
        yield subclass
        yield from function_classes(subclass)


def _recording(tracer: fx.Tracer, kind: Any, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that leaves one node for its Function where it is given proxies."""
    with_context = kind.setup_context is torch.autograd.Function.setup_context
    enabled = torch.is_grad_enabled()

    def record(*args: Any) -> Any:
        inputs = args[1:] if with_context or name == "setup_context" else args
        if not any(isinstance(value, fx.Proxy) for value in pytree.tree_leaves(inputs)):
            return original(*args)
        if name == "setup_context":
            return None
        with torch.set_grad_enabled(enabled):  # autograd has switched it off in here
            return tracer.create_proxy("call_function", FunctionCall(kind), inputs, {})

    return record


# ------------------------------------------------------------------------------- what makes a tensor of sizes


def traced_in(values: Any) -> fx.Proxy | None:
    """The last traced value in these, at any depth; torch looks for one less thoroughly."""
    found: list[Any] = [None]
    fx.node.map_aggregate(values, lambda it: found.append(it) if isinstance(it, fx.Proxy) else None)
    return found[-1]  # type: ignore[no-any-return]


UNSEEN: dict[Any, Any] = {
    **{function: function for function in (torch.as_tensor, torch.asarray, torch.tensor)},
    torch.Tensor.__getitem__: operator.getitem,
}
"""What to record for functions that miss a traced value in what they are given, as the ``n`` in ``x[:n]``."""
