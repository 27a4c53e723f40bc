"""Hydra callbacks for sweeps: `hydra/callbacks=compare`."""

import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from src.config.overrides import key_of
from src.config.search_path import CONF
from src.config.sweeps import parallel_jobs
from src.distributed.ranks import rank
from src.quoting import command, format_override, literal


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
