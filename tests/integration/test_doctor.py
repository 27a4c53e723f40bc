"""`src.doctor` on folders, as a user types it."""

import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from src.config.cli import launch
from src.doctor import examine


class Output(NamedTuple):
    status: object
    out: str
    err: str

    @property
    def command(self) -> list[str]:
        """The words of the suggested command, the last line."""
        return shlex.split(self.out.splitlines()[-1])


@pytest.fixture
def doctor(tmp_path, monkeypatch, capsys):
    """Return a function that runs `python -m src.doctor WORDS` in this process."""

    def run(*words: str) -> Output:
        environment = dict(os.environ)
        monkeypatch.setattr(sys, "argv", ["doctor.py", *words, f"hydra.run.dir={tmp_path / 'out'}"])
        try:
            launch("doctor", examine)
            status: object = 0
        except SystemExit as ended:
            status = ended.code
        finally:
            for name in os.environ.keys() - environment.keys():  # where folders are remembered
                del os.environ[name]
        return Output(status, *capsys.readouterr())

    return run


def save(root: Path, name: str, *shape: int, seed: int = 0) -> None:
    """Write an image whose colors of a coarse grid, and so its thumbnail, depend on `seed`."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, *shape[2:]), dtype=np.uint8)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(coarse.repeat(shape[0] // 4, 0).repeat(shape[1] // 4, 1), shape)).save(root / name)


def test_the_suggested_command_fits_the_folder(tmp_path, doctor, recwarn):
    """Gray photos saved in color: one channel. Its steps are measured without warnings about what nobody typed."""
    for k in range(30):
        save(tmp_path / "my photos", f"{'cats' if k % 2 else 'dogs'}/{k}.png", 20, 24, seed=k)
        with Image.open(path := tmp_path / "my photos" / f"{'cats' if k % 2 else 'dogs'}/{k}.png") as image:
            image.convert("RGB").save(path)
    (tmp_path / "my photos" / "notes.txt").write_text("text")
    own = [f"data.root='{tmp_path / 'my photos'}'", r"data.source.class_pattern='^(\w+)/'"]
    done = doctor("data=folder", *own, "steps=1")
    assert done.status == 0, done.err
    assert all(text in done.out for text in ("30 images (30 png)", "2 classes", "notes.txt"))
    assert (tmp_path / "out" / "images.png").exists() and (tmp_path / "out" / "values.png").exists()
    assert done.command[:3] == ["python", "-m", "src.train"]
    assert {"data.channels=1", "data.image_size=16", "conditioning=class", *own} <= {*done.command}
    assert not [each for each in recwarn if "=" in str(each.message)]


def test_typed_settings_decide_the_others(tmp_path, doctor):
    """The network suits the size that was typed, not that of the files; three captioned images fit one batch of two."""
    for k in range(3):
        save(tmp_path / "photos", f"{k}.png", 40, 40, 3, seed=k)
        (tmp_path / "photos" / f"{k}.txt").write_text(f"picture {k}")
    done = doctor("data=captions", f"data.root={tmp_path / 'photos'}", "data.image_size=[16,12]", "steps=0")
    assert done.status == 0, done.err
    assert {"conditioning=text", "data.batch_size=2", "data.image_size=[16,12]", "model=unet_tiny"} <= {*done.command}


def test_copies_across_the_split_and_nested_folders_are_reported(tmp_path, doctor):
    """Two of the three validation images are a copy and a brighter copy of a training image."""
    root = tmp_path / "photos"
    for k, name in enumerate(["train/a/x/0", "train/a/y/1", "train/b/2", "train/b/3", "val/a/x/4"]):
        save(root, f"{name}.png", 16, 16, seed=k)
    (root / "val/b").mkdir()
    (root / "val/b/copy.png").write_bytes((root / "train/b/3.png").read_bytes())
    with Image.open(root / "train/a/x/0.png") as image:
        image.point([value * 9 // 10 + 20 for value in range(256)]).save(root / "val/b/bright.png")
    done = doctor("data=folder", f"data.root={root}", "steps=0")
    assert done.status == 0, done.err
    summary, counts, duplicates, fix, *_ = done.out.splitlines()
    assert "data.source.class_depth=2" in summary
    assert counts.startswith("4 images for training and 3 ")
    assert "2 validation images" in duplicates and "data.val_root" in fix
    assert {"train/b/3.png", "val/b/copy.png"} <= {*duplicates.replace(";", "").split()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=array", "data.root=x.npy"], "python -m src.train data=array data.root=x.npy"),
        (["data=table", "data.path=x.csv"], "src.train"),
        (["data=folder", "data.root=x", "model.model_channels=8"], "model.model_channels"),
    ],
)
def test_what_it_does_not_support_is_refused(doctor, words, message):
    done = doctor(*words)
    assert done.status == 2 and message in done.err and done.err.count("\n") == 1
