"""A resumed run continues its W&B run, by the commands that a user types, without a network."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from src.config.resume import expand_resume
from src.errors import UsageError
from tests.conftest import TINY
from tests.integration.test_refused import command
from tests.runs.test_runs import runs_until
from tests.wandb_file import read_offline

TYPED = [*TINY, "validate_every=100", "~callbacks.bits_per_dim", "trainer.max_steps=6"]
SLURM_ENVIRONMENT = {
    "SLURM_JOB_ID": "5",
    "SLURM_JOB_NAME": "train",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
}
"""The environment of a task of a SLURM job."""


@pytest.fixture
def stopped(tmp_path, monkeypatch, no_network) -> Path:
    """Return a run that a signal of SLURM stopped after three of six steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    for name, value in SLURM_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch:
        runs_until(patch, stop_after=3, number=signal.SIGUSR1)
        status = command(patch, "train", *TYPED, "logger=[csv,tensorboard,wandb]", "hydra.run.dir=5", "resume=auto")
    assert status == 128 + signal.SIGUSR1
    return tmp_path / "5"


def test_requeued_and_extended_runs_keep_their_wandb_run(stopped, tmp_path, monkeypatch):
    """A requeued job has `resume=auto`; then a user resumes with more steps."""
    name = (stopped / "wandb_id.txt").read_text().strip()
    assert any(path.is_symlink() and not path.resolve().is_relative_to(stopped) for path in stopped.rglob("*"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    typed_overrides = [*TYPED, "logger=[csv,tensorboard,wandb]", "hydra.run.dir=5", "resume=auto"]
    assert command(monkeypatch, "train", *typed_overrides) == 0
    for variable in (*SLURM_ENVIRONMENT, "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(variable)
    assert command(monkeypatch, "train", "resume=5", "trainer.max_steps=8") == 0
    assert (stopped / "wandb_id.txt").read_text().strip() == name
    steps = []
    parts = sorted((stopped / "wandb").glob("offline-run-*"))  # sorted by time
    for k, part in enumerate(parts):
        # A link and not a copy: W&B may still be writing the end of the file.
        (tmp_path / "parts" / str(k)).mkdir(parents=True)
        (tmp_path / "parts" / str(k) / part.name).symlink_to(part)
        read = read_offline(tmp_path / "parts" / str(k))
        assert read.run.run_id == name
        steps += read.steps("train/loss")
    assert len(parts) == 3 and steps == [*range(8)]


def test_links_out_of_the_run_folder_are_refused(tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("- seed=1\n")
    for part in ("run-20260101_000000-abc", "offline-run-20260101_000000-abc"):  # two versions of W&B
        (folder / "wandb" / part / "logs").mkdir(parents=True)
        (folder / "wandb" / part / "logs" / "debug-core.log").symlink_to(outside / "core.log")
    (folder / "wandb" / "latest-run").symlink_to("run-20260101_000000-abc")
    expand_resume([f"resume={folder}"])
    for name in (
        "checkpoints",
        "checkpoints/last.ckpt",
        ".hydra/config.yaml",
        ".lock",
        "train.log",
        "metrics.json",
        "wandb_id.txt",
        "samples",
        "logs/version_1",
        "tensorboard",
        "wandb/debug.log",
        "wandb/run-20260202_000000-abc",
        "wandb/run-20260101_000000-abc/files",
        "wandb/run-20260101_000000-abc/logs/debug.log",
        "wandb/run-20260101_000000-abc/files/debug-core.log",
        "debug-core.log",
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(outside)
        with pytest.raises(UsageError, match="out of the run's folder") as error:
            expand_resume([f"resume={folder}"])
        assert name in str(error.value)
        path.unlink()
    shutil.move(folder / "wandb", outside)
    os.symlink(outside, folder / "wandb")
    with pytest.raises(UsageError, match="wandb links out"):
        expand_resume([f"resume={folder}"])
