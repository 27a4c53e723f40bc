"""Runs that stop at any moment resume to the same result."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from src.config.search_path import CONF
from src.errors import UsageError
from src.runs import lock
from src.training.checkpoints import read_checkpoint
from tests.conftest import train_tiny
from tests.runs.test_runs import assert_equal_bits, losses, weights


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not during collection."""
    global DiffusionModule, GracefulShutdown
    from src.training.callbacks.graceful_shutdown import GracefulShutdown
    from src.training.module import DiffusionModule


def during_validation(monkeypatch, act):
    """Call `act` in the second batch of the first validation, after step 3."""
    original = DiffusionModule.validation_step

    def validation_step(self, batch, batch_idx):
        if self.global_step == 3 and batch_idx == 1:
            act()
        original(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "validation_step", validation_step)


def during_sampling(monkeypatch, act, number):
    """Call `act` while `number` samples are drawn: 4 during training, 64 after it."""
    original = DiffusionModule.sample_distributed

    def sample_distributed(self, count, seed):
        for k, x in enumerate(original(self, count, seed)):
            if k == 1 and count == number:
                act()
            yield x

    monkeypatch.setattr(DiffusionModule, "sample_distributed", sample_distributed)


def assert_same_results(folder, other):
    """Compare weights, logged losses, the best checkpoint and the names of pictures."""
    for key in ("state_dict", "current_model_state"):
        assert_equal_bits(weights(folder, key), weights(other, key))
    assert losses(folder) == losses(other)
    assert losses(folder, "val/loss") == losses(other, "val/loss")
    best, same = (read_checkpoint(f / "checkpoints" / "best.ckpt") for f in (folder, other))
    assert_equal_bits(best["state_dict"], same["state_dict"])
    assert sorted(p.name for p in (folder / "samples").iterdir()) == sorted(
        p.name for p in (other / "samples").iterdir()
    )


@pytest.mark.parametrize("moment", ["validation", "grid", "trajectory"])
def test_signal_saves_during_validation_and_sampling(trained, tmp_path, monkeypatch, capsys, moment):
    """The run saves at once. Resumed, it repeats what the signal interrupted."""
    folder = tmp_path / "run"

    def act():
        os.kill(os.getpid(), signal.SIGTERM)

    if moment == "validation":
        during_validation(monkeypatch, act)
    else:
        during_sampling(monkeypatch, act, 4 if moment == "grid" else 64)
    with pytest.raises(SystemExit) as stop:
        train_tiny(folder)
    assert stop.value.code == 143
    assert f"saved at step {6 if moment == 'trajectory' else 3}" in capsys.readouterr().out
    assert not (folder / "metrics.json").exists()
    assert len(list((folder / "samples").glob("*.png"))) == (2 if moment == "trajectory" else 0)
    monkeypatch.undo()
    metrics = train_tiny(folder, f"resume='{folder}'")
    assert metrics["val/loss"] == json.loads((trained / "metrics.json").read_text())["val/loss"]
    if moment == "trajectory":  # The resumed run validates again, since the checkpoint has no metrics.
        assert losses(folder, "val/loss")[-1:] == losses(folder, "val/loss")[-2:-1]
        log = sorted((folder / "logs").iterdir())[-1]
        (log / "metrics.csv").unlink()
    assert_same_results(folder, trained)


def test_resumed_run_repeats_an_interrupted_validation(trained, tmp_path, monkeypatch):
    """The checkpoint of the same step precedes the validation."""

    def act():
        raise RuntimeError("power failure")

    during_validation(monkeypatch, act)
    with pytest.raises(RuntimeError, match="power failure"):
        train_tiny(tmp_path / "run", "checkpoint_every=3")
    monkeypatch.undo()
    train_tiny(tmp_path / "run", f"resume='{tmp_path / 'run'}'", "checkpoint_every=100")
    assert_same_results(tmp_path / "run", trained)


def test_resumed_run_has_the_same_dropout_masks(tmp_path, monkeypatch):
    from tests.runs.test_runs import runs_until

    settings = ["model.dropout=0.5", "data.num_workers=2", "data.microbatch_size=32"]
    train_tiny(tmp_path / "uninterrupted", *settings)
    runs_until(monkeypatch, stop_after=4)
    with pytest.raises(SystemExit):
        train_tiny(tmp_path / "stopped", *settings)
    monkeypatch.undo()
    torch.manual_seed(7)  # another state than that of a fresh process
    train_tiny(tmp_path / "stopped", *settings, f"resume='{tmp_path / 'stopped'}'")
    assert_same_results(tmp_path / "stopped", tmp_path / "uninterrupted")


def test_sampling_uses_the_microbatch_of_training(tmp_path, monkeypatch):
    """The network gets at most a micro-batch, also for the 64 samples at the end."""
    batch_sizes = []
    original = DiffusionModule._call_network

    def denoise(self, net, x, t, cond, augment=None):
        batch_sizes.append(len(x))
        return original(self, net, x, t, cond, augment)

    monkeypatch.setattr(DiffusionModule, "_call_network", denoise)
    train_tiny(tmp_path / "run", "data.microbatch_size=8", "trainer.max_steps=1", "callbacks.samples.num_samples=20")
    assert (
        max(batch_sizes) < 16 and batch_sizes.count(4) == 3
    )  # Validation has up to twice as many; 20 samples split into 8, 8 and 4.
    assert sum(size == 8 for size in batch_sizes) >= 3 * (64 // 8 + 2)


def test_signal_during_all_gather_counts_at_the_next_one(tmp_path):
    """The signal arrives while this process reports to the others that it has none."""
    stop = GracefulShutdown(str(tmp_path / "last.ckpt"))
    ours = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    arrives = [signal.SIGTERM]

    def all_gather(mine):
        gathered = torch.stack([mine, torch.zeros_like(mine)])
        for number in arrives:
            stop._request_stop(number, None)
        arrives.clear()
        return gathered

    ours.strategy.all_gather = all_gather
    assert not stop._stop_agreed(ours)
    stop._next_collective = 0
    assert stop._stop_agreed(ours) and stop.signal == signal.SIGTERM


def test_signal_in_the_last_step_saves(trained, tmp_path, monkeypatch, capsys):
    """The run saves a checkpoint; the resumed run makes the pictures."""
    from tests.runs.test_runs import runs_until

    folder = tmp_path / "run"
    runs_until(monkeypatch, stop_after=6, number=signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        train_tiny(folder, "validate_every=4")
    assert stop.value.code == 143 and "saved at step 6" in capsys.readouterr().out
    assert not (folder / "metrics.json").exists()
    monkeypatch.undo()
    assert train_tiny(folder, "validate_every=4", f"resume='{folder}'")["steps"] == 6
    for key in ("state_dict", "current_model_state"):
        assert_equal_bits(weights(folder, key), weights(trained, key))


def test_lock_keeps_other_processes_out_of_a_folder(tmp_path, monkeypatch):
    """The operating system releases the lock when its process ends, however it ends."""
    code = "import sys; from pathlib import Path; from src.runs.lock import lock_run_dir; "
    code += f"lock_run_dir(Path({str(tmp_path / 'run')!r})); print('held', flush=True); sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    other = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with monkeypatch.context() as patch:
            patch.setattr(lock, "WAIT_S", 0)
            with pytest.raises(UsageError, match=r"another process trains in .*run: wait for it or stop it"):
                train_tiny(tmp_path / "run")
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    finally:
        other.kill()
        other.wait()
    assert train_tiny(tmp_path / "run", "trainer.max_steps=1")["steps"] == 1
