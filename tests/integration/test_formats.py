"""Training on images of any type and sampling them back, through the commands."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from src.data.decode import decode
from src.data.write import encode_png16
from tests.conftest import compose, train_tiny

SHAPE = (8, 8)


def values(channels: int, high: int, dtype: str, seed: int) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, high, (*SHAPE, channels), endpoint=True)
    pixels.flat[0], pixels.flat[1] = 0, high
    return pixels.astype(dtype)


def write(folder: Path, kind: str) -> None:
    """Write 12 images of a kind."""
    folder.mkdir()
    for k in range(12):
        match kind:
            case "12-bit PNG":
                (folder / f"{k}.png").write_bytes(encode_png16(values(1, 4095, "uint16", k)))
            case "16-bit RGB PNG":
                (folder / f"{k}.png").write_bytes(encode_png16(values(3, 65535, "uint16", k)))
            case "float TIFF":
                tifffile.imwrite(folder / f"{k}.tif", values(1, 255, "float32", k)[..., 0] / 100 - 1)
            case "RGBA PNG":
                Image.fromarray(values(4, 255, "uint8", k)).save(folder / f"{k}.png")
            case "JPEG":
                Image.fromarray(values(3, 255, "uint8", k)).save(folder / f"{k}.jpg")
            case "mask PNG":
                Image.fromarray(values(1, 1, "uint8", k)[..., 0]).save(folder / f"{k}.png")
            case "12 bands":
                np.save(folder / f"{k}.npy", values(12, 9000, "uint16", k))


@pytest.mark.parametrize(
    ("kind", "channels", "dtype", "suffix", "value_range"),
    [
        ("12-bit PNG", 1, "uint16", ".png", (0, 4095)),
        ("16-bit RGB PNG", 3, "uint16", ".png", (0, 65535)),
        ("float TIFF", 1, "float32", ".tif", (-1, 1.55)),
        ("RGBA PNG", 4, "uint8", ".png", (0, 255)),
        ("JPEG", 3, "uint8", ".png", (0, 255)),
        ("mask PNG", 1, "uint8", ".png", (0, 1)),
        ("12 bands", 12, "uint16", ".npy", (0, 16383)),
    ],
)
def test_samples_have_the_type_and_range_of_the_files(tmp_path, kind, channels, dtype, suffix, value_range):
    from src.sample import sample

    write(tmp_path / "data", kind)
    ranges = ["data.value_range=[0,1]"] if kind == "mask PNG" else []
    data = ["data=folder", f"data.root='{tmp_path / 'data'}'", "data.image_size=8", f"data.channels={channels}"]
    run = tmp_path / "run"
    short = [
        "trainer.max_steps=1",
        "validate_every=1",
        "~callbacks.bits_per_dim",
        "neighbors.num_samples=0",
        "logger=none",
    ]
    train_tiny(run, *data, *ranges, *short, "data.batch_size=4", "data.val_fraction=0.3")
    assert (run / "samples" / "final.png").exists()
    out = tmp_path / "out"
    sample(compose("sample", f"run='{run}'", "n=3", f"run_dir='{out}'", "device=cpu", "sampler.steps=2"))
    files = sorted(path for path in out.iterdir() if path.stem.isdecimal())
    assert [path.suffix for path in files] == [suffix] * 3
    saved = np.load(out / "samples.npz")["arr_0"]
    for k, path in enumerate(files):
        with path.open("rb") as stream:
            pixels = decode(stream, channels=channels).pixels
        assert pixels.dtype == saved.dtype == dtype and pixels.shape == (*SHAPE, channels)
        assert np.array_equal(pixels, saved[k])
    low, high = value_range
    assert low <= saved.min() < saved.max() <= high * (1 + 1e-6)
    assert saved.max() - saved.min() > 0.3 * (high - low)  # an untrained network draws noise of every value
