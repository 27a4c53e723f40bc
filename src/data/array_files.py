"""Read arrays from NumPy, audio and NIfTI files, and find their channel axis."""

import gzip
import io
import struct
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from src.data.decode import ARRAY_SUFFIXES, check_format
from src.data.decoded import Array
from src.data.found_images import FoundImages
from src.data.read_errors import read_with_retries
from src.errors import absence, counted, first_names, optional_package

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".aif", ".aiff", ".mp3", ".opus"}
NIFTI_SUFFIXES = {".nii", ".nii.gz"}
MAX_WAV = 2**31 - 2**16
"""Bytes; programs that do not know the length of a recording claim more in its header."""
KINDS = {1: "signal", 2: "image", 3: "volume"}


class Sample(NamedTuple):
    """The contents of a file: `values` in the file's type, its `header` (`ArrayDataModule`), and the `changes` made."""

    values: Array
    header: dict[str, Any]
    changes: Sequence[str] = ()


def array_suffix(name: str) -> str:
    """Return the suffix of a file name in lower case, including .gz, such as `.nii.gz`."""
    suffixes = Path(name.lower()).suffixes[-2:]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def is_array(name: str) -> bool:
    """Return whether a file name has the suffix of a NumPy, audio or NIfTI file."""
    return array_suffix(name) in ARRAY_SUFFIXES | AUDIO_SUFFIXES | NIFTI_SUFFIXES


# Shapes


def arrange(path: Path, array: Array, channels: int | None, size: tuple[int, ...] | None, batched: bool) -> Array:
    """Return an array as (N, C, *size), or (C, *size) if it is not `batched`.

    Adds a missing channel axis, and moves one at the end to the front, if `channels` and `size` imply it. Raises
    ValueError for other shapes.
    """
    axis = int(batched)
    shape = array.shape[axis:]
    if len(shape) == (1 if size is None else len(size)):
        array = np.expand_dims(array, axis)
    elif len(shape) > 1:
        if shape[0] != channels == shape[-1]:
            array = np.moveaxis(array, -1, axis)
        elif size is None and (channels == 1 < shape[0] or (channels is None and is_gray_image(array, axis))):
            array = np.expand_dims(array, axis)
        elif size is None and channels is None and array.dtype == np.uint8 and len(shape) == 3 and shape[-1] in (3, 4):
            array = np.moveaxis(array, -1, axis) if shape[0] > 4 else array
        elif channels is None and (shape[-1] < shape[0] if len(shape) == 2 else shape[-1] <= 4 < shape[0]):
            raise ValueError(
                f"{path} has shape {array.shape}: are channels at the end? Set data.channels={shape[-1]}, or "
                f"data.channels={shape[0]} if they are in front"
            )
    shape = array.shape[axis:]
    dims = len(shape) - 1
    if dims not in KINDS or (size is not None and dims != len(size)) or not array.size:
        wanted = "N x C x L, N x C x H x W or N x C x D x H x W" if batched else "C x L, C x H x W or C x D x H x W"
        wanted += "" if size is None else f" for data.image_size={list(size)}"
        raise ValueError(f"{path} has shape {array.shape}, and it must be {wanted}; save it with this shape")
    if channels not in (None, shape[0]):
        has = counted(shape[0], "channel")
        raise ValueError(f"{path} has {has}, and data.channels={channels}; leave data.channels out")
    return array


def is_gray_image(array: Array, axis: int) -> bool:
    """Return whether the last two axes, with `axis` others before, seem to be the sides of an image of 8 bits."""
    sides = array.shape[axis:]
    return len(sides) == 2 and array.dtype == np.uint8 and min(sides) > 4 and max(sides) <= 4 * min(sides)


# NumPy files of all samples


def open_numpy(path: Path, key: str | None = None, setting: str = "data.root", kinds: str = "buif") -> Array:
    """Return the array of a .npy file or of a .npz file, mapped into memory unless it is compressed.

    `kinds` are NumPy's codes of the data types to accept.

    Raises ValueError for a file without numbers, or for an .npz file with several arrays without `key`.
    """
    if not path.is_file():  # reading a pipe would wait forever
        raise ValueError(f"{path} {absence(path)}; set {setting} to a .npy or .npz file")
    try:
        names = names_in_npz(path)
        problem = None if names is None else _problem_with_key(names, key)
        if names is None:
            with path.open("rb") as stream:
                check_format(stream)
            array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        elif problem is None:
            array = _open_npz(path, key or names[0])
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read ({reason}); save it again as numbers, or set {setting}") from error
    if problem is not None:
        raise ValueError(f"{path}: {problem}")
    if array.dtype.kind not in kinds:
        raise ValueError(f"{path} has values of type {array.dtype}; use integers or floats, or split complex numbers")
    return array


def names_in_npz(path: Path) -> list[str] | None:
    """Return the names of the arrays in an .npz file; None for other files."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return [info.filename.removesuffix(".npy") for info in archive.infolist()]


def _problem_with_key(names: Sequence[str], key: str | None) -> str | None:
    """Return why `key` does not select one array of an .npz file, and the setting to change; None if it does."""
    if not names:
        return "it has no arrays; set data.root to another file"
    if key is None and len(names) > 1:
        return f"it has the arrays {first_names(names)}; set data.source.key={names[0]}"
    if key is not None and key not in names:
        return f"it has no array {key}; data.source.key can be {first_names(names)}"
    return None


def _open_npz(path: Path, name: str) -> Array:
    """Return an array of an .npz file, memory-mapped in place unless it is compressed."""
    with zipfile.ZipFile(path) as archive:
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


# One file per sample


def read_file(found: FoundImages, index: int, key: str | None = None) -> Sample:
    """Return the sample (C, *size) or `size` in a file. Raises DataReadError."""
    return read_with_retries(str(found.path(index)), partial(_read_file, found, index, key))


def _read_file(found: FoundImages, index: int, key: str | None) -> Sample:
    with found.open(index) as stream:
        check_format(stream)
        suffix = array_suffix(found.names[index])
        if suffix in AUDIO_SUFFIXES:
            sample = _read_audio(stream)
        elif suffix in NIFTI_SUFFIXES:
            sample = _read_nifti(stream.read())
        else:
            sample = Sample(_load_numpy(stream, key), {})
    values = sample.values.astype(sample.values.dtype.newbyteorder("="), copy=False)
    if values.dtype.kind not in "buif":
        raise ValueError(f"its values have type {values.dtype}; use integers or floats, or split complex numbers")
    if not values.size:
        raise ValueError("it is empty")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("it has values that are not finite; replace NaN and infinity by numbers")
    return sample._replace(values=values)


def _load_numpy(stream: BinaryIO, key: str | None) -> Array:
    loaded = np.load(io.BytesIO(stream.read()), allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        if (problem := _problem_with_key(loaded.files, key)) is not None:
            raise ValueError(problem)
        array: Array = loaded[key or loaded.files[0]]
        return array


def _read_audio(stream: BinaryIO) -> Sample:
    """Return audio (channels, L): int16 for up to 16 bits, else float32. The header has no `subtype` for PCM_16."""
    with optional_package("audio", "soundfile"):
        import soundfile
    start = stream.read(8)
    size = 8 + int.from_bytes(start[4:], "little") if start[:4] == b"RIFF" else 0
    if stream.seek(0, io.SEEK_END) < size < MAX_WAV:
        raise ValueError("it is truncated")
    stream.seek(0)
    with soundfile.SoundFile(stream) as file:
        few_bits = file.subtype in ("PCM_16", "PCM_S8", "PCM_U8")
        values = file.read(dtype="int16" if few_bits else "float32", always_2d=True)
        header: dict[str, Any] = {"sample_rate": int(file.samplerate)}
        if file.subtype.startswith("PCM") and file.subtype != "PCM_16":
            header["subtype"] = file.subtype
        return Sample(np.ascontiguousarray(values.T), header)


def _read_nifti(contents: bytes) -> Sample:
    """Return a volume (C, X, Y, Z) with its scaled values; the fourth axis of a NIfTI file holds the channels."""
    with optional_package("a NIfTI file", "nibabel"):
        import nibabel
    data = gzip.decompress(contents) if contents[:2] == b"\x1f\x8b" else contents
    is_second = 540 in (int.from_bytes(data[:4], order) for order in ("little", "big"))  # the size of the header
    image: Any = (nibabel.Nifti2Image if is_second else nibabel.Nifti1Image).from_bytes(data)
    values = np.asanyarray(image.dataobj)
    if values.ndim > 4:
        values = values.reshape(*values.shape[:3], -1)
    values = values[None] if values.ndim < 4 else np.moveaxis(values, -1, 0)
    # nibabel scales in float64, but the file has fewer bits than that.
    values = values.astype(np.float32) if values.dtype == np.float64 != image.get_data_dtype() else values
    return Sample(values, {"affine": image.affine.tolist()})


def orientation(affine: Any) -> Array:
    """Return the axis and the direction (3, 2) of each axis of a volume with this affine (4, 4)."""
    import nibabel

    orientations: Any = nibabel.orientations
    axes: Array = orientations.io_orientation(np.asarray(affine))
    return axes


def reorient(sample: Sample, affine: Any) -> Sample:
    """Return a volume (C, X, Y, Z) turned and mirrored, without resampling, to the axes of another `affine` (4, 4).

    Scanners and programs store volumes in different orientations, which the affine of each file tells.
    """
    import nibabel

    orientations: Any = nibabel.orientations
    own = np.asarray(sample.header["affine"])
    have, wanted = orientation(own), orientation(affine)
    if sample.values.ndim != 4 or np.array_equal(have, wanted):
        return sample
    change = orientations.ornt_transform(have, wanted)
    values = np.stack([orientations.apply_orientation(channel, change) for channel in sample.values])
    turned = own @ orientations.inv_ornt_aff(change, sample.values.shape[1:])
    header = {**sample.header, "affine": turned.tolist()}
    return Sample(values, header, [*sample.changes, "turned to common axes"])
