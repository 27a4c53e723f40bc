"""Convert decoded images to one size and number of channels, and find the range of their values."""

import math
import warnings
from collections.abc import Sequence
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

from src.data.decode import decode
from src.data.decoded import Array, Decoded, Pages
from src.errors import counted

Fit = Literal["crop", "random_crop", "pad", "stretch", "buckets"]

MIN_USE = 0.05
"""Smallest share of the range that the values of a dataset must use."""


class ImageSpec(NamedTuple):
    """The images that a run trains on: `size` (H, W) and `channels`, and how other files are converted to them.

    `fit`: `crop` to the center, `random_crop` in training, `pad` with the edge, `stretch`, or crop to the nearest of
    `bucket_sizes`. `background` is the color behind transparent pixels, unless `channels` is 2 or 4 and keeps them.
    `pages` chooses the images of a TIFF or an animation.
    """

    size: tuple[int, int]
    channels: int
    fit: Fit = "crop"
    background: str = "white"
    pages: Pages = "first"

    @property
    def varies(self) -> bool:
        """Whether images have different shapes."""
        return self.fit in ("random_crop", "buckets")


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (H, W) of `data.image_size`. Raises ValueError unless it is one or two numbers of at least 1."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"data.image_size={image_size} must be a number, or [height,width], of at least 1")
    return int(size[0]), int(size[1])


def spatial_size(image_size: int | Sequence[int]) -> tuple[int, ...]:
    """Return `data.image_size` as (L,), (H, W) or (D, H, W); one number is a square. Raises ValueError for others."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if not 1 <= len(size) <= 3 or min(size) < 1:
        raise ValueError(f"data.image_size={image_size} must be a number, [L], [H,W] or [D,H,W], of at least 1")
    return tuple(map(int, size))


class Loaded(NamedTuple):
    """A decoded image with the channels and size of an `ImageSpec`; for `random_crop` one side is larger.

    `pixels` is (C, H, W) in the type of the file, `type` names that type (bool for pixels of 0 and 1), `low` and `high`
    are the least and largest value of the file, `size` (W, H) is its size, and `frames` counts its images.
    """

    pixels: Array
    low: float
    high: float
    size: tuple[int, int]
    frames: int
    type: str


def load_image(file: BinaryIO, spec: ImageSpec) -> Loaded:
    """Read an image file. Raises OSError or ValueError, with the reason, if it is not such an image."""
    # At twice the size needed, the antialiasing is left to the filter of `resize`.
    return prepare_image(decode(file, spec.pages, 2 * max(spec.size), spec.channels), spec)


def prepare_image(decoded: Decoded, spec: ImageSpec) -> Loaded:
    """Convert channels and size of a decoded image. Raises ValueError if it has the wrong number of channels."""
    pixels = decoded.pixels
    low, high = float(pixels.min()), float(pixels.max())
    pixels = convert_channels(decoded, spec.channels, spec.background)
    alpha = spec.channels in (2, 4) and (decoded.alpha or spec.channels != decoded.pixels.shape[-1])
    fitted = resize(pixels, spec.size, spec.fit, alpha).transpose(2, 0, 1)
    return Loaded(np.ascontiguousarray(fitted), low, high, decoded.size, decoded.frames, decoded.pixels.dtype.name)


def convert_channels(decoded: Decoded, channels: int, background: str = "white") -> Array:
    """Return pixels (H, W, channels) of the same type.

    Gray becomes RGB and RGB becomes gray (ITU-R BT.601). Opacity is kept for 2 and 4 channels, else the image is
    composed on `background`. Raises ValueError for any other difference in the number of channels.
    """
    pixels, alpha, is_rgb = decoded.pixels, decoded.alpha, decoded.is_rgb
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8)
    colors = pixels.shape[-1] - alpha
    if channels == pixels.shape[-1]:
        return pixels
    opaque = _opaque(pixels.dtype)
    if alpha and channels in (1, 3):
        pixels, alpha = _compose(pixels[..., :-1], pixels[..., -1:], background, opaque), False
    convertible = channels in (1, 2, 3, 4) and (colors == 1 or (colors == 3 and is_rgb))
    if not convertible:
        count = decoded.pixels.shape[-1]
        has = f"{count} channel{'s' * (count != 1)}" + f" and {decoded.frames} pages" * (decoded.frames > 1)
        by_page = decoded.frames > 1 and decoded.frames * count == channels
        fix = "data.source.pages=channels" if by_page else f"data.channels={count}"
        raise ValueError(f"it has {has}, and data.channels={channels}; set {fix}")
    color, opacity = pixels[..., :colors], pixels[..., colors:]
    if colors == 1 and channels > 2:
        color = np.repeat(color, 3, axis=-1)
    elif colors == 3 and channels < 3:
        color = _luma(color)
    if channels in (1, 3):
        return color
    if not alpha:
        opacity = np.full((*color.shape[:2], 1), opaque, pixels.dtype)
    return np.concatenate([color, opacity], axis=-1)


def resize(pixels: Array, size: tuple[int, int], fit: Fit, alpha: bool = False) -> Array:
    """Resize (H, W, C) to `size` (H, W) with antialiasing, by bicubic interpolation; keeps the type and range.

    For `random_crop` the result covers `size`, and equals it in at least one side: see `crop_at`. For `buckets` it has
    the one of `bucket_sizes` whose aspect ratio is nearest. With `alpha` the last channel is opacity, by which 8-bit
    colors are weighted.
    """
    have_height, have_width = pixels.shape[:2]
    if fit == "buckets":
        size, fit = min(bucket_sizes(size), key=lambda s: abs(math.log(s[0] * have_width / s[1] / have_height))), "crop"
    height, width = size
    if (have_height, have_width) == (height, width):
        return pixels
    box = (0.0, 0.0, float(have_width), float(have_height))
    target = size
    if fit == "crop":
        scale = min(have_height / height, have_width / width)
        crop_height, crop_width = max(1, round(scale * height)), max(1, round(scale * width))
        left, top = (have_width - crop_width) // 2, (have_height - crop_height) // 2
        box = (float(left), float(top), float(left + crop_width), float(top + crop_height))
    elif fit == "random_crop":
        scale = min(have_height / height, have_width / width)
        target = max(height, round(have_height / scale)), max(width, round(have_width / scale))
    elif fit == "pad":
        scale = max(have_height / height, have_width / width)
        target = max(1, round(have_height / scale)), max(1, round(have_width / scale))
    resized = _resample(pixels, target, box, alpha)
    if target == size or fit == "random_crop":
        return resized
    top, left = (height - target[0]) // 2, (width - target[1]) // 2
    margins = ((top, height - target[0] - top), (left, width - target[1] - left), (0, 0))
    return np.pad(resized, margins, mode="edge")


def bucket_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return `size` (H, W) and others with aspect ratios up to 2 and at most the same area, from wide to tall.

    Their sides are multiples of 8, as most U-Nets need, or of about an eighth of the side if that is more.

    Source: NovelAI 2022, aspect ratio bucketing.
    """
    area = size[0] * size[1]
    step = max(8, 8 * round(math.sqrt(area) / 64))
    sides = [(short, area // short // step * step) for short in range(step, math.isqrt(area) + 1, step)]
    allowed = [(short, long) for short, long in sides if short <= long <= 2 * short]
    return sorted({size, *allowed, *((long, short) for short, long in allowed)}, key=lambda s: s[0] / s[1])


def crop_at(pixels: Array, size: tuple[int, int], key: int | None = None) -> Array:
    """Return the part of `size` (H, W) of pixels (C, H', W'): the center, or a place drawn by 63 random bits `key`."""
    height, width = size
    down, right = pixels.shape[1] - height, pixels.shape[2] - width
    if key is None:
        top, left = down // 2, right // 2
    else:
        top, left = (key % 2**32) * (down + 1) >> 32, (key >> 32) * (right + 1) >> 31
    return pixels[:, top : top + height, left : left + width]


def _resample(pixels: Array, size: tuple[int, int], box: tuple[float, float, float, float], alpha: bool) -> Array:
    """Resample the part `box` (left, top, right, bottom) of (H, W, C) to `size` (H, W)."""

    def resample(part: Array) -> Array:
        image = Image.fromarray(np.ascontiguousarray(part))
        wanted = (size[1], size[0])
        return np.asarray(image.resize(wanted, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))

    count = pixels.shape[-1]
    if pixels.dtype == np.uint8:
        if count == 3 or alpha:
            return resample(pixels)
        return np.stack([resample(pixels[..., k]) for k in range(count)], axis=-1)
    resized = np.stack([resample(pixels[..., k].astype(np.float32)) for k in range(count)], axis=-1)
    # Bicubic interpolation overshoots the range of the values, which Pillow prevents for 8 bits.
    return _round_to(np.clip(resized, pixels.min((0, 1)), pixels.max((0, 1))), pixels.dtype)


def _compose(color: Array, opacity: Array, background: str, opaque: float) -> Array:
    """Compose colors (H, W, C) with opacity (H, W, 1) in [0, opaque] on a background color."""
    red, green, blue = (c / 255 for c in ImageColor.getrgb(background)[:3])
    backdrop = [red, green, blue] if color.shape[-1] == 3 else [0.299 * red + 0.587 * green + 0.114 * blue]
    alpha = opacity.astype(np.float64) / opaque
    return _round_to(color * alpha + np.asarray(backdrop) * opaque * (1 - alpha), color.dtype)


def _luma(color: Array) -> Array:
    """Return the luma (H, W, 1) of RGB (H, W, 3) by ITU-R BT.601; of 8 bits as Pillow computes it."""
    if color.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(color)).convert("L"))[..., None]
    return _round_to((color.astype(np.float64) @ [0.299, 0.587, 0.114])[..., None], color.dtype)


def _opaque(dtype: npt.DTypeLike) -> float:
    """Return the value of full opacity."""
    dtype = np.dtype(dtype)
    return float(np.iinfo(dtype).max) if dtype.kind in "ui" else 1.0


def _round_to(values: Array, dtype: npt.DTypeLike) -> Array:
    return (np.rint(values) if np.dtype(dtype).kind in "ui" else values).astype(dtype)


def infer_range(dtype: str, low: float, high: float) -> tuple[float, float]:
    """Return the range of values of a dataset, from the type of its files and its least and largest value.

    8 bits use [0, 255]; other unsigned integers as many bits as the largest value needs; floats [0, 1] or [-1, 1]
    where they suffice. Anything else uses the measured range.
    """
    kind = np.dtype(dtype)
    if kind == np.bool_:
        return 0.0, 1.0
    if kind == np.uint8:
        return 0.0, 255.0
    if kind.kind == "u":
        return 0.0, float(2 ** max(1, int(high).bit_length()) - 1)
    if kind.kind == "f" and low >= -1 and high <= 1:
        return (0.0, 1.0) if low >= 0 else (-1.0, 1.0)
    return low, high


def check_range(value_range: Sequence[float], low: float, high: float) -> None:
    """Raise ValueError if the values of a dataset, from `low` to `high`, are constant or use little of the range."""
    start, end = value_range
    shown = f"[{start:g},{end:g}]"
    if low == high:
        raise ValueError(
            f"all values of all files are {low:g}; check the files, or set data.root to a folder with other files"
        )
    if high < start or low > end or min(high, end) - max(low, start) < MIN_USE * (end - start):
        raise ValueError(
            f"data.value_range={shown} does not suit the files: their values lie in [{low:g}, {high:g}], less than "
            f"{MIN_USE:.0%} of it; set 'data.value_range=[{low:g},{high:g}]'"
        )


def check_resolution(limits: tuple[float, float]) -> None:
    """Raise ValueError if float32, the type of network inputs, has fewer than 256 values between the limits."""
    low, high = limits
    if high - low < 2**-16 * max(abs(low), abs(high)):
        raise ValueError(
            f"data.value_range=[{low:.10g},{high:.10g}] is too narrow for its distance from 0 in float32; subtract a "
            "constant from the values of the files"
        )


def as_range(value_range: Sequence[float]) -> tuple[float, float]:
    """Return `data.value_range` as numbers. Raises ValueError unless it is two, the lower one first."""
    if len(value_range) != 2 or not value_range[0] < value_range[1]:
        raise ValueError(f"data.value_range={list(value_range)} must be [low,high] with low < high")
    return float(value_range[0]), float(value_range[1])


def find_limits(value_range: Sequence[float] | None, dtype: str, low: float, high: float) -> tuple[float, float]:
    """Return the values that become -1 and 1, of data in [low, high]. Raises ValueError if they do not suit."""
    limits = infer_range(dtype, low, high) if value_range is None else as_range(value_range)
    check_range(limits, low, high)
    check_resolution(limits)
    return limits


MAX_EXAMINED = 200_000
"""Values that `warn_of_outliers` examines."""


def warn_of_outliers(pixels: Array, limits: tuple[float, float]) -> None:
    """Warn if all but 0.2% of the values of evenly spaced samples (N, ...) use little of the range `limits`.

    Of large samples, random values are examined: 64 volumes may exceed the memory. Data of 8 bits are not examined:
    they may be masks, or drawings with few strokes.
    """
    if pixels.dtype.itemsize == 1:
        return
    chosen = np.linspace(0, len(pixels) - 1, min(len(pixels), 64)).astype(int)
    size, count = math.prod(pixels.shape[1:]), MAX_EXAMINED // len(chosen)
    if pixels.ndim == 1:
        values = pixels[:MAX_EXAMINED]
    elif size <= count:
        values = pixels[chosen]
    else:
        places = np.sort(np.random.default_rng(0).integers(size, size=(len(chosen), count)))
        values = pixels[chosen[:, None], *np.unravel_index(places, pixels.shape[1:])]
    low, high = np.quantile(values, [0.001, 0.999]).tolist()
    if 0 < high - low < MIN_USE * (limits[1] - limits[0]):
        warnings.warn(
            f"99.8% of the values lie in [{low:g}, {high:g}], which is {(high - low) / (limits[1] - limits[0]):.1%} of "
            f"the range [{limits[0]:g}, {limits[1]:g}]; 'data.value_range=[{low:g},{high:g}]' scales by these values",
            stacklevel=2,
        )


def describe_sizes(sizes: Array, frames: Array, spec: ImageSpec, dtype: str, limits: tuple[float, float]) -> str:
    """Return the part of the summary about sizes and values.

    `sizes` (N, 2) are the width and height of each file, `frames` (N,) the number of its images.
    """
    (height, width), (widths, heights) = spec.size, sizes.T
    scale = np.minimum(heights / height, widths / width)
    smaller, cropped = int((scale < 1).sum()), 1 - float((scale**2 * height * width).sum() / (heights * widths).sum())
    low, high = sizes.min(0), sizes.max(0)
    text = f"; {low[0]}x{low[1]}" + (f" to {high[0]}x{high[1]}" if (low != high).any() else "") + " pixels"
    text += f", {smaller:,} smaller than {width}x{height}" if smaller else ""
    if spec.fit in ("crop", "random_crop") and cropped >= 0.005:
        text += f", {cropped:.0%} of the area cropped" + " at random" * (spec.fit == "random_crop")
    text += f"; {dtype} values in [{limits[0]:g}, {limits[1]:g}]"
    if several := int((frames > 1).sum()):
        text += f"; several images in {counted(several, 'file')}, of which the first is used (data.source.pages)"
    return text
