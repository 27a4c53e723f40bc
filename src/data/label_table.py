"""Tables with the class, the numbers or the texts of each image file."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from src.data.found_images import FoundImages
from src.data.sources import Covariates
from src.data.table_files import read_pairs, read_table
from src.data.table_text import to_numbers
from src.errors import counted, did_you_mean, first_names

T = TypeVar("T")


def group_by_image(pairs: Iterable[tuple[str, T]], found: FoundImages, source: Path | str, what: str) -> list[list[T]]:
    """Return the values of each image, from pairs of file name and value in the file `source`.

    A file name is absolute, or relative to the first root, with slashes or backslashes. Raises ValueError for names
    without an image, and for images without values; `what` names the value in messages.
    """
    indices: dict[str, list[int]] = {}
    for k in range(len(found)):
        for path in found.paths_of(k):
            indices.setdefault(os.path.abspath(path), []).append(k)
    values: list[list[T]] = [[] for _ in range(len(found))]
    unknown = []
    for name, value in pairs:
        paths = [os.path.abspath(found.root / each) for each in (name, name.replace("\\", "/"))]
        known = next((path for path in paths if path in indices), None)
        if known is None:
            unknown.append(name)
        else:
            for k in indices[known]:
                values[k].append(value)
    if unknown:
        fix = _missing_ending(unknown, found, indices)
        raise ValueError(
            f"{source} lists {counted(len(unknown), 'file')} without an image under {found.root} "
            f"({first_names(unknown)}); "
            f"{fix or 'remove these rows, or write file names relative to data.root'}"
        )
    several_roots = len(found.roots) > 1
    if missing := [k for k, several in enumerate(values) if not several]:
        names = [str(found.path(k)) if several_roots else found.names[k] for k in missing]
        fix = "add rows, or remove these images"
        if several_roots:
            fix = "add rows, with absolute file names for roots after the first, or put a table of this name there"
        raise ValueError(
            f"{source} has no {what} for {len(missing)} of {len(found)} images {found.place}"
            f"{' and other roots' * several_roots} ({first_names(names)}); {fix}"
        )
    return values


def _missing_ending(unknown: Sequence[str], found: FoundImages, paths: Iterable[str]) -> str:
    """Return the fix for names that lack only the ending of an image's file; empty for others."""
    endings = dict(os.path.splitext(path) for path in paths)
    for name in unknown:
        if ending := endings.get(os.path.abspath(found.root / name.replace("\\", "/"))):
            return f"write them with their ending, such as {name}{ending}"
    return ""


def find_tables(name: str, found: FoundImages) -> dict[Path, Path]:
    """Return the paths of the table `name`, absolute or one in each root that has it, with the root of each.

    Without any, returns the path in the first root.
    """
    paths: dict[Path, Path] = {}
    for root in found.roots:
        paths.setdefault(root / name, root)
    return {path: root for path, root in paths.items() if path.is_file()} or {found.root / name: found.root}


def read_classes(
    tables: Mapping[Path, Path], found: FoundImages, file_columns: Sequence[str], label_columns: Sequence[str]
) -> list[str]:
    """Return the class of each image from tables with their roots.

    Raises ValueError for unknown columns, images without a class or with several, and rows without an image.
    """
    read = partial(
        read_pairs, setting="data.source.labels", what="label", file_columns=file_columns, columns=label_columns
    )
    return _one_per_image(tables, found, read, "label")


def read_numbers(
    tables: Mapping[Path, Path], found: FoundImages, file_columns: Sequence[str], columns: Sequence[str]
) -> Covariates:
    """Return the numbers of each image in some columns of tables with their roots; true and false are 1 and 0.

    Raises ValueError for unknown columns, for cells that are not finite numbers, and for images with different numbers.
    """
    read = partial(_rows_of_numbers, file_columns=file_columns, columns=columns)
    rows = _one_per_image(tables, found, read, "numbers")
    return Covariates(torch.tensor(rows, dtype=torch.float64), list(columns))


def _one_per_image(
    tables: Mapping[Path, Path], found: FoundImages, read: Callable[[Path], Iterable[tuple[str, T]]], what: str
) -> list[T]:
    """Return the value of each image from the rows of tables with their roots. Raises ValueError unless it has one."""
    pairs = [(_below(root, file, found), value) for source, root in tables.items() for file, value in read(source)]
    source = " and ".join(map(str, tables))
    values = group_by_image(pairs, found, source, what)
    for name, several in zip(found.names, values, strict=True):
        if len(different := dict.fromkeys(several)) > 1:
            listed = " and ".join(map(str, different))
            raise ValueError(f"{source} lists the {what.removesuffix('s')}s {listed} for {name}; keep one row")
    return [several[0] for several in values]


def read_label_table(
    tables: Mapping[Path, Path],
    found: FoundImages,
    file_columns: Sequence[str],
    label_column: str | None,
    condition_columns: Sequence[str],
) -> tuple[list[str] | None, Covariates | None]:
    """Return the class and the numbers of each image from tables with their roots.

    With `condition_columns` the tables need no classes. Raises ValueError as `read_classes` and `read_numbers` do.
    """
    if not condition_columns:
        return read_classes(tables, found, file_columns, (label_column or "label",)), None
    numbers = read_numbers(tables, found, file_columns, condition_columns)
    with_classes = label_column is not None or all(
        read_table(source, "data.source.labels").named(["label"]) for source in tables
    )
    if not with_classes or ("label" in condition_columns and label_column is None):
        return None, numbers
    return read_classes(tables, found, file_columns, (label_column or "label",)), numbers


def _below(root: Path, file: str, found: FoundImages) -> str:
    """Return the name of a file in a table of `root` as `group_by_image` takes it, relative to the first root."""
    return file if root == found.root else str(root / file.replace("\\", "/"))


def _rows_of_numbers(
    source: Path, file_columns: Sequence[str], columns: Sequence[str]
) -> Iterator[tuple[str, tuple[float | None, ...]]]:
    """Yield the file and the numbers of each row of a table."""
    table = read_table(source, "data.source.labels")
    first = table.named(file_columns)[:1]
    files = table.column(table.one_of(first or file_columns, "data.source.file_column"))
    values = []
    for name in columns:
        if name not in table.names:
            hint = did_you_mean(name, table.names)
            raise ValueError(f"data.source.condition_columns: {name!r} is not a column of {source}; {hint}")
        cells = table.column(name)
        switches = {"true": "1", "false": "0"}
        numbers = to_numbers([switches.get(cell.lower(), cell) for cell in cells], table.decimal)
        bad = [k for k, number in enumerate(numbers) if number is None or number - number != 0]
        if bad:
            raise ValueError(
                f"{table.place(bad[0])}: column {name!r} is {cells[bad[0]]!r:.40}, not a finite number "
                f"({len(bad)} of {len(table)} rows); correct it, or remove the row and its image"
            )
        values.append(numbers)
    yield from zip(files, zip(*values, strict=True), strict=True)
