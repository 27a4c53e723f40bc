"""Runs from end to end: training, its traces, resuming, opening again, sampling."""

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
    """Import what takes seconds here, since every collection of the tests would pay for it above."""
    global L, CompileCounterWithBackend, seed_networks
    import lightning as L
    from torch._dynamo.testing import CompileCounterWithBackend

    from src.training.module import seed_networks


def losses(folder: Path, name: str = "train/loss") -> list[str]:
    """The logged values as they were written, so that equality is equality of bits."""
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
    """Run `src.sample` in this process; its `samples.npz`."""
    from src.sample import sample as command

    folder = command(compose("sample", f"run_dir='{tmp_path}'", "device=cpu", "sampler.steps=3", *overrides))
    return np.load(folder / "samples.npz")["arr_0"]


def test_a_run_leaves_everything_to_look_at(trained):
    for name in ("samples/final.png", "samples/film.png", "samples/film.gif", "curves.png", "metrics.json"):
        assert (trained / name).stat().st_size > 0
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert [p.name for p in sorted((trained / "samples").glob("step_*.png"))] == ["step_000003.png", "step_000006.png"]
    with Image.open(trained / "samples" / "film.gif") as film:
        assert film.n_frames == 4  # noise and one frame per step
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["steps"] == 6
    assert metrics["parameters"] == sum(w.numel() for w in weights(trained).values())
    assert 0 < metrics["val/loss"] < 10
    assert len(losses(trained)) == 6


def test_the_same_seed_gives_the_same_run_bit_for_bit(trained, tmp_path):
    train_tiny(tmp_path / "again")
    train_tiny(tmp_path / "other", "seed=1")
    assert losses(tmp_path / "again") == losses(trained)
    assert losses(tmp_path / "again", "val/loss") == losses(trained, "val/loss")
    assert_equal_bits(weights(tmp_path / "again"), weights(trained))
    assert losses(tmp_path / "other")[0] != losses(trained)[0]


def test_accumulated_batches_train_the_same_model(trained, tmp_path):
    """The draws belong to the place in the global batch, so only the order of summation differs."""
    train_tiny(tmp_path / "run", "trainer.accumulate_grad_batches=4")
    whole, parts = weights(trained), weights(tmp_path / "run")
    for name in whole:
        # Adam divides by the root of tiny second moments in the first steps, so rounding is magnified there.
        assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_run_saves_and_goes_on_to_the_same_end(trained, tmp_path, monkeypatch, capsys, number):
    """On Ctrl-C, kill and SLURM's warning; the exit status is the shell's for the signal."""
    folder = tmp_path / "run"
    step = runs_until(monkeypatch, stop_after=2, number=number)
    with pytest.raises(SystemExit) as stop:
        train_tiny(folder)
    assert stop.value.code == 128 + number
    said = capsys.readouterr().out
    assert f"saved at step {step}" in said
    assert re.search(rf"python -m src\.train resume=\S*{folder.name}", said)
    monkeypatch.undo()
    train_tiny(folder, f"resume='{folder}'")
    assert losses(folder) == losses(trained)
    for key in ("state_dict", "current_model_state"):
        assert_equal_bits(weights(folder, key), weights(trained, key))


def test_importance_sampling_resumes_and_does_not_depend_on_how_the_batch_is_cut(tmp_path, monkeypatch):
    """What was seen of the losses is in the checkpoint, in the order of the global batch."""
    settings = [
        "loss=vlb",
        "diffusion.variance=learned_range",
        "timestep_sampler=importance",
        "timestep_sampler.num_bins=4",
    ]
    whole, cut, stopped = (tmp_path / name for name in ("whole", "cut", "stopped"))
    train_tiny(whole, *settings)
    assert (weights(whole, "current_model_state")["timestep_sampler.seen"].sum() == 6 * 64).all()
    train_tiny(cut, *settings, "trainer.accumulate_grad_batches=4")
    for name, value in weights(whole, "current_model_state").items():
        assert_close(weights(cut, "current_model_state")[name], value, rtol=1e-2, atol=1e-3)
    runs_until(monkeypatch, stop_after=3)
    with pytest.raises(SystemExit):
        train_tiny(stopped, *settings)
    monkeypatch.undo()
    train_tiny(stopped, *settings, f"resume='{stopped}'")
    assert losses(stopped) == losses(whole)
    assert_equal_bits(weights(stopped, "current_model_state"), weights(whole, "current_model_state"))


def runs_until(monkeypatch: pytest.MonkeyPatch, stop_after: int, number: int = signal.SIGINT) -> int:
    """Send a signal, Ctrl-C's, while step number `stop_after` is being computed."""
    from src.training.module import DiffusionModule

    original = DiffusionModule.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == stop_after - 1:
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "training_step", training_step)
    return stop_after


def test_a_finished_folder_is_not_trained_over(trained):
    from src.errors import UsageError

    with pytest.raises(UsageError, match="already holds a run"):
        train_tiny(trained)


def test_ema_is_the_recursion_over_the_weights_of_each_step(tmp_path, monkeypatch):
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


def test_a_checkpoint_saved_in_validation_has_both_weights_in_their_places(tmp_path, monkeypatch):
    """As a signal or an error in validation has it: while the averaged weights stand in for the raw ones."""
    from src.training.callbacks.samples import SampleGrid

    def save(self, trainer, *_):
        trainer.save_checkpoint(tmp_path / "within.ckpt")

    monkeypatch.setattr(SampleGrid, "on_validation_batch_end", save)
    train_tiny(tmp_path / "run", "trainer.max_steps=3", "~callbacks.best")
    best = read_checkpoint(tmp_path / "within.ckpt")
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for key in ("state_dict", "current_model_state"):
        assert_equal_bits(best[key], last[key])
    assert not torch.equal(*(best[k]["net.conv_in.weight"] for k in ("state_dict", "current_model_state")))


def test_two_validations_of_the_same_weights_agree(trained):
    opened = open_run(str(trained))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_steps=1)
    first, second = (trainer.validate(opened.module, datamodule=opened.data, verbose=False)[0] for _ in range(2))
    assert first == second
    written = json.loads((trained / "metrics.json").read_text())
    assert first["val/loss"] == pytest.approx(written["val/loss"], rel=1e-6)


def test_a_run_opens_from_its_folder_or_one_checkpoint_with_the_averaged_weights(trained, tmp_path):
    alone = tmp_path / "alone.ckpt"
    alone.write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes())
    by_folder, by_file = open_run(str(trained)), open_run(None, str(alone))
    raw = open_run(str(trained), ema=False)
    assert_equal_bits(by_folder.module.state_dict(), by_file.module.state_dict())
    assert_equal_bits(by_folder.module.state_dict(), weights(trained))
    assert_equal_bits(raw.module.state_dict(), weights(trained, "current_model_state"))


def test_sample_k_depends_on_the_seed_and_k_alone(trained, tmp_path):
    for sampler in ("ddim", "ancestral"):
        whole = sample(tmp_path / f"{sampler}-a", f"run='{trained}'", "n=5", f"sampler={sampler}")
        parts = sample(tmp_path / f"{sampler}-b", f"run='{trained}'", "n=3", "batch_size=2", f"sampler={sampler}")
        other = sample(tmp_path / f"{sampler}-c", f"run='{trained}'", "n=3", "seed=1", f"sampler={sampler}")
        assert whole.shape == (5, 8, 8, 1) and whole.dtype == np.uint8
        # A batch of another size may round differently, by one of the digits' 17 levels at most.
        assert np.abs(whole[:3].astype(int) - parts.astype(int)).max() <= 16
        assert (whole[:3] == parts).mean() > 0.99
        assert (whole[:3] != other).any()


def test_sampling_writes_every_image_a_grid_and_a_film(trained, tmp_path):
    samples = sample(tmp_path, f"run='{trained}'", "n=3", "gif=true")
    for k in range(3):
        assert np.array_equal(np.array(Image.open(tmp_path / f"{k:05d}.png")), samples[k, :, :, 0])
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 4
    assert Image.open(tmp_path / "grid.png").width > 3 * 8


def test_a_compiled_network_draws_the_same_samples_in_batches_of_one_size(trained, tmp_path, traced):
    plain, compiled = (
        sample(tmp_path / name, f"run='{trained}'", "n=7", "batch_size=3", f"compile={name}")
        for name in ("null", "true")
    )
    assert traced.frame_count == 1
    assert np.abs(plain.astype(int) - compiled.astype(int)).max() <= 16  # rounding, by one of the digits' 17 levels


def test_half_precision_draws_about_the_same_samples(trained):
    """bfloat16 has 8 digits. What the sampler itself computes stays in float32."""
    opened = open_run(str(trained))
    drawn = []
    for precision in ("32-true", "bf16-mixed"):
        configure_inference(opened, precision, None)
        *_, x = opened.module.sample(range(4), 0)
        assert x.dtype == torch.float32
        drawn.append(x)
    apart = (drawn[1] - drawn[0]).norm() / drawn[0].norm()
    assert 1e-5 < apart < 0.05


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("precision=bf16", "precision=bf16 is none of 32-true, bf16-mixed"),
        ("compile=fast", "compile=fast is no way to compile: true, or a mode of torch.compile, default"),
    ],
)
def test_ways_to_compute_that_there_are_not_are_named(wrong, message, trained, tmp_path):
    from src.errors import UsageError

    with pytest.raises(UsageError, match=message):
        sample(tmp_path, f"run='{trained}'", wrong)


def test_graphs_that_are_replayed_do_not_go_with_gradients_that_are_gathered(tmp_path):
    settings = ("compile=reduce-overhead", "trainer.accumulate_grad_batches=2", f"run_dir='{tmp_path}'")
    with pytest.raises(ValueError, match="replays CUDA graphs"):
        build(compose("train", *TINY, *settings))


def test_samples_are_drawn_as_the_run_was_told_unless_told_otherwise(trained, tmp_path):
    """The run's own sampler is ancestral in 3 steps; settings alone change it, a choice replaces it."""
    own = sample(tmp_path / "a", f"run='{trained}'", "n=4", "sampler.steps=null")
    said = sample(tmp_path / "b", f"run='{trained}'", "n=4", "sampler=ancestral", "sampler.steps=3")
    longer = sample(tmp_path / "c", f"run='{trained}'", "n=4", "sampler.steps=4")
    other = sample(tmp_path / "d", f"run='{trained}'", "n=4", "sampler=ddim")
    assert (own == said).all()
    assert (own != longer).any() and (own != other).any()


def test_raw_weights_are_another_model(trained, tmp_path):
    averaged = sample(tmp_path / "a", f"run='{trained}'", "n=4")
    raw = sample(tmp_path / "b", f"run='{trained}'", "n=4", "ema=false")
    assert (averaged != raw).any()


@pytest.mark.parametrize("damage", ["truncated", "pickle", "foreign"])
def test_what_is_no_checkpoint_is_refused_with_a_sentence(trained, tmp_path, damage):
    path = tmp_path / "bad.ckpt"
    if damage == "truncated":
        path.write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes()[:2000])
    elif damage == "pickle":
        torch.save({"state_dict": {}, "hyper_parameters": os.system}, path)
    else:
        torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="checkpoint"):
        open_run(None, str(path))


def test_a_checkpoint_of_another_network_is_named_as_such(trained, tmp_path):
    from src.errors import UsageError

    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match=r"another network: net\.\S+ is \(.*\) there and \(.*\) here"):
        train_tiny(tmp_path / "run", f"resume='{trained}'", "model.model_channels=16")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule.num_steps=5"], "num_steps must lie in"),
        (["schedule.num_steps=abc"], "schedule.num_steps=abc is of the wrong type: it must be int"),
        (["diffusion.prediction=noise"], "one of eps, x0, v"),
        (["data.batch_size=2000"], "data.batch_size=2000 must be at most"),
        (["data.batch_size=63", "trainer.accumulate_grad_batches=2"], "data.batch_size=63 is the global batch and must be a multiple of 2"),
        (["model.attention_resolutions=[5]"], "attention at [5] does not occur"),
        (["zero_terminal_snr=true", "diffusion.prediction=eps"], "zero SNR x_T is the noise itself"),
        (["sampler=ddim", "sampler.eta=2"], "eta must lie in [0, 1]"),
        (["sampler.steps=0"], "at least 1 step"),
        (["sampler.spacing=even"], "trailing, leading, linspace, karras or log_snr"),
        (["weighting.gamma=-1"], "gamma must be positive"),
        (["lr_scheduler.warmup_steps=-1"], "warmup_steps must not be negative"),
        (["optimizer.lr=-1"], "optimizer.lr=-1 must be positive"),
        (["trainer.accelerator=gpu"], "trainer.accelerator=gpu"),
        (["trainer.devices=0"], "trainer.devices must be at least 1, or auto"),
        (["+trainer.max_stepz=3"], "did you mean trainer.max_steps?"),
        (["trainer.max_epochs=3"], "set trainer.max_steps"),
        (["callbacks.ema.decay=1.5"], "must lie in [0, 1)"),
        (["schedule=custom", "schedule.betas=nowhere.csv"], "no file"),
        (["data=mnist", "data.root={tmp}"], "put the dataset's original files there"),
        (["data=folder", "data.root={tmp}"], "has no images"),
        (["data=folder", "data.root={tmp}/nowhere"], "set data.root to the folder"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_work(overrides, message, tmp_path, no_network):
    from src.errors import UsageError

    given = [o.replace("{tmp}", str(tmp_path)) for o in overrides]
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        train_tiny(tmp_path / "run", *given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_networks_and_data_of_different_kinds_are_told_apart(tmp_path):
    from src.errors import UsageError
    from src.train import train

    for choice, remedy in (("model=mlp", "choose model=unet_tiny"), ("data=points model=unet_tiny", "model=mlp")):
        cfg = compose("train", *choice.split(), f"run_dir='{tmp_path}'")
        with pytest.raises(UsageError, match=remedy):
            train(cfg)


def test_batches_that_are_cut_otherwise_are_not_resumed(trained, tmp_path):
    from src.errors import UsageError

    with pytest.raises(UsageError, match="cannot resume a run that had 1"):
        train_tiny(tmp_path / "run", f"resume='{trained}'", "trainer.accumulate_grad_batches=2")


def test_a_run_that_diverged_says_so(tmp_path):
    from src.errors import UsageError

    with pytest.raises(UsageError, match=r"diverged.*lower optimizer.lr"):
        train_tiny(tmp_path / "run", "optimizer.lr=1e30")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["val/loss"] is None


def test_nothing_to_validate_on_is_no_failure(tmp_path):
    metrics = train_tiny(tmp_path / "run", "+trainer.limit_val_batches=0", "trainer.max_steps=1")
    assert metrics["steps"] == 1 and "val/loss" not in metrics
    assert (tmp_path / "run" / "samples" / "final.png").exists()


def test_custom_betas_from_a_file_are_kept_in_the_run(tmp_path):
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


def test_a_schedule_that_keeps_signal_says_so(tmp_path):
    with pytest.warns(UserWarning, match="does not reach noise"):
        train_tiny(tmp_path / "run", "schedule=quadratic", "schedule.num_steps=100", "trainer.max_steps=1")


def test_a_weighting_that_leaves_the_last_step_out_says_so(tmp_path):
    with pytest.warns(UserWarning, match="no weight at all"):
        train_tiny(tmp_path / "run", "zero_terminal_snr=true", "trainer.max_steps=1")


def test_no_logger_leaves_pictures_all_the_same(tmp_path):
    train_tiny(tmp_path / "run", "logger=none", "trainer.max_steps=2")
    assert (tmp_path / "run" / "samples" / "final.png").exists()
    assert not (tmp_path / "run" / "curves.png").exists()


def allow_fp16(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """On a CPU, where Lightning would take bfloat16 in its place."""
    from lightning.pytorch.plugins.precision import MixedPrecision
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    def plugin(self):
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))

    monkeypatch.setattr(_AcceleratorConnector, "_check_and_init_precision", plugin)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_tables_sinusoids_losses_and_average_are_float32_in_every_precision(trained, tmp_path, monkeypatch, precision):
    """While the network computes in a lower one; its losses stay close to those of float32."""
    from src.models import layers
    from src.training.callbacks.ema import EMA
    from src.training.module import DiffusionModule

    seen: dict[str, set[torch.dtype]] = {}

    def look(owner, name, tensors):
        original = getattr(owner, name)

        def looked_at(*args, **kwargs):
            out = original(*args, **kwargs)
            for tensor in tensors(args[0], args, out):
                seen.setdefault(name, set()).add(tensor.dtype)
            return out

        monkeypatch.setattr(owner, name, looked_at)

    look(layers, "sinusoidal_embedding", lambda time, _, out: [time, out])
    look(DiffusionModule, "_terms", lambda module, args, out: [*module.schedule.level(torch.tensor([3]), args[1])])
    look(DiffusionModule, "training_step", lambda module, _, out: [out["loss"], out["losses"], out["v"]])
    look(EMA, "on_train_batch_end", lambda ema, *_: ema._average)
    look(layers.ResidualBlock, "forward", lambda _, __, out: [out])
    if precision == "16-mixed":
        allow_fp16(monkeypatch, 2.0**10)
    train_tiny(tmp_path / "run", f"trainer.precision={precision}")
    within = seen.pop("forward")
    assert (torch.float16 if precision == "16-mixed" else torch.bfloat16) in within
    assert len(seen) == 4 and all(dtypes == {torch.float32} for dtypes in seen.values()), seen
    ours, full = (np.array(losses(f), dtype=float) for f in (tmp_path / "run", trained))
    # bfloat16 keeps 8 bits: the loss of six steps agrees to a few per cent.
    np.testing.assert_allclose(ours, full, rtol=0.1)


def test_a_run_goes_on_in_another_precision(trained, tmp_path, monkeypatch):
    """From fp16, whose optimizer is not fused, to float32, whose is, and back."""
    folder = tmp_path / "run"
    allow_fp16(monkeypatch, 2.0**10)
    train_tiny(folder, "trainer.precision=16-mixed", "trainer.max_steps=2")
    monkeypatch.undo()
    train_tiny(folder, f"resume='{folder}'", "trainer.max_steps=4")
    allow_fp16(monkeypatch, 2.0**10)
    train_tiny(folder, f"resume='{folder}'", "trainer.precision=16-mixed", "trainer.max_steps=6")
    ours, full = (np.array(losses(f), dtype=float) for f in (folder, trained))
    np.testing.assert_allclose(ours, full, rtol=0.1)


def test_what_is_logged_now_and_then_is_that_of_the_step(trained, tmp_path, monkeypatch):
    """As in a run that logs every step; nothing is written again for the step at which training stops."""
    runs_until(monkeypatch, stop_after=5)
    with pytest.raises(SystemExit):
        train_tiny(tmp_path, "trainer.log_every_n_steps=3")
    for name in ("train/loss", "train/mse", "train/grad_norm"):
        assert losses(tmp_path, name) == losses(trained, name)[2:3]


def test_a_finished_run_that_goes_on_logs_its_steps(tmp_path):
    """Those with the numbers 2, 4, ... of 10, of which it took 4 before: loss, validation and speed, at their steps."""
    often = ("trainer.log_every_n_steps=2", "validate_every=2")
    train_tiny(tmp_path, "trainer.max_steps=4", *often)
    train_tiny(tmp_path, "trainer.max_steps=10", *often, f"resume='{tmp_path}'")
    for name in ("train/loss", "train/grad_norm", "speed/steps_per_second", "val/loss"):
        steps = []
        for log in sorted((tmp_path / "logs").glob("version_*/metrics.csv")):
            with log.open(newline="") as file:
                steps += [int(row["step"]) for row in csv.DictReader(file) if row.get(name)]
        assert steps == [1, 3, 5, 7, 9], name  # Lightning's own count begins at 0


def test_networks_draw_as_if_all_devices_were_seeded():
    seed_networks(7, torch.device("cpu"))
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)


@pytest.fixture
def traced(monkeypatch):
    """Counts the graphs that networks are compiled to, each in one, though not to machine code: that takes a minute."""
    counter, really = CompileCounterWithBackend("aot_eager"), torch.compile

    def compile_quickly(net, *, options, dynamic):
        really(net, options=options, dynamic=dynamic)  # refuses options that there are not
        assert options["force_layout_optimization"]
        return really(net, backend=counter, fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_quickly)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    return counter


def test_a_compiled_run_leaves_the_checkpoints_of_an_uncompiled_one(trained, tmp_path, monkeypatch, traced):
    """Compiled once, for training, whatever the sizes of validation and samples. Then it goes on uncompiled."""
    runs_until(monkeypatch, stop_after=3)
    with pytest.raises(SystemExit):
        train_tiny(tmp_path / "run", "compile=true")
    assert traced.frame_count == 1
    monkeypatch.undo()
    assert weights(tmp_path / "run").keys() == weights(trained).keys()
    with pytest.warns(UserWarning, match="another setting: compile: True -> None"):
        train_tiny(tmp_path / "run", f"resume='{tmp_path / 'run'}'")
    np.testing.assert_allclose(*(np.array(losses(f), dtype=float) for f in (tmp_path / "run", trained)), rtol=1e-4)


def test_a_step_that_overflows_in_fp16_is_skipped_and_said(tmp_path, monkeypatch):
    """The scale starts at 2^40, which no gradient survives: it halves at each step, and no step counts as one of 20."""
    allow_fp16(monkeypatch, 2.0**40)
    with pytest.warns(UserWarning, match="skipped step 0: the gradient overflowed in fp16"):
        train_tiny(tmp_path / "run", "trainer.precision=16-mixed", "callbacks.nan_guard.patience=2")
    rows = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(6)]
    assert [math.log2(row["fp16_scale"]) for row in rows] == pytest.approx([40 - k for k in range(1, 7)], abs=1)
    start, end = (weights(tmp_path / "run", key) for key in ("state_dict", "current_model_state"))
    assert_equal_bits(start, end)  # the average of weights that never moved


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, monkeypatch, no_network):
    """The name is made up once; both parts, offline here, are of one run that `wandb sync` puts together."""
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


def test_points_are_learned_nearly_as_well_as_can_be(tmp_path):
    """On a mixture the best prediction of v is known (Tweedie), and with it the error that no network can beat."""
    from src.train import train

    cfg = compose(
        "train", "data=mixture", "model.model_channels=64", "model.num_res_blocks=2", "trainer.max_steps=400", "validate_every=400",
        "data.val_fraction=0.5", "callbacks.samples.num_samples=100", "callbacks.progress.refresh_rate=0", "sampler.steps=5",
        "trainer.accelerator=cpu", f"run_dir='{tmp_path / 'run'}'",
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
    # Both are means over about 10^4 draws, known to two or three per cent.
    assert 0.96 * best < metrics["val/mse"] < 1.15 * best
    assert Image.open(tmp_path / "run" / "samples" / "final.png").size[0] > 100


def start_two_processes(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """`trainer.devices=2` with DDP over gloo, typed as a user types it."""
    settings = [*TINY, "validate_every=3", "checkpoint_every=1000", "trainer.devices=2", *overrides]
    command = [sys.executable, "-m", "src.train", *once(*settings), f"hydra.run.dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.faults
def test_ctrl_c_in_one_of_two_processes_stops_and_saves_both(tmp_path):
    with start_two_processes(tmp_path / "run", "trainer.max_steps=100000", "validate_every=100000") as diffusion:
        log = tmp_path / "run" / "logs" / "version_0" / "metrics.csv"
        deadline = time.monotonic() + HANG_SECONDS
        while not log.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130, said[-3000:]
    step = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert step > 0 and f"saved at step {step}" in said
