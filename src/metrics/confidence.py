"""What a metric gives: a figure with its interval, under a name that says of how many samples it is."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor


class Metric(NamedTuple):
    """A value, and the interval within which chance may have moved it."""

    value: float
    low: float
    high: float


def metric_name(metric: str, n: int) -> str:
    """`fid` of 10,000 samples is `fid_10k`, of 1,797 it is `fid_1797`."""
    return f"{metric}_{n // 1000}k" if n and n % 1000 == 0 else f"{metric}_{n}"


@dataclass(frozen=True)
class Statistic:
    """A metric of `n` samples as a function of how often each of them is taken.

    `of` maps counts (B, n) float64, of which each row sums to n, to values (B,): what does not depend on the counts is
    computed once, so that resampling is cheap. The reference is held fixed: it is the same for all that are compared.
    """

    n: int
    of: Callable[[Tensor], Tensor]
    within: tuple[float, float] = (-math.inf, math.inf)
    """Where the metric can lie; so does its interval."""

    @property
    def value(self) -> float:
        """Each sample taken once."""
        return self.of(torch.ones(1, self.n, dtype=torch.float64)).item()

    def bootstrap(self, seed: int, replicates: int = 200, level: float = 0.95) -> Metric:
        """The value with a percentile bootstrap interval (Efron 1979) over the samples, drawn with `seed`.

        Resampling biases a distance once more by about what sampling did. The percentiles are moved so that the
        replicates' mean is the value: the interval is for what the metric is, on average, of n samples, which is what
        its name says. For means of samples it is the plain percentile interval.
        """
        if replicates < 2 or not 0 < level < 1:
            raise ValueError(
                f"a bootstrap needs at least 2 replicates and a level in (0, 1), got {replicates} and {level}: 200 and "
                "0.95 are usual"
            )
        generator = torch.Generator().manual_seed(seed)
        counts = torch.zeros(replicates + 1, self.n, dtype=torch.float64)
        counts[0] = 1
        for row in counts[1:]:
            row += torch.bincount(torch.randint(self.n, (self.n,), generator=generator), minlength=self.n)
        value, *_ = values = self.of(counts).double().cpu()
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        low, high = values[1:].quantile(tails) + (value - values[1:].mean())
        return Metric(value.item(), max(low.item(), self.within[0]), min(high.item(), self.within[1]))


SHARE = (0.0, 1.0)
"""Where a share of something lies."""


def linear(value: Tensor, slope: Tensor, within: tuple[float, float] = (-math.inf, math.inf)) -> Statistic:
    """A metric () that changes by slope (N,) for each further time that a sample is taken."""
    return Statistic(len(slope), lambda counts: value + (counts.to(slope) - 1) @ slope, within)


def mean_of(scores: Tensor) -> Statistic:
    """The mean of the samples' scores (N,); of true and false the share that is true."""
    within = SHARE if scores.dtype == torch.bool else (-math.inf, math.inf)
    scores = scores.double()
    return linear(scores.mean(), scores / len(scores), within)


def median_of(scores: Tensor) -> Statistic:
    """The (lower) median of the samples' scores (N,)."""
    ordered, order = scores.double().sort()

    def of(counts: Tensor) -> Tensor:
        reached = counts.to(scores.device)[:, order].cumsum(1)
        half = (reached[:, -1:] + 1) // 2
        return ordered[torch.searchsorted(reached, half).squeeze(1)]

    return Statistic(len(scores), of)


def wilson(right: int, n: int, level: float = 0.95) -> Metric:
    """The share right / n with Wilson's interval (1927), which has a width also where all are right, or none."""
    if not 0 <= right <= n or n < 1 or not 0 < level < 1:
        raise ValueError(
            f"an interval is of 0 to n of at least one sample, and a level in (0, 1), got {right}, {n} and {level}"
        )
    share, z = right / n, NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    return Metric(share, max(middle - half, SHARE[0]), min(middle + half, SHARE[1]))
