"""All metrics of a set of samples, by name."""

import math

from torch import Tensor

from src.metrics.classes import inception_score, total_variation
from src.metrics.collected import Collected
from src.metrics.confidence import Metric, Statistic, median_of, metric_name, wilson
from src.metrics.frechet import frechet, frechet_distance, frechet_linear
from src.metrics.kernels import energy_distance, kid, mmd
from src.metrics.neighbors import manifolds
from src.metrics.transport import sliced_wasserstein

WIDE = 512  # number of features from which the interval of the Fréchet distance is linearized


def image_metrics(extractor: str, samples: Collected, reference: Collected, seed: int) -> dict[str, Metric]:
    """Return Fréchet and kernel distance, precision, recall, density, coverage, and metrics of class probabilities.

    The names are fid, kid and inception_score for `inception` only; otherwise fd, kd and class_score with the
    extractor, such as `fd_classifier_1k`. Classes are compared with predictions for the reference, so that errors of
    the classifier cancel.
    """
    metrics = {"fd": frechet_metric(samples, reference, seed)}
    x, y = samples.features, reference.features
    statistics = {"kd": kid(x, y), **manifolds(x, y)._asdict()}
    if reference.probabilities.shape[1]:
        classes = reference.probabilities.argmax(1).bincount(minlength=reference.probabilities.shape[1])
        statistics["class_score"] = inception_score(samples.probabilities, splits=min(10, len(x)))
        statistics["class_variation"] = total_variation(samples.probabilities.argmax(1), classes)
    metrics |= {key: each.bootstrap(seed) for key, each in statistics.items()}
    known = {"fd": "fid", "kd": "kid", "class_score": "inception_score"} if extractor == "inception" else {}
    numbers = {"fd": int(samples.moments.number)}
    return {
        metric_name(known.get(key, f"{key}_{extractor}"), numbers.get(key, len(x))): metric
        for key, metric in metrics.items()
    }


def frechet_metric(samples: Collected, reference: Collected, seed: int) -> Metric:
    """Return the Fréchet distance of all samples; its interval is that of the kept ones, scaled to all."""
    resampled = frechet_linear if samples.features.shape[1] >= WIDE else frechet
    kept = resampled(samples.features, reference.moments).bootstrap(seed)
    value = frechet_distance(samples.moments, reference.moments)
    narrower = math.sqrt(len(samples.features) / samples.moments.number.item())
    return Metric(value, *(value + narrower * (end - kept.value) for end in kept[1:]))


def point_metrics(samples: Tensor, reference: Tensor, seed: int) -> dict[str, Metric]:
    """Return sliced Wasserstein, energy distance and MMD of samples (N, D) to reference points (M, D)."""
    statistics = {
        "sliced_wasserstein": sliced_wasserstein(samples, reference, seed),
        "energy_distance": energy_distance(samples, reference),
        "mmd": mmd(samples, reference),
    }
    return {metric_name(key, len(samples)): each.bootstrap(seed) for key, each in statistics.items()}


def memorization_metrics(space: str, distances: Tensor, of_val: Tensor, seed: int) -> dict[str, Metric]:
    """Return the ratio of nearest training distances and the fraction of copies, in a feature space.

    `distances` (N,) and `of_val` (M,) lead from samples and validation data to their nearest training samples. The
    ratio is that of medians: 1 for new data and 0 for copies. A copy is nearer than 95% of validation data.

    Raises ValueError if half of the validation data are copies themselves.

    Source: Meehan et al. 2020 (arXiv 2004.05675), without the partition into cells.
    """
    n, medians, middle = len(distances), median_of(distances), median_of(of_val).value
    if middle == 0:
        raise ValueError("half of the validation data are copies of training data: remove duplicates")
    ratio = Statistic(n, lambda counts: medians.of(counts) / middle).bootstrap(seed)
    copies = wilson(int((distances <= of_val.quantile(0.05)).sum()), n)
    return {metric_name(f"nearest_ratio_{space}", n): ratio, metric_name(f"copies_{space}", n): copies}
