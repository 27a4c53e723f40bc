"""A refused or interrupted command changes no file and creates none."""

import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from src.config.cli import launch
from src.runs import lock
from tests.conftest import TINY

TASKS = {"schedules": "show_schedules", "dashboard": "show_dashboard", "doctor": "examine"}
QUICK = [*TINY, "validate_every=100", "~callbacks.bits_per_dim", "~neighbors", "trainer.max_steps=2"]


def command(monkeypatch: pytest.MonkeyPatch, module: str, *words: str) -> Any:
    """Run `python -m src.<module> <words>` in this process; return its exit status."""
    task = getattr(importlib.import_module(f"src.{module}"), TASKS.get(module, module))
    environment = dict(os.environ)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module}.py", *words])
        try:
            launch(module, task, together="sampler" if module == "evaluate" else None)
        except SystemExit as ended:
            return ended.code
        finally:
            for name in os.environ.keys() - environment.keys():  # where folders are remembered
                del os.environ[name]
    return 0


def tree(folder: Path) -> dict[str, Any]:
    """Return every path below a folder with its kind, modification time and contents."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        stat, name = path.lstat(), str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = "link", os.readlink(path)
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = stat.st_ino, stat.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of two steps, R, and a sweep of one such job, S."""
    where = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        assert command(patch, "train", *QUICK, "hydra.run.dir=R") == 0
        shutil.copytree("R", "S/0")
        typed_overrides = {"hydra": {"overrides": {"task": [*QUICK, "seed=0"], "hydra": ["hydra.mode=MULTIRUN"]}}}
        Path("S/multirun.yaml").write_text(json.dumps(typed_overrides))
    return where


@pytest.fixture
def there(place, monkeypatch, no_network) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("NETRC", str(place / "absent"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return place


NEW_RUN = [
    ["data.batch_size=5000"],
    ["data=folder", "data.root=nowhere"],
    ["optimized_metric=val/los"],
    ["schedule=cosin"],
    ["hydra/job_logging=nope"],
    ["optimizer.lr=0"],
    ["+logger.csv.nonsense=1"],
    ["logger=[csv,tensorboard]", "+logger.tensorboard.nonsense=1"],
    ["logger=[csv,tensorboard,wandb]", "logger.wandb.id='a/b'"],
    ["hydra.output_subdir=conf", "data.batch_size=5000"],
    ["hydra.job.chdir=true", "data.batch_size=5000"],
]
"""Refused before Hydra starts, by Hydra, by a constructor, by the data, and by a logger."""


def refused(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, module: str, *words: str) -> str:
    """Run a command that must be refused and change nothing; return its message."""
    before = tree(place)
    capsys.readouterr()
    status = command(monkeypatch, module, *words)
    said = capsys.readouterr().err
    assert status == 2, (words, status, said)
    assert tree(place) == before, words
    assert "Traceback" not in said, said
    return said


def test_refused_run_leaves_no_folder(there, monkeypatch, capsys):
    for k, wrong in enumerate(NEW_RUN):
        folder = ([], ["hydra.run.dir=new/of/its/own"], ["hydra.run.dir='new/${seed}/x'"])[k % 3]
        refused(there, monkeypatch, capsys, "train", *QUICK, *wrong, *folder)
    said = refused(there, monkeypatch, capsys, "train", *QUICK, "hydra.run.dir='${nowhere}'")
    assert "hydra.run.dir" in said and "nowhere" in said


def test_refused_resume_changes_no_file(there, monkeypatch, capsys):
    for wrong in (
        ["model=unet_small"],
        ["data.batch_size=5000"],
        ["trainer.max_steps=1"],
        ["optimized_metric=val/los"],
        ["logger=[csv,tensorboard]", "+logger.tensorboard.nonsense=1", "trainer.max_steps=4"],
        ["logger=[csv,tensorboard,wandb]", "logger.wandb.id='a/b'", "trainer.max_steps=4"],
    ):
        refused(there, monkeypatch, capsys, "train", "resume=R", *wrong)
    said = refused(there, monkeypatch, capsys, "train", *QUICK, "hydra.run.dir=R")
    assert "already holds a run" in said


def test_run_locked_by_another_process_is_unchanged(there, monkeypatch, capsys):
    code = "import fcntl, sys; f = open('R/.lock', 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); "
    code += "sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout and other.stdout.readline() == b"held\n"
        monkeypatch.setattr(lock, "WAIT_S", 0)
        said = refused(there, monkeypatch, capsys, "train", "resume=R", "trainer.max_steps=4")
        assert "another process trains in" in said
    finally:
        other.kill()
        other.wait()


def test_refused_sweep_leaves_no_file(there, monkeypatch, capsys):
    for wrong in (
        ["data.batch_size=5000,6000"],
        ["data.batch_size=5000,6000", "hydra.sweep.dir=new/sweep"],
        ["seed=1,2", "resume=auto", "hydra.sweep.dir=S", "hydra.sweep.subdir=0"],  # of another job
    ):
        said = refused(there, monkeypatch, capsys, "train", "-m", *QUICK, *wrong)
        assert "5000" in said or "another job" in said
        assert "Error executing job" not in said
    before = tree(there)
    assert command(monkeypatch, "train", "-m", *QUICK, "seed=1,2", "hydra.sweep.dir=S") == 2
    assert "S already holds a sweep" in capsys.readouterr().err
    assert tree(there) == before


def test_refused_job_leaves_no_file_beside_others(there, monkeypatch, capsys):
    assert command(monkeypatch, "train", "-m", *QUICK, "data.batch_size=5000,64", "hydra.sweep.dir=half") == 2
    assert sorted(path.name for path in Path("half").iterdir()) == ["1", "multirun.yaml"]
    assert "data.batch_size=64" in yaml.safe_load(Path("half/1/.hydra/overrides.yaml").read_text())
    assert Path("half/1/metrics.json").is_file() and Path("half/1/train.log").is_file()
    shutil.rmtree("half")


def test_other_refused_commands_leave_no_file(there, monkeypatch, capsys):
    own = "hydra.run.dir=new/of/its/own"
    for module, *words in (
        ("sample", "run=nowhere", own),
        ("sample", "run=R", "device=nonsense"),
        ("evaluate", "run=R", "n=0", own),
        ("evaluate", "run=R", "features=nonsense", "likelihood=false"),
        ("compare", "runs=[R]"),
        ("export", "run=R", "ckpt=R/checkpoints/last.ckpt", own),
        ("schedules", "names=[cosin]"),
        ("schedules", "num_steps=0", own),
        ("dashboard",),
    ):
        refused(there, monkeypatch, capsys, module, *words)


def test_signal_during_start_leaves_no_file(there, monkeypatch):
    """The signal arrives while a new run, a resumed run or a sweep's job is built."""
    from src.runs.build import warn_about_schedule

    original, before = warn_about_schedule, tree(there)
    for number, words in (
        (signal.SIGINT, [*QUICK, "hydra.run.dir=new/run"]),
        (signal.SIGTERM, ["resume=R", "trainer.max_steps=4"]),
        (signal.SIGTERM, ["-m", *QUICK, "seed=1,2"]),
    ):

        def interrupted(module: Any, number: int = number) -> None:
            os.kill(os.getpid(), number)
            original(module)

        monkeypatch.setattr("src.runs.build.warn_about_schedule", interrupted)
        handler = signal.getsignal(number)
        assert command(monkeypatch, "train", *words) == 128 + number
        assert tree(there) == before, words
        assert signal.getsignal(number) == handler


def test_started_run_has_the_files_of_hydra(there, monkeypatch):
    """They are in the typed folder with the typed settings, even after a refused command."""
    shutil.copytree("R", "T")
    assert command(monkeypatch, "train", "resume=T", "model=unet_small") == 2
    assert command(monkeypatch, "train", "resume=T", "trainer.max_steps=3") == 0
    assert json.loads(Path("T/metrics.json").read_text())["steps"] == 3
    written = yaml.safe_load(Path("T/.hydra/overrides.yaml").read_text())
    assert written == [*QUICK, "resume=T", "trainer.max_steps=3"]
    config = yaml.safe_load(Path("T/.hydra/config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 3 and config["run_dir"] == "${hydra:runtime.output_dir}"
    settings = yaml.safe_load(Path("T/.hydra/hydra.yaml").read_text())["hydra"]
    assert settings["output_subdir"] == ".hydra" and settings["runtime"]["output_dir"] == str(there / "T")
    assert set(settings["job_logging"]["root"]["handlers"]) == {"console", "file"}
    assert not list(Path("T/.hydra").glob(".*"))
    shutil.rmtree("T")
    typed_overrides = ["hydra.output_subdir=conf", "hydra/job_logging=stdout", "hydra.job.chdir=true", "names=[cosine]"]
    assert command(monkeypatch, "schedules", "hydra.run.dir=schedules", *typed_overrides) == 0
    left = sorted(path.name for path in Path("schedules").iterdir())
    assert left == ["conf", "noising.png", "schedules.png", "schedules.txt"]
    settings = yaml.safe_load(Path("schedules/conf/hydra.yaml").read_text())["hydra"]
    assert settings["output_subdir"] == "conf" and settings["job"]["chdir"] is True
    assert set(typed_overrides[:3]) <= set(settings["overrides"]["hydra"])
    shutil.rmtree("schedules")
