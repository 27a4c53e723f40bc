"""A source of images in tar shards in the webdataset format.

As in the webdataset library, the files of a sample have the same name up to the first dot. An index, built once, gives
the offset of each image, so images are read at random. The library's pipeline is not used: its shuffle buffers and its
assignment of shards to workers cannot be resumed at a step, and change the batches with the number of processes. Here
sample k is always the same image in every process.
"""

import glob
import os
import re
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from src.data.archives import read_at
from src.data.decode import image_suffixes
from src.data.decoded import Pages
from src.data.encoded import ImageBytes, Names
from src.data.fit import Fit, ImageSpec, height_and_width
from src.data.image_source import ImageSource, open_images
from src.data.pixel_store import default_cache_dir
from src.data.shard_files import cached_shard
from src.data.shard_index import Keys, ShardIndex, build_index, read_index, write_index
from src.errors import absence, counted, format_override, optional_package

VERSION = 3
"""Version of the index; increase it when the same shards would produce another index."""


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
) -> ImageSource:
    """Open the images of shards with their classes and captions.

    Args:
        root: paths or http(s) URLs of the shards, one or several, with braces such as `{0000..0009}` or `*`. Shards
            from the network and compressed shards are stored in `cache_dir` once.
        val_root: the shards for validation (`data.val_urls`). None takes `data.val_fraction` of the samples.
        image_key: the extension of the images, or several separated by `;`. None uses the only image of each sample.
        caption_key, label_key: the extension of the file, or the key in the .json file, with the caption or the class.
            None uses the first of `CAPTION_KEYS` or `LABEL_KEYS` that exists.

    The other arguments are those of `src.data.folder.folder`. Raises FileNotFoundError if a shard does not exist, and
    ValueError if a shard occurs twice, is truncated or cannot be downloaded, if a sample has several images or lacks
    the caption or class that a key names, or as `folder` does.
    """
    store = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / "shards"
    train_urls = expand_urls(root, "data.urls")
    val_urls = [] if val_root is None else expand_urls(val_root)
    _check_shards_differ(train_urls, val_urls)
    train = [cached_shard(url, store, "data.urls") for url in train_urls]
    paths = [*train, *(cached_shard(url, store, "data.val_urls") for url in val_urls)]
    key, index = _stored_index(paths, Keys(image_key, caption_key, label_key), store)
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
        val_mask=index.shard >= len(train) if val_urls else None,
        left_out=index.left_out,
    )
    spec = ImageSpec(height_and_width(image_size), channels, fit, background, pages)
    classes = None if index.classes is None else list(index.classes)
    about = f"; {counted(len(paths), 'shard')}"
    about += index.about + (f"; {counted(sum(map(len, index.captions)), 'caption')}" if index.captions else "")
    return open_images(found, spec, classes, index.captions, value_range, skip_unreadable, cache, cache_dir, about)


def _stored_index(paths: Sequence[Path], keys: Keys, store: Path) -> tuple[str, ShardIndex]:
    """Return the index of shards, which is built once and stored, and its cache key."""
    status = [path.stat() for path in paths]
    stated = [(str(path.resolve()), s.st_size, s.st_mtime_ns) for path, s in zip(paths, status, strict=True)]
    key = sha256(repr((VERSION, stated, keys, sorted(image_suffixes()))).encode()).hexdigest()[:32]
    index = read_index(store / f"{key}.npz")
    if index is None:
        index = build_index(paths, keys)
        write_index(store / f"{key}.npz", index)
    return key, index


def expand_urls(urls: str | Sequence[str] | None, setting: str = "data.val_urls") -> list[str]:
    """Return the paths and URLs of the shards, with braces and `*` expanded.

    Raises FileNotFoundError for a path that does not exist, and ValueError for folders and unmatched braces.
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
            if os.path.isdir(path):
                shown = format_override(setting, os.path.join(path, "*.tar"))
                raise ValueError(f"{text} is a folder; name its tar files: {shown}")
            matches = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path)))
            if not matches:
                raise FileNotFoundError(f"{text}: {path} {absence(Path(path))}; set {setting} to tar files")
            expanded += matches
    return expanded


def _check_shards_differ(urls: Sequence[str], val_urls: Sequence[str]) -> None:
    """Raise ValueError if a shard occurs twice, by one name or by several, such as links."""
    first: dict[str | tuple[int, int], str] = {}
    for k, url in enumerate([*urls, *val_urls]):
        status = None if re.match(r"https?://", url) else os.stat(url)
        shard = url if status is None else (status.st_dev, status.st_ino)
        if shard in first:
            setting = format_override("data.urls" if k < len(urls) else "data.val_urls", url)
            other = "is named twice" if url == first[shard] else f"is the same file as {first[shard]}"
            raise ValueError(f"{setting} {other}, and a shard may occur once; leave one out")
        first[shard] = url


def _expand_braces(url: str, text: str) -> list[str]:
    with optional_package(f"{text}, a pattern with braces,", "webdataset"):
        from braceexpand import braceexpand
    try:
        return list(braceexpand(url))
    except ValueError as error:
        raise ValueError(f"{text} has braces that do not match; write for example {{0000..0009}}") from error


def _read_sample(
    paths: Sequence[Path],
    shard: npt.NDArray[np.int64],
    offset: npt.NDArray[np.int64],
    size: npt.NDArray[np.int64],
    row: int,
) -> bytes:
    return read_at(paths[int(shard[row])], int(offset[row]), int(size[row]))
