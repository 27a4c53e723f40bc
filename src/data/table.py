"""Rows of a table as samples, with columns for classes and covariates."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from src.data.column_types import MAX_CATEGORIES, MISSING, parse_column, type_override
from src.data.columns import CategoryCode, Cells, Column, ColumnType, Transform, from_json, infer_column, to_json
from src.data.dates import EPOCHS, UNIT_NAMES, dates_of_texts
from src.data.module import BaseDataModule
from src.data.sources import Covariates, InMemory, Labels, Source
from src.data.table_files import Table, labels_from_names, read_table
from src.data.table_text import to_number
from src.errors import did_you_mean, first_names
from src.quoting import format_override

if TYPE_CHECKING:
    import pandas as pd

SIGNS = {"tab": "\t", "space": " ", "comma": ",", "semicolon": ";", "point": "."}
"""Names of separators and decimal signs that are hard to type in a shell."""
TYPES = (*get_args(ColumnType), *EPOCHS, "id", "text")
"""What `data.types` takes, besides the format of a date; the last two leave a column out."""


class TableRows(InMemory):
    """Encoded rows of a table; `summary` says how each column is modeled."""

    def __init__(
        self,
        samples: Tensor,
        labels: Labels | None,
        covariates: Covariates | None,
        ids: Sequence[str],
        summary: str,
    ) -> None:
        super().__init__(samples, labels, covariates, ids=ids)
        self.summary = summary


class TableDataModule(BaseDataModule):
    """Rows of a table (CSV, TSV, Excel, Parquet, JSON): samples (N, D), the encoded values of the columns.

    Numbers, integers and dates take one value each, standardized to mean 0 and std 1 over the table; booleans one in
    {-1, 1}; categories several (`src.data.columns`).

    Args:
        path: the file; None if a run stored `columns`, `mean`, `std` and `encoders`, which suffice for its samples.
        columns: columns of a sample; None takes all without another use, except ids, texts and constants.
        condition_columns: columns of covariates, numbers in their original units.
        label: the column with each row's class.
        types: of columns by name, or a list of `name=type`, instead of the detected ones: number, integer, category,
            boolean, date or the format of dates; id and text leave a column out.
        transforms: of numbers, integers and dates, before they are standardized: standardize (none), log, quantile.
        categories: code of categories, `onehot` or analog `bits`.
        missing: what happens to rows with missing cells in these columns: `drop`, or None, which refuses them.
        clip: limit samples to the observed range of each column.
        header, separator, decimal, encoding, sheet: of the file; None detects them, and takes the first sheet.
        mean, std: statistics of each column's encoded values; None computes them over the table.
        encoders: the columns' types, categories and ranges as JSON; None infers them from the table.
        balance_classes: draw the class of each training row uniformly, then a row of that class; needs `label`.

    `postprocess` returns display values (N, columns) in float64: numbers in the table's units, the index of a category,
    0 or 1 for a boolean, and dates since the first one. `to_frame` returns cells of the table's types.

    Raises FileNotFoundError if the file is needed and missing; ValueError for unknown, repeated or constant columns,
    and for missing and invalid cells.
    """

    inferred_settings = ("columns", "mean", "std", "encoders")

    def __init__(
        self,
        path: str | None,
        columns: Sequence[str] | None = None,
        condition_columns: Sequence[str] = (),
        label: str | None = None,
        types: Mapping[str, str] | Sequence[str] | None = None,
        transforms: Mapping[str, str] | Sequence[str] | None = None,
        categories: CategoryCode = "onehot",
        missing: Literal["drop"] | None = None,
        clip: bool = True,
        header: bool | None = None,
        separator: str | None = None,
        decimal: str | None = None,
        encoding: str | None = None,
        sheet: str | int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        encoders: str | None = None,
        balance_classes: bool = False,
        batch_size: int = 512,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        microbatch_size: int | Literal["auto"] | None = None,
    ) -> None:
        self.path = path
        self.condition_columns = list(condition_columns)
        self.label = label
        self.names = list(columns) if columns else None
        self.types, self.transforms = _by_column(types, "data.types"), _by_column(transforms, "data.transforms")
        self.clip = clip
        self.missing = missing
        self.categories: CategoryCode = categories
        self.separator, self.decimal = (
            None if sign is None else SIGNS.get(sign, sign) for sign in (separator, decimal)
        )
        self._read_file = partial(
            read_table, header=header, separator=self.separator, decimal=self.decimal, encoding=encoding, sheet=sheet
        )
        self._check_settings()
        self.encoders: list[Column] = []
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []
        self.label_note = ""
        self.file: dict[str, Any] = {}
        self._stores_encoders = True
        self._table: Table | None = None  # from the constructor to the first use
        if encoders is not None:
            self.encoders, self.file = from_json(encoders)
            self.names = [column.name for column in self.encoders] if self.names is None else self.names
        elif self.names is not None and mean is not None and std is not None:
            self.encoders = [Column(name) for name in self.names]  # a run from before encoders existed
            self._stores_encoders = False
        else:
            table = self._read()
            self._table = table
            self.encoders, cells = self._infer(table)
            encoded = self._encode(
                [column.display(each.values) for column, each in zip(self.encoders, cells, strict=True)]
            )
            if mean is None or std is None:
                coded = [column.is_coded for column in self.encoders for _ in range(column.width)]
                first = np.cumsum([0, *(column.width for column in self.encoders)])[:-1].tolist()
                means, stds = encoded.mean(0).tolist(), encoded.std(0, correction=0).tolist()
                mean = [0.0 if coded[k] else means[k] for k in first]
                std = [1.0 if coded[k] else stds[k] for k in first]
        assert self.names is not None
        if not len(self.names) == len(mean or []) == len(std or []) == len(self.encoders):
            raise ValueError(
                f"data.mean and data.std must have {len(self.names)} numbers, one for each of "
                f"{', '.join(self.names)}, got {len(mean or [])} and {len(std or [])}; null computes them"
            )
        assert mean is not None and std is not None
        self.widths = [column.width for column in self.encoders]
        shape = (sum(self.widths),)
        super().__init__(self._open, shape, batch_size, val_fraction, split_seed, seed, num_workers, microbatch_size)
        self.balance_classes = balance_classes
        self.columns = [column.label for column in self.encoders]
        self.mean, self.scale = (torch.tensor(list(each), dtype=torch.float64) for each in (mean, std))
        display = [
            each if column.transform == "standardize" and not column.is_coded else column.std
            for column, each in zip(self.encoders, std, strict=True)
        ]
        self.std = torch.tensor(display, dtype=torch.float64)

    @property
    def inferred(self) -> Mapping[str, Any]:
        return {
            "columns": self.names,
            "mean": self.mean.tolist(),
            "std": self.scale.tolist(),
            "encoders": to_json(self.encoders, **self.file) if self._stores_encoders else None,
        }

    @property
    def summary(self) -> list[str]:
        """How each column is modeled, with what was detected in the file, and which are left out and why."""
        modeled = first_names([column.summary for column in self.encoders], 20)
        lines = [*filter(None, [", ".join(self.notes)]), f"columns {modeled}"]
        if self.label_note:
            lines.append(self.label_note)
        if self.left_out:
            lines.append(f"left out: {first_names([f'{name} ({why})' for name, why in self.left_out.items()], 20)}")
        return lines

    @property
    def num_categories(self) -> list[int]:
        """Categories of each column of display values; 0 for numbers."""
        return [len(column.categories) if column.type == "category" else 0 for column in self.encoders]

    def postprocess(self, x: Tensor) -> Tensor:
        device = x.device if x.device.type != "mps" else torch.device("cpu")  # MPS has no float64
        encoded = x.detach().cpu().double()
        widths = torch.tensor(self.widths)
        encoded = encoded * self.scale.repeat_interleave(widths) + self.mean.repeat_interleave(widths)
        parts = torch.split(encoded, self.widths, dim=1)
        display = [c.decode(part.numpy(), self.clip) for c, part in zip(self.encoders, parts, strict=True)]
        return torch.from_numpy(np.stack(display, axis=1)).to(device)

    def to_frame(self, display: Tensor) -> "pd.DataFrame":
        """Return display values (N, columns) as cells with the types, categories and formats of the table."""
        import pandas as pd

        values = display.cpu().double().numpy()
        series = {column.name: column.restore(values[:, k]) for k, column in enumerate(self.encoders)}
        return pd.DataFrame(series)

    def write_samples(self, path: Path, display: Tensor) -> None:
        """Write samples as `path` with the ending .csv, with the table's separator and decimal sign.

        If the table was Parquet, it is written as well.
        """
        frame = self.to_frame(display)
        separator, decimal = self.file.get("separator", ","), self.file.get("decimal", ".")
        frame.to_csv(path.with_suffix(".csv"), index=False, sep=separator, decimal=decimal, encoding="utf-8")
        if self.file.get("kind") == "parquet":
            frame.to_parquet(path.with_suffix(".parquet"), index=False)

    def _check_settings(self) -> None:
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
        if self.decimal not in (None, ".", ","):
            raise ValueError(f"data.decimal={self.decimal} must be point or comma")
        if self.separator is not None and len(self.separator) != 1:
            names = ", ".join(SIGNS)
            raise ValueError(f"data.separator={self.separator} must be one character, or one of {names}")

    def _open(self) -> Source:
        table = self._table or self._read()
        self._table = None
        self.notes = self.notes or [*table.notes]
        cells = [parse_column(table, column.name, known=column) for column in self.encoders]
        names = [column.name for column in self.encoders]
        conditions = [_condition(table, name) for name in self.condition_columns]
        table, kept = self._complete(
            table, dict(zip([*names, *self.condition_columns], [*cells, *conditions], strict=True))
        )
        unused = set(table.names) - {*names, *self.condition_columns, self.label, *self.left_out}
        self.left_out |= {name: "not in the run" for name in table.names if name in unused}
        display = [c.display(each.values[kept]) for c, each in zip(self.encoders, cells, strict=True)]
        encoded = self._encode(display)
        widths = torch.tensor(self.widths)
        mean, scale = (each.repeat_interleave(widths) for each in (self.mean, self.scale))
        samples = ((encoded - mean) / scale).float()
        if not (finite := samples.isfinite()).all():
            row, value = (int(k) for k in (~finite).nonzero()[0])
            column = self.encoders[int(np.repeat(np.arange(len(self.widths)), self.widths)[value])]
            raise ValueError(
                f"{table.place(row)}: column {column.name!r} is {table.column(column.name)[row]!r:.40}, which has no "
                f"finite code by data.transforms={{{column.name}: {column.transform}}}; use quantile, or scale it"
            )
        covariates = labels = None
        if self.condition_columns:
            values = [each.values[kept].astype(np.float64).tolist() for each in conditions]
            for name, numbers in zip(self.condition_columns, values, strict=True):
                _check_varies(table, name, min(numbers), max(numbers), "data.condition_columns")
            covariates = Covariates(torch.tensor(values, dtype=torch.float64).T, self.condition_columns)
        if self.label is not None:
            labels = labels_from_names(table.column(self.label))
            self._check_label(table, labels)
            counts = torch.bincount(labels.targets, minlength=len(labels.classes)).tolist()
            shown = first_names([f"{n:,} {name}" for n, name in zip(counts, labels.classes, strict=True)], 10)
            self.label_note = f"label {self.label}: {len(counts)} classes ({shown})"
        # The cells identify a row, so that equal rows are on the same side of the split.
        return TableRows(samples, labels, covariates, ids=table.row_texts(), summary="; ".join(self.summary))

    def _encode(self, display: Sequence[Any]) -> Tensor:
        """Return the encoded values (N, D) in float64."""
        encoded = [column.encode(values) for column, values in zip(self.encoders, display, strict=True)]
        return torch.tensor(
            [each[:, k].tolist() for each in encoded for k in range(each.shape[1])], dtype=torch.float64
        ).T

    def _read(self) -> Table:
        """Read the table. Raises ValueError unless all columns in the settings exist and have one use each."""
        if self.path is None:
            raise FileNotFoundError("data.path is not set; set it to a table, such as a CSV file with a header")
        table = self._read_file(Path(self.path), "data.path")
        uses = {
            "data.columns": self.names or [],
            "data.condition_columns": self.condition_columns,
            "data.label": [] if self.label is None else [self.label],
        }
        used: dict[str, str] = {}
        for setting, names in [
            *uses.items(),
            ("data.types", list(self.types)),
            ("data.transforms", list(self.transforms)),
        ]:
            for name in names:
                if name not in table.names:
                    hint = did_you_mean(name, table.names)
                    raise ValueError(f"{setting}: {name!r} is not a column of {table.path}; {hint}")
                if name in used and setting in uses:
                    where = f"both {used[name]} and {setting}" if used[name] != setting else f"{setting} twice"
                    raise ValueError(f"{name!r} is in {where}; remove one of them")
                used[name] = setting
        return table

    def _infer(self, table: Table) -> tuple[list[Column], list[Cells]]:
        """Return the columns to model and their complete cells; set the names, and what was left out."""
        explicit = self.names is not None
        free = [name for name in table.names if name not in self.condition_columns and name != self.label]
        parsed = {}
        for name in self.names or free:
            cells = parse_column(table, name, self.types.get(name), used=explicit)
            if cells.type is not None:
                parsed[name] = cells
            elif explicit:
                raise ValueError(
                    f"{table.place(0)}: column {name!r} is {table.column(name)[0]!r:.40}, and the column is left out "
                    f"({cells.why}); remove it from data.columns, or add {type_override(name, 'category')}"
                )
            else:
                self.left_out[name] = cells.why
        if not parsed:
            raise ValueError(
                f"{table.path} has no column to model among "
                f"{first_names([f'{name} ({self.left_out[name]})' for name in free]) or 'none'}; add for example "
                f"{type_override(free[0], 'category') if free else 'data.columns=[...]'}"
            )
        conditions = {name: _condition(table, name) for name in self.condition_columns}
        _, kept = self._complete(table, {**parsed, **conditions})
        self.names = list(parsed)
        self.notes = [*table.notes]
        if len(kept) < len(table):
            self.notes.append(f"data.missing=drop left out {len(table) - len(kept)} of {len(table)} rows")
        self.file = {"separator": table.separator, "decimal": table.decimal, "kind": table.kind}
        columns, cells_kept = [], []
        for name, cells in parsed.items():
            cells = cells._replace(values=cells.values[kept])
            transform = self.transforms.get(name, "standardize")
            if transform != "standardize" and cells.type in ("category", "boolean"):
                raise ValueError(
                    f"data.transforms={{{name}: {transform}}} needs numbers, and the column is a {cells.type}"
                )
            if cells.type == "category":
                present = set(cells.values)
                known = [category for category in cells.details["categories"] if category in present]
                cells = cells._replace(details={**cells.details, "categories": known})
                _check_varies(table, name, 1, len(known), "data.columns")
            try:
                column = infer_column(name, cells, transform, self.categories)
            except ValueError as error:
                raise ValueError(f"{table.path}: data.transforms of {error}") from error
            if column.low is not None and column.high is not None:
                _check_varies(table, name, column.low, column.high, "data.columns")
            if name not in self.types and (doubt := _describe_doubt(table, column)):
                self.notes.append(doubt)
            columns.append(column)
            cells_kept.append(cells)
        return columns, cells_kept

    def _complete(self, table: Table, cells: Mapping[str, Cells]) -> tuple[Table, "np.ndarray[Any, Any]"]:
        """Return the table without rows of missing cells, and the positions of those that remain.

        Raises ValueError for invalid cells, and unless `data.missing=drop` for missing ones.
        """
        lacks = np.zeros(len(table), dtype=bool)
        for name, each in cells.items():
            if len(bad := np.flatnonzero(each.invalid)):
                self._refuse_invalid(table, name, each, int(bad[0]))
            lacks |= each.missing
        labels = [] if self.label is None else table.column(self.label)
        words = {""} if self.types.get(self.label or "") == "category" else MISSING
        empty = np.array([label.strip().lower() in words for label in labels], dtype=bool)
        lacks = lacks | empty if labels else lacks
        if self.missing is None and lacks.any():
            row = int(np.flatnonzero(lacks)[0])
            rest = f"fill in all {int(lacks.sum())}, or add data.missing=drop to leave out their rows"
            for name, each in cells.items():
                if each.missing[row]:
                    count = int(each.missing.sum())
                    raise ValueError(
                        f"{table.place(row)}: column {name!r} is {table.column(name)[row]!r}, which is missing "
                        f"({count} of {len(table)} rows); {rest}, or leave the column out: "
                        f"{type_override(name, 'text')}"
                    )
            cell = labels[row].strip() or "empty"
            raise ValueError(f"{table.place(row)}: the label {self.label!r} is {cell}, which is missing; {rest}")
        kept = np.flatnonzero(~lacks)
        if not len(kept):
            raise ValueError(
                f"{table.path}: data.missing=drop leaves out all {len(table)} rows; leave out columns instead, such as "
                f"{type_override(max(cells, key=lambda name: cells[name].missing.sum()), 'text')}"
            )
        return (table if len(kept) == len(table) else table.rows(kept.tolist())), kept

    def _check_label(self, table: Table, labels: Labels) -> None:
        """Raise ValueError for a label of numbers with decimals that repeat too rarely to be classes."""
        if len(labels.classes) <= MAX_CATEGORIES and 2 * len(labels.classes) <= len(labels.targets):
            return
        numbers = [to_number(name.strip(), table.decimal) for name in labels.classes]
        fraction = next((x for x in numbers if x is not None and not x.is_integer()), None)
        if fraction is not None and None not in numbers:
            raise ValueError(
                f"{format_override('data.label', self.label)} has numbers with decimals, such as {fraction:g}, and "
                f"{len(numbers)} different ones; add conditioning=continuous and "
                f"{format_override('data.condition_columns', [self.label])} instead"
            )

    def _refuse_invalid(self, table: Table, name: str, cells: Cells, row: int) -> None:
        column = next((each for each in self.encoders if each.name == name), None)
        what = {"number": "not a finite number", "integer": "not an integer"}.get(
            cells.type or "", f"not a {cells.type}"
        )
        fix = "fill it in, or remove the row"
        if column is not None and column.categories:
            what = "unknown to the run"
            fix = "leave its rows out, or train a new run"
        elif name in self.condition_columns:
            fix += ", or remove the column from data.condition_columns"
        else:
            fix += f", or leave the column out: {type_override(name, 'text')}"
        if cells.type == "date" and table.column(name)[row].isdecimal():
            fix += f", or set the unit of whole numbers since 1970: {type_override(name, 'epoch_ms')}"
        raise ValueError(
            f"{table.place(row)}: column {name!r} is {table.column(name)[row]!r:.40}, {what} "
            f"({int(cells.invalid.sum())} of {len(table)} rows); {fix}"
        )


def _by_column(settings: Mapping[str, str] | Sequence[str] | None, name: str) -> dict[str, str]:
    """Return a setting of each column from a mapping, or from a list of `column=value`."""
    if isinstance(settings, Mapping):
        return {str(column): str(value) for column, value in settings.items()}
    parts = [str(each).rpartition("=") for each in settings or []]
    if not all(column and value for column, _, value in parts):
        raise ValueError(f"{name}={list(settings or [])} must be a mapping or a list such as ['zip=category']")
    return {column: value for column, _, value in parts}


def _condition(table: Table, name: str) -> Cells:
    """Return a column of covariates: numbers, or booleans as 0 and 1."""
    cells = parse_column(table, name, used=True)
    if cells.type == "boolean":
        numbers = Column(name, **cells.details, type="boolean").display
        values = np.array(
            [0.0 if lacks else numbers([v])[0] for v, lacks in zip(cells.values, cells.missing, strict=True)]
        )
        return cells._replace(type="number", values=values)
    return cells if cells.type in ("number", "integer") else parse_column(table, name, "number")


def _describe_doubt(table: Table, column: Column) -> str:
    """Return which other type a column of dates may have, and how to set it; empty for other columns."""
    if column.format in EPOCHS:
        unit = UNIT_NAMES[EPOCHS[column.format]]
        return (
            f"{column.name} read as dates, {unit} since 1970 from {column.origin}, although it may be a number: "
            f"then add {type_override(column.name, 'integer')}"
        )
    if (other := _other_order(table, column)) is not None:
        use = type_override(column.name, other)
        return f"{column.name} read as {column.format}, although it may be {other}: then add {use}"
    return ""


def _other_order(table: Table, column: Column) -> str | None:
    """Return the format of a column's dates with day and month swapped if it fits all of them too."""
    if not re.match(r"%[dm][-/]%[dm]", column.format) or column.suffix:
        return None
    other = column.format.translate(str.maketrans("dm", "md"))
    texts = [cell.strip() for cell in table.column(column.name)]
    texts = [text for text in texts if text.lower() not in MISSING]
    return other if dates_of_texts(texts, [other]) is not None else None


def _check_varies(table: Table, name: str, low: float, high: float, setting: str) -> None:
    if low == high:
        cell = table.column(name)[0]
        raise ValueError(f"{table.path}: column {name!r} is {cell} in all rows; remove it from {setting}")
