"""The graph behind a proof: all points of the spliced network, and the gradient that is predicted at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from grl_surgery.graph_data import ModelGraph
from grl_surgery.points import Edge
from grl_surgery.surgery.describe import describe, graph_of
from grl_surgery.verify.reference_model import is_fully_traced, predict_flow, sign_label

__all__ = ["FlipGraph", "flip_graph"]


@dataclass(frozen=True)
class FlipGraph:
    """What is predicted, in words, all the way down.

    Args:
        graph: The spliced network.
        points: By objective and point, what the gradient of the point's value is: flipped, unchanged, mixed,
            unreached. Empty where nothing is predicted.
        edges: The same for what flows back over each edge.
    """

    graph: ModelGraph
    points: dict[str, dict[str, str]]
    edges: dict[str, dict[Edge, str]]


def flip_graph(
    model: nn.Module, oracle: nn.Module, example_inputs: Any, objectives: Sequence[str]
) -> FlipGraph | None:
    """The graph of a spliced network, with what its recipe predicts; None where nothing can be traced.

    Args:
        model: The spliced network, in the mode that is meant.
        oracle: What the recipe says, from
            :func:`grl_surgery.verify.reference_model.with_reversals`, in the same mode.
        example_inputs: Arguments of forward.
        objectives: ``output``, and the names of heads.
    """
    graph = describe(model, None, example_inputs)
    if not graph.nodes:
        return None
    if not is_fully_traced(oracle):
        return FlipGraph(graph, {}, {})
    deep, _ = graph_of(oracle, None, example_inputs)
    flows = {objective: predict_flow(oracle, deep, objective) for objective in objectives}
    return FlipGraph(
        graph,
        {
            name: {at: sign_label(signs) for at, signs in points.items()}
            for name, (points, _) in flows.items()
        },
        {name: {at: sign_label(signs) for at, signs in edges.items()} for name, (_, edges) in flows.items()},
    )
