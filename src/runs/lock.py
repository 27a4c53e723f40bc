"""Lock a run folder, so that no two processes train in it."""

from pathlib import Path

from filelock import FileLock, Timeout

WAIT_S = 30
"""Seconds to wait for the lock: a process that was stopped may still be exiting."""

_locks: dict[Path, FileLock] = {}


def lock_run_dir(directory: Path) -> None:
    """Lock a run folder for this process until `unlock_run_dir`. Raises ValueError if another process trains there."""
    unlock_run_dir(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=WAIT_S, poll_interval=1)
    except Timeout as error:
        raise ValueError(
            f"another process trains in {directory}: wait for it or stop it, or choose another run_dir"
        ) from error
    except OSError:  # a file system without locks
        return
    _locks[directory.resolve()] = lock


def unlock_run_dir(directory: Path) -> None:
    """Release the lock of a run folder, if this process holds it."""
    if lock := _locks.pop(directory.resolve(), None):
        lock.release()
