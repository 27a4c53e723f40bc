"""Read tables from CSV, TSV, Excel, Parquet, JSON and JSON Lines files; keep the line of each row for messages."""

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from src.data.sources import Labels
from src.data.table_text import ambiguous_number, decode_text, find_decimal, find_separator, is_number
from src.errors import did_you_mean, first_names, one_line
from src.quoting import format_override

if TYPE_CHECKING:
    import pandas as pd

COMPRESSED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\x00": lzma.decompress}
"""Decompression function by the first bytes of a file."""
NAMELESS = re.compile(r"(Unnamed: \d+(_level_\d+)?)?")
"""Header of an index as pandas writes it (empty) or reads it (Unnamed: 0)."""
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

    def one_of(self, names: Sequence[str], setting: str) -> str:
        """Return the only column with one of these names. Raises ValueError unless there is exactly one."""
        found = [name for name in self.names if name in names]
        if len(found) != 1:
            raise ValueError(
                f"{self.path} needs exactly one column named {' or '.join(names)}, found {', '.join(self.names)}; "
                f"rename or remove columns, or set {setting}"
            )
        return found[0]

    def row_texts(self) -> list[str]:
        """Return one text per row; equal rows have equal texts."""
        return ["\x1f".join(cells) for cells in zip(*map(self.column, self.names), strict=True)]

    def rows(self, keep: Sequence[int]) -> "Table":
        """Return the table with only these rows."""
        frame = self.frame.iloc[list(keep)].reset_index(drop=True)
        fields = {"frame": frame, "lines": [self.lines[k] for k in keep]}
        return Table(**{**self.__dict__, **fields})


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

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it cannot be read, has no rows, rows of different lengths, or two columns with one name.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{format_override(setting, path.resolve())} does not exist; set it to a table, such as a CSV file"
        )
    data = path.read_bytes()
    try:
        for magic, decompress in COMPRESSED.items():
            data = decompress(data) if data.startswith(magic) else data
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be decompressed ({one_line(error)}); save it again") from error
    ending = next((s.lower() for s in reversed(path.suffixes) if s.lower() not in (".gz", ".bz2", ".xz")), "")
    if data.startswith(b"PAR1"):
        table = _typed(path, "parquet", _read_parquet(path, data))
    elif data.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        table = _read_excel(path, data, header, sheet)
    elif ending in (".jsonl", ".ndjson"):
        table = _read_json_lines(path, data)
    elif ending == ".json":
        table = _typed(path, "json", _read_json(path, data))
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
    found = [name for name in file_columns if name in table.names][:1]
    files = table.column(table.one_of(found or file_columns, f"data.source.file_column or {setting}"))
    several_names = [name for name in table.names if name in columns]
    if table.kind not in ("json", "jsonl") or not several_names:
        several_names = [table.one_of(columns, f"data.source.{what}_column or {setting}")]
    rows: list[list[Any]] = table.frame[several_names].values.tolist()
    for row, (file, cells) in enumerate(zip(files, rows, strict=True)):
        lists = [list(c) if isinstance(c, list | tuple) or type(c).__name__ == "ndarray" else [c] for c in cells]
        given = [each for each in lists if any(map(cell_text, each))]
        for each in given[0] if given else [""]:
            text = cell_text(each).strip()
            if not file or not text:
                raise ValueError(
                    f"{table.place(row)}: the {what if file else 'file name'} is empty; write one, or remove the row "
                    "and its image"
                )
            yield file, text


def cell_text(cell: Any) -> str:
    """Return a cell as text: missing cells are empty, and whole numbers have no decimals."""
    if isinstance(cell, str):
        return cell
    if cell is None or type(cell).__name__ in ("NAType", "NaTType") or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def labels_from_names(names: Iterable[str]) -> Labels:
    """Return labels from the class name of each sample; `sorted_names` orders the classes."""
    names = list(names)
    classes = sorted_names(names)
    index = {name: k for k, name in enumerate(classes)}
    return Labels(torch.tensor([index[name] for name in names], dtype=torch.int64), classes)


def sorted_names(names: Iterable[str]) -> list[str]:
    """Return the unique names in order; if all are integers, in numeric order."""
    different = sorted(set(names))
    if all(name.isdecimal() for name in different):
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
    names = _clean_names(path, read[0][0])
    for cells, line in read[1:]:
        if len(cells) != len(names):
            sign = "a comma" if found == "," else repr(found)
            fix = "remove the lines above the header, or " if len(names) == 1 else ""
            raise ValueError(
                f"{path}, line {line}: {len(cells)} cells under {len(names)} names; {fix}quote cells with {sign}"
            )
    import pandas as pd

    columns = zip(*(cells for cells, _ in read[1:]), strict=True)
    frame = pd.DataFrame(
        {name: pd.Series(list(cells), dtype=object) for name, cells in zip(names, columns, strict=True)}
    )
    if decimal is None:  # in a comma-separated file, a comma in a number separates thousands
        decimal = "." if found == "," else find_decimal(cell for row, _ in read[1:] for cell in row)
    notes = [f"separator {found!r}"] if found != "," else []
    notes += ["decimal comma"] if decimal == "," else []
    if found == ";" and decimal == "." and (number := ambiguous_number(cell for row, _ in read[1:] for cell in row)):
        notes += [f"decimal point (if {number} is a whole number, add data.decimal=comma)"]
    notes += [f"encoding {encoding_used}"] if encoding_used not in ("utf-8", "utf-8-sig") else []
    return Table(path, frame, [line for _, line in read[1:]], True, found, decimal, "text", notes)


def check_header(place: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Raise ValueError if the first row looks like data: numbers, or mostly texts that recur in their columns."""
    named = [name for name in names if not NAMELESS.fullmatch(name)]
    numbers = [name for name in named if is_number(name) or is_number(name, ",")]
    why = ""
    if numbers and (len(numbers) == len(named) or any(not name.isdecimal() for name in numbers)):
        why = f"has the number {numbers[0]} in place of a column name"
    else:
        repeated = [n for k, n in enumerate(names) if n and any(len(row) > k and row[k] == n for row in rows)]
        if len(repeated) > max(1, len(named) / 2):
            why = f"has {first_names([*map(repr, repeated)])}, which are also cells below it"
    if why:
        raise ValueError(
            f"{place} {why}; add a header, or type data.header=false if the file has none, which names the columns "
            "c0, c1, ... (data.header=true accepts it as the header)"
        )


def _clean_names(path: Path, cells: Sequence[Any]) -> list[str]:
    """Return column names without line breaks; name unnamed ones as pandas does. Raises ValueError for duplicates."""
    names = [" ".join(cell_text(cell).split()) or f"Unnamed: {k}" for k, cell in enumerate(cells)]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has several columns named {', '.join(map(repr, duplicates))}; rename them")
    return names


# Other files


def _typed(path: Path, kind: str, frame: "pd.DataFrame", first: int = 1, notes: Sequence[str] = ()) -> Table:
    frame.columns = _clean_names(path, list(frame.columns))
    return Table(path, frame, range(first, first + len(frame)), False, kind=kind, notes=[*notes])


def _read_parquet(path: Path, data: bytes) -> "pd.DataFrame":
    import pandas as pd

    with _reading(path, "pyarrow"):
        frame = pd.read_parquet(io.BytesIO(data))
    if isinstance(frame.index, pd.RangeIndex):
        return frame.reset_index(drop=True)
    frame.index.names = [name or f"Unnamed: {k}" for k, name in enumerate(frame.index.names)]
    return frame.reset_index()


def _read_excel(path: Path, data: bytes, header: bool | None, sheet: str | int | None) -> Table:
    import pandas as pd

    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if not any(name.startswith("xl/") for name in archive.namelist()):
                raise ValueError(
                    f"{path} is a zip file without an Excel workbook; unpack it, or save the table as .xlsx or .csv"
                )
    with _reading(path, "xlrd" if data.startswith(b"\xd0") else "openpyxl"):
        book = pd.ExcelFile(io.BytesIO(data))
    names = book.sheet_names
    if sheet is not None and sheet not in names and not (isinstance(sheet, int) and 0 <= sheet < len(names)):
        raise ValueError(f"data.sheet={sheet} is not a sheet of {path}; {did_you_mean(str(sheet), [*map(str, names)])}")
    with _reading(path, "openpyxl"):
        cells = pd.read_excel(book, sheet or 0, header=None, dtype=object, na_values=[], keep_default_na=False)
    cells = cells.where(cells != "", None).dropna(how="all").dropna(how="all", axis=1)
    numbers = [int(row) + 1 for row in cells.index]
    rows = cells.values.tolist()
    first: list[Any] = [f"c{k}" for k in range(cells.shape[1])]
    if header is not False and rows:
        first, rows, numbers = rows[0], rows[1:], numbers[1:]
        if header is None:
            texts = [[cell_text(cell) for cell in row] for row in rows]
            check_header(f"{path}, row {numbers[0] - 1 if numbers else 1}", [*map(cell_text, first)], texts)
    columns = list(zip(*rows, strict=True)) or [()] * len(first)
    named = zip(_clean_names(path, first), columns, strict=True)
    frame = pd.DataFrame({name: pd.Series(list(each), dtype=object) for name, each in named})
    notes = [f"sheet {names[0] if sheet is None else sheet!r} of {len(names)}"] if len(names) > 1 else []
    return Table(path, _infer_types(frame), numbers, False, kind="excel", notes=notes)


def _read_json_lines(path: Path, data: bytes) -> Table:
    records, lines = [], []
    for number, line in enumerate(decode_text(data, None, path)[0].split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}); write one object per line, without a comma after it"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object; write one object of column names per line")
        records.append(record)
        lines.append(number)
    table = _typed(path, "jsonl", _frame_of(records))
    return Table(**{**table.__dict__, "lines": lines})


def _read_json(path: Path, data: bytes) -> "pd.DataFrame":
    import pandas as pd

    try:
        value = json.loads(decode_text(data, None, path)[0])
        if isinstance(value, dict) and {"columns", "data"} <= value.keys():  # pandas' orientation "split"
            return pd.DataFrame(value["data"], columns=value["columns"])
        # A list of records, alone or as in {"data": [...]}.
        lists = [each for each in (value.values() if isinstance(value, dict) else [value]) if isinstance(each, list)]
        if len(lists) == 1 and all(isinstance(record, dict) for record in lists[0]):
            return _frame_of(lists[0])
        if isinstance(value, dict) and all(isinstance(v, list | dict) for v in value.values()):
            return pd.DataFrame(value).reset_index(drop=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a table in JSON ({one_line(error)}); save it again") from error
    raise ValueError(f"{path} is not a table in JSON; write a list of objects, one for each row")


def _frame_of(records: Sequence[dict[str, Any]]) -> "pd.DataFrame":
    """Return records as a frame with columns in order of appearance; missing cells are None, which keeps integers."""
    import pandas as pd

    names = dict.fromkeys(name for record in records for name in record)
    frame = pd.DataFrame({n: pd.Series([r.get(n) for r in records], dtype=object) for n in names})
    return _infer_types(frame)


def _infer_types(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Infer the types of object columns, but keep integers with missing cells as objects instead of floats."""
    inferred = frame.infer_objects()
    for name in frame:
        if inferred[name].dtype.kind == "f" and not any(isinstance(cell, float) for cell in frame[name].tolist()):
            inferred[name] = frame[name]
    return inferred


@contextmanager
def _reading(path: Path, package: str) -> Iterator[None]:
    """Turn errors of a reader into a ValueError that says how to install `package`, or why the file is unreadable."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{path} needs the package {package}; pip install {package}") from error
    except Exception as error:  # a corrupted file can raise anything
        raise ValueError(f"{path} cannot be read ({one_line(error)}); save it again") from error


def _without_index(table: Table) -> Table:
    """Return the table without unnamed columns that are empty or number the rows."""
    notes, dropped = [], []
    for name in table.names:
        cells = table.column(name) if NAMELESS.fullmatch(name) else ["x"]
        numbers = {int(cell) for cell in cells} if all(cell.isdecimal() for cell in cells) else set()
        if not any(cells):
            dropped.append(name)
        elif len(numbers) == len(cells) and len(cells) > 1:
            dropped.append(name)
            notes.append(f"{name!r} (an index without a name)")
    if not dropped or len(dropped) == len(table.names):
        return table
    return Table(
        **{
            **table.__dict__,
            "frame": table.frame.drop(columns=dropped),
            "notes": [*table.notes, *(f"left out {note}" for note in notes)],
        }
    )
