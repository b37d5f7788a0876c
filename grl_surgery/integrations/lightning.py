"""Lightning: a callback that steps the coefficient's schedule and logs what the domain head does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from grl_surgery.heads import find_heads
from grl_surgery.integrations.scalars import scalars
from grl_surgery.metrics import AdversarialMetrics
from grl_surgery.schedules import CoefficientScheduler, dann

__all__ = ["GradientReversalCallback"]


class GradientReversalCallback(Callback):
    """Steps the coefficient once for each step of the optimizer, and logs the run's adversarial metrics.

    The coefficient is logged as ``grl/coeff``. Where ``training_step`` returns a dict with ``domain_logits``
    and ``domains`` beside its ``loss``, the head's accuracy, loss and gradients are logged as well, every
    ``log_every_n_steps`` of the trainer. Gradients are read after the step, that is after any clipping. A run
    that is resumed from a checkpoint of Lightning goes on with exactly its coefficients.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from grl_surgery.schedules import dann
        >>> callback = GradientReversalCallback(dann(hi=0.3))
        >>> trainer = Trainer(callbacks=[callback], accelerator="cpu", logger=False)

    Args:
        schedule: From progress in [0, 1] to the coefficient; :func:`grl_surgery.schedules.dann` by default.
        total_steps: Number of optimizer steps; by default as many as the trainer says it will make.
        head: Name of the head to watch, where the network has several.
        only: Names of the reversals to drive; all by default.
    """

    def __init__(
        self,
        schedule: Callable[[float], float] | None = None,
        total_steps: int | None = None,
        *,
        head: str | None = None,
        only: str | Sequence[str] | None = None,
    ) -> None:
        self.schedule = dann() if schedule is None else schedule
        self.total_steps, self.head, self.only = total_steps, head, only
        self.scheduler: CoefficientScheduler | None = None
        self.metrics: AdversarialMetrics | None = None
        self._steps_seen = 0
        self._resumed: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the first coefficient, or the one of the checkpoint.

        Raises:
            SurgeryError: The network has no reversal, or the trainer does not know how long it will run.
        """
        total = self.total_steps or trainer.estimated_stepping_batches
        whole = int(total) if float(total).is_integer() else total
        self.scheduler = CoefficientScheduler(pl_module, self.schedule, whole, only=self.only)  # type: ignore[arg-type]
        if self._resumed is not None:
            self.scheduler.load_state_dict(self._resumed)
        self._steps_seen = trainer.global_step
        self.metrics = AdversarialMetrics(pl_module, head=self.head) if find_heads(pl_module) else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the step that was made, log, and set the coefficient of the next one."""
        if self.scheduler is None or trainer.global_step == self._steps_seen:
            return  # gradients are still being accumulated
        self._steps_seen = trainer.global_step
        pl_module.log("grl/coeff", self.scheduler.coeff)
        self._measure(trainer, pl_module, outputs)
        if self.scheduler.steps_done < self.scheduler.total_steps:
            self.scheduler.step()

    def _measure(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        known = isinstance(outputs, Mapping) and {"domain_logits", "domains"} <= outputs.keys()
        if self.metrics is None or not known:
            return
        self.metrics.update(outputs["domain_logits"], outputs["domains"])
        # The trainer's loggers decide by the same condition whether they keep what is logged now.
        if self._steps_seen % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = scalars(self.metrics.report())
            del values["grl/coeff"]
            pl_module.log_dict({name: torch.tensor(value) for name, value in values.items()})
            self.metrics.reset()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hook off the reversal."""
        if self.metrics is not None:
            self.metrics.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, for the trainer's checkpoint."""
        return {} if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when training starts."""
        self._resumed = state_dict or None
