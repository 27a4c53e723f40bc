"""Write checkpoints atomically, and tolerate a full disk."""

import io
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import loggers
from lightning.pytorch.utilities import rank_zero_only

from src.training.checkpoints import with_checksum


@contextmanager
def tolerate_full_disk(path: Path) -> Iterator[None]:
    """Say so, and go on, where what is done within cannot be written to `path`."""
    try:
        yield
    except OSError as error:
        warnings.warn(
            f"{path} could not be written ({error.strerror or error}): the run goes on, and what was saved before "
            "stays; make room",
            stacklevel=3,
        )


def retry_until_written(write: Callable[[], object], path: Path) -> None:
    """Have something written to `path`, however long it takes until there is room for it."""
    done = False
    while not done:
        with tolerate_full_disk(path):
            write()
            done = True
        time.sleep(0 if done else 10)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that replace the one before only when they are on the disk in whole.

    `failed` says whether the last one could not be written; until one can, nothing older is removed.
    """

    def __init__(self) -> None:
        self.failed = False
        self._folders: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        contents = io.BytesIO()
        torch.save(checkpoint, contents)
        partial = path.with_name(f"{path.name}.partial")
        self.failed = True
        with tolerate_full_disk(path):
            try:
                self._enter(path.parent)
                with partial.open("wb") as file:
                    file.writelines(with_checksum(contents.getbuffer()))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
                self.failed = False
            finally:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)

    def _enter(self, folder: Path) -> None:
        """Before the first checkpoint in a folder: make it, and remove what a killed process was writing there."""
        if folder.resolve() not in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
            self._folders.add(folder.resolve())
            for partial in folder.glob("*.ckpt.partial"):
                partial.unlink(missing_ok=True)

    def remove_checkpoint(self, path: Any) -> None:
        path = Path(path)
        # A resumed checkpoint says which older ones may go: believed of those beside what was written here.
        if not self.failed and path.suffix == ".ckpt" and path.parent.resolve() in self._folders:
            path.unlink(missing_ok=True)


class NoCheckpoints(TorchCheckpointIO):
    """Writes none, whoever saves one, as `trainer.enable_checkpointing=false` and `trainer.fast_dev_run` ask."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        return


class CSVLogger(loggers.CSVLogger):
    """Lightning's; rows that cannot be written are kept, and written when there is room again."""

    @rank_zero_only
    def save(self) -> None:
        writer = self.experiment
        path = Path(writer.metrics_file_path)
        beside = path.with_suffix(".before")
        keys, size = [*writer.metrics_keys], path.stat().st_size if path.exists() else 0
        with tolerate_full_disk(path):
            try:
                if path.exists() and not all(row.keys() <= set(keys) for row in writer.metrics):
                    shutil.copyfile(path, beside)  # a new column has the whole file written anew
                super().save()
            except OSError:
                if beside.exists() and beside.stat().st_size == size:
                    os.replace(beside, path)
                elif path.exists():
                    os.truncate(path, size)
                writer.metrics_keys = keys
                raise
            finally:
                with suppress(OSError):
                    beside.unlink(missing_ok=True)
