"""Detect copies of training data by the distance to the nearest training sample, relative to validation data."""

from typing import NamedTuple

from torch import Tensor

from src.metrics.confidence import Statistic, mean_of, median_of
from src.metrics.neighbors import Nearest, nearest_neighbors


class Memorization(NamedTuple):
    """`ratio` is 1 and `copies` equals the quantile (0.05) for new data; for copies they are 0 and 1."""

    ratio: Statistic  # median distance to the nearest training sample, divided by that of validation data
    copies: Statistic  # fraction of samples within the quantile of validation data
    distances: Tensor  # (N,) distance to the nearest training sample
    neighbors: Tensor  # (N,) index of the nearest training sample
    threshold: float  # largest distance of a copy

    @classmethod
    def of(cls, samples: Nearest, val_distances: Tensor, quantile: float = 0.05) -> "Memorization":
        """Compare the samples' nearest training samples with the distances (M,) of validation data to theirs.

        Raises ValueError if half of the validation data are copies themselves.
        """
        if not 0 < quantile < 1:
            raise ValueError(f"quantile={quantile} must be in (0, 1): 0.05 is usual")
        threshold = val_distances.quantile(quantile).item()
        middle = median_of(val_distances).value
        if middle == 0:
            raise ValueError("half of the validation data are copies of training data: remove duplicates")
        medians = median_of(samples.distances)
        return cls(
            ratio=Statistic(len(samples.distances), lambda counts: medians.of(counts) / middle),
            copies=mean_of(samples.distances <= threshold),
            distances=samples.distances,
            neighbors=samples.numbers,
            threshold=threshold,
        )


def memorization(samples: Tensor, val: Tensor, train: Tensor, quantile: float = 0.05) -> Memorization:
    """Compare samples (N, F) with validation (M, F) and training data (K, F) in one feature space.

    Raises ValueError if half of the validation data are copies themselves.

    Source: Meehan et al. 2020 (arXiv 2004.05675), without the partition into cells.
    """
    return Memorization.of(nearest_neighbors(samples, train), nearest_neighbors(val, train).distances, quantile)
