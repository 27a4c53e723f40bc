"""Resolve and build: the configuration is read, resolved on a copy, and instantiated."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from src.config.search_path import CONF
from src.errors import UsageError
from src.runs.build import build, close_run
from src.runs.nodes import instantiate_node
from src.runs.resolve import relocate, resolve
from src.runs.trainer import world_size
from src.train import train
from tests.conftest import TINY, compose, train_tiny
from tests.fork_server import run_python

NOTEBOOK = """
import os
import hydra
with hydra.initialize_config_dir(version_base=None, config_dir={conf!r}):
    cfg = hydra.compose("train", {overrides!r})
from src.runs.build import build
os.chdir({folder!r})
run = build(cfg)
run.trainer.fit(run.module, run.data)
print("steps", run.trainer.global_step, "folders", len({{run.directory, build(cfg).directory}}))
"""


def test_compose_and_build_work_in_a_notebook(tmp_path):
    """In a fresh process, without any other import of the project and without Hydra's main."""
    overrides = [*TINY, "trainer.max_steps=1", "~callbacks.samples", "~callbacks.bits_per_dim"]
    code = NOTEBOOK.format(conf=str(CONF), overrides=overrides, folder=str(tmp_path))
    done = run_python("-c", code, cwd=CONF.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "steps 1 folders 2" in done.stdout
    assert len([*(tmp_path / "outputs" / "train").glob("*/checkpoints/last.ckpt")]) == 1


def test_build_raises_the_error_of_the_constructor(tmp_path):
    for wrong in (
        *("optimizer.lr=-1", "data.batch_size=0", "callbacks.ema.decay=2", "weighting.gamma=-1"),
        *("model.conv_backend=fast", "diffusion.prediction=noise", "trainer.devices=0"),
    ):
        with pytest.raises(ValueError, match=wrong):
            build(compose("train", *TINY, wrong, f"run_dir='{tmp_path}'"))


@pytest.mark.parametrize("more", [[], ["data.microbatch_size=5"], ["trainer.accumulate_grad_batches=4"]])
def test_default_batch_size_is_lowered_to_small_data(tmp_path, monkeypatch, more):
    def resolved(*typed: str, before: int | None = None) -> DictConfig:
        task = SimpleNamespace(overrides=SimpleNamespace(task=[*settings, *typed]))
        monkeypatch.setattr(HydraConfig, "get", lambda: task)
        cfg = compose("train", *settings, *typed)
        if before is not None:
            return resolve(cfg, None, {"hyper_parameters": {**cfg, "data": {**cfg.data, "batch_size": before}}}).data
        return resolve(cfg, data, None).data

    settings = ["data=points", "data.num_samples=41", "trainer.accelerator=cpu", f"run_dir='{tmp_path}'", *more]
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    data = instantiate_node(compose("train", *settings).data)
    with pytest.warns(UserWarning, match="instead of 512"):
        size = resolved().batch_size
    parts = {"data.microbatch_size=5": 5, "trainer.accumulate_grad_batches=4": 4}.get("".join(more), 1)
    assert size == max(n for n in range(len(data.train_indices) + 1) if n % parts == 0)
    assert resolved("++data.batch_size=60").batch_size == 60  # which the sampler refuses
    assert resolved(before=size).batch_size == size


def test_build_leaves_the_configuration_unchanged(tmp_path):
    overrides = ["conditioning=class", "data.microbatch_size=16", "logger=wandb", "trainer.precision=bf16-mixed"]
    cfg = compose("train", *TINY, *overrides, f"run_dir='{tmp_path / 'run'}'")
    before = OmegaConf.to_container(cfg, resolve=False)
    run = build(cfg)
    close_run(run)
    assert OmegaConf.to_container(cfg, resolve=False) == before
    assert list(run.config.conditioning.encode.names) == [str(k) for k in range(10)]
    assert run.config.trainer.accumulate_grad_batches == run.trainer.accumulate_grad_batches == 4
    assert run.config.logger.wandb.id is not None
    assert run.module.hparams == OmegaConf.to_container(run.config, resolve=True)
    assert not (tmp_path / "run").exists()


def test_opened_runs_write_to_no_cache_folder_of_their_own():
    """The configuration may be that of somebody else."""
    config = compose("train", "data=folder", "data.root=photos", "data.cache_dir=/elsewhere", "run_dir=x")
    moved = relocate(config, "other", None, Path("a.ckpt"))
    assert moved.data.cache_dir is None and moved.data.root == "other"
    assert config.data.cache_dir == "/elsewhere"


def test_resolve_infers_settings_on_a_copy_once(tmp_path):
    (tmp_path / "betas.csv").write_text("0.1\n0.2\n")
    overrides = ["conditioning=class", "data.microbatch_size=32", "schedule=custom", "trainer.accelerator=cpu"]
    cfg = compose("train", *overrides, f"schedule.betas='{tmp_path / 'betas.csv'}'", f"run_dir='{tmp_path}'")
    before = OmegaConf.to_container(cfg, resolve=False)
    data = instantiate_node(cfg.data)
    resolved = resolve(cfg, data, None)
    assert OmegaConf.to_container(cfg, resolve=False) == before
    assert list(resolved.schedule.betas) == [0.1, 0.2]
    assert resolve(resolved, data, None) == resolved


def test_microbatches_count_the_processes(tmp_path):
    """A batch of 64 on two processes is two micro-batches of 16 on each."""
    processes = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"]
    cfg = compose("train", "data.microbatch_size=16", *processes, f"run_dir='{tmp_path}'")
    assert world_size(cfg) == 2
    assert resolve(cfg, instantiate_node(cfg.data), None).trainer.accumulate_grad_batches == 2


def test_val_check_interval_counts_steps_with_microbatches():
    from src.runs.trainer_settings import validation_interval

    settings = {"max_steps": 10, "accumulate_grad_batches": 4}
    assert validation_interval(settings, 3) == 12
    assert validation_interval({**settings, "val_check_interval": 8}, 3) == 8
    assert validation_interval({**settings, "val_check_interval": 2}, 3, counts_steps=True) == 8
    assert validation_interval({**settings, "val_check_interval": 0.5}, 3) == 20


def test_fp16_turns_the_fused_optimizer_off(tmp_path):
    cfg = compose("train", "trainer.precision=16-mixed", f"run_dir='{tmp_path}'")
    with pytest.warns(UserWarning, match="optimizer.fused=false"):
        assert resolve(cfg, None, None).optimizer.fused is False


def test_resume_auto_finds_the_job_and_its_settings(tmp_path):
    train_tiny(tmp_path / "run", "trainer.max_steps=1", "logger=none")
    cfg = compose("train", *TINY, "resume=auto", f"run_dir='{tmp_path / 'run'}'")
    assert resolve(cfg, None, None).resume == str(tmp_path / "run")
    cfg.run_dir = str(tmp_path / "empty")
    assert resolve(cfg, None, None).resume is None


def debug(folder: Path, preset: str, *overrides: str) -> dict[str, float]:
    return train(compose("train", *TINY, f"debug={preset}", f"run_dir='{folder}'", *overrides))


def test_debug_fast_dev_run_writes_no_results(tmp_path):
    assert debug(tmp_path / "run", "fast_dev_run")["steps"] == 1
    assert not any((tmp_path / "run" / name).exists() for name in ("checkpoints", "logs", "metrics.json"))


def test_debug_overfit_repeats_two_batches(tmp_path):
    cfg = compose("train", "debug=overfit")
    assert (cfg.trainer.overfit_batches, cfg.trainer.max_steps) == (2, 500)
    assert debug(tmp_path / "run", "overfit", "trainer.max_steps=3", "logger=none")["steps"] == 3


def test_debug_profile_prints_a_table(tmp_path, capsys, caplog):
    with caplog.at_level("INFO"):
        debug(tmp_path / "run", "profile", "trainer.max_steps=2", "logger=none")
    assert "run_training_batch" in caplog.text + capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_debug_presets_override_recipes():
    cfg = compose("train", "experiment=digits", "debug=overfit")
    assert cfg.trainer.max_steps == 500 and cfg.diffusion.prediction == "x0"


def test_unknown_metric_for_a_search_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"optimized_metric=val/los .*val/loss"):
        train_tiny(tmp_path / "run", "optimized_metric=val/los")
