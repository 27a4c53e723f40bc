"""Two-sample distances by a kernel: E k(x, x') + E k(y, y') - 2 E k(x, y). Source: Gretton et al. 2012, lemma 6."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from src.metrics.confidence import Statistic
from src.metrics.neighbors import chunks, distances

Kernel = Callable[[Tensor, Tensor], Tensor]  # x (N, F), y (M, F) -> (N, M) float64


def kid(x: Tensor, y: Tensor) -> Statistic:
    """Return the kernel inception distance of samples x (N, F) to y (M, F) over all pairs, unbiased for any N.

    Source: Bińkowski et al. 2018 (arXiv 1801.01401).
    """
    return kernel_distance(x, y, cubic)


def mmd(x: Tensor, y: Tensor) -> Statistic:
    """Return the unbiased squared maximum mean discrepancy with the kernel exp(-|x - y|^2 / (2 bandwidth^2)).

    The bandwidth is the `median_distance` of the reference y, so all compared samples share it.
    """
    return kernel_distance(x, y, partial(gaussian, bandwidth=median_distance(y)))


def energy_distance(x: Tensor, y: Tensor) -> Statistic:
    """Return 2 E|x - y| - E|x - x'| - E|y - y'| over all pairs, including a sample with itself.

    In units of the data; never negative, 0 for equal sets.

    Source: Székely and Rizzo 2013.
    """
    return kernel_distance(x, y, lambda a, b: -distances(a, b), unbiased=False)


def kernel_distance(x: Tensor, y: Tensor, kernel: Kernel, unbiased: bool = True) -> Statistic:
    """Return the kernel distance of samples x (N, F) to y (M, F); `unbiased` excludes pairs of a sample with itself.

    The cost is (N + M)^2 kernel values, for any number of replicates.
    """
    x, y = x.double(), y.double()
    among_y = _mean_of_pairs(torch.ones(1, len(y), dtype=y.dtype, device=y.device), y, kernel, unbiased)
    across = torch.cat([kernel(x[rows], y).mean(1) for rows in chunks(len(x), len(y))])

    def of(counts: Tensor) -> Tensor:
        counts = counts.to(x)
        return _mean_of_pairs(counts, x, kernel, unbiased) + among_y - 2 * counts @ across / counts.sum(1)

    return Statistic(len(x), of)


def cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    return (distances(x, y) / bandwidth).square().mul(-0.5).exp()


def median_distance(x: Tensor, limit: int = 2000) -> float:
    """Return the median distance of pairs among the first `limit` samples of x (N, F). Source: Gretton et al. 2012."""
    return torch.pdist(x[:limit].double()).median().item()


def _mean_of_pairs(counts: Tensor, x: Tensor, kernel: Kernel, unbiased: bool) -> Tensor:
    """Return the mean kernel (B,) over pairs of x (N, F) with counts (B, N)."""
    total = torch.zeros(len(counts), dtype=x.dtype, device=x.device)
    for rows in chunks(len(x), len(x)):
        k = kernel(x[rows], x)
        if unbiased:
            k.diagonal(rows.start).zero_()
        total += ((counts[:, rows] @ k) * counts).sum(1)
    return total / (counts.sum(1).square() - (counts.square().sum(1) if unbiased else 0))
