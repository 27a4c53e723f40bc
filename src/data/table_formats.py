"""Read tables from the contents of Excel, Parquet, JSON and JSON Lines files. Unreadable files raise ValueError."""

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.data.table_text import cell_text, check_header, clean_names, decode_text
from src.errors import did_you_mean, one_line

if TYPE_CHECKING:
    import pandas as pd


def read_parquet(path: Path, data: bytes) -> "pd.DataFrame":
    """Return a table with its index as a column, unless it numbers the rows."""
    import pandas as pd

    with _reading(path, "pyarrow"):
        from pyarrow import parquet

        # Integers beside missing cells would be floats otherwise.
        frame: pd.DataFrame = parquet.read_table(io.BytesIO(data)).to_pandas(integer_object_nulls=True)
    if isinstance(frame.index, pd.RangeIndex):
        return frame.reset_index(drop=True)
    frame.index.names = [name or f"Unnamed: {k}" for k, name in enumerate(frame.index.names)]
    return frame.reset_index()


def read_excel(
    path: Path, data: bytes, header: bool | None, sheet: str | int | None
) -> "tuple[pd.DataFrame, list[int], list[str]]":
    """Return a sheet, by default the first with cells, the number of each row, and a note if there are several sheets.

    Empty rows and columns are left out.
    """
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
    for chosen in names if sheet is None else [sheet]:
        with _reading(path, "openpyxl"):
            cells = pd.read_excel(book, chosen, header=None, dtype=object, na_values=[], keep_default_na=False)
        cells = cells.where(cells != "", None).dropna(how="all").dropna(how="all", axis=1)
        if not cells.empty:
            break
    numbers = [int(row) + 1 for row in cells.index]
    rows = cells.values.tolist()
    first: list[Any] = [f"c{k}" for k in range(cells.shape[1])]
    if header is not False and rows:
        first, rows, numbers = rows[0], rows[1:], numbers[1:]
        if header is None:
            texts = [[cell_text(cell) for cell in row] for row in rows]
            check_header(f"{path}, row {numbers[0] - 1 if numbers else 1}", [*map(cell_text, first)], texts)
    frame = pd.DataFrame(rows, columns=clean_names(path, first), dtype=object)
    notes = [f"sheet {chosen!r} of {len(names)}"] if len(names) > 1 else []
    return _infer_types(frame), numbers, notes


def read_json_lines(path: Path, data: bytes) -> "tuple[pd.DataFrame, list[int]]":
    """Return a table with one object per line, and the line of each row."""
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
    return _frame_of(records), lines


def read_json(path: Path, data: bytes) -> "pd.DataFrame":
    """Return a list of objects, alone or in one object, or one of the forms that pandas writes."""
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
    return _infer_types(pd.DataFrame({n: pd.Series([r.get(n) for r in records], dtype=object) for n in names}))


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
