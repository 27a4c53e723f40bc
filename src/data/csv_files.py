"""CSV files with a header, read with line numbers for error messages."""

import csv
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from src.data.sources import Labels


class Table(NamedTuple):
    """The column `names` and the stripped cells of each row, as many as there are names."""

    path: Path
    names: list[str]
    rows: list[list[str]]
    lines: list[int]
    """The line of the file in which each row ends."""

    def column(self, name: str) -> list[str]:
        index = self.names.index(name)
        return [row[index] for row in self.rows]

    def one_of(self, names: Sequence[str], setting: str) -> str:
        """Return the only column with one of these names. Raises ValueError unless there is exactly one."""
        found = [name for name in self.names if name in names]
        if len(found) != 1:
            raise ValueError(
                f"{self.path} needs exactly one column named {' or '.join(names)}, found {', '.join(self.names)}; "
                f"rename or remove columns, or set {setting} to another file"
            )
        return found[0]


def read_table(path: Path, setting: str) -> Table:
    """Read the CSV file that `setting` names, without empty lines.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8, has no rows, rows of different lengths, or two columns with one name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{setting}={path.resolve()} does not exist; set it to a CSV file with a header")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            read = [([cell.strip() for cell in row], reader.line_num) for row in reader if any(map(str.strip, row))]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8 ({error}); save it again, or set {setting}") from error
    if len(read) < 2:
        raise ValueError(f"{path} has {len(read)} rows; {setting} needs a header and at least one row below it")
    names = read[0][0]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has several columns named {', '.join(map(repr, duplicates))}; rename them")
    for cells, line in read[1:]:
        if len(cells) != len(names):
            raise ValueError(
                f"{path}, line {line}: {len(cells)} cells under {len(names)} names; quote cells that contain a comma"
            )
    return Table(path, names, [cells for cells, _ in read[1:]], [line for _, line in read[1:]])


def labels_from_names(names: Iterable[str]) -> Labels:
    """Return labels from the class name of each sample. Classes are sorted, as numbers if all are integers."""
    names = list(names)
    classes = sorted(set(names))
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    index = {name: k for k, name in enumerate(classes)}
    return Labels(torch.tensor([index[name] for name in names], dtype=torch.int64), classes)


def first_names(names: Sequence[str], count: int = 5) -> str:
    """Return the first names and the number of the rest, for a message."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return the end of an error: the known names most similar to an unknown one."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose one of {first_names(known)}"
