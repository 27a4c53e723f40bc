"""Rows of a CSV file as samples, with columns for classes and covariates."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from src.data.csv_files import Table, did_you_mean, first_names, labels_from_names, read_table
from src.data.module import BaseDataModule
from src.data.sources import Covariates, InMemory, Source


class TableDataModule(BaseDataModule):
    """Rows of a CSV file with a header: samples (N, D) of D columns, standardized to mean 0 and std 1.

    Args:
        path: the CSV file; None if a run stored `columns`, `mean` and `std`, which suffice to display its samples.
        columns: columns of a sample; None takes all numeric columns without another use.
        condition_columns: columns of covariates, in their original units.
        label: the column with each row's class.
        mean, std: statistics of each column; None computes them over the table.

    `postprocess` returns samples in the table's units. Raises FileNotFoundError if the file is needed and missing;
    ValueError for unknown, repeated or constant columns, and for cells that are not numbers.
    """

    inferred_settings = ("columns", "mean", "std")

    def __init__(
        self,
        path: str | None,
        columns: Sequence[str] | None = None,
        condition_columns: Sequence[str] = (),
        label: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
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
        self.columns = list(columns) if columns else None
        if self.columns is None or mean is None or std is None:
            table = self._read()
            self.columns = self.columns or self._numeric_columns(table)
            values = self._values(table)
            mean, std = values.mean(0).tolist(), values.std(0, correction=0).tolist()
        if not len(self.columns) == len(mean) == len(std):
            raise ValueError(
                f"data.mean and data.std must have {len(self.columns)} numbers, one for each of "
                f"{', '.join(self.columns)}, got {len(mean)} and {len(std)}; null computes them"
            )
        shape = (len(self.columns),)
        super().__init__(self._open, shape, batch_size, val_fraction, split_seed, seed, num_workers, microbatch_size)
        self.mean = torch.tensor(mean, dtype=torch.float64)
        self.std: Tensor = torch.tensor(std, dtype=torch.float64)

    @property
    def inferred(self) -> Mapping[str, Any]:
        return {"columns": self.columns, "mean": self.mean.tolist(), "std": self.std.tolist()}

    def postprocess(self, x: Tensor) -> Tensor:
        return x * self.std.to(x) + self.mean.to(x)

    def _open(self) -> Source:
        table = self._read()
        samples = ((self._values(table) - self.mean) / self.std).float()
        covariates = labels = None
        if names := self.condition_columns:
            covariates = Covariates(_numbers(table, names, "data.condition_columns"), names)
        if self.label is not None:
            classes = table.column(self.label)
            if "" in classes:
                line = table.lines[classes.index("")]
                raise ValueError(f"{table.path}, line {line}: the label {self.label!r} is empty; fill it in")
            labels = labels_from_names(classes)
        # The cells identify a row, so that equal rows are on the same side of the split.
        return InMemory(samples, labels, covariates, ids=["\x1f".join(row) for row in table.rows])

    def _read(self) -> Table:
        """Read the table. Raises ValueError unless all columns in the settings exist and have one use each."""
        if self.path is None:
            raise FileNotFoundError("data.path is not set; set it to a CSV file with a header")
        table = read_table(Path(self.path), "data.path")
        uses = {
            "data.columns": self.columns or [],
            "data.condition_columns": self.condition_columns,
            "data.label": [] if self.label is None else [self.label],
        }
        used: dict[str, str] = {}
        for setting, names in uses.items():
            for name in names:
                if name not in table.names:
                    hint = did_you_mean(name, table.names)
                    raise ValueError(f"{setting}: {name!r} is not a column of {table.path}; {hint}")
                if name in used:
                    where = f"both {used[name]} and {setting}" if used[name] != setting else f"{setting} twice"
                    raise ValueError(f"{name!r} is in {where}; remove one of them")
                used[name] = setting
        return table

    def _numeric_columns(self, table: Table) -> list[str]:
        """Return the columns without another use that are mostly numbers; other cells in them are errors."""
        free = [name for name in table.names if name not in self.condition_columns and name != self.label]
        numeric = [n for n in free if 2 * sum(map(_is_number, table.column(n))) > len(table.rows)]
        if not numeric:
            raise ValueError(
                f"{table.path} has no column of numbers among {first_names(free) or 'none'}; set data.columns"
            )
        return numeric

    def _values(self, table: Table) -> Tensor:
        """Return (N, D) float64 in the table's units."""
        assert self.columns is not None
        return _numbers(table, self.columns, "data.columns")


def _numbers(table: Table, names: Sequence[str], setting: str) -> Tensor:
    """Return (N, K) float64 of these columns. Raises ValueError for other cells and for constant columns."""
    columns = []
    for name in names:
        cells = table.column(name)
        for cell, line in zip(cells, table.lines, strict=True):
            if not _is_number(cell):
                raise ValueError(
                    f"{table.path}, line {line}: column {name!r} is {cell!r:.40}, not a finite number; fill it in, "
                    f"remove the row, or remove the column from {setting}"
                )
        values = [float(cell) for cell in cells]
        if min(values) == max(values):
            raise ValueError(f"{table.path}: column {name!r} is {cells[0]} in all rows; remove it from {setting}")
        columns.append(values)
    return torch.tensor(columns, dtype=torch.float64).T


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
