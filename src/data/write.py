"""Write samples in the format of the files that a run trained on."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from src.data.array_files import AUDIO_SUFFIXES, NIFTI_SUFFIXES
from src.data.arrays import ArrayDataModule
from src.data.decode import ARRAY_SUFFIXES
from src.data.decoded import Array
from src.data.images import ImageDataModule

TIFF_SUFFIXES = {".tif", ".tiff"}
PNG_CHANNELS = {1: 0, 2: 4, 3: 2, 4: 6}
"""The color type of the PNG specification by number of channels: gray, gray and opacity, RGB, RGBA."""


def write_arrays(folder: Path, samples: Array, data: ArrayDataModule) -> Path:
    """Write `samples.npy` (N, C, *size) and return it; with one file per sample in the data, write such files too."""
    path = folder / "samples.npy"
    np.save(path, to_type(samples, data.dtype))
    if not (data.header or {}).get("one_file"):
        for k, sample in enumerate(samples):
            write_sample(folder, k, sample, data)
    return path


def write_sample(folder: Path, k: int, array: Array, data: ImageDataModule) -> Path:
    """Write sample k (C, *size), as `data.denormalize` returns it, to a file like those of the data, and return it."""
    name, suffix = f"{k:05d}", data.file_type or ".png"
    values = to_type(array, data.dtype)
    if not isinstance(data, ArrayDataModule):
        return write_image(folder, name, np.moveaxis(values, 0, -1), suffix)
    header = data.header or {}
    if suffix in AUDIO_SUFFIXES:
        import soundfile

        subtype = header.get("subtype") or ("PCM_16" if values.dtype == np.int16 else "FLOAT")
        kind = {".aif": "AIFF"}.get(suffix, suffix[1:].upper())
        kind = kind if soundfile.check_format(kind, subtype) else "WAV"
        path = folder / f"{name}{'.wav' if kind == 'WAV' else suffix}"
        soundfile.write(path, values.T, header["sample_rate"], subtype, format=kind)
    elif suffix in NIFTI_SUFFIXES:
        import nibabel

        path = folder / f"{name}{suffix}"
        volume = values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)
        image: Any = nibabel.Nifti1Image(volume, np.array(header["affine"]), dtype=volume.dtype)  # type: ignore[no-untyped-call]
        image.to_filename(path)
    else:
        path = folder / f"{name}.npy"
        np.save(path, values)
    return path


def to_type(values: Array, dtype: str | None) -> Array:
    """Return values in the type of the files, rounded and clipped for integers; uint8 if the type is unknown."""
    kind = np.dtype(dtype or "uint8")
    if kind.kind in "ui":
        info = np.iinfo(kind)
        values = np.clip(np.rint(values.astype(np.float64)), info.min, info.max)
    return values.astype(kind)


def write_image(folder: Path, name: str, pixels: Array, suffix: str) -> Path:
    """Write an image (H, W, C) with its values and return the file.

    `suffix` is that of the original file. NumPy and TIFF files keep their format. Other formats become PNG for 8 or 16
    bits and up to four channels, and TIFF otherwise.
    """
    if suffix in ARRAY_SUFFIXES:
        path = folder / f"{name}.npy"
        np.save(path, pixels)
        return path
    is_png = pixels.dtype in (np.uint8, np.uint16) and pixels.shape[-1] in PNG_CHANNELS
    if suffix in TIFF_SUFFIXES or not is_png:
        import tifffile

        path = folder / f"{name}.tif"
        single = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        rgb = single.ndim == 3 and pixels.shape[-1] in (3, 4) and pixels.dtype in (np.uint8, np.uint16)
        options: dict[str, Any] = {"photometric": "rgb" if rgb else "minisblack"}
        if single.ndim == 3:
            options["planarconfig"] = "contig"
        tifffile.imwrite(path, single, metadata=None, **options)
        return path
    path = folder / f"{name}.png"
    if pixels.dtype == np.uint16:
        path.write_bytes(encode_png16(pixels))
    else:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path)
    return path


def encode_png16(pixels: Array) -> bytes:
    """Return (H, W, C) uint16 as a PNG, which Pillow writes only for gray."""
    height, width, channels = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, PNG_CHANNELS[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
