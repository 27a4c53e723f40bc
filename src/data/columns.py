"""Columns of a table: their parsed cells, and their invertible encodings as network inputs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from src.data.dates import EPOCHS, UNIT_NAMES, UNITS, date_texts

if TYPE_CHECKING:
    import pandas as pd

Floats = npt.NDArray[Any]  # float64
ColumnType = Literal["number", "integer", "category", "boolean", "date"]
Transform = Literal["standardize", "log", "quantile"]
CategoryCode = Literal["onehot", "bits"]

NUM_KNOTS = 256
"""Largest number of points of the distribution function that the transform `quantile` stores."""
EXACT = 2**53
"""Integers up to this one are exact in float64."""


class Cells(NamedTuple):
    """The parsed cells of a column."""

    type: ColumnType | None
    """None for a column that is left out."""
    values: Any
    """(N,) array of float64, integers, booleans or categories; dates are integer units of time since 1970."""
    missing: npt.NDArray[np.bool_]
    invalid: npt.NDArray[np.bool_]
    """(N,) whether a cell is neither missing nor of this type."""
    why: str = ""
    """Why a column is left out."""
    details: Mapping[str, Any] = {}
    """Fields of the `Column`."""


@dataclass
class Column:
    """The encoding of a column, with all that is needed to restore its cells.

    A cell has three forms: its value in the file; its *display* value, one number (the value minus `offset`, the index
    of a category, or 0 or 1 for a boolean); and its *encoded* values, `width` numbers, which the data module
    standardizes unless `is_coded`.
    """

    name: str
    type: ColumnType = "number"
    dtype: str | None = None
    """pandas data type of the column in the file; None for text."""
    transform: Transform = "standardize"
    code: CategoryCode = "onehot"
    low: float | None = None
    high: float | None = None
    """Observed range of display values."""
    decimals: int | None = None
    """Number of decimals to which samples are rounded; None for no rounding."""
    offset: int = 0
    std: float = 1.0
    """Standard deviation of display values."""
    categories: list[Any] = field(default_factory=list)
    levels: list[Any] | None = None
    """All categories of a pandas categorical column, in its order."""
    ordered: bool = False
    unit: str = ""
    format: str = ""
    """strftime format of dates that are text, one of `EPOCHS`, or empty for dates with a data type."""
    unpadded: str = ""
    """Directives of `format` whose numbers have no leading zero, such as "dm" for 3/1/2020."""
    suffix: str = ""
    """Text after each date, such as Z."""
    digits: int = 6
    """Number of digits of a fraction of a second."""
    knots: list[list[float]] = field(default_factory=list)
    """Display values and their normal scores, for `quantile`."""

    @property
    def is_coded(self) -> bool:
        """Whether the encoded values are codes or normal scores, which need no standardization."""
        return self.type in ("category", "boolean") or self.transform == "quantile"

    @property
    def category_names(self) -> list[str]:
        """Names of the display values 0, 1, ...; empty for numbers."""
        return [*map(str, self.categories or ([False, True] if self.type == "boolean" else []))]

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
        """The name, type and encoding, for the first lines of a run."""
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
        """Return the display values (N,) of encoded values (N, width), rounded; `clip` keeps the observed range.

        The category is the one with the nearest code. NaN stays NaN.
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
        """Return cells (N,) with the file's data type from display values; those that are not finite become missing."""
        import pandas as pd

        finite = np.isfinite(display)
        known = display[finite]
        cells: Any
        if self.type in ("category", "boolean"):
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
        """Return dates as in the file: whole numbers, text, Python dates, or pandas timestamps, in UTC with a zone."""
        import pandas as pd

        numbers = display.astype(np.int64) + self.offset
        if self.format in EPOCHS:
            return (numbers * (UNITS[self.unit] // UNITS[EPOCHS[self.format]])).tolist()
        unit = {"D": "s", "h": "s", "m": "s"}.get(self.unit, self.unit)
        ticks = numbers * (UNITS[self.unit] // UNITS[unit])
        dates = pd.DatetimeIndex(ticks.astype(f"datetime64[{unit}]"))
        if self.format:
            texts = date_texts(dates, self.format, self.unpadded)
            cut = 6 - self.digits if self.format.endswith("%f") else 0
            return [f"{text[: len(text) - cut]}{self.suffix}" for text in texts]
        if self.dtype == "object":
            return list(dates.date)
        return dates.tz_localize("UTC") if "," in (self.dtype or "") or "tz=" in (self.dtype or "") else dates


def infer_column(name: str, cells: Cells, transform: str, code: CategoryCode) -> Column:
    """Infer the encoding of a column from its cells, which must all be present and valid.

    Raises ValueError if the transform does not apply; the caller adds the name of the file.
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
    """Return display values and their normal scores, at the midpoints of the jumps of the distribution function."""
    from scipy.special import ndtri

    values, counts = np.unique(display, return_counts=True)
    scores = ndtri((np.cumsum(counts) - counts / 2) / len(display))
    if len(values) > NUM_KNOTS:
        chosen = np.unique(np.searchsorted(np.cumsum(counts), np.linspace(1, len(display), NUM_KNOTS)))
        values, scores = values[chosen], scores[chosen]
    return [values.tolist(), scores.tolist()]


def to_json(columns: Sequence[Column], **file: Any) -> str:
    """Return columns, and settings of their file, as ASCII JSON without `${`."""
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
