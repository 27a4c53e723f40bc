"""Draw sample grids at validations."""

from pathlib import Path

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from src.data.module import StreamDataModule
from src.training.callbacks.graceful_shutdown import answer_signals
from src.training.checkpoint_io import without_room_go_on
from src.training.loggers import log_picture
from src.training.module import DiffusionModule
from src.viz.images import draw


class SampleGrid(L.Callback):
    """At each validation, `count` samples from the same noise, next to held-out data, into `directory` and the loggers.

    They are the averaged weights'.
    """

    def __init__(self, directory: str, count: int = 64, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"callbacks.samples.count must be at least 1, got {count}")
        self.directory = Path(directory)
        self.count = count
        self.seed = seed

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        assert isinstance(pl_module, DiffusionModule) and isinstance(data, StreamDataModule)
        for last in pl_module.sample_together(self.count, self.seed):  # noqa: B007 - the others are on the way to it
            answer_signals(trainer)
        with data.together():
            real = data.examples(self.count) if trainer.is_global_zero else last
        if not trainer.is_global_zero:
            return
        picture = draw(data.to_display(last), data.to_display(real), data.titles(self.count), data.columns)
        with without_room_go_on(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            picture.save(self.directory / f"step_{trainer.global_step:06d}.png")
        log_picture(trainer, "samples", picture)
