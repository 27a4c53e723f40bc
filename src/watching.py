"""What shows how a run goes: speed and memory, loss by level of noise, bits/dim, where it came from, its best model."""

import csv
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from src import plots
from src.checkpoints import read_checkpoint, shareable, weights_of, write_exported
from src.data.batch import StreamDataModule
from src.data.conditions import shown
from src.diffusion.noise import Schedule
from src.disk import without_room_go_on
from src.evaluation import Errors, ReverseVariance, bounds, check_halves, check_reverse_variance
from src.loggers import log_model, log_picture, log_values, show_pictures
from src.metrics.neighbours import Nearest, nearest
from src.module import DiffusionModule
from src.provenance import code_version, environment
from src.stopping import answer_signals

MAX_LOG_SNR = 15.0
"""Where the bins of `LossByNoise` end at the latest: sigma / alpha is 1800 there, or its inverse."""


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


class Beginning(L.Callback):
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
        with without_room_go_on(path):
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
    return plots.schedule_curves({"this run": (1 - (alpha / before).square(), alpha, sigma)})


class Speed(L.Callback):
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


class LossByNoise(L.Callback):
    """The training loss by level of noise: the mean in each of `bins` equal bins of log-SNR, at every validation.

    Of all samples of all processes since the last time, with the objective's weighting and without that of
    `timesteps`. Into `directory`/loss_by_noise.csv, and as a heat-map to loggers that show pictures. The bins run from
    the schedule's noisiest level to its cleanest, as they are when training starts, within +-15; what lies beyond is in
    the outermost. Steps only hand their losses over: they are sorted into bins on the device, which is waited for at
    validations and when a checkpoint is saved.
    """

    HEADER = ("step", "log_snr", "loss", "samples")

    def __init__(self, directory: str, bins: int = 20) -> None:
        if bins < 1:
            raise ValueError(f"callbacks.loss_by_noise.bins must be at least 1, got {bins}: 20 is usual")
        self.path = Path(directory) / "loss_by_noise.csv"
        self.bins = bins
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
        self._totals = torch.zeros(2, self.bins, device=pl_module.device)
        if self._left and trainer.is_global_zero:
            self._totals += torch.tensor(self._left, device=pl_module.device)
        self._left = None
        self._parts.clear()
        self._pending.clear()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._parts.append((outputs["v"], outputs["losses"]))
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
        t = module.link(v, v).t
        place = (t.snr.log().clamp(self._low, self._high) - self._low) / (self._high - self._low)
        index = (place * self.bins).long().clamp(max=self.bins - 1)
        finite = losses.isfinite()
        values = torch.stack([torch.where(finite, losses, 0), finite]).to(self._totals)
        self._totals.index_add_(1, index, values)

    def _gathered(self, trainer: L.Trainer, module: L.LightningModule) -> tuple[list[float], list[float]]:
        """Sums and counts over all processes."""
        if self._totals is None:  # resumed when there was nothing left to train
            return self._left or ([0.0] * self.bins, [0.0] * self.bins)
        self._sort(module)
        sums, counts = trainer.strategy.all_gather(self._totals).view(-1, 2, self.bins).sum(0).tolist()
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
        with without_room_go_on(self.path):
            partial = self.path.with_suffix(".tmp")
            with partial.open("w", newline="") as file:
                csv.writer(file).writerows([self.HEADER, *(line for row in self._history for line in self._lines(row))])
            os.replace(partial, self.path)
            if show_pictures(trainer):
                log_picture(trainer, "loss_by_noise", plots.loss_by_noise(self.path))

    def _lines(self, row: tuple[int, list[float], list[float]]) -> list[tuple[int, float, float | None, int]]:
        """Of each bin: the step, the bin's centre, the mean (none without samples) and the number of samples."""
        step, sums, counts = row
        width = (self._high - self._low) / self.bins
        return [
            (step, round(self._low + (k + 0.5) * width, 6), sums[k] / counts[k] if counts[k] else None, int(counts[k]))
            for k in range(self.bins)
        ]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        left = self._gathered(trainer, pl_module)
        checkpoint["loss_by_noise"] = {"ends": self._ends, "left": left, "history": [*self._history]}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("loss_by_noise")
        if trainer.state.fn == TrainerFn.FITTING and saved and len(saved["left"][0]) == self.bins:
            self._ends, self._left, self._history = saved["ends"], saved["left"], [*saved["history"]]


def log_snr_range(schedule: Schedule) -> tuple[float, float]:
    """The log-SNR of the noisiest level and of the cleanest that is not clean data, within +-15."""
    noisiest, cleanest = schedule.at(torch.tensor([1.0, schedule.first], dtype=torch.float64))
    low, high = (max(-MAX_LOG_SNR, min(MAX_LOG_SNR, t.snr.log().item())) for t in (noisiest, cleanest))
    return low, high


class BitsPerDim(L.Callback):
    """`val/bits_per_dim`: the averaged weights' bound on held-out data, as `src.evaluation.bounds` estimates it.

    Of the first `samples` of them, from the decoder's term and `links` others each, as many passes of the network,
    and with the reverse variance `optimal` as many again (5120 by default, about a validation's on 5120 samples).
    At every validation, or only at the `end` of training. Processes take equal shares, for which a few samples may be
    left out.
    """

    def __init__(
        self,
        samples: int = 512,
        links: int = 4,
        reverse_variance: ReverseVariance = "optimal",
        every_validation: bool = False,
        seed: int = 0,
    ) -> None:
        if samples < 1 or links < 1:
            raise ValueError(
                f"callbacks.bits_per_dim needs samples and links of at least 1, got {samples} and {links}: 512 and 4 "
                "are usual"
            )
        check_reverse_variance(reverse_variance, "callbacks.bits_per_dim.reverse_variance")
        check_halves(reverse_variance, samples, "callbacks.bits_per_dim.reverse_variance")
        self.samples = samples
        self.links = links
        self.reverse_variance: ReverseVariance = reverse_variance
        self.every_validation = every_validation
        self.seed = seed

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        last = trainer.state.fn != TrainerFn.FITTING or trainer.should_stop or trainer.global_step >= trainer.max_steps
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not (self.every_validation or last) or trainer.sanity_checking:
            return
        assert isinstance(pl_module, DiffusionModule) and isinstance(data, StreamDataModule)
        with data.together():
            x, indices = data.held_out(max(self.samples, trainer.world_size))
        assert data.source is not None
        device = pl_module.device
        cond = shown(data.condition, data.source, indices)
        share, size = len(x) // trainer.world_size, data.at_once(trainer)
        first = trainer.global_rank * share
        stop = first + share
        if self.reverse_variance == "optimal" and share * trainer.world_size < 2:
            rank_zero_warn(
                "val/bits_per_dim is left out: callbacks.bits_per_dim.reverse_variance=optimal needs at least 2 "
                "held-out samples, and there is 1; hold out more, or set it to fixed_large"
            )
            return

        def load(places: range) -> tuple[Tensor, Tensor | None]:
            if trainer.state.fn == TrainerFn.FITTING:
                answer_signals(trainer)
            part = slice(places.start, places.stop)
            return x[part].to(device), None if cond is None else cond[part].to(device)

        def together(errors: Errors) -> Errors:
            flat = torch.cat([part.flatten() for part in errors]).to(device, torch.float32)
            summed = trainer.strategy.all_gather(flat).view(-1, len(flat)).sum(0).cpu().double()
            pieces = torch.split(summed, [part.numel() for part in errors])
            return Errors(*(piece.view_as(part) for piece, part in zip(pieces, errors, strict=True)))

        parts = [range(start, min(start + size, stop)) for start in range(first, stop, size)]
        settings = self.seed, self.links, self.reverse_variance
        found = bounds(pl_module, parts, load, *settings, together=together)
        mine = torch.cat([part.total for part in found]).mean().to(device, torch.float32)
        pl_module.log("val/bits_per_dim", trainer.strategy.all_gather(mine).mean(), rank_zero_only=False)


class BestToWandb(L.Callback):
    """At the end of training, W&B is given the best checkpoint as an artifact: the averaged weights, as `src.export`.

    The file, `directory`/best.safetensors, is 4 bytes a parameter, and goes where the run goes: up, or offline to wait
    in the run's folder. Without W&B nothing is written.
    """

    def __init__(self, directory: str) -> None:
        self.path = Path(directory) / "best.safetensors"

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            return
        best = [
            callback
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and callback.monitor == "val/loss" and callback.best_model_path
        ]
        for callback in best[:1]:
            source = Path(callback.best_model_path)
            checkpoint = read_checkpoint(source)
            averaged = "current_model_state" in checkpoint
            weights = weights_of(checkpoint, averaged, source)
            score = callback.best_model_score
            with without_room_go_on(self.path):
                write_exported(self.path, weights, averaged, shareable(checkpoint["hyper_parameters"])[0])
                about = {"step": checkpoint["global_step"], "averaged": averaged}
                log_model(trainer, self.path, about | ({} if score is None else {"val/loss": float(score)}))


def nearest_training(data: StreamDataModule, samples: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """For each of samples (N, *data) the nearest of `limit` training samples (N, *data), and how far it is (N,).

    Root mean square of the differences, over the numbers of a sample as the network sees them. The training samples
    are in no order, so that the first `limit` are any. 1024 are in memory at a time.
    """
    flat = samples.flatten(1).cpu()
    found = Nearest.none(flat)
    indices: list[int] = []
    for start in range(0, len(data.train_indices[:limit]), 1024):
        some, which = data.fetch(data.train_indices[start : min(start + 1024, limit)])
        found = found.or_nearer(nearest(flat, data.to_model(some).cpu().flatten(1), start))
        indices += which
    neighbours = data.to_model(data.fetch([indices[k] for k in found.numbers.tolist()])[0]).cpu()
    return neighbours, found.distances / math.sqrt(flat.shape[1])
