"""Sources of samples, with their labels, covariates and captions, and the conversion of pixel values."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from src.errors import counted, first_names


class Labels(NamedTuple):
    """The class of each sample: `targets` (N,) int64 index into the names `classes`."""

    targets: Tensor
    classes: Sequence[str]


class Covariates(NamedTuple):
    """Measurements that accompany each sample: `values` (N, K) float32 and their K `names`."""

    values: Tensor
    names: Sequence[str]


def describe_conditions(names: Sequence[str]) -> str:
    """Return the part of a summary about covariates of these names."""
    return f"conditions: {counted(len(names), 'number')} ({first_names(names, 10)})"


class Source(Protocol):
    """A dataset that returns several samples per call.

    Any of `labels`, `covariates` and `captions` (one or several per sample) may be None. `ids` identify samples
    independent of location and order: the split depends on nothing else. None means the index. A source that defines
    its own split has a mask `val_mask` (N,) of validation samples, and may describe itself in one line, `summary`. One
    with other samples in training has a method `fetch_training(indices, keys)`, with 63 random bits for each sample,
    keyed by (seed, step, position). If these differ in shape, `buckets` (N,) has the same integer for equal shapes.
    """

    labels: Labels | None
    covariates: Covariates | None
    captions: Sequence[Sequence[str]] | None
    ids: Sequence[str] | None

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """Return the samples (N, *data)."""
        ...

    def stamps(self) -> Sequence[int] | None:
        """Return an integer per sample that changes with its contents; None if unknown."""
        ...


@dataclass(eq=False)
class InMemory:
    """A source whose samples (N, *data) are one tensor."""

    samples: Tensor
    labels: Labels | None = None
    covariates: Covariates | None = None
    captions: Sequence[Sequence[str]] | None = None
    ids: Sequence[str] | None = None
    summary: str = ""

    def __len__(self) -> int:
        return len(self.samples)

    def fetch(self, indices: Sequence[int]) -> Tensor:
        return self.samples[torch.as_tensor(indices)]

    def stamps(self) -> Sequence[int] | None:
        if self.samples.dtype != torch.uint8:  # computed samples may be rounded differently on another machine
            return None
        return [zlib.crc32(sample) for sample in self.samples.numpy()]


def normalize(x: Tensor, value_range: tuple[float, float] = (0, 255)) -> Tensor:
    """Map values from [low, high] to float32 in [-1, 1]."""
    low, high = value_range
    x = x.float() - low if low else x.float()
    return x * (2 / (high - low)) - 1


def to_uint8(x: Tensor, num_values: int = 256) -> Tensor:
    """Round floats, clipped to [-1, 1], to the nearest of `num_values` values and return them as uint8 in [0, 255]."""
    index = ((x.float().clamp(-1, 1) + 1) * ((num_values - 1) / 2)).round()
    return (index * (255 / (num_values - 1))).round().to(torch.uint8)
