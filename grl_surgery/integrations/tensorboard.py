"""TensorBoard: the coefficient, the domain accuracy and the gradients of an adversarial run as curves."""

from __future__ import annotations

from torch.utils.tensorboard.writer import SummaryWriter

from grl_surgery.integrations.scalars import scalars
from grl_surgery.training.metrics import AdversarialReport

__all__ = ["write_report"]


def write_report(writer: SummaryWriter, report: AdversarialReport, step: int, prefix: str = "grl/") -> None:
    """Write a report's numbers as scalars and its verdict as text.

    Example:
        >>> import tempfile
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> from grl_surgery.training.metrics import AdversarialReport
        >>> report = AdversarialReport({0: 4, 1: 4}, 2, 0.5, {0: 1.0, 1: 0.5}, 0.6, 0.6931, 0.1, 0.2)
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     write_report(writer, report, step=100)

    Args:
        writer: Where to write.
        report: What :meth:`AdversarialMetrics.report` returned.
        step: Number of training steps made.
        prefix: What each name begins with; another one for each head.
    """
    for name, value in scalars(report, prefix).items():
        writer.add_scalar(name, value, step)
    writer.add_text(f"{prefix}verdict", f"{report.verdict}: {report.explanation}", step)
