"""Build a training run from its configuration."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from omegaconf import DictConfig

from src.config.arguments import check_arguments
from src.config.combinations import check_task
from src.config.output import start_output
from src.config.rules import check_values
from src.errors import format_override
from src.runs.autoencoder import build_autoencoder, is_autoencoder
from src.runs.checkpoints import (
    check_fit,
    check_resumed,
    find_checkpoint,
    load_initial_weights,
    read_metrics,
    record_path,
)
from src.runs.components import build_condition, build_module, warn_about_schedule
from src.runs.latents import build_data, has_autoencoder
from src.runs.lock import lock_run_dir, unlock_run_dir
from src.runs.nodes import to_plain
from src.runs.resolve import resolve, resumed_folder
from src.runs.trainer import build_trainer, quiet_libraries, start_wandb
from src.runs.trust import check_targets, known_targets
from src.training.checkpoints import read_checkpoint

if TYPE_CHECKING:
    import lightning as L

    from src.data.module import BaseDataModule
    from src.training.base import TrainingModule


C = TypeVar("C")


class Run(NamedTuple):
    """A run that is ready to train."""

    config: DictConfig
    """The resolved configuration."""
    directory: Path
    module: "TrainingModule"
    data: "BaseDataModule"
    trainer: "L.Trainer"
    resume_from: Path | None
    steps: int = 0
    """Steps that the run took before it was resumed."""
    initial: str = ""
    """Which weights a new run took from a trained model, and which it could not take."""
    changes: Sequence[str] = ()
    """Settings of a resumed run that differ from its checkpoint, as "name: old -> new"."""

    def callbacks(self, kind: type[C]) -> list[C]:
        """Return the callbacks of a class."""
        return [c for c in self.trainer.callbacks if isinstance(c, kind)]  # type: ignore[attr-defined]

    @property
    def last_checkpoint(self) -> Path:
        return self.directory / "checkpoints" / "last.ckpt"

    @property
    def finished(self) -> dict[str, Any] | None:
        """The metrics of a run that completed its steps and did not diverge; else None."""
        metrics = read_metrics(self.directory)
        done = metrics is not None and metrics.get("steps") == self.steps >= self.trainer.max_steps
        return metrics if done else None


def build(cfg: DictConfig) -> Run:
    """Return the run that a composed configuration describes. It writes neither `cfg` nor the run folder.

    Raises ValueError for wrong settings, and FileNotFoundError without the run to resume.
    """
    folder = resumed_folder(cfg)
    if folder is not None and not cfg.trust:
        check_targets(to_plain(cfg, resolve=False), known_targets(training=True), format_override("resume", folder))
    resume_from = None if folder is None else find_checkpoint(str(folder), None)
    checkpoint = None if resume_from is None else read_checkpoint(resume_from)
    cfg = resolve(cfg, None, checkpoint)
    if (cfg.data.get("num_samples") or cfg.data.get("path")) and str(cfg.trainer.precision) in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision={cfg.trainer.precision} would round the points themselves: use 32-true or bf16-mixed"
        )
    check_arguments(cfg)
    check_values(cfg)
    quiet_libraries()
    import lightning as L

    L.seed_everything(cfg.seed, verbose=False)
    data = build_data(cfg, trust=bool(cfg.trust))
    cfg = resolve(cfg, data, checkpoint)
    data.batch_size = cfg.data.batch_size
    return instantiate_run(cfg, data, resume_from, checkpoint)


def instantiate_run(
    cfg: DictConfig, data: "BaseDataModule", resume_from: Path | None, checkpoint: Mapping[str, Any] | None
) -> Run:
    """Return the run of a resolved configuration: module, then Trainer with its callbacks and loggers."""
    from src.distributed.processes import check_processes, start_quietly
    from src.training.callbacks.power_ema import PowerEMA
    from src.training.callbacks.time_budget import TimeBudget
    from src.training.compile import check_cuda_graphs, compile_network
    from src.training.memory import MicrobatchFinder, keep_freed_memory

    directory = Path(cfg.run_dir)
    data.fingerprint_path = resume_from and record_path(resume_from)
    data.condition = build_condition(cfg)
    check_task(cfg)
    if has_autoencoder(cfg):
        data.prepare_once_per_node()  # of a resumed run, before its processes wait for each other
    module: TrainingModule
    if is_autoencoder(cfg):
        module = build_autoencoder(cfg, data.shape, data.augment_labels)
    else:
        module = build_module(cfg, data.shape, data.num_values, data.condition, data.augment_labels)
        warn_about_schedule(module)
    module.compiled_training = compile_network(module.net, cfg.compile)
    steps, changes, initial = 0, [], ""
    if checkpoint is not None:
        assert resume_from is not None
        check_fit(checkpoint["state_dict"], module, resume_from)
        steps, changes = checkpoint["global_step"], check_resumed(checkpoint, cfg, module)
    elif any((directory / "checkpoints").glob("*.ckpt")):
        raise ValueError(
            f"{format_override('hydra.run.dir', directory)} already holds a run; continue it with "
            f"{format_override('resume', directory)}, or choose another folder"
        )
    elif cfg.init_from.path is not None:
        initial = load_initial_weights(module, cfg.init_from)
    elif cfg.get("lora"):
        raise ValueError("lora=default trains adapters of a trained model: add init_from=FOLDER")
    trainer = build_trainer(cfg, directory)
    environment = getattr(trainer.strategy, "cluster_environment", None)  # strategies with several processes have one
    check_processes("trainer.", trainer.strategy.root_device, trainer.num_devices, trainer.num_nodes, environment)
    start_quietly(trainer.strategy)
    data.overfit_batches, data.limit_val_batches = cfg.trainer.get("overfit_batches") or 0, trainer.limit_val_batches
    run = Run(cfg, directory, module, data, trainer, resume_from, steps, initial, changes)
    for budget in run.callbacks(TimeBudget):
        budget.restore(trainer, checkpoint or {})  # Lightning restores it later, after `Run.finished` is read.
    for average in run.callbacks(PowerEMA):
        average.check_lengths(checkpoint or {})
    if not run.callbacks(MicrobatchFinder):
        keep_freed_memory(trainer.strategy.root_device)  # The finder needs the memory that a failed trial frees.
    check_sharding(run)
    check_optimized_metric(run)
    microbatch = cfg.data.get("microbatch_size")
    check_cuda_graphs(cfg.compile, "auto" if microbatch == "auto" else trainer.accumulate_grad_batches)
    module.hparams.update({str(k): v for k, v in to_plain(cfg).items()})
    return run


def check_sharding(run: Run) -> None:
    """Raise ValueError for settings that do not work with sharded weights."""
    from src.distributed.sharding import FullyShardedStrategy

    if not isinstance(run.trainer.strategy, FullyShardedStrategy):
        return
    if is_autoencoder(run.config):
        raise ValueError("trainer=fsdp does not support task=autoencoder; use trainer=ddp")
    if run.module.curve_weights:
        raise ValueError("trainer=fsdp shards only the network, and schedule=learned has weights too: use trainer=ddp")
    if run.config.data.get("microbatch_size") == "auto":
        raise ValueError(
            "data.microbatch_size=auto runs a step on each device separately, which sharded weights do not allow: set "
            "data.microbatch_size=1, and double it while it fits"
        )


def check_optimized_metric(run: Run) -> None:
    """Raise ValueError if `optimized_metric` is not a validation metric of this run."""
    metric, known = run.config.optimized_metric, [f"val/{name}" for name in run.module.validation]
    if metric not in (None, *known):
        raise ValueError(f"optimized_metric={metric} is not a metric of this run: choose one of {', '.join(known)}")


def start_run(run: Run) -> None:
    """Lock the folder of a run, start its loggers, and write its record.

    No file is written into the folder before, and none remains if this fails. Raises ValueError if another process
    trains there, or if W&B cannot start.
    """
    from src.training.loggers import folder_of, rollback_logger_files

    lock = run.directory / ".lock"
    existed = lock.exists()
    if run.trainer.is_global_zero:
        lock_run_dir(run.directory)
    try:
        loggers = run.trainer.loggers if run.trainer.is_global_zero else []
        folders = [folder for logger in loggers if (folder := folder_of(logger, run.directory))]
        with rollback_logger_files(folders):
            start_wandb(run.config, run.trainer, run.directory)
            for logger in run.trainer.loggers:
                _ = getattr(logger, "experiment", None)  # Invalid arguments of its library raise here.
                if run.trainer.enable_autolog_hparams:
                    logger.log_hyperparams(dict(run.module.hparams))
            start_output(run.directory)
        for line in run.changes:  # Not earlier: a rejected command does not resume.
            warnings.warn(f"resumed with another setting: {line}", stacklevel=2)
    except BaseException:
        if run.trainer.is_global_zero and not existed:
            lock.unlink(missing_ok=True)
        unlock_run_dir(run.directory)
        raise


def close_run(run: Run) -> None:
    """Release the lock and end the loggers, so that the next run of this process is independent."""
    from src.training.loggers import finish_loggers

    unlock_run_dir(run.directory)
    finish_loggers(run.trainer)
