"""Faults that a run does to itself, put into it as callbacks: `+callbacks.fault._target_=tests.faults.Poison`."""

import math
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


class Die(L.Callback):
    """At this step one process is gone, as if for lack of memory."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank = rank
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Stop(L.Callback):
    """At this step one process is asked to end, the first time only: it leaves a file `once`."""

    def __init__(self, rank: int, step: int, once: str) -> None:
        self.rank = rank
        self.step = step
        self.once = Path(once)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        asked = trainer.global_rank == self.rank and trainer.global_step == self.step
        if asked and not self.once.exists():
            self.once.touch()
            os.kill(os.getpid(), signal.SIGTERM)


class KillWorker(L.Callback):
    """At this step a process that loads data is gone."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            workers = trainer.fit_loop._data_fetcher.combined_loader.iterators
            for iterator in workers if isinstance(workers, list) else workers.iterators:
                os.kill(iterator._workers[0].pid, signal.SIGKILL)


class Watch(L.Callback):
    """Prints what the weights come to as each step begins, the same bits as the same text."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        total = torch.stack([p.double().sum() for p in pl_module.parameters()]).sum()
        line = f"rank {trainer.global_rank} step {trainer.global_step} weights {total.item()!r}\n"
        os.write(1, line.encode())  # in one piece, beside other processes
