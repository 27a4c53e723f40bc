"""Callbacks that inject faults into a run: `+callbacks.fault._target_=tests.faults.Poison`."""

import math
import multiprocessing
import os
import resource
import signal
from pathlib import Path
from threading import Timer

import lightning as L
import torch

from src.data.samplers import InfiniteBatchSampler
from src.distributed.sharding import local_shard
from src.training.callbacks.time_budget import TimeBudget
from src.training.checkpoints import is_intact


class Poison(L.Callback):
    """Put a NaN into the data of one process at these steps."""

    def __init__(self, rank: int, steps: list[int]) -> None:
        self.rank = rank
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step in self.steps:
            batch["x"][0] = math.nan


class Stop(L.Callback):
    """Send a signal to one process at this step, the first time only: the file `once` records it."""

    def __init__(self, rank: int, step: int, once: str, number: int = signal.SIGTERM) -> None:
        self.rank = rank
        self.step = step
        self.once = Path(once)
        self.number = number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        is_due = trainer.global_rank == self.rank and trainer.global_step == self.step
        if is_due and not self.once.exists():
            self.once.touch()
            os.kill(os.getpid(), self.number)


class KillWorker(L.Callback):
    """Kill a data-loading process at this step, the first time only."""

    def __init__(self, step: int, once: str) -> None:
        self.step = step
        self.once = Path(once)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and not self.once.exists():
            self.once.touch()
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


class FullDisk(L.Callback):
    """Limit files to 2 kB from step `begin` to step `end`, as on a full disk.

    Print at the end whether all checkpoints are intact.
    """

    def __init__(self, begin: int, end: int) -> None:
        self.begin = begin
        self.end = end

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.begin:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        if trainer.global_step == self.end:
            saved = [*Path(trainer.checkpoint_callback.dirpath).glob("*.ckpt")]
            os.write(1, f"{len(saved)} checkpoints, whole: {all(map(is_intact, saved))}\n".encode())
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Watch(L.Callback):
    """Print the sum of the weights before each step; equal text means equal bits."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        total = torch.stack([local_shard(p).double().sum() for p in pl_module.parameters()]).sum()
        line = f"rank {trainer.global_rank} step {trainer.global_step} weights {total.item()!r}\n"
        os.write(1, line.encode())  # one write, so that lines of several processes do not mix


class SkewedBudget(TimeBudget):
    """A budget whose clock counts 0.5 s per step, times the number of the process, from 1."""

    def setup(self, trainer, pl_module, stage):
        self.clock = lambda: 0.5 * trainer.global_step * (1 + trainer.global_rank)


class Kill(L.Callback):
    """Send SIGKILL some seconds after the run enters a phase for the n-th time: KILL="phase n seconds".

    The file `KILL_NOTES` records each start and end of that phase, so its text tells whether the run died within it.
    """

    PHASES = ("step", "epoch's end", "save", "validation", "sampling")

    def __init__(self) -> None:
        self.phase, self.left, self.seconds = "", 0, 0.0
        if "KILL" in os.environ:
            self.phase, number, seconds = os.environ["KILL"].rsplit(" ", 2)
            self.left, self.seconds = int(number), float(seconds)
            self.notes = Path(os.environ["KILL_NOTES"])

    def setup(self, trainer, pl_module, stage):
        saver, sample = trainer.strategy.checkpoint_io, pl_module.sample_distributed
        save = saver.save_checkpoint

        def save_checkpoint(*args, **kwargs):
            self.enter("save")
            save(*args, **kwargs)
            self.leave("save")

        def sample_distributed(*args, **kwargs):
            self.enter("sampling")
            yield from sample(*args, **kwargs)
            self.leave("sampling")

        saver.save_checkpoint, pl_module.sample_distributed = save_checkpoint, sample_distributed

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        stream: InfiniteBatchSampler = trainer.train_dataloader.sampler
        self.step = "step" if spans_one_epoch(stream, trainer.global_step) else "epoch's end"
        self.enter(self.step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.leave(self.step)

    def on_validation_start(self, trainer, pl_module):
        self.enter("validation")

    def on_validation_epoch_end(self, trainer, pl_module):
        self.leave("validation")

    def enter(self, phase: str) -> None:
        if phase == self.phase:
            self.left -= 1
            self.notes.write_text(f"within {phase}")
            if self.left == 0:
                timer = Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()

    def leave(self, phase: str) -> None:
        if phase == self.phase:
            self.notes.write_text(f"after {phase}")


def spans_one_epoch(stream: InfiniteBatchSampler, step: int) -> bool:
    """Return whether the batch of `step` contains no sample of the next epoch."""
    count = len(stream.indices)
    return step * stream.batch_size // count == ((step + 1) * stream.batch_size - 1) // count
