"""Checkpoints on disk: written whole or not at all, verified before they are believed, and found again.

A checkpoint is the zip archive that torch makes, which holds a CRC-32 of each of its parts. It holds the resolved
configuration (`hyper_parameters`) and both sets of weights. Torch is imported only where one is read.
"""

import difflib
import functools
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    from torch import Tensor

    from src.module import DiffusionModule


def find_checkpoint(run: str | None, ckpt: str | None) -> Path:
    """The checkpoint that `run=` (the newest whole one in the folder) or `ckpt=` means. Raises FileNotFoundError."""
    if (run is None) == (ckpt is None):
        raise ValueError("give run=FOLDER (a run folder, under outputs/train) or ckpt=FILE (one checkpoint)")
    if ckpt is not None:
        path = Path(ckpt)
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint {path.resolve()}: ckpt= takes a .ckpt file, run= a run folder")
        return path
    folder = Path(str(run))
    if folder.is_file():
        raise FileNotFoundError(f"{folder} is a file, and a run is a folder: use ckpt={folder} for one checkpoint")
    if not folder.is_dir():
        close = difflib.get_close_matches(folder.name, [f.name for f in folder.parent.glob("*/")], n=1)
        near = f"; did you mean {folder.parent / close[0]}?" if close else ""
        raise FileNotFoundError(f"no run folder {folder.resolve()}{near or ': runs lie under outputs/train'}")
    for path in by_age(folder):
        if is_whole(path):
            return path
        warnings.warn(f"{path} is damaged and passed over for the next newest checkpoint", stacklevel=2)
    raise FileNotFoundError(f"{folder.resolve()} holds no checkpoints/*.ckpt that is whole: has it trained?")


def by_age(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first; of those written at once, the last one's name first."""
    found = (folder / "checkpoints").glob("*.ckpt")
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt"), reverse=True)


def is_whole(path: Path) -> bool:
    """Whether every part of the archive has the checksum that was written with it."""
    stat = path.stat()
    return _is_whole(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache
def _is_whole(path: Path, written: int, size: int) -> bool:
    """As of a time and size, so that a large file is read through once only."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError):
        return False


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint of this project; nothing but tensors and plain values is unpickled."""
    import torch

    if not is_whole(path):
        raise ValueError(f"{path} cannot be read as a checkpoint (damaged, or not made by src.train): use another one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(
            f"{path} is no checkpoint of this project: it holds more than tensors and plain values, and is not opened"
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of this project: it holds no configuration beside its weights")
    return checkpoint


def check_fit(checkpoint: dict[str, Any], module: "DiffusionModule", path: Path) -> None:
    """Raise ValueError, naming the first difference, if the checkpoint holds another network's weights."""
    theirs: dict[str, Tensor] = checkpoint["state_dict"]
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
            "(data.micro_batch sets it too), or start a new run"
        )


OF_THE_MODEL = ("model", "schedule", "process", "snr_shift", "zero_terminal_snr")
"""Settings that a resumed run must keep: with others the weights would mean something else."""


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each setting in which two configurations differ, as "name: old -> new", but for where they write.

    Raises ValueError if it is one of the model.
    """
    old, new = _flat(before, str(before["run_dir"])), _flat(now, str(now["run_dir"]))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) and name not in ("resume", "run_dir")]
    lines = [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names]
    for name, line in zip(names, lines, strict=True):
        if name.split(".")[0] in OF_THE_MODEL and name != "model.checkpointing":  # which changes no figure
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
