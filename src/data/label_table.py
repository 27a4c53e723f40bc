"""Tables with the class, the numbers or the texts of each image file."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from src.data.scan import FoundImages
from src.data.sources import Covariates
from src.data.table_files import did_you_mean, first_names, read_pairs, read_table
from src.data.table_text import to_numbers

T = TypeVar("T")


def group_by_image(pairs: Iterable[tuple[str, T]], found: FoundImages, source: Path, what: str) -> list[list[T]]:
    """Return the values of each image, from pairs of file name and value in the file `source`.

    A file name is absolute, or relative to the first root. Raises ValueError for names without an image, and for images
    without values; `what` names the value in messages.
    """
    indices: dict[str, list[int]] = {}
    for k in range(len(found)):
        for path in found.paths_of(k):
            indices.setdefault(os.path.abspath(path), []).append(k)
    values: list[list[T]] = [[] for _ in range(len(found))]
    unknown = []
    for name, value in pairs:
        path = os.path.abspath(found.root / name)
        if path not in indices:
            unknown.append(name)
        for k in indices.get(path, ()):
            values[k].append(value)
    if unknown:
        raise ValueError(
            f"{source} lists {len(unknown)} files that are not images under {found.root} ({first_names(unknown)}); "
            "remove these rows, or write file names relative to data.root"
        )
    if missing := [name for name, several in zip(found.names, values, strict=True) if not several]:
        raise ValueError(
            f"{source} has no {what} for {len(missing)} of {len(found)} images under {found.root} "
            f"({first_names(missing)}); add rows, or remove these images"
        )
    return values


def classes_from_table(
    source: Path, found: FoundImages, file_columns: Sequence[str], label_columns: Sequence[str]
) -> list[str]:
    """Return the class of each image from a table."""
    pairs = read_pairs(source, "data.source.labels", "label", file_columns, label_columns)
    labels_of = group_by_image(pairs, found, source, "label")
    for name, several in zip(found.names, labels_of, strict=True):
        if len(set(several)) > 1:
            raise ValueError(f"{source} lists the labels {' and '.join(sorted(set(several)))} for {name}; keep one")
    return [several[0] for several in labels_of]


def numbers_from_table(
    source: Path, found: FoundImages, file_columns: Sequence[str], columns: Sequence[str]
) -> Covariates:
    """Return the numbers of each image in some columns of a table; true and false are 1 and 0.

    Raises ValueError for unknown columns, for cells that are not finite numbers, and for images with different numbers.
    """
    table = read_table(source, "data.source.labels")
    first = [name for name in file_columns if name in table.names][:1]
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
    rows = group_by_image(zip(files, zip(*values, strict=True), strict=True), found, source, "numbers")
    for name, several in zip(found.names, rows, strict=True):
        if len(set(several)) > 1:
            raise ValueError(f"{source} lists different {', '.join(columns)} for {name}; keep one row")
    return Covariates(torch.tensor([several[0] for several in rows], dtype=torch.float64), list(columns))


def read_label_table(
    source: Path,
    found: FoundImages,
    file_columns: Sequence[str],
    label_column: str | None,
    condition_columns: Sequence[str],
) -> tuple[list[str] | None, Covariates | None]:
    """Return the class and the numbers of each image. With `condition_columns` the table needs no classes."""
    if not condition_columns:
        return classes_from_table(source, found, file_columns, (label_column or "label",)), None
    numbers = numbers_from_table(source, found, file_columns, condition_columns)
    with_classes = label_column is not None or "label" in read_table(source, "data.source.labels").names
    if not with_classes or ("label" in condition_columns and label_column is None):
        return None, numbers
    return classes_from_table(source, found, file_columns, (label_column or "label",)), numbers
