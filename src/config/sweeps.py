"""Assign the devices of a machine to the jobs of a sweep that run on it at the same time."""

import functools
import os
import time
from pathlib import Path
from typing import IO


@functools.cache
def gpus() -> tuple[str, ...]:
    """Return the GPUs that the jobs of this sweep may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    # Counting does not initialize CUDA, which would ignore later changes of the environment.
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    return tuple(names.split(",")[: torch.cuda.device_count()])


@functools.cache
def parallel_jobs() -> int:
    """Return the number of GPUs, or of cores on a machine without GPUs."""
    import joblib

    return len(gpus()) or int(joblib.cpu_count())


def assign_devices(sweep: Path, n_jobs: int) -> None:
    """Make some of the GPUs visible only to this worker, one of up to `n_jobs` that run jobs of `sweep`.

    The worker keeps them until it ends: CUDA cannot change its devices once it is initialized.
    """
    import joblib

    if gpus():
        workers = joblib.effective_n_jobs(n_jobs)
        os.environ["CUDA_VISIBLE_DEVICES"] = devices_of_worker(gpus(), _place(sweep, workers), workers)


def devices_of_worker(devices: tuple[str, ...], place: int, workers: int) -> str:
    """Return the devices of worker number `place` of `workers`: at least one, several if there are more devices."""
    if workers >= len(devices):
        return devices[place % len(devices)]
    return ",".join(devices[place * len(devices) // workers : (place + 1) * len(devices) // workers])


_locks: list[IO[str]] = []


@functools.cache
def _place(sweep: Path, workers: int) -> int:
    """Return the lowest worker number that no process has locked. The lock ends with the process, even if killed."""
    import fcntl

    sweep.mkdir(parents=True, exist_ok=True)
    for _ in range(600):  # a worker that this one replaces may still be ending
        for place in range(workers):
            file = (sweep / f".worker_{place}").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _locks.append(file)
            return place
        time.sleep(0.1)
    raise RuntimeError(f"another sweep runs in {sweep}: all {workers} workers are locked")
