"""Seed the random numbers that networks draw themselves, such as dropout."""

from typing import Any, cast

import lightning as L
import torch

from src.rng import key


class SeedDropout(L.Callback):
    """Seed the global generators by step and position, so that a resumed run repeats dropout exactly.

    Attached by the module, so it works with `callbacks=none`.
    """

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        seed = cast(int, pl_module.seed)
        seed_networks(key(seed, "network", trainer.global_step, batch["start"]), pl_module.device)


def seed_networks(seed: int, device: torch.device) -> None:
    """Seed the default generators of the CPU and of this device.

    `torch.manual_seed` seeds every device type of torch, which takes a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
