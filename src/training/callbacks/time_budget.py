"""Fit the number of training steps to a time budget, so that the learning-rate schedule ends with it."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm

from src.training.base import TrainingModule
from src.training.checkpoint_io import tolerate_full_disk
from src.training.lightning_internals import set_max_steps
from src.training.optim import replace_schedule

UNTIMED_STEPS = 5
"""Untimed steps at the start: they compile, allocate memory and start workers."""

FIRST_ESTIMATE = 10
"""Steps after which a first estimate of the time per step decides how long to measure."""

MIN_MEASURED = 20
"""Least number of steps, untimed ones included, before the number of steps is fixed."""

MEASURED_SHARE = 0.05
"""Share of the budget to measure before the number of steps is fixed, if that is longer than `MIN_MEASURED` steps."""

VALIDATION_SHARE = 0.1
"""Share of the budget reserved for validations if some will run and none has been measured."""


class TimeBudget(L.Callback):
    """Fix the number of steps early in a run, so that training takes `minutes` and the learning rate ends on time.

    The number is at least `min_steps` and at most `trainer.max_steps`. The first process determines it for all. The
    budget includes compilation, validations and training time before a resume, but nothing after the last step. Until
    the number is fixed, the learning rate follows the schedule of a run with `trainer.max_steps` steps. Checkpoints
    store the number, so a resumed run keeps it unless `minutes` has changed. `directory`/time_budget.json records it.
    With `minutes=None` the callback does nothing.

    Raises ValueError for `minutes` that are not positive and finite, and for `min_steps` below 1.
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)
    """Returns the time in seconds; tests replace it."""

    def __init__(self, directory: str, minutes: float | None = None, min_steps: int = 1) -> None:
        if minutes is not None and not 0 < minutes < math.inf:
            raise ValueError(f"callbacks.time_budget.minutes={minutes} must be above 0; null trains trainer.max_steps")
        if min_steps < 1:
            raise ValueError(f"callbacks.time_budget.min_steps={min_steps} must be at least 1")
        self.directory = Path(directory)
        self.minutes = minutes
        self.min_steps = min_steps
        self.num_steps: int | None = None
        """Steps that fit into the budget, before both limits apply; None until it is known."""
        self._earlier_s = 0.0  # training time before this start
        self._started: float | None = None
        self._validations: list[float] = []  # duration in seconds of each validation since the start
        self._validation_start = 0.0
        self._timed_from = (0, 0.0)  # first timed step, and the clock then, minus validations
        self._first_step = 0
        self._next_step = -1  # the step whose end the callback acts on; -1 for none

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = self.clock()
        self._validations = []
        if self.minutes is not None and self.num_steps is None:
            self._first_step = trainer.global_step
            self._next_step = self._first_step + UNTIMED_STEPS

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_start = self.clock()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._started is not None:
            self._validations.append(self.clock() - self._validation_start)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step != self._next_step or step >= trainer.max_steps:
            return
        device = trainer.strategy.root_device
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        now = self.clock() - sum(self._validations)
        if step == self._first_step + UNTIMED_STEPS:
            self._timed_from = (step, now)
            self._next_step = self._first_step + FIRST_ESTIMATE
            return
        first_timed, start = self._timed_from
        seconds = max((now - start) / (step - first_timed), 1e-9)
        if step == self._first_step + FIRST_ESTIMATE:
            assert self.minutes is not None
            measured = max(MIN_MEASURED, math.ceil(MEASURED_SHARE * 60 * self.minutes / seconds))
            self._next_step = self._first_step + trainer.strategy.broadcast(measured)
            return
        self._next_step = -1
        self._fix(trainer, pl_module, seconds)

    def _fix(self, trainer: L.Trainer, module: L.LightningModule, seconds: float) -> None:
        """Fix the number of steps and the learning-rate schedule, given the seconds per training step. Collective."""
        assert isinstance(module, TrainingModule) and self.minutes is not None
        decided_at, limit = trainer.global_step, trainer.max_steps
        left = 60 * self.minutes - self._elapsed_s()
        if self._validations:
            seconds += sum(self._validations) / len(self._validations) / module.validation_period
        elif trainer.enable_validation and decided_at + left / seconds >= module.validation_period:
            left -= VALIDATION_SHARE * 60 * self.minutes
        self.num_steps = trainer.strategy.broadcast(decided_at + max(0, int(left / seconds)))
        self._limit(trainer)
        for config in trainer.lr_scheduler_configs:
            config.scheduler = replace_schedule(config.scheduler, module.prepare_optimizer(trainer.max_steps)[1])
        if not trainer.is_global_zero:
            return
        reason = {limit: " (trainer.max_steps)", self.min_steps: " (min_steps)"}.get(trainer.max_steps, "")
        limited = "" if trainer.max_steps == self.num_steps else f"; training takes {trainer.max_steps:,}{reason}"
        tqdm.write(f"{self.num_steps:,} steps fit into {self.minutes:.1f} minutes ({seconds:.2g} s per step){limited}")
        record = {
            "minutes": self.minutes,
            "num_steps": trainer.max_steps,
            "fitting_steps": self.num_steps,
            "max_steps": limit,
            "seconds_per_step": round(seconds, 6),
            "decided_at_step": decided_at,
        }
        path = self.directory / "time_budget.json"
        with tolerate_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _limit(self, trainer: L.Trainer) -> None:
        """Set the number of steps of the Trainer; calling it again changes nothing."""
        assert self.num_steps is not None
        set_max_steps(trainer, min(max(self.num_steps, self.min_steps, trainer.min_steps or 0), trainer.max_steps))

    def _elapsed_s(self) -> float:
        return self._earlier_s + (0.0 if self._started is None else self.clock() - self._started)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["time_budget"] = (self.minutes, self.num_steps, self._elapsed_s())

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.restore(trainer, checkpoint)

    def restore(self, trainer: L.Trainer, checkpoint: Mapping[str, Any]) -> None:
        """Restore the elapsed time of a checkpoint, and its number of steps if `minutes` is unchanged."""
        minutes, num_steps, self._earlier_s = checkpoint.get("time_budget", (None, None, 0.0))
        if self.minutes is not None and minutes == self.minutes and num_steps is not None:
            self.num_steps = num_steps
            self._limit(trainer)
