"""Find a checkpoint and check that it fits the configuration."""

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
    """Return the checkpoint that `run=` (the newest whole one in the folder) or `ckpt=` means.

    Raises FileNotFoundError if there is none, ValueError unless one of the two is given.
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
    if ckpt is not None:
        path = Path(str(ckpt))
        if not path.is_file():
            of_run = path.parent if path.name == "checkpoints" else path
            hint = (
                f"; did you mean {format_override('run', of_run)}?"
                if any((of_run / "checkpoints").glob("*.ckpt"))
                else ""
            )
            hint = hint or newest_run("ckpt", path) or _nearest(path, "ckpt", "*.ckpt")
            raise FileNotFoundError(
                f"no checkpoint {path.resolve()}: ckpt= takes a .ckpt or .safetensors file, run= a run folder{hint}"
            )
        return path
    folder = Path(str(run))
    if folder.is_file():
        raise FileNotFoundError(
            f"{folder} is a file, and a run is a folder: use {format_override('ckpt', folder)} for one checkpoint"
        )
    if not folder.is_dir():
        near = _nearest(folder, "run", "*/")
        raise FileNotFoundError(f"no run folder {folder.resolve()}{near or ': runs lie under outputs/train'}")
    if folder.name == "checkpoints" and any(folder.glob("*.ckpt")):
        raise FileNotFoundError(
            f"{folder} holds the checkpoints of a run, and is no run folder: did you mean "
            f"{format_override('run', folder.parent)}?"
        )
    for path in newest_first(folder):
        if is_intact(path):
            return path
        warnings.warn(f"{path} is corrupted; loading the next newest checkpoint", stacklevel=2)
    hint = newest_run("run", folder) or ": has it trained?"
    raise FileNotFoundError(f"{folder.resolve()} holds no intact checkpoint in checkpoints/{hint}")


def check_fit(theirs: "Mapping[str, Tensor]", module: "DiffusionModule", path: Path) -> None:
    """Raise ValueError, naming the first difference, if these weights, from the file `path`, are another network's."""
    ours = module.state_dict()
    for name in [*ours, *theirs]:
        shapes = [tuple(state[name].shape) if name in state else "absent" for state in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{path} holds another network: {name} is {shapes[0]} there and {shapes[1]} here; use the settings "
                "that it was trained with, or start a new run"
            )


def check_accumulation(checkpoint: dict[str, Any], cfg: DictConfig) -> None:
    """Raise ValueError if batches were cut otherwise: Lightning's count of them would lie across the steps."""
    before = checkpoint["hyper_parameters"]["trainer"]["accumulate_grad_batches"]
    now = cfg.trainer.accumulate_grad_batches
    if before != now:
        raise ValueError(
            f"trainer.accumulate_grad_batches={now} cannot resume a run that had {before}: keep it "
            "(data.microbatch_size sets it too), or start a new run"
        )


def check_optimizer(checkpoint: dict[str, Any], module: "DiffusionModule") -> None:
    """Raise ValueError if the optimizer keeps something of each weight that the checkpoint does not have."""
    states = checkpoint["optimizer_states"][0]["state"]
    before = set(next(iter(states.values()), ()))
    if before and (missing := module.optimizer_state() - before):
        own = checkpoint["hyper_parameters"]["optimizer"]["_target_"]
        raise ValueError(
            f"optimizer.* needs {', '.join(sorted(missing))} of each weight, which the run (with {own}) lacks: resume "
            "with the optimizer of the run, or start a new run"
        )


def check_steps(checkpoint: dict[str, Any], cfg: DictConfig) -> None:
    """Raise ValueError if a resumed run has taken more steps than it is to take."""
    done = checkpoint["global_step"]
    if cfg.trainer.max_steps < done:
        raise ValueError(
            f"trainer.max_steps={cfg.trainer.max_steps} must be at least {done}, the steps that the run has taken: "
            "raise it, or start a new run"
        )


FIXED_KEYS = (
    *("model", "schedule", "diffusion", "snr_shift", "zero_terminal_snr", "conditioning"),
    *("data.num_values", "data.columns", "data.mean", "data.std"),
)
"""Settings that a resumed run must keep: with others the weights would mean something else."""


MUTABLE_KEYS = (
    *("model.gradient_checkpointing", "conditioning.cond_drop_prob"),
    *(f"conditioning.encode.{name}" for name in ("cache", "model", "device", "examples")),
)
"""But for these, which change no weight's meaning."""


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each setting in which two configurations differ, as "name: old -> new", but for where they write.

    Raises ValueError if it is one of the model.
    """
    old, new = _flat(before, str(before.get("run_dir"))), _flat(now, str(now["run_dir"]))
    how = "resume", "run_dir", "trust"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) and name not in how]
    lines = [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names]
    for name, line in zip(names, lines, strict=True):
        if {name, name.split(".")[0]} & set(FIXED_KEYS) and name not in MUTABLE_KEYS:
            raise ValueError(f"{line} makes another model of a run that is resumed: keep it, or start a new run")
    return lines


def _flat(settings: Mapping[str, Any], run_dir: str, prefix: str = "") -> dict[str, Any]:
    """Dotted names and values, with the run's folder taken out of paths."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, run_dir, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value.replace(run_dir, "") if isinstance(value, str) else value
    return flat
