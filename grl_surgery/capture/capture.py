"""Captures a network as a graph: as deep as asked, a name for every node, right in train and in eval."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from grl_surgery.capture.aliasing import ArgumentEffects, may_alias, mutated_args, redirect_in_place_uses
from grl_surgery.capture.node_names import TORCH, is_item
from grl_surgery.capture.recorded_functions import WholeFunctions
from grl_surgery.capture.state_of_calls import state_left_by_calls
from grl_surgery.capture.trace_errors import GlobalHookError, OpaqueValueInspected, TraceStopped
from grl_surgery.capture.tracer import Tracer
from grl_surgery.errors import SurgeryError, TracingError
from grl_surgery.points import ancestors, escape, number

__all__ = ["Trace", "around_aliases", "module_paths", "trace"]

Flags = tuple[bool, ...]


@dataclass
class Trace:
    """The graphs of one network: one, or one for each mode that makes a difference.

    Args:
        graphs: From the mode flags of the ``mode_dependent`` modules to the graph that holds under them.
        mode_dependent: Paths of the modules whose ``training`` flag decides what the forward does.
        constants: Tensors that the forward makes itself, by the attribute under which graphs refer to them.
        traced_modules: Paths of the modules whose forwards were traced through; the root's is ``""``.
    """

    graphs: dict[Flags, fx.Graph]
    mode_dependent: tuple[str, ...]
    constants: dict[str, torch.Tensor]
    traced_modules: frozenset[str]

    def names(self) -> list[str]:
        """Every name in the graphs, in the order of execution."""
        nodes = (node for graph in self.graphs.values() for node in graph.nodes)
        return list(dict.fromkeys(node.meta["point"] for node in nodes if "point" in node.meta))


def module_paths(model: nn.Module) -> dict[str, str]:
    """From every module's name, aliases of shared modules included, to its first path in the tree."""
    first: dict[nn.Module, str] = {}
    paths: dict[str, str] = {}

    def walk(module: nn.Module, path: str) -> None:
        paths[escape(path)] = first.setdefault(module, path)
        for name, child in module._modules.items():
            if child is not None:
                walk(child, f"{path}.{name}" if path else name)

    walk(model, "")  # named_modules() takes three times as long, and this is called for every cut
    return paths


def around_aliases(paths: Mapping[str, str], names: Collection[str]) -> set[str]:
    """Return the modules that enclose these, wherever else in the tree they lie.

    A shared module is called from any of its places. Where one of these is not traced through, its calls
    are missing there, and the others are numbered as nowhere else.

    Args:
        paths: From every module's name to its first path, as :func:`module_paths` gives it.
        names: Of modules.
    """
    places: dict[str, list[str]] = {}
    if len(paths) == len(set(paths.values())):
        return set()
    for alias, first in paths.items():
        places.setdefault(first, []).append(alias)
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        around = {path for alias in places[paths[waiting.pop()]] for path in ancestors(alias)}
        waiting += around - found
        found |= around
    return found


def trace(
    model: nn.Module,
    traced_modules: Collection[str],
    *,
    given: Collection[str] = (),
    allow_untraceable: bool = False,
) -> Trace:
    """Trace the forwards of the ``traced_modules`` modules; every other module stays one call.

    The model is not touched: tracing runs on copies of the opened modules.

    Args:
        model: Root of the network.
        traced_modules: Paths of the modules to trace through; the root is always among them.
        given: Arguments of the root's forward that are passed though they have a default; only for
            a ``allow_untraceable`` trace.
        allow_untraceable: For a graph that is looked at and does not run: arguments with a default are left
            out, and a module whose forward cannot be traced, or only in one mode, is no failure.

    Raises:
        TracingError: A forward cannot be traced, or a graph could not take every call that it takes. The
            message names the module and what stopped the trace.
        SurgeryError: Hooks that run around every module would not run around one.
    """
    wanted = {"", *traced_modules, *(around for path in traced_modules for around in ancestors(path))}
    traced_modules = {path for path in wanted if _can_be_opened(model, path)}
    closed: set[str] = set()
    while True:
        try:
            return _trace_modes(
                model, frozenset(traced_modules), frozenset(given) if allow_untraceable else None
            )
        except TraceStopped as stopped:
            stop = stopped
        if isinstance(stop, OpaqueValueInspected):
            hidden = {stop.hidden, *ancestors(stop.hidden)}
            if closed.isdisjoint(hidden) and all(_can_be_opened(model, path) for path in hidden):
                traced_modules |= hidden
                continue
        if (
            isinstance(stop, GlobalHookError) and not allow_untraceable
        ):  # spliced in another way it would be lost as well
            raise SurgeryError(str(stop), example="handle.remove() before insert_grl(model, ...)")
        if not stop.path or (stop.path in wanted and not allow_untraceable):
            raise TracingError(str(stop), example=_workaround_hint(stop.path)) from stop.__cause__
        closed.add(stop.path)
        inside = f"{stop.path}."
        traced_modules = {
            path for path in traced_modules if path != stop.path and not path.startswith(inside)
        }


def _can_be_opened(model: nn.Module, path: str) -> bool:
    return not path or not isinstance(model.get_submodule(path), torch.jit.ScriptModule)


def _workaround_hint(path: str) -> str:
    whole = f"after={path!r}" if path else "after='block', in a model whose forward calls self.block(x)"
    return f"{whole} needs no trace of that forward"


def _trace_modes(model: nn.Module, traced_modules: frozenset[str], given: frozenset[str] | None) -> Trace:
    """Trace as the flags are now and, if a forward looks at them, with all on and all off as well."""
    constants: dict[str, torch.Tensor] = {}
    graph, read = _trace_once(model, traced_modules, given, constants)
    variants: dict[bool | None, fx.Graph] = {None: graph}
    for mode in (True, False) if read else ():
        try:
            variants[mode], also_read = _trace_once(model, traced_modules, given, constants, mode)
            read |= also_read
        except TraceStopped:
            if given is None:  # a graph for one mode only would refuse the other
                raise
    _name_nodes([variants[mode] for mode in (True, False, None) if mode in variants])
    shapes = [_structure(graph) for graph in variants.values()]
    if all(shape == shapes[0] for shape in shapes[1:]):
        return Trace({(): graph}, (), constants, traced_modules)
    mode_dependent = tuple(sorted(read))

    def flags(mode: bool | None) -> Flags:
        return tuple(model.get_submodule(p).training if mode is None else mode for p in mode_dependent)

    return Trace(
        {flags(mode): graph for mode, graph in variants.items()}, mode_dependent, constants, traced_modules
    )


def _structure(graph: fx.Graph) -> list[Any]:
    """Return what a graph computes, in a form that can be compared with another graph's."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    refer: Callable[[fx.Node], Any] = lambda node: ("node", place[node])  # noqa: E731
    return [
        (node.op, node.target, repr(map_arg(node.args, refer)), repr(map_arg(node.kwargs, refer)))
        for node in graph.nodes
    ]


def _name_nodes(graphs: Sequence[fx.Graph]) -> None:
    """Number what shares a base name; all boundaries of one call of a module are one thing.

    An item is named after what it is an item of, so it waits until that has its number.
    """
    waiting = [[node for node in graph.nodes if "base" in node.meta] for graph in graphs]
    while any(waiting):
        ready = [[node for node in row if not _waits(node)] for row in waiting]
        waiting = [[node for node in row if _waits(node)] for row in waiting]
        _number_nodes(ready)


def _waits(node: fx.Node) -> bool:
    return is_item(node) and "point" not in node.args[0].meta  # type: ignore[union-attr]


def _number_nodes(rows: Sequence[Sequence[fx.Node]]) -> None:
    things: list[list[list[fx.Node]]] = []
    for row in rows:
        called = {node.meta["base"] for node in row if node.op == "call_module" or "boundary" in node.meta}
        for node in row:  # an argument makes room for the module that has its name
            if node.op == "placeholder" and node.meta["base"] in called:
                node.meta["base"] = f"input.{node.meta['base']}"
        calls: dict[Any, list[fx.Node]] = {}
        for node in row:
            calls.setdefault(node.meta.get("call") or node, []).append(node)
        things.append(sorted(calls.values(), key=_stored))
    named = number([[(_base(nodes[0]), nodes[0].meta["line"]) for nodes in thing] for thing in things])
    for thing, names in zip(things, named, strict=True):
        for nodes, name in zip(thing, names, strict=True):
            for node in nodes:
                node.meta["point"] = name


def _stored(thing: Sequence[fx.Node]) -> tuple[bool, str]:
    """Parameters and buffers come first, by name: where one is read first depends on the mode."""
    stored = thing[0].op == "get_attr"
    return (False, str(thing[0].meta["base"])) if stored else (True, "")


def _base(node: fx.Node) -> str:
    if not is_item(node):
        return str(node.meta["base"])
    source, key = node.args
    return f"{source.meta['point']}[{key}]"  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------ one trace


def _trace_once(
    model: nn.Module,
    traced_modules: frozenset[str],
    given: frozenset[str] | None,
    constants: dict[str, torch.Tensor],
    mode: bool | None = None,
    whole: tuple[CodeType, ...] = (),
    with_math: bool = False,
) -> tuple[fx.Graph, set[str]]:
    """One trace with the flags as they are, or all set to ``mode``; and whose flags the forwards read.

    Where a function that a forward calls cannot be traced, it is traced again with that function as one
    operation. Those of ``math`` can never be; wrapping them all costs more than a small trace, so it waits
    until one is called.
    """
    tracer = Tracer(model, traced_modules, given, constants, mode, WholeFunctions(whole, with_math))
    try:
        graph = tracer.trace_root()
        if given is None:
            _refuse_state_of_calls(model, traced_modules, graph)
        _clone_written_constants(model, graph, tracer.made.nodes())
        redirect_in_place_uses(model, graph)
        return graph, tracer.mode_dependent
    except (OpaqueValueInspected, GlobalHookError):
        raise
    except Exception as error:  # user code runs in here: anything can come out of it
        failed = _code_that_failed(error)
        if isinstance(error, (TypeError, fx.proxy.TraceError)) and not with_math:
            with_math = True
        elif failed is not None and failed not in whole:
            whole = (*whole, failed)
        else:
            raise tracer.stopped(error) from error
    return _trace_once(model, traced_modules, given, constants, mode, whole, with_math)


def _refuse_state_of_calls(model: nn.Module, traced_modules: frozenset[str], graph: fx.Graph) -> None:
    """Raise an error if a forward may read what a module that it calls has left in Python."""
    called = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module")
    left = state_left_by_calls(map(model.get_submodule, traced_modules), map(model.get_submodule, called))
    if left:
        raise RuntimeError(
            f"it reads {left!r}, which a module that it calls may write, and a graph would not"
        )


def _clone_written_constants(model: nn.Module, graph: fx.Graph, made: Iterable[fx.Node]) -> None:
    """Copy, in every run, what the forward makes anew in every run and then overwrites or hands out."""
    for node in made:
        same = may_alias(model, node, lambda _: ArgumentEffects())
        written = (user for value in same for user in value.users if _writes(model, user, value))
        if next(written, None) is not None:
            with graph.inserting_after(node):
                copy = graph.call_function(torch.clone, (node,))
            node.replace_all_uses_with(copy)
            copy.args = (node,)
            copy.meta.update(line=node.meta["line"])


def _writes(model: nn.Module, user: fx.Node, value: fx.Node) -> bool:
    return user.op == "output" or value in mutated_args(model, user)


def _code_that_failed(error: Exception) -> CodeType | None:
    """Of the function, called by the innermost forward, in which tracing came to an end; None if none was."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        code: CodeType = frame.f_code
        if code is Tracer.call_module.__code__:
            return None
        function = frame.f_globals.get(code.co_name)
        is_named = isinstance(function, FunctionType) and inspect.unwrap(function).__code__ is code
        if is_named and not code.co_filename.startswith(TORCH):
            return code
    return None
