"""Faults done to real processes: a run that was killed goes on, and ends as if it had not been.

One kill by default; `make test-faults` does twenty.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from src.checkpoints import read_checkpoint
from tests.conftest import TINY

KILLS = int(os.environ.get("FAULT_KILLS", "1"))
STEPS = 60 * (KILLS + 1)
SETTINGS = [
    *TINY,
    f"trainer.max_steps={STEPS}",
    "validate_every=40",
    "checkpoint_every=10",
    "timesteps=importance",
    "timesteps.bins=4",
]


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "src.train", *SETTINGS, "resume=auto", f"hydra.run.dir={folder}"]
    log = (folder.parent / f"{folder.name}.log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(tmp_path):
    """SIGKILL at seeded random moments: in a step, in a save, in a validation, while samples are drawn."""
    assert start(tmp_path / "undisturbed").wait(600) == 0
    moments, folder = random.Random(0), tmp_path / "killed"
    for _ in range(KILLS):
        began, process = time.time(), start(folder)
        while not any(p.stat().st_mtime > began for p in (folder / "checkpoints").glob("*.ckpt")):
            time.sleep(0.02)
            assert process.poll() is None, (tmp_path / "killed.log").read_text()[-3000:]
            assert time.time() < began + 300
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed: raise the number of steps"
    assert start(folder).wait(600) == 0, (tmp_path / "killed.log").read_text()[-3000:]
    ours, theirs = (read_checkpoint(tmp_path / n / "checkpoints" / "last.ckpt") for n in ("killed", "undisturbed"))
    assert ours["global_step"] == theirs["global_step"] == STEPS
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, theirs[key][name]) for name, value in ours[key].items())
    assert not list((folder / "checkpoints").glob("*.partial"))
