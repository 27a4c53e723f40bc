"""Detect date formats, and convert dates to integer units of time and back to text."""

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pandas as pd

DATE_FORMATS = ["%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%d-%m-%Y"]
DATE_FORMATS += ["%d.%m.%y", "%m/%d/%y", "%d/%m/%y"]
DATE_FORMATS += ["%d %b %Y", "%d %B %Y", "%d-%b-%Y", "%d-%b-%y", "%b %d, %Y", "%B %d, %Y", "%Y-%m"]
COMPACT_DATE, COMPACT_FORMAT = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"), "%Y%m%d"
"""Dates such as 20200131: integers are read as dates if all match and at least three differ."""
TIME_FORMATS = ["", *(f"{sign}{time}" for sign in " T" for time in ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f"))]
TIME_FORMATS += [" %I:%M %p", " %I:%M:%S %p"]
UNITS = {"D": 86_400_000_000_000, "h": 3_600_000_000_000, "m": 60_000_000_000, "s": 1_000_000_000}
UNITS |= {"ms": 1_000_000, "us": 1_000, "ns": 1}
"""Nanoseconds of each unit of time."""
UNIT_NAMES = {"D": "days", "h": "hours", "m": "minutes", "s": "seconds"}
UNIT_NAMES |= {"ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
EPOCHS = {f"epoch_{unit}": unit for unit in ("s", "ms", "us", "ns")}
"""Formats of dates that are whole numbers of a unit since 1970-01-01."""
EPOCH_RANGE = (631_152_000, 2_524_608_000)
"""Seconds from 1970 to 1990 and to 2050: whole numbers are read as dates if all lie between them in one unit."""
TIME_WORDS = {"date", "day", "time", "datetime", "timestamp", "ts", "epoch", "created", "updated", "modified", "at"}
"""Words in the names of columns whose whole numbers may be dates; `at` as in created_at."""


def dates_of_texts(
    texts: Sequence[str], patterns: Sequence[str] | None
) -> tuple[npt.NDArray[np.int64], dict[str, Any]] | None:
    """Return dates (N,) as units since 1970, and fields of their `Column`; None if any text is not a date.

    Dates of different UTC offsets become those in UTC; those of one offset keep it.
    """
    import pandas as pd

    if not all(any(c.isdigit() for c in text) and len(text) <= 40 for text in texts[:100]):
        return None
    zone = re.compile(r"(?<=\d)\s?(Z|[+-]\d\d:?\d\d|UTC)$")
    ends = [match[0] if (match := zone.search(text)) else "" for text in texts]
    if "" in ends or not any(":" in text for text in texts[:1]):  # 01-02-2020 ends in digits, not in a time zone
        ends = [""] * len(texts)
    bare = pd.Series([text.removesuffix(end) for text, end in zip(texts, ends, strict=True)], dtype=object)
    zones = {end: _offset(end) for end in set(ends)}
    suffix = "+00:00" if len(zones) > 1 else "".join(ends[:1])
    for pattern in patterns or [date + time for date in DATE_FORMATS for time in TIME_FORMATS]:
        if pd.to_datetime(bare[:20], format=pattern, errors="coerce").isna().any():
            continue
        dates = pd.to_datetime(bare, format=pattern, errors="coerce")
        if dates.isna().any():
            continue
        local = dates
        if len(zones) > 1:
            dates = dates - pd.Series([zones[end] for end in ends])
        ticks, unit = ticks_of(dates)
        details: dict[str, Any] = {"format": pattern, "suffix": suffix, "unit": unit}
        first, wanted = pd.DatetimeIndex(local[:1000]), bare[:1000].tolist()
        exact = (each for each in ("", "dm", "HI", "dmHI") if date_texts(first, pattern, each) == wanted)
        details["unpadded"] = next(exact, "")
        if pattern.endswith("%f"):
            details["digits"] = max(len(text.rpartition(".")[2]) for text in bare)
        return ticks, details
    return None


def _offset(zone: str) -> "pd.Timedelta":
    """Return the difference from UTC of a zone such as +01:00, -0730 or Z."""
    import pandas as pd

    digits = re.sub(r"\D", "", zone)
    minutes = 60 * int(digits[:2]) + int(digits[2:]) if digits else 0
    return pd.Timedelta(minutes=-minutes if "-" in zone else minutes)


def date_texts(dates: "pd.DatetimeIndex", pattern: str, unpadded: str) -> list[str]:
    """Format dates as text; numbers of the directives in `unpadded` have no leading zeros."""
    for directive in unpadded:
        pattern = pattern.replace(f"%{directive}", f"\x01%{directive}")
    return [re.sub("\x010?", "", text) for text in dates.strftime(pattern)]


def are_compact_dates(different: Collection[str]) -> bool:
    """Return whether these different texts of integers are dates such as 20200131."""
    import pandas as pd

    if len(different) < 3 or not all(map(COMPACT_DATE.fullmatch, different)):
        return False
    return bool(pd.to_datetime(pd.Series(list(different)), format=COMPACT_FORMAT, errors="coerce").notna().all())


def is_named_like_time(name: str) -> bool:
    """Return whether a word of a column name is one of `TIME_WORDS`, as in created_at, eventTime or Date (UTC)."""
    return not TIME_WORDS.isdisjoint(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))


def epoch_format(numbers: Collection[int]) -> str | None:
    """Return the format in `EPOCHS` by which all numbers lie in `EPOCH_RANGE`; None if there is none."""
    if not numbers:
        return None
    smallest, largest = min(numbers), max(numbers)
    for form, unit in EPOCHS.items():
        low, high = (second * (UNITS["s"] // UNITS[unit]) for second in EPOCH_RANGE)
        if low <= smallest and largest <= high:
            return form
    return None


def ticks_of_epochs(numbers: Sequence[int], form: str) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
    """Return dates (N,), whole numbers in a format of `EPOCHS`, as `dates_of_texts` does."""
    import pandas as pd

    ticks, unit = ticks_of(pd.Series(np.array(numbers, dtype=np.int64).astype(f"datetime64[{EPOCHS[form]}]")))
    return ticks, {"format": form, "unit": unit}


def ticks_of(dates: "pd.Series[Any]") -> tuple[npt.NDArray[np.int64], str]:
    """Return dates (N,), none missing, as units since 1970, and the coarsest unit that is exact."""
    if getattr(dates.dt, "tz", None) is not None:
        dates = dates.dt.tz_convert("UTC").dt.tz_localize(None)
    array = dates.to_numpy(dtype=dates.dtype if str(dates.dtype).startswith("datetime64") else "datetime64[ns]")
    size = UNITS[np.datetime_data(array.dtype)[0]]
    ticks = array.astype(np.int64)
    for unit, length in UNITS.items():
        if length >= size and not (ticks % (length // size)).any():
            return ticks // (length // size), unit
    raise AssertionError("the unit of the dates is exact")
