"""A model as a graph: no deeper than asked, with a name for every node, right in train and in eval."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from grl_surgery.errors import TracingError
from grl_surgery.points import escape, number
from grl_surgery.sharing import share_copy

__all__ = ["Trace", "module_paths", "random_state_kept", "trace"]

Flags = tuple[bool, ...]


@dataclass
class Trace:
    """The graphs of one network: one, or one for each mode that makes a difference.

    Args:
        graphs: From the mode flags of the ``steering`` modules to the graph that holds under them.
        steering: Paths of the modules whose ``training`` flag decides what the forward does.
        constants: Tensors that the forward makes itself, by the attribute under which graphs refer to them.
        opened: Paths of the modules whose forwards were traced through; the root's is ``""``.
        refused: Modes that cannot be traced, each with the reason.
    """

    graphs: dict[Flags, fx.Graph]
    steering: tuple[str, ...]
    constants: dict[str, torch.Tensor]
    opened: frozenset[str]
    refused: dict[Flags, str]

    def names(self) -> list[str]:
        """Every name in the graphs, in the order of execution."""
        nodes = (node for graph in self.graphs.values() for node in graph.nodes)
        return list(dict.fromkeys(node.meta["point"] for node in nodes if "point" in node.meta))


def module_paths(model: nn.Module) -> dict[str, str]:
    """From every module's name, aliases of shared modules included, to its first path in the tree."""
    first: dict[nn.Module, str] = {}
    return {
        escape(path): first.setdefault(module, path)
        for path, module in model.named_modules(remove_duplicate=False)
    }


def trace(
    model: nn.Module,
    opened: Collection[str],
    *,
    given: Collection[str] = (),
    lenient: bool = False,
) -> Trace:
    """Trace the forwards of the ``opened`` modules; every other module stays one call.

    The model is not touched: tracing runs on copies of the opened modules.

    Args:
        model: Root of the network.
        opened: Paths of the modules to trace through; the root is always among them.
        given: Names of arguments of the root's forward that callers will pass, though they have a default.
        lenient: Where a module's forward cannot be traced, keep the module as one call instead of failing.

    Raises:
        TracingError: A forward cannot be traced. It names the module and what stopped it.
    """
    opened = set(opened) | {""}
    while True:
        try:
            return _trace_modes(model, frozenset(opened), given)
        except _Stopped as stop:
            if not (lenient and stop.path):
                raise TracingError(str(stop), example=_way_out(stop.path)) from stop.__cause__
            inside = f"{stop.path}."
            opened = {path for path in opened if path != stop.path and not path.startswith(inside)}


def _way_out(path: str) -> str:
    whole = f"after={path!r}" if path else "after='block', in a model whose forward calls self.block(x)"
    return f"{whole} needs no trace of that forward"


def _trace_modes(model: nn.Module, opened: frozenset[str], given: Collection[str]) -> Trace:
    """Trace as the flags are now and, if a forward looks at them, with all on and all off as well."""
    constants: dict[str, torch.Tensor] = {}
    graph, read = _trace_once(model, opened, given, constants)
    variants: dict[bool | None, fx.Graph] = {None: graph}
    reasons: dict[bool | None, str] = {}
    for mode in (True, False) if read else ():
        try:
            variants[mode], also_read = _trace_once(model, opened, given, constants, mode)
            read |= also_read
        except _Stopped as stop:
            reasons[mode] = str(stop)
    _name_nodes(list(variants.values()))
    shapes = [_structure(graph) for graph in variants.values()]
    if not reasons and all(shape == shapes[0] for shape in shapes[1:]):
        return Trace({(): graph}, (), constants, opened, {})
    steering = tuple(sorted(read))

    def flags(mode: bool | None) -> Flags:
        return tuple(model.get_submodule(p).training if mode is None else mode for p in steering)

    graphs = {flags(mode): graph for mode, graph in variants.items()}
    return Trace(graphs, steering, constants, opened, {flags(mode): why for mode, why in reasons.items()})


def _structure(graph: fx.Graph) -> list[Any]:
    """What a graph computes, comparable between two graphs."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    refer: Callable[[fx.Node], Any] = lambda node: ("node", place[node])  # noqa: E731
    return [
        (node.op, node.target, repr(map_arg(node.args, refer)), repr(map_arg(node.kwargs, refer)))
        for node in graph.nodes
    ]


# ------------------------------------------------------------------------------------------ one trace


def is_building_block(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers (a container is not): nobody looks inside those."""
    return type(module).__module__.startswith("torch.nn.modules") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


class _Stopped(Exception):
    """Tracing came to an end inside the forward of the module at ``path``."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


_TORCH = os.path.dirname(torch.__file__) + os.sep
_MACHINERY = (f"{_TORCH}fx", __file__)

# torch.fx patches torch.nn.Module while it traces, so two traces at a time would see each other.
_ONE_AT_A_TIME = threading.RLock()


def _trace_once(
    model: nn.Module,
    opened: frozenset[str],
    given: Collection[str],
    constants: dict[str, torch.Tensor],
    mode: bool | None = None,
    numbers_fixed: bool = False,
    whole: tuple[FunctionType, ...] = (),
) -> tuple[fx.Graph, set[str]]:
    """One trace with the flags as they are, or all set to ``mode``; and whose flags the forwards read.

    Where a number among the arguments steers the forward, it is traced again with all of them fixed; where a
    function that a forward calls cannot be traced, again with that function as one operation.
    """
    with _ONE_AT_A_TIME, random_state_kept() as moved:
        tracer = _Tracer(model, opened, given, constants, numbers_fixed, whole, moved)
        try:
            with _functions_kept(tracer):
                return tracer.trace(_trace_copy(model, opened, mode)), tracer.steering
        except Exception as error:  # user code runs in here: anything can come out of it
            function = _function_that_failed(error)
            if isinstance(error, fx.proxy.TraceError) and tracer.has_numbers and not numbers_fixed:
                numbers_fixed = True
            elif function is not None and function not in whole:
                whole = (*whole, function)
            else:
                raise tracer.stopped(error) from error
    return _trace_once(model, opened, given, constants, mode, numbers_fixed, whole)


def _function_that_failed(error: Exception) -> FunctionType | None:
    """The function, called by the innermost forward, in which tracing came to an end; None if none was."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        code = frame.f_code
        if code is _Tracer.call_module.__code__:
            return None
        function = frame.f_globals.get(code.co_name)
        if code.co_filename.startswith(_TORCH) or not isinstance(function, FunctionType):
            continue
        if inspect.unwrap(function).__code__ is code:
            return function
    return None


class FunctionCall:
    """A call of an autograd.Function, with what torch.fx needs to write it down under the function's name."""

    def __init__(self, kind: type[torch.autograd.Function]) -> None:
        self.kind = kind
        self.__name__ = self.__qualname__ = kind.__name__
        self.__module__ = __name__  # under a name of torch's own it would be taken for the class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kind.apply(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FunctionCall) and other.kind is self.kind

    def __hash__(self) -> int:
        return hash(self.kind)


@contextlib.contextmanager
def _functions_kept(tracer: _Tracer) -> Iterator[None]:
    """Record a call of an autograd.Function as one operation: traced into, it would lose its backward.

    ``apply`` is a built-in that may have been looked up long ago; the forward is looked up at each call.
    """
    held = [
        (kind, name, kind.__dict__[name])
        for kind in _subclasses(torch.autograd.Function)
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


def _subclasses(kind: type[torch.autograd.Function]) -> Iterator[type[torch.autograd.Function]]:
    for subclass in type.__subclasses__(kind):
        if not subclass.__module__.startswith("torch._library"):  # behind operators, which torch.fx records
            yield subclass
            yield from _subclasses(subclass)


def _recording(tracer: _Tracer, kind: Any, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that leaves one node for its Function where it is given proxies."""
    with_context = kind.setup_context is torch.autograd.Function.setup_context

    def record(*args: Any) -> Any:
        inputs = args[1:] if with_context or name == "setup_context" else args
        if not any(isinstance(value, fx.Proxy) for value in pytree.tree_leaves(inputs)):
            return original(*args)
        if name == "setup_context":
            return None
        return tracer.create_proxy("call_function", FunctionCall(kind), inputs, {})

    return record


def _trace_copy(model: nn.Module, opened: frozenset[str], mode: bool | None) -> nn.Module:
    """The opened modules and their children, on which the forwards run instead of on the model.

    Each flag is moved from the instance to where torch.fx sees an attribute being read. What lies inside a
    module that stays one call can be reached but is not listed: torch.fx would walk through all of it.
    """
    near = {path: model.get_submodule(path) for path in opened}
    for path in opened:
        near.update(_children(path, near[path]))
    copy = share_copy(model, only=list(dict.fromkeys(near.values())))
    for path in near:
        module = copy.get_submodule(path)
        flag = module.__dict__.pop("training", None)
        if flag is not None:
            module._buffers["training"] = _Flag(path, flag if mode is None else mode)  # type: ignore[assignment]
    for path in near.keys() - opened:
        module = copy.get_submodule(path)
        if not _is_list(module):
            module.__dict__["_modules"] = _Unlisted(module._modules)
    return copy


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


class _Flag(NamedTuple):
    """Stands for the ``training`` of the module at ``path``."""

    path: str
    value: bool


@contextlib.contextmanager
def random_state_kept() -> Iterator[Callable[[], bool]]:
    """Put every generator on the host back; yields a function that says whether one has moved."""
    numpy: Any = sys.modules.get("numpy")
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    numpy_state = numpy and numpy.random.get_state(legacy=False)

    def moved() -> bool:
        return (
            not torch.equal(torch_state, torch.random.get_rng_state())
            or python_state != random.getstate()
            or (
                numpy
                and _numpy_position(numpy_state) != _numpy_position(numpy.random.get_state(legacy=False))
            )
        )

    try:
        yield moved
    finally:
        torch.random.set_rng_state(torch_state)
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def _numpy_position(state: Any) -> tuple[int, bytes]:
    return state["state"]["pos"], state["state"]["key"].tobytes()


def boundary(value: Any) -> Any:
    """Marks in a graph where a value enters or leaves a traced module; taken out before the graph runs."""
    return value


def check_fixed(value: Any, name: str, default: Any) -> Any:
    """Refuse another value than the default for an argument that tracing has fixed."""
    if isinstance(value, fx.Proxy) or value is default or (type(value) is type(default) and value == default):
        return value
    raise TracingError(
        f"the argument {name!r} steers what forward does, so surgery fixed it at its default {default!r}; "
        f"got {value if isinstance(value, (bool, int, float, str)) else type(value).__name__!r}",
        example=f"insert_grl(model, ..., example_inputs={{..., {name!r}: value}}) keeps it an argument",
    )


_FIXED = (bool, str, type(None))
_NUMBERS = (int, float, complex)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Stored(fx.Proxy):
    """A parameter or a buffer: its shape is known, and forwards do look at it."""

    shape: torch.Size

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.__dict__.update(shape=tensor.shape, ndim=tensor.ndim, dtype=tensor.dtype)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    nelement = numel


class _Tracer(fx.Tracer):
    """Traces the opened modules only, and writes down for each node where it came from."""

    proxy_buffer_attributes = True  # a buffer read as a plain tensor would be updated for real

    def __init__(
        self,
        model: nn.Module,
        opened: frozenset[str],
        given: Collection[str],
        constants: dict[str, torch.Tensor],
        numbers_fixed: bool,
        whole: tuple[FunctionType, ...],
        moved: Callable[[], bool],
    ) -> None:
        super().__init__(autowrap_functions=whole)
        self.model, self.opened, self.given, self.constants = model, opened, given, constants
        self.numbers_fixed, self.moved = numbers_fixed, moved
        self.steering: set[str] = set()
        self.has_numbers = False
        self.inside = [""]
        self.calls = 0

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
        return module_qualified_name not in self.opened

    def path_of_module(self, mod: nn.Module) -> str:
        path = self.near.get(id(mod), None)
        path = self.far.get(id(mod)) if path is None else path
        if path is None:
            raise RuntimeError(f"it calls a {type(mod).__name__} that is not a submodule of the network")
        return path

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        if path not in self.opened:
            return super().call_module(m, forward, args, kwargs)
        self.inside.append(path)
        _refuse_hooks(m, path)
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
                base=escape(path), call=call, boundary="out" if arg is None else "in", arg=arg, items=items
            )
            return proxy
        if type(value) in (tuple, list):
            return type(value)(self.mark(v, path, call, arg, (*items, i)) for i, v in enumerate(value))
        if type(value) is dict:
            return {k: self.mark(v, path, call, arg, (*items, k)) for k, v in value.items()}
        return value

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta.pop("nn_module_stack", None)
        node.meta.update(base=self.base_name(node), line=_line_of_forward())
        return node

    def base_name(self, node: fx.Node) -> str:
        """The node's name before things that share it are numbered."""
        if node.op in ("call_module", "get_attr", "placeholder", "output"):
            return escape(str(node.target))
        if _is_item(node):
            source, key = node.args
            return f"{source.meta['base']}[{key}]"  # type: ignore[union-attr]
        prefix = f"{escape(self.scope.module_path)}." if self.scope.module_path else ""
        return prefix + operation(node)

    # -- values

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if isinstance(attr_val, _Flag):
            self.steering.add(attr_val.path)
            return attr_val.value
        name = self.tensors.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if name is None:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = _Stored(self.create_node("get_attr", name, (), {}), self, attr_val)
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            return self.constant(a)
        if isinstance(a, dict) and type(a) is not dict:
            return self.mapping(a)
        return super().create_arg(a)

    def constant(self, tensor: torch.Tensor) -> fx.Node:
        """A tensor that is no proxy: read past its module, an attribute, or made by the forward."""
        name = self.tensors.get(id(tensor)) or self.tensor_attrs.get(tensor)
        if name is None and tensor.requires_grad:
            raise TypeError("a tensor computed from a parameter would be frozen at its present value")
        if name is None:
            held = (key for key, value in self.constants.items() if torch.equal(value, tensor))
            name = next((k for k in held if self.constants[k].dtype == tensor.dtype), None)
        if name is None:
            name = f"_constant_{len(self.constants)}"
            self.constants[name] = tensor
            setattr(self.root, name, tensor)
        return self.create_node("get_attr", name, (), {})

    def mapping(self, value: dict[str, Any]) -> fx.Node:
        """A dict of a class of its own (OrderedDict, a ModelOutput): built again by that class."""
        items = [(key, self.create_arg(item)) for key, item in value.items()]
        if hasattr(type(value), "__dataclass_fields__"):
            return self.create_node("call_function", type(value), (), dict(items))
        return self.create_node("call_function", type(value), (items,), {})

    # -- arguments of the root

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[[], Any], list[Any]]:
        _, *parameters = inspect.signature(root_fn).parameters.values()
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            value = self.argument(parameter)
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords[parameter.name] = value
            else:
                positional.append(value)
        if keywords:
            self.graph.set_codegen(KeywordOnlyCodeGen(len(positional)))
        self.inside = [""]

        def run() -> Any:
            result = root_fn(self.root, *positional, **keywords)
            self.refuse_randomness()
            for path in self.opened:
                _refuse_assignment(self.root.get_submodule(path), path)
            return result

        return run, []

    def argument(self, parameter: inspect.Parameter) -> Any:
        """A proxy for one argument, or its default where that steers the forward."""
        name, default = parameter.name, parameter.default
        if default is parameter.empty:
            return self.create_proxy("placeholder", name, (), {})
        node = self.create_proxy("placeholder", name, (default,), {})
        if name in self.given:
            return node
        is_number = isinstance(default, _NUMBERS) and not isinstance(default, bool)
        self.has_numbers |= is_number
        if isinstance(default, torch.Tensor) or (is_number and not self.numbers_fixed):
            return node
        check = self.create_proxy("call_function", check_fixed, (node, name, default), {})
        del check.node.meta["base"]  # no point: nothing flows through it
        return default

    # -- what stops it

    def refuse_randomness(self) -> None:
        if self.moved():
            raise RuntimeError("it draws random numbers in Python, which a graph would freeze")

    def stopped(self, error: Exception) -> _Stopped:
        path = self.inside[-1]
        module = self.root.get_submodule(path)
        where = f"{path!r}" if path else "the root"
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        message = f"the forward of {where} ({type(module).__name__}) cannot be traced: {reason}"
        return _Stopped(message, path)


def _refuse_hooks(module: nn.Module, path: str) -> None:
    """A traced forward is not called through its module any more, so its hooks would never run."""
    held = [kind.strip("_").replace("_", " ") for kind in _HOOKS if getattr(module, kind)]
    if held:
        raise RuntimeError(f"{path!r} has {' and '.join(held)}, which would be lost")
    if "forward" in module.__dict__:
        raise RuntimeError(f"{path!r} has a forward set on the instance, which would be lost")


# ---------------------------------------------------------------------------------------- node names


def _is_item(node: fx.Node) -> bool:
    """Whether the node picks one item, by a constant key, out of another node's value."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "getitem":
        return False
    source, key = (*node.args, None, None)[:2]
    return isinstance(source, fx.Node) and type(key) in (int, str) and "base" in source.meta


def operation(node: fx.Node) -> str:
    """What an operation is called: ``add``, ``flatten``, ``view``; attribute reads by the attribute."""
    if node.op == "call_method":
        return str(node.target)
    name = str(getattr(node.target, "__name__", None) or type(node.target).__name__)
    if name == "getattr" and len(node.args) > 1:
        return str(node.args[1])
    return name.strip("_") if name.startswith("__") else name


def _refuse_assignment(module: nn.Module, path: str) -> None:
    """A value that a forward stores on its module would be stored while tracing, and never again."""
    for holder in (module.__dict__, module._buffers, module._parameters):
        for name, value in holder.items():
            if isinstance(value, fx.Proxy):
                where = f"{path}.{name}" if path else name
                raise RuntimeError(f"it assigns self.{name}, and a graph would leave {where!r} as it is")


def _line_of_forward() -> tuple[str, int]:
    """The line of the network's code that is being traced."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_MACHINERY):
        frame = frame.f_back
    return (frame.f_code.co_filename, frame.f_lineno) if frame else ("", 0)


def _name_nodes(graphs: Sequence[fx.Graph]) -> None:
    """Number what shares a base name; all boundaries of one call of a module are one thing."""
    things: list[list[list[fx.Node]]] = []
    for graph in graphs:
        calls: dict[Any, list[fx.Node]] = {}
        for node in graph.nodes:
            if "base" in node.meta:
                calls.setdefault(node.meta.get("call") or node, []).append(node)
        things.append(list(calls.values()))
    named = number([[(nodes[0].meta["base"], nodes[0].meta["line"]) for nodes in row] for row in things])
    for row, names in zip(things, named, strict=True):
        for nodes, name in zip(row, names, strict=True):
            for node in nodes:
                node.meta["point"] = name


class KeywordOnlyCodeGen(fx.graph.CodeGen):
    """Writes a forward whose arguments after the first ``positional`` ones are keyword-only."""

    def __init__(self, positional: int) -> None:
        super().__init__()
        self.positional = positional

    def gen_fn_def(self, free_vars: list[str], *args: Any, **kwargs: Any) -> str:
        named = [*free_vars[: self.positional], "*", *free_vars[self.positional :]]
        return super().gen_fn_def(named, *args, **kwargs)
