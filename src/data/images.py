"""The image data module and its sources: scikit-learn's digits, torchvision's datasets, folders."""

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

from src.data.module import BaseDataModule
from src.data.read_errors import read_with_retries
from src.data.sources import Covariates, InMemory, Labels, Source, normalize, to_uint8
from src.data.table_files import first_names, labels_from_names, read_table
from src.errors import DataReadError
from src.quoting import format_override
from src.rng import StepRng

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}


class OpenImages(Protocol):
    """Opens a source of images (N, channels, image_size, image_size) uint8 from `root`.

    `prepare`, set once per machine before training, downloads the files or checks that each can be read.
    """

    def __call__(self, root: str | None, image_size: int, channels: int, prepare: bool = False) -> Source: ...


class ImageDataModule(BaseDataModule):
    """Images (channels, image_size, image_size): uint8 until on the device, then float32 in [-1, 1].

    Args:
        source: opens the images under `root`.
        num_values: the number of values of a pixel, 256 for 8 bits.
        flip: mirror half of the training images left to right.

    The other arguments are those of `BaseDataModule`.
    """

    num_values: int

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
        if channels not in (1, 3):
            raise ValueError(f"data.channels={channels} must be 1 (gray) or 3 (RGB)")
        if image_size < 1:
            raise ValueError(f"data.image_size={image_size} must be at least 1")
        if not 2 <= num_values <= 256:
            raise ValueError(f"data.num_values={num_values} must be in [2, 256]; 8-bit images have 256")
        self._prepare = partial(source, root, image_size, channels, prepare=True)
        self._prepared = False
        self.num_values = num_values
        self.flip = flip

    def prepare_data(self) -> None:
        if self._prepared:  # Lightning calls this at each fit and validate
            return
        self._prepared = True
        try:
            self._prepare()
        except DataReadError as error:
            if not self.skip_unreadable:
                raise ValueError(f"{error}; remove them, or add data.skip_unreadable=true") from error
            warnings.warn(f"{error}; they are replaced by other samples", stacklevel=2)

    def preprocess(self, x: Tensor) -> Tensor:
        return normalize(x, self.num_values)

    def postprocess(self, x: Tensor) -> Tensor:
        return to_uint8(x, self.num_values)

    def augment(self, x: Tensor, rng: StepRng) -> Tensor:
        if not self.flip:
            return x
        mirrored = rng.uniform("flip") < 0.5
        return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


class ImageFiles:
    """A source that decodes images lazily: `open_image(i)` returns image i, of any size and mode.

    `files` are the paths of images that are files. `fetch` raises DataReadError.
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
        """Return the file sizes: copying changes time stamps, and hashing all files takes too long."""
        return None if self.files is None else [_size(file) for file in self.files]

    def fetch(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([read_with_retries(self._name(i), partial(self._read, i)) for i in indices])

    def _read(self, i: int) -> Tensor:
        with self.open_image(i) as image:
            return fit_image(image, self.image_size, self.channels)

    def _name(self, i: int) -> str:
        return f"image {i}" if self.files is None else str(self.files[i])


def digits(root: str | None, image_size: int, channels: int, prepare: bool = False) -> Source:
    """Open scikit-learn's 1,797 handwritten digits, 8x8 with pixel values 0 to 16; needs no download."""
    from sklearn.datasets import load_digits

    _require(image_size == 8 and channels == 1, "data=digits are 8x8 and gray; set data.image_size=8 data.channels=1")
    loaded = load_digits()
    labels = Labels(torch.from_numpy(loaded.target).long(), [str(name) for name in loaded.target_names])
    return InMemory(torch.from_numpy(loaded.images.astype(np.uint8))[:, None], labels)


def torchvision_images(
    root: str | None, image_size: int, channels: int, prepare: bool = False, *, dataset: Callable[..., Any]
) -> Source:
    """Open a torchvision dataset, `dataset(root=..., download=...)`: in memory if it holds arrays, else lazily.

    Raises ValueError if the files are missing and cannot be downloaded.
    """
    name = getattr(getattr(dataset, "func", dataset), "__name__", "dataset")
    _require(root is not None, f"data.root=null is not a folder; set data.root to the folder of {name}")
    try:
        opened = dataset(root=root, download=prepare)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, pickle.UnpicklingError) as error:
        # Torchvision has no single error for missing files without network, nor for incomplete files.
        reason = " ".join(str(error).split())[:200].rstrip(": ") or type(error).__name__
        raise ValueError(
            f"{format_override('data.root', Path(root or '.').resolve())} "
            f"has no complete {name}, and it cannot be downloaded ({reason}); "
            "connect to the network, put the dataset's original files there, or set data.root to their folder"
        ) from error
    labels = _labels_of(opened)
    data = getattr(opened, "data", None)
    if data is None:
        return ImageFiles(partial(_image_of, opened), len(opened), image_size, channels, labels)
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
    """Open every image file under `root`, recursively, sorted by path. `prepare` checks that each can be read.

    The CSV file `labels` (absolute or relative to `root`) lists their classes in columns `file` (or `file_name`) and
    `label`. Without it, the subfolders of `root` are the classes if there are two or more and all images are in one.

    Raises FileNotFoundError for a missing folder or file; ValueError for no images, unreadable images, or images
    without a class in the CSV file.
    """
    path, files = find_images(root, prepare)
    classes = classes_from_folders(path, files) if labels is None else _classes_from_csv(path / labels, path, files)
    return image_files(path, files, image_size, channels, classes)


def find_images(root: str | None, prepare: bool) -> tuple[Path, list[Path]]:
    """Return `root` as a path, and every image file under it. Raises as `folder` does."""
    path = Path(root or "")
    if root is None or not path.is_dir():
        raise FileNotFoundError(
            f"{format_override('data.root', path.resolve() if root else None)} "
            f"is not a folder; set data.root to the folder with your "
            "images"
        )
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in EXTENSIONS and _is_visible_file(f, path))
    if not files:
        raise ValueError(
            f"{format_override('data.root', path.resolve())} "
            f"has no images ({' '.join(sorted(EXTENSIONS))}); set data.root to the folder "
            "with your images"
        )
    if prepare:
        with ThreadPoolExecutor() as pool:  # decoding releases the GIL
            readable = list(pool.map(_is_readable, files))
        unreadable = [str(f.relative_to(path)) for f, ok in zip(files, readable, strict=True) if not ok]
        if unreadable:
            raise DataReadError(
                f"{len(unreadable)} of {len(files)} images under {path} cannot be read ({first_names(unreadable)})"
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
    """Return files under `path` as a source, with their relative POSIX paths as ids.

    Ids are in Unicode normal form C, since file systems store accents differently.
    """
    ids = [unicodedata.normalize("NFC", file.relative_to(path).as_posix()) for file in files]
    return ImageFiles(partial(open_file, files), len(files), image_size, channels, labels, captions, files, ids)


def open_file(files: Sequence[Path], i: int) -> Image.Image:
    """Open image i of the files."""
    return Image.open(files[i])


def classes_from_folders(path: Path, files: Sequence[Path]) -> Labels | None:
    """Return the subfolders of `path` as classes; None unless there are two or more and all files are in one."""
    parts = [f.relative_to(path).parts for f in files]
    if all(len(each) > 1 for each in parts) and len({each[0] for each in parts}) > 1:
        return labels_from_names(each[0] for each in parts)
    return None


def group_by_image(
    pairs: Iterable[tuple[str, str]], path: Path, files: Sequence[Path], source: Path, what: str
) -> list[list[str]]:
    """Return the texts of each image, from pairs of file name (relative to `path`) and text in the file `source`.

    Raises ValueError for names without an image, and for images without text; `what` names the text in messages.
    """
    texts_of: dict[str, list[str]] = {os.path.abspath(f): [] for f in files}
    unknown = []
    for name, text in pairs:
        file = os.path.abspath(path / name)
        if file in texts_of:
            texts_of[file].append(text)
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{source} lists {len(unknown)} files that are not images under {path} ({first_names(unknown)}); remove "
            "these rows, or write file names relative to data.root"
        )
    if missing := [str(f.relative_to(path)) for f, texts in zip(files, texts_of.values(), strict=True) if not texts]:
        raise ValueError(
            f"{source} has no {what} for {len(missing)} of {len(files)} images under {path} ({first_names(missing)}); "
            "add rows, or remove these images"
        )
    return list(texts_of.values())


def fit_image(image: Image.Image, image_size: int, channels: int) -> Tensor:
    """Rotate upright, composite onto white, crop the central square, resize; return (channels, size, size) uint8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and np.asarray(image).max() > 255):
        # Pillow's conversion clips 16-bit gray to white.
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


def _classes_from_csv(source: Path, path: Path, files: Sequence[Path]) -> Labels:
    """Return the class of each image from a CSV file."""
    table = read_table(source, "data.source.labels")
    names = table.column(table.one_of(("file", "file_name"), "data.source.labels"))
    labels = table.column(table.one_of(("label",), "data.source.labels"))
    if "" in labels:
        raise ValueError(f"{source}, line {table.lines[labels.index('')]}: the label is empty; fill it in")
    labels_of = group_by_image(zip(names, labels, strict=True), path, files, source, "label")
    for file, several in zip(files, labels_of, strict=True):
        if len(set(several)) > 1:
            raise ValueError(
                f"{source} lists the labels {' and '.join(sorted(set(several)))} for {file.relative_to(path)}; keep one"
            )
    return labels_from_names(several[0] for several in labels_of)


def _labels_of(dataset: Any) -> Labels | None:
    """Return the labels of a torchvision dataset, its `targets` or `labels`; None if it has none."""
    targets = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if targets is None:
        return None
    targets = torch.as_tensor(targets).long()
    classes = getattr(dataset, "classes", None) or range(int(targets.max()) + 1)
    return Labels(targets, [str(name) for name in classes])


def _image_of(dataset: Any, i: int) -> Image.Image:
    """Return the image of a torchvision dataset's pair of image and target."""
    image: Image.Image = dataset[i][0]
    return image


def _is_visible_file(path: Path, root: Path) -> bool:
    """Return whether it is a file, not hidden and not in a hidden folder below `root`."""
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)


def _size(path: Path) -> int:
    """Return the size in bytes; 0 for a deleted file."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_readable(path: Path) -> bool:
    """Return whether the file passes `fit_image`: a truncated one fails only when its pixels are decoded."""

    def decode() -> None:
        with Image.open(path) as image:
            fit_image(image, 8, 3)

    try:
        read_with_retries(str(path), decode)
    except DataReadError:
        return False
    return True


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
