"""Check the arguments of Lightning's Trainer, and name the arguments in its errors."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from omegaconf import DictConfig

from src.errors import format_override, sentence
from src.runs.nodes import to_plain
from src.training.lightning_internals import copies_this_process

COUNTS_EPOCHS = "counts epochs, and training counts steps"
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "max_epochs": (-1, f"{COUNTS_EPOCHS}; set trainer.max_steps"),
    "min_epochs": (0, f"{COUNTS_EPOCHS}; set trainer.min_steps"),
    "check_val_every_n_epoch": (None, f"{COUNTS_EPOCHS}; set validate_every"),
    "reload_dataloaders_every_n_epochs": (0, f"{COUNTS_EPOCHS}; leave it at 0"),
    "limit_train_batches": (
        1.0,
        "ends an epoch, and training counts steps; set trainer.max_steps for a shorter run, or trainer.overfit_batches "
        "to train on the same few batches",
    ),
    "limit_test_batches": (1.0, "has no effect: src.train runs no test; src.evaluate has n=..."),
    "limit_predict_batches": (1.0, "has no effect: src.train makes no predictions; src.sample has n=..."),
    "callbacks": ([], "has no effect; add each one as +callbacks.NAME._target_=..."),
    "default_root_dir": (None, "has no effect; set hydra.run.dir"),
    "barebones": (
        False,
        "disables val/loss too; set logger=none trainer.enable_checkpointing=false trainer.enable_progress_bar=false",
    ),
    "model_registry": (None, "uploads nothing; choose logger=wandb, which uploads the best model"),
}
"""For each unsupported argument: the value that changes nothing, and the rule with the setting to use instead."""


def _is_duration(value: Any) -> bool:
    """Return whether `value` is a duration above 0: a string DD:HH:MM:SS, or arguments of `timedelta`."""
    try:
        if isinstance(value, str):
            days, *rest = map(int, re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", value.strip()).groups())  # type: ignore[union-attr]
            return bool(days or any(rest))
        return timedelta(**value) > timedelta(0)
    except (AttributeError, TypeError):
        return False


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "devices": (lambda n: not isinstance(n, int) or n >= 1 or n == -1, "must be at least 1; auto takes all devices"),
    "max_time": (_is_duration, 'must be a duration above 0, as days:hours:minutes:seconds; "00:02:00:00" is two hours'),
    "overfit_batches": (
        lambda limit: limit >= 0 and not (isinstance(limit, float) and limit > 1),
        "must be a number of batches, or a fraction of the data in [0.0, 1.0]",
    ),
    "precision": (
        lambda name: not str(name).startswith("transformer-engine"),
        "replaces layers that the optimizer holds; use bf16-mixed or 32-true",
    ),
    "plugins": (
        lambda nodes: isinstance(nodes, list) and all(isinstance(node, dict) and "_target_" in node for node in nodes),
        "must be a list of nodes with a _target_ each",
    ),
    "profiler": (lambda value: isinstance(value, str | dict), "must be simple, advanced or pytorch"),
}
"""For each argument that neither Lightning nor `config.rules` checks clearly: the test and the rule."""

DEVICE_DEFAULTS = {"accelerator": "auto", "strategy": "auto", "devices": "auto", "num_nodes": 1, "precision": "32-true"}
"""The arguments that select hardware, with their defaults. Lightning's errors about them often name no argument."""


def trainer_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of the Trainer that are not null.

    Raises ValueError for an argument that this project does not support, or a value outside its range.
    """
    settings = {str(name): value for name, value in to_plain(cfg.trainer).items() if value is not None}
    for name, (neutral, rule) in UNSUPPORTED.items():
        value = settings.get(name, neutral)
        if type(value) is not type(neutral) or value != neutral:  # A limit of 1 is one batch, 1.0 is all of them.
            raise ValueError(f"{_shown(name, settings)} {rule}")
    for name, (is_valid, rule) in RULES.items():
        if name in settings and not is_valid(settings[name]):
            raise ValueError(f"{_shown(name, settings)} {rule}")
    if "max_steps" not in settings:
        raise ValueError("trainer.max_steps=null must be a number of steps")
    if not 0 <= settings.get("min_steps", 0) <= settings["max_steps"]:
        raise ValueError(
            f"{_shown('min_steps', settings)} must be in [0, trainer.max_steps]; trainer.max_steps is "
            f"{settings['max_steps']}"
        )
    if match := re.match(r"fsdp|deepspeed|ddp_(spawn|fork|notebook)", str(settings.get("strategy", "auto"))):
        raise ValueError(
            f"{_shown('strategy', settings)} is not supported; use {'trainer=ddp' if match[1] else 'trainer=fsdp'}"
        )
    logger = settings.get("logger", False)
    if not isinstance(logger, bool) or (logger and not cfg.logger):
        raise ValueError(
            f"{_shown('logger', settings)} has no effect; choose logger=csv, tensorboard or wandb, or add one as "
            "+logger.NAME._target_=..."
        )
    if cfg.resume is not None and settings.get("fast_dev_run"):
        raise ValueError(
            f"{_shown('fast_dev_run', settings)} trains from the start and saves nothing; leave resume out"
        )
    return settings


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
    raise ValueError(f"{_shown('val_check_interval', settings)} {rule}")


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
    return f"{' '.join(_shown(name, settings) for name in causes)}: {sentence(error)}{fix}"


def check_strategy(trainer: L.Trainer) -> None:
    """Raise ValueError for a strategy that does not return callbacks and weights to this process."""
    name = type(trainer.strategy).__name__
    if copies_this_process(trainer.strategy):
        raise ValueError(f"trainer.strategy={name} starts copies of this process; use trainer=ddp")
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise ValueError(f"trainer.strategy={name} shards weights in its own way; use trainer=fsdp")


def _shown(name: str, settings: Mapping[str, Any]) -> str:
    """Return the argument and its value as a user types them."""
    value = settings[name]
    if isinstance(value, dict) and "_target_" in value:
        return format_override(f"trainer.{name}._target_", value["_target_"])
    return format_override(f"trainer.{name}", value)
