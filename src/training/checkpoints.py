"""Read checkpoint files, order them, and tell intact ones from corrupted ones."""

import functools
import json
import math
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config.resume import PATH_KEYS

if TYPE_CHECKING:
    from torch import Tensor


def newest_first(folder: Path) -> list[Path]:
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


UNREADABLE = (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError)
"""Errors of `zipfile` and `pickletools` for corrupted files."""


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
    except UNREADABLE:
        pass
    return math.inf


def is_intact(path: Path) -> bool:
    """Return whether a checkpoint is a complete zip archive whose members all match their CRC-32."""
    stat = path.stat()
    return _is_intact(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache
def _is_intact(path: Path, written: int, size: int) -> bool:
    """Cached by time and size, so that a large file is read only once."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # torch.save does not compress; reading only stored members bounds the memory by the file size.
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            return stored and sum(member.file_size for member in members) <= size and archive.testzip() is None
    except UNREADABLE:
        return False


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint or exported model of this project; nothing but tensors and plain values is read."""
    import torch

    if path.suffix == ".safetensors":
        checkpoint = _read_exported(path)
    elif not is_intact(path):
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
    absent = [
        name for name in MODEL_KEYS if not (isinstance(settings, dict) and "_target_" in (settings.get(name) or {}))
    ]
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


def exportable_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What others need to use the model, and the names of the settings in it that became null.

    These are where the data lie and what could be a path: they would tell of the machine that it was trained on.
    """
    left_out: list[str] = []

    def cleared(node: Any, name: str) -> Any:
        if isinstance(node, dict):
            return {key: cleared(value, f"{name}.{key}") for key, value in node.items()}
        if isinstance(node, list):
            return [cleared(value, f"{name}.{k}") for k, value in enumerate(node)]
        told = name.startswith((*TEXT_KEYS, "data.columns"))
        if name == "conditioning.encode.model" and isinstance(node, str):
            told = node.count("/") == 1 and not node.startswith("/") and not Path(node).exists()  # of the hub
        if isinstance(node, str) and not told and (name in PATH_KEYS or "/" in node or "\\" in node):
            left_out.append(name)
            return None
        return node

    return {name: cleared(settings[name], name) for name in EXPORTED_KEYS if name in settings}, left_out


MODEL_KEYS = ("data", "model", "schedule", "diffusion", "loss", "timestep_sampler", "sampler")
"""Settings from which a trained model is built again."""


CONDITION_KEYS = ("conditioning", "guidance")
"""Likewise, of a model that takes conditions."""


EXPORTED_KEYS = (*MODEL_KEYS, *CONDITION_KEYS, "seed", "snr_shift", "zero_terminal_snr", "optimizer", "lr_scheduler")
"""Settings that go with an exported model: how to build it, and how it was trained as far as no path comes with it."""

TEXT_KEYS = tuple(f"conditioning.encode.{name}" for name in ("names", "examples", "tokenizer"))
"""Settings that may look like paths and are texts of the data."""


PLAIN = (dict, list, str, int, float, bool, type(None))

MAX_DEPTH, MAX_VALUES = 32, 100_000
"""A configuration has about 200 values, and as many more as its schedule has betas, at most 10,000."""


def check_plain(settings: Any, source: object) -> None:
    """Raise ValueError if there is more in `settings`, at any depth, than an ordinary number of plain values."""
    for count, (name, value) in enumerate(walk_settings(settings)):
        if count > MAX_VALUES or name.count(".") > MAX_DEPTH:
            raise ValueError(f"{source} is no configuration of this project: it is larger or deeper than any")
        if type(value) not in PLAIN:
            raise ValueError(f"{source} is no configuration of this project: {name} is a {type(value).__name__}")
        if isinstance(value, dict) and not all(isinstance(key, str) and key and key.isprintable() for key in value):
            raise ValueError(f"{source} is no configuration of this project: {name} has keys that are no names")


def walk_settings(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested plain ones, itself included, by its dotted name; containers before what they hold."""
    yield name, node
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from walk_settings(value, f"{name}.{key}".lstrip("."))
