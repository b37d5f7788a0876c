"""Model surgery for gradient reversal: splice, prove, export.

Importing this package imports no torch: each public name is looked up in its module when it is first used, so
that ``grl-surgery --help`` answers at once. As soon as torch is imported, before or after, the operator of a
reversal is registered, so that torch can load programs that hold it.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grl_surgery.adaptation import validators
    from grl_surgery.adaptation.pairing import paired
    from grl_surgery.adaptation.probing import suggest_points
    from grl_surgery.adaptation.runs import load_run, save_run
    from grl_surgery.doctor.adopt import adopt
    from grl_surgery.doctor.diagnose import assert_flips, diagnose, find_reversals
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
    from grl_surgery.graph_data import ModelGraph
    from grl_surgery.io.export import export, load
    from grl_surgery.nn.classifiers import DomainClassifier, PatchDomainClassifier
    from grl_surgery.nn.heads import DomainHead
    from grl_surgery.nn.pooling import FeaturePool
    from grl_surgery.nn.reversal import GradientReversal, reversal_disabled, reverse_gradient
    from grl_surgery.points import Edge, GraphNode
    from grl_surgery.surgery.attach_head import attach_domain_head
    from grl_surgery.surgery.describe import describe as graph
    from grl_surgery.surgery.insert import graph_module, insert_grl, reversals, strip
    from grl_surgery.training import schedules
    from grl_surgery.training.discrepancy import GradientPenalty, mdd_loss, wasserstein_loss
    from grl_surgery.training.losses import domain_loss, entropy_weights
    from grl_surgery.training.metrics import AdversarialMetrics, proxy_a_distance
    from grl_surgery.training.optimization import dann_lr, param_groups
    from grl_surgery.training.schedules import CoefficientScheduler
    from grl_surgery.training.train_mode import batch_norm_frozen, set_train_mode
    from grl_surgery.verify.report import FlipReport, ParameterFlip, ReversalFlip
    from grl_surgery.verify.verify_flip import verify_flip

__version__: str

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
    "reverse_gradient": "nn.reversal",
    "GradientReversal": "nn.reversal",
    "reversal_disabled": "nn.reversal",
    "schedules": "training.schedules:*",
    "CoefficientScheduler": "training.schedules",
    "DomainClassifier": "nn.classifiers",
    "PatchDomainClassifier": "nn.classifiers",
    "DomainHead": "nn.heads",
    "GraphNode": "points",
    "Edge": "points",
    "ModelGraph": "graph_data",
    "graph": "surgery.describe:describe",
    "insert_grl": "surgery.insert",
    "reversals": "surgery.insert",
    "attach_domain_head": "surgery.attach_head",
    "strip": "surgery.insert",
    "graph_module": "surgery.insert",
    "verify_flip": "verify.verify_flip",
    "FlipReport": "verify.report",
    "ParameterFlip": "verify.report",
    "ReversalFlip": "verify.report",
    "find_reversals": "doctor.diagnose",
    "Finding": "doctor.verdicts",
    "diagnose": "doctor.diagnose",
    "assert_flips": "doctor.diagnose",
    "Diagnosis": "doctor.report",
    "adopt": "doctor.adopt",
    "Adoption": "doctor.report",
    "domain_loss": "training.losses",
    "entropy_weights": "training.losses",
    "param_groups": "training.optimization",
    "dann_lr": "training.optimization",
    "set_train_mode": "training.train_mode",
    "batch_norm_frozen": "training.train_mode",
    "mdd_loss": "training.discrepancy",
    "wasserstein_loss": "training.discrepancy",
    "GradientPenalty": "training.discrepancy",
    "FeaturePool": "nn.pooling",
    "AdversarialMetrics": "training.metrics",
    "proxy_a_distance": "training.metrics",
    "export": "io.export",
    "load": "io.export",
    "suggest_points": "adaptation.probing",
    "validators": "adaptation.validators:*",
    "paired": "adaptation.pairing",
    "save_run": "adaptation.runs",
    "load_run": "adaptation.runs",
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
    "FeaturePool",
    "Finding",
    "FlipError",
    "FlipReport",
    "GradientPenalty",
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
    "batch_norm_frozen",
    "dann_lr",
    "diagnose",
    "domain_loss",
    "entropy_weights",
    "export",
    "find_reversals",
    "graph",
    "graph_module",
    "insert_grl",
    "load",
    "load_run",
    "mdd_loss",
    "paired",
    "param_groups",
    "proxy_a_distance",
    "reversal_disabled",
    "reversals",
    "reverse_gradient",
    "save_run",
    "schedules",
    "set_train_mode",
    "strip",
    "suggest_points",
    "validators",
    "verify_flip",
    "wasserstein_loss",
]


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Imports the operator of a reversal when somebody has imported torch."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Finds torch where the others find it, with one line more to run at the end of its import."""
        if name != "torch":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                importlib.import_module(f"{__name__}.nn.reversal")

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if sys.modules.get("torch") is None:
    sys.meta_path.insert(0, _AfterTorch())
else:
    importlib.import_module(f"{__name__}.nn.reversal")

# Hidden from type checkers, which would otherwise take every misspelt name for one that exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("grl-surgery")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _HOMES[name].partition(":")
        home = importlib.import_module(f"{__name__}.{module}")
        value = home if attribute == "*" else getattr(home, attribute or name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
