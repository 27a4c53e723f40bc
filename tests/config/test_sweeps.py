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

from src.config.overrides import check_overrides
from src.config.search_path import CONF
from src.config.sweeps import share
from src.errors import UsageError
from tests.conftest import HANG_SECONDS, TINY, train_tiny

SEEDS = (0, 1)


def sweep(folder: Path, *overrides: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """`src.train -m` with a tiny network and two steps a job, into `folder`."""
    quiet = {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "src.train", "-m", *TINY, "trainer.max_steps=2", f"hydra.sweep.dir='{folder}'"]
    env = {**os.environ, **quiet, "PYTHONPATH": str(CONF.parent), **variables}
    return subprocess.run(
        [*command, *overrides],
        cwd=folder.parent,
        env=env,
        text=True,
        capture_output=True,
        check=False,
        timeout=HANG_SECONDS,
    )


def val_loss(run: Path) -> float:
    return float(json.loads((run / "metrics.json").read_text())["val/loss"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The loss of each seed's run, made in this process and without a sweep."""
    folder = tmp_path_factory.mktemp("alone")
    return {s: train_tiny(folder / str(s), "trainer.max_steps=2", f"seed={s}")["val/loss"] for s in SEEDS}


@pytest.mark.parametrize(
    "launcher", [pytest.param("local", marks=pytest.mark.slow), pytest.param("ray_local", marks=pytest.mark.faults)]
)
def test_launchers_run_the_jobs_as_they_run_alone(launcher, alone, tmp_path):
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
def test_a_job_in_a_worker_starts_its_other_processes_as_the_command_would(alone, tmp_path):
    """Under submitit_local; joblib's worker does the same in the tests of several devices."""
    done = sweep(tmp_path / "jobs", "hydra/launcher=submitit_local", "seed=0", "trainer.devices=2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    check_one_job(tmp_path, alone[0])


def check_one_job(cwd: Path, loss: float) -> None:
    """That several processes trained one model in one folder, with one log, and left nothing else."""
    assert [f.name for f in cwd.iterdir() if f.name != "bin"] == ["jobs"]
    assert {f.name for f in (cwd / "jobs").iterdir() if not f.name.startswith(".")} == {"0", "multirun.yaml"}
    run = cwd / "jobs" / "0"
    assert [f.name for f in run.glob("*.log")] == ["train.log"]
    assert [f.name for f in (run / "logs").iterdir()] == ["version_0"]
    assert val_loss(run) == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_a_search_names_the_best_and_goes_on_after_a_job_that_is_refused(tmp_path):
    folder = tmp_path / "jobs"
    settings = ["hydra/sweeper=search", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=1"]
    done = sweep(folder, *settings, "optimizer.lr=choice(-1.0,0.001,0.03)")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    losses = {}
    for job in range(3):
        run = folder / str(job)
        if not run.exists():  # a refused job leaves nothing
            losses[-1.0] = math.inf
            continue
        (lr,) = [o for o in yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text()) if "lr=" in o]
        lr = float(lr.removeprefix("optimizer.lr="))
        losses[lr] = val_loss(run)
    assert len(losses) == 3, "with this seed each value is tried once"
    best = min(losses, key=lambda lr: losses[lr])
    results = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert results["best_params"] == {"optimizer.lr": best}
    assert results["best_value"] == pytest.approx(losses[best])
    assert "Failed experiment: optimizer.lr=-1" in done.stdout
    assert "Traceback" not in done.stderr


def programs(folder: Path, **scripts: str) -> str:
    """A PATH on which shell scripts stand for programs."""
    folder.mkdir()
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.faults
def test_the_tasks_of_a_slurm_job_train_one_model(alone, tmp_path):
    """Scripts stand for SLURM: they set the variables that it sets, and start what it starts."""
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


def test_what_is_asked_of_slurm(tmp_path):
    """Up to `sbatch`, which here takes the script to pieces: a run answers SIGUSR1, and not submitit's SIGUSR2."""
    path = programs(tmp_path / "bin", srun="exit 1", sbatch=f"cp $1 '{tmp_path}/script'; exit 1")
    settings = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.signal_delay_s=60"]
    done = sweep(tmp_path / "jobs", *settings, "seed=0,1", PATH=path)
    assert done.returncode != 0
    asked = {line.removeprefix("#SBATCH --") for line in (tmp_path / "script").read_text().splitlines()}
    assert {"time=1440", "gpus-per-node=1", "cpus-per-task=8", "ntasks-per-node=1", "partition=gpu"} <= asked
    assert "signal=USR1@60" in asked and "array=0-1%2" in asked


@pytest.mark.parametrize(
    "overrides",
    [
        ["hydra/launcher=local", "hydra.launcher.n_jobs=2", "seed=0,1"],
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "sweep=schedules"],
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
        (["hydra.launcher.n_jobs=2"], ["hydra.launcher.n_jobs", "need it chosen"]),
        (["optimizer.lr=interval(1e-4,1e-2)"], ["no values to go through", "hydra/sweeper=search"]),
        (["sweep=schedule"], ["did you mean schedules?"]),
    ],
)
def test_what_is_asked_wrongly_of_a_sweep_gets_one_line(overrides, fragments):
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
def test_an_extra_that_is_not_installed_is_named(override, extra, monkeypatch):
    check_overrides("train", [override], multirun=True)  # which finds all plugins
    for group in ("launcher", "sweeper"):
        options = ConfigStore.instance().repo["hydra"][group]
        for name in [n for n in options if n.split(".")[0].split("_")[0] == extra]:
            monkeypatch.delitem(options, name)
    with pytest.raises(UsageError, match=rf"extra {extra}, which is not installed: pip install -e '\.\[{extra}\]'"):
        check_overrides("train", [override], multirun=True)


@pytest.mark.parametrize("preset", sorted((CONF / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_sweep_what_exists(preset):
    params = OmegaConf.load(preset).hydra.sweeper.params
    values = [f"{name}={value}" for name, value in params.items()]
    check_overrides("train", [f"sweep={preset.stem}", *values], multirun=True)
    with pytest.raises(UsageError, match="add -m"):
        check_overrides("train", [f"sweep={preset.stem}"])


def test_an_unknown_metric_is_refused_before_training(tmp_path):
    with pytest.raises(UsageError, match="optimized_metric=val/los is no metric of this run: choose one of val/loss"):
        train_tiny(tmp_path / "run", "optimized_metric=val/los")


@pytest.mark.parametrize(("devices", "workers"), [(8, 2), (7, 3), (4, 4), (1, 1), (2, 5)])
def test_devices_are_shared_out(devices, workers):
    """All are used; as evenly as can be; by one worker each if there are enough."""
    names = tuple(f"gpu{n}" for n in range(devices))
    shares = [share(names, place, workers).split(",") for place in range(workers)]
    used = [name for part in shares for name in part]
    assert set(used) == set(names) and all(shares)
    assert len(used) == max(devices, workers)
    counts = [used.count(n) for n in names] + ([] if devices > workers else [max(map(used.count, names))])
    assert max(counts) - min(counts) <= 1
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_worker_keeps_its_place_until_it_ends_even_if_it_is_killed(tmp_path):
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
