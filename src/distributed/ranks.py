"""Which of a run's processes this one is, and the folder that all of them agree on. Torch is not imported for one."""

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


def fresh_folder(parent: str) -> str:
    """A new folder under `parent` named after the time; of runs that start in the same second each has its own.

    Asked again, also by the processes that this one starts, the same: the environment remembers.
    """
    memory = f"{FRESH}{Path(parent).resolve()}"
    if memory in os.environ:
        return os.environ[memory]
    record_missing_dirs(Path(parent))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ[memory] = _agreed_folder(parent)
        _missing.append(Path(os.environ[memory]).resolve())
        return os.environ[memory]
    if slurm_tasks() > 1:
        # Its processes know no more of each other yet than the job that they belong to.
        name = "slurm_{SLURM_JOB_ID}_{SLURM_STEP_ID}".format_map(os.environ)
        os.environ[memory] = str(Path(parent) / name)
    else:
        os.environ[memory] = _made_folder(parent)
    _missing.append(Path(os.environ[memory]).resolve())
    return os.environ[memory]


_missing: list[Path] = []
"""Folders that were not there when this process began, or are its own, from the outermost."""


def record_missing_dirs(folder: Path) -> None:
    """Remember which of `folder` and its parents do not exist, for `remove_empty_dirs`."""
    path = folder.absolute()
    _missing.extend(p for p in [*reversed(path.parents), path] if not p.exists() and p not in _missing)


def remove_empty_dirs() -> None:
    """Remove the folders that were made since `record_missing_dirs`, as far as nothing is in them."""
    while _missing:
        with suppress(OSError):
            _missing.pop().rmdir()


def _made_folder(parent: str) -> str:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in count(1):
        path = Path(parent) / (stamp if attempt == 1 else f"{stamp}_{attempt}")
        try:
            path.mkdir(parents=True)
        except (FileExistsError, FileNotFoundError):  # the latter if a refused process has just removed the parent
            continue
        return str(path)
    raise AssertionError


def _agreed_folder(parent: str) -> str:
    """The folder that the first process of `torchrun` makes, which tells the others through the store they share."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank() == 0)
    name = f"folder of {parent}, attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank() == 0:
        store.set(name, _made_folder(parent))
    return str(store.get(name).decode())


def slurm_tasks() -> int:
    """The processes of the step that this one is of; 1 also within a job's script, which srun did not start."""
    return int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1


def rank() -> int:
    """This process's number among those of the run: as torchrun, SLURM or Lightning's launcher says."""
    names = ["RANK", *(["SLURM_PROCID"] if slurm_tasks() > 1 else []), "LOCAL_RANK"]
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def local_rank() -> int:
    """Its number among those on this machine."""
    names = ["LOCAL_RANK", *(["SLURM_LOCALID"] if slurm_tasks() > 1 else [])]
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Within this, a signal to stop calls `handler`."""
    if threading.current_thread() is not threading.main_thread():  # the only one that may listen to signals
        yield
        return
    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


def run_as_worker() -> None:
    """Be one of the processes that leave it to the first to warn, and do not outlive it."""
    warnings.simplefilter("ignore")
    if "TORCHELASTIC_RUN_ID" not in os.environ and slurm_tasks() == 1:
        # Started by the first process, which is killed when this one ends before it has understood a signal.
        ignore_signals()
    end_with_parent()


def ignore_signals() -> None:
    """Ignore signals to stop, also those that came while `signals_blocked` kept them from this process."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Start processes within this: a signal to stop reaches them only when they know what to do with it.

    Else each of them would answer Ctrl-C with the traceback of an import. This process hears a signal afterwards, or in
    another of its threads.
    """
    if not hasattr(signal, "pthread_sigmask"):  # not on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_launchers: list[Any] = []


def remember_children(launcher: Any) -> None:
    """Have `kill_children` know the processes that a launcher of Lightning starts."""
    _launchers.append(launcher)


def kill_children() -> None:
    """End the other processes at once: they have nothing to save, and would say at length that this one is gone."""
    while _launchers:
        children = _launchers.pop().procs
        started = [*children]
        children.clear()  # else Lightning, which watches them, ends this process too
        for child in started:
            child.kill()


def end_on_ctrl_c() -> None:
    """Have Ctrl-C end this process in one line, whatever it is importing."""

    def end(number: int, frame: FrameType | None) -> None:
        if rank() == 0:
            os.write(2, b"Interrupted\n")
        os._exit(128 + number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, end)
        _leaves_at_once.append(True)


_leaves_at_once: list[bool] = []
"""Whether this process is a command, and not one that calls it."""


def leave(status: int) -> None:
    """End an interrupted process with `status`, and in a command without what libraries still log.

    Where the interruption went through code that a library had as text, Python would end with the signal instead.
    """
    if not _leaves_at_once:
        sys.exit(status)
    logging.disable(logging.CRITICAL)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


_watched: set[int] = set()


def is_orphan() -> bool:
    """Whether the process that started this one, and with which it is to end, is gone."""
    return bool(_watched) and os.getppid() not in _watched


def end_with_parent(seconds: float = 5.0) -> None:
    """Have this process end when the one that started it is gone, which it might wait for in vain for half an hour."""
    _watched.add(os.getppid())

    def watch() -> None:
        while not is_orphan():
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
