"""Images decoded once into an array on disk, which all processes and later runs read without decoding."""

import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from src.data.encoded import EncodedImages
from src.data.fit import ImageSpec, Loaded, load_image, prepare_image
from src.data.read_errors import read_with_retries
from src.errors import DataReadError

Array = npt.NDArray[Any]
T = TypeVar("T")

VERSION = 5
"""Changes whenever the same files give other pixels."""

CHUNK = 64
"""Images that a process decodes at a time."""

MIN_PARALLEL = 512
"""Smallest number of files that is worth starting processes for."""

logger = logging.getLogger(__name__)


class PixelStore(NamedTuple):
    """Decoded images: `pixels` (N, C, H, W), uint8 if the files have 8 bits, else float32 with their values.

    Images of different shapes have their `pixels` (V,) in one row, and `places` (N, 4) has the offset and the shape
    C, H, W of each.

    `low`, `high` (N,) are the least and largest value of each file, `sizes` (N, 2) its width and height, `frames` (N,)
    the number of its images, `types` (N,) the type of its values. `errors` has the reason for each image that cannot
    be read, whose pixels are 0.
    """

    pixels: Array
    low: Array
    high: Array
    sizes: Array
    frames: Array
    types: Array
    errors: dict[int, str]
    places: Array | None = None

    @property
    def ok(self) -> npt.NDArray[np.bool_]:
        """Return which images (N,) could be read."""
        mask = np.ones(len(self.low), bool)
        mask[list(self.errors)] = False
        return mask

    def image(self, index: int) -> Array:
        """Return one image (C, H, W)."""
        if self.places is None:
            image: Array = self.pixels[index]
            return image
        start, *shape = self.places[index].tolist()
        return self.pixels[start : start + math.prod(shape)].reshape(shape)


Part = tuple[dict[int, Loaded], dict[int, str]]
"""Images that a process has decoded, by index, and why others cannot be read. Only images of different shapes have
their `pixels`; others are in the file."""


def default_cache_dir() -> Path:
    """Return the folder for decoded images: `DIFFUSION_CACHE`, or one below the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DIFFUSION_CACHE") or Path(cache) / "denoising-diffusion-lab") / "images"


def open_pixels(found: EncodedImages, spec: ImageSpec, cache_dir: Path) -> PixelStore:
    """Return the decoded images, from `cache_dir` if they are there, else after decoding all in parallel.

    The key is `found.identity()` and `spec`. Raises OSError if the cache cannot be written, and DataReadError if a
    process that decodes dies.
    """
    folder = cache_dir / store_key(found, spec)
    store = _read(folder)
    if store is not None and not _readable_now(store, found, spec):
        return store
    return fill_cache(folder, _read, partial(_write, found=found, spec=spec), again=store is not None)


def fill_cache(folder: Path, read: Callable[[Path], T | None], write: Callable[[Path], None], again: bool = False) -> T:
    """Return what `read` finds in a folder of the cache, after `write` has filled it unless it is complete.

    The folder is complete or does not exist, whenever a process is killed. One process writes; others wait for it.
    `again` replaces a complete folder. Raises OSError if the cache cannot be written.
    """
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not again and (complete := read(folder)) is not None:
            return complete
        for left in folder.parent.glob(f"{folder.name}.partial*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        part = folder.with_name(f"{folder.name}.partial{os.getpid()}")
        part.mkdir()
        try:
            write(part)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    written = read(folder)
    assert written is not None
    return written


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError if the disk of a folder has fewer free bytes than needed."""
    if needed > (free := shutil.disk_usage(folder).free):
        raise OSError(f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")


def store_key(found: EncodedImages, spec: Any) -> str:
    """Return the name of the cache of these files, decoded to `spec`, which changes with either."""
    return sha256(f"{VERSION} {found.identity()} {spec!r}".encode()).hexdigest()[:32]


def _read(folder: Path) -> PixelStore | None:
    """Return a complete store, or None."""
    try:
        about = json.loads((folder / "about.json").read_text())
        pixels = np.memmap(folder / "pixels.bin", about["dtype"], "r", shape=tuple(about["shape"]))
        with np.load(folder / "files.npz") as files:
            columns = {name: files[name] for name in files.files}
        return PixelStore(pixels, **columns, errors={int(k): str(v) for k, v in about["errors"].items()})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _readable_now(store: PixelStore, found: EncodedImages, spec: ImageSpec) -> bool:
    """Return whether an image that could not be read can be now, for example after a decoder was installed."""
    return any(try_load(found, spec, k)[0] is not None for k in store.errors)


def try_load(found: EncodedImages, spec: ImageSpec, index: int) -> tuple[Any, str]:
    """Return the image, or None and the reason why it cannot be read."""
    try:
        return read_with_retries(str(found.path(index)), partial(load_sample, found, spec, index)), ""
    except DataReadError as error:
        return None, str((error.__cause__ and " ".join(str(error.__cause__).split())) or error)


def load_sample(found: EncodedImages, spec: ImageSpec, index: int) -> Loaded:
    """Return a decoded image, which is not all of one file if `found` has a method `decode`. Raises as `decode` does.

    Such a method returns image `index` with its original values, given the setting `pages`.
    """
    if (decode := getattr(found, "decode", None)) is not None:
        return prepare_image(decode(index, spec.pages), spec)
    with found.open(index) as stream:
        return load_image(stream, spec)


def _write(folder: Path, found: EncodedImages, spec: ImageSpec) -> None:
    """Decode all images into `folder`."""
    shape: tuple[int, ...] = (len(found), spec.channels, *spec.size)
    varies, extra = spec.varies, dict[str, Any]()
    for dtype in dict.fromkeys((_storage_type(found, spec), "float32")):
        itemsize = np.dtype(dtype).itemsize
        check_space(folder, needed := math.prod(shape) * itemsize)
        path = folder / "pixels.bin"
        with path.open("wb") as file:
            file.truncate(0 if varies else needed)
        low, high = np.zeros(len(found)), np.zeros(len(found))
        sizes, frames = np.zeros((len(found), 2), np.int64), np.zeros(len(found), np.int64)
        types, errors = np.zeros(len(found), "U16"), {}
        places, end = np.zeros((len(found), 4), np.int64), 0
        for images, unread in _decode_all(found, spec, path, dtype, needed):
            errors.update(unread)
            with path.open("ab") as file:
                for k, image in images.items():
                    low[k], high[k], sizes[k], frames[k], types[k] = image[1:]
                    if varies:
                        places[k] = end, *image.pixels.shape
                        end += image.pixels.size
                        file.write(image.pixels.tobytes())
        if dtype == "float32" or set(types) <= {"", "bool", "uint8"}:
            break
    if varies:
        shape, extra = (max(end, 1),), {"places": places}
        with path.open("ab") as file:
            file.truncate(shape[0] * itemsize)
    np.savez(folder / "files.npz", low=low, high=high, sizes=sizes, frames=frames, types=types, **extra)
    (folder / "about.json").write_text(json.dumps({"shape": shape, "dtype": dtype, "errors": errors}))
    for each in folder.iterdir():
        with each.open("rb") as file:
            os.fsync(file.fileno())


def _storage_type(found: EncodedImages, spec: ImageSpec) -> str:
    """Return uint8 if the first image that can be read has 8 bits, else float32."""
    for k in range(len(found)):
        image, _ = try_load(found, spec, k)
        if image is not None:
            return "uint8" if image.pixels.dtype == np.uint8 else "float32"
    return "uint8"


def _decode_all(found: EncodedImages, spec: ImageSpec, path: Path, dtype: str, needed: int) -> Iterator[Part]:
    """Decode all images into the file `path`, and yield what is found out about them."""
    from tqdm import tqdm

    chunks = [range(start, min(start + CHUNK, len(found))) for start in range(0, len(found), CHUNK)]
    work = partial(_decode_chunk, found, spec, path, dtype)
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = f"{'about ' * spec.varies}{needed / 1e6:,.0f} MB"
    title = f"Decoding {len(found):,} images once ({size} in {path.parent.parent})"
    bar = tqdm(total=len(found), unit="image", desc=title, disable=None if len(found) >= MIN_PARALLEL else True)
    if not sys.stderr.isatty() and len(found) >= MIN_PARALLEL:
        logger.info(title)
    with bar:
        for part in _run(work, chunks, processes if len(found) >= MIN_PARALLEL else 1):
            bar.update(len(part[0]) + len(part[1]))
            yield part


def _run(work: Any, chunks: Sequence[range], processes: int) -> Iterable[Part]:
    if processes == 1:
        return map(work, chunks)
    # A forked process needs no imports, and never uses torch or the device.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    return _run_in_processes(chunks, ProcessPoolExecutor(processes, context, _start_process, (work,)))


def _run_in_processes(chunks: Sequence[range], pool: ProcessPoolExecutor) -> Iterator[Part]:
    try:
        yield from pool.map(_work_on, chunks)
    except BrokenProcessPool as error:
        raise DataReadError("a process that decodes images died, often for lack of memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[range], Part] | None = None


def _start_process(work: Callable[[range], Part]) -> None:
    """Store the work once per process, since it holds all names, and leave Ctrl-C to the process that started it."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work_on(chunk: range) -> Part:
    assert _work is not None
    return _work(chunk)


def _decode_chunk(found: EncodedImages, spec: ImageSpec, path: Path, dtype: str, indices: range) -> Part:
    """Decode some images into their places in the file `path`, or return their pixels if their shapes differ."""
    pixels = np.zeros((0 if spec.varies else len(indices), spec.channels, *spec.size), dtype)
    images, errors = dict[int, Loaded](), dict[int, str]()
    for row, index in enumerate(indices):
        image, reason = try_load(found, spec, index)
        if image is None:
            errors[index] = reason
            continue
        if not spec.varies and (dtype == "float32" or image.type in ("bool", "uint8")):
            pixels[row] = image.pixels  # otherwise all are decoded again, as float32
        images[index] = image._replace(pixels=image.pixels.astype(dtype) if spec.varies else np.empty(0))
    if not spec.varies:
        with path.open("r+b") as file:
            file.seek(indices.start * pixels[0].nbytes)
            file.write(pixels.tobytes())
    return images, errors
