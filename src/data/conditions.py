"""Conditions: what a sample is asked to be, turned into what the network takes.

One is asked for by a class's name or number, by a text, or by measured values; `None` asks for nothing, which is what
the network is shown when the condition is dropped, and what guidance leads away from.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from src.data.batch import Source


class Condition(Protocol):
    """What is asked for -> what the network takes.

    `examples` are some that one could ask for, to draw pictures of. `found_in` are the settings of its constructor that
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

    @staticmethod
    def found_in(source: Source, settings: Mapping[str, Any]) -> Mapping[str, Any]: ...


def shown(condition: Condition | None, source: Source, indices: Sequence[int]) -> Tensor | None:
    """What samples of a source show, as the network takes it (N, ...); None without a condition."""
    if condition is None:
        return None
    return condition([condition.of(source, index, 0) for index in indices])


class Classes:
    """Kinds by name or number -> (N,) int64. Nothing is the number after the last, so that it is no class."""

    def __init__(self, names: Sequence[str] | None) -> None:
        if not names:
            raise ValueError("conditioning=class needs the names of the classes, which the data tell when a run starts")
        self.names = [str(name) for name in names]
        self.examples = range(len(self.names))

    def __call__(self, asked: Sequence[int | str | None]) -> Tensor:
        return torch.tensor([self._number(each) for each in asked], dtype=torch.int64)

    def of(self, source: Source, index: int, choice: int) -> int:
        assert source.labels is not None
        return int(source.labels.numbers[index])

    def title(self, asked: int | str | None) -> str:
        return "no class" if asked is None else self.names[self._number(asked)]

    @staticmethod
    def found_in(source: Source, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        if source.labels is None:
            raise ValueError(
                "conditioning=class needs data with classes, and these have none: put the images of each class into a "
                "folder of its own under data.root, or name their classes in a file (data.source.labels=classes.csv)"
            )
        return {"names": list(source.labels.names)}

    def _number(self, asked: int | str | None) -> int:
        if asked is None:
            return len(self.names)
        if isinstance(asked, int) and not isinstance(asked, bool) and 0 <= asked < len(self.names):
            return asked
        if str(asked) in self.names:  # also a name that looks like a number
            return self.names.index(str(asked))
        near = difflib.get_close_matches(str(asked), self.names, n=3, cutoff=0.5)
        shown = ", ".join(near or self.names[:10]) + (", ..." if not near and len(self.names) > 10 else "")
        hint = f"did you mean {shown}?" if near else f"the {len(self.names)} that there are: {shown}"
        raise ValueError(f"unknown class {str(asked)!r}: {hint}")


class Measurements:
    """Measured values -> (N, K) float32 with mean 0 and deviation 1 over the data. Nothing is NaN."""

    def __init__(
        self,
        names: Sequence[str] | None,
        mean: Sequence[float] | None,
        deviation: Sequence[float] | None,
        examples: Sequence[Sequence[float]] | None = None,
    ) -> None:
        if not names or not mean or not deviation:
            raise ValueError("conditioning=measured needs names, mean and deviation, which data tell as a run starts")
        self.names = [str(name) for name in names]
        self.mean, self.deviation = torch.tensor(mean), torch.tensor(deviation)
        self.examples = [list(row) for row in examples or [mean]]

    def __call__(self, asked: Sequence[float | Sequence[float] | None]) -> Tensor:
        rows = [self._row(each) for each in asked]
        return (torch.tensor(rows, dtype=torch.float32).view(-1, len(self.names)) - self.mean) / self.deviation

    def of(self, source: Source, index: int, choice: int) -> list[float]:
        assert source.given is not None
        return source.given.values[index].tolist()

    def title(self, asked: float | Sequence[float] | None) -> str:
        if asked is None:
            return "nothing given"
        return ", ".join(f"{name} {value:.3g}" for name, value in zip(self.names, self._row(asked), strict=True))

    @staticmethod
    def found_in(source: Source, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        if source.given is None:
            raise ValueError(
                "conditioning=measured needs data with measured values to go by, and these have none: name columns of "
                "a table by data.given=[...]"
            )
        values = source.given.values.double()
        mean, deviation = values.mean(0), values.std(0, correction=0)
        if constant := [n for n, d in zip(source.given.names, deviation.tolist(), strict=True) if not d > 0]:
            raise ValueError(f"data.given has {', '.join(constant)}, which is the same everywhere: leave it out")
        shares = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
        return {
            "names": list(source.given.names),
            "mean": mean.tolist(),
            "deviation": deviation.tolist(),
            "examples": values.quantile(shares, dim=0).tolist(),
        }

    def _row(self, asked: float | Sequence[float] | None) -> list[float]:
        if asked is None:
            return [float("nan")] * len(self.names)
        row = [asked] if isinstance(asked, int | float) else list(asked) if not isinstance(asked, str) else []
        if len(row) != len(self.names) or not all(isinstance(value, int | float) for value in row):
            raise ValueError(f"{asked!r} is no value of {', '.join(self.names)}: give {len(self.names)} numbers")
        return [float(value) for value in row]
