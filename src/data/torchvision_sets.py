"""Torchvision's datasets that need more than to be opened: image files, and files with peculiarities."""

import gzip
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from src.cache import write_atomically
from src.data.encoded import ImageBytes, Names
from src.data.fit import Fit, ImageSpec, height_and_width
from src.data.folder import refuse_val_root
from src.data.image_source import ImageSource, open_images
from src.data.images import open_dataset
from src.data.sources import Labels

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has the compressed files."""


class EMNIST(datasets.EMNIST):  # type: ignore[misc]
    """EMNIST with upright images: rows and columns are exchanged in its files. Letters have no class "N/A"."""

    data: Tensor
    targets: Tensor
    classes: list[str]

    def __init__(self, root: str | Path, split: str, train: bool = True, download: bool = False) -> None:
        super().__init__(root, split, train=train, download=download)
        self.data = self.data.mT.contiguous()
        if split == "letters":
            self.targets, self.classes = self.targets - 1, self.classes[1:]


class FashionMNIST(datasets.FashionMNIST):  # type: ignore[misc]
    """FashionMNIST, from Debian's package dataset-fashion-mnist instead of the network if it is installed."""

    def __init__(self, root: str | Path, train: bool = True, download: bool = False) -> None:
        super().__init__(root, train=train, download=download)

    def download(self) -> None:
        packed = [DEBIAN_FASHION_MNIST / name for name, _ in self.resources]
        if all(path.is_file() for path in packed) and not self._check_exists():
            for path in packed:
                write_atomically(Path(self.raw_folder) / path.stem, gzip.decompress(path.read_bytes()))
        super().download()


def torchvision_files(
    root: str | None,
    image_size: int | Sequence[int],
    channels: int,
    prepare: bool = False,
    *,
    dataset: Callable[..., Any],
    fit: Fit = "crop",
    background: str = "white",
    value_range: Sequence[float] | None = None,
    skip_unreadable: bool | float = False,
    cache: bool = True,
    cache_dir: str | None = None,
    val_root: str | None = None,
) -> ImageSource:
    """Open a torchvision dataset of image files: CelebA, or any whose constructor takes `loader`.

    `prepare` downloads the files if they are missing. The other arguments are those of `src.data.folder.folder`. Raises
    ValueError if the files are missing and cannot be downloaded, or as `folder` does.
    """
    refuse_val_root(val_root, "leave it out, or set data.val_fraction")
    takes_loader = "loader" in inspect.signature(dataset).parameters
    opened = open_dataset(partial(dataset, loader=Path) if takes_loader else dataset, root, prepare)
    targets: list[int] = []
    if takes_loader:  # which returns the path of an image in place of its pixels
        paths, targets = map(list, zip(*(opened[k] for k in range(len(opened))), strict=True))
    else:
        folder = Path(opened.root) / opened.base_folder / "img_align_celeba"
        paths = [folder / name for name in opened.filename]
    labels = Labels(torch.tensor(targets), list(opened.classes)) if targets else None
    times: list[int] = []
    sizes: list[int] = []
    for path in paths:
        status = path.stat() if path.is_file() else None  # a missing file is an unreadable image
        times.append(status.st_mtime_ns if status else 0)
        sizes.append(status.st_size if status else 0)
    names = Names(str(path.relative_to(opened.root)) for path in paths)
    found = ImageBytes(
        place=f"under {opened.root}",
        key=sha256(repr((str(Path(opened.root).resolve()), times)).encode()).hexdigest(),
        names=names,
        sample_ids=Names(str(k) for k in range(len(paths))),
        sizes=np.array(sizes, np.int64),
        read=partial(_read_file, Path(opened.root), names),
    )
    spec = ImageSpec(height_and_width(image_size), channels, fit, background)
    return open_images(found, spec, labels, None, value_range, skip_unreadable, cache, cache_dir)


def _read_file(root: Path, names: Names, row: int) -> bytes:
    return (root / names[row]).read_bytes()
