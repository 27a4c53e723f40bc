"""Detect the types of the columns of a table, and parse their cells."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from src.data.columns import EXACT, Cells, Column, Floats
from src.data.dates import (
    COMPACT_FORMAT,
    EPOCHS,
    UNITS,
    are_compact_dates,
    dates_of_texts,
    epoch_format,
    is_named_like_time,
    ticks_of,
    ticks_of_epochs,
)
from src.data.table_files import MISSING, Table, sorted_names
from src.data.table_text import cell_text, to_numbers
from src.errors import first_names, format_override, shell_word

if TYPE_CHECKING:
    import pandas as pd

MAX_CATEGORIES = 100
"""Largest number of categories of a text column; each must occur twice on average."""
MAX_DECIMALS = 8
"""Largest number of decimals to which samples are rounded; columns with more are not rounded."""
_SIGN = re.compile(r"^\s*[$€£¥]\s*|\s*[$€£¥%]\s*$")
"""Currency or percent signs, which make a text of a number."""
MISSING_NUMBERS = MISSING | {"none", "-", "--", ".", "?", "-nan", "nat"}
"""Texts of missing cells in columns of numbers, in lower case."""
BOOLEANS = [("false", "true"), ("no", "yes"), ("n", "y"), ("f", "t")]
ID_NAMES = re.compile(r"(?i:(.*[_\s.-])?(id|uuid|index|key))|.*[a-z](Id|ID)")
"""Names of integer columns that are left out as ids if all their values differ."""


def parse_column(
    table: Table, name: str, given: str | None = None, known: Column | None = None, used: bool = False
) -> Cells:
    """Return the parsed cells of a column.

    The type is `given` (`data.types`), that of the `known` encoding of a run, or else detected. `used` means that a
    setting names the column: it is then kept even if it looks like an id or a constant.
    """
    series = table.frame[name]
    if known is not None:
        return _parse_known(table, series, known)
    wide = given not in (None, "category", "boolean")
    words = MISSING_NUMBERS if wide else {""} if given == "category" else MISSING
    missing = _missing(series, table.is_text, words)
    present = series[~missing].tolist()
    if given in ("id", "text"):
        return _left_out(missing, given)
    if not present:
        return _left_out(missing, "empty")
    constant = f"constant {cell_text(present[0])!r:.40}" + (f" with {missing.sum()} missing" if missing.any() else "")
    if given is None and len(set(map(str, present))) == 1 and not used:
        return _left_out(missing, constant)
    if given == "category" or (given is None and str(series.dtype) == "category"):
        return _categories(series, missing)
    if given in EPOCHS or given == "date" or (given is None and is_named_like_time(name)):
        dates = _parse_epochs(table, series, given)
        if dates is not None:
            return dates
    text = all(isinstance(cell, str) for cell in present)
    parsed = _parse_texts(table, series, missing, given) if text else _parse_typed(series, missing, given)
    if given is not None or used or parsed.type not in ("number", "integer", "date"):
        return parsed
    values = np.asarray(parsed.values)[~parsed.missing & ~parsed.invalid].tolist()
    if len(different := set(values)) == 1:
        return _left_out(parsed.missing, constant)
    if parsed.type == "integer" and len(different) == len(values) > 2:
        if all(b - a == 1 for a, b in pairwise(values)):
            return _left_out(parsed.missing, "counts the rows")
        if ID_NAMES.fullmatch(name):
            return _left_out(parsed.missing, "id")
    return parsed


def _parse_known(table: Table, series: "pd.Series[Any]", known: Column) -> Cells:
    """Return the cells of a column of a known type."""
    if known.type in ("category", "boolean"):
        words = MISSING - {str(category).lower() for category in known.categories}
        missing = _missing(series, table.is_text, words)
        cells = [cell.item() if isinstance(cell, np.generic) else cell for cell in series.tolist()]
        values = np.array([cell.strip() if table.is_text else cell for cell in cells], dtype=object)
        allowed = set(known.categories or [False, True])
        return Cells(known.type, values, missing, np.array([v not in allowed for v in values]) & ~missing)
    missing = _missing(series, table.is_text, MISSING_NUMBERS)
    text = all(isinstance(cell, str) for cell in series[~missing].tolist())
    given = known.format or known.type
    parsed = _parse_epochs(table, series, given) if given in EPOCHS else None
    if parsed is None:
        parsed = _parse_texts(table, series, missing, given) if text else _parse_typed(series, missing, given)
    if parsed.type == "date" and parsed.details:
        found, wanted = UNITS[parsed.details["unit"]], UNITS[known.unit]
        values = parsed.values * (found // wanted) if found >= wanted else parsed.values // (wanted // found)
        parsed = parsed._replace(values=values)
    return parsed


def _left_out(missing: npt.NDArray[np.bool_], why: str) -> Cells:
    return Cells(None, [], missing, np.zeros_like(missing), why)


def _all_invalid(given: str, missing: npt.NDArray[np.bool_]) -> Cells:
    """Return a column whose cells all violate the given type or date format."""
    return Cells("date" if "%" in given or given in EPOCHS else given, [], missing, ~missing)  # type: ignore[arg-type]


def _missing(series: "pd.Series[Any]", is_text: bool, words: set[str]) -> npt.NDArray[np.bool_]:
    missing: npt.NDArray[np.bool_] = series.isna().to_numpy(dtype=bool)
    if is_text or series.dtype == object or str(series.dtype) == "str":
        # Only short cells are compared: a table may have millions of others.
        short = (isinstance(c, str) and len(c) < 9 and c.strip().lower() in words for c in series.tolist())
        missing = missing | np.fromiter(short, bool, len(series))
    return missing


def _categories(series: "pd.Series[Any]", missing: npt.NDArray[np.bool_]) -> Cells:
    """Return a column of categories, sorted or in the order of a pandas categorical."""
    cells = [cell.item() if isinstance(cell, np.generic) else cell for cell in series.tolist()]
    invalid = np.array([not isinstance(cell, str | int | float | bool) for cell in cells]) & ~missing
    present = [cell for cell, leave in zip(cells, missing | invalid, strict=True) if not leave]
    dtype = None if all(isinstance(cell, str) for cell in present) and series.dtype == object else str(series.dtype)
    details: dict[str, Any] = {"dtype": dtype}
    if str(series.dtype) == "category":
        levels = [each.item() if isinstance(each, np.generic) else each for each in series.cat.categories.tolist()]
        used = set(present)
        details |= {
            "levels": levels,
            "ordered": bool(series.cat.ordered),
            "categories": [x for x in levels if x in used],
        }
    elif all(isinstance(cell, str) for cell in present):
        details["categories"] = sorted_names(present)
    else:
        details["categories"] = sorted(set(present), key=lambda cell: (isinstance(cell, str), cell))
    return Cells("category", np.array(cells, dtype=object), missing, invalid, details=details)


def _parse_texts(table: Table, series: "pd.Series[Any]", missing: npt.NDArray[np.bool_], given: str | None) -> Cells:
    """Return a text column as numbers, booleans, dates or categories, or the reason why it is left out."""
    dtype = None if table.is_text or series.dtype == object else str(series.dtype)
    cells: list[Any] = [None if lacks else cell.strip() for cell, lacks in zip(series.tolist(), missing, strict=True)]
    present = [cell for cell in cells if cell is not None]
    different = set(present)
    if given in (None, "boolean"):
        words = sorted(different, key=str.lower) if len(different) <= 2 else []
        lowered = tuple(word.lower() for word in words)
        pairs = [*BOOLEANS, ("0", "1")] if given else BOOLEANS
        if lowered in pairs or (given and len(words) == 2):
            return _booleans(cells, missing, {"categories": words, "dtype": dtype})
        if given and len(words) == 1 and any(set(lowered) <= set(pair) for pair in pairs):
            return _left_out(missing, f"constant {words[0]!r}")
    numeric = table.is_text or given in ("number", "integer")
    leading_zero = given is None and re.search(r"^[+-]?0\d+$", "\n".join(different), re.MULTILINE) is not None
    compact = given in (None, "date") and are_compact_dates(different)
    if numeric and given in (None, "number", "integer") and not leading_zero and not compact:
        numbers = to_numbers(cells, table.decimal)
        valid = np.array([number is not None and number - number == 0 for number in numbers])
        wide = _missing(series, True, MISSING_NUMBERS)
        if given is not None or valid.sum() > 0.5 * (~wide).sum():
            return _numbers_of_texts(cells, numbers, valid, wide, given, table.decimal, dtype)
    if given in (None, "date") or "%" in (given or ""):
        patterns = [given] if given and "%" in given else [COMPACT_FORMAT] if compact else None
        if (dates := _parse_dates(cells, missing, patterns, dtype)) is not None:
            return dates
    if given is not None:
        return _all_invalid(given, missing)
    if len(different) <= MAX_CATEGORIES and 2 * len(different) <= len(present):
        parsed = _categories(series, missing)
        return parsed._replace(details={**parsed.details, "dtype": dtype})
    if not numeric and all(number is not None for number in to_numbers(present, ".")):
        use = type_override(str(series.name), "number")
        return _left_out(missing, f"numbers in text cells like {present[0]!r:.30}; add {use}")
    if table.is_text and all(_SIGN.search(cell) for cell in present[:100]):
        bare = [_SIGN.sub("", cell) for cell in present]
        if all(number is not None for number in to_numbers(bare, table.decimal)):
            return _left_out(missing, f"text: numbers with a sign such as {present[0]!r:.30}; remove the sign")
    return _left_out(missing, f"{'id' if len(different) == len(present) else 'text'} like {present[0]!r:.30}")


def _numbers_of_texts(
    cells: Sequence[str | None],
    numbers: Sequence[float | None],
    valid: npt.NDArray[np.bool_],
    missing: npt.NDArray[np.bool_],
    given: str | None,
    decimal: str,
    dtype: str | None,
) -> Cells:
    good = [cell for cell, ok in zip(cells, valid, strict=True) if ok and cell is not None]
    whole = not any(decimal in cell or "e" in cell.lower() for cell in good)
    values: Any
    if (whole and given != "number") or given == "integer":
        if whole:  # exact also beyond 2^53
            groups = re.compile(r"[^\d+-]")  # what separates thousands
            values = [int(groups.sub("", c)) if ok and c else 0 for c, ok in zip(cells, valid, strict=True)]
        else:
            valid = valid & np.array([x is not None and x == x and x.is_integer() for x in numbers])
            values = [int(x) if ok and x is not None else 0 for x, ok in zip(numbers, valid, strict=True)]
        fits = all(-(2**63) <= value < 2**63 for value in values)
        array = np.array(values, dtype=np.int64 if fits else object)
        return Cells("integer", array, missing, ~valid & ~missing, details={"dtype": dtype})
    values = np.array([x if ok else np.nan for x, ok in zip(numbers, valid, strict=True)], dtype=np.float64)
    digits = max((_decimals(cell, decimal) for cell in good), default=0)
    largest = float(np.abs(values[valid]).max(initial=0))
    keeps = digits <= MAX_DECIMALS and largest * 10**digits < EXACT  # rounding changes no cell
    details = {"decimals": digits if keeps else None, "dtype": dtype}
    return Cells("number", values, missing, ~valid & ~missing, details=details)


def _decimals(cell: str, decimal: str) -> int:
    """Return the number of decimals of a number, at least 0: 2 for 1.5e-1, and 0 for 1.5e3."""
    number, _, exponent = cell.lower().partition("e")
    return max(0, len(number.partition(decimal)[2].rstrip("0")) - int(exponent or 0))


def _booleans(values: Sequence[Any], missing: npt.NDArray[np.bool_], details: Mapping[str, Any]) -> Cells:
    return Cells("boolean", np.array(values, dtype=object), missing, np.zeros_like(missing), details=details)


def _parse_dates(
    cells: Sequence[str | None], missing: npt.NDArray[np.bool_], patterns: Sequence[str] | None, dtype: str | None
) -> Cells | None:
    """Return a text column as dates; None if any cell is not a date."""
    found = dates_of_texts([cell for cell in cells if cell is not None], patterns)
    if found is None:
        return None
    ticks, details = found
    values = np.zeros(len(cells), dtype=np.int64)
    values[~missing] = ticks
    return Cells("date", values, missing, np.zeros_like(missing), details={**details, "dtype": dtype})


def _parse_epochs(table: Table, series: "pd.Series[Any]", given: str | None) -> Cells | None:
    """Return a column of whole numbers as dates, in a unit since 1970; None for other columns.

    The unit is that of `given`, if it is one of `EPOCHS`, or else the one that puts all numbers in `EPOCH_RANGE`.
    """
    missing = _missing(series, table.is_text, MISSING_NUMBERS)
    cells = series.tolist()
    if not table.is_text and any(isinstance(cell, str) for cell in cells):
        return None
    numbers = [None if lacks else _whole(cell) for cell, lacks in zip(cells, missing, strict=True)]
    invalid = np.array([number is None for number in numbers]) & ~missing
    present = [number for number in numbers if number is not None]
    form = given
    if given not in EPOCHS:
        enough = given is not None or len(set(present)) > 2
        form = epoch_format(present) if enough and not invalid.any() else None
    if form is None:
        return None
    if (likely := epoch_format(present)) not in (None, form):
        raise ValueError(
            f"{type_override(str(series.name), form)} puts numbers such as {present[0]} far from today, and {likely} "
            f"between 1990 and 2050; add {type_override(str(series.name), str(likely))}"
        )
    values = np.zeros(len(cells), dtype=np.int64)
    values[~missing & ~invalid], details = ticks_of_epochs(present, form)
    dtype = None if table.is_text else "int64" if series.dtype == object else str(series.dtype)
    return Cells("date", values, missing, invalid, details={**details, "dtype": dtype})


def _whole(cell: Any) -> int | None:
    """Return a cell as an integer of 64 bits; None for others."""
    if isinstance(cell, str):
        cell = int(cell) if re.fullmatch(r"\s*[+-]?\d{1,19}\s*", cell) else None
    is_integer = isinstance(cell, int | np.integer) and not isinstance(cell, bool | np.bool_)
    return int(cell) if is_integer and abs(int(cell)) < 2**63 else None


def _parse_typed(series: "pd.Series[Any]", missing: npt.NDArray[np.bool_], given: str | None) -> Cells:
    """Return a column with a data type as booleans, integers, numbers or dates, or the reason why it is left out."""
    import datetime
    import decimal

    import pandas as pd
    from pandas.api import types

    dtype = str(series.dtype)
    cells = series.tolist()
    present = [cell for cell, lacks in zip(cells, missing, strict=True) if not lacks]
    details: dict[str, Any] = {"dtype": dtype}
    none = np.zeros_like(missing)
    if given == "boolean" and len(set(present)) == 2:
        words = sorted(set(present))
        values = [cell.item() if isinstance(cell, np.generic) else cell for cell in cells]
        return _booleans(values, missing, {**details, "categories": [values[cells.index(w)] for w in words]})
    if types.is_bool_dtype(series.dtype) or all(isinstance(cell, bool | np.bool_) for cell in present):
        if given in (None, "boolean"):
            values = [bool(cell) if not lacks else False for cell, lacks in zip(cells, missing, strict=True)]
            return _booleans(values, missing, details)
        cells = [cell if lacks else int(cell) for cell, lacks in zip(cells, missing, strict=True)]
    if types.is_datetime64_any_dtype(series.dtype) or all(isinstance(cell, datetime.date) for cell in present):
        if given in ("number", "integer", "boolean"):
            return _all_invalid(given, missing)
        dates = pd.Series(pd.to_datetime(series[~missing])).reset_index(drop=True)
        ticks = np.zeros(len(series), dtype=np.int64)
        ticks[~missing], details["unit"] = ticks_of(dates)
        return Cells("date", ticks, missing, none, details=details)
    if not all(isinstance(cell, int | float | np.number | decimal.Decimal) for cell in present):
        found = sorted({type(cell).__name__ for cell in present})
        return _left_out(missing, f"has values of type {first_names(found)}")
    whole = all(isinstance(cell, int | np.integer) for cell in present)
    texts = [None if lacks else str(cell) for cell, lacks in zip(cells, missing, strict=True)] if whole else []
    may_be_dates = given in (None, "date") and whole
    compact = may_be_dates and are_compact_dates({text for text in texts if text is not None})
    if compact or (given is not None and "%" in given):
        patterns = [COMPACT_FORMAT if compact or given is None else given]
        as_dates = _parse_dates(texts, missing, patterns, "int64" if dtype == "object" else dtype)
        if whole and as_dates is not None:
            return as_dates
    if given is not None and given not in ("number", "integer"):
        return _all_invalid(given, missing)
    if given == "integer" or (given is None and whole):
        ok = np.array([lacks or int(cell) == cell for cell, lacks in zip(cells, missing, strict=True)])
        values = [0 if lacks or not ok[k] else int(cells[k]) for k, lacks in enumerate(missing)]
        fits = all(-(2**63) <= value < 2**63 for value in values)
        return Cells("integer", np.array(values, dtype=np.int64 if fits else object), missing, ~ok, details=details)
    numbers = np.array([np.nan if lacks else float(c) for c, lacks in zip(cells, missing, strict=True)])
    narrow: Callable[[Floats], Any] = np.float32 if "32" in dtype else np.float16 if "16" in dtype else np.float64
    finite = numbers[np.isfinite(numbers)]
    exact = (d for d in range(MAX_DECIMALS + 1) if (narrow(finite.round(d)) == narrow(finite)).all())
    details["decimals"] = next(exact, None)
    if any(isinstance(cell, decimal.Decimal) for cell in present):
        details["dtype"] = "float64"
    return Cells("number", numbers, missing, ~np.isfinite(numbers) & ~missing, details=details)


def type_override(name: str, kind: str) -> str:
    """Return the override that sets the type of a column, quoted for a shell."""
    if name.isascii() and re.fullmatch(r"[\w ./@%+-]+", name):
        return shell_word(f"data.types={{{name}: {kind}}}")
    return format_override("data.types", [f"{name}={kind}"])  # Hydra's grammar does not quote the keys of {...}
