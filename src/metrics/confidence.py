"""Metrics with confidence intervals, and names that include the number of samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Metric(NamedTuple):
    """A value and its confidence interval."""

    value: float
    low: float
    high: float


def metric_name(metric: str, n: int) -> str:
    """Return `fid_10k` for the FID of 10,000 samples, `fid_1797` for 1,797."""
    return f"{metric}_{n // 1000}k" if n and n % 1000 == 0 else f"{metric}_{n}"


@dataclass(frozen=True)
class Statistic:
    """A metric of `n` samples as a function of their bootstrap counts.

    `of` maps counts (B, n) float64, whose rows sum to n, to values (B,). Whatever does not depend on the counts is
    computed once, so resampling is cheap. The reference is fixed, since all compared samples share it.
    """

    n: int
    of: Callable[[Tensor], Tensor]
    within: tuple[float, float] = (-math.inf, math.inf)  # the range of the metric, which bounds its interval

    @property
    def value(self) -> float:
        """The metric with each sample counted once."""
        return self.of(torch.ones(1, self.n, dtype=torch.float64)).item()

    def bootstrap(self, seed: int, replicates: int = 200, confidence: float = 0.95) -> Metric:
        """Return the value with a percentile bootstrap interval over the samples.

        Resampling adds about the same bias to a distance as sampling did. The percentiles are shifted so that the mean
        of the replicates equals the value: the interval then covers the expectation of the metric for n samples.

        Source: Efron 1979.
        """
        generator = torch.Generator().manual_seed(seed)
        counts = torch.zeros(replicates + 1, self.n, dtype=torch.float64)
        counts[0] = 1
        for row in counts[1:]:
            row += torch.bincount(torch.randint(self.n, (self.n,), generator=generator), minlength=self.n)
        value, *_ = values = self.of(counts).double().cpu()
        tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
        low, high = values[1:].quantile(tails) + (value - values[1:].mean())
        return Metric(value.item(), max(low.item(), self.within[0]), min(high.item(), self.within[1]))


UNIT_INTERVAL = (0.0, 1.0)  # the range of a fraction


def linear_statistic(value: Tensor, slope: Tensor, within: tuple[float, float] = (-math.inf, math.inf)) -> Statistic:
    """Return a metric () that changes by slope (N,) per additional count of a sample."""
    return Statistic(len(slope), lambda counts: value + (counts.to(slope) - 1) @ slope, within)


def mean_of(scores: Tensor) -> Statistic:
    """Return the mean of the samples' scores (N,); for booleans the fraction of True."""
    within = UNIT_INTERVAL if scores.dtype == torch.bool else (-math.inf, math.inf)
    scores = scores.double()
    return linear_statistic(scores.mean(), scores / len(scores), within)


def median_of(scores: Tensor) -> Statistic:
    """Return the lower median of the samples' scores (N,)."""
    ordered, order = scores.double().sort()

    def of(counts: Tensor) -> Tensor:
        reached = counts.to(scores.device)[:, order].cumsum(1)
        half = (reached[:, -1:] + 1) // 2
        return ordered[torch.searchsorted(reached, half).squeeze(1)]

    return Statistic(len(scores), of)


def wilson(correct: int, n: int) -> Metric:
    """Return the fraction correct / n with Wilson's 95% interval, whose width is positive even for 0 and 1."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(method="wilson")
    return Metric(correct / n, float(interval.low), float(interval.high))
