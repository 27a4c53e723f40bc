"""Metrics of class probabilities: the Inception score, and class frequencies compared with the data."""

import torch
from torch import Tensor
from torch.nn import functional as F

from src.metrics.confidence import UNIT_INTERVAL, Statistic


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
