"""Rows of a table as samples, with columns for classes and covariates."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from src.data.column_types import parse_column
from src.data.columns import CategoryCode, Column, from_json, to_json
from src.data.module import BaseDataModule, Coupling
from src.data.sources import Covariates, InMemory, Source, describe_conditions
from src.data.table_columns import (
    ColumnSettings,
    check_label,
    check_varies,
    complete_rows,
    condition_cells,
    infer_columns,
)
from src.data.table_files import Table, labels_from_names, read_table
from src.errors import counted, first_names

if TYPE_CHECKING:
    import pandas as pd

SIGNS = {"tab": "\t", "space": " ", "comma": ",", "semicolon": ";", "point": "."}
"""Names of separators and decimal signs that are hard to type in a shell."""


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
        na_values: further texts and numbers that mean a missing cell, such as -999.
        clip: limit samples to the observed range of each column.
        header, separator, decimal, encoding, sheet: of the file; None detects them; the first sheet with cells.
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
        na_values: Sequence[Any] = (),
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
        coupling: Coupling = "independent",
    ) -> None:
        self.path = path
        self.settings = ColumnSettings(
            list(columns) if columns else None, list(condition_columns), label, _by_column(types, "data.types"),
            _by_column(transforms, "data.transforms"), categories, missing,
        )  # fmt: skip
        self.na_values = list(na_values)
        self.clip = clip
        separator, decimal = _signs(separator, decimal)
        self._read_file = partial(
            read_table, header=header, separator=separator, decimal=decimal, encoding=encoding, sheet=sheet
        )
        self.label_note = ""
        mean, std = self._set_encoders(encoders, columns, mean, std)
        self.widths = [column.width for column in self.encoders]
        shape = (sum(self.widths),)
        super().__init__(self._open, shape, batch_size, val_fraction, split_seed, seed, num_workers, microbatch_size)
        self.balance_classes = balance_classes
        self.coupling = coupling
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
            "encoders": to_json(self.encoders, **self.file),
        }

    @property
    def summary(self) -> list[str]:
        """How each column is modeled, with what was detected in the file, and which are left out and why."""
        modeled = first_names([column.summary for column in self.encoders], 20)
        lines = [*filter(None, [", ".join(self.notes)]), f"columns {modeled}"]
        if self.label_note:
            lines.append(self.label_note)
        if self.settings.condition_columns:
            lines.append(describe_conditions(self.settings.condition_columns))
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

    def read(self) -> Table:
        """Return the table with all rows. Raises FileNotFoundError or ValueError as the constructor."""
        if self.path is None:
            raise FileNotFoundError("data.path is not set; set it to a table, such as a CSV file with a header")
        table = self._read_file(Path(self.path), "data.path")
        self.settings.check(table)
        return table.without(self.na_values) if self.na_values else table

    def _set_encoders(
        self,
        encoders: str | None,
        columns: Sequence[str] | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> tuple[Sequence[float], Sequence[float]]:
        """Read the columns' encodings from JSON, or infer them from the table. Return the typed or inferred statistics.

        Raises ValueError for another number of statistics than columns.
        """
        self.encoders: list[Column] = []
        self.left_out: dict[str, str] = {}
        self.notes: list[str] = []
        self.file: dict[str, Any] = {}
        self._table: Table | None = None  # from the constructor to the first use
        if encoders is not None:
            self.encoders, self.file = from_json(encoders)
        else:
            self._table = self.read()
            inferred = self._infer(self._table)
            mean, std = inferred if mean is None or std is None else (mean, std)
        self.names = list(columns) if columns else [column.name for column in self.encoders]
        if not len(self.names) == len(mean or []) == len(std or []) == len(self.encoders):
            raise ValueError(
                f"data.mean and data.std must have {len(self.names)} numbers, one for each of "
                f"{', '.join(self.names)}, got {len(mean or [])} and {len(std or [])}; null computes them"
            )
        assert mean is not None and std is not None
        return mean, std

    def _infer(self, table: Table) -> tuple[list[float], list[float]]:
        """Infer the columns to model from the table. Return the mean and std of each column's encoded values."""
        self.encoders, cells, self.left_out, self.notes = infer_columns(table, self.settings)
        self.file = {"separator": table.separator, "decimal": table.decimal, "kind": table.kind}
        encoded = self._encode([column.display(each.values) for column, each in zip(self.encoders, cells, strict=True)])
        first = np.cumsum([0, *(column.width for column in self.encoders)])[:-1].tolist()
        means, stds = encoded.mean(0)[first].tolist(), encoded.std(0, correction=0)[first].tolist()
        return (
            [0.0 if column.is_coded else mean for column, mean in zip(self.encoders, means, strict=True)],
            [1.0 if column.is_coded else std for column, std in zip(self.encoders, stds, strict=True)],
        )

    def _open(self) -> Source:
        table = self._table or self.read()
        self._table = None
        self.notes = self.notes or [*table.notes]
        cells = {column.name: parse_column(table, column.name, known=column) for column in self.encoders}
        conditions = {name: condition_cells(table, name) for name in self.settings.condition_columns}
        table, kept = complete_rows(table, {**cells, **conditions}, self.settings, self.encoders)
        unused = set(table.names) - {*cells, *conditions, self.settings.label, *self.left_out}
        self.left_out |= {name: "not in the run" for name in table.names if name in unused}
        encoded = self._encode([column.display(cells[column.name].values[kept]) for column in self.encoders])
        widths = torch.tensor(self.widths)
        mean, scale = (each.repeat_interleave(widths) for each in (self.mean, self.scale))
        samples = ((encoded - mean) / scale).float()
        if not (finite := samples.isfinite() & scale.isfinite()).all():
            row, value = (int(k) for k in (~finite).nonzero()[0])
            column = self.encoders[int(np.repeat(np.arange(len(self.widths)), self.widths)[value])]
            raise ValueError(
                f"{table.place(row)}: column {column.name!r} is {table.column(column.name)[row]!r:.40}, which has no "
                f"finite code by data.transforms={{{column.name}: {column.transform}}}; use quantile, or scale it"
            )
        covariates = labels = None
        if conditions:
            values = {name: each.values[kept].astype(np.float64).tolist() for name, each in conditions.items()}
            for name, numbers in values.items():
                check_varies(table, name, min(numbers), max(numbers), "data.condition_columns")
            covariates = Covariates(torch.tensor([*values.values()], dtype=torch.float64).T, [*values])
        if (label := self.settings.label) is not None:
            labels = labels_from_names(table.column(label))
            check_label(table, label, labels)
            counts = torch.bincount(labels.targets, minlength=len(labels.classes)).tolist()
            shown = first_names([f"{n:,} {name}" for n, name in zip(counts, labels.classes, strict=True)], 10)
            self.label_note = f"label {label}: {counted(len(counts), 'class')} ({shown})"
        # The cells identify a row, so that equal rows are on the same side of the split.
        return InMemory(samples, labels, covariates, ids=table.row_texts(), summary="; ".join(self.summary))

    def _encode(self, display: Sequence[Any]) -> Tensor:
        """Return the encoded values (N, D) in float64."""
        encoded = [column.encode(values) for column, values in zip(self.encoders, display, strict=True)]
        return torch.from_numpy(np.concatenate(encoded, axis=1).T.copy()).T


def _signs(separator: str | None, decimal: str | None) -> tuple[str | None, str | None]:
    """Return the separator and the decimal sign from their names. Raises ValueError for other texts."""
    character, sign = (None if name is None else SIGNS.get(name, name) for name in (separator, decimal))
    if sign not in (None, ".", ","):
        raise ValueError(f"data.decimal={decimal} must be point or comma; change it, or leave it out")
    if character is not None and len(character) != 1:
        names = ", ".join(SIGNS)
        raise ValueError(f"data.separator={separator} must be one character, or one of {names}; change it")
    return character, sign


def _by_column(settings: Mapping[str, str] | Sequence[str] | None, name: str) -> dict[str, str]:
    """Return a setting of each column from a mapping, or from a list of `column=value`."""
    if isinstance(settings, Mapping):
        return {str(column): str(value) for column, value in settings.items()}
    parts = [str(each).rpartition("=") for each in settings or []]
    if not all(column and value for column, _, value in parts):
        raise ValueError(f"{name}={list(settings or [])} must be a mapping or a list such as ['zip=category']")
    return {column: value for column, _, value in parts}
