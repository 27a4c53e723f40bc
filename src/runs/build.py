"""Build a training run from its configuration."""

import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from src.config.arguments import check_arguments, check_seeds
from src.config.output import begin
from src.quoting import format_override
from src.runs.checkpoints import (
    changed_settings,
    check_accumulation,
    check_fit,
    check_optimizer,
    check_steps,
    find_checkpoint,
)
from src.runs.components import build_condition, build_module, make, plain, start_wandb, warn_of_schedule
from src.runs.resolve import (
    infer_accumulation,
    infer_condition_settings,
    infer_data_settings,
    inline_betas,
    restore_found,
)
from src.runs.trainer import build_trainer, quiet_libraries
from src.runs.trust import check_targets, known_targets
from src.training.checkpoints import read_checkpoint

if TYPE_CHECKING:
    import lightning as L

    from src.data.module import BaseDataModule
    from src.training.module import DiffusionModule


class Run(NamedTuple):
    """A run that is ready to train."""

    directory: Path
    module: "DiffusionModule"
    data: "BaseDataModule"
    trainer: "L.Trainer"
    resume_from: Path | None
    steps: int = 0
    """How many it has taken."""
    changes: Sequence[str] = ()
    """The settings of a resumed run that are not those of its checkpoint, as "name: old -> new"."""

    @property
    def averages(self) -> bool:
        """Whether its checkpoints hold averaged weights."""
        from src.training.callbacks.ema import EMA

        return any(isinstance(c, EMA) for c in self.trainer.callbacks)  # type: ignore[attr-defined]

    @property
    def last_checkpoint(self) -> Path:
        return self.directory / "checkpoints" / "last.ckpt"

    def save(self) -> None:
        """Save the last checkpoint, however long it takes until there is room for it."""
        from src.training.checkpoint_io import AtomicCheckpointIO

        while True:
            self.trainer.save_checkpoint(self.last_checkpoint)
            written = self.trainer.strategy.checkpoint_io
            failed = isinstance(written, AtomicCheckpointIO) and written.failed
            if not self.trainer.strategy.broadcast(failed):
                return
            if self.trainer.is_global_zero:
                warnings.warn(
                    f"training is over and waits for room at {self.directory}: make some, or stop it; what the last "
                    "whole checkpoint has stays",
                    stacklevel=2,
                )
            time.sleep(10)

    @property
    def finished(self) -> dict[str, Any] | None:
        """The metrics of a run that has taken all its steps and ended well; else None."""
        path = self.directory / "metrics.json"
        if self.steps < self.trainer.max_steps or not path.is_file():
            return None
        metrics: dict[str, Any] = json.loads(path.read_text())
        ended = metrics.get("steps") == self.steps and metrics.get("val/loss", 0.0) is not None
        return metrics if ended else None

    @property
    def saves(self) -> bool:
        """Whether checkpoints are written."""
        from src.training.checkpoint_io import NoCheckpoints

        return not isinstance(self.trainer.strategy.checkpoint_io, NoCheckpoints)

    @property
    def stop_signal(self) -> int:
        """The signal that ended training; 0 if no callback was there to say."""
        from src.training.callbacks.graceful_shutdown import GracefulShutdown

        asked = [c.signal for c in self.trainer.callbacks if isinstance(c, GracefulShutdown)]  # type: ignore[attr-defined]
        return max(asked, default=0)

    @property
    def diagnosis(self) -> str:
        """Why training was given up; empty if it was not."""
        from src.training.callbacks.nan_guard import NonFiniteGuard

        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return "".join(c.diagnosis for c in callbacks if isinstance(c, NonFiniteGuard))


def build(cfg: DictConfig) -> Run:
    """Everything that a training run consists of, of which nothing is written yet.

    Raises ValueError for settings that cannot work together.
    """
    if cfg.resume is not None and not cfg.trust:
        check_targets(plain(cfg, resolve=False), known_targets(training=True), format_override("resume", cfg.resume))
    resume_from = None if cfg.resume is None else find_checkpoint(cfg.resume, None)
    saved = read_checkpoint(resume_from) if resume_from else None
    before = saved and saved["hyper_parameters"]
    inline_betas(cfg, before)
    if before is not None:
        restore_found(cfg, before)
    if (cfg.data.get("num_samples") or cfg.data.get("path")) and str(cfg.trainer.precision) in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision={cfg.trainer.precision} would round the points themselves: use 32-true or bf16-mixed"
        )
    check_arguments(cfg)
    if not 0 < cfg.optimizer.get("lr", 1) < math.inf:
        raise ValueError(f"optimizer.lr={cfg.optimizer.lr} must be positive and finite: 1e-3 is usual")
    check_seeds(cfg)
    for name, least in (("keep_checkpoints", -1), ("neighbors.num_samples", 0), ("neighbors.num_candidates", 0)):
        if (number := OmegaConf.select(cfg, name)) < least:
            raise ValueError(f"{name}={number} must be at least {least}")
    quiet_libraries()
    import lightning as L

    directory = Path(cfg.run_dir)
    L.seed_everything(cfg.seed, verbose=False)
    data = make(cfg.data)
    infer_data_settings(cfg, data)
    infer_condition_settings(cfg, data)
    data.fingerprint_path = resume_from and record_path(resume_from)
    data.condition = build_condition(cfg)
    module = build_module(cfg, data.shape, data.num_values, data.condition)
    warn_of_schedule(module)
    from src.training.compile import check_graphs, compiled

    module.compiled_training = compiled(module.net, cfg.compile)
    if saved is not None:  # what cannot be resumed is refused before loggers write
        assert resume_from is not None
        check_fit(saved["state_dict"], module, resume_from)
        changed_settings(saved["hyper_parameters"], plain(cfg))
        check_steps(saved, cfg)
    elif any((directory / "checkpoints").glob("*.ckpt")):
        raise ValueError(
            f"{directory} already holds a run: go on with {format_override('resume', directory)}, or choose another run_dir"
        )
    trainer = build_trainer(cfg, directory)
    from src.distributed.processes import check_processes, start_quietly

    environment = getattr(trainer.strategy, "cluster_environment", None)  # of several processes
    check_processes("trainer.", trainer.strategy.root_device, trainer.num_devices, trainer.num_nodes, environment)
    start_quietly(trainer.strategy)
    data.overfit_batches, data.limit_val_batches = cfg.trainer.get("overfit_batches") or 0, trainer.limit_val_batches
    from src.training.memory import MicrobatchFinder, keep_freed_memory

    if not any(isinstance(callback, MicrobatchFinder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        keep_freed_memory(trainer.strategy.root_device)
    from src.distributed.sharding import FullyShardedStrategy

    if isinstance(trainer.strategy, FullyShardedStrategy) and module.curve_weights:
        raise ValueError("trainer=fsdp deals out the network alone, and a learned schedule learns too: use trainer=ddp")
    infer_accumulation(cfg, trainer, saved)
    check_graphs(cfg.compile, "auto" if cfg.data.get("microbatch_size") == "auto" else trainer.accumulate_grad_batches)
    module.hparams.update({str(k): v for k, v in plain(cfg).items()})
    if saved is not None:
        check_accumulation(saved, cfg)
        check_optimizer(saved, module)
    changes = changed_settings(saved["hyper_parameters"], module.hparams) if saved is not None else []
    return Run(directory, module, data, trainer, resume_from, saved["global_step"] if saved else 0, changes)


def start(cfg: DictConfig, run: Run) -> None:
    """Lock the folder of a run that nothing can be said against any more, start its loggers, and write its record.

    Before this nothing is written into the folder, and if this fails nothing stays. Raises ValueError if another
    process trains there, or W&B cannot start.
    """
    from src.training.loggers import folder_of, rollback_logger_files

    lock = run.directory / ".lock"
    found = lock.exists()
    if run.trainer.is_global_zero:
        lock_run_dir(run.directory)
    try:
        loggers = run.trainer.loggers if run.trainer.is_global_zero else []
        folders = [folder for logger in loggers if (folder := folder_of(logger, run.directory))]
        with rollback_logger_files(folders):
            start_wandb(cfg, run.trainer, run.directory)
            for logger in run.trainer.loggers if run.trainer.enable_autolog_hparams else ():
                logger.log_hyperparams(dict(run.module.hparams))
            begin(run.directory)
        for line in run.changes:  # not before: a refused command resumes nothing
            warnings.warn(f"resumed with another setting: {line}", stacklevel=2)
    except BaseException:
        if run.trainer.is_global_zero and not found:
            lock.unlink(missing_ok=True)
        if held := _locks.pop(run.directory.resolve(), None):
            held.close()
        raise


def record_path(checkpoint: Path) -> Path | None:
    """Where the record of the data is, of a checkpoint in a run's folder."""
    from src.data.split import FINGERPRINT_FILE

    return checkpoint.parent.parent / FINGERPRINT_FILE if checkpoint.parent.name == "checkpoints" else None


_locks: dict[Path, IO[str]] = {}


def lock_run_dir(directory: Path) -> None:
    """Keep a run's folder for this process until it ends. Raises ValueError if another trains there."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    directory.mkdir(parents=True, exist_ok=True)
    if before := _locks.pop(directory.resolve(), None):
        before.close()
    path = directory / ".lock"
    for _ in range(30):  # seconds: one that was stopped may still be on its way out
        file = path.open("a")  # which changes nothing of a file that is there
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which processes that load data do not inherit
        except BlockingIOError:
            file.close()
            time.sleep(1)
        except OSError:  # a file system without locks
            return
        else:
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                _locks[directory.resolve()] = file
                return
            file.close()  # its process was refused, and has removed it
    raise ValueError(f"another process trains in {directory}: wait for it or stop it, or choose another run_dir")


def close(run: Run) -> None:
    """End what would otherwise live on into the next run of the same process."""
    from src.training.loggers import finish

    if held := _locks.pop(run.directory.resolve(), None):
        held.close()
    finish(run.trainer)
