"""Types of the columns of a table, and their invertible encodings as numbers for a network."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from src.data.table_files import Table, cell_text, first_names, sorted_names, to_numbers
from src.quoting import format_override, shell_word

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[Any]  # float64
ColumnType = Literal["number", "integer", "category", "boolean", "date"]
Transform = Literal["standardize", "log", "quantile"]
CategoryCode = Literal["onehot", "bits"]

MAX_CATEGORIES = 100
"""Most categories of a column of texts; each must occur twice on average."""
NUM_KNOTS = 256
"""Most points of the distribution function that the transform `quantile` stores."""
MAX_DECIMALS = 8
"""Most decimals of a column whose samples are rounded to as many."""
MISSING = {"", "na", "n/a", "nan", "null", "<na>", "#n/a"}
MISSING_NUMBERS = MISSING | {"none", "-", "--", ".", "?", "-nan", "nat"}
"""Texts of missing cells, in lower case; the second set for columns of numbers."""
BOOLEANS = [("false", "true"), ("no", "yes"), ("n", "y"), ("f", "t")]
DATE_FORMATS = [
    "%Y-%m-%d",
    "%Y/%m/%d",
    "%d.%m.%Y",
    "%m/%d/%Y",
    "%d/%m/%Y",
    "%d-%m-%Y",
    "%d.%m.%y",
    "%m/%d/%y",
    "%d/%m/%y",
]
DATE_FORMATS += ["%d %b %Y", "%d %B %Y", "%d-%b-%Y", "%d-%b-%y", "%b %d, %Y", "%B %d, %Y", "%Y-%m"]
COMPACT_DATE, COMPACT_FORMAT = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"), "%Y%m%d"
"""Dates such as 20200131: what whole numbers are if all are such dates, and at least three differ."""
TIME_FORMATS = [
    "",
    " %H:%M",
    " %H:%M:%S",
    " %H:%M:%S.%f",
    "T%H:%M",
    "T%H:%M:%S",
    "T%H:%M:%S.%f",
    " %I:%M %p",
    " %I:%M:%S %p",
]
UNITS = {"D": 86_400_000_000_000, "h": 3_600_000_000_000, "m": 60_000_000_000, "s": 1_000_000_000}
UNITS |= {"ms": 1_000_000, "us": 1_000, "ns": 1}
"""Nanoseconds of each unit of time."""
UNIT_NAMES = {"D": "days", "h": "hours", "m": "minutes", "s": "seconds"}
ID_NAMES = re.compile(r"(?i:(.*[_\s.-])?(id|uuid|index|key))|.*[a-z](Id|ID)")
"""Names of columns that are left out if all their integers differ."""
EXACT = 2**53
"""Integers up to here are exact in float64."""


class Cells(NamedTuple):
    """The parsed cells of a column."""

    type: ColumnType | None
    """None for a column that is left out."""
    values: Any
    """(N,) array: float64, Python or numpy integers, booleans, or categories; units of time since 1970 for dates."""
    missing: npt.NDArray[np.bool_]
    invalid: npt.NDArray[np.bool_]
    """(N,) cells that are neither missing nor of this type."""
    why: str = ""
    """Why a column is left out."""
    details: Mapping[str, Any] = {}
    """Fields of the `Column`."""


@dataclass
class Column:
    """How a column is encoded, and what restores its cells.

    A cell has three forms: its value, the *display* value (the value minus `offset`, the index of a category, or 0 or 1
    for a boolean), and the *encoded* values, `width` of them, which the module standardizes unless `is_coded`.
    """

    name: str
    type: ColumnType = "number"
    dtype: str | None = None
    """Type of the file's column; None for text."""
    transform: Transform = "standardize"
    code: CategoryCode = "onehot"
    low: float | None = None
    high: float | None = None
    """Observed range of display values."""
    decimals: int | None = None
    """Digits after the decimal sign of numbers; None if there are many."""
    offset: int = 0
    std: float = 1.0
    """Standard deviation of display values."""
    categories: list[Any] = field(default_factory=list)
    levels: list[Any] | None = None
    """All categories of pandas' categorical column, in its order."""
    ordered: bool = False
    unit: str = ""
    format: str = ""
    """Of dates that are text, as in strftime; empty for dates with a type."""
    unpadded: str = ""
    """Directives of `format` whose numbers have no leading zero, such as "dm" for 3/1/2020."""
    suffix: str = ""
    """Text after each date, such as Z."""
    digits: int = 6
    """Digits of a fraction of a second."""
    knots: list[list[float]] = field(default_factory=list)
    """Display values and their normal scores, for `quantile`."""

    @property
    def is_coded(self) -> bool:
        """Whether the encoded values are codes or normal scores, which need no standardization."""
        return self.type in ("category", "boolean") or self.transform == "quantile"

    @property
    def width(self) -> int:
        return self.codebook.shape[1] if self.type == "category" else 1

    @property
    def codebook(self) -> Floats:
        """The code (K, width) of each category in {-1, 1}: one-hot, or its index in binary digits.

        Source: Chen et al. 2022 (arXiv 2208.04202), section 2, for the bits.
        """
        count = len(self.categories)
        if self.code == "onehot":
            return 2.0 * np.eye(count) - 1
        bits = max(1, (count - 1).bit_length())
        return 2.0 * (np.arange(count)[:, None] >> np.arange(bits) & 1) - 1

    @property
    def origin(self) -> str:
        """The date whose display value is 0."""
        return str(np.array(self.offset).astype(f"datetime64[{self.unit}]"))

    @property
    def label(self) -> str:
        """The name for plots, with the unit of dates."""
        if self.type != "date":
            return self.name
        unit = UNIT_NAMES.get(self.unit, self.unit)
        return f"{self.name} ({unit} since {self.origin})"

    @property
    def summary(self) -> str:
        """The name and how it is modeled, for the first lines of a run."""
        details: list[str] = [self.transform] if self.transform != "standardize" else []
        details += [f"{len(self.categories)}"] if self.type == "category" else []
        details += [self.code] if self.type == "category" and self.code != "onehot" else []
        details += [self.format] if self.format else []
        return f"{self.name} {self.type}" + (f" ({' '.join(details)})" if details else "")

    def display(self, values: Any) -> Floats:
        """Return the display values (N,) of cells' values. Raises KeyError for an unknown category."""
        if self.type in ("category", "boolean"):
            index = {category: k for k, category in enumerate(self.categories or [False, True])}
            return np.array([index[value] for value in values], dtype=np.float64)
        if self.offset:
            return np.array([int(value) - self.offset for value in values], dtype=np.float64)
        return np.asarray(values, dtype=np.float64)

    def encode(self, display: Floats) -> Floats:
        """Return the encoded values (N, width) of display values (N,)."""
        if self.type == "category":
            return self.codebook[display.astype(np.int64)]
        if self.type == "boolean":
            encoded = 2 * display - 1
        elif self.transform == "quantile":
            encoded = np.interp(display, np.array(self.knots[0]), np.array(self.knots[1]))
        elif self.transform == "log":
            encoded = np.log1p(display) if self.low == 0 else np.log(display)
        else:
            encoded = display
        return encoded[:, None]

    def decode(self, encoded: Floats, clip: bool = True) -> Floats:
        """Return the display values (N,) of encoded values (N, width), rounded, and with `clip` in the observed range.

        The category is that with the nearest code. NaN stays NaN.
        """
        if self.type == "category":
            nearest = (encoded @ self.codebook.T).argmax(1).astype(np.float64)
            return np.where(np.isfinite(encoded).all(1), nearest, np.nan)
        encoded = encoded[:, 0]
        if self.type == "boolean":
            return np.where(np.isfinite(encoded), encoded > 0, np.nan)
        if self.transform == "quantile":
            display = np.interp(encoded, np.array(self.knots[1]), np.array(self.knots[0]))
        elif self.transform == "log":
            with np.errstate(over="ignore"):
                display = np.expm1(encoded) if self.low == 0 else np.exp(encoded)
        else:
            display = encoded
        if self.type in ("integer", "date"):
            display = display.round()
        elif self.decimals is not None:
            display = display.round(self.decimals)
        result: Floats = display.clip(self.low, self.high) if clip and self.low is not None else display
        return result + 0.0  # 0 for -0.0

    def restore(self, display: Floats) -> "pd.Series[Any]":
        """Return cells of the file's type (N,) from display values. Not finite ones become missing."""
        import pandas as pd

        finite = np.isfinite(display)
        known = display[finite]
        cells: Any
        if self.type == "category":
            cells = [self.categories[int(k)] for k in known]
        elif self.type == "boolean":
            cells = [(self.categories or [False, True])[int(k)] for k in known]
        elif self.type == "date":
            cells = self._dates(known)
        elif self.type == "integer":
            cells = [int(k) + self.offset for k in known]
        else:
            cells = known
        if not finite.all():
            full = pd.Series([None] * len(display), dtype=object)
            full[finite] = list(cells)
            return full
        if self.levels is not None:
            return pd.Series(pd.Categorical(cells, categories=self.levels, ordered=self.ordered))
        if self.dtype is None:
            dtype = "float64" if self.type == "number" else "object"
            if self.type == "integer" and all(-(2**63) <= cell < 2**63 for cell in cells):
                dtype = "int64"
            return pd.Series(cells, dtype=dtype)
        if self.type == "date":
            return pd.Series(cells) if self.dtype == "object" else pd.Series(cells).astype(self.dtype)
        if self.type == "integer" and self.dtype in np.sctypeDict:
            kind = np.dtype(self.dtype)
            if kind.kind in "iu":  # without clipping to the observed range
                cells = np.clip(np.array(cells, dtype=object), np.iinfo(kind).min, np.iinfo(kind).max)
        return pd.Series(cells, dtype=object if self.dtype == "object" else None).astype(self.dtype)

    def _dates(self, display: Floats) -> Any:
        """Return dates as text, Python dates, or pandas' dates without a time zone, else with that of `dtype`."""
        import pandas as pd

        numbers = display.astype(np.int64) + self.offset
        unit = {"D": "s", "h": "s", "m": "s"}.get(self.unit, self.unit)
        ticks = numbers * (UNITS[self.unit] // UNITS[unit])
        dates = pd.DatetimeIndex(ticks.astype(f"datetime64[{unit}]"))
        if self.format:
            texts = _date_texts(dates, self.format, self.unpadded)
            cut = 6 - self.digits if self.format.endswith("%f") else 0
            return [f"{text[: len(text) - cut]}{self.suffix}" for text in texts]
        if self.dtype == "object":
            return list(dates.date)
        return dates.tz_localize("UTC") if "," in (self.dtype or "") or "tz=" in (self.dtype or "") else dates


def to_json(columns: Sequence[Column], **file: Any) -> str:
    """Return columns, and settings of the file that holds them, as ASCII JSON without `${`."""
    default = asdict(Column(""))
    entries = [{k: v for k, v in asdict(column).items() if v != default[k]} for column in columns]
    text = json.dumps({"columns": entries, **file}, separators=(",", ":"))
    return text.replace("$", "\\u0024")  # a configuration interpolates "${"


def from_json(text: str) -> tuple[list[Column], dict[str, Any]]:
    """Return the columns and other settings of `to_json`. Raises ValueError for another text."""
    try:
        loaded = json.loads(text)
        columns = [Column(**entry) for entry in loaded.pop("columns")]
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ValueError("data.encoders is not the text that a run stores; null infers it from the table") from error
    return columns, loaded


# Types of columns


def parse(table: Table, name: str, given: str | None = None, known: Column | None = None, used: bool = False) -> Cells:
    """Return the cells of a column, of the type `given` or `known`, else of a detected one.

    `used` means that a setting names the column: then it is a number or a category although it may be an id.
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
    parsed = _parse_texts(table, series, missing, given) if text else _parse_typed(series, missing, given)
    if parsed.type == "date" and parsed.details:
        found, wanted = UNITS[parsed.details["unit"]], UNITS[known.unit]
        values = parsed.values * (found // wanted) if found >= wanted else parsed.values // (wanted // found)
        parsed = parsed._replace(values=values)
    return parsed


def infer_column(name: str, cells: Cells, transform: str, code: CategoryCode) -> Column:
    """Return the encoding of a column from its cells, all present and valid.

    Raises ValueError, without the name of the file, if the transform does not apply.
    """
    assert cells.type is not None
    column = Column(name, cells.type, code=code, **cells.details)
    values = cells.values
    if cells.type == "category":
        return column
    if cells.type == "boolean":
        column.std = float(column.display(values).std())
        return column
    if cells.type in ("integer", "date"):
        least, most = int(min(values)), int(max(values))
        column.offset = least if cells.type == "date" or max(abs(least), abs(most)) > EXACT else 0
    display = column.display(values)
    column.low, column.high, column.std = float(display.min()), float(display.max()), float(display.std())
    column.transform = transform  # type: ignore[assignment]
    if transform == "log" and column.low < 0:
        raise ValueError(f"{name}: log needs numbers of at least 0, found {column.low:g}; use quantile")
    if transform == "quantile":
        column.knots = _knots(display)
    return column


def _knots(display: Floats) -> list[list[float]]:
    """Return display values and their normal scores, at the middle of the jumps of the distribution function."""
    from scipy.special import ndtri

    values, counts = np.unique(display, return_counts=True)
    scores = ndtri((np.cumsum(counts) - counts / 2) / len(display))
    if len(values) > NUM_KNOTS:
        chosen = np.unique(np.searchsorted(np.cumsum(counts), np.linspace(1, len(display), NUM_KNOTS)))
        values, scores = values[chosen], scores[chosen]
    return [values.tolist(), scores.tolist()]


def _left_out(missing: npt.NDArray[np.bool_], why: str) -> Cells:
    return Cells(None, [], missing, np.zeros_like(missing), why)


def _all_invalid(given: str, missing: npt.NDArray[np.bool_]) -> Cells:
    """Return a column none of whose cells is of the given type, or a date of the given format."""
    return Cells("date" if "%" in given else given, [], missing, ~missing)  # type: ignore[arg-type]


def _missing(series: "pd.Series[Any]", is_text: bool, words: set[str]) -> npt.NDArray[np.bool_]:
    missing: npt.NDArray[np.bool_] = series.isna().to_numpy(dtype=bool)
    if is_text or series.dtype == object or str(series.dtype) == "str":
        # Only short cells are compared: a table may have millions of others.
        short = (isinstance(c, str) and len(c) < 9 and c.strip().lower() in words for c in series.tolist())
        missing = missing | np.fromiter(short, bool, len(series))
    return missing


def _categories(series: "pd.Series[Any]", missing: npt.NDArray[np.bool_]) -> Cells:
    """Return a column of categories, sorted, or in the order of pandas' categorical type."""
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
    """Return a column of texts as numbers, booleans, dates or categories, or why it is none of these."""
    dtype = None if table.is_text or series.dtype == object else str(series.dtype)
    cells: list[Any] = [None if lacks else cell.strip() for cell, lacks in zip(series.tolist(), missing, strict=True)]
    present = [cell for cell in cells if cell is not None]
    different = set(present)
    if given in (None, "boolean"):
        words = sorted(different, key=str.lower) if len(different) <= 2 else []
        lowered = tuple(word.lower() for word in words)
        pairs = [*BOOLEANS, ("0", "1")] if given else BOOLEANS
        if lowered in pairs or (given and len(words) == 2):
            return _valid("boolean", cells, missing, {"categories": words, "dtype": dtype})
        if given and len(words) == 1 and any(set(lowered) <= set(pair) for pair in pairs):
            return _left_out(missing, f"constant {words[0]!r}")
    numeric = table.is_text or given in ("number", "integer")
    leading_zero = given is None and re.search(r"^[+-]?0\d+$", "\n".join(different), re.MULTILINE) is not None
    compact = given is None and _are_compact_dates(different)
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
    unique = len(different) == len(present)
    return _left_out(missing, f"{'id' if unique else 'text'} like {present[0]!r:.30}")


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
    joined = "\n".join(good)
    whole = re.fullmatch(r"([+-]?\d+(\n|$))*", joined) is not None
    values: Any
    if (whole and given != "number") or given == "integer":
        if whole:
            values = [int(c) if ok and c is not None else 0 for c, ok in zip(cells, valid, strict=True)]
        else:
            valid = valid & np.array([x is not None and x == x and x.is_integer() for x in numbers])
            values = [int(x) if ok and x is not None else 0 for x, ok in zip(numbers, valid, strict=True)]
        fits = all(-(2**63) <= value < 2**63 for value in values)
        array = np.array(values, dtype=np.int64 if fits else object)
        return Cells("integer", array, missing, ~valid & ~missing, details={"dtype": dtype})
    values = np.array([x if ok else np.nan for x, ok in zip(numbers, valid, strict=True)], dtype=np.float64)
    many = re.search(rf"{re.escape(decimal)}\d{{{MAX_DECIMALS}}}\d*[1-9]|e", joined, re.IGNORECASE)
    fractions = [] if many else [cell.partition(decimal)[2].rstrip("0") for cell in good]
    digits = max(map(len, fractions), default=0)
    largest = float(np.abs(values[valid]).max(initial=0))
    keeps = not many and largest * 10**digits < EXACT  # rounding changes no cell
    details = {"decimals": digits if keeps else None, "dtype": dtype}
    return Cells("number", values, missing, ~valid & ~missing, details=details)


def _valid(
    kind: ColumnType, values: Sequence[Any], missing: npt.NDArray[np.bool_], details: Mapping[str, Any]
) -> Cells:
    return Cells(kind, np.array(values, dtype=object), missing, np.zeros_like(missing), details=details)


def _dates_of_texts(
    texts: Sequence[str], patterns: Sequence[str] | None
) -> tuple[npt.NDArray[np.int64], dict[str, Any]] | None:
    """Return dates as units since 1970, and the details of their column; None if any text is not a date."""
    import pandas as pd

    if not all(any(c.isdigit() for c in text) and len(text) <= 40 for text in texts[:100]):
        return None
    ends = {match[0] if (match := re.search(r"(?<=\d)\s?(Z|[+-]\d\d:?\d\d|UTC)$", text)) else "" for text in texts}
    suffix = ends.pop() if len(ends) == 1 else ""
    if suffix and not any(":" in text for text in texts[:1]):  # 01-02-2020 ends in digits, not in a time zone
        suffix = ""
    bare = pd.Series([text.removesuffix(suffix) for text in texts], dtype=object)
    for pattern in patterns or [date + time for date in DATE_FORMATS for time in TIME_FORMATS]:
        if pd.to_datetime(bare[:20], format=pattern, errors="coerce").isna().any():
            continue
        dates = pd.to_datetime(bare, format=pattern, errors="coerce")
        if dates.isna().any():
            continue
        ticks, unit = _ticks(dates)
        details: dict[str, Any] = {"format": pattern, "suffix": suffix, "unit": unit}
        first, wanted = pd.DatetimeIndex(dates[:1000]), bare[:1000].tolist()
        exact = (each for each in ("", "dm", "HI", "dmHI") if _date_texts(first, pattern, each) == wanted)
        details["unpadded"] = next(exact, "")
        if pattern.endswith("%f"):
            details["digits"] = max(len(text.rpartition(".")[2]) for text in bare)
        return ticks, details
    return None


def _date_texts(dates: "pd.DatetimeIndex", pattern: str, unpadded: str) -> list[str]:
    """Return dates as text, without the leading zeros of the numbers of the directives `unpadded`."""
    for directive in unpadded:
        pattern = pattern.replace(f"%{directive}", f"\x01%{directive}")
    return [re.sub("\x010?", "", text) for text in dates.strftime(pattern)]


def _are_compact_dates(different: Collection[str]) -> bool:
    """Return whether these texts of whole numbers are dates such as 20200131."""
    import pandas as pd

    if len(different) < 3 or not all(map(COMPACT_DATE.fullmatch, different)):
        return False
    return bool(pd.to_datetime(pd.Series(list(different)), format=COMPACT_FORMAT, errors="coerce").notna().all())


def _parse_dates(
    cells: Sequence[str | None], missing: npt.NDArray[np.bool_], patterns: Sequence[str] | None, dtype: str | None
) -> Cells | None:
    """Return a column of dates that are text; None if any is not a date."""
    found = _dates_of_texts([cell for cell in cells if cell is not None], patterns)
    if found is None:
        return None
    ticks, details = found
    values = np.zeros(len(cells), dtype=np.int64)
    values[~missing] = ticks
    return Cells("date", values, missing, np.zeros_like(missing), details={**details, "dtype": dtype})


def _ticks(dates: "pd.Series[Any]") -> tuple[npt.NDArray[np.int64], str]:
    """Return dates without missing ones as units since 1970, and the coarsest unit that is exact."""
    if getattr(dates.dt, "tz", None) is not None:
        dates = dates.dt.tz_convert("UTC").dt.tz_localize(None)
    array = dates.to_numpy(dtype=dates.dtype if str(dates.dtype).startswith("datetime64") else "datetime64[ns]")
    size = UNITS[np.datetime_data(array.dtype)[0]]
    ticks = array.astype(np.int64)
    for unit, length in UNITS.items():
        if length >= size and not (ticks % (length // size)).any():
            return ticks // (length // size), unit
    raise AssertionError("the unit of the dates is exact")


def _parse_typed(series: "pd.Series[Any]", missing: npt.NDArray[np.bool_], given: str | None) -> Cells:
    """Return a column with types as booleans, integers, numbers or dates, or why it is none of these."""
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
        return _valid("boolean", values, missing, {**details, "categories": [values[cells.index(w)] for w in words]})
    if types.is_bool_dtype(series.dtype) or all(isinstance(cell, bool | np.bool_) for cell in present):
        if given in (None, "boolean"):
            values = [bool(cell) if not lacks else False for cell, lacks in zip(cells, missing, strict=True)]
            return _valid("boolean", values, missing, details)
        cells = [cell if lacks else int(cell) for cell, lacks in zip(cells, missing, strict=True)]
    if types.is_datetime64_any_dtype(series.dtype) or all(isinstance(cell, datetime.date) for cell in present):
        if given in ("number", "integer", "boolean"):
            return _all_invalid(given, missing)
        dates = pd.Series(pd.to_datetime(series[~missing])).reset_index(drop=True)
        ticks = np.zeros(len(series), dtype=np.int64)
        ticks[~missing], details["unit"] = _ticks(dates)
        return Cells("date", ticks, missing, none, details=details)
    if not all(isinstance(cell, int | float | np.number | decimal.Decimal) for cell in present):
        found = sorted({type(cell).__name__ for cell in present})
        return _left_out(missing, f"has values of type {first_names(found)}")
    whole = all(isinstance(cell, int | np.integer) for cell in present)
    texts = [None if lacks else str(cell) for cell, lacks in zip(cells, missing, strict=True)] if whole else []
    compact = given is None and whole and _are_compact_dates({text for text in texts if text is not None})
    if compact or (given is not None and "%" in given):
        as_dates = _parse_dates(texts, missing, [given or COMPACT_FORMAT], "int64" if dtype == "object" else dtype)
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
    """Return the word on a command line that sets the type of a column."""
    if name.isascii() and re.fullmatch(r"[\w ./@%+-]+", name):
        return shell_word(f"data.types={{{name}: {kind}}}")
    return format_override("data.types", [f"{name}={kind}"])  # Hydra's grammar does not quote the keys of {...}
