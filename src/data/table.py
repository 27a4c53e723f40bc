"""Measurements from a CSV file: the rows are samples, and columns may tell their kind, or be given to go by."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from src.data.csv_files import Table, kinds, nearest, read_table, some
from src.data.module import BaseDataModule
from src.data.sources import Covariates, InMemory, Source


class TableDataModule(BaseDataModule):
    """The rows of a CSV file, a row of names first: samples (N, D) of D columns, each of mean 0 and deviation 1.

    `columns` are those that samples consist of; None takes all columns of numbers that are nothing else. Columns
    `given` are measured beside (`Source.given`, in their units), and `label` names the kind (`Source.labels`).
    `postprocess` gives samples back in their units. `mean` and `std` of the columns are those of the whole table;
    a run keeps them in its configuration, and with them its samples need no file (`found`).

    Raises FileNotFoundError if the file is needed and is not there, ValueError for columns that do not exist, are
    used twice or are the same everywhere, and for cells that are no numbers.
    """

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
            self.columns = self.columns or self._numeric(table)
            values = self._values(table)
            mean, std = values.mean(0).tolist(), values.std(0, correction=0).tolist()
        if not len(self.columns) == len(mean) == len(std):
            raise ValueError(
                f"data.mean and data.std need a number for each of the columns {', '.join(self.columns)}, got "
                f"{len(mean)} and {len(std)}: null takes those of the table"
            )
        shape = (len(self.columns),)
        super().__init__(self._open, shape, batch_size, val_fraction, split_seed, seed, num_workers, microbatch_size)
        self.mean = torch.tensor(mean, dtype=torch.float64)
        self.std: Tensor = torch.tensor(std, dtype=torch.float64)

    @property
    def found(self) -> Mapping[str, Any]:
        """The settings that only the table tells, for the run's configuration."""
        return {"columns": self.columns, "mean": self.mean.tolist(), "std": self.std.tolist()}

    def postprocess(self, x: Tensor) -> Tensor:
        return x * self.std.to(x) + self.mean.to(x)

    def _open(self) -> Source:
        table = self._read()
        samples = ((self._values(table) - self.mean) / self.std).float()
        measured = (
            Covariates(_numbers(table, self.condition_columns, "data.condition_columns"), self.condition_columns)
            if self.condition_columns
            else None
        )
        labels = None
        if self.label is not None:
            names = table.column(self.label)
            if "" in names:
                line = table.lines[names.index("")]
                raise ValueError(f"{table.path}, line {line}: the label {self.label!r} is empty; fill it in")
            labels = kinds(names)
        # A row is known by its cells, wherever it stands: those that are the same are held out together.
        return InMemory(samples, labels, measured, ids=["\x1f".join(row) for row in table.rows])

    def _read(self) -> Table:
        """The table, in which all columns that the settings name exist, each for one use."""
        if self.path is None:
            raise FileNotFoundError("no table: set data.path to a CSV file with a row of names first")
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
                    hint = nearest(name, table.names)
                    raise ValueError(f"{setting} names {name!r}, no column of {table.path}: {hint}")
                if name in used:
                    where = f"both {used[name]} and {setting}" if used[name] != setting else f"{setting} twice"
                    raise ValueError(f"{name!r} is in {where}: leave one of them out")
                used[name] = setting
        return table

    def _numeric(self, table: Table) -> list[str]:
        """The columns that are not used otherwise and mostly hold numbers: of these a cell without one is a mistake."""
        free = [name for name in table.names if name not in self.condition_columns and name != self.label]
        numeric = [n for n in free if 2 * sum(map(_is_number, table.column(n))) > len(table.rows)]
        if not numeric:
            raise ValueError(f"{table.path} has no column of numbers among {some(free) or 'none'}: see data.columns")
        return numeric

    def _values(self, table: Table) -> Tensor:
        """(N, D) float64 in the table's units."""
        assert self.columns is not None
        return _numbers(table, self.columns, "data.columns")


def _numbers(table: Table, names: Sequence[str], setting: str) -> Tensor:
    """(N, K) float64 of the columns of these names. Raises ValueError for other cells, and if all are the same."""
    columns = []
    for name in names:
        cells = table.column(name)
        for cell, line in zip(cells, table.lines, strict=True):
            if not _is_number(cell):
                raise ValueError(
                    f"{table.path}, line {line}: column {name!r} is {cell!r:.40}, which is no finite number; fill it "
                    f"in, remove the row, or leave the column out of {setting}"
                )
        values = [float(cell) for cell in cells]
        if min(values) == max(values):
            raise ValueError(f"{table.path}: column {name!r} is {cells[0]} in all rows: leave it out of {setting}")
        columns.append(values)
    return torch.tensor(columns, dtype=torch.float64).T


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
