"""What happens around training: weight averaging, pictures at each validation, and a clean stop on Ctrl-C."""

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
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
    """On Ctrl-C: finish the step, save `path`, then stop. A second Ctrl-C stops at once.

    Several processes agree first, every `every` steps, since the signal may have reached only one of them.
    """

    def __init__(self, path: str, every: int = 100) -> None:
        if every < 1:
            raise ValueError(f"callbacks.stop.every must be at least 1 step, got {every}")
        self.path = path
        self.every = every
        self._asked = False
        self._previous: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._asked = False
        if threading.current_thread() is threading.main_thread():  # the only one that may listen to signals
            self._previous = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The start of the next step: only here has Lightning logged and counted the last one.
        step, part = divmod(batch_idx, trainer.accumulate_grad_batches)
        if part == 0 and self._agreed(trainer, step):
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt

    def _agreed(self, trainer: L.Trainer, step: int) -> bool:
        if trainer.world_size == 1:
            return self._asked
        return step % self.every == 0 and trainer.strategy.reduce_boolean_decision(self._asked, all=False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
