"""Finds in-place writes that a graph does not show as an edge, and who reads the memory afterwards."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any, NamedTuple

from torch import fx, nn
from torch.fx.node import map_arg
from torch.fx.operator_schemas import get_signature_for_torch_op

from grl_surgery.capture.node_uses import boundary, is_size, skip_boundaries
from grl_surgery.capture.proxies import IN_PLACE
from grl_surgery.capture.recorded_functions import FunctionCall
from grl_surgery.capture.traceable_copy import is_building_block
from grl_surgery.errors import SurgeryError
from grl_surgery.nn.nested_reversal import reverse_nested

__all__ = [
    "VIEWING",
    "ArgumentEffects",
    "hidden_writes",
    "may_alias",
    "mutated_args",
    "overwrites",
    "overwritten_later",
    "redirect_in_place_uses",
    "refuse_lost_writes",
    "refuse_unseen_reads",
]


class ArgumentEffects(NamedTuple):
    """What a module does to the memory of its arguments.

    Args:
        overwrites: It changes one in place.
        returns: What it returns may lie in the memory of one, as a dropout's result does in eval mode.
        known: Its code could be traced; otherwise it may do either.
    """

    overwrites: bool = False
    returns: bool = False
    known: bool = True


EffectsOf = Callable[[nn.Module], ArgumentEffects]


def overwrites(model: nn.Module, node: fx.Node) -> bool:
    """Whether the node is known to change its first argument in place and to return it."""
    if not node.args or _called(node) == "setitem" or isinstance(node.target, FunctionCall):
        return False
    return mutated_args(model, node) == [node.args[0]] and (not _is_operator(node) or _is_aten(node))


def mutated_args(model: nn.Module, node: fx.Node) -> list[fx.Node]:
    """The arguments that the node is known to change in place."""
    if node.op == "call_module":
        held = None if node.meta.get("spliced") else model.get_submodule(str(node.target))
        return _given(node) if getattr(held, "inplace", False) is True else []
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, FunctionCall):
        return node.all_input_nodes if "mark_dirty" in _names_in_forward(node.target.kind) else []
    if node.kwargs.get("out") is not None:
        return _nodes_in(node.kwargs["out"])
    if _is_operator(node):
        return _mutated(node)
    return _given(node) if _writes(node) else []


def _writes(node: fx.Node) -> bool:
    name = _called(node)
    is_operators = getattr(node.target, "__module__", "") == "_operator"
    if is_operators or (node.op == "call_method" and str(node.target).startswith("__")):
        return name in IN_PLACE or name == "setitem"  # the underscore of operator.and_ means nothing
    return name.endswith("_") or (node.op == "call_function" and node.kwargs.get("inplace") is True)


def _names_in_forward(kind: type) -> tuple[str, ...]:
    """Names that the forward of an autograd.Function uses; it must mark what it changes in place."""
    methods = (getattr(kind, name, None) for name in ("forward", "setup_context"))
    return tuple(
        name for method in methods if isinstance(method, FunctionType) for name in method.__code__.co_names
    )


def _is_operator(node: fx.Node) -> bool:
    return str(getattr(node.target, "__module__", "")).startswith("torch._ops.")


def _is_aten(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") == "torch._ops.aten"


def _mutated(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operator changes by its schema."""
    operator: Any = node.target
    schemas = get_signature_for_torch_op(operator, return_schemas=True)[1] or ()
    arguments = [(n, arg) for schema in schemas for n, arg in enumerate(schema.arguments) if not arg.is_out]
    written = [(n, arg.name) for n, arg in arguments if arg.alias_info and arg.alias_info.is_write]
    return _nodes_in([node.args[n : n + 1] or node.kwargs.get(name) for n, name in dict.fromkeys(written)])


def _called(node: fx.Node) -> str:
    """Its function: ``getitem`` also for ``__getitem__``, ``mul_`` for ``torch.ops.aten.mul_.Tensor``."""
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    return name.strip("_") if name.startswith("__") else name.partition(".")[0]


def _given(node: fx.Node) -> list[fx.Node]:
    """The values in the first argument, which torch also takes by one of these names."""
    names = ("input", "self", "tensor", "tensors")
    return _nodes_in(node.args[0] if node.args else [node.kwargs.get(name) for name in names])


def _nodes_in(argument: Any) -> list[fx.Node]:
    if isinstance(argument, fx.Node):
        return [argument]
    found: dict[fx.Node, None] = {}
    map_arg(argument, found.setdefault)
    return list(found)


def redirect_in_place_uses(model: nn.Module, graph: fx.Graph) -> None:
    """Make every use of a value that has been overwritten a use of what overwrote it.

    Both are one tensor when the network runs, so this changes nothing that is computed; but only so does the
    graph say where the gradient flows.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if overwrites(model, node):
            for same in _marked(skip_boundaries(node.args[0])):
                for user in list(same.users):
                    if places[user] > places[node]:
                        user.replace_input_with(same, node)
                        node.meta.setdefault("read_as", {})[same] = None


def _marked(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and the marks that its value gets where it enters and leaves modules."""
    yield node
    for user in list(node.users):
        if user.target is boundary:
            yield from _marked(user)


# ------------------------------------------------------------------------------------------------- views

# torch's functions and methods whose result may lie in the memory of what they are given first: views, what
# returns its argument where nothing is to do, parts of tuples and mappings. An attribute is a ``getattr``.
_VIEWS = frozenset(
    """
    adjoint alias align_as align_to as_strided as_subclass as_tensor asarray broadcast_to chunk conj
    conj_physical contiguous detach diagonal dsplit expand expand_as flatten from_dlpack getattr getitem
    hsplit imag lift_fresh linalg_diagonal mH mT matrix_H moveaxis movedim narrow numpy_T permute pos positive
    ravel real refine_names rename reshape reshape_as resize_as resolve_conj resolve_neg select slice
    slice_inverse split split_with_sizes squeeze sum_to_size swapaxes swapdims t tensor_split transpose unbind
    unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view view_as view_as_complex
    view_as_real vsplit

    bfloat16 cdouble cfloat chalf cpu cuda dequantize double float half pin_memory to to_dense type type_as
    xpu

    alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout feature_dropout

    ccol_indices coalesce col_indices crow_indices indices row_indices values

    get items pop setdefault to_tuple
    """.split()  # noqa: SIM905
)
# The same for those that are given several.
_VIEWS_OF_SEVERAL = frozenset(
    "atleast_1d atleast_2d atleast_3d broadcast_tensors cartesian_prod einsum meshgrid set_".split()  # noqa: SIM905
)
VIEWING = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)


def _viewed(model: nn.Module, node: fx.Node, effects: EffectsOf) -> list[fx.Node]:
    """The values in whose memory the node's may lie."""
    if node.op == "call_module" and not node.meta.get("spliced"):
        module = model.get_submodule(str(node.target))
        if not is_building_block(module):
            return node.all_input_nodes if effects(module).returns else []
        return _given(node) if isinstance(module, VIEWING) else mutated_args(model, node)
    name = _called(node)
    if _is_unknown(node) or name in _VIEWS_OF_SEVERAL:  # a named tuple of its arguments, perhaps
        return node.all_input_nodes
    if node.target is boundary or node.op == "call_module" or name in _VIEWS:
        return [] if is_size(node) else _given(node)
    return mutated_args(model, node)


def _is_unknown(node: fx.Node) -> bool:
    """Whether it calls code in Python that is not torch's, and was not traced through."""
    if node.op != "call_function" or node.target is boundary:
        return False
    python = isinstance(node.target, (type, FunctionType, FunctionCall))
    return python and str(node.target.__module__).partition(".")[0] != "torch"


def may_alias(model: nn.Module, node: fx.Node, effects: EffectsOf, *, behind: bool = False) -> set[fx.Node]:
    """All nodes whose values may lie in the same memory as this one's; ``behind``: only it and its views."""

    def next_to(node: fx.Node) -> list[fx.Node]:
        views = [user for user in node.users if node in _viewed(model, user, effects)]
        return views if behind else [*views, *_viewed(model, node, effects)]

    return _reached(node, next_to)


def _reached(start: fx.Node, next_to: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    rest = [start]
    while rest:
        node = rest.pop()
        if node not in found:
            found.add(node)
            rest += next_to(node)
    return found


def overwritten_later(model: nn.Module, value: fx.Node, effects: EffectsOf) -> bool:
    """Whether anything behind a value may change it in place before the network is through."""
    same = may_alias(model, value, effects)
    for node in itertools.dropwhile(lambda node: node is not value, value.graph.nodes):
        if node is not value and not same.isdisjoint(node.all_input_nodes):
            if not same.isdisjoint(mutated_args(model, node)):
                return True
            if _is_block(model, node):
                held = effects(model.get_submodule(str(node.target)))
                if held.overwrites or not held.known:
                    return True
    return False


class HiddenWrite(NamedTuple):
    """An operation, the argument that it overwrites, and a value that is read afterwards in its memory."""

    node: fx.Node
    value: fx.Node
    read: fx.Node


def hidden_writes(model: nn.Module, graph: fx.Graph, effects: EffectsOf) -> Iterator[HiddenWrite]:
    """Yield in-place writes that reach a later read through an alias and so have no graph edge.

    A module that stays one call may read one of its inputs after it has overwritten another one, and may
    return one. To know this of a module takes a trace of it, so nobody asks before it matters.

    Args:
        model: The network that the graph was traced from.
        graph: Its graph, after :func:`redirect_in_place_uses`.
        effects: Tells whether an untraced module mutates its arguments or returns an alias of them.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node, value in _suspects(model, graph):
        visible = overwrites(model, node)
        if mutated_args(model, node) or effects(model.get_submodule(str(node.target))).overwrites:
            for same in sorted(may_alias(model, value, effects), key=places.__getitem__):
                if places[same] < places[node] and (
                    any(places[user] > places[node] and not is_size(user) for user in same.users)
                    or (not visible and same is not value and same in node.all_input_nodes)
                ):
                    yield HiddenWrite(node, value, same)


def _suspects(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What may overwrite, and the values whose memory may be read afterwards, if all blocks return arguments.

    In one walk through the graph: a deep network has hundreds of blocks, and few write.
    """
    last_read: dict[int, int] = {}  # of the values so far that may lie in one memory
    shared = _memories(model, graph)
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node, place in places.items():
        values = mutated_args(model, node)
        if not values and node.op == "call_module" and not node.meta.get("spliced"):
            values = node.all_input_nodes
        if values:
            together = Counter(shared[value] for value in values)
            for value in values:
                if last_read[shared[value]] > place or together[shared[value]] > 1:
                    yield node, value
        read = max((places[user] for user in node.users if not is_size(user)), default=0)
        last_read[shared[node]] = max(read, last_read.get(shared[node], 0))


def _memories(model: nn.Module, graph: fx.Graph) -> dict[fx.Node, int]:
    """A number for each node, equal where values may lie in one memory if all blocks return arguments."""
    joined: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.nodes}
    for node in graph.nodes:
        for value in _viewed(model, node, lambda _: ArgumentEffects(returns=True)):
            joined[node].append(value)
            joined[value].append(node)
    numbers: dict[fx.Node, int] = {}
    for number, start in enumerate(graph.nodes):
        rest = [] if start in numbers else [start]
        while rest:
            node = rest.pop()
            if node not in numbers:
                numbers[node] = number
                rest += joined[node]
    return numbers


def refuse_lost_writes(
    model: nn.Module,
    graph: fx.Graph,
    reversals: Collection[str],
    effects: EffectsOf,
) -> None:
    """Refuse a reversal between an operation that overwrites a memory and a value that is read out of it.

    What a reversal returns lies in the memory of its input, and autograd does not know: a value overwritten
    on one side of it would be read on the other with the gradient of before.

    Raises:
        SurgeryError: With the two places.
    """
    calls = list(_reversed(graph, reversals))
    _refuse_lost_passes(graph, {call: name for call, _, name in calls})
    if next(_suspects(model, graph), None) is None:
        return
    if not any(len(source.users) > 1 or _viewed(model, source, effects) for _, source, _ in calls):
        return  # whatever lies in the memory of a reversed value lies behind its reversal
    for node, value, read in hidden_writes(model, graph, effects):
        shared = may_alias(model, read, effects)
        for call, source, name in calls:
            side = may_alias(model, call, effects, behind=True)
            is_bypassed = source is node and read is not value and _may_be_one(model, value, read, effects)
            if is_bypassed or (call in shared and (value in side) != (read in side)):
                raise _lost(node, read, shared, f"between the two ({name}) would be lost on one of them")


def _refuse_lost_passes(graph: fx.Graph, reversals: Mapping[fx.Node, str]) -> None:
    """Refuse a reversal on the way through a block into which a value goes and comes out as the same tensor.

    What reads it behind the block, after it has been overwritten, reads what overwrote it
    (:func:`redirect_in_place_uses`).
    """
    for node in graph.nodes:
        for mark in node.meta.get("read_as", ()):
            passed, overwritten_value = skip_boundaries(mark), skip_boundaries(node.args[0])
            if passed in reversals and passed is not overwritten_value:
                where = f"between the two ({reversals[passed]}) would be lost on one of them"
                raise _lost(node, mark, [overwritten_value], where)


def _may_be_one(model: nn.Module, first: fx.Node, second: fx.Node, effects: EffectsOf) -> bool:
    """Whether two values may be one tensor: a block may return an argument of it, or one thing twice."""

    def next_to(node: fx.Node) -> list[fx.Node]:
        steps = [step for step in (node, *node.users) if _hands_on(model, step, effects)]
        return [same for step in steps for same in (step, *step.all_input_nodes)]

    return second in _reached(first, next_to)


def _hands_on(model: nn.Module, node: fx.Node, effects: EffectsOf) -> bool:
    if _called(node) == "getitem":
        return _is_block(model, node.args[0])
    if _is_block(model, node):
        return effects(model.get_submodule(str(node.target))).returns
    return node.target is boundary


def _is_block(model: nn.Module, node: Any) -> bool:
    """Whether it is a call of a module that is made of others, which the graph does not look into."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or node.meta.get("spliced"):
        return False
    return not is_building_block(model.get_submodule(str(node.target)))


def _reversed(graph: fx.Graph, names: Collection[str]) -> Iterator[tuple[fx.Node, fx.Node, str]]:
    """Each call of a reversal, what it reverses, and the reversal's name."""
    for node in graph.nodes:
        if node.op == "call_module" and node.target in names:
            yield node, node.all_input_nodes[0], str(node.target)
        elif node.target is reverse_nested:
            layer, value = node.all_input_nodes
            yield node, value, str(layer.target)


def refuse_unseen_reads(model: nn.Module, graph: fx.Graph, point: str, effects: EffectsOf) -> None:
    """Refuse a reversal after an operation that nothing uses but by reading the memory that it overwrites.

    Raises:
        SurgeryError: With the two places.
    """
    for node, _, read in hidden_writes(model, graph, effects):
        if _name(node) == point:
            shared = may_alias(model, read, effects)
            raise _lost(node, read, shared, "after the former would not be on the way")


def _lost(node: fx.Node, read: fx.Node, shared: Collection[fx.Node], where: str) -> SurgeryError:
    what = f"{_name(node)!r} overwrites in place what {_name(read)!r} reads again afterwards"
    whole = min(shared, key=list(node.graph.nodes).index)
    example = f"after={_name(whole)!r}, which reverses both"
    return SurgeryError(f"{what}, and a reversal {where}", example=example)


def _name(node: fx.Node) -> str:
    node = skip_boundaries(node)
    while node.meta.get("spliced") or node.target is reverse_nested:
        node = skip_boundaries(node.all_input_nodes[-1])
    return str(node.meta.get("point", node.name))
