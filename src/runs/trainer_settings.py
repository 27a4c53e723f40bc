"""The settings of Lightning's Trainer: which are refused in favor of another one, and which one an error is about."""

import inspect
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from src.errors import sentence
from src.training.lightning_internals import copies_this_process

BY_STEPS = "counts epochs, and training counts steps"
REFUSED: dict[str, tuple[Any, str]] = {
    "max_epochs": (-1, f"{BY_STEPS}; set trainer.max_steps"),
    "min_epochs": (0, f"{BY_STEPS}; set trainer.min_steps"),
    "check_val_every_n_epoch": (None, f"{BY_STEPS}; set validate_every"),
    "reload_dataloaders_every_n_epochs": (0, f"{BY_STEPS}, over one stream of batches; leave it at 0"),
    "limit_train_batches": (
        1.0,
        "ends an epoch, and training is one stream of trainer.max_steps batches; set trainer.max_steps for a shorter "
        "run, or trainer.overfit_batches to train on the same few batches",
    ),
    "limit_test_batches": (1.0, "limits a test, and src.train runs none; src.evaluate has n=..."),
    "limit_predict_batches": (1.0, "limits predictions, and src.train makes none; src.sample has n=..."),
    "callbacks": ([], "is not read; add each one as +callbacks.NAME._target_=..."),
    "default_root_dir": (None, "is not read; set hydra.run.dir"),
    "barebones": (
        False,
        "turns off val/loss too; set logger=none trainer.enable_checkpointing=false trainer.enable_progress_bar=false",
    ),
    "model_registry": (None, "uploads nothing; choose logger=wandb, which is given the best model"),
}
"""Of each argument that is refused: the value that changes nothing, and why another is, with the setting to use."""

DEVICE_ARGUMENTS = {
    "accelerator": "auto",
    "strategy": "auto",
    "devices": "auto",
    "num_nodes": 1,
    "precision": "32-true",
}
"""The arguments that tell where and in what numbers to compute, one of which an error is about that names none."""


def check_settings(settings: Mapping[str, Any], resumes: bool, has_loggers: bool) -> None:
    """Raise ValueError for a setting that another has to be used for, or whose value means nothing here.

    `settings` are the arguments of the Trainer that are not null. `has_loggers` tells whether the group has any.
    """
    for name, (neutral, why) in REFUSED.items():
        if name in settings and not same(settings[name], neutral):
            raise ValueError(f"{shown(name, settings)} {why}")
    steps, least = settings.get("max_steps", -1), settings.get("min_steps", 0)
    if not 1 <= steps <= 10**9:
        raise ValueError(f"trainer.max_steps must lie in [1, 10^9], got {steps}: training is counted in steps")
    if not 0 <= least <= steps:
        raise ValueError(f"trainer.min_steps={least} must lie in [0, trainer.max_steps = {steps}]")
    if settings.get("log_every_n_steps", 1) < 1:
        raise ValueError(f"{shown('log_every_n_steps', settings)} must be at least 1 step; logger=none logs nothing")
    if settings.get("num_sanity_val_steps", 0) < -1:
        raise ValueError(f"{shown('num_sanity_val_steps', settings)} must be at least 0 batches, or -1 for all")
    if settings.get("accumulate_grad_batches", 1) < 1:
        raise ValueError(f"{shown('accumulate_grad_batches', settings)} must be at least 1")
    devices = settings.get("devices")
    if isinstance(devices, int) and devices < 1 and devices != -1:
        raise ValueError(f"trainer.devices must be at least 1, or auto for all that there are, got {devices}")
    if settings.get("gradient_clip_val", 0) < 0:
        raise ValueError(f"{shown('gradient_clip_val', settings)} must not be negative: 1.0 is usual, 0 clips nothing")
    if "max_time" in settings and not is_duration(settings["max_time"]):
        raise ValueError(
            f'{shown("max_time", settings)} must be a duration above 0, as days:hours:minutes:seconds: "00:02:00:00" '
            "is two hours"
        )
    overfit = settings.get("overfit_batches", 0)
    if overfit < 0 or (isinstance(overfit, float) and overfit > 1):
        raise ValueError(
            f"{shown('overfit_batches', settings)} must be a number of batches, or a share of the data in [0.0, 1.0]"
        )
    if str(settings.get("precision", "")).startswith("transformer-engine"):
        raise ValueError(
            f"{shown('precision', settings)} replaces the layers that the optimizer holds; use bf16-mixed or 32-true"
        )
    strategy = str(settings.get("strategy", "auto"))
    if elsewhere := re.match(r"fsdp|deepspeed|ddp_(spawn|fork|notebook)", strategy):
        preset = "trainer=ddp" if elsewhere[1] else "trainer=fsdp"
        raise ValueError(f"{shown('strategy', settings)} is not supported; use {preset}")
    plugins = settings.get("plugins", [])
    if not (isinstance(plugins, list) and all(isinstance(node, dict) and "_target_" in node for node in plugins)):
        raise ValueError(f"{shown('plugins', settings)} must be a list of nodes with a _target_ each")
    if not isinstance(settings.get("profiler", ""), str | dict):
        raise ValueError(f"{shown('profiler', settings)} must be simple, advanced or pytorch")
    logger = settings.get("logger", False)
    if not isinstance(logger, bool) or (logger and not has_loggers):
        raise ValueError(
            f"{shown('logger', settings)} is not read; choose logger=csv, tensorboard or wandb, or add one as "
            "+logger.NAME._target_=..."
        )
    if resumes and settings.get("fast_dev_run"):
        raise ValueError(f"{shown('fast_dev_run', settings)} trains from the start and saves nothing; leave resume out")


def validation_interval(settings: Mapping[str, Any], every: int) -> int:
    """Return the batches from one validation to the next: `every` so many steps, unless `val_check_interval` is given.

    That is a number of batches, as Lightning counts them, or a share of the run. Raises ValueError for others.
    """
    steps, batches = int(settings["max_steps"]), int(settings.get("accumulate_grad_batches", 1))
    given = settings.get("val_check_interval", every * batches)
    whole = isinstance(given, int) and not isinstance(given, bool)
    if whole and given >= 1 and given % batches == 0:
        return int(min(given, steps * batches))
    if isinstance(given, float) and 0 < given <= 1:
        return max(1, int(steps * given)) * int(batches)
    if whole and given >= 1:
        rule = f"must be a multiple of trainer.accumulate_grad_batches={batches}; or set validate_every, in steps"
    else:
        rule = "must be a number of batches, or a share of the run in (0.0, 1.0]; or set validate_every, in steps"
    raise ValueError(f"{shown('val_check_interval', settings)} {rule}")


def is_duration(value: Any) -> bool:
    """Whether Lightning takes `value` for a time above 0: a text DD:HH:MM:SS, or arguments of `timedelta`."""
    try:
        if isinstance(value, str):
            days, *rest = map(int, re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", value.strip()).groups())  # type: ignore[union-attr]
            return bool(days or any(rest))
        return timedelta(**value) > timedelta(0)
    except (AttributeError, TypeError):
        return False


def kept(callbacks: Sequence[L.Callback], settings: Mapping[str, Any]) -> list[L.Callback]:
    """Return the callbacks without those of what is turned off: the progress bar, checkpoints, or validation."""
    off: list[L.Callback] = []
    for callback in callbacks:
        bar = isinstance(callback, lightning_callbacks.ProgressBar)
        checkpoint = isinstance(callback, lightning_callbacks.Checkpoint)
        best = isinstance(callback, lightning_callbacks.ModelCheckpoint) and (callback.monitor or "").startswith("val/")
        if (
            (bar and settings.get("enable_progress_bar") is False)
            or (checkpoint and settings.get("enable_checkpointing") is False)
            or (best and settings.get("limit_val_batches") == 0)
        ):
            off.append(callback)
    return [callback for callback in callbacks if callback not in off]


def explain_error(error: Exception, settings: Mapping[str, Any]) -> str:
    """Return one line for an error of the Trainer's constructor, with the settings that it is about.

    These are those that it names, else the ones of devices that are not as Lightning has them by default.
    """
    known = [name for name in inspect.signature(L.Trainer).parameters if name in settings]
    named = [name for name in known if re.search(rf"\b{name}\b", str(error))]
    likely = [name for name, default in DEVICE_ARGUMENTS.items() if settings.get(name, default) not in (default, "cpu")]
    about = named or likely or [name for name in DEVICE_ARGUMENTS if name in settings]
    remedy = "; trainer=default takes whatever there is" if set(about) & set(DEVICE_ARGUMENTS) else ""
    return f"{' '.join(shown(name, settings) for name in about)}: {sentence(error)}{remedy}"


def check_built(trainer: L.Trainer) -> None:
    """Raise ValueError if processes would be started, or weights held, in a way that training does not know.

    So it is with processes that are copies of this one, whose callbacks and weights do not come back to it.
    """
    strategy = trainer.strategy
    copies = copies_this_process(strategy)
    if copies or isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        how = "starts copies of this process" if copies else "deals weights out in its own way"
        raise ValueError(
            f"trainer.strategy={type(strategy).__name__} {how}; use {'trainer=ddp' if copies else 'trainer=fsdp'}"
        )


def same(value: Any, neutral: Any) -> bool:
    """Whether the values are equal and of one type: of a limit 1 is one batch, and 1.0 all of them."""
    return type(value) is type(neutral) and bool(value == neutral)


def shown(name: str, settings: Mapping[str, Any]) -> str:
    """Return a setting and its value as they are typed."""
    value = settings[name]
    return f"trainer.{name}={str(value).lower() if isinstance(value, bool) else value}"
