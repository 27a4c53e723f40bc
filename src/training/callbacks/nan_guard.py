"""Skip non-finite steps and roll back after too many."""

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from src.training.callbacks.ema import EMA
from src.training.checkpoint_io import tolerate_full_disk
from src.training.checkpoints import is_intact, newest_first, read_checkpoint
from src.training.module import DiffusionModule


class Step(NamedTuple):
    """What is needed to tell what was wrong with a step; tensors stay on the device until they are asked for."""

    number: int
    norm: Tensor
    v: Tensor
    losses: Tensor
    rate: float
    scale: float
    """Of the loss, in fp16; else 0."""


class NonFiniteGuard(L.Callback):
    """Tells of the steps that were skipped, loss or gradient not being finite, and turns back after too many.

    Each goes to `directory`/nonfinite.jsonl: the samples, where on the chain they were, their losses and the norm.
    After `patience` of them in a row, weights, average and optimizer go back to the last whole checkpoint from before,
    with the learning rate times `lr_factor`; the data go on, so that what led there is not met again (as Chowdhery et al.
    2022, PaLM, sec. 5.1). After `max_rollbacks` times training ends, with a `diagnosis`. It looks at what has happened
    every `trainer.log_every_n_steps`, so that no step waits for the device.
    """

    def __init__(self, directory: str, patience: int = 20, max_rollbacks: int = 3, lr_factor: float = 0.5) -> None:
        if patience < 1 or max_rollbacks < 0 or not 0 < lr_factor <= 1:
            raise ValueError(
                f"callbacks.nan_guard needs patience >= 1, rewinds >= 0 and factor in (0, 1], got {patience}, {max_rollbacks}, "
                f"{lr_factor}: 20, 3 and 0.5 are usual"
            )
        self.directory = Path(directory)
        self.patience = patience
        self.max_rollbacks = max_rollbacks
        self.lr_factor = lr_factor
        self.record = self.directory / "nonfinite.jsonl"
        self.diagnosis = ""
        self._blame = ""
        self._steps: list[Step] = []
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._in_a_row: list[int] = []
        self._rolled_back_to: list[int] = []
        self._limit: int | None = None
        """Of the steps whose checkpoints may be turned back to; None while all goes well."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._parts:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._scale = scaler.get_scale() if scaler else 0.0  # for which a step in fp16 waits anyway
            self._rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self._parts.append((outputs["v"], outputs["losses"]))
        if len(self._parts) < trainer.accumulate_grad_batches:
            return
        v, losses = (torch.stack(part) for part in zip(*self._parts, strict=True))
        self._parts.clear()
        step = Step(trainer.global_step - 1, pl_module.grad_norm, v, losses, self._rate, self._scale)
        self._steps.append(step)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._look(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self._look(trainer, pl_module, roll_back=False)
        checkpoint["skipped"] = ([*self._in_a_row], [*self._rolled_back_to], self._limit)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if saved := checkpoint.get("skipped"):
            self._in_a_row, self._rolled_back_to, self._limit = saved

    def _look(self, trainer: L.Trainer, module: DiffusionModule, roll_back: bool = True) -> None:
        """At the steps since the last time, for which the device is waited for once."""
        norms = torch.stack([step.norm for step in self._steps]).tolist() if self._steps else []
        skipped: dict[str, list[int]] = {}
        for step, norm in zip(self._steps, norms, strict=True):
            if math.isfinite(norm):
                self._in_a_row.clear()
                self._limit = None
            elif self._write(trainer, module, step, norm):
                skipped.setdefault("the gradient overflowed in fp16", []).append(step.number)
            else:
                skipped.setdefault("loss or gradient was not finite", []).append(step.number)
                self._in_a_row.append(step.number)
                self._limit = step.number if self._limit is None else self._limit
        self._steps.clear()
        for why, steps in skipped.items() if trainer.is_global_zero else ():
            warnings.warn(f"skipped step {', '.join(map(str, steps))}: {why}; see {self.record}", stacklevel=2)
        if roll_back and len(self._in_a_row) >= self.patience:
            self._roll_back(trainer, module)

    def _write(self, trainer: L.Trainer, module: DiffusionModule, step: Step, norm: float) -> bool:
        """Write a skipped step down; whether it is only the scaled gradient of fp16 that was too large."""
        # (processes, parts, samples): a process's parts lie apart in the global batch.
        v, losses = (
            trainer.strategy.all_gather(part).view(-1, *part.shape).transpose(0, 1).flatten().tolist()
            for part in (step.v, step.losses)
        )
        data = trainer.datamodule  # type: ignore[attr-defined]
        samples = data.train_sampler(trainer).batch(step.number)
        wrong = [sample for sample, loss in zip(samples, losses, strict=True) if not math.isfinite(loss)]
        if not wrong:
            self._blame = "the losses were finite and their gradient was not"
        elif len(wrong) == len(samples):
            self._blame = "the loss of every sample was not finite: the weights have diverged"
        else:
            self._blame = f"the loss was not finite for samples {wrong} of the data alone: look at those"
        if trainer.is_global_zero:
            line = {
                "step": step.number,
                "grad_norm": norm,
                "lr": step.rate,
                "fp16_scale": step.scale or None,
                "samples": samples,
                "t": [int(place * module.schedule.num_steps) for place in v],
                "v": v,
                "losses": losses,
            }
            with tolerate_full_disk(self.record), self.record.open("a") as file:
                # JSON knows no NaN.
                file.write(re.sub(r"NaN|-?Infinity", lambda m: f'"{float(m[0])}"', json.dumps(line)) + "\n")
        return step.scale >= 1 and not wrong

    def _roll_back(self, trainer: L.Trainer, module: DiffusionModule) -> None:
        """To the last checkpoint from before the skipped steps; if that has just been tried, to the one before it."""
        first, last = self._in_a_row[0], self._in_a_row[-1]
        path, step = trainer.strategy.broadcast(self._good_checkpoint() if trainer.is_global_zero else (None, 0))
        if path is None or len(self._rolled_back_to) >= self.max_rollbacks:
            tried = (
                f"and going back to steps {self._rolled_back_to} did not help"
                if self._rolled_back_to
                else ("and no checkpoint from before is to be had")
            )
            self.diagnosis = (
                f"no step from {first} to {last} had a finite gradient, {tried}; {self._blame} (see {self.record}): "
                f"lower optimizer.lr (it was {trainer.optimizers[0].param_groups[0]['lr']:.3g}), or use "
                "trainer.precision=32-true"
            )
            trainer.fit_loop.epoch_loop.min_steps = None  # more steps would not help
            trainer.should_stop = True
            return
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True)
        trainer.strategy.load_model_state_dict(checkpoint)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EMA):
                callback.restore(module, checkpoint)
        for group, rate in zip(trainer.optimizers[0].param_groups, rates, strict=True):
            group["lr"] = self.lr_factor * rate
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            scheduler.base_lrs = [self.lr_factor * rate for rate in scheduler.base_lrs]
        self._rolled_back_to.append(step)
        self._in_a_row.clear()
        self._limit = step - 1
        if trainer.is_global_zero:
            warnings.warn(
                f"no step from {first} to {last} had a finite gradient: the weights go back to those of step {step}, "
                f"and the learning rate falls to {self.lr_factor:g} of what it was; {self._blame}",
                stacklevel=2,
            )

    def _good_checkpoint(self) -> tuple[Path | None, int]:
        for path in newest_first(self.directory):
            if is_intact(path) and self._limit is not None:
                step = read_checkpoint(path)["global_step"]
                if step <= self._limit:
                    return path, step
        return None, 0
