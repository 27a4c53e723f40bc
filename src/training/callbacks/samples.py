"""Draw sample grids at validations."""

from pathlib import Path

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from src.data.module import BaseDataModule
from src.training.callbacks.graceful_shutdown import check_stop_requested
from src.training.checkpoint_io import tolerate_full_disk
from src.training.loggers import log_picture
from src.training.module import DiffusionModule
from src.viz.images import draw


class SampleGrid(L.Callback):
    """At each validation, `num_samples` samples from the same noise, next to held-out data, into `directory` and the loggers.

    They are the averaged weights'.
    """

    def __init__(self, directory: str, num_samples: int = 64, seed: int = 0) -> None:
        if num_samples < 1:
            raise ValueError(f"callbacks.samples.num_samples must be at least 1, got {num_samples}")
        self.directory = Path(directory)
        self.num_samples = num_samples
        self.seed = seed

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        assert isinstance(pl_module, DiffusionModule) and isinstance(data, BaseDataModule)
        for last in pl_module.sample_distributed(self.num_samples, self.seed):  # noqa: B007 - the others are on the way to it
            check_stop_requested(trainer)
        with data.reading_on_one_rank():
            real = data.examples(self.num_samples) if trainer.is_global_zero else last
        if not trainer.is_global_zero:
            return
        picture = draw(data.postprocess(last), data.postprocess(real), data.titles(self.num_samples), data.columns)
        with tolerate_full_disk(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            picture.save(self.directory / f"step_{trainer.global_step:06d}.png")
        log_picture(trainer, "samples", picture)
