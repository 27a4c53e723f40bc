"""A source of samples from one memory-mapped array."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.data.decoded import Array
from src.data.sources import Covariates, Labels
from src.errors import counted

CHUNK_BYTES = 64 * 2**20
"""Bytes of an array that `measure` reads at a time."""


@dataclass(eq=False)
class ArraySource:
    """Samples (N, C, *size) of an array in the file `path`, which `open_array` maps into memory.

    `rows` (N,) selects rows of the array; None uses all. `ImageSource` and `ArrayDataModule` explain `value_range`,
    `dtype`, `suffix`, `header`, `summary` and `unreadable`.
    """

    open_array: Callable[[], Array]
    path: Path
    rows: Array | None
    labels: Labels | None
    ids: Sequence[str] | None
    val_mask: Array | None
    sizes: Sequence[int] | None
    value_range: tuple[float, float]
    suffix: str
    header: Mapping[str, Any] | None
    summary: str
    unreadable: dict[str, str]
    covariates: Covariates | None = None
    captions: Sequence[Sequence[str]] | None = None

    def __post_init__(self) -> None:
        self.array: Array | None = self.open_array()
        self.dtype = self.array.dtype.name

    def __len__(self) -> int:
        return len(self._array()) if self.rows is None else len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "array": None}  # each process maps the file again instead of copying the array

    def stamps(self) -> Sequence[int] | None:
        """Return the sizes of the files; None for one file, since hashing all samples takes too long."""
        return self.sizes

    def identity(self) -> str:
        """Return a text that changes whenever the contents of the file may have changed."""
        status = self.path.stat()
        return f"{self.path.resolve()} {status.st_size} {status.st_mtime_ns}"

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """Return samples (N, C, *size), uint8 for 8 bits and booleans, else float32."""
        chosen = np.asarray(indices, dtype=np.int64)
        values = self._array()[chosen if self.rows is None else self.rows[chosen]]
        return torch.from_numpy(values.astype(np.uint8 if values.dtype in (np.uint8, np.bool_) else np.float32))

    def _array(self) -> Array:
        if self.array is None:
            self.array = self.open_array()
        return self.array


def measure(path: Path, array: Array) -> tuple[float, float]:
    """Return the minimum and maximum of an array (N, *shape). Raises ValueError for values that are not finite."""
    lows, highs = [], []
    step = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        part = array[start : start + step]
        low, high = float(part.min()), float(part.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            bad = np.flatnonzero(~np.isfinite(part).all(axis=tuple(range(1, part.ndim))))
            raise ValueError(f"{path} has values that are not finite (sample {start + int(bad[0])}); remove the sample")
        lows.append(low)
        highs.append(high)
    return min(lows), max(highs)


def describe_array(array: Array, limits: tuple[float, float]) -> str:
    """Return the end of the line about the data: channels, size, type and range of an array (N, C, *size)."""
    channels, *size = array.shape[1:]
    shape = "x".join(map(str, size))
    values = f"{array.dtype.name} values in [{limits[0]:g}, {limits[1]:g}]"
    return f"; {counted(channels, 'channel')} of {shape}; {values}"
