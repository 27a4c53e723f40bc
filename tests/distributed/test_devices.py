"""Several real processes train, validate and sample like one, with gloo on the CPU."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.testing import assert_close

from src.distributed.ranks import Interruption
from src.errors import UsageError
from src.runs.open import open_run
from src.training.checkpoints import read_checkpoint
from tests.conftest import HANG_SECONDS, TINY, compose, once, train_tiny
from tests.fork_server import run_python, run_ranks
from tests.runs.test_runs import weights


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global DiffusionModule, GracefulShutdown
    from src.training.callbacks.graceful_shutdown import GracefulShutdown
    from src.training.module import DiffusionModule


SETTINGS = [
    "trainer.max_steps=20",
    "validate_every=8",  # the last step has a validation of its own
    "lr_scheduler.warmup_steps=0",  # so that the weights move far
    "timestep_sampler=importance",
    "timestep_sampler.num_bins=4",
    "callbacks.samples.num_samples=5",
    "callbacks.power_ema.lengths=[0.05,0.1]",
    "callbacks.power_ema.max_snapshots=4",
]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def python(*arguments: str, cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=environment() | variables, cwd=cwd, text=True, capture_output=True, timeout=HANG_SECONDS
    )


def run_jobs(jobs: list[list[str]], cwd: Path, ranks: int = 0) -> str:
    """Run commands one after the other in `ranks` processes, or in those that the first command starts."""
    words = ("-m", "tests.distributed.jobs")
    done = (
        run_ranks(ranks, *words, cwd=cwd, JOBS=json.dumps(jobs))
        if ranks
        else [run_python(*words, cwd=cwd, JOBS=json.dumps(jobs))]
    )
    for process in done:
        assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-3000:]
        assert "sync_dist" not in process.stderr  # Lightning's advice for values of one process only
    assert [p.name for p in cwd.iterdir()] == ["outputs"]
    return "".join(process.stdout for process in done)


def lightning_starts(processes: int, *overrides: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return python("-m", "src.train", *once(*TINY, f"trainer.devices={processes}", *overrides), cwd=cwd)


def two_nodes_start(processes: int, *overrides: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Start half of the processes by each of two torchruns that connect on a local port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    each = processes // 2
    start = ["--nnodes", "2", "--nproc-per-node", str(each), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    settings = once(*TINY, "trainer.num_nodes=2", f"trainer.devices={each}", *overrides)
    with ThreadPoolExecutor() as nodes:
        first, second = nodes.map(
            lambda rank: python(
                "-m", "torch.distributed.run", *start, "--node-rank", str(rank), "-m", "src.train", *settings, cwd=cwd
            ),
            range(2),
        )
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-3000:]
    return first


def stop_at(step: int, folder: Path) -> list[str]:
    """Send a stop signal to the second process at this step, once."""
    fault = {"_target_": "tests.faults.Stop", "rank": 1, "step": step, "once": folder / "once"}
    return [
        *(f"+callbacks.fault.{key}={value}" for key, value in fault.items()),
        "callbacks.graceful_shutdown.check_interval_s=0.001",
        "trust=true",
    ]


def only_run(cwd: Path) -> Path:
    """Return the only new run, which must hold one log and no files of other processes."""
    (run,) = (cwd / "outputs" / "train").iterdir()
    assert [p.name for p in cwd.iterdir()] == ["outputs"]
    assert [p.name for p in run.glob("*.log")] == ["train.log"]
    assert [p.name for p in (run / "logs").iterdir()] == ["version_0"]
    assert (run / ".hydra" / "overrides.yaml").is_file()
    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_tiny(folder, *SETTINGS)
    return folder


SHARDED = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true"]
SAMPLING = ["n=5", "device=cpu", "sampler.steps=3"]
EVALUATION = ["num_val=30", "batch_size=8", "num_terms=5", "n=20", "sampler.steps=2", "device=cpu"]


@pytest.fixture(scope="module")
def started(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, str]":
    """Return the folder and the output of two processes that Lightning starts: they train and evaluate."""
    cwd = tmp_path_factory.mktemp("lightning")
    jobs = [
        ["src.train", *once(*TINY, "trainer.devices=2", *SETTINGS)],
        ["src.evaluate", f"run={trained}", *EVALUATION, "devices=2"],
    ]
    return cwd, run_jobs(jobs, cwd)


@pytest.fixture(scope="module")
def torchrun_started(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, str]":
    """Return the folder and the output of two processes, as of torchrun: they train with sharded weights and sample."""
    cwd = tmp_path_factory.mktemp("torchrun")
    jobs = [
        ["src.train", *once(*TINY, "trainer.devices=2", *SHARDED, *SETTINGS)],
        ["src.sample", f"run={trained}", *SAMPLING, "batch_size=2", "devices=2", "gif=true"],
    ]
    return cwd, run_jobs(jobs, cwd, ranks=2)


@pytest.mark.slow
def test_two_processes_train_the_same_model(alone, started):
    assert_same_run(only_run(started[0]), alone)


@pytest.mark.faults
def test_two_nodes_train_the_same_model(alone, tmp_path):
    done = two_nodes_start(4, *SETTINGS, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert_same_run(only_run(tmp_path), alone)


def assert_same_run(run: Path, alone: Path) -> None:
    """Weights, EMA, importance-sampling history, validation and samples are equal up to rounding."""
    assert_close_weights(run, alone)
    assert_close_averages(run, alone)
    losses = [json.loads((folder / "metrics.json").read_text())["val/loss"] for folder in (run, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for picture in ("samples/final.png", "samples/step_000008.png", "samples/trajectory.png"):
        ours, theirs = (np.asarray(Image.open(folder / picture)).astype(int) for folder in (run, alone))
        # The digits have 17 levels: one of them apart at most, and hardly anywhere.
        assert np.abs(ours - theirs).max() <= 16 and (ours == theirs).mean() > 0.999, picture


@pytest.mark.slow
def test_sharded_training_equals_unsharded(alone, torchrun_started):
    """FSDP2 on two processes: the checkpoint has the format of any run."""
    run = only_run(torchrun_started[0])
    assert_close_weights(run, alone)
    assert_close_averages(run, alone)
    opened = open_run(str(run))
    assert_close(opened.module.net.conv_in.weight, weights(alone)["net.conv_in.weight"], rtol=1e-5, atol=1e-5)
    best = read_checkpoint(run / "checkpoints" / "best.ckpt")
    assert best["global_step"] == 20 and [*best["optimizer_states"][0]["state"]] == [
        *read_checkpoint(alone / "checkpoints" / "last.ckpt")["optimizer_states"][0]["state"]
    ]


@pytest.mark.faults
def test_sharded_run_resumes_to_the_same_weights(alone, tmp_path, tmp_path_factory):
    """One of two processes receives a stop signal during training."""
    done = lightning_starts(2, *SHARDED, *SETTINGS, *stop_at(12, tmp_path_factory.mktemp("once")), cwd=tmp_path)
    assert done.returncode == 143, done.stdout[-2000:] + done.stderr[-3000:]
    run = only_run(tmp_path)
    step = read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"]
    assert 12 < step < 20 and f"saved at step {step}" in done.stdout
    done = lightning_starts(2, f"resume={run}", "trust=true", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert_close_weights(run, alone)


@pytest.mark.faults
def test_sweep_on_two_devices_writes_two_folders(tmp_path):
    done = lightning_starts(2, "-m", "seed=0,1", *OF_SWEEP, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    check_sweep(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["basic", "local"])
def test_sweep_on_two_devices_resumes(tmp_path, tmp_path_factory, launcher):
    """The first job is stopped, then the command is repeated."""
    command = ["-m", "seed=0,1", *OF_SWEEP, "resume=auto", *stop_at(4, tmp_path_factory.mktemp("once"))]
    command += [] if launcher == "basic" else ["hydra/launcher=local", "hydra.launcher.n_jobs=1"]
    for status in (143, 0):
        done = lightning_starts(2, *command, cwd=tmp_path)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
    check_sweep(tmp_path)


OF_SWEEP = ["trainer.max_steps=8", "validate_every=4", "checkpoint_every=100"]


def check_sweep(cwd: Path) -> None:
    """Check that the weights of seeds 0 and 1 equal those of single runs."""
    assert [p.name for p in cwd.iterdir()] == ["outputs"]
    (sweep,) = (cwd / "outputs" / "sweeps").iterdir()
    assert [p.name for p in (cwd / "outputs").iterdir()] == ["sweeps"]
    assert sorted(p.name for p in sweep.iterdir() if p.name[0] != ".") == ["0", "1", "multirun.yaml"]
    for seed in (0, 1):
        assert [p.name for p in (sweep / str(seed)).glob("*.log")] == ["train.log"]
        train_tiny(cwd / f"alone{seed}", f"seed={seed}", "trainer.max_steps=8", "validate_every=4")
        assert_close_weights(sweep / str(seed), cwd / f"alone{seed}")


def assert_close_weights(run: Path, other: Path) -> None:
    for key in ("state_dict", "current_model_state"):
        ours, theirs = weights(run, key), weights(other, key)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def assert_close_averages(run: Path, other: Path) -> None:
    """Check that averages of a length between those of the snapshots are equal up to rounding."""
    ours, theirs = (open_run(str(folder), ema=0.07).module.state_dict() for folder in (run, other))
    for name in ours:
        assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = (sorted(path.name for path in (folder / "averages").iterdir()) for folder in (run, other))
    assert ours == theirs and len(ours) == 4


@pytest.mark.faults
@pytest.mark.parametrize("sharded", [False, True])
def test_nan_on_one_rank_rolls_back_all(tmp_path, sharded):
    """Compare the weights at the start of each step: while step 3's loss is not finite they do not change."""
    fault = {"_target_": "tests.faults.Poison", "rank": 1, "steps": "[3,4]"}
    settings = [f"+callbacks.fault.{key}={value}" for key, value in fault.items()]
    settings += ["+callbacks.watch._target_=tests.faults.Watch", "trainer.max_steps=7", "validate_every=100"]
    settings += ["checkpoint_every=2", "callbacks.nan_guard.patience=2", *(SHARDED if sharded else [])]
    done = lightning_starts(2, *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    printed: dict[tuple[int, int], str] = {}
    for rank, step, total in re.findall(r"rank (\d) step (\d) weights (\S+)", done.stdout):
        printed[int(rank), int(step)] = total
    assert len(printed) == 14 and "nan" not in printed.values()
    assert sharded or all(printed[0, step] == printed[1, step] for step in range(7))
    for rank in (0, 1):
        # Steps 3 and 4 are skipped; step 5 begins as step 2 did, whose checkpoint is the last from before.
        assert printed[rank, 3] == printed[rank, 4] != printed[rank, 2] == printed[rank, 5] != printed[rank, 6]
    rows = [json.loads(line) for line in (only_run(tmp_path) / "nonfinite.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 4]
    # The second process has the second half of the batch.
    assert [place for place, loss in enumerate(rows[0]["losses"]) if loss == "nan"] == [32]


@pytest.mark.slow
def test_two_processes_draw_the_same_samples(trained, torchrun_started, tmp_path):
    """Five samples in batches of two: in the second round one process draws one sample, and the other none."""
    from src.sample import sample

    cwd, printed = torchrun_started
    assert printed.count("\n5 samples of") == 1
    (folder,) = (cwd / "outputs" / "sample").iterdir()
    assert {p.suffix for p in folder.iterdir()} == {".png", ".npz", ".gif", ".log", ""}
    assert len(list(folder.glob("0000?.png"))) == 5 and len(list(folder.glob("*.log"))) == 1
    alone = sample(compose("sample", f"run='{trained}'", *SAMPLING, f"run_dir='{tmp_path}'"))
    ours, theirs = (np.load(f / "samples.npz")["arr_0"].astype(int) for f in (folder, alone))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 16 and (ours == theirs).mean() > 0.99


@pytest.mark.slow
def test_two_processes_compute_the_same_metrics(trained, started, tmp_path):
    from src.evaluate import evaluate

    cwd, printed = started
    assert printed.count("30 validation samples:") == 1
    (folder,) = (cwd / "outputs" / "evaluate").iterdir()
    alone = evaluate(compose("evaluate", f"run='{trained}'", *EVALUATION, f"run_dir='{tmp_path}'"))
    together = json.loads((folder / "metrics.json").read_text())
    for found, expected in (
        (together["baseline"], alone.pop("baseline")),
        (together["samplers"]["ancestral 2"]["metrics"], alone["samplers"]["ancestral 2"]["metrics"]),
    ):
        assert found == {name: pytest.approx(figure, rel=1e-5, abs=1e-6) for name, figure in expected.items()}
    assert {n: v for n, v in together.items() if n not in ("baseline", "samplers")} == {
        name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        for name, value in alone.items()
        if name != "samplers"
    }


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        (["devices=0"], "devices=0"),
        (["devices=2", "device=cpu:0"], "device=cpu:0 names one of devices=2 devices; set device=cpu"),
    ],
)
def test_unavailable_devices_are_refused(trained, tmp_path, settings, rule):
    from src.sample import sample

    with pytest.raises(UsageError, match=rule):
        sample(compose("sample", f"run='{trained}'", f"run_dir='{tmp_path}'", *settings))


def test_more_processes_than_devices_are_refused(trained, tmp_path, monkeypatch):
    from src.sample import sample

    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="devices=1 num_nodes=1 needs 1 processes, but 4 run; set devices=4"):
        sample(compose("sample", f"run='{trained}'", f"run_dir='{tmp_path}'"))


def test_run_handles_slurm_warning_itself(tmp_path, monkeypatch):
    """Lightning would save elsewhere and requeue the job, even without a handler of ours."""
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
    assert isinstance(getattr(in_training, "__self__", None), GracefulShutdown)
    assert isinstance(at_the_end, Interruption)
