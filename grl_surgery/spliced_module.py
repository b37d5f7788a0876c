"""The result of surgery: a GraphModule over the original's modules that can be copied, pickled and undone."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from grl_surgery.errors import TracingError
from grl_surgery.forward_text import spell_keywords
from grl_surgery.points import Edge, escape
from grl_surgery.reversal import GradientReversal
from grl_surgery.sharing import COMPILED, ORIGINAL, share_copy
from grl_surgery.trace_copy import overrides_call
from grl_surgery.tracer import KINDS, check_fixed, check_kind
from grl_surgery.tracing import Flags, Trace

# To torch they are dead code, since nothing uses what they return.
fx.has_side_effect(check_fixed)
fx.has_side_effect(check_kind)

__all__ = ["Cut", "SplicedModule", "Surgery", "free_name", "refuse_as_graph", "taken_apart"]


@dataclass(frozen=True)
class Cut:
    """One thing that was spliced in.

    Args:
        kind: ``"after"`` a point, ``"before"`` a point, on one ``"edge"``, or a ``"head"`` after a point.
            Where the root cannot be traced, a head is ``"tapped"``: the value comes out of the inside through
            a ``"tap"`` at the point. A call that was adopted has a reversal ``"instead"``. A ``"probe"``
            behind a point only looks at the value.
        at: Name of the point, or the edge. ``""``, or ``"[0]"``, is what leaves the network,
            or one item of it.
        module: Attribute of the spliced network under which the reversal or the head lives; for a tap, the
            head that reads it.
        condition: Name of the point whose class logits condition a head.
    """

    kind: Literal["after", "before", "edge", "head", "tapped", "tap", "instead", "probe"]
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
    """``name``, or ``name_2`` and so on where that is taken, or the model or any result has it already."""
    candidates = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(2)))
    return next(
        free for free in candidates if free not in taken and free not in _TAKEN and not hasattr(model, free)
    )


@dataclass(frozen=True)
class Surgery:
    """What was done to a network.

    Args:
        cuts: What was spliced in, in order.
        traced: The graphs, edited; of the constants only the names.
    """

    cuts: tuple[Cut, ...]
    traced: Trace

    @property
    def is_opaque(self) -> bool:
        """Whether the graph is one call of the original's own forward."""
        return "" not in self.traced.opened

    @property
    def names(self) -> list[str]:
        """Attributes under which the reversals and heads live."""
        return [cut.module for cut in self.cuts if cut.kind != "tap"]

    @property
    def arguments(self) -> dict[str, type]:
        """The classes of those arguments of forward that stayed arguments though they may have a default."""
        kept: dict[str, type] = {}
        for node in next(iter(self.traced.graphs.values())).nodes:
            if node.op != "placeholder":
                continue
            name = str(node.target).lstrip("*")
            kinds = (KINDS[user.args[2]] for user in node.users if user.target is check_kind)
            if all(user.target is not check_fixed for user in node.users):
                kept[name] = next(kinds, torch.Tensor)
            elif not node.args:  # an argument without a default, which was None
                kept[name] = type(None)
        return kept


class SplicedModule(fx.GraphModule):
    """A network with reversals and heads in it.

    The forward is generated code; everything that it calls is the original's: same classes, same names, same
    parameters. The original's own tree is kept (without its tensors being copied), so that ``train()`` does
    what the original's ``train()`` does and surgery can be undone. Attributes of our own begin with ``grl_``,
    to stay out of the way of the network's.

    Args:
        original: The network that the graphs were traced from; it becomes part of the result.
        traced: Its graphs, edited.
        cuts: What was spliced in, in order.
        modules: The spliced modules by name.
    """

    grl_surgery: Surgery

    def __init__(
        self, original: nn.Module, traced: Trace, cuts: Sequence[Cut], modules: Mapping[str, nn.Module]
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=type(original).__name__)
        self.__dict__[ORIGINAL] = original
        if "" in traced.opened:
            self.__dict__.update(
                (key, original.__dict__[key]) for key in (*_SHARED, *_plain_attributes(original))
            )
        else:  # the original's forward runs, and must not meet the spliced modules among its children
            self.__dict__.update((key, original.__dict__[key]) for key in _SHARED)
            self.__dict__["_modules"] = dict(original._modules)
            if overrides_call(original):  # which runs them itself
                self.__dict__.update((key, OrderedDict()) for key in _AROUND_FORWARD)
        self.training = original.training
        for name, module in modules.items():
            self.add_module(name, module)
        for name, tensor in traced.constants.items():
            self.register_buffer(name, tensor, persistent=False)
        for graph in traced.graphs.values():
            spell_keywords(graph)
        names_only = replace(traced, constants=dict.fromkeys(traced.constants, torch.empty(0)))
        self.__dict__["grl_surgery"] = Surgery(tuple(cuts), names_only)
        self._graph = next(iter(traced.graphs.values()))
        _offer_container(type(self), type(original))
        self.recompile()

    # -- modes

    def train(self, mode: bool = True) -> SplicedModule:
        """Set the mode of every module as the original's own ``train`` does."""
        self.grl_original.train(mode)
        self.training = self.grl_original.training
        if self.grl_surgery.is_opaque:
            for module in _spliced(self).values():
                module.train(mode)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SplicedModule:
        # The original shares both; torch moves a parameter in place, but puts another buffer where one was.
        parts = [module for module in self.modules() if not isinstance(module, torch.jit.ScriptModule)]
        held = [(part._buffers, dict(part._buffers)) for part in parts if part._buffers]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not torch.__future__.get_overwrite_module_params_on_conversion():
            for buffers, before in held:
                buffers.update((name, _in_place(tensor, buffers[name])) for name, tensor in before.items())
        return self

    # -- the original

    @property
    def grl_original(self) -> nn.Module:
        """The network that the graphs were traced from; where it is not opaque, with what was spliced in."""
        original: nn.Module = self.__dict__[ORIGINAL]
        return original

    @property
    def grl_whole(self) -> nn.Module:
        """The original, for a graph that calls it: with this network's mode and children."""
        original = self.grl_original
        if self.grl_surgery.is_opaque:  # torch.jit.trace reads every property of any network
            original.training = self.training
            _set_children(original, _children(self))
        return original

    @property
    def __class__(self) -> type:
        """What ``isinstance`` is told: a forward may ask for the class of a child that runs as it was."""
        surgery, original = self.__dict__.get("grl_surgery"), self.__dict__.get(ORIGINAL)
        if surgery is None or not surgery.is_opaque or isinstance(original, torch.jit.ScriptModule):
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

    def __getattr__(self, name: str) -> Any:
        """Attributes and methods of an original whose own forward runs are the original's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            surgery = self.__dict__.get("grl_surgery")
            if surgery is None or not surgery.is_opaque or name.startswith("__") or name in _OF_THE_GRAPH:
                raise
            return getattr(self.__dict__[ORIGINAL], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What is the original's stays one and the same there and here."""
        surgery = self.__dict__.get("grl_surgery")
        if surgery is None or name in _NAMES or name in self._modules or not hasattr(self.grl_original, name):
            super().__setattr__(name, value)
            return
        setattr(self.grl_original, name, value)
        if not surgery.is_opaque:
            super().__setattr__(name, value)

    # -- checkpoints: as the original reads and writes them

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's state, and that of the heads."""
        with _complete(self) as network:
            return network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Take over what :meth:`state_dict` gave, of this network or of the original."""
        with _complete(self) as network:
            return network.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Called where this network is a part of the one that is loaded."""
        with _complete(self) as network:
            network._load_from_state_dict(*args, **kwargs)

    # -- graphs

    @property
    def graph(self) -> fx.Graph:
        """The graph that runs in the present mode."""
        surgery = self.__dict__.get("grl_surgery")
        graph = surgery.traced.graphs.get(_flags(self), self._graph) if surgery else self._graph
        _own(graph, self)
        return graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        self._graph = graph
        surgery = self.__dict__.get("grl_surgery")
        if surgery is not None:  # GraphModule.__init__ comes before there is anything to write
            traced = replace(surgery.traced, graphs={**surgery.traced.graphs, _flags(self): graph})
            self.__dict__["grl_surgery"] = replace(surgery, traced=traced)
            self.recompile()

    def recompile(self) -> Any:
        """Write the forward from the graph; with more than one, write each and choose by the mode."""
        self._graph = self.graph
        code = super().recompile()
        traced = self.grl_surgery.traced
        if not traced.steering:
            return code
        current, kind = self._graph, type(self)
        variants = {}
        for flags, graph in traced.graphs.items():
            self._graph = graph
            super().recompile()
            variants[flags] = kind.forward
        self._graph = current
        kind.grl_variants = variants  # type: ignore[attr-defined]
        kind.forward = _forward_by_mode
        return code

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel need not broadcast: coefficients, which every process sets itself."""
        layers = (path for path, module in self.named_modules() if isinstance(module, GradientReversal))
        return [*self.grl_original.__dict__.get(_IGNORED, ()), *(f"{path}.coeff" for path in layers)]

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: list[str]) -> None:
        self.grl_original.__dict__[_IGNORED] = names

    # -- copies

    def __reduce__(self) -> tuple[Any, ...]:
        surgery = self.grl_surgery
        graphs = {flags: pack(graph) for flags, graph in surgery.traced.graphs.items()}
        traced = replace(surgery.traced, graphs={})
        attributes = {key: value for key, value in self.__dict__.items() if key not in _REBUILT}
        if surgery.is_opaque:
            return _rebuild, (self.grl_whole, traced, graphs, surgery.cuts, attributes, _spliced(self))
        return _rebuild, (self.grl_original, traced, graphs, surgery.cuts, attributes, {})

    def __deepcopy__(self, memo: dict[int, Any]) -> SplicedModule:
        twin = _rebuild(*copy.deepcopy(self.__reduce__()[1], memo))
        memo[id(self)] = twin
        return twin

    def __copy__(self) -> SplicedModule:
        _, (original, traced, graphs, cuts, attributes, modules) = self.__reduce__()
        if self.grl_surgery.is_opaque:
            original, modules = taken_apart(self)
        return _rebuild(share_copy(original), traced, graphs, cuts, attributes, modules)


def taken_apart(network: SplicedModule) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The original's tree over the same tensors, and what was spliced in, by name: copies of both."""
    if network.grl_surgery.is_opaque:
        twin: Any = share_copy(network)
        return twin.grl_whole, _spliced(twin)
    tree = share_copy(network.grl_original)
    for name in network.grl_surgery.traced.constants:
        del tree._buffers[name]
        tree._non_persistent_buffers_set.discard(name)
    modules = {name: tree._modules.pop(name) for name in network.grl_surgery.names}
    tree.training = network.training
    return tree, modules  # type: ignore[return-value]


def _in_place(tensor: torch.Tensor | None, moved: torch.Tensor | None) -> torch.Tensor | None:
    """``tensor`` with the content of ``moved``; where torch cannot exchange it, as with meta, ``moved``."""
    if tensor is None or moved is None or type(moved) is not type(tensor):
        return moved
    with contextlib.suppress(RuntimeError):
        tensor.data = moved
        return tensor
    return moved


def _own(graph: fx.Graph, network: SplicedModule) -> None:
    """Tell a graph whose modules it calls; it does not keep the network alive when its last user goes."""
    known = weakref.ref(graph)

    def forget(_: Any) -> None:
        if (left := known()) is not None:
            left.owning_module = None

    graph.owning_module = weakref.proxy(network, forget)  # type: ignore[assignment]


def _spliced(network: SplicedModule) -> dict[str, nn.Module]:
    """What was spliced in, by name."""
    return {name: network._modules[name] for name in network.grl_surgery.names}  # type: ignore[misc]


def _children(network: SplicedModule) -> dict[str, nn.Module | None]:
    """The original's children."""
    spliced = network.grl_surgery.names
    return {name: module for name, module in network._modules.items() if name not in spliced}


def _set_children(original: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
    if original._modules != children and not isinstance(original, torch.jit.ScriptModule):
        original._modules.clear()
        original._modules.update(children)


@contextlib.contextmanager
def _complete(network: SplicedModule) -> Iterator[nn.Module]:
    """The original with what was spliced in among its children; what it sets on itself is set here too."""
    original = network.grl_original
    if isinstance(original, torch.jit.ScriptModule):
        yield super(SplicedModule, network)  # type: ignore[misc]
    elif network.grl_surgery.is_opaque:
        _set_children(original, network._modules)
        try:
            yield original
        finally:
            _set_children(original, _children(network))
    else:
        yield original
        network.__dict__.update((key, original.__dict__[key]) for key in _plain_attributes(original))


def _flags(network: SplicedModule) -> Flags:
    """The flags that decide which graph runs."""
    return tuple(network.get_submodule(path).training for path in network.grl_surgery.traced.steering)


# ------------------------------------------------------------------------- what a result has of its original


def _offer_container(kind: type, original: type) -> None:
    """Let the class of one result be indexed and iterated over as its original's class is."""
    if not issubclass(original, torch.jit.ScriptModule):  # which has them all, to refuse most
        for name in _CONTAINER:
            if hasattr(original, name):
                setattr(kind, name, _on_the_original(getattr(original, name)))


def _on_the_original(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def called(self: SplicedModule, *args: Any) -> Any:
        return method(_without_spliced(self), *args)

    return called


def _without_spliced(network: SplicedModule) -> nn.Module:
    """The original with its own children only."""
    if network.grl_surgery.is_opaque:
        return network.grl_whole
    original = network.grl_original
    plain: nn.Module = object.__new__(type(original))
    plain.__dict__.update(original.__dict__, _modules=_children(network))
    return plain


def refuse_as_graph(model: nn.Module) -> None:
    """Refuse a network that would lose something of its own if a graph took its place.

    Raises:
        TracingError: A name is one that torch.fx or we need, or that code cannot spell; or the class
            overrides ``__call__``.
    """
    held = (_plain_attributes(model), model._parameters, model._buffers, model._modules)
    taken = [name for names in held for name in names if name in _TAKEN and not _is_meta(model, name)]
    if taken:
        reason = f"its attribute {taken[0]!r} would hide what a torch.fx.GraphModule has under that name"
    elif odd := [path for path, _ in model.named_modules() if re.search(r'["\\\n]', path)]:
        reason = f"the name of its module {odd[0]!r} cannot stand in the code of one"
    elif overrides_call(model):
        reason = "its class overrides __call__, which a graph would lose"
    else:
        return
    raise TracingError(
        f"a graph cannot take the place of {type(model).__name__}: {reason}",
        example="after='block', the path of a module in it: what lies inside needs no graph of the whole",
    )


def _is_meta(model: nn.Module, name: str) -> bool:
    """Whether it is a dictionary under the name under which a GraphModule keeps one for its user."""
    return name == "meta" and type(model.__dict__.get(name)) is dict


def _plain_attributes(model: nn.Module) -> set[str]:
    """Names of what a network keeps for itself beside modules and tensors."""
    return model.__dict__.keys() - (_OF_GRAPH_MODULES if isinstance(model, fx.GraphModule) else _OF_MODULES)


_EMPTY = fx.GraphModule(nn.Module(), fx.Graph())
_OF_MODULES = frozenset(nn.Module().__dict__)
_OF_GRAPH_MODULES = frozenset({*_EMPTY.__dict__, "_in_spec", "_out_spec"}) - {"meta"}
_IGNORED = "_ddp_params_and_buffers_to_ignore"
# Every name that a result has for itself, and those that other modules have not.
_NAMES = frozenset({*dir(_EMPTY), *dir(SplicedModule), ORIGINAL, "grl_surgery", "grl_variants"})
_TAKEN = _NAMES - {*dir(nn.Module()), _IGNORED}
_CONTAINER = ("__getitem__", "__len__", "__iter__", "__contains__", "__bool__")
# What the result and the original's tree hold in common, and those of the hooks that run around a forward.
_HOOKS = tuple(key for key in nn.Module().__dict__ if "hook" in key)
_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *_HOOKS)
_AROUND_FORWARD = tuple(key for key in _HOOKS if "ward" in key and nn.Module().__dict__[key] == {})
# What GraphModule looks up on itself.
_OF_THE_GRAPH = frozenset({"grl_surgery", "grl_whole", "grl_original", ORIGINAL, "_graph", "_code"})
_PER_CLASS = frozenset({"__dict__", "__weakref__"})
# What a copy makes anew.
_REBUILT = frozenset({*_SHARED, *_EMPTY.__dict__, COMPILED, ORIGINAL, "grl_surgery"}) - {"training", "meta"}


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
    flags = _flags(self)
    forward: Callable[..., Any] | None = self.grl_variants.get(flags)
    if forward is not None:
        return forward(self, *args, **kwargs)
    traced: Trace = self.grl_surgery.traced
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
