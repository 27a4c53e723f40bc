"""Save a grid of reconstructions at each validation."""

from pathlib import Path

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from src.data.module import BaseDataModule
from src.training.autoencoder import AutoencoderModule
from src.training.pictures import draw_reconstructions, save_at_step


class Reconstructions(L.Callback):
    """At each validation, save `num_samples` validation images above their reconstructions by the averaged weights.

    The picture goes to `directory` and the loggers.
    """

    def __init__(self, directory: str, num_samples: int = 32) -> None:
        if num_samples < 1:
            raise ValueError(f"callbacks.reconstructions.num_samples={num_samples} must be at least 1: 32 is usual")
        self.directory = Path(directory)
        self.num_samples = num_samples

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        assert isinstance(pl_module, AutoencoderModule) and isinstance(data, BaseDataModule)
        with data.reading_on_one_rank():
            picture = draw_reconstructions(pl_module, data, self.num_samples) if trainer.is_global_zero else None
        if picture is not None:
            save_at_step(self.directory, trainer, picture)
