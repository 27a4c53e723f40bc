"""Read the images in TIFF files: pages, planes, channels and the copies that are none."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import TiffImagePlugin
from tifffile import EXTRASAMPLE, PHOTOMETRIC, TiffFile

from src.data.decoded import Array, Decoded, colors_to_srgb, upright

PILLOW_COMPRESSIONS = TiffImagePlugin.COMPRESSION_INFO.keys() - {50001}
"""Compressions of TIFF that every Pillow decodes, so not WebP."""


def full_pages(tiff: TiffFile) -> list[int]:
    """Return the numbers of the pages that are images, neither smaller copies nor masks of others.

    Raises ValueError if there are none.
    """
    numbers = [k for k, page in enumerate(tiff.pages) if not getattr(page, "subfiletype", 0) & 5]
    if not numbers:
        raise ValueError("it has only a preview, as raw files of cameras; convert it to an ordinary TIFF or JPEG")
    return numbers


def is_plain(tiff: TiffFile, numbers: list[int]) -> bool:
    """Return whether the pages of a TIFF are ordinary 8-bit images, which Pillow decodes as well."""
    page: Any = tiff.pages[numbers[0]]
    alpha = _has_alpha(page)
    colors = {0: 1, 1: 1, 2: 3}.get(int(page.photometric))  # white is zero, black is zero, RGB
    plain = colors is None or page.samplesperpixel == colors + alpha  # others, such as CMYK, are left to Pillow
    plain = plain and int(page.compression) in PILLOW_COMPRESSIONS
    plain = plain and page.bitspersample in (1, 2, 4, 8) and page.sampleformat == 1
    return plain and (len(numbers) == 1 or "C" not in tiff.series[0].axes)


def _has_alpha(page: Any) -> bool:
    return bool(page.extrasamples) and page.extrasamples[-1] in (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)


def _nodata(page: Any) -> float:
    """Return the value of pixels without data, or 0. That of tifffile is 0 for the lowest float, GDAL's usual one."""
    try:
        return float(str(page.tags["GDAL_NODATA"].value).strip("\0 "))
    except (KeyError, ValueError):
        return 0.0


def _stacked(axes: str) -> list[int]:
    """Return the positions of the axes of a TIFF that are neither pixels nor channels."""
    return [k for k, axis in enumerate(axes) if axis not in "YXSC"]


def _full_series(tiff: TiffFile) -> list[Any]:
    """Return the series of pages that are neither smaller copies nor masks of others."""
    return [series for series in tiff.series if not series.keyframe.subfiletype & 5]


def count_tiff(tiff: TiffFile) -> int:
    """Return the number of images that `tiff_frames` yields."""
    return sum(math.prod(each.shape[k] for k in _stacked(each.axes)) for each in _full_series(tiff))


def tiff_frames(tiff: TiffFile, as_channels: bool = False) -> Iterator[Decoded]:
    """Yield the images in a TIFF, or all of its first series as the channels of one."""
    for series in _full_series(tiff):
        array, axes, page = series.asarray(), series.axes, series.keyframe
        orientation = int(page.tags["Orientation"].value) if "Orientation" in page.tags else 1
        alpha = _has_alpha(page)
        rgb = page.photometric == PHOTOMETRIC.RGB and page.samplesperpixel == 3 + alpha
        order = [*_stacked(axes), *(k for k, axis in enumerate(axes) if axis in "SC"), axes.index("Y"), axes.index("X")]
        inverted = page.photometric == PHOTOMETRIC.MINISWHITE and array.dtype.kind == "u"
        if (missing := _nodata(page)) and (array == missing).any():
            raise ValueError(
                f"some of its pixels have no data (GDAL_NODATA={missing:g}); fill them in, or remove the tag"
            )
        array = array.transpose(order)
        frames = 1 if as_channels else math.prod(array.shape[: len(_stacked(axes))])
        channels_used = as_channels or "C" in axes
        for frame in array.reshape(frames, -1, *array.shape[-2:]):
            pixels = upright(frame.transpose(1, 2, 0), orientation)
            pixels = 2**page.bitspersample - 1 - pixels if inverted else pixels
            if alpha and page.extrasamples[-1] == EXTRASAMPLE.ASSOCALPHA:
                pixels = _divide_by_opacity(pixels)
            pixels = colors_to_srgb(pixels, page.iccprofile) if rgb else pixels
            yield Decoded.of(pixels, alpha and not channels_used, rgb and not channels_used)


def _divide_by_opacity(pixels: Array) -> Array:
    """Return colors (H, W, C), which are multiplied by opacity, the last channel, without this factor."""
    is_float = pixels.dtype.kind == "f"
    opaque = 1.0 if is_float else float(np.iinfo(pixels.dtype).max)
    share = np.maximum(pixels[..., -1:].astype(np.float64), np.finfo(np.float32).tiny) / opaque
    colors = np.minimum(pixels[..., :-1] / share, opaque)
    return np.concatenate([colors if is_float else np.rint(colors), pixels[..., -1:]], axis=-1).astype(pixels.dtype)
