"""Conditions of conditional models, encoded for the network.

A condition's value is a class (by name or index), a text prompt, or a list of covariates. None means no condition: the
network sees it when training drops the condition, and guidance extrapolates away from it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from src.data.sources import Source
from src.errors import did_you_mean

NO_CLASSES = (
    "conditioning=class needs data with classes; put the images of each class into a subfolder of data.root, or list "
    "the classes in a CSV file (data.source.labels=classes.csv)"
)


class Condition(Protocol):
    """Encodes values of a condition for the network. `examples` are the default values for sampling."""

    examples: Sequence[Any]

    def __call__(self, values: Sequence[Any]) -> Tensor:
        """Return the encoded values (N, ...); None means no condition. Raises ValueError for unknown values."""
        ...

    def of_sample(self, source: Source, index: int, choice: int) -> Any:
        """Return the value of sample `index` of a source; any integer `choice` selects one of several."""
        ...

    def title(self, value: Any) -> str:
        """Return a title for samples drawn with this value."""
        ...

    def check(self, source: Source) -> None:
        """Raise ValueError if the source has values that cannot be encoded."""
        ...

    @staticmethod
    def infer_settings(source: Source, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the constructor's arguments that depend on the data, given its other `settings`.

        A new run stores them in its configuration. Raises ValueError for data without such conditions.
        """
        ...


def encode_conditions(condition: Condition | None, source: Source, indices: Sequence[int]) -> Tensor | None:
    """Return the encoded conditions (N, ...) of samples of a source; None without a condition."""
    if condition is None:
        return None
    return condition([condition.of_sample(source, index, 0) for index in indices])


class Classes:
    """Encodes classes, by name or index, as (N,) int64. None becomes the index after the last class.

    If a value is the name of one class and the index of another, the name wins.
    """

    def __init__(self, names: Sequence[str] | None) -> None:
        if not names:
            raise ValueError("conditioning.encode.names is empty; a new run takes the classes of its data")
        self.names = [str(name) for name in names]
        self.examples = self.names

    def __call__(self, values: Sequence[int | str | None]) -> Tensor:
        return torch.tensor([self._index(value) for value in values], dtype=torch.int64)

    def of_sample(self, source: Source, index: int, choice: int) -> str:
        assert source.labels is not None
        return source.labels.classes[int(source.labels.targets[index])]

    def title(self, value: int | str | None) -> str:
        return "no class" if value is None else self.names[self._index(value)]

    def check(self, source: Source) -> None:
        if source.labels is None:
            raise ValueError(NO_CLASSES)
        if unknown := [name for name in source.labels.classes if name not in self.names]:
            raise ValueError(
                f"the data have the class {unknown[0]!r}, unknown to the run: {did_you_mean(unknown[0], self.names)}; "
                "leave its images out, or train a new run"
            )

    @staticmethod
    def infer_settings(source: Source, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        if source.labels is None:
            raise ValueError(NO_CLASSES)
        # A run stores the names, and refuses texts that may do more than name a class (`src.runs.trust`).
        if odd := [name for name in source.labels.classes if "${" in name or not name.isprintable()]:
            raise ValueError(
                f"conditioning=class: the name of the class {odd[0]!r:.80} is not plain text ({len(odd)} of "
                f"{len(source.labels.classes)} classes); rename its folder, or change it in the table of classes"
            )
        return {"names": list(source.labels.classes)}

    def _index(self, value: int | str | None) -> int:
        if value is None:
            return len(self.names)
        text = str(value)
        if text in self.names:
            return self.names.index(text)
        if text.isdecimal() and int(text) < len(self.names):
            return int(text)
        raise ValueError(
            f"unknown class {text!r}: {did_you_mean(text, self.names)} (or a number below {len(self.names)})"
        )


class Continuous:
    """Encodes K covariates as (N, K) float32, standardized by their mean and std over the data. None becomes NaN."""

    def __init__(
        self,
        names: Sequence[str] | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        examples: Sequence[Sequence[float]] | None = None,
    ) -> None:
        if not names or not mean or not std:
            raise ValueError(
                "conditioning.encode needs names, mean and std for conditioning=continuous; a new run takes those of "
                "its data"
            )
        self.names = [str(name) for name in names]
        # float64: float32 cannot resolve dates in seconds
        self.mean, self.std = (torch.tensor(each, dtype=torch.float64) for each in (mean, std))
        self.examples = [list(row) for row in examples or [mean]]

    def __call__(self, values: Sequence[float | str | Sequence[float] | None]) -> Tensor:
        rows = torch.tensor([self._row(value) for value in values], dtype=torch.float64).view(-1, len(self.names))
        return ((rows - self.mean) / self.std).float()

    def of_sample(self, source: Source, index: int, choice: int) -> list[float]:
        assert source.covariates is not None
        return source.covariates.values[index].tolist()

    def title(self, value: float | str | Sequence[float] | None) -> str:
        if value is None:
            return "no condition"
        return ", ".join(f"{name} {number:.3g}" for name, number in zip(self.names, self._row(value), strict=True))

    def check(self, source: Source) -> None:
        names = [] if source.covariates is None else source.covariates.names
        if list(names) != self.names:
            raise ValueError(f"condition_columns=[{','.join(names)}] must be [{','.join(self.names)}], as in training")

    @staticmethod
    def infer_settings(source: Source, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        if source.covariates is None:
            raise ValueError(
                "conditioning=continuous needs data with covariates; name columns of a table in "
                "data.condition_columns=[...], or data.source.condition_columns=[...] for images of data=folder"
            )
        values = source.covariates.values.double()
        mean, std = values.mean(0), values.std(0, correction=0)
        if constant := [n for n, d in zip(source.covariates.names, std.tolist(), strict=True) if not d > 0]:
            raise ValueError(f"condition_columns has the constant column {', '.join(constant)}; leave it out")
        quantiles = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
        return {
            "names": list(source.covariates.names),
            "mean": mean.tolist(),
            "std": std.tolist(),
            "examples": values.quantile(quantiles, dim=0).tolist(),
        }

    def _row(self, value: float | str | Sequence[float] | None) -> list[float]:
        if value is None:
            return [math.nan] * len(self.names)
        parts = [value] if isinstance(value, int | float) else value.split(",") if isinstance(value, str) else value
        try:
            row = [float(part) for part in parts]
        except (TypeError, ValueError):
            row = []
        if len(row) != len(self.names) or not all(map(math.isfinite, row)):
            raise ValueError(
                f"{value!r} is not a value of {', '.join(self.names)}; give {len(self.names)} finite numbers"
            )
        return row
