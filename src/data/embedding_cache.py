"""A cache of token embeddings on disk, shared by processes."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from src.cache import digest, write_atomically

Embeddings = npt.NDArray[np.float16]


class EmbeddingCache:
    """Arrays (tokens, width) float16 by integer key, memory-mapped from files in `folder`.

    Each call that computes something writes one safetensors file and never changes it, so readers need no lock. A
    corrupted file is computed again. In a folder that is not writable, arrays are computed each time. Both warn once.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self.width = width
        self._warned = False
        self._close()

    def get(self, keys: Sequence[int], compute: Callable[[list[int]], Sequence[Embeddings]]) -> list[Embeddings]:
        """Return the array of each key. `compute` is called for missing keys while other processes wait."""
        new: dict[int, Embeddings] = {}
        if self.missing(keys):
            with self._lock():
                if missing := self.missing(keys):
                    new = dict(zip(missing, compute(missing), strict=True))
                    self._write(new)
        return [new[key] if key in new else self._read(key) for key in keys]

    def missing(self, keys: Sequence[int]) -> list[int]:
        """Return the distinct keys without an array."""
        if len(keys) and not self._known(keys).all():
            self._open_new_files()
        return [key for key, known in dict(zip(keys, self._known(keys), strict=True)).items() if not known]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "width": self.width, "_warned": self._warned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._close()

    def _close(self) -> None:
        self._opened: set[str] = set()
        self._files: list[Any] = []
        self._keys = np.empty(0, np.int64)  # sorted
        self._places = np.empty((0, 3), np.int64)  # file, first row, last row + 1 of each key

    def _known(self, keys: Sequence[int]) -> npt.NDArray[np.bool_]:
        return np.isin(np.asarray(keys, np.int64), self._keys)

    def _read(self, key: int) -> Embeddings:
        file, start, stop = self._places[np.searchsorted(self._keys, key)].tolist()
        rows: Embeddings = self._files[file].get_slice("embeddings")[start:stop]
        return rows

    def _open_new_files(self) -> None:
        """Open the files that this object or other processes have written since the last call."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._opened:
                continue
            self._opened.add(path.name)
            try:
                file: Any = safe_open(path, "numpy")
                keys, counts = file.get_tensor("keys"), file.get_tensor("counts")
                if list(file.get_slice("embeddings").get_shape()) != [counts.sum(), self.width]:
                    raise ValueError("wrong shape")
            except (OSError, SafetensorError, ValueError) as error:
                self._warn(f"{path.name} is corrupted ({error}); computing its embeddings again")
                continue
            stops = np.cumsum(counts)
            places = np.stack([np.full(len(keys), len(self._files)), stops - counts, stops], axis=1)
            self._files.append(file)
            self._keys, first = np.unique(np.concatenate([self._keys, keys]), return_index=True)
            self._places = np.concatenate([self._places, places])[first]

    def _write(self, arrays: dict[int, Embeddings]) -> None:
        path = self.folder / f"{digest(*arrays)}.safetensors"
        tensors = {
            "keys": np.array(list(arrays), np.int64),
            "counts": np.array([len(array) for array in arrays.values()], np.int64),
            "embeddings": np.concatenate(list(arrays.values())),
        }
        try:
            write_atomically(path, safetensors.numpy.save(tensors))
        except OSError as error:
            self._warn(f"cannot be written ({error.strerror or error}); computing each time: free disk space")
            return
        self._opened.discard(path.name)  # it may have replaced a corrupted file

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Prevent other processes from computing the same arrays at the same time."""
        lock = FileLock(self.folder / "lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            self._warn(f"cannot be locked ({error}); computing each time: choose another folder")
        try:
            yield
        finally:
            lock.release()

    def _warn(self, what: str) -> None:
        if not self._warned:
            warnings.warn(f"the cache {self.folder}: {what}", stacklevel=4)
        self._warned = True
