"""Sweeps by every launcher and sweeper that can run here: real jobs in real processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from src.config.overrides import _compose_cached, check_overrides
from src.config.search_path import CONF
from src.config.sweeps import devices_of_worker
from src.errors import UsageError
from tests.conftest import TINY, train_tiny
from tests.fork_server import run_python

SEEDS = (0, 1)


def sweep(folder: Path, *overrides: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run `src.train -m` with a tiny network and two steps per job, into `folder`."""
    command = ["-m", "src.train", "-m", *TINY, "trainer.max_steps=2", f"hydra.sweep.dir='{folder}'", *overrides]
    return run_python(*command, cwd=folder.parent, RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", **variables)


def val_loss(run: Path) -> float:
    return float(json.loads((run / "metrics.json").read_text())["val/loss"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Return the loss of each seed from a single run in this process."""
    folder = tmp_path_factory.mktemp("alone")
    return {s: train_tiny(folder / str(s), "trainer.max_steps=2", f"seed={s}")["val/loss"] for s in SEEDS}


@pytest.mark.parametrize(
    "launcher", [pytest.param("local", marks=pytest.mark.slow), pytest.param("ray_local", marks=pytest.mark.faults)]
)
def test_sweep_job_equals_single_run(launcher, alone, tmp_path):
    folder = tmp_path / "jobs"
    done = sweep(folder, f"hydra/launcher={launcher}", "seed=" + ",".join(map(str, SEEDS)))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert {f.name for f in folder.iterdir() if not f.name.startswith(".")} == {"0", "1", "multirun.yaml"}
    for number, seed in enumerate(SEEDS):
        run = folder / str(number)
        assert f"seed={seed}" in yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text())
        assert (run / "checkpoints" / "last.ckpt").is_file() and (run / "samples" / "final.png").is_file()
        assert val_loss(run) == pytest.approx(alone[seed], rel=1e-6)


@pytest.mark.faults
def test_worker_job_launches_its_other_processes(alone, tmp_path):
    """Under submitit_local; joblib's worker does the same in the tests of several devices."""
    done = sweep(tmp_path / "jobs", "hydra/launcher=submitit_local", "seed=0", "trainer.devices=2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    check_one_job(tmp_path, alone[0])


def check_one_job(cwd: Path, loss: float) -> None:
    """Check that several processes trained one model in one folder, with one log, and left no other file."""
    assert [f.name for f in cwd.iterdir() if f.name != "bin"] == ["jobs"]
    assert {f.name for f in (cwd / "jobs").iterdir() if not f.name.startswith(".")} == {"0", "multirun.yaml"}
    run = cwd / "jobs" / "0"
    assert [f.name for f in run.glob("*.log")] == ["train.log"]
    assert [f.name for f in (run / "logs").iterdir()] == ["version_0"]
    assert val_loss(run) == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_search_continues_after_refused_job_and_reports_best(tmp_path):
    folder = tmp_path / "jobs"
    settings = ["hydra/sweeper=search", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=1"]
    done = sweep(folder, *settings, "data.batch_size=choice(5000,16,32)")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    losses = {}
    for job in range(3):
        run = folder / str(job)
        if not run.exists():  # a refused job leaves nothing
            losses[5000] = math.inf
            continue
        *_, typed = [o for o in yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text()) if "batch_size=" in o]
        losses[int(typed.removeprefix("data.batch_size="))] = val_loss(run)
    assert len(losses) == 3, "with this seed each value is tried once"
    best = min(losses, key=lambda size: losses[size])
    results = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert results["best_params"] == {"data.batch_size": best}
    assert results["best_value"] == pytest.approx(losses[best])
    assert "Failed experiment: data.batch_size=5000" in done.stdout
    assert "Traceback" not in done.stderr


def programs(folder: Path, **scripts: str) -> str:
    """Return a PATH on which shell scripts replace programs."""
    folder.mkdir()
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.faults
def test_slurm_tasks_train_one_model(alone, tmp_path):
    """Shell scripts replace SLURM: they set its variables and start its tasks."""
    job = str(os.getpid())  # which chooses the port
    known = f"SLURM_JOB_ID={job} SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NODEID=0 SLURM_NODELIST=localhost"
    path = programs(
        tmp_path / "bin",
        sbatch=f"cp $1 $0.script; {known} bash $0.script &> $0.log & echo Submitted batch job {job}",
        srun="while [[ $1 == --* ]]; do case $1 in --unbuffered) shift ;; *) shift 2 ;; esac; done\n"
        f'for task in 0 1; do SLURM_STEP_ID=0 SLURM_PROCID=$task SLURM_LOCALID=$task "${{@//%j/{job}}}" & done; wait',
        sacct="exit 1",
    )
    settings = ["hydra/launcher=slurm", "hydra.launcher.tasks_per_node=2", "trainer.devices=2", "seed=0"]
    done = sweep(tmp_path / "jobs", *settings, PATH=path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    check_one_job(tmp_path, alone[0])
    assert (tmp_path / "jobs" / "0" / "train.log").read_text().count("Job completed successfully") == 1


def test_slurm_script_requests_resources_and_signal(tmp_path):
    """A fake `sbatch` keeps the script. A run handles SIGUSR1, not the SIGUSR2 of submitit."""
    path = programs(tmp_path / "bin", srun="exit 1", sbatch=f"cp $1 '{tmp_path}/script'; exit 1")
    settings = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.signal_delay_s=60"]
    done = sweep(tmp_path / "jobs", *settings, "seed=0,1", PATH=path)
    assert done.returncode != 0
    requested = {line.removeprefix("#SBATCH --") for line in (tmp_path / "script").read_text().splitlines()}
    assert {"time=1440", "gpus-per-node=1", "cpus-per-task=8", "ntasks-per-node=1", "partition=gpu"} <= requested
    assert "signal=USR1@60" in requested and "array=0-1%2" in requested


@pytest.mark.parametrize(
    "overrides",
    [
        ["hydra/launcher=local", "hydra.launcher.n_jobs=2", "seed=0,1"],
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1"],
        ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "seed=range(0,3)"],
        ["hydra/sweeper=search", "hydra.sweeper.n_trials=3", "optimizer.lr=tag(log,interval(1e-4,1e-2))"],
        ["sweep=optimizer", "hydra/launcher=ray_local", "hydra.sweeper.n_jobs=2"],
    ],
)
def test_launchers_and_sweepers_can_be_chosen(overrides):
    check_overrides("train", overrides, multirun=True)


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["hydra/launcher=loca"], ["unknown hydra/launcher 'loca'", "did you mean local?", "slurm"]),
        (["hydra/sweeper=serch"], ["unknown hydra/sweeper 'serch'", "did you mean search?"]),
        (["hydra.launcher.n_jobs=2"], ["hydra.launcher.n_jobs", "hydra/launcher="]),
        (["optimizer.lr=interval(1e-4,1e-2)"], ["optimizer.lr=interval(1e-4,1e-2)", "hydra/sweeper=search"]),
        (["sweep=schedule"], ["did you mean schedules?"]),
    ],
)
def test_invalid_sweep_is_refused_on_one_line(overrides, fragments):
    with pytest.raises(UsageError) as error:
        check_overrides("train", overrides, multirun=True)
    assert "\n" not in str(error.value)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("override", "extra"),
    [
        ("hydra/launcher=joblib", "joblib"),
        ("hydra/launcher=local", "joblib"),
        ("hydra/launcher=slurm", "submitit"),
        ("hydra/launcher=ray_local", "ray"),
        ("hydra/sweeper=search", "optuna"),
        ("sweep=optimizer", "optuna"),
    ],
)
def test_missing_plugin_names_its_extra(override, extra, monkeypatch):
    check_overrides("train", [override], multirun=True)  # which finds all plugins
    for group in ("launcher", "sweeper"):
        options = ConfigStore.instance().repo["hydra"][group]
        for name in [n for n in options if n.split(".")[0].split("_")[0] == extra]:
            monkeypatch.delitem(options, name)
    _compose_cached.cache_clear()
    with pytest.raises(UsageError, match=rf"extra {extra}, which is not installed: pip install -e '\.\[{extra}\]'"):
        check_overrides("train", [override], multirun=True)


@pytest.mark.parametrize("preset", sorted((CONF / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_sweep_presets_compose_and_need_multirun(preset):
    params = OmegaConf.load(preset).hydra.sweeper.params
    values = [f"{name}={value}" for name, value in params.items()]
    check_overrides("train", [f"sweep={preset.stem}", *values], multirun=True)
    with pytest.raises(UsageError, match=r"sweep=.* -m"):
        check_overrides("train", [f"sweep={preset.stem}"])


def test_unknown_optimized_metric_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"optimized_metric=val/los .*val/loss"):
        train_tiny(tmp_path / "run", "optimized_metric=val/los")


@pytest.mark.parametrize(("devices", "workers"), [(8, 2), (7, 3), (4, 4), (1, 1), (2, 5)])
def test_workers_share_all_devices_evenly(devices, workers):
    """With enough devices no two workers share one."""
    names = tuple(f"gpu{n}" for n in range(devices))
    shares = [devices_of_worker(names, place, workers).split(",") for place in range(workers)]
    used = [name for part in shares for name in part]
    assert set(used) == set(names) and all(shares)
    assert len(used) == max(devices, workers)
    counts = [used.count(n) for n in names] + ([] if devices > workers else [max(map(used.count, names))])
    assert max(counts) - min(counts) <= 1
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_worker_number_is_free_after_a_kill(tmp_path):
    code = (
        "import sys; from pathlib import Path; from src.config.sweeps import _place;"
        f"print(_place(Path({str(tmp_path)!r}), 2), flush=True); sys.stdin.read()"
    )

    def worker() -> "subprocess.Popen[str]":
        environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
        return subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def place(process: "subprocess.Popen[str]") -> int:
        assert process.stdout is not None
        return int(process.stdout.readline())

    workers = [worker(), worker()]
    try:
        assert sorted(map(place, workers)) == [0, 1]
        waiting = worker()
        workers.append(waiting)
        freed = 0
        workers[freed].kill()
        held = place(waiting)
        workers[1].kill()
        workers.append(worker())
        assert {held, place(workers[-1])} == {0, 1}
    finally:
        for process in workers:
            process.kill()
            process.wait()
