"""Summarize columns of numbers and categories before training, and find rows that nearly equal others."""

from collections.abc import Sequence

import numpy as np

from src.data.columns import Column, Floats
from src.errors import counted, first_names

OUTLIER = 10
"""Number of interquartile ranges beyond the quartiles from which a value is an outlier."""
TOLERANCE = 1e-3
"""Difference in each column, in standard deviations, below which two rows are nearly equal."""


def count_near_rows(val: Floats, train: Floats) -> int:
    """Return how many rows of `val` (M, D) nearly equal a row of `train` (N, D), both standardized."""
    from scipy.spatial import cKDTree

    distances, _ = cKDTree(train).query(val, p=np.inf, distance_upper_bound=TOLERANCE)
    return int(np.isfinite(distances).sum())


def summarize_columns(
    columns: Sequence[Column], display: Floats, encoded: Floats, missing: Sequence[int] = (0,)
) -> tuple[str, list[str]]:
    """Return a table of the columns as text, and the names of those with outliers after their transforms.

    `display` (N, K) and `encoded` (N, D) are the values of the columns (`Column`), `missing` counts their other cells.
    """
    import pandas as pd

    inputs = encoded[:, np.cumsum([0, *(column.width for column in columns)])[:-1]]
    low, high = np.quantile(inputs, [0.25, 0.75], axis=0)
    reach = OUTLIER * np.where(high > low, high - low, inputs.std(axis=0))  # of a column of mostly one value: its std
    outliers = ((inputs < low - reach) | (inputs > high + reach)).sum(axis=0)
    rows, names = [], []
    for k, column in enumerate(columns):
        row = {"column": column.name, "type": column.type} | ({"missing": missing[k]} if any(missing) else {})
        if categories := column.category_names:
            counts = np.bincount(display[:, k].astype(int), minlength=len(categories))
            row["notes"] = first_names([f"{counts[i] / len(display):.0%} {categories[i]}" for i in np.argsort(-counts)])
        else:
            cells = column.restore(np.quantile(display[:, k], [0, 0.5, 1], method="nearest")).tolist()
            texts = [f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells]
            row |= dict(zip(("min", "median", "max"), texts, strict=True))
            row["notes"] = "constant" if cells[0] == cells[2] else ""
            if outliers[k]:
                names.append(column.name)
                row["notes"] = counted(int(outliers[k]), "outlier")
        rows.append(row)
    text = pd.DataFrame(rows).fillna("").to_string(index=False, max_rows=100)
    return text + (f"\nOutliers lie {OUTLIER} interquartile ranges beyond the quartiles" if names else ""), names
