"""Compare generated rows of a table with real ones: marginals, associations between columns, nearest neighbors.

Rows are display values (N, K). `num_categories` has one entry per column: the number of categories if the values are
category indices, and 0 if they are numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from src.metrics.confidence import Metric, wilson
from src.metrics.neighbors import nearest_neighbors


def marginal_distances(rows: Tensor, reference: Tensor, num_categories: Sequence[int]) -> list[float]:
    """Return the distance in [0, 1] between each column (N, K) and that of the reference (M, K).

    It is the Kolmogorov-Smirnov statistic of numbers, and the total variation distance of categories.
    """
    distances = []
    for x, y, count in zip(rows.double().T, reference.double().T, num_categories, strict=True):
        if count:
            shares = [each.long().bincount(minlength=count).double() / len(each) for each in (x, y)]
            distances.append(0.5 * float((shares[0] - shares[1]).abs().sum()))
        else:
            grid = torch.cat([x, y]).sort().values
            below = [torch.searchsorted(each.sort().values, grid, right=True).double() / len(each) for each in (x, y)]
            distances.append(float((below[0] - below[1]).abs().max()))
    return distances


def associations(rows: Tensor, num_categories: Sequence[int]) -> Tensor:
    """Return the association of each pair of columns of rows (N, K), (K, K) float64 with 1 on the diagonal.

    It is Pearson's correlation of two numbers, in [-1, 1]; the correlation ratio of a number and a category, in [0, 1];
    and Cramér's V of two categories, in [0, 1]. That of a constant column is 0.
    """
    x, count = rows.double(), rows.shape[1]
    matrix = torch.eye(count, dtype=torch.float64)
    for i in range(count):
        for j in range(i):
            kinds = num_categories[i], num_categories[j]
            if not any(kinds):
                value = _pearson(x[:, i], x[:, j])
            elif all(kinds):
                value = _cramers_v(x[:, i].long(), x[:, j].long(), *kinds)
            elif kinds[0]:
                value = _correlation_ratio(x[:, i].long(), x[:, j], kinds[0])
            else:
                value = _correlation_ratio(x[:, j].long(), x[:, i], kinds[1])
            matrix[i, j] = matrix[j, i] = value
    return matrix


def association_error(rows: Tensor, reference: Tensor, num_categories: Sequence[int]) -> float:
    """Return the mean absolute difference of the associations of all pairs of columns; 0 for one column."""
    difference = (associations(rows, num_categories) - associations(reference, num_categories)).abs()
    pairs = torch.ones_like(difference).tril(-1).bool()
    return float(difference[pairs].mean()) if pairs.any() else 0.0


def closer_to_training(samples: Tensor, train: Tensor, held_out: Tensor) -> Metric:
    """Return the share of samples (N, F) that are nearer to training than to held-out data, with its 95% interval.

    As many training samples as held-out ones are compared, so it is 0.5 for new samples and 1 for copies. Ties count
    half.
    """
    count = min(len(train), len(held_out))
    ours, theirs = (nearest_neighbors(samples, each[:count]).distances for each in (train, held_out))
    wins = float((ours < theirs).sum()) + 0.5 * float((ours == theirs).sum())
    return wilson(round(wins), len(samples))


def _pearson(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else 0.0


def _correlation_ratio(classes: Tensor, y: Tensor, count: int) -> float:
    """Return the root of the share of the variance of y (N,) that lies between the classes (N,)."""
    y = y - y.mean()
    total = y.square().sum()
    sizes = classes.bincount(minlength=count).double()
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, classes, y)
    between = (sums.square() / sizes.clamp(min=1)).sum()
    return float((between / total).clamp(0, 1).sqrt()) if total > 0 else 0.0


def _cramers_v(x: Tensor, y: Tensor, rows: int, columns: int) -> float:
    """Return Cramér's V of two columns of classes (N,), over the classes that occur."""
    table = (x * columns + y).bincount(minlength=rows * columns).view(rows, columns).double()
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    if min(table.shape) < 2:
        return 0.0
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    chi2 = ((table - expected).square() / expected).sum()
    return float((chi2 / table.sum() / (min(table.shape) - 1)).sqrt())
