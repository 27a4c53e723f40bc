"""Find a checkpoint and check that it fits the configuration."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from src.config.resume import _nearest, newest_run
from src.quoting import format_override
from src.training.checkpoints import is_intact, newest_first

if TYPE_CHECKING:
    from torch import Tensor

    from src.training.module import DiffusionModule


def find_checkpoint(run: str | None, ckpt: str | None) -> Path:
    """Return the newest intact checkpoint in the folder `run`, or the file `ckpt`.

    Raises FileNotFoundError without one, and ValueError unless exactly one of the two is given.
    """
    if (run is None) == (ckpt is None):
        raise ValueError(
            "give run=FOLDER (a run folder, under outputs/train) or ckpt=FILE (one checkpoint or exported model)"
            + ("" if run else newest_run("run", Path("outputs/train")))
        )
    for name, value in (("run", run), ("ckpt", ckpt)):
        if value is not None and not str(value).strip():
            raise ValueError(
                f"{name}= is empty: give a value, or leave it out{newest_run(name, Path('outputs/train'))}"
            )
    return _existing_file(Path(str(ckpt))) if ckpt is not None else _newest_intact(Path(str(run)))


def _existing_file(path: Path) -> Path:
    if path.is_file():
        return path
    folder = path.parent if path.name == "checkpoints" else path
    is_run = any((folder / "checkpoints").glob("*.ckpt"))
    hint = f"; did you mean {format_override('run', folder)}?" if is_run else newest_run("ckpt", path)
    hint = hint or _nearest(path, "ckpt", "*.ckpt")
    raise FileNotFoundError(
        f"no checkpoint {path.resolve()}: ckpt= takes a .ckpt or .safetensors file, run= a run folder{hint}"
    )


def _newest_intact(folder: Path) -> Path:
    if folder.is_file():
        raise FileNotFoundError(
            f"{folder} is a file, and run= takes a folder: use {format_override('ckpt', folder)} for one checkpoint"
        )
    if not folder.is_dir():
        near = _nearest(folder, "run", "*/")
        raise FileNotFoundError(f"no run folder {folder.resolve()}{near or ': runs are in outputs/train'}")
    if folder.name == "checkpoints" and any(folder.glob("*.ckpt")):
        raise FileNotFoundError(
            f"{folder} holds checkpoints but is not a run folder: did you mean {format_override('run', folder.parent)}?"
        )
    for path in newest_first(folder):
        if is_intact(path):
            return path
        warnings.warn(f"{path} is corrupted; loading the next newest checkpoint", stacklevel=3)
    hint = newest_run("run", folder) or ": has it trained?"
    raise FileNotFoundError(f"{folder.resolve()} holds no intact checkpoint in checkpoints/{hint}")


def record_path(checkpoint: Path) -> Path | None:
    """Return the path of the data record of a checkpoint's run; None for a file outside a run folder."""
    from src.data.split import FINGERPRINT_FILE

    return checkpoint.parent.parent / FINGERPRINT_FILE if checkpoint.parent.name == "checkpoints" else None


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """Return the final metrics of a run, or None if it has not finished or has diverged."""
    path = folder / "metrics.json"
    metrics: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    diverged = metrics is not None and metrics.get("val/loss", 0.0) is None
    return None if diverged else metrics


def check_fit(weights: "Mapping[str, Tensor]", module: "DiffusionModule", path: Path) -> None:
    """Raise ValueError, naming the first difference, if the `weights` of the file `path` do not fit the module."""
    ours = module.state_dict()
    for name in [*ours, *weights]:
        saved, built = (tuple(state[name].shape) if name in state else "absent" for state in (weights, ours))
        if saved != built:
            raise ValueError(
                f"{path} holds another network: {name} is {saved} there and {built} here; use the settings of its "
                "training, or start a new run"
            )


def check_accumulation(checkpoint: Mapping[str, Any], cfg: DictConfig) -> None:
    """Raise ValueError if a resumed run accumulates another number of batches: Lightning's counters would not match."""
    before = checkpoint["hyper_parameters"]["trainer"]["accumulate_grad_batches"]
    now = cfg.trainer.accumulate_grad_batches
    if before != now:
        raise ValueError(
            f"trainer.accumulate_grad_batches={now} cannot resume a run that had {before}: keep it "
            "(data.microbatch_size sets it too), or start a new run"
        )


def check_optimizer(checkpoint: Mapping[str, Any], module: "DiffusionModule") -> None:
    """Raise ValueError if the optimizer keeps a state of each weight that the checkpoint lacks."""
    states = checkpoint["optimizer_states"][0]["state"]
    before = set(next(iter(states.values()), ()))
    if before and (missing := module.optimizer_state() - before):
        own = checkpoint["hyper_parameters"]["optimizer"]["_target_"]
        raise ValueError(
            f"optimizer.* needs {', '.join(sorted(missing))} of each weight, which the run (with {own}) lacks: resume "
            "with the optimizer of the run, or start a new run"
        )


def check_steps(checkpoint: Mapping[str, Any], cfg: DictConfig) -> None:
    """Raise ValueError if a resumed run has taken more steps than `trainer.max_steps`."""
    done = checkpoint["global_step"]
    if cfg.trainer.max_steps < done:
        raise ValueError(
            f"trainer.max_steps={cfg.trainer.max_steps} must be at least {done}, the steps that the run has taken: "
            "raise it, or start a new run"
        )


FIXED_KEYS = (
    *("model", "schedule", "diffusion", "snr_shift", "zero_terminal_snr", "conditioning"),
    *("data.num_values", "data.value_range", "data.dtype", "data.columns", "data.mean", "data.std"),
    "data.encoders",
)
"""Settings that a resumed run must keep: they determine the meaning of the weights."""


MUTABLE_KEYS = (
    *("model.gradient_checkpointing", "conditioning.cond_drop_prob"),
    *(f"conditioning.encode.{name}" for name in ("cache", "model", "device", "examples")),
)
"""Settings among `FIXED_KEYS` that a resumed run may change."""


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return each setting in which two configurations differ, as "name: old -> new", without the run folder.

    Raises ValueError if the setting determines the meaning of the weights.
    """
    old, new = (
        {
            k: v.replace(str(each.get("run_dir")), "") if isinstance(v, str) else v
            for k, v in flatten_settings(each).items()
        }
        for each in (before, now)
    )
    ignored = "resume", "run_dir", "trust"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) and name not in ignored]
    lines = [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names]
    for name, line in zip(names, lines, strict=True):
        if {name, name.split(".")[0]} & set(FIXED_KEYS) and name not in MUTABLE_KEYS:
            raise ValueError(f"{line} changes the model of a resumed run: keep it, or start a new run")
    return lines


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            result |= flatten_settings(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result
