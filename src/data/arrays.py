"""Signals, volumes and other arrays: one NumPy file, or a folder or archive of NumPy, audio or NIfTI files."""

import gzip
import io
import json
import logging
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from src.data.decode import ARRAY_SUFFIXES, Array
from src.data.fit import find_limits, spatial_size
from src.data.folder import check_readable
from src.data.images import ImageDataModule
from src.data.label_table import classes_from_table
from src.data.pixel_store import default_cache_dir, store_key
from src.data.read_errors import read_with_retries
from src.data.scan import FoundImages, class_by_pattern, class_folders, describe, find_images, join
from src.data.sources import Covariates, Labels, to_uint8
from src.data.table_files import FILE_COLUMNS, first_names, labels_from_names, read_table
from src.errors import DataReadError
from src.quoting import format_override

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".aif", ".aiff"}
NIFTI_SUFFIXES = {".nii", ".nii.gz"}
KINDS = {1: "signals", 2: "images", 3: "volumes"}
CHUNK_BYTES = 64 * 2**20
"""Bytes of an array that are measured at a time."""
MAX_VALUES = 65536
"""Most integers that the likelihood counts; more are as good as continuous."""

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """What a file holds: `values` in the type of the file, and its `header` (`ArrayDataModule`)."""

    values: Array
    header: dict[str, Any]


class ArraySource:
    """Samples (N, C, *size) of an array in a file, which `open_array` maps into memory.

    `rows` are those of the array that are used. `value_range`, `dtype`, `suffix`, `header`, `summary` and `unreadable`
    are as in `FolderImages` and `ArrayDataModule`.
    """

    covariates: Covariates | None = None
    captions: Sequence[Sequence[str]] | None = None

    def __init__(
        self,
        open_array: Callable[[], Array],
        rows: Array | None,
        labels: Labels | None,
        ids: Sequence[str] | None,
        val_mask: Array | None,
        sizes: Sequence[int] | None,
        value_range: tuple[float, float],
        suffix: str,
        header: Mapping[str, Any] | None,
        summary: str,
        unreadable: dict[str, str],
    ) -> None:
        self.open_array = open_array
        self.array: Array | None = open_array()
        self.rows = rows
        self.labels = labels
        self.ids = ids
        self.val_mask = val_mask
        self.sizes = sizes
        self.value_range = value_range
        self.dtype = self.array.dtype.name
        self.suffix = suffix
        self.header = header
        self.summary = summary
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self._array()) if self.rows is None else len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "array": None}  # a process maps the file itself, instead of copying the array

    def stamps(self) -> Sequence[int] | None:
        """Return the sizes of the files; None for one file, since hashing all samples takes too long."""
        return self.sizes

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """Return samples (N, C, *size), uint8 for 8 bits and booleans, else float32."""
        chosen = np.asarray(indices, dtype=np.int64)
        values = self._array()[chosen if self.rows is None else self.rows[chosen]]
        return torch.from_numpy(values.astype(np.uint8 if values.dtype in (np.uint8, np.bool_) else np.float32))

    def _array(self) -> Array:
        if self.array is None:
            self.array = self.open_array()
        return self.array


class Arrays:
    """Opens arrays as a source (`OpenImages`): one .npy or .npz file of all samples, or one file per sample.

    Args:
        labels: the class of each sample: a .npy file of integers (N,), or a table with the column `label`, and for
            one file per sample the column `file`. None takes the subfolders if there are two or more.
        class_pattern: a regular expression with one group that finds the class in the path of a file.
        key: the array of an .npz file that has several.
        length: the length of signals, longer ones are cut to and shorter ones are filled up to with zeros.

    Files of one sample have the shape (C, *size) or `size`. Images and volumes of another size are resampled, signals
    cut or filled up. Opening raises FileNotFoundError without the files, DataReadError for unreadable ones, and
    ValueError for shapes, types and values that do not suit.
    """

    def __init__(
        self,
        labels: str | None = None,
        class_pattern: str | None = None,
        key: str | None = None,
        length: int | None = None,
    ) -> None:
        self.labels = labels
        self.class_pattern = class_pattern
        self.key = key
        self.length = length

    def shape(self, root: Any, channels: int | None, image_size: int | Sequence[int] | None) -> tuple[int, ...]:
        """Return the shape (C, *size) of a sample, from settings and where they are None from the first file."""
        size = self._size(image_size)
        if channels is not None and size is not None:
            return (channels, *size)
        if (path := one_file(root, self.labels)) is not None:
            return arrange(path, open_numpy(path, self.key), channels, size, batched=True).shape[1:]
        found = self._find(root, None)
        for k in range(len(found)):
            try:
                values = read_file(found, k, self.key).values
            except DataReadError:
                continue
            got = arrange(found.path(k), mix(found.names[k], values, channels), channels, size, batched=False).shape
            return (got[0], *(size or got[1:]))
        raise DataReadError(f"{len(found)} of {len(found)} files under {found.root} cannot be read; set data.root")

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
    ) -> ArraySource:
        """Return the samples below `root`, of this shape.

        Args:
            value_range: the values that become -1 and 1; None finds them.
            skip_unreadable: leave out files that cannot be read, up to a tenth of all, or up to this share.
            cache_dir: where one file per sample is decoded to, once; None is below the user's cache folder.
            val_root: the folder or archive of the validation samples. None takes a folder for validation in the root,
                or the fraction `data.val_fraction`.
        """
        size = self._size(image_size)
        assert size is not None
        if (path := one_file(root, self.labels)) is None:
            found = self._find(root, val_root)
            return self._open_many(found, channels, size, value_range, skip_unreadable, cache_dir)
        if val_root is not None:
            raise ValueError(f"data.val_root={val_root} is for one file per sample; use data.val_fraction")
        return self._open_one(path, channels, size, value_range)

    def _size(self, image_size: int | Sequence[int] | None) -> tuple[int, ...] | None:
        size = None if image_size is None else spatial_size(image_size)
        if self.length is None:
            return size
        if size not in (None, (self.length,)):
            raise ValueError(f"data.source.length={self.length} contradicts data.image_size={image_size}; leave one")
        return spatial_size([self.length])

    def _find(self, root: Any, val_root: str | None) -> FoundImages:
        roots = [root] if root is None or isinstance(root, str | Path) else list(root)
        parts = [_find_folder(each, "data.root") for each in roots or [None]]
        found = join(parts, None if val_root is None else _find_folder(val_root, "data.val_root"))
        return found if self.labels is None else found.keep([name != self.labels for name in found.names], "labels")

    def _open_one(
        self, path: Path, channels: int, size: tuple[int, ...], value_range: Sequence[float] | None
    ) -> ArraySource:
        open_array = partial(_open_arranged, path, self.key, channels, size)
        array = open_array()
        limits = find_limits(value_range, array.dtype.name, *measure(path, array))
        labels, counted = None, ""
        if self.labels is not None:
            labels = labels_from_names(_read_labels(path.parent / self.labels, len(array)))
            counted = f", {len(labels.classes)} classes"
        text = f"{len(array):,} {KINDS[len(size)]} in {path.name}{counted}" + _describe(array, limits)
        return ArraySource(open_array, None, labels, None, None, None, limits, ".npy", {"one_file": True}, text, {})

    def _open_many(
        self,
        found: FoundImages,
        channels: int,
        size: tuple[int, ...],
        value_range: Sequence[float] | None,
        skip_unreadable: bool | float,
        cache_dir: str | None,
    ) -> ArraySource:
        classes: Sequence[str] | None = None
        if self.labels is not None:
            classes = _labels_of_files(found.root / self.labels, found)
        elif self.class_pattern is not None:
            classes = class_by_pattern(found, self.class_pattern)
        else:
            found, classes = class_folders(found)
        folder = decode_all(found, channels, size, self.key, cache_dir)
        about = json.loads((folder / "about.json").read_text())
        errors = {int(k): str(reason) for k, reason in about["errors"].items()}
        check_readable(found, errors, skip_unreadable, "files")
        keep = np.array([k not in errors for k in range(len(found))])
        suffix = suffix_of(found.names[int(np.flatnonzero(keep)[0])])
        text = describe(found, classes, KINDS[len(size)])
        kept = found.keep(keep, "unreadable")
        labels = None if classes is None else labels_from_names(classes[k] for k in np.flatnonzero(keep))
        open_array = partial(np.load, folder / "samples.npy", mmap_mode="r")
        array = open_array()
        low, high = about["low"], about["high"]
        if suffix in AUDIO_SUFFIXES and array.dtype.kind == "i":  # silence is 0 inside, too
            low, high = -max(-low, high), max(-low, high)
        limits = find_limits(value_range, array.dtype.name, low, high)
        text += _describe(array, limits) + (f"; {len(errors):,} cannot be read" if errors else "")
        reasons = {str(found.path(k)): reason for k, reason in errors.items()}
        sizes: list[int] = kept.sizes.tolist()
        return ArraySource(
            open_array, np.flatnonzero(keep), labels, kept.ids(), kept.val_mask, sizes, limits, suffix,
            about["header"], text, reasons,
        )  # fmt: skip


class ArrayDataModule(ImageDataModule):
    """Signals (C, L), images (C, H, W) or volumes (C, D, H, W) of any values, float32 in [-1, 1] for the network.

    Args:
        source: opens the files below `root`.
        channels, image_size: shape of a sample; None takes those of the files.
        header: what written samples repeat of the files: `sample_rate` of audio in Hz, `affine` (4, 4) of NIfTI files,
            from positions to millimeters, or `one_file` if one file has all samples. None takes that of the files.

        skip_unreadable, cache_dir, val_root: see `Arrays.__call__`.

    The other arguments are those of `ImageDataModule`.
    """

    inferred_settings: ClassVar[Sequence[str]] = (
        "value_range",
        "dtype",
        "file_type",
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
    ) -> None:
        channels, *size = source.shape(root, channels, image_size)
        settings: dict[str, Any] = {"skip_unreadable": skip_unreadable, "cache_dir": cache_dir, "val_root": val_root}
        super().__init__(
            partial(source, value_range=value_range, **settings), root, channels, size, value_range=value_range,
            dtype=dtype, file_type=file_type, flip=flip, batch_size=batch_size, val_fraction=val_fraction,
            split_seed=split_seed, seed=seed, num_workers=num_workers, microbatch_size=microbatch_size,
            skip_unreadable=bool(skip_unreadable), balance_classes=balance_classes,
        )  # fmt: skip
        self.header = header

    @property
    def num_values(self) -> int | None:  # type: ignore[override]
        """The number of values that integers can take, or None for floats and for more than 65,536."""
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
        """Return samples to look at, uint8: all channels of signals, the first of two channels, or else three."""
        shown = to_uint8(x, min(self.num_values or 256, 256))
        count = self.shape[0]
        if len(self.shape) == 2 or count in (1, 3):
            return shown
        return shown[:, : 1 if count == 2 else 3]


def suffix_of(name: str) -> str:
    """Return the ending of a file name in lower case, with that of its compression."""
    suffixes = Path(name.lower()).suffixes[-2:]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def one_file(root: Any, labels: str | None) -> Path | None:
    """Return the file with all samples: `root`, or the only file of a folder but `labels`; None for one per sample."""
    if not isinstance(root, str | Path):
        return None
    path = Path(root)
    if path.is_dir():
        files = [each for each in path.iterdir() if each.name != labels and (each.is_dir() or _is_array(each.name))]
        path = files[0] if len(files) == 1 else path
    return path if path.is_file() and path.suffix.lower() in ARRAY_SUFFIXES else None


def _is_array(name: str) -> bool:
    return suffix_of(name) in ARRAY_SUFFIXES | AUDIO_SUFFIXES | NIFTI_SUFFIXES


def _find_folder(root: Any, name: str) -> FoundImages:
    path = Path(root or "")
    setting = format_override(name, str(path.resolve()) if root else None)
    fix = f"set {name} to a .npy or .npz file, or to a folder, zip or tar file of .npy, .wav or .nii.gz files"
    if root is None or not path.exists():
        raise FileNotFoundError(f"{setting} does not exist; {fix}")
    try:
        return find_images(path, _is_array, "array")
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{setting}: {error}; {fix}") from error


# NumPy files of all samples


def open_numpy(path: Path, key: str | None = None) -> Array:
    """Return the array of a .npy file or of a .npz file, mapped into memory unless it is compressed.

    Raises ValueError if it is not a file of numbers, or if an .npz file has several and `key` names none.
    """
    try:
        if not zipfile.is_zipfile(path):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            array = _open_npz(path, key)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}); set data.root") from error
    return _check_type(array, path)


def _check_type(array: Array, path: Path) -> Array:
    if array.dtype.kind not in "buif":
        raise ValueError(f"{path} has values of type {array.dtype}; use integers or floats, or split complex numbers")
    return array


def _open_npz(path: Path, key: str | None) -> Array:
    with zipfile.ZipFile(path) as archive:
        names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        if key is None and len(names) > 1:
            raise ValueError(f"it has the arrays {first_names(names)}; set data.source.key={names[0]}")
        if key is not None and key not in names:
            raise ValueError(f"it has no array {key}; data.source.key can be {first_names(names)}")
        name = names[0] if key is None else key
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type == zipfile.ZIP_STORED:
            with path.open("rb") as file:
                file.seek(info.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                file.seek(info.header_offset + 30 + name_length + extra_length)
                version = np.lib.format.read_magic(file)
                read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
                shape, fortran, dtype = read_header(file)
                if not dtype.hasobject:
                    return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")
    with np.load(path, allow_pickle=False) as loaded:
        array: Array = loaded[name]
        return array


def _open_arranged(path: Path, key: str | None, channels: int, size: tuple[int, ...]) -> Array:
    array = arrange(path, open_numpy(path, key), channels, size, batched=True)
    if array.shape[2:] != size:
        raise ValueError(
            f"data.image_size={list(size)} is not {list(array.shape[2:])}, that of {path}; leave it out, or save one "
            "file per sample, which are resampled"
        )
    return array


def arrange(path: Path, array: Array, channels: int | None, size: tuple[int, ...] | None, batched: bool) -> Array:
    """Return an array as (N, C, *size), or (C, *size) if it is not `batched`.

    A missing axis of channels is added, and one at the end is moved, where `channels` and `size` tell so. Raises
    ValueError for other shapes.
    """
    axis = int(batched)
    shape = array.shape[axis:]
    if len(shape) > 2 and shape[-1] <= 4 < shape[0]:
        if channels is None:
            raise ValueError(
                f"{path} has shape {array.shape}: are channels at the end? Set data.channels={shape[-1]}, or "
                f"data.channels={shape[0]} if they are in front"
            )
        if shape[-1] == channels != shape[0]:
            array = np.moveaxis(array, -1, axis)
    elif len(shape) == (1 if size is None else len(size)) or (size is None and channels == 1 < shape[0]):
        array = np.expand_dims(array, axis)
    shape = array.shape[axis:]
    dims = len(shape) - 1
    if dims not in KINDS or (size is not None and dims != len(size)) or not array.size:
        wanted = "N x C x L, N x C x H x W or N x C x D x H x W" if batched else "C x L, C x H x W or C x D x H x W"
        wanted += "" if size is None else f" for data.image_size={list(size)}"
        raise ValueError(f"{path} has shape {array.shape}, and it must be {wanted}; save it with this shape")
    if channels not in (None, shape[0]):
        raise ValueError(f"{path} has {shape[0]} channels, and data.channels={channels}; leave data.channels out")
    return array


def measure(path: Path, array: Array) -> tuple[float, float]:
    """Return the least and the largest value of (N, *shape). Raises ValueError for values that are not finite."""
    lows, highs = [], []
    step = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        part = array[start : start + step]
        low, high = float(part.min()), float(part.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            bad = np.flatnonzero(~np.isfinite(part).all(axis=tuple(range(1, part.ndim))))
            raise ValueError(f"{path} has values that are not finite (sample {start + int(bad[0])}); remove it")
        lows.append(low)
        highs.append(high)
    return min(lows), max(highs)


# One file per sample


def read_file(found: FoundImages, index: int, key: str | None = None) -> Sample:
    """Return what a file holds, (C, *size) or `size`. Raises DataReadError."""
    return read_with_retries(str(found.path(index)), partial(_read_file, found, index, key))


def _read_file(found: FoundImages, index: int, key: str | None) -> Sample:
    with found.open(index) as stream:
        suffix = suffix_of(found.names[index])
        if suffix in AUDIO_SUFFIXES:
            sample = _read_audio(stream)
        elif suffix in NIFTI_SUFFIXES:
            sample = _read_nifti(stream.read())
        else:
            sample = Sample(_load_numpy(stream, key), {})
    values = sample.values
    if values.dtype.kind not in "buif":
        raise ValueError(f"its values have type {values.dtype}")
    if not values.size:
        raise ValueError("it is empty")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    return sample


def _load_numpy(stream: BinaryIO, key: str | None) -> Array:
    loaded = np.load(io.BytesIO(stream.read()), allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        if key is None and len(loaded.files) != 1:
            raise ValueError(f"it has the arrays {first_names(loaded.files)}; set data.source.key")
        array: Array = loaded[key or loaded.files[0]]
        return array


def _read_audio(stream: BinaryIO) -> Sample:
    """Return audio (channels, L): int16 for up to 16 bits, else float32."""
    try:
        import soundfile
    except ImportError as error:
        raise ValueError("audio needs: pip install soundfile") from error
    with soundfile.SoundFile(stream) as file:
        few_bits = file.subtype in ("PCM_16", "PCM_S8", "PCM_U8")
        values = file.read(dtype="int16" if few_bits else "float32", always_2d=True)
        return Sample(np.ascontiguousarray(values.T), {"sample_rate": int(file.samplerate)})


def _read_nifti(contents: bytes) -> Sample:
    """Return a volume (C, X, Y, Z) with its scaled values; the fourth axis of a NIfTI file are its channels."""
    try:
        import nibabel
    except ImportError as error:
        raise ValueError("NIfTI files need: pip install nibabel") from error
    data = gzip.decompress(contents) if contents[:2] == b"\x1f\x8b" else contents
    is_second = 540 in (int.from_bytes(data[:4], order) for order in ("little", "big"))  # the size of the header
    image: Any = (nibabel.Nifti2Image if is_second else nibabel.Nifti1Image).from_bytes(data)
    values = np.asanyarray(image.dataobj)
    values = values.astype(values.dtype.newbyteorder("="))
    if values.ndim > 4:
        values = values.reshape(*values.shape[:3], -1)
    values = values[None] if values.ndim < 4 else np.moveaxis(values, -1, 0)
    # Scaled values are float64, of which the file has fewer bits.
    values = values.astype(np.float32) if values.dtype == np.float64 != image.get_data_dtype() else values
    return Sample(values, {"affine": image.affine.tolist()})


def mix(name: str, values: Array, channels: int | None) -> Array:
    """Return audio with several channels as one, if one is wanted; other data unchanged."""
    if suffix_of(name) in AUDIO_SUFFIXES and channels == 1 < len(values):
        mixed: Array = values.mean(0, keepdims=True).astype(values.dtype)
        return mixed
    return values


def fit(values: Array, size: tuple[int, ...]) -> Array:
    """Return (C, *any size) of the wanted size: signals cut or filled up with zeros, others resampled.

    Resampling averages where all sides shrink, and interpolates linearly otherwise. It keeps the type.
    """
    if values.shape[1:] == size:
        return values
    if len(size) == 1:
        cut = values[:, : size[0]]
        return np.pad(cut, ((0, 0), (0, size[0] - cut.shape[1])))
    shrinks = all(n <= m for n, m in zip(size, values.shape[1:], strict=True))
    mode = "area" if shrinks else ("bilinear" if len(size) == 2 else "trilinear")
    x = torch.from_numpy(values.astype(np.float64))[None]
    resampled = F.interpolate(x, size, mode=mode)[0].numpy()
    return (np.rint(resampled) if values.dtype.kind in "biu" else resampled).astype(values.dtype)


def fit_header(header: Mapping[str, Any], before: Sequence[int], size: Sequence[int]) -> dict[str, Any]:
    """Return the header of a volume that was resampled: its affine maps the same corner to the same place."""
    if "affine" not in header or tuple(before) == tuple(size):
        return dict(header)
    steps = np.array([m / n for m, n in zip(before, size, strict=True)])
    change = np.diag([*steps, 1.0])
    change[:3, 3] = (steps - 1) / 2
    return {"affine": (np.asarray(header["affine"]) @ change).tolist()}


def decode_all(
    found: FoundImages, channels: int, size: tuple[int, ...], key: str | None, cache_dir: str | None
) -> Path:
    """Decode all files once into the cache and return its folder, with `samples.npy` and `about.json`.

    The folder is complete or does not exist, whenever a process is killed. One process decodes; others wait for it.
    Raises ValueError if the cache cannot be written, and DataReadError if no file can be read.
    """
    from filelock import FileLock

    cache = default_cache_dir().with_name("arrays") if cache_dir is None else Path(cache_dir)
    folder = cache / store_key(found, (channels, size, key))
    if (folder / "about.json").exists():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if (folder / "about.json").exists():
                return folder
            for left in cache.glob(f"{folder.name}.partial*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            part = cache / f"{folder.name}.partial{os.getpid()}"
            try:
                part.mkdir()
                _decode_into(part, found, channels, size, key)
                os.replace(part, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        setting = format_override("data.cache_dir", str(cache))
        raise ValueError(f"{setting} cannot hold the decoded files ({error}); set it to a folder with room") from error
    return folder


def _decode_into(folder: Path, found: FoundImages, channels: int, size: tuple[int, ...], key: str | None) -> None:
    from tqdm import tqdm

    errors: dict[int, str] = {}
    out: Any = None
    low, high, header = np.inf, -np.inf, {}
    bar = tqdm(range(len(found)), "Decoding once", unit="file", disable=None if len(found) >= 512 else True)
    for k, (sample, reason) in zip(bar, _read_all(found, channels, size, key), strict=True):
        if sample is not None and out is None:
            header = sample.header
            needed, free = len(found) * sample.values.nbytes, shutil.disk_usage(folder).free
            log.info(f"Decoding {len(found):,} files once ({needed / 1e6:,.0f} MB in {folder.parent})")
            if needed > free:
                raise OSError(f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")
            out = np.lib.format.open_memmap(
                folder / "samples.npy", "w+", sample.values.dtype, (len(found), *sample.values.shape)
            )
        if sample is not None and out is not None:
            if sample.values.dtype != out.dtype:
                reason = f"its values have type {sample.values.dtype}, and those of others {out.dtype}"
            elif sample.header.get("sample_rate") != header.get("sample_rate"):
                reason = f"its sample rate is {sample.header.get('sample_rate')}, and that of others {header}"
            else:
                out[k] = sample.values
                low, high = min(low, float(sample.values.min())), max(high, float(sample.values.max()))
        if reason:
            errors[k] = reason
    if out is None:
        check_readable(found, errors, 1.0, "files")  # raises, since none is left
    assert out is not None
    out.flush()
    about = {"low": low, "high": high, "header": header or None, "errors": errors}
    (folder / "about.json").write_text(json.dumps(about))


def _read_all(
    found: FoundImages, channels: int, size: tuple[int, ...], key: str | None
) -> Iterator[tuple[Sample | None, str]]:
    """Yield each sample as (C, *size), or None and the reason why it cannot be read or does not suit."""
    for k in range(len(found)):
        try:
            sample = read_file(found, k, key)
            values = arrange(Path("it"), mix(found.names[k], sample.values, channels), channels, size, batched=False)
            header = fit_header(sample.header, values.shape[1:], size)
        except (DataReadError, ValueError) as error:
            yield None, str((error.__cause__ and " ".join(str(error.__cause__).split())) or error)
        else:
            yield Sample(fit(values, size), header), ""


# Labels and the summary


def _read_labels(path: Path, count: int) -> list[str]:
    """Return the class of each of `count` samples. Raises ValueError for another number, or for empty classes."""
    if path.suffix.lower() == ".npy":
        array = open_numpy(path)
        if array.ndim != 1 or array.dtype.kind not in "bui":
            raise ValueError(f"data.source.labels={path} has shape {array.shape} of {array.dtype}; use integers (N,)")
        names = [str(int(value)) for value in array]
    else:
        table = read_table(path, "data.source.labels")
        names = table.column(table.one_of(("label",), "data.source.labels"))
    if len(names) != count:
        raise ValueError(f"data.source.labels={path} has {len(names)} labels for {count} samples; give one each")
    if "" in names:
        raise ValueError(f"data.source.labels={path} has no label for sample {names.index('')}; fill it in")
    return names


def _labels_of_files(path: Path, found: FoundImages) -> list[str]:
    """Return the class of each file."""
    if path.suffix.lower() == ".npy":
        return _read_labels(path, len(found))
    return classes_from_table(path, found, FILE_COLUMNS, ("label",))


def _describe(array: Array, limits: tuple[float, float]) -> str:
    channels, *size = array.shape[1:]
    shape = "x".join(map(str, size))
    return (
        f"; {channels} channel{'s' * (channels > 1)} of {shape}; {array.dtype} values in [{limits[0]:g}, {limits[1]:g}]"
    )
