"""Averages of any length, from snapshots of two: mathematics, callback, commands and refusals."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from src.errors import UsageError
from src.runs.build import build
from src.runs.open import open_run
from src.training.checkpoints import read_checkpoint
from tests.conftest import TINY, compose, train_tiny
from tests.fork_server import run_python
from tests.loops import for_each
from tests.runs.test_runs import assert_equal_bits, runs_until, weights

LENGTHS = [0.05, 0.1]
SETTINGS = ["callbacks.power_ema.lengths=[0.05,0.1]", "callbacks.power_ema.max_snapshots=6"]


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global PowerEMA, remove_crowded, power_ema
    from src.training import power_ema
    from src.training.callbacks.power_ema import PowerEMA, remove_crowded


def direct_average(history: np.ndarray, length: float) -> np.ndarray:
    """Return the average of values (T, n) by its definition: weights u^(gamma + 1) - (u - 1)^(gamma + 1)."""
    u = np.arange(len(history) + 1) / len(history)
    return np.diff(u ** (power_ema.exponent(length) + 1)) @ history


def from_snapshots(history: np.ndarray, steps: list[int], length: float) -> "tuple[np.ndarray, float]":
    """Return the average from snapshots in float32 of the direct averages until each step, and its error."""
    result = power_ema.reconstruct(steps, LENGTHS, length)
    parts = [[direct_average(history[:step], each).astype(np.float32) for each in LENGTHS] for step in steps]
    return np.einsum("kl,kln->n", result.coefficients, np.array(parts, float)), result.error


@for_each("length", [0.01, 0.05, 0.1, 0.2, 0.2886])
def test_exponent_gives_the_length(length):
    """The standard deviation of the profile by numerical integration."""
    u = (np.arange(100_000) + 0.5) / 100_000
    p = u ** power_ema.exponent(length)
    mean = (u * p).sum() / p.sum()
    assert math.sqrt(((u - mean) ** 2 * p).sum() / p.sum()) == pytest.approx(length, rel=1e-5)


def test_updates_follow_the_profile():
    """Also after step 16,383, where an update stands for several steps."""
    history, gamma = np.random.default_rng(0).normal(size=40_000), power_ema.exponent(0.1)
    average, used = 0.0, []
    for step, value in enumerate(history, start=1):
        if step % power_ema.stride(step) == 0:
            factor = power_ema.decay(gamma, step)
            average = factor * average + (1 - factor) * value
            used.append(step)
    assert used[16_382:16_386] == [16_383, 16_384, 16_386, 16_388] and used[-1] == power_ema.last_update(40_001)
    edges = np.array([0, *used]) / 40_000
    assert average == pytest.approx(np.diff(edges ** (gamma + 1)) @ history[np.array(used) - 1], rel=1e-10)


@for_each("length", [0.03, 0.04, 0.07, 0.12, 0.2, 0.25])
def test_two_steps_per_snapshot_give_exact_averages(length):
    history = 1 + np.random.default_rng(0).normal(size=(200, 5))
    average, _ = from_snapshots(history, list(range(2, 201, 2)), length)
    assert_close(average, direct_average(history, length), rtol=1e-6, atol=1e-6)


@for_each("length", [0.04, 0.07, 0.12])
def test_sparse_snapshots_give_accurate_averages(length):
    """Of weights that move by a tenth of their size, as in a random walk."""
    history = 1 + np.random.default_rng(0).normal(size=(6400, 5), scale=1e-3).cumsum(0)
    average, _ = from_snapshots(history, list(range(100, 6401, 100)), length)
    assert_close(average, direct_average(history, length), rtol=1e-6, atol=0)


@for_each("length", [0.03, 0.07, 0.2, 0.28])
def test_error_is_below_its_bound(length):
    history = np.random.default_rng(0).choice([0.0, 1.0], size=(400, 20))
    average, bound = from_snapshots(history, [50, 100, 150, 200, 250, 300, 350, 400], length)
    error = np.abs(average - direct_average(history, length)).max()
    assert 0 < error < bound + 1e-6


@for_each("length", [0.04, 0.07, 0.15])
def test_reconstruction_solves_the_least_squares(length):
    """Of all snapshots at once, by inner products of the continuous profiles (algorithm 3 of the paper)."""
    steps = [1000, 1500, 2500, 4000]

    def inner(a: float, s: float, b: float, t: float) -> float:
        first, second = s ** (a + 1), t ** (b + 1)
        return (a + 1) * (b + 1) / (a + b + 1) * min(s, t) ** (a + b + 1) / first / second

    points = [(power_ema.exponent(each), step) for step in steps for each in LENGTHS]
    wanted = power_ema.exponent(length), steps[-1]
    matrix = np.array([[inner(*p, *q) for q in points] for p in points])
    expected = np.linalg.solve(matrix, [inner(*p, *wanted) for p in points])
    found = power_ema.reconstruct(steps, LENGTHS, length).coefficients.ravel()
    assert_close(found, expected / expected.sum(), rtol=1e-3, atol=1e-3)


def test_continued_run_keeps_few_and_even_snapshots(tmp_path):
    """A run of 3,000 steps is continued to 4,500 and to 20,000: at most 2% off for lengths from 0.03 to 0.2."""
    step = 0
    for end in (3000, 4500, 20_000):
        while step < end:
            step += 1
            if step * 32 // end > (step - 1) * 32 // end:
                power_ema.snapshot_file(tmp_path, step).touch()
                remove_crowded(tmp_path, 32)
        steps = [number for number, _ in power_ema.snapshots(tmp_path)]
        assert len(steps) == 32 and steps[-1] == end
        for length in (0.03, 0.07, 0.15, 0.2):
            assert power_ema.reconstruct(steps, LENGTHS, length).error < 0.02, (end, length)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, dict[str, np.ndarray]]":
    """Return the folder of a run of 12 steps, and the weights after each step."""
    history: dict[str, list[np.ndarray]] = {}
    original = PowerEMA.on_train_batch_end

    def on_train_batch_end(self, trainer, pl_module, *rest):
        for name, weight in pl_module.named_parameters():
            history.setdefault(name, []).append(weight.detach().double().flatten().numpy().copy())
        original(self, trainer, pl_module, *rest)

    folder = tmp_path_factory.mktemp("tracked") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PowerEMA, "on_train_batch_end", on_train_batch_end)
        train_tiny(folder, *SETTINGS, "trainer.max_steps=12", "lr_scheduler.warmup_steps=0")
    return folder, {name: np.array(values) for name, values in history.items()}


def test_opened_average_equals_that_of_all_weights(tracked):
    folder, history = tracked
    for length in (0.04, 0.05, 0.07, 0.12):
        found = open_run(str(folder), ema=length).module.state_dict()
        for name, values in history.items():
            assert_close(found[name].double().flatten().numpy(), direct_average(values, length), rtol=1e-6, atol=1e-7)


def test_training_does_not_depend_on_the_averages(tracked, tmp_path):
    train_tiny(tmp_path, "trainer.max_steps=12", "lr_scheduler.warmup_steps=0")
    for key in ("state_dict", "current_model_state"):
        assert_equal_bits(weights(tracked[0], key), weights(tmp_path, key))
    assert "power_ema" not in read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")


def test_stopped_run_resumes_to_the_same_averages(tracked, tmp_path, monkeypatch):
    """And removes snapshots of later steps, which another attempt left."""
    settings = [*SETTINGS, "trainer.max_steps=12", "lr_scheduler.warmup_steps=0"]
    runs_until(monkeypatch, stop_after=5)
    with pytest.raises(SystemExit):
        train_tiny(tmp_path / "run", *settings)
    monkeypatch.undo()
    (tmp_path / "run" / "averages" / "step_00000007.safetensors").touch()
    train_tiny(tmp_path / "run", *settings, f"resume='{tmp_path / 'run'}'")
    whole, stopped = (
        read_checkpoint(folder / "checkpoints" / "last.ckpt")["power_ema"] for folder in (tracked[0], tmp_path / "run")
    )
    assert whole["steps"] == stopped["steps"] == 12
    for ours, theirs in zip(stopped["averages"], whole["averages"], strict=True):
        assert_equal_bits(ours, theirs)
    whole, stopped = (power_ema.snapshots(folder / "averages") for folder in (tracked[0], tmp_path / "run"))
    assert [step for step, _ in stopped] == [step for step, _ in whole] == [2, 4, 6, 8, 10, 12]
    assert [path.read_bytes() for _, path in stopped] == [path.read_bytes() for _, path in whole]


def test_resumed_run_keeps_its_lengths(tracked):
    """It is refused before `fit`."""
    settings = [*TINY, *SETTINGS[1:], "trainer.max_steps=14", f"resume='{tracked[0]}'", f"run_dir='{tracked[0]}'"]
    with pytest.raises(ValueError, match=r"power_ema\.lengths=\[0\.05,0\.2\]"):
        build(compose("train", *settings, "callbacks.power_ema.lengths=[0.05,0.2]"))


def test_commands_write_sample_and_evaluate_averages(tracked, tmp_path):
    """Of a list of lengths; the file of src.ema is the model that ema=0.07 opens."""
    run, quick = tracked[0], ["n=10", "sampler.steps=2", "device=cpu"]
    evaluated = ["likelihood=false", "alignment.enabled=false", "max_features=10", "num_memorization=10"]
    jobs = [
        ["src.ema", f"run={run}", "length=[0.05,0.07]"],
        ["src.sample", f"run={run}", "ema=0.07", *quick, "hydra.run.dir=a"],
        ["src.evaluate", f"run={run}", "ema=[0.05,0.07]", "features=pixels", *evaluated, *quick, "hydra.run.dir=b"],
    ]
    done = run_python("-m", "tests.distributed.jobs", cwd=tmp_path, JOBS=json.dumps(jobs))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert {path.name for path in (run / "averages").glob("length_*")} == {
        "length_0.05.safetensors",
        "length_0.07.safetensors",
    }
    assert (tmp_path / "a" / "samples.npz").is_file() and "average of length 0.07" in done.stdout
    written = open_run(None, f"{run}/averages/length_0.07.safetensors").module.state_dict()
    assert_equal_bits(written, open_run(str(run), ema=0.07).module.state_dict())
    metrics = json.loads((tmp_path / "b" / "metrics.json").read_text())["ema"]
    assert list(metrics) == ["0.05", "0.07"] and all("ancestral 2" in each["samplers"] for each in metrics.values())
    assert "| 0.05 | 0.07 |" in (tmp_path / "b" / "table.md").read_text()
    assert not (tmp_path / "outputs" / "ema").exists()


def test_lengths_without_accurate_snapshots_are_refused(trained, tracked, tmp_path):
    """Before any average is computed; tracked lengths need no snapshots."""
    from src.ema import ema
    from src.evaluate import evaluate
    from src.sample import sample

    alone = tmp_path / "checkpoints" / "last.ckpt"
    alone.parent.mkdir()
    alone.write_bytes((tracked[0] / "checkpoints" / "last.ckpt").read_bytes())
    for task, run, typed, rule in (
        (ema, trained, "length=0.1", r"length=0\.1 needs averages of callbacks\.power_ema"),
        (sample, trained, "ema=0.1", r"ema=0\.1 needs averages of callbacks\.power_ema"),
        (evaluate, trained, "ema=[0.05,0.1]", r"ema=\[0\.05,0\.1\]\S? needs averages of callbacks"),
        (ema, tmp_path, "length=0.2", r"length=0\.2 cannot be reconstructed from 1 snapshot of the lengths \[0\.05,0"),
        (ema, tracked[0], "length=[0.1,0.4]", r"length=\[0\.1,0\.4\]"),
        (ema, tracked[0], "length=[]", r"length=\[\] must"),
        (evaluate, tracked[0], "ema=[0.05,0.05]", r"ema=\[0\.05,0\.05\]\S? must list different lengths"),
        (sample, tracked[0], "ema=[0.05,0.1]", r"ema=\[0\.05,0\.1\]\S? must be one length"),
    ):
        name = task.__name__
        with pytest.raises(UsageError, match=rule) as error:
            task(compose(name, f"run='{run}'", typed, f"run_dir='{tmp_path / 'out'}'"))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "averages").exists()
    exact, saved = open_run(str(tmp_path), ema=0.05).module.state_dict(), read_checkpoint(alone)["power_ema"]
    assert_close({name: exact[name] for name in saved["averages"][0]}, saved["averages"][0], rtol=1e-6, atol=0)


def test_message_without_a_run_offers_settings_of_the_command():
    from src.ema import ema

    cfg = compose("ema")
    with pytest.raises(UsageError, match=r"run=FOLDER .*ckpt=FILE") as error:
        ema(cfg)
    offered = re.findall(r"(\w+)=", str(error.value))
    assert set(offered) <= {str(key) for key in cfg}


def test_corrupted_snapshot_is_not_used(tracked, tmp_path):
    checkpoint = read_checkpoint(tracked[0] / "checkpoints" / "last.ckpt")
    path = tmp_path / "checkpoints" / "last.ckpt"
    for step, file in power_ema.snapshots(tracked[0] / "averages"):
        copy = power_ema.snapshot_file(power_ema.averages_folder(path), step)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes()[: None if step != 6 else -4])
    with pytest.warns(UserWarning, match=r"step_00000006\.safetensors is not used"):
        assert power_ema.tracked_averages(checkpoint, path, "ema").steps == [2, 4, 8, 10, 12]


@for_each("settings, rule", [([0.1], "two"), ([0.1, 0.1], "two"), ([0.1, 0.3], "0.3"), ([0.0, 0.1], "0.0")])
def test_callback_refuses_lengths(settings, rule):
    with pytest.raises(ValueError, match=rf"callbacks\.power_ema\.lengths=\[.*{rule}"):
        PowerEMA("run", settings)


def test_average_keeps_weights_that_are_not_trained(trained, tmp_path):
    """Adapters alone are averaged; the rest comes from the checkpoint."""
    train_tiny(tmp_path / "run", f"init_from.path='{trained}'", "lora=default", *SETTINGS)
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert len(saved["power_ema"]["averages"][0]) < len(saved["state_dict"])
    found, plain = (open_run(str(tmp_path / "run"), ema=ema).module.state_dict() for ema in (0.07, None))
    assert found.keys() == plain.keys() and any(not torch.equal(found[name], plain[name]) for name in found)
