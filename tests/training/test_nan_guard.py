"""Steps whose loss or gradient is not finite are skipped and recorded; many of them cause a rollback."""

import json
import math

import pytest
import torch

from src.errors import UsageError
from src.training.checkpoints import read_checkpoint
from tests.conftest import train_tiny


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global DiffusionModule, skip_unless, snapshots
    from src.training.module import DiffusionModule
    from src.training.optim import skip_unless
    from src.training.power_ema import snapshots


def poison(monkeypatch, steps, sample=slice(None)):
    """Make the network return NaN for these samples of the batch at these steps."""
    original = DiffusionModule.denoise

    def denoise(self, x, t, cond=None, augment=None):
        out = original(self, x, t, cond, augment)
        if self.training and self.trainer.global_step in steps:
            wrong = torch.ones(len(out), *[1] * (out.ndim - 1))
            wrong[sample] = math.nan
            out = wrong * out
        return out

    monkeypatch.setattr(DiffusionModule, "denoise", denoise)


def watch(monkeypatch):
    """Return lists that collect weights with optimizer state, and the learning rate, at the start of each step."""
    history: list[dict[str, torch.Tensor]] = []
    rates: list[float] = []

    def on_train_batch_start(self, batch, batch_idx):
        state = {name: value.clone() for name, value in self.net.state_dict().items()}
        for k, moments in self.trainer.optimizers[0].state_dict()["state"].items():
            state |= {f"{k}.{name}": value.clone() for name, value in moments.items()}
        history.append(state)
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    monkeypatch.setattr(DiffusionModule, "on_train_batch_start", on_train_batch_start)
    return history, rates


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(folder):
    return [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fused", ["true", "false"])
def test_nonfinite_step_is_skipped_and_recorded(tmp_path, monkeypatch, fused):
    """With NaN in sample 5 of the fourth batch, that step is skipped and the others are not."""
    poison(monkeypatch, {3}, sample=5)
    history, _ = watch(monkeypatch)
    with pytest.warns(UserWarning, match="skipped step 3"):
        train_tiny(tmp_path / "run", f"optimizer.fused={fused}")
    assert same(history[4], history[3])
    assert not any(same(history[k + 1], history[k]) for k in (0, 1, 2, 4))
    (row,) = rows(tmp_path / "run")
    assert row["step"] == 3 and row["grad_norm"] == "nan"
    assert [k for k, loss in enumerate(row["losses"]) if loss == "nan"] == [5]
    assert len(set(row["samples"])) == len(row["t"]) == len(row["v"]) == 64
    assert row["t"] == [int(1000 * v) for v in row["v"]]


def test_overflowing_loss_with_finite_gradient_is_skipped(tmp_path, monkeypatch):
    """An error of 1e20 squares to infinity in float32, while twice the error is finite."""
    original = DiffusionModule.denoise
    monkeypatch.setattr(
        DiffusionModule,
        "denoise",
        lambda self, x, t, cond=None, augment=None: (
            original(self, x, t, cond, augment) + 1e20 * (self.training and self.trainer.global_step == 3)
        ),
    )
    history, _ = watch(monkeypatch)
    with pytest.warns(UserWarning, match="skipped step 3"):
        train_tiny(tmp_path / "run")
    assert same(history[4], history[3])


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_skipped_step_leaves_weights_and_moments(optimizer):
    for fused in (True, False):
        for finite in (True, False):
            weight = torch.nn.Parameter(torch.ones(3))
            stepper = optimizer([weight], lr=0.1, fused=fused)
            weight.grad = torch.ones(3)
            skip_unless(torch.tensor(finite), stepper)
            stepper.step()
            assert torch.equal(weight.detach(), torch.ones(3)) is not finite


def test_rollback_restores_weights_and_halves_the_rate(tmp_path, monkeypatch):
    """With NaN in steps 5 and 6 and a checkpoint of step 4, step 7 starts as step 4 did, at half the rate."""
    poison(monkeypatch, {5, 6})
    history, rates = watch(monkeypatch)
    settings = ["trainer.max_steps=10", "checkpoint_every=4", "callbacks.nan_guard.patience=2", "validate_every=100"]
    with pytest.warns(UserWarning, match="rolled back to step 4"):
        train_tiny(tmp_path / "run", *settings)
    assert same(history[7], history[4]) and not same(history[6], history[4])
    monkeypatch.undo()
    _, plain = watch(monkeypatch)
    train_tiny(tmp_path / "plain", *settings)
    assert rates[:7] == plain[:7]
    assert rates[7:] == pytest.approx([rate / 2 for rate in plain[7:]])
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["skipped"] == ([], [4], None)
    assert len(rows(tmp_path / "run")) == 2


def test_rollback_saves_a_diverged_run(tmp_path, monkeypatch):
    """One bad step ruins the weights for good: with a rollback the run finishes, without it ends."""
    original = DiffusionModule.training_step
    ruined = []

    def training_step(self, batch, batch_idx):
        if self.global_step == 5 and not ruined:
            ruined.append(True)
            with torch.no_grad():
                for weight in self.weights:
                    weight.mul_(1e30)
        return original(self, batch, batch_idx)

    settings = ["trainer.max_steps=10", "checkpoint_every=4", "callbacks.nan_guard.patience=2", "validate_every=100"]
    monkeypatch.setattr(DiffusionModule, "training_step", training_step)
    with pytest.warns(UserWarning, match="rolled back to step 4"):
        metrics = train_tiny(tmp_path / "saved", *settings)
    assert metrics["steps"] == 10 and math.isfinite(metrics["val/loss"])
    ruined.clear()
    with pytest.raises(UsageError, match="the weights have diverged"):
        train_tiny(tmp_path / "lost", *settings, "callbacks.nan_guard.max_rollbacks=0")


def test_rollback_restores_the_average(tmp_path, monkeypatch):
    from src.training.callbacks.ema import EMA
    from src.training.callbacks.power_ema import PowerEMA

    averages, powers, covered = [], [], []

    def keep_average(self, trainer, *_):
        averages.append([value.clone() for value in self._average])

    def keep_powers(self, trainer, *_):
        powers.append([value.clone() for part in self._averages for value in part])
        covered.append(self.steps)

    monkeypatch.setattr(EMA, "on_train_batch_start", keep_average)
    monkeypatch.setattr(PowerEMA, "on_train_batch_start", keep_powers)
    poison(monkeypatch, {5, 6})
    settings = ["trainer.max_steps=10", "checkpoint_every=4", "callbacks.nan_guard.patience=2"]
    with pytest.warns(UserWarning, match="rolled back"):
        train_tiny(tmp_path, *settings, "callbacks.power_ema.lengths=[0.05,0.1]")
    for kept in (averages, powers):
        assert all(map(torch.equal, kept[7], kept[4]))
        assert not all(map(torch.equal, kept[6], kept[4]))
    assert covered == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert [step for step, _ in snapshots(tmp_path / "averages")] == [1, 2, 3, 4, 5, 6, 7]


def test_failed_rollbacks_end_with_a_diagnosis(tmp_path, monkeypatch):
    """Each checkpoint is tried once, newest first, and intact ones stay on the disk."""
    poison(monkeypatch, range(5, 100))
    with pytest.raises(UsageError) as error:
        train_tiny(
            tmp_path,
            "trainer.max_steps=40",
            "validate_every=100",
            "checkpoint_every=2",
            "callbacks.nan_guard.patience=3",
            "keep_checkpoints=-1",
        )
    said = str(error.value)
    assert "[4, 2]" in said and "the loss of every sample was not finite" in said and "optimizer.lr" in said
    assert "\n" not in said
    assert len(rows(tmp_path)) == 9
    assert read_checkpoint(tmp_path / "checkpoints" / "step_000004.ckpt")["global_step"] == 4


def test_resumed_run_counts_skipped_steps_on(tmp_path, monkeypatch):
    """It rolls back where it would have without the stop."""
    from tests.runs.test_runs import assert_equal_bits, runs_until, weights

    settings = ["trainer.max_steps=12", "checkpoint_every=4", "callbacks.nan_guard.patience=4", "validate_every=100"]
    poison(monkeypatch, range(5, 9))
    with pytest.warns(UserWarning, match="rolled back"):
        train_tiny(tmp_path / "whole", *settings)
    runs_until(monkeypatch, stop_after=7)
    with pytest.raises(SystemExit):
        train_tiny(tmp_path / "stopped", *settings)
    monkeypatch.undo()
    poison(monkeypatch, range(5, 9))
    with pytest.warns(UserWarning, match="rolled back"):
        train_tiny(tmp_path / "stopped", *settings, f"resume='{tmp_path / 'stopped'}'")
    for key in ("state_dict", "current_model_state"):
        assert_equal_bits(weights(tmp_path / "stopped", key), weights(tmp_path / "whole", key))


def test_guard_refuses_patience_below_one(tmp_path):
    with pytest.raises(UsageError, match=r"nan_guard\.patience=0"):
        train_tiny(tmp_path, "callbacks.nan_guard.patience=0")


def test_guard_synchronizes_only_at_logs_and_checkpoints(monkeypatch, tmp_path):
    shapes = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: shapes.append(self.shape) or original(self))
    train_tiny(tmp_path, "trainer.log_every_n_steps=4", "trainer.max_steps=10", "validate_every=100")
    assert [shape for shape in shapes if len(shape) == 1 and shape[0] in (4, 2)] == [(4,), (4,), (2,)]
