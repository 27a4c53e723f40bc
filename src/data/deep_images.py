"""Decode formats whose values Pillow changes: PNG, Netpbm and JPEG 2000 with more than 8 bits, and FITS."""

import io
import math
import re
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from src.data.decoded import Array, upright
from src.errors import optional_package

NETPBM_HEADER = re.compile(rb"P([2356])\s(?:\s*#.*\n)*\s*(\d+)\s+(?:#.*\n)*(\d+)\s+(?:#.*\n)*(\d+)\s")
"""The header of a PGM (2: text, 5: binary) or PPM (3, 6): width, height and largest value, with comments."""
JPEG2000_MARKS = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
"""The first bytes of a JPEG 2000 file, and of its codestream, which has the number of bits at byte 42."""


def decode_png16(stream: BinaryIO) -> tuple[Array, bool, dict[Any, Any]]:
    """Decode a PNG with 16 bits per channel, of which Pillow keeps the upper 8 if it has color or opacity.

    Returns upright pixels (H, W, C) of uint16, whether the last channel is opacity, and what Pillow knows of the file.
    """
    with Image.open(stream) as image:
        *place, args = image.tile[0]
        mode = str(args)
        info, key = image.info, image.info.get("transparency")
        orientation = image.getexif().get(274, 1)
    # Gray with opacity has as many bytes as RGBA of 8 bits. Of colors, "L" (little-endian) takes the lower byte.
    parts = []
    for raw in {"I;16B": ["I;16B"], "LA;16B": ["RGBA"]}.get(mode, [mode, f"{mode[:-1]}L"]):
        with Image.open(stream) as image:
            cast("Any", image).tile = [(*place, raw)]
            parts.append(np.asarray(image))
    pixels = parts[0]
    if mode != "I;16B":
        pixels = (np.stack(parts, -1) if len(parts) == 2 else pixels).view(">u2").reshape(*pixels.shape[:2], -1)
    pixels = pixels.reshape(*pixels.shape[:2], -1).astype(np.uint16)
    alpha = pixels.shape[-1] in (2, 4)
    if key is not None and not alpha:
        opacity = np.where((pixels == np.array(key)).all(-1, keepdims=True), 0, 65535).astype(np.uint16)
        pixels, alpha = np.concatenate([pixels, opacity], axis=-1), True
    return upright(pixels, orientation), alpha, info


def decode_netpbm(contents: bytes) -> Array:
    """Return the values (H, W, C) of a PGM or PPM file with more than 8 bits, which Pillow rescales."""
    header = NETPBM_HEADER.match(contents)
    assert header is not None
    shape = int(header[3]), int(header[2]), 1 if header[1] in b"25" else 3
    if header[1] in b"23":
        text = re.sub(rb"#.*", b"", contents[header.end() :])
        return np.array(text.split(), dtype="S5").astype(np.uint16).reshape(shape)
    values = np.frombuffer(contents, ">u2", count=math.prod(shape), offset=header.end())
    return values.astype(np.uint16).reshape(shape)


def bits_of_jpeg2000(contents: bytes) -> int:
    """Return the bits per channel of a JPEG 2000 file, or 0 if it has no codestream."""
    start = contents.find(JPEG2000_MARKS[1])
    return (contents[start + 42] & 127) + 1 if 0 <= start < len(contents) - 42 else 0


def decode_jpeg2000(contents: bytes) -> Array:
    """Return the values (H, W) or (H, W, C) of a JPEG 2000 file, whose depth Pillow changes to 8 or 16 bits."""
    with optional_package("JPEG 2000 with more than 8 bits", "imagecodecs"):
        import imagecodecs
    pixels: Array = imagecodecs.jpeg2k_decode(contents)
    return pixels


def decode_fits(contents: bytes) -> Array:
    """Return the first image of a FITS file with its scaled values, (H, W, C); the first row is at the top.

    Pixels without data become NaN.
    """
    with optional_package("FITS", "astropy"):
        from astropy.io import fits
    with fits.open(io.BytesIO(contents), memmap=False) as file:
        images = [each for each in file if each.is_image and each.header["NAXIS"] > 1]
        if not images:
            raise ValueError("it has no image; save its array by numpy.save")
        data: Array = images[0].data
    planes = data.reshape(-1, *data.shape[-2:])[:, ::-1]
    return np.moveaxis(planes, 0, -1).astype(data.dtype.newbyteorder("="))
