"""Model surgery for gradient reversal: splice, prove, export.

Importing this package imports neither torch nor any of its own modules but this one: each public name is
looked up in its module when it is first used, so that ``grl-surgery --help`` answers at once.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grl_surgery import schedules
    from grl_surgery.attaching import attach_domain_head
    from grl_surgery.doctor.adopting import adopt
    from grl_surgery.doctor.diagnosing import assert_flips, diagnose, find_reversals
    from grl_surgery.doctor.report import Adoption, Diagnosis
    from grl_surgery.doctor.verdicts import Finding
    from grl_surgery.errors import (
        AmbiguousPointError,
        ExportError,
        FlipError,
        PointNotFoundError,
        ShapeError,
        SurgeryError,
        TracingError,
    )
    from grl_surgery.exporting import export, load
    from grl_surgery.flip_report import FlipReport, ParameterFlip, ReversalFlip
    from grl_surgery.heads import DomainClassifier, DomainHead, PatchDomainClassifier
    from grl_surgery.metrics import AdversarialMetrics, proxy_a_distance
    from grl_surgery.model_graph import ModelGraph
    from grl_surgery.model_graph import describe as graph
    from grl_surgery.points import Edge, GraphNode
    from grl_surgery.reversal import GradientReversal, reversal_disabled, reverse_gradient
    from grl_surgery.schedules import CoefficientScheduler
    from grl_surgery.splicing import insert_grl, reversals, strip
    from grl_surgery.training import dann_lr, domain_loss, entropy_weights, param_groups
    from grl_surgery.verification import verify_flip

# Where each public name lives, in the order in which a model flows through the modules; "module:name" where
# it has another name there, "module:*" for the module itself.
_HOMES = {
    "SurgeryError": "errors",
    "PointNotFoundError": "errors",
    "AmbiguousPointError": "errors",
    "TracingError": "errors",
    "ShapeError": "errors",
    "FlipError": "errors",
    "ExportError": "errors",
    "reverse_gradient": "reversal",
    "GradientReversal": "reversal",
    "reversal_disabled": "reversal",
    "schedules": "schedules:*",
    "CoefficientScheduler": "schedules",
    "DomainClassifier": "heads",
    "PatchDomainClassifier": "heads",
    "DomainHead": "heads",
    "GraphNode": "points",
    "Edge": "points",
    "ModelGraph": "model_graph",
    "graph": "model_graph:describe",
    "insert_grl": "splicing",
    "reversals": "splicing",
    "attach_domain_head": "attaching",
    "strip": "splicing",
    "verify_flip": "verification",
    "FlipReport": "flip_report",
    "ParameterFlip": "flip_report",
    "ReversalFlip": "flip_report",
    "find_reversals": "doctor.diagnosing",
    "Finding": "doctor.verdicts",
    "diagnose": "doctor.diagnosing",
    "assert_flips": "doctor.diagnosing",
    "Diagnosis": "doctor.report",
    "adopt": "doctor.adopting",
    "Adoption": "doctor.report",
    "domain_loss": "training",
    "entropy_weights": "training",
    "param_groups": "training",
    "dann_lr": "training",
    "AdversarialMetrics": "metrics",
    "proxy_a_distance": "metrics",
    "export": "exporting",
    "load": "exporting",
}

__all__ = [
    "Adoption",
    "AdversarialMetrics",
    "AmbiguousPointError",
    "CoefficientScheduler",
    "Diagnosis",
    "DomainClassifier",
    "DomainHead",
    "Edge",
    "ExportError",
    "Finding",
    "FlipError",
    "FlipReport",
    "GradientReversal",
    "GraphNode",
    "ModelGraph",
    "ParameterFlip",
    "PatchDomainClassifier",
    "PointNotFoundError",
    "ReversalFlip",
    "ShapeError",
    "SurgeryError",
    "TracingError",
    "adopt",
    "assert_flips",
    "attach_domain_head",
    "dann_lr",
    "diagnose",
    "domain_loss",
    "entropy_weights",
    "export",
    "find_reversals",
    "graph",
    "insert_grl",
    "load",
    "param_groups",
    "proxy_a_distance",
    "reversal_disabled",
    "reversals",
    "reverse_gradient",
    "schedules",
    "strip",
    "verify_flip",
]

# Hidden from type checkers, which would otherwise take every misspelt name for one that exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _HOMES[name].partition(":")
        home = importlib.import_module(f"{__name__}.{module}")
        value = home if attribute == "*" else getattr(home, attribute or name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
