"""A cache on disk for tensors that take long to compute, keyed by a hash of their inputs."""

import hashlib
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

Tensors = dict[str, Tensor]


def digest(*parts: Tensor | str | float | None) -> str:
    """Return 32 hexadecimal digits that identify these tensors (dtype, shape and contents) and values, in order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            total.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            total.update(f"{part!r};".encode())
    return total.hexdigest()[:32]


def cached(folder: Path, key: str, compute: Callable[[], Tensors]) -> Tensors:
    """Return the tensors stored in `folder` under `key`, or those of `compute` after storing them.

    Computes again, with a warning, if the file is corrupted. Warns if the file cannot be written.
    """
    path = folder / f"{key}.safetensors"
    if path.exists():
        try:
            return safetensors.torch.load(path.read_bytes())
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{path} is corrupted ({_line(error)}); computing it again", stacklevel=2)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
    try:
        write_atomically(path, safetensors.torch.save(tensors))
    except OSError as error:
        warnings.warn(
            f"{path} cannot be written ({_line(error)}); computing it each time: free disk space", stacklevel=2
        )
    return tensors


def write_atomically(path: Path, contents: bytes | memoryview) -> None:
    """Write a file, and its folder if missing, so that other processes see all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
