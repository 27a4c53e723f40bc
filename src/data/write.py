"""Write samples in the format of the files that a run trained on."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from src.data.decode import ARRAY_SUFFIXES, Array

TIFF_SUFFIXES = {".tif", ".tiff"}
PNG_CHANNELS = {1: 0, 2: 4, 3: 2, 4: 6}
"""The color type of the PNG specification by number of channels: gray, gray and opacity, RGB, RGBA."""


def write_image(folder: Path, name: str, pixels: Array, suffix: str) -> Path:
    """Write an image (H, W, C) with its values and return the file.

    The format is PNG for 8 and 16 bits and up to four channels, unless `suffix` is that of TIFF or NumPy files. Other
    images of a PNG, JPEG or similar become TIFF.
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
