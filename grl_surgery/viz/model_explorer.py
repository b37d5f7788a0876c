"""Shows the exported program in ai-edge-model-explorer, with the result of the proof for each operation."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from grl_surgery.errors import SurgeryError
from grl_surgery.io.programs import inputs_for, record
from grl_surgery.surgery.insert import reversals
from grl_surgery.verify.verify_flip import verify_flip
from grl_surgery.viz.gradient_colors import FACTORS, Mark, View, views_of
from grl_surgery.viz.nested_boxes import Box

__all__ = ["Overlay", "open_in_model_explorer", "overlays"]

Overlay = dict[str, tuple[str, str]]  # from a node of the program to a word and a colour

_COLORS = {
    "flipped": "#fbe0cf",
    "mixed": "#f1dcee",
    "unchanged": "#d6e9f8",
    "unreached": "#e3e7ec",
    "no signal": "#faf1bd",
    "wrong": "#ffc9cf",
    "several": "#ffffff",
}


def open_in_model_explorer(model: nn.Module, example_inputs: Any) -> None:
    """Export the network and show the program; where it has reversals, prove it and show the factors as well.

    It returns when the viewer's server is stopped.

    Raises:
        SurgeryError: The viewer is not installed.
        ExportError: torch cannot export the network.
    """
    try:
        viewer = importlib.import_module("model_explorer")
        builder = importlib.import_module("model_explorer.node_data_builder")
    except ImportError as error:
        raise SurgeryError("Model Explorer is not installed: pip install ai-edge-model-explorer") from error
    program = record(model, inputs_for(model, example_inputs), dynamic=False)
    config = viewer.config()
    config.add_model_from_pytorch(type(model).__name__, exported_program=program)
    if reversals(model):
        for view in views_of([verify_flip(model, example_inputs=example_inputs)]):
            for title, overlay in overlays(view, program).items():
                results = {
                    node: builder.NodeDataResult(value=word, bgColor=color, textColor="#000000")
                    for node, (word, color) in overlay.items()
                }
                name = f"{title}, {view.label}" if view.label else title
                config.add_node_data(name=name, node_data=builder.GraphNodeData(results=results))
    viewer.visualize_from_config(config)


def overlays(view: View, program: torch.export.ExportedProgram) -> dict[str, Overlay]:
    """The factor of each parameter, and of each operation in a module: predicted, and measured."""
    found: dict[str, Overlay] = {"predicted": {}, "measured": {}}
    for node, name in _places(program):
        mark = view.box(Box(name, name, "module"))
        if mark.kind:
            found["measured" if mark.measured else "predicted"][node] = _shown(mark.kind)
        predicted = _prediction(mark)
        if predicted:
            found["predicted"][node] = _shown(predicted)
    return found


def _shown(kind: str) -> tuple[str, str]:
    factor = FACTORS.get(kind)
    return (f"{kind} ({factor})" if factor not in (None, kind) else kind), _COLORS[kind]


def _prediction(mark: Mark) -> str:
    """The one word that is predicted; empty where there are several."""
    word = mark.predicted.partition(" (")[0]
    return word if word in _COLORS else ""


def _places(program: torch.export.ExportedProgram) -> Iterator[tuple[str, str]]:
    """The nodes of a program with the parameter that each is, or the module that each is computed in."""
    parameters = program.graph_signature.inputs_to_parameters
    for node in program.graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        name = parameters.get(node.name) or (stack[-1][0] if stack else "")
        if name:
            yield node.name, name
