"""Faults in real processes: a killed run resumes and ends with the same results.

FAULT_KILLS=1 kills once instead of twenty times.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from torch.testing import assert_close

from src.training.checkpoints import read_checkpoint
from tests.conftest import HANG_SECONDS, TINY, train_tiny
from tests.runs.test_runs import assert_equal_bits, losses

KILLS = int(os.environ.get("FAULT_KILLS", "20"))
SETTINGS = [
    *TINY,
    "model.dropout=0.2",
    f"trainer.max_steps={40 * (KILLS + 2)}",
    "validate_every=20",
    "checkpoint_every=10",
    "timestep_sampler=importance",
    "timestep_sampler.num_bins=4",
]
DURATIONS = {"step": 0.02, "epoch's end": 0.02, "save": 0.04, "validation": 0.05, "sampling": 0.02}
"""Approximate duration of each phase, in seconds."""


@pytest.mark.faults
def test_run_killed_many_times_ends_with_the_same_weights(tmp_path):
    """SIGKILL comes at seeded random moments of saves, validations, steps, sampling and ends of epochs."""
    generator, folder, died = random.Random(0), tmp_path / "killed", Counter[str]()
    command = [sys.executable, "-m", "src.train", *SETTINGS, "resume=auto", f"hydra.run.dir={folder}"]
    command += ["+callbacks.kill._target_=tests.faults.Kill", "trust=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILL_NOTES": str(tmp_path / "notes")}
    phases = ("save", "validation", "step", "sampling", "epoch's end")
    with (tmp_path / "log").open("ab") as log:
        for kill in range(KILLS):
            phase = phases[kill % len(phases)]
            number = generator.randint(
                2, 30 if phase == "step" else 2
            )  # In other phases the second, after some good steps.
            seconds = generator.uniform(0, DURATIONS[phase])
            killed = {**environment, "KILL": f"{phase} {number} {seconds}"}
            done = subprocess.run(command, stdout=log, stderr=log, env=killed, timeout=HANG_SECONDS)
            assert done.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
            died[(tmp_path / "notes").read_text()] += 1
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=HANG_SECONDS)
    assert done.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    print(f"{KILLS} kills: {dict(died)}")
    train_tiny(tmp_path / "uninterrupted", *SETTINGS)
    assert_same_checkpoints(folder, tmp_path / "uninterrupted")
    assert not list((folder / "checkpoints").glob("*.partial"))
    names = [{p.name for p in (f / "samples").iterdir()} for f in (folder, tmp_path / "uninterrupted")]
    assert names[0] == names[1]


@pytest.mark.faults
def test_full_disk_neither_ends_nor_changes_a_run(tmp_path):
    """For 30 steps a limit of 2 kB per file simulates a full disk: checkpoints and the log do not fit."""
    settings = [*TINY, "trainer.max_steps=300", "validate_every=150", "checkpoint_every=25", "keep_checkpoints=2"]
    folder = tmp_path / "run"
    fault = {"_target_": "tests.faults.FullDisk", "begin": 30, "end": 60}
    command = [sys.executable, "-m", "src.train", *settings, f"hydra.run.dir={folder}", "trust=true"]
    command += [f"+callbacks.fault.{key}={value}" for key, value in fault.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=HANG_SECONDS)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output[-3000:]
    assert re.search(r"could not be written .* the run continues", output), output[-3000:]
    assert re.search(r"^[1-9]\d* checkpoints, whole: True$", output, re.MULTILINE), output[-3000:]
    train_tiny(tmp_path / "uninterrupted", *settings)
    assert_same_checkpoints(folder, tmp_path / "uninterrupted")
    assert losses(folder) == losses(tmp_path / "uninterrupted")
    assert len(list((folder / "checkpoints").glob("step_*.ckpt"))) == 2


@pytest.mark.faults
def test_run_resumes_after_a_data_worker_died(tmp_path):
    settings = [*TINY, "trainer.max_steps=60", "validate_every=40", "checkpoint_every=10", "data.num_workers=2"]
    fault = ["+callbacks.fault._target_=tests.faults.KillWorker", "+callbacks.fault.step=33"]
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "src.train", *settings, *fault, f"+callbacks.fault.once={tmp_path}/once"]
    command += [f"hydra.run.dir={folder}", "resume=auto", "trust=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first, second = (
        subprocess.run(command, env=environment, text=True, capture_output=True, timeout=HANG_SECONDS) for _ in "12"
    )
    assert first.returncode == 2 and "Traceback" not in first.stderr, first.stderr[-3000:]
    assert "a process that loads data died" in first.stderr and "data.num_workers" in first.stderr
    assert second.returncode == 0, second.stderr[-3000:]
    train_tiny(tmp_path / "uninterrupted", *settings)
    assert_same_checkpoints(folder, tmp_path / "uninterrupted")


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_run_resumes_after_one_of_two_processes_died(tmp_path, rank):
    settings = [*TINY, "trainer.max_steps=40", "validate_every=100", "checkpoint_every=10", "trainer.devices=2"]
    fault = {"_target_": "tests.faults.Stop", "rank": rank, "step": 23, "once": tmp_path / "once", "number": 9}
    settings += [f"+callbacks.fault.{key}={value}" for key, value in fault.items()]
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "src.train", *settings, f"hydra.run.dir={folder}", "resume=auto", "trust=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MARK": str(tmp_path)}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        wait_until(lambda: (tmp_path / "once").exists(), run)
        run.wait(HANG_SECONDS)
        wait_until(lambda: not processes_marked(tmp_path), None)
        assert run.returncode != 0
        assert subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=HANG_SECONDS).returncode == 0
    train_tiny(tmp_path / "alone", *TINY, *settings[len(TINY) : len(TINY) + 3])
    for key in ("state_dict", "current_model_state"):
        ours, theirs = (read_checkpoint(f / "checkpoints" / "last.ckpt")[key] for f in (folder, tmp_path / "alone"))
        for name in ours:
            assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


def processes_marked(mark: Path) -> list[str]:
    """Return the ids of the running processes with MARK in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"MARK={mark}\0".encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any] | None) -> None:
    """Wait until `condition` holds. Fails if the process ends before."""
    end = time.monotonic() + HANG_SECONDS
    while not condition():
        time.sleep(0.02)
        assert process is None or process.poll() is None, "the process ended too early"
        assert time.monotonic() < end


def assert_same_checkpoints(a: Path, b: Path) -> None:
    """Compare the last and the best checkpoint of two runs bit by bit."""
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (read_checkpoint(folder / "checkpoints" / name) for folder in (a, b))
        assert ours["global_step"] == theirs["global_step"]
        for key in ("state_dict", "current_model_state"):
            assert_equal_bits(ours[key], theirs[key])
