"""What the guard against steps that are not finite costs: a run's steps with it against the same run's without it.

Both in one process and in turns, a few steps at a time, so that what else the machine does slows both alike:
`python -m benchmarks.guard --model unet_tiny`. A ratio of 1 means that the guard costs nothing.
"""

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import lightning as L
import torch

from benchmarks.training import WORKLOADS, Clock, compose, now, since
from src.runs.build import build
from src.training.callbacks.nan_guard import NonFiniteGuard


class WithAndWithout(L.Callback):
    """Has the guard watch every second segment of `warmup` + `steps` steps, and times the last `steps` of each."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup = warmup
        self.steps = steps
        self.guarded: list[Clock] = []
        self.unguarded: list[Clock] = []
        self._start = now()
        self._blind = ExitStack()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        taken = trainer.global_step % (self.warmup + self.steps)
        if taken == self.warmup:
            self._start = now()
        elif taken == 0:
            is_guarded = len(self.guarded) == len(self.unguarded)
            (self.guarded if is_guarded else self.unguarded).append(since(self._start))
            callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
            (guard,) = (callback for callback in callbacks if isinstance(callback, NonFiniteGuard))
            if is_guarded:
                for hook in ("on_before_backward", "on_train_batch_end"):
                    self._blind.enter_context(patch.object(guard, hook, lambda *_: None))
                # Nor does the optimizer's step look whether the norm is finite.
                self._blind.enter_context(patch("src.training.module.skip_unless", take_every_step))
            else:
                self._blind.close()


def take_every_step(fine: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    cast(Any, optimizer).found_inf = None


def main() -> None:
    """Measure, and print the median and range of the ratio over all pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=WORKLOADS, default="unet_tiny")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of segments")
    parser.add_argument("--steps", type=int, default=20, help="timed per segment; the guard looks every 10")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before each segment")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        steps = 2 * args.rounds * (args.warmup + args.steps)
        run = build(compose(args.model, steps, "32-true", Path(folder) / "run"))
        turns = WithAndWithout(args.warmup, args.steps)
        run.trainer.callbacks.append(turns)  # type: ignore[attr-defined]
        run.trainer.fit(run.module, datamodule=run.data)
    for name in Clock._fields:
        pairs = zip(turns.guarded, turns.unguarded, strict=True)
        ratios = sorted(getattr(a, name) / getattr(b, name) for a, b in pairs)
        median = statistics.median(ratios)
        print(
            f"{args.model}, {name} time with the guard over without: median {median:.4f} of {len(ratios)} pairs, "
            f"quartiles {ratios[len(ratios) // 4]:.4f} to {ratios[-1 - len(ratios) // 4]:.4f}"
        )


if __name__ == "__main__":
    main()
