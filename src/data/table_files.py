"""Read tables from CSV, TSV, Excel, Parquet, JSON and JSON Lines files; keep the line of each row for messages."""

import bz2
import csv
import gzip
import io
import lzma
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from src.data.sources import Labels
from src.data.table_formats import read_excel, read_json, read_json_lines, read_parquet
from src.data.table_text import (
    NAMELESS,
    ambiguous_number,
    cell_text,
    check_header,
    clean_names,
    decode_text,
    find_decimal,
    find_separator,
    to_number,
)
from src.errors import absence, format_override, one_line

if TYPE_CHECKING:
    import pandas as pd

COMPRESSED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\x00": lzma.decompress}
"""Decompression function by the first bytes of a file."""
MISSING = {"", "na", "n/a", "nan", "null", "<na>", "#n/a"}
"""Texts of missing cells, in lower case."""
FILE_COLUMNS = ("file_name", "file", "filename", "image")
"""Names of the column with image files; Hugging Face's ImageFolder uses `file_name`."""


@dataclass(frozen=True)
class Table:
    """The columns of a file, all of one length, by name.

    Cells of a text file (`is_text`) are stripped strings; cells of other files have data types. `notes` describe the
    detected format and columns that were left out.
    """

    path: Path
    frame: "pd.DataFrame"
    lines: Sequence[int]
    """Position of each row: the line of a text file where it ends, or the number of the row."""
    is_text: bool
    separator: str = ","
    decimal: str = "."
    kind: str = "text"
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.frame.columns]

    def __len__(self) -> int:
        return len(self.frame)

    def place(self, row: int) -> str:
        """Return the file and the line of a row, for a message."""
        return f"{self.path}, {'line' if self.kind in ('text', 'jsonl') else 'row'} {self.lines[row]}"

    def column(self, name: str) -> list[str]:
        """Return the cells of a column as text; missing cells are empty."""
        return [cell_text(cell) for cell in self.frame[name].tolist()]

    def named(self, names: Sequence[str]) -> list[str]:
        """Return the columns with these names, in the order of `names`; without any, those in capitals, too."""
        exact = [name for name in names if name in self.names]
        return exact or [column for name in names for column in self.names if column.lower() == name.lower()]

    def one_of(self, names: Sequence[str], setting: str) -> str:
        """Return the only column with one of these names. Raises ValueError unless there is exactly one."""
        found = self.named(names)
        if len(found) != 1:
            raise ValueError(
                f"{self.path} needs exactly one column named {' or '.join(names)}, found {', '.join(self.names)}; "
                f"rename or remove columns, or set {setting}"
            )
        return found[0]

    def row_texts(self) -> list[str]:
        """Return one text per row; equal rows have equal texts."""
        return ["\x1f".join(cells) for cells in zip(*map(self.column, self.names), strict=True)]

    def without(self, na_values: Sequence[Any]) -> "Table":
        """Return the table with missing cells in place of these texts and numbers."""
        words = {cell_text(value).strip() for value in na_values}
        numbers = {number for word in words if (number := to_number(word)) is not None}
        frame = self.frame.copy()
        for name in self.names:
            cells = self.column(name)
            keep = [cell not in words and to_number(cell, self.decimal) not in numbers for cell in cells]
            if not all(keep):
                frame[name] = frame[name].astype(object).where(keep, "" if self.is_text else None)
        return replace(self, frame=frame)

    def rows(self, keep: Sequence[int]) -> "Table":
        """Return the table with only these rows."""
        frame = self.frame.iloc[list(keep)].reset_index(drop=True)
        return replace(self, frame=frame, lines=[self.lines[k] for k in keep])


def read_table(
    path: Path,
    setting: str,
    *,
    header: bool | None = True,
    separator: str | None = None,
    decimal: str | None = None,
    encoding: str | None = None,
    sheet: str | int | None = None,
) -> Table:
    """Read the table that `setting` names, without empty lines and without an unnamed index column.

    Compression, Excel and Parquet are detected by the contents, JSON by the suffix; any other file is text. Encoding,
    separator and decimal sign of text are detected if they are None. `header=None` rejects a first row that looks like
    data; False names the columns c0, c1, ...

    Raises FileNotFoundError if the file does not exist, and ValueError if it cannot be read, has no rows, rows of
    different lengths, or two columns with one name.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{format_override(setting, path.resolve())} {absence(path)}; set it to a table, such as a CSV file"
        )
    data = path.read_bytes()
    try:
        for magic, decompress in COMPRESSED.items():
            data = decompress(data) if data.startswith(magic) else data
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be decompressed ({one_line(error)}); save it again") from error
    ending = next((s.lower() for s in reversed(path.suffixes) if s.lower() not in (".gz", ".bz2", ".xz")), "")
    if data.startswith(b"PAR1"):
        table = _typed(path, "parquet", read_parquet(path, data))
    elif data.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        table = _typed(path, "excel", *read_excel(path, data, header, sheet))
    elif ending in (".jsonl", ".ndjson"):
        table = _typed(path, "jsonl", *read_json_lines(path, data))
    elif ending == ".json":
        table = _typed(path, "json", read_json(path, data))
    else:
        table = _read_text(path, setting, data, header, separator, decimal, encoding)
    if not len(table):
        raise ValueError(f"{path} has no rows; {setting} needs a table with at least one")
    return _without_index(table)


def read_pairs(
    path: Path, setting: str, what: str, file_columns: Sequence[str], columns: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield the file name and the text of each row; a list of texts yields one pair per text.

    The file names are in the first of `file_columns` that exists, the texts in the only one of `columns`; in JSON,
    objects may use different ones of `columns`. `what` names the texts in messages. Raises ValueError for an empty text
    or file name.
    """
    table = read_table(path, setting)
    found = table.named(file_columns)[:1]
    files = table.column(table.one_of(found or file_columns, f"data.source.file_column or {setting}"))
    several_names = sorted(table.named(columns), key=table.names.index)
    if table.kind not in ("json", "jsonl") or not several_names:
        several_names = [table.one_of(columns, f"data.source.{what}_column or {setting}")]
    rows: list[list[Any]] = table.frame[several_names].values.tolist()
    for row, (file, cells) in enumerate(zip(files, rows, strict=True)):
        lists = [list(c) if isinstance(c, list | tuple) or type(c).__name__ == "ndarray" else [c] for c in cells]
        given = [each for each in lists if any(map(cell_text, each))]
        for each in given[0] if given else [""]:
            if isinstance(each, dict | list):
                raise ValueError(
                    f"{table.place(row)}: the {what} is {each!r:.60}; write one text, or set data.source.{what}_column"
                )
            text = cell_text(each).strip()
            if not file or not text or (what == "label" and text.lower() in MISSING):
                raise ValueError(
                    f"{table.place(row)}: the {what if file else 'file name'} is empty; write one, or remove the row "
                    "and its image"
                )
            yield file, text


def labels_from_names(names: Iterable[str]) -> Labels:
    """Return labels from the class name of each sample; `sorted_names` orders the classes."""
    names = list(names)
    classes = sorted_names(names)
    index = {name: k for k, name in enumerate(classes)}
    return Labels(torch.tensor([index[name] for name in names], dtype=torch.int64), classes)


def sorted_names(names: Iterable[str]) -> list[str]:
    """Return the unique names in order; if all are integers, in numeric order."""
    different = sorted(set(names))
    if all(name.removeprefix("-").isdecimal() for name in different):
        different.sort(key=int)
    return different


# Text files


def _read_text(
    path: Path,
    setting: str,
    data: bytes,
    header: bool | None,
    separator: str | None,
    decimal: str | None,
    encoding: str | None,
) -> Table:
    text, encoding_used = decode_text(data, encoding, path)
    if re.search(r"^@relation\b", text[:10_000], re.IGNORECASE | re.MULTILINE):
        raise ValueError(f"{format_override(setting, str(path))} is an ARFF file; save the table as CSV")
    declared = re.match(r"sep=(.)\r?\n", text)  # a line that Excel writes
    found = separator or (declared[1] if declared else find_separator(text))
    lines = io.StringIO(text, newline="")
    source = (line.strip() + "\n" for line in lines) if found == " " else lines
    reader = csv.reader(source, strict=True, delimiter=found, skipinitialspace=found == " ")
    try:
        read = [([cell.strip() for cell in row], reader.line_num) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise ValueError(
            f"{path} is not a CSV file (line {reader.line_num}: {error}); double each quote in a quoted cell, or save "
            "it again"
        ) from error
    read = read[1:] if declared else read
    if header is False:
        if read:
            read.insert(0, ([f"c{k}" for k in range(len(read[0][0]))], 0))
    elif header is None and len(read) > 1:
        check_header(f"{path}, line {read[0][1]}", read[0][0], [cells for cells, _ in read[1:]])
    if len(read) < 2:
        raise ValueError(f"{path} has {len(read)} rows; {setting} needs a header and at least one row below it")
    names = clean_names(path, read[0][0])
    for cells, line in read[1:]:
        if len(cells) != len(names):
            sign = "a comma" if found == "," else repr(found)
            fix = "remove the lines above the header, or " if len(names) == 1 else ""
            raise ValueError(
                f"{path}, line {line}: {len(cells)} cells under {len(names)} names; {fix}quote cells with {sign}"
            )
    import pandas as pd

    frame = pd.DataFrame([cells for cells, _ in read[1:]], columns=names, dtype=object)
    if decimal is None:
        only_points = found == "," and not any("," in cell for row, _ in read[1:] for cell in row)
        decimal = "." if only_points else find_decimal((cell for row, _ in read[1:] for cell in row), found)
    notes = [f"separator {found!r}"] if found != "," else []
    notes += ["decimal comma"] if decimal == "," else []
    if found == ";" and decimal == "." and (number := ambiguous_number(cell for row, _ in read[1:] for cell in row)):
        notes += [f"decimal point (if {number} is a whole number, add data.decimal=comma)"]
    notes += [f"encoding {encoding_used}"] if encoding_used not in ("utf-8", "utf-8-sig") else []
    return Table(path, frame, [line for _, line in read[1:]], True, found, decimal, "text", notes)


def _typed(
    path: Path, kind: str, frame: "pd.DataFrame", lines: Sequence[int] | None = None, notes: Sequence[str] = ()
) -> Table:
    frame.columns = clean_names(path, list(frame.columns))
    return Table(path, frame, lines or range(1, len(frame) + 1), False, kind=kind, notes=[*notes])


def _without_index(table: Table) -> Table:
    """Return the table without unnamed columns that are empty or number the rows."""
    notes, dropped = [*table.notes], []
    for name in filter(NAMELESS.fullmatch, table.names):
        cells = table.column(name)
        numbers = {int(cell) for cell in cells} if all(cell.isdecimal() for cell in cells) else set()
        if not any(cells):
            dropped.append(name)
        elif len(numbers) == len(cells) > 1:
            dropped.append(name)
            notes.append(f"left out {name!r} (an index without a name)")
    if not dropped or len(dropped) == len(table.names):
        return table
    return replace(table, frame=table.frame.drop(columns=dropped), notes=notes)
