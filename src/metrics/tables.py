"""Compare generated rows of a table with real ones: marginals, associations between columns, nearest neighbors.

Rows are display values (N, K). `num_categories` has one entry per column: the number of categories if the values are
category indices, and 0 if they are numbers.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import pandas as pd
import torch
from torch import Tensor

from src.metrics.confidence import Metric, wilson
from src.metrics.neighbors import nearest_neighbors


def marginal_distances(rows: Tensor, reference: Tensor, num_categories: Sequence[int]) -> list[float]:
    """Return the distance in [0, 1] between each column (N, K) and that of the reference (M, K).

    It is the Kolmogorov-Smirnov statistic of numbers, and the total variation distance of categories.
    """
    from scipy.stats import ks_2samp

    distances = []
    for x, y, count in zip(rows.double().T, reference.double().T, num_categories, strict=True):
        if count:
            shares = [each.long().bincount(minlength=count).double() / len(each) for each in (x, y)]
            distances.append(0.5 * float((shares[0] - shares[1]).abs().sum()))
        else:
            distances.append(float(ks_2samp(x, y, method="asymp").statistic))
    return distances


def associations(rows: Tensor, num_categories: Sequence[int]) -> Tensor:
    """Return the association of each pair of columns of rows (N, K), (K, K) float64 with 1 on the diagonal.

    It is Pearson's correlation of two numbers, in [-1, 1]; the correlation ratio of a number and a category, in [0, 1];
    and Cramér's V of two categories, in [0, 1]. That of a constant column is 0.
    """
    from scipy.stats import contingency

    columns = [pd.Series(column) for column in rows.double().T.numpy()]
    matrix = torch.eye(len(columns), dtype=torch.float64)
    for i, j in combinations(range(len(columns)), 2):
        x, y = columns[i], columns[j]
        if num_categories[i] and num_categories[j]:
            table = contingency.crosstab(x, y).count
            value = contingency.association(table, method="cramer") if min(table.shape) > 1 else 0.0
        elif num_categories[i]:
            value = y.corr(y.groupby(x).transform("mean"))
        elif num_categories[j]:
            value = x.corr(x.groupby(y).transform("mean"))
        else:
            value = x.corr(y)
        matrix[i, j] = matrix[j, i] = 0.0 if math.isnan(value) else value
    return matrix


def association_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the mean absolute difference of two `associations` (K, K) over all pairs of columns; 0 for K = 1."""
    pairs = torch.ones_like(ours).tril(-1).bool()
    return float((ours - theirs).abs()[pairs].mean()) if pairs.any() else 0.0


def closer_to_training(samples: Tensor, train: Tensor, held_out: Tensor) -> Metric:
    """Return the share of samples (N, F) that are nearer to training than to held-out data, with its 95% interval.

    As many training samples as held-out ones are compared, so it is 0.5 for new samples and 1 for copies. Ties count
    half.
    """
    count = min(len(train), len(held_out))
    ours, theirs = (nearest_neighbors(samples, each[:count]).distances for each in (train, held_out))
    wins = float((ours < theirs).sum()) + 0.5 * float((ours == theirs).sum())
    return wilson(round(wins), len(samples))
