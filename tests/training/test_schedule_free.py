"""The schedule-free optimizer: training at y, evaluation at the average x."""

import json
import shutil
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from src.runs.build import build, close_run
from src.training.callbacks.schedule_free import adamw_schedule_free
from src.training.checkpoints import read_checkpoint
from tests.conftest import TINY, compose, once, train_tiny
from tests.fork_server import run_ranks

FREE = ["optimizer=schedule_free", "optimizer.lr=0.01", "lr_scheduler.warmup_steps=2", "validate_every=2",
        "callbacks.bits_per_dim=null", "neighbors.num_samples=0"]  # fmt: skip


def last(folder):
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ValueError, match=r"optimizer=schedule_free .*pip install schedulefree"):
        adamw_schedule_free([{"params": [nn.Parameter(torch.zeros(2))]}])


def test_saved_average_is_that_of_the_steps(tmp_path):
    """x is the mean of z over the steps, weighted by the squared learning rate of the warm-up (arXiv 2405.15682)."""
    pytest.importorskip("schedulefree")
    x, total = None, 0.0
    for steps in (1, 2, 3, 4):
        train_tiny(tmp_path / str(steps), *FREE, f"trainer.max_steps={steps}")
        checkpoint = last(tmp_path / str(steps))
        names = [name for name in checkpoint["current_model_state"] if name.startswith("net.")]
        z = [checkpoint["optimizer_states"][0]["state"][k]["z"] for k in range(len(names))]
        weight = min(1, steps / 2) ** 2
        total += weight
        x = z if x is None else [a + weight / total * (b - a) for a, b in zip(x, z, strict=True)]
        for name, ours, theirs in zip(names, x, z, strict=True):
            assert_close(checkpoint["state_dict"][name], ours, rtol=1e-4, atol=1e-6)
            assert_close(checkpoint["current_model_state"][name], 0.1 * theirs + 0.9 * ours, rtol=1e-4, atol=1e-6)


def test_resumes_with_equal_bits(tmp_path):
    """Across validations, which evaluate the average; another optimizer is refused."""
    pytest.importorskip("schedulefree")
    for name, steps in (("whole", 6), ("parts", 3)):
        train_tiny(tmp_path / name, *FREE, f"trainer.max_steps={steps}")
    shutil.copytree(tmp_path / "parts", tmp_path / "copy")
    train_tiny(tmp_path / "parts", *FREE, "trainer.max_steps=6", f"resume='{tmp_path / 'parts'}'")
    ours, theirs = last(tmp_path / "parts"), last(tmp_path / "whole")
    for key in ("current_model_state", "state_dict"):
        assert all(torch.equal(ours[key][name], theirs[key][name]) for name in ours[key])
    words = ["optimizer=adamw", "lr_scheduler=constant", "trainer.max_steps=6", f"resume='{tmp_path / 'copy'}'"]
    with pytest.raises(ValueError, match=r"optimizer\.\*"):
        close_run(build(compose("train", *TINY, *FREE[3:], *words)))


def test_validations_do_not_change_training(tmp_path):
    pytest.importorskip("schedulefree")
    for every in (1, 100):
        words = [word for word in FREE if not word.startswith("validate_every")]
        train_tiny(tmp_path / str(every), *words, f"validate_every={every}", "trainer.max_steps=3")
    ours, theirs = (last(tmp_path / name) for name in ("1", "100"))
    for key in ("current_model_state", "state_dict"):
        assert all(torch.equal(ours[key][name], theirs[key][name]) for name in ours[key])


def test_averages_of_any_length_are_refused(tmp_path):
    """They would average y, with which nothing is evaluated."""
    words = ["optimizer=schedule_free", "callbacks.power_ema.lengths=[0.05,0.1]", f"run_dir='{tmp_path}'"]
    with pytest.raises(ValueError, match=r"callbacks\.power_ema\.lengths=\[0\.05,0\.1\].*schedule_free") as error:
        build(compose("train", *TINY, *words))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_two_processes_average_like_one(tmp_path):
    pytest.importorskip("schedulefree")
    settings = [*FREE, "optimizer.lr=1e-3", "trainer.max_steps=3"]
    train_tiny(tmp_path / "alone", *settings)
    (tmp_path / "cwd").mkdir()
    words = once(*TINY, *settings, "trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true",
                 "trainer.devices=2")  # fmt: skip
    for done in run_ranks(2, "-m", "src.train", *words, f"hydra.run.dir={tmp_path / 'two'}", cwd=tmp_path / "cwd"):
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    ours, theirs = last(tmp_path / "two"), last(tmp_path / "alone")
    for key in ("current_model_state", "state_dict"):
        for name in theirs[key]:
            assert_close(ours[key][name], theirs[key][name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sharded_run_resumes_with_equal_bits(tmp_path):
    """From the step of a validation, with a learning rate so large that no later validation is the best."""
    pytest.importorskip("schedulefree")
    sharded = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2"]
    words = once(*TINY, *FREE, *sharded, "optimizer.lr=0.1", "checkpoint_every=100")
    jobs = [
        ["src.train", *words, f"trainer.max_steps={steps}", f"{where}={tmp_path / folder}"]
        for where, folder, steps in (
            ("hydra.run.dir", "whole", 6),
            ("hydra.run.dir", "parts", 4),
            ("resume", "parts", 6),
        )
    ]
    (tmp_path / "cwd").mkdir()
    for done in run_ranks(2, "-m", "tests.distributed.jobs", cwd=tmp_path / "cwd", JOBS=json.dumps(jobs)):
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    ours, theirs = last(tmp_path / "parts"), last(tmp_path / "whole")
    assert ours["global_step"] == theirs["global_step"] == 6
    for key in ("current_model_state", "state_dict"):
        assert all(torch.equal(ours[key][name], theirs[key][name]) for name in ours[key])
