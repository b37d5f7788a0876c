"""The result of surgery: a GraphModule over the original's modules that can be copied, pickled and undone."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from grl_surgery.capture.capture import Flags, Trace
from grl_surgery.capture.code_inspection import method_that_calls_itself
from grl_surgery.capture.codegen import spell_keywords
from grl_surgery.capture.traceable_copy import overrides_call
from grl_surgery.errors import SurgeryError, TracingError
from grl_surgery.isolation.module_tree import modules_by_path
from grl_surgery.isolation.shared_copy import COMPILED, ORIGINAL, share_copy
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.points import Edge, escape, split_items
from grl_surgery.surgery.call_hooks import remove_call_hooks
from grl_surgery.surgery.head_outputs import heads_that_keep

__all__ = [
    "Cut",
    "SplicedModule",
    "Surgery",
    "as_original",
    "disassemble",
    "free_name",
    "refuse_as_graph",
    "surgery_of",
]


@dataclass(frozen=True)
class Cut:
    """One thing that was spliced in.

    Args:
        kind: ``"after"`` a point, ``"before"`` a point, on one ``"edge"``, or a ``"head"`` after a point.
            A call that was adopted has a reversal ``"instead"``. A ``"probe"`` behind a point only looks at
            the value.
        at: Name of the point, or the edge.
        module: Attribute of the spliced network under which the reversal or the head lives.
        condition: Name of the point whose class logits condition a head, or whose mask its pool reads.
        operations: Which points are operations of a forward that cannot be traced: the point, the path of the
            module around it, the operation's name, and how many of that name run before it.
        mask: Name of the point whose mask the pool of a conditioned head reads.
        also: Further points that the same head reads, each in a call of its own.
        keeps_logits: Whether a head keeps its logits, so that the network returns what it did without it.
    """

    kind: Literal["after", "before", "edge", "head", "instead", "probe"]
    at: str | Edge
    module: str
    condition: str | None = None
    operations: tuple[tuple[str, str, str, int], ...] = ()
    mask: str | None = None
    also: tuple[str, ...] = ()
    keeps_logits: bool = False

    @property
    def points(self) -> tuple[str, ...]:
        """Names of the points that it needs: one, both ends of an edge, or all that a head reads."""
        if isinstance(self.at, Edge):
            return (self.at.source, self.at.target)
        return tuple(point for call in self.calls for point in call)

    @property
    def calls(self) -> list[list[str]]:
        """The points that a head reads, for each of its calls."""
        assert isinstance(self.at, str)
        first = [self.at, *(point for point in (self.condition, self.mask) if point)]
        return [first, *([point] for point in self.also)]

    @property
    def has_items(self) -> bool:
        """Whether it is about an item of a value."""
        return any(split_items(point)[1] for point in self.points)

    @property
    def is_head(self) -> bool:
        """Whether it adds logits to what the network returns."""
        return self.kind == "head"

    def is_at_operation(self, point: str) -> bool:
        """Whether one of its points, or what that is an item of, is an operation that no graph shows."""
        return split_items(point)[0] in {name for name, *_ in self.operations}

    def within(self, path: str) -> Cut:
        """The same cut as a network names it that has this one at ``path``."""
        if not path:
            return self
        place = escape(path)
        if isinstance(self.at, Edge):
            return replace(self, at=self.at.within(f"{place}."))
        return replace(self, at=f"{place}.{self.at}")

    def __str__(self) -> str:
        return f"{ {'edge': 'on', 'head': 'after'}.get(self.kind, self.kind) } {self.at}"


def free_name(name: str, taken: Container[str], model: nn.Module) -> str:
    """``name``, or ``name_2`` and so on where that is taken, or the model or any result has it already."""
    candidates = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(2)))
    return next(
        free for free in candidates if free not in taken and free not in _TAKEN and not hasattr(model, free)
    )


@dataclass(frozen=True)
class Surgery:
    """The record of what was done to a network.

    Args:
        cuts: What was spliced in, in order.
        traced: The graphs, edited; of the constants only the names. None where the network keeps its own
            class.
        hooked: Attributes of what hooks at the calls of modules run, and no graph.
    """

    cuts: tuple[Cut, ...]
    traced: Trace | None = None
    hooked: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        """Attributes under which the reversals and heads live."""
        return [cut.module for cut in self.cuts]

    @property
    def in_graph(self) -> list[Cut]:
        """The cuts that the graph has."""
        return [cut for cut in self.cuts if cut.module not in self.hooked]


def surgery_of(network: nn.Module) -> Surgery | None:
    """Return what was done to a network itself, not to a module inside it; None where nothing was."""
    done: Surgery | None = network.__dict__.get("grl_surgery")
    return done


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
        self.__dict__.update(
            (key, original.__dict__[key]) for key in (*_SHARED, *_plain_attributes(original))
        )
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

    @property
    def grl_traced(self) -> Trace:
        """The graphs, one for each mode that makes a difference."""
        traced = self.grl_surgery.traced
        assert traced is not None
        return traced

    # -- modes

    def train(self, mode: bool = True) -> SplicedModule:
        """Set the mode of every module as the original's own ``train`` does."""
        self.grl_original.train(mode)
        self.training = self.grl_original.training
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
        """The network that the graphs were traced from, with what was spliced in among its children."""
        original: nn.Module = self.__dict__[ORIGINAL]
        return original

    def __getattr__(self, name: str) -> Any:
        """Methods and attributes of the original's class; what is called runs with what was spliced in."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get(ORIGINAL)
            if original is None or name.startswith("__") or name in _OF_THE_GRAPH:
                raise
            found = inspect.getattr_static(type(original), name, _MISSING)
            if found is _MISSING and type(original).__getattr__ is nn.Module.__getattr__:
                raise
        value = getattr(original, name)
        if isinstance(found, (staticmethod, classmethod, type)) or not _is_bound(value, original):
            return value
        return _method(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the tensors of the original and of the result the same objects."""
        surgery = self.__dict__.get("grl_surgery")
        if surgery is None or name in _NAMES or name in self._modules or not hasattr(self.grl_original, name):
            super().__setattr__(name, value)
            return
        setattr(self.grl_original, name, value)
        super().__setattr__(name, value)

    # -- checkpoints: as the original reads and writes them

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's state, and that of the heads."""
        with as_original(self) as network:
            return network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Take over what :meth:`state_dict` gave, of this network or of the original."""
        with as_original(self) as network:
            return network.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Called where this network is a part of the one that is loaded."""
        with as_original(self) as network:
            network._load_from_state_dict(*args, **kwargs)

    # -- graphs

    @property
    def graph(self) -> fx.Graph:
        """The graph that runs in the present mode."""
        surgery = self.__dict__.get("grl_surgery")
        graph = self.grl_traced.graphs.get(_flags(self), self._graph) if surgery else self._graph
        _own(graph, self)
        return graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        self._graph = graph
        surgery = self.__dict__.get("grl_surgery")
        if surgery is not None:  # GraphModule.__init__ comes before there is anything to write
            traced = replace(self.grl_traced, graphs={**self.grl_traced.graphs, _flags(self): graph})
            self.__dict__["grl_surgery"] = replace(surgery, traced=traced)
            self.recompile()

    def recompile(self) -> Any:
        """Write the forward from the graph; with more than one, write each and choose by the mode."""
        self._graph = self.graph
        code = super().recompile()
        traced = self.grl_traced
        if not traced.mode_dependent:
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
        """Coefficients, which DistributedDataParallel need not broadcast: every process sets them itself."""
        layers = (path for path, module in self.named_modules() if isinstance(module, GradientReversal))
        return [*self.grl_original.__dict__.get(_IGNORED, ()), *(f"{path}.coeff" for path in layers)]

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: list[str]) -> None:
        self.grl_original.__dict__[_IGNORED] = names

    # -- copies

    def __prepare_scriptable__(self) -> SplicedModule:
        """Refuse torch.jit.script, which asks here first and cannot read a generated forward."""
        raise SurgeryError(
            "torch.jit.script cannot read a spliced network; trace it instead, which keeps the reversals",
            example="torch.jit.trace(m, example_inputs)",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        graphs = {flags: pack(graph) for flags, graph in self.grl_traced.graphs.items()}
        traced = replace(self.grl_traced, graphs={})
        attributes = {key: value for key, value in self.__dict__.items() if key not in _REBUILT}
        done = replace(self.grl_surgery, traced=traced)
        return _rebuild, (self.grl_original, done, graphs, attributes)

    def __deepcopy__(self, memo: dict[int, Any]) -> SplicedModule:
        twin = _rebuild(*copy.deepcopy(self.__reduce__()[1], memo))
        memo[id(self)] = twin
        return twin

    def __copy__(self) -> SplicedModule:
        _, (original, *rest) = self.__reduce__()
        return _rebuild(share_copy(original), *rest)


def disassemble(network: nn.Module) -> tuple[nn.Module, list[Cut], dict[str, nn.Module]]:
    """A copy of the network before its surgery over the same tensors, its cuts, and what was spliced in.

    A network that was not cut itself comes back as a copy, with no cuts.
    """
    done = surgery_of(network)
    if done is None:
        return share_copy(network), [], {}
    tree = share_copy(network.grl_original if isinstance(network, SplicedModule) else network)
    for name in done.traced.constants if done.traced else ():
        del tree._buffers[name]
        tree._non_persistent_buffers_set.discard(name)
    modules: dict[str, Any] = {name: tree._modules.pop(name) for name in done.names}
    for name in heads_that_keep(network):
        modules[name].forget_logits()
    tree.__dict__["_modules"] = dict(tree._modules)
    tree.__dict__.pop("grl_surgery", None)
    remove_call_hooks(tree, modules.values())
    tree.training = network.training
    return tree, list(done.cuts), modules


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


def _children(network: SplicedModule) -> dict[str, nn.Module | None]:
    """The original's children."""
    spliced = network.grl_surgery.names
    return {name: module for name, module in network._modules.items() if name not in spliced}


@contextlib.contextmanager
def as_original(network: SplicedModule) -> Iterator[nn.Module]:
    """The original with what was spliced in among its children; what it sets on itself is set here too."""
    original = network.grl_original
    if isinstance(original, torch.jit.ScriptModule):
        yield super(SplicedModule, network)  # type: ignore[misc]
        return
    yield original
    network.__dict__.update((key, original.__dict__[key]) for key in _plain_attributes(original))


def _is_bound(value: Any, original: nn.Module) -> bool:
    """Whether a value is a function that gets the network: a method, a partial one, one with a memory."""
    held = value.func if isinstance(value, functools.partial) else value
    return getattr(held, "__self__", None) is original


def _method(network: SplicedModule, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the original's class that can be called on the graph."""

    @functools.wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        from grl_surgery.surgery.other_methods import call_method  # it makes networks with hooks

        return call_method(network, name, args, kwargs)

    return called


def _flags(network: SplicedModule) -> Flags:
    """The flags that decide which graph runs."""
    return tuple(network.get_submodule(path).training for path in network.grl_traced.mode_dependent)


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
    original = network.grl_original
    plain: nn.Module = object.__new__(type(original))
    plain.__dict__.update(original.__dict__, _modules=_children(network))
    return plain


def refuse_as_graph(model: nn.Module) -> None:
    """Refuse a network that would lose something of its own if a graph took its place.

    Raises:
        TracingError: A name is one that torch.fx or we need, or that code cannot spell; or the class
            overrides ``__call__``, or has a method that calls the network, as ``training_step`` does.
    """
    held = (_plain_attributes(model), model._parameters, model._buffers, model._modules)
    taken = [name for names in held for name in names if name in _TAKEN and not _is_meta(model, name)]
    if taken:
        reason = f"its attribute {taken[0]!r} would hide what a torch.fx.GraphModule has under that name"
    elif odd := [path for path in modules_by_path(model) if not _UNSPELLABLE.isdisjoint(path)]:
        reason = f"the name of its module {odd[0]!r} cannot stand in the code of one"
    elif overrides_call(model):
        reason = "its class overrides __call__, which a graph would lose"
    elif caller := method_that_calls_itself(type(model)):
        reason = f"its method {caller!r} calls the network, and would call it past the graph"
    else:
        return
    raise TracingError(
        f"a graph cannot take the place of {type(model).__name__}: {reason}",
        example="after='block', the path of a module in it: what lies inside needs no graph of the whole",
    )


_UNSPELLABLE = frozenset('"\\\n')


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
# What GraphModule looks up on itself.
_OF_THE_GRAPH = frozenset({"grl_surgery", "grl_original", "grl_traced", ORIGINAL, "_graph", "_code"})
_MISSING = object()
# What a copy makes anew.
_REBUILT = frozenset({*_SHARED, *_EMPTY.__dict__, COMPILED, ORIGINAL, "grl_surgery"}) - {"training", "meta"}


def _rebuild(
    original: nn.Module, done: Surgery, graphs: Mapping[Flags, PackedGraph], attributes: Mapping[str, Any]
) -> SplicedModule:
    assert done.traced is not None
    buffers = dict(original.named_buffers())
    constants = {name: buffers[name] for name in done.traced.constants}
    unpacked = {flags: unpack(packed) for flags, packed in graphs.items()}
    traced = replace(done.traced, graphs=unpacked, constants=constants)
    module = SplicedModule(original, traced, done.cuts, {})
    module.__dict__["grl_surgery"] = replace(module.grl_surgery, hooked=done.hooked)
    module.__dict__.update(attributes)
    return module


def _forward_by_mode(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward of a network that computes something else in another mode."""
    flags = _flags(self)
    forward: Callable[..., Any] | None = self.grl_variants.get(flags)
    if forward is not None:
        return forward(self, *args, **kwargs)
    mode_dependent = self.grl_traced.mode_dependent
    modes = (
        f"{path or 'the root'}.training={flag}" for path, flag in zip(mode_dependent, flags, strict=True)
    )
    raise TracingError(
        f"there is no graph for {', '.join(modes)}: surgery traced the mode of that moment, all on, and all "
        "off",
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
