"""Runs from end to end: training, results, resuming, opening, sampling."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from src.runs.build import build
from src.runs.open import configure_inference, open_run
from src.training.checkpoints import read_checkpoint
from src.training.compile import shutil
from tests.conftest import HANG_SECONDS, TINY, compose, once, train_tiny


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not during collection."""
    global L, CompileCounterWithBackend, seed_networks
    import lightning as L
    from torch._dynamo.testing import CompileCounterWithBackend

    from src.training.callbacks.seeding import seed_networks


def losses(folder: Path, name: str = "train/loss") -> list[str]:
    """Return the logged values as text, so that equal values have equal bits."""
    values = []
    for log in sorted((folder / "logs").glob("version_*/metrics.csv")):
        with log.open(newline="") as file:
            values += [row[name] for row in csv.DictReader(file) if row.get(name)]
    return values


def weights(folder: Path, key: str = "state_dict") -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")[key]


def assert_equal_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def sample(tmp_path: Path, *overrides: str) -> np.ndarray:
    """Run `src.sample` in this process, and return the array of `samples.npz`."""
    from src.sample import sample as command

    folder = command(compose("sample", f"run_dir='{tmp_path}'", "device=cpu", "sampler.steps=3", *overrides))
    return np.load(folder / "samples.npz")["arr_0"]


def test_run_writes_pictures_metrics_and_checkpoints(trained):
    for name in ("samples/final.png", "samples/trajectory.png", "samples/trajectory.gif", "curves.png", "metrics.json"):
        assert (trained / name).stat().st_size > 0
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert [p.name for p in sorted((trained / "samples").glob("step_*.png"))] == ["step_000003.png", "step_000006.png"]
    with Image.open(trained / "samples" / "trajectory.gif") as animation:
        assert animation.n_frames == 4  # the noise, and one frame per step
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["steps"] == 6
    assert metrics["parameters"] == sum(w.numel() for w in weights(trained).values())
    assert 0 < metrics["val/loss"] < 10
    assert len(losses(trained)) == 6


def test_same_seed_gives_the_same_bits(trained, tmp_path):
    train_tiny(tmp_path / "again")
    train_tiny(tmp_path / "other", "seed=1")
    assert losses(tmp_path / "again") == losses(trained)
    assert losses(tmp_path / "again", "val/loss") == losses(trained, "val/loss")
    assert_equal_bits(weights(tmp_path / "again"), weights(trained))
    assert losses(tmp_path / "other")[0] != losses(trained)[0]


def test_accumulated_batches_train_the_same_model(trained, tmp_path):
    """Random numbers depend on the position in the global batch, so only the order of summation differs."""
    train_tiny(tmp_path / "run", "trainer.accumulate_grad_batches=4")
    single, accumulated = weights(trained), weights(tmp_path / "run")
    for name in single:
        # Adam divides by the root of tiny second moments in the first steps, which magnifies rounding.
        assert_close(accumulated[name], single[name], rtol=1e-3, atol=1e-4)


def test_stopped_run_saves_and_resumes_to_the_same_bits(trained, tmp_path, monkeypatch, capsys):
    """After Ctrl-C, kill and SLURM's warning, one after the other. The exit status is 128 plus the signal."""
    folder = tmp_path / "run"
    resume: list[str] = []
    for step, number in {2: signal.SIGINT, 3: signal.SIGTERM, 5: signal.SIGUSR1}.items():
        runs_until(monkeypatch, stop_after=step, number=number)
        with pytest.raises(SystemExit) as stop:
            train_tiny(folder, *resume)
        monkeypatch.undo()
        assert stop.value.code == 128 + number
        output = capsys.readouterr().out
        assert f"saved at step {step}" in output
        assert re.search(rf"python -m src\.train resume=\S*{folder.name}", output)
        resume = [f"resume='{folder}'"]
    train_tiny(folder, *resume)
    assert losses(folder) == losses(trained)
    for key in ("state_dict", "current_model_state"):
        assert_equal_bits(weights(folder, key), weights(trained, key))


def test_importance_sampling_resumes_and_accumulates(tmp_path, monkeypatch):
    """The checkpoint holds the history of losses, in the order of the global batch."""
    settings = [
        "loss=vlb",
        "diffusion.variance=learned_range",
        "timestep_sampler=importance",
        "timestep_sampler.num_bins=4",
        "trainer.max_steps=4",
        "~callbacks.bits_per_dim",
    ]
    single, accumulated, stopped = (tmp_path / name for name in ("single", "accumulated", "stopped"))
    train_tiny(single, *settings)
    assert (weights(single, "current_model_state")["timestep_sampler.seen"].sum() == 4 * 64).all()
    train_tiny(accumulated, *settings, "trainer.accumulate_grad_batches=4")
    for name, value in weights(single, "current_model_state").items():
        assert_close(weights(accumulated, "current_model_state")[name], value, rtol=1e-2, atol=1e-3)
    runs_until(monkeypatch, stop_after=3)
    with pytest.raises(SystemExit):
        train_tiny(stopped, *settings)
    monkeypatch.undo()
    train_tiny(stopped, *settings, f"resume='{stopped}'")
    assert losses(stopped) == losses(single)
    assert_equal_bits(weights(stopped, "current_model_state"), weights(single, "current_model_state"))


def runs_until(monkeypatch: pytest.MonkeyPatch, stop_after: int, number: int = signal.SIGINT) -> int:
    """Send a signal, by default that of Ctrl-C, during step number `stop_after`; return the step."""
    from src.training.module import DiffusionModule

    original = DiffusionModule.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == stop_after - 1:
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "training_step", training_step)
    return stop_after


def test_new_run_in_a_used_folder_is_refused(trained):
    from src.errors import UsageError

    with pytest.raises(UsageError, match="already holds a run"):
        train_tiny(trained)


def test_ema_follows_its_recursion(tmp_path, monkeypatch):
    from src.training.callbacks.ema import EMA
    from src.training.callbacks.samples import SampleGrid

    history: list[torch.Tensor] = []
    original = EMA.on_train_batch_end

    def on_train_batch_end(self, trainer, pl_module, *rest):
        history.append(pl_module.net.conv_in.weight.detach().double().clone())
        original(self, trainer, pl_module, *rest)

    started: list[torch.Tensor] = []
    monkeypatch.setattr(EMA, "on_train_batch_end", on_train_batch_end)
    monkeypatch.setattr(
        SampleGrid,
        "on_train_start",
        lambda self, trainer, m: started.append(m.net.conv_in.weight.detach().double().clone()),
    )
    train_tiny(tmp_path / "run")
    expected = started[0]
    for n, current in enumerate(history, start=1):
        decay = min(0.995, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * current
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert_close(saved["state_dict"]["net.conv_in.weight"].double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(saved["current_model_state"]["net.conv_in.weight"].double(), history[-1])


def test_checkpoint_saved_during_validation_has_both_weights(tmp_path, monkeypatch):
    """During validation the averaged weights replace the raw ones in the network."""
    from src.training.callbacks.samples import SampleGrid

    def save(self, trainer, *_):
        trainer.save_checkpoint(tmp_path / "during.ckpt")

    monkeypatch.setattr(SampleGrid, "on_validation_batch_end", save)
    train_tiny(tmp_path / "run", "trainer.max_steps=3", "~callbacks.best")
    best = read_checkpoint(tmp_path / "during.ckpt")
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for key in ("state_dict", "current_model_state"):
        assert_equal_bits(best[key], last[key])
    assert not torch.equal(*(best[k]["net.conv_in.weight"] for k in ("state_dict", "current_model_state")))


def test_validation_is_deterministic(trained):
    opened = open_run(str(trained))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_steps=1)
    first, second = (trainer.validate(opened.module, datamodule=opened.data, verbose=False)[0] for _ in range(2))
    assert first == second
    written = json.loads((trained / "metrics.json").read_text())
    assert first["val/loss"] == pytest.approx(written["val/loss"], rel=1e-6)


def test_run_opens_from_folder_or_checkpoint(trained, tmp_path):
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes())
    by_folder, by_file = open_run(str(trained)), open_run(None, str(alone))
    raw = open_run(str(trained), ema=False)
    assert_equal_bits(by_folder.module.state_dict(), by_file.module.state_dict())
    assert_equal_bits(by_folder.module.state_dict(), weights(trained))
    assert_equal_bits(raw.module.state_dict(), weights(trained, "current_model_state"))


def test_sample_depends_only_on_seed_and_index(trained, tmp_path):
    for sampler in ("ddim", "ancestral"):
        all_samples = sample(tmp_path / f"{sampler}-a", f"run='{trained}'", "n=5", f"sampler={sampler}")
        parts = sample(tmp_path / f"{sampler}-b", f"run='{trained}'", "n=3", "batch_size=2", f"sampler={sampler}")
        other = sample(tmp_path / f"{sampler}-c", f"run='{trained}'", "n=3", "seed=1", f"sampler={sampler}")
        assert all_samples.shape == (5, 8, 8, 1) and all_samples.dtype == np.uint8
        # A batch of another size may round differently, by at most one of the 17 pixel values.
        assert np.abs(all_samples[:3].astype(int) - parts.astype(int)).max() <= 16
        assert (all_samples[:3] == parts).mean() > 0.99
        assert (all_samples[:3] != other).any()


def test_sample_writes_images_grid_and_trajectory(trained, tmp_path):
    samples = sample(tmp_path, f"run='{trained}'", "n=3", "gif=true")
    for k in range(3):
        assert np.array_equal(np.array(Image.open(tmp_path / f"{k:05d}.png")), samples[k, :, :, 0])
    with Image.open(tmp_path / "trajectory.gif") as animation:
        assert animation.n_frames == 4
    assert Image.open(tmp_path / "grid.png").width > 3 * 8


def test_compiled_network_draws_the_same_samples(trained, tmp_path, traced):
    plain, compiled = (
        sample(tmp_path / name, f"run='{trained}'", "n=7", "batch_size=3", f"compile={name}")
        for name in ("null", "true")
    )
    assert traced.frame_count == 1
    assert np.abs(plain.astype(int) - compiled.astype(int)).max() <= 16  # rounding by one of 17 pixel values


def test_bfloat16_draws_similar_samples(trained):
    """bfloat16 has 8 bits of precision. The sampler itself computes in float32."""
    opened = open_run(str(trained))
    drawn = []
    for precision in ("32-true", "bf16-mixed"):
        configure_inference(opened, precision, None)
        *_, x = opened.module.sample(range(4), 0)
        assert x.dtype == torch.float32
        drawn.append(x)
    difference = (drawn[1] - drawn[0]).norm() / drawn[0].norm()
    assert 1e-5 < difference < 0.05


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("precision=bf16", "precision=bf16"),
        ("compile=fast", "compile=fast"),
    ],
)
def test_unknown_precision_and_compile_mode_are_refused(wrong, message, trained, tmp_path):
    from src.errors import UsageError

    with pytest.raises(UsageError, match=message):
        sample(tmp_path, f"run='{trained}'", wrong)


def test_cuda_graphs_with_accumulation_are_refused(tmp_path):
    settings = ("compile=reduce-overhead", "trainer.accumulate_grad_batches=2", f"run_dir='{tmp_path}'")
    with pytest.raises(ValueError, match="compile="):
        build(compose("train", *TINY, *settings))


def test_commands_print_paths_below_the_current_folder(trained, tmp_path, monkeypatch, capsys):
    """The other paths, such as those of a run elsewhere, are absolute."""
    from src.evaluate import evaluate

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(trained)
    sample(tmp_path / "drawn", "run=run", "n=2")
    settings = [
        "run=run",
        f"run_dir='{tmp_path / 'results'}'",
        "device=cpu",
        "quality=false",
        "num_val=20",
        "num_terms=2",
    ]
    evaluate(compose("evaluate", *settings))
    printed = capsys.readouterr().out
    assert str(tmp_path) not in printed
    for path in (
        "run/checkpoints/last.ckpt",
        "drawn/grid.png",
        "drawn/samples.npz",
        "results/table.md",
        "results/metrics.json",
    ):
        assert f" {path}" in printed, path


def test_best_checkpoint_counts_the_last_validation(tmp_path):
    """The last step is not a multiple of `validate_every`; a resumed run compares with its loss."""
    metrics = train_tiny(tmp_path / "run", "trainer.max_steps=4", "lr_scheduler.warmup_steps=0")
    before = float(losses(tmp_path / "run", "val/loss")[0])
    best, last = (read_checkpoint(tmp_path / "run" / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert metrics["val/loss"] < before and best["global_step"] == last["global_step"] == 4
    assert_equal_bits(best["state_dict"], last["state_dict"])
    (state,) = (s for name, s in last["callbacks"].items() if "val/loss" in name)
    assert float(state["best_model_score"]) == pytest.approx(metrics["val/loss"])


def test_sample_uses_the_sampler_of_the_run_by_default(trained, tmp_path):
    """The run has ancestral sampling in 3 steps. Settings modify it, and `sampler=` replaces it."""
    own = sample(tmp_path / "a", f"run='{trained}'", "n=4", "sampler.steps=null")
    explicit = sample(tmp_path / "b", f"run='{trained}'", "n=4", "sampler=ancestral", "sampler.steps=3")
    longer = sample(tmp_path / "c", f"run='{trained}'", "n=4", "sampler.steps=4")
    other = sample(tmp_path / "d", f"run='{trained}'", "n=4", "sampler=ddim")
    assert (own == explicit).all()
    assert (own != longer).any() and (own != other).any()


def test_raw_weights_draw_other_samples(trained, tmp_path):
    averaged = sample(tmp_path / "a", f"run='{trained}'", "n=4")
    raw = sample(tmp_path / "b", f"run='{trained}'", "n=4", "ema=false")
    assert (averaged != raw).any()


@pytest.mark.parametrize("damage", ["truncated", "pickle", "foreign"])
def test_files_that_are_not_checkpoints_are_refused(trained, tmp_path, damage):
    path = tmp_path / "bad.ckpt"
    if damage == "truncated":
        path.write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes()[:2000])
    elif damage == "pickle":
        torch.save({"state_dict": {}, "hyper_parameters": os.system}, path)
    else:
        torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="checkpoint"):
        open_run(None, str(path))


def test_checkpoint_of_another_network_is_refused(trained, tmp_path):
    from src.errors import UsageError

    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match=r"another network: net\.\S+ is \(.*\) there and \(.*\) here"):
        train_tiny(tmp_path / "run", f"resume='{trained}'", "model.model_channels=16")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.num_steps=5"], "schedule.num_steps=5"),
        (["schedule.num_steps=abc"], "schedule.num_steps=abc"),
        (["diffusion.prediction=noise"], "diffusion.prediction=noise"),
        (["data.batch_size=2000"], "data.batch_size=2000"),
        (["data.batch_size=63", "trainer.accumulate_grad_batches=2"], "multiple of 2"),
        (["model.conv_backend=fast"], "model.conv_backend=fast"),
        (["zero_terminal_snr=true", "diffusion.prediction=eps"], "diffusion.prediction=eps"),
        (["sampler=ddim", "sampler.eta=2"], "sampler.eta=2"),
        (["sampler.steps=0"], "sampler.steps=0"),
        (["sampler.spacing=even"], "sampler.spacing=even"),
        (["weighting.gamma=-1"], "weighting.gamma=-1"),
        (["lr_scheduler.warmup_steps=-1"], "lr_scheduler.warmup_steps=-1"),
        (["optimizer.lr=-1"], "optimizer.lr=-1"),
        (["trainer.accelerator=gpu"], "trainer.accelerator=gpu"),
        (["trainer.devices=0"], "trainer.devices=0"),
        (["+trainer.max_stepz=3"], "did you mean trainer.max_steps?"),
        (["callbacks.ema.decay=1.5"], "callbacks.ema.decay=1.5"),
        (["schedule=custom", "schedule.betas=nowhere.csv"], "nowhere.csv"),
        (["data=mnist", "data.root={tmp}"], "data"),
        (["data=folder", "data.root={tmp}"], "images"),
        (["data=folder", "data.root={tmp}/nowhere"], "data.root"),
    ],
)
def test_invalid_settings_are_refused_before_training(overrides, message, tmp_path, no_network):
    from src.errors import UsageError

    given = [o.replace("{tmp}", str(tmp_path)) for o in overrides]
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        train_tiny(tmp_path / "run", *given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_networks_must_fit_the_kind_of_data(tmp_path):
    from src.errors import UsageError
    from src.train import train

    for choice, fix in (("model=mlp", "choose model=unet_tiny"), ("data=points model=unet_tiny", "model=mlp")):
        cfg = compose("train", *choice.split(), f"run_dir='{tmp_path}'")
        with pytest.raises(UsageError, match=fix):
            train(cfg)


def test_resume_with_other_accumulation_is_refused(trained, tmp_path):
    from src.errors import UsageError

    with pytest.raises(UsageError, match="cannot resume a run that had 1"):
        train_tiny(tmp_path / "run", f"resume='{trained}'", "trainer.accumulate_grad_batches=2")


def test_diverged_run_ends_with_an_error(tmp_path):
    from src.errors import UsageError

    with pytest.raises(UsageError, match=r"diverged.*lower optimizer.lr"):
        train_tiny(tmp_path / "run", "optimizer.lr=1e30")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["val/loss"] is None


def test_run_without_validation_finishes(tmp_path):
    metrics = train_tiny(tmp_path / "run", "+trainer.limit_val_batches=0", "trainer.max_steps=1")
    assert metrics["steps"] == 1 and "val/loss" not in metrics
    assert (tmp_path / "run" / "samples" / "final.png").exists()


def test_run_keeps_the_betas_of_a_file(tmp_path):
    betas = np.linspace(1e-3, 0.3, 20)
    np.savetxt(tmp_path / "betas.csv", betas)
    np.save(tmp_path / "betas.npy", betas)
    for name in ("betas.csv", "betas.npy"):
        folder = tmp_path / name.replace(".", "-")
        train_tiny(folder, "schedule=custom", f"schedule.betas='{tmp_path / name}'", "trainer.max_steps=1")
        (tmp_path / name).unlink()
        schedule = open_run(str(folder)).module.schedule
        expected = torch.from_numpy(np.cumprod(1 - betas)).sqrt().float()
        assert_close(schedule.alpha[:-1], expected, rtol=1e-6, atol=0)


def test_schedule_that_does_not_reach_noise_warns(tmp_path):
    with pytest.warns(UserWarning, match="does not reach noise"):
        train_tiny(tmp_path / "run", "schedule=quadratic", "schedule.num_steps=100", "trainer.max_steps=1")


def test_weighting_of_zero_at_the_last_step_warns(tmp_path):
    with pytest.warns(UserWarning, match="weighting=uniform"):
        train_tiny(tmp_path / "run", "zero_terminal_snr=true", "trainer.max_steps=1")


def test_run_without_logger_writes_samples(tmp_path):
    train_tiny(tmp_path / "run", "logger=none", "trainer.max_steps=2", curves=True)
    assert (tmp_path / "run" / "samples" / "final.png").exists()
    assert not (tmp_path / "run" / "curves.png").exists()


def allow_fp16(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Allow fp16 on a CPU, where Lightning would use bfloat16."""
    from lightning.pytorch.plugins.precision import MixedPrecision
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    def plugin(self):
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))

    monkeypatch.setattr(_AcceleratorConnector, "_check_and_init_precision", plugin)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_tables_losses_and_ema_stay_float32(trained, tmp_path, monkeypatch, precision):
    """The network computes in a lower precision, with losses close to those of float32."""
    from src.models import layers
    from src.training.callbacks.ema import EMA
    from src.training.module import DiffusionModule

    seen: dict[str, set[torch.dtype]] = {}

    def record(owner, name, tensors):
        original = getattr(owner, name)

        def recorded(*args, **kwargs):
            out = original(*args, **kwargs)
            for tensor in tensors(args[0], args, out):
                seen.setdefault(name, set()).add(tensor.dtype)
            return out

        monkeypatch.setattr(owner, name, recorded)

    record(layers, "sinusoidal_embedding", lambda time, _, out: [time, out])
    record(
        DiffusionModule,
        "compute_losses",
        lambda module, args, out: [*module.schedule.level(torch.tensor([3]), args[1])],
    )
    record(DiffusionModule, "training_step", lambda module, _, out: [out["loss"], out["terms"]["loss"], out["v"]])
    record(EMA, "on_train_batch_end", lambda ema, *_: ema._average)
    record(layers.ResidualBlock, "forward", lambda _, __, out: [out])
    if precision == "16-mixed":
        allow_fp16(monkeypatch, 2.0**10)
    train_tiny(tmp_path / "run", f"trainer.precision={precision}")
    dtypes_of_network = seen.pop("forward")
    assert (torch.float16 if precision == "16-mixed" else torch.bfloat16) in dtypes_of_network
    assert len(seen) == 4 and all(dtypes == {torch.float32} for dtypes in seen.values()), seen
    ours, full = (np.array(losses(f), dtype=float) for f in (tmp_path / "run", trained))
    # bfloat16 has 8 bits of precision: six steps agree to a few percent.
    np.testing.assert_allclose(ours, full, rtol=0.1)


def test_run_resumes_in_another_precision(trained, tmp_path, monkeypatch):
    """From fp16, with an unfused optimizer, to float32, with a fused one, and back."""
    folder = tmp_path / "run"
    allow_fp16(monkeypatch, 2.0**10)
    train_tiny(folder, "trainer.precision=16-mixed", "trainer.max_steps=2")
    monkeypatch.undo()
    train_tiny(folder, f"resume='{folder}'", "trainer.max_steps=4")
    allow_fp16(monkeypatch, 2.0**10)
    train_tiny(folder, f"resume='{folder}'", "trainer.precision=16-mixed", "trainer.max_steps=6")
    ours, full = (np.array(losses(f), dtype=float) for f in (folder, trained))
    np.testing.assert_allclose(ours, full, rtol=0.1)


def test_log_every_n_steps_logs_the_values_of_its_step(trained, tmp_path, monkeypatch):
    """The values equal those of a run that logs every step. The last step is not logged twice."""
    runs_until(monkeypatch, stop_after=5)
    with pytest.raises(SystemExit):
        train_tiny(tmp_path, "trainer.log_every_n_steps=3")
    for name in ("train/loss", "train/mse", "train/grad_norm"):
        assert losses(tmp_path, name) == losses(trained, name)[2:3]


def test_extended_run_logs_every_interval_once(tmp_path):
    """A run of 4 steps is extended to 10, and logs loss, validation and speed at every second step."""
    often = ("trainer.log_every_n_steps=2", "validate_every=2")
    train_tiny(tmp_path, "trainer.max_steps=4", *often)
    train_tiny(tmp_path, "trainer.max_steps=10", *often, f"resume='{tmp_path}'")
    for name in ("train/loss", "train/grad_norm", "speed/steps_per_second", "val/loss"):
        steps = []
        for log in sorted((tmp_path / "logs").glob("version_*/metrics.csv")):
            with log.open(newline="") as file:
                steps += [int(row["step"]) for row in csv.DictReader(file) if row.get(name)]
        assert steps == [1, 3, 5, 7, 9], name  # Lightning's own count begins at 0


def test_seed_networks_equals_manual_seed():
    seed_networks(7, torch.device("cpu"))
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)


@pytest.fixture
def traced(monkeypatch):
    """Count compiled graphs. The backend skips machine code, which takes a minute to compile."""
    counter, really = CompileCounterWithBackend("aot_eager"), torch.compile

    def compile_quickly(net, *, options, dynamic):
        really(net, options=options, dynamic=dynamic)  # refuses unknown options
        assert options["force_layout_optimization"]
        return really(net, backend=counter, fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_quickly)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    return counter


def test_compiled_run_resumes_uncompiled(trained, tmp_path, monkeypatch, traced):
    """Training compiles once, for all batch sizes. The checkpoints equal those of an uncompiled run."""
    runs_until(monkeypatch, stop_after=3)
    with pytest.raises(SystemExit):
        train_tiny(tmp_path / "run", "compile=true")
    assert traced.frame_count == 1
    monkeypatch.undo()
    assert weights(tmp_path / "run").keys() == weights(trained).keys()
    with pytest.warns(UserWarning, match="another setting: compile: True -> None"):
        train_tiny(tmp_path / "run", f"resume='{tmp_path / 'run'}'")
    np.testing.assert_allclose(*(np.array(losses(f), dtype=float) for f in (tmp_path / "run", trained)), rtol=1e-4)


def test_overflow_in_fp16_skips_the_step_with_a_warning(tmp_path, monkeypatch):
    """The scale starts at 2^40, where every gradient overflows, and halves at each step."""
    allow_fp16(monkeypatch, 2.0**40)
    with pytest.warns(UserWarning, match="skipped step 0: the gradient overflowed in fp16"):
        train_tiny(tmp_path / "run", "trainer.precision=16-mixed", "callbacks.nan_guard.patience=2")
    rows = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(6)]
    assert [math.log2(row["fp16_scale"]) for row in rows] == pytest.approx([40 - k for k in range(1, 7)], abs=1)
    start, end = (weights(tmp_path / "run", key) for key in ("state_dict", "current_model_state"))
    assert_equal_bits(start, end)  # the average of weights that never moved


def test_resumed_run_keeps_its_wandb_id(tmp_path, monkeypatch, no_network):
    """Both offline parts have one id, with which `wandb sync` joins them."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    folder = tmp_path / "run"
    runs_until(monkeypatch, stop_after=3)
    with pytest.raises(SystemExit):
        train_tiny(folder, "logger=wandb")
    name = (folder / "wandb_id.txt").read_text().strip()
    monkeypatch.undo()
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    train_tiny(folder, "logger=wandb", f"resume='{folder}'")
    assert (folder / "wandb_id.txt").read_text().strip() == name
    parts = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(parts) == 2 and all(part.name.endswith(f"-{name}") for part in parts)


def test_mixture_is_learned_close_to_the_optimal_loss(tmp_path):
    """On a mixture the optimal prediction of v follows from Tweedie's formula, and with it the lowest possible loss."""
    from src.train import train

    cfg = compose(
        "train", "data=mixture", "model.hidden_size=64", "model.num_res_blocks=2", "trainer.max_steps=400",
        "validate_every=400", "data.val_fraction=0.5", "callbacks.samples.num_samples=100",
        "callbacks.progress.refresh_rate=0", "sampler.steps=5", "trainer.accelerator=cpu",
        f"run_dir='{tmp_path / 'run'}'",
    )  # fmt: skip
    metrics = train(cfg)
    opened = open_run(str(tmp_path / "run"))
    mixture, schedule = opened.data.distribution, opened.module.schedule
    generator = torch.Generator().manual_seed(0)
    errors = []
    for t in range(0, 1000, 25):
        alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
        x0, eps = mixture(2000, generator), torch.randn(2000, 2, generator=generator)
        x_t = alpha * x0 + sigma * eps
        best_eps = -sigma * mixture.noised(alpha, sigma).score(x_t)
        best_x0 = (x_t - sigma * best_eps) / alpha
        errors.append((alpha * (best_eps - eps) - sigma * (best_x0 - x0)).square().mean())
    best = torch.stack(errors).mean().item()
    # Both are means over about 10^4 samples, exact to two or three percent.
    assert 0.96 * best < metrics["val/mse"] < 1.15 * best
    assert Image.open(tmp_path / "run" / "samples" / "final.png").size[0] > 100


def start_two_processes(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start `src.train` with `trainer.devices=2`, which is DDP over gloo on a CPU."""
    settings = [*TINY, "validate_every=3", "checkpoint_every=1000", "trainer.devices=2", *overrides]
    command = [sys.executable, "-m", "src.train", *once(*settings), f"hydra.run.dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.faults
def test_ctrl_c_stops_and_saves_both_processes(tmp_path):
    with start_two_processes(tmp_path / "run", "trainer.max_steps=100000", "validate_every=100000") as process:
        log = tmp_path / "run" / "logs" / "version_0" / "metrics.csv"
        deadline = time.monotonic() + HANG_SECONDS
        while not log.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130, output[-3000:]
    step = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert step > 0 and f"saved at step {step}" in output
