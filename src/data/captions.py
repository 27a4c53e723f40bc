"""Own images with texts that describe them, for text-to-image models."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from src.data.csv_files import read_table, some
from src.data.images import by_image, find_images, folder_kinds, image_files
from src.data.sources import Source

TABLES = ("metadata.csv", "metadata.jsonl")
"""Files in the images' folder that have their captions, as Hugging Face's ImageFolder reads them."""

KEYS = ("text", "caption", "captions")
"""The column, or key, that has the caption."""


def captioned(root: str | None, image_size: int, channels: int, prepare: bool = False) -> Source:
    """Every image under `root` as `images.folder` finds them, each with one or several captions.

    They are in `root/metadata.csv` or `root/metadata.jsonl` if there is one, by `file_name` and one of `KEYS`: in CSV a
    row for each caption, in JSON lines a text or a list of them. Else each non-empty line of the `.txt` of the same
    name beside an image is one.

    Raises FileNotFoundError if there is no such folder, ValueError for images that cannot be read or have no caption,
    and for captions that are empty or of no image.
    """
    path, files = find_images(root, prepare)
    tables = [path / name for name in TABLES if (path / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"{path} has both {' and '.join(TABLES)}: remove one of them")
    if tables:
        said = _in_csv(tables[0]) if tables[0].suffix == ".csv" else _in_json_lines(tables[0])
        captions: Sequence[Sequence[str]] = by_image(said, path, files, tables[0], "caption")
    else:
        captions = _beside(path, files)
    return image_files(path, files, image_size, channels, folder_kinds(path, files), captions)


def _in_csv(source: Path) -> Iterator[tuple[str, str]]:
    table = read_table(source, "data.root")
    names = table.column(table.one_of(("file_name",), "data.root"))
    texts = table.column(table.one_of(KEYS, "data.root"))
    for name, text, line in zip(names, texts, table.lines, strict=True):
        yield name, _not_empty(text, f"{source}, line {line}")


def _in_json_lines(source: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(source), 1):
        if not line:
            continue
        place = f"{source}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place} is no JSON ({error}): each line is one object, with no comma after it"
            ) from error
        keys = [key for key in KEYS if key in entry] if isinstance(entry, dict) else []
        if len(keys) != 1 or not isinstance(entry.get("file_name"), str):
            has = ", ".join(entry) if isinstance(entry, dict) and entry else "no keys"
            raise ValueError(f'{place} has {has}: it needs "file_name" and one of {", ".join(KEYS)}')
        texts = entry[keys[0]]
        texts = texts if isinstance(texts, list) else [texts]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{place}: {keys[0]} is {entry[keys[0]]!r:.60}, and must be a text or a list of texts")
        for text in texts:
            yield entry["file_name"], _not_empty(text.strip(), place)


def _beside(path: Path, files: Sequence[Path]) -> list[list[str]]:
    texts = [file.with_suffix(".txt") for file in files]
    there = [text.is_file() for text in texts]
    if not any(there):
        raise ValueError(
            f"no captions of the images under {path}: looked for {', '.join(TABLES)} and a text beside each image, "
            f"such as {texts[0].relative_to(path)}; write one of these, or use data=folder"
        )
    if missing := [str(f.relative_to(path)) for f, is_there in zip(files, there, strict=True) if not is_there]:
        raise ValueError(
            f"{len(missing)} of {len(files)} images under {path} have no caption ({some(missing)}): write a .txt of "
            "the same name beside each, or remove these images"
        )
    captions = [[line for line in _lines(text) if line] for text in texts]
    if empty := [str(t.relative_to(path)) for t, found in zip(texts, captions, strict=True) if not found]:
        raise ValueError(f"{len(empty)} captions under {path} are empty ({some(empty)}): each needs a line of text")
    return captions


def _lines(source: Path) -> list[str]:
    """The lines of a text, without the blanks about them."""
    try:
        return [line.strip() for line in source.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no text in UTF-8 ({error}): save it as UTF-8") from error


def _not_empty(text: str, place: str) -> str:
    if not text:
        raise ValueError(f"{place}: the caption is empty; write one, or remove the row and its image")
    return text
