"""Image folders with captions, for text-to-image models."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from src.data.csv_files import first_names, read_table
from src.data.decode import Pages
from src.data.fit import Fit, ImageSpec, height_and_width
from src.data.folder import FolderImages, find, group_by_image, open_images
from src.data.scan import class_folders
from src.quoting import format_override

TABLES = ("metadata.csv", "metadata.jsonl")
"""Files with captions in the image folder, in the format of Hugging Face's ImageFolder."""

KEYS = ("text", "caption", "captions")
"""Names of the column, or key, with the caption."""


def captioned(
    root: str | None,
    image_size: int | Sequence[int],
    channels: int,
    prepare: bool = False,
    *,
    fit: Fit = "crop",
    background: str = "white",
    pages: Pages = "first",
    value_range: Sequence[float] | None = None,
    skip_unreadable: bool | float = False,
    cache: bool = True,
    cache_dir: str | None = None,
    val_root: str | None = None,
) -> FolderImages:
    """Open every image under `root`, as `src.data.folder.folder` does, with one or several captions each.

    Captions are read from `root/metadata.csv` or `root/metadata.jsonl` if one exists, by `file_name` and one of `KEYS`:
    a CSV row per caption, or a JSON line with a string or a list of strings. Otherwise each non-empty line of the
    `.txt` with the image's name is a caption.

    Raises FileNotFoundError if there is no such folder; ValueError for unreadable images, images without a caption,
    empty captions and captions without an image, and as `folder` does.
    """
    found, classes = class_folders(find(root, val_root))
    path = found.root
    tables = [path / name for name in TABLES if (path / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"{path} has both {' and '.join(TABLES)}; remove one of them")
    if tables:
        pairs = _from_csv(tables[0]) if tables[0].suffix == ".csv" else _from_json_lines(tables[0])
        captions: Sequence[Sequence[str]] = group_by_image(pairs, found, tables[0], "caption")
    else:
        captions = _from_text_files(path, [path / name for name in found.names])
    spec = ImageSpec(height_and_width(image_size), channels, fit, background, pages)
    return open_images(found, spec, classes, captions, value_range, skip_unreadable, cache, cache_dir)


def _from_csv(source: Path) -> Iterator[tuple[str, str]]:
    table = read_table(source, "data.root")
    names = table.column(table.one_of(("file_name",), "data.root"))
    texts = table.column(table.one_of(KEYS, "data.root"))
    for name, text, line in zip(names, texts, table.lines, strict=True):
        yield name, _not_empty(text, f"{source}, line {line}")


def _from_json_lines(source: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(source), 1):
        if not line:
            continue
        place = f"{source}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place} is not JSON ({error}); write one object per line, without a comma after it"
            ) from error
        keys = [key for key in KEYS if key in entry] if isinstance(entry, dict) else []
        if len(keys) != 1 or not isinstance(entry.get("file_name"), str):
            has = ", ".join(entry) if isinstance(entry, dict) and entry else "no keys"
            raise ValueError(f'{place} has {has}; it needs "file_name" and one of {", ".join(KEYS)}')
        texts = entry[keys[0]]
        texts = texts if isinstance(texts, list) else [texts]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{place}: {keys[0]} is {entry[keys[0]]!r:.60}; it must be a string or a list of strings")
        for text in texts:
            yield entry["file_name"], _not_empty(text.strip(), place)


def _from_text_files(path: Path, files: Sequence[Path]) -> list[list[str]]:
    texts = [file.with_suffix(".txt") for file in files]
    exists = [text.is_file() for text in texts]
    if not any(exists):
        raise ValueError(
            f"{format_override('data.root', path)} "
            f"has no captions, neither in {' nor '.join(TABLES)} nor in a text file per image, such "
            f"as {texts[0].relative_to(path)}; write one of these, or use data=folder"
        )
    if missing := [str(f.relative_to(path)) for f, found in zip(files, exists, strict=True) if not found]:
        raise ValueError(
            f"{len(missing)} of {len(files)} images under {path} have no caption ({first_names(missing)}); write a "
            ".txt with the same name for each, or remove these images"
        )
    captions = [[line for line in _lines(text) if line] for text in texts]
    if empty := [str(t.relative_to(path)) for t, found in zip(texts, captions, strict=True) if not found]:
        raise ValueError(f"{len(empty)} captions under {path} are empty ({first_names(empty)}); write a line of text")
    return captions


def _lines(source: Path) -> list[str]:
    """Return the stripped lines of a text file."""
    try:
        return [line.strip() for line in source.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text ({error}); save it as UTF-8") from error


def _not_empty(text: str, place: str) -> str:
    if not text:
        raise ValueError(f"{place}: the caption is empty; write one, or remove the row and its image")
    return text
