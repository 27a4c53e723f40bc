"""Distances in feature space, in chunks: nearest neighbors, precision and recall, density and coverage."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from src.metrics.confidence import UNIT_INTERVAL, Statistic, linear_statistic, mean_of

CHUNK = 2**23  # elements per chunk of a distance matrix: 64 MB


class Manifolds(NamedTuple):
    """How well samples and real data cover each other's neighborhoods; 1 is best, and density is unbounded."""

    precision: Statistic  # fraction of samples inside a real sample's ball
    density: Statistic  # mean number of real samples' balls around a sample, divided by k
    recall: Statistic  # fraction of real samples inside a sample's ball
    coverage: Statistic  # fraction of real samples whose ball holds a sample


def chunks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of the rows of a (rows, columns) matrix, each with at most `CHUNK` elements or one row."""
    size = max(1, CHUNK // max(columns, 1))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Return Euclidean distances between x (N, F) and y (M, F): (N, M) float64, exactly 0 for copies."""
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


class Nearest(NamedTuple):
    """The distance (N,) of each sample to its nearest neighbor, and the index (N,) of that neighbor."""

    distances: Tensor
    numbers: Tensor

    @classmethod
    def none(cls, x: Tensor) -> "Nearest":
        """Return an infinite distance for each of x (N, F)."""
        numbers = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return cls(torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device), numbers)

    def or_nearer(self, other: "Nearest") -> "Nearest":
        """Merge with the nearest of other candidates; ties take the lowest index."""
        same = other.distances == self.distances
        take = (other.distances < self.distances) | (same & (other.numbers < self.numbers))
        return Nearest(*(torch.where(take, theirs, ours) for ours, theirs in zip(self, other, strict=True)))


def nearest_neighbors(x: Tensor, y: Tensor, first: int = 0) -> Nearest:
    """Return the nearest of y (M, F) for each of x (N, F); indices start at `first`."""
    parts = [distances(x[rows], y).min(1) for rows in chunks(len(x), len(y))]
    return Nearest(torch.cat([p.values for p in parts]), first + torch.cat([p.indices for p in parts]))


def radii(x: Tensor, k: int) -> Tensor:
    """Return the distance (N,) of each of x (N, F) to its k-th nearest neighbor."""
    # The sample itself, at distance 0, is the first.
    return torch.cat([distances(x[rows], x).kthvalue(k + 1).values for rows in chunks(len(x), len(x))])


def manifolds(samples: Tensor, real: Tensor, k: int = 5) -> Manifolds:
    """Compare samples (M, F) with real data (N, F), where each sample has a ball that reaches its k-th neighbor.

    The bootstrap of recall and coverage is linear: a sample contributes the real samples that no other sample covers.
    Their intervals are therefore too wide rather than too narrow (Efron and Stein 1981).

    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), eq. 1-2 (with k = 3), for precision and recall; Naeem et al.
    2020 (arXiv 2002.09797), section 3 (with k = 5), for density and coverage.
    """
    ours, theirs = radii(samples, k), radii(real, k)
    parts = list(chunks(len(samples), len(real)))
    hits = torch.cat([(distances(samples[rows], real) <= theirs).sum(1) for rows in parts]).double()

    def covered_share(ball: Callable[[slice], Tensor]) -> Statistic:
        """Return the fraction of real samples within `ball` of a sample."""
        hits_per_real = torch.zeros(len(real), dtype=torch.int64, device=real.device)
        for rows in parts:
            hits_per_real += (distances(samples[rows], real) <= ball(rows)).sum(0)
        alone = torch.cat(
            [((distances(samples[rows], real) <= ball(rows)) & (hits_per_real == 1)).sum(1) for rows in parts]
        )
        return linear_statistic((hits_per_real > 0).double().mean(), alone.double() / len(real), UNIT_INTERVAL)

    return Manifolds(
        precision=mean_of(hits > 0),
        density=mean_of(hits / k),
        recall=covered_share(lambda rows: ours[rows, None]),
        coverage=covered_share(lambda rows: theirs),
    )
