"""Exponential moving average of the weights."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from src.distributed.sharding import gather_full, load_state, local_shard, shard_like


def trained_weights(module: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    """Return names and weights that are trained; collecting them takes milliseconds, too long for every step."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return list(trained), list(trained.values())


class EMA(L.Callback):
    """Average the weights exponentially, with decay min(decay, (1 + n) / (10 + n)) after n steps.

    Validation and samples use the average, and the checkpoint's `state_dict` holds it; `current_model_state` holds the
    raw weights. The average is float32 in every precision and sharded like the weights. Its update is one fused
    operation per step.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay={decay} must be in [0, 1): 0.999 is usual")
        self.decay = decay
        self._names: list[str] = []
        self._weights: list[nn.Parameter] = []
        self._average: list[Tensor] = []
        self._raw: list[Tensor] | None = None  # the raw weights while the module holds the average, else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._names, self._weights = trained_weights(pl_module)
        saved = self._average or [local_shard(w) for w in self._weights]
        self._average = [
            a.detach().to(w.device, torch.float32, copy=True) for a, w in zip(saved, self._local(), strict=True)
        ]
        self._raw = None
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step <= self._step:  # accumulated without a step
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [w.float() for w in self._local()]
        get_ema_multi_avg_fn(decay)(self._average, current, None)  # type: ignore[no-untyped-call]
        self._step = step

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._average and self._raw is None:  # otherwise already swapped, or not trained
            self._swap_in()

    # Other callbacks sample from the average in `on_validation_epoch_end`, which runs before this hook.
    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._raw is not None and trainer.state.fn == TrainerFn.FITTING:
            torch._foreach_copy_(self._local(), self._raw)
            self._raw = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swap_in()

    @torch.no_grad()
    def _swap_in(self) -> None:
        self._raw = [w.clone() for w in self._local()]
        torch._foreach_copy_(self._local(), self._average)

    def _local(self) -> list[Tensor]:
        return [local_shard(w) for w in self._weights]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        assert self._names, "saved before training"
        for key, values in (("current_model_state", self._raw), ("state_dict", self._average)):
            weights = {
                n: gather_full(v, w)
                for n, v, w in zip(self._names, values or self._local(), self._weights, strict=True)
            }
            checkpoint[key] = state | weights if state else state  # only the first process holds sharded state
        # A second reference: loading sharded weights removes `state_dict` and casts it to their precision.
        checkpoint["average"] = checkpoint["state_dict"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING and "current_model_state" in checkpoint:
            self.restore(pl_module, checkpoint)

    def restore(self, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore average and weights from a checkpoint whose `state_dict` the module has loaded."""
        self._names, self._weights = trained_weights(pl_module)
        state = checkpoint.get("average", checkpoint.get("state_dict"))
        saved = [
            shard_like(state[n], w) if state else local_shard(w).clone()
            for n, w in zip(self._names, self._weights, strict=True)
        ]
        self._average = [value.detach().to(torch.float32) for value in saved]
        load_state(pl_module, checkpoint["current_model_state"])
