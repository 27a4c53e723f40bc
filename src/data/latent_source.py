"""Latents of images in a file on disk, and as a source of samples."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.data.batches import BatchDataset, BatchLoader
from src.data.decoded import Array
from src.data.pixel_store import check_space
from src.data.samplers import BatchIndices
from src.data.sources import Covariates, Labels, Source
from src.errors import DataReadError
from src.rng import key

log = logging.getLogger(__name__)

ReadLatents = Callable[[Sequence[int], Sequence[int]], Tensor]
"""Indices of samples, and for each 1 if it is mirrored or 0 -> mean and standard deviation (B, 2, C, h, w) of its
latents, or the mean alone (B, 1, C, h, w)."""


@dataclass(eq=False)
class LatentSource:
    """Latents (N, C, h, w) float32 of the images of a source, with its labels, covariates, captions and ids.

    `fetch` draws from the posterior of each image, always the same latents. `fetch_training` draws new ones for each
    key, and mirrors half of the images if `flips` is true. `fetch_images` returns the images, with the values of their
    source, that belong to the latents of the same keys; training batches of the steps `image_steps` have them, too.
    """

    read: ReadLatents
    flips: bool
    num_samples: int
    labels: Labels | None
    covariates: Covariates | None
    captions: Sequence[Sequence[str]] | None
    ids: Sequence[str] | None
    sample_stamps: Sequence[int] | None
    summary: str
    unreadable: Mapping[str, str]
    images: Source
    image_steps: range

    def __len__(self) -> int:
        return self.num_samples

    def stamps(self) -> Sequence[int] | None:
        return self.sample_stamps

    def fetch(self, indices: Sequence[int]) -> Tensor:
        return self._draw(indices, [key("latent", int(i)) for i in indices], [0] * len(indices))

    def fetch_training(self, indices: Sequence[int], keys: Sequence[int]) -> Tensor:
        return self._draw(indices, keys, self._mirrored(keys))

    def fetch_images(self, indices: Sequence[int], keys: Sequence[int]) -> Tensor:
        x, mirrored = self.images.fetch(indices), torch.tensor(self._mirrored(keys), dtype=torch.bool)
        return torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)

    def _mirrored(self, keys: Sequence[int]) -> list[int]:
        return [k % 2 if self.flips else 0 for k in keys]

    def _draw(self, indices: Sequence[int], keys: Sequence[int], mirrored: Sequence[int]) -> Tensor:
        mean, *std = self.read(indices, mirrored).float().unbind(1)
        if not std:
            return mean
        generator = torch.Generator()
        eps = torch.stack([torch.randn(mean.shape[1:], generator=generator.manual_seed(k)) for k in keys])
        return mean + std[0] * eps


class CachedLatents:
    """The latents in a file (N, orientations, 1 or 2, C, h, w), mapped into memory; a `ReadLatents`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.array: Array = np.load(path, mmap_mode="r")

    def __call__(self, indices: Sequence[int], mirrored: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.array[np.asarray(indices, np.int64), np.asarray(mirrored, np.int64)])

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedLatents, (self.path,)  # each process maps the file again instead of copying the array

    @classmethod
    def find(cls, folder: Path) -> "CachedLatents | None":
        """Return the latents in a folder of the cache; None if it does not exist or its file is incomplete."""
        try:
            return cls(folder / "latents.npy")
        except (OSError, ValueError, EOFError):
            return None


def write_latents(
    folder: Path, source: Source, encode: Callable[[Tensor], Tensor], dtype: str, num_at_once: int, num_workers: int
) -> None:
    """Encode all images of `source` into a folder of the cache, after a line with the size of the file.

    `encode` maps images to mean and standard deviation of their latents (B, orientations, 2, C, h, w). Raises OSError
    if the disk is too small, and DataReadError for an image that cannot be read.
    """
    from tqdm import tqdm

    first = encode(source.fetch([0]))
    kinds = 2 if first[:, :, 1].any() else 1  # a deterministic encoder has no standard deviation
    shape = (len(source), first.shape[1], kinds, *first.shape[3:])
    needed = int(np.prod(shape)) * np.dtype(dtype).itemsize
    log.info(f"Encoding {len(source):,} images once ({needed / 1e6:,.1f} MB in {folder.parent})")
    check_space(folder, needed)
    out = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.dtype(dtype), shape)
    starts = range(0, len(source), num_at_once)
    batches = [BatchIndices(k, len(source), [*range(k, min(k + num_at_once, len(source)))]) for k in starts]
    loader = BatchLoader(
        BatchDataset(source),
        sampler=batches,
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator(),  # The default one draws the initial weights, whether or not there is a cache.
    )
    with tqdm(total=len(source), desc="Encoding", unit="image", disable=None) as bar:
        for batch in loader:
            if "failure" in batch:
                raise DataReadError(batch["failure"])
            rows = slice(batch["start"], batch["start"] + len(batch["x"]))
            out[rows] = encode(batch["x"])[:, :, :kinds].numpy()
            bar.update(len(batch["x"]))
    out.flush()
