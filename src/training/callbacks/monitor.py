"""Progress bar, throughput, memory, and how a run started."""

import json
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from src.diffusion.noise import Schedule
from src.training.checkpoint_io import tolerate_full_disk
from src.training.loggers import log_picture, log_values, show_pictures
from src.training.module import DiffusionModule
from src.training.provenance import code_version, environment
from src.viz import charts


class Progress(TQDMProgressBar):
    """Lightning's bar, which reads the loss when it moves: with `prog_bar=True` Lightning reads it at every step.

    For that a GPU's queue of work would have to run empty. `refresh_rate` is in batches; 0 shows no bar.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.loss: Tensor | None = None
        """Of the last batch, divided by the number of batches to a step; None before there was one."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.loss = outputs["loss"]
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bars, so that what is printed about the exception has a line of its own."""
        for bar in (self._train_progress_bar, self._val_progress_bar):
            if bar is not None:
                bar.close()

    @property
    def total_train_batches(self) -> int:
        """Batches that are still to come; Lightning takes the steps for them."""
        return (self.trainer.max_steps - self.trainer.global_step) * self.trainer.accumulate_grad_batches

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        if self.loss is None:
            return metrics
        return {"train/loss": self.loss.item() * trainer.accumulate_grad_batches, **metrics}


class LearningRate(LearningRateMonitor):
    """Log the learning rate at every step.

    Where a finished run goes on Lightning's own count of steps, as of which loggers log, is one too large: it is set
    right here, before the first value of a step is logged.
    """

    def __init__(self) -> None:
        super().__init__(logging_interval="step")

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        super().on_train_batch_start(trainer, *args, **kwargs)


class RunInfo(L.Callback):
    """At each start of a run: code and environment into `directory`/environment.json, and what loggers show of it.

    They are given the configuration, this start, and a picture of the schedule.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
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
        if trainer.global_step == 0 and show_pictures(trainer):
            log_picture(trainer, "schedule", schedule_picture(pl_module.schedule))


def append_start(path: Path, start: dict[str, Any]) -> None:
    """Add a start to those that the file lists, of which each belongs to the steps from its own on."""
    before = json.loads(path.read_text())["starts"] if path.is_file() else []
    kept = [old for old in before if old["step"] < start["step"]]
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps({"starts": [*kept, start]}, indent=2) + "\n")
    os.replace(partial, path)


def schedule_picture(schedule: Schedule) -> Any:
    """beta, alpha_bar and log-SNR over time."""
    at = schedule.at((torch.arange(schedule.num_steps, dtype=torch.float64) + 1) / schedule.num_steps)
    alpha, sigma = (torch.stack([getattr(level, name) for level in at]) for name in ("alpha", "sigma"))
    # Of a curve whose variance grows: as if alpha^2 + sigma^2 were 1.
    norm = torch.hypot(alpha, sigma)
    alpha, sigma = alpha / norm, sigma / norm
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha[:-1]])
    return charts.schedule_curves({"this run": (1 - (alpha / before).square(), alpha, sigma)})


class Throughput(L.Callback):
    """Every `trainer.log_every_n_steps` steps: how fast the steps since the last time were, and the memory in use.

    `speed/samples_per_second` counts those of the global batch; validation is not in it, saving is. `memory/gib` is the
    first process's: of a GPU the most so far, of a CPU what it holds now. Nothing waits for the device, which runs at
    most one such span behind.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since, self._step = time.perf_counter(), trainer.global_step

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._since, self._step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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
    """Bytes: of a GPU the most that tensors have taken so far, of a CPU what the process holds now."""
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
