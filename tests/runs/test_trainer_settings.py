"""Every argument of Lightning's Trainer has its documented effect, or is refused with the setting to use instead."""

import contextlib
import copy
import csv
import inspect
import io
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import DictConfig, OmegaConf
from torch.testing import assert_close

from src.config.overrides import check_overrides
from src.errors import UsageError
from src.train import train
from src.training.checkpoint_io import AtomicCheckpointIO
from src.training.checkpoints import read_checkpoint
from tests.conftest import LOSS_BY_NOISE, TINY, compose

FAST = [
    *TINY,
    LOSS_BY_NOISE,
    *("trainer.max_steps=4", "validate_every=3", "checkpoint_every=100", "sampler.steps=1", "neighbors.num_samples=0"),
    *("~callbacks.samples", "~callbacks.bits_per_dim", "~callbacks.run_info", "~callbacks.throughput", "trust=true"),
    "+callbacks.recorder._target_=tests.runs.test_trainer_settings.Recorder",
]
QUIET = ["logger=none", "~callbacks.loss_by_noise"]


class Recorder(L.Callback):
    """Record batches, gradients, validations and global settings of torch during a run."""

    last: "Recorder"

    def __init__(self) -> None:
        Recorder.last = self
        self.batches: list[torch.Tensor] = []
        self.largest: list[float] = []
        self.norms: list[float] = []
        self.validated_at: list[int] = []
        self.validation: list[tuple[int, int, int]] = []
        """Start, total and size of each batch in the last validation."""
        self.sanity_batches = 0

    def setup(self, trainer, pl_module, stage):
        self.trainer = trainer

    def on_train_start(self, trainer, pl_module):
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        self.warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
        self.benchmark = torch.backends.cudnn.benchmark

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch["x"].clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        gradients = torch.cat(
            [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None] or [torch.ones(1)]
        )
        self.largest.append(gradients.abs().max().item())
        self.norms.append(gradients.norm().item())

    def on_validation_start(self, trainer, pl_module):
        self.inference_mode = torch.is_inference_mode_enabled()
        if not trainer.sanity_checking:
            self.validation.clear()
            self.validated_at.append(trainer.global_step)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.sanity_checking:
            self.sanity_batches += 1
        else:
            self.validation.append((batch["start"], batch["total"], len(batch["x"])))


class Result(NamedTuple):
    folder: Path
    metrics: dict[str, float]
    recorder: Recorder
    output: str

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("checkpoints/*"))

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return read_checkpoint(self.folder / "checkpoints" / "last.ckpt")["current_model_state"]

    def logged(self) -> dict[int, str]:
        """Return the logged text of the training loss by step."""
        rows: list[dict[str, str]] = []
        for path in self.folder.glob("logs/*/metrics.csv"):
            with path.open(newline="") as file:
                rows += csv.DictReader(file)
        return {int(row["step"]): row["train/loss"] for row in rows if row.get("train/loss")}


class Runs:
    """Short runs, each trained at first use. Settings that do not interact share one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = itertools.count()

    def go(self, *overrides: str, folder: Path | None = None) -> Result:
        """Train with overrides, by default in a new folder."""
        folder = folder or self.folder / str(next(self.count))
        output = io.StringIO()
        handler = logging.StreamHandler(output)
        logging.getLogger().addHandler(handler)
        try:
            with contextlib.redirect_stdout(output):
                metrics = train(compose("train", *FAST, f"run_dir='{folder}'", *overrides))
        finally:
            logging.getLogger().removeHandler(handler)
        return Result(folder, metrics, Recorder.last, output.getvalue())

    def resume(self, before: Result, *overrides: str) -> Result:
        return self.go(f"resume='{before.folder}'", *overrides, folder=before.folder)

    @cached_property
    def base(self) -> Result:
        return self.go()

    @cached_property
    def neutral(self) -> Result:
        """A run with settings that do not change training."""
        benchmark = torch.backends.cudnn.benchmark
        try:
            return self.go(
                "trainer.strategy=single_device",
                "trainer.devices='1'",
                "trainer.num_nodes=1",
                "trainer.min_steps=2",
                "trainer.max_time='00:01:00:00'",
                "trainer.logger=true",
                "trainer.log_every_n_steps=2",
                "trainer.num_sanity_val_steps=-1",
                "trainer.enable_progress_bar=false",
                "trainer.enable_model_summary=true",
                "trainer.enable_autolog_hparams=false",
                "trainer.deterministic=true",
                "trainer.benchmark=true",
                "trainer.inference_mode=false",
                "trainer.use_distributed_sampler=true",
                "trainer.profiler=simple",
                "trainer.detect_anomaly=true",
                "trainer.plugins=[{_target_:lightning.pytorch.plugins.TorchCheckpointIO}]",
                "trainer.sync_batchnorm=true",
            )
        finally:
            torch.backends.cudnn.benchmark = benchmark

    @cached_property
    def other(self) -> Result:
        """A run with other data, gradients and validations, without checkpoints and loggers."""
        return self.go(
            "trainer.logger=false",
            "trainer.overfit_batches=2",
            "trainer.val_check_interval=0.5",
            "trainer.enable_checkpointing=false",
            "trainer.gradient_clip_val=1e-3",
            "trainer.gradient_clip_algorithm=value",
            "trainer.deterministic=warn",
            "trainer.plugins=[{_target_:lightning.pytorch.plugins.TorchSyncBatchNorm}]",
        )

    @cached_property
    def parts(self) -> Result:
        """A run with two batches per step."""
        return self.go(
            "trainer.accumulate_grad_batches=2",
            "trainer.overfit_batches=0.17",  # 3.8 batches of 1,438 samples
            "trainer.val_check_interval=6",
            "trainer.gradient_clip_val=1e-3",
            "trainer.log_every_n_steps=null",
        )

    @cached_property
    def halves(self) -> tuple[Result, Result, Result]:
        """Three steps; a fourth step with other settings, not saved; and the fourth step again."""
        first = self.go("trainer.max_steps=3")
        second = self.resume(
            first, "trainer.max_steps=4", "trainer.overfit_batches=1", "trainer.enable_checkpointing=false"
        )
        assert second.checkpoints == first.checkpoints
        return first, second, self.resume(first, "trainer.num_sanity_val_steps=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def assert_same_training(ours: Result, theirs: Result) -> None:
    """Compare the bits of the weights after the last step."""
    weights = ours.weights
    for name, value in theirs.weights.items():
        assert torch.equal(weights[name], value), name


def no_effect_on_training(runs: Runs) -> None:
    assert_same_training(runs.neutral, runs.base)


def devices(runs: Runs) -> None:
    assert runs.neutral.recorder.trainer.num_devices == 1


def strategy(runs: Runs) -> None:
    assert type(runs.neutral.recorder.trainer.strategy) is SingleDeviceStrategy


def precision(runs: Runs) -> None:
    double = runs.go("trainer.precision=64-true", *QUIET).weights
    for name, value in runs.base.weights.items():
        assert double[name].dtype == torch.float64
        # Adam magnifies rounding where second moments are tiny; four steps change a weight by at most 8e-3.
        assert_close(double[name].float(), value, rtol=1e-2, atol=1e-4)


def logger(runs: Runs) -> None:
    assert (runs.neutral.folder / "logs").exists()
    assert not (runs.other.folder / "logs").exists()


def fast_dev_run(runs: Runs) -> None:
    for settings, batches, steps in ((["true"], 1, 1), (["2", "trainer.accumulate_grad_batches=2"], 2, 1)):
        got = runs.go(f"trainer.fast_dev_run={settings[0]}", *settings[1:])
        assert got.metrics["steps"] == steps
        assert len(got.recorder.batches) == len(got.recorder.validation) == batches
        assert got.metrics["val/loss"] > 0
        assert not any((got.folder / name).exists() for name in ("logs", "checkpoints", "metrics.json"))
        assert "trainer.fast_dev_run" in got.output
    assert runs.go("trainer.fast_dev_run=true", "data.microbatch_size=16", *QUIET).metrics["steps"] == 1


def max_steps(runs: Runs) -> None:
    first, _, last = runs.halves
    assert (first.metrics["steps"], last.metrics["steps"]) == (3, 4)


def max_time(runs: Runs) -> None:
    """Time runs out after the first step. Resumed, the run says so, and with more time it trains."""
    short = ["trainer.max_time={microseconds:1}", *QUIET]
    got = runs.go(*short)
    assert got.metrics["steps"] == 1 and "trainer.max_time" in got.output
    again = runs.resume(got, *short)
    assert again.metrics["steps"] == 1 and "trainer.max_time" in again.output and not again.recorder.batches
    assert runs.resume(got, "trainer.max_time='00:01:00:00'", *QUIET).metrics["steps"] == 4


def min_steps(runs: Runs) -> None:
    assert runs.go("trainer.min_steps=3", "trainer.max_time={microseconds:1}", *QUIET).metrics["steps"] == 3


def overfit_batches(runs: Runs) -> None:
    first = runs.base.recorder.batches
    assert not torch.equal(first[0], first[1])
    for step, x in enumerate(runs.other.recorder.batches):
        assert torch.equal(x, first[step % 2]), step
    assert len(runs.other.recorder.validation) == 2
    for step in range(4):
        x = torch.cat(runs.parts.recorder.batches[2 * step : 2 * step + 2])
        assert torch.equal(x, first[step % 3]), step
    (x,) = runs.halves[1].recorder.batches
    assert torch.equal(x, first[0])


def limit_val_batches(runs: Runs) -> None:
    """Timesteps are stratified over the samples within the limit."""
    count = len(runs.base.recorder.validation)
    share = runs.go("trainer.limit_val_batches=0.5", "trainer.max_steps=1", *QUIET)
    for recorder, batches in (
        (runs.base.recorder, count),
        (runs.other.recorder, 2),
        (share.recorder, int(count * 0.5)),
    ):
        sizes = [size for _, _, size in recorder.validation]
        assert [start for start, _, _ in recorder.validation] == [sum(sizes[:k]) for k in range(batches)]
        assert {total for _, total, _ in recorder.validation} == {sum(sizes)}
    with pytest.warns(UserWarning, match="limit_val_batches=0 disables validation"):
        off = runs.go("trainer.limit_val_batches=0", *QUIET)
    assert "val/loss" not in off.metrics and "val/loss" not in json.loads((off.folder / "metrics.json").read_text())
    assert off.recorder.validated_at == [] and off.checkpoints == ["last.ckpt"] and "not validated" in off.output
    assert_same_training(off, runs.base)
    assert runs.resume(off, "trainer.max_steps=5", *QUIET).metrics["val/loss"] > 0


def val_check_interval(runs: Runs) -> None:
    assert runs.base.recorder.validated_at == [3, 4]
    assert runs.other.recorder.validated_at == [2, 4]
    assert runs.parts.recorder.validated_at == [3, 4]
    for value, expected in (("1", [1, 2]), ("1.0", [2]), ("100", [2])):
        got = runs.go(f"trainer.val_check_interval={value}", "trainer.max_steps=2", *QUIET)
        assert got.recorder.validated_at == expected, value
    with pytest.raises(UsageError, match=r"trainer\.val_check_interval"):
        check_overrides("train", ["validate_every=3", "trainer.val_check_interval=2"])


def num_sanity_val_steps(runs: Runs) -> None:
    """They change neither training nor the metrics of later validations, resumed or not."""
    assert runs.base.recorder.sanity_batches == 0
    assert runs.neutral.recorder.sanity_batches == len(runs.base.recorder.validation)
    assert runs.neutral.recorder.validated_at == runs.base.recorder.validated_at
    with (runs.halves[2].folder / "loss_by_noise.csv").open(newline="") as file:
        samples = [(int(row["step"]), int(row["samples"])) for row in csv.DictReader(file)]
    assert {step: sum(n for at, n in samples if at == step) for step, _ in samples} == {3: 192, 4: 64}


def log_every_n_steps(runs: Runs) -> None:
    every = runs.base.logged()
    assert list(every) == [0, 1, 2, 3]
    assert runs.neutral.logged() == {step: every[step] for step in (1, 3)}
    assert runs.parts.logged() == {}  # Lightning's default is 50


def enable_checkpointing(runs: Runs) -> None:
    assert not runs.other.checkpoints and "trainer.enable_checkpointing=false" in runs.other.output
    assert "src.sample" in runs.base.output and "src.sample" not in runs.other.output
    assert runs.halves[1].metrics["steps"] == 4  # The checkpoint stays at step 3.


def enable_progress_bar(runs: Runs) -> None:
    assert runs.base.recorder.trainer.progress_bar_callback is not None
    assert runs.neutral.recorder.trainer.progress_bar_callback is None


def enable_model_summary(runs: Runs) -> None:
    assert "Trainable params" not in runs.base.output and "Trainable params" in runs.neutral.output


def accumulate_grad_batches(runs: Runs) -> None:
    x = torch.cat(runs.parts.recorder.batches[:2])
    assert torch.equal(x, runs.base.recorder.batches[0]) and runs.parts.metrics["steps"] == 4


def gradient_clip_val(runs: Runs) -> None:
    assert min(runs.base.recorder.norms) > 1e-3
    # The gradient after the first batch of a step is incomplete and not clipped.
    assert max(runs.parts.recorder.norms[1::2]) <= 1.001e-3
    free, none = (runs.go(f"trainer.gradient_clip_val={value}", *QUIET) for value in ("0", "null"))
    assert_same_training(free, none)


def gradient_clip_algorithm(runs: Runs) -> None:
    assert max(runs.base.recorder.largest) > 1e-3
    assert max(runs.other.recorder.largest) == pytest.approx(1e-3) and min(runs.other.recorder.norms) > 2e-3


def deterministic(runs: Runs) -> None:
    switches = [
        (each.recorder.deterministic, each.recorder.warns_only) for each in (runs.neutral, runs.other, runs.parts)
    ]
    assert switches == [(True, False), (True, True), (False, False)]


def benchmark(runs: Runs) -> None:
    assert runs.neutral.recorder.benchmark and not runs.base.recorder.benchmark


def inference_mode(runs: Runs) -> None:
    """In the validation after training. Lightning turns it off during training."""
    assert runs.base.recorder.inference_mode and not runs.neutral.recorder.inference_mode


def profiler(runs: Runs) -> None:
    assert "FIT Profiler Report" in runs.neutral.output and "run_training_batch" in runs.neutral.output


def detect_anomaly(runs: Runs) -> None:
    poison = [f"+callbacks.poison.{setting}" for setting in ("_target_=tests.faults.Poison", "rank=0", "steps=[1]")]
    with (
        pytest.raises(RuntimeError, match="returned nan values"),
        pytest.warns(UserWarning, match="Error detected"),
    ):
        runs.go("trainer.detect_anomaly=true", *QUIET, *poison)


def plugins(runs: Runs) -> None:
    """They add to the plugins of this project or replace them."""
    assert type(runs.neutral.recorder.trainer.strategy.checkpoint_io) is TorchCheckpointIO
    assert isinstance(runs.base.recorder.trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert not runs.other.checkpoints


def enable_autolog_hparams(runs: Runs) -> None:
    assert "max_steps" in (runs.base.folder / "logs" / "version_0" / "hparams.yaml").read_text()
    assert not (runs.neutral.folder / "logs" / "version_0" / "hparams.yaml").exists()


class Argument(NamedTuple):
    """A check of the effect of an argument, if it has one, and refused values with the words of the error."""

    works: Callable[[Runs], None] | None
    refused: Mapping[str, str]


ARGUMENTS: dict[str, Argument] = {
    "accelerator": Argument(no_effect_on_training, {"foo": "", "tpu": "", "gpu": "", "7": ""}),
    "strategy": Argument(
        strategy,
        {
            "foo": "",
            "7": "",
            "fsdp": "trainer=fsdp",
            "deepspeed_stage_2": "trainer=fsdp",
            "ddp_spawn": "trainer=ddp",
            "ddp_fork": "trainer=ddp",
            "ddp_notebook": "trainer=ddp",
            "{_target_: lightning.pytorch.strategies.DDPStrategy, start_method: spawn}": "trainer=ddp",
        },
    ),
    "devices": Argument(devices, {"[0]": "", "'0,'": "", "foo": "", "0": "", "-1": "", "2.5": "", "[]": ""}),
    "num_nodes": Argument(None, {"2": "torchrun", "0": "", "1.5": ""}),
    "precision": Argument(
        precision, {"8": "32-true", "transformer-engine": "bf16-mixed", "16-true": "trainer.precision=32-true"}
    ),
    "logger": Argument(logger, {"5": "logger=csv", "[{_target_: lightning.pytorch.loggers.CSVLogger}]": "+logger."}),
    "callbacks": Argument(None, {"[{_target_: lightning.pytorch.callbacks.Timer}]": "+callbacks.NAME._target_"}),
    "fast_dev_run": Argument(fast_dev_run, {"-1": "", "1.5": "", "abc": ""}),
    "max_epochs": Argument(None, {"3": "trainer.max_steps", "0": "trainer.max_steps"}),
    "min_epochs": Argument(None, {"1": "trainer.min_steps"}),
    "max_steps": Argument(max_steps, {"0": "", "-1": "", "null": "", "2.5": ""}),
    "min_steps": Argument(min_steps, {"5": "trainer.max_steps", "-1": "", "1.5": ""}),
    "max_time": Argument(max_time, {"5": "", "abc": "", "'00:00:00:00'": "", "'1:00'": "", "{hour: 1}": ""}),
    "limit_train_batches": Argument(
        None, dict.fromkeys(("2", "1", "0", "0.5"), "trainer.max_steps.*trainer.overfit_batches")
    ),
    "limit_val_batches": Argument(limit_val_batches, {"0.01": "", "-1": "", "1.5": "", "abc": ""}),
    "limit_test_batches": Argument(None, {"2": "src.evaluate"}),
    "limit_predict_batches": Argument(None, {"2": "src.sample"}),
    "overfit_batches": Argument(overfit_batches, {"-1": "", "1.5": "", "0.01": "", "abc": ""}),
    "val_check_interval": Argument(
        val_check_interval,
        dict.fromkeys(("0", "-2", "1.5", "0.0", "true", "'00:00:00:01'", "{minutes: 1}"), "validate_every"),
    ),
    "check_val_every_n_epoch": Argument(None, {"1": "validate_every", "2": "validate_every"}),
    "num_sanity_val_steps": Argument(num_sanity_val_steps, {"-2": "", "1.5": ""}),
    "log_every_n_steps": Argument(log_every_n_steps, {"0": "logger=none", "-1": "logger=none", "1.5": ""}),
    "enable_checkpointing": Argument(enable_checkpointing, {"abc": ""}),
    "enable_progress_bar": Argument(enable_progress_bar, {"abc": ""}),
    "enable_model_summary": Argument(enable_model_summary, {"abc": ""}),
    "accumulate_grad_batches": Argument(accumulate_grad_batches, {"0": "", "-1": "", "1.5": ""}),
    "gradient_clip_val": Argument(gradient_clip_val, {"-1": "", "abc": ""}),
    "gradient_clip_algorithm": Argument(gradient_clip_algorithm, {"foo": "", "1": ""}),
    "deterministic": Argument(deterministic, {"foo": "warn"}),
    "benchmark": Argument(benchmark, {"foo": ""}),
    "inference_mode": Argument(inference_mode, {"foo": ""}),
    "use_distributed_sampler": Argument(no_effect_on_training, {"foo": ""}),
    "profiler": Argument(profiler, {"foo": "simple", "5": "simple"}),
    "detect_anomaly": Argument(detect_anomaly, {"foo": ""}),
    "barebones": Argument(None, {"true": "logger=none trainer.enable_checkpointing=false", "foo": ""}),
    "plugins": Argument(plugins, {"[foo]": "_target_", "5": "_target_"}),
    "sync_batchnorm": Argument(no_effect_on_training, {"foo": ""}),
    "reload_dataloaders_every_n_epochs": Argument(None, {"1": "", "-1": ""}),
    "default_root_dir": Argument(None, {"elsewhere": "hydra.run.dir"}),
    "enable_autolog_hparams": Argument(enable_autolog_hparams, {"foo": ""}),
    "model_registry": Argument(None, {"mine": "logger=wandb"}),
}


def test_table_and_configuration_have_every_argument():
    arguments = {*inspect.signature(L.Trainer).parameters}
    assert {*ARGUMENTS} == arguments
    assert {str(name) for name in compose("train").trainer} - {"_target_"} == arguments


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, argument in ARGUMENTS.items() if argument.works])
def test_argument_has_its_documented_effect(name, runs):
    works = ARGUMENTS[name].works
    assert works is not None
    works(runs)


@pytest.mark.filterwarnings("ignore")
def test_invalid_values_are_refused_in_one_line(tmp_path, monkeypatch):
    for variable in ("NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(variable, raising=False)
    settings = compose("train", *FAST, *QUIET, "trainer.max_steps=2", f"run_dir='{tmp_path / 'run'}'")
    wrong: list[str] = []
    for name, argument in ARGUMENTS.items():
        for value, instead in argument.refused.items():
            line = error_of(settings, name, value)
            if f"trainer.{name}" not in line or "\n" in line or not in_order(instead.split(".*"), line):
                wrong.append(f"trainer.{name}={value}: {line}")
            if not {name} & {*DEVICE_ARGUMENTS} and "trainer=default" in line:
                wrong.append(f"trainer.{name}={value} gets advice about devices: {line}")
    assert not wrong, "\n".join(wrong)


DEVICE_ARGUMENTS = ("accelerator", "strategy", "devices", "num_nodes", "precision")


def error_of(settings: DictConfig, name: str, value: str) -> str:
    """Return the error that a run ends with. It must leave no checkpoint, unless it trained and diverged."""
    cfg = copy.deepcopy(settings)
    OmegaConf.update(cfg, f"trainer.{name}", yaml.safe_load(value), merge=False)
    folder = Path(cfg.run_dir)
    try:
        train(cfg)
    except UsageError as error:
        if "diverged" in str(error):
            shutil.rmtree(folder / "checkpoints")
        assert not (folder / "checkpoints").exists(), f"trainer.{name}={value}"
        return str(error)
    shutil.rmtree(folder)
    return "not refused"


def in_order(parts: list[str], line: str) -> bool:
    start = 0
    for part in parts:
        start = line.find(part, start)
        if start < 0:
            return False
    return True


def test_guard_that_gives_up_ends_before_min_steps(tmp_path):
    """`trainer.min_steps` does not extend training after the guard gives up."""
    settings = ["trainer.min_steps=4", "callbacks.nan_guard.patience=1", "optimizer.lr=1e30", "trainer.max_steps=6"]
    with pytest.raises(UsageError, match=r"no step from .* had a finite gradient"):
        train(compose("train", *FAST, *QUIET, f"run_dir='{tmp_path}'", *settings))
    assert len(Recorder.last.batches) < 6
