"""Data of every shape train, sample and are read back, through the commands."""

import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from src.data.decode import decode
from tests.conftest import compose, train_tiny


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Return values that reach exactly 0 and 1."""
    values = np.random.default_rng(seed).random(shape)
    values.flat[0], values.flat[-1] = 0, 1
    return values


def gray_images(folder: Path) -> str:
    folder.mkdir()
    for k in range(12):
        Image.fromarray((255 * numbers(20, 37, seed=k)).astype(np.uint8)).save(folder / f"{k}.png")
    return "data=folder data.channels=1 data.image_size=[20,37]"


def bands(folder: Path) -> str:
    folder.mkdir()
    for k in range(12):
        values = (4095 * numbers(12, 16, 16, seed=k)).astype(np.uint16)
        tifffile.imwrite(folder / f"{k}.tif", values, photometric="minisblack", planarconfig="separate")
    return "data=folder data.channels=12 data.image_size=16"


def one_file(*shape: int, dtype: str = "float32", scale: float = 8.0) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        folder.mkdir()
        np.save(folder / "all.npy", (scale * (numbers(16, *shape) - 0.5)).astype(dtype))
        return "data=array"

    return write


def sounds(folder: Path) -> str:
    folder.mkdir()
    for k in range(12):
        with wave.open(str(folder / f"{k}.wav"), "wb") as file:
            file.setparams((2, 2, 8000, 0, "NONE", ""))
            file.writeframes((20000 * (numbers(200 + 20 * k, 2, seed=k) - 0.5)).astype("<i2").tobytes())
    return "data=array data.source.length=256"


def scans(folder: Path) -> str:
    import nibabel

    folder.mkdir()
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    for k in range(12):
        volume = (1000 * numbers(10, 12, 6 + k % 2, seed=k)).astype(np.int16)
        nibabel.Nifti1Image(volume, affine).to_filename(folder / f"{k}.nii.gz")
    return "data=array data.image_size=[8,8,6]"


def read_back(path: Path, channels: int) -> np.ndarray:
    """Return a written sample as (C, *size)."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".wav":
        with wave.open(str(path)) as file:
            assert (file.getsampwidth(), file.getframerate()) == (2, 8000)
            return np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, channels).T
    if path.suffix == ".gz":
        import nibabel

        scan = nibabel.load(path)
        assert np.allclose(scan.affine[:3, :3], np.diag([2.0 * 10 / 8, 2.0 * 12 / 8, 3.0]))
        return np.asanyarray(scan.dataobj)[None]
    with path.open("rb") as stream:
        return np.moveaxis(decode(stream, channels=channels).pixels, -1, 0)


CASES = {
    "20x37 gray images": (gray_images, (1, 20, 37), "uint8", 0, 255, ".png"),
    "12 channels of 16 bits": (bands, (12, 16, 16), "uint16", 0, 4095, ".tif"),
    "integer latents": (one_file(4, 16, 16, dtype="int16", scale=600), (4, 16, 16), "int16", -300, 300, None),
    "signals": (one_file(2, 250, dtype="float64"), (2, 250), "float64", -4, 4, None),
    "volumes": (one_file(1, 12, 12, 12, dtype="float16"), (1, 12, 12, 12), "float16", -4, 4, None),
    "sounds": (sounds, (2, 256), "int16", -10000, 10000, ".wav"),
    "scans": (scans, (1, 8, 8, 6), "int16", 0, 1000, ".gz"),
}


@pytest.mark.parametrize("case", CASES)
def test_data_of_any_shape_come_back(case, tmp_path):
    from src.sample import sample

    write, shape, dtype, low, high, suffix = CASES[case]
    settings = write(tmp_path / "data").split()
    run, out = tmp_path / "run", tmp_path / "out"
    tiny = [
        "model.attention_resolutions=[]",
        "model.patch_size=2",
        "data.batch_size=4",
        "data.val_fraction=0.2",
        "data.num_workers=0",
    ]
    steps = ["trainer.max_steps=2", "validate_every=2", "neighbors.num_samples=2", f"data.root='{tmp_path / 'data'}'"]
    metrics = train_tiny(run, *settings, *tiny, *steps)
    assert np.isfinite(metrics["val/loss"])
    for name in ("final.png", "trajectory.png", "trajectory.gif", "neighbors.png"):
        with Image.open(run / "samples" / name) as picture:
            assert min(picture.size) > 16
    sample(compose("sample", f"run='{run}'", "n=3", f"run_dir='{out}'", "device=cpu", "sampler.steps=2", "gif=true"))
    assert (out / "grid.png").exists() and (out / "trajectory.gif").exists()
    files = sorted(path for path in out.iterdir() if path.name.split(".")[0].isdecimal())
    assert [path.suffix for path in files] == ([suffix] * 3 if suffix else [])
    samples = [read_back(path, shape[0]) for path in files] or [*np.load(out / "samples.npy")]
    for each in samples:
        assert each.shape == shape and each.dtype == dtype
        assert low <= each.min() < each.max() <= high
        assert float(each.max()) - float(each.min()) > 0.3 * (high - low)  # an untrained network draws noise
