"""All figures of a set of samples against a reference, by name: what a command shows as a table."""

import math

from torch import Tensor

from src.metrics.classes import inception_score, total_variation
from src.metrics.collected import Collected
from src.metrics.confidence import Metric, metric_name, wilson
from src.metrics.frechet import frechet, frechet_distance, frechet_linear
from src.metrics.kernels import energy_distance, kid, mmd
from src.metrics.memorization import Memorization
from src.metrics.neighbors import manifolds
from src.metrics.transport import sliced_wasserstein

WIDE = 512
"""Features from here on have the Fréchet distance's interval by its linear form."""


def image_metrics(
    extractor: str, samples: Collected, reference: Collected, seed: int, k: int = 5, replicates: int = 200
) -> dict[str, Metric]:
    """Fréchet and kernel distance, precision, recall, density, coverage; with probabilities also those of classes.

    Over `inception` alone are they called fid, kid and inception_score; else fd, kd and class_score, and every name
    has the extractor in it: `fd_classifier_1k`. Classes are compared with those that the extractor sees in the
    reference, so that its mistakes cancel.
    """
    figures = {"fd": frechet_metric(samples, reference, seed, replicates)}
    x, y = samples.features, reference.features
    statistics = {"kd": kid(x, y), **manifolds(x, y, k)._asdict()}
    if samples.probabilities is not None and reference.probabilities is not None:
        classes = reference.probabilities.argmax(1).bincount(minlength=reference.probabilities.shape[1])
        statistics["class_score"] = inception_score(samples.probabilities, splits=min(10, len(x)))
        statistics["class_variation"] = total_variation(samples.probabilities.argmax(1), classes)
    figures |= {key: each.bootstrap(seed, replicates) for key, each in statistics.items()}
    known = {"fd": "fid", "kd": "kid", "class_score": "inception_score"} if extractor == "inception" else {}
    numbers = {"fd": int(samples.moments.number)}
    return {
        metric_name(known.get(key, f"{key}_{extractor}"), numbers.get(key, len(x))): figure
        for key, figure in figures.items()
    }


def frechet_metric(samples: Collected, reference: Collected, seed: int, replicates: int = 200) -> Metric:
    """The Fréchet distance of all samples; its interval by resampling those that were kept.

    Where more came by than were kept, the interval shrinks by the root of their ratio.
    """
    resampled = frechet_linear if samples.features.shape[1] >= WIDE else frechet
    kept = resampled(samples.features, reference.moments).bootstrap(seed, replicates)
    value = frechet_distance(samples.moments, reference.moments)
    narrower = math.sqrt(len(samples.features) / samples.moments.number.item())
    return Metric(value, *(value + narrower * (end - kept.value) for end in kept[1:]))


def point_metrics(samples: Tensor, reference: Tensor, seed: int, replicates: int = 200) -> dict[str, Metric]:
    """Sliced Wasserstein, energy distance and MMD of samples (N, D) to reference points (M, D)."""
    statistics = {
        "sliced_wasserstein": sliced_wasserstein(samples, reference, seed),
        "energy_distance": energy_distance(samples, reference),
        "mmd": mmd(samples, reference),
    }
    return {metric_name(key, len(samples)): each.bootstrap(seed, replicates) for key, each in statistics.items()}


def memorization_metrics(space: str, found: Memorization, seed: int, replicates: int = 200) -> dict[str, Metric]:
    """The ratio of nearest training distances and the share of copies, in the named feature space."""
    n = len(found.distances)
    ratio = found.ratio.bootstrap(seed, replicates)
    copies = wilson(round(found.copies.bootstrap(seed, 2).value * n), n)
    return {metric_name(f"nearest_ratio_{space}", n): ratio, metric_name(f"copies_{space}", n): copies}
