"""The training loss by noise level."""

import csv
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from src.diffusion.noise import Schedule
from src.training.checkpoint_io import tolerate_full_disk
from src.training.loggers import log_picture, show_pictures
from src.training.module import DiffusionModule
from src.viz import charts

MAX_LOG_SNR = 15.0
"""Where the bins of `LossByNoise` end at the latest: sigma / alpha is 1800 there, or its inverse."""


class LossByNoise(L.Callback):
    """The training loss by level of noise: the mean in each of `bins` equal bins of log-SNR, at every validation.

    Of all samples of all processes since the last time, with the objective's weighting and without that of
    `timestep_sampler`. Into `directory`/loss_by_noise.csv, and as a heat-map to loggers that show pictures. The bins run from
    the schedule's noisiest level to its cleanest, as they are when training starts, within +-15; what lies beyond is in
    the outermost. Steps only hand their losses over: they are sorted into bins on the device, which is waited for at
    validations and when a checkpoint is saved.
    """

    HEADER = ("step", "log_snr", "loss", "samples")

    def __init__(self, directory: str, num_bins: int = 20) -> None:
        if num_bins < 1:
            raise ValueError(f"callbacks.loss_by_noise.num_bins must be at least 1, got {num_bins}: 20 is usual")
        self.path = Path(directory) / "loss_by_noise.csv"
        self.num_bins = num_bins
        self._parts: list[tuple[Tensor, Tensor]] = []
        """Of a step that is not completed: a run that stops in it takes it once more."""
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._history: list[tuple[int, list[float], list[float]]] = []
        """Step, sums (bins,) of the loss, and counts (bins,)."""
        self._left: tuple[list[float], list[float]] | None = None
        """Sums and counts since the last validation, of a checkpoint."""
        self._ends: tuple[float, float] | None = None
        self._totals: Tensor | None = None
        """(2, bins) sums and counts of this process's samples since the last validation, once training has started."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self._low, self._high = self._ends = self._ends or log_snr_range(pl_module.schedule)
        self._totals = torch.zeros(2, self.num_bins, device=pl_module.device)
        if self._left and trainer.is_global_zero:
            self._totals += torch.tensor(self._left, device=pl_module.device)
        self._left = None
        self._parts.clear()
        self._pending.clear()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._parts.append((outputs["v"], outputs["terms"]["loss"]))
        if len(self._parts) == trainer.accumulate_grad_batches:
            self._pending += self._parts
            self._parts.clear()
        if len(self._pending) >= 32:
            self._sort(pl_module)

    @torch.no_grad()
    def _sort(self, module: L.LightningModule) -> None:
        """What is pending into its bins."""
        assert isinstance(module, DiffusionModule)
        if not self._pending or self._totals is None:
            return
        v, losses = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        t = module.transition(v, v).t
        place = (t.snr.log().clamp(self._low, self._high) - self._low) / (self._high - self._low)
        index = (place * self.num_bins).long().clamp(max=self.num_bins - 1)
        finite = losses.isfinite()
        values = torch.stack([torch.where(finite, losses, 0), finite]).to(self._totals)
        self._totals.index_add_(1, index, values)

    def _gathered(self, trainer: L.Trainer, module: L.LightningModule) -> tuple[list[float], list[float]]:
        """Sums and counts over all processes."""
        if self._totals is None:  # resumed when there was nothing left to train
            return self._left or ([0.0] * self.num_bins, [0.0] * self.num_bins)
        self._sort(module)
        sums, counts = trainer.strategy.all_gather(self._totals).view(-1, 2, self.num_bins).sum(0).tolist()
        return sums, counts

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._flush(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._flush(trainer, pl_module)

    def _flush(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        sums, counts = self._gathered(trainer, module)
        if self._totals is not None:
            self._totals.zero_()
        if not any(counts):  # a validation that is made up for
            return
        self._history.append((trainer.global_step, sums, counts))
        if not trainer.is_global_zero:
            return
        with tolerate_full_disk(self.path):
            partial = self.path.with_suffix(".tmp")
            with partial.open("w", newline="") as file:
                csv.writer(file).writerows([self.HEADER, *(line for row in self._history for line in self._lines(row))])
            os.replace(partial, self.path)
            if show_pictures(trainer):
                log_picture(trainer, "loss_by_noise", charts.loss_by_noise(self.path))

    def _lines(self, row: tuple[int, list[float], list[float]]) -> list[tuple[int, float, float | None, int]]:
        """Of each bin: the step, the bin's centre, the mean (none without samples) and the number of samples."""
        step, sums, counts = row
        width = (self._high - self._low) / self.num_bins
        return [
            (step, round(self._low + (k + 0.5) * width, 6), sums[k] / counts[k] if counts[k] else None, int(counts[k]))
            for k in range(self.num_bins)
        ]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        left = self._gathered(trainer, pl_module)
        checkpoint["loss_by_noise"] = {"ends": self._ends, "left": left, "history": [*self._history]}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("loss_by_noise")
        if trainer.state.fn == TrainerFn.FITTING and saved and len(saved["left"][0]) == self.num_bins:
            self._ends, self._left, self._history = saved["ends"], saved["left"], [*saved["history"]]


def log_snr_range(schedule: Schedule) -> tuple[float, float]:
    """The log-SNR of the noisiest level and of the cleanest that is not clean data, within +-15."""
    noisiest, cleanest = schedule.at(torch.tensor([1.0, schedule.first], dtype=torch.float64))
    low, high = (max(-MAX_LOG_SNR, min(MAX_LOG_SNR, t.snr.log().item())) for t in (noisiest, cleanest))
    return low, high
