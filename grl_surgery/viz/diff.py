"""Shows what surgery did to a network: the edges it reversed, the lines of the forward it changed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from torch import fx, nn

from grl_surgery.capture.node_uses import node_uses
from grl_surgery.points import Edge
from grl_surgery.surgery.graph_rewrite import apply_cuts, modules_to_open
from grl_surgery.surgery.spliced_module import Cut, SplicedModule, disassemble, surgery_of

__all__ = ["forward_diff", "reversed_edges", "spliced_parts"]


def spliced_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a network that something was spliced into, by path; the root's is ``""``."""
    return {path: part for path, part in model.named_modules() if surgery_of(part)}


def reversed_edges(part: nn.Module, cut: Cut) -> list[Edge]:
    """The edges of the original's graph, in its present mode, whose gradient one cut reverses.

    A cut at the call of a module is in no graph and has none.

    Example:
        >>> from grl_surgery.surgery.insert import insert_grl
        >>> spliced = insert_grl(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), after="0")
        >>> [str(edge) for edge in reversed_edges(spliced, spliced.grl_surgery.cuts[0])]
        ['0 -> 1']
    """
    if not isinstance(part, SplicedModule) or cut not in part.grl_surgery.in_graph:
        return []
    calls = [node for node in part.graph.nodes if node.op == "call_module" and node.target == cut.module]
    return [
        Edge(source.meta.get("point", str(cut.at)), target)
        for call in calls
        for _, source in node_uses(call)
        for target in _points_that_use(call)
    ]


def _points_that_use(node: fx.Node) -> Iterator[str]:
    """Names of the users of a value; what surgery put between has none."""
    for user in node.users:
        if "point" in user.meta:
            yield user.meta["point"]
        else:
            yield from _points_that_use(user)


def forward_diff(part: SplicedModule, name: str = "forward") -> str:
    """The lines of the generated forward, in the present mode, that surgery changed, as a unified diff.

    Example:
        >>> from grl_surgery.surgery.insert import insert_grl
        >>> spliced = insert_grl(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), after="0")
        >>> print(forward_diff(spliced).splitlines()[-3])
        +    grl_0 = self.grl_0(_0)
    """
    original, _, _ = disassemble(part)
    plain = apply_cuts(original, [], traced_modules=modules_to_open(original, part.grl_surgery.in_graph))
    flags = tuple(original.get_submodule(path).training for path in plain.mode_dependent)
    before = plain.graphs.get(flags) or next(iter(plain.graphs.values()))
    lines = difflib.unified_diff(
        _forward_lines(before), _forward_lines(part.graph), name, f"{name}, spliced", lineterm="", n=2
    )
    return "\n".join(lines)


def _forward_lines(graph: fx.Graph) -> list[str]:
    """The code of a forward, without the statements that only release memory."""
    code = graph.python_code(root_module="self").src
    return [re.sub(r";  \w+ = (\w+ = )*None", "", line).rstrip() for line in code.strip().splitlines()]
