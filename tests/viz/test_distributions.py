"""Plots of tables."""

import numpy as np
import pytest
import torch

from src.viz.distributions import association_matrices, marginals
from src.viz.figures import histogram_bins


@pytest.mark.parametrize("offset", [0.0, 1e9, -1e17])
def test_bins_hold_all_values_and_differ(offset):
    for values in (offset + np.arange(5) * 1e-3, np.full(3, offset), np.array([np.nan, offset])):
        edges = histogram_bins(values)
        finite = values[np.isfinite(values)]
        assert (np.diff(edges) > 0).all() and edges[0] <= finite.min() and finite.max() <= edges[-1]


def test_numbers_and_categories_are_drawn():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 3, generator=generator, dtype=torch.float64)
    rows[:, 1] = torch.randint(3, (100,), generator=generator)
    rows[0, 2] = torch.nan
    picture = marginals(rows, rows + torch.tensor([1.0, 0, 1e9]), ["a", "b", "c"], [[], ["x", "y", "z"], []])
    assert len(set(picture.convert("L").tobytes())) > 20
    matrix = torch.eye(3, dtype=torch.float64)
    assert association_matrices(matrix, -matrix, ["a", "b", "c"]).width > 300
