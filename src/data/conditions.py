"""Conditions: what a sample is asked to be, turned into what the network takes.

One is asked for by a class's name or number, by a text, or by measured values; `None` asks for nothing, which is what
the network is shown when the condition is dropped, and what guidance leads away from.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from src.data.csv_files import nearest
from src.data.sources import Source


class Condition(Protocol):
    """What is asked for -> what the network takes.

    `examples` are some that one could ask for, to draw pictures of. `infer_settings` are the settings of its constructor that
    only the data tell, made once when a run starts and kept in its configuration; `settings` are the others, and
    those of the former that were given. It raises ValueError for data that have no such conditions.
    """

    examples: Sequence[Any]

    def __call__(self, asked: Sequence[Any]) -> Tensor:
        """(N, ...): equally long for all, with `None` for nothing. Raises ValueError for what there is not."""
        ...

    def of(self, source: Source, index: int, choice: int) -> Any:
        """What sample `index` of a source shows, as one would ask for it; `choice`, any number, picks one of several.

        It may be given to the call above among others.
        """
        ...

    def title(self, asked: Any) -> str:
        """What is written beside a sample of it."""
        ...

    def check(self, source: Source) -> None:
        """Raise ValueError if a source's samples show what cannot be asked for."""
        ...

    @staticmethod
    def infer_settings(source: Source, settings: Mapping[str, Any]) -> Mapping[str, Any]: ...


def shown(condition: Condition | None, source: Source, indices: Sequence[int]) -> Tensor | None:
    """What samples of a source show, as the network takes it (N, ...); None without a condition."""
    if condition is None:
        return None
    return condition([condition.of(source, index, 0) for index in indices])


class Classes:
    """Kinds by name or number -> (N,) int64. Nothing is the number after the last, so that it is no class.

    Where names look like numbers, what is asked for is the name.
    """

    def __init__(self, names: Sequence[str] | None) -> None:
        if not names:
            raise ValueError("conditioning=class needs the names of the classes, which the data tell when a run starts")
        self.names = [str(name) for name in names]
        self.examples = self.names

    def __call__(self, asked: Sequence[int | str | None]) -> Tensor:
        return torch.tensor([self._number(each) for each in asked], dtype=torch.int64)

    def of(self, source: Source, index: int, choice: int) -> str:
        assert source.labels is not None
        return source.labels.names[int(source.labels.numbers[index])]

    def title(self, asked: int | str | None) -> str:
        return "no class" if asked is None else self.names[self._number(asked)]

    def check(self, source: Source) -> None:
        if unknown := [name for name in self.infer_settings(source, {})["names"] if name not in self.names]:
            raise ValueError(
                f"the data have the class {unknown[0]!r}, which the run was not trained with: "
                f"{nearest(unknown[0], self.names)}; leave its images out, or train a new run"
            )

    @staticmethod
    def infer_settings(source: Source, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        if source.labels is None:
            raise ValueError(
                "conditioning=class needs data with classes, and these have none: put the images of each class into a "
                "folder of its own under data.root, or name their classes in a file (data.source.labels=classes.csv)"
            )
        return {"names": list(source.labels.names)}

    def _number(self, asked: int | str | None) -> int:
        if asked is None:
            return len(self.names)
        text = str(asked)
        if text in self.names:
            return self.names.index(text)
        if text.isdecimal() and int(text) < len(self.names):
            return int(text)
        raise ValueError(f"unknown class {text!r}: {nearest(text, self.names)} (or a number below {len(self.names)})")


class Continuous:
    """Measured values -> (N, K) float32 with mean 0 and deviation 1 over the data. Nothing is NaN."""

    def __init__(
        self,
        names: Sequence[str] | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        examples: Sequence[Sequence[float]] | None = None,
    ) -> None:
        if not names or not mean or not std:
            raise ValueError("conditioning=continuous needs names, mean and deviation, which data tell as a run starts")
        self.names = [str(name) for name in names]
        # float64: dates in seconds differ by less than float32 can tell
        self.mean, self.std = (torch.tensor(each, dtype=torch.float64) for each in (mean, std))
        self.examples = [list(row) for row in examples or [mean]]

    def __call__(self, asked: Sequence[float | str | Sequence[float] | None]) -> Tensor:
        rows = [self._row(each) for each in asked]
        values = torch.tensor(rows, dtype=torch.float64).view(-1, len(self.names))
        return ((values - self.mean) / self.std).float()

    def of(self, source: Source, index: int, choice: int) -> list[float]:
        assert source.covariates is not None
        return source.covariates.values[index].tolist()

    def title(self, asked: float | str | Sequence[float] | None) -> str:
        if asked is None:
            return "nothing given"
        return ", ".join(f"{name} {value:.3g}" for name, value in zip(self.names, self._row(asked), strict=True))

    def check(self, source: Source) -> None:
        names = [] if source.covariates is None else source.covariates.names
        if list(names) != self.names:
            raise ValueError(
                f"the run goes by {', '.join(self.names)}, the data by {', '.join(names) or 'nothing'}: set data.condition_columns "
                "to what it was trained with"
            )

    @staticmethod
    def infer_settings(source: Source, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        if source.covariates is None:
            raise ValueError(
                "conditioning=continuous needs data with measured values to go by, and these have none: name columns of "
                "a table by data.condition_columns=[...]"
            )
        values = source.covariates.values.double()
        mean, std = values.mean(0), values.std(0, correction=0)
        if constant := [n for n, d in zip(source.covariates.names, std.tolist(), strict=True) if not d > 0]:
            raise ValueError(
                f"data.condition_columns has {', '.join(constant)}, which is the same everywhere: leave it out"
            )
        shares = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
        return {
            "names": list(source.covariates.names),
            "mean": mean.tolist(),
            "std": std.tolist(),
            "examples": values.quantile(shares, dim=0).tolist(),
        }

    def _row(self, asked: float | str | Sequence[float] | None) -> list[float]:
        if asked is None:
            return [math.nan] * len(self.names)
        given = [asked] if isinstance(asked, int | float) else asked.split(",") if isinstance(asked, str) else asked
        try:
            row = [float(value) for value in given]
        except (TypeError, ValueError):
            row = []
        if len(row) != len(self.names) or not all(map(math.isfinite, row)):
            raise ValueError(f"{asked!r} is no value of {', '.join(self.names)}: give {len(self.names)} numbers")
        return row
