"""Hugging Face Trainer: a callback that steps the coefficient's schedule and logs what the head does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grl_surgery.errors import SurgeryError
from grl_surgery.integrations.scalars import scalars
from grl_surgery.nn.heads import find_heads
from grl_surgery.training.metrics import AdversarialMetrics
from grl_surgery.training.schedules import CoefficientScheduler, check_schedule, dann

__all__ = ["GradientReversalCallback"]


class GradientReversalCallback(TrainerCallback):
    """Steps the coefficient once for each step of the optimizer, and adds the metrics to what is logged.

    ``grl/coeff`` is added to every record of the trainer's ``state.log_history``. The metrics of a domain
    head need its logits: call :meth:`watch` with them where the loss is computed. Trackers such as
    TensorBoard are callbacks themselves and see what callbacks before them have added: put this one first,
    ``trainer.callback_handler.callbacks.insert(0, callback)``, where they shall show it. A run that is
    resumed goes on with exactly its coefficients, from the step that the trainer is at. Several heads take a
    callback each, with a ``head``, an ``only`` and a ``prefix`` of its own.

    Example:
        >>> from grl_surgery.training.schedules import dann
        >>> callback = GradientReversalCallback(dann(hi=0.3))

    Args:
        schedule: From progress in [0, 1] to the coefficient;
            :func:`grl_surgery.training.schedules.dann` by default.
        head: Name of the head to watch, where the network has several.
        only: Names of the reversals to drive; all by default.
        prefix: What each logged name begins with.

    Raises:
        SurgeryError: ``schedule`` is no schedule.
    """

    def __init__(
        self,
        schedule: Callable[[float], float] | None = None,
        *,
        head: str | None = None,
        only: str | Sequence[str] | None = None,
        prefix: str = "grl/",
    ) -> None:
        self.schedule = dann() if schedule is None else schedule
        check_schedule(self.schedule)
        self.head, self.only, self.prefix = head, only, prefix
        self.scheduler: CoefficientScheduler | None = None
        self.metrics: AdversarialMetrics | None = None
        self._watched: list[tuple[Tensor, Tensor | int]] = []
        self._measured = False

    def watch(self, domain_logits: Tensor, domains: Tensor | int) -> None:
        """Hand over what the head said of one batch; call it in ``compute_loss``.

        Args:
            domain_logits: As for :func:`grl_surgery.domain_loss`; only those of training steps are kept.
            domains: (B,) integers, or one integer for the whole batch.
        """
        if self.metrics is not None and domain_logits.requires_grad:
            self._watched.append((domain_logits.detach(), domains))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the first coefficient, or the one of the step at which the run is resumed."""
        if self.metrics is not None:  # of a run that ended with an exception, of which no callback is told
            self.metrics.close()
        self._watched.clear()
        model: nn.Module = kwargs["model"]
        self.scheduler = CoefficientScheduler(model, self.schedule, state.max_steps, only=self.only)
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), "steps_done": state.global_step})
        self.metrics = AdversarialMetrics(model, head=self.head) if find_heads(model) else None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take in the batches of this step while their gradients are there."""
        for logits, domains in self._watched:
            assert self.metrics is not None
            self.metrics.update(logits, domains)
            self._measured = True
        self._watched.clear()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the coefficient of the next step."""
        if self.scheduler is not None and self.scheduler.steps_done < self.scheduler.total_steps:
            self.scheduler.step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the coefficient and what was measured since the last record.

        Raises:
            SurgeryError: Another callback has added something of the same name.
        """
        if self.scheduler is None:
            return
        values = {f"{self.prefix}coeff": self.scheduler.coeff}
        if values.keys() & kwargs["logs"].keys():
            raise SurgeryError(
                f"two callbacks log under the prefix {self.prefix!r}",
                example="GradientReversalCallback(head='early', only='early', prefix='early/')",
            )
        if self.metrics is not None and self._measured:
            values |= scalars(self.metrics.report(), self.prefix)
            self.metrics.reset()
            self._measured = False
        kwargs["logs"].update(values)
        state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hook off the reversal."""
        if self.metrics is not None:
            self.metrics.close()
