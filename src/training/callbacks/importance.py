"""Update the statistics of importance-sampled timesteps."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from src.diffusion.timestep_samplers import ImportanceSampler


class ImportanceUpdate(L.Callback):
    """After each step, pass the losses of the global batch to the `ImportanceSampler`, in the batch's order.

    Collective in every batch. Attached by the module, so it works with `callbacks=none`.
    """

    def __init__(self) -> None:
        self._microbatches: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        v, losses = (trainer.strategy.all_gather(x).flatten() for x in (outputs["v"], outputs["terms"]["loss"]))
        self._microbatches.append((v, losses))
        if len(self._microbatches) == trainer.accumulate_grad_batches:
            sampler = pl_module.timestep_sampler
            assert isinstance(sampler, ImportanceSampler)
            sampler.update(*(torch.cat(parts) for parts in zip(*self._microbatches, strict=True)))
            self._microbatches.clear()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._microbatches.clear()
