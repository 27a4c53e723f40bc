"""Arrays that take long to compute, each kept on disk under a number: a file that grows, and that processes share."""

import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

Rows = npt.NDArray[np.float16]

RECORD = np.dtype([("key", "<i8"), ("start", "<i8"), ("count", "<i4"), ("check", "<u4")])


class Store:
    """Arrays (any number of rows, `width`) float16 in `folder`: all rows in one file, where each lies in another.

    Files only grow, the rows before what tells of them, so that a reader needs no lock and a killed writer does no
    harm. What is damaged is computed again, and what cannot be written is done without, each with a warning.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self.width = width
        self._warned = False
        self._forget()

    def get(self, keys: Sequence[int], compute: Callable[[list[int]], Sequence[Rows]]) -> list[Rows]:
        """The arrays under `keys`, of which `compute` gives those that are not there, while other processes wait."""
        found = self._read(keys)
        if len(found) < len(set(keys)):
            with self._locks():
                self._refresh()
                found = self._read(keys)
                missing = [key for key in dict.fromkeys(keys) if key not in found]
                if missing:
                    arrays = compute(missing)
                    self._append(missing, arrays)
                    found |= dict(zip(missing, arrays, strict=True))
        return [found[key] for key in keys]

    def lacks(self, keys: Sequence[int]) -> list[int]:
        """The keys of which the index has nothing; of the others the rows are not looked at."""
        self._refresh()
        there = set(self._records["key"][self._places(keys)].tolist()) if len(self._records) else set()
        return [key for key in dict.fromkeys(keys) if key not in there]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "width": self.width, "_warned": self._warned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._records = np.empty(0, RECORD)  # sorted by key; of several with one key the last counts
        self._read_records = 0
        self._rows: Rows = np.empty((0, self.width), np.float16)

    def _read(self, keys: Sequence[int]) -> dict[int, Rows]:
        """What is there under `keys`, and whole."""
        found: dict[int, Rows] = {}
        if not len(self._records):
            self._refresh()
        if not len(self._records):
            return found
        for key, record in zip(keys, self._records[self._places(keys)].tolist(), strict=True):
            known, start, count, check = record
            if known != key or key in found:
                continue
            rows = self._rows[start : start + count]
            if len(rows) == count and zlib.crc32(rows.tobytes()) == check:
                found[key] = rows
            else:
                self._warn("is damaged: what is missing is computed again")
        return found

    def _places(self, keys: Sequence[int]) -> npt.NDArray[np.int64]:
        """Where each key is in the sorted index, if it is there at all."""
        after = np.searchsorted(self._records["key"], np.asarray(keys, np.int64), side="right")
        return np.asarray(np.maximum(after - 1, 0), np.int64)

    def _refresh(self) -> None:
        """Take note of what other processes have written since."""
        index, rows = self._paths()
        try:
            with index.open("rb") as file:
                file.seek(self._read_records * RECORD.itemsize)
                contents = file.read()
            new = np.frombuffer(contents, RECORD, len(contents) // RECORD.itemsize)
            if not len(new):
                return
            whole = rows.stat().st_size // (2 * self.width)
            if whole:
                self._rows = np.memmap(rows, np.float16, "r", shape=(whole, self.width))
        except OSError:
            return  # nothing is there yet, or none of it can be read
        self._read_records += len(new)
        records = np.concatenate([self._records, new])
        self._records = records[np.argsort(records["key"], kind="stable")]

    def _append(self, keys: Sequence[int], arrays: Sequence[Rows]) -> None:
        index, rows = self._paths()
        try:
            with rows.open("ab") as file:
                start = file.tell() // (2 * self.width)
                file.truncate(start * 2 * self.width)  # what a killed process began to write
                for array in arrays:
                    file.write(array.tobytes())
            records = np.empty(len(keys), RECORD)
            records["key"] = keys
            records["count"] = [len(array) for array in arrays]
            records["start"] = start + np.cumsum(records["count"]) - records["count"]
            records["check"] = [zlib.crc32(array.tobytes()) for array in arrays]
            with index.open("ab") as file:
                file.truncate(file.tell() // RECORD.itemsize * RECORD.itemsize)
                file.write(records.tobytes())
        except OSError as error:
            self._warn(f"could not be written ({error.strerror or error}): it is computed each time; make room")
            return
        self._refresh()

    @contextmanager
    def _locks(self) -> Iterator[None]:
        """No other process writes meanwhile."""
        lock = FileLock(self.folder / "lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            self._warn(f"could not be locked ({error}): what is missing is computed each time; choose another folder")
        try:
            yield
        finally:
            lock.release()

    def _paths(self) -> tuple[Path, Path]:
        return self.folder / "index", self.folder / "rows"

    def _warn(self, what: str) -> None:
        if not self._warned:
            warnings.warn(f"the cache {self.folder} {what}", stacklevel=4)
        self._warned = True
