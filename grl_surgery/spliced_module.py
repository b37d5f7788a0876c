"""The result of surgery: a GraphModule over the original's modules that can be copied, pickled and undone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from grl_surgery.errors import TracingError
from grl_surgery.points import Edge, escape
from grl_surgery.reversal import GradientReversal
from grl_surgery.sharing import share_copy
from grl_surgery.tracer import KINDS, check_fixed, check_kind
from grl_surgery.tracing import Flags, Trace

__all__ = ["Cut", "SplicedModule", "free_name"]


@dataclass(frozen=True)
class Cut:
    """One thing that was spliced in.

    Args:
        kind: ``"after"`` a point, ``"before"`` a point, on one ``"edge"``, or a ``"head"`` after a point.
            Where the root cannot be traced, a head is ``"tapped"``: the value comes out of the inside through
            a ``"tap"`` at the point. A call that was adopted has a reversal ``"instead"``.
        at: Name of the point, or the edge. ``""``, or ``"[0]"``, is what leaves the network,
            or one item of it.
        module: Attribute of the spliced network under which the reversal or the head lives; for a tap, the
            head that reads it.
        condition: Name of the point whose class logits condition a head.
    """

    kind: Literal["after", "before", "edge", "head", "tapped", "tap", "instead"]
    at: str | Edge
    module: str
    condition: str | None = None

    @property
    def points(self) -> tuple[str, ...]:
        """Names of the points that it needs: one, both ends of an edge, or a head's two."""
        ends = (self.at.source, self.at.target) if isinstance(self.at, Edge) else (self.at,)
        return (*ends, self.condition) if self.condition else ends

    @property
    def is_head(self) -> bool:
        """Whether it adds logits to what the network returns."""
        return self.kind in ("head", "tapped")

    @property
    def is_at_output(self) -> bool:
        """Whether it is about what leaves the network as a whole."""
        return self.at[:1] in ("", "[") if isinstance(self.at, str) else False

    def within(self, path: str) -> Cut:
        """The same cut as a network names it that has this one at ``path``."""
        if not path:
            return self
        place = escape(path)
        if isinstance(self.at, Edge):
            return replace(self, at=self.at.within(f"{place}."))
        return replace(self, at=place + self.at if self.is_at_output else f"{place}.{self.at}")

    def __str__(self) -> str:
        word = {"edge": "on", "head": "after", "tapped": "after"}.get(self.kind, self.kind)
        return f"{word} {f'the output{self.at}' if self.is_at_output else self.at}"


def free_name(name: str, taken: Container[str], model: nn.Module) -> str:
    """``name``, or ``name_2`` and so on where that is taken or an attribute of the model."""
    candidates = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(2)))
    return next(free for free in candidates if free not in taken and not hasattr(model, free))


class SplicedModule(fx.GraphModule):
    """A network with reversals and heads in it.

    The forward is generated code; everything that it calls is the original's: same classes, same names, same
    parameters. The original's own tree is kept (without its tensors being copied), so that ``train()`` does
    what the original's ``train()`` does and surgery can be undone.

    Args:
        original: The network that the graphs were traced from; it becomes part of the result.
        traced: Its graphs, edited.
        cuts: What was spliced in, in order.
        modules: The spliced modules by name.
    """

    _graphs: dict[Flags, fx.Graph]
    _original: nn.Module
    cuts: tuple[Cut, ...]

    def __init__(
        self, original: nn.Module, traced: Trace, cuts: Sequence[Cut], modules: Mapping[str, nn.Module]
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=type(original).__name__)
        self.__dict__["_original"] = original
        if "" in traced.opened:
            own = {*self.__dict__, "training"} - set(_SHARED)
            self.__dict__.update((key, value) for key, value in original.__dict__.items() if key not in own)
        else:  # the original's forward runs, and must not meet the spliced modules among its children
            self.__dict__.update((key, original.__dict__[key]) for key in _SHARED)
            self.__dict__["_modules"] = dict(original._modules)
        self.training = original.training
        for name, module in modules.items():
            self.add_module(name, module)
        for name, tensor in traced.constants.items():
            self.register_buffer(name, tensor, persistent=False)
        self.cuts = tuple(cuts)
        self._traced = replace(traced, constants=dict.fromkeys(traced.constants, torch.empty(0)))
        self._graphs = traced.graphs
        self._graph = next(iter(traced.graphs.values()))
        self.recompile()

    # -- modes

    def train(self, mode: bool = True) -> SplicedModule:
        """Set the mode of every module as the original's own ``train`` does."""
        self._original.train(mode)
        self.training = self._original.training
        if self.is_opaque:
            for module in self._spliced().values():
                module.train(mode)
        return self

    # -- where the original's own forward runs

    @property
    def is_opaque(self) -> bool:
        """Whether the graph is one call of the original's own forward."""
        return "" not in self._traced.opened

    @property
    def whole(self) -> nn.Module:
        """The original, for a graph that calls it: with this network's mode and children."""
        original: nn.Module = self.__dict__["_original"]
        original.training = self.training
        spliced = self._spliced()
        children = {name: module for name, module in self._modules.items() if name not in spliced}
        if original._modules != children and not isinstance(original, torch.jit.ScriptModule):
            original._modules.clear()
            original._modules.update(children)
        return original

    @property
    def __class__(self) -> type:
        """What ``isinstance`` is told: a forward may ask for the class of a child that runs as it was."""
        traced, original = self.__dict__.get("_traced"), self.__dict__.get("_original")
        if traced is None or "" in traced.opened or isinstance(original, torch.jit.ScriptModule):
            return type(self)
        return type(original)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        """FSDP gives a module a class that also inherits from the one that it was told."""
        told = self.__class__
        bases = tuple(type(self) if base is told else base for base in kind.__bases__)
        if told is not type(self) and told in kind.__bases__:
            kind = type(kind.__name__, bases, {k: v for k, v in kind.__dict__.items() if k not in _PER_CLASS})
        object.__dict__["__class__"].__set__(self, kind)

    def _spliced(self) -> dict[str, nn.Module]:
        """What was spliced in, by name."""
        names = (cut.module for cut in self.cuts if cut.kind != "tap")
        return {name: self._modules[name] for name in names}  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        """Attributes and methods of an original whose own forward runs are the original's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            traced = self.__dict__.get("_traced")
            if traced is None or "" in traced.opened or name.startswith("__") or name in _OF_THE_GRAPH:
                raise
            return getattr(self.__dict__["_original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        traced = self.__dict__.get("_traced")
        if traced is not None and "" not in traced.opened and name in self._original.__dict__.keys() - _OWN:
            setattr(self._original, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def graph(self) -> fx.Graph:
        """The graph that runs in the present mode."""
        graphs = self.__dict__.get("_graphs", {})
        return graphs.get(self._flags(), self._graph) if graphs else self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        self._graph = graph
        graph.owning_module = self
        if "_graphs" in self.__dict__:  # GraphModule.__init__ comes before there is anything to write
            self._graphs[self._flags()] = graph
            self.recompile()

    @property
    def arguments(self) -> dict[str, type]:
        """The classes of those arguments of forward that stayed arguments though they may have a default."""
        kept: dict[str, type] = {}
        for node in next(iter(self._graphs.values())).nodes:
            if node.op == "placeholder" and all(user.target is not check_fixed for user in node.users):
                kinds = (KINDS[user.args[2]] for user in node.users if user.target is check_kind)
                kept[str(node.target).lstrip("*")] = next(kinds, torch.Tensor)
        return kept

    def _flags(self) -> Flags:
        """The flags that decide which graph runs."""
        return tuple(self.get_submodule(path).training for path in self._traced.steering)

    def recompile(self) -> Any:
        """Write the forward from the graph; with more than one, write each and choose by the mode."""
        self._graph = self.graph
        code = super().recompile()
        if not self._traced.steering:
            return code
        current, kind = self._graph, type(self)
        variants = {}
        for flags, graph in self._graphs.items():
            self._graph = graph
            super().recompile()
            variants[flags] = kind.forward
        self._graph = current
        kind._variants = variants  # type: ignore[attr-defined]
        kind.forward = _forward_by_mode
        return code

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel need not broadcast: coefficients, which every process sets itself."""
        layers = (path for path, module in self.named_modules() if isinstance(module, GradientReversal))
        return [f"{path}.coeff" for path in layers]

    # -- copies

    def __reduce__(self) -> tuple[Any, ...]:
        graphs = {flags: pack(graph) for flags, graph in self._graphs.items()}
        traced = replace(self._traced, graphs={})
        attributes = {key: value for key, value in self.__dict__.items() if key not in _REBUILT}
        if self.is_opaque:
            return _rebuild, (self.whole, traced, graphs, self.cuts, attributes, self._spliced())
        return _rebuild, (self._original, traced, graphs, self.cuts, attributes, {})

    def __deepcopy__(self, memo: dict[int, Any]) -> SplicedModule:
        twin = _rebuild(*copy.deepcopy(self.__reduce__()[1], memo))
        memo[id(self)] = twin
        return twin

    def __copy__(self) -> SplicedModule:
        _, (original, traced, graphs, cuts, attributes, modules) = self.__reduce__()
        if self.is_opaque:
            original, modules = self.taken_apart()
        return _rebuild(share_copy(original), traced, graphs, cuts, attributes, modules)

    def taken_apart(self) -> tuple[nn.Module, dict[str, nn.Module]]:
        """The original's tree over the same tensors, and what was spliced in, by name: copies of both."""
        if self.is_opaque:
            twin: Any = share_copy(self)
            return twin.whole, twin._spliced()
        tree = share_copy(self._original)
        for name in self._traced.constants:
            del tree._buffers[name]
            tree._non_persistent_buffers_set.discard(name)
        modules = {cut.module: tree._modules.pop(cut.module) for cut in self.cuts if cut.kind != "tap"}
        tree.training = self.training
        return tree, modules  # type: ignore[return-value]


# The containers that the result and the original's tree hold in common.
_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    *(key for key in nn.Module().__dict__ if key.endswith(("_hooks", "_with_kwargs", "_always_called"))),
)
# What GraphModule looks up on itself, and what is kept here although the original has it as well.
_OF_THE_GRAPH = frozenset({"_graphs", "_traced", "_original", "cuts", "whole", "_graph", "_code"})
_OWN = frozenset({*_SHARED, "_modules", "training"})
_PER_CLASS = frozenset({"__dict__", "__weakref__"})
# What a copy makes anew.
_REBUILT = frozenset(
    {*_SHARED, *fx.GraphModule(nn.Module(), fx.Graph()).__dict__, "_original", "_graphs", "_traced", "cuts"}
) - {"training", "meta"}


def _rebuild(
    original: nn.Module,
    traced: Trace,
    graphs: Mapping[Flags, PackedGraph],
    cuts: Sequence[Cut],
    attributes: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
) -> SplicedModule:
    buffers = dict(original.named_buffers())
    constants = {name: buffers[name] for name in traced.constants}
    unpacked = {flags: unpack(packed) for flags, packed in graphs.items()}
    module = SplicedModule(original, replace(traced, graphs=unpacked, constants=constants), cuts, modules)
    module.__dict__.update(attributes)
    return module


def _forward_by_mode(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward of a network that computes something else in another mode."""
    flags = self._flags()
    forward: Callable[..., Any] | None = self._variants.get(flags)
    if forward is not None:
        return forward(self, *args, **kwargs)
    traced: Trace = self._traced
    modes = (
        f"{path or 'the root'}.training={flag}" for path, flag in zip(traced.steering, flags, strict=True)
    )
    reason = traced.refused.get(flags, "surgery traced the mode of that moment, all on, and all off")
    raise TracingError(
        f"there is no graph for {', '.join(modes)}: {reason}",
        example="model.train() or model.eval(); or set the flags before insert_grl",
    )


# ------------------------------------------------------------------------------------ graphs as plain data


class _Place(NamedTuple):
    """Stands for the node at this index."""

    place: int


class PackedNode(NamedTuple):
    """One node as plain data."""

    op: str
    target: Any
    args: Any
    kwargs: Any
    name: str
    point: str | None


class PackedGraph(NamedTuple):
    """A graph as plain data, with what writes its forward."""

    nodes: list[PackedNode]
    codegen: fx.graph.CodeGen


def pack(graph: fx.Graph) -> PackedGraph:
    """A graph as data that pickles: nodes refer to each other by their places."""
    place = {node: _Place(index) for index, node in enumerate(graph.nodes)}
    nodes = [
        PackedNode(
            node.op,
            node.target,
            map_arg(node.args, place.__getitem__),
            map_arg(node.kwargs, place.__getitem__),
            node.name,
            node.meta.get("point"),
        )
        for node in graph.nodes
    ]
    return PackedGraph(nodes, graph._codegen)


def unpack(packed: PackedGraph) -> fx.Graph:
    """The graph that was packed."""
    graph = fx.Graph()
    graph.set_codegen(packed.codegen)
    nodes: list[fx.Node] = []
    for op, target, args, kwargs, name, point in packed.nodes:
        args, kwargs = _resolve(args, nodes), _resolve(kwargs, nodes)
        node = graph.create_node(op, target, args, kwargs, name)
        if point is not None:
            node.meta["point"] = point
        nodes.append(node)
    return graph


def _resolve(value: Any, nodes: Sequence[fx.Node]) -> Any:
    if isinstance(value, _Place):
        return nodes[value.place]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_resolve(item, nodes) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_resolve(item, nodes) for item in value)
    if isinstance(value, dict):
        return {key: _resolve(item, nodes) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_resolve(item, nodes) for item in (value.start, value.stop, value.step)))
    return value
