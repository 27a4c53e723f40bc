"""A budget of minutes fixes the number of steps once, and the learning rate ends with it. The clocks are not real."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from src.runs.build import build, close_run, start_run
from src.runs.fit import save_last_checkpoint
from src.training.checkpoints import read_checkpoint
from tests.conftest import TINY, compose, once, train_tiny
from tests.distributed.test_devices import only_run
from tests.fork_server import run_ranks
from tests.training.test_resume_lr import formula, rates


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global L, TimeBudget
    import lightning as L

    from src.training.callbacks.time_budget import TimeBudget


SETTINGS = (
    *("optimizer.lr=2e-3", "lr_scheduler.warmup_steps=5", "validate_every=1000", "checkpoint_every=25"),
    *("~callbacks.bits_per_dim", "data.batch_size=8", "keep_checkpoints=-1"),
)
HALF_A_MINUTE = ("callbacks.time_budget.minutes=0.5", "trainer.max_steps=200")


def train_by_clock(folder: Path, seconds_per_step: float, *overrides: str, validation: float = 0.0):
    """Train as `src.train` does, without final pictures, where only steps and validations take time; return the run.

    The first step takes 3 s more, as if it were compiled.
    """
    settings = once(*TINY, *SETTINGS, *overrides, f"run_dir='{folder}'")
    run = build(compose("train", *settings))
    (budget,) = run.callbacks(TimeBudget)
    spent = [0.0]

    class Spend(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            spent[0] += seconds_per_step + 3 * (trainer.global_step == 0)

        def on_validation_epoch_start(self, *_):
            spent[0] += validation

    budget.clock = lambda: spent[0]
    run.trainer.callbacks.insert(0, Spend())
    start_run(run)
    run.trainer.fit(run.module, datamodule=run.data, ckpt_path=run.resume_from, weights_only=True)
    save_last_checkpoint(run)
    close_run(run)
    return run


@pytest.fixture(scope="module")
def half_a_minute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with half a minute for steps of 0.5 s."""
    folder = tmp_path_factory.mktemp("budget") / "run"
    train_by_clock(folder, 0.5, *HALF_A_MINUTE)
    return folder


FITTING = 54
"""After 20 steps 3 + 20 x 0.5 = 13 s are over, and the other 17 s have room for 34 steps of 0.5 s."""


def last(folder: Path) -> dict:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")


def test_budget_fixes_the_number_of_steps(half_a_minute):
    record = json.loads((half_a_minute / "time_budget.json").read_text())
    assert last(half_a_minute)["global_step"] == record["num_steps"] == FITTING
    assert (record["decided_at_step"], record["seconds_per_step"], record["max_steps"]) == (20, 0.5, 200)


def test_learning_rate_ends_with_the_budget(half_a_minute):
    """Before step 20 it is that of the upper limit, 200 steps."""
    expected = [formula("linear", 2e-3, 5, 200 if step < 20 else FITTING)(step) for step in range(FITTING)]
    assert rates(half_a_minute) == pytest.approx(expected, rel=1e-6)
    assert last(half_a_minute)["optimizer_states"][0]["param_groups"][0]["lr"] == 0


def test_torch_schedulers_end_with_the_budget(tmp_path):
    """CosineAnnealingLR computes each rate from the previous one, and its length is fixed at construction."""
    schedule = ("lr_scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingLR", "~lr_scheduler.decay")
    settings = [s for s in SETTINGS if "warmup" not in s]
    cfg = once(*settings, *HALF_A_MINUTE, *schedule, "~lr_scheduler.warmup_steps")
    assert train_by_clock(tmp_path / "run", 0.5, *cfg).trainer.global_step == FITTING
    expected = [formula("cosine", 2e-3, 1, 200 if step < 20 else FITTING)(step) for step in range(FITTING)]
    assert rates(tmp_path / "run") == pytest.approx(expected, rel=1e-6)


def test_resumed_run_keeps_its_steps_and_bits(half_a_minute, tmp_path):
    """On a machine of a quarter of the speed."""
    folder = tmp_path / "run"
    shutil.copytree(half_a_minute, folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name != "step_000025.ckpt":
            path.unlink()
    run = train_by_clock(folder, 2.0, *HALF_A_MINUTE, f"resume='{folder}'")
    assert run.steps == 25 and run.trainer.global_step == FITTING
    for key in ("state_dict", "current_model_state"):
        before, after = last(half_a_minute)[key], last(folder)[key]
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_finished_budget_is_not_trained_again(half_a_minute, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(half_a_minute, folder)
    (folder / "metrics.json").write_text(json.dumps({"steps": FITTING, "val/loss": 1.0}))
    settings = once(*SETTINGS, *HALF_A_MINUTE, f"resume='{folder}'")
    assert train_tiny(folder, *settings)["steps"] == FITTING
    assert "raise callbacks.time_budget.minutes" in capsys.readouterr().out


def test_changed_minutes_are_measured_again(half_a_minute, tmp_path):
    """54 steps took 30 s of now 60; 20 more take 20 s of 1 s each, so 10 fit into the rest."""
    folder = tmp_path / "run"
    shutil.copytree(half_a_minute, folder)
    changed = ("callbacks.time_budget.minutes=1", "trainer.max_steps=200", f"resume='{folder}'")
    with pytest.warns(UserWarning, match=r"callbacks\.time_budget\.minutes"):
        run = train_by_clock(folder, 1.0, *changed)
    assert run.trainer.global_step == 54 + 20 + 10
    assert last(folder)["optimizer_states"][0]["param_groups"][0]["lr"] == 0


def test_smaller_max_steps_wins(tmp_path):
    """The limit is also the interval of validations, which take a tenth: 17 - 3 s have room for 28 steps."""
    folder = tmp_path / "run"
    assert train_by_clock(folder, 0.5, HALF_A_MINUTE[0], "trainer.max_steps=30").trainer.global_step == 30
    assert last(folder)["optimizer_states"][0]["param_groups"][0]["lr"] == 0
    # The number that fits is known, so a higher limit needs no new measurement.
    with pytest.warns(UserWarning, match=r"trainer\.max_steps"):
        run = train_by_clock(folder, 100.0, HALF_A_MINUTE[0], "trainer.max_steps=60", f"resume='{folder}'")
    assert run.trainer.global_step == 20 + 28


def test_slow_machine_trains_min_steps(tmp_path):
    """20 steps of 9 s are more than the budget; the learning rate ends with the 26 steps of the setting."""
    run = train_by_clock(tmp_path / "run", 9.0, *HALF_A_MINUTE, "callbacks.time_budget.min_steps=26")
    assert run.trainer.global_step == 26
    assert last(tmp_path / "run")["optimizer_states"][0]["param_groups"][0]["lr"] == 0


def test_validations_count(tmp_path):
    """The second of 10 steps each: 5 + 13 s are over at step 20, and the rest has room for 12 s of 1 s per step.

    A step takes 0.5 s and a tenth of a validation of 5 s.
    """
    run = train_by_clock(tmp_path / "run", 0.5, *HALF_A_MINUTE, "validate_every=10", validation=5.0)
    assert run.trainer.global_step == 20 + 12


def test_unknown_validations_take_a_tenth(tmp_path):
    """With validations every 30 steps, none is measured by step 20: 17 - 3 s have room for 28 steps."""
    assert train_by_clock(tmp_path / "run", 0.5, *HALF_A_MINUTE, "validate_every=30").trainer.global_step == 20 + 28


def test_fast_steps_are_measured_longer(tmp_path):
    """A twentieth of the budget is 1.5 s or 24 steps. Of the rest, 25.5 s, validations take 3: 360 steps fit."""
    train_by_clock(tmp_path / "run", 1 / 16, HALF_A_MINUTE[0], "trainer.max_steps=40")
    record = json.loads((tmp_path / "run" / "time_budget.json").read_text())
    assert (record["decided_at_step"], record["fitting_steps"], record["num_steps"]) == (24, 24 + 360, 40)


def test_impossible_budgets_are_refused(tmp_path):
    for values, name in {(0, 1): "minutes", (-1, 1): "minutes", (math.inf, 1): "minutes", (1, 0): "min_steps"}.items():
        with pytest.raises(ValueError, match=rf"callbacks\.time_budget\.{name}="):
            TimeBudget(str(tmp_path), *values)


@pytest.mark.slow
def test_two_processes_fix_the_same_number(tmp_path):
    """By the clock of the first one, 15 s are 30 steps of 0.5 s; by that of the second, steps take twice as long."""
    settings = [*SETTINGS, "callbacks.time_budget._target_=tests.faults.SkewedBudget", "trainer.max_steps=60"]
    settings += ["callbacks.time_budget.minutes=0.25", "+callbacks.watch._target_=tests.faults.Watch"]
    ranks = run_ranks(2, "-m", "src.train", *once(*TINY, "trainer.devices=2", *settings), cwd=tmp_path)
    assert [done.returncode for done in ranks] == [0, 0], "".join(done.stdout + done.stderr for done in ranks)[-5000:]
    run = only_run(tmp_path)
    assert json.loads((run / "metrics.json").read_text())["steps"] == 30
    assert all(f"rank {rank} step 29 weights" in done.stdout for rank, done in enumerate(ranks))
    assert sum(done.stdout.count("steps fit into") for done in ranks) == 1
