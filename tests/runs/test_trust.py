"""Malicious checkpoints, runs and arrays are refused before anything runs; exported models hold nothing private."""

import importlib
import inspect
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from src.config.resume import expand_resume
from src.config.search_path import CONF
from src.errors import UsageError
from src.runs.open import open_run
from src.runs.trust import known_targets
from src.training.checkpoints import MAX_VALUES, check_plain
from tests.conftest import HANG_SECONDS, compose, train_tiny
from tests.fork_server import run_python


class Bomb:
    """Run a command on unpickling."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def run_command(name: str, folder: Path, *overrides: str) -> Path:
    """Run `src.sample`, `src.evaluate` or `src.export` in this process with little work; return its output folder."""
    module = importlib.import_module(f"src.{name}")
    small = {
        "sample": ["n=2", "sampler.steps=2"],
        "evaluate": ["num_val=2", "num_terms=2", "quality=false"],
        "export": [],
    }[name]
    device = [] if name == "export" else ["device=cpu"]
    getattr(module, name)(compose(name, f"run_dir='{folder}'", *small, *device, *overrides))
    return folder


def refused(name: str, folder: Path, *overrides: str) -> str:
    """Return the one-line error of a command."""
    with pytest.raises(UsageError) as error:
        run_command(name, folder, *overrides)
    assert "\n" not in str(error.value)
    assert not folder.exists()
    return str(error.value)


def tampered(trained: Path, path: Path, setting: str, value: object) -> Path:
    """Write a copy of the trained checkpoint with another value in its configuration; return its path."""
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    node = checkpoint["hyper_parameters"]
    *parents, last = setting.split(".")
    for part in parents:
        node = node[part]
    node[last] = value
    torch.save(checkpoint, path)
    return path


def touch(canary: Path) -> dict[str, object]:
    """Return a node that creates a file when it is instantiated, and that Hydra itself does not refuse."""
    return {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": [str(canary)]}]}


COMMANDS = ["sample", "evaluate", "export"]
TRAPS = {
    "os.system": ("data.source", lambda c: {"_target_": "os.system", "_args_": [f"touch {c}"]}),
    "attribute of our module": ("model", lambda c: {"_target_": "src.config.cli.os.system", "_args_": [f"touch {c}"]}),
    "our function": (
        "sampler",
        lambda c: {"_target_": "src.viz.tables.write_json", "path": {"_target_": "pathlib.Path", "_args_": [c]}},
    ),
    "our launcher": ("loss", lambda c: {"_target_": "src.config.cli.launch", "config_name": "train", "task": c}),
    "in a list": ("model.channel_mult", lambda c: [1, [touch(c)]]),
    "deep": ("diffusion.extra", lambda c: {"a": [{"b": touch(c)}]}),
    "known target elsewhere": ("diffusion", lambda c: {"_target_": "src.diffusion.losses.vlb", "_args_": [touch(c)]}),
    "recursion off": ("timestep_sampler._recursive_", lambda _: False),
    "partial": ("schedule", lambda c: {"_target_": "subprocess.run", "_partial_": True, "args": ["touch", c]}),
    "get_method": ("schedule", lambda _: {"_target_": "hydra.utils.get_method", "path": "os.system"}),
    "eval": ("model", lambda c: {"_target_": "builtins.eval", "_args_": [f"open({c!r}, 'w')"]}),
    "torch.hub": (
        "model",
        lambda c: {"_target_": "torch.hub.load", "repo_or_dir": c, "model": "net", "source": "local"},
    ),
    "download as loss": (
        "loss", lambda c: {"_target_": "torchvision.datasets.MNIST", "root": c, "download": True}
    ),
    "dataset without partial": ("data.source", lambda c: {"_target_": "torchvision.datasets.MNIST", "root": c}),
    "data source as model": ("model", lambda c: {"_target_": "src.data.images.digits", "_partial_": True}),
    "download on open": ("data.source.prepare", lambda _: True),
    "optimizer as model": ("model", lambda _: {"_target_": "torch.optim.AdamW", "params": []}),
    "logger as model": ("model", lambda c: {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": c}),
    "attribute of a known target": ("model._target_", lambda _: "src.models.unet.UNet.__init__"),
    "leading space": ("model._target_", lambda _: " src.models.unet.UNet"),
    "list as target": ("model._target_", lambda _: ["src.models.unet.UNet"]),
    "interpolated target": ("model._target_", lambda _: "${oc.env:HOME}"),
    "interpolation with our resolver": ("data.root", lambda c: f"${{fresh_folder:{c}}}"),
    "interpolated secret": ("logger.csv.name", lambda _: "${oc.env:HOME}"),
    "control characters": ("sampler.spacing", lambda _: "\x1b]0;title\x07"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "trap"), [*zip(COMMANDS * 9, TRAPS, strict=False), ("evaluate", "os.system"), ("export", "os.system")]
)
def test_malicious_configuration_is_not_instantiated(trained, tmp_path, canary, command, trap):
    """One command tries each trap, and all commands try one: they open runs in the same way."""
    setting, make = TRAPS[trap]
    path = tampered(trained, tmp_path / "a.ckpt", setting, make(str(canary)))
    message = refused(command, tmp_path / "out", f"ckpt='{path}'")
    assert setting in message and "trust=true" in message and "\x1b" not in message
    assert not canary.exists()


def test_trust_instantiates_everything(trained, tmp_path, canary):
    path = tampered(trained, tmp_path / "a.ckpt", "data.source", touch(canary))
    with pytest.raises(TypeError):  # The result is not a data source.
        open_run(None, str(path), trust=True)
    assert canary.exists()


def test_own_network_opens_with_trust(trained, tmp_path, monkeypatch):
    """Its class is on the import path, and conf/ does not name it."""
    (tmp_path / "mine.py").write_text("from src.models.unet import UNet\n\nclass Net(UNet):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tampered(trained, tmp_path / "a.ckpt", "model._target_", "mine.Net")
    for command in COMMANDS:
        assert "model._target_='mine.Net'" in refused(command, tmp_path / "out", f"ckpt='{path}'")
    assert "mine" not in sys.modules
    for command in COMMANDS:
        run_command(command, tmp_path / command, f"ckpt='{path}'", "trust=true")


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors", "a.npz"])
def test_files_are_never_unpickled(tmp_path, canary, name):
    """Neither checkpoints nor exported models nor archives of arrays."""
    bomb, path = Bomb(f"touch {canary}"), tmp_path / name
    if name == "a.npz":
        np.savez(path, np.array([bomb], dtype=object))
    elif name == "a.ckpt":
        torch.save({"state_dict": {}, "hyper_parameters": bomb}, path)
    else:
        path.write_bytes(pickle.dumps({"state_dict": {}, "hyper_parameters": bomb}))
    for command in COMMANDS:
        assert path.name in refused(command, tmp_path / "out", f"ckpt='{path}'")
    assert not canary.exists()
    if name == "a.npz":
        np.load(path, allow_pickle=True)["arr_0"]
    elif name == "a.ckpt":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert canary.exists()  # The pickle works elsewhere.


def test_compressed_archives_are_refused(trained, tmp_path):
    """Checkpoints are never compressed, and an archive could expand to any size."""
    path = tmp_path / "a.ckpt"
    last = trained / "checkpoints" / "last.ckpt"
    with zipfile.ZipFile(last) as original, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in original.infolist():
            packed.writestr(part.filename, original.read(part))
    torch.load(path, weights_only=True)
    assert "cannot be read as a checkpoint" in refused("sample", tmp_path / "out", f"ckpt='{path}'")


def billion_laughs() -> object:
    """Return nested references to few lists, which would fill the memory when written out."""
    node: object = "ha"
    for _ in range(30):
        node = [node] * 10
    return node


def endless() -> object:
    node: dict[str, object] = {}
    node["again"] = node
    return node


@pytest.mark.parametrize(
    "value",
    [billion_laughs(), endless(), [0.5] * MAX_VALUES, torch.zeros(1), {1: 2}, {"a\nb": 1}, {"": 1}, {1, 2}],
    ids=["laughs", "endless", "long", "tensor", "number", "newline", "empty", "set"],
)
def test_configurations_hold_few_plain_values(trained, tmp_path, value):
    with pytest.raises(ValueError, match=r"a\.ckpt"):
        check_plain({"model": value}, "a.ckpt")
    path = tampered(trained, tmp_path / "a.ckpt", "model.extra", value)
    assert path.name in refused("sample", tmp_path / "out", f"ckpt='{path}'")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model", {"_target_": "src.diffusion.curves.Learned"}),
        ("schedule", {"_target_": "src.data.points.rings", "_partial_": True}),
        ("diffusion", "a text"),
        ("data", None),
        ("data", {"_target_": "src.models.mlp.MLP", "features": 2}),
        ("timestep_sampler", {"_target_": "src.diffusion.timestep_samplers.ImportanceSampler", "num_bins": -1}),
        ("sampler.steps", "many"),
    ],
    ids=str,
)
def test_invalid_configurations_are_refused_in_one_line(trained, tmp_path, setting, value):
    path = tampered(trained, tmp_path / "a.ckpt", setting, value)
    refused("sample", tmp_path / "out", f"ckpt='{path}'")


def test_known_targets_are_those_of_conf():
    """Each is a class or function of the package that its name starts with. A run has no targets of conf/hydra."""
    files = [file for file in CONF.rglob("*.yaml") if "hydra" not in file.relative_to(CONF).parts]
    found = {name for file in files for name in targets(OmegaConf.load(file))}
    known = {target.name for target in known_targets(training=True)}
    optimizers = {name for name in known if name.startswith("torch.optim.")}
    assert known == found | optimizers
    assert {target.name.split(".")[0] for target in known_targets()} == {"src", "torchvision"}
    assert all(target.partial for target in known_targets() if target.name.startswith("torchvision"))
    for name in known:
        module, _, last = name.rpartition(".")
        target = getattr(importlib.import_module(module), last)
        assert inspect.isclass(target) or inspect.isfunction(target)
        assert target.__module__.split(".")[0] == name.split(".")[0]
    for name in optimizers:
        assert issubclass(getattr(torch.optim, name.rpartition(".")[2]), torch.optim.Optimizer)


def targets(node: object) -> set[str]:
    if not isinstance(node, DictConfig | ListConfig):
        return set()
    own = {node._get_node("_target_")._value()} if isinstance(node, DictConfig) and "_target_" in node else set()
    keys = node.keys() if isinstance(node, DictConfig) else range(len(node))
    return own.union(*(targets(node._get_node(key)) for key in keys)) - {None}


# Resuming


def run_folder(trained: Path, folder: Path, *overrides: str) -> Path:
    """Return a copy of the trained run with other saved overrides."""
    shutil.copytree(trained / "checkpoints", folder / "checkpoints")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "hydra.run.dir={tmp}",
        "+hydra.callbacks.evil._target_=os.system",
        "++hydra/job_logging=default",
        "~hydra.sweep",
        "+data@hydra.callbacks.evil=digits",
        "run_dir={tmp}/elsewhere",
        "callbacks.graceful_shutdown.path={tmp}/last.ckpt",
        "callbacks.best.filename=..",
        "callbacks.graceful_shutdown.path=README.md",
        "callbacks.samples.directory=docs",
        "callbacks.nan_guard.directory=.git",
        "callbacks={stop:{path:notes}}",
        "logger.csv.save_dir=src",
        "logger.wandb.entity=somebody",
        "logger={wandb:{entity:somebody}}",
        "+callbacks.best.filename='a\\b'",
        "seed=${oc.env:HOME}",
        "schedule.betas=${fresh_folder:{canary}}",
        "callbacks.samples.directory=${data.root}",
        "schedule=../../evil",
        "--config-dir={tmp}",
        "--multirun",
        "seed=[",
    ],
)
def test_malicious_saved_overrides_are_refused(trained, tmp_path, canary, line):
    line = line.replace("{tmp}", str(tmp_path)).replace("{canary}", str(canary))
    folder = run_folder(trained, tmp_path / "run", "seed=1", line, "trust=true", "+trust=true")
    for typed_overrides in ([f"resume={folder}"], ["resume=auto", f"hydra.run.dir={folder}"]):
        with pytest.raises(UsageError, match="add trust=true") as error:
            expand_resume(typed_overrides)
        assert "\n" not in str(error.value)
        assert line in expand_resume([*typed_overrides, "trust=true"])
    assert not canary.exists()


def test_ordinary_saved_overrides_are_resumed(trained, tmp_path):
    """`trust` is not restored: a run cannot vouch for itself."""
    typed_overrides = [
        "data=folder",
        "data.root=/my/images",
        "optimizer._target_=torch.optim.SGD",
        "~callbacks.checkpoint_every",
    ]
    typed_overrides += [
        "callbacks.ema.decay=0.99",
        "callbacks.power_ema.lengths=[0.05, 1e-1]",
        "callbacks.nan_guard.max_rollbacks=1e1",
        "logger=[csv,wandb]",
        "logger.wandb.offline=true",
    ]
    typed_overrides += [
        "+trainer.limit_val_batches=3",
        "trainer.max_time='00:01:00:00'",
        "schedule.betas=some/betas.npy",
    ]
    folder = run_folder(trained, tmp_path / "run", *typed_overrides, "trust=true", "++trust=true", "resume=/elsewhere")
    assert expand_resume([f"resume={folder}"])[:-2] == typed_overrides


@pytest.mark.parametrize("text", ["a: &a [*a]", "- [", "- 5", "!!python/object/apply:os.system [touch {canary}]"])
def test_malformed_saved_overrides_are_refused(trained, tmp_path, canary, text):
    folder = run_folder(trained, tmp_path / "run")
    (folder / ".hydra" / "overrides.yaml").write_text(text.replace("{canary}", str(canary)))
    with pytest.raises(UsageError, match="start a new run") as error:
        expand_resume([f"resume={folder}"])
    assert "\n" not in str(error.value) and not canary.exists()


def test_links_out_of_the_run_folder_are_refused(trained, tmp_path):
    """The run would write through them. W&B makes links within the folder, which are allowed."""
    folder = run_folder(trained, tmp_path / "run")
    (folder / "samples").symlink_to(folder / "checkpoints")
    expand_resume([f"resume={folder}"])
    (folder / "checkpoints" / "x").symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(UsageError, match="out of the run's folder"):
        expand_resume([f"resume={folder}"])


def test_command_refuses_malicious_hydra_callbacks(trained, tmp_path, canary):
    """Hydra calls its callbacks before our code, so the check must come first. With trust the callback runs."""
    folder = run_folder(
        trained, tmp_path / "run", "+hydra.callbacks.evil._target_=pathlib.Path.touch",
        f"+hydra.callbacks.evil._args_=[{{_target_:pathlib.Path,_args_:['{canary}']}}]",
    )  # fmt: skip
    invalid = ["data=points", "trainer.precision=bf16-true"]  # refused before the slow imports
    for trust, message in (("false", "add trust=true"), ("true", "would round the points")):
        done = run_python("-m", "src.train", f"resume={folder}", f"trust={trust}", *invalid, cwd=CONF.parent)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
        assert canary.exists() == (trust == "true")


def test_resumed_run_instantiates_only_targets_of_conf(trained, tmp_path, canary):
    """With trust it instantiates others too."""
    trap = f"+callbacks.evil={{_target_:pathlib.Path.touch,_args_:[{{_target_:pathlib.Path,_args_:['{canary}']}}]}}"
    for override in (trap, "optimizer._target_=src.runs.build.os.system", "model._target_=${oc.env:HOME}"):
        with pytest.raises(UsageError, match=r"which conf/ does not have.*add trust=true"):
            train_tiny(tmp_path / "run", f"resume='{trained}'", override)
    assert not canary.exists()
    with pytest.raises(Exception, match=r"NoneType|callback"):  # The call happens; its result is not a callback.
        train_tiny(tmp_path / "run", f"resume='{trained}'", trap, "trust=true")
    assert canary.exists()


def test_resumed_run_removes_no_files_outside_its_folder(trained, tmp_path):
    """Lightning removes the files that the state of a checkpoint callback names."""
    folder, victim = tmp_path / "run", tmp_path / "thesis.ckpt"
    shutil.copytree(trained, folder)
    victim.touch()
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint["callbacks"].values():
        if "last_model_path" in state:
            named = str(folder / "checkpoints" / ".." / ".." / "thesis.ckpt")
            state |= {"dirpath": str(folder / "checkpoints"), "last_model_path": named, "kth_best_model_path": named}
            state |= {"best_k_models": {named: torch.tensor(9.0)}, "kth_value": torch.tensor(9.0)}
    torch.save(checkpoint, path)
    train_tiny(folder, f"resume='{folder}'", "trainer.max_steps=9")
    assert victim.exists()


def test_experimental_rerun_of_hydra_is_refused(tmp_path, canary):
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(Bomb(f"touch {canary}")))
    command = [sys.executable, "-m", "src.train", "--experimental-re", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_SECONDS, cwd=CONF.parent)
    assert done.returncode == 2 and "--experimental-rerun" in done.stderr
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["pickle", "objects", "archive", "vast", "vaster", "gzip", "texts"])
def test_beta_files_hold_numbers_or_are_refused(tmp_path, canary, kind):
    """`schedule.betas=FILE` is the only setting that reads arrays."""
    path, bomb = tmp_path / "betas.npy", Bomb(f"touch {canary}")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif kind == "objects":
        np.save(path, np.array([bomb], dtype=object))
    elif kind == "archive":
        with path.open("wb") as file:
            np.savez(file, np.array([bomb], dtype=object))
    elif kind in ("vast", "vaster"):  # a header that claims 8 TB, or more than 64 bits can count
        shape = (10**12,) if kind == "vast" else (10**30,)
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    elif kind == "gzip":
        import gzip

        path = tmp_path / "betas.csv.gz"
        path.write_bytes(gzip.compress(b"0.1\n" * 20))
    else:
        np.save(path, np.array(["0.1", "x"]))
    with pytest.raises(UsageError, match="is not a table of numbers") as error:
        train_tiny(tmp_path / "run", "schedule=custom", f"schedule.betas='{path}'")
    assert "\n" not in str(error.value)
    assert not canary.exists()


# Exported models


def about(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["model"])


def test_exported_model_draws_the_same_bits_as_the_run(trained, tmp_path):
    """With averaged and raw weights; exporting the export gives the same file."""
    for ema in ("true", "false"):
        own = run_command("sample", tmp_path / f"own-{ema}", f"run='{trained}'", f"ema={ema}")
        first = run_command("export", tmp_path / f"e-{ema}", f"run='{trained}'", f"ema={ema}") / "model.safetensors"
        again = run_command("export", tmp_path / f"f-{ema}", f"ckpt='{first}'", f"ema={ema}") / "model.safetensors"
        assert first.read_bytes() == again.read_bytes()
        alone = (tmp_path / f"alone-{ema}.safetensors").absolute()
        first.rename(alone)
        theirs = run_command("sample", tmp_path / f"theirs-{ema}", f"ckpt='{alone}'", f"ema={ema}")
        arrays = [np.load(folder / "samples.npz", allow_pickle=False)["arr_0"] for folder in (own, theirs)]
        assert np.array_equal(*arrays)
        opened = [open_run(r, c, ema == "true").module for r, c in ((str(trained), None), (None, str(alone)))]
        for x, y in zip(*(m.sample(range(2), 0) for m in opened), strict=True):
            assert torch.equal(x, y)
    assert "no averaged weights" in refused("sample", tmp_path / "x", f"ckpt='{alone}'", "ema=true")
    averaged = tmp_path / "alone-true.safetensors"
    assert "ema=false" in refused("sample", tmp_path / "x", f"ckpt='{averaged}'", "ema=false")


def test_exported_model_holds_no_private_names(tmp_path, monkeypatch):
    """Its bytes name no folder, logger or data; it samples without data."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    images = tmp_path / "anna" / "photos"
    images.mkdir(parents=True)
    for k in range(20):
        Image.fromarray(np.full((8, 8), 12 * k, np.uint8)).save(images / f"{k}.png")
    folder = tmp_path / "anna" / "runs"
    train_tiny(
        folder, "data=folder", f"data.root='{images}'", "data.image_size=8", "data.channels=1", "data.batch_size=4",
        "data.val_fraction=0.2", "data.num_workers=0", "logger=[csv,wandb]", "logger.wandb.project=thesis-of-anna",
        "trainer.max_steps=1",
    )  # fmt: skip
    path = run_command("export", tmp_path / "e", f"run='{folder}'") / "model.safetensors"
    contents = path.read_bytes()
    for word in (b"anna", str(tmp_path).encode(), b"wandb", b"logger", b"callbacks", b"run_dir", b"photos"):
        assert word not in contents, word
    config = about(path)["config"]
    assert config["data"]["root"] is None and config["data"]["image_size"] == 8
    assert config["optimizer"]["_target_"] == "torch.optim.AdamW"
    run_command("sample", tmp_path / "s", f"ckpt='{path}'")
    assert "set data.root to the folder" in refused("evaluate", tmp_path / "v", f"ckpt='{path}'")
    metrics = [
        json.loads((run_command("evaluate", tmp_path / name, *given) / "metrics.json").read_text())
        for name, given in (("a", [f"ckpt='{path}'", f"data.root='{images}'"]), ("b", [f"run='{folder}'"]))
    ]
    assert metrics[0]["bits_per_dim"] == metrics[1]["bits_per_dim"] and metrics[0]["num_val"] == 2


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_command("export", tmp_path_factory.mktemp("exported"), f"run='{trained}'") / "model.safetensors"


@pytest.mark.parametrize("trap", ["target", "text", "laughs", "header", "no json"])
def test_malicious_exported_model_is_refused(exported, tmp_path, canary, trap):
    path = tmp_path / "model.safetensors"
    shutil.copy(exported, path)
    metadata = about(path)
    config = metadata["config"]
    match trap:
        case "target":
            config["data"]["source"] = touch(canary)
        case "text":
            config["data"]["root"] = f"${{fresh_folder:{canary}}}"
        case "laughs":
            config["model"]["extra"] = [0] * MAX_VALUES
    text = "[" * 10**6 if trap == "no json" else json.dumps(metadata)
    with safe_open(path, "pt") as file:
        save_file({name: file.get_tensor(name) for name in file.keys()}, path, {"model": text})
    if trap == "header":  # a length beyond the file
        path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    for command in COMMANDS if trap == "target" else ["sample"]:
        assert path.name in refused(command, tmp_path / "out", f"ckpt='{path}'")
    assert not canary.exists()
