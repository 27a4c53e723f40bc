"""Build Lightning's Trainer and the loggers from the configuration."""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from src.errors import sentence
from src.runs.components import make, plain

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.loggers import Logger


def build_trainer(cfg: DictConfig, directory: Path) -> "L.Trainer":
    """Lightning's Trainer with the configured callbacks and loggers.

    Of its arguments null stands for Lightning's default. Raises ValueError for those that are to be set in another way.
    """
    from lightning.pytorch.plugins import CheckpointIO, Precision

    from src.runs.trainer_settings import check_built, check_settings, explain_error, kept, validation_interval
    from src.training.callbacks.monitor import LearningRate
    from src.training.checkpoint_io import AtomicCheckpointIO, NoCheckpoints
    from src.training.lightning_internals import disable_slurm_requeue
    from src.training.memory import MicrobatchFinder

    settings = {str(name): value for name, value in plain(cfg.trainer).items() if value is not None}
    check_settings(settings, cfg.resume is not None, bool(cfg.logger))
    for name in ("validate_every", "checkpoint_every"):
        if cfg[name] < 1:
            raise ValueError(f"{name} must be at least 1 step, got {cfg[name]}")
    interval = validation_interval(settings, cfg.validate_every)
    tries = bool(settings.get("fast_dev_run"))
    logs = settings.get("logger", True) and not tries
    loggers = [build_logger(name, node, directory) for name, node in (cfg.logger or {}).items() if node and logs]
    # A model brings settings along for callbacks that perhaps were not chosen: these have no _target_.
    callbacks = [make(node) for node in (cfg.callbacks or {}).values() if node and "_target_" in node]
    if cfg.data.get("microbatch_size") == "auto" and cfg.resume is None:
        callbacks.append(MicrobatchFinder())
    if loggers:
        callbacks.append(LearningRate())
    limit = settings.get("overfit_batches") or settings.get("limit_val_batches", 1.0)
    if limit == 0 and not tries:
        warnings.warn(
            "trainer.limit_val_batches=0 turns validation off: there will be no val/loss, no best checkpoint and no "
            "samples while training",
            stacklevel=2,
        )
    plugins = [make(node) for node in cfg.trainer.get("plugins") or []]
    if tries or settings.get("enable_checkpointing") is False:
        plugins = [*[plugin for plugin in plugins if not isinstance(plugin, CheckpointIO)], NoCheckpoints()]
    elif not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins.append(AtomicCheckpointIO())
    if "precision" in settings and any(isinstance(plugin, Precision) for plugin in plugins):
        raise ValueError("one of trainer.plugins says the precision too; set trainer.precision=null")
    try:
        given = {
            "callbacks": kept(callbacks, {**settings, "limit_val_batches": limit}),
            "logger": loggers or False,
            "plugins": plugins,
            "default_root_dir": str(directory),
            "val_check_interval": interval,
            "check_val_every_n_epoch": None,
            "limit_val_batches": limit,
            "min_epochs": 0,  # else Lightning takes min_steps for a whole epoch, which is all steps
            "overfit_batches": 0,  # which stream of batches it is, is the data's affair
            "deterministic": settings.get("deterministic", False),  # else it stays as a job before this one had it
            "use_distributed_sampler": False,  # the stream is distributed, and such a one Lightning leaves alone
        }
        trainer: L.Trainer = make(OmegaConf.masked_copy(cfg.trainer, [*settings]), given)
    except Exception as error:
        cause = error.__cause__
        raise ValueError(explain_error(cause if isinstance(cause, Exception) else error, settings)) from error
    check_built(trainer)
    disable_slurm_requeue(trainer)
    return trainer


def build_logger(name: str, node: DictConfig, directory: Path) -> "Logger":
    """A logger from its YAML, which has written nothing yet; W&B's keeps the id of a resumed run."""
    from src.training.loggers import wandb_id

    if name == "wandb" and node.id is None:
        node.id = wandb_id(directory)
    try:
        logger: Logger = instantiate(node)
        if name == "wandb":
            import wandb  # noqa: F401 - whether it is there
    except Exception as error:
        if isinstance(error.__cause__ or error, ImportError):
            raise ValueError(
                f"logger={name} needs a package that is not installed ({sentence(error.__cause__ or error)}): "
                f"pip install {name}"
            ) from error
        raise
    return logger


def quiet_libraries() -> None:
    """Silence what Lightning says of itself, advertisements among it, and have it say the rest once under Hydra."""
    import lightning  # noqa: F401 - sets the levels that are changed below

    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("callbacks.model_summary", "profilers.profiler"):  # which say only what they were asked for
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.INFO)
    if logging.getLogger().handlers:  # Hydra's, which say it too
        for name in ("lightning", "lightning.pytorch"):
            logging.getLogger(name).handlers.clear()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    # The stream of batches starts at the step where the checkpoint left it.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*functional.all_gather is deprecated.*")
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
