"""What a forward overwrites in place, and who reads it afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from types import FunctionType
from typing import NamedTuple

from torch import fx, nn

from grl_surgery.errors import SurgeryError
from grl_surgery.links import is_size, origin
from grl_surgery.trace_copy import is_building_block
from grl_surgery.tracer import IN_PLACE, boundary

__all__ = [
    "VIEWING",
    "Effects",
    "follow",
    "hidden_writes",
    "memory",
    "overwrites",
    "refuse_lost_writes",
    "refuse_unseen_reads",
]


class Effects(NamedTuple):
    """What a module does to the memory of its arguments.

    Args:
        overwrites: It changes one in place.
        returns: What it returns may lie in the memory of one, as a dropout's result does in eval mode.
    """

    overwrites: bool = False
    returns: bool = False


EffectsOf = Callable[[nn.Module], Effects]


def overwrites(model: nn.Module, node: fx.Node) -> bool:
    """Whether the node is known to change its first argument in place and to return it."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        held = None if node.meta.get("spliced") else model.get_submodule(str(node.target))
        return getattr(held, "inplace", False) is True
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place_operator = getattr(node.target, "__module__", "") == "_operator" and name in IN_PLACE
    return in_place_operator or (name.endswith("_") and not name.endswith("__")) or _asks(node, name)


def _asks(node: fx.Node, name: str) -> bool:
    positional = node.args[-1] if name in ("relu", "relu6", "hardswish", "silu", "mish") else False
    return node.op == "call_function" and (node.kwargs.get("inplace") is True or positional is True)


def follow(model: nn.Module, graph: fx.Graph) -> None:
    """Make every use of a value that has been overwritten a use of what overwrote it.

    Both are one tensor when the network runs, so this changes nothing that is computed; but only so does the
    graph say where the gradient flows.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if overwrites(model, node):
            for same in _marked(origin(node.args[0])):
                for user in list(same.users):
                    if places[user] > places[node]:
                        user.replace_input_with(same, node)


def _marked(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and the marks that its value gets where it enters and leaves modules."""
    yield node
    for user in list(node.users):
        if user.target is boundary:
            yield from _marked(user)


# ------------------------------------------------------------------------------------------------- views

# torch's functions and methods whose result may lie in the memory of what they are given.
_VIEWS = frozenset(
    """
    view view_as reshape reshape_as expand expand_as flatten unflatten squeeze unsqueeze transpose t permute
    moveaxis movedim swapaxes swapdims narrow select chunk split tensor_split unbind diagonal unfold getitem
    as_strided real imag contiguous detach to float double type_as dropout alpha_dropout feature_dropout
    """.split()  # noqa: SIM905
)
VIEWING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def _viewed(model: nn.Module, node: fx.Node, effects: EffectsOf) -> list[fx.Node]:
    """The values in whose memory the node's may lie."""
    if _is_unknown(node):  # perhaps a named tuple of its arguments
        return node.all_input_nodes
    if node.op == "call_module" and not node.meta.get("spliced"):
        module = model.get_submodule(str(node.target))
        if not is_building_block(module):
            return node.all_input_nodes if effects(module).returns else []
        viewing = isinstance(module, VIEWING) or overwrites(model, node)
    else:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        known = node.target is boundary or node.op == "call_module" or str(name) in _VIEWS
        viewing = known or overwrites(model, node)
    return [node.args[0]] if viewing and node.args and isinstance(node.args[0], fx.Node) else []


def _is_unknown(node: fx.Node) -> bool:
    """Whether it calls code in Python that is not torch's, and was not traced through."""
    if node.op != "call_function" or node.target is boundary:
        return False
    return isinstance(node.target, (type, FunctionType)) and node.target.__module__.split(".")[0] != "torch"


def memory(model: nn.Module, node: fx.Node, effects: EffectsOf, *, behind: bool = False) -> set[fx.Node]:
    """All nodes whose values may lie in the same memory as this one's; ``behind``: only it and its views."""
    found: set[fx.Node] = set()
    rest = [node]
    while rest:
        node = rest.pop()
        if node not in found:
            found.add(node)
            rest += [user for user in node.users if node in _viewed(model, user, effects)]
            rest += [] if behind else _viewed(model, node, effects)
    return found


def hidden_writes(model: nn.Module, graph: fx.Graph, effects: EffectsOf) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Values that are read after their memory has been written in a way that no edge of the graph shows.

    A module that stays one call may read one of its inputs after it has overwritten another one, and may
    return one. To know this of a module takes a trace of it, so nobody asks before it matters.

    Args:
        model: The network that the graph was traced from.
        graph: Its graph, after :func:`follow`.
        effects: What a module that stays one call does to its arguments.

    Returns:
        Pairs of an operation and a value that is read after the operation has overwritten it.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node, value in _suspects(model, graph):
        visible = overwrites(model, node)
        if visible or effects(model.get_submodule(str(node.target))).overwrites:
            for same in memory(model, value, effects):
                if places[same] < places[node] and (
                    any(places[user] > places[node] and not is_size(user) for user in same.users)
                    or (not visible and same is not value and same in node.all_input_nodes)
                ):
                    yield node, same


def _suspects(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What may overwrite, and the values whose memory may be read afterwards, if all blocks return arguments.

    In one walk through the graph: a deep network has hundreds of blocks, and few write.
    """
    last_read: dict[int, int] = {}  # of the values so far that may lie in one memory
    shared = _memories(model, graph)
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node, place in places.items():
        visible = overwrites(model, node)
        if visible or (node.op == "call_module" and not node.meta.get("spliced")):
            values = node.all_input_nodes[:1] if visible else node.all_input_nodes
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
        for value in _viewed(model, node, lambda _: Effects(returns=True)):
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
    if next(_suspects(model, graph), None) is None:
        return
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target in reversals]
    sources = [call.all_input_nodes[0] for call in calls]
    if not any(len(source.users) > 1 or _viewed(model, source, effects) for source in sources):
        return  # whatever lies in the memory of a reversed value lies behind its reversal
    for node, read in hidden_writes(model, graph, effects):
        shared = memory(model, read, effects)
        for call in calls:
            side = memory(model, call, effects, behind=True)
            if call in shared and (node.all_input_nodes[0] in side) != (read in side):
                raise _lost(
                    node, read, shared, f"between the two ({call.target}) would be lost on one of them"
                )


def refuse_unseen_reads(model: nn.Module, graph: fx.Graph, point: str, effects: EffectsOf) -> None:
    """Refuse a reversal after an operation that nothing uses but by reading the memory that it overwrites.

    Raises:
        SurgeryError: With the two places.
    """
    for node, read in hidden_writes(model, graph, effects):
        if _name(node) == point:
            shared = memory(model, read, effects)
            raise _lost(node, read, shared, "after the former would not be on the way")


def _lost(node: fx.Node, read: fx.Node, shared: Collection[fx.Node], where: str) -> SurgeryError:
    what = f"{_name(node)!r} overwrites in place what {_name(read)!r} reads again afterwards"
    whole = min(shared, key=list(node.graph.nodes).index)
    example = f"after={_name(whole)!r}, which reverses both"
    return SurgeryError(f"{what}, and a reversal {where}", example=example)


def _name(node: fx.Node) -> str:
    node = origin(node)
    while node.meta.get("spliced"):
        node = origin(node.args[0])  # type: ignore[arg-type]
    return str(node.meta.get("point", node.name))
