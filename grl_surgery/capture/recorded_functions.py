"""Records a call as one operation: an autograd.Function, ``torch.as_tensor(n)``, a function kept whole."""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import math
import operator
import threading
from collections.abc import Callable, Collection, Iterator
from types import CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from grl_surgery.capture.code_inspection import functions_of, names_in
from grl_surgery.compat import is_wrapped_for_fx, names_wrapped_for_fx

__all__ = [
    "UNSEEN",
    "FunctionCall",
    "WholeFunctions",
    "function_classes",
    "recording_autograd_functions",
    "traced_in",
]


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
    thread = threading.get_ident()

    def record(*args: Any) -> Any:
        if threading.get_ident() != thread:
            return original(*args)
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


# --------------------------------------------------------------------------------- functions that stay whole


class WholeFunctions:
    """Makes functions anew that call others which a trace records as one operation.

    A function made anew has the same code and globals of its own, so that nobody's file is written to. Those
    are recorded that ``torch.fx.wrap`` names, and those that are given here.

    Args:
        whole: Code of the functions to record.
        with_math: Whether to record those of ``math`` as well.
    """

    def __init__(self, whole: Collection[CodeType] = (), with_math: bool = False) -> None:
        self.whole, self.with_math = whole, with_math
        self.wrapped = names_wrapped_for_fx()
        self.made: dict[int, FunctionType] = {}

    def bind(self, twin: nn.Module) -> None:
        """Have a copy of a module call functions made anew where its class's own are concerned."""
        kind: Any = type(twin)
        if not self.whole and not self.with_math and self.wrapped.isdisjoint(_names(kind, kind.forward)):
            return
        for function in functions_of(kind):
            if inspect.getattr_static(kind, function.__name__, None) is function:
                anew = self.of(function)
                if anew is not function:
                    twin.__dict__[function.__name__] = MethodType(anew, twin)

    def of(self, function: FunctionType) -> FunctionType:
        """The function made anew, or itself where it calls none of those."""
        if id(function) not in self.made:
            self.made[id(function)] = function  # should it call itself
            held = function.__globals__
            named = {
                name: held.get(name, getattr(builtins, name, None)) for name in names_in(function.__code__)
            }
            instead = {name: self._instead(held, name, value) for name, value in named.items()}
            changed = {name: value for name, value in instead.items() if value is not named[name]}
            if changed:
                self.made[id(function)] = _with_globals(function, {**held, **changed})
        return self.made[id(function)]

    def _instead(self, held: dict[str, Any], name: str, value: Any) -> Any:
        if is_wrapped_for_fx(held, name):
            return _recorded(value)
        if self.with_math and (value is math or getattr(value, "__module__", "") == "math"):
            return _MATH if value is math else _recorded(value)
        if not isinstance(value, FunctionType) or str(value.__module__).partition(".")[0] == "torch":
            return value
        return _recorded(value) if inspect.unwrap(value).__code__ in self.whole else self.of(value)


@functools.lru_cache(maxsize=1000)
def _names(kind: Any, forward: Any) -> frozenset[str]:
    """All names in the code that a forward may run."""
    return frozenset[str]().union(*(names_in(function.__code__) for function in functions_of(kind)))


def _with_globals(function: FunctionType, held: dict[str, Any]) -> FunctionType:
    name, defaults, closure = function.__name__, function.__defaults__, function.__closure__
    anew = FunctionType(function.__code__, held, name, defaults, closure)
    anew.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(anew, function)
    return anew


def _recorded(function: Any) -> Any:
    """The function, which leaves a node where it is given traced values."""

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        traced = traced_in((args, kwargs))
        if traced is None:
            return function(*args, **kwargs)
        proxy = traced.tracer.create_proxy("call_function", function, args, kwargs)
        proxy.node.meta["is_wrapped"] = True  # a graph that is printed as code says so
        return proxy

    return record


_MATH = SimpleNamespace(
    **{name: _recorded(value) if callable(value) else value for name, value in vars(math).items()}
)
