"""Two-sample distances from a kernel: E k(x, x') + E k(y, y') - 2 E k(x, y) (Gretton et al. 2012, Lemma 6)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from src.metrics.confidence import Statistic
from src.metrics.neighbors import chunks, distances

Kernel = Callable[[Tensor, Tensor], Tensor]
"""x (N, F), y (M, F) -> (N, M) float64."""


def kid(x: Tensor, y: Tensor) -> Statistic:
    """Kernel inception distance of samples x (N, F) to the reference y (M, F), of all pairs: unbiased at any N.

    Bińkowski et al. 2018, with the kernel (x . y / F + 1)^3.
    """
    return discrepancy(x, y, cubic)


def kid_subsets(x: Tensor, y: Tensor, seed: int, subsets: int = 100, size: int = 1000) -> Tensor:
    """KID of random subsets, as the literature reports its mean and deviation: (subsets,)."""
    if not 2 <= size <= min(len(x), len(y)):
        raise ValueError(
            f"KID's subsets must have between 2 and {min(len(x), len(y))} samples here, got {size}: lower the size"
        )
    generator = torch.Generator().manual_seed(seed)

    def draw(z: Tensor) -> Tensor:
        return z[torch.randperm(len(z), generator=generator)[:size].to(z.device)]

    return torch.tensor([kid(draw(x), draw(y)).value for _ in range(subsets)], dtype=torch.float64)


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None) -> Statistic:
    """Squared maximum mean discrepancy, unbiased, with the kernel exp(-|x - y|^2 / (2 bandwidth^2)).

    Without a bandwidth it is the median heuristic over the reference y alone, so that all that are compared with it
    share one: see `median_distance`.
    """
    width = median_distance(y) if bandwidth is None else bandwidth
    if not width > 0:
        raise ValueError(f"the kernel's bandwidth must be positive, got {width}: give one, or a reference that varies")
    return discrepancy(x, y, partial(gaussian, bandwidth=width))


def energy_distance(x: Tensor, y: Tensor) -> Statistic:
    """2 E|x - y| - E|x - x'| - E|y - y'| over all pairs, also of a sample with itself (Székely & Rizzo 2013).

    In the unit of the data; never negative, 0 for a set with itself.
    """
    return discrepancy(x, y, lambda a, b: -distances(a, b), unbiased=False)


def discrepancy(x: Tensor, y: Tensor, kernel: Kernel, unbiased: bool = True) -> Statistic:
    """The kernel distance of samples x (N, F) to y (M, F); unbiased leaves out the pairs of a sample with itself.

    Costs (N + M)^2 kernels, whatever the number of replicates; those of a sample with itself stay left out of them.
    """
    if min(len(x), len(y)) < 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"needs two sets (N, F) of at least 2 samples and the same F, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = x.double(), y.double()
    among_y = _mean_of_pairs(torch.ones(1, len(y), dtype=y.dtype, device=y.device), y, kernel, unbiased)
    across = torch.cat([kernel(x[rows], y).mean(1) for rows in chunks(len(x), len(y))])

    def of(counts: Tensor) -> Tensor:
        counts = counts.to(x)
        return _mean_of_pairs(counts, x, kernel, unbiased) + among_y - 2 * counts @ across / counts.sum(1)

    return Statistic(len(x), of)


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """(x . y / F + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """exp(-|x - y|^2 / (2 bandwidth^2))."""
    return (distances(x, y) / bandwidth).square().mul(-0.5).exp()


def median_distance(x: Tensor, most: int = 2000) -> float:
    """The median distance between two of the first `most` samples of x (N, F) (Gretton et al. 2012)."""
    return torch.pdist(x[:most].double()).median().item()


def _mean_of_pairs(counts: Tensor, x: Tensor, kernel: Kernel, unbiased: bool) -> Tensor:
    """The mean kernel (B,) over pairs of x (N, F), each taken `counts` (B, N) times."""
    total = torch.zeros(len(counts), dtype=x.dtype, device=x.device)
    for rows in chunks(len(x), len(x)):
        k = kernel(x[rows], x)
        if unbiased:
            k.diagonal(rows.start).zero_()
        total += ((counts[:, rows] @ k) * counts).sum(1)
    return total / (counts.sum(1).square() - (counts.square().sum(1) if unbiased else 0))
