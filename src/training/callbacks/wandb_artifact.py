"""Upload the best model as a W&B artifact."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from src.training.checkpoint_io import tolerate_full_disk
from src.training.checkpoints import exportable_settings, read_checkpoint, weights_of, write_exported
from src.training.loggers import log_model


class WandbArtifact(L.Callback):
    """At the end of training, export the best checkpoint as `src.export` does and log it as a W&B artifact.

    The file, `directory`/best.safetensors, takes 4 bytes per parameter. Without a W&B logger nothing is written.
    """

    def __init__(self, directory: str) -> None:
        self.path = Path(directory) / "best.safetensors"

    def upload(self, trainer: L.Trainer) -> None:
        """Export and log the best checkpoint, after the last validation."""
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
            with tolerate_full_disk(self.path):
                write_exported(self.path, weights, averaged, exportable_settings(checkpoint["hyper_parameters"])[0])
                metadata = {"step": checkpoint["global_step"], "averaged": averaged}
                log_model(trainer, self.path, metadata | ({} if score is None else {"val/loss": float(score)}))
