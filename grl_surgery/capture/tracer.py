"""The torch.fx tracer: opens some modules, names every node, refuses what a graph would lose."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
import threading
from collections import defaultdict
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn

from grl_surgery.capture.codegen import signature
from grl_surgery.capture.forward_constants import MadeTensors
from grl_surgery.capture.guards import (
    refuse_arguments,
    refuse_hooks,
    refuse_narrowing,
    refuse_questions,
    settings,
)
from grl_surgery.capture.node_names import is_item, line_of_forward, operation
from grl_surgery.capture.node_uses import boundary, is_size
from grl_surgery.capture.proxies import ASSIGNED, AskedTracer, ParameterProxy, TensorProxy
from grl_surgery.capture.trace_errors import OpaqueValueInspected, TraceStopped
from grl_surgery.capture.traceable_copy import TrainingFlagProxy, is_building_block, refuse_own_call
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.points import escape

__all__ = [
    "Tracer",
    "returns_several",
]


def returns_several(layer: nn.Module) -> bool:
    """Whether a layer of torch returns a tuple of tensors."""
    kinds = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss)
    pairs = isinstance(layer, kinds)
    return pairs or bool(getattr(layer, "return_indices", False))


_ITERATED = (
    "it goes through the items of a value, and how many there are is only known when the network runs "
    "(x.shape passed whole, as in torch.zeros(x.shape), can be traced, *x.shape cannot)"
)


# Where the arithmetic of Python's own is from. A run does not count it where it is about sizes.
_ARITHMETIC = ("_operator", "builtins", "math")


class Tracer(AskedTracer):
    """Traces the opened modules only, and writes down for each node where it came from."""

    proxy_buffer_attributes = True  # a buffer read as a plain tensor would be updated for real

    def __init__(
        self,
        model: nn.Module,
        traced_modules: frozenset[str],
        given: frozenset[str] | None,
        constants: dict[str, torch.Tensor],
        whole: tuple[FunctionType | ModuleType, ...],
        moved: Callable[[], bool],
        changed: Callable[[], str | None],
    ) -> None:
        super().__init__(
            autowrap_modules=tuple(it for it in whole if isinstance(it, ModuleType)),
            autowrap_functions=tuple(it for it in whole if isinstance(it, FunctionType)),
        )
        self.model, self.traced_modules, self.given, self.constants = model, traced_modules, given, constants
        self.moved, self.changed = moved, changed
        self.mode_dependent: set[str] = set()
        self.made = MadeTensors(model)
        self.refusal: Exception | None = None
        self.inside = [""]
        self.calls = 0
        self.settings = settings()
        self.thread = threading.get_ident()

    @functools.cached_property
    def near(self) -> dict[int, str]:
        """Path of every module in the copy that is traced."""
        return {id(module): path for path, module in self.root.named_modules()}

    @functools.cached_property
    def far(self) -> dict[int, str]:
        """Path of every module in the model; what lies deep inside a call is there and not in the copy."""
        return {id(module): path for path, module in self.model.named_modules()}

    @functools.cached_property
    def tensors(self) -> dict[int, str]:
        """Name of every parameter and buffer."""
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        return {id(tensor): name for name, tensor in named}

    # -- structure

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Everything that was not opened stays one call."""
        return module_qualified_name not in self.traced_modules

    def path_of_module(self, mod: nn.Module) -> str:
        """The path of a module, wherever in the network it lies."""
        path = self.near.get(id(mod), None)
        path = self.far.get(id(mod)) if path is None else path
        if path is None:
            raise RuntimeError(f"it calls a {type(mod).__name__} that is not a submodule of the network")
        return path

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One node for a call; for an opened module its forward, between marks."""
        if threading.get_ident() != self.thread:  # torch.fx patches torch for every thread
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if path not in self.traced_modules:
            refuse_own_call(m, path, traced_modules=False)
            refuse_arguments(m, args, kwargs)
            return super().call_module(m, forward, args, kwargs)
        self.inside.append(path)
        refuse_hooks(m, path)
        refuse_own_call(m, path, traced_modules=True)
        refuse_questions(type(m).forward)
        self.calls += 1
        call = self.calls
        named = [(str(index), value) for index, value in enumerate(args)]
        marked = {arg: self.mark(value, path, call, arg) for arg, value in [*named, *kwargs.items()]}
        args = tuple(marked[str(index)] for index in range(len(args)))
        kwargs = {key: marked[key] for key in kwargs}
        result = super().call_module(m, forward, args, kwargs)
        self.refuse_randomness()
        self.inside.pop()
        return self.mark(result, path, call, None)

    def mark(self, value: Any, path: str, call: int, arg: str | None, items: tuple[Any, ...] = ()) -> Any:
        """Wrap each proxy in ``value`` in a boundary node of one call of the module at ``path``."""
        if isinstance(value, fx.Proxy):
            proxy = self.create_proxy("call_function", boundary, (value,), {})
            proxy.node.meta.update(
                base=escape(path),
                call=call,
                boundary="out" if arg is None else "in",
                arg=None if arg is None else arg + "".join(f"[{key}]" for key in items),
                items=items,
            )
            return proxy
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.mark(v, path, call, arg, (*items, i)) for i, v in enumerate(value)))
        if type(value) in (tuple, list):
            return type(value)(self.mark(v, path, call, arg, (*items, i)) for i, v in enumerate(value))
        if type(value) is dict:
            return {k: self.mark(v, path, call, arg, (*items, k)) for k, v in value.items()}
        return value

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that knows its name and the line it comes from."""
        changed = [name for name, value in settings().items() if self.settings[name] != value]
        if changed:
            raise RuntimeError(f"part of it runs under another {changed[0]}, which a graph would lose")
        if target == "__setitem__":  # of a tensor that the forward made
            raise self.refused(TypeError(ASSIGNED))
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta.pop("nn_module_stack", None)
        line = ("", 0) if node.op == "get_attr" else line_of_forward()
        node.meta.update(base=self.base_name(node), line=line)
        self.made.note_write(node)
        return node

    def base_name(self, node: fx.Node) -> str:
        """The node's name before things that share it are numbered."""
        if node.op in ("call_module", "get_attr", "placeholder", "output"):
            return escape(str(node.target))
        if is_item(node):
            source, key = node.args
            return f"{source.meta['base']}[{key}]"  # type: ignore[union-attr]
        prefix = f"{escape(self.scope.module_path)}." if self.scope.module_path else ""
        is_python = getattr(node.target, "__module__", "") in _ARITHMETIC and node.target is not getattr
        is_of_sizes = is_python and is_size(node)
        return f"{prefix}size_{operation(node)}" if is_of_sizes else prefix + operation(node)

    # -- values

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the proxy that stands for the node's value while the forward runs."""
        return TensorProxy(node, self)

    def look_into(self, node: fx.Node) -> None:
        """Refuse a value that comes out of a module which could be traced through as well.

        Raises:
            OpaqueValueInspected: It does.
        """
        while node.target is boundary or is_item(node):
            node = node.args[0]  # type: ignore[assignment]
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            if not isinstance(module, GradientReversal) and not is_building_block(module):
                reason = f"it looks into the value of {node.target!r}, whose forward was not traced through"
                raise OpaqueValueInspected(
                    str(self.stopped(RuntimeError(reason))), self.inside[-1], str(node.target)
                )

    def is_tensor(self, node: fx.Node) -> bool:
        """Whether it is certain that the value is one tensor, or a number made of sizes."""
        if node.op == "call_module":
            layer = self.root.get_submodule(str(node.target))
            return is_building_block(layer) and not returns_several(layer)
        made_by = getattr(node.target, "__module__", "")
        return node.op == "call_function" and made_by == "_operator" and node.target is not operator.getitem

    def iter(self, obj: fx.Proxy) -> Any:
        """The items of a value, where the line of code says how many there are."""
        try:
            return super().iter(obj)
        except fx.proxy.TraceError:
            self.look_into(obj.node)
            raise self.refused(fx.proxy.TraceError(_ITERATED)) from None

    def to_bool(self, obj: fx.Proxy) -> bool:
        """No answer: which branch it is depends on what the network is given."""
        try:
            return super().to_bool(obj)
        except fx.proxy.TraceError as error:
            raise self.refused(error)  # noqa: B904

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """A proxy for each parameter and buffer; a mode flag as it is, but noticed."""
        if threading.get_ident() != self.thread:
            return attr_val
        if isinstance(attr_val, TrainingFlagProxy):
            self.mode_dependent.add(attr_val.path)
            return attr_val.value
        name = self.tensors.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if name is None:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            node = self.create_node("get_attr", name, (), {})
            parameter_proxy_cache[name] = ParameterProxy(node, self, attr_val)
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """Return what stands for a value in a node's arguments."""
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        if isinstance(a, torch.Tensor):
            return self.constant(a)
        if isinstance(a, torch.Generator):
            raise RuntimeError("it draws from a torch.Generator, which a graph would not hold")
        if isinstance(a, dict) and type(a) is not dict:
            return self.mapping(a)
        return super().create_arg(a)

    def constant(self, tensor: torch.Tensor) -> fx.Node:
        """A tensor that is no proxy: read past its module, an attribute, or made by the forward."""
        name = self.tensors.get(id(tensor)) or self.tensor_attrs.get(tensor)
        if name is not None:
            return self.create_node("get_attr", name, (), {})
        if tensor.requires_grad:
            raise TypeError("a tensor computed from a parameter would be frozen at its present value")
        node = self.made.node_of(tensor)
        return node or self.made.add(
            tensor, self.create_node("get_attr", self.name_of_constant(tensor), (), {})
        )

    def name_of_constant(self, tensor: torch.Tensor) -> str:
        """The attribute that holds a tensor of these values, in this graph and in that of the other mode."""
        held = (key for key, value in self.constants.items() if torch.equal(value, tensor))
        name = next((k for k in held if self.constants[k].dtype == tensor.dtype), None)
        if name is None:
            numbered = (f"_constant_{number}" for number in itertools.count(len(self.constants)))
            name = next(it for it in numbered if it not in self.constants and not hasattr(self.model, it))
            self.constants[name] = tensor
            setattr(self.root, name, tensor)
        return name

    def mapping(self, value: dict[str, Any]) -> fx.Node:
        """A dict of a class of its own (OrderedDict, a ModelOutput): built again by that class."""
        items = [(key, self.create_arg(item)) for key, item in value.items()]
        if hasattr(type(value), "__dataclass_fields__"):
            return self.create_node("call_function", type(value), (), dict(items))
        first = (None,) if isinstance(value, defaultdict) else ()  # its factory, which nobody asks any more
        return self.create_node("call_function", type(value), (*first, items), {})

    # -- arguments of the root

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[[], Any], list[Any]]:
        """The root's forward, given proxies for its arguments, and its checks afterwards."""
        refuse_questions(root_fn)
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        if self.given is None:
            refuse_narrowing(root_fn, parameters)
        elif any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            raise RuntimeError("it takes any number of arguments")
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for parameter in parameters:
            if not self.is_passed(parameter):
                self.note_argument(parameter)
                continue
            value = self.placeholder(parameter)
            if parameter.kind is parameter.KEYWORD_ONLY or keywords or self.given is not None:
                keywords[parameter.name] = value
            else:
                positional.append(value)
        codegen = signature(parameters, len(positional)) if self.given is None else None
        if codegen is not None:
            self.graph.set_codegen(codegen)
        self.inside = [""]

        def run() -> Any:
            with self.made:
                result = root_fn(self.root, *positional, **keywords)
            if self.refusal is not None:  # the forward caught it, and took another branch than it will
                raise self.refusal
            self.refuse_randomness()
            self.refuse_changes()
            return result

        return run, []

    def note_argument(self, parameter: inspect.Parameter) -> None:
        """Have a graph that is looked at show an argument that is left out."""
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            with contextlib.suppress(RuntimeError):
                self.placeholder(parameter)

    def is_passed(self, parameter: inspect.Parameter) -> bool:
        """Whether the graph has an argument of the root's; one that is only looked at has those given."""
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return False
        is_required = parameter.default is parameter.empty
        return self.given is None or is_required or parameter.name in self.given

    def placeholder(self, parameter: inspect.Parameter) -> fx.Proxy:
        """A proxy for one argument, with its default, which has to be one that can be written as code."""
        name, default = parameter.name, parameter.default
        defaults = () if default is parameter.empty or name in (self.given or ()) else (default,)
        try:
            proxy = self.create_proxy("placeholder", name, defaults, {})
        except NotImplementedError:
            proxy = None
        if proxy is None or proxy.node.all_input_nodes:
            is_tensor = isinstance(default, torch.Tensor)
            kind = "tensor" if is_tensor else f"{type(default).__name__} that a graph cannot have"
            raise RuntimeError(f"the default of its argument {name!r} is a {kind}")
        return proxy

    # -- what stops it

    def refused(self, error: Exception) -> Exception:
        """The error, noted in case that the forward catches it."""
        self.refusal = self.refusal or error
        return error

    def refuse_randomness(self) -> None:
        """A number drawn while tracing would be the same in every run."""
        if self.moved():
            raise RuntimeError("it draws random numbers in Python, which a graph would freeze")

    def refuse_changes(self) -> None:
        """Refuse a forward that stores something in Python: the trace would store it, no run would."""
        if change := self.changed():
            raise RuntimeError(change)
        self.made.refuse_changes()

    def stopped(self, error: Exception) -> TraceStopped:
        """The error with the innermost module whose forward was being traced."""
        path = self.inside[-1]
        module = self.root.get_submodule(path)
        where = f"{path!r}" if path else "the root"
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        message = f"the forward of {where} ({type(module).__name__}) cannot be traced: {reason}"
        return TraceStopped(message, path)


# ---------------------------------------------------------------------------------------- node names
