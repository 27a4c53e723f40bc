"""Signals, volumes and other arrays: one NumPy file, or a folder or archive of NumPy, audio or NIfTI files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from src.data.array_files import (
    AUDIO_SUFFIXES,
    KINDS,
    arrange,
    array_suffix,
    names_in_npz,
    open_numpy,
    read_file,
)
from src.data.array_folders import find_arrays, labels_beside, labels_of_files, one_file, read_labels
from src.data.array_source import ArraySource, describe_array, measure
from src.data.array_store import decode_all, mix
from src.data.decoded import Array
from src.data.fit import find_limits, spatial_size, warn_of_outliers
from src.data.found_images import FoundImages, describe
from src.data.image_source import check_readable
from src.data.images import ImageDataModule
from src.data.layout import class_by_pattern, class_folders
from src.data.module import Coupling
from src.data.npz import ChosenArrays, choose_arrays
from src.data.sources import to_uint8
from src.data.table_files import labels_from_names
from src.errors import DataReadError, counted, first_names, format_override

MAX_VALUES = 65536
"""Largest number of integer values for a discrete likelihood; data with more values are treated as continuous."""


@dataclass(eq=False)
class Arrays:
    """Opens arrays as a source (`OpenImages`): one .npy or .npz file of all samples, or one file per sample.

    Args:
        labels: the class of each sample: a .npy file of integers (N,), the name of such an array in the .npz file of
            all samples, or a table with the column `label`, and for one file per sample the column `file`. None uses
            the subfolders as classes if there are two or more, and the labels in an .npz file, see `choose_arrays`.
        class_pattern: a regular expression with one group, which matches the class in the path of a file.
        key: the name of the array, for .npz files with several. None chooses by the names, see `choose_arrays`.
        length: the length of signals: longer ones are cut, shorter ones are zero-padded at the end.
        masks: use masks beside images, see `src.data.masks`, as samples; False leaves them out.

    A file of one sample has the shape (C, *size) or `size`. Images and volumes of another size are resampled; signals
    are cut or zero-padded. Opening raises FileNotFoundError if there are no files, DataReadError for unreadable files,
    and ValueError for unsupported shapes, types and values.
    """

    labels: str | None = None
    class_pattern: str | None = None
    key: str | None = None
    length: int | None = None
    masks: bool = False

    def shape(self, root: Any, channels: int | None, image_size: int | Sequence[int] | None) -> tuple[int, ...]:
        """Return the shape (C, *size) of a sample from the settings; those that are None come from the first file."""
        size = self._size(image_size)
        if channels is not None and size is not None:
            return (channels, *size)
        if (path := one_file(root, self.labels)) is not None:
            first_array = open_numpy(path, self._choose(path).samples[0])
            return arrange(path, first_array, channels, size, batched=True).shape[1:]
        found = find_arrays(root, None, self.labels, self.masks)
        first: DataReadError | None = None
        for k in range(len(found)):
            try:
                values = read_file(found, k, self.key).values
            except DataReadError as error:
                first = first or error
                continue
            got = arrange(found.path(k), mix(found.names[k], values, channels), channels, size, batched=False).shape
            return (got[0], *(size or got[1:]))
        cause, _, fix = str(first).removesuffix(")").partition("; ")
        fix = fix or "set data.root to other files"
        raise DataReadError(f"none of the {len(found)} files under {found.root} can be read: {cause}); {fix}")

    def __call__(
        self,
        root: Any,
        image_size: int | Sequence[int],
        channels: int,
        prepare: bool = False,
        *,
        value_range: Sequence[float] | None = None,
        skip_unreadable: bool | float = False,
        cache_dir: str | None = None,
        val_root: str | None = None,
        affine: Any = None,
    ) -> ArraySource:
        """Return the samples below `root`, of this shape.

        Args:
            prepare: unused; files are decoded when they are missing in the cache.
            value_range: the values that map to -1 and 1; None infers them.
            skip_unreadable: leave out unreadable files: True up to a tenth of all, a number up to that share.
            cache_dir: the folder for the decoded samples of many files; None is below the user's cache folder.
            val_root: the folder or archive of the validation samples. None uses a validation folder in the root if
                there is one, else the fraction `data.val_fraction`.
            affine: the affine (4, 4) to whose axes volumes are turned; None takes that of the first file.
        """
        size = self._size(image_size)
        assert size is not None
        if (path := one_file(root, self.labels)) is None:
            found = find_arrays(root, val_root, self.labels, self.masks)
            return self._open_many(found, channels, size, value_range, skip_unreadable, cache_dir, affine)
        if val_root is not None:
            raise ValueError(
                f"{format_override('data.val_root', val_root)} is for one file per sample, and {path} has all samples; "
                "leave it out (data.val_fraction sets the share for validation), or save one file per sample"
            )
        return self._open_one(path, channels, size, value_range)

    def _size(self, image_size: int | Sequence[int] | None) -> tuple[int, ...] | None:
        size = None if image_size is None else spatial_size(image_size)
        if self.length is None:
            return size
        if size not in (None, (self.length,)):
            raise ValueError(f"data.source.length={self.length} contradicts data.image_size={image_size}; leave one")
        return spatial_size([self.length])

    def _choose(self, path: Path) -> ChosenArrays:
        names = names_in_npz(path) or []
        labels = self.labels if self.labels in names else None
        return choose_arrays(names, self.key, labels) or ChosenArrays([self.key], [], [])

    def _read_labels(self, path: Path, arrays: Sequence[str], counts: Sequence[int]) -> list[str] | None:
        """Return the class of each sample, from `arrays` of the file or from the file `labels`; None without."""
        if self.labels is not None and self.labels not in arrays:
            return read_labels(path.parent / self.labels, sum(counts))
        each = [read_labels(path, count, array) for array, count in zip(arrays, counts, strict=False)]
        return [name for names in each for name in names] or None

    def _open_one(
        self, path: Path, channels: int, size: tuple[int, ...], value_range: Sequence[float] | None
    ) -> ArraySource:
        chosen = self._choose(path)
        open_array = partial(_open_arranged, path, chosen.samples, channels, size)
        array = open_array()
        limits = find_limits(value_range, array.dtype.name, *measure(path, array))
        if value_range is None:
            warn_of_outliers(array, limits)
        num_train = len(array) if len(chosen.samples) == 1 else len(open_numpy(path, chosen.samples[0]))
        counts = [num_train, len(array) - num_train]
        labels, text = None, f"{counted(len(array), KINDS[len(size)])} in {path.name}"
        val_mask = None
        if counts[1]:
            val_mask = np.arange(len(array)) >= num_train
            text += f" ({counts[1]:,} for validation)"
        unused = chosen.unused
        try:
            names = self._read_labels(path, chosen.labels, counts)
        except ValueError:
            if self.labels is not None:
                raise
            names, unused = None, [*chosen.labels, *unused]
        if names is not None:
            labels = labels_from_names(names)
            of = chosen.labels[0] if chosen.labels else Path(str(self.labels)).name
            text += f", {counted(len(labels.classes), 'class')} from {of}"
        text += describe_array(array, limits) + _guessed_channels(array)
        if unused:
            text += f"; arrays not used: {first_names(unused)}"
        if labels is None and (files := labels_beside(path)):
            text += f"; not used: {first_names(files)} (add {format_override('data.source.labels', files[0])})"
        header = {"one_file": True}
        return ArraySource(open_array, path, None, labels, None, val_mask, None, limits, ".npy", header, text, {})

    def _open_many(
        self,
        found: FoundImages,
        channels: int,
        size: tuple[int, ...],
        value_range: Sequence[float] | None,
        skip_unreadable: bool | float,
        cache_dir: str | None,
        affine: Any,
    ) -> ArraySource:
        classes: Sequence[str] | None = None
        if self.labels is not None:
            classes = labels_of_files(self.labels, found)
        elif self.class_pattern is not None:
            classes = class_by_pattern(found, self.class_pattern)
        else:
            found, classes = class_folders(found)
        folder = decode_all(found, channels, size, self.key, cache_dir, affine)
        about = json.loads((folder / "about.json").read_text())
        errors = {int(k): str(reason) for k, reason in about["errors"].items()}
        check_readable(found, errors, skip_unreadable, "files")
        keep = np.array([k not in errors for k in range(len(found))])
        suffix = array_suffix(found.names[int(np.flatnonzero(keep)[0])])
        text = describe(found, classes, KINDS[len(size)])
        kept = found.keep(keep, "unreadable")
        labels = None if classes is None else labels_from_names(classes[k] for k in np.flatnonzero(keep))
        path = folder / "samples.npy"
        open_array = partial(np.load, path, mmap_mode="r")
        array = open_array()
        low, high = about["low"], about["high"]
        if suffix in AUDIO_SUFFIXES:  # so that silence maps to 0
            low, high = -max(-low, high), max(-low, high)
        limits = find_limits(value_range, array.dtype.name, low, high)
        if value_range is None:
            warn_of_outliers(array, limits)
        text += describe_array(array, limits)
        if changes := about.get("changes"):
            text += "; " + ", ".join(f"{count:,} {change}" for change, count in changes.items())
        text += f"; {len(errors):,} cannot be read" if errors else ""
        reasons = {str(found.path(k)): reason for k, reason in errors.items()}
        sizes: list[int] = kept.sizes.tolist()
        return ArraySource(
            open_array, path, np.flatnonzero(keep), labels, kept.ids(), kept.val_mask, sizes, limits, suffix,
            about["header"], text, reasons,
        )  # fmt: skip


class ArrayDataModule(ImageDataModule):
    """Signals (C, L), images (C, H, W) or volumes (C, D, H, W) of any values, float32 in [-1, 1] for the network.

    Args:
        source: opens the files below `root`.
        channels, image_size: shape of a sample; None infers it from the files.
        header: metadata of the files that written samples repeat: `sample_rate` of audio in Hz and its `subtype` if
            it is not PCM_16, `affine` (4, 4) of NIfTI files, from voxel indices to millimeters, or `one_file` if one
            file has all samples. None infers it from the files.
        skip_unreadable, cache_dir, val_root: see `Arrays.__call__`.

    The other arguments are those of `ImageDataModule`.
    """

    inferred_settings: ClassVar[Sequence[str]] = (
        *ImageDataModule.inferred_settings,
        "channels",
        "image_size",
        "header",
    )

    def __init__(
        self,
        source: Arrays,
        root: Any,
        channels: int | None = None,
        image_size: int | Sequence[int] | None = None,
        value_range: Sequence[float] | None = None,
        dtype: str | None = None,
        file_type: str | None = None,
        header: Mapping[str, Any] | None = None,
        flip: bool = False,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        microbatch_size: int | Literal["auto"] | None = None,
        skip_unreadable: bool | float = False,
        cache_dir: str | None = None,
        val_root: str | None = None,
        balance_classes: bool = False,
        coupling: Coupling = "independent",
    ) -> None:
        channels, *size = source.shape(root, channels, image_size)
        settings: dict[str, Any] = {"skip_unreadable": skip_unreadable, "cache_dir": cache_dir, "val_root": val_root}
        settings["affine"] = (header or {}).get("affine")
        super().__init__(
            partial(source, value_range=value_range, **settings), root, channels, size, value_range=value_range,
            dtype=dtype, file_type=file_type, flip=flip, batch_size=batch_size, val_fraction=val_fraction,
            split_seed=split_seed, seed=seed, num_workers=num_workers, microbatch_size=microbatch_size,
            skip_unreadable=bool(skip_unreadable), balance_classes=balance_classes, coupling=coupling,
        )  # fmt: skip
        self.header = header

    @property
    def num_values(self) -> int | None:  # type: ignore[override]
        """The number of possible values of integer data; None for floats and for more than 65,536 values."""
        count = super().num_values
        return None if count is None or count > MAX_VALUES else count

    @property
    def inferred(self) -> Mapping[str, Any]:
        values = super().inferred
        channels, *size = self.shape
        return {**values, "channels": channels, "image_size": size, "header": self.header}

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.header is None:
            self.header = getattr(self.source, "header", None)

    def postprocess(self, x: Tensor) -> Tensor:
        """Return samples for display, uint8: signals with all channels; others with 1 of 2, or 3 of more channels."""
        shown = to_uint8(x, min(self.num_values or 256, 256))
        count = self.shape[0]
        if len(self.shape) == 2 or count in (1, 3):
            return shown
        return shown[:, : 1 if count == 2 else 3]


def _guessed_channels(array: Array) -> str:
    """Return the part of the summary that says how to read an array (N, C, *size) whose axis 1 may be no channels."""
    _, channels, *size = array.shape
    many = channels > 4 and array.dtype.kind in "bui"
    if channels == 1 or len(size) > 2 or not (many or size == [channels]):
        return ""
    kind = KINDS[len(size) + 1]
    return f"; axis 1 is read as {channels} channels: if the samples are {kind}s of one channel, add data.channels=1"


def _open_arranged(path: Path, keys: Sequence[str | None], channels: int, size: tuple[int, ...]) -> Array:
    arrays = [arrange(path, open_numpy(path, key), channels, size, batched=True) for key in keys]
    if different := next((each.shape[2:] for each in arrays if each.shape[2:] != size), None):
        raise ValueError(
            f"data.image_size={list(size)} is not {list(different)}, that of {path}; leave it out, or save one "
            "file per sample, which are resampled"
        )
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
