"""Faults that a run does to itself, put into it as callbacks: `+callbacks.fault._target_=tests.faults.Poison`."""

import math
import multiprocessing
import os
import signal
from pathlib import Path

import lightning as L
import torch


class Poison(L.Callback):
    """At this step the data of one process hold a NaN."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank = rank
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            batch["x"][0] = math.nan


class Stop(L.Callback):
    """At this step one process gets a signal, the first time only: it leaves a file `once`."""

    def __init__(self, rank: int, step: int, once: str, number: int = signal.SIGTERM) -> None:
        self.rank = rank
        self.step = step
        self.once = Path(once)
        self.number = number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        asked = trainer.global_rank == self.rank and trainer.global_step == self.step
        if asked and not self.once.exists():
            self.once.touch()
            os.kill(os.getpid(), self.number)


class KillWorker(L.Callback):
    """At this step a process that loads data is gone, the first time only."""

    def __init__(self, step: int, once: str) -> None:
        self.step = step
        self.once = Path(once)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and not self.once.exists():
            self.once.touch()
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


class Watch(L.Callback):
    """Prints what the weights come to as each step begins, the same bits as the same text."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        total = torch.stack([p.double().sum() for p in pl_module.parameters()]).sum()
        line = f"rank {trainer.global_rank} step {trainer.global_step} weights {total.item()!r}\n"
        os.write(1, line.encode())  # in one piece, beside other processes
