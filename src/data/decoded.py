"""A decoded image, and its conversion to sRGB."""

import io
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ImageCms

from src.errors import optional_package

Array = npt.NDArray[Any]
Pages = Literal["first", "channels", "samples"]
"""Which images of a file are used; `samples` is all, each as a sample of its own (`src.data.frames`)."""

ORIENTATIONS = {2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 3), 7: (1, 3), 8: (0, 1)}
"""What turns an array (H, W, C) upright, by the tag of TIFF and EXIF: a mirrored width, then quarter turns."""


class Decoded(NamedTuple):
    """An image with its original values.

    `pixels` has shape (H, W, C) and the type of the file. With `alpha` the last channel is opacity. `is_rgb` tells
    whether three color channels are red, green and blue, not bands of other meaning. `size` (W, H) is that of the
    upright image in the file, which is larger than `pixels` where a JPEG was decoded at reduced size. `frames` counts
    the images in the file, of which `pixels` is the first.
    """

    pixels: Array
    alpha: bool
    is_rgb: bool
    size: tuple[int, int]
    frames: int = 1

    @classmethod
    def of(cls, pixels: Array, alpha: bool = False, is_rgb: bool = False) -> "Decoded":
        """Return the only image of a file, at full size."""
        return cls(pixels, alpha, is_rgb, (pixels.shape[1], pixels.shape[0]))


def upright(pixels: Array, orientation: int) -> Array:
    """Return pixels (H, W, C) upright, by the tag of TIFF and EXIF; unchanged for an invalid one, as by Pillow."""
    mirrored, turns = ORIENTATIONS.get(orientation, (0, 0))
    return np.rot90(pixels[:, ::-1] if mirrored else pixels, turns)


def is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    return "sRGB" in (ImageCms.getProfileDescription(profile) or "")


def colors_to_srgb(pixels: Array, profile: bytes | None) -> Array:
    """Convert the colors of RGB or RGBA (H, W, C) of 16 bits to sRGB; return other images unchanged.

    Raises ValueError without imagecodecs.
    """
    if profile is None or pixels.shape[-1] < 3 or pixels.dtype != np.uint16:
        return pixels
    try:
        if is_srgb(ImageCms.ImageCmsProfile(io.BytesIO(profile))):
            return pixels
    except (ImageCms.PyCMSError, OSError):
        return pixels
    with optional_package("the color profile of 16-bit images", "imagecodecs"):
        import imagecodecs
    colors, srgb = np.ascontiguousarray(pixels[..., :3]), imagecodecs.cms_profile("srgb")
    converted = imagecodecs.cms_transform(colors, profile, srgb, colorspace="rgb", outcolorspace="rgb")
    return np.concatenate([converted, pixels[..., 3:]], axis=-1)


def gamma_to_srgb(pixels: Array, alpha: bool, info: Mapping[Any, Any]) -> Array:
    """Convert unsigned colors (H, W, C) by the exponent that a PNG names; return those of sRGB unchanged."""
    gamma = info.get("gamma")
    if not gamma or abs(gamma - 1 / 2.2) < 0.01 or "srgb" in info or "icc_profile" in info:
        return pixels
    largest = np.iinfo(pixels.dtype).max
    light = (np.arange(largest + 1) / largest) ** (1 / gamma)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    colors = pixels.shape[-1] - alpha
    table = np.rint(srgb * largest).astype(pixels.dtype)
    return np.concatenate([table[pixels[..., :colors]], pixels[..., colors:]], axis=-1)
