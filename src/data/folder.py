"""Folders and archives of images as a source."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from src.data.decode import ARRAY_SUFFIXES, image_suffixes, looks_like_image
from src.data.decoded import Pages
from src.data.fit import Fit, ImageSpec, height_and_width
from src.data.found_images import FoundImages, join, without_linked
from src.data.frames import describe_frames, split_frames
from src.data.image_source import ImageSource, open_images
from src.data.images import ImageDataModule
from src.data.label_table import find_tables, read_label_table
from src.data.layout import Depth, class_by_pattern, class_folders, describe_folders
from src.data.module import Coupling
from src.data.multi_file import combine, describe_channels
from src.data.overlap import check_overlap
from src.data.scan import find_in
from src.data.sources import Covariates, Source, describe_conditions
from src.data.table_files import FILE_COLUMNS
from src.errors import format_override


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
        coupling: Coupling = "independent",
    ) -> None:
        files: dict[str, Any] = {"cache": cache, "cache_dir": cache_dir, "val_root": val_root}
        open_files = partial(source, value_range=value_range, skip_unreadable=skip_unreadable, **files)
        super().__init__(
            open_files, root, channels, image_size, num_values, value_range, dtype, file_type, flip, vertical_flip,
            rotations, color_jitter, edm_augment, batch_size, val_fraction, split_seed, seed, num_workers,
            microbatch_size, bool(skip_unreadable), balance_classes, coupling,
        )  # fmt: skip
        self.repeats = check_repeats(repeats, root)

    def training_indices(self) -> list[int]:
        if self.repeats is None or self.source is None:
            return self.train_indices
        return repeat_indices(self.train_indices, getattr(self.source, "found", None), self.repeats)


def check_repeats(repeats: Sequence[int] | None, root: Any) -> list[int] | None:
    """Return `data.repeats`. Raises ValueError unless it has an integer of at least 1 for each root."""
    if repeats is None:
        return None
    roots = 1 if root is None or isinstance(root, str) else len(root)
    counts = list(repeats) if isinstance(repeats, Sequence) else [repeats]
    if len(counts) != roots or not all(isinstance(count, int) and count >= 1 for count in counts):
        raise ValueError(
            f"{format_override('data.repeats', repeats)} must have an integer of at least 1 for each of the "
            f"{roots} folders of data.root; change it, or leave it out"
        )
    return counts


def repeat_indices(indices: Sequence[int], found: object, repeats: Sequence[int]) -> list[int]:
    """Return each index as often as `repeats` says for its root. Raises ValueError for images without folders."""
    if not isinstance(found, FoundImages):
        raise ValueError("data.repeats is for folders of images; leave it out")
    which = found.which.tolist()
    return [index for index in indices for _ in range(repeats[which[index]])]


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
    masks: bool = False,
    fit: Fit = "crop",
    background: str = "white",
    pages: Pages = "first",
    value_range: Sequence[float] | None = None,
    skip_unreadable: bool | float = False,
    cache: bool = True,
    cache_dir: str | None = None,
    val_root: str | None = None,
) -> ImageSource:
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
        masks: use masks, depth maps and degraded versions beside images, see `src.data.masks`; False leaves them out.
        fit, background, pages: how images become (channels, H, W): see `ImageSpec`.
        value_range: the values that become -1 and 1; None finds them.
        skip_unreadable: leave out images that cannot be read, up to a tenth of all, or up to this share.
        cache: decode all images once, into `cache_dir`; None is below the user's cache folder.
        val_root: the folder or archive of the validation images. None takes a folder for validation in `root`, or
            the fraction `data.val_fraction`.

    Raises FileNotFoundError if the folder or file does not exist, DataReadError if images cannot be read, unless
    `skip_unreadable` allows it, and ValueError if there are no images, images without a class in the table, images of
    different types, or values that are constant or use little of their range.
    """
    if labels is not None and class_pattern is not None:
        raise ValueError(f"data.source.labels={labels} and data.source.class_pattern exclude each other; remove one")
    if labels is None:
        columns = {"file_column": file_column, "label_column": label_column, "condition_columns": condition_columns}
        refuse_columns(columns, "data.source.labels")
    found = find(root, val_root, pages, channel_pattern, channel_names, masks)
    classes: Sequence[str] | None
    covariates: Covariates | None = None
    about = ""
    if labels is not None:
        tables = find_tables(labels, found)
        file_columns = (file_column,) if file_column else FILE_COLUMNS
        classes, covariates = read_label_table(tables, found, file_columns, label_column, condition_columns)
        found = found.without_used(tables)
        if covariates is not None:
            about = f"; {describe_conditions(covariates.names)} from {Path(labels).name}"
    elif class_pattern is not None:
        classes = class_by_pattern(found, class_pattern)
    else:
        found, classes = class_folders(found, class_depth)
        about = describe_folders(found, classes, class_depth)
    spec = ImageSpec(height_and_width(image_size), channels, fit, background, pages)
    about += describe_channels(found) + describe_frames(found)
    source = open_images(found, spec, classes, None, value_range, skip_unreadable, cache, cache_dir, about)
    if covariates is not None:
        source.covariates = covariates._replace(values=covariates.values[torch.from_numpy(source.rows)])
    return source


def refuse_columns(columns: Mapping[str, str | Sequence[str] | None], table_setting: str) -> None:
    """Raise ValueError for columns, by the names of their settings, without a table."""
    for name, value in columns.items():
        if value:
            setting = format_override(f"data.source.{name}", value)
            raise ValueError(f"{setting} needs a table; set {table_setting} to its name")


def find(
    root: str | Sequence[str] | None,
    val_root: str | None = None,
    pages: Pages = "first",
    channel_pattern: str | None = None,
    channel_names: Sequence[str] | None = None,
    masks: bool = False,
) -> FoundImages:
    """Return the images under `root` and `val_root`, each of one file, of several, or a frame of one.

    Images of `val_root` below `root` are for validation only. Masks are left out unless `masks` is true, or the pattern
    may join them to images. Raises FileNotFoundError if one is neither a folder nor
    an archive, and ValueError if one has no images, or if they have the same files.
    """
    roots = [root] if root is None or isinstance(root, str) else list(root)
    check_overlap(roots, val_root)
    if channel_names is not None and channel_pattern is None:
        setting = format_override("data.source.channel_names", channel_names)
        raise ValueError(f"{setting} needs data.source.channel_pattern, such as '_(B[0-9]+)'; set it")
    masks = masks or channel_pattern is not None
    parts = [_find_one(each, "data.root", masks, val_root) for each in roots or [None]]
    found = without_linked(join(parts, None if val_root is None else _find_one(val_root, "data.val_root", masks)))
    if channel_pattern is None:
        return split_frames(found) if pages == "samples" else found
    if pages == "samples":
        raise ValueError("data.source.channel_pattern excludes data.source.pages=samples; leave one out")
    return combine(found, channel_pattern, channel_names)


def _find_one(root: str | None, name: str, masks: bool, val_root: str | None = None) -> FoundImages:
    path = Path(root or "")
    suffix = path.suffix.lower()
    if path.is_file() and (suffix in image_suffixes() - ARRAY_SUFFIXES or looks_like_image(path)):
        setting, parent = (format_override(name, each) for each in (path.resolve(), path.resolve().parent))
        raise FileNotFoundError(f"{setting} is one image; set {parent}, the folder with it")
    fix = f"set {name} to the folder, zip or tar file with your images"
    return find_in(root, name, fix, val_root, masks=masks)
