"""What happens around training: weight averaging, pictures at each validation, checkpoints, a clean stop on signals."""

import io
import os
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from src.data.batch import StreamDataModule
from src.module import DiffusionModule
from src.plots import draw

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class EMA(WeightAveraging):
    """Exponential moving average of the weights, decay min(decay, (1 + n) / (10 + n)) after n steps.

    Validation, samples and the checkpoint's `state_dict` are the average's; the raw weights lie beside it as
    `current_model_state`. Mends Lightning's callback in three places: no device synchronisation in a step and one
    fused update (its counter is a tensor that is compared each time), buffers are left alone, and a checkpoint
    has the two sets of weights in their places also when it is saved during validation or after training.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the moving average must lie in [0, 1), got {decay}: 0.999 is usual")
        super().__init__(use_buffers=False)
        self.decay = decay
        self._swapped = False
        self._average: Sequence[Tensor] = []
        self._current: Sequence[Tensor] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            assert self._average_model is not None
            self._swapped = False
            # Finding them anew costs milliseconds.
            self._average, self._current = (tuple(m.parameters()) for m in (self._average_model.module, pl_module))

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step <= self._latest_update_step:  # an accumulated batch, not a step
            return
        current = [p.to(a.dtype) for p, a in zip(self._current, self._average, strict=True)]
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self._average, current, None)  # type: ignore[no-untyped-call]
        self._latest_update_step = step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: the average moves with steps, not with epochs."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_models(pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._average_model is not None and not self._swapped:
            self._swap_models(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._swapped and trainer.state.fn == TrainerFn.FITTING:
            self._swap_models(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            raw, average = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, raw

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped


class SampleGrid(L.Callback):
    """At each validation, `count` samples from the same noise, next to held-out data, into `directory` and the loggers.

    Must stand before `EMA` in the list of callbacks, so that it samples while the averaged weights are in place.
    """

    def __init__(self, directory: str, count: int = 64, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"callbacks.samples.count must be at least 1, got {count}")
        self.directory = Path(directory)
        self.count = count
        self.seed = seed

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        assert isinstance(pl_module, DiffusionModule) and isinstance(data, StreamDataModule)
        samples = pl_module.sample(range(self.count), self.seed)
        *_, last = samples
        picture = draw(data.to_display(last), data.to_display(data.examples(self.count)))
        self.directory.mkdir(parents=True, exist_ok=True)
        picture.save(self.directory / f"step_{trainer.global_step:06d}.png")
        log_picture(trainer, "samples", picture)


def log_picture(trainer: L.Trainer, name: str, picture: Image.Image) -> None:
    """Give a picture to every logger that shows pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [picture])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(picture), trainer.global_step, dataformats="HWC")


class CleanStop(L.Callback):
    """On Ctrl-C, SIGTERM or SIGUSR1 (SLURM's warning): finish the step, save `path`, then stop.

    `signal` is the one that it was, 0 if none. A second Ctrl-C stops at once. Several processes agree first, since the
    signal may have reached only one of them: about every `seconds`, at a step that all of them count alike.
    """

    def __init__(self, path: str, seconds: float = 5.0) -> None:
        if seconds <= 0:
            raise ValueError(f"callbacks.stop.seconds must be positive, got {seconds}: 5 is usual")
        self.path = path
        self.seconds = seconds
        self.signal = 0
        self._previous: dict[int, Any] = {}
        self._next_step = 0
        self._last: tuple[int, float] | None = None

    # Lightning listens to signals of its own, from before this hook until after `on_exception`.
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signal, self._next_step, self._last = 0, 0, None
        if threading.current_thread() is threading.main_thread():  # the only one that may listen to signals
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._ask)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The start of the next step: only here has Lightning logged and counted the last one.
        step, part = divmod(batch_idx, trainer.accumulate_grad_batches)
        if part == 0 and self._agreed(trainer, step):
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt

    def _agreed(self, trainer: L.Trainer, step: int) -> bool:
        if trainer.world_size > 1 and step >= self._next_step:
            now = time.perf_counter()
            count, since = (step - self._last[0], now - self._last[1]) if self._last else (1, self.seconds)
            # The largest of each: any process's signal, and the slowest one's seconds a step.
            mine = torch.tensor([[self.signal, since / max(count, 1)]], device=trainer.strategy.root_device)
            largest = trainer.strategy.all_gather(mine).flatten(0, -2).amax(0)
            self.signal = int(largest[0])
            self._last = step, now
            self._next_step = step + max(1, int(self.seconds / largest[1].item()))
            return self.signal != 0
        return trainer.world_size == 1 and self.signal != 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that replace the one before only when they are on the disk in whole.

    Where they cannot be written (a full disk), says so and lets the run go on; what lies there stays until one can.
    """

    def __init__(self) -> None:
        self._failed = False
        self._folders: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        contents = io.BytesIO()
        torch.save(checkpoint, contents)
        partial = path.with_name(f"{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(contents.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            self._failed = False
            self._folders.add(path.parent.resolve())
        except OSError as error:
            self._failed = True
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            warnings.warn(
                f"{path} could not be written ({error.strerror or error}): the run goes on, and what was saved before "
                "stays; make room",
                stacklevel=2,
            )

    def remove_checkpoint(self, path: Any) -> None:
        path = Path(path)
        # A resumed checkpoint says which older ones may go: believed of those beside what was written here.
        if not self._failed and path.suffix == ".ckpt" and path.parent.resolve() in self._folders:
            path.unlink(missing_ok=True)
