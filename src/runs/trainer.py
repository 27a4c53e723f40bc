"""Build Lightning's Trainer and the loggers from the configuration."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from src.errors import sentence
from src.runs.nodes import instantiate_node

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.loggers import Logger


def build_trainer(cfg: DictConfig, directory: Path) -> "L.Trainer":
    """Return Lightning's Trainer with the configured callbacks, loggers and plugins.

    Null means Lightning's default. Raises ValueError for arguments that another setting of this project controls.
    """
    from lightning.pytorch.callbacks import Checkpoint, ProgressBar
    from lightning.pytorch.plugins import CheckpointIO

    from src.runs.trainer_settings import check_strategy, enabled_callbacks, trainer_settings, validation_interval
    from src.training.callbacks.monitor import LearningRate
    from src.training.checkpoint_io import AtomicCheckpointIO, NoCheckpoints
    from src.training.lightning_internals import disable_slurm_requeue
    from src.training.memory import MicrobatchFinder

    settings = trainer_settings(cfg)
    dev_run = bool(settings.get("fast_dev_run"))
    logs = settings.get("logger", True) and not dev_run
    loggers = [build_logger(name, node) for name, node in (cfg.logger or {}).items() if node and logs]
    # An experiment may set values of a callback that is not configured; that node has no _target_.
    callbacks = [instantiate_node(node) for node in (cfg.callbacks or {}).values() if node and "_target_" in node]
    if cfg.data.get("microbatch_size") == "auto" and cfg.resume is None:
        callbacks.append(MicrobatchFinder())
    if loggers:
        callbacks.append(LearningRate())
    limit = settings.get("overfit_batches") or settings.get("limit_val_batches", 1.0)
    if limit == 0 and not dev_run:
        warnings.warn(
            "trainer.limit_val_batches=0 disables validation: no val/loss, no best checkpoint, no samples during "
            "training",
            stacklevel=2,
        )
    plugins = [instantiate_node(node) for node in cfg.trainer.get("plugins") or []]
    if dev_run or settings.get("enable_checkpointing") is False:
        plugins = [*[plugin for plugin in plugins if not isinstance(plugin, CheckpointIO)], NoCheckpoints()]
    elif not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpointIO())
    callbacks = enabled_callbacks(callbacks, {**settings, "limit_val_batches": limit})
    arguments = {
        "callbacks": callbacks,
        # Lightning would add its own progress bar, which shows epochs.
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
        # With None, Lightning would add a ModelCheckpoint that writes beside the logs.
        "enable_checkpointing": settings.get("enable_checkpointing", any(isinstance(c, Checkpoint) for c in callbacks)),
        "logger": loggers or False,
        "plugins": plugins,
        "default_root_dir": str(directory),
        "val_check_interval": validation_interval(
            settings, cfg.validate_every, counts_steps=cfg.data.get("microbatch_size") is not None
        ),
        "check_val_every_n_epoch": None,
        "limit_val_batches": limit,
        "min_epochs": 0,  # Otherwise Lightning trains at least one epoch, and an epoch here has all steps.
        "overfit_batches": 0,  # The data module repeats the batches.
        "deterministic": settings.get("deterministic", False),  # None would keep the value of an earlier job.
        "use_distributed_sampler": False,  # The batch sampler splits the batch itself.
    }
    trainer = _construct(settings, arguments)
    check_strategy(trainer)
    disable_slurm_requeue(trainer)
    return trainer


def world_size(cfg: DictConfig) -> int:
    """Return the number of processes that the Trainer of a configuration starts."""
    from src.runs.trainer_settings import trainer_settings

    names = ("_target_", "accelerator", "devices", "num_nodes", "strategy")
    settings = {name: value for name, value in trainer_settings(cfg).items() if name in names}
    arguments = {"logger": False, "plugins": [instantiate_node(node) for node in cfg.trainer.get("plugins") or []]}
    return _construct(settings, arguments).world_size


def _construct(settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> "L.Trainer":
    """Return a Trainer from the `settings` of its node and further arguments. Raises ValueError in one line."""
    from src.runs.trainer_settings import explain_error

    try:
        trainer: L.Trainer = instantiate_node(OmegaConf.create(dict(settings)), arguments)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        raise ValueError(explain_error(cause or error, settings)) from error
    return trainer


def build_logger(name: str, node: DictConfig) -> "Logger":
    """Return the logger of a node; it writes nothing yet. Raises ValueError if its package is not installed."""
    try:
        logger: Logger = instantiate(node)
        if name == "wandb":
            import wandb  # noqa: F401 - raises here if it is not installed
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, ImportError):
            raise ValueError(
                f"logger={name} needs a package that is not installed ({sentence(cause)}); pip install {name}"
            ) from error
        raise
    return logger


def start_wandb(cfg: DictConfig, trainer: "L.Trainer", directory: Path) -> None:
    """Start the run at W&B, if it is one of the loggers, and save its id.

    Without a connection, warn and log offline. Raises ValueError if W&B cannot start offline either.
    """
    from lightning.pytorch.loggers import WandbLogger

    from src.training.loggers import write_wandb_id

    node = (cfg.logger or {}).get("wandb")
    for k, logger in enumerate(trainer.loggers):
        if not isinstance(logger, WandbLogger) or node is None:  # A logger of the user starts by itself.
            continue
        try:
            _ = logger.experiment
        except Exception as error:
            if node.offline:
                raise ValueError(f"logger=wandb cannot start ({sentence(error)}); change logger.wandb.*") from error
            warnings.warn(f"W&B could not start online ({sentence(error)}): this run is logged offline", stacklevel=2)
            offline: WandbLogger = instantiate(node, offline=True, mode="offline")
            _ = offline.experiment
            trainer.loggers[k] = offline
        if trainer.is_global_zero:
            write_wandb_id(directory, node.id)


IGNORED_WARNINGS = (
    "does not have many workers",
    "smaller than the logging interval",
    "your dataloader is not resumable",  # The stream of batches starts at the step of the checkpoint.
    "Checkpoint directory .* exists and is not empty",
    "functional.all_gather is deprecated",
    "broadcast_buffers.* is deprecated",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def quiet_libraries() -> None:
    """Silence Lightning's tips and its repeated log lines."""
    import lightning  # noqa: F401 - sets the levels that are changed below

    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("callbacks.model_summary", "profilers.profiler"):  # The user requests these explicitly.
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    if logging.getLogger().handlers:  # Hydra's handlers print the same lines.
        for name in ("lightning", "lightning.pytorch"):
            logging.getLogger(name).handlers.clear()
    for text in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{text}.*")
