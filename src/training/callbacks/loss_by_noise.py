"""The training loss by noise level."""

import csv
import io
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from src.cache import write_atomically
from src.diffusion.noise import Schedule
from src.training.checkpoint_io import tolerate_full_disk
from src.training.loggers import log_picture, show_pictures
from src.training.module import DiffusionModule
from src.viz import line_plots

MAX_LOG_SNR = 15.0  # bound of the bins' range: sigma / alpha is 1800 at -15


class LossByNoise(L.Callback):
    """At every validation, write the mean training loss in each of `num_bins` equal bins of log-SNR.

    The means cover all samples of all processes since the last validation, with the weighting of the loss and without
    that of `timestep_sampler`. They go to `directory`/loss_by_noise.csv and to loggers that show pictures. The bins
    span the schedule's log-SNR at the start of training, within +-15; the outermost bins include everything beyond.
    """

    HEADER = ("step", "log_snr", "loss", "samples")

    def __init__(self, directory: str, num_bins: int = 20) -> None:
        if num_bins < 1:
            raise ValueError(f"callbacks.loss_by_noise.num_bins={num_bins} must be at least 1: 20 is usual")
        self.path = Path(directory) / "loss_by_noise.csv"
        self.num_bins = num_bins
        self._microbatches: list[tuple[Tensor, Tensor]] = []
        """Micro-batches of the unfinished step; a resumed run repeats it."""
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._history: list[tuple[int, list[float], list[float]]] = []
        """Step, sums of the loss (num_bins,) and counts (num_bins,) of each validation."""
        self._resumed: tuple[list[float], list[float]] | None = None
        """Sums and counts since the last validation, from a checkpoint."""
        self._range: tuple[float, float] | None = None
        self._totals: Tensor | None = None
        """(2, num_bins) sums and counts of this process since the last validation; None before training."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self._low, self._high = self._range = self._range or log_snr_range(pl_module.schedule)
        self._totals = torch.zeros(2, self.num_bins, device=pl_module.device)
        if self._resumed and trainer.is_global_zero:
            self._totals += torch.tensor(self._resumed, device=pl_module.device)
        self._resumed = None
        self._microbatches.clear()
        self._pending.clear()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self._microbatches.append((outputs["v"], outputs["terms"]["loss"]))
        if len(self._microbatches) == trainer.accumulate_grad_batches:
            self._pending += self._microbatches
            self._microbatches.clear()
        if len(self._pending) >= 32:
            self._bin_pending(pl_module)

    @torch.no_grad()
    def _bin_pending(self, module: L.LightningModule) -> None:
        """Add the pending losses to their bins."""
        assert isinstance(module, DiffusionModule)
        if not self._pending or self._totals is None:
            return
        v, losses = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        t = module.transition(v, v).t
        position = (t.snr.log().clamp(self._low, self._high) - self._low) / (self._high - self._low)
        index = (position * self.num_bins).long().clamp(max=self.num_bins - 1)
        finite = losses.isfinite()
        values = torch.stack([torch.where(finite, losses, 0), finite]).to(self._totals)
        self._totals.index_add_(1, index, values)

    def _gathered(self, trainer: L.Trainer, module: L.LightningModule) -> tuple[list[float], list[float]]:
        """Return sums and counts over all processes."""
        if self._totals is None:  # resumed with no steps left
            return self._resumed or ([0.0] * self.num_bins, [0.0] * self.num_bins)
        self._bin_pending(module)
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
        if not any(counts):  # a repeated validation
            return
        self._history.append((trainer.global_step, sums, counts))
        if not trainer.is_global_zero:
            return
        with tolerate_full_disk(self.path):
            text = io.StringIO(newline="")
            csv.writer(text).writerows([self.HEADER, *(line for row in self._history for line in self._lines(row))])
            write_atomically(self.path, text.getvalue().encode())
            if show_pictures(trainer):
                log_picture(trainer, "loss_by_noise", line_plots.loss_by_noise(self.path))

    def _lines(self, row: tuple[int, list[float], list[float]]) -> list[tuple[int, float, float | None, int]]:
        """Return step, center, mean loss (None without samples) and number of samples of each bin."""
        step, sums, counts = row
        width = (self._high - self._low) / self.num_bins
        return [
            (step, round(self._low + (k + 0.5) * width, 6), sums[k] / counts[k] if counts[k] else None, int(counts[k]))
            for k in range(self.num_bins)
        ]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        totals = self._gathered(trainer, pl_module)
        checkpoint["loss_by_noise"] = {"ends": self._range, "left": totals, "history": [*self._history]}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("loss_by_noise")
        if trainer.state.fn == TrainerFn.FITTING and saved and len(saved["left"][0]) == self.num_bins:
            self._range, self._resumed, self._history = saved["ends"], saved["left"], [*saved["history"]]


def log_snr_range(schedule: Schedule) -> tuple[float, float]:
    """Return the log-SNR of the noisiest and the cleanest noise level of a schedule, within +-15."""
    noisiest, cleanest = schedule.at(torch.tensor([1.0, schedule.first], dtype=torch.float64))
    low, high = (max(-MAX_LOG_SNR, min(MAX_LOG_SNR, t.snr.log().item())) for t in (noisiest, cleanest))
    return low, high
