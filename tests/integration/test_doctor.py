"""`src.doctor`, as a user types it."""

import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from src.config.cli import launch
from src.config.overrides import check_overrides
from src.data.column_summary import count_near_rows
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


def test_suggestions_suit_the_typed_network(tmp_path, doctor):
    save(tmp_path / "photos", "a.png", 16, 16, 3)
    save(tmp_path / "photos", "b.png", 16, 16, 3, seed=1)
    done = doctor("data=folder", f"data.root={tmp_path / 'photos'}", "model=dit_tiny", "steps=0")
    assert done.status == 0, done.err
    check_overrides("train", done.command[3:])
    done = doctor("data=digits", "model=mlp", "steps=0")
    assert done.status == 2 and "model=mlp" in done.err


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


def test_a_table_is_checked_by_column(tmp_path, doctor):
    """Two rows of 40 lack a cell, one number is far off, one class is rare, and validation rows are copies."""
    rng = np.random.default_rng(0)
    rows = [
        [f"{rng.normal():.2f}", f"{rng.normal():.2f}", "no" if k % 3 else "yes", "ab"[k % 20 == 7]] for k in range(40)
    ]
    rows[3][0] = rows[4][0] = ""
    rows[5][1] = "-999"
    rows = [[str(k), *row] for k, row in enumerate(rows * 2)]  # equal but for the number of the row
    (tmp_path / "t.csv").write_text("\n".join(map(",".join, [["n", "x", "y", "smoker", "kind"], *rows])))
    done = doctor(
        "data=table", f"data.path={tmp_path / 't.csv'}", "data.label=kind", "data.val_fraction=0.3", "steps=1"
    )
    assert done.status == 0, done.err
    cells = {line.split()[0]: line.split() for line in done.out.splitlines() if line.split()}
    numbers = [float(row[1]) for row in rows if row[1] and row[2] != "-999"]
    assert cells["x"][1:4] == ["number", "4", f"{min(numbers):g}"]
    assert cells["y"][3] == "-999" and cells["y"][-2:] == ["2", "outliers"]
    assert cells["smoker"][1:] == ["boolean", "0", "66%", "no,", "34%", "yes"]
    assert "data.balance_classes=true" in done.out and "data.transforms=['y=quantile']" in done.out
    assert "nearly equal to a training row" in done.out and (tmp_path / "out" / "columns.png").exists()
    assert {"data.missing=drop", "conditioning=class", "data.batch_size=8"} <= {*done.command}


def test_points_have_the_network_of_their_data(doctor, tmp_path):
    done = doctor("data=swiss_roll", "data.num_samples=300", "model.hidden_size=16", "steps=1")
    assert done.status == 0, done.err
    assert "column 2" in done.out and (tmp_path / "out" / "columns.png").exists()
    assert {"data=swiss_roll", "model.hidden_size=16", "trainer.max_steps=4000"} <= {*done.command}
    assert "data.missing=drop" not in done.command


def test_signals_with_a_constant_channel_and_copies_are_reported(doctor, tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 2, 32)).cumsum(-1).astype("float32")
    x[:, 1], x[3, 0, 5], x[8] = 2, 1e4, x[7]
    np.save(tmp_path / "x.npy", x)
    done = doctor("data=array", f"data.root={tmp_path / 'x.npy'}", "steps=0")
    assert done.status == 0, done.err
    lines = {line[:9]: line.split() for line in done.out.splitlines()}
    assert lines["channel 2"][3:] == ["2", "2", "2", "constant"]
    assert lines["channel 1"][-2:] == ["1", "outlier"] and "data.value_range=[" in done.out
    assert "1 signal equal to another" in done.out and (tmp_path / "out" / "images.png").exists()


def test_rows_are_nearly_equal_by_every_column():
    train = np.array([[0.0, 0.0], [1.0, 1.0]])
    assert count_near_rows(np.array([[1e-4, -1e-4], [1.0, 0.0], [1.0, 1.01]]), train) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=table", "data.path=nowhere.csv"], "nowhere.csv"),
        (["data=table", "data.path=x.csv", "model=unet_tiny"], "model=mlp"),
        (["data=folder", "data.root=x", "model.model_channels=8"], "model.model_channels"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(doctor, words, message):
    done = doctor(*words)
    assert done.status == 2 and message in done.err and done.err.count("\n") == 1
