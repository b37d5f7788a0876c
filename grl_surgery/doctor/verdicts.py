"""Verdicts of the doctor, for each place and each context, with what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["FIXES", "Finding", "Outcome", "Status", "shown_factor"]

Status = Literal["alive", "LOST", "wrong", "frozen", "off", "error"]

FIXES = {
    "backward never called": "put gs.GradientReversal() in its place",
    "factor +1": "put gs.GradientReversal() in its place, or return -coeff * grad from its backward",
    "factor 0": "set its coefficient: gs.CoefficientScheduler, gs.schedules.dann()",
    "un-reverses": "a coefficient is not negative: the minus sign is in the reversal already",
    "signed, negative": "nothing to mend if that is meant; a coefficient above 0 reverses",
    "no multiple": "nothing to mend if that is meant; a reversal is gs.GradientReversal()",
    "detached": "leave out detach() and no_grad() before and behind the reversal",
    "unused": "return the head's logits from forward, so that a loss can be made of them",
    "no gradient": "return the logits; with one unit, no softmax and binary_cross_entropy_with_logits",
    "all frozen": "requires_grad_(True) upstream of it, or leave the reversal out",
    "reversed twice": "take one of the two out",
    "fails": "mend that line, or put gs.GradientReversal() in its place",
}


@dataclass(frozen=True)
class Finding:
    """One place whose output equals its input, and what it makes of the gradient.

    Example:
        >>> import torch
        >>> from grl_surgery import GradientReversal, find_reversals
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), GradientReversal(0.5), torch.nn.Linear(8, 2))
        >>> [(row.where, row.factor, row.ok) for row in find_reversals(net, torch.randn(3, 4))]
        [('1', -0.5, True)]

    Args:
        where: The place in words: a module's path, or what stands in which module's forward.
        kind: ``module``, ``function`` (an autograd Function called in a forward) or ``hook`` (on a tensor).
        path: Of the module, or of the module whose forward makes the call.
        name: Of the class or the hook: for the reader; nothing depends on it.
        factor: What it multiplies gradients by; one number for each sample where they differ; None where what
            leaves is no multiple of what enters.
        verdict: ``reverses``, or why it does not: a key of ``FIXES``.
        note: What was measured, in words.
        source: File and line, where they are known.
        coeff_from: What sets the coefficient, found by changing it: ``grl.alpha``; None where nothing does.
        moves: Whether the factor is another one at the next forward.
        remarks: Further observations.
        calls: How often one forward calls it.
        ours: Whether it is a :class:`GradientReversal` already.
    """

    where: str
    kind: str
    path: str
    name: str
    factor: float | tuple[float, ...] | None
    verdict: str
    note: str = ""
    source: str | None = None
    coeff_from: str | None = None
    moves: bool = False
    remarks: tuple[str, ...] = ()
    calls: int = 1
    ours: bool = False

    @property
    def ok(self) -> bool:
        """Whether it reverses a gradient that reaches a trainable parameter."""
        return self.verdict == "reverses"

    @property
    def is_silent(self) -> bool:
        """Whether the place looks like a reversal and passes the gradient unreversed, without an error."""
        return self.verdict not in ("reverses", "no multiple", "fails", "signed, negative")

    @property
    def fix(self) -> str:
        """How to mend it; empty if nothing is wrong."""
        if self.verdict == "fails" and "inplace" in self.note:
            return "no inplace=True behind it; or gs.adopt(model), where no other branch reads that value"
        return FIXES.get(self.verdict, "")

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain data, ready for JSON."""
        return {"ok": self.ok, "fix": self.fix, **asdict(self)}

    def __str__(self) -> str:
        note = f": {self.note}" if self.note else ""
        return f"{self.where} {self.verdict}{note} (factor {shown_factor(self.factor)}, {self.source})"


def shown_factor(factor: float | tuple[float, ...] | None) -> str:
    """A factor as a table shows it."""
    if factor is None:
        return "none"
    if isinstance(factor, tuple):
        return f"{min(factor):g} to {max(factor):g}, per sample"
    return f"{factor + 0.0:g}" if factor <= 0 else f"+{factor:g}"


@dataclass(frozen=True)
class Outcome:
    """What became of the reversals in one context.

    Args:
        context: Its name.
        status: ``alive``; ``LOST``: no error, and the gradient is as without the reversal; ``wrong``: no
            error, and it is neither; ``frozen``: alive, with the coefficient of the moment for good;
            ``off``: the identity in that mode, as its author wrote it; ``error``.
        note: The error, or what is known besides.
    """

    context: str
    status: Status
    note: str = ""

    @property
    def is_silent(self) -> bool:
        """Whether a gradient is not what eager mode gives, and nothing says so."""
        return self.status in ("LOST", "wrong")
