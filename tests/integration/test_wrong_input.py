"""Invalid values are refused with one line that names the setting; unusual valid ones work."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import src
from src.compare import compare
from src.config.cli import launch
from src.config.overrides import check_overrides
from src.config.resume import check_unused, check_writable, expand_resume, expand_sweep
from src.config.rules import check_values
from src.config.search_path import CONF
from src.config.words import choose_none
from src.distributed.processes import check_processes
from src.errors import UsageError, literal
from src.evaluate import evaluate
from src.runs.build import build, close_run
from src.sample import sample
from src.schedules import show_schedules
from src.train import train
from tests.conftest import TINY, compose, train_tiny

ROOT = CONF.parent
COMMANDS = {"sample": sample, "evaluate": evaluate, "compare": compare, "schedules": show_schedules, "train": train}


def refused(call, *fragments: str) -> None:
    """Check that a call raises an error of one line with the fragments."""
    with pytest.raises((UsageError, ValueError, OSError)) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message


# Values.


def test_non_finite_numbers_are_refused():
    """NaN is refused everywhere, an infinity unless it means that there is no bound."""
    for name, override in (
        *(("train", f"optimizer.lr={value}") for value in ("inf", "-inf", "nan", "+inf", "1e999")),
        *(("train", f"{name}=inf") for name in ("optimizer.weight_decay", "snr_shift", "diffusion.clip_x0")),
        *(("train", f"{name}=nan") for name in ("data.val_fraction", "model.dropout", "trainer.gradient_clip_val")),
        ("train", "callbacks.ema.decay=nan"),
        ("train", "optimizer.betas=[0.9,nan]"),
        ("train", "guidance.interval=[nan,2]"),
        ("train", "schedule=cosine schedule.offset=nan"),
        ("sample", "guidance.scale=nan"),
        ("sample", "guidance.rescale=inf"),
        ("sample", "seed=nan"),
        ("sample", "sampler=ddim sampler.eta=inf"),
        ("evaluate", "ode_tolerance=inf"),
        ("evaluate", "alignment.scales=[1,inf]"),
        ("schedules", "snr_shift=-inf"),
        ("sample", "sampler=heun sampler.s_tmax=-inf"),
    ):
        overrides = override.split()
        setting = overrides[-1].partition("=")[0]
        refused(lambda name=name, overrides=overrides: check_overrides(name, overrides), f"{setting}=", "finite")
    refused(lambda: check_overrides("train", ["optimizer.lr=1e-3,nan"], multirun=True), "optimizer.lr=nan")
    check_overrides("train", ["guidance.interval=[0.2,inf]"])
    check_overrides("sample", ["sampler=heun", "sampler.s_tmax=inf"])


def test_every_value_of_a_sweep_is_checked():
    for override in ("seed=0,one", "optimizer.lr=1e-3,fast", "zero_terminal_snr=true,2", "seed=0,''"):
        refused(lambda override=override: check_overrides("train", [override], multirun=True), override.split("=")[0])


def test_empty_values_are_refused():
    """An empty path would be the current folder."""
    for command, name in (
        *(("sample", name) for name in ("run", "ckpt", "encoder", "guidance.model", "device", "precision", "seed")),
        *(("evaluate", name) for name in ("run", "data.root", "cache", "features", "reference")),
        *(("compare", name) for name in ("runs", "data.root")),
        *(
            ("train", name)
            for name in ("data.root", "compile", "optimized_metric", "trainer.precision", "model", "schedule")
        ),
    ):
        refused(lambda c=command, o=f"{name}=''": check_overrides(c, [o]), name)
    for name in ("run", "device", "data.root"):  # a path of a run, a text, and a path of data
        for empty in ("", "' '"):
            command = "evaluate" if name == "data.root" else "sample"
            refused(lambda c=command, o=f"{name}={empty}": check_overrides(c, [o]), name)
    check_overrides("train", ["logger.csv.prefix=''"])  # its default
    check_overrides("sample", ["cond=''", "negative=''"])  # texts may be empty
    for call in (
        lambda: expand_resume(["resume="]),
        lambda: expand_resume(["++resume=''"]),
        lambda: expand_sweep(["resume="]),
        lambda: sample(compose("sample", "run=''")),
        lambda: sample(compose("sample", "ckpt=''")),
    ):
        refused(call, "is empty")
    for name in ("hydra.run.dir", "hydra.sweep.dir"):
        refused(lambda name=name: check_writable([f"{name}="]), f"{name}= is empty")
    refused(lambda: check_unused(["hydra.run.dir="]), "hydra.run.dir= is empty")
    for runs_given in ("[]", "['']"):
        refused(lambda given=runs_given: compare(compose("compare", f"runs={given}")), "runs")


def test_typed_settings_override_those_of_resumed_run(tmp_path):
    """The typed value wins over saved ones, even repeated ones."""
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("[trainer.max_steps=4, seed=1, ++trainer.max_steps=6]\n")
    expanded = expand_resume([f"resume={literal(tmp_path)}", "trainer.max_steps=9"])
    check_overrides("train", expanded)
    cfg = compose("train", *expanded[:-1])
    assert cfg.trainer.max_steps == 9 and cfg.seed == 1
    # A run resumes in its own folder, and null cancels one of two exclusive settings.
    refused(lambda: expand_resume([f"resume={literal(tmp_path)}", "hydra.run.dir=elsewhere"]), "hydra.run.dir")
    check_overrides("train", ["trainer.val_check_interval=3", "trainer.val_check_interval=null", "validate_every=2"])
    for words in (["analytic=mixture", "n=5"], ["run=x", "analytic_steps=[5,10]"]):
        refused(lambda words=words: check_overrides("evaluate", words), "analytic=")
    check_overrides("evaluate", ["analytic=gaussian", "analytic_steps=[5]", "seed=1", "hydra.run.dir=x"])
    check_overrides("evaluate", ["analytic=none", "run=x", "n=50"])
    again = choose_none(["callbacks=quality", "conditioning=class", "seed=1", "callbacks=null", "conditioning=null"])
    assert again == ["seed=1", "callbacks=none", "~conditioning"]


@pytest.mark.parametrize("words", [["seed=1.5"], ["resume="], ["-m", "resume="], ["hydra.run.dir="]], ids=str)
def test_refused_command_exits_with_status_two(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(SystemExit) as ended:
        launch("train", lambda _: None)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1
    assert words[-1].split("=")[0] in said
    assert not list(tmp_path.iterdir())


def test_seeds_out_of_range_are_refused(trained, tmp_path):
    for name, setting in (
        ("sample", "seed=-1"),
        ("sample", f"seed={2**32}"),
        ("evaluate", "seed=-1"),
        ("evaluate", "analytic=mixture seed=-1"),
        ("schedules", "seed=-1"),
        ("train", "seed=-1"),
        ("train", "data.split_seed=-1"),
        ("train", "callbacks.samples.seed=-2"),
    ):
        run = {"sample": [f"run='{trained}'"], "train": TINY}.get(name, [f"run='{trained}'"] * (setting == "seed=-1"))
        run = [] if name == "schedules" else run
        cfg = compose(name, *run, *setting.split(), f"run_dir='{tmp_path}'")
        refused(lambda name=name, cfg=cfg: COMMANDS[name](cfg), setting.split()[-1])
    check_values(compose("train", f"seed={2**32 - 1}"))


def test_counts_below_one_are_refused(trained, tmp_path):
    for name, settings in (
        ("sample", ("n=0", "n=-3", "batch_size=0", "sampler.steps=0", "devices=0", "devices=-1", "num_nodes=0")),
        (
            "evaluate",
            (
                "n=0",
                "max_features=0",
                "num_memorization=-1",
                "num_val=0",
                "num_terms=0",
                "batch_size=0",
                "devices=0",
            ),
        ),
        ("evaluate", ("alignment.n=0", "alignment.detector_steps=0", "ode_tolerance=0", "ode_tolerance=-1")),
        ("schedules", ("num_steps=0", "num_steps=-1", "frames=1")),
    ):
        run = [] if name == "schedules" else [f"run='{trained}'"]
        for setting in settings:
            call = lambda n=name, s=setting, run=run: COMMANDS[n](compose(n, *run, s, f"run_dir='{tmp_path}'"))  # noqa: E731
            refused(call, setting.split("=")[0])


def test_too_many_processes_are_refused(trained, tmp_path):
    """A CPU allows 8 processes, or one per core; several nodes need a launcher."""
    cpu, many = torch.device("cpu"), max(8, os.cpu_count() or 1)
    check_processes("", cpu, many, 1, None)
    refused(lambda: check_processes("trainer.", cpu, many + 1, 1, None), f"trainer.devices={many + 1}", str(many))
    for setting in (f"devices={many + 91}", "num_nodes=2"):
        call = lambda s=setting: sample(compose("sample", f"run='{trained}'", "device=cpu", s, f"run_dir='{tmp_path}'"))  # noqa: E731
        refused(call, setting)
        refused(lambda s=setting: train_tiny(tmp_path / "run", f"trainer.{s}"), f"trainer.{setting}")


def test_evaluate_takes_run_or_analytic(trained, tmp_path):
    for name, value in (("run", trained), ("ckpt", trained / "checkpoints" / "last.ckpt")):
        cfg = compose("evaluate", f"{name}='{value}'", "analytic=mixture", f"run_dir='{tmp_path}'")
        refused(lambda cfg=cfg: evaluate(cfg), f"{name}=", "analytic")


# Callbacks and loggers that are removed.


def test_any_callback_can_be_removed(tmp_path):
    names = list(compose("train").callbacks)
    settings = [o for o in TINY if not o.startswith("callbacks.")]
    assert {"ema", "nan_guard", "graceful_shutdown", "best"} <= set(names)
    for name in names:
        for out in (f"callbacks.{name}=null", f"~callbacks.{name}"):
            check_overrides("train", [out])
        cfg = compose("train", *settings, f"callbacks.{name}=null", f"run_dir='{tmp_path / name}'")
        removed = compose("train", *settings, f"~callbacks.{name}").callbacks
        assert {**removed, name: None} == cfg.callbacks  # so both build the same run
        run = build(cfg)
        left = {str(each["_target_"]).rpartition(".")[2] for each in run.module.hparams.callbacks.values() if each}
        kinds = {type(each).__name__ for each in run.trainer.callbacks}
        bar = run.trainer.progress_bar_callback  # Lightning's own would show epochs
        assert bar is None if name == "progress" else type(bar).__name__ == "Progress"
        close_run(run)
        assert left <= kinds and len(run.module.hparams.callbacks) == len(names)


@pytest.mark.parametrize(
    "choice",
    ["callbacks=quality", "callbacks=[quality,default]", "callbacks=null", "callbacks=none", "~callbacks"],
)
def test_run_trains_with_any_callbacks_option(choice, tmp_path):
    check_overrides("train", choose_none([choice]))
    settings = [o for o in TINY if not o.startswith("callbacks.")]
    if "quality" in choice:
        settings += ["callbacks.quality.n=20", "callbacks.quality.features=[pixels]"]
    if "default" in choice:
        settings += [
            "callbacks.bits_per_dim.num_samples=3",
            "callbacks.samples.num_samples=4",
            "callbacks.progress.refresh_rate=0",
        ]
    settings += ["trainer.max_steps=2", "validate_every=1", f"run_dir='{tmp_path / 'run'}'"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = train(compose("train", *settings, *choose_none([choice])))
    assert metrics["steps"] == 2 and (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert any(name.startswith("quality/") for name in metrics) == ("quality" in choice)


def test_any_logger_can_be_removed(tmp_path):
    for choice in ("logger=null", "logger=none", "logger.csv=null", "~logger", "logger=[csv,tensorboard]"):
        chosen = choose_none([choice])
        check_overrides("train", chosen)
        run = build(compose("train", *TINY, *chosen, f"run_dir='{tmp_path / 'run'}'"))
        close_run(run)
        assert len(run.trainer.loggers) == (2 if "tensorboard" in choice else 0)


# Commands.


def python(*words: str, cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, text=True, capture_output=True, timeout=500,
        start_new_session=True,
    )  # fmt: skip


def test_unknown_command_lists_the_commands(tmp_path):
    """The process ends before any import."""
    for module, near in (
        *(
            ("src.evaluation", "src.evaluate"),
            ("src.evalute", "src.evaluate"),
            ("src.samples", "src.sample"),
        ),
        *(
            ("src.training.module", None),
            ("src.data.batches", None),
            ("src", None),
            ("src.data", None),
            ("src.no.such", None),
        ),
    ):
        done = python("-m", module, "seed=1", cwd=tmp_path)
        assert done.returncode == 2 and not done.stdout
        assert len(done.stderr.splitlines()) == 1 and f"{module} is not a command" in done.stderr
        assert near is None or f"did you mean {near}?" in done.stderr
        assert "src.train" in done.stderr and "src.__init__" not in done.stderr


def test_user_package_may_import_src(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import src\n")
    (tmp_path / "mine" / "analyze.py").write_text("print('analyzed')\n")
    done = python("-m", "mine.analyze", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "analyzed\n")


def test_commands_are_the_files_with_a_main():
    files = (ROOT / "src").glob("*.py")
    assert sorted(src.COMMANDS) == sorted(f.stem for f in files if '__name__ == "__main__"' in f.read_text())


INTERRUPT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "{name}" and os.environ.get("LOCAL_RANK", "0") == "{rank}":
            sys.meta_path.remove(self)
            os.killpg(0, signal.{signal})

sys.meta_path.insert(0, Interrupt())
"""
"""A sitecustomize.py that sends a signal to all processes when one of them imports a module."""


@pytest.mark.parametrize(
    ("name", "rank", "signal_name"),
    [
        ("src.config.cli", 0, "SIGINT"),
        ("torch.nn", 0, "SIGINT"),
        ("src", 1, "SIGINT"),
        pytest.param("lightning", 1, "SIGTERM", marks=pytest.mark.faults),
    ],
)
def test_ctrl_c_while_a_run_starts_prints_one_line(name, rank, signal_name, tmp_path):
    """The signal goes to all processes, as from a terminal, at an import rather than after a time."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(INTERRUPT.format(name=name, rank=rank, signal=signal_name))
    settings = [*TINY, "trainer.devices=2", "trainer.max_steps=1000000"]
    path = os.pathsep.join([str(tmp_path / "hook"), str(ROOT)])
    done = python("-m", "src.train", *settings, cwd=tmp_path / "work", PYTHONPATH=path)
    assert done.returncode == 128 + getattr(signal, signal_name), done.stderr[-3000:]
    said = [line for line in (done.stdout + done.stderr).splitlines() if line and not line.startswith("Training ")]
    assert len(said) == 1, done.stderr[-3000:]
