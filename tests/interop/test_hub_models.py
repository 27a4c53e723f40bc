"""Push models to a local Hub and open them from there, with the library's own client."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from src.errors import UsageError
from src.export import export
from src.interop import hub_models
from src.interop.autoencoders import PATTERNS as AUTOENCODER
from src.interop.hub_models import check_push, local_copy, push
from src.runs.checkpoints import find_checkpoint
from src.sample import sample
from tests.conftest import compose, train_tiny
from tests.interop.hub_server import running_hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub_models._download.cache_clear()
    with running_hub(str(tmp_path / "cache"), monkeypatch) as running:
        yield running


@pytest.fixture
def model(tmp_path):
    """Return a folder with what an export leaves."""
    folder = tmp_path / "exported"
    (folder / ".hydra").mkdir(parents=True)
    for name in ("model.safetensors", "README.md", "export.log", ".hydra/overrides.yaml"):
        (folder / name).write_text(f"contents of {name}")
    return folder


def command(function, name, folder, *overrides):
    return function(compose(name, *overrides, f"run_dir='{folder}'"))


def test_pushed_folder_opens_from_the_hub(hub, model):
    """Without the command line and the log, which contain paths; again from the cache, without the Hub."""
    assert push(model, "ann/digits", private=True) == f"{hub.url}/ann/digits"
    assert sorted(hub.files("ann/digits")) == ["README.md", "model.safetensors"]
    assert hub.private["ann/digits"]
    assert (local_copy("hf://ann/digits", "run") / "model.safetensors").read_text() == "contents of model.safetensors"
    hub.commits.clear()
    hub_models._download.cache_clear()
    assert find_checkpoint("hf://ann/digits@" + "1".zfill(40), None).name == "model.safetensors"


def repository(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_pipeline_of_this_project_brings_its_autoencoder(hub, tmp_path):
    names = ["unet/config.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    unet = "unet/diffusion_pytorch_model.safetensors"
    push(repository(tmp_path / "ours", "training.safetensors", unet, *names), "ann/ours", private=True)
    push(repository(tmp_path / "theirs", "model_index.json", unet, *names), "ann/theirs", private=True)
    assert all((local_copy("hf://ann/ours", "run") / name).is_file() for name in names)
    assert not (local_copy("hf://ann/theirs", "run") / "vae").exists()


def test_old_weights_of_the_other_networks_are_not_downloaded(hub, tmp_path):
    bins = [f"{place}/diffusion_pytorch_model.bin" for place in ("unet", "vae")]
    push(repository(tmp_path / "old", "model_index.json", "vae/config.json", *bins), "ann/old", private=True)
    folder = local_copy("ann/old", "autoencoder", AUTOENCODER)
    assert [(folder / name).exists() for name in bins] == [False, True]


def test_revisions_select_commits(hub, model):
    push(model, "ann/digits", private=False)
    (model / "model.safetensors").write_text("second")
    push(model, "ann/digits", private=True)
    assert not hub.private["ann/digits"]  # an existing repository stays visible
    for revision, text in {"": "second", "@v1": "contents of model.safetensors", "@main": "second"}.items():
        assert (local_copy(f"hf://ann/digits{revision}", "run") / "model.safetensors").read_text() == text, revision


def test_models_that_cannot_be_opened_name_the_setting(hub, model, monkeypatch):
    push(model, "ann/public", private=False)
    push(model, "ann/private", private=True)
    push(model, "ann/gated", private=False)
    hub.gated.add("ann/gated")
    (model / "model.safetensors").rename(model / "model.onnx")
    push(model, "ann/onnx", private=False)
    monkeypatch.delenv("HF_TOKEN")
    reasons = {
        "hf://ann/absent": "does not exist or is private",
        "hf://ann/private": "HF_TOKEN",
        "hf://ann/gated": "consent",
        "hf://ann/public@v9": "no such revision",
        "hf://ann/public@": "empty revision",
        "hf://ann/onnx": "model.safetensors",
        "hf://ann/public/model.safetensors": "user/name",
        "hf://": "user/name",
    }
    for location, reason in reasons.items():
        with pytest.raises(ValueError, match=re.escape(reason)) as error:
            find_checkpoint(location, None, setting="guidance.model")
        assert "guidance.model=" in str(error.value) and "\n" not in str(error.value), location


def test_unreachable_hub_names_the_setting(hub, model, monkeypatch):
    from huggingface_hub import constants

    push(model, "ann/digits", private=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (
        lambda: local_copy("hf://ann/digits", "run"),
        lambda: push(model, "ann/digits", private=False),
        lambda: check_push("ann/digits"),
    ):
        with pytest.raises(ValueError, match=r"^(run|hub)=\S*ann/digits .*HF_HUB_OFFLINE|^hub=ann/digits failed"):
            call()


def test_impossible_pushes_are_refused(hub, model, monkeypatch):
    check_push("ann/digits")
    for name in ("ann/digits/model", "ann digits", "a--b", "ann/.x", 3):
        with pytest.raises(ValueError, match="hub="):
            check_push(name)
    push(model, "bob/digits", private=False)
    hub.read_only.add("bob/digits")
    with pytest.raises(ValueError, match=r"hub=bob/digits failed .*403"):
        push(model, "bob/digits", private=False)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=r"hub=ann/digits failed .*401"):
        push(model, "ann/digits", private=False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"^hub=.*HF_TOKEN"):
        check_push("ann/digits")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: check_push("ann/digits"), lambda: local_copy("hf://ann/digits", "run")):
        with pytest.raises(ValueError, match="huggingface_hub"):
            call()


def test_exported_run_samples_the_same_from_the_hub(hub, trained, tmp_path):
    """Also from the exported folder; its repository has the card with samples, and is refused if it exists already."""
    folder = command(export, "export", tmp_path / "export", f"run='{trained}'", "hub=ann/digits").parent
    assert sorted(hub.files("ann/digits")) == ["README.md", "model.safetensors", "samples.png"]
    assert "run=hf://ann/digits" in hub.files("ann/digits")["README.md"].decode()
    drawn = [
        np.load(command(sample, "sample", tmp_path / f"s{k}", f"run='{run}'", "n=2", "device=cpu") / "samples.npz")
        for k, run in enumerate((trained, folder, "hf://ann/digits"))
    ]
    assert all(np.array_equal(each["arr_0"], drawn[0]["arr_0"]) for each in drawn)
    with pytest.raises(UsageError, match=r"guidance\.model=hf://ann/absent"):
        command(sample, "sample", tmp_path / "s", f"run='{trained}'", "guidance.model='hf://ann/absent'")
    with pytest.raises(UsageError, match="hub=ann/digits"):
        command(export, "export", folder, f"run='{trained}'", "hub=ann/digits")
    train_tiny(tmp_path / "new", "init_from.path='hf://ann/digits'", "trainer.max_steps=1")


def test_foreign_targets_of_the_hub_are_refused(hub, trained, tmp_path):
    path = command(export, "export", tmp_path / "export", f"run='{trained}'")
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["model"])
    metadata["config"]["data"]["source"] = {"_target_": "os.system", "command": f"touch {tmp_path / 'canary'}"}
    weights = load_file(path)
    shutil.rmtree(path.parent / ".hydra", ignore_errors=True)
    save_file(weights, path, {"model": json.dumps(metadata)})
    push(path.parent, "eve/digits", private=False)
    with pytest.raises(UsageError, match=r"os\.system"):
        command(sample, "sample", tmp_path / "s", "run='hf://eve/digits'", "n=2")
    assert not (tmp_path / "canary").exists()


def test_pipelines_of_the_hub_open_by_their_name(hub, tmp_path, monkeypatch):
    """The files of the network and its scheduler are downloaded, others are not."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pipeline"
    names = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "scheduler/scheduler_config.json",
    ]
    for name in [*names, "unet/diffusion_pytorch_model.fp16.safetensors", "images/big.png"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    push(folder, "ann/ddpm", private=False)
    found = find_checkpoint(None, None, "ann/ddpm")
    assert found == find_checkpoint(None, None, "hf://ann/ddpm") == find_checkpoint("hf://ann/ddpm", None)
    assert sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()) == sorted(names)
    (tmp_path / "ann").mkdir()  # a path, not a name
    with pytest.raises(FileNotFoundError, match="init_from"):
        find_checkpoint(None, None, "ann/absent")
