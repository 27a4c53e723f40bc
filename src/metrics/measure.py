"""All metrics of a set of samples, by name."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from src.metrics.collected import Collected
from src.metrics.confidence import UNIT_INTERVAL, Metric, Statistic, median_of, metric_name, wilson
from src.metrics.frechet import frechet, frechet_distance, frechet_linear
from src.metrics.kernels import energy_distance, kid, mmd
from src.metrics.neighbors import manifolds

WIDE = 512  # number of features from which the interval of the Fréchet distance is linearized


def image_metrics(extractor: str, samples: Collected, reference: Collected, seed: int) -> dict[str, Metric]:
    """Return Fréchet and kernel distance, precision, recall, density, coverage, and metrics of class probabilities.

    The names are fid, kid and inception_score for `inception` only; otherwise fd, kd and class_score with the
    extractor, such as `fd_classifier_1k`. The first is the headline. Classes are compared with predictions for
    the reference, so that errors of the classifier cancel.
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
    if extractor == "efficientnet":  # its headline; the Fréchet distance of 1,280 features is biased for few samples
        metrics = {"kd": metrics.pop("kd"), **metrics}
    return {
        metric_name(known.get(key, f"{key}_{extractor}"), numbers.get(key, len(x))): metric
        for key, metric in metrics.items()
    }


def frechet_metric(samples: Collected, reference: Collected, seed: int) -> Metric:
    """Return the Fréchet distance of all samples, and the interval of the kept features, narrowed to all samples."""
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


def inception_score(probabilities: Tensor, splits: int = 10) -> Statistic:
    """Return exp E KL(p(class | x) || p(class)) for probabilities (N, K), averaged over `splits` parts: in [1, K].

    The parts are consecutive, and their sizes differ by at most one sample.

    Source: Salimans et al. 2016 (arXiv 1606.03498), section 4.
    """
    n = len(probabilities)
    p = probabilities.double()
    entropy = torch.special.entr(p).sum(1)
    parts = [slice(i * n // splits, (i + 1) * n // splits) for i in range(splits)]

    def part_score(counts: Tensor, part: slice) -> Tensor:
        share = counts[:, part] / counts[:, part].sum(1, keepdim=True).clamp(min=1)
        information: Tensor = torch.special.entr(share @ p[part]).sum(1) - share @ entropy[part]
        return information.exp()

    return Statistic(n, lambda counts: torch.stack([part_score(counts.to(p), part) for part in parts]).mean(0))


def total_variation(labels: Tensor, reference: Tensor) -> Statistic:
    """Return the total variation distance between labels (N,) and the data's class counts (K,): in [0, 1]."""
    one_hot = F.one_hot(labels, len(reference)).double()
    expected = reference.to(one_hot) / reference.sum()

    def of(counts: Tensor) -> Tensor:
        counts = counts.to(one_hot)
        return ((counts @ one_hot / counts.sum(1, keepdim=True)) - expected).abs().sum(1) / 2

    return Statistic(len(labels), of, UNIT_INTERVAL)


def sliced_wasserstein(x: Tensor, y: Tensor, seed: int, directions: int = 128) -> Statistic:
    """Return the sliced 2-Wasserstein distance of samples x (N, F) to y (M, F), in units of the data.

    It is the root mean square over random directions of the distance along each, which is exact for any N and M.

    Source: Bonneel et al. 2015.
    """
    generator = torch.Generator().manual_seed(seed)
    projections = torch.randn(x.shape[1], directions, generator=generator, dtype=torch.float64).to(x.device)
    projections /= projections.norm(dim=0)
    projected, order = (x.double() @ projections).T.sort(dim=1)  # (directions, N)
    target = (y.double() @ projections).T.sort(dim=1).values
    ours, theirs, share = matched_quantiles(len(x), len(y), x.device)

    def distance(counts: Tensor) -> Tensor:
        taken = projected.flatten().repeat_interleave(counts.long()[order].flatten()).view_as(projected)
        return ((taken[:, ours] - target[:, theirs]).square() @ share).mean().sqrt()

    return Statistic(len(x), lambda counts: torch.stack([distance(row.to(x.device)) for row in counts]))


def matched_quantiles(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matched indices of n and of m sorted values, and the mass (float64) of each match."""
    ends = torch.cat([torch.arange(1, n + 1, device=device) * m, torch.arange(1, m + 1, device=device) * n])
    edges = ends.unique()  # type: ignore[no-untyped-call]
    widths = edges.diff(prepend=edges.new_zeros(1))  # in units of 1 / (n m)
    return (edges - 1) // m, (edges - 1) // n, widths.double() / (n * m)
