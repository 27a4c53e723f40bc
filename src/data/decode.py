"""Decode an image file of any format into an array of its original values."""

import io
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps, ImageSequence, UnidentifiedImageError
from tifffile import TiffFile

from src.data.decoded import Array, Decoded, Pages, colors_to_srgb, gamma_to_srgb, is_srgb
from src.data.deep_images import (
    JPEG2000_MARKS,
    NETPBM_HEADER,
    bits_of_jpeg2000,
    decode_fits,
    decode_jpeg2000,
    decode_netpbm,
    decode_png16,
)
from src.data.tiff import count_tiff, full_pages, is_plain, tiff_frames

Kind = Literal["empty", "numpy", "tiff", "png16", "netpbm16", "jpeg2000", "fits", "other"]
ARRAY_SUFFIXES = {".npy", ".npz"}
HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
HEIF_BRANDS = {b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")}
TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NOT_IMAGES = {".bufr", ".emf", ".eps", ".gbr", ".grib", ".h5", ".hdf", ".iim", ".mpeg", ".mpg", ".ps", ".wmf"}
"""Suffixes that Pillow registers for formats that it does not decode into pixels by itself."""


FOREIGN = {
    b"PF\n": ("color PFM", "convert it to TIFF"),
    b"P7\n": ("PAM", "convert it to PNG"),
    b"\xff\x0a": ("JPEG XL", "convert it to PNG"),
    b"\0\0\0\x0cJXL ": ("JPEG XL", "convert it to PNG"),
    b"version https://git-lfs": ("a Git LFS pointer", "run git lfs pull"),
}
"""The first bytes of formats that are not decoded, with their names and what to do."""


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


def foreign_format(stream: BinaryIO) -> tuple[str, str] | None:
    """Return the name of a format that is not decoded, and what to do; None for other formats."""
    start = stream.read(32)
    return next((known for mark, known in FOREIGN.items() if start.startswith(mark)), None)


def check_format(stream: BinaryIO) -> None:
    """Raise ValueError if a file has a format that is not decoded, such as a Git LFS pointer."""
    if known := foreign_format(stream):
        raise ValueError(f"it is {known[0]}; {known[1]}")
    stream.seek(0)


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
            decoded = _from_png16(stream)
        case "netpbm16" | "jpeg2000" | "fits" as kind:
            read = {"netpbm16": decode_netpbm, "jpeg2000": decode_jpeg2000, "fits": decode_fits}[kind]
            decoded = _without_alpha(read(stream.read()), rgb=kind != "fits")
        case "other":
            decoded = _from_pillow(stream, pages, at_least)
    return _check_values(decoded)


def _kind(stream: BinaryIO) -> Kind:
    """Return which decoder an opened file needs, by its first bytes. Raises ValueError for a PNG in other colors."""
    start = stream.read(4096)
    stream.seek(0)
    if not start:
        return "empty"
    if start.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        return "numpy"
    if start[:4] in TIFF_MARKS:
        return "tiff"
    if is_png := start.startswith(b"\x89PNG"):
        head, _, codes = start.partition(b"IDAT")[0].partition(b"cICP")
        if codes and b"iCCP" not in head + codes and (codes[0] != 1 or codes[1] not in (1, 6, 13)):
            raise ValueError(f"its colors are not sRGB (cICP {codes[0]}, {codes[1]}); convert it to sRGB")
    if is_png and start[24:25] == b"\x10":
        return "png16"
    if (header := NETPBM_HEADER.match(start)) is not None and int(header[4]) > 255:
        return "netpbm16"
    if start.startswith(JPEG2000_MARKS):
        bits = bits_of_jpeg2000(stream.read())
        stream.seek(0)
        return "jpeg2000" if bits > 8 else "other"
    return "fits" if start.startswith(b"SIMPLE  =") else "other"


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
    return _without_alpha(array, rgb=False)


def _without_alpha(array: Array, rgb: bool) -> Decoded:
    """Return (H, W) or (H, W, C) as an image without opacity, whose channels, if they are three, may be RGB.

    Raises ValueError for other shapes and empty arrays.
    """
    if array.ndim not in (2, 3) or not array.size:
        fix = "; use data=array, for signals, volumes, and files of all samples" if array.size else ""
        raise ValueError(f"its shape is {array.shape}, not (height, width) or (height, width, channels){fix}")
    pixels = np.atleast_3d(array)
    return Decoded.of(pixels, is_rgb=rgb and pixels.shape[2] == 3)


def _from_png16(stream: BinaryIO) -> Decoded:
    pixels, alpha, info = decode_png16(stream)
    if is_rgb := pixels.shape[2] > 2:
        pixels = gamma_to_srgb(colors_to_srgb(pixels, info.get("icc_profile")), alpha, info)
    return Decoded.of(pixels, alpha, is_rgb)


def decode_frames(stream: BinaryIO) -> Iterator[Decoded]:
    """Yield all frames of an animation, or pages of a TIFF, in the form of `decode`; other files have one.

    Raises as `decode` does.
    """
    if _kind(stream) == "tiff":
        with TiffFile(stream) as tiff:
            numbers = full_pages(tiff)
            frames = _pillow_frames(stream, numbers) if is_plain(tiff, numbers) else iter(list(tiff_frames(tiff)))
    else:
        count = count_frames(stream)
        frames = _pillow_frames(stream, range(count)) if count > 1 else iter([decode(stream)])
    yield from map(_check_values, frames)


def count_frames(stream: BinaryIO) -> int:
    """Return the number of frames that `decode_frames` yields, without decoding them."""
    kind = _kind(stream)
    if kind == "tiff":
        with TiffFile(stream) as tiff:
            numbers = full_pages(tiff)
            return len(numbers) if is_plain(tiff, numbers) else count_tiff(tiff)
    if kind != "other":
        return 1
    try:
        with _open(stream) as image:
            return int(getattr(image, "n_frames", 1))
    except UnidentifiedImageError:  # `decode` has the reason
        return 1
    finally:
        stream.seek(0)


def _from_tiff(stream: BinaryIO, pages: Pages) -> Decoded:
    """Decode a TIFF by Pillow if it is an ordinary 8-bit image, else by tifffile."""
    with TiffFile(stream) as tiff:
        numbers, as_channels = full_pages(tiff), pages == "channels"
        if is_plain(tiff, numbers) and not as_channels:
            stream.seek(0)
            return _from_pillow(stream, pages, None, numbers[0])._replace(frames=len(numbers))
        decoded = next(tiff_frames(tiff, as_channels))
        return decoded if as_channels else decoded._replace(frames=count_tiff(tiff))


def _from_pillow(stream: BinaryIO, pages: Pages, at_least: int | None, page: int = 0) -> Decoded:
    try:
        image = _open(stream)
    except UnidentifiedImageError as error:
        stream.seek(4)
        heif = stream.read(8) in HEIF_BRANDS and "HEIF" not in Image.OPEN
        stream.seek(0)
        check_format(stream)
        raise ValueError("HEIC needs: pip install pillow-heif" if heif else "its format is unknown") from error
    with image:
        frames = getattr(image, "n_frames", 1)
        if page:
            image.seek(page)
        size = image.size
        if at_least is not None and image.format in ("JPEG", "MPO"):  # MPO is a JPEG with others behind it
            image.draft(None, (at_least, at_least))
        if pages == "channels" and frames > 1:
            parts = [_pixels(frame)[0] for frame in ImageSequence.Iterator(image)]
            return Decoded(np.concatenate(parts, axis=-1), False, False, size)
        decoded = from_pillow(image)
    height, width = decoded.pixels.shape[:2]
    turned = size if (size[0] > size[1]) == (width > height) else size[::-1]
    return decoded._replace(size=turned, frames=frames)


def _pillow_frames(stream: BinaryIO, numbers: Iterable[int]) -> Iterator[Decoded]:
    stream.seek(0)
    with _open(stream) as image:
        for k in numbers:
            image.seek(k)
            yield from_pillow(image)


def from_pillow(image: Image.Image) -> Decoded:
    """Return the current frame of an image that Pillow opened."""
    pixels, alpha = _pixels(image)
    return Decoded.of(pixels, alpha, pixels.shape[-1] - alpha == 3)


def _pixels(image: Image.Image) -> tuple[Array, bool]:
    """Return the pixels (H, W, C) of a Pillow image, upright and in sRGB, and whether the last channel is opacity."""
    info, profile = image.info, image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        array = np.asarray(image)
        return array[..., None].astype(array.dtype.newbyteorder("=")), False
    alpha = "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa")
    gray = image.mode in ("1", "L", "LA", "La")
    if profile:
        image = _to_srgb(image, profile, alpha)
    mode = ("LA" if alpha else "L") if gray else ("RGBA" if alpha else "RGB")
    if image.mode != mode:
        # Pillow converts a transparent color of gray images only to RGBA.
        image = image.convert("RGBA").convert("LA") if mode == "LA" and image.mode != "La" else image.convert(mode)
    return gamma_to_srgb(np.atleast_3d(np.asarray(image)), alpha, info), alpha


def _to_srgb(image: Image.Image, profile: bytes, alpha: bool) -> Image.Image:
    """Convert colors from the image's profile to sRGB; return the image unchanged if its profile is invalid."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if is_srgb(source):
            return image
        mode = "L" if image.mode in ("1", "LA", "La") else "RGB"
        colors = image.convert(mode) if image.mode not in ("L", "RGB", "CMYK", "LAB") else image
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
