"""The model card of an exported run."""

import shutil

import pytest
import yaml

from src.runs.model_card import describe_node, draw_card_samples, model_card
from src.runs.open import open_run
from src.training.checkpoints import exportable_settings, read_checkpoint, write_exported


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """Return a copy of a run, with the overrides that only the command line saves."""
    folder = tmp_path_factory.mktemp("cards") / "run"
    shutil.copytree(trained, folder)
    (folder / ".hydra").mkdir(exist_ok=True)
    typed = [
        *("schedule=cosine", "data.root=/home/ann/photos", "data.val_root=photos", "callbacks.ema.decay=0.9"),
        *("hydra.run.dir=secret", "logger.wandb.project=secret", "conditioning.encode.examples=['a cat', 'x|y']"),
    ]
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(typed))
    return folder


def parts(card):
    """Return the front matter and the rest of a card."""
    _, header, body = card.split("---\n", 2)
    return yaml.safe_load(header), body


def test_card_describes_model_and_training(run):
    opened = open_run(str(run))
    header, body = parts(model_card(opened, "USAGE", "SAMPLES", "diffusers"))
    assert header["library_name"] == "diffusers" and header["pipeline_tag"] == "unconditional-image-generation"
    assert "license" not in header and "datasets" not in header
    count = sum(value.numel() for value in read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"].values())
    for text in (
        *("USAGE", "SAMPLES", f"`{count:,}`", "`cosine(num_steps=1000", "prediction=v", "min_snr(", "AdamW(lr="),
        *("| training steps | `6` |", "| weights | `averaged` |", "val/loss"),
    ):
        assert text in body, text


def test_card_holds_no_paths_of_the_machine(run):
    _, body = parts(model_card(open_run(str(run)), "USAGE"))
    for word in ("/home", "photos", "secret", str(run)):
        assert word not in body, word
    assert "src.train schedule=cosine data.root=... data.val_root=... callbacks.ema.decay=0.9" in body
    assert "a cat" in body


def test_card_of_an_exported_model_has_no_training(run, tmp_path):
    """The file contains neither the command nor the metrics."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    config, _ = exportable_settings(checkpoint["hyper_parameters"])
    write_exported(tmp_path / "model.safetensors", checkpoint["state_dict"], True, config)
    header, body = parts(model_card(open_run(str(tmp_path)), "USAGE"))
    assert "library_name" not in header
    assert "## Settings" in body and "src.train" not in body and "val/loss" not in body


def test_card_shows_samples_of_the_run(run):
    opened = open_run(str(run))
    picture = draw_card_samples(opened)
    assert picture == draw_card_samples(opened) and len(set(picture.getdata())) > 1


def test_long_values_stay_out_of_the_table():
    node = {"_target_": "a.b.f", "_partial_": True, "x": 1, "none": None, "long": "x" * 100, "g": {"_target_": "c.g"}}
    assert describe_node(node) == "f(x=1, g=g)"
