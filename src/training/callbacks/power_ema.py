"""Keep averages of the weights from which an average of any length is reconstructed after training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from src.cache import write_atomically
from src.distributed.sharding import gather_full, local_shard, shard_like
from src.errors import literal
from src.training.callbacks.ema import trained_weights
from src.training.checkpoint_io import tolerate_full_disk
from src.training.power_ema import FOLDER, decay, exponent, last_update, snapshot_file, snapshots, stride, tensor_name


class PowerEMA(L.Callback):
    """Average the weights by powers of time of several `lengths`, and write snapshots of the averages.

    `src.ema`, `src.sample` and `src.evaluate` reconstruct an average of another length from them. Each length costs a
    float32 copy of the weights, sharded like them, in memory, in each checkpoint and in each snapshot. Snapshots are
    written at `max_snapshots` equally spaced steps of the run into `directory`/averages. If a run is continued
    beyond its last step, those with the nearest neighbors are removed. With `lengths=None` the callback does nothing.

    Raises ValueError for fewer than two different lengths, a length outside (0, 0.2886], or `max_snapshots` below 2.

    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), sec. 3.
    """

    def __init__(self, directory: str, lengths: Sequence[float] | None = None, max_snapshots: int = 32) -> None:
        self.folder = Path(directory) / FOLDER
        self.lengths = None if lengths is None else sorted(lengths)
        self.max_snapshots = max_snapshots
        shown = f"callbacks.power_ema.lengths={literal(lengths)}"
        if self.lengths is not None and len({*self.lengths}) != max(2, len(self.lengths)):
            raise ValueError(f"{shown} must have at least two different lengths: [0.05,0.1] is usual")
        try:
            self._exponents = [exponent(length) for length in self.lengths or ()]
        except ValueError as error:
            raise ValueError(f"{shown}: {error}") from error
        if max_snapshots < 2:
            raise ValueError(f"callbacks.power_ema.max_snapshots={max_snapshots} must be at least 2: 32 is usual")
        self.steps = 0
        """Number of steps that the averages cover."""
        self._names: list[str] = []
        self._weights: list[nn.Parameter] = []
        self._averages: list[list[Tensor]] = []  # for each length, the shards of this process

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.lengths is None:
            return
        self._names, self._weights = trained_weights(pl_module)
        if not self._averages:
            self._averages = [[local_shard(w) for w in self._weights] for _ in self.lengths]
        self._averages = [
            [a.detach().to(w.device, torch.float32, copy=True) for a, w in zip(part, self._weights, strict=True)]
            for part in self._averages
        ]
        self._step = trainer.global_step
        if trainer.is_global_zero:
            self._remove_later()
            size = 4 * len(self.lengths) * sum(w.numel() for w in self._weights)
            tqdm.write(
                f"Averages of lengths {literal(self.lengths)}: {size / 1e6:,.1f} MB in memory and in each checkpoint, "
                f"and at most {self.max_snapshots} snapshots of that size, {self.max_snapshots * size / 1e6:,.1f} MB, "
                f"in {self.folder}"
            )

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        if self.lengths is None or step <= self._step:  # accumulated without a step
            return
        self._step = step
        self.steps += 1
        if self.steps % stride(self.steps) == 0:
            current = [local_shard(w).float() for w in self._weights]
            for gamma, average in zip(self._exponents, self._averages, strict=True):
                torch._foreach_lerp_(average, current, 1 - decay(gamma, self.steps))
        before, now = (s * self.max_snapshots // trainer.max_steps for s in (step - 1, step))
        if now > before:
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        """Write a snapshot, and remove others if there are too many. Collective."""
        gathered = [self._gather(trainer, part) for part in self._averages]
        if not trainer.is_global_zero:
            return
        path = snapshot_file(self.folder, last_update(self.steps))
        with tolerate_full_disk(path):
            tensors = {tensor_name(k, name): value for k, part in enumerate(gathered) for name, value in part.items()}
            write_atomically(path, save(tensors))
            remove_crowded(self.folder, self.max_snapshots)

    def _gather(self, trainer: L.Trainer, average: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return an average on the CPU, in the first process; the others return nothing. Collective."""
        full = {}
        for name, value, weight in zip(self._names, average, self._weights, strict=True):
            whole = gather_full(value, weight)
            if trainer.is_global_zero:
                full[name] = whole.contiguous()
        return full

    def _remove_later(self) -> None:
        """Remove snapshots after the current step, which a resumed run or a rollback left, and unfinished files."""
        later = [path for step, path in snapshots(self.folder) if step > last_update(self.steps)]
        for path in [*later, *self.folder.glob("step_*.partial")]:
            path.unlink(missing_ok=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.lengths is not None:
            averages = [self._gather(trainer, part) for part in self._averages]
            checkpoint["power_ema"] = {"lengths": self.lengths, "steps": self.steps, "averages": averages}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.restore(trainer, pl_module, checkpoint)

    def restore(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Restore the averages of a checkpoint; without any, they start at its step.

        Raises ValueError for averages of other lengths.
        """
        self.check_lengths(checkpoint)
        saved = checkpoint.get("power_ema")
        if self.lengths is None or saved is None:
            return
        self._names, self._weights = trained_weights(pl_module)
        self._averages = [
            [shard_like(part[name], w).float() for name, w in zip(self._names, self._weights, strict=True)]
            for part in saved["averages"]
        ]
        self.steps = saved["steps"]
        if trainer.is_global_zero:
            self._remove_later()

    def check_lengths(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise ValueError if a checkpoint has averages of other lengths."""
        saved = checkpoint.get("power_ema")
        if self.lengths is not None and saved is not None and saved["lengths"] != self.lengths:
            raise ValueError(
                f"callbacks.power_ema.lengths={literal(self.lengths)} must stay {literal(saved['lengths'])} in a "
                "resumed run; leave it out, or start a new run"
            )


def remove_crowded(folder: Path, limit: int) -> None:
    """Remove snapshots until `limit` are left, each time the one whose neighbors are nearest; the last one stays."""
    kept = snapshots(folder)
    while len(kept) > limit:
        steps = [0, *(step for step, _ in kept)]
        gaps = [after - before for before, after in zip(steps, steps[2:], strict=False)]
        kept.pop(gaps.index(min(gaps)))[1].unlink(missing_ok=True)
