"""Images from files, torchvision's datasets and memory, up to the network."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import itertools
import json
import multiprocessing
import pickle
import socket
import struct
import sys
import urllib.request
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from src.config.search_path import CONF
from tests.data.test_split import is_validation


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global Recorder, images_module, torchvision_sets
    global L, torchvision_utils, InMemory, Source, ImageDataModule, digits, fit_image, folder, torchvision_images
    import lightning as L
    from torchvision.datasets import utils as torchvision_utils

    from src.data import images as images_module
    from src.data import torchvision_sets
    from src.data.decode import from_pillow
    from src.data.fit import ImageSpec, prepare_image
    from src.data.folder import folder
    from src.data.images import ImageDataModule, digits, torchvision_images
    from src.data.sources import InMemory, Source

    def fit_image(image: Image.Image, size: int, channels: int) -> Tensor:
        return torch.from_numpy(prepare_image(from_pillow(image), ImageSpec((size, size), channels)).pixels)

    class Recorder(L.LightningModule):
        """Records the batches of a Trainer."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.trained: dict[int, dict[int, Tensor]] = {}
            self.validated: dict[int, Tensor] = {}

        def training_step(self, batch, batch_idx):
            self.trained.setdefault(self.global_step, {})[batch["start"]] = batch["x"]
            return self.weight.sum()

        def validation_step(self, batch, batch_idx):
            self.validated[batch["start"]] = batch["x"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)


ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Make every connection fail at once."""

    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def any_checksum(monkeypatch):
    """Let torchvision accept tiny files in place of the published ones."""
    monkeypatch.setattr(torchvision_utils, "check_md5", lambda *args, **kwargs: True)


@cache
def composed(name: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("train", overrides=[f"data={name}", "data.num_workers=0"])
    return OmegaConf.masked_copy(cfg, ["data", "seed"])


def configured(name: str, *overrides: str) -> ImageDataModule:
    """Return the data module of a YAML."""
    cfg = copy.deepcopy(composed(name))
    for override in OverridesParser.create().parse_overrides([*overrides]):
        OmegaConf.update(cfg, override.key_or_group, override.value())
    return instantiate(cfg.data)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def chw(pixels: np.ndarray) -> Tensor:
    """Return (H, W, C) or (H, W) pixels as (C, H, W)."""
    return torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1).copy())


def fetch_all(data: ImageDataModule) -> Tensor:
    data.prepare_data()
    data.setup()
    return data.source.fetch(range(len(data.source)))


def only(path: Path, size: int, channels: int = 3) -> Tensor:
    """Return the only image under `path`, (C, size, size) uint8, as a run reads it."""
    source = folder(str(path), size, channels, prepare=True)
    assert len(source) == 1
    (x,) = source.fetch([0])
    assert x.dtype == torch.uint8
    assert x.shape == (channels, size, size)
    return x


def within(found: Tensor, expected, tolerance: int) -> bool:
    """Return whether all pixels are within `tolerance` of the expected ones."""
    return bool((found.int() - torch.as_tensor(expected).int()).abs().max() <= tolerance)


def test_digits_match_scikit_learn():
    """1,797 images of 8x8 with 17 pixel values, as uint8."""
    from sklearn.datasets import load_digits

    source = digits(None, 8, 1)
    assert len(source) == 1797
    x = source.fetch(range(1797))
    assert x.shape == (1797, 1, 8, 8)
    assert x.dtype == torch.uint8
    assert x.unique().tolist() == list(range(17))
    assert_close(x.flatten(1).numpy(), load_digits().data, rtol=0, atol=0, check_dtype=False)
    assert source.labels is not None
    assert source.labels.targets.tolist() == load_digits().target.tolist()
    assert source.labels.classes == list("0123456789")


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (8, 3)])
def test_digits_of_another_shape_raise(size, channels):
    with pytest.raises(ValueError, match=r"data\.image_size=8 data\.channels=1"):
        digits(None, size, channels)


def test_preprocessed_digits_cover_the_range():
    """Values 0 to 16 map to [-1, 1] in steps of 1/8, and back to [0, 255]."""
    data = configured("digits")
    data.prepare_data()
    x = data.examples(300)
    assert x.shape == (300, *data.shape)
    assert x.dtype == torch.float32
    assert_close(x.unique().numpy(), np.linspace(-1, 1, 17, dtype=np.float32), rtol=0, atol=1e-7)
    raw = data.source.fetch(data.val_indices[:300])
    assert_close(data.postprocess(x), (raw.double() * 255 / 16).round().to(torch.uint8), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("suffix", "options", "error"),
    [
        ("png", {}, 0),
        ("bmp", {}, 0),
        ("tif", {}, 0),
        ("webp", {"lossless": True}, 0),
        ("jpg", {"quality": 100, "subsampling": 0}, 3),  # rounded in the cosine transform and in YCbCr
        ("JPEG", {"quality": 100, "subsampling": 0}, 3),
        ("gif", {}, 0),
    ],
)
def test_every_format_is_decoded(tmp_path, suffix, options, error):
    """A 12x12 image of few colors is preserved up to lossy compression."""
    blocks = noise(3, 3, 3).repeat(4, 0).repeat(4, 1)
    Image.fromarray(blocks).save(tmp_path / f"a.{suffix}", **options)
    assert within(only(tmp_path, 12), chw(blocks), error)


def test_folders_are_searched_recursively_in_path_order(tmp_path):
    """Other and hidden files are ignored."""
    names = ["b.png", "a/z.jpg", "a/b/c/d.webp", "c/x.bmp", "c/a.gif", "UPPER.PNG"]
    order = sorted(names, key=lambda n: Path(n))
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        value = 10 + 40 * order.index(name)
        Image.fromarray(np.full((6, 6), value, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("nor this")
    source = folder(str(tmp_path), 6, 1, prepare=True)
    assert len(source) == len(names)
    found = source.fetch(range(len(names)))
    assert within(found, (10 + 40 * torch.arange(len(names)))[:, None, None, None], 1)
    assert_close(source.fetch([4, 1]), found[[4, 1]], rtol=0, atol=0)
    assert source.labels is None  # some are in no subfolder


def test_subfolders_are_classes(tmp_path):
    """At any depth; a single subfolder gives no labels."""
    for name in ("dogs/old/a.png", "cats/b.png", "dogs/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(6, 6)).save(tmp_path / name)
    labels = folder(str(tmp_path), 6, 1).labels
    assert labels is not None
    assert [labels.classes[k] for k in labels.targets] == ["cats", "dogs", "dogs"]
    assert folder(str(tmp_path / "dogs"), 6, 1).labels is None
    (tmp_path / "cats" / "b.png").unlink()
    assert folder(str(tmp_path), 6, 1).labels is None


def labeled(path: Path, contents: str, name: str = "classes.csv") -> Source:
    """Write four images in two subfolders and a CSV file of classes; return their source."""
    for image in ("dogs/a.png", "dogs/b.png", "cats/c.png", "cats/d.png"):
        (path / image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(6, 6)).save(path / image)
    (path / name).write_text(contents)
    return folder(str(path), 6, 1, labels=name)


@pytest.mark.parametrize("column", ["file", "file_name"])
def test_a_csv_file_gives_the_classes(tmp_path, column):
    """Independent of subfolders and of the order of rows; integer names are sorted as numbers."""
    rows = ["cats/d.png,10", "dogs/a.png,9", "cats/c.png,9", f"{tmp_path}/dogs/b.png,10"]
    labels = labeled(tmp_path, "\n".join([f"{column},label", *rows])).labels
    assert labels is not None
    assert [labels.classes[k] for k in labels.targets] == ["9", "10", "9", "10"]  # c, d, a, b in order of path
    assert labels.classes == ["9", "10"]
    data = configured("folder", f"data.root='{tmp_path}'", "data.source.labels=classes.csv", "data.val_fraction=0.25")
    data.setup()
    assert labels_of(data) == labels.targets.tolist()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["dogs/a.png,x", "dogs/b.png,x", "cats/c.png,y"], "has no label for 1 of 4 images under .* (cats/d.png)"),
        (["dogs/a.png,x", "dogs/b.png,x", "cats/c.png,y", "cats/d.png,y", "e.png,y"], "lists 1 file .* (e.png)"),
        (["dogs/a.png,x", "dogs/b.png,x", "cats/c.png,y", "cats/d.png,"], "line 5: the label is empty"),
        (
            ["dogs/a.png,x", "dogs/b.png,x", "cats/c.png,y", "cats/d.png,y", "dogs/a.png,y"],
            "the labels x and y for dogs/a.png",
        ),
        ([], "has 1 rows"),
    ],
)
def test_a_csv_file_must_match_the_images(tmp_path, rows, message):
    with pytest.raises(ValueError) as error:
        labeled(tmp_path, "\n".join(["file,label", *rows]))
    assert all(part in str(error.value) for part in [str(tmp_path / "classes.csv"), *message.split(" .* ")])
    assert "\n" not in str(error.value)


def test_a_missing_or_invalid_csv_file_raises(tmp_path):
    with pytest.raises(ValueError, match=r"one column named label, found file, kind.*data\.source\.labels"):
        labeled(tmp_path, "file,kind\ndogs/a.png,x")
    with pytest.raises(FileNotFoundError, match=r"data\.source\.labels=.*other\.csv does not exist"):
        folder(str(tmp_path), 6, 1, labels="other.csv")


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparency_is_composited_onto_white(tmp_path, suffix):
    """alpha c + (1 - alpha) 255; colors of transparent pixels do not show."""
    pixels = noise(9, 9, 4)
    pixels[:3, :, 3], pixels[3:6, :, 3] = 0, 255
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **options)
    alpha = pixels[..., 3:] / 255.0
    expected = np.rint(alpha * pixels[..., :3] + (1 - alpha) * 255)
    found = only(tmp_path, 9)
    assert within(found, chw(expected), 1)
    assert (found[:, :3] == 255).all()


def test_gray_with_alpha_is_composited_onto_white(tmp_path):
    pixels = noise(9, 9, 2)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    alpha = pixels[..., 1:] / 255.0
    expected = np.rint(alpha * pixels[..., :1] + (1 - alpha) * 255)
    assert Image.open(tmp_path / "a.png").mode == "LA"
    assert within(only(tmp_path, 9), chw(expected).expand(3, -1, -1), 1)
    assert within(only(tmp_path, 9, channels=1), chw(expected), 1)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_palette_entries_become_white(tmp_path, suffix):
    """Each index gets its color, the transparent one white."""
    index = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4
    colors = np.array([[200, 0, 0], [0, 180, 40], [10, 20, 30], [250, 240, 0]], dtype=np.uint8)
    image = Image.fromarray(index)
    image.putpalette(colors.flatten().tolist())
    image.save(tmp_path / f"a.{suffix}", transparency=2)
    assert Image.open(tmp_path / f"a.{suffix}").mode == "P"
    colors[2] = 255
    assert within(only(tmp_path, 8), chw(colors[index]), 0)


def test_transparent_gray_values_become_white(tmp_path):
    """A PNG may declare one gray value transparent (its tRNS chunk)."""
    pixels = np.array([[10, 20], [20, 200]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=20)
    assert only(tmp_path, 2, channels=1).flatten().tolist() == [10, 255, 255, 200]


def test_one_bit_images_are_black_and_white(tmp_path):
    bits = noise(8, 8) > 127
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "1"
    assert within(only(tmp_path, 8, channels=1), chw(bits * np.uint8(255)), 0)


def test_cmyk_becomes_rgb(tmp_path):
    """Without a profile, R = 255 (1 - C) (1 - K), and the same for G and B."""
    inks = np.zeros((8, 8, 4), dtype=np.uint8)
    inks[:4, :, 0], inks[4:, :, 1], inks[:, 4:, 3] = 255, 128, 64
    Image.fromarray(inks, mode="CMYK").save(tmp_path / "a.tif")
    expected = np.rint(255 * (1 - inks[..., :3] / 255.0) * (1 - inks[..., 3:] / 255.0))
    assert Image.open(tmp_path / "a.tif").mode == "CMYK"
    assert within(only(tmp_path, 8), chw(expected), 1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_gray_keeps_its_values(tmp_path, suffix, channels):
    values = np.array([[0, 32768], [150, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    source = folder(str(tmp_path), 2, channels)
    assert_close(source.fetch([0])[0], chw(values.astype(np.float32)).expand(channels, -1, -1), rtol=0, atol=0)
    assert source.value_range == (0, 65535)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    """Images are rotated upright for all eight orientations of the EXIF standard."""
    upright = np.array([[10, 90], [170, 250]], dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    # EXIF: where the stored image's row 0 and column 0 are displayed
    stored = {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.T,  # left, top
        6: upright.T[::-1],  # right, top: the stored rows are columns, from right to left
        7: upright.T[::-1, ::-1],  # right, bottom
        8: upright.T[:, ::-1],  # left, bottom
    }[orientation]
    if orientation == 6:
        assert stored[0, 0] == upright[0, -1]  # its first row is the right column, from the top
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{suffix}", exif=exif, **options)
    assert within(only(tmp_path, 32, channels=1), chw(upright), 2)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 9), (9, 8)])
def test_the_central_square_is_cropped(tmp_path, shape):
    """An image of the right height or width is cropped, not resized."""
    pixels = noise(*shape, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    top, left = (shape[0] - 8) // 2, (shape[1] - 8) // 2
    assert within(only(tmp_path, 8), chw(pixels[top : top + 8, left : left + 8]), 0)


@pytest.mark.parametrize(("width", "height", "size"), [(2000, 1500, 64), (300, 800, 32), (5, 9, 16), (64, 64, 64)])
def test_large_and_small_images_are_resized(tmp_path, width, height, size):
    """A linear ramp stays linear: an output pixel has the value at its center, except near edges."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    ramps = np.stack([240 * x, 240 * y, np.full_like(x, 77)], -1).round().astype(np.uint8)
    Image.fromarray(ramps).save(tmp_path / "a.png")
    side = min(width, height)
    centers = (np.arange(size) + 0.5) / size * side
    across = 240 * (centers + (width - side) // 2) / width
    down = 240 * (centers + (height - side) // 2) / height
    found = only(tmp_path, size)
    edge = max(2, 2 * size // side)
    inner = slice(edge, size - edge)
    assert within(found[0, inner, inner], across[None, inner].round().repeat(size - 2 * edge, 0), 2)
    assert within(found[1, inner, inner], down[inner, None].round(), 2)
    assert within(found[2], 77, 0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1)])
def test_single_pixels_and_lines_fill_the_image(tmp_path, shape):
    Image.fromarray(np.full((*shape, 3), [10, 130, 250], dtype=np.uint8)).save(tmp_path / "a.png")
    assert within(only(tmp_path, 16), torch.tensor([10, 130, 250])[:, None, None], 0)


def test_downsampling_is_antialiased(tmp_path):
    """A fine checkerboard becomes its mean gray."""
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    assert within(only(tmp_path, 16, channels=1), 127, 2)


def test_color_becomes_gray_by_luma(tmp_path):
    """0.299 R + 0.587 G + 0.114 B (ITU-R 601), and gray becomes three equal channels."""
    pixels = noise(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert within(only(tmp_path, 8, channels=1), chw((pixels @ [0.299, 0.587, 0.114]).round()), 1)
    gray = noise(8, 8)
    Image.fromarray(gray).save(tmp_path / "a.png")
    assert within(only(tmp_path, 8, channels=3), chw(gray).expand(3, -1, -1), 0)


def test_animations_become_their_first_frame(tmp_path):
    frames = [Image.fromarray(noise(8, 8, seed=seed)) for seed in (0, 1)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as image:
        first = np.asarray(image.convert("L"))
    assert within(only(tmp_path, 8, channels=1), chw(first), 1)


def test_fit_image_does_not_change_its_argument():
    image = Image.fromarray(noise(10, 14, 4))
    before = image.tobytes()
    fit_image(image, 6, 3)
    assert image.tobytes() == before
    assert image.mode == "RGBA"


def test_missing_folder_raises(tmp_path):
    """Also a file, or none; the message names the path and the setting."""
    (tmp_path / "file.png").write_bytes(b"")
    for path in (tmp_path / "nowhere", tmp_path / "file.png"):
        with pytest.raises(FileNotFoundError) as error:
            folder(str(path), 8, 3, prepare=True)
        assert str(path) in str(error.value)
        assert "data.root" in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"data\.root"):
        folder(None, 8, 3, prepare=True)


def test_torchvision_datasets_need_a_folder():
    """An exported model does not store the folder of its data."""
    from torchvision.datasets import MNIST

    with pytest.raises(ValueError, match=r"set data\.root to the folder of MNIST"):
        torchvision_images(None, 28, 1, prepare=True, dataset=MNIST)


def test_empty_folder_raises(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(ValueError, match=r"has no images") as error:
        folder(str(tmp_path), 8, 3, prepare=True)
    for part in (str(tmp_path), ".png", ".jpg", "data.root"):
        assert part in str(error.value)


def damaged_text(path: Path) -> Path:
    path = path / "text.png"
    path.write_text("this is no image")
    return path


def damaged_nothing(path: Path) -> Path:
    path = path / "empty.webp"
    path.write_bytes(b"")
    return path


def damaged_jpeg(path: Path) -> Path:
    path = path / "cut.jpg"
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def damaged_png(path: Path) -> Path:
    path = path / "cut.png"
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.mark.parametrize("damage", [damaged_text, damaged_nothing, damaged_jpeg, damaged_png])
def test_unreadable_files_raise_before_training(tmp_path, damage):
    """The message names the folder, the file and the number of files."""
    (tmp_path / "deep").mkdir()
    bad = damage(tmp_path / "deep")
    for i in range(3):
        Image.fromarray(noise(8, 8, 3, seed=i)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"1 of 4 images under .* cannot be read.*; remove them") as error:
        configured("folder", f"data.root={tmp_path}").prepare_data()
    assert str(tmp_path) in str(error.value)
    assert f"deep/{bad.name}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_files_that_pass_the_check_can_be_fetched(tmp_path, suffix):
    """An image with invalid EXIF data is read without them or refused before training."""
    pixels = np.full((8, 8), 90, dtype=np.uint8)
    pixels[:, 4:] = 200
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=b"Exif\0\0garbage garbage")
    try:
        source = folder(str(tmp_path), 8, 1, prepare=True)
    except ValueError as error:
        assert f"a.{suffix}" in str(error)  # noqa: PT017 - both are valid
    else:
        assert within(source.fetch([0]), chw(pixels), 8)


def test_sources_can_be_pickled(tmp_path):
    """Spawned workers receive a pickled source."""
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png")
    source = folder(str(tmp_path), 8, 3)
    assert torch.equal(pickle.loads(pickle.dumps(source)).fetch([0]), source.fetch([0]))


def test_folders_named_like_images_are_searched(tmp_path):
    """A folder called holiday.png may contain images."""
    (tmp_path / "holiday.png").mkdir()
    pixels = noise(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "holiday.png" / "a.png")
    assert within(only(tmp_path, 8), chw(pixels), 0)


def test_many_unreadable_files_are_counted(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.png").write_text("no")
    with pytest.raises(ValueError, match=r"8 of 8 images .*0\.png.*1\.png.* and 5 more"):
        folder(str(tmp_path), 8, 3, prepare=True)


def labels_of(data: ImageDataModule) -> list[int]:
    assert data.source is not None and data.source.labels is not None
    return data.source.labels.targets.tolist()


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write LeCun's IDX format: two zero bytes, type 8 (uint8), number of dimensions, big-endian sizes, bytes."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(root: Path, name: str, images: np.ndarray) -> None:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", images if part == "train" else images[:1])
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(len(images) if part == "train" else 1, dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "dataset"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")]
)
def test_mnist_files_are_read(tmp_path, name, dataset):
    """IDX files in <root>/<name>/raw, in order, with targets and classes."""
    images = noise(10, 28, 28)
    write_mnist(tmp_path, dataset, images)
    data = configured(name, f"data.root={tmp_path}", "data.batch_size=2")
    found = fetch_all(data)
    assert labels_of(data) == list(range(10))
    assert data.source.labels.classes[9] == {"mnist": "9 - nine", "kmnist": "wo"}.get(name, "Ankle boot")
    assert found.dtype == torch.uint8
    assert_close(found[:, 0].numpy(), images, rtol=0, atol=0)


@pytest.mark.parametrize(("split", "first", "count"), [("balanced", 0, 47), ("letters", 1, 26)])
def test_emnist_images_are_upright(tmp_path, split, first, count):
    """The files hold columns in place of rows; letters are numbered from 1."""
    images = noise(10, 28, 28)
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    write_idx(raw / f"emnist-{split}-train-images-idx3-ubyte", images.transpose(0, 2, 1))
    targets = np.arange(first, first + 10, dtype=np.uint8)
    write_idx(raw / f"emnist-{split}-train-labels-idx1-ubyte", targets)
    data = configured("emnist", f"data.root={tmp_path}", "data.batch_size=2", f"data.source.dataset.split={split}")
    assert_close(fetch_all(data)[:, 0].numpy(), images, rtol=0, atol=0)
    classes = [data.source.labels.classes[k] for k in labels_of(data)]
    assert classes == list("abcdefghij" if split == "letters" else "0123456789")
    assert len(data.source.labels.classes) == count


def test_fashion_mnist_comes_from_the_package_of_debian(tmp_path, monkeypatch):
    """Its compressed files are used if root has none; corrupted ones are an error."""
    images = noise(10, 28, 28)
    write_mnist(tmp_path / "in", "FashionMNIST", images)
    package = tmp_path / "package"
    package.mkdir()
    for file in (tmp_path / "in" / "FashionMNIST" / "raw").iterdir():
        (package / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    monkeypatch.setattr(torchvision_sets, "DEBIAN_FASHION_MNIST", package)
    found = fetch_all(configured("fashion_mnist", f"data.root={tmp_path / 'a'}", "data.batch_size=2"))
    assert_close(found[:, 0].numpy(), images, rtol=0, atol=0)
    cut = package / "train-images-idx3-ubyte.gz"
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(ValueError, match="FashionMNIST"):
        fetch_all(configured("fashion_mnist", f"data.root={tmp_path / 'b'}", "data.batch_size=2"))


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (14, 3), (28, 3)])
def test_mnist_is_resized_and_converted_to_rgb(tmp_path, size, channels):
    """A constant image stays constant."""
    images = np.arange(0, 250, 25, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
    write_mnist(tmp_path, "MNIST", images)
    options = [f"data.root={tmp_path}", "data.batch_size=2", f"data.image_size={size}", f"data.channels={channels}"]
    found = fetch_all(configured("mnist", *options))
    assert found.shape == (10, channels, size, size)
    assert found.dtype == torch.uint8
    assert within(found, torch.from_numpy(images[:, :1, :1, None]), 0)


@pytest.mark.parametrize("keep", [0, 2, 16, 1000])
def test_truncated_mnist_files_raise(tmp_path, keep):
    """As after an interrupted download."""
    write_mnist(tmp_path, "MNIST", noise(10, 28, 28))
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="MNIST") as error:
        fetch_all(configured("mnist", f"data.root={tmp_path}", "data.batch_size=2"))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def write_cifar(root: Path, name: str, images: np.ndarray) -> None:
    """Write CIFAR's pickles: rows of 3072 bytes, first red, then green, then blue."""
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    if name == "cifar10":
        base, label, meta = root / "cifar-10-batches-py", "labels", ("batches.meta", "label_names")
        parts = {f"data_batch_{i + 1}": rows[2 * i : 2 * i + 2] for i in range(5)} | {"test_batch": rows[:1]}
    else:
        base, label, meta = root / "cifar-100-python", "fine_labels", ("meta", "fine_label_names")
        parts = {"train": rows, "test": rows[:1]}
    base.mkdir()
    for file, part in parts.items():
        (base / file).write_bytes(pickle.dumps({"data": part, label: [i % 2 for i in range(len(part))]}))
    (base / meta[0]).write_bytes(pickle.dumps({meta[1]: ["thing", "being"]}))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.usefixtures("any_checksum")
def test_cifar_files_are_read(tmp_path, name):
    """In order, as (N, 3, 32, 32), with targets and classes."""
    images = noise(10, 32, 32, 3)
    write_cifar(tmp_path, name, images)
    data = configured(name, f"data.root={tmp_path}", "data.batch_size=2")
    found = fetch_all(data)
    assert labels_of(data) == [0, 1] * 5
    assert data.source.labels.classes == ["thing", "being"]
    assert found.dtype == torch.uint8
    assert_close(found.numpy(), images.transpose(0, 3, 1, 2), rtol=0, atol=0)


@pytest.mark.usefixtures("any_checksum")
def test_cifar_is_resized_and_converted_to_gray(tmp_path):
    """A constant color becomes its luma."""
    colors = noise(10, 1, 1, 3)
    write_cifar(tmp_path, "cifar10", colors.repeat(32, 1).repeat(32, 2))
    options = [f"data.root={tmp_path}", "data.batch_size=2", "data.image_size=16", "data.channels=1"]
    found = fetch_all(configured("cifar10", *options))
    assert found.shape == (10, 1, 16, 16)
    luma = torch.from_numpy(colors.astype(float) @ [0.299, 0.587, 0.114])[:, :, :, None]
    assert within(found, luma.round(), 1)


@pytest.mark.usefixtures("any_checksum")
def test_svhn_files_are_read(tmp_path):
    """A MATLAB file with X (32, 32, 3, N) becomes (N, 3, 32, 32)."""
    from scipy.io import savemat

    images = noise(60, 32, 32, 3)
    labels = np.arange(60, dtype=np.uint8)[:, None] % 10 + 1
    savemat(tmp_path / "train_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": labels})
    data = configured("svhn", f"data.root={tmp_path}", "data.batch_size=2")
    found = fetch_all(data)
    assert labels_of(data) == (labels[:, 0] % 10).tolist()  # the file stores 0 as 10
    assert found.dtype == torch.uint8
    assert_close(found.numpy(), images.transpose(0, 3, 1, 2), rtol=0, atol=0)


@pytest.mark.parametrize("split", ["unlabeled", "train"])
@pytest.mark.usefixtures("any_checksum")
def test_stl10_files_are_read(tmp_path, split, monkeypatch):
    """Bytes of one channel after another, each column by column (the description of the dataset)."""
    monkeypatch.setattr(images_module, "RESIZED_AT_ONCE", 2)
    images = noise(5, 96, 96, 3)
    base = tmp_path / "stl10_binary"
    base.mkdir()
    for name in ("train", "test", "unlabeled"):
        given = images if name == split else images[:1]
        (base / f"{name}_X.bin").write_bytes(given.transpose(0, 3, 2, 1).tobytes())
        if name != "unlabeled":
            (base / f"{name}_y.bin").write_bytes(np.arange(1, len(given) + 1, dtype=np.uint8).tobytes())
    (base / "class_names.txt").write_text("airplane\nbird\ncar\ncat\ndeer\n")
    settings = [f"data.root={tmp_path}", "data.batch_size=2", f"data.source.dataset.split={split}"]
    data = configured("stl10", *settings)
    assert_close(fetch_all(data).numpy(), images.transpose(0, 3, 1, 2), rtol=0, atol=0)
    if split == "train":
        assert labels_of(data) == [0, 1, 2, 3, 4] and data.source.labels.classes[4] == "deer"
    else:
        assert data.source.labels is None
    small = fetch_all(configured("stl10", *settings, "data.image_size=48"))
    halved = images.reshape(5, 48, 2, 48, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    assert small.shape == (5, 3, 48, 48)
    assert np.abs(small.numpy() - halved).mean() < 20  # noise: antialiasing averages some more pixels


def write_flowers(root: Path, colors: np.ndarray, train: list[int]) -> None:
    """Write Oxford's numbered images and MATLAB files with classes and splits, both counted from 1."""
    from scipy.io import savemat

    base = root / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for k, color in enumerate(colors, 1):
        Image.fromarray(np.full((30, 40, 3), color)).save(base / "jpg" / f"image_{k:05d}.jpg", quality=100)
    savemat(base / "imagelabels.mat", {"labels": np.arange(1, len(colors) + 1)[None]})
    others = [k for k in range(1, len(colors) + 1) if k not in train]
    savemat(base / "setid.mat", {"trnid": [train], "valid": [others], "tstid": [others]})


def write_food(root: Path, colors: np.ndarray, train: list[int]) -> None:
    """Write a folder per dish and the lists of splits; images and dishes are numbered from 1."""
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for k, color in enumerate(colors, 1):
        (base / "images" / f"dish{k}").mkdir(parents=True)
        Image.fromarray(np.full((30, 40, 3), color)).save(base / "images" / f"dish{k}" / "1.jpg", quality=100)
    for split, chosen in (("train", train), ("test", [k for k in range(1, len(colors) + 1) if k not in train])):
        (base / "meta" / f"{split}.json").write_text(json.dumps({f"dish{k}": [f"dish{k}/1"] for k in chosen}))


@pytest.mark.parametrize(("name", "write"), [("flowers102", write_flowers), ("food101", write_food)])
@pytest.mark.usefixtures("any_checksum")
def test_files_of_flowers_and_food_are_read(tmp_path, name, write):
    """Only those for training, with their classes, and a file that is missing is reported."""
    colors = noise(5, 3)
    write(tmp_path, colors, [4, 1, 3])
    data = configured(name, f"data.root={tmp_path}", "data.batch_size=1", f"data.cache_dir={tmp_path / 'cache'}")
    found = fetch_all(data)
    order = [3, 0, 2]  # as listed
    assert found.shape == (3, 3, 64, 64) and found.dtype == torch.uint8
    assert within(found, torch.from_numpy(colors[order])[:, :, None, None], 3)
    expected = (
        ["sweet pea", "pink primrose", "canterbury bells"] if name == "flowers102" else ["dish4", "dish1", "dish3"]
    )
    assert [data.source.labels.classes[k] for k in labels_of(data)] == expected
    assert list(data.source.ids) == ["0", "1", "2"]
    next(tmp_path.glob("*/**/image_00001.jpg" if name == "flowers102" else "*/**/dish1/1.jpg")).unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images under .* cannot be read"):
        fetch_all(configured(name, f"data.root={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}"))


class StubLmdb:
    """The part of the package lmdb that reads: a pickled dictionary in place of a database."""

    Error = OSError

    @staticmethod
    def open(path: str, readonly: bool, **options: bool) -> SimpleNamespace:
        stored = pickle.loads((Path(path) / "data.mdb").read_bytes())
        transaction = SimpleNamespace(cursor=lambda: iter(sorted(stored.items())), get=stored.get)
        return SimpleNamespace(begin=lambda buffers=False: contextlib.nullcontext(transaction), close=lambda: None)


@pytest.fixture(params=["stub", "lmdb"])
def write_database(request, monkeypatch):
    """Return a function that writes a database."""
    if request.param == "stub":
        monkeypatch.setitem(sys.modules, "lmdb", StubLmdb)

        def write(path: Path, stored: dict[bytes, bytes]) -> None:
            path.mkdir(parents=True)
            (path / "data.mdb").write_bytes(pickle.dumps(stored))

        return write
    lmdb = pytest.importorskip("lmdb")

    def write_real(path: Path, stored: dict[bytes, bytes]) -> None:
        path.mkdir(parents=True)
        with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
            for key, value in stored.items():
                transaction.put(key, value)

    return write_real


def test_lsun_databases_are_read(tmp_path, write_database):
    """Images in the order of their keys; several databases are classes."""
    pixels = noise(4, 64, 64, 3)
    encoded = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "WEBP", lossless=True)
        encoded.append(file.getvalue())
    write_database(tmp_path / "bedroom_train_lmdb", {b"b" * 40: encoded[1], b"a" * 40: encoded[0]})
    write_database(tmp_path / "tower_train_lmdb", {b"a" * 40: encoded[2], b"c" * 40: encoded[3]})
    both = configured("lsun", f"data.root={tmp_path}", "data.source.classes=[bedroom_train,tower_train]")
    assert_close(fetch_all(both).numpy(), pixels.transpose(0, 3, 1, 2), rtol=0, atol=0)
    assert [both.source.labels.classes[k] for k in labels_of(both)] == ["bedroom", "bedroom", "tower", "tower"]
    one = configured("lsun", f"data.root={tmp_path}")
    assert_close(fetch_all(one), both.source.fetch([0, 1]), rtol=0, atol=0)
    assert one.source.labels is None and list(one.source.ids) == list(both.source.ids)[:2]
    for wrong, kind in (("bedroom_test", ValueError), ("kitchen_train", FileNotFoundError)):
        with pytest.raises(kind, match=r"data\.source\.classes"):
            fetch_all(configured("lsun", f"data.root={tmp_path}", f"data.source.classes=[{wrong}]"))
    (tmp_path / "link_train_lmdb").symlink_to(tmp_path / "tower_train_lmdb")
    for twice in ("tower_train,tower_train", "bedroom_train,tower_train,link_train"):
        with pytest.raises(ValueError, match=r"data\.source\.classes=.*tower_train_lmdb"):
            fetch_all(configured("lsun", f"data.root={tmp_path}", f"data.source.classes=[{twice}]"))


def all_pixels(source: Source) -> np.ndarray:
    return source.fetch(range(len(source))).numpy()


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")
def test_lsun_is_read_in_forked_processes(tmp_path, write_database):
    """Under two names of its folder, and without a cache."""
    pixels = noise(3, 64, 64, 3)
    stored = {}
    for k, image in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        stored[b"%d" % k] = file.getvalue()
    write_database(tmp_path / "bedroom_train_lmdb", stored)
    for root in (tmp_path, tmp_path / ".." / tmp_path.name):
        data = configured("lsun", f"data.root={root}", "data.cache=false")
        found = fetch_all(data).numpy()
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert np.array_equal(pool.apply(all_pixels, (data.source,)), found)
        assert np.array_equal(found, pixels.transpose(0, 3, 1, 2))


def write_celeba(root: Path, pixels: list[np.ndarray], split: list[int]) -> None:
    """Write CelebA's folder of aligned images and its five lists; `split` is 0 for training images."""
    base = root / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    names = [f"{i + 1:06d}.jpg" for i in range(len(pixels))]
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(base / "img_align_celeba" / name, quality=100, subsampling=0)

    def rows(values: list[int]) -> str:
        return "".join(f"{name}  {' '.join(map(str, values))}\n" for name in names)

    (base / "list_eval_partition.txt").write_text("".join(f"{n} {s}\n" for n, s in zip(names, split, strict=True)))
    (base / "identity_CelebA.txt").write_text(rows([7]))
    (base / "list_bbox_celeba.txt").write_text(f"{len(names)}\nimage_id x_1 y_1 width height\n" + rows([0, 0, 9, 9]))
    marks = "lefteye_x lefteye_y righteye_x righteye_y"
    (base / "list_landmarks_align_celeba.txt").write_text(f"{len(names)}\n{marks}\n" + rows([1, 2, 3, 4]))
    (base / "list_attr_celeba.txt").write_text(f"{len(names)}\nBald Smiling\n" + rows([-1, 1]))


@pytest.mark.usefixtures("any_checksum")
def test_celeba_files_are_read(tmp_path):
    """The central squares of the training images."""
    colors = noise(6, 3)
    pixels = [np.zeros((218, 178, 3), dtype=np.uint8) for _ in colors]
    for image, color in zip(pixels, colors, strict=True):
        image[20:198] = color  # the central square; black above and below
    write_celeba(tmp_path, pixels, [0, 0, 1, 0, 2, 0])
    options = [f"data.root={tmp_path}", "data.batch_size=2", "data.val_fraction=0.25"]
    found = fetch_all(configured("celeba", *options))
    assert found.shape == (4, 3, 64, 64)
    assert found.dtype == torch.uint8
    assert within(found[..., 2:-2, :], torch.from_numpy(colors[[0, 1, 3, 5]])[:, :, None, None], 3)


SETS = ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "celeba", "kmnist", "emnist", "stl10", "food101"]


@pytest.mark.parametrize("name", [*SETS, "flowers102"])
@pytest.mark.parametrize("prepared", [True, False], ids=["download", "no download"])
def test_failed_downloads_raise(tmp_path, name, prepared):
    """The message names the dataset and the folder, when preparing and when not."""
    data = configured(name, f"data.root={tmp_path}")
    with pytest.raises(ValueError, match=r"cannot be downloaded") as error:
        data.prepare_data() if prepared else data.setup()
    message = str(error.value)
    names = {"fashion_mnist": "FashionMNIST", "celeba": "CelebA", "food101": "Food101", "flowers102": "Flowers102"}
    dataset = names.get(name, name.upper())
    assert message.startswith(f"data.root={tmp_path} has no complete {dataset}")
    assert "\n" not in message


def halves(num: int) -> Tensor:
    """Return images (num, 1, 4, 4), black on the left, each with its own gray on the right."""
    x = torch.zeros(num, 1, 4, 4, dtype=torch.uint8)
    x[..., 2:] = (55 + torch.arange(num) % 200).to(torch.uint8)[:, None, None, None]
    return x


def in_memory_module(images: Tensor, **settings) -> ImageDataModule:
    """Return a data module of images in memory."""
    shape = {"root": None, "channels": images.shape[1], "image_size": images.shape[2]}
    return ImageDataModule(lambda root, image_size, channels, prepare=False: InMemory(images), **shape, **settings)


def in_training(data: ImageDataModule, training: bool = True, step: int = 0) -> ImageDataModule:
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        training=training,
        global_step=step,
        max_steps=3,
        accumulate_grad_batches=1,
        global_rank=0,
        world_size=1,
    )
    return data


def test_batches_are_uint8_until_on_the_device():
    """After the transfer they are float32, 2 v / 255 - 1."""
    data = in_training(in_memory_module(halves(40), batch_size=8))
    data.setup()
    for batch in itertools.chain(data.train_dataloader(), data.val_dataloader()):
        assert batch["x"].dtype == torch.uint8
        moved = data.on_after_batch_transfer(batch, 0)
        assert moved["x"].dtype == torch.float32
        assert moved["start"] == batch["start"]
        expected = batch["x"].double() * 2 / 255 - 1
        assert_close(moved["x"].double(), expected, rtol=0, atol=2e-7)  # float32 rounding of values up to 1


@pytest.mark.parametrize(("flip", "training"), [(False, True), (False, False), (True, False)])
def test_images_are_flipped_in_training_only(flip, training):
    images = halves(500)
    data = in_training(in_memory_module(images, flip=flip), training)
    moved = data.on_after_batch_transfer({"x": images, "start": 0}, 0)["x"]
    assert_close(data.postprocess(moved), images, rtol=0, atol=0)


def test_half_of_the_training_images_are_flipped():
    """Within 5 standard deviations of a fair coin, independent between steps and seeds."""
    images = halves(2000)

    def flipped(step: int = 0, seed: int = 0) -> Tensor:
        data = in_training(in_memory_module(images, flip=True, seed=seed), step=step)
        x = data.postprocess(data.on_after_batch_transfer({"x": images, "start": 0}, 0)["x"])
        mirrored = (x == images.flip(-1)).flatten(1).all(1)
        assert (mirrored | (x == images).flatten(1).all(1)).all()
        return mirrored

    first = flipped()
    assert abs(first.float().mean() - 0.5) < 5 * (0.25 / 2000) ** 0.5
    assert torch.equal(first, flipped())
    for other in (flipped(step=1), flipped(seed=1)):
        assert abs((first == other).float().mean() - 0.5) < 5 * (0.25 / 2000) ** 0.5


@pytest.mark.parametrize("sizes", [[32, 32], [7, 13, 44], [16] * 4])
def test_flips_do_not_depend_on_micro_batches(sizes):
    """Parts of a global batch are flipped like the complete batch."""
    images = halves(64)
    data = in_training(in_memory_module(images, flip=True), step=3)
    whole = data.on_after_batch_transfer({"x": images, "start": 0}, 0)["x"]
    starts = [0, *itertools.accumulate(sizes)]
    cut = [data.on_after_batch_transfer({"x": images[a:b], "start": a}, 0)["x"] for a, b in itertools.pairwise(starts)]
    assert_close(torch.cat(cut), whole, rtol=0, atol=0)


def recorded(accumulate: int) -> Recorder:
    """Return the batches of 5 steps, more than one epoch, with validation."""
    recorder = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=5,
        accumulate_grad_batches=accumulate,
        val_check_interval=2 * accumulate,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, in_memory_module(halves(40), batch_size=16, flip=True))
    return recorder


@pytest.mark.filterwarnings("ignore")
def test_accumulation_does_not_change_the_images():
    """Nor their flips; validation has each image once, not flipped."""
    whole, parts = recorded(1), recorded(2)
    assert sorted(whole.trained) == sorted(parts.trained) == list(range(5))
    for step, seen in whole.trained.items():
        assert list(seen) == [0]
        assert list(parts.trained[step]) == [0, 8]
        assert_close(torch.cat(list(parts.trained[step].values())), seen[0], rtol=0, atol=0)
        assert seen[0].abs().max() <= 1
    for recorder in (whole, parts):
        x = torch.cat([recorder.validated[start] for start in sorted(recorder.validated)])
        assert len(x) == sum(is_validation(str(k), 0.1) for k in range(40))
        assert (x[..., :2] == -1).all()
    assert any((x[..., :2] != -1).any() for seen in whole.trained.values() for x in seen.values())


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"image_size": 0}, {"num_values": 1}, {"image_size": -1}])
def test_invalid_settings_raise(wrong):
    settings = {"root": None, "channels": 1, "image_size": 8, **wrong}
    with pytest.raises(ValueError, match="data\\.{}={} must be".format(*next(iter(wrong.items())))):
        ImageDataModule(digits, **settings)
