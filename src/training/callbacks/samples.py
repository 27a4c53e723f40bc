"""Save a grid of samples at each validation."""

from pathlib import Path

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from src.data.module import BaseDataModule
from src.training.callbacks.graceful_shutdown import check_stop_requested
from src.training.module import DiffusionModule
from src.training.pictures import save_at_step
from src.viz.images import draw_samples


class SampleGrid(L.Callback):
    """At each validation, save `num_samples` samples of the averaged weights next to validation data.

    All validations start from the same noise. The picture goes to `directory` and the loggers.
    """

    def __init__(self, directory: str, num_samples: int = 64, seed: int = 0) -> None:
        if num_samples < 1:
            raise ValueError(f"callbacks.samples.num_samples={num_samples} must be at least 1: 64 is usual")
        self.directory = Path(directory)
        self.num_samples = num_samples
        self.seed = seed

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        assert isinstance(pl_module, DiffusionModule) and isinstance(data, BaseDataModule)
        for samples in pl_module.sample_distributed(self.num_samples, self.seed):  # noqa: B007 - only the last is used
            check_stop_requested(trainer)
        with data.reading_on_one_rank():
            real = data.displayed_examples(self.num_samples) if trainer.is_global_zero else samples
        if not trainer.is_global_zero:
            return
        picture = draw_samples(data.postprocess(samples), real, data.titles(self.num_samples), data.columns)
        save_at_step(self.directory, trainer, picture)
