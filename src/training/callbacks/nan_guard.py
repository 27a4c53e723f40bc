"""Skip steps whose loss or gradient is not finite, and roll back after too many in a row."""

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from src.training.base import TrainingModule
from src.training.callbacks.ema import EMA
from src.training.callbacks.power_ema import PowerEMA
from src.training.checkpoint_io import tolerate_full_disk
from src.training.checkpoints import is_intact, newest_first, read_checkpoint
from src.training.lightning_internals import stop_training
from src.training.module import DiffusionModule


class Step(NamedTuple):
    """The values to record for a skipped step; tensors stay on the device until the next check."""

    number: int
    norm: Tensor
    values: dict[str, Tensor]  # (microbatches, samples) losses, and times v in [0, 1) of a diffusion model
    lr: float
    scale: float  # loss scale in fp16, else 0


class NonFiniteGuard(L.Callback):
    """Skip and record steps whose loss or gradient is not finite, and roll back after `patience` in a row.

    `directory`/nonfinite.jsonl records each such step. A rollback restores weights, averages and optimizer from the
    last intact checkpoint before those steps and multiplies the learning rate by `lr_factor`; the data stream
    continues. After `max_rollbacks` training ends with a `diagnosis`. Checks happen every `trainer.log_every_n_steps`
    steps, so that no step waits for the device. Source: Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), sec. 5.1.
    """

    def __init__(self, directory: str, patience: int = 20, max_rollbacks: int = 3, lr_factor: float = 0.5) -> None:
        if patience < 1:
            raise ValueError(f"callbacks.nan_guard.patience={patience} must be at least 1: 20 is usual")
        if max_rollbacks < 0:
            raise ValueError(f"callbacks.nan_guard.max_rollbacks={max_rollbacks} must be at least 0: 3 is usual")
        if not 0 < lr_factor <= 1:
            raise ValueError(f"callbacks.nan_guard.lr_factor={lr_factor} must be in (0, 1]: 0.5 is usual")
        self.directory = Path(directory)
        self.patience = patience
        self.max_rollbacks = max_rollbacks
        self.lr_factor = lr_factor
        self.record = self.directory / "nonfinite.jsonl"
        self.diagnosis = ""
        self._cause = ""
        self._steps: list[Step] = []  # steps since the last check
        self._microbatches: list[dict[str, Tensor]] = []
        self._skipped: list[int] = []  # consecutive skipped steps so far
        self._rolled_back_to: list[int] = []
        self._newest_allowed: int | None = None  # the newest step to roll back to; None while steps are finite

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not self._microbatches:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._scale = scaler.get_scale() if scaler else 0.0  # synchronizes, as a step in fp16 does anyway
            self._lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Make the gradient NaN if the loss is not finite; the gradient is shared, so all processes skip the step."""
        factor = torch.where(loss.detach().isfinite(), 1.0, math.nan)
        loss.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        assert isinstance(pl_module, TrainingModule)
        times = {"v": outputs["v"]} if "v" in outputs else {}
        self._microbatches.append({**times, "losses": outputs["terms"]["loss"]})
        if len(self._microbatches) < trainer.accumulate_grad_batches:
            return
        values = {name: torch.stack([each[name] for each in self._microbatches]) for name in self._microbatches[0]}
        self._microbatches.clear()
        self._steps.append(Step(trainer.global_step - 1, pl_module.grad_norm, values, self._lr, self._scale))
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._check(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, TrainingModule)
        self._check(trainer, pl_module, roll_back=False)
        checkpoint["skipped"] = ([*self._skipped], [*self._rolled_back_to], self._newest_allowed)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if saved := checkpoint.get("skipped"):
            self._skipped, self._rolled_back_to, self._newest_allowed = saved

    def _check(self, trainer: L.Trainer, module: TrainingModule, roll_back: bool = True) -> None:
        """Inspect the steps since the last check, with one synchronization."""
        norms = torch.stack([step.norm for step in self._steps]).tolist() if self._steps else []
        by_reason: dict[str, list[int]] = {}
        for step, norm in zip(self._steps, norms, strict=True):
            if math.isfinite(norm):
                self._skipped.clear()
                self._newest_allowed = None
                continue
            overflowed = self._write_record(trainer, module, step, norm)
            reason = "the gradient overflowed in fp16" if overflowed else "loss or gradient was not finite"
            by_reason.setdefault(reason, []).append(step.number)
            if not overflowed:
                self._skipped.append(step.number)
                self._newest_allowed = step.number if self._newest_allowed is None else self._newest_allowed
        self._steps.clear()
        for reason, steps in by_reason.items() if trainer.is_global_zero else ():
            warnings.warn(f"skipped step {', '.join(map(str, steps))}: {reason}; see {self.record}", stacklevel=2)
        if roll_back and len(self._skipped) >= self.patience:
            self._roll_back(trainer, module)

    def _write_record(self, trainer: L.Trainer, module: TrainingModule, step: Step, norm: float) -> bool:
        """Record a skipped step; return whether only the scaled fp16 gradient overflowed, which is harmless."""
        # (processes, microbatches, samples): the microbatches of one process are not adjacent in the global batch.
        values = {
            name: trainer.strategy.all_gather(part).view(-1, *part.shape).transpose(0, 1).flatten().tolist()
            for name, part in step.values.items()
        }
        losses = values["losses"]
        data = trainer.datamodule  # type: ignore[attr-defined]
        samples = data.train_sampler(trainer).batch(step.number)
        bad = [sample for sample, loss in zip(samples, losses, strict=True) if not math.isfinite(loss)]
        if not bad:
            self._cause = "the losses were finite and their gradient was not"
        elif len(bad) == len(samples):
            self._cause = "the loss of every sample was not finite: the weights have diverged"
        else:
            self._cause = f"only the training samples {bad} had a loss that was not finite: inspect them"
        if trainer.is_global_zero:
            if isinstance(module, DiffusionModule):
                values = {"t": [int(time * module.schedule.num_steps) for time in values["v"]], **values}
            line = {
                "step": step.number,
                "grad_norm": norm,
                "lr": step.lr,
                "fp16_scale": step.scale or None,
                "samples": samples,
                **values,
            }
            with tolerate_full_disk(self.record), self.record.open("a") as file:
                # JSON has no NaN.
                file.write(re.sub(r"NaN|-?Infinity", lambda m: f'"{float(m[0])}"', json.dumps(line)) + "\n")
        return step.scale >= 1 and not bad

    def _roll_back(self, trainer: L.Trainer, module: TrainingModule) -> None:
        """Restore the newest checkpoint before the skipped steps; after a failed attempt, the one before it."""
        first, last = self._skipped[0], self._skipped[-1]
        path, step = trainer.strategy.broadcast(self._find_checkpoint() if trainer.is_global_zero else (None, 0))
        if path is None or len(self._rolled_back_to) >= self.max_rollbacks:
            attempts = "and there is no checkpoint from before to roll back to"
            if self._rolled_back_to:
                attempts = f"and rollbacks to steps {self._rolled_back_to} did not help"
            self.diagnosis = (
                f"no step from {first} to {last} had a finite gradient, {attempts}; {self._cause} (see {self.record}): "
                f"lower optimizer.lr (it was {trainer.optimizers[0].param_groups[0]['lr']:.3g}), or set "
                "trainer.precision=32-true"
            )
            stop_training(trainer)
            return
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
        trainer.strategy.load_model_state_dict(checkpoint)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EMA):
                callback.restore(module, checkpoint)
            elif isinstance(callback, PowerEMA):
                callback.restore(trainer, module, checkpoint)
        for group, rate in zip(trainer.optimizers[0].param_groups, rates, strict=True):
            group["lr"] = self.lr_factor * rate
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            scheduler.base_lrs = [self.lr_factor * rate for rate in scheduler.base_lrs]
        self._rolled_back_to.append(step)
        self._skipped.clear()
        self._newest_allowed = step - 1
        if trainer.is_global_zero:
            warnings.warn(
                f"no step from {first} to {last} had a finite gradient: rolled back to step {step}, with the learning "
                f"rate multiplied by {self.lr_factor:g}; {self._cause}",
                stacklevel=2,
            )

    def _find_checkpoint(self) -> tuple[Path | None, int]:
        for path in newest_first(self.directory):
            if is_intact(path) and self._newest_allowed is not None:
                step = read_checkpoint(path)["global_step"]
                if step <= self._newest_allowed:
                    return path, step
        return None, 0
