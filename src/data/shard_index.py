"""The index of the samples in shards: shard and byte offset of each image, with captions and classes."""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from src.cache import write_atomically
from src.data.archives import tar_places
from src.data.decode import ARRAY_SUFFIXES, image_suffixes
from src.data.encoded import Names
from src.data.shard_files import damaged_shard
from src.errors import counted, first_names, format_override

CAPTION_KEYS = ("txt", "text", "caption", "captions")
"""Extensions of files with the caption, or keys of the .json file."""
LABEL_KEYS = ("cls", "label", "class")
"""Extensions of files with the class, or keys of the .json file."""


class Keys(NamedTuple):
    """The extensions, or keys of the .json file, of image, caption and class; None is automatic."""

    image: str | None
    caption: str | None
    label: str | None


class ShardIndex(NamedTuple):
    """The N images in shards: index of the `shard`, `offset` and `size` in bytes, each (N,), and their names.

    `captions` and `classes` are None unless every sample has one. `left_out` lists unused files by reason; `about`
    reports unused captions and classes.
    """

    shard: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    names: Names
    captions: list[list[str]] | None
    classes: Names | None
    left_out: dict[str, list[str]]
    about: str


def build_index(paths: Sequence[Path], keys: Keys) -> ShardIndex:
    """Build the index of the shards from the headers of all files, and read all captions and classes.

    Raises ValueError for a corrupted shard, shards without images, and samples without a requested caption or class.
    """
    from tqdm import tqdm

    samples: list[_Sample] = []
    left_out: dict[str, list[str]] = {}
    for number, path in enumerate(tqdm(paths, unit="shard", desc="Indexing shards once", disable=len(paths) < 10)):
        try:
            if (places := tar_places(path)) is None:
                raise ValueError("it is not a tar file")
        except ValueError as error:
            raise damaged_shard(path, error) from error
        with path.open("rb") as file:
            samples += _samples_of(file, path, number, places, keys, left_out)
    if not samples:
        others = ", ".join(f"{len(names)} {reason}" for reason, names in left_out.items()) or "no files"
        raise ValueError(
            f"data.urls has no images in {counted(len(paths), 'shard')} ({others}); set data.urls to other shards"
        )
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
            about += f"; {counted(len(missing), 'image')} without a {what}, so none is used"
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


class _Sample(NamedTuple):
    """The image of a sample, with captions and class, or None."""

    shard: int
    image: str
    place: tuple[int, int]
    captions: list[str] | None
    label: str | None


def _samples_of(
    file: BinaryIO,
    path: Path,
    number: int,
    stored: Sequence[tuple[str, tuple[int, int]]],
    keys: Keys,
    left_out: dict[str, list[str]],
) -> Iterator[_Sample]:
    """Yield the samples of a shard in the order of their first files, and add unused files to `left_out`."""
    files: dict[str, dict[str, str]] = {}
    places = dict(stored)
    for name, _ in stored:
        if match := re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", name):
            endings = files.setdefault(match[1], {})
            if (ending := match[2].lower()) in endings:
                raise ValueError(
                    f"{path}: {match[1]} has several files .{ending}, and a sample has one of each ending; write the "
                    "shard again with one key per sample"
                )
            endings[ending] = name
        else:
            left_out.setdefault("without a name like key.ending", []).append(f"{path.name}/{name}")

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
            left_out.setdefault("without an image", []).append(f"{path.name}/{key}")
            continue
        fields = _Fields(path, endings, text)
        captions = fields.first((keys.caption,) if keys.caption else CAPTION_KEYS)
        label = fields.first((keys.label,) if keys.label else LABEL_KEYS)
        if fields.unread:
            left_out.setdefault("of JSON without keys", []).append(f"{path.name}/{endings['json']}")
        texts = [each.strip() for each in (captions if isinstance(captions, list) else [captions]) if each is not None]
        name = endings[image]
        if isinstance(label, list):
            raise ValueError(f"{path}: {key} has the class {label!r:.60}; it must be a name or a whole number")
        yield _Sample(number, name, places[name], [each for each in texts if each] or None, label or None)


def _image_of(path: Path, key: str, endings: dict[str, str], typed: str | None) -> str | None:
    """Return the extension of a sample's image, or None if it has none. Raises ValueError for several images."""
    if typed is not None:
        wanted = [each.strip().removeprefix(".") for each in typed.lower().split(";")]
        return next((each for each in wanted if each in endings), None)
    images = [each for each in endings if f".{each.rpartition('.')[2]}" in image_suffixes()]
    files = [each for each in images if f".{each.rpartition('.')[2]}" not in ARRAY_SUFFIXES] or images
    if len(files) > 1:
        raise ValueError(
            f"{path}: {key} has the images {first_names(files)}; set data.source.image_key to one of these endings, or "
            "write keys without dots"
        )
    return files[0] if files else None


@dataclass
class _Fields:
    """The texts of a sample: files by extension, and entries of its .json file by key."""

    path: Path
    endings: dict[str, str]
    text: Callable[[str], str]
    unread: bool = False
    """Whether the .json file is neither an object nor a list of captions."""

    def first(self, keys: Sequence[str]) -> str | list[str] | None:
        """Return the first text that exists under `keys`; integers become text. Raises ValueError for other values."""
        for key in keys:
            if key.lower() in self.endings and key.lower() != "json":
                return self.text(self.endings[key.lower()])
        for key in keys:
            value = self.json.get(key)
            if any(
                isinstance(each, bool | float | dict | list) for each in (value if type(value) is list else [value])
            ):
                raise ValueError(
                    f"{self.path}: {self.endings['json']} has {key}={value!r:.60}; it must be a text or a whole number"
                )
            if value is not None:
                return [str(each) for each in value] if isinstance(value, list) else str(value)
        return None

    @cached_property
    def json(self) -> dict[str, Any]:
        if (name := self.endings.get("json")) is None:
            return {}
        try:
            loaded = json.loads(self.text(name))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}: {name} is not JSON ({error}); write the shard again") from error
        if isinstance(loaded, dict):
            return loaded
        if isinstance(loaded, list) and loaded and all(isinstance(each, str) for each in loaded):
            return {"caption": loaded}
        self.unread = True
        return {}


def write_index(path: Path, index: ShardIndex) -> None:
    """Store an index in an .npz file; warn if it cannot be written."""
    columns: dict[str, Any] = {"shard": index.shard, "offset": index.offset, "size": index.size}
    texts = {"names": index.names} | ({} if index.classes is None else {"classes": index.classes})
    if index.captions is not None:
        columns["counts"] = np.array([len(captions) for captions in index.captions], np.int64)
        texts["captions"] = Names(text for captions in index.captions for text in captions)
    columns |= {f"{key}_{name}": array for key, each in texts.items() for name, array in each.arrays().items()}
    about = json.dumps({"left_out": index.left_out, "about": index.about}).encode()
    file = io.BytesIO()
    np.savez(file, about=np.frombuffer(about, np.uint8), **columns)
    try:
        write_atomically(path, file.getvalue())
    except OSError as error:
        setting = format_override("data.cache_dir", path.parent.parent)
        warnings.warn(f"{setting} cannot hold the index of the shards ({error}); building it each time", stacklevel=2)


def read_index(path: Path) -> ShardIndex | None:
    """Return a stored index; None if the file is missing or corrupted."""
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
