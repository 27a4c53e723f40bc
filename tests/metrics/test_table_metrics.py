"""Marginals, associations and neighbors of tables, against other implementations and known answers."""

import math

import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from src.metrics.features import Values
from src.metrics.tables import association_error, associations, closer_to_training, marginal_distances


def rows(count: int, seed: int) -> torch.Tensor:
    """Return a number, one that depends on it, a category that depends on it, and an independent category."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    x[:, 1] += x[:, 0]
    category = (x[:, 0] > 0).double() + (x[:, 0] > 1).double()
    other = torch.randint(4, (count,), generator=generator).double()
    return torch.cat([x, category[:, None], other[:, None]], dim=1)


KINDS = [0, 0, 3, 4]


def test_marginal_distances_equal_a_loop():
    a, b = rows(300, 0), rows(500, 1)
    found = marginal_distances(a, b, KINDS)
    for k in (0, 1):
        below = [[(each[:, k] <= value).double().mean() for value in torch.cat([a, b])[:, k]] for each in (a, b)]
        assert found[k] == pytest.approx(max(abs(p - q).item() for p, q in zip(*below, strict=True)), abs=1e-12)
    shares = [[float((each[:, 3] == k).double().mean()) for k in range(4)] for each in (a, b)]
    assert found[3] == pytest.approx(sum(abs(p - q) for p, q in zip(*shares, strict=True)) / 2)
    assert marginal_distances(a, a, KINDS) == [0, 0, 0, 0]


def test_associations_equal_other_formulas():
    x = rows(400, 2)
    found = associations(x, KINDS)
    assert found[0, 1] == pytest.approx(stats.pearsonr(x[:, 0], x[:, 1]).statistic)
    table = torch.zeros(3, 4)
    for a, b in x[:, 2:].long().tolist():
        table[a, b] += 1
    expected = table.sum(1, keepdim=True) * table.sum(0) / 400
    assert found[2, 3] == pytest.approx(math.sqrt(((table - expected) ** 2 / expected).sum() / 400 / 2))
    groups = [x[x[:, 2] == k, 1] for k in range(3)]
    f = stats.f_oneway(*groups).statistic
    assert found[1, 2] ** 2 == pytest.approx(f * 2 / (f * 2 + len(x) - 3))
    assert_close(found, found.T) and assert_close(found.diagonal(), torch.ones(4, dtype=torch.float64))
    assert association_error(found, found) == 0 and association_error(found[:1, :1], found[:1, :1]) == 0


def test_shuffled_columns_lose_their_associations():
    x = rows(2000, 3)
    shuffled = torch.stack([column[torch.randperm(2000)] for column in x.T], dim=1)
    assert association_error(associations(shuffled, KINDS), associations(x, KINDS)) > 0.2
    assert associations(torch.ones(5, 4), KINDS).equal(torch.eye(4, dtype=torch.float64))


def test_copies_are_closer_to_training():
    space = Values(torch.ones(4), KINDS)
    train, val, new = (space(rows(1500, seed)).features for seed in (4, 5, 6))
    assert closer_to_training(train[:500], train, val).value == 1
    low, high = closer_to_training(new, train, val)[1:]
    assert low < 0.5 < high


def test_different_categories_are_equally_far_apart():
    x = torch.tensor([[0.0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 2, 0]])
    features = Values(torch.full((4,), 2.0), KINDS)(x).features
    assert features.shape == (3, 9)
    assert torch.pdist(features).unique().numel() == 1
    assert Values(torch.ones(2), [0, 0]).fingerprint == Values(torch.ones(2)).fingerprint
