"""Distances in feature space, in chunks: nearest neighbours, precision and recall, density and coverage."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from src.metrics.confidence import SHARE, Statistic, linear, mean_of

CHUNK = 2**23
"""The numbers that one chunk of a distance matrix holds: 64 MB."""


class Manifolds(NamedTuple):
    """How well samples and real ones lie within each other's neighbourhoods; 1 is best, density has no bound."""

    precision: Statistic  # share of samples in some real sample's ball
    density: Statistic  # mean number of real samples' balls that a sample is in, over k
    recall: Statistic  # share of real samples in some sample's ball
    coverage: Statistic  # share of real samples with some sample in their ball


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a (rows, columns) matrix, of at most `CHUNK` numbers each (but one row at least)."""
    size = max(1, CHUNK // max(columns, 1))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean, between x (N, F) and y (M, F): (N, M) float64, from differences, so that a copy is at exactly 0."""
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


class Nearest(NamedTuple):
    """For each of N samples the distance (N,) to the nearest of some others, and the number (N,) of that one."""

    distances: Tensor
    numbers: Tensor

    @classmethod
    def none(cls, x: Tensor) -> "Nearest":
        """Of x (N, F) among nothing yet: infinitely far."""
        numbers = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return cls(torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device), numbers)

    def or_nearer(self, other: "Nearest") -> "Nearest":
        """The nearest among more others; of several as near, the one with the lowest number."""
        same = other.distances == self.distances
        take = (other.distances < self.distances) | (same & (other.numbers < self.numbers))
        return Nearest(*(torch.where(take, theirs, ours) for ours, theirs in zip(self, other, strict=True)))


def nearest(x: Tensor, y: Tensor, first: int = 0) -> Nearest:
    """For each of x (N, F) the nearest of y (M, F), which are numbered from `first` on."""
    if len(y) == 0:
        raise ValueError("there is nothing to be near to: the reference has no samples; raise n")
    parts = [distances(x[rows], y).min(1) for rows in chunks(len(x), len(y))]
    return Nearest(torch.cat([p.values for p in parts]), first + torch.cat([p.indices for p in parts]))


def radii(x: Tensor, k: int) -> Tensor:
    """For each of x (N, F) the distance (N,) to its k-th nearest among the others."""
    if not 1 <= k < len(x):
        raise ValueError(f"{len(x)} samples have no neighbour number {k} each: k must lie in [1, {len(x) - 1}]")
    # The sample itself, at 0, is the first.
    return torch.cat([distances(x[rows], x).kthvalue(k + 1).values for rows in chunks(len(x), len(x))])


def manifolds(samples: Tensor, real: Tensor, k: int = 5) -> Manifolds:
    """Of samples (M, F) against real ones (N, F), each with a ball that reaches to its k-th neighbour.

    Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1-2; they take k = 3), density and coverage (Naeem et
    al. 2020, section 3; k = 5). What recall and coverage lose without a sample, its balls staying as they are, is what
    only this sample reaches: linear in that, their intervals are rather too wide (Efron & Stein 1981) than too narrow,
    as those of repeated samples would be.
    """
    ours, theirs = radii(samples, k), radii(real, k)
    parts = list(chunks(len(samples), len(real)))
    hits = torch.cat([(distances(samples[rows], real) <= theirs).sum(1) for rows in parts]).double()

    def reached(ball: Callable[[slice], Tensor]) -> Statistic:
        """The share of real samples that are in one ball with some sample."""
        times = torch.zeros(len(real), dtype=torch.int64, device=real.device)
        for rows in parts:
            times += (distances(samples[rows], real) <= ball(rows)).sum(0)
        alone = torch.cat([((distances(samples[rows], real) <= ball(rows)) & (times == 1)).sum(1) for rows in parts])
        return linear((times > 0).double().mean(), alone.double() / len(real), SHARE)

    return Manifolds(
        precision=mean_of(hits > 0),
        density=mean_of(hits / k),
        recall=reached(lambda rows: ours[rows, None]),
        coverage=reached(lambda rows: theirs),
    )
