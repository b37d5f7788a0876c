"""Model surgery for gradient reversal: splice, prove, export."""

from grl_surgery.errors import (
    AmbiguousPointError,
    ExportError,
    FlipError,
    PointNotFoundError,
    ShapeError,
    SurgeryError,
    TracingError,
)
from grl_surgery.flip_report import FlipReport, ParameterFlip, ReversalFlip
from grl_surgery.model_graph import ModelGraph
from grl_surgery.model_graph import describe as graph
from grl_surgery.points import Edge, GraphNode
from grl_surgery.reversal import GradientReversal, reversal_disabled, reverse_gradient
from grl_surgery.splicing import insert_grl, reversals, strip
from grl_surgery.verification import verify_flip

__all__ = [
    "AmbiguousPointError",
    "Edge",
    "ExportError",
    "FlipError",
    "FlipReport",
    "GradientReversal",
    "GraphNode",
    "ModelGraph",
    "ParameterFlip",
    "PointNotFoundError",
    "ReversalFlip",
    "ShapeError",
    "SurgeryError",
    "TracingError",
    "graph",
    "insert_grl",
    "reversal_disabled",
    "reversals",
    "reverse_gradient",
    "strip",
    "verify_flip",
]
