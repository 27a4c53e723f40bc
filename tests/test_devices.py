"""Several processes train, validate and sample as one does; real ones, with gloo on the CPU."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.testing import assert_close

from src.checkpoints import read_checkpoint
from src.cli import UsageError
from src.module import DiffusionModule
from src.runs import open_run
from src.stopping import CleanStop, Interruption
from tests.conftest import TINY, compose, train_tiny
from tests.test_runs import weights

SETTINGS = [
    "trainer.max_steps=20",
    "validate_every=10",
    "lr_scheduler.warmup_steps=0",  # so that the weights move far
    "timesteps=importance",
    "timesteps.bins=4",
    "callbacks.samples.count=5",
]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}


def python(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment(), cwd=cwd, text=True, capture_output=True, timeout=500)


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def lightning_starts(processes: int, *overrides: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return python("-m", "src.train", *TINY, f"trainer.devices={processes}", *overrides, cwd=cwd)


def torchrun_starts(processes: int, *overrides: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return python(*torchrun(processes), "-m", "src.train", *TINY, f"trainer.devices={processes}", *overrides, cwd=cwd)


def stop_at(step: int, folder: Path) -> list[str]:
    """Have the second process asked to end at this step, once."""
    fault = {"_target_": "tests.faults.Stop", "rank": 1, "step": step, "once": folder / "once"}
    return [
        *(f"+callbacks.fault.{key}={value}" for key, value in fault.items()),
        "callbacks.stop.seconds=0.001",
        "trust=true",
    ]


def only_run(cwd: Path) -> Path:
    """The one folder that was made, which holds one log and nothing of the other processes."""
    (run,) = (cwd / "outputs" / "train").iterdir()
    assert [p.name for p in cwd.iterdir()] == ["outputs"] and [p.name for p in (cwd / "outputs").iterdir()] == ["train"]
    assert [p.name for p in run.glob("*.log")] == ["train.log"]
    assert [p.name for p in (run / "logs").iterdir()] == ["version_0"]
    assert (run / ".hydra" / "overrides.yaml").is_file()
    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_tiny(folder, *SETTINGS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("start", [lightning_starts, torchrun_starts])
def test_two_and_four_processes_train_the_same_model_as_one(alone, tmp_path, start):
    """Weights, average, what importance sampling has seen, validation, and the samples: only rounding may differ."""
    processes = 2 if start is lightning_starts else 4
    done = start(processes, *SETTINGS, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    run = only_run(tmp_path)
    for key in ("state_dict", "current_model_state"):
        ours, theirs = weights(run, key), weights(alone, key)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    losses = [json.loads((folder / "metrics.json").read_text())["val/loss"] for folder in (run, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for picture in ("samples/final.png", "samples/step_000010.png", "samples/film.png"):
        ours, theirs = (np.asarray(Image.open(folder / picture)).astype(int) for folder in (run, alone))
        # The digits have 17 levels: one of them apart at most, and hardly anywhere.
        assert np.abs(ours - theirs).max() <= 16 and (ours == theirs).mean() > 0.999, picture


@pytest.mark.slow
def test_sharded_weights_train_stop_and_resume_as_whole_ones_do(alone, tmp_path, tmp_path_factory):
    """FSDP2 on two processes, of which one is asked to end on its way: the checkpoint is that of any run."""
    sharded = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true", *SETTINGS]
    done = lightning_starts(2, *sharded, *stop_at(12, tmp_path_factory.mktemp("once")), cwd=tmp_path)
    assert done.returncode == 143, done.stdout[-2000:] + done.stderr[-3000:]
    run = next((tmp_path / "outputs" / "train").iterdir())
    step = read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"]
    assert 12 < step < 20 and f"saved at step {step}" in done.stdout
    done = lightning_starts(2, f"resume={run}", "trust=true", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for key in ("state_dict", "current_model_state"):
        ours, theirs = weights(run, key), weights(alone, key)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    opened = open_run(str(run))
    assert_close(opened.module.net.conv_in.weight, weights(alone)["net.conv_in.weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_sweep_on_two_devices_goes_on_where_it_stopped(tmp_path, tmp_path_factory):
    """The first job is stopped, the command given again: it ends with the folders of two jobs and no other."""
    command = ["-m", "seed=0,1", "trainer.max_steps=8", "validate_every=4", "checkpoint_every=100", "resume=auto"]
    command += stop_at(4, tmp_path_factory.mktemp("once"))
    for status in (143, 0):
        done = lightning_starts(2, *command, cwd=tmp_path)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
    assert [p.name for p in tmp_path.iterdir()] == ["outputs"]
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert [p.name for p in (tmp_path / "outputs").iterdir()] == ["sweeps"]
    assert sorted(p.name for p in sweep.iterdir()) == ["0", "1", "multirun.yaml"]
    for seed in (0, 1):
        assert [p.name for p in (sweep / str(seed)).glob("*.log")] == ["train.log"]
        train_tiny(tmp_path / f"alone{seed}", f"seed={seed}", "trainer.max_steps=8", "validate_every=4")
        ours, theirs = weights(sweep / str(seed)), weights(tmp_path / f"alone{seed}")
        for name in ours:
            assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_a_nan_on_one_process_of_two_has_both_skip_the_step(tmp_path):
    """Told by the weights that each process begins its steps with."""
    fault = ["+callbacks.fault._target_=tests.faults.Poison", "+callbacks.fault.rank=1", "+callbacks.fault.step=3"]
    done = lightning_starts(
        2, "trainer.max_steps=6", *fault, "+callbacks.watch._target_=tests.faults.Watch", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    told: dict[tuple[int, int], str] = {}
    for rank, step, total in re.findall(r"rank (\d) step (\d) weights (\S+)", done.stdout):
        told[int(rank), int(step)] = total
    assert len(told) == 12 and "nan" not in told.values()
    assert all(told[0, step] == told[1, step] for step in range(6))
    assert [told[0, step + 1] == told[0, step] for step in range(5)] == [False, False, False, True, False]
    (row,) = [json.loads(line) for line in (only_run(tmp_path) / "nonfinite.jsonl").read_text().splitlines()]
    assert row["step"] == 3
    # The second process has the second half of the batch.
    assert [place for place, loss in enumerate(row["losses"]) if loss == "nan"] == [32]


@pytest.mark.slow
def test_samples_are_the_same_drawn_by_three_processes(trained, tmp_path):
    """Seven in batches of two: in the second turn one process has a single sample to draw, and two have none."""
    asked = ["-m", "src.sample", f"run={trained}", "n=7", "batch_size=2", "device=cpu", "sampler.steps=3"]
    done = python(*torchrun(3), *asked, "devices=3", "gif=true", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("7 samples of") == 1
    (folder,) = (tmp_path / "outputs" / "sample").iterdir()
    assert {p.suffix for p in folder.iterdir()} == {".png", ".npz", ".gif", ".log", ""}
    assert len(list(folder.glob("0000?.png"))) == 7 and len(list(folder.glob("*.log"))) == 1
    ours, alone = (np.load(f)["arr_0"].astype(int) for f in (folder / "samples.npz", drawn_alone(trained, tmp_path)))
    assert ours.shape == alone.shape and np.abs(ours - alone).max() <= 16 and (ours == alone).mean() > 0.99


def drawn_alone(run: Path, tmp_path: Path) -> Path:
    from src.sample import sample

    settings = [f"run='{run}'", "n=7", "device=cpu", "sampler.steps=3", f"run_dir='{tmp_path / 'alone'}'"]
    return sample(compose("sample", *settings)) / "samples.npz"


@pytest.mark.slow
def test_two_processes_find_the_likelihood_that_one_finds(trained, tmp_path):
    from src.evaluate import evaluate

    asked = [f"run='{trained}'", "n=30", "batch_size=8", "links=5", "ode=true", "ode_tolerance=1e-2", "device=cpu"]
    done = python("-m", "src.evaluate", *asked, "devices=2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("30 held-out samples") == 1 and [p.name for p in tmp_path.iterdir()] == ["outputs"]
    (folder,) = (tmp_path / "outputs" / "evaluate").iterdir()
    alone = evaluate(compose("evaluate", *asked, f"run_dir='{tmp_path / 'alone'}'"))
    assert json.loads((folder / "metrics.json").read_text()) == {
        name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value for name, value in alone.items()
    }


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        (["devices=0"], "must be at least 1, got 0 and 1"),
        (["devices=2", "device=cpu:0"], "device=cpu:0 is one device, devices=2 asks for several"),
    ],
)
def test_devices_that_cannot_be_had_are_refused(trained, tmp_path, settings, rule):
    from src.sample import sample

    with pytest.raises(UsageError, match=rule):
        sample(compose("sample", f"run='{trained}'", f"run_dir='{tmp_path}'", *settings))


def test_more_processes_than_devices_are_refused(trained, tmp_path, monkeypatch):
    from src.sample import sample

    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="4 processes were started for devices=1 num_nodes=1: give devices=4"):
        sample(compose("sample", f"run='{trained}'", f"run_dir='{tmp_path}'"))


def test_on_slurm_a_run_answers_its_warning_by_itself(tmp_path, monkeypatch):
    """Lightning would save elsewhere and requeue the job, also when it has none of ours to give way to."""
    places = ("PROCID", "LOCALID", "NODEID")
    for name, value in {
        "JOB_ID": 7,
        "NTASKS": 1,
        "NTASKS_PER_NODE": 1,
        "NNODES": 1,
        **dict.fromkeys(places, 0),
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    heard = []
    monkeypatch.setattr(
        DiffusionModule,
        "on_validation_start",
        lambda self: heard.append(signal.getsignal(signal.SIGUSR1)),
        raising=False,
    )
    train_tiny(tmp_path / "run", "trainer.max_steps=3", "validate_every=2")
    in_training, at_the_end = heard
    assert isinstance(getattr(in_training, "__self__", None), CleanStop)
    assert isinstance(at_the_end, Interruption)
