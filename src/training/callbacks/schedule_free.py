"""Training with a schedule-free optimizer, whose average of the steps replaces the decay of the learning rate."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import lightning as L
import torch
from torch.optim import Optimizer

from src.distributed.sharding import local_shard
from src.errors import optional_package
from src.training.callbacks.ema import EMA


def adamw_schedule_free(
    params: Iterable[dict[str, Any]],
    lr: float = 1e-3,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.01,
) -> Optimizer:
    """Return the schedule-free AdamW of the library schedulefree, ready for training.

    Raises ValueError without the library, or for betas[0] = 0, with which the average cannot be computed.
    """
    with optional_package("optimizer=schedule_free", "schedulefree"):
        from schedulefree import AdamWScheduleFree
    if not all(0 < beta < 1 for beta in betas):
        raise ValueError(f"optimizer.betas={list(betas)} must be in (0, 1): [0.9, 0.999] is usual")
    optimizer = AdamWScheduleFree(params, lr, (betas[0], betas[1]), weight_decay=weight_decay)
    optimizer.train()
    optimizer.state.clear()  # of empty entries, with which torch would not load the state of a sharded run
    return cast(Optimizer, optimizer)


class ScheduleFreeAverage(EMA):
    """Evaluate the average x of a schedule-free optimizer's steps, while training continues from y.

    The weights hold y = (1 - beta1) z + beta1 x, and the optimizer keeps z. Validation, samples and the checkpoint's
    `state_dict` use x, and `current_model_state` holds y, as `EMA` does with its average. Attached by the module.

    Source: Defazio et al. 2024 (arXiv 2405.15682), eq. 3 and 5.
    """

    def __init__(self) -> None:
        super().__init__(0.0)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Leave the average to the optimizer."""

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._find_average(trainer)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._find_average(trainer)
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._find_average(trainer)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    @torch.no_grad()
    def _find_average(self, trainer: L.Trainer) -> None:
        """Compute x = y + (1 - 1 / beta1) (z - y), unless the weights hold it already."""
        if self._raw is not None or not trainer.optimizers:
            return
        (optimizer,) = trainer.optimizers
        beta1 = optimizer.param_groups[0]["betas"][0]
        y = [w.float() for w in self._local()]
        z = [local_shard(optimizer.state.get(w, {}).get("z", w)).float() for w in self._weights]
        self._average = [torch.lerp(a, b, 1 - 1 / beta1) for a, b in zip(y, z, strict=True)]
