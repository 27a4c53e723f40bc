"""Are samples copies of the training set? Their distance to it, against that of held-out data."""

from typing import NamedTuple

from torch import Tensor

from src.metrics.confidence import Statistic, mean_of, median_of
from src.metrics.neighbors import Nearest, nearest


class Memorization(NamedTuple):
    """`ratio` is 1 and `copies` the quantile (0.05) for samples like new data; 0 and 1 for copies."""

    ratio: Statistic  # median distance to the nearest training sample over that of held-out data
    copies: Statistic  # share of samples no farther than the quantile of held-out data
    distances: Tensor  # (N,) of each sample to the nearest training sample
    neighbors: Tensor  # (N,) which that is
    threshold: float  # up to which a sample counts as a copy

    @classmethod
    def of(cls, found: Nearest, usual: Tensor, quantile: float = 0.05) -> "Memorization":
        """Of samples whose nearest training samples were found, `usual` (M,) being held-out data's distances to theirs.

        Raises ValueError where held-out data are copies themselves.
        """
        if not 0 < quantile < 1:
            raise ValueError(f"the quantile of held-out data must lie in (0, 1), got {quantile}: 0.05 is usual")
        threshold = usual.quantile(quantile).item()
        middle = median_of(usual).value
        if middle == 0:
            raise ValueError(
                "half of the held-out data are copies of training data, of which nothing can be told: remove duplicates"
            )
        medians = median_of(found.distances)
        return cls(
            ratio=Statistic(len(found.distances), lambda counts: medians.of(counts) / middle),
            copies=mean_of(found.distances <= threshold),
            distances=found.distances,
            neighbors=found.numbers,
            threshold=threshold,
        )


def memorization(samples: Tensor, held_out: Tensor, train: Tensor, quantile: float = 0.05) -> Memorization:
    """Of samples (N, F), held-out (M, F) and training data (K, F) in one feature space, such as flattened pixels.

    The distances to the nearest training sample, against those of data that were not trained on (as in the test of
    Meehan et al. 2020, 2004.05675, without its cells). Raises ValueError where held-out data are copies themselves.
    """
    return Memorization.of(nearest(samples, train), nearest(held_out, train).distances, quantile)
