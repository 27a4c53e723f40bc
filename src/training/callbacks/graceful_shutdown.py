"""How a run ends before its time: on Ctrl-C, SIGTERM or SIGUSR1 (SLURM's warning), saved and without a traceback."""

import signal
import threading
import time
from contextlib import ExitStack
from types import FrameType
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from src.distributed.ranks import handle_signals, kill_children
from src.errors import DataReadError


class Interruption:
    """As a handler, ends what is going on at once, and remembers the signal's `number`."""

    number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        kill_children()
        raise KeyboardInterrupt


def wait_for_children() -> None:
    """Have Lightning no longer watch the processes that this one started: when one ends it would kill this one."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            cast(Any, thread)._child_processes.clear()


class GracefulShutdown(L.Callback):
    """On a signal: finish the step of training, validation or sampling at hand, save `path`, then stop.

    `signal` is the one that it was, 0 if none. A second Ctrl-C stops at once. Several processes agree first, since the
    signal may have reached only one of them: about every `check_interval_s`, at a turn that all of them count alike.
    """

    def __init__(self, path: str, check_interval_s: float = 5.0) -> None:
        if check_interval_s <= 0:
            raise ValueError(
                f"callbacks.graceful_shutdown.check_interval_s must be positive, got {check_interval_s}: 5 is usual"
            )
        self.path = path
        self.check_interval_s = check_interval_s
        self.signal = 0
        self._listening = ExitStack()
        self._turn = self._next_turn = 0
        self._last: tuple[int, float] | None = None

    # Lightning listens to signals of its own, from before this hook until after `on_exception`.
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signal, self._last = 0, None
        self._turn = self._next_turn = 0
        self._listening.enter_context(handle_signals(self._ask))
        # Which has every step wait for the device, to tell all processes of a SIGTERM.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The start of the next step: only here has Lightning logged and counted the last one.
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._agreed(trainer):
            _count_as_at_the_end_of_a_step(trainer)
            self._save_and_stop(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._next_turn, self._last = 0, None  # other turns take other times

    on_validation_end = on_validation_start

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.look(trainer)

    def look(self, trainer: L.Trainer) -> None:
        """Save and stop, if a signal asked for it. All processes must take this turn."""
        if self._agreed(trainer):
            self._save_and_stop(trainer)

    def _save_and_stop(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        wait_for_children()
        raise KeyboardInterrupt

    def _agreed(self, trainer: L.Trainer) -> bool:
        turn = self._turn
        self._turn += 1
        if trainer.world_size > 1 and turn >= self._next_turn:
            now = time.perf_counter()
            count, since = (turn - self._last[0], now - self._last[1]) if self._last else (1, self.check_interval_s)
            # The largest of each: any process's signal, and the slowest one's seconds a turn.
            mine = torch.tensor([[self.signal, since / max(count, 1)]], device=trainer.strategy.root_device)
            largest = trainer.strategy.all_gather(mine).flatten(0, -2).amax(0)
            self._last = turn, now
            self._next_turn = turn + max(1, int(self.check_interval_s / largest[1].item()))
            agreed = int(largest[0])
            self.signal = agreed or self.signal  # one that came meanwhile is for the next time
            return agreed != 0
        return trainer.world_size == 1 and self.signal != 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._next_turn = 0
        self.look(trainer)
        self._listening.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the last step that was completed, where data can no longer be read."""
        together = trainer.world_size == 1 or getattr(exception, "everywhere", False)
        if isinstance(exception, DataReadError) and together and trainer.state.fn == TrainerFn.FITTING:
            wait_for_children()
            if trainer.training:
                _count_as_at_the_end_of_a_step(trainer)
            trainer.save_checkpoint(self.path)
        self._listening.close()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            kill_children()
            raise KeyboardInterrupt
        self.signal = number


def _count_as_at_the_end_of_a_step(trainer: L.Trainer) -> None:
    """Have Lightning count as where it saves checkpoints by itself, so that a resumed run counts on from there.

    It counts the batch that is not begun as begun: a resumed run would validate one too early, and log one step off.
    The batches that a step has begun with are not counted, of which the next process knows nothing.
    """
    if trainer.global_step == 0:
        return
    loop = trainer.fit_loop.epoch_loop
    counts: list[Any] = [loop.batch_progress.total, loop.batch_progress.current]
    over = counts[1].processed - trainer.global_step * trainer.accumulate_grad_batches
    for count in counts:
        count.ready = count.started = count.processed = count.processed - over
        count.completed = count.processed - 1
    loop.batch_progress.is_last_batch = False
    loop._batches_that_stepped = trainer.global_step - 1


def check_stop_requested(trainer: L.Trainer) -> None:
    """For what takes long within a hook: a turn of every `GracefulShutdown` of the trainer."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GracefulShutdown):
            callback.look(trainer)
