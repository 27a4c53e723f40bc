"""Sweeps: devices for the jobs that run at the same time, and a comparison of the runs at the end."""

import functools
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from src.config.search_path import CONF
from src.config.words import key_of
from src.distributed.ranks import rank
from src.errors import command, format_override, literal


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


class CompareRuns(Callback):
    """Compare the runs of a sweep with `src.compare`, in its folder comparison/, and in W&B if they log there.

    Runs in a separate process, because Hydra cannot run twice in one. A failure only warns.
    """

    def __init__(self, devices: int | None = None, overrides: Sequence[str] = ()) -> None:
        self.devices = devices
        self.overrides = list(map(str, overrides))  # launchers can pickle plain strings

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Run the comparison in the process that started the sweep."""
        if rank() > 0:
            return
        sweep = Path(config.hydra.sweep.dir)
        jobs = sum(folder.name.isdecimal() for folder in sweep.iterdir())
        devices = self.devices or max(1, min(8, jobs, parallel_jobs()))
        settings: dict[str, object] = {"runs": [sweep], "hydra.run.dir": sweep / "comparison", "devices": devices}
        path = os.pathsep.join([str(CONF.parent), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path}
        environment.pop("HYDRA_FULL_ERROR", None)  # the launcher sets it for a sweep
        if any(sweep.glob("*/wandb_id.txt")):  # left by runs that W&B logs
            settings["wandb"] = True
        own = set(map(key_of, self.overrides))
        words = [f"{name}={literal(value)}" for name, value in settings.items() if name not in own]
        done = subprocess.run(
            [sys.executable, "-m", "src.compare", *words, *self.overrides], env=environment, check=False
        )
        if done.returncode:
            warnings.warn(
                f"comparing the runs of the sweep failed (status {done.returncode}, see above); repeat it with "
                f"{command('compare', format_override('runs', [sweep]))}",
                stacklevel=2,
            )
