"""The rules of the Trainer's arguments that need no torch: which are unsupported, and the values of the others."""

import math
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from omegaconf import DictConfig, OmegaConf

from src.errors import UsageError, format_override

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
        lambda limit: isinstance(limit, int | float) and 0 <= limit <= (1 if isinstance(limit, float) else math.inf),
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
"""For each argument that neither Lightning nor `rules` checks clearly: the test and the rule."""


def check_trainer(cfg: DictConfig) -> None:
    """Raise UsageError for an argument of the Trainer that is unsupported or outside its range; null is the default."""
    trainer = OmegaConf.to_container(cfg.trainer, resolve=True)
    assert isinstance(trainer, dict)
    settings = {str(name): value for name, value in trainer.items() if value is not None}
    for name, (neutral, rule) in UNSUPPORTED.items():
        value = settings.get(name, neutral)
        if type(value) is not type(neutral) or value != neutral:  # A limit of 1 is one batch, 1.0 is all of them.
            raise UsageError(f"{format_argument(name, settings)} {rule}")
    for name, (is_valid, rule) in RULES.items():
        if name in settings and not is_valid(settings[name]):
            raise UsageError(f"{format_argument(name, settings)} {rule}")
    if "max_steps" not in settings:
        raise UsageError("trainer.max_steps=null must be a number of steps")
    least, most = settings.get("min_steps", 0), settings["max_steps"]
    if isinstance(most, int) and not (isinstance(least, int) and 0 <= least <= most):
        shown = format_argument("min_steps", settings)
        raise UsageError(f"{shown} must be in [0, trainer.max_steps]; trainer.max_steps is {most}")
    if match := re.match(r"fsdp|deepspeed|ddp_(spawn|fork|notebook)", str(settings.get("strategy", "auto"))):
        shown = format_argument("strategy", settings)
        raise UsageError(f"{shown} is not supported; use {'trainer=ddp' if match[1] else 'trainer=fsdp'}")
    logger = settings.get("logger", False)
    if not isinstance(logger, bool) or (logger and not cfg.logger):
        raise UsageError(
            f"{format_argument('logger', settings)} has no effect; choose logger=csv, tensorboard or wandb, or add one "
            "as +logger.NAME._target_=..."
        )
    if cfg.resume is not None and settings.get("fast_dev_run"):
        raise UsageError(
            f"{format_argument('fast_dev_run', settings)} trains from the start and saves nothing; leave resume out"
        )


def format_argument(name: str, settings: Mapping[str, Any]) -> str:
    """Return the argument and its value as a user types them."""
    value = settings[name]
    if isinstance(value, dict) and "_target_" in value:
        return format_override(f"trainer.{name}._target_", value["_target_"])
    return format_override(f"trainer.{name}", value)
