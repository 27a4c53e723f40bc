"""Image folders with captions, for text-to-image models."""

import os
from collections.abc import Sequence
from pathlib import Path

from src.data.decoded import Pages
from src.data.fit import Fit, ImageSpec, height_and_width
from src.data.folder import find, refuse_columns
from src.data.frames import describe_frames
from src.data.image_source import ImageSource, open_images
from src.data.label_table import group_by_image
from src.data.layout import class_folders
from src.data.table_files import FILE_COLUMNS, read_pairs
from src.data.table_text import decode_text
from src.errors import counted, first_names, format_override

TABLES = tuple(f"metadata.{ending}" for ending in ("csv", "jsonl", "tsv", "json", "parquet"))
"""Files with captions in the image folder, in the format of Hugging Face's ImageFolder."""

CAPTION_COLUMNS = ("text", "caption", "captions")
"""Names of the column, or of the key in JSON, with the caption."""


def captioned(
    root: str | Sequence[str] | None,
    image_size: int | Sequence[int],
    channels: int,
    prepare: bool = False,
    *,
    captions: str | None = None,
    file_column: str | None = None,
    caption_column: str | None = None,
    masks: bool = False,
    fit: Fit = "crop",
    background: str = "white",
    pages: Pages = "first",
    value_range: Sequence[float] | None = None,
    skip_unreadable: bool | float = False,
    cache: bool = True,
    cache_dir: str | None = None,
    val_root: str | None = None,
) -> ImageSource:
    """Open every image under `root`, as `src.data.folder.folder` does, with one or several captions each.

    Without a table of captions, each non-empty line of the `.txt` with the image's name is a caption.

    Args:
        captions: a table (absolute, or relative to the first root) with a row per caption, or a list of them in one
            cell. None takes the one of `TABLES` that exists.
        file_column: its column with the images' files, relative to the first root; None takes one of `FILE_COLUMNS`.
        caption_column: its column with the captions; None takes one of `CAPTION_COLUMNS`.

    The other arguments are those of `src.data.folder.folder`. Raises FileNotFoundError if the folder does not exist,
    and ValueError for images without a caption, empty captions and captions without an image, and as `folder` does.
    """
    found, classes = class_folders(find(root, val_root, pages, masks=masks))
    path = found.root
    tables = [path / name for name in TABLES if (path / name).is_file()] if captions is None else [path / captions]
    if len(tables) > 1:
        names = " and ".join(table.name for table in tables)
        raise ValueError(f"{path} has both {names}; remove one, or name one by data.source.captions={tables[0].name}")
    if tables:
        file_columns = (file_column,) if file_column else FILE_COLUMNS
        caption_columns = (caption_column,) if caption_column else CAPTION_COLUMNS
        setting = "data.source.captions" if captions else "data.root"
        pairs = read_pairs(tables[0], setting, "caption", file_columns, caption_columns)
        texts: Sequence[Sequence[str]] = group_by_image(pairs, found, tables[0], "caption")
        origin = tables[0].name
        found = found.without_used([tables[0].absolute()])
    else:
        refuse_columns({"file_column": file_column, "caption_column": caption_column}, "data.source.captions")
        files = [found.path(k) for k in range(len(found))]
        texts, origin = _from_text_files(path, files), "text files"
        found = found.without_used(file.with_suffix(".txt").absolute() for file in files)
    spec = ImageSpec(height_and_width(image_size), channels, fit, background, pages)
    about = f"; {counted(sum(map(len, texts)), 'caption')} from {origin}" + describe_frames(found)
    return open_images(found, spec, classes, texts, value_range, skip_unreadable, cache, cache_dir, about)


def _from_text_files(path: Path, files: Sequence[Path]) -> list[list[str]]:
    texts = [file.with_suffix(".txt") for file in files]
    exists = [text.is_file() for text in texts]
    if not any(exists):
        fix = "write one of these, or use data=folder"
        if path.is_file():
            fix = "unpack this archive, or set data.source.captions to the path of a table outside of it"
        raise ValueError(
            f"{format_override('data.root', path)} has no captions, neither in {' nor '.join(TABLES)} nor in a text "
            f"file per image, such as {os.path.relpath(texts[0], path)}; {fix}"
        )
    if missing := [os.path.relpath(f, path) for f, found in zip(files, exists, strict=True) if not found]:
        raise ValueError(
            f"{len(missing)} of {len(files)} images under {path} have no caption ({first_names(missing)}); write a "
            ".txt with the same name for each, or remove these images"
        )
    captions = [[line for line in _lines(text) if line] for text in texts]
    if empty := [os.path.relpath(t, path) for t, found in zip(texts, captions, strict=True) if not found]:
        count = counted(len(empty), "empty caption")
        raise ValueError(f"{path} has {count} ({first_names(empty)}); write a line of text")
    return captions


def _lines(source: Path) -> list[str]:
    """Return the stripped lines of a text file."""
    return [line.strip() for line in decode_text(source.read_bytes(), None, source)[0].replace("\r", "\n").split("\n")]
