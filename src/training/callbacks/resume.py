"""Continue a run exactly where its checkpoint left it."""

from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from src.training.lightning_internals import run_validation
from src.training.optim import update_settings


class ResumeTraining(L.Callback):
    """Apply this run's optimizer settings to a resumed run, and repeat a validation that did not finish.

    Lightning restores the settings of the checkpoint, and counts an interrupted validation as done. Attached by the
    module, so it works with `callbacks=none`.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises RuntimeError if the processes do not start at the same step."""
        module, step = cast(Any, pl_module), trainer.global_step
        if step > 0:
            (config,) = trainer.lr_scheduler_configs
            update_settings(config.scheduler, module.prepare_optimizer(trainer.max_steps)[1])
        steps = trainer.strategy.all_gather(torch.tensor(step, device=pl_module.device)).flatten().tolist()
        if len({*steps}) > 1:
            raise RuntimeError(f"the processes start at steps {steps}: all of them must see the same checkpoints")
        is_due = module.validated < step and step % module.validation_period == 0
        if is_due and trainer.enable_validation:
            run_validation(trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            cast(Any, pl_module).validated = trainer.global_step

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["validated"] = pl_module.validated

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        cast(Any, pl_module).validated = checkpoint.get("validated", checkpoint["global_step"])
