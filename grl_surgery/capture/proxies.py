"""Proxies that stand for values while a forward is traced, and refuse what a graph cannot answer."""

from __future__ import annotations

import math
import operator
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from grl_surgery.capture.code_inspection import asking_lines
from grl_surgery.capture.node_uses import is_size, size_class

__all__ = ["ASSIGNED", "IN_PLACE", "AskedTracer", "ParameterProxy", "TensorProxy"]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OF_A_PROXY = frozenset({"tracer", "node", "root", "attr", "_node"})
# Who asks for the class of a proxy itself: torch.fx, what walks through nested values, and this library.
_MACHINERY = (
    *(
        _TORCH + part
        for part in ("fx", "overrides", "utils/_pytree", "nn/modules/module", "_functorch/utils")
    ),
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
)

ASSIGNED = "an item of a value is assigned, and a graph would leave the value as it is"


class AskedTracer(fx.Tracer):
    """A tracer whose proxies ask it what they may answer.

    Attributes:
        thread: The thread that traces.
    """

    thread: int

    def look_into(self, node: fx.Node) -> None:
        """Refuse a value that comes out of a module which could be traced through as well."""
        raise NotImplementedError

    def refused(self, error: Exception) -> Exception:
        """The error, noted in case that the forward catches it."""
        raise NotImplementedError

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether it is certain that the value is one tensor."""
        raise NotImplementedError


class TensorProxy(fx.Proxy):
    """A value of the forward. ``x += y`` overwrites it, which torch.fx would write down as ``x = x + y``.

    What Python asks of an object and a graph cannot answer is refused, also where the forward catches the
    error: it would go on along a branch that the running network does not take.
    """

    tracer: AskedTracer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class of a size; that of another value is not told where the network's own code asks.

        C code asks as well, and would take for a tensor what says that it is one.
        """
        asking = sys._getframe(1)
        while asking.f_code.co_name == "__instancecheck__" and asking.f_back:
            asking = asking.f_back
        is_ours = asking.f_code.co_filename.startswith(_MACHINERY)
        if is_ours or threading.get_ident() != self.tracer.thread:
            return type(self)
        if is_size(self.node):
            return size_class(self.node)
        if asking.f_lineno in asking_lines(asking.f_code):
            self.tracer.look_into(self.node)
            raise self.tracer.refused(TypeError("it asks of which class a value is"))
        return type(self)

    def __str__(self) -> str:
        """No text: a branch may depend on it, as on ``str(x.dtype)``."""
        if sys._getframe(1).f_code.co_filename.startswith(_MACHINERY):
            return repr(self)
        self.tracer.look_into(self.node)
        raise self.tracer.refused(TypeError("it reads a value as text"))

    def __format__(self, specification: str) -> str:
        """Text for a message, which forwards prepare for a check that does not fail."""
        return repr(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.look_into(self.node)
        raise self.tracer.refused(TypeError(ASSIGNED))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_A_PROXY:
            reason = f"it assigns the {name} of a value, and a graph would leave the value as it is"
            raise self.tracer.refused(TypeError(reason))
        super().__setattr__(name, value)

    def __len__(self) -> int:
        self.tracer.look_into(self.node)
        return super().__len__()

    def __hash__(self) -> int:
        raise self.tracer.refused(TypeError("a value is looked up in a dict or a set, or a cache"))

    def __int__(self) -> int:
        raise self.tracer.refused(TypeError("a value is made a number of Python's"))

    __float__ = __complex__ = __int__

    def __getattr__(self, name: str) -> Any:
        if self.tracer.is_tensor(self.node) and not hasattr(torch.Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return Attribute(self, name)


class Attribute(fx.proxy.Attribute, TensorProxy):
    """An attribute of a value, or a method of it: it has no node before that is known."""

    def __getattr__(self, name: str) -> Any:
        return Attribute(self, name)


def _in_place(target: Callable[[Any, Any], Any]) -> Callable[[TensorProxy, Any], fx.Proxy]:
    def method(self: TensorProxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


IN_PLACE = frozenset(name for name in dir(operator) if name.startswith("i") and name[1:] in dir(operator))
for _name in IN_PLACE:
    setattr(TensorProxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class ParameterProxy(TensorProxy):
    """A parameter or a buffer: its shape is known, and forwards do look at it."""

    shape: torch.Size

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.__dict__.update(shape=tensor.shape, ndim=tensor.ndim, dtype=tensor.dtype)

    def size(self, dim: int | None = None) -> Any:
        """All sizes, or one of them."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    nelement = numel
