"""The diagnosis of a network: what reverses, where that is lost, and what adopting it would mend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from grl_surgery.doctor.adopt import adopt_unsurveyed
from grl_surgery.doctor.coefficient_source import with_coefficients
from grl_surgery.doctor.context_survey import survey
from grl_surgery.doctor.contexts import CONTEXTS, Context
from grl_surgery.doctor.detect import examine, inputs_of
from grl_surgery.doctor.report import Diagnosis
from grl_surgery.doctor.verdicts import Finding, Outcome
from grl_surgery.errors import SurgeryError
from grl_surgery.surgery.insert import check_model
from grl_surgery.validation import check_count

__all__ = ["assert_flips", "diagnose", "find_reversals"]

Progress = Callable[[str], None]


def find_reversals(model: nn.Module, example_inputs: Any = None) -> tuple[Finding, ...]:
    """Find every reversal of a network, and every place that only looks like one.

    Names play no role. A copy of the network runs once, and every call that returns its input unchanged is
    given a gradient of random numbers: modules, autograd Functions (also those behind custom
    operators) and hooks on tensors. A whole backward pass shows whether a gradient arrives there at all,
    where it goes on to, and whether it is reversed again. Arithmetic between other lines of a forward, such
    as ``2 * x.detach() - x``, is none of these calls: it is found where a module of its own computes it.

    Example:
        >>> import torch
        >>> from grl_surgery.nn.reversal import GradientReversal
        >>> net = nn.Sequential(nn.Linear(4, 8), GradientReversal(0.5), nn.Linear(8, 2))
        >>> for finding in find_reversals(net, torch.randn(3, 4)):
        ...     print(finding.where, finding.factor, finding.verdict, finding.coeff_from)
        1 -0.5 reverses 1.coeff

    Args:
        model: Any network. It is not changed, nor are class attributes and globals that its forward writes.
        example_inputs: Arguments of forward: a tensor, a tuple, or a dict by name; by default those that timm
            or torchvision declare. Numbers among them are kept, so that a coefficient may be one of them.

    Returns:
        What was found, in the order of the forward.

    Raises:
        SurgeryError: There are no example inputs, the network does not run on them, or it is no network.
    """
    check_model(model, "find_reversals")
    inputs = inputs_of(model, example_inputs, "find_reversals")
    return tuple(site.finding for site in with_coefficients(model, inputs, examine(model, inputs)))


def diagnose(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    ddp: bool = False,
    seed: int = 0,
    progress: Progress = lambda what: None,
) -> Diagnosis:
    """Measure whether the reversals of a network work, in eager mode and in every other context.

    The network runs, privately, in eager mode, in train and in eval mode, through torch.fx, torchvision's
    extractor, torch.export (also saved and loaded), torch.compile (with the ``aot_eager`` backend),
    per-sample gradients, autocast, checkpointing and deepcopy. The gradients of all parameters are compared
    with those of eager mode, and with those of the same network whose reversals pass gradients on unchanged.
    Then the same is done with what :func:`adopt` makes of it.

    Example:
        >>> from grl_surgery.nn.reversal import GradientReversal
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), GradientReversal(0.5), nn.Linear(8, 2))
        >>> diagnose(net, torch.randn(3, 4)).ok
        True

    Args:
        model: Any network; neither it nor anything that its forward touches is changed.
        example_inputs: As for :func:`find_reversals`.
        ddp: Also run it under DistributedDataParallel, in two processes. It has to be picklable then.
        seed: Of all random numbers.
        progress: Is told what is about to run.

    Returns:
        The diagnosis, which prints as a table.

    Raises:
        SurgeryError: There are no example inputs, the network does not run on them, or it is no network.
    """
    check_model(model, "diagnose")
    seed = check_count("seed", seed, least=0, example="seed=0")
    inputs = inputs_of(model, example_inputs, "diagnose")
    progress("looking for reversals")
    sites = examine(model, inputs, seed=seed, training=True)
    findings = tuple(
        site.finding for site in with_coefficients(model, inputs, sites, seed=seed, training=True)
    )
    contexts = _contexts(ddp)
    outcomes: Sequence[Outcome] = ()
    if any(finding.ok for finding in findings):
        outcomes = survey(model, inputs, seed=seed, progress=progress, contexts=contexts)
    if all(finding.ours or not _is_adoptable(finding) for finding in findings):
        return Diagnosis(findings, tuple(outcomes))
    after, words = _after_adoption(model, inputs, contexts, seed, progress)
    return Diagnosis(findings, tuple(outcomes), tuple(after), words)


def _is_adoptable(finding: Finding) -> bool:
    return finding.verdict in ("reverses", "fails") and isinstance(finding.factor, float)


def _contexts(ddp: bool) -> Sequence[Context]:
    if not ddp:
        return CONTEXTS
    from grl_surgery.doctor.ddp_context import TWO_PROCESSES

    return (*CONTEXTS, TWO_PROCESSES)


def _after_adoption(
    model: nn.Module, inputs: Any, contexts: Sequence[Context], seed: int, progress: Progress
) -> tuple[Sequence[Outcome], str]:
    progress("adopting")
    try:
        adoption = adopt_unsurveyed(model, inputs, seed=seed)
    except SurgeryError as error:
        return (), str(error).partition("\n")[0]
    told: Progress = lambda what: progress(f"{what}, adopted")  # noqa: E731
    adoption.outcomes = tuple(survey(adoption.model, inputs, seed=seed, progress=told, contexts=contexts))
    return adoption.outcomes, adoption.verdict


def assert_flips(model: nn.Module, example_inputs: Any = None, *, seed: int = 0) -> None:
    """Raise FlipError if a network has no reversal, or loses one without an error in some context.

    For test suites: pytest shows the error as a failure.

    Example:
        >>> from grl_surgery.nn.reversal import GradientReversal
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), GradientReversal(0.5), nn.Linear(8, 2))
        >>> assert_flips(net, torch.randn(3, 4))

    Args:
        model: The network.
        example_inputs: As for :func:`find_reversals`.
        seed: Of all random numbers.

    Raises:
        FlipError: Naming what is lost, and where.
        SurgeryError: There are no example inputs, the network does not run on them, or it is no network.
    """
    diagnose(model, example_inputs, seed=seed).raise_if_lost()
