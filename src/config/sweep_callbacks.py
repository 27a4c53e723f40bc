"""What a sweep does by itself when its last job is done: `hydra/callbacks=compare`."""

import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from src.config.overrides import CONF, key_of
from src.config.sweeps import gpus
from src.distributed.ranks import rank
from src.quoting import command, format_override, literal


class CompareRuns(Callback):
    """Compares the runs of the sweep by `src.compare`, into the folder comparison/ of the sweep; W&B's runs also there.

    In a process of its own, since Hydra cannot be entered twice. If it fails, the sweep does not: a warning says so.
    """

    def __init__(self, devices: int | None = None, overrides: Sequence[str] = ()) -> None:
        self.devices = devices
        self.overrides = list(map(str, overrides))  # plain, since launchers send it to other processes

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called once, where the sweep was started."""
        if rank() > 0:
            return
        sweep = Path(config.hydra.sweep.dir)
        jobs = sum(folder.name.isdecimal() for folder in sweep.iterdir())
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = self.devices or max(1, min(8, jobs, len(gpus()) or cores))
        settings: dict[str, object] = {"runs": [sweep], "hydra.run.dir": sweep / "comparison", "devices": devices}
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(CONF.parent), os.environ.get("PYTHONPATH", "")]),
        }
        if any(sweep.glob("*/wandb_id.txt")):  # that runs which W&B logs leave
            settings["wandb"] = True
        own = set(map(key_of, self.overrides))
        words = [f"{name}={literal(value)}" for name, value in settings.items() if name not in own]
        done = subprocess.run(
            [sys.executable, "-m", "src.compare", *words, *self.overrides], env=environment, check=False
        )
        if done.returncode:
            warnings.warn(
                f"the jobs of the sweep are done, but comparing them failed (status {done.returncode}, see above): try "
                f"again with {command('compare', format_override('runs', [sweep]))}",
                stacklevel=2,
            )
