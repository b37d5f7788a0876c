"""An adversarial report as the numbers that loggers take."""

from __future__ import annotations

from grl_surgery.training.metrics import AdversarialReport

__all__ = ["scalars"]


def scalars(report: AdversarialReport, prefix: str = "grl/") -> dict[str, float]:
    """The numbers of a report by name, such as ``grl/domain_accuracy``.

    Example:
        >>> from grl_surgery.training.metrics import AdversarialReport
        >>> report = AdversarialReport({0: 4, 1: 4}, 2, 0.5, {0: 1.0, 1: 0.5}, 0.6, 0.6931, 0.1, 0.2)
        >>> scalars(report)["grl/domain_accuracy"]
        0.75

    Args:
        report: What :meth:`AdversarialMetrics.report` returned.
        prefix: What each name begins with.

    Returns:
        Names to floats; what was not measured is left out.
    """
    values = {
        "coeff": report.coeff,
        "domain_accuracy": report.balanced_accuracy,
        **{f"domain_accuracy/{domain}": accuracy for domain, accuracy in report.accuracy.items()},
        "domain_loss": report.loss,
        "chance_loss": report.chance_loss,
        "head_gradient": report.head_gradient,
        "splice_gradient": report.splice_gradient,
        "a_distance": report.a_distance,
    }
    return {f"{prefix}{name}": float(value) for name, value in values.items() if value is not None}
