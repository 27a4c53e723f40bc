"""Autoencoders from end to end: training, resuming, several processes, opening, export and other commands."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

from src.comparison.survey import survey
from src.errors import UsageError
from src.export import export
from src.runs.autoencoder import open_autoencoder
from src.training.checkpoints import read_checkpoint
from tests.conftest import compose, once
from tests.fork_server import run_ranks

TINY = [
    "task=autoencoder",
    "model.model_channels=8",
    "model.channel_mult=[1,2]",
    "trainer.accelerator=cpu",
    "trainer.max_steps=4",
    "trainer.log_every_n_steps=1",
    "validate_every=2",
    "checkpoint_every=2",
    "callbacks.reconstructions.num_samples=10",
    "callbacks.progress.refresh_rate=0",
]


def train_tiny(folder: Path, *overrides: str) -> dict[str, float]:
    from src.train import train

    return train(compose("train", *TINY, f"run_dir='{folder}'", *overrides))


def weights(path: Path, key: str = "state_dict") -> dict[str, torch.Tensor]:
    return read_checkpoint(path / "checkpoints" / "last.ckpt" if path.is_dir() else path)[key]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder") / "run"
    train_tiny(folder)
    return folder


def test_run_writes_reconstructions_and_metrics(run):
    for name in ("samples/step_000002.png", "samples/step_000004.png", "samples/final.png", "curves.png"):
        assert (run / name).stat().st_size > 0
    assert not (run / "loss_by_noise.csv").exists()
    assert not (run / "nonfinite.jsonl").exists()
    metrics = json.loads((run / "metrics.json").read_text())
    terms = ["loss", "l1", "kl", "psnr", *(f"latent_{name}_{k}" for name in ("mean", "std") for k in range(4))]
    assert {f"val/{name}" for name in terms} == {name for name in metrics if name.startswith("val/")}
    assert metrics["val/loss"] == pytest.approx(metrics["val/l1"] + 1e-6 * metrics["val/kl"])


def test_resumed_run_ends_with_the_same_bits(run, tmp_path, monkeypatch):
    """The run is interrupted by an error in its third step, after the checkpoint of the second."""
    from src.training.autoencoder import AutoencoderModule

    original = AutoencoderModule.training_step

    def step(self, batch, batch_idx):
        if self.global_step == 2:
            raise ZeroDivisionError
        return original(self, batch, batch_idx)

    folder = tmp_path / "run"
    monkeypatch.setattr(AutoencoderModule, "training_step", step)
    with pytest.raises(ZeroDivisionError):
        train_tiny(folder)
    monkeypatch.undo()
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 2
    train_tiny(folder, f"resume='{folder}'")
    for key in ("state_dict", "current_model_state"):
        ours, theirs = weights(folder, key), weights(run, key)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (json.loads((each / "metrics.json").read_text()) for each in (folder, run))
    assert {k: v for k, v in ours.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}


def test_accumulated_batches_train_the_same_model(run, tmp_path):
    train_tiny(tmp_path / "run", "data.microbatch_size=16")
    ours, theirs = weights(tmp_path / "run"), weights(run)
    for name, weight in theirs.items():
        assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_like_one(run, tmp_path):
    (tmp_path / "cwd").mkdir()
    words = once(*TINY, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    for done in run_ranks(2, "-m", "src.train", *words, f"hydra.run.dir={tmp_path / 'two'}", cwd=tmp_path / "cwd"):
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    ours, theirs = weights(tmp_path / "two"), weights(run)
    for name, weight in theirs.items():
        assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)
    metrics = [json.loads((each / "metrics.json").read_text()) for each in (tmp_path / "two", run)]
    for name in [name for name in metrics[1] if name.startswith("val/")]:
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4, abs=1e-5), name


def test_autoencoder_opens_with_averaged_weights(run):
    net = open_autoencoder(str(run))
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    averaged, raw = weights(run), weights(run, "current_model_state")
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, averaged[f"net.{name}"]), name
    assert any(not torch.equal(averaged[name], raw[name]) for name in averaged)
    assert (net.channels, net.latent_channels, net.factor) == (1, 4, 2)


def test_exported_autoencoder_opens_with_equal_weights(run, tmp_path):
    path = export(compose("export", f"run={run}", f"run_dir='{tmp_path}'"))
    ours, theirs = open_autoencoder(str(tmp_path)), open_autoencoder(str(run))
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight)
    assert load_file(path).keys() == weights(run).keys()
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    code = card.partition("```python\n")[2].partition("```")[0].replace("model.safetensors", str(path))
    names = {"x": torch.zeros(2, 1, 8, 8)}
    exec(code, names)
    assert "pytorch" in front["tags"] and names["images"].shape == names["x"].shape
    with pytest.raises(UsageError, match="format=diffusers"):
        export(compose("export", f"run={run}", f"run_dir='{tmp_path / 'other'}'", "format=diffusers"))


def test_other_weights_and_models_are_refused(run, trained, tmp_path):
    with pytest.raises(ValueError, match="task=autoencoder"):
        open_autoencoder(str(trained))
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in {"_target_": "os.system", "model_channels": 16}.items():
        model = checkpoint["hyper_parameters"]["model"] | {name: value}
        changed = checkpoint | {"hyper_parameters": checkpoint["hyper_parameters"] | {"model": model}}
        torch.save(changed, tmp_path / "changed.ckpt")
        with pytest.raises(ValueError, match="trust=true" if name == "_target_" else "another network"):
            open_autoencoder(str(tmp_path / "changed.ckpt"))


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_other_commands_name_the_next_step(name, run, tmp_path):
    import src.evaluate
    import src.sample

    command = {"sample": src.sample.sample, "evaluate": src.evaluate.evaluate}[name]
    with pytest.raises(UsageError, match=r"python -m src\.train autoencoder="):
        command(compose(name, f"run={run}", f"run_dir='{tmp_path / name}'"))


def test_comparison_skips_autoencoders(run, trained):
    runs, notes = survey([run, trained])
    assert [each.folder for each in runs] == [trained]
    assert len(notes) == 1
    assert "autoencoder" in notes[0]


def test_summary_names_psnr_and_the_next_command(tmp_path, capsys):
    train_tiny(tmp_path / "run", "trainer.max_steps=1", "validate_every=1", "callbacks.reconstructions=null")
    printed = capsys.readouterr().out
    assert "PSNR" in printed
    assert f"python -m src.train autoencoder={tmp_path / 'run'} " in printed
    assert "src.sample" not in printed


def test_skipped_steps_are_recorded_without_noise_levels(tmp_path, monkeypatch):
    from src.training.autoencoder import AutoencoderLoss

    original = AutoencoderLoss.__call__

    def call(self, x, out):
        terms = original(self, x, out)
        return {name: value * float("nan") for name, value in terms.items()}

    monkeypatch.setattr(AutoencoderLoss, "__call__", call)
    with pytest.warns(UserWarning, match="skipped step"), pytest.raises(UsageError, match="diverged"):
        train_tiny(tmp_path / "run", "trainer.max_steps=1", "validate_every=1", "callbacks.reconstructions=null")
    (line,) = map(json.loads, (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines())
    assert len(line["losses"]) == len(line["samples"])
    assert "t" not in line


def test_export_refuses_an_average_that_was_not_kept(run, tmp_path):
    with pytest.raises(UsageError, match=r"ema=0\.1"):
        export(compose("export", f"run={run}", f"run_dir='{tmp_path}'", "ema=0.1"))


def test_adapters_of_a_trained_autoencoder_train(run, tmp_path):
    short = ["trainer.max_steps=1", "validate_every=1", "callbacks.reconstructions=null", "lr_scheduler.warmup_steps=0"]
    train_tiny(tmp_path / "run", f"init_from.path={run}", "lora=default", "callbacks.ema=null", *short)
    ours, theirs = (open_autoencoder(str(each)).state_dict() for each in (tmp_path / "run", run))
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)
