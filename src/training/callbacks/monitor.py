"""Progress bar, learning rate, throughput, memory, and the record of each start."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from src.cache import write_atomically
from src.diffusion.noise import Schedule
from src.training.checkpoint_io import tolerate_full_disk
from src.training.lightning_internals import FirstLearningRateMonitor, close_progress_bars, correct_logged_step
from src.training.loggers import log_hparams, log_picture, log_values, show_pictures
from src.training.module import DiffusionModule
from src.training.provenance import code_version, environment
from src.viz import line_plots

SECONDS_PER_LINE = 10.0


class Progress(TQDMProgressBar):
    """Lightning's progress bar on a terminal; elsewhere at most one line per 10 s.

    It reads the loss only to display it; `self.log(prog_bar=True)` would wait for the device in every step.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.loss: Tensor | None = None
        """Loss of the last batch, divided by the number of batches per step; None before the first."""
        self._prints_lines = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not sys.stdout.isatty():
            self._prints_lines = trainer.is_global_zero and self.is_enabled
            self.disable()

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        self._last_line = time.monotonic(), self.trainer.global_step  # time in seconds and step
        self._max_steps = self.trainer.max_steps

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.train_progress_bar.reset(self.total_train_batches)
        self.train_progress_bar.initial = 0
        self.train_progress_bar.set_description("Training")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *rest: Any) -> None:
        self.loss = outputs["loss"]
        if (fewer := self._max_steps - trainer.max_steps) and self.train_progress_bar.total is not None:
            self.train_progress_bar.total -= fewer * trainer.accumulate_grad_batches
        self._max_steps = trainer.max_steps  # `TimeBudget` lowers it once
        super().on_train_batch_end(trainer, pl_module, outputs, *rest)
        (before, step), now = self._last_line, time.monotonic()
        is_last = trainer.global_step == trainer.max_steps
        if self._prints_lines and trainer.global_step > step and (is_last or now - before >= SECONDS_PER_LINE):
            metrics = ", ".join(f"{name} {float(v):.4g}" for name, v in self.get_metrics(trainer, pl_module).items())
            rate = (trainer.global_step - step) / max(now - before, 1e-9)
            sys.stdout.write(f"step {trainer.global_step} of {trainer.max_steps}: {metrics}, {rate:.3g} steps/s\n")
            sys.stdout.flush()
            self._last_line = now, trainer.global_step

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        close_progress_bars(self)

    @property
    def total_train_batches(self) -> int:
        """Return the number of remaining batches; Lightning's property counts steps."""
        return (self.trainer.max_steps - self.trainer.global_step) * self.trainer.accumulate_grad_batches

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        loss = {} if self.loss is None else {"train/loss": self.loss.item() * trainer.accumulate_grad_batches}
        return loss | metrics


class LearningRate(FirstLearningRateMonitor):
    """Log the learning rate in every step, without `lr_multipliers`."""

    def __init__(self) -> None:
        super().__init__(logging_interval="step")

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        correct_logged_step(trainer)  # before the first value of a step is logged
        super().on_train_batch_start(trainer, *args, **kwargs)


class RunInfo(L.Callback):
    """Record code version and environment of each start in `directory`/environment.json and the loggers."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        start = {
            "step": trainer.global_step,
            "code": code_version(),
            **environment(trainer.strategy.root_device, trainer.world_size),
        }
        path = self.directory / "environment.json"
        with tolerate_full_disk(path):
            append_start(path, start)
        log_values(trainer, "environment", start)
        log_hparams(trainer, pl_module.hparams)
        is_new = trainer.global_step == 0 and show_pictures(trainer)
        if is_new and isinstance(pl_module, DiffusionModule):
            log_picture(trainer, "schedule", schedule_picture(pl_module.schedule))


def append_start(path: Path, start: dict[str, Any]) -> None:
    """Append a start to the file's list, replacing any at later steps; each covers the steps that follow it."""
    before = json.loads(path.read_text())["starts"] if path.is_file() else []
    kept = [old for old in before if old["step"] < start["step"]]
    write_atomically(path, json.dumps({"starts": [*kept, start]}, indent=2).encode() + b"\n")


def schedule_picture(schedule: Schedule) -> Any:
    """Plot beta, alpha_bar and log-SNR over time."""
    at = schedule.at((torch.arange(schedule.num_steps, dtype=torch.float64) + 1) / schedule.num_steps)
    # Variance-exploding schedules are normalized to alpha^2 + sigma^2 = 1.
    alpha, sigma = (torch.stack([getattr(level, name) / level.norm for level in at]) for name in ("alpha", "sigma"))
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha[:-1]])
    return line_plots.schedule_curves({"this run": (1 - (alpha / before).square(), alpha, sigma)})


class Throughput(L.Callback):
    """Log speed and the first process's memory every `trainer.log_every_n_steps` steps, without waiting for the device.

    `speed/samples_per_second` counts samples of the global batch; the time includes saving but not validation.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since, self._step = time.perf_counter(), trainer.global_step

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._step or step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        now = time.perf_counter()
        rate = (step - self._step) / (now - self._since)
        self._since, self._step = now, step
        device = trainer.strategy.root_device
        values = {
            "speed/steps_per_second": rate,
            "speed/samples_per_second": rate * trainer.datamodule.batch_size,  # type: ignore[attr-defined]
            "memory/gib": used_memory(device) / 2**30,
        }
        pl_module.log_dict(values, rank_zero_only=True)


def used_memory(device: torch.device) -> int:
    """Return bytes in use: the peak of tensors on a GPU, the process's (peak) resident memory on a CPU."""
    if device.type in ("cuda", "xpu"):
        return int(torch.get_device_module(device).max_memory_allocated(device))
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    table = Path("/proc/self/statm")
    if table.is_file():
        return int(table.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024
