"""Lightning: a callback that steps the coefficient's schedule and logs what the domain head does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from grl_surgery.errors import SurgeryError
from grl_surgery.integrations.scalars import scalars
from grl_surgery.nn.heads import find_heads
from grl_surgery.nn.reversal import GradientReversal
from grl_surgery.training.metrics import AdversarialMetrics
from grl_surgery.training.schedules import CoefficientScheduler, check_schedule, dann
from grl_surgery.validation import check_count

__all__ = ["GradientReversalCallback"]

_ONE_OF_SEVERAL = "GradientReversalCallback(head='network.early', only='network.early', prefix='early/')"


class GradientReversalCallback(Callback):
    """Steps the coefficient once for each step of the optimizer, and logs the run's adversarial metrics.

    The coefficient is logged as ``grl/coeff``. Where ``training_step`` returns a dict with ``domain_logits``
    and ``domains`` beside its ``loss``, the head's accuracy, loss and gradients are logged as well, every
    ``log_every_n_steps`` of the trainer. Gradients are read after the step, that is after any clipping. A run
    that is resumed from a checkpoint of Lightning goes on with exactly its coefficients.

    Several heads take a callback each, with a ``head``, an ``only`` and a ``prefix`` of its own;
    ``domain_logits`` is then a dict from their names to their logits, and ``domains`` may be one as well.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from grl_surgery.training.schedules import dann
        >>> callback = GradientReversalCallback(dann(hi=0.3))
        >>> trainer = Trainer(callbacks=[callback], accelerator="cpu", logger=False)

    Args:
        schedule: From progress in [0, 1] to the coefficient;
            :func:`grl_surgery.training.schedules.dann` by default.
        total_steps: Number of optimizer steps; by default as many as the trainer says it will make.
        head: Name of the head to watch, where the network has several.
        only: Names of the reversals to drive; all by default.
        prefix: What each logged name begins with.

    Raises:
        SurgeryError: ``total_steps`` is no number of steps, or ``schedule`` no schedule.
    """

    def __init__(
        self,
        schedule: Callable[[float], float] | None = None,
        total_steps: int | None = None,
        *,
        head: str | None = None,
        only: str | Sequence[str] | None = None,
        prefix: str = "grl/",
    ) -> None:
        self.schedule = dann() if schedule is None else schedule
        check_schedule(self.schedule)
        if total_steps is not None:
            total_steps = check_count("total_steps", total_steps, example="total_steps=epochs * len(loader)")
        self.total_steps = total_steps
        self.head, self.only, self.prefix = head, only, prefix
        self.scheduler: CoefficientScheduler | None = None
        self.metrics: AdversarialMetrics | None = None
        self._steps_seen = 0
        self._resumed: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the first coefficient, or the one of the checkpoint.

        Raises:
            SurgeryError: The network has no reversal, the trainer does not know how long it will run, or
                another callback drives the same reversal or logs under the same names.
        """
        total = _steps_of(trainer) if self.total_steps is None else self.total_steps
        self.scheduler = CoefficientScheduler(pl_module, self.schedule, total, only=self.only)
        self._check_others(trainer, self.scheduler.reversals)
        if self._resumed is not None:
            self.scheduler.load_state_dict(self._resumed)
        self._steps_seen = trainer.global_step
        self.metrics = AdversarialMetrics(pl_module, head=self.head) if find_heads(pl_module) else None

    def _others(self, trainer: Trainer) -> list[GradientReversalCallback]:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return [c for c in callbacks if isinstance(c, GradientReversalCallback) and c is not self]

    def _check_others(self, trainer: Trainer, mine: Mapping[str, GradientReversal]) -> None:
        """Of two that set one layer, or log under one name, the later would hide the other."""
        for other in self._others(trainer):
            theirs = other.scheduler.reversals.values() if other.scheduler else ()
            shared = [name for name, layer in mine.items() if any(layer is driven for driven in theirs)]
            if shared or other.prefix == self.prefix:
                both = f"drive {shared[0]!r}" if shared else f"log under the prefix {self.prefix!r}"
                raise SurgeryError(f"two callbacks {both}", example=_ONE_OF_SEVERAL)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the step that was made, log, and set the coefficient of the next one."""
        if self.scheduler is None or trainer.global_step == self._steps_seen:
            return  # gradients are still being accumulated
        self._steps_seen = trainer.global_step
        pl_module.log(f"{self.prefix}coeff", self.scheduler.coeff)
        self._measure(trainer, pl_module, outputs)
        if self.scheduler.steps_done < self.scheduler.total_steps:
            self.scheduler.step()

    def _measure(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        known = isinstance(outputs, Mapping) and {"domain_logits", "domains"} <= outputs.keys()
        if self.metrics is None or not known:
            return
        logits, domains = outputs["domain_logits"], outputs["domains"]
        if not isinstance(logits, Mapping) and any(c.head != self.head for c in self._others(trainer)):
            raise SurgeryError(
                "several heads are watched, and training_step does not say whose 'domain_logits' it returns",
                example=f"'domain_logits': {{{self.head!r}: logits, ...}}",
            )
        self.metrics.update(self._of_head(logits), self._of_head(domains))
        # The trainer's loggers decide by the same condition whether they keep what is logged now.
        if self._steps_seen % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = scalars(self.metrics.report(), self.prefix)
            del values[f"{self.prefix}coeff"]
            pl_module.log_dict({name: torch.tensor(value) for name, value in values.items()})
            self.metrics.reset()

    def _of_head(self, given: Any) -> Any:
        """The head's own entry, where there is one for each head."""
        if not isinstance(given, Mapping):
            return given
        name = next(iter(given)) if self.head is None and len(given) == 1 else self.head
        if name not in given:
            raise SurgeryError(
                f"training_step returned nothing for the head {name!r}", choices=[str(key) for key in given]
            )
        return given[name]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hook off the reversal."""
        if self.metrics is not None:
            self.metrics.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hook off the reversal."""
        self.on_train_end(trainer, pl_module)

    @property
    def state_key(self) -> str:
        """Where the trainer's checkpoint keeps the state: one place for each head."""
        own = {name: value for name, value in (("head", self.head), ("only", self.only)) if value is not None}
        return f"{type(self).__qualname__}{own or ''}"

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, for the trainer's checkpoint."""
        return {} if self.scheduler is None else self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when training starts."""
        self._resumed = state_dict or None


def _steps_of(trainer: Trainer) -> int:
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        raise SurgeryError(
            "the trainer does not know how many steps it will make (max_time, or endless data)",
            example="GradientReversalCallback(total_steps=1000), or Trainer(max_steps=1000)",
        )
    return int(total)
