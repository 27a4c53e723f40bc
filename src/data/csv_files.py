"""CSV files that people made: a row of names, then rows of cells, with the lines where they stand."""

import csv
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from src.data.sources import Labels


class Table(NamedTuple):
    """The `names` of the columns, and each row's cells, as many, without the blanks about them."""

    path: Path
    names: list[str]
    rows: list[list[str]]
    lines: list[int]
    """In which line of the file each row ends."""

    def column(self, name: str) -> list[str]:
        place = self.names.index(name)
        return [row[place] for row in self.rows]

    def one_of(self, names: Sequence[str], setting: str) -> str:
        """The one column that has one of these names. Raises ValueError if none has, or several have."""
        found = [name for name in self.names if name in names]
        if len(found) != 1:
            raise ValueError(
                f"{self.path} needs one column named {' or '.join(names)}, and has {', '.join(self.names)}: rename or "
                f"remove some, or choose another file by {setting}"
            )
        return found[0]


def read_table(path: Path, setting: str) -> Table:
    """The table in a CSV file that `setting` names; empty lines are passed over.

    Raises FileNotFoundError if there is no such file, ValueError if it is no table: not UTF-8, without rows, with a row
    of another length than the first, with two columns of one name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.resolve()}: set {setting} to a CSV file with a row of names first")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            read = [([cell.strip() for cell in row], reader.line_num) for row in reader if any(map(str.strip, row))]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8 ({error}): write it again, or set {setting}") from error
    if len(read) < 2:
        raise ValueError(f"{path} has {len(read)} rows: {setting} needs a row of names and at least one below it")
    names = read[0][0]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has several columns named {', '.join(map(repr, twice))}: give each its own name")
    for cells, line in read[1:]:
        if len(cells) != len(names):
            raise ValueError(
                f"{path}, line {line}: {len(cells)} cells under {len(names)} names; cells with a comma in them need "
                "quotes about them"
            )
    return Table(path, names, [cells for cells, _ in read[1:]], [line for _, line in read[1:]])


def kinds(each: Iterable[str]) -> Labels:
    """Labels from the name of each sample's kind, numbered in order: of numbers if all are whole ones."""
    each = list(each)
    names = sorted(set(each))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    places = {name: k for k, name in enumerate(names)}
    return Labels(torch.tensor([places[name] for name in each], dtype=torch.int64), names)


def some(names: Sequence[str], count: int = 5) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def nearest(name: str, known: Sequence[str]) -> str:
    """What was probably meant by an unknown name, as the end of a sentence."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {some(known)}"
