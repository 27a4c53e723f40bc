"""Hydra's command line, as its documentation describes it, works with every command."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import src
from src.config.cli import launch
from src.config.search_path import CONF, load_option
from src.config.words import parsed
from tests.conftest import HANG_SECONDS
from tests.fork_server import run_python

OWN_CODE = """
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from src.diffusion.samplers import ddim
from src.diffusion.losses import simple
from src.models.mlp import MLP


def betas(num_steps):
    return torch.linspace(1e-3, 0.2, num_steps, dtype=torch.float64)


def sampler(diffusion, predict, x, grid, *, noise):
    yield from ddim(diffusion, predict, x, grid, eta=0.5, noise=noise)


def loss(diffusion, denoise, x0, transition, eps, *, weighting):
    return simple(diffusion, denoise, x0, transition, eps, weighting=weighting)


class Network(MLP):
    pass


def ring(n, generator):
    angle = 6.28 * torch.rand(n, generator=generator)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


class Hello(Callback):
    def on_train_start(self, trainer, module):
        print("hello from a callback")


class Logger(CSVLogger):
    pass
"""

OWN_FILES = {
    "own.yaml": "seed: 11\n",
    "schedule/mine.yaml": "_target_: own_package.betas\nnum_steps: 20\n",
    "sampler/finer.yaml": "defaults: [ddim, _self_]\nsteps: 7\n",
    "sampler/mine.yaml": "_target_: own_package.sampler\n_partial_: true\nsteps: 3\nspacing: trailing\n",
    "loss/mine.yaml": "_target_: own_package.loss\n_partial_: true\nweighting: ${weighting}\n",
    "model/mine.yaml": "_target_: own_package.Network\nfeatures: 2\nhidden_size: 8\nnum_res_blocks: 1\n",
    "data/mine.yaml": (
        "_target_: src.data.points.PointsDataModule\nsource: {_target_: own_package.ring, _partial_: true}\n"
        "num_samples: 200\nbatch_size: 16\nmicrobatch_size: null\n"
    ),
    "callbacks/mine.yaml": "hello: {_target_: own_package.Hello}\n",
    "logger/mine.yaml": "mine: {_target_: own_package.Logger, save_dir: '${run_dir}'}\n",
    "experiment/mine.yaml": (
        "# @package _global_\ndefaults:\n"
        + "".join(
            f"  - override /{g}: mine\n"
            for g in ("schedule", "sampler", "loss", "model", "data", "callbacks", "logger")
        )
        + "seed: 5\ndiffusion: {clip_x0: null}\ntrainer: {max_steps: 2, accelerator: cpu}\nvalidate_every: 2\n"
    ),
}
"""A user config folder outside the clone."""

COMPOSE = {
    "train --cfg job": ["seed: 0", "prediction: "],
    "train --cfg job --package schedule": ["num_steps: 1000"],
    "train -c hydra": ["output_subdir: .hydra"],
    "train -c hydra -p hydra.job": ["chdir: "],
    "train --cfg job --resolve -p model": ["model_channels: 32"],
    "train --config-path own --cfg job -cn own": ["seed: 11"],
    "train --config-dir own -cn own --cfg job": ["seed: 11"],
    "train hydra.searchpath=[pkg://hydra.conf] --cfg job": ["seed: 0"],
    "train --config-dir own schedule=mine --cfg job": ["_target_: own_package.betas"],
    "train --config-dir=own schedule=mine --cfg job": ["_target_: own_package.betas"],
    "train hydra.searchpath=[file://own] schedule=mine --cfg job": ["_target_: own_package.betas"],
    "train --config-dir own experiment=mine --cfg job": ["own_package.ring", "seed: 5"],
    "train --config-dir own experiment=mine seed=7 --cfg job": ["own_package.ring", "seed: 7"],
    "sample --config-dir own sampler=mine --cfg job": ["_target_: own_package.sampler"],
    "train ~logger --cfg job": ["logger: null"],
    "train logger=null --cfg job": ["logger: {}"],
    "train callbacks=none --cfg job": ["seed: 0"],
    "train data=table data.path=x data.types={a.b:number} --cfg job": ["a.b: number"],
    "train conditioning=null --cfg job": ["conditioning: null"],
    "train conditioning=null experiment=shapes_text --cfg job": ["conditioning: null"],
    "train conditioning=class conditioning=null --cfg job": ["conditioning: null"],
    "train trainer.fast_dev_run=true --cfg job": ["fast_dev_run: true"],
    "train +trainer.limit_val_batches=3 --cfg job": ["limit_val_batches: 3"],
    "train ++seed=4 --cfg job": ["seed: 4"],
    "train init_from=x init_from.weights=raw --cfg job": ["path: x", "weights: raw"],
    "train optimizer={lr:0.002} --cfg job": ["torch.optim.AdamW", "lr: 0.002"],
    "train ~callbacks.ema --cfg job": ["nan_guard:"],
    "train seed=1 model=unet_tiny seed=2 --cfg job": ["seed: 2"],
    "train model.model_channels=${data.batch_size} --cfg job": ["model_channels: ${data.batch_size}"],
    "train sampler=ddim data=points --cfg job": ["samplers.ddim", "points.moons"],
    "sample run=~/runs/x --cfg job": [f"run: {Path.home()}/runs/x"],
    "train data=folder data.root=~/images --cfg job": [f"root: {Path.home()}/images"],
    "train --info searchpath": ["main", "conf"],
    "train --info defaults": ["schedule/cosine"],
    "train --hydra-help": ["--multirun"],
    "train --shell-completion install=bash": ["hydra_bash_completion"],
    "train -sc install=fish": ["hydra_fish_completion"],
    "train --version": [f"{src.NAME} {src.__version__}"],
    "train --help": ["Usage: python -m src.train", "schedule:", "cosine", "seed: 0 #", "max_steps: 2500"],
    "train -h --config-dir own": ["mine"],
    "compare runs=[~/a,~/b] --cfg job": [f"- {Path.home()}/a", f"- {Path.home()}/b"],
    "sample sampler=ddim sampler.spacing=karras --cfg job": ["spacing: karras"],
    "sample --help": ["Usage: python -m src.sample", "run: null #"],
}
"""Commands that print something, with parts of it."""

REFUSED = {
    # Ranges, choices and types.
    "train optimizer.lr=-1": "optimizer.lr=-1",
    "train optimizer.lr=fast": "optimizer.lr=fast",
    "train optimizer.lr=0,001": "type optimizer.lr=0.001",
    "train data.batch_size=0": "data.batch_size=0",
    "train trainer.max_steps=0": "trainer.max_steps=0",
    "train seed=-1": "seed=-1",
    "train callbacks.samples.seed=-2": "callbacks.samples.seed=-2",
    "train diffusion.prediction=epsilon": "diffusion.prediction=epsilon",
    "train loss.type=l3": "loss.type=l3",
    "train keep_checkpoints=-2": "keep_checkpoints=-2",
    "train schedule.num_steps=5": "schedule.num_steps=5 must be in [10, 10000]",
    "train schedule=edm_lognormal schedule.num_steps=1": "schedule.num_steps=1",
    "train seed=${foo}": "seed=${foo} refers to foo",
    "train optimizer.betas=[0.9,${foo}]": "refers to foo",
    "train optimizer.lr=${recipe.lrr}": "did you mean recipe.lr",
    "train optimizer.lr=${oc.env:NO_SUCH_NAME}": "optimizer.lr=${oc.env:NO_SUCH_NAME}",
    "train hydra.job.name=${foo}": "hydra.job.name=${foo} refers to foo",
    "train data=points model=unet_tiny": "model=mlp for points",
    "evaluate run=x n=5": "n=5 must be at least 10",
    "train -m optimizer.lr=1e-3,-1": "optimizer.lr=-1",
    "train hydra.mode=MULTIRUN optimizer.lr=1e-3,-1": "optimizer.lr=-1",
    "train -m seed=range(1,-2,-2)": "seed=-1",
    "train -m schedule=glob(c*)": "schedule=custom: schedule.betas has no default",
    "train -m data=digits,folder seed=0,1": "data=folder: data.root has no default",
    "train -m sampler=dpmpp_2m_sde,ddim sampler.eta=1,2": "sampler=ddim: sampler.eta=2",
    "train -m hydra.sweeper.max_batch_size=x seed=0,1": "hydra.sweeper.max_batch_size=x",
    "train -m hydra.sweeper.max_batch_size=0 seed=0,1": "hydra.sweeper.max_batch_size=0",
    "train -m hydra.sweeper.params=3": "hydra.sweeper.params=3",
    "train -m hydra.sweeper.params={seed:x}": "hydra.sweeper.params={seed:x}",
    "train -m hydra.sweeper.params.seed=x": "hydra.sweeper.params.seed=x",
    "sample run=x sampler=ddim sampler.eta=2": "sampler.eta=2",
    "sample n=0": "n=0",
    "sample guidance.rescale=2": "guidance.rescale=2",
    "evaluate run=x num_terms=0": "num_terms=0",
    "evaluate run=x ode_tolerance=0": "ode_tolerance=0",
    "sample run=x devices=0": "devices=0",
    "schedules frames=1": "frames=1",
    "evaluate run=x features=[pixels,resnet]": "features=resnet",
    "evaluate run=x reference=test": "reference=test",
    "compare n=0": "n=0",
    "compare runs=[x,y]": "x",
    "sample": "run=FOLDER",
    "sample run=outputs/no/such/run": "no run folder",
    "schedules names=[cosin]": "did you mean cosine?",
    # Combinations.
    "train schedule=null": "schedule=null",
    "train ~model": "model=null",
    "train optimizer=null": "optimizer=null",
    "train diffusion=null": "diffusion=null",
    "train neighbors=5": "neighbors=5",
    "train ~snr_shift": "~snr_shift",
    "train validate_every=5 trainer.val_check_interval=3": "trainer.val_check_interval=null",
    "evaluate analytic=mixture n=3": "n=",
    "train autoencoder.scale=2": "add autoencoder=FOLDER",
    "evaluate run=x analytic_steps=[5]": "add analytic=mixture",
    "train data=folder": "data.root=...",
    "schedules data=points": "data=points",
    "sample schedule=cosine": "a run keeps its schedule",
    # Names of other libraries.
    "train lr=1e-3": "type optimizer.lr=1e-3",
    "train warmup_steps=5": "type lr_scheduler.warmup_steps=5",
    "train learning_rate=1e-3": "type optimizer.lr=1e-3",
    "train batch_size=8": "type data.batch_size=8",
    "train epochs=3": "trainer.max_steps to 3 times",
    "train steps=50": "type trainer.max_steps=50",
    "sample steps=50": "type sampler.steps=50",
    "schedules steps=50": "type num_steps=50",
    "train noise_schedule=cosine": "type schedule=cosine",
    "train objective=hybrid": "type loss=hybrid",
    "train process.clip=2": "type diffusion.clip_x0=2",
    "train process.variance=learned": "type diffusion.variance=learned",
    "train model.width=8": "type model.model_channels=8",
    "train callbacks.guard.rewinds=2": "type callbacks.nan_guard.max_rollbacks=2",
    "train beta_schedule=linear": "type schedule=linear",
    "train num_timesteps=100": "type schedule.num_steps=100",
    "sample num_inference_steps=20": "type sampler.steps=20",
    "sample guidance_scale=2": "type guidance.scale=2",
    "train loss=mse": "type loss=simple",
    "train schedule=squaredcos_cap_v2": "type schedule=cosine",
    # Misspelled.
    "train schedule=cosin": "did you mean cosine?",
    "train data=moons": "type experiment=moons",
    "train logger=[csv,wandbb]": "did you mean wandb?",
    "train shedule=cosine": "did you mean schedule?",
    "train ~shedule": "did you mean schedule?",
    "train -m shedule=linear,cosine": "did you mean schedule?",
    "train -m +model.foo=1,2": "model.foo",
    "train -m optimizer.amsgrad=true,false": "+optimizer.amsgrad=true,false",
    "train --config-path own": "--config-dir own",
    "train -p conditioning --cfg job": "it is null",
    "train schedule.num_stps=10": "did you mean schedule.num_steps?",
    "train +schedule.num_stps=10": "did you mean schedule.num_steps?",
    "train trainer.fast_dev=true": "did you mean trainer.fast_dev_run?",
    "train trainer.foo=1": "type +trainer.foo=1",
    "train optimizer.amsgrad=true": "type +optimizer.amsgrad=true",
    "train logger=wandb logger.wandb.foo=1": "type +logger.wandb.foo=1",
    "train sampler.eta=0.5": "sampler=ddim",
    "train optimizer=sgd optimizer.betas=[0.9,0.99]": "optimizer=adam",
    "train conditioning.cond_drop_prob=0.2": "conditioning=class",
    "train data.root=photos": "add data=folder",
    "train +schedule=linear": "without the +",
    "sample trainer=ddp": "trainer=ddp",
    "train run_dir=x": "type hydra.run.dir=x",
    # Not an override, or several values.
    "train --schedule=linear": "type schedule=linear",
    "train --schedule linear": "type schedule=linear",
    "train schedule = linear": "without spaces",
    "train schedule= linear": "schedule=linear",
    "sample outputs/train/x": "type run=outputs/train/x",
    "sample last.ckpt/x.ckpt": "type ckpt=last.ckpt/x.ckpt",
    "train outputs/train/x": "type resume=outputs/train/x",
    "train own": "type data=folder data.root=own",
    "doctor tables/x.csv": "type data=table data.path=tables/x.csv",
    "train data=table path=x.csv": "init_from.path or data.path",
    "train run=x": "type resume=x",
    "sample resume=x": "type run=x",
    "sample run=x data.batch_size=8 data=mnist": "a run keeps its data",
    "evaluate run=x metric=fid": "type features=fid",
    "train cosine": "schedule=cosine",
    "train schedule=[linear,cosine]": "type -m schedule=linear,cosine",
    "train schedule=linear,cosine": "add -m",
    "train -m optimizer.lr=interval(1,2)": "hydra/sweeper=search",
    "train --config-dir nowhere schedule=mine": "--config-dir nowhere",
    "train --experimental-rerun x": "resume=FOLDER",
    # Settings with the default null, and lists.
    "sample run=x ema=yes": "ema=yes must be true or false",
    "sample run=x guidance.interval=0.5": "guidance.interval=0.5 must be a list",
    "evaluate run=x samplers=ddim": "[{sampler:ddim,steps:10}]",
    "sample run=x optimizer.lr=1": "a run keeps its optimizer",
    "sample run=x device=gpu": "type device=cuda",
    "sample run=x sampler=ddim sampler.spacing=foo": "karras",
    "evaluate run=x num_terms=few": "num_terms=few must be an integer",
    "evaluate run=x features=[]": "features=[]",
    "evaluate run=x cache=null": "cache=null",
    "evaluate run=x alignment=false": "type alignment.enabled=false",
    "evaluate analytic=mixture analytic_steps=[a]": "analytic_steps=[a] must be a list of numbers",
    "schedules names=linear,cosine": "names=[linear,cosine]",
    "schedules linear cosine": "names=[linear,cosine]",
    "schedules names=5": "unknown schedule '5'",
    "compare runs=nope": "nope",
    "train --format json": "type format=json",
    # Hydra's flags.
    "train --cfg job --package": "--package",
    "train --cfg job -p nope": "--package nope",
    "train --cfg job -p hydra.job": "--package hydra.job",
    "train --package model": "add --cfg job",
    "train --resolve": "add --cfg job",
    "train --cfg jobs": "--cfg",
    "train -m --cfg job": "--multirun and --cfg",
    "train --shell-completion": "install=bash",
    "train -sc install=tcsh": "install=bash",
    "train --config-name trein": "did you mean train?",
    "train -cn sample": "type python -m src.sample",
    "train --config-dir own -cn mein": "--config-name mein",
    "train --config-path nowhere": "--config-path nowhere",
    "train hydra.searchpath=[pkg://nope]": "hydra.searchpath=",
    "train hydra.searchpath=[file://nope]": "hydra.searchpath=",
    "train hydra.searchpath=own": "must be a list",
}
"""Commands that are refused, and part of the message, before torch is imported."""

RESERVED = ("a(b", "a)b", "a[b", "a]b", "{a", "a}b", "a#b&c", "a~b'c", "größe", "a=b'", '"a')
"""Names with characters of Hydra's grammar, or outside ASCII."""


def subprocess_python(*words: str, cwd: Path, stdin: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run `python WORDS` in a process that has imported nothing."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *words]
    return subprocess.run(
        command, input=stdin, cwd=cwd, env=environment, text=True, capture_output=True, timeout=HANG_SECONDS
    )


def run_all(commands: list[list[str]], cwd: Path, start: Any = subprocess_python) -> list[dict[str, Any]]:
    """Run commands one after another in a process."""
    path = os.pathsep.join([str(CONF.parent), str(cwd)])
    done = start("-m", "tests.config.run_commands", stdin=json.dumps(commands), cwd=cwd, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def words(line: str) -> list[str]:
    return line.split(" ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the clone with a user package and a user config folder."""
    where = tmp_path_factory.mktemp("user")
    (where / "own_package.py").write_text(OWN_CODE)
    for name, text in OWN_FILES.items():
        (where / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (where / "own" / name).write_text(text)
    return where


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of all commands that need no torch, by their line."""
    lines = [*REFUSED, *(f"sample run={name}" for name in RESERVED), *COMPOSE]
    return dict(zip(lines, run_all([words(line) for line in lines], folder), strict=True))


def test_documented_flags_and_overrides_work(results):
    for line, parts in COMPOSE.items():
        result = results[line]
        assert result["status"] == 0, (line, result)
        for part in parts:
            assert part in result["out"], (line, part, result["out"][-2000:])


def test_refusals_name_the_setting_on_one_line(results):
    for line, part in REFUSED.items():
        result = results[line]
        assert result["status"] == 2, (line, result)
        assert len(result["err"].strip().splitlines()) == 1, (line, result["err"])
        assert part in result["err"], (line, part, result["err"])


def test_refusals_import_no_torch(results):
    assert [line for line in REFUSED if results[line]["torch"]] == []


def test_refusals_leave_no_files(results, folder):
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == ["own", "own_package.py"]


def test_reserved_characters_get_the_quoted_override(results):
    for name in RESERVED:
        result = results[f"sample run={name}"]
        assert result["status"] == 2 and f"run={name} " in result["err"]
        (override,) = shlex.split(result["err"].rpartition("type ")[2])
        assert parsed(override).key_or_group == "run" and parsed(override).value() == name


def test_misspelled_added_key_gets_hint(folder):
    (result,) = run_all([["train", "+shedule=cosine", "--cfg", "job"]], folder)
    assert result["status"] == 0 and "did you mean schedule?" in result["err"]


def test_repeated_key_warns_that_last_wins(results):
    assert "seed=2" in results["train seed=1 model=unet_tiny seed=2 --cfg job"]["err"]


def test_help_has_one_usage_line_and_three_examples(results):
    text = results["train --help"]["out"]
    assert text.count("Usage:") == 1 and text.count("  python -m src.train ") == 3


def test_version_has_one_source():
    project = tomllib.loads((CONF.parent / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and project["project"]["name"] == src.NAME
    assert project["tool"]["hatch"]["version"]["path"] == "src/__init__.py"


def test_run_uses_own_package_without_trust(folder):
    """A schedule, sampler, loss, network, data, callback and logger by `_target_`, from a user folder."""
    few = ["weighting=uniform", "neighbors.num_samples=0", "diffusion.prediction=eps"]
    own = ["--config-dir", "own", "experiment=mine", *few]
    few_samples = ["n=10", "batch_size=10", "max_features=10", "num_memorization=10", "likelihood=false"]
    evaluated = [
        "evaluate",
        "--config-dir",
        "own",
        "run=run",
        "ema=false",
        "sampler=mine,ddim",
        "sampler.steps=2",
    ]
    analytic = ["evaluate", "--config-dir", "own", "analytic=mixture", "analytic_schedule=mine"]
    trained, moved, resumed, compared, exact = run_all(
        [
            ["train", *own, "hydra.run.dir=run"],
            ["train", *own, "hydra.run.dir=moved", "hydra.job.chdir=true"],
            ["train", *own, "resume=run", "trainer.max_steps=3"],
            [*evaluated, *few_samples, "hydra.run.dir=evaluated"],
            [*analytic, "analytic_steps=[4]", "analytic_samples=10", "hydra.run.dir=exact"],
        ],
        folder,
        run_python,
    )
    assert trained["status"] == 0, trained["err"][-3000:]
    assert "hello from a callback" in trained["out"]
    overrides = yaml.safe_load((folder / "run" / ".hydra" / "overrides.yaml").read_text())
    assert "experiment=mine" in overrides
    assert moved["status"] == 0, moved["err"][-3000:]
    for name in ("run", "moved"):
        assert json.loads((folder / name / "metrics.json").read_text())["steps"] >= 2
    assert compared["status"] == 0, compared["err"][-3000:]
    assert exact["status"] == 0, exact["err"][-3000:]
    measured, errors = (json.loads((folder / name / "metrics.json").read_text()) for name in ("evaluated", "exact"))
    assert [name.split()[0] for name in measured["samplers"]] == ["sampler", "ddim"]
    assert "mine" in errors["samplers"]
    left = {path.name for path in folder.iterdir()}
    assert left <= {"run", "moved", "evaluated", "exact", "outputs", "own", "own_package.py", "__pycache__"}
    assert resumed["status"] == 0, resumed["err"][-3000:]


def test_sampler_of_own_folder_loads_beside_ours(folder, monkeypatch):
    source = SimpleNamespace(path=str(folder / "own"), schema="file")
    settings = SimpleNamespace(runtime=SimpleNamespace(config_sources=[source]))
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: settings)
    assert load_option("sampler", "mine")._target_ == "own_package.sampler"
    ddim = load_option("sampler", "ddim")
    assert ddim._target_.endswith("ddim")
    assert load_option("sampler", "finer") == {**ddim, "steps": 7}
    with pytest.raises(ValueError, match="unknown sampler 'min'"):
        load_option("sampler", "min")


def test_closed_pipe_ends_a_command_silently(folder):
    task = "import sys; from src.config.cli import launch; launch('train', lambda _: print('x' * 10**6))"
    for words in (["-m", "src.train", "--cfg", "job"], ["-m", "src.train", "--hydra-help"], ["-c", task]):
        reader, writer = os.pipe()
        os.close(reader)
        environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_command_run_as_a_file_names_the_module(folder):
    for words in ([str(CONF.parent / "src" / "sample.py"), "n=1"], ["-m", "sample"]):
        done = subprocess_python(*words, cwd=CONF.parent / "src" if words[0] == "-m" else folder)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert "python -m src.sample" in done.stderr


def test_paths_start_where_the_command_was_typed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    seen = []
    paths = {"train": ["data.root", "data.val_root"], "sample": ["run", "guidance.model"], "evaluate": ["ckpt"]}
    for name, settings in paths.items():
        own = ["data=folder", "data.val_root=b/c"] if name == "train" else []
        typed = [f"{setting}=b/c" for setting in settings if setting != "data.val_root"]
        where = ["hydra.job.chdir=true", f"hydra.run.dir='{folder}/moved/{name}'"]
        monkeypatch.setattr(sys, "argv", [name, *own, *typed, *where])
        launch(name, lambda cfg: seen.append((cfg, os.getcwd())))
        cfg, here = seen.pop()
        assert here == str(folder / "moved" / name)
        assert all(OmegaConf.select(cfg, setting) == str(folder / "b" / "c") for setting in settings)
        assert "cache" not in cfg or cfg.cache == str(folder / "outputs" / "cache")
