"""A resumed run uses the optimizer settings of the resuming command, at the learning rate of its step."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from src.runs.build import build, close_run, start_run
from src.runs.fit import save_last_checkpoint
from src.training.checkpoints import read_checkpoint
from tests.conftest import TINY, compose, train_tiny

PLAIN = ("optimizer.lr=2e-3", "validate_every=100", "~callbacks.bits_per_dim")
WARM = (*PLAIN, "lr_scheduler.warmup_steps=50")
"""Settings common to the runs of this module."""


def train_alone(folder: Path, *overrides: str) -> None:
    """Train as `src.train` does, without its slow final pictures."""
    cfg = compose("train", *TINY, *overrides, f"run_dir='{folder}'")
    run = build(cfg)
    start_run(run)
    run.trainer.fit(run.module, datamodule=run.data, ckpt_path=run.resume_from, weights_only=True)
    save_last_checkpoint(run)
    close_run(run)


def rates(folder: Path, first: int = 0) -> list[float]:
    """Return the logged learning rates of the steps from `first` on; each step must be logged once."""
    logged = []
    for log in sorted((folder / "logs").glob("version_*/metrics.csv")):
        with log.open(newline="") as file:
            logged += [(int(row["step"]), float(row["lr"])) for row in csv.DictReader(file) if row.get("lr")]
    assert [step for step, _ in logged] == list(range(len(logged)))
    return [rate for _, rate in logged[first:]]


def formula(decay: str, lr: float, warmup: int, total: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the step: linear warm-up times a decay that ends at `total`."""
    fall = {
        "constant": lambda step: 1.0,
        "linear": lambda step: (total - step) / total,
        "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * step / total)),
    }[decay]
    return lambda step: lr * min(1, (step + 1) / warmup) * fall(step)


def test_extended_run_logs_each_rate_once(tmp_path):
    """Also if its last step was validated."""
    folder = tmp_path / "run"
    often = ("validate_every=2", *WARM[:1], *WARM[2:])
    for steps in (4, 8):
        again = [f"resume='{folder}'"] if steps > 4 else []
        train_tiny(folder, *often, f"trainer.max_steps={steps}", *again)
    assert rates(folder, first=4) == pytest.approx([1e-4, 9e-5, 7e-5, 4e-5], rel=1e-6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of a run of four steps for each learning-rate schedule."""
    folders = {}
    for name in ("linear", "cosine", "constant"):
        folders[name] = tmp_path_factory.mktemp("finished") / name
        train_alone(folders[name], *WARM, f"lr_scheduler={name}", "trainer.max_steps=4")
        assert rates(folders[name]) == pytest.approx([*map(formula(name, 2e-3, 50, 4), range(4))], rel=1e-6)
    return folders


def resumed(run: Path, folder: Path, *settings: str) -> list[float]:
    """Resume a copy of `run` with these settings and return the rates of the steps from 4 on."""
    shutil.copytree(run, folder)
    train_alone(folder, *WARM, "trainer.max_steps=8", f"resume='{folder}'", *settings)
    return rates(folder, first=4)


def test_first_step_after_resume_has_its_own_rate(tmp_path, capsys):
    """By the command, with manually computed values: 2e-3, 50 steps of warm-up, decay over 8."""
    folder = tmp_path / "run"
    train_tiny(folder, *WARM, "trainer.max_steps=4")
    train_tiny(folder, *WARM, "trainer.max_steps=8", f"resume='{folder}'")
    assert rates(folder, first=4) == pytest.approx([1e-4, 9e-5, 7e-5, 4e-5], rel=1e-6)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    metrics = train_tiny(folder, *WARM, "trainer.max_steps=8", f"resume='{folder}'")
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert "finished: all 8 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_more_steps_continue_the_longer_schedule(finished, tmp_path):
    for name, run in finished.items():
        got = resumed(run, tmp_path / name, f"lr_scheduler={name}")
        assert got == pytest.approx([*map(formula(name, 2e-3, 50, 8), range(4, 8))], rel=1e-6), name


def test_changed_learning_rate_settings_take_effect(finished, tmp_path):
    for k, (settings, expected) in enumerate(
        {
            ("lr_scheduler=cosine",): formula("cosine", 2e-3, 50, 8),
            ("lr_scheduler=constant", "optimizer.lr=1e-3"): formula("constant", 1e-3, 50, 8),
            ("lr_scheduler=linear", "lr_scheduler.warmup_steps=6"): formula("linear", 2e-3, 6, 8),
            ("lr_scheduler=linear", "lr_scheduler.decay=cosine", "optimizer.lr=5e-4"): formula("cosine", 5e-4, 50, 8),
        }.items()
    ):
        got = resumed(finished["linear"], tmp_path / str(k), *settings)
        assert got == pytest.approx([*map(expected, range(4, 8))], rel=1e-6), settings


def test_torch_schedulers_continue_as_if_uninterrupted(tmp_path):
    """CosineAnnealingLR computes each rate from the previous one, and its length is fixed at construction."""
    schedule = (
        "lr_scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingLR",
        "~lr_scheduler.warmup_steps",
        "~lr_scheduler.decay",
        "trust=true",
    )
    folder = tmp_path / "run"
    train_alone(folder, *PLAIN, *schedule, "trainer.max_steps=4")
    train_alone(folder, *PLAIN, *schedule, "trainer.max_steps=8", f"resume='{folder}'")
    expected = [*map(formula("cosine", 2e-3, 1, 4), range(4)), *map(formula("cosine", 2e-3, 1, 8), range(4, 8))]
    assert rates(folder) == pytest.approx(expected, rel=1e-6)


def groups(folder: Path) -> list[dict]:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"]


def test_optimizer_settings_take_effect_in_every_group(tmp_path):
    """A learned schedule is a second group without weight decay."""
    settings = (*WARM, "schedule=learned", "lr_scheduler=constant")
    folder = tmp_path / "run"
    train_alone(folder, *settings, "trainer.max_steps=2")
    changed = ("optimizer.weight_decay=0.25", "optimizer.betas=[0.8,0.99]", "+optimizer.eps=1e-6", "optimizer.lr=1e-3")
    with pytest.warns(UserWarning, match=r"optimizer.weight_decay: 0.01 -> 0.25"):
        train_alone(folder, *settings, "trainer.max_steps=4", f"resume='{folder}'", *changed)
    assert [group["weight_decay"] for group in groups(folder)] == [0.25, 0.0]
    for group in groups(folder):
        assert list(group["betas"]) == [0.8, 0.99] and group["eps"] == 1e-6
        assert group["initial_lr"] == 1e-3 and group["lr"] == pytest.approx(1e-3 * 5 / 50)


def test_resumed_steps_use_the_new_weight_decay(finished, tmp_path):
    """AdamW subtracts lr * decay * weight in addition to Adam's step, which is equal for equal weights."""
    before = read_checkpoint(finished["constant"] / "checkpoints" / "last.ckpt")["current_model_state"]
    weights = {}
    for decay in (0.0, 5.0):
        folder = tmp_path / str(decay)
        setting = ("lr_scheduler=constant", f"optimizer.weight_decay={decay}", "trainer.max_steps=5")
        resumed(finished["constant"], folder, *setting)
        weights[decay] = read_checkpoint(folder / "checkpoints" / "last.ckpt")["current_model_state"]
    lr = formula("constant", 2e-3, 50, 5)(4)
    for name, weight in weights[0.0].items():
        torch.testing.assert_close(weights[5.0][name] - weight, -lr * 5.0 * before[name], rtol=1e-3, atol=1e-7)


def test_rate_halved_by_the_guard_stays_halved(tmp_path, monkeypatch):
    """Two bad steps halve the rate from the fourth step on; a changed rate is halved too."""
    from src.training.module import DiffusionModule

    original = DiffusionModule.training_step
    bad = {2, 3}

    def training_step(self, batch, batch_idx):
        out = original(self, batch, batch_idx)
        if self.global_step in bad:
            bad.remove(self.global_step)
            out["loss"] = out["loss"] * math.nan
        return out

    settings = (*WARM, "callbacks.nan_guard.patience=2", "lr_scheduler=linear", "checkpoint_every=1")
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionModule, "training_step", training_step)
        with pytest.warns(UserWarning, match="rolled back"):
            train_alone(tmp_path / "run", *settings, "trainer.max_steps=6")
    rate = formula("linear", 2e-3, 50, 6)
    assert rates(tmp_path / "run") == pytest.approx([*map(rate, range(4)), rate(4) / 2, rate(5) / 2], rel=1e-6)
    for lr in (2e-3, 1e-3):
        folder = tmp_path / str(lr)
        shutil.copytree(tmp_path / "run", folder)
        change = f"optimizer.lr={lr}"
        train_alone(folder, *settings, "trainer.max_steps=9", f"resume='{folder}'", change)
        assert rates(folder, first=6) == pytest.approx([formula("linear", lr, 50, 9)(s) / 2 for s in (6, 7, 8)])


def test_optimizer_with_other_state_is_refused(finished, tmp_path):
    for change, name in (
        (["+optimizer.amsgrad=true"], "max_exp_avg_sq"),
        (["optimizer._target_=torch.optim.Adagrad", "~optimizer.betas", "optimizer.fused=null"], "sum"),
    ):
        with pytest.raises(ValueError, match=rf"optimizer.*{name}"):
            resumed(finished["linear"], tmp_path / name, *change)


def test_fewer_steps_than_taken_are_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.max_steps=3"):
        resumed(finished["linear"], tmp_path / "run", "trainer.max_steps=3")
