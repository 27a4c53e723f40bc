"""Lock a run folder, so that no two processes train in it."""

import os
import time
from pathlib import Path
from typing import IO

_locks: dict[Path, IO[str]] = {}


def lock_run_dir(directory: Path) -> None:
    """Lock a run folder for this process until `unlock_run_dir`. Raises ValueError if another process trains there."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    directory.mkdir(parents=True, exist_ok=True)
    unlock_run_dir(directory)
    path = directory / ".lock"
    for _ in range(30):  # seconds: a process that was stopped may still be exiting
        file = path.open("a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # The workers of the data loader do not inherit it.
        except BlockingIOError:
            file.close()
            time.sleep(1)
        except OSError:  # a file system without locks
            return
        else:
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                _locks[directory.resolve()] = file
                return
            file.close()  # Another process removed the file after this one had opened it.
    raise ValueError(f"another process trains in {directory}: wait for it or stop it, or choose another run_dir")


def unlock_run_dir(directory: Path) -> None:
    """Release the lock of a run folder, if this process holds it."""
    if file := _locks.pop(directory.resolve(), None):
        file.close()
