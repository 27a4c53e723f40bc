"""Detect encoding, separator and decimal sign of a text table, check its header, and parse its numbers."""

import csv
import io
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from src.errors import first_names, one_line

NAMELESS = re.compile(r"(Unnamed: \d+(_level_\d+)?)?")
"""Header of an index as pandas writes it (empty) or reads it (Unnamed: 0)."""
SEPARATORS = (",", ";", "\t", "|")
_SPACES = r" \u00a0\u2009\u202f'\u2019"
_COMMA_DECIMAL = re.compile(rf"[+-]?(\d+|\d{{1,3}}([.{_SPACES}]\d{{3}})+)?,\d+(e[+-]?\d+)?", re.IGNORECASE)
_POINT_DECIMAL = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)?\.\d+(e[+-]?\d+)?", re.IGNORECASE)
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")
_POINT_GROUPS = re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+")
_SPACED = re.compile(rf"[+-]?[1-9]\d{{0,2}}(([{_SPACES[1:]}]\d{{3}})+([.,]\d+)?|( \d{{3}})+[.,]\d+)")
"""Thousands separated by apostrophes or spaces; ordinary spaces need a fraction, unlike in telephone numbers."""


def decode_text(data: bytes, encoding: str | None, path: Path) -> tuple[str, str]:
    """Return the text and its encoding: UTF-8, UTF-16 or cp1252. Raises ValueError for other and binary data."""
    if encoding is None:
        zeros = [data[:2000][side::2].count(0) for side in (0, 1)]
        marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
        marked = next((name for mark, name in marks.items() if data.startswith(mark)), None)
        if marked is None and max(zeros) > len(data[:2000]) / 5 and min(zeros) * 5 < max(zeros):
            marked = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
        candidates = [marked] if marked else ["utf-8", "cp1252", "latin-1"]
    else:
        candidates = [encoding]
    for name in candidates:
        try:
            text = data.decode(name)
        except UnicodeDecodeError as error:
            reason = one_line(error)
        except LookupError as error:
            raise ValueError(f"data.encoding={encoding} is unknown; use one of Python's, such as cp1252") from error
        else:
            if "\0" in text:
                raise ValueError(f"{path} is not a text file, it contains null bytes; save the table as CSV in UTF-8")
            if encoding is None and (name == "latin-1" or (name == "cp1252" and _is_foreign(text))):
                raise ValueError(
                    f"{path} is not text in UTF-8, UTF-16 or cp1252; save it as UTF-8, or set data.encoding of a "
                    "table, such as gbk, shift_jis or cp1252"
                )
            return text, name
    raise ValueError(f"{path} is not text in {candidates[0]} ({reason}); save it as UTF-8")


def _is_foreign(text: str) -> bool:
    """Return whether a text seems to be wrongly decoded: Western words do not have four special letters in a row.

    Punctuation does not count: …”—“ is common.
    """
    return any(len(set(filter(str.isalpha, run))) > 1 for run in re.findall(r"[^\0-\x7f]{4,}", text))


def find_separator(text: str) -> str:
    """Return the separator that splits the first lines most consistently and into most cells, by default a comma."""
    head = [line for line in itertools.islice(io.StringIO(text, newline=""), 200) if line.strip()]
    best, chosen = (0.0, 0), ","
    for separator in SEPARATORS:
        counts = [len(row) for row in csv.reader(head, delimiter=separator)]
        if len(counts) and counts[0] > 1:
            score = sum(count == counts[0] for count in counts) / len(counts), counts[0]
            if score > best:
                best, chosen = score, separator
    if best == (0.0, 0) and len(head) > 1:
        rows = [line.split() for line in head]
        if len(rows[0]) > 1 and all(len(row) == len(rows[0]) and all(map(is_number, row)) for row in rows[1:]):
            return " "
    return chosen


def find_decimal(cells: Iterable[str], separator: str = ";") -> str:
    """Return the decimal sign, "," or ".", of most cells whose fraction cannot be a group of thousands.

    Without such cells, the comma of numbers such as 1,234 is decimal unless others are like 1.234, or commas separate
    the cells of the file.
    """
    comma = point = comma_groups = point_groups = 0
    for cell in cells:
        if "," in cell or "." in cell:
            comma_groups += (group := _THOUSANDS.fullmatch(cell) is not None)
            point += group and cell.count(",") > 1
            comma += not group and _COMMA_DECIMAL.fullmatch(cell) is not None
            point_groups += (group := _POINT_GROUPS.fullmatch(cell) is not None)
            comma += group and cell.count(".") > 1
            point += not group and _POINT_DECIMAL.fullmatch(cell) is not None
    if comma or point:
        return "," if comma > point else "."
    return "," if comma_groups and not point_groups and separator != "," else "."


def ambiguous_number(cells: Iterable[str]) -> str | None:
    """Return the first number, such as 1.234, if the point in every number could separate thousands; else None."""
    numbers = [cell for cell in cells if _POINT_DECIMAL.fullmatch(cell)]
    return numbers[0] if numbers and all(map(_POINT_GROUPS.fullmatch, numbers)) else None


def is_number(cell: str, decimal: str = ".") -> bool:
    """Return whether a text is a finite number."""
    value = to_number(cell, decimal)
    return value is not None and value - value == 0


def to_number(cell: str, decimal: str = ".") -> float | None:
    """Parse a number, which may be infinite or NaN; return None for any other text."""
    if _SPACED.fullmatch(cell):
        cell = re.sub(f"[{_SPACES}]", "", cell)
    if decimal == ",":
        if "." in cell and not re.fullmatch(r"[+-]?[1-9]\d{0,2}(\.\d{3})+(,\d+)?", cell):
            return None
        cell = cell.replace(".", "").replace(",", ".")
    elif "," in cell and re.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", cell):
        cell = cell.replace(",", "")
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def to_numbers(cells: Sequence[str | None], decimal: str) -> Sequence[float | None]:
    """Return `to_number` of each cell; None stays None."""
    if decimal == ".":
        try:
            numbers = [float(cell) for cell in cells]  # type: ignore[arg-type]
        except (TypeError, ValueError):
            pass
        else:
            if not any("_" in cell for cell in cells if cell):
                return numbers
    return [None if cell is None else to_number(cell, decimal) for cell in cells]


# Headers and cells


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


def clean_names(path: Path, cells: Sequence[Any]) -> list[str]:
    """Return column names without line breaks; name unnamed ones as pandas does. Raises ValueError for duplicates."""
    names = [" ".join(cell_text(cell).split()) or f"Unnamed: {k}" for k, cell in enumerate(cells)]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has several columns named {', '.join(map(repr, duplicates))}; rename them")
    return names


def cell_text(cell: Any) -> str:
    """Return a cell as text: missing cells are empty, and whole numbers have no decimals."""
    if isinstance(cell, str):
        return cell
    if cell is None or type(cell).__name__ in ("NAType", "NaTType") or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
