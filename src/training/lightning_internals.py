"""All uses of Lightning's undocumented attributes, each with its reason.

Checked with lightning 2.6, to which the dependency is pinned.
"""

import threading
from typing import Any, cast

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy


def clear_logged_metrics(trainer: L.Trainer) -> None:
    """Clear metrics logged by the previous step; Lightning would log them again, at a later step, on stop."""
    if (logged := trainer._results) is not None:
        logged.reset(metrics=False)


def run_validation(trainer: L.Trainer) -> None:
    """Run one validation outside Lightning's loop, from the first batch, logged at the last completed step."""
    loop = trainer.fit_loop.epoch_loop
    loop.val_loop.restarting = False
    logged_step, loop._batches_that_stepped = loop._batches_that_stepped, trainer.global_step - 1
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    loop._batches_that_stepped = logged_step


def save_best(trainer: L.Trainer) -> bool:
    """Save the checkpoints that are best by a validation after training, which Lightning ignores; return if any is."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    monitoring = [c for c in callbacks if (c.monitor or "").startswith("val/")]
    for callback in monitoring:
        callback._save_topk_checkpoint(trainer, callback._monitor_candidates(trainer))
    return any(callback._last_global_step_saved == trainer.global_step for callback in monitoring)


def logged_step(trainer: L.Trainer) -> int:
    """Return the step at which Lightning currently logs metrics: in a validation, the index of the last step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def correct_logged_step(trainer: L.Trainer) -> None:
    """Log the next step at its index. When a finished run resumes, Lightning's count is one too large."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class FirstLearningRateMonitor(LearningRateMonitor):
    """Log the learning rate of the first parameter group as `lr`. Of several, Lightning logs `lr/pg1`, `lr/pg2`, ..."""

    def _check_duplicates_and_update_name(self, *args: Any) -> list[str]:
        return [super()._check_duplicates_and_update_name(*args)[0].removesuffix("/pg1")]


def mark_step_completed(trainer: L.Trainer) -> None:
    """Set Lightning's counters as at the end of the last step, where it saves checkpoints itself.

    At the start of a batch, Lightning counts it as started: a run resumed from there would validate one step early
    and log at wrong steps. Batches of an unfinished accumulation are not counted: the next process repeats them.
    """
    if trainer.global_step == 0:
        return
    loop = trainer.fit_loop.epoch_loop
    counts: list[Any] = [loop.batch_progress.total, loop.batch_progress.current]
    excess = counts[1].processed - trainer.global_step * trainer.accumulate_grad_batches
    for count in counts:
        count.ready = count.started = count.processed = count.processed - excess
        count.completed = count.processed - 1
    loop.batch_progress.is_last_batch = False
    loop._batches_that_stepped = trainer.global_step - 1


def stop_training(trainer: L.Trainer) -> None:
    """Stop after this step, even if `trainer.min_steps` demands more."""
    trainer.fit_loop.epoch_loop.min_steps = None
    trainer.should_stop = True


def set_max_steps(trainer: L.Trainer, num_steps: int) -> None:
    """Set `trainer.max_steps`, which Lightning can only set in the constructor; training stops at this step."""
    trainer.fit_loop.epoch_loop.max_steps = num_steps


def disable_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Keep Lightning from broadcasting SIGTERM in each step: the broadcast synchronizes with the device."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def disable_slurm_requeue(trainer: L.Trainer) -> None:
    """Keep Lightning from handling SIGUSR1: it would save another checkpoint and requeue the job."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False


def wait_for_children() -> None:
    """Stop Lightning from watching its child processes: it kills this one as soon as one of them ends."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            cast(Any, thread)._child_processes.clear()


def copies_this_process(strategy: Any) -> bool:
    """Return whether DDP forks or spawns processes instead of running the command again in each."""
    return isinstance(strategy, DDPStrategy) and strategy._start_method != "popen"


def close_progress_bars(progress: TQDMProgressBar) -> None:
    """Close the bars on an exception, so that its message starts on a new line."""
    for bar in (progress._train_progress_bar, progress._val_progress_bar):
        if bar is not None:
            bar.close()
