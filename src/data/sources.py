"""Sources of samples: what a data set provides, and its labels and covariates."""

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


class Labels(NamedTuple):
    """What kind each sample of a source is: `numbers` (N,) int64, which count through `names`."""

    numbers: Tensor
    names: Sequence[str]


class Covariates(NamedTuple):
    """What was measured beside each sample of a source: `values` (N, K) float32 of so many `names`."""

    values: Tensor
    names: Sequence[str]


class Source(Protocol):
    """Where samples come from, and what is known of them: their kinds, measurements, or texts that describe each.

    `ids` are what each sample is known by wherever the data lie and in whatever order: whether it is held out depends
    on that alone. None stands for its number.
    """

    labels: Labels | None
    covariates: Covariates | None
    captions: Sequence[Sequence[str]] | None
    ids: Sequence[str] | None

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> Tensor:
        """The samples as (N, *data)."""
        ...

    def stamps(self) -> Sequence[int] | None:
        """A number for each sample that tells whether its content has changed; None where there is none."""
        ...


class InMemory:
    """Samples (N, *data) in one tensor."""

    def __init__(
        self,
        samples: Tensor,
        labels: Labels | None = None,
        covariates: Covariates | None = None,
        captions: Sequence[Sequence[str]] | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        self.samples = samples
        self.labels = labels
        self.covariates = covariates
        self.captions = captions
        self.ids = ids

    def __len__(self) -> int:
        return len(self.samples)

    def fetch(self, indices: Sequence[int]) -> Tensor:
        return self.samples[torch.as_tensor(indices)]

    def stamps(self) -> Sequence[int] | None:
        if self.samples.dtype != torch.uint8:  # computed: another machine may round otherwise
            return None
        return [zlib.crc32(sample) for sample in self.samples.numpy()]


def normalize(x: Tensor, num_values: int = 256) -> Tensor:
    """Integers 0..levels - 1 -> float32 in [-1, 1]."""
    return x.float() * (2 / (num_values - 1)) - 1


def to_uint8(x: Tensor, num_values: int = 256) -> Tensor:
    """Floats in [-1, 1] (clipped) -> the nearest of `num_values` values, as uint8 0..255 for showing and saving."""
    index = ((x.float().clamp(-1, 1) + 1) * ((num_values - 1) / 2)).round()
    return (index * (255 / (num_values - 1))).round().to(torch.uint8)
