"""Rank, output folder and signals of a process. Imports torch only under torchrun."""

import atexit
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
FRESH = "FRESH_FOLDER_"


def fresh_folder(parent: str, again: bool = False) -> str:
    """Return a new folder under `parent`, named after the time and unique among runs of the same second.

    Later calls return the same folder, in this process and its children: an environment variable stores it. With
    `again` only processes that another one started return it.
    """
    memory = f"{FRESH}{Path(parent).resolve()}"
    renews = again and rank() == 0 and "TORCHELASTIC_RUN_ID" not in os.environ
    if memory not in os.environ or renews:
        record_missing_dirs(Path(parent))
        os.environ[memory] = _agree_on_folder(parent)
        _missing.append(Path(os.environ[memory]).resolve())
    return os.environ[memory]


_missing: list[Path] = []
"""Folders that this process created or that were missing when it started, outermost first."""


def record_missing_dirs(folder: Path) -> None:
    """Record which of `folder` and its parents do not exist, for `remove_empty_dirs`."""
    path = folder.absolute()
    _missing.extend(p for p in [*reversed(path.parents), path] if not p.exists() and p not in _missing)


def remove_empty_dirs() -> None:
    """Remove the recorded folders that are empty."""
    while _missing:
        with suppress(OSError):
            _missing.pop().rmdir()


def _create_folder(parent: str) -> str:
    """Create a folder named after the time; append a number if the name is taken."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in count(1):
        path = Path(parent) / (stamp if attempt == 1 else f"{stamp}_{attempt}")
        try:
            path.mkdir(parents=True)
        except (FileExistsError, FileNotFoundError):  # a rejected process may just have removed the parent
            continue
        return str(path)
    raise AssertionError


def _agree_on_folder(parent: str) -> str:
    """Return a folder under `parent` that is the same in all processes of torchrun or of a SLURM step.

    Hydra names the folder before any process group exists; otherwise every process would train in a separate folder.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.rendezvous import rendezvous

        store, global_rank, _ = next(rendezvous("env://"))
        if global_rank == 0:
            store.set(f"folder of {parent}", _create_folder(parent))
        return str(store.get(f"folder of {parent}").decode())
    if slurm_tasks() > 1:  # They cannot communicate yet; they share the ids of their job and step.
        return str(Path(parent) / "slurm_{SLURM_JOB_ID}_{SLURM_STEP_ID}".format_map(os.environ))
    return _create_folder(parent)


def slurm_tasks() -> int:
    """Return the number of processes in this SLURM step; 1 outside a step, as in a batch script."""
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1


def rank() -> int:
    """Return the global rank that torchrun, SLURM or Lightning's launcher assigned; 0 for a single process."""
    return _assigned_rank("RANK", "SLURM_PROCID", "LOCAL_RANK")


def local_rank() -> int:
    """Return the rank among the processes on this machine."""
    return _assigned_rank("LOCAL_RANK", "SLURM_LOCALID")


def _assigned_rank(*names: str) -> int:
    counts = [name for name in names if name in os.environ and (slurm_tasks() > 1 or not name.startswith("SLURM"))]
    return int(os.environ[counts[0]]) if counts else 0


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Call `handler` on a stop signal within this context."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


class Interruption:
    """A handler of stop signals that kills child processes, raises KeyboardInterrupt and stores the signal's `number`.

    A second signal of the same number kills this process.
    """

    number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)  # blocking library code handles the first one too late
        sys.unraisablehook = self._interrupt_again
        kill_children()
        raise KeyboardInterrupt

    def _interrupt_again(self, unraisable: Any) -> None:
        """Interrupt again if Python ignored the exception because a callback raised it, such as an import hook."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            signal.signal(self.number, self)
            os.kill(os.getpid(), self.number)


def run_as_worker() -> None:
    """Silence warnings, which the first process prints, and end when the first process ends."""
    warnings.simplefilter("ignore")
    if "TORCHELASTIC_RUN_ID" not in os.environ and slurm_tasks() == 1:
        # Lightning kills the first process if this one ends before it handles signals.
        ignore_signals()
    end_with_parent()


def ignore_signals() -> None:
    """Ignore stop signals, including pending ones that `signals_blocked` held back."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block stop signals for processes started within this context, until they handle or ignore them.

    Otherwise Ctrl-C would end each of them with the traceback of an import. This process receives a pending signal
    afterwards, or in another thread.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_launchers: list[Any] = []


def remember_children(launcher: Any) -> None:
    """Register the processes of a Lightning launcher for `kill_children`."""
    _launchers.append(launcher)


def kill_children() -> None:
    """Kill the processes that this one started: they have no state to save and would print tracebacks."""
    while _launchers:
        children = _launchers.pop().procs
        started = [*children]
        children.clear()  # otherwise Lightning's watcher ends this process too
        for child in started:
            child.kill()


def end_on_ctrl_c() -> None:
    """Let Ctrl-C end this process with one line during imports."""

    def end(number: int, frame: FrameType | None) -> None:
        if rank() == 0:
            os.write(2, b"Interrupted\n")
        os._exit(128 + number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, end)
        _is_command.append(True)


_is_command: list[bool] = []
"""Not empty if this process is a command rather than a program that calls one."""


def exit_process(status: int) -> None:
    """End an interrupted process with `status`; in a command, silence what libraries log at exit.

    After an interruption within `exec`, Python would die by the signal instead.
    """
    if not _is_command:
        sys.exit(status)
    logging.disable(logging.CRITICAL)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


_watched: set[int] = set()


def is_orphan() -> bool:
    """Return whether the parent process has ended, if `end_with_parent` watches it."""
    return bool(_watched) and os.getppid() not in _watched


def end_with_parent() -> None:
    """End this process when its parent ends; a collective would wait half an hour for it."""
    _watched.add(os.getppid())

    def watch() -> None:
        while not is_orphan():
            time.sleep(5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
