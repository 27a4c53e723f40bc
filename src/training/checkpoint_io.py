"""Write checkpoints atomically, and tolerate a full disk."""

import io
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import loggers
from lightning.pytorch.utilities import rank_zero_only

from src.cache import write_atomically


@contextmanager
def tolerate_full_disk(path: Path) -> Iterator[None]:
    """Turn an OSError in writing `path` into a warning."""
    try:
        yield
    except OSError as error:
        warnings.warn(
            f"{path} could not be written ({error.strerror or error}): the run continues and earlier files are kept; "
            "free some disk space",
            stacklevel=3,
        )


def retry_until_written(write: Callable[[], object], path: Path) -> None:
    """Call `write` every 10 s until it can write `path`."""
    while True:
        with tolerate_full_disk(path):
            write()
            return
        time.sleep(10)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints that replace the previous one only when they are complete on the disk.

    `failed` is True if the last write failed; until one succeeds, older checkpoints are not removed.
    """

    def __init__(self) -> None:
        self.failed = False
        self._folders: set[Path] = set()
        self._obsolete: list[Path] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        contents = io.BytesIO()  # torch.save to a full disk raises a RuntimeError without the cause
        torch.save(checkpoint, contents)
        self.failed = True
        with tolerate_full_disk(path):
            self._prepare(path.parent)
            write_atomically(path, contents.getbuffer())
            self.failed = False

    def _prepare(self, folder: Path) -> None:
        """Create the folder of the first checkpoint, and remove partial files of a killed process."""
        if folder.resolve() not in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
            self._folders.add(folder.resolve())
            for partial in folder.glob("*.ckpt.*partial"):
                partial.unlink(missing_ok=True)

    def remove_checkpoint(self, path: Any) -> None:
        path = Path(path)
        # The paths to remove come from a checkpoint, so only files next to this run's own checkpoints are trusted.
        if path.suffix == ".ckpt" and path.parent.resolve() in self._folders:
            self._obsolete = [p for p in (*self._obsolete, path) if p.exists()]
            if self._obsolete and not self.failed:
                self._obsolete.pop(0).unlink(missing_ok=True)


class NoCheckpoints(TorchCheckpointIO):
    """Write no checkpoints, for `trainer.enable_checkpointing=false` and `trainer.fast_dev_run`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        return


class CSVLogger(loggers.CSVLogger):
    """Lightning's CSVLogger, but on a full disk rows wait in memory, and the file keeps what it has."""

    @rank_zero_only
    def save(self) -> None:
        writer = self.experiment
        path, keys = Path(writer.metrics_file_path), [*writer.metrics_keys]
        with tolerate_full_disk(path):
            size = path.stat().st_size if path.exists() else 0
            # For a new column Lightning rewrites the file.
            rewritten = path.read_bytes() if size and set().union(*writer.metrics) - set(keys) else b""
            try:
                super().save()
            except OSError:
                if rewritten:
                    path.write_bytes(rewritten)
                elif path.exists():
                    os.truncate(path, size)
                writer.metrics_keys = keys
                raise
