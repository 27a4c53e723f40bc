"""`src.doctor` on a folder, as a user types it."""

import shlex
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from src.data.decode import Decoded
from src.runs.advice import expectation, file_stats, suggest, suggest_steps
from tests.fork_server import run_python

ROOT = Path(__file__).parents[2]


def test_a_folder_is_examined_and_trained(tmp_path):
    """Gray photos saved in color, two of them equal: the printed command trains on one channel."""
    rng = np.random.default_rng(0)
    for k in range(30):
        path = tmp_path / "my photos" / ("cats" if k % 2 else "dogs") / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        gray = rng.integers(0, 256, (20, 24, 1), dtype=np.uint8)
        Image.fromarray(np.repeat(gray if k else gray * 0 + 9, 3, -1)).save(path)
    (tmp_path / "my photos" / "dogs" / "copy.png").write_bytes((tmp_path / "my photos" / "dogs" / "2.png").read_bytes())
    (tmp_path / "my photos" / "notes.txt").write_text("text")
    own = [f"data.root='{tmp_path / 'my photos'}'", r"data.source.class_pattern='^(\w+)/'"]
    words = ["data=folder", *own, f"hydra.run.dir={tmp_path / 'out'}", "steps=1"]
    assert examine(*words, "model.model_channels=8").returncode == 2  # this command has no such setting
    done = examine(*words)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in ("31 images (31 png)", "2 classes", "notes.txt", "dogs/copy.png"))
    assert (tmp_path / "out" / "images.png").exists() and (tmp_path / "out" / "values.png").exists()
    assert "trainer.limit_val_batches" not in done.stderr  # the user has not set it
    *_, line = done.stdout.splitlines()
    typed = shlex.split(line)
    assert typed[:3] == ["python", "-m", "src.train"]
    assert {"data.channels=1", "data.image_size=16", "conditioning=class", *own} <= {*typed}


def examine(*words: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "src.doctor", *words, cwd=ROOT)


def decoded(*shape: int, alpha: bool = False, rgb: bool = True, dtype: str = "uint8") -> Decoded:
    pixels = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    return Decoded(pixels, alpha, rgb, (shape[1], shape[0]))


def test_suggestions_follow_the_files():
    """Opacity is kept if it is used; bands are kept; sizes are powers of two below the files and the device's limit."""
    assert file_stats([decoded(40, 50, 3)] * 3).suggested_channels == 3
    assert file_stats([decoded(40, 50, 4, alpha=True)]).suggested_channels == 4
    opaque = decoded(40, 50, 4, alpha=True)
    opaque.pixels[..., 3] = 255
    assert file_stats([opaque]).suggested_channels == 3
    assert file_stats([decoded(40, 50, 4, rgb=False)]).suggested_channels == 4
    assert file_stats([decoded(40, 50, 12, rgb=False, dtype="uint16")]).suggested_channels == 12
    large = file_stats([decoded(500, 300, 3)])
    assert (large.suggested_size(on_gpu=True), large.suggested_size(on_gpu=False)) == (256, 32)
    assert "experiment=folder_256" in suggest(large, 5000, on_gpu=True)
    assert "data.batch_size=16" in suggest(large, 70, on_gpu=False)
    assert suggest_steps(10**6, on_gpu=False, seconds=2.0) == 1800
    assert "data.batch_size=2" in suggest(large, 2, on_gpu=False)
    assert "data.flip" in expectation(50, flipped=False) and "data.flip" in expectation(500, flipped=False)
    assert "data.flip" not in expectation(50, flipped=True) + expectation(500, flipped=True)


def test_few_captioned_images_train_on_text(tmp_path):
    """With 3 images, 2 of them for training, the suggested batch fits."""
    root = tmp_path / "photos"
    root.mkdir()
    rng = np.random.default_rng(0)
    for k in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(root / f"{k}.png")
        (root / f"{k}.txt").write_text(f"picture {k}")
    done = examine("data=captions", f"data.root={root}", f"hydra.run.dir={tmp_path / 'out'}", "steps=0")
    assert done.returncode == 0, done.stderr
    *_, line = done.stdout.splitlines()
    assert {"conditioning=text", "data.batch_size=2"} <= {*shlex.split(line)}


def test_other_data_are_refused(tmp_path):
    done = examine("data=array", f"data.root={tmp_path / 'x.npy'}", f"hydra.run.dir={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "data=folder" in done.stderr and done.stderr.count("\n") == 1
