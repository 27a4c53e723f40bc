"""One datamodule for images, and the sources it draws on: embedded digits, torchvision's sets, own folders."""

import os
import pickle
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from src.data.csv_files import kinds, read_table, some
from src.data.module import BaseDataModule
from src.data.sources import Covariates, InMemory, Labels, Source, normalize, to_uint8
from src.data.unreadable import read
from src.errors import DataReadError
from src.rng import StepRng

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}


class OpenImages(Protocol):
    """Opens a source of images (N, channels, image_size, image_size) uint8 from `root`.

    With `prepare`, asked once on each machine before training, it first sees to it that the files are there and
    whole: downloads them or looks at each.
    """

    def __call__(self, root: str | None, image_size: int, channels: int, prepare: bool = False) -> Source: ...


class ImageDataModule(BaseDataModule):
    """Images of `channels` x `image_size` x `image_size`, uint8 until they are on the device, then in [-1, 1].

    `source` opens them from `root`; `num_values` is the number of values a pixel can take (256 for 8 bits); `flip`
    mirrors half of the training images left to right. With `skip_unreadable` others take the place of images that
    cannot be read.
    """

    def __init__(
        self,
        source: OpenImages,
        root: str | None,
        channels: int,
        image_size: int,
        num_values: int = 256,
        flip: bool = False,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        microbatch_size: int | Literal["auto"] | None = None,
        skip_unreadable: bool = False,
    ) -> None:
        super().__init__(
            partial(source, root, image_size, channels),
            (channels, image_size, image_size),
            batch_size,
            val_fraction,
            split_seed,
            seed,
            num_workers,
            microbatch_size,
            skip_unreadable,
        )
        if channels not in (1, 3) or image_size < 1 or not 2 <= num_values <= 256:
            raise ValueError(
                "needs data.channels 1 or 3, data.image_size >= 1 and data.num_values in [2, 256], got "
                f"{channels}, {image_size}, {num_values}"
            )
        self._prepare = partial(source, root, image_size, channels, prepare=True)
        self._prepared = False
        self.num_values = self.pixel_levels = num_values
        self.flip = flip

    def prepare_data(self) -> None:
        if self._prepared:  # Lightning asks again at each fit and validate
            return
        self._prepared = True
        try:
            self._prepare()
        except DataReadError as error:
            if not self.skip_unreadable:
                raise ValueError(f"{error}: remove them, or train without them by data.skip_unreadable=true") from error
            warnings.warn(f"{error}: other samples take their places", stacklevel=2)

    def preprocess(self, x: Tensor) -> Tensor:
        return normalize(x, self.pixel_levels)

    def postprocess(self, x: Tensor) -> Tensor:
        return to_uint8(x, self.pixel_levels)

    def augment(self, x: Tensor, rng: StepRng) -> Tensor:
        if not self.flip:
            return x
        mirrored = rng.uniform("flip") < 0.5
        return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


class ImageFiles:
    """Images decoded as they are asked for: `open_image(i)` gives number i, of any size and mode.

    Where they are files, these are `files`, and `ids` what they are known by. `fetch` raises DataReadError.
    """

    def __init__(
        self,
        open_image: Callable[[int], Image.Image],
        count: int,
        image_size: int,
        channels: int,
        labels: Labels | None = None,
        captions: Sequence[Sequence[str]] | None = None,
        files: Sequence[Path] | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        self.open_image = open_image
        self.count = count
        self.image_size = image_size
        self.channels = channels
        self.labels = labels
        self.covariates: Covariates | None = None
        self.captions = captions
        self.files = files
        self.ids = ids

    def __len__(self) -> int:
        return self.count

    def stamps(self) -> Sequence[int] | None:
        """The sizes of the files: a copy has another time, and to read all takes too long."""
        return None if self.files is None else [_size(file) for file in self.files]

    def fetch(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([read(self._name(i), partial(self._read, i)) for i in indices])

    def _read(self, i: int) -> Tensor:
        with self.open_image(i) as image:
            return fit_image(image, self.image_size, self.channels)

    def _name(self, i: int) -> str:
        return f"image {i}" if self.files is None else str(self.files[i])


def digits(root: str | None, image_size: int, channels: int, prepare: bool = False) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8, pixel values 0..16: installed with it, nothing to download."""
    from sklearn.datasets import load_digits

    _require(
        image_size == 8 and channels == 1, "the embedded digits are 8x8 and gray: data.image_size=8 data.channels=1"
    )
    loaded = load_digits()
    labels = Labels(torch.from_numpy(loaded.target).long(), [str(name) for name in loaded.target_names])
    return InMemory(torch.from_numpy(loaded.images.astype(np.uint8))[:, None], labels)


def torchvision_images(
    root: str | None, image_size: int, channels: int, prepare: bool = False, *, dataset: Callable[..., Any]
) -> Source:
    """A torchvision dataset, `dataset(root=..., download=...)`: in memory where it holds arrays, else decoded lazily.

    Raises ValueError, naming the folder, if the files are not there and cannot be downloaded.
    """
    name = getattr(getattr(dataset, "func", dataset), "__name__", "dataset")
    _require(root is not None, f"set data.root to the folder where {name} lies, or is to be downloaded to")
    try:
        opened = dataset(root=root, download=prepare)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, pickle.UnpicklingError) as error:
        # Not there and no network, or there but broken off: torchvision has no one error for either.
        reason = " ".join(str(error).split())[:200].rstrip(": ") or type(error).__name__
        raise ValueError(
            f"{name} is not (or not whole) in {Path(root or '.').resolve()} and could not be downloaded ({reason}): "
            "connect to the network, put the dataset's original files there, or set data.root to where they are"
        ) from error
    labels = _labels_of(opened)
    data = getattr(opened, "data", None)
    if data is None:
        return ImageFiles(partial(_first_of, opened), len(opened), image_size, channels, labels)
    images = torch.as_tensor(data)
    if images.ndim == 3:
        images = images[:, None]  # (N, H, W)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)  # (N, H, W, 3)
    if images.shape[-2:] != (image_size, image_size):
        images = TF.resize(images, [image_size, image_size], antialias=True)
    if images.shape[1] != channels:
        images = TF.rgb_to_grayscale(images) if channels == 1 else images.expand(-1, 3, -1, -1)
    return InMemory(images.contiguous(), labels)


def folder(
    root: str | None, image_size: int, channels: int, prepare: bool = False, *, labels: str | None = None
) -> Source:
    """Every image file under `root`, however nested, sorted by path. `prepare` looks at all of them.

    Their kinds are what the CSV file `labels` (absolute, or relative to `root`) says, in the columns `file` (or
    `file_name`) and `label`; without one, the folders of `root` that they lie in, if all lie in two or more of these.

    Raises FileNotFoundError if there is no such folder or file, ValueError if it holds no images or unreadable ones, or
    if the CSV file does not give each image its kind.
    """
    path, files = find_images(root, prepare)
    found = folder_kinds(path, files) if labels is None else _kinds_in(path / labels, path, files)
    return image_files(path, files, image_size, channels, found)


def find_images(root: str | None, prepare: bool) -> tuple[Path, list[Path]]:
    """`root` as a path, and every image file under it. Raises as `folder` does."""
    path = Path(root or "")
    if root is None or not path.is_dir():
        raise FileNotFoundError(
            f"no folder {root and path.resolve()}: set data.root to the folder that holds your images"
        )
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in EXTENSIONS and _is_visible_file(f, path))
    if not files:
        raise ValueError(
            f"no images under {path.resolve()} (looked for {' '.join(sorted(EXTENSIONS))}): set data.root to the "
            "folder that holds your images"
        )
    if prepare:
        with ThreadPoolExecutor() as pool:  # decoding releases the interpreter
            readable = list(pool.map(_is_readable, files))
        unreadable = [str(f.relative_to(path)) for f, ok in zip(files, readable, strict=True) if not ok]
        if unreadable:
            raise DataReadError(
                f"{len(unreadable)} of {len(files)} images under {path} cannot be read ({some(unreadable)})"
            )
    return path, files


def image_files(
    path: Path,
    files: Sequence[Path],
    image_size: int,
    channels: int,
    labels: Labels | None,
    captions: Sequence[Sequence[str]] | None = None,
) -> ImageFiles:
    """Files under `path`, each known by how it is reached from there, whatever the system writes between folders.

    Names are taken in Unicode's normal form C, since systems differ in how they keep accents.
    """
    ids = [unicodedata.normalize("NFC", file.relative_to(path).as_posix()) for file in files]
    return ImageFiles(partial(open_file, files), len(files), image_size, channels, labels, captions, files, ids)


def open_file(files: Sequence[Path], i: int) -> Image.Image:
    """Image number i of the files."""
    return Image.open(files[i])


def folder_kinds(path: Path, files: Sequence[Path]) -> Labels | None:
    """The folders of `path` that the files lie in, as their kinds; None unless all lie in two or more of these."""
    parts = [f.relative_to(path).parts for f in files]
    if all(len(each) > 1 for each in parts) and len({each[0] for each in parts}) > 1:
        return kinds(each[0] for each in parts)
    return None


def by_image(
    said: Iterable[tuple[str, str]], path: Path, files: Sequence[Path], source: Path, what: str
) -> list[list[str]]:
    """What the file `source` says of each image, from its pairs of file name (relative to `path`) and text.

    Raises ValueError if it names images that are not there, or says nothing of some; `what` it says is for the message.
    """
    found: dict[str, list[str]] = {os.path.abspath(f): [] for f in files}
    unknown = []
    for name, text in said:
        place = os.path.abspath(path / name)
        if place in found:
            found[place].append(text)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{source} names {len(unknown)} files that are no images under {path} ({some(unknown)}): remove these "
            "rows, or give file names relative to data.root"
        )
    if missing := [str(f.relative_to(path)) for f, texts in zip(files, found.values(), strict=True) if not texts]:
        raise ValueError(
            f"{source} has no {what} for {len(missing)} of {len(files)} images under {path} ({some(missing)}): add "
            "rows, or remove these images"
        )
    return list(found.values())


def fit_image(image: Image.Image, image_size: int, channels: int) -> Tensor:
    """Turn upright, flatten onto white, take the central square and resize it: (channels, size, size) uint8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and np.asarray(image).max() > 255):
        # 16-bit gray; Pillow's own conversion clips it to white.
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    pixels = np.array(image).reshape(image_size, image_size, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _kinds_in(source: Path, path: Path, files: Sequence[Path]) -> Labels:
    """What a CSV file says of which kind each image is."""
    table = read_table(source, "data.source.labels")
    names = table.column(table.one_of(("file", "file_name"), "data.source.labels"))
    labels = table.column(table.one_of(("label",), "data.source.labels"))
    if "" in labels:
        raise ValueError(f"{source}, line {table.lines[labels.index('')]}: the label is empty; fill it in")
    each = by_image(zip(names, labels, strict=True), path, files, source, "label")
    for file, said in zip(files, each, strict=True):
        if len(set(said)) > 1:
            raise ValueError(
                f"{source} gives {file.relative_to(path)} the labels {' and '.join(sorted(set(said)))}: keep one"
            )
    return kinds(said[0] for said in each)


def _labels_of(dataset: Any) -> Labels | None:
    """Of a torchvision dataset, which calls them `targets`, or `labels`; None where they are no classes."""
    numbers = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if numbers is None:
        return None
    numbers = torch.as_tensor(numbers).long()
    names = getattr(dataset, "classes", None) or range(int(numbers.max()) + 1)
    return Labels(numbers, [str(name) for name in names])


def _first_of(dataset: Any, i: int) -> Image.Image:
    """The image of a torchvision dataset's pair of image and label."""
    image: Image.Image = dataset[i][0]
    return image


def _is_visible_file(path: Path, root: Path) -> bool:
    """Whether it is a file, and neither it nor a folder that it is in (below `root`) is hidden."""
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)


def _size(path: Path) -> int:
    """In bytes; of a file that is gone 0."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_readable(path: Path) -> bool:
    """Whether the whole file goes through `fit_image`: a truncated one fails only when its pixels are read."""

    def decode() -> None:
        with Image.open(path) as image:
            fit_image(image, 8, 3)

    try:
        read(str(path), decode)
    except DataReadError:
        return False
    return True


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
