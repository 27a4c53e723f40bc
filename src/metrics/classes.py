"""What the class probabilities of samples say: the Inception score, and the classes against those of the data."""

from typing import NamedTuple

import torch
from scipy.stats import chi2_contingency
from torch import Tensor
from torch.nn import functional as F

from src.metrics.confidence import SHARE, Statistic


class ChiSquare(NamedTuple):
    """Pearson's statistic, its degrees of freedom, and the chance of one at least as large if nothing differs."""

    statistic: float
    freedom: int
    p: float


def inception_score(probabilities: Tensor, splits: int = 10) -> Statistic:
    """exp E KL(p(class | x) || p(class)) of probabilities (N, K), the mean over `splits` parts of the samples.

    Salimans et al. 2016, section 4. Between 1 and K; the parts are consecutive, and differ by one sample at most.
    """
    n = len(probabilities)
    if not 1 <= splits <= n:
        raise ValueError(f"{n} samples do not split into {splits} parts: splits must lie in [1, {n}]")
    p = probabilities.double()
    entropy = torch.special.entr(p).sum(1)
    parts = [slice(i * n // splits, (i + 1) * n // splits) for i in range(splits)]

    def part_score(counts: Tensor, part: slice) -> Tensor:
        share = counts[:, part] / counts[:, part].sum(1, keepdim=True).clamp(min=1)
        information: Tensor = torch.special.entr(share @ p[part]).sum(1) - share @ entropy[part]
        return information.exp()

    return Statistic(n, lambda counts: torch.stack([part_score(counts.to(p), part) for part in parts]).mean(0))


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """How many of the labels (N,) are each of `classes`: (classes,)."""
    if labels.numel() and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"labels must lie in [0, {classes - 1}], got up to {labels.max()}: raise the number of classes"
        )
    return torch.bincount(labels, minlength=classes)


def total_variation(labels: Tensor, reference: Tensor) -> Statistic:
    """Half the summed difference of the classes' shares: labels (N,) against the data's counts (K,). In [0, 1]."""
    counts_of = class_counts(labels, len(reference))
    one_hot = F.one_hot(labels, len(counts_of)).double()
    expected = reference.to(one_hot) / reference.sum()

    def of(counts: Tensor) -> Tensor:
        counts = counts.to(one_hot)
        return ((counts @ one_hot / counts.sum(1, keepdim=True)) - expected).abs().sum(1) / 2

    return Statistic(len(labels), of, SHARE)


def chi_square(counts: Tensor, reference: Tensor) -> ChiSquare:
    """Pearson's test that samples with class counts (K,) and data with theirs (K,) share one distribution."""
    table = torch.stack([counts.cpu(), reference.cpu()]).double()
    table = table[:, table.sum(0) > 0]
    if not table.sum(1).all():
        raise ValueError(f"needs samples on both sides, got {table.sum(1).tolist()}: raise n")
    statistic, p, freedom, _ = chi2_contingency(table.numpy(), correction=False)
    return ChiSquare(float(statistic), int(freedom), float(p))
