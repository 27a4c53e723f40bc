"""Runs that are stopped at any moment, and end as if they had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from src.config.overrides import CONF
from src.errors import UsageError
from src.training.checkpoints import read_checkpoint
from tests.conftest import train_tiny
from tests.runs.test_runs import assert_equal_bits, losses, weights


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import what takes seconds here, since every collection of the tests would pay for it above."""
    global DiffusionModule, GracefulShutdown
    from src.training.callbacks.graceful_shutdown import GracefulShutdown
    from src.training.module import DiffusionModule


def in_validation(monkeypatch, act):
    """`act` in the second batch of the first validation, which is after step 3."""
    original = DiffusionModule.validation_step

    def validation_step(self, batch, batch_idx):
        if self.global_step == 3 and batch_idx == 1:
            act()
        original(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "validation_step", validation_step)


def among_samples(monkeypatch, act, number):
    """`act` while so many samples are drawn: 4 in training, 64 after it."""
    original = DiffusionModule.sample_distributed

    def sample_distributed(self, count, seed):
        for k, x in enumerate(original(self, count, seed)):
            if k == 1 and count == number:
                act()
            yield x

    monkeypatch.setattr(DiffusionModule, "sample_distributed", sample_distributed)


def assert_ended_as(folder, other):
    """In weights, in what was logged, in what was found best, and with as many pictures."""
    for key in ("state_dict", "current_model_state"):
        assert_equal_bits(weights(folder, key), weights(other, key))
    assert losses(folder) == losses(other)
    assert losses(folder, "val/loss") == losses(other, "val/loss")
    best, same = (read_checkpoint(f / "checkpoints" / "best.ckpt") for f in (folder, other))
    assert_equal_bits(best["state_dict"], same["state_dict"])
    assert sorted(p.name for p in (folder / "samples").iterdir()) == sorted(
        p.name for p in (other / "samples").iterdir()
    )


@pytest.mark.parametrize("moment", ["validation", "grid", "film"])
def test_a_signal_is_answered_wherever_it_comes(trained, tmp_path, monkeypatch, capsys, moment):
    """Within a validation and between the steps of sampling it is saved at once; what was cut short is made up for."""
    folder = tmp_path / "run"

    def act():
        os.kill(os.getpid(), signal.SIGTERM)

    if moment == "validation":
        in_validation(monkeypatch, act)
    else:
        among_samples(monkeypatch, act, 4 if moment == "grid" else 64)
    with pytest.raises(SystemExit) as stop:
        train_tiny(folder)
    assert stop.value.code == 143
    assert f"saved at step {6 if moment == 'film' else 3}" in capsys.readouterr().out
    assert not (folder / "metrics.json").exists()
    assert len(list((folder / "samples").glob("*.png"))) == (2 if moment == "film" else 0)
    monkeypatch.undo()
    metrics = train_tiny(folder, f"resume='{folder}'")
    assert metrics["val/loss"] == json.loads((trained / "metrics.json").read_text())["val/loss"]
    if moment == "film":  # whose run validates once more, since the figure is not in the checkpoint
        assert losses(folder, "val/loss")[-1:] == losses(folder, "val/loss")[-2:-1]
        log = sorted((folder / "logs").iterdir())[-1]
        (log / "metrics.csv").unlink()
    assert_ended_as(folder, trained)


def test_a_validation_in_which_a_run_died_is_made_up_for(trained, tmp_path, monkeypatch):
    """The checkpoint was saved just before it, at the same step."""

    def act():
        raise RuntimeError("the lights went out")

    in_validation(monkeypatch, act)
    with pytest.raises(RuntimeError, match="lights"):
        train_tiny(tmp_path / "run", "checkpoint_every=3")
    monkeypatch.undo()
    train_tiny(tmp_path / "run", f"resume='{tmp_path / 'run'}'", "checkpoint_every=100")
    assert_ended_as(tmp_path / "run", trained)


def test_dropout_is_drawn_as_if_the_run_had_gone_on(tmp_path, monkeypatch):
    from tests.runs.test_runs import runs_until

    settings = ["model.dropout=0.5", "data.num_workers=2", "data.microbatch_size=32"]
    train_tiny(tmp_path / "whole", *settings)
    runs_until(monkeypatch, stop_after=4)
    with pytest.raises(SystemExit):
        train_tiny(tmp_path / "stopped", *settings)
    monkeypatch.undo()
    torch.manual_seed(7)  # as in a process that has drawn something else before
    train_tiny(tmp_path / "stopped", *settings, f"resume='{tmp_path / 'stopped'}'")
    assert_ended_as(tmp_path / "stopped", tmp_path / "whole")


def test_samples_do_not_ask_for_more_memory_than_training_does(tmp_path, monkeypatch):
    """The network never sees more than a micro-batch, though 64 samples are drawn at the end."""
    seen = []
    original = DiffusionModule._call_network

    def denoise(self, net, x, t, cond):
        seen.append(len(x))
        return original(self, net, x, t, cond)

    monkeypatch.setattr(DiffusionModule, "_call_network", denoise)
    train_tiny(tmp_path / "run", "data.microbatch_size=8", "trainer.max_steps=1", "callbacks.samples.num_samples=20")
    assert max(seen) < 16 and seen.count(4) == 3  # validation has up to twice as many, 20 samples go 8, 8 and 4
    assert sum(size == 8 for size in seen) >= 3 * (64 // 8 + 2)


def test_a_signal_that_comes_while_processes_agree_is_answered_the_next_time(tmp_path):
    """Here at the very moment at which this process tells the others that it has none."""
    stop = GracefulShutdown(str(tmp_path / "last.ckpt"))
    ours = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    arrives = [signal.SIGTERM]

    def all_gather(mine):
        told = torch.stack([mine, torch.zeros_like(mine)])
        for number in arrives:
            stop._request_stop(number, None)
        arrives.clear()
        return told

    ours.strategy.all_gather = all_gather
    assert not stop._stop_agreed(ours)
    stop._next_collective = 0
    assert stop._stop_agreed(ours) and stop.signal == signal.SIGTERM


def test_a_signal_in_the_last_step_is_answered(trained, tmp_path, monkeypatch, capsys):
    """No step comes after it; all is saved, and the pictures are left for later."""
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


def test_two_processes_do_not_train_in_one_folder(tmp_path, monkeypatch):
    """The lock is the process's: it goes with it, however that ends."""
    code = f"import sys; from pathlib import Path; from src.runs.build import lock_run_dir; lock_run_dir(Path({str(tmp_path / 'run')!r}));"
    code += "print('held', flush=True); sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    other = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout and other.stdout.readline() == b"held\n"
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", lambda _: None)
            with pytest.raises(UsageError, match=r"another process trains in .*run: wait for it or stop it"):
                train_tiny(tmp_path / "run")
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    finally:
        other.kill()
        other.wait()
    assert train_tiny(tmp_path / "run", "trainer.max_steps=1")["steps"] == 1
