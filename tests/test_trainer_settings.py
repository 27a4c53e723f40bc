"""Every argument of Lightning's Trainer has its documented effect, or is refused for the setting to use instead."""

import csv
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from torch.testing import assert_close

from src.checkpoints import read_checkpoint
from src.disk import WholeCheckpoints
from src.errors import UsageError
from src.overrides import check_overrides
from src.train import train
from tests.conftest import TINY, compose

FAST = [
    *TINY,
    *("trainer.max_steps=4", "validate_every=2", "checkpoint_every=100", "sampler.steps=1", "neighbours.samples=0"),
    *("~callbacks.samples", "~callbacks.bits_per_dim", "~callbacks.beginning", "~callbacks.speed", "trust=true"),
    "+callbacks.seen._target_=tests.test_trainer_settings.Seen",
]
QUIET = ["logger=none", "~callbacks.loss_by_noise"]


class Seen(L.Callback):
    """What a run's callbacks see of it: batches, gradients, validations, switches of torch."""

    last: "Seen"

    def __init__(self) -> None:
        Seen.last = self
        self.batches: list[torch.Tensor] = []
        self.largest: list[float] = []
        self.norms: list[float] = []
        self.validated_at: list[int] = []
        self.validation: list[tuple[int, int, int]] = []
        """Start, total and size of each batch of the last validation."""
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
        gradients = torch.cat([p.grad.flatten() for p in pl_module.parameters()])
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
    seen: Seen
    said: str

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("checkpoints/*"))

    def logged(self, name: str = "train/loss") -> dict[int, str]:
        rows: list[dict[str, str]] = []
        for path in sorted(self.folder.glob("logs/*/metrics.csv")):
            with path.open(newline="") as file:
                rows += csv.DictReader(file)
        return {int(row["step"]): row[name] for row in rows if row.get(name)}


Go = Callable[..., Result]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run with the default settings."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    return Result(folder, train(compose("train", *FAST, f"run_dir='{folder}'")), Seen.last, "")


@pytest.fixture
def go(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Go:
    """Train with overrides, in a folder of its own unless one is named."""
    count = iter(range(100))

    def run(*overrides: str, folder: Path | None = None) -> Result:
        folder = folder or tmp_path / str(next(count))
        caplog.clear()
        metrics = train(compose("train", *FAST, f"run_dir='{folder}'", *overrides))
        printed = capsys.readouterr()
        return Result(folder, metrics, Seen.last, printed.out + printed.err + caplog.text)

    return run


def weights(folder: Path, name: str = "current_model_state") -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")[name]


def same_training(ours: Result, theirs: Result) -> None:
    """The same bits after the last step."""
    for name, value in weights(theirs.folder).items():
        assert torch.equal(weights(ours.folder)[name], value), name


def accelerator(go: Go, base: Result) -> None:
    assert go("trainer.accelerator=cpu", *QUIET).seen.trainer.strategy.root_device.type == "cpu"


def strategy(go: Go, base: Result) -> None:
    same_training(go("trainer.strategy=single_device", *QUIET), base)


def devices(go: Go, base: Result) -> None:
    for given in ("1", "'1'", "null"):
        assert go(f"trainer.devices={given}", *QUIET, "trainer.max_steps=1").seen.trainer.num_devices == 1


def precision(go: Go, base: Result) -> None:
    double = go("trainer.precision=64-true", *QUIET)
    for name, value in weights(double.folder).items():
        assert value.dtype == torch.float64, name
        # Rounding to 24 bits, magnified by Adam where second moments are tiny, within four steps of 2e-3 at most.
        assert_close(value.float(), weights(base.folder)[name], rtol=1e-2, atol=1e-4)
    assert_close(go("trainer.precision=bf16", *QUIET).metrics["val/loss"], base.metrics["val/loss"], rtol=0.05, atol=0)


def logger(go: Go, base: Result) -> None:
    for given in (True, False):
        folder = go(f"trainer.logger={given}", "~callbacks.loss_by_noise", "trainer.max_steps=1").folder
        assert (folder / "logs").exists() == given


def fast_dev_run(go: Go, base: Result) -> None:
    for given, steps in (("true", 1), ("2", 2)):
        got = go(f"trainer.fast_dev_run={given}", "~callbacks.loss_by_noise")
        assert got.metrics["steps"] == len(got.seen.batches) == len(got.seen.validation) == steps
        assert got.metrics["val/loss"] > 0
        assert not (got.folder / "logs").exists() and not got.checkpoints
        assert not (got.folder / "metrics.json").exists()
        assert "fast_dev_run" in got.said
    assert go("trainer.fast_dev_run=true", "data.micro_batch=16", *QUIET).metrics["steps"] == 1
    go(*QUIET, folder=got.folder)  # nothing of it is in the way of a run


def max_steps(go: Go, base: Result) -> None:
    assert go("trainer.max_steps=2", *QUIET).metrics["steps"] == 2


def max_time(go: Go, base: Result) -> None:
    """What has passed after the first step stops there; a resumed run that has none left says so."""
    short = "trainer.max_time={microseconds:1}"
    got = go(short, *QUIET)
    assert got.metrics["steps"] == 1 and "trainer.max_time" in got.said
    again = go(short, *QUIET, f"resume='{got.folder}'", folder=got.folder)
    assert again.metrics["steps"] == 1 and "trainer.max_time" in again.said and not again.seen.batches
    assert (
        go("trainer.max_time='00:01:00:00'", *QUIET, f"resume='{got.folder}'", folder=got.folder).metrics["steps"] == 4
    )


def min_steps(go: Go, base: Result) -> None:
    assert go("trainer.min_steps=3", "trainer.max_time={microseconds:1}", *QUIET).metrics["steps"] == 3


def overfit_batches(go: Go, base: Result) -> None:
    first = base.seen.batches
    got = go("trainer.overfit_batches=2", *QUIET)
    for step, x in enumerate(got.seen.batches):
        assert torch.equal(x, first[step % 2]), step
    assert not torch.equal(first[0], first[1])
    assert len(got.seen.validation) == 2
    parts = go("trainer.overfit_batches=2", "trainer.accumulate_grad_batches=2", *QUIET).seen.batches
    assert torch.equal(torch.cat(parts[4:6]), first[0])
    share = go("trainer.overfit_batches=0.21", "data.batch_size=100", *QUIET).seen  # of 1,438 samples 3.02 batches
    assert torch.equal(share.batches[3], share.batches[0]) and not torch.equal(share.batches[2], share.batches[0])
    half = go("trainer.max_steps=2", *QUIET).folder
    on = go("trainer.overfit_batches=1", *QUIET, f"resume='{half}'", folder=half)
    assert len(on.seen.batches) == 2 and all(torch.equal(x, first[0]) for x in on.seen.batches)


def limit_val_batches(go: Go, base: Result) -> None:
    """The samples that are left are the whole validation set, over which the timesteps are stratified."""
    count = len(base.seen.validation)
    for given, left in (("1", 1), ("0.5", int(count * 0.5)), ("100", count), ("1.0", count)):
        seen = go(f"trainer.limit_val_batches={given}", *QUIET, "trainer.max_steps=1").seen.validation
        assert len(seen) == left
        sizes = [size for _, _, size in seen]
        assert [start for start, _, _ in seen] == [sum(sizes[:k]) for k in range(left)]
        assert {total for _, total, _ in seen} == {sum(sizes)}
    with pytest.warns(UserWarning, match="limit_val_batches=0 turns validation off"):
        off = go("trainer.limit_val_batches=0", *QUIET)
    assert "val/loss" not in off.metrics and "val/loss" not in json.loads((off.folder / "metrics.json").read_text())
    assert off.seen.validated_at == [] and off.checkpoints == ["last.ckpt"] and "not validated" in off.said
    same_training(off, base)
    on = go(f"resume='{off.folder}'", "trainer.max_steps=5", *QUIET, folder=off.folder)
    assert on.metrics["val/loss"] > 0


def val_check_interval(go: Go, base: Result) -> None:
    for given, at in (("1", [1, 2, 3, 4]), ("3", [3, 4]), ("0.5", [2, 4]), ("1.0", [4]), ("100", [4])):
        assert go(f"trainer.val_check_interval={given}", *QUIET).seen.validated_at == at, given
    parts = go("trainer.val_check_interval=6", "trainer.accumulate_grad_batches=2", *QUIET)
    assert parts.seen.validated_at == [3, 4]
    with pytest.raises(UsageError, match=r"validate_every and trainer\.val_check_interval"):
        check_overrides("train", ["validate_every=3", "trainer.val_check_interval=2"])


def num_sanity_val_steps(go: Go, base: Result) -> None:
    """They leave no trace in training, nor where it is resumed in a validation."""
    for given, batches in (("2", 2), ("-1", len(base.seen.validation))):
        got = go(f"trainer.num_sanity_val_steps={given}", *QUIET)
        assert got.seen.sanity_batches == batches and got.seen.validated_at == [2, 4]
        same_training(got, base)
    half = go("trainer.max_steps=3").folder
    on = go(f"resume='{half}'", "trainer.num_sanity_val_steps=2", folder=half)
    assert on.seen.sanity_batches == 2
    with (half / "loss_by_noise.csv").open(newline="") as file:
        samples = [(int(row["step"]), int(row["samples"])) for row in csv.DictReader(file)]
    counts = {step: sum(n for at, n in samples if at == step) for step, _ in samples}
    assert counts == {2: 128, 3: 64, 4: 64}


def log_every_n_steps(go: Go, base: Result) -> None:
    assert list(base.logged()) == [0, 1, 2, 3]
    rarely = go("trainer.log_every_n_steps=2", "~callbacks.loss_by_noise")
    assert rarely.logged() == {step: base.logged()[step] for step in (1, 3)}
    assert go("trainer.log_every_n_steps=null", "~callbacks.loss_by_noise").logged() == {}  # Lightning's default is 50


def enable_checkpointing(go: Go, base: Result) -> None:
    got = go("trainer.enable_checkpointing=false", *QUIET)
    assert not got.checkpoints and "trainer.enable_checkpointing=false" in got.said
    assert "src.sample" not in got.said
    half = go("trainer.max_steps=2", *QUIET).folder
    assert go(f"resume='{half}'", "trainer.enable_checkpointing=false", *QUIET, folder=half).metrics["steps"] == 4
    assert read_checkpoint(half / "checkpoints" / "last.ckpt")["global_step"] == 2


def enable_progress_bar(go: Go, base: Result) -> None:
    assert base.seen.trainer.progress_bar_callback is not None
    got = go("trainer.enable_progress_bar=false", *QUIET, "trainer.max_steps=1")
    assert got.seen.trainer.progress_bar_callback is None


def enable_model_summary(go: Go, base: Result) -> None:
    for given in (True, False):
        said = go(f"trainer.enable_model_summary={given}", *QUIET, "trainer.max_steps=1").said
        assert ("Trainable params" in said) == given


def accumulate_grad_batches(go: Go, base: Result) -> None:
    parts = go("trainer.accumulate_grad_batches=2", *QUIET).seen.batches
    for step, x in enumerate(base.seen.batches):
        assert torch.equal(torch.cat(parts[2 * step : 2 * step + 2]), x)


def gradient_clip_val(go: Go, base: Result) -> None:
    free = go("trainer.gradient_clip_val=null", *QUIET)
    limit = min(free.seen.norms) / 2
    assert all(norm <= limit * 1.001 for norm in go(f"trainer.gradient_clip_val={limit}", *QUIET).seen.norms)
    same_training(go("trainer.gradient_clip_val=0", *QUIET), free)


def gradient_clip_algorithm(go: Go, base: Result) -> None:
    settings = ["trainer.gradient_clip_val=1e-3", *QUIET]
    assert base.seen.largest[0] > 1e-3
    by_value = go("trainer.gradient_clip_algorithm=value", *settings).seen
    assert max(by_value.largest) == pytest.approx(1e-3) and min(by_value.norms) > 1e-3
    assert max(go("trainer.gradient_clip_algorithm=norm", *settings).seen.norms) <= 1e-3 * 1.001


def deterministic(go: Go, base: Result) -> None:
    for given, (on, warns) in {"true": (True, False), "warn": (True, True), "null": (False, False)}.items():
        seen = go(f"trainer.deterministic={given}", *QUIET, "trainer.max_steps=1").seen
        assert (seen.deterministic, seen.warns_only) == (on, warns)


def benchmark(go: Go, base: Result) -> None:
    before = torch.backends.cudnn.benchmark
    try:
        for given in (True, False):
            assert go(f"trainer.benchmark={given}", *QUIET, "trainer.max_steps=1").seen.benchmark == given
    finally:
        torch.backends.cudnn.benchmark = before


def inference_mode(go: Go, base: Result) -> None:
    """Of the validation after training: within it Lightning uses none."""
    for given in (True, False):
        settings = ["trainer.max_steps=2", "trainer.val_check_interval=1", f"trainer.inference_mode={given}"]
        folder = go(*settings, *QUIET).folder
        # With nothing left to train, all that a resumed run does is that validation.
        assert go(*settings, *QUIET, f"resume='{folder}'", folder=folder).seen.inference_mode == given


def use_distributed_sampler(go: Go, base: Result) -> None:
    """The stream is a distributed one, which Lightning does not replace."""
    same_training(go("trainer.use_distributed_sampler=true", *QUIET), base)


def profiler(go: Go, base: Result) -> None:
    for given, action in (("simple", "run_training_batch"), ("advanced", "run_training_batch")):
        got = go(f"trainer.profiler={given}", *QUIET, "trainer.max_steps=1")
        assert "FIT Profiler Report" in got.said and action in got.said


def detect_anomaly(go: Go, base: Result) -> None:
    same_training(go("trainer.detect_anomaly=true", *QUIET), base)
    poison = [
        "+callbacks.poison._target_=tests.faults.Poison",
        "+callbacks.poison.rank=0",
        "+callbacks.poison.steps=[1]",
    ]
    with pytest.raises(RuntimeError, match="returned nan values"), pytest.warns(UserWarning, match="Error detected"):
        go("trainer.detect_anomaly=true", *QUIET, *poison)


def plugins(go: Go, base: Result) -> None:
    """They join those of this project, or take their place."""
    of = "+trainer.plugins=[{_target_:lightning.pytorch.plugins.%s}]"
    theirs = go(of % "TorchCheckpointIO", *QUIET)
    assert type(theirs.seen.trainer.strategy.checkpoint_io) is TorchCheckpointIO
    same_training(theirs, base)
    ours = go(of % "TorchSyncBatchNorm", *QUIET, "trainer.max_steps=1")
    assert isinstance(ours.seen.trainer.strategy.checkpoint_io, WholeCheckpoints)
    assert not go(of % "TorchCheckpointIO", "trainer.enable_checkpointing=false", *QUIET).checkpoints


def sync_batchnorm(go: Go, base: Result) -> None:
    same_training(go("trainer.sync_batchnorm=true", *QUIET), base)


def enable_autolog_hparams(go: Go, base: Result) -> None:
    for given in (True, False):
        folder = go(f"trainer.enable_autolog_hparams={given}", "~callbacks.loss_by_noise", "trainer.max_steps=1").folder
        assert ("max_steps" in (folder / "logs" / "version_0" / "hparams.yaml").read_text()) == given


class Argument(NamedTuple):
    """What an argument does, if it does anything, and its values that are refused with what the error has to name."""

    works: Callable[[Go, Result], None] | None
    refused: Mapping[str, str]


ARGUMENTS: dict[str, Argument] = {
    "accelerator": Argument(accelerator, {"foo": "", "tpu": "", "gpu": "", "7": ""}),
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
            "{_target_:lightning.pytorch.strategies.DDPStrategy,start_method:spawn}": "trainer=ddp",
        },
    ),
    "devices": Argument(devices, {"[0]": "", "'0,'": "", "foo": "", "0": "", "-1": "", "2.5": "", "[]": ""}),
    "num_nodes": Argument(None, {"2": "torchrun", "0": "", "1.5": ""}),
    "precision": Argument(
        precision, {"8": "32-true", "transformer-engine": "bf16-mixed", "16-true": "trainer.precision=32-true"}
    ),
    "logger": Argument(logger, {"5": "logger=csv", "[{_target_:lightning.pytorch.loggers.CSVLogger}]": "+logger."}),
    "callbacks": Argument(None, {"[{_target_:lightning.pytorch.callbacks.Timer}]": "+callbacks.NAME._target_"}),
    "fast_dev_run": Argument(fast_dev_run, {"-1": "", "1.5": "", "abc": ""}),
    "max_epochs": Argument(None, {"3": "trainer.max_steps", "0": "trainer.max_steps"}),
    "min_epochs": Argument(None, {"1": "trainer.min_steps"}),
    "max_steps": Argument(max_steps, {"0": "", "-1": "", "null": "", "2.5": ""}),
    "min_steps": Argument(min_steps, {"5": "trainer.max_steps", "-1": "", "1.5": ""}),
    "max_time": Argument(max_time, {"5": "", "abc": "", "'00:00:00:00'": "", "'1:00'": "", "{hour:1}": ""}),
    "limit_train_batches": Argument(
        None, dict.fromkeys(("2", "1", "0", "0.5"), "trainer.max_steps.*trainer.overfit_batches")
    ),
    "limit_val_batches": Argument(limit_val_batches, {"0.01": "", "-1": "", "1.5": "", "abc": ""}),
    "limit_test_batches": Argument(None, {"2": "src.evaluate"}),
    "limit_predict_batches": Argument(None, {"2": "src.sample"}),
    "overfit_batches": Argument(overfit_batches, {"-1": "", "1.5": "", "0.01": "", "abc": ""}),
    "val_check_interval": Argument(
        val_check_interval,
        dict.fromkeys(("0", "-2", "1.5", "0.0", "true", "'00:00:00:01'", "{minutes:1}"), "validate_every"),
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
    "use_distributed_sampler": Argument(use_distributed_sampler, {"foo": ""}),
    "profiler": Argument(profiler, {"foo": "simple", "5": "simple"}),
    "detect_anomaly": Argument(detect_anomaly, {"foo": ""}),
    "barebones": Argument(None, {"true": "logger=none trainer.enable_checkpointing=false", "foo": ""}),
    "plugins": Argument(plugins, {"[foo]": "_target_", "5": "_target_"}),
    "sync_batchnorm": Argument(sync_batchnorm, {"foo": ""}),
    "reload_dataloaders_every_n_epochs": Argument(None, {"1": "", "-1": ""}),
    "default_root_dir": Argument(None, {"elsewhere": "hydra.run.dir"}),
    "enable_autolog_hparams": Argument(enable_autolog_hparams, {"foo": ""}),
    "model_registry": Argument(None, {"mine": "logger=wandb"}),
}


def test_the_table_and_the_configuration_have_every_argument():
    arguments = {*inspect.signature(L.Trainer).parameters}
    assert {*ARGUMENTS} == arguments
    assert {str(name) for name in compose("train").trainer} - {"_target_"} == arguments


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, argument in ARGUMENTS.items() if argument.works])
def test_argument_has_its_documented_effect(name, go, base):
    works = ARGUMENTS[name].works
    assert works is not None
    works(go, base)


@pytest.mark.filterwarnings("ignore")
def test_other_values_are_refused_in_one_line_that_names_the_setting(tmp_path, monkeypatch):
    for variable in ("NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(variable, raising=False)
    wrong: list[str] = []
    for name, argument in ARGUMENTS.items():
        for value, instead in argument.refused.items():
            line = refusal(tmp_path / "run", f"trainer.{name}={value}")
            if f"trainer.{name}" not in line or "\n" in line or not in_order(instead.split(".*"), line):
                wrong.append(f"trainer.{name}={value}: {line}")
    assert not wrong, "\n".join(wrong)


def refusal(folder: Path, override: str) -> str:
    """What a run ends with, nothing of which is saved unless it has trained."""
    try:
        train(compose("train", *FAST, *QUIET, f"run_dir='{folder}'", override))
    except UsageError as error:
        if "diverged" not in str(error):
            assert not (folder / "checkpoints").exists(), override
        else:
            for path in folder.glob("checkpoints/*"):
                path.unlink()
            (folder / "checkpoints").rmdir()
        return str(error)
    return "not refused"


def in_order(parts: list[str], line: str) -> bool:
    start = 0
    for part in parts:
        start = line.find(part, start)
        if start < 0:
            return False
    return True


def test_errors_of_other_settings_do_not_advise_on_devices(tmp_path):
    for override in ("trainer.profiler=foo", "trainer.gradient_clip_algorithm=foo", "trainer.limit_val_batches=-1"):
        line = refusal(tmp_path / "run", override)
        assert not any(f"trainer.{name}" in line for name in ("accelerator", "devices", "strategy")), line
        assert "trainer=default" not in line


def test_training_that_cannot_go_on_ends_before_min_steps(tmp_path):
    """A guard that has given up is not made to take more steps."""
    settings = ["trainer.min_steps=4", "callbacks.guard.patience=1", "optimizer.lr=1e30", "trainer.max_steps=6"]
    with pytest.raises(UsageError, match=r"no step from .* had a finite gradient"):
        train(compose("train", *FAST, *QUIET, f"run_dir='{tmp_path}'", *settings))
    assert len(Seen.last.batches) < 6
