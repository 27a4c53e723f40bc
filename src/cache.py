"""What is expensive to compute of data that stay the same, kept on disk under the hash of all that it depends on."""

import hashlib
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Tensors = dict[str, Tensor]


def digest(*parts: Tensor | str | float | None) -> str:
    """32 hexadecimal digits that stand for these tensors (type, shape and contents) and values, in this order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            total.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            total.update(f"{part!r};".encode())
    return total.hexdigest()[:32]


def cached(folder: Path, key: str, compute: Callable[[], Tensors]) -> Tensors:
    """The tensors that `compute` gives, read from `folder` if they were computed under this `key` before.

    Written in whole or not at all. A file that does not hold what was written is computed again, and one that cannot
    be written is done without, each with a warning.
    """
    path = folder / f"{key}.safetensors"
    if path.exists():
        try:
            return _read(path)
        except (OSError, SafetensorError, ValueError) as error:
            warnings.warn(f"{path} is damaged ({_line(error)}): computed again", stacklevel=2)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
    try:
        _write(path, tensors)
    except OSError as error:
        warnings.warn(
            f"{path} could not be written ({_line(error)}): it is computed each time; make room", stacklevel=2
        )
    return tensors


def _read(path: Path) -> Tensors:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        noted = (file.metadata() or {}).get("digest")
    if noted != _digest_of(tensors):
        raise ValueError("its contents do not have the digest that was noted")
    return tensors


def _write(path: Path, tensors: Tensors) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(safetensors.torch.save(tensors, {"digest": _digest_of(tensors)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _digest_of(tensors: Tensors) -> str:
    return digest(*(part for item in sorted(tensors.items()) for part in item))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
