"""A source of image files: decoded once into a cache on disk, or at every access."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import ImageColor
from torch import Tensor

from src.data.decoded import Array
from src.data.encoded import EncodedImages
from src.data.fit import (
    ImageSpec,
    as_range,
    bucket_sizes,
    crop_at,
    describe_sizes,
    find_limits,
    infer_range,
    warn_of_outliers,
)
from src.data.found_images import describe, suffix_of
from src.data.frames import FrameImages
from src.data.pixel_store import PixelStore, default_cache_dir, load_sample, open_pixels, try_load
from src.data.read_errors import read_with_retries
from src.data.sources import Covariates, Labels
from src.data.table_files import labels_from_names
from src.errors import DataReadError, first_names, format_override

MAX_SKIPPED = 0.1
"""Largest share of images that `skip_unreadable=true` leaves out; a number sets another share."""


@dataclass(eq=False)
class ImageSource:
    """A source of image files, decoded once into `store`, or at every access if that is None.

    `value_range` is the range of the values that `fetch` returns, `dtype` their type in the files, and `suffix` the
    ending of most of the first 1,000 files. `summary` describes the dataset in one line. `unreadable` has the reason
    for each image that was left out.
    """

    found: EncodedImages
    spec: ImageSpec
    store: PixelStore | None
    labels: Labels | None
    captions: Sequence[Sequence[str]] | None
    value_range: tuple[float, float]
    dtype: str
    summary: str
    unreadable: dict[str, str]
    covariates: Covariates | None = None

    def __post_init__(self) -> None:
        self.rows = np.arange(len(self.found)) if self.store is None else np.flatnonzero(self.store.ok)
        self.ids: Sequence[str] | None = self.found.ids()
        self.val_mask = self.found.val_mask

    @property
    def suffix(self) -> str:
        return Counter(map(suffix_of, self.found.names[:1000])).most_common(1)[0][0]

    def __len__(self) -> int:
        return len(self.found)

    def stamps(self) -> Sequence[int]:
        """Return the file sizes: copying changes time stamps, and hashing all files takes too long."""
        sizes: list[int] = self.found.sizes.tolist()
        return sizes

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """Return images (N, C, H, W), uint8 or float32, with the values of the files. Raises DataReadError."""
        if self.store is not None:
            return torch.from_numpy(self.store.pixels[self.rows[list(indices)]])
        return torch.from_numpy(np.stack([self._image(i) for i in indices]))

    def _image(self, index: int) -> Array:
        """Return an image (C, H, W). Raises DataReadError."""
        if self.store is not None:
            return self.store.image(int(self.rows[index]))
        return read_with_retries(str(self.found.path(index)), partial(self._decode, index))

    def _decode(self, index: int) -> Array:
        loaded = load_sample(self.found, self.spec, index)
        if self.dtype not in ("bool", "uint8"):
            return loaded.pixels.astype(np.float32)
        if loaded.type != self.dtype:
            raise ValueError(f"its values have type {loaded.type}, and those of other images {self.dtype}")
        return loaded.pixels


class RandomCrops(ImageSource):
    """Images that cover the wanted size and are cropped: at random by `fetch_training`, in the center by `fetch`."""

    def fetch(self, indices: Sequence[int]) -> Tensor:
        return self._crop(indices, [None] * len(indices))

    def fetch_training(self, indices: Sequence[int], keys: Sequence[int]) -> Tensor:
        return self._crop(indices, keys)

    def _crop(self, indices: Sequence[int], keys: Sequence[int | None]) -> Tensor:
        crops = [crop_at(self._image(i), self.spec.size, key) for i, key in zip(indices, keys, strict=True)]
        return torch.from_numpy(np.stack(crops))


class BucketedImages(ImageSource):
    """Images that `fetch` crops to one size, and `fetch_training` to one of several of other aspect ratios.

    `shaped` holds the latter, in the rows of `store`, and `buckets` (N,) has the index of the size of each image.
    """

    def in_buckets(self, shaped: PixelStore) -> Self:
        assert shaped.places is not None
        self.shaped = shaped
        sizes = bucket_sizes(self.spec.size)
        indices = [sizes.index((height, width)) for *_, height, width in shaped.places[self.rows].tolist()]
        self.buckets = torch.tensor(indices)
        counts = self.buckets.bincount(minlength=len(sizes)).tolist()
        used = ", ".join(f"{w}x{h} ({n:,})" for (h, w), n in zip(sizes, counts, strict=True) if n)
        self.summary += f"; trained as {used}, width x height"
        return self

    def fetch_training(self, indices: Sequence[int], keys: Sequence[int]) -> Tensor:
        """Return images of one bucket."""
        return torch.from_numpy(np.stack([self.shaped.image(int(self.rows[i])) for i in indices]))


def open_images(
    found: EncodedImages,
    spec: ImageSpec,
    classes: Sequence[str] | Labels | None,
    captions: Sequence[Sequence[str]] | None,
    value_range: Sequence[float] | None,
    skip_unreadable: bool | float,
    cache: bool,
    cache_dir: str | None,
    about: str = "",
) -> ImageSource:
    """Return images as a source, after decoding them if `cache` is true. Raises as `src.data.folder.folder` does.

    `classes` are the class of each image, or labels whose classes have an order of their own. `about` is appended to
    the summary.
    """
    if spec.pages == "samples" and not isinstance(found, FrameImages):
        raise ValueError("data.source.pages=samples is for data=folder and data=captions; set first or channels")
    try:
        ImageColor.getrgb(spec.background)
    except ValueError as error:
        setting = format_override("data.source.background", spec.background)
        raise ValueError(f"{setting} must be a color, such as white or '#ff8000'; change it") from error
    in_buckets = spec if spec.fit == "buckets" else None
    spec = spec._replace(fit="crop") if in_buckets else spec  # buckets are for training only
    store = _open_store(found, spec, cache_dir) if cache else None
    shaped = _open_store(found, in_buckets, cache_dir) if in_buckets and store else None
    if in_buckets and shaped is None:
        raise ValueError(
            "data.source.fit=buckets needs data.cache=true and a data.cache_dir with enough space; set both"
        )
    errors = {} if store is None else store.errors
    check_readable(found, errors, skip_unreadable)
    readable = np.ones(len(found), bool)
    readable[list(errors)] = False
    labels = _labels_of(classes, readable)
    names = [classes.classes[k] for k in classes.targets.tolist()] if isinstance(classes, Labels) else classes
    summary = describe(found, names)
    kept = found.keep(readable, "unreadable")
    if store is None:
        dtype, limits = _probe(kept, spec, value_range)
    else:
        dtype, limits = _measure(kept, store, readable, value_range)
        summary += describe_sizes(store.sizes[readable], store.frames[readable], spec, dtype, limits)
        summary += f"; {len(errors):,} cannot be read" if errors else ""
    texts = None if captions is None else [captions[k] for k in np.flatnonzero(readable).tolist()]
    unreadable = {str(found.path(k)): reason for k, reason in errors.items()}
    arguments = (kept, spec, store, labels, texts, limits, dtype, summary + about, unreadable)
    if shaped is not None:
        return BucketedImages(*arguments).in_buckets(shaped)
    return RandomCrops(*arguments) if spec.fit == "random_crop" else ImageSource(*arguments)


def _labels_of(classes: Sequence[str] | Labels | None, readable: npt.NDArray[np.bool_]) -> Labels | None:
    """Return the labels of the readable images, from the class of each image or from labels of all."""
    if isinstance(classes, Labels):
        return Labels(classes.targets[torch.from_numpy(readable)], classes.classes)
    if classes is None:
        return None
    return labels_from_names(classes[k] for k in np.flatnonzero(readable).tolist())


def _open_store(found: EncodedImages, spec: ImageSpec, cache_dir: str | None) -> PixelStore | None:
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    try:
        return open_pixels(found, spec, folder)
    except OSError as error:
        setting = format_override("data.cache_dir", folder)
        warnings.warn(f"{setting} cannot hold the decoded images ({error}); decoding them in each epoch", stacklevel=2)
        return None


def check_readable(
    found: EncodedImages, unreadable: Mapping[int, str], skip_unreadable: bool | float, noun: str = "images"
) -> None:
    """Raise DataReadError for images that cannot be read, unless as few as `skip_unreadable` allows."""
    if not unreadable:
        return
    share = MAX_SKIPPED if skip_unreadable is True else float(skip_unreadable)
    # What follows a semicolon is the fix of that file; if all have the same reason, it is the fix of the settings.
    causes = [reason.partition("; ")[0] for reason in unreadable.values()]
    names = [found.names[k] for k in unreadable]
    if len({*causes}) == 1:
        listed = f"{first_names(names, 3)}: {causes[0]}"
    else:
        listed = first_names([f"{name}: {cause}" for name, cause in zip(names, causes, strict=True)], 3)
    text = f"{len(unreadable)} of {len(found)} {noun} {found.place} cannot be read ({listed})"
    if len(unreadable) == len(found):
        fixes = {reason.partition("; ")[2] for reason in unreadable.values()}
        fix = fixes.pop() if len(fixes) == 1 else ""
        raise DataReadError(f"{text}; {fix or 'check these files, or set data.root to other ones'}")
    if len(unreadable) <= share * len(found):
        warnings.warn(f"{text}; they are left out", stacklevel=2)
        return
    fix = "remove them, or add data.skip_unreadable=true"
    if share:
        fix = (
            f"more than data.skip_unreadable={skip_unreadable} allows; remove them, or raise it to a share such as 0.5"
        )
    raise DataReadError(f"{text}; {fix}")


def _measure(
    found: EncodedImages, store: PixelStore, readable: npt.NDArray[np.bool_], value_range: Sequence[float] | None
) -> tuple[str, tuple[float, float]]:
    """Return the type and the range of values of the readable images `found`. Raises ValueError if they do not suit."""
    types = store.types[readable]
    low, high = float(store.low[readable].min()), float(store.high[readable].max())
    names, first = np.unique(types, return_index=True)
    if len(names) > 1 and value_range is None:
        counts = ", ".join(
            f"{int((types == name).sum())} of {name}, such as {found.names[int(k)]}"
            for name, k in zip(names, first, strict=True)
        )
        raise ValueError(
            f"the images {found.place} have values of different types ({counts}); convert them to one type, or set "
            f"'data.value_range=[{low:g},{high:g}]' if their values have the same meaning"
        )
    dtype = str(names[0]) if len(names) == 1 else "float32"
    limits = find_limits(value_range, dtype, low, high)
    if value_range is None:
        warn_of_outliers(store.pixels, limits)
    return dtype, limits


def _probe(
    found: EncodedImages, spec: ImageSpec, value_range: Sequence[float] | None
) -> tuple[str, tuple[float, float]]:
    """Return the type of the first readable image, and its range if that does not need all images.

    Raises DataReadError if none is readable, and ValueError if the range needs all.
    """
    errors: dict[int, str] = {}
    for k in range(len(found)):
        image, errors[k] = try_load(found, spec, k)
        if image is None:
            continue
        if value_range is not None:
            return image.type, as_range(value_range)
        if image.type not in ("bool", "uint8"):
            raise ValueError(
                f"data.cache=false does not measure the values of {image.type} images; set "
                "'data.value_range=[low,high]', or data.cache=true"
            )
        return image.type, infer_range(image.type, image.low, image.high)
    check_readable(found, errors, skip_unreadable=False)
    raise AssertionError("check_readable raises if no image is readable")
