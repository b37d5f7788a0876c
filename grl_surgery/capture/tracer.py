"""The torch.fx tracer: opens some modules, names every node, refuses what a graph would lose."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import operator
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from grl_surgery.capture.code_inspection import identity_questions
from grl_surgery.capture.codegen import signature
from grl_surgery.capture.forward_constants import MadeTensors
from grl_surgery.capture.guards import (
    refuse_arguments,
    refuse_hooks,
    refuse_identity_questions,
    refuse_narrowing,
    refuse_questions,
    refuse_untraceable_methods,
    settings,
)
from grl_surgery.capture.node_names import is_item, line_of_forward, operation
from grl_surgery.capture.node_uses import boundary, is_size
from grl_surgery.capture.proxies import ASSIGNED, AskedTracer, ParameterProxy, TensorProxy
from grl_surgery.capture.python_state import preserve_python_state
from grl_surgery.capture.recorded_functions import WholeFunctions, recording_autograd_functions
from grl_surgery.capture.state_of_calls import attributes_left_by_a_call
from grl_surgery.capture.trace_errors import OpaqueValueInspected, TraceStopped
from grl_surgery.capture.traceable_copy import (
    HiddenAttribute,
    TrainingFlagProxy,
    TwinModules,
    is_building_block,
    refuse_own_call,
)
from grl_surgery.isolation.rng_state import preserve_rng_state
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


# A call of a copied module goes from the one to the tracer, and only from there to the other.
_CALLED, _RUN = nn.Module.__call__.__code__, nn.Module._call_impl.__code__

# Where the arithmetic of Python's own is from. A run does not count it where it is about sizes.
_ARITHMETIC = ("_operator", "builtins", "math")


class Tracer(AskedTracer):
    """Traces the opened modules only, and writes down for each node where it came from."""

    def __init__(
        self,
        model: nn.Module,
        traced_modules: frozenset[str],
        given: frozenset[str] | None,
        constants: dict[str, torch.Tensor],
        mode: bool | None,
        whole: WholeFunctions,
    ) -> None:
        super().__init__(autowrap_modules=())
        self.model, self.traced_modules, self.given, self.constants = model, traced_modules, given, constants
        self.whole = whole
        self.twins = TwinModules(model, mode, self.call, self.read, self.hidden_attributes)
        self.parameter_proxies: dict[str, fx.Proxy] = {}
        self.mode_dependent: set[str] = set()
        self.made = MadeTensors(model, self.refuse_strangers)
        self.refusal: Exception | None = None
        self.inside = [""]
        self.calls = 0
        self.settings = settings()
        self.thread = threading.get_ident()

    @functools.cached_property
    def tensors(self) -> dict[int, str]:
        """Name of every parameter and buffer."""
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        return {id(tensor): name for name, tensor in named}

    @functools.cached_property
    def module_names(self) -> set[str]:
        """The attributes under which the network's modules lie."""
        return {path.rpartition(".")[2] for path in self.twins.originals} - {""}

    # -- structure

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Everything that was not opened stays one call."""
        return module_qualified_name not in self.traced_modules

    def path_of_module(self, mod: nn.Module) -> str:
        """The path of a module, wherever in the network it lies."""
        path = self.twins.path_of(mod)
        if path is None:
            raise RuntimeError(f"it calls a {type(mod).__name__} that is not a submodule of the network")
        return path

    def call(self, twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A copied module is called."""
        return self.call_module(twin, twin._call_impl, args, kwargs)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One node for a call; for an opened module its forward, between marks."""
        path = self.path_of_module(m)
        if path not in self.traced_modules:
            refuse_own_call(m, path, traced_modules=False)
            refuse_arguments(m, args, kwargs)
            return super().call_module(m, forward, args, kwargs)
        self.inside.append(path)
        refuse_hooks(self.twins.original_of(m), path)
        refuse_own_call(m, path, traced_modules=True)
        refuse_questions(type(m).forward)
        if self.given is None:
            refuse_untraceable_methods(type(m))
            outside = given_from_outside(type(m), args, kwargs)
            refuse_identity_questions(type(m), outside, self.module_names)
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
        self.refuse_strangers()
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

    def hidden_attributes(self, path: str, module: nn.Module) -> set[str]:
        """What a module that stays one call may leave in its attributes: no graph has that."""
        is_call = self.given is None and path not in self.traced_modules
        return attributes_left_by_a_call(module) if is_call else set()

    def read(self, value: Any) -> Any:
        """A proxy for each parameter and buffer; a mode flag as it is, but noticed."""
        if isinstance(value, HiddenAttribute):
            left = f"{value.path}.{value.name}"
            reason = f"it reads {left!r}, which a call of that module may write, and a graph would not"
            raise self.refused(RuntimeError(reason))
        if isinstance(value, TrainingFlagProxy):
            self.mode_dependent.add(value.path)
            return value.value
        name = self.tensors.get(id(value)) if isinstance(value, torch.Tensor) else None
        if name is None:
            return value
        if name not in self.parameter_proxies:
            node = self.create_node("get_attr", name, (), {})
            self.parameter_proxies[name] = ParameterProxy(node, self, value)
        return self.parameter_proxies[name]

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
        if hasattr(type(a), "__dataclass_fields__") and not _is_made_of_its_fields(a):
            raise RuntimeError(f"a {type(a).__name__} cannot be made again of its fields")
        return super().create_arg(a)

    def constant(self, tensor: torch.Tensor) -> fx.Node:
        """A tensor that is no proxy: read past its module, an attribute, or made by the forward."""
        name = self.tensors.get(id(tensor)) or self.twins.plain_tensors.get(tensor)
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
        if not _is_made_of_its_items(value, first):
            raise RuntimeError(f"a {type(value).__name__} cannot be made again of its items")
        return self.create_node("call_function", type(value), (*first, items), {})

    # -- arguments of the root

    def trace_root(self) -> fx.Graph:
        """Run the root's forward on proxies for its arguments.

        ``fx.Tracer.trace`` would patch ``nn.Module`` and other people's files meanwhile, for every thread.

        Returns:
            The graph of what it did.
        """
        self.root = self.twins.root
        self.graph = fx.Graph(tracer_cls=type(self))
        opened = {path: self.root.get_submodule(path) for path in self.traced_modules}
        for twin in opened.values():
            self.whole.bind(twin)
        with (
            preserve_rng_state() as self.moved,
            preserve_python_state(opened) as self.changed,
            recording_autograd_functions(self),
        ):
            forward = type(self.root).forward
            refuse_questions(forward)
            positional, keywords = self.root_arguments(forward)
            with self.made:
                result = self.root.__dict__.get("forward", functools.partial(forward, self.root))(
                    *positional, **keywords
                )
            if self.refusal is not None:  # the forward caught it, and took another branch than it will
                raise self.refusal
            self.refuse_randomness()
            self.refuse_changes()
            returns = inspect.get_annotations(inspect.unwrap(forward)).get("return")
            self.create_node("output", "output", (self.create_arg(result),), {}, type_expr=returns)
        return self.graph

    def root_arguments(self, forward: Callable[..., Any]) -> tuple[list[fx.Proxy], dict[str, fx.Proxy]]:
        """Proxies for the arguments of the root's forward: those without names, and those by name."""
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        if self.given is None:
            refuse_narrowing(forward, parameters)
            refuse_untraceable_methods(type(self.root))
            names = [parameter.name for parameter in parameters]
            refuse_identity_questions(type(self.root), names, self.module_names)
        elif any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            raise RuntimeError("it takes any number of arguments")
        positional: list[fx.Proxy] = []
        keywords: dict[str, fx.Proxy] = {}
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
        return positional, keywords

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

    def refuse_strangers(self) -> None:
        """A module that is none of the network's runs: a graph would not hold it."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code not in (Tracer.call.__code__, Tracer.trace_root.__code__):
            if frame.f_code is _RUN and frame.f_back is not None and frame.f_back.f_code is _CALLED:
                stranger = type(frame.f_locals["self"]).__name__
                raise RuntimeError(f"it calls a {stranger} that is not a submodule of the network")
            frame = frame.f_back

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


def _is_made_of_its_items(value: dict[str, Any], first: tuple[None, ...]) -> bool:
    """Whether the class of a dict makes the same of the items, and nothing else was kept on it."""
    items = list(dict.items(value))
    kind: Any = type(value)
    try:
        again = kind(*first, items)
    except Exception:  # the class is the user's: anything can come out of it
        return False
    same = type(again) is kind and len(again) == len(items)
    same = same and all(key in again and dict.get(again, key) is item for key, item in items)
    return same and vars(again).keys() == vars(value).keys() if hasattr(value, "__dict__") else same


def _is_made_of_its_fields(value: Any) -> bool:
    """Whether a dataclass makes the same of the values of its fields, and nothing else was kept on it."""
    fields = dataclasses.fields(value)
    names = {field.name for field in fields}
    is_plain = all(field.init for field in fields) and not hasattr(type(value), "__post_init__")
    return is_plain and getattr(value, "__dict__", dict.fromkeys(names)).keys() == names


def given_from_outside(kind: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """The arguments of a forward that are the root's, or a part of these or of what a module returned."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    if code is None or not identity_questions(code).arguments:
        return []
    bound = inspect.signature(kind.forward).bind_partial(None, *args, **kwargs).arguments
    return [name for name, value in bound.items() if isinstance(value, fx.Proxy) and _is_given(value.node)]


def _is_given(node: fx.Node) -> bool:
    is_part = False
    while node.op != "placeholder":
        part = is_item(node) or node.target is getattr or (node.op, node.target) == ("call_method", "get")
        if not part and node.target is not boundary:
            return is_part and node.op == "call_module"
        is_part |= part
        node = node.args[0]  # type: ignore[assignment]
    return True
