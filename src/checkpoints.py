"""Checkpoints on disk: written whole or not at all, verified before they are believed, and found again.

A checkpoint is the zip archive that torch makes, with a CRC-32 of the whole file as its comment. It holds the resolved
configuration (`hyper_parameters`) and both sets of weights. An exported model is a safetensors file with one set of
weights, and as metadata what others need of the configuration. Torch is imported only where one is read.
"""

import difflib
import functools
import json
import math
import pickletools
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from omegaconf import DictConfig

from src.overrides import typed
from src.trust import check_plain

if TYPE_CHECKING:
    from torch import Tensor

    from src.module import DiffusionModule


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
            hint = f"; did you mean {typed('run', of_run)}?" if any((of_run / "checkpoints").glob("*.ckpt")) else ""
            hint = hint or newest_run("ckpt", path) or _nearest(path, "ckpt", "*.ckpt")
            raise FileNotFoundError(
                f"no checkpoint {path.resolve()}: ckpt= takes a .ckpt or .safetensors file, run= a run folder{hint}"
            )
        return path
    folder = Path(str(run))
    if folder.is_file():
        raise FileNotFoundError(
            f"{folder} is a file, and a run is a folder: use {typed('ckpt', folder)} for one checkpoint"
        )
    if not folder.is_dir():
        near = _nearest(folder, "run", "*/")
        raise FileNotFoundError(f"no run folder {folder.resolve()}{near or ': runs lie under outputs/train'}")
    if folder.name == "checkpoints" and any(folder.glob("*.ckpt")):
        raise FileNotFoundError(
            f"{folder} holds the checkpoints of a run, and is no run folder: did you mean "
            f"{typed('run', folder.parent)}?"
        )
    for path in by_age(folder):
        if is_whole(path):
            return path
        warnings.warn(f"{path} is corrupted; loading the next newest checkpoint", stacklevel=2)
    hint = newest_run("run", folder) or ": has it trained?"
    raise FileNotFoundError(f"{folder.resolve()} holds no intact checkpoint in checkpoints/{hint}")


def newest_run(name: str, folder: Path) -> str:
    """Return the end of an error: the newest run in a folder that is none itself, as the setting `name` takes it.

    Empty if there is none, at most two folders down.
    """
    found = [path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/checkpoints/*.ckpt")]
    if not found:
        return ""
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    value = {"ckpt": newest, "runs": [newest.parents[1]]}.get(name, newest.parents[1])
    return f"; the newest run in {folder} is {typed(name, value)}"


def _nearest(path: Path, name: str, pattern: str) -> str:
    """Return the end of an error: what lies beside `path` and has nearly its name; empty if nothing has."""
    close = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob(pattern)], n=1)
    return f"; did you mean {typed(name, path.parent / close[0])}?" if close else ""


def by_age(folder: Path) -> list[Path]:
    """Return the checkpoints of a run folder, that of the latest step first.

    Not by the time of the files alone, which a copy of the folder changes. Of one step the file that was written last
    comes first; one whose step cannot be read comes before all others, so that whoever looks for a checkpoint says so.
    """
    found = (folder / "checkpoints").glob("*.ckpt")
    return sorted(found, key=lambda p: (step_of(p), p.stat().st_mtime_ns, p.name == "last.ckpt"), reverse=True)


def step_of(path: Path) -> float:
    """Return the step of a checkpoint without loading it or unpickling anything; infinity if it cannot be read."""
    stat = path.stat()
    return _step_of(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache
def _step_of(path: Path, written: int, size: int) -> float:
    try:
        with zipfile.ZipFile(path) as archive:
            (part,) = (each for each in archive.infolist() if each.filename.rpartition("/")[2] == "data.pkl")
            # Torch compresses nothing: so what is read is bounded by the size of the file.
            if part.compress_type != zipfile.ZIP_STORED or part.file_size > size:
                return math.inf
            operations = pickletools.genops(archive.read(part))
            if any(argument == "global_step" for _, argument, _ in operations):
                numbers = (
                    value for code, value, _ in operations if code.name in ("BININT", "BININT1", "BININT2", "LONG1")
                )
                return float(next(numbers, None) or 0)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError):
        return math.inf
    return math.inf


SEAL = 8
"""Bytes of a checkpoint's comment, with which it ends: the CRC-32 of all that stands before, in hexadecimal."""


def sealed(archive: memoryview) -> Iterator[bytes | memoryview]:
    """A zip archive without a comment, as it ends now, and its seal as comment: the parts of what is to be written."""
    body, length = archive[:-2], SEAL.to_bytes(2, "little")  # an archive ends with the length of its comment, 0 here
    yield from (body, length, f"{zlib.crc32(length, zlib.crc32(body)):0{SEAL}x}".encode())


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is what was written: by its seal, or if it has none, by the CRC-32 of each of its parts."""
    stat = path.stat()
    return _is_whole(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache
def _is_whole(path: Path, written: int, size: int) -> bool:
    """As of a time and size, so that a large file is read through once only."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            # Torch compresses nothing: so what is read is bounded by the size of the file.
            stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
            if not stored or sum(part.file_size for part in parts) > size:
                return False
            if archive.comment:
                return archive.comment == f"{_checksum(file, size - SEAL):0{SEAL}x}".encode()
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError):
        return False


def _checksum(file: IO[bytes], size: int) -> int:
    """CRC-32 of the first `size` bytes."""
    file.seek(0)
    total = 0
    for start in range(0, size, 2**24):
        total = zlib.crc32(file.read(min(2**24, size - start)), total)
    return total


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint or exported model of this project; nothing but tensors and plain values is read."""
    import torch

    if path.suffix == ".safetensors":
        checkpoint = _read_exported(path)
    elif not is_whole(path):
        raise ValueError(f"{path} cannot be read as a checkpoint (damaged, or not made by src.train): use another one")
    else:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a stranger's bytes lead to
            raise ValueError(
                f"{path} is no checkpoint of this project: it holds more than tensors and plain values, and is not "
                "opened"
            ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of this project: it holds no configuration beside its weights")
    settings = checkpoint["hyper_parameters"]
    check_plain(settings, path)
    absent = [name for name in BUILT if not (isinstance(settings, dict) and "_target_" in (settings.get(name) or {}))]
    if absent:
        raise ValueError(f"{path} is not a checkpoint of this project: its configuration has no {', '.join(absent)}")
    for key in ("state_dict", "current_model_state"):
        for name, value in dict(checkpoint.get(key) or {}).items():
            if not (isinstance(name, str) and name.isprintable() and isinstance(value, torch.Tensor)):
                raise ValueError(f"{path} is not a checkpoint of this project: not all of its {key} are weights")
    return checkpoint


def _read_exported(path: Path) -> dict[str, Any]:
    """As a checkpoint has it: one set of weights, "averaged" if these are the averaged ones, and the configuration."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["model"])
            return {
                "state_dict": {name: file.get_tensor(name) for name in file.keys()},
                "hyper_parameters": about["config"],
                "averaged": about["weights"] == "averaged",
            }
    except Exception as error:  # whatever a stranger's bytes lead to
        raise ValueError(f"{path} cannot be read as a model that src.export wrote: use another one") from error


def write_exported(path: Path, weights: "Mapping[str, Tensor]", averaged: bool, config: Mapping[str, Any]) -> None:
    """One file that is all that a later command needs, in a format that holds nothing but tensors and text."""
    from safetensors.torch import save

    # One entry, since of several the order is chance, and equal models are to be equal files.
    about = json.dumps({"weights": "averaged" if averaged else "raw", "config": config})
    path.write_bytes(save({name: value.contiguous() for name, value in weights.items()}, {"model": about}))


def weights_of(checkpoint: dict[str, Any], ema: bool, path: Path) -> "dict[str, Tensor]":
    """The averaged weights or the raw ones. Raises ValueError if the file does not hold these."""
    exported = checkpoint.get("averaged")
    if ema and not exported and "current_model_state" not in checkpoint:
        raise ValueError(
            f"{path} holds no averaged weights (trained without callbacks.ema, or exported with ema=false): add "
            "ema=false"
        )
    if exported and not ema:
        raise ValueError(f"{path} holds the averaged weights alone: leave ema=false out, or export it with ema=false")
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    return weights if ema else checkpoint.get("current_model_state", weights)


def shareable(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What others need to use the model, and the names of the settings in it that became null.

    These are where the data lie and what could be a path: they would tell of the machine that it was trained on.
    """
    left_out: list[str] = []

    def cleared(node: Any, name: str) -> Any:
        if isinstance(node, dict):
            return {key: cleared(value, f"{name}.{key}") for key, value in node.items()}
        if isinstance(node, list):
            return [cleared(value, f"{name}.{k}") for k, value in enumerate(node)]
        told = name.startswith((*TOLD, "data.columns"))
        if name == "conditioning.encode.model" and isinstance(node, str):
            told = node.count("/") == 1 and not node.startswith("/") and not Path(node).exists()  # of the hub
        if isinstance(node, str) and not told and (name in OF_FILES or "/" in node or "\\" in node):
            left_out.append(name)
            return None
        return node

    return {name: cleared(settings[name], name) for name in SHARED if name in settings}, left_out


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
            "(data.micro_batch sets it too), or start a new run"
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


OF_FILES = ("data.root", "data.path", "data.source.labels")
"""Settings that name files which are read, never written."""

BUILT = ("data", "model", "schedule", "process", "objective", "timesteps", "sampler")
"""Settings from which a trained model is built again."""

ASKED = ("conditioning", "guidance")
"""Likewise, of a model that takes conditions."""

SHARED = (*BUILT, *ASKED, "seed", "snr_shift", "zero_terminal_snr", "optimizer", "lr_scheduler")
"""Settings that go with an exported model: how to build it, and how it was trained as far as no path comes with it."""

OF_THE_MODEL = (
    *("model", "schedule", "process", "snr_shift", "zero_terminal_snr", "conditioning"),
    *("data.levels", "data.columns", "data.mean", "data.deviation"),
)
"""Settings that a resumed run must keep: with others the weights would mean something else."""

TOLD = tuple(f"conditioning.encode.{name}" for name in ("names", "examples", "tokenizer"))
"""Settings that may look like paths and are texts of the data."""

FREE = (
    *("model.checkpointing", "conditioning.drop"),
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
        if {name, name.split(".")[0]} & set(OF_THE_MODEL) and name not in FREE:
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
