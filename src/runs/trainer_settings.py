"""Check the arguments of Lightning's Trainer, and name the arguments in its errors."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from omegaconf import DictConfig

from src.config.trainer_rules import check_trainer, format_argument
from src.errors import sentence
from src.runs.nodes import to_plain
from src.training.lightning_internals import copies_this_process

DEVICE_DEFAULTS = {"accelerator": "auto", "strategy": "auto", "devices": "auto", "num_nodes": 1, "precision": "32-true"}
"""The arguments that select hardware, with their defaults. Lightning's errors about them often name no argument."""


def trainer_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of the Trainer that are not null. Raises UsageError for an unsupported one."""
    check_trainer(cfg)
    return {str(name): value for name, value in to_plain(cfg.trainer).items() if value is not None}


def validation_interval(settings: Mapping[str, Any], validate_every: int, counts_steps: bool = False) -> int:
    """Return the number of batches between validations: `validate_every` steps, unless `val_check_interval` is set.

    `val_check_interval` is a number of batches, as in Lightning, or a fraction of the run. With `counts_steps` a batch
    means an optimizer step. Raises ValueError for other values.
    """
    steps, batches = int(settings["max_steps"]), int(settings.get("accumulate_grad_batches", 1))
    interval = settings.get("val_check_interval", validate_every)
    rule = "must be a number of batches, or a fraction of the run in (0.0, 1.0]; or set validate_every, in steps"
    if isinstance(interval, float) and 0 < interval <= 1:
        return max(1, int(steps * interval)) * batches
    if isinstance(interval, int) and not isinstance(interval, bool) and interval >= 1:
        interval *= batches if counts_steps or "val_check_interval" not in settings else 1
        if interval % batches == 0:
            return int(min(interval, steps * batches))
        rule = f"must be a multiple of trainer.accumulate_grad_batches={batches}; or set validate_every, in steps"
    raise ValueError(f"{format_argument('val_check_interval', settings)} {rule}")


def enabled_callbacks(callbacks: Sequence[L.Callback], settings: Mapping[str, Any]) -> list[L.Callback]:
    """Return the callbacks except those that `settings` turn off: progress bar, checkpoints, best checkpoint."""
    kinds = {
        "enable_progress_bar": lightning_callbacks.ProgressBar,
        "enable_checkpointing": lightning_callbacks.Checkpoint,
    }
    off = tuple(kind for name, kind in kinds.items() if settings.get(name) is False)
    kept = [callback for callback in callbacks if not isinstance(callback, off)]
    if settings.get("limit_val_batches") != 0:
        return kept
    best = [c for c in kept if isinstance(c, lightning_callbacks.ModelCheckpoint) and (c.monitor or "")[:4] == "val/"]
    return [callback for callback in kept if callback not in best]


def explain_error(error: BaseException, settings: Mapping[str, Any]) -> str:
    """Return one line for an error of the Trainer's constructor, with the settings that cause it.

    These are the settings that the error names, or else the settings of devices that differ from the default.
    """
    known = [name for name in inspect.signature(L.Trainer).parameters if name in settings]
    named = [name for name in known if re.search(rf"\b{name}\b", str(error))]
    likely = [name for name, default in DEVICE_DEFAULTS.items() if settings.get(name, default) not in (default, "cpu")]
    causes = named or likely or [name for name in DEVICE_DEFAULTS if name in settings]
    fix = "; trainer=default uses the devices of this machine" if set(causes) & set(DEVICE_DEFAULTS) else ""
    return f"{' '.join(format_argument(name, settings) for name in causes)}: {sentence(error)}{fix}"


def check_strategy(trainer: L.Trainer) -> None:
    """Raise ValueError for a strategy that does not return callbacks and weights to this process."""
    name = type(trainer.strategy).__name__
    if copies_this_process(trainer.strategy):
        raise ValueError(f"trainer.strategy={name} starts copies of this process; use trainer=ddp")
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ValueError(f"trainer.strategy={name} shards weights in its own way; use trainer=fsdp")
