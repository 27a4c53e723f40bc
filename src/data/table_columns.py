"""Choose the columns of a table to model, check them against the settings, and leave out incomplete rows."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from src.data.column_types import MAX_CATEGORIES, parse_column, type_override
from src.data.columns import CategoryCode, Cells, Column, ColumnType, Transform, infer_column
from src.data.dates import EPOCHS, UNIT_NAMES, dates_of_texts
from src.data.sources import Labels
from src.data.table_files import MISSING, Table
from src.data.table_text import to_number
from src.errors import did_you_mean, first_names, format_override

TYPES = (*get_args(ColumnType), *EPOCHS, "id", "text")
"""Values of `data.types`, besides the format of a date; the last two leave a column out."""


@dataclass(frozen=True)
class ColumnSettings:
    """The settings of columns, as in `TableDataModule`. Raises ValueError for values that no table allows."""

    columns: Sequence[str] | None
    condition_columns: Sequence[str]
    label: str | None
    types: Mapping[str, str]
    transforms: Mapping[str, str]
    categories: CategoryCode
    missing: Literal["drop"] | None

    def __post_init__(self) -> None:
        if unknown := next((t for t in self.types.values() if t not in TYPES and "%" not in t), None):
            raise ValueError(
                f"data.types has {unknown!r}, which must be one of {', '.join(TYPES)}, or a date's format, "
                "such as %d.%m.%Y"
            )
        if unknown := next((t for t in self.transforms.values() if t not in get_args(Transform)), None):
            raise ValueError(f"data.transforms has {unknown!r}, which must be one of {', '.join(get_args(Transform))}")
        if self.categories not in get_args(CategoryCode):
            raise ValueError(f"data.categories={self.categories} must be one of {', '.join(get_args(CategoryCode))}")
        if self.missing not in (None, "drop"):
            raise ValueError(f"data.missing={self.missing} must be null, which refuses missing cells, or drop")

    def check(self, table: Table) -> None:
        """Raise ValueError unless all columns in the settings exist and have one use each."""
        uses = {
            "data.columns": self.columns or [],
            "data.condition_columns": self.condition_columns,
            "data.label": [] if self.label is None else [self.label],
        }
        named = {**uses, "data.types": list(self.types), "data.transforms": list(self.transforms)}
        used: dict[str, str] = {}
        for setting, names in named.items():
            for name in names:
                if name not in table.names:
                    hint = did_you_mean(name, table.names)
                    raise ValueError(f"{setting}: {name!r} is not a column of {table.path}; {hint}")
                if name in used and setting in uses:
                    where = f"both {used[name]} and {setting}" if used[name] != setting else f"{setting} twice"
                    raise ValueError(f"{name!r} is in {where}; remove one of them")
                used[name] = setting


def infer_columns(
    table: Table, settings: ColumnSettings
) -> tuple[list[Column], list[Cells], dict[str, str], list[str]]:
    """Return the columns to model with their cells, why others are left out, and what was detected.

    Rows of missing cells are left out. Raises ValueError without columns, and for missing, invalid or constant cells.
    """
    parsed, left_out = _parse_free_columns(table, settings)
    conditions = {name: condition_cells(table, name) for name in settings.condition_columns}
    _, kept = complete_rows(table, {**parsed, **conditions}, settings)
    notes = [*table.notes]
    if len(kept) < len(table):
        notes.append(f"data.missing=drop left out {len(table) - len(kept)} of {len(table)} rows")
    columns, complete = [], []
    for name, cells in parsed.items():
        cells = cells._replace(values=cells.values[kept])
        transform = settings.transforms.get(name, "standardize")
        if transform != "standardize" and cells.type in ("category", "boolean"):
            raise ValueError(f"data.transforms={{{name}: {transform}}} needs numbers, and the column is a {cells.type}")
        if cells.type == "category":
            present = set(cells.values)
            known = [category for category in cells.details["categories"] if category in present]
            cells = cells._replace(details={**cells.details, "categories": known})
            check_varies(table, name, 1, len(known), "data.columns")
        try:
            column = infer_column(name, cells, transform, settings.categories)
        except ValueError as error:
            raise ValueError(f"{table.path}: data.transforms of {error}") from error
        if column.low is not None and column.high is not None:
            check_varies(table, name, column.low, column.high, "data.columns")
        if name not in settings.types and (doubt := _describe_doubt(table, column)):
            notes.append(doubt)
        if cells.type in ("number", "integer") and (doubt := _describe_sentinel(name, cells.values)):
            notes.append(doubt)
        columns.append(column)
        complete.append(cells)
    return columns, complete, left_out, notes


def _parse_free_columns(table: Table, settings: ColumnSettings) -> tuple[dict[str, Cells], dict[str, str]]:
    """Return the cells of each column to model, and why each other one without a use is left out."""
    explicit = settings.columns is not None
    free = [name for name in table.names if name not in settings.condition_columns and name != settings.label]
    parsed, left_out = {}, {}
    for name in settings.columns or free:
        cells = parse_column(table, name, settings.types.get(name), used=explicit)
        if cells.type is not None:
            parsed[name] = cells
        elif explicit:
            raise ValueError(
                f"{table.place(0)}: column {name!r} has cells such as {table.column(name)[0]!r:.40} and cannot be "
                f"modeled ({cells.why}); remove it from data.columns, or add {type_override(name, 'category')}"
            )
        else:
            left_out[name] = cells.why
    if not parsed:
        raise ValueError(
            f"{table.path} has no column to model among "
            f"{first_names([f'{name} ({left_out[name]})' for name in free]) or 'none'}; add for example "
            f"{type_override(free[0], 'category') if free else 'data.columns=[...]'}"
        )
    return parsed, left_out


def _describe_doubt(table: Table, column: Column) -> str:
    """Return which other type a column of dates may have, and how to set it; empty for other columns."""
    if column.format in EPOCHS:
        unit = UNIT_NAMES[EPOCHS[column.format]]
        return (
            f"{column.name} read as dates, {unit} since 1970 from {column.origin}, although it may be a number: "
            f"then add {type_override(column.name, 'integer')}"
        )
    if not re.match(r"%[dm][-/]%[dm]", column.format) or column.suffix:
        return ""
    other = column.format.translate(str.maketrans("dm", "md"))
    texts = [cell.strip() for cell in table.column(column.name)]
    if dates_of_texts([text for text in texts if text.lower() not in MISSING], [other]) is None:
        return ""
    use = type_override(column.name, other)
    return f"{column.name} read as {column.format}, although it may be {other}: then add {use}"


def _describe_sentinel(name: str, values: npt.NDArray[Any]) -> str:
    """Return which value may mean a missing cell, and how to say so; empty if none does.

    It is -1, or has only nines, as -999; it repeats, and is farther from the others than they are from each other.
    """
    different, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    for value, count, others in ((different[0], counts[0], different[1:]), (different[-1], counts[-1], different[:-1])):
        apart = len(others) > 2 and min(abs(others[0] - value), abs(others[-1] - value)) > others[-1] - others[0]
        if apart and count > 1 and re.fullmatch(r"-1|-?99+", f"{value:.15g}"):
            return (
                f"{name} is {value:g} in {count:,} rows, far from the others in [{others[0]:g}, {others[-1]:g}]: if it "
                f"means a missing cell, add {format_override('data.na_values', [int(value)])}"
            )
    return ""


def condition_cells(table: Table, name: str) -> Cells:
    """Return the cells of a column of covariates: numbers, or booleans as 0 and 1."""
    cells = parse_column(table, name, used=True)
    if cells.type == "boolean":
        numbers = Column(name, **cells.details, type="boolean").display
        values = np.array(
            [0.0 if lacks else numbers([v])[0] for v, lacks in zip(cells.values, cells.missing, strict=True)]
        )
        return cells._replace(type="number", values=values)
    return cells if cells.type in ("number", "integer") else parse_column(table, name, "number")


# Checks of cells


def complete_rows(
    table: Table, cells: Mapping[str, Cells], settings: ColumnSettings, known: Sequence[Column] = ()
) -> tuple[Table, npt.NDArray[np.int64]]:
    """Return the table without rows of missing cells, and the positions of those that remain.

    `known` are the columns that a run stores. Raises ValueError for invalid cells, and unless `data.missing=drop` for
    missing ones.
    """
    lacks = np.zeros(len(table), dtype=bool)
    for name, each in cells.items():
        if each.invalid.any():
            raise ValueError(_describe_invalid(table, name, each, settings, known))
        lacks |= each.missing
    labels = [] if settings.label is None else table.column(settings.label)
    if labels:
        words = {""} if settings.types.get(settings.label or "") == "category" else MISSING
        lacks = lacks | np.array([label.strip().lower() in words for label in labels], dtype=bool)
    if settings.missing is None and lacks.any():
        row = int(np.flatnonzero(lacks)[0])
        rest = f"fill in all {int(lacks.sum())}, or add data.missing=drop to leave out their rows"
        for name, each in cells.items():
            if each.missing[row]:
                count = int(each.missing.sum())
                raise ValueError(
                    f"{table.place(row)}: column {name!r} is {table.column(name)[row]!r}, which is missing "
                    f"({count} of {len(table)} rows); {rest}, or leave the column out: {type_override(name, 'text')}"
                )
        cell = labels[row].strip() or "empty"
        raise ValueError(f"{table.place(row)}: the label {settings.label!r} is {cell}, which is missing; {rest}")
    kept = np.flatnonzero(~lacks)
    if not len(kept):
        most = max(cells, key=lambda name: cells[name].missing.sum())
        raise ValueError(
            f"{table.path}: data.missing=drop leaves out all {len(table)} rows; leave out columns instead, such as "
            f"{type_override(most, 'text')}"
        )
    return (table if len(kept) == len(table) else table.rows(kept.tolist())), kept


def _describe_invalid(table: Table, name: str, cells: Cells, settings: ColumnSettings, known: Sequence[Column]) -> str:
    """Return what is wrong with the first invalid cell of a column, and the fix."""
    row = int(np.flatnonzero(cells.invalid)[0])
    cell = table.column(name)[row]
    column = next((each for each in known if each.name == name), None)
    what = {"number": "not a finite number", "integer": "not an integer"}.get(cells.type or "", f"not a {cells.type}")
    fix = "fill it in, or remove the row"
    if column is not None and column.categories:
        what, fix = "unknown to the run", "leave its rows out, or train a new run"
    elif name in settings.condition_columns:
        fix += ", or remove the column from data.condition_columns"
    else:
        fix += f", or leave the column out: {type_override(name, 'text')}"
    if cells.type == "date" and cell.isdecimal():
        fix += f", or set the unit of whole numbers since 1970: {type_override(name, 'epoch_ms')}"
    count = int(cells.invalid.sum())
    return f"{table.place(row)}: column {name!r} is {cell!r:.40}, {what} ({count} of {len(table)} rows); {fix}"


def check_varies(table: Table, name: str, low: float, high: float, setting: str) -> None:
    """Raise ValueError if the smallest and the largest value of a column are equal."""
    if low == high:
        cell = table.column(name)[0]
        raise ValueError(f"{table.path}: column {name!r} is {cell} in all rows; remove it from {setting}")


def check_label(table: Table, name: str, labels: Labels) -> None:
    """Raise ValueError for a label of numbers with decimals that repeat too rarely to be classes."""
    if len(labels.classes) <= MAX_CATEGORIES and 2 * len(labels.classes) <= len(labels.targets):
        return
    numbers: list[Any] = [to_number(each.strip(), table.decimal) for each in labels.classes]
    fraction = next((x for x in numbers if x is not None and not x.is_integer()), None)
    if fraction is not None and None not in numbers:
        raise ValueError(
            f"{format_override('data.label', name)} has numbers with decimals, such as {fraction:g}, and "
            f"{len(numbers)} different ones; add conditioning=continuous and "
            f"{format_override('data.condition_columns', [name])} instead"
        )
