"""What a forward overwrites in place, and who reads it afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from torch import fx, nn

from grl_surgery.errors import SurgeryError
from grl_surgery.links import is_size, origin
from grl_surgery.trace_copy import is_building_block
from grl_surgery.tracer import IN_PLACE, boundary

__all__ = ["Effects", "follow", "hidden_writes", "memory", "overwrites", "refuse_lost_writes"]


class Effects(NamedTuple):
    """What a module does to the memory of its arguments.

    Args:
        overwrites: It changes one in place.
        returns: What it returns may lie in the memory of one, as a dropout's result does in eval mode.
    """

    overwrites: bool = False
    returns: bool = False


Returns = Callable[[nn.Module], bool]


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

_VIEWS = re.compile(
    "(view|reshape|expand)(_as)?|(un)?flatten|(un)?squeeze|transpose|t|permute|moveaxis|movedim|swap(axes|dims)|"
    "narrow|select|chunk|split|tensor_split|unbind|diagonal|unfold|getitem|as_strided|real|imag|contiguous|"
    "detach|to|float|double|type_as|(alpha_|feature_)?dropout"
)
_VIEWING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def _viewed(model: nn.Module, node: fx.Node, returns: Returns) -> list[fx.Node]:
    """The values in whose memory the node's may lie."""
    if node.op == "call_module" and not node.meta.get("spliced"):
        module = model.get_submodule(str(node.target))
        if not is_building_block(module):
            return node.all_input_nodes if returns(module) else []
        viewing = isinstance(module, _VIEWING) or overwrites(model, node)
    else:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        known = node.target is boundary or node.op == "call_module" or _VIEWS.fullmatch(str(name))
        viewing = bool(known) or overwrites(model, node)
    return [node.args[0]] if viewing and node.args and isinstance(node.args[0], fx.Node) else []


def memory(model: nn.Module, node: fx.Node, returns: Returns, *, behind: bool = False) -> set[fx.Node]:
    """All nodes whose values may lie in the same memory as this one's; ``behind``: only it and its views."""
    found: set[fx.Node] = set()
    rest = [node]
    while rest:
        node = rest.pop()
        if node not in found:
            found.add(node)
            rest += [user for user in node.users if node in _viewed(model, user, returns)]
            rest += [] if behind else _viewed(model, node, returns)
    return found


def hidden_writes(
    model: nn.Module, graph: fx.Graph, effects: Callable[[nn.Module], Effects]
) -> Iterator[tuple[fx.Node, fx.Node]]:
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

    def read_after(node: fx.Node, value: fx.Node, visible: bool, returns: Returns) -> list[fx.Node]:
        return [
            same
            for same in memory(model, value, returns)
            if places[same] < places[node]
            and (
                any(places[user] > places[node] and not is_size(user) for user in same.users)
                or (not visible and same is not value and same in node.all_input_nodes)
            )
        ]

    for node in graph.nodes:
        visible = overwrites(model, node)
        if not visible and (node.op != "call_module" or node.meta.get("spliced")):
            continue
        for value in node.all_input_nodes[:1] if visible else node.all_input_nodes:
            if not read_after(node, value, visible, lambda _: True):
                continue
            if visible or effects(model.get_submodule(str(node.target))).overwrites:
                for same in read_after(node, value, visible, lambda module: effects(module).returns):
                    yield node, same


def refuse_lost_writes(
    model: nn.Module,
    graph: fx.Graph,
    reversals: Collection[str],
    effects: Callable[[nn.Module], Effects],
) -> None:
    """Refuse a reversal between an operation that overwrites a memory and a value that is read out of it.

    What a reversal returns lies in the memory of its input, and autograd does not know: a value overwritten
    on one side of it would be read on the other with the gradient of before.

    Raises:
        SurgeryError: With the two places.
    """
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target in reversals]
    sources = [call.all_input_nodes[0] for call in calls]
    if not any(len(source.users) > 1 or _viewed(model, source, lambda _: True) for source in sources):
        return

    def returns(module: nn.Module) -> bool:
        return effects(module).returns

    for node, read in hidden_writes(model, graph, effects):
        for call in calls:
            written = node.all_input_nodes[0]
            side = memory(model, call, returns, behind=True)
            if read in memory(model, call, returns) and (written in side) != (read in side):
                raise SurgeryError(
                    f"{_name(node)!r} overwrites in place what {_name(read)!r} reads again afterwards, and a "
                    f"reversal between the two ({call.target}) would be lost on one of them",
                    example=f"after={_name(read)!r}, which reverses both",
                )


def _name(node: fx.Node) -> str:
    node = origin(node)
    while node.meta.get("spliced"):
        node = origin(node.args[0])  # type: ignore[arg-type]
    return str(node.meta.get("point", node.name))
