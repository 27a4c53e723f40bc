"""Shards of images in tar files, in the format of webdataset, as a source.

The files of a sample follow the library: they differ after the first dot of their names. They are read at their places
in the shards, by an index that is built once, and not through the library's pipeline: its shuffle buffers and its deal
of shards to workers have no position that a resumed run could return to, and give other batches for another number of
processes. Here sample k is the same image for any process at any time.
"""

import glob
import http.client
import io
import json
import logging
import os
import re
import shutil
import tarfile
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from src.cache import write_atomically
from src.data.decode import ARRAY_SUFFIXES, Pages, image_suffixes
from src.data.encoded import ImageBytes, Names
from src.data.fit import Fit, ImageSpec, height_and_width
from src.data.folder import FolderImages, open_images
from src.data.pixel_store import default_cache_dir
from src.data.scan import read_at, tar_places
from src.data.table_files import first_names
from src.quoting import format_override

VERSION = 1
"""Changes whenever the same shards give another index."""

CAPTION_KEYS = ("txt", "text", "caption", "captions")
"""Endings of files with the caption, or keys of the .json."""

LABEL_KEYS = ("cls", "label", "class")
"""Endings of files with the class, or keys of the .json."""

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
"""The first bytes of files compressed by gzip, bzip2 and xz."""

TIMEOUT = 60
"""Seconds without an answer after which a download fails."""

logger = logging.getLogger(__name__)


def shards(
    root: str | Sequence[str] | None,
    image_size: int | Sequence[int],
    channels: int,
    prepare: bool = False,
    *,
    image_key: str | None = None,
    caption_key: str | None = None,
    label_key: str | None = None,
    fit: Fit = "crop",
    background: str = "white",
    pages: Pages = "first",
    value_range: Sequence[float] | None = None,
    skip_unreadable: bool | float = False,
    cache: bool = True,
    cache_dir: str | None = None,
    val_root: str | Sequence[str] | None = None,
) -> FolderImages:
    """Open the images of shards with their classes and captions.

    Args:
        root: paths or http(s) URLs of the shards, one or several, with braces such as `{0000..0009}` or `*`. Shards
            from the network, and compressed ones, are stored in `cache_dir` once.
        image_size: of the images that are returned, in pixels: one number or (H, W).
        channels: of the images that are returned.
        prepare: unused; shards are downloaded when they are missing.
        val_root: the shards for validation (`data.val_urls`). None takes `data.val_fraction` of the samples.
        image_key: the ending of the images, or several separated by `;`. None takes the only image of each sample.
        caption_key, label_key: the ending of the file, or the key in the .json, with the caption and with the class.
            None takes the first of `CAPTION_KEYS` and of `LABEL_KEYS`.
        fit, background, pages, value_range, skip_unreadable, cache, cache_dir: as in `src.data.folder.folder`.

    Raises:
        FileNotFoundError: If a shard does not exist.
        ValueError: If a shard is cut off or cannot be downloaded, if samples have several images, or no caption or
            class where one was typed, or as `folder` does.
    """
    store = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / "shards"
    train = [_local(url, store, "data.urls") for url in expand_urls(root, "data.urls")]
    val = [] if val_root is None else [_local(url, store, "data.val_urls") for url in expand_urls(val_root)]
    paths = [*train, *val]
    keys = Keys(image_key, caption_key, label_key)
    status = [path.stat() for path in paths]
    stated = [(str(path.resolve()), s.st_size, s.st_mtime_ns) for path, s in zip(paths, status, strict=True)]
    key = sha256(repr((VERSION, stated, keys, sorted(image_suffixes()))).encode()).hexdigest()[:32]
    index = _read_index(store / f"{key}.npz")
    if index is None:
        index = _build_index(paths, keys)
        _write_index(store / f"{key}.npz", index)
    unique = len({path.name for path in paths}) == len(paths)
    prefixes = [path.name if unique else f"{k}/{path.name}" for k, path in enumerate(paths)]
    names = Names(f"{prefixes[k]}/{name}" for k, name in zip(index.shard, index.names, strict=True))
    found = ImageBytes(
        place=f"of {prefixes[0]}" if len(paths) == 1 else f"of {len(paths)} shards",
        key=key,
        names=names,
        sample_ids=names,
        sizes=index.size,
        read=partial(_read_sample, paths, index.shard, index.offset, index.size),
        val_mask=index.shard >= len(train) if val else None,
        left_out=index.left_out,
    )
    spec = ImageSpec(height_and_width(image_size), channels, fit, background, pages)
    classes = None if index.classes is None else list(index.classes)
    about = f"; {len(paths)} shards{index.about}"
    return open_images(found, spec, classes, index.captions, value_range, skip_unreadable, cache, cache_dir, about)


class Keys(NamedTuple):
    """The typed endings, or keys of the .json, of image, caption and class."""

    image: str | None
    caption: str | None
    label: str | None


class ShardIndex(NamedTuple):
    """The images in shards: number of the `shard`, `offset` and `size` in bytes (N,), name, captions and class.

    `captions` and `classes` are None if samples have none. `about` and `left_out` say what is not used.
    """

    shard: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    names: Names
    captions: list[list[str]] | None
    classes: Names | None
    left_out: dict[str, list[str]]
    about: str


def expand_urls(urls: str | Sequence[str] | None, setting: str = "data.val_urls") -> list[str]:
    """Return the paths and URLs of the shards, with braces and `*` expanded.

    Raises FileNotFoundError for a path without a file, and ValueError for braces that do not match.
    """
    given = [urls] if isinstance(urls, str) else list(urls or [])
    if not given:
        raise ValueError(f"{setting}=null has no shards; set {setting} to paths or URLs of tar files")
    expanded: list[str] = []
    for url in (part for each in given for part in each.split("::")):
        text = format_override(setting, url)
        for one in _expand_braces(url, text) if "{" in url else [url]:
            if re.match(r"https?://", one):
                expanded.append(one)
                continue
            path = os.path.expanduser(re.sub(r"^file:(//)?", "", one))
            if re.match(r"\w\w+:", path):
                raise ValueError(f"{text} must be a path or an http(s) URL; download the shards, and set their paths")
            matches = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path)))
            if not matches:
                raise FileNotFoundError(f"{text}: {path} does not exist; set {setting} to tar files")
            expanded += matches
    return expanded


def _expand_braces(url: str, text: str) -> list[str]:
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise ValueError(f"{text} has braces, which need the package webdataset; pip install webdataset") from error
    try:
        return list(braceexpand(url))
    except ValueError as error:
        raise ValueError(f"{text} has braces that do not match; write for example {{0000..0009}}") from error


def _local(url: str, store: Path, setting: str) -> Path:
    """Return the path of an uncompressed shard, after downloading or decompressing it into `store` if necessary."""
    path = Path(url)
    if re.match(r"https?://", url):
        name = Path(url.partition("?")[0]).name or "shard.tar"
        path = store / sha256(url.encode()).hexdigest()[:16] / name
        try:
            _store_once(path, partial(_download, url))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ValueError(
                f"{format_override(setting, url)} cannot be downloaded ({' '.join(str(error).split()):.200}); check "
                "the URL and the network"
            ) from error
    with path.open("rb") as file:
        compressed = file.read(6).startswith(COMPRESSED)
    if not compressed:
        return path
    status = path.stat()
    key = sha256(repr((str(path.resolve()), status.st_size, status.st_mtime_ns)).encode()).hexdigest()[:16]
    target = store / key / f"{path.name.partition('.')[0]}.tar"
    try:
        _store_once(target, partial(_decompress, path))
    except (EOFError, tarfile.TarError, zlib.error, OSError) as error:
        raise _damaged(path, error) from error
    return target


def _store_once(target: Path, write: Any) -> None:
    """Let `write` fill the file `target` unless it exists; other processes see all of it or none."""
    from filelock import FileLock

    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):
        if target.exists():
            return
        partial_file = target.with_name(f"{target.name}.partial")
        try:
            with partial_file.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial_file, target)
        finally:
            partial_file.unlink(missing_ok=True)


def _download(url: str, file: BinaryIO) -> None:
    logger.info("Downloading %s", url)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        shutil.copyfileobj(response, file)
        expected = response.headers.get("Content-Length")
    if expected is not None and file.tell() != int(expected):
        raise OSError(f"{file.tell()} of {expected} bytes arrived")


def _decompress(path: Path, file: BinaryIO) -> None:
    with tarfile.open(path) as archive:
        contents: Any = archive.fileobj  # the decompressed file
        contents.seek(0)
        shutil.copyfileobj(contents, file)


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()).removeprefix(f"{path} ") or type(error).__name__
    return ValueError(f"the shard {path} cannot be read ({reason}); write it again, or leave it out of data.urls")


def _read_sample(
    paths: Sequence[Path],
    shard: npt.NDArray[np.int64],
    offset: npt.NDArray[np.int64],
    size: npt.NDArray[np.int64],
    row: int,
) -> bytes:
    return read_at(paths[int(shard[row])], int(offset[row]), int(size[row]))


class _Sample(NamedTuple):
    """The image of a sample, its captions and its class; None without one."""

    shard: int
    image: str
    place: tuple[int, int]
    captions: list[str] | None
    label: str | None


def _build_index(paths: Sequence[Path], keys: Keys) -> ShardIndex:
    """Return the index of the shards, after reading the headers of all files, and all captions and classes."""
    from tqdm import tqdm

    samples: list[_Sample] = []
    left_out: dict[str, list[str]] = {}
    for number, path in enumerate(tqdm(paths, unit="shard", desc="Indexing shards once", disable=len(paths) < 10)):
        try:
            places = tar_places(path)
        except ValueError as error:
            raise _damaged(path, error) from error
        if places is None:
            raise _damaged(path, ValueError("it is not a tar file"))
        with path.open("rb") as file:
            samples += _samples_of(file, path, number, places, keys, left_out)
    if not samples:
        others = ", ".join(f"{len(names)} {reason}" for reason, names in left_out.items()) or "no files"
        raise ValueError(f"data.urls has no images in {len(paths)} shards ({others}); set data.urls to other shards")
    without = {
        "caption": [each.image for each in samples if not each.captions],
        "class": [each.image for each in samples if each.label is None],
    }
    about = ""
    for what, typed in (("caption", keys.caption), ("class", keys.label)):
        missing = without[what]
        if missing and typed is not None:
            setting = "caption_key" if what == "caption" else "label_key"
            raise ValueError(
                f"{format_override(f'data.source.{setting}', typed)}: {len(missing)} of {len(samples)} samples have "
                f"no such {what} ({first_names(missing)}); choose another ending or key"
            )
        if 0 < len(missing) < len(samples):
            about += f"; {len(missing):,} images have no {what}, so none is used"
    return ShardIndex(
        np.array([each.shard for each in samples], np.int64),
        np.array([each.place[0] for each in samples], np.int64),
        np.array([each.place[1] for each in samples], np.int64),
        Names(each.image for each in samples),
        None if without["caption"] else [each.captions or [] for each in samples],
        None if without["class"] else Names(each.label or "" for each in samples),
        left_out,
        about,
    )


def _samples_of(
    file: BinaryIO,
    path: Path,
    number: int,
    places: dict[str, tuple[int, int]],
    keys: Keys,
    left_out: dict[str, list[str]],
) -> Iterator[_Sample]:
    """Yield the samples of a shard, in the order of their first files."""
    files: dict[str, dict[str, str]] = {}
    for name in places:
        if match := re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", name):
            files.setdefault(match[1], {})[match[2].lower()] = name

    def text(name: str) -> str:
        offset, size = places[name]
        file.seek(offset)
        try:
            return file.read(size).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {name} is not UTF-8 text ({error}); write it again as UTF-8") from error

    for key, endings in files.items():
        image = _image_of(path, key, endings, keys.image)
        if image is None:
            left_out.setdefault("samples without an image", []).append(f"{path.name}/{key}")
            continue
        fields = _Fields(path, endings, text)
        captions = fields.first((keys.caption,) if keys.caption else CAPTION_KEYS)
        label = fields.first((keys.label,) if keys.label else LABEL_KEYS)
        texts = [each.strip() for each in (captions if isinstance(captions, list) else [captions]) if each is not None]
        name = endings[image]
        if isinstance(label, list):
            raise ValueError(f"{path}: {key} has the class {label!r:.60}; it must be a name or a whole number")
        yield _Sample(number, name, places[name], [each for each in texts if each] or None, label or None)


def _image_of(path: Path, key: str, endings: dict[str, str], typed: str | None) -> str | None:
    """Return the ending of a sample's image, or None without one. Raises ValueError if there are several."""
    if typed is not None:
        wanted = [each.strip().removeprefix(".") for each in typed.lower().split(";")]
        return next((each for each in wanted if each in endings), None)
    images = [each for each in endings if f".{each.rpartition('.')[2]}" in image_suffixes()]
    files = [each for each in images if f".{each.rpartition('.')[2]}" not in ARRAY_SUFFIXES] or images
    if len(files) > 1:
        raise ValueError(
            f"{path}: {key} has the images {', '.join(files)}; set data.source.image_key to one of these endings"
        )
    return files[0] if files else None


class _Fields:
    """The texts of a sample: in files by their endings, and in its .json by their keys."""

    def __init__(self, path: Path, endings: dict[str, str], text: Any) -> None:
        self.path = path
        self.endings = endings
        self.text = text
        self._json: dict[str, Any] | None = None

    def first(self, keys: Sequence[str]) -> str | list[str] | None:
        """Return the first of these texts; a number becomes text. Raises ValueError for other values."""
        for key in keys:
            if key.lower() in self.endings and key.lower() != "json":
                text: str = self.text(self.endings[key.lower()])
                return text
        for key in keys:
            value = self.json().get(key)
            if isinstance(value, bool | float | dict):
                raise ValueError(
                    f"{self.path}: {self.endings['json']} has {key}={value!r:.60}; it must be a text or a whole number"
                )
            if value is not None:
                return [str(each) for each in value] if isinstance(value, list) else str(value)
        return None

    def json(self) -> dict[str, Any]:
        if self._json is None:
            self._json = {}
            if "json" in self.endings:
                name = self.endings["json"]
                try:
                    loaded = json.loads(self.text(name))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{self.path}: {name} is not JSON ({error}); write the shard again") from error
                self._json = loaded if isinstance(loaded, dict) else {}
        return self._json


def _write_index(path: Path, index: ShardIndex) -> None:
    columns: dict[str, Any] = {"shard": index.shard, "offset": index.offset, "size": index.size}
    columns |= {f"names_{name}": array for name, array in index.names.arrays().items()}
    if index.classes is not None:
        columns |= {f"classes_{name}": array for name, array in index.classes.arrays().items()}
    if index.captions is not None:
        columns["counts"] = np.array([len(texts) for texts in index.captions], np.int64)
        texts = Names(text for texts in index.captions for text in texts)
        columns |= {f"captions_{name}": array for name, array in texts.arrays().items()}
    about = json.dumps({"left_out": index.left_out, "about": index.about}).encode()
    file = io.BytesIO()
    np.savez(file, about=np.frombuffer(about, np.uint8), **columns)
    try:
        write_atomically(path, file.getvalue())
    except OSError as error:
        setting = format_override("data.cache_dir", path.parent.parent)
        warnings.warn(f"{setting} cannot hold the index of the shards ({error}); building it each time", stacklevel=2)


def _read_index(path: Path) -> ShardIndex | None:
    """Return a stored index, or None."""
    try:
        with np.load(path) as loaded:
            columns = dict(loaded)
        about = json.loads(columns["about"].tobytes())
        captions = classes = None
        if "counts" in columns:
            texts = iter(Names.of(columns["captions_ends"], columns["captions_text"]))
            captions = [[next(texts) for _ in range(count)] for count in columns["counts"].tolist()]
        if "classes_ends" in columns:
            classes = Names.of(columns["classes_ends"], columns["classes_text"])
        names = Names.of(columns["names_ends"], columns["names_text"])
        shard, offset, size = (columns[name] for name in ("shard", "offset", "size"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return ShardIndex(shard, offset, size, names, captions, classes, about["left_out"], about["about"])
