"""Image files of every format, type and number of channels, pixel by pixel."""

import io
import os
import shutil
import signal
import struct
import warnings
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from src.data import pixel_store
from src.data.archives import open_member, tar_places
from src.data.captions import captioned
from src.data.decode import count_frames, decode, decode_frames
from src.data.fit import ImageSpec, infer_range, load_image, warn_of_outliers
from src.data.folder import folder
from src.data.scan import find_images
from src.errors import DataReadError

RNG = np.random.default_rng(0)
SHAPE = (5, 7)


def uniform(*shape: int, dtype: str = "uint8", low: int = 0, high: int = 255) -> np.ndarray:
    """Return random integers from `low` to `high`, both of which occur."""
    values = np.random.default_rng(len(shape) + high).integers(low, high, shape, endpoint=True)
    values.flat[0], values.flat[1] = low, high
    return values.astype(dtype)


def png16(pixels: np.ndarray, **chunks: bytes) -> bytes:
    """Return a PNG with 16 bits per channel and more `chunks`, written after the PNG specification."""
    height, width, channels = pixels.shape
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            *(chunk(b"IHDR", header), *(chunk(name.encode(), data) for name, data in chunks.items())),
            *(chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")),
        ]
    )


def tiff(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def numpy_file(pixels: np.ndarray, name: str = "npy") -> bytes:
    file = io.BytesIO()
    np.save(file, pixels) if name == "npy" else np.savez(file, pixels)
    return file.getvalue()


def fits(values: np.ndarray, bits: int, **cards: float) -> bytes:
    """Return a FITS file of (H, W), or of (C, H, W): big-endian, the last row first, in blocks of 2,880 bytes."""
    axes = {f"NAXIS{k}": n for k, n in enumerate(values.shape[::-1], 1)}
    every = {"BITPIX": bits, "NAXIS": values.ndim, **axes, **cards}
    lines = ["SIMPLE  =                    T", *(f"{name:8}= {value:20}" for name, value in every.items()), "END"]
    header = "".join(line.ljust(80) for line in lines).encode()
    body = values[..., ::-1, :].astype(values.dtype.newbyteorder(">")).tobytes()
    return b"".join(part + pad * (-len(part) % 2880) for part, pad in ((header, b" "), (body, b"\0")))


def jpeg2000(pixels: np.ndarray, bits: int) -> bytes:
    import imagecodecs

    return imagecodecs.jpeg2k_encode(pixels, level=0, reversible=True, bitspersample=bits)


def netpbm(pixels: np.ndarray, maximum: int, text: bool = False) -> bytes:
    if text:
        kind, cells = "P2" if pixels.shape[-1] == 1 else "P3", " ".join(map(str, pixels.ravel().tolist()))
        return f"{kind}\n{pixels.shape[1]} {pixels.shape[0]}\n{maximum}\n{cells}\n".encode()
    kind = "P5" if pixels.shape[-1] == 1 else "P6"
    return (
        f"{kind}\n# made here\n{pixels.shape[1]} {pixels.shape[0]}\n{maximum}\n".encode()
        + pixels.astype(">u2").tobytes()
    )


GRAY16, RGB16 = uniform(*SHAPE, 1, dtype="uint16", high=65535), uniform(*SHAPE, 3, dtype="uint16", high=65535)
TWELVE_BITS = uniform(*SHAPE, 1, dtype="uint16", high=3000)
BANDS = uniform(*SHAPE, 12, dtype="uint16", high=10000)
PLANES = BANDS.transpose(2, 0, 1)
CONTIGUOUS = {"photometric": "minisblack", "planarconfig": "contig"}
FLOATS = (uniform(*SHAPE, 1) / 255).astype("float32")
SIGNED = uniform(*SHAPE, 1, dtype="int16", low=-1000, high=3000)
RGBN = uniform(*SHAPE, 4)
FILES = {
    "gray16.png": (png16(GRAY16), GRAY16, (0, 65535)),
    "gray_alpha16.png": (png16(RGB16[..., :2]), RGB16[..., :2], (0, 65535)),
    "rgb16.png": (png16(RGB16), RGB16, (0, 65535)),
    "twelve_bits.png": (png16(TWELVE_BITS), TWELVE_BITS, (0, 4095)),
    "twelve_bits.pgm": (netpbm(TWELVE_BITS, 4095), TWELVE_BITS, (0, 4095)),
    "rgb16.ppm": (netpbm(RGB16, 65535), RGB16, (0, 65535)),
    "text.pgm": (netpbm(TWELVE_BITS, 4095, text=True), TWELVE_BITS, (0, 4095)),
    "text16.ppm": (netpbm(RGB16, 65535, text=True), RGB16, (0, 65535)),
    "signed.fits": (fits(SIGNED[..., 0], 16), SIGNED, (-1000, 3000)),
    "unsigned.fits": (fits((GRAY16[..., 0].astype(int) - 32768).astype("int16"), 16, BZERO=32768), GRAY16, (0, 65535)),
    "scaled.fits": (fits(SIGNED[..., 0], 16, BSCALE=0.5, BZERO=10.0), SIGNED / 2 + 10, (-490, 1510)),
    "cube.fits": (fits(RGBN.transpose(2, 0, 1), 8), RGBN, (0, 255)),
    "gray16.tif": (tiff(GRAY16[..., 0]), GRAY16, (0, 65535)),
    "compressed.tif": (tiff(RGB16, photometric="rgb", compression="lzw"), RGB16, (0, 65535)),
    "float.tif": (tiff(FLOATS[..., 0]), FLOATS, (0, 1)),
    "double.tif": (tiff(FLOATS[..., 0].astype(float) * 2 - 1), FLOATS.astype(float) * 2 - 1, (-1, 1)),
    "signed.tif": (tiff(SIGNED[..., 0]), SIGNED, (-1000, 3000)),
    "two_bands.tif": (
        tiff(BANDS[..., :2], **CONTIGUOUS),
        BANDS[..., :2],
        (0, 16383),
    ),
    "contiguous.tif": (tiff(BANDS, **CONTIGUOUS), BANDS, (0, 16383)),
    "planar.tif": (
        tiff(PLANES, photometric="minisblack", planarconfig="separate"),
        BANDS,
        (0, 16383),
    ),
    "rgb_and_infrared.tif": (tiff(RGBN, photometric="rgb", extrasamples=["unspecified"]), RGBN, (0, 255)),
    "gray.npy": (numpy_file(GRAY16[..., 0]), GRAY16, (0, 65535)),
    "channels_last.npy": (numpy_file(BANDS[..., :3].astype("float64")), BANDS[..., :3], (0, 10000)),
    "channels_first.npy": (numpy_file(BANDS[..., :4].transpose(2, 0, 1)), BANDS[..., :4], (0, 16383)),
    "array.npz": (numpy_file(BANDS, "npz"), BANDS, (0, 16383)),
    "mask.npy": (numpy_file(FLOATS[..., 0] > 0.5), FLOATS > 0.5, (0, 1)),
}
if find_spec("imagecodecs"):
    FILES |= {
        "twelve_bits.jp2": (jpeg2000(TWELVE_BITS[..., 0], 12), TWELVE_BITS, (0, 4095)),
        "rgb16.jp2": (jpeg2000(RGB16, 16), RGB16, (0, 65535)),
        "inverted12.tif": (
            tiff(4095 - TWELVE_BITS[..., 0], photometric="miniswhite", bitspersample=12),
            TWELVE_BITS,
            (0, 4095),
        ),
    }


@pytest.mark.parametrize("name", FILES)
def test_every_type_keeps_its_values(tmp_path, name):
    contents, pixels, value_range = FILES[name]
    (tmp_path / name).write_bytes(contents)
    source = folder(str(tmp_path), SHAPE, pixels.shape[-1])
    (x,) = source.fetch([0])
    assert x.dtype == (torch.uint8 if pixels.dtype in ("uint8", "bool") else torch.float32)
    np.testing.assert_array_equal(x.permute(1, 2, 0).numpy(), pixels.astype(np.float32))
    assert source.value_range == pytest.approx(value_range)


def test_unassociated_alpha_is_composed_and_bands_are_not(tmp_path):
    """The fourth band of a TIFF is opacity only if the file says so."""
    (tmp_path / "a.tif").write_bytes(tiff(RGBN, photometric="rgb", extrasamples=["unassalpha"]))
    alpha = RGBN[..., 3:] / 255
    expected = np.rint(RGBN[..., :3] * alpha + 255 * (1 - alpha))
    assert np.abs(fetched(tmp_path, 3) - expected).max() <= 1
    assert np.array_equal(fetched(tmp_path, 4), RGBN)
    (tmp_path / "a.tif").write_bytes(tiff(RGBN, photometric="rgb", extrasamples=["unspecified"]))
    with pytest.raises(ValueError, match=r"data\.channels=3"):
        fetched(tmp_path, 3)


def fetched(root: Path, channels: int, **options: object) -> np.ndarray:
    """Return the only image under `root` (H, W, C)."""
    (x,) = folder(str(root), SHAPE, channels, **options).fetch([0])
    return x.permute(1, 2, 0).numpy()


def test_pages_are_counted_or_become_channels(tmp_path):
    pages = BANDS.transpose(2, 0, 1)[:3]
    (tmp_path / "a.tif").write_bytes(tiff(pages, photometric="minisblack"))
    source = folder(str(tmp_path), SHAPE, 1)
    assert np.array_equal(source.fetch([0])[0, 0].numpy(), pages[0])
    assert "several images in 1 file," in source.summary
    assert np.array_equal(fetched(tmp_path, 3, pages="channels"), pages.transpose(1, 2, 0))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_axes_of_tiffs_are_used_or_counted(dtype):
    """Channels are kept, and other times and depths are frames, whatever the number of bits."""
    stack = uniform(2, 3, *SHAPE, dtype=dtype)
    contents = tiff(stack, ome=True, metadata={"axes": "TCYX"}, photometric="minisblack")
    decoded = decode(io.BytesIO(contents))
    assert decoded.frames == count_frames(io.BytesIO(contents)) == 2
    assert np.array_equal(decoded.pixels, stack[0].transpose(1, 2, 0))
    assert np.array_equal([*decode_frames(io.BytesIO(contents))][1].pixels, stack[1].transpose(1, 2, 0))


def test_smaller_copies_in_tiffs_are_not_images():
    """Previews come before or behind the image; raw files of cameras have nothing else that is an ordinary image."""
    pixels = uniform(16, 16, 3)
    for order in ([4, 1], [1, 4]):
        file = io.BytesIO()
        with tifffile.TiffWriter(file) as writer:
            for step in order:
                writer.write(pixels[::step, ::step], photometric="rgb", subfiletype=int(step > 1), metadata=None)
        decoded = decode(io.BytesIO(file.getvalue()))
        assert np.array_equal(decoded.pixels, pixels) and decoded.frames == 1
        assert [frame.pixels.shape for frame in decode_frames(io.BytesIO(file.getvalue()))] == [pixels.shape]
    with pytest.raises(ValueError, match="preview"):
        decode(io.BytesIO(tiff(pixels, photometric="rgb", subfiletype=1)))


def test_colors_multiplied_by_opacity_are_restored():
    """A file with `assocalpha` has color times opacity."""
    share = np.array([0.5, 1.0])
    colors = np.array([[[20000, 40000, 60000]] * 2])
    stored = np.dstack([colors * share[:, None], 65535 * share[None]]).round().astype("uint16")
    pixels = decode(io.BytesIO(tiff(stored, photometric="rgb", extrasamples=["assocalpha"]))).pixels
    assert np.abs(pixels[..., :3].astype(int) - colors).max() <= 2


def test_png16_is_upright_and_has_a_transparent_color():
    """Orientation 6 of EXIF; the color of the first pixel is transparent."""
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    pixels = decode(io.BytesIO(png16(RGB16, eXIf=exif, tRNS=RGB16[0, 0].astype(">u2").tobytes()))).pixels
    opacity = np.where((RGB16[0, 0] == RGB16).all(-1), 0, 65535)
    assert np.array_equal(pixels, np.rot90(np.dstack([RGB16, opacity]), -1))


def test_damaged_png16_is_an_error():
    """Other decoders end the process."""
    contents = bytearray(png16(RGB16))
    contents[len(contents) // 2] ^= 255
    for each in (bytes(contents), bytes(contents[:100])):
        with pytest.raises(OSError):
            decode(io.BytesIO(each))


def test_sizes_are_those_of_upright_images(tmp_path):
    """Orientation 6 of EXIF and TIFF: the first row of the file is the right column of the image."""
    (tmp_path / "a.tif").write_bytes(tiff(GRAY16[..., 0], extratags=[(274, "H", 1, 6, True)]))
    source = folder(str(tmp_path), SHAPE[::-1], 1)
    assert np.array_equal(source.fetch([0])[0, 0].numpy(), np.rot90(GRAY16[..., 0], -1))
    assert f"; {SHAPE[0]}x{SHAPE[1]} pixels;" in source.summary


@pytest.mark.parametrize("compression", ["jpeg2000", "lerc", "lzw"])
def test_compressed_tiffs_keep_their_values(compression):
    """Pillow decodes only the last one."""
    pixels = uniform(16, 16, 3)
    options = {"compressionargs": {"reversible": True}} if compression == "jpeg2000" else {}
    contents = tiff(pixels, photometric="rgb", compression=compression, **options)
    assert np.array_equal(decode(io.BytesIO(contents)).pixels, pixels)


def test_complex_values_are_refused():
    """Their imaginary part would be lost."""
    for contents in (tiff(np.ones(SHAPE, "complex64")), numpy_file(np.ones(SHAPE, "complex64"))):
        with pytest.raises(ValueError, match="complex64"):
            decode(io.BytesIO(contents))


def test_a_few_outliers_bring_a_warning(tmp_path):
    """A typed range, and data that use the range, bring none."""
    for k in range(4):
        values = uniform(*SHAPE, 30, dtype="uint16", high=1000)
        values[0, 0, 0] = 65535 if k == 0 else 0
        (tmp_path / f"{k}.npy").write_bytes(numpy_file(values))
    with pytest.warns(UserWarning, match=r"data\.value_range=\["):
        source = folder(str(tmp_path), SHAPE, 30)
    assert source.value_range == (0, 65535) and source.fetch([0]).max() == 65535
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder(str(tmp_path), SHAPE, 30, value_range=[0, 1000])
        (tmp_path / "0.npy").unlink()
        folder(str(tmp_path), SHAPE, 30)


def test_outliers_of_samples_beyond_the_memory_bring_a_warning():
    samples = np.broadcast_to(uniform(1000, dtype="float32", high=9), (3, 10**6, 10**6, 1000))
    with pytest.warns(UserWarning, match=r"data\.value_range=\["):
        warn_of_outliers(samples, (0, 1000))


def test_pixels_without_data_are_refused():
    """The tag of GDAL names their value, which is not a measurement; 0 is black in many images."""
    for text in ("-9999", "-3.4028234663852886e+38"):
        values = np.where(FLOATS[..., 0] < 0.1, float(text), FLOATS[..., 0]).astype("float32")
        tag = {"extratags": [(42113, "s", 0, text, True)]}
        with pytest.raises(ValueError, match="GDAL_NODATA=-"):
            decode(io.BytesIO(tiff(values, **tag)))
    assert np.array_equal(decode(io.BytesIO(tiff(FLOATS[..., 0], **tag))).pixels, FLOATS)
    zero = {"extratags": [(42113, "s", 0, "0", True)]}
    assert np.array_equal(decode(io.BytesIO(tiff(FLOATS[..., 0], **zero))).pixels, FLOATS)


def test_values_too_far_from_zero_for_float32_are_refused(tmp_path):
    values = (uniform(*SHAPE, high=100).astype("int32") + 10**9)[None]
    (tmp_path / "a.tif").write_bytes(tiff(values[0]))
    with pytest.raises(ValueError, match="float32"):
        folder(str(tmp_path), SHAPE, 1)


def test_photos_with_a_second_image_are_decoded_at_reduced_size():
    """Phones write such JPEGs, which Pillow calls MPO."""
    file = io.BytesIO()
    Image.new("RGB", (160, 120)).save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    decoded = decode(io.BytesIO(file.getvalue()), at_least=16)
    assert decoded.pixels.shape[0] < 120
    assert decoded.size == (160, 120) and decoded.frames == 2


def test_background_and_opacity(tmp_path):
    """A transparent pixel takes the color of the background, or stays transparent with two or four channels."""
    pixels = uniform(*SHAPE, 4)
    pixels[0, 0] = [10, 20, 30, 0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert fetched(tmp_path, 3, background="#ff8000")[0, 0].tolist() == [255, 128, 0]
    assert np.array_equal(fetched(tmp_path, 4), pixels)
    Image.fromarray(pixels[..., :3]).save(tmp_path / "a.png")
    assert np.array_equal(fetched(tmp_path, 4)[..., 3], np.full(SHAPE, 255))


def test_color_profiles_become_srgb(tmp_path):
    """Gray of 50% light is 128/255 in a linear profile and 188/255 in sRGB (IEC 61966-2-1)."""
    curve = struct.pack(">4sII", b"curv", 0, 0)  # the identity
    linear = linear_profile(curve)
    image = Image.new("RGB", (7, 5), (128, 128, 128))
    image.putpixel((0, 0), (0, 0, 0))
    image.putpixel((1, 0), (255, 255, 255))
    image.save(tmp_path / "a.png", icc_profile=linear)
    light = 128 / 255
    expected = 255 * (1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(fetched(tmp_path, 3)[2, 3].astype(float) - expected).max() <= 1.5
    image.save(tmp_path / "a.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert fetched(tmp_path, 3)[2, 3].tolist() == [128, 128, 128]


def test_profiles_of_16_bits_become_srgb():
    pytest.importorskip("imagecodecs")
    linear = linear_profile(struct.pack(">4sII", b"curv", 0, 0))
    light = np.linspace(0.1, 1, 8)
    pixels = np.repeat(np.tile(light * 65535, (4, 1))[..., None], 3, -1).round().astype("uint16")
    expected = 65535 * (1.055 * light ** (1 / 2.4) - 0.055)
    png = png16(pixels, iCCP=b"x\0\0" + zlib.compress(linear))
    for contents in (png, tiff(pixels, photometric="rgb", iccprofile=linear)):
        assert np.abs(decode(io.BytesIO(contents)).pixels[0, :, 1] - expected).max() < 20


def png8(pixels: np.ndarray, **chunks: bytes) -> bytes:
    """Return a PNG (H, W, C) with more `chunks` before its pixels."""
    file, info = io.BytesIO(), PngInfo()
    for name, data in chunks.items():
        info.add(name.encode(), data)
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize(("write", "largest", "channels"), [(png8, 255, 1), (png8, 255, 4), (png16, 65535, 3)])
def test_gamma_of_png_becomes_srgb(write, largest, channels):
    """Values are light^gamma; about 1/2.2 is that of sRGB, and opacity is not changed."""
    values = uniform(*SHAPE, channels, dtype=f"uint{8 if largest == 255 else 16}", high=largest)
    light = values / largest
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * largest
    if channels == 4:
        expected[..., 3] = values[..., 3]
    linear = decode(io.BytesIO(write(values, gAMA=struct.pack(">I", 100_000)))).pixels
    assert np.abs(linear - expected).max() <= 0.51
    for chunks in ({"gAMA": struct.pack(">I", 45455)}, {"gAMA": struct.pack(">I", 100_000), "sRGB": b"\0"}):
        assert np.array_equal(decode(io.BytesIO(write(values, **chunks))).pixels, values)


def test_png_in_other_colors_is_refused():
    """The codes of ITU-T H.273: primaries of BT.2020 with PQ, and of sRGB with its curve."""
    for write, values in ((png8, uniform(*SHAPE, 3)), (png16, RGB16)):
        assert np.array_equal(decode(io.BytesIO(write(values, cICP=bytes([1, 13, 0, 1])))).pixels, values)
        with pytest.raises(ValueError, match="cICP"):
            decode(io.BytesIO(write(values, cICP=bytes([9, 16, 0, 1]))))


def test_depth_that_is_lost_is_reported(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    for bits in (8, 10):
        values = uniform(16, 16, 3, dtype=f"uint{8 if bits == 8 else 16}", high=2**bits - 1)
        (tmp_path / "a.avif").write_bytes(imagecodecs.avif_encode(values, bitspersample=bits))
        assert ("read as 8 bits" in folder(str(tmp_path), SHAPE, 3, cache=False).summary) == (bits == 10)


def test_invalid_orientations_are_ignored():
    """As by Pillow, in a TIFF of 16 bits."""
    for tag in (0, 9):
        contents = tiff(GRAY16[..., 0], extratags=[(274, "H", 1, tag, True)])
        assert np.array_equal(decode(io.BytesIO(contents)).pixels, GRAY16)


def linear_profile(curve: bytes) -> bytes:
    """Return Pillow's sRGB profile with its three tone curves replaced by a linear one (ICC.1:2010, table of tags)."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack(">I", profile[128:132])
    place = len(profile)
    profile += curve
    for k in range(count):
        entry = 132 + 12 * k
        if profile[entry : entry + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            profile[entry + 4 : entry + 12] = struct.pack(">II", place, len(curve))
        if profile[entry : entry + 4] == b"desc":
            offset, size = struct.unpack(">II", profile[entry + 4 : entry + 12])
            text = profile[offset : offset + size].replace("sRGB".encode("utf-16-be"), "line".encode("utf-16-be"))
            profile[offset : offset + size] = text.replace(b"sRGB", b"line")
    profile[:4] = struct.pack(">I", len(profile))
    return bytes(profile)


@pytest.mark.parametrize("suffix", [".heic", ".jp2", ".avif", ".webp", ".qoi", ".tga", ".pcx", ".dds"])
def test_other_formats_are_decoded_as_pillow_does(tmp_path, suffix):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    Image.fromarray(uniform(*SHAPE, 3)).save(tmp_path / f"a{suffix}")
    with Image.open(tmp_path / f"a{suffix}") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(fetched(tmp_path, 3), expected)


def test_images_are_found_by_contents(tmp_path):
    """Also without an ending or with an unusual one; other files are listed by the reason."""
    Image.fromarray(uniform(*SHAPE)).save(tmp_path / "noending", format="PNG")
    Image.fromarray(uniform(*SHAPE)).save(tmp_path / "b.dat", format="JPEG")
    (tmp_path / "c.dat").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("text")
    found = find_images(tmp_path)
    assert list(found.names) == ["b.dat", "noending"]
    assert {name for names in found.left_out.values() for name in names} == {"c.dat", "notes.txt"}


def test_links_to_folders_are_followed(tmp_path):
    """Links that lead to a parent, or nowhere, are reported."""
    root, other = tmp_path / "root", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    for name in ("cats", "dogs"):
        (other / name).mkdir()
        Image.fromarray(uniform(*SHAPE)).save(other / name / "a.png")
        (root / name).symlink_to(other / name)
    (root / "cats" / "up").symlink_to(root)
    (root / "gone.png").symlink_to(tmp_path / "nowhere")
    source = folder(str(root), SHAPE, 1)
    assert list(source.found.names) == ["cats/a.png", "dogs/a.png"]
    assert source.labels.classes == ["cats", "dogs"]
    assert source.found.left_out == {"linked to a parent folder": ["cats/up"], "linked to nothing": ["gone.png"]}


def save(root: Path, *names: str) -> None:
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(uniform(*SHAPE, high=200 + k)).save(root / name)


@pytest.mark.parametrize("val", ["val", "valid", "Validation", "dev"])
def test_folders_of_splits_are_no_classes(tmp_path, val):
    """Test images are never used, and the folder for validation is the validation set."""
    save(tmp_path, "train/cats/a.png", "train/dogs/b.png", f"{val}/cats/c.png", "test/dogs/d.png")
    source = folder(str(tmp_path), SHAPE, 1)
    assert {*source.found.names} == {"train/cats/a.png", "train/dogs/b.png", f"{val}/cats/c.png"}
    assert source.labels.classes == ["cats", "dogs"]
    held_out = [name for name, held in zip(source.found.names, source.val_mask, strict=True) if held]
    assert held_out == [f"{val}/cats/c.png"]
    assert source.found.left_out == {"for testing": ["test/dogs/d.png"]}
    assert "1 for testing" in source.summary


def test_a_stray_file_does_not_remove_the_classes(tmp_path):
    save(tmp_path, *(f"{name}/{k}.png" for name in ("cats", "dogs") for k in range(12)), "stray.png")
    source = folder(str(tmp_path), SHAPE, 1)
    assert source.labels.classes == ["cats", "dogs"]
    assert len(source) == len(source.labels.targets) == 24
    assert "stray.png" in source.summary
    save(tmp_path, "stray2.png", "stray3.png")
    assert folder(str(tmp_path), SHAPE, 1).labels is None  # too many to be strays


def test_a_pattern_finds_classes_in_names(tmp_path):
    save(tmp_path, "a/cat_1.png", "b/dog_1.png", "b/cat_2.png")
    labels = folder(str(tmp_path), SHAPE, 1, class_pattern=r"([a-z]+)_\d").labels
    assert [labels.classes[k] for k in labels.targets] == ["cat", "cat", "dog"]
    for wrong in ("cat_", "(cat)_(1)", "(", "(cat)_"):
        with pytest.raises(ValueError, match=r"data\.source\.class_pattern"):
            folder(str(tmp_path), SHAPE, 1, class_pattern=wrong)


@pytest.mark.parametrize("kind", ["zip", "gztar", "tar"])
def test_archives_are_read_in_place(tmp_path, kind):
    save(tmp_path / "in", "cats/a.png", "dogs/b.png", "dogs/c.png")
    archive = shutil.make_archive(str(tmp_path / "images"), kind, tmp_path / "in")
    direct, packed = folder(str(tmp_path / "in"), SHAPE, 1), folder(archive, SHAPE, 1)
    assert list(packed.found.names) == list(direct.found.names)
    assert packed.labels.classes == direct.labels.classes
    assert torch.equal(packed.fetch([0, 1, 2]), direct.fetch([0, 1, 2]))
    assert torch.equal(folder(archive, SHAPE, 1, cache=False).fetch([2]), direct.fetch([2]))


def test_files_of_a_tar_are_read_at_their_place(tmp_path):
    """Also with names of more than 100 characters, and without reading the archive from its start."""
    long = "/".join(["folder" * 10, "b" * 120 + ".png"])
    save(tmp_path / "in", "a.png", long)
    archive = Path(shutil.make_archive(str(tmp_path / "images"), "tar", tmp_path / "in"))
    places = dict(tar_places(archive))
    for name in ("a.png", long):
        offset, size = places[name]
        assert archive.read_bytes()[offset : offset + size] == (tmp_path / "in" / name).read_bytes()
        assert open_member(archive, name).read() == (tmp_path / "in" / name).read_bytes()
    with pytest.raises(OSError, match=r"c\.png"):
        open_member(archive, "c.png")


@pytest.mark.parametrize("keep", ["in a header", "after a member", "in a member"])
def test_a_tar_that_is_cut_off_is_refused(tmp_path, keep):
    save(tmp_path / "in", "a.png", "b.png")
    archive = Path(shutil.make_archive(str(tmp_path / "images"), "tar", tmp_path / "in"))
    offset = max(offset for _, (offset, _) in tar_places(archive))
    size = {"in a header": offset - 300, "after a member": offset - 512, "in a member": offset + 10}[keep]
    archive.write_bytes(archive.read_bytes()[:size])
    assert all(part in refusal(archive) for part in (str(archive), "cut off", "data.root"))


def refusal(root: Path, channels: int = 1, **options: object) -> str:
    with pytest.raises(ValueError) as error:
        folder(str(root), SHAPE, channels, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_constant_and_dark_images_are_refused(tmp_path):
    """Eight-bit masks of 0 and 1 would train as black images."""
    Image.new("L", SHAPE[::-1], 7).save(tmp_path / "a.png")
    assert "7" in refusal(tmp_path)
    Image.fromarray(uniform(*SHAPE, high=1)).save(tmp_path / "a.png")
    assert "data.value_range=[0,1]" in refusal(tmp_path)
    source = folder(str(tmp_path), SHAPE, 1, value_range=[0, 1])
    assert source.fetch([0]).unique().tolist() == [0, 1] and source.value_range == (0, 1)


def test_masks_need_no_cache(tmp_path):
    """Their range is that of their type, and a file of another type is refused."""
    masks = [uniform(*SHAPE, high=1 + k) == 1 for k in range(2)]
    for k, mask in enumerate(masks):
        np.save(tmp_path / f"{k}.npy", mask)
    for value_range in (None, [0, 1]):
        source = folder(str(tmp_path), SHAPE, 1, cache=False, value_range=value_range)
        assert source.value_range == (0, 1)
        assert np.array_equal(source.fetch([0, 1])[:, 0].numpy(), masks)
    np.save(tmp_path / "2.npy", uniform(*SHAPE))
    with pytest.raises(DataReadError, match=r"2\.npy .*uint8.*bool"):
        folder(str(tmp_path), SHAPE, 1, cache=False).fetch([2])


def test_types_that_do_not_compare_are_refused(tmp_path):
    save(tmp_path, "a.png")
    (tmp_path / "b.png").write_bytes(png16(GRAY16))
    message = refusal(tmp_path)
    assert all(part in message for part in ("uint8", "uint16", "a.png", "b.png", "data.value_range="))
    (tmp_path / "c.png").write_bytes(png16(GRAY16 // 257))
    source = folder(str(tmp_path), SHAPE, 1, value_range=[0, 65535])
    assert np.array_equal(source.fetch([1])[0, 0].numpy(), GRAY16[..., 0])


def test_unreadable_files_have_a_reason(tmp_path):
    """They are refused, or left out up to a share."""
    save(tmp_path, *(f"{k}.png" for k in range(4)))
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    np.save(tmp_path / "nan.npy", np.full(SHAPE, np.nan))
    np.savez(tmp_path / "two.npz", a=np.zeros(SHAPE), b=np.zeros(SHAPE))
    (tmp_path / "text.jpg").write_text("no image")
    message = refusal(tmp_path, skip_unreadable=True)
    assert "4 of 8" in message and "data.skip_unreadable" in message
    source = folder(str(tmp_path), SHAPE, 1, skip_unreadable=0.5)
    assert list(source.found.names) == [f"{k}.png" for k in range(4)]
    reasons = {Path(path).name: reason for path, reason in source.unreadable.items()}
    assert set(reasons) == {"truncated.png", "nan.npy", "two.npz", "text.jpg"}
    assert (
        "truncated" in reasons["truncated.png"] and "finite" in reasons["nan.npy"] and "2 arrays" in reasons["two.npz"]
    )


def test_ranges_follow_the_type_of_the_values():
    """Of 12 bits in 16, of floats in [0, 1] or [-1, 1], and as measured otherwise."""
    assert infer_range("uint8", 3, 99) == (0, 255)
    assert infer_range("uint16", 3, 2900) == (0, 4095)
    assert infer_range("uint16", 0, 65535) == (0, 65535)
    assert infer_range("float32", 0.2, 0.9) == (0, 1)
    assert infer_range("float64", -0.2, 0.9) == (-1, 1)
    assert infer_range("float32", -3, 900) == (-3, 900)
    assert infer_range("int16", -1000, 3000) == (-1000, 3000)


@pytest.mark.parametrize(("height", "width"), [(20, 37), (64, 32), (7, 5)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_rectangles_keep_a_linear_ramp(height, width, fit):
    """A ramp stays a ramp: bicubic interpolation reproduces linear functions away from the edges."""
    ramp = np.add.outer(2.0 * np.arange(120), 3.0 * np.arange(90)).astype(np.float32)
    file = io.BytesIO(numpy_file(ramp))
    x = load_image(file, ImageSpec((height, width), 1, fit)).pixels[0]
    assert x.shape == (height, width)
    if fit == "pad":
        return
    scale_y, scale_x = (120 / height, 90 / width) if fit == "stretch" else (min(120 / height, 90 / width),) * 2
    steps_y, steps_x = np.diff(x, axis=0)[2:-2, 2:-2], np.diff(x, axis=1)[2:-2, 2:-2]
    np.testing.assert_allclose(steps_y, 2 * scale_y, rtol=0.05)
    np.testing.assert_allclose(steps_x, 3 * scale_x, rtol=0.05)


def test_padding_keeps_the_whole_image():
    """A 40x20 image in 20x20 has five rows of its edge above and below."""
    image = uniform(20, 40)
    x = load_image(io.BytesIO(numpy_file(image)), ImageSpec((20, 20), 1, "pad")).pixels[0]
    assert (x[:5] == x[5]).all() and (x[15:] == x[14]).all()
    half = np.asarray(Image.fromarray(image).resize((20, 10), Image.Resampling.BICUBIC, reducing_gap=3.0))
    assert np.array_equal(x[5:15], half)


def test_large_jpegs_are_decoded_at_reduced_size():
    """With nearly the same result as decoding all and resizing."""
    y, x = np.mgrid[:800, :1200]
    pixels = np.stack([x / 1200, y / 800, (x + y) / 2000], -1) * 200 + 20
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95)
    assert decode(io.BytesIO(file.getvalue()), at_least=128).pixels.shape[:2] == (200, 300)
    loaded = load_image(io.BytesIO(file.getvalue()), ImageSpec((64, 64), 3))
    assert loaded.size == (1200, 800)
    whole = Image.open(file).resize((64, 64), Image.Resampling.BICUBIC, box=(200, 0, 1000, 800))
    assert np.abs(loaded.pixels.transpose(1, 2, 0).astype(int) - np.asarray(whole).astype(int)).max() <= 3


def test_the_cache_is_used_until_files_change(tmp_path, monkeypatch):
    save(tmp_path / "in", "a.png", "b.png")
    options = {"cache_dir": str(tmp_path / "cache")}
    first = folder(str(tmp_path / "in"), SHAPE, 1, **options)
    before = first.fetch([0, 1])
    with monkeypatch.context() as patched:
        patched.setattr(pixel_store, "load_image", None)  # decoding would fail
        assert torch.equal(folder(str(tmp_path / "in"), SHAPE, 1, **options).fetch([0, 1]), before)
    Image.fromarray(255 - before[0, 0].numpy()).save(tmp_path / "in" / "a.png")
    os.utime(tmp_path / "in" / "a.png", ns=(0, 0))
    again = folder(str(tmp_path / "in"), SHAPE, 1, **options)
    assert torch.equal(again.fetch([0]), 255 - before[:1])
    assert torch.equal(again.fetch([1]), before[1:])


def test_an_image_that_becomes_readable_is_used(tmp_path, monkeypatch):
    """For example after a decoder was installed."""
    save(tmp_path / "in", *(f"{k}.png" for k in range(4)))
    options = {"cache_dir": str(tmp_path / "cache"), "skip_unreadable": 0.5}
    load = pixel_store.load_image

    def without_a_decoder(stream, spec):
        if stream.name.endswith("2.png"):
            raise ValueError("no decoder")
        return load(stream, spec)

    with monkeypatch.context() as patched:
        patched.setattr(pixel_store, "load_image", without_a_decoder)
        assert folder(str(tmp_path / "in"), SHAPE, 1, **options).unreadable == {
            str(tmp_path / "in" / "2.png"): "no decoder"
        }
    source = folder(str(tmp_path / "in"), SHAPE, 1, **options)
    assert source.unreadable == {}
    assert torch.equal(source.fetch(range(4)), folder(str(tmp_path / "in"), SHAPE, 1, cache=False).fetch(range(4)))


def test_many_files_are_decoded_in_processes(tmp_path, monkeypatch):
    """With the same pixels as in one process."""
    save(tmp_path / "in", *(f"{k:03}.png" for k in range(40)))
    monkeypatch.setattr(pixel_store, "MIN_PARALLEL", 10)
    monkeypatch.setattr(pixel_store, "CHUNK", 7)
    several = folder(str(tmp_path / "in"), SHAPE, 1, cache_dir=str(tmp_path / "a"))
    one = folder(str(tmp_path / "in"), SHAPE, 1, cache=False)
    assert torch.equal(several.fetch(range(40)), one.fetch(range(40)))


def decode_until_killed(root: Path, cache: Path, events: int) -> None:
    """Decode a folder in a forked process, which is killed with its workers at its event number `events`.

    An event is an image decoded, or a file of the cache closed or renamed.
    """
    counter = os.open(cache.with_suffix(".events"), os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_APPEND)
    if (child := os.fork()) > 0:
        os.close(counter)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        return

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            os.write(counter, b".")
            if os.fstat(counter).st_size >= events:
                os.killpg(0, signal.SIGKILL)
            return function(*arguments, **options)

        return call

    try:
        os.setsid()
        pixel_store.load_image = counted(pixel_store.load_image)
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        pixel_store.CHUNK, pixel_store.MIN_PARALLEL = 4, 8
        pixel_store.open_pixels(find_images(root), ImageSpec(SHAPE, 1), cache)
    finally:
        os._exit(0)


def test_a_killed_process_leaves_no_wrong_image(tmp_path):
    """Killed while it decodes or writes; the next process has every pixel right."""
    count = 20
    save(tmp_path / "in", *(f"{k:03}.png" for k in range(count)))
    cache = tmp_path / "cache"
    cache.mkdir()
    for events in (1, 7, count, count + 2, count + 5):  # the image that shows the type is decoded twice
        decode_until_killed(tmp_path / "in", cache, events)
        assert not [folder for folder in cache.glob("*/about.json") if ".partial" not in folder.parent.name]
    expected = folder(str(tmp_path / "in"), SHAPE, 1, cache=False).fetch(range(count))
    assert torch.equal(folder(str(tmp_path / "in"), SHAPE, 1, cache_dir=str(cache)).fetch(range(count)), expected)
    assert [path.name for path in cache.iterdir() if "partial" in path.name] == []


def test_a_full_disk_means_decoding_each_time(tmp_path):
    save(tmp_path / "in", "a.png", "b.png")
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match=r"data\.cache_dir"):
        source = folder(str(tmp_path / "in"), SHAPE, 1, cache_dir=str(tmp_path / "file" / "cache"))
    assert source.store is None
    assert torch.equal(source.fetch([0]), folder(str(tmp_path / "in"), SHAPE, 1).fetch([0]))


def test_several_roots_and_one_for_validation(tmp_path):
    save(tmp_path / "a", "cats/1.png", "dogs/2.png")
    save(tmp_path / "b", "cats/1.png", "birds/4.png")
    save(tmp_path / "v", "cats/5.png")
    source = folder([str(tmp_path / "a"), str(tmp_path / "b")], SHAPE, 1, val_root=str(tmp_path / "v"))
    assert [source.labels.classes[k] for k in source.labels.targets] == ["cats", "dogs", "birds", "cats", "cats"]
    assert source.val_mask.tolist() == [False] * 4 + [True]
    assert len({*source.ids}) == 5
    paths = [
        tmp_path / name for name in ("a/cats/1.png", "a/dogs/2.png", "b/birds/4.png", "b/cats/1.png", "v/cats/5.png")
    ]
    expected = [np.asarray(Image.open(path)) for path in paths]
    assert np.array_equal(source.fetch(range(5))[:, 0].numpy(), expected)
    with pytest.raises(FileNotFoundError, match=r"data\.val_root"):
        folder(str(tmp_path / "a"), SHAPE, 1, val_root=str(tmp_path / "nowhere"))


def test_train_beside_other_folders_is_a_class(tmp_path):
    """Unless another folder is a split, too."""
    save(tmp_path, "train/a.png", "bus/b.png", "car/c.png")
    source = folder(str(tmp_path), SHAPE, 1)
    assert source.labels.classes == ["bus", "car", "train"] and source.val_mask is None
    save(tmp_path, "test/d.png")
    assert list(folder(str(tmp_path), SHAPE, 1).found.names) == ["train/a.png"]


def test_tables_of_several_roots_label_each_file(tmp_path):
    """Also files of one name in two roots; the table is not among the files that were left out."""
    save(tmp_path / "a", "1.png", "2.png")
    save(tmp_path / "b", "1.png")
    rows = ["1.png,x", "2.png,y", f"{tmp_path / 'b' / '1.png'},z"]
    (tmp_path / "a" / "classes.csv").write_text("\n".join(["file,label", *rows]))
    source = folder([str(tmp_path / "a"), str(tmp_path / "b")], SHAPE, 1, labels="classes.csv")
    assert [source.labels.classes[k] for k in source.labels.targets] == ["x", "y", "z"]
    assert source.found.left_out == {}
    (tmp_path / "a" / "classes.csv").write_text("\n".join(["file,label", *rows[:2]]))
    with pytest.raises(ValueError, match="no label for 1 of 3"):
        folder([str(tmp_path / "a"), str(tmp_path / "b")], SHAPE, 1, labels="classes.csv")


def test_captions_of_several_roots_are_read(tmp_path):
    for root, text in (("a", "one"), ("b", "two")):
        save(tmp_path / root, "1.png")
        (tmp_path / root / "1.txt").write_text(text)
    (tmp_path / "a" / "notes.md").write_text("not read")
    source = captioned([str(tmp_path / "a"), str(tmp_path / "b")], SHAPE, 1)
    assert source.captions == [["one"], ["two"]]
    assert [name for names in source.found.left_out.values() for name in names] == ["notes.md"]


def test_samples_take_the_most_common_format(tmp_path):
    save(tmp_path, "a.bmp", "b.png", "c.png")
    assert folder(str(tmp_path), SHAPE, 1).suffix == ".png"


def test_a_folder_without_a_readable_file_is_refused(tmp_path):
    """Whatever share may be left out."""
    (tmp_path / "a.png").write_text("no image")
    assert "1 of 1" in refusal(tmp_path, skip_unreadable=1.0)
