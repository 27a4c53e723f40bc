"""The Fréchet distance between Gaussians fitted to two feature sets, from moments that merge over batches and ranks.

|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in squared units of the features. Its bias decreases with the number of
samples, so only equal numbers are comparable.

Source: Dowson and Landau 1982; as FID, Heusel et al. 2017 (arXiv 1706.08500), eq. 6.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from src.metrics.confidence import Statistic, linear_statistic


class Moments(NamedTuple):
    """The number of samples, their mean (F,), and their scatter matrix (F, F), all float64."""

    number: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Tensor, counts: Tensor | None = None) -> "Moments":
        """Return the moments of samples x (N, F), each counted once or `counts` (N,) times."""
        x = x.double()
        weights = torch.ones(len(x), dtype=x.dtype, device=x.device) if counts is None else counts.to(x)
        number = weights.sum()
        mean = weights @ x / number
        centered = x - mean
        return cls(number, mean, (centered * weights[:, None]).T @ centered)

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets, exact in any order. Source: Chan et al. 1983."""
        number = self.number + other.number
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(apart, apart) * (self.number * other.number / number)
        return Moments(number, self.mean + apart * (other.number / number), scatter)

    @property
    def covariance(self) -> Tensor:
        """(F, F), unbiased."""
        return self.scatter / (self.number - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    return _distance(a, b, sqrtm(b.covariance)).item()


def frechet(x: Tensor, reference: Moments) -> Statistic:
    """Return the distance of samples x (N, F) to the reference. A bootstrap replicate costs O(N F^2 + F^3)."""
    reference_root = sqrtm(reference.covariance)

    def of(counts: Tensor) -> Tensor:
        return torch.stack([_distance(Moments.of(x, row), reference, reference_root) for row in counts])

    return Statistic(len(x), of)


def frechet_linear(x: Tensor, reference: Moments) -> Statistic:
    """Return `frechet` linearized in the counts, for many features: all replicates cost as much as one.

    The slope is the influence function. With T = C1^(-1/2) (C1^(1/2) C2 C1^(1/2))^(1/2) C1^(-1/2), the optimal
    transport map between the Gaussians, a sample at d from the mean contributes 2 (m1 - m2) . d + d^T (I - T) d,
    minus the mean of this. Near zero distance the slope vanishes and the interval is too narrow.

    Source: Hampel 1974.
    """
    x = x.double()
    moments, reference_root = Moments.of(x), sqrtm(reference.covariance)
    values, vectors = torch.linalg.eigh(reference_root @ moments.covariance @ reference_root)
    kept = values > 1e-12 * values[-1]
    half = reference_root @ (vectors[:, kept] * values[kept] ** -0.25)  # T = half half^T
    apart = x - moments.mean
    slope = 2 * apart @ (moments.mean - reference.mean) + apart.square().sum(1) - (apart @ half).square().sum(1)
    slope = (slope - slope.mean()) / len(x)
    return linear_statistic(_distance(moments, reference, reference_root), slope)


def sqrtm(covariance: Tensor) -> Tensor:
    """Return the symmetric square root of a covariance (F, F)."""
    values, vectors = torch.linalg.eigh(covariance)
    square_root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return square_root


def _distance(a: Moments, b: Moments, b_root: Tensor) -> Tensor:
    # The eigenvalues of C1 C2 are the squared singular values of C1^(1/2) C2^(1/2), which are never complex.
    cross = torch.linalg.svdvals(sqrtm(a.covariance) @ b_root).sum()
    gap = (a.mean - b.mean).square().sum()
    distance: Tensor = gap + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return distance.clamp(min=0)
