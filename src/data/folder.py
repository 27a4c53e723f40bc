"""Folders and archives of images as a source."""

import posixpath
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from src.data.decode import ARRAY_SUFFIXES, Pages, image_suffixes, looks_like_image
from src.data.encoded import EncodedImages
from src.data.fit import (
    Fit,
    ImageSpec,
    as_range,
    bucket_sizes,
    crop_at,
    describe_sizes,
    find_limits,
    height_and_width,
)
from src.data.frames import FrameImages, describe_frames, split_frames
from src.data.images import ImageDataModule
from src.data.label_table import read_label_table
from src.data.layout import Depth
from src.data.multi_file import combine, describe_channels
from src.data.overlap import check_overlap
from src.data.pixel_store import PixelStore, default_cache_dir, load_sample, open_pixels
from src.data.read_errors import read_with_retries
from src.data.repeats import check_repeats, repeat_indices
from src.data.scan import (
    FoundImages,
    class_by_pattern,
    class_folders,
    describe,
    describe_depth,
    find_images,
    join,
)
from src.data.sources import Covariates, Labels, Source
from src.data.table_files import FILE_COLUMNS, labels_from_names
from src.errors import DataReadError, first_names
from src.quoting import format_override

MAX_SKIPPED = 0.1
"""Largest share of images that `skip_unreadable=true` leaves out; a number sets another share."""


class FolderImages:
    """A source of image files, decoded once into `store`, or at every access if that is None.

    `value_range` is the range of the values that `fetch` returns, `dtype` their type in the files, and `suffix` the
    ending of most of the first 1,000 files. `summary` describes the dataset in one line. `unreadable` has the reason
    for each image that was left out.
    """

    def __init__(
        self,
        found: EncodedImages,
        spec: ImageSpec,
        store: PixelStore | None,
        labels: Labels | None,
        captions: Sequence[Sequence[str]] | None,
        value_range: tuple[float, float],
        dtype: str,
        summary: str,
        unreadable: dict[str, str],
    ) -> None:
        self.found = found
        self.spec = spec
        self.store = store
        self.rows = np.arange(len(found)) if store is None else np.flatnonzero(store.ok)
        self.labels = labels
        self.covariates: Covariates | None = None
        self.captions = captions
        self.ids: Sequence[str] | None = found.ids()
        self.val_mask = found.val_mask
        self.value_range = value_range
        self.dtype = dtype
        self.summary = summary
        self.unreadable = unreadable

    @property
    def suffix(self) -> str:
        endings = Counter(posixpath.splitext(name)[1].lower() for name in self.found.names[:1000])
        return endings.most_common(1)[0][0]

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
        return torch.stack([read_with_retries(str(self.found.path(i)), partial(self._load, i)) for i in indices])

    def _load(self, index: int) -> Tensor:
        pixels = load_sample(self.found, self.spec, index).pixels
        if self.dtype != pixels.dtype.name and "uint8" in (self.dtype, pixels.dtype.name):
            raise ValueError(f"its values have type {pixels.dtype}, and those of other images {self.dtype}")
        return torch.from_numpy(pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32))


class RandomCrops(FolderImages):
    """Images that cover the wanted size and are cropped: at random by `fetch_training`, in the center by `fetch`."""

    def fetch(self, indices: Sequence[int]) -> Tensor:
        return self._crop(indices, [None] * len(indices))

    def fetch_training(self, indices: Sequence[int], keys: Sequence[int]) -> Tensor:
        return self._crop(indices, keys)

    def _crop(self, indices: Sequence[int], places: Sequence[int | None]) -> Tensor:
        crops = [crop_at(self._image(i), self.spec.size, k) for i, k in zip(indices, places, strict=True)]
        return torch.from_numpy(np.stack(crops))

    def _image(self, index: int) -> npt.NDArray[Any]:
        if self.store is not None:
            return self.store.image(int(self.rows[index]))
        return read_with_retries(str(self.found.path(index)), partial(self._load, index)).numpy()


class BucketedImages(FolderImages):
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
        self.summary += f"; trained as {used}"
        return self

    def fetch_training(self, indices: Sequence[int], keys: Sequence[int]) -> Tensor:
        """Return images of one bucket."""
        return torch.from_numpy(np.stack([self.shaped.image(int(self.rows[i])) for i in indices]))


class OpenFiles(Protocol):
    """Opens a source of image files: `folder`, or a function with these arguments."""

    def __call__(
        self,
        root: Any,
        image_size: int | Sequence[int],
        channels: int,
        prepare: bool = False,
        *,
        value_range: Sequence[float] | None = None,
        skip_unreadable: bool | float = False,
        cache: bool = True,
        cache_dir: str | None = None,
        val_root: Any = None,
    ) -> Source: ...


class FolderDataModule(ImageDataModule):
    """Images of files.

    Args:
        source: opens the files under `root` with the settings below.
        val_root: the folder of the validation images, see `folder`.
        skip_unreadable: leave out images that cannot be read, see `folder`.
        cache, cache_dir: decode all images once, into this folder, see `folder`.
        repeats: how often an epoch of training has the images of each of several roots; None has all once.

    The other arguments are those of `ImageDataModule`.
    """

    def __init__(
        self,
        source: OpenFiles,
        root: Any,
        channels: int,
        image_size: int | Sequence[int],
        num_values: int | None = None,
        value_range: Sequence[float] | None = None,
        dtype: str | None = None,
        file_type: str | None = None,
        flip: bool = False,
        vertical_flip: bool = False,
        rotations: bool = False,
        color_jitter: Mapping[str, float] | None = None,
        edm_augment: float = 0.0,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        microbatch_size: int | Literal["auto"] | None = None,
        skip_unreadable: bool | float = False,
        balance_classes: bool = False,
        val_root: str | Sequence[str] | None = None,
        cache: bool = True,
        cache_dir: str | None = None,
        repeats: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            partial(
                source,
                value_range=value_range,
                skip_unreadable=skip_unreadable,
                cache=cache,
                cache_dir=cache_dir,
                val_root=val_root,
            ),
            root,
            channels,
            image_size,
            num_values,
            value_range,
            dtype,
            file_type,
            flip,
            vertical_flip,
            rotations,
            color_jitter,
            edm_augment,
            batch_size,
            val_fraction,
            split_seed,
            seed,
            num_workers,
            microbatch_size,
            bool(skip_unreadable),
            balance_classes,
        )
        self.repeats = check_repeats(repeats, root)

    def training_indices(self) -> list[int]:
        if self.repeats is None or self.source is None:
            return self.train_indices
        return repeat_indices(self.train_indices, getattr(self.source, "found", None), self.repeats)


def refuse_val_root(val_root: str | None, fix: str) -> None:
    """Raise ValueError if a folder for validation is set for a source that takes none."""
    if val_root is not None:
        raise ValueError(f"{format_override('data.val_root', val_root)} is for folders; {fix}")


def folder(
    root: str | Sequence[str] | None,
    image_size: int | Sequence[int],
    channels: int,
    prepare: bool = False,
    *,
    labels: str | None = None,
    file_column: str | None = None,
    label_column: str | None = None,
    class_pattern: str | None = None,
    class_depth: Depth = 1,
    condition_columns: Sequence[str] = (),
    channel_pattern: str | None = None,
    channel_names: Sequence[str] | None = None,
    fit: Fit = "crop",
    background: str = "white",
    pages: Pages = "first",
    value_range: Sequence[float] | None = None,
    skip_unreadable: bool | float = False,
    cache: bool = True,
    cache_dir: str | None = None,
    val_root: str | None = None,
) -> FolderImages:
    """Open every image under `root`, a folder or a zip or tar file, in order of their names.

    Args:
        root: the folder or archive, or several.
        image_size: of the images that are returned, in pixels: one number or (H, W).
        channels: of the images that are returned.
        prepare: unused; images are decoded when the source is opened first.
        labels: a table (absolute, or relative to each root that has it) of files and their classes. Without it, the
            subfolders of `root` are the classes if there are two or more and hold all images.
        file_column, label_column: columns of this table; None takes the first of `FILE_COLUMNS`, and `label`.
        class_pattern: a regular expression with one group that finds the class in the relative path of an image.
        class_depth: the number of folders, from the top, whose names are the class of an image; `all` takes the path.
        condition_columns: columns of numbers in `labels`, for conditioning=continuous.
        channel_pattern, channel_names: the files that are the channels of one image, see `src.data.multi_file.combine`.
        fit, background, pages: how images become (channels, H, W): see `ImageSpec`.
        value_range: the values that become -1 and 1; None finds them.
        skip_unreadable: leave out images that cannot be read, up to a tenth of all, or up to this share.
        cache: decode all images once, into `cache_dir`; None is below the user's cache folder.
        val_root: the folder or archive of the validation images. None takes a folder for validation in `root`, or
            the fraction `data.val_fraction`.

    Raises:
        FileNotFoundError: If the folder or file does not exist.
        ValueError: If there are no images, unreadable ones, images without a class in the CSV file, images of different
            types, or values that are constant or use little of their range.
    """
    found = find(root, val_root, pages, channel_pattern, channel_names)
    if labels is not None and class_pattern is not None:
        raise ValueError(f"data.source.labels={labels} and data.source.class_pattern exclude each other; remove one")
    if condition_columns and labels is None:
        setting = format_override("data.source.condition_columns", list(condition_columns))
        raise ValueError(f"{setting} needs a table of files and numbers; set data.source.labels to its name")
    classes: Sequence[str] | None
    about, covariates = "", None
    if labels is not None:
        columns = (file_column,) if file_column else FILE_COLUMNS, label_column, condition_columns
        classes, covariates = read_label_table(labels, found, *columns)
        found = found.without_used([labels])
    elif class_pattern is not None:
        classes = class_by_pattern(found, class_pattern)
    else:
        found, classes = class_folders(found, class_depth)
        about = describe_depth(found, class_depth)
    spec = ImageSpec(height_and_width(image_size), channels, fit, background, pages)
    about += describe_channels(found) + describe_frames(found)
    source = open_images(found, spec, classes, None, value_range, skip_unreadable, cache, cache_dir, about)
    if covariates is not None:
        source.covariates = covariates._replace(values=covariates.values[torch.from_numpy(source.rows)])
    return source


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
) -> FolderImages:
    """Return images as a source, after decoding them if `cache` is true. Raises as `folder` does.

    `classes` are the class of each image, or labels whose classes have an order of their own. `about` is appended to
    the summary.
    """
    if spec.pages == "samples" and not isinstance(found, FrameImages):
        raise ValueError("data.source.pages=samples is for data=folder and data=captions; set first or channels")
    bucketed = spec if spec.fit == "buckets" else None
    spec = spec._replace(fit="crop") if bucketed else spec
    store = _open_store(found, spec, cache_dir) if cache else None
    shaped = _open_store(found, bucketed, cache_dir) if bucketed and store else None
    if bucketed and shaped is None:
        raise ValueError(
            "data.source.fit=buckets needs data.cache=true and a data.cache_dir with enough space; set both"
        )
    unreadable: dict[str, str] = {}
    keep = np.ones(len(found), bool)
    if store is not None:
        unreadable = {str(found.path(k)): reason for k, reason in store.errors.items()}
        keep = store.ok
        check_readable(found, store.errors, skip_unreadable)
    names = [classes.classes[k] for k in classes.targets.tolist()] if isinstance(classes, Labels) else classes
    text = describe(found, names)
    chosen = np.flatnonzero(keep).tolist()
    kept = found.keep(keep, "unreadable")
    labels = None
    if isinstance(classes, Labels):
        labels = Labels(classes.targets[torch.from_numpy(keep)], classes.classes)
    elif classes is not None:
        labels = labels_from_names(classes[k] for k in chosen)
    captions = None if captions is None else [captions[k] for k in chosen]
    if store is None:
        dtype, limits = _probe(kept, spec, value_range)
    else:
        dtype, limits = _measure(kept, store, keep, value_range)
        text += describe_sizes(store.sizes[keep], store.frames[keep], spec, dtype, limits)
        text += f"; {len(unreadable):,} cannot be read" if unreadable else ""
    arguments = (kept, spec, store, labels, captions, limits, dtype, text + about, unreadable)
    if shaped is not None:
        return BucketedImages(*arguments).in_buckets(shaped)
    return RandomCrops(*arguments) if spec.fit == "random_crop" else FolderImages(*arguments)


def find(
    root: str | Sequence[str] | None,
    val_root: str | None = None,
    pages: Pages = "first",
    channel_pattern: str | None = None,
    channel_names: Sequence[str] | None = None,
) -> FoundImages:
    """Return the images under `root` and `val_root`, each of one file, of several, or a frame of one.

    Images of `val_root` below `root` are for validation only. Raises FileNotFoundError if one is neither a folder nor
    an archive, and ValueError if one has no images, or if they have the same files.
    """
    roots = [root] if root is None or isinstance(root, str) else list(root)
    check_overlap(roots, val_root)
    parts = [_find_one(each, "data.root", val_root) for each in roots or [None]]
    found = join(parts, None if val_root is None else _find_one(val_root, "data.val_root"))
    if channel_pattern is None:
        return split_frames(found) if pages == "samples" else found
    if pages == "samples":
        raise ValueError("data.source.channel_pattern excludes data.source.pages=samples; leave one out")
    return combine(found, channel_pattern, channel_names)


def _find_one(root: str | None, name: str, val_root: str | None = None) -> FoundImages:
    path = Path(root or "")
    setting = format_override(name, path.resolve() if root else None)
    fix = f"set {name} to the folder, zip or tar file with your images"
    if root is None or not path.exists():
        raise FileNotFoundError(f"{setting} does not exist; {fix}")
    suffix = path.suffix.lower()
    if path.is_file() and (suffix in image_suffixes() - ARRAY_SUFFIXES or looks_like_image(path)):
        parent = format_override(name, path.resolve().parent)
        raise FileNotFoundError(f"{setting} is one image; set {parent}, the folder with it")
    try:
        return find_images(path, val_root=None if val_root is None else Path(val_root))
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{setting}: {error}; {fix}") from error


def _open_store(found: EncodedImages, spec: ImageSpec, cache_dir: str | None) -> PixelStore | None:
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    try:
        return open_pixels(found, spec, folder)
    except DataReadError:
        raise
    except OSError as error:
        setting = format_override("data.cache_dir", folder)
        warnings.warn(f"{setting} cannot hold the decoded images ({error}); decoding them in each epoch", stacklevel=2)
        return None


def check_readable(
    found: EncodedImages, unreadable: Mapping[int, str], skip_unreadable: bool | float, noun: str = "images"
) -> None:
    """Raise DataReadError for images that cannot be read, unless as few as `skip_unreadable` allows."""
    share = MAX_SKIPPED if skip_unreadable is True else float(skip_unreadable)
    if not unreadable:
        return
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
    found: EncodedImages, store: PixelStore, keep: npt.NDArray[np.bool_], value_range: Sequence[float] | None
) -> tuple[str, tuple[float, float]]:
    """Return the type and the range of values of the readable images. Raises ValueError if they do not suit."""
    types = store.types[keep]
    low, high = float(store.low[keep].min()), float(store.high[keep].max())
    names, first = np.unique(types, return_index=True)
    if len(names) > 1 and value_range is None:
        counts = ", ".join(
            f"{int((types == name).sum())} of {name}, such as {found.names[int(k)]}"
            for name, k in zip(names, first, strict=True)
        )
        raise ValueError(
            f"the images {found.place} have values of different types ({counts}); convert them to one type, or set "
            f"data.value_range=[{low:g},{high:g}] if their values have the same meaning"
        )
    dtype = str(names[0]) if len(names) == 1 else "float32"
    return dtype, find_limits(value_range, dtype, low, high)


def _probe(
    found: EncodedImages, spec: ImageSpec, value_range: Sequence[float] | None
) -> tuple[str, tuple[float, float]]:
    """Return the type of the first readable image, and its range if that does not need all images."""
    for k in range(len(found)):
        try:
            dtype = load_sample(found, spec, k).type
        except (OSError, ValueError, SyntaxError):
            continue
        if value_range is None and dtype != "uint8":
            raise ValueError(
                f"data.cache=false does not measure the values of {dtype} images; set data.value_range=[low,high], or "
                "data.cache=true"
            )
        return dtype, (0.0, 255.0) if value_range is None else as_range(value_range)
    count = len(found)
    raise DataReadError(
        f"{count} of {count} images {found.place} cannot be read; check the first of them, {found.path(0)}"
    )
