"""The jobs of a sweep that run side by side on one machine share its devices out."""

import functools
import os
import time
from pathlib import Path
from typing import IO


@functools.cache
def gpus() -> tuple[str, ...]:
    """The GPUs that the jobs of this sweep may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    # Counted without CUDA being initialised, after which the environment is no longer heeded.
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    return tuple(names.split(",")[: torch.cuda.device_count()])


@functools.cache
def parallel_jobs() -> int:
    """One for each GPU; where there is none, one for each core."""
    import joblib

    return len(gpus()) or int(joblib.cpu_count())


def assign_devices(sweep: Path, n_jobs: int) -> None:
    """Let this process, which runs jobs of `sweep` beside up to `n_jobs` - 1 others, see its share of the GPUs.

    It keeps them until it ends: CUDA cannot change its devices once it is initialised.
    """
    import joblib

    if gpus():
        workers = joblib.effective_n_jobs(n_jobs)
        os.environ["CUDA_VISIBLE_DEVICES"] = share(gpus(), _place(sweep, workers), workers)


def share(devices: tuple[str, ...], place: int, workers: int) -> str:
    """The devices of the worker at `place` among `workers`: several if there are more than workers, else one."""
    if workers >= len(devices):
        return devices[place % len(devices)]
    return ",".join(devices[place * len(devices) // workers : (place + 1) * len(devices) // workers])


_locks: list[IO[str]] = []


@functools.cache
def _place(sweep: Path, workers: int) -> int:
    """The lowest place that no living process holds. The system frees it when this one ends, however that be."""
    import fcntl

    sweep.mkdir(parents=True, exist_ok=True)
    for _ in range(600):  # a worker that this one replaces may still be on its way out
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
    raise RuntimeError(f"all {workers} places of {sweep} are taken: another sweep runs in this folder")
