"""Read checkpoint files, sort them by step, and detect corrupted ones."""

import json
import math
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.data import PATH_KEYS

if TYPE_CHECKING:
    from torch import Tensor


UNREADABLE = (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError)
"""Errors of `zipfile` and `pickletools` for corrupted files."""

PROJECTION = "repa."
"""How the names of the weights of the projection of `repa` start in a checkpoint."""


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints of a run folder, sorted by step, latest first, but unreadable files before them.

    File times only break ties, because copying a folder changes them.
    """
    paths = (folder / "checkpoints").glob("*.ckpt")
    return sorted(paths, key=lambda p: (step_of(p), p.stat().st_mtime_ns, p.name == "last.ckpt"), reverse=True)


def step_of(path: Path) -> float:
    """Return the step of a checkpoint without loading or unpickling it; infinity if it cannot be read."""
    with suppress(*UNREADABLE), zipfile.ZipFile(path) as archive:
        (member,) = (m for m in archive.infolist() if m.filename.rpartition("/")[2] == "data.pkl")
        # torch.save does not compress; reading only stored members bounds the memory by the file size.
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
            return math.inf
        operations = pickletools.genops(archive.read(member))
        if any(argument == "global_step" for _, argument, _ in operations):
            numbers = (value for code, value, _ in operations if code.name in ("BININT", "BININT1", "BININT2", "LONG1"))
            return float(next(numbers, None) or 0)
    return math.inf


def is_intact(path: Path) -> bool:
    """Return whether a checkpoint is a complete zip archive whose members all match their CRC-32."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            return stored and sum(member.file_size for member in members) <= size and archive.testzip() is None
    except UNREADABLE:
        return False


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint or exported model, reading only tensors and plain values.

    Raises ValueError if the file is corrupted or was not written by this project.
    """
    import torch

    if path.suffix == ".safetensors":
        checkpoint = _read_exported(path)
    elif not is_intact(path):
        raise ValueError(f"{path} cannot be read as a checkpoint: it is corrupted or was not written by src.train")
    else:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # untrusted bytes can raise anything
            raise ValueError(
                f"{path} cannot be read as a checkpoint: it holds more than tensors and plain values"
            ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of this project: it has no state_dict and hyper_parameters")
    settings = checkpoint["hyper_parameters"]
    check_plain(settings, path)
    known = settings if isinstance(settings, dict) else {}
    missing = [name for name in MODEL_KEYS if "_target_" not in (known.get(name) or {})]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of this project: its configuration has no {', '.join(missing)}")
    for key in ("state_dict", "current_model_state"):
        for name, value in dict(checkpoint.get(key) or {}).items():
            if not (isinstance(name, str) and name.isprintable() and isinstance(value, torch.Tensor)):
                raise ValueError(f"{path} is not a checkpoint of this project: its {key} holds more than named tensors")
    return checkpoint


def _read_exported(path: Path) -> dict[str, Any]:
    """Return an exported model as a checkpoint: one set of weights, "averaged" or raw, and the configuration."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["model"])
            return {
                "state_dict": {name: file.get_tensor(name) for name in file.keys()},
                "hyper_parameters": metadata["config"],
                "averaged": metadata["weights"] == "averaged",
            }
    except Exception as error:  # untrusted bytes can raise anything
        raise ValueError(
            f"{path} cannot be read as an exported model: it is corrupted or not from src.export"
        ) from error


def write_exported(path: Path, weights: "Mapping[str, Tensor]", averaged: bool, config: Mapping[str, Any]) -> None:
    """Write weights and configuration as safetensors, a format that holds only tensors and text."""
    from safetensors.torch import save

    # One entry: the order of several varies, and equal models should be equal files.
    metadata = json.dumps({"weights": "averaged" if averaged else "raw", "config": config})
    path.write_bytes(save({name: value.contiguous() for name, value in weights.items()}, {"model": metadata}))


def weights_of(checkpoint: dict[str, Any], ema: bool, path: Path) -> "dict[str, Tensor]":
    """Return the averaged (`ema`) or raw weights, with adapters merged and without the projection of `repa`.

    Raises ValueError if the file does not contain them.
    """
    from src.training.finetuning import merge_adapters

    exported = checkpoint.get("averaged")
    if ema and not exported and "current_model_state" not in checkpoint:
        raise ValueError(f"{path} has no averaged weights (it was trained or exported without): set ema=false")
    if exported and not ema:
        raise ValueError(
            f"ema=false needs raw weights, but {path} has averaged ones: drop ema=false, or export with ema=false"
        )
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    weights = weights if ema else checkpoint.get("current_model_state", weights)
    weights = {name: value for name, value in weights.items() if not name.startswith(PROJECTION)}
    lora = checkpoint["hyper_parameters"].get("lora")
    return merge_adapters(weights, float(lora["alpha"])) if lora else weights


def exportable_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings to export with a model, and the names of those set to null.

    Settings that may be paths become null: they would reveal details of the machine.
    """
    cleared_names: list[str] = []

    def clear(node: Any, name: str) -> Any:
        if isinstance(node, dict):
            return {key: clear(value, f"{name}.{key}") for key, value in node.items()}
        if isinstance(node, list):
            return [clear(value, f"{name}.{k}") for k, value in enumerate(node)]
        if isinstance(node, str) and may_be_path(name, node):
            cleared_names.append(name)
            return None
        return node

    return {name: clear(settings[name], name) for name in EXPORTED_KEYS if name in settings}, cleared_names


def may_be_path(name: str, value: str) -> bool:
    """Return whether the value of a setting may be a path of this machine."""
    is_text = name.startswith((*TEXT_KEYS, "data.columns", "data.encoders"))
    if name in ("conditioning.encode.model", "autoencoder.path"):
        value = value.removeprefix("hf://")
        is_text = value.count("/") == 1 and not value.startswith("/") and not Path(value).exists()  # a hub id
    return not is_text and (name in PATH_KEYS or "/" in value or "\\" in value)


MODEL_KEYS = ("data", "model", "schedule", "diffusion", "loss", "timestep_sampler", "sampler")
"""Settings that rebuild a trained model."""


CONDITION_KEYS = ("conditioning", "guidance")  # further settings that rebuild a conditional model


OPENED_KEYS = (*MODEL_KEYS, *CONDITION_KEYS, "autoencoder", "seed", "snr_shift", "zero_terminal_snr")
"""Settings with which a trained model is opened."""

EXPORTED_KEYS = (*OPENED_KEYS, "task", "optimizer", "lr_scheduler")
"""Settings of an exported model: how to build it and how it was trained, without paths."""

TEXT_KEYS = tuple(f"conditioning.encode.{name}" for name in ("names", "examples", "tokenizer"))
"""Settings that may look like paths but are text of the data."""

PLAIN = (dict, list, str, int, float, bool, type(None))

MAX_DEPTH, MAX_VALUES = 32, 100_000
"""A configuration has about 200 values, plus at most 10,000 betas of its schedule."""


def check_plain(settings: Any, source: object) -> None:
    """Raise ValueError if `settings` holds values that are not plain, too many values, or too deeply nested ones."""
    for count, (name, value) in enumerate(walk_settings(settings)):
        if count > MAX_VALUES or name.count(".") > MAX_DEPTH:
            raise ValueError(f"{source} is not a configuration of this project: it is too large or too deeply nested")
        if type(value) not in PLAIN:
            raise ValueError(f"{source} is not a configuration of this project: {name} is a {type(value).__name__}")
        if isinstance(value, dict) and not all(isinstance(key, str) and key and key.isprintable() for key in value):
            raise ValueError(f"{source} is not a configuration of this project: {name} has keys that are not names")


def walk_settings(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of each node of nested plain values, containers before their items."""
    yield name, node
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from walk_settings(value, f"{name}.{key}".lstrip("."))
