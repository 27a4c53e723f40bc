"""Decode an image file of any format into an array of its original values."""

import io
import math
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps, ImageSequence, UnidentifiedImageError
from tifffile import EXTRASAMPLE, PHOTOMETRIC, TiffFile

Array = npt.NDArray[Any]
Pages = Literal["first", "channels", "samples"]
"""Which images of a file are used; `samples` is all, each as a sample of its own (`src.data.frames`)."""

ARRAY_SUFFIXES = {".npy", ".npz"}
HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
HEIF_BRANDS = {b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")}
TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NETPBM_HEADER = re.compile(rb"P([56])\s(?:\s*#.*\n)*\s*(\d+)\s+(?:#.*\n)*(\d+)\s+(?:#.*\n)*(\d+)\s")
"""The header of a binary PGM (5) or PPM (6): width, height and largest value, with comments."""
ONLY_TIFFFILE = {33003, 33004, 33005, 34712, 50001, 50002}
"""Compressions of TIFF that Pillow does not decode: JPEG 2000 (four numbers), WebP and JPEG XL."""
ORIENTATIONS = ((0, 0), (0, 0), (1, 0), (0, 2), (1, 2), (1, 1), (0, 3), (1, 3), (0, 1))
"""What turns an array (H, W, C) upright, by the tag 1 to 8 of TIFF and EXIF: a mirrored width, then quarter turns."""
NOT_IMAGES = {".bufr", ".emf", ".eps", ".gbr", ".grib", ".h5", ".hdf", ".iim", ".mpeg", ".mpg", ".ps", ".wmf"}
"""Suffixes that Pillow registers for formats that it does not decode into pixels by itself."""


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


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the formats that `decode` reads."""
    _register_plugins()
    Image.init()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    return frozenset(known - NOT_IMAGES | ARRAY_SUFFIXES | HEIF_SUFFIXES)


def looks_like_image(file: Path) -> bool:
    """Return whether the contents of a file of any name are those of an image. Reads only the header."""
    try:
        with _open(file):
            return True
    except Exception:  # decoders raise almost anything on other contents
        return False


def decode(stream: BinaryIO, pages: Pages = "first", at_least: int | None = None, channels: int = 0) -> Decoded:
    """Return the image in a file of any name.

    An image that Pillow decodes is upright, and in sRGB if it has a color profile.

    Args:
        stream: the opened file. NumPy arrays have shape (H, W), (H, W, C) or (C, H, W).
        pages: which pages of a TIFF or frames of an animation to use: the first, or all as channels.
        at_least: pixels; a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if no side becomes smaller.
        channels: the number of channels that is wanted, to recognize (C, H, W); otherwise the smallest of three is C.

    Raises OSError if the file cannot be read, and ValueError if the contents are not an image, or not finite.
    """
    match _kind(stream):
        case "empty":
            raise ValueError("the file is empty")
        case "numpy":
            decoded = _from_array(_load_numpy(stream), channels)
        case "tiff":
            decoded = _from_tiff(stream, pages)
        case "png16":
            decoded = _from_png16(stream.read())
        case "netpbm16":
            decoded = _from_netpbm16(stream.read())
        case "other":
            decoded = _from_pillow(stream, pages, at_least)
    return _check_values(decoded)


def _kind(stream: BinaryIO) -> Literal["empty", "numpy", "tiff", "png16", "netpbm16", "other"]:
    """Return which decoder an opened file needs, by its first bytes."""
    start = stream.read(4096)
    stream.seek(0)
    if not start:
        return "empty"
    if start.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        return "numpy"
    if start[:4] in TIFF_MARKS:
        return "tiff"
    if start.startswith(b"\x89PNG") and start[24:25] == b"\x10":
        return "png16"
    if (header := NETPBM_HEADER.match(start)) is not None and int(header[4]) > 255:
        return "netpbm16"
    return "other"


def _check_values(decoded: Decoded) -> Decoded:
    """Return an image. Raises ValueError if its values are not integers or floats, or not finite."""
    dtype = decoded.pixels.dtype
    if dtype.kind not in "buif":
        raise ValueError(f"its values have type {dtype}; use integers or floats")
    if dtype.kind == "f" and not np.isfinite(decoded.pixels).all():
        raise ValueError("it has values that are not finite; replace NaN and infinity by numbers")
    return decoded


def _load_numpy(stream: BinaryIO) -> Array:
    """Return the array of a .npy file, or the only array of a .npz file."""
    loaded = np.load(stream, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        if len(loaded.files) != 1:
            raise ValueError(f"it has {len(loaded.files)} arrays ({', '.join(loaded.files[:5])}); keep one per file")
        array: Array = loaded[loaded.files[0]]
        return array


def _from_array(array: Array, channels: int) -> Decoded:
    planar = array.ndim == 3 and array.shape[2] != channels
    if planar and (array.shape[0] == channels or array.shape[0] < min(array.shape[1:])):
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or not array.size:
        fix = "; use data=array, for signals, volumes, and files of all samples" if array.size else ""
        raise ValueError(f"its shape is {array.shape}, not (height, width) or (height, width, channels){fix}")
    return Decoded.of(np.atleast_3d(array))


def _from_png16(contents: bytes) -> Decoded:
    """Decode a PNG with 16 bits per channel, which Pillow reduces to 8 if it has color or alpha."""
    import torch
    from torchvision.io import ImageReadMode, decode_image

    stored = torch.frombuffer(bytearray(contents), dtype=torch.uint8)
    pixels = decode_image(stored, mode=ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    return Decoded.of(pixels, pixels.shape[2] in (2, 4), pixels.shape[2] > 2)


def _from_netpbm16(contents: bytes) -> Decoded:
    """Decode a PGM or PPM file with more than 8 bits, whose values Pillow rescales."""
    header = NETPBM_HEADER.match(contents)
    assert header is not None
    shape = int(header[3]), int(header[2]), 1 if header[1] == b"5" else 3
    values = np.frombuffer(contents, ">u2", count=math.prod(shape), offset=header.end())
    return Decoded.of(values.astype(np.uint16).reshape(shape), is_rgb=shape[2] == 3)


def decode_frames(stream: BinaryIO) -> Iterator[Decoded]:
    """Yield all frames of an animation, or pages of a TIFF, in the form of `decode`; other files have one.

    Raises as `decode` does.
    """
    if _kind(stream) == "tiff":
        with TiffFile(stream) as tiff:
            frames = _pillow_frames(stream) if _is_plain(tiff) else iter(list(_tiff_frames(tiff)))
    else:
        frames = _pillow_frames(stream) if count_frames(stream) > 1 else iter([decode(stream)])
    yield from map(_check_values, frames)


def count_frames(stream: BinaryIO) -> int:
    """Return the number of frames that `decode_frames` yields, without decoding them."""
    kind = _kind(stream)
    if kind in ("numpy", "png16", "netpbm16"):
        return 1
    if kind == "tiff":
        with TiffFile(stream) as tiff:
            if not _is_plain(tiff):
                return sum(math.prod(each.shape[k] for k in _stacked(each.axes)) for each in tiff.series)
    stream.seek(0)
    try:
        with _open(stream) as image:
            return int(getattr(image, "n_frames", 1))
    except UnidentifiedImageError:  # `decode` has the reason
        return 1
    finally:
        stream.seek(0)


def _is_plain(tiff: TiffFile) -> bool:
    """Return whether a TIFF has ordinary 8-bit images, which Pillow decodes as well."""
    page = tiff.pages.first
    alpha = _has_alpha(page)
    colors = {0: 1, 1: 1, 2: 3}.get(int(page.photometric))  # white is zero, black is zero, RGB
    plain = colors is None or page.samplesperpixel == colors + alpha  # others, such as CMYK, are left to Pillow
    plain = plain and int(page.compression) not in ONLY_TIFFFILE
    return page.bitspersample in (1, 2, 4, 8) and page.sampleformat == 1 and plain


def _has_alpha(page: Any) -> bool:
    return bool(page.extrasamples) and page.extrasamples[-1] in (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)


def _from_tiff(stream: BinaryIO, pages: Pages) -> Decoded:
    """Decode a TIFF by Pillow if it is an ordinary 8-bit image, else by tifffile."""
    with TiffFile(stream) as tiff:
        count = len(tiff.pages)
        if _is_plain(tiff) and pages != "channels":
            stream.seek(0)
            return _from_pillow(stream, pages, None)._replace(frames=count)
        decoded = next(_tiff_frames(tiff, pages == "channels"))
        one = pages == "channels" or "C" in tiff.series[0].axes
    return decoded if one else decoded._replace(frames=count)


def _nodata(page: Any) -> float:
    """Return the value of pixels without data, or 0. That of tifffile is 0 for the lowest float, GDAL's usual one."""
    try:
        return float(str(page.tags["GDAL_NODATA"].value).strip("\0 "))
    except (KeyError, ValueError):
        return 0.0


def _stacked(axes: str) -> list[int]:
    """Return the positions of the axes of a TIFF that are neither pixels nor channels."""
    return [k for k, axis in enumerate(axes) if axis not in "YXSC"]


def _tiff_frames(tiff: TiffFile, as_channels: bool = False) -> Iterator[Decoded]:
    """Yield the images in a TIFF, or all of its first series as the channels of one."""
    for series in tiff.series:
        array, axes, page = series.asarray(), series.axes, series.keyframe
        mirrored, turns = ORIENTATIONS[int(page.tags["Orientation"].value) if "Orientation" in page.tags else 1]
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
            pixels = frame.transpose(1, 2, 0)
            pixels = np.rot90(pixels[:, ::-1] if mirrored else pixels, turns)
            pixels = np.iinfo(pixels.dtype).max - pixels if inverted else pixels
            yield Decoded.of(pixels, alpha and not channels_used, rgb and not channels_used)


def _from_pillow(stream: BinaryIO, pages: Pages, at_least: int | None) -> Decoded:
    try:
        image = _open(stream)
    except UnidentifiedImageError as error:
        stream.seek(4)
        heif = stream.read(8) in HEIF_BRANDS and "HEIF" not in Image.OPEN
        raise ValueError("HEIC needs: pip install pillow-heif" if heif else "its format is unknown") from error
    with image:
        frames, size = getattr(image, "n_frames", 1), image.size
        if at_least is not None and image.format == "JPEG":
            image.draft(None, (at_least, at_least))
        if pages == "channels" and frames > 1:
            parts = [_pixels(frame)[0] for frame in ImageSequence.Iterator(image)]
            return Decoded(np.concatenate(parts, axis=-1), False, False, size)
        decoded = from_pillow(image)
    height, width = decoded.pixels.shape[:2]
    turned = size if (size[0] > size[1]) == (width > height) else size[::-1]
    return decoded._replace(size=turned, frames=frames)


def _pillow_frames(stream: BinaryIO) -> Iterator[Decoded]:
    stream.seek(0)
    with _open(stream) as image:
        yield from map(from_pillow, ImageSequence.Iterator(image))


def from_pillow(image: Image.Image) -> Decoded:
    """Return the current frame of an image that Pillow opened."""
    pixels, alpha = _pixels(image)
    return Decoded.of(pixels, alpha, pixels.shape[-1] - alpha == 3)


def _pixels(image: Image.Image) -> tuple[Array, bool]:
    """Return the pixels (H, W, C) of a Pillow image, upright and in sRGB, and whether the last channel is opacity."""
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        array = np.asarray(image)
        return array[..., None].astype(array.dtype.newbyteorder("=")), False
    alpha = "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa")
    gray = image.mode in ("1", "L", "LA", "La")
    if profile and not gray:
        image = _to_srgb(image, profile, alpha)
    mode = ("LA" if alpha else "L") if gray else ("RGBA" if alpha else "RGB")
    if image.mode != mode:
        # Pillow converts a transparent color of gray images only to RGBA.
        image = image.convert("RGBA").convert("LA") if mode == "LA" and image.mode != "La" else image.convert(mode)
    return np.atleast_3d(np.asarray(image)), alpha


def _to_srgb(image: Image.Image, profile: bytes, alpha: bool) -> Image.Image:
    """Convert colors from the image's profile to sRGB; return the image unchanged if its profile is invalid."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in (ImageCms.getProfileDescription(source) or ""):
            return image
        colors = image.convert("RGB") if image.mode not in ("RGB", "CMYK", "LAB") else image
        opacity = image.convert("RGBA").getchannel("A") if alpha else None
        converted = ImageCms.profileToProfile(colors, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, struct.error):
        return image
    assert converted is not None
    if opacity is not None:
        converted.putalpha(opacity)
    return converted


def _open(file: Path | BinaryIO) -> Image.Image:
    _register_plugins()
    return Image.open(file)


@cache
def _register_plugins() -> None:
    """Let Pillow open HEIC files if pillow-heif is installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
