"""Save and stop cleanly on Ctrl-C, SIGTERM and SIGUSR1 (SLURM's warning before a time limit)."""

import signal
import time
from contextlib import ExitStack
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from src.distributed.ranks import handle_signals, kill_children
from src.errors import DataReadError
from src.training.lightning_internals import disable_sigterm_broadcast, mark_step_completed, wait_for_children


class GracefulShutdown(L.Callback):
    """On a signal, finish the current step of training, validation or sampling, save `path`, and stop.

    `signal` is the number of that signal, 0 if none arrived. A second Ctrl-C stops immediately. With several processes
    the signal may reach only one, so they synchronize about every `check_interval_s` seconds.
    """

    def __init__(self, path: str, check_interval_s: float = 5.0) -> None:
        if check_interval_s <= 0:
            raise ValueError(f"callbacks.graceful_shutdown.check_interval_s={check_interval_s} must be positive")
        self.path = path
        self.check_interval_s = check_interval_s
        self.signal = 0
        self._handlers = ExitStack()
        # Processes must call the collective in the same check, so they count checks instead of seconds.
        self._num_checks = self._next_collective = 0
        self._last_collective: tuple[int, float] | None = None
        """Number of the check and time in seconds of the last collective."""

    # Lightning installs its own signal handlers before this hook and removes them after `on_exception`.
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.signal = self._num_checks = self._next_collective = 0
        self._last_collective = None
        self._handlers.enter_context(handle_signals(self._request_stop))
        disable_sigterm_broadcast(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Lightning has logged and counted a step only when the next one starts.
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.check(trainer, starts_step=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._next_collective, self._last_collective = 0, None  # time per check changes

    on_validation_end = on_validation_start

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.check(trainer)

    def check(self, trainer: L.Trainer, starts_step: bool = False) -> None:
        """Save and stop if a signal arrived. Collective."""
        if self._stop_agreed(trainer):
            if starts_step:
                mark_step_completed(trainer)
            trainer.save_checkpoint(self.path)
            wait_for_children()
            raise KeyboardInterrupt

    def _stop_agreed(self, trainer: L.Trainer) -> bool:
        check = self._num_checks
        self._num_checks += 1
        if trainer.world_size > 1 and check >= self._next_collective:
            now = time.perf_counter()
            last = self._last_collective
            count, elapsed = (check - last[0], now - last[1]) if last else (1, self.check_interval_s)
            # The maximum of each column: the signal of any process, and the seconds per check of the slowest.
            mine = torch.tensor([[self.signal, elapsed / max(count, 1)]], device=trainer.strategy.root_device)
            largest = trainer.strategy.all_gather(mine).flatten(0, -2).amax(0)
            self._last_collective = check, now
            self._next_collective = check + max(1, int(self.check_interval_s / largest[1].item()))
            agreed = int(largest[0])
            self.signal = agreed or self.signal  # a signal that arrived meanwhile counts next time
            return agreed != 0
        return trainer.world_size == 1 and self.signal != 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._next_collective = 0
        self.check(trainer)
        self._handlers.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the last completed step if the data can no longer be read."""
        in_all_processes = trainer.world_size == 1 or getattr(exception, "everywhere", False)
        if isinstance(exception, DataReadError) and in_all_processes and trainer.state.fn == TrainerFn.FITTING:
            wait_for_children()
            if trainer.training:
                mark_step_completed(trainer)
            trainer.save_checkpoint(self.path)
        self._handlers.close()

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            kill_children()
            raise KeyboardInterrupt
        self.signal = number


def check_stop_requested(trainer: L.Trainer) -> None:
    """Save and stop if a signal arrived; long hooks call it. Collective."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GracefulShutdown):
            callback.check(trainer)
