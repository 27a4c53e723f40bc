"""The report on generated rows of a table: marginals, associations between columns, nearest neighbors."""

from pathlib import Path
from typing import Any

from torch import Tensor

from src.data.table import TableDataModule
from src.evaluation.quality import fetch_for_display
from src.metrics.features import Values
from src.metrics.tables import association_error, associations, closer_to_training, marginal_distances
from src.viz import table_plots

MAX_REAL = 5000
"""Rows of training and of validation data that the report compares."""


def table_report(folder: Path, data: TableDataModule, samples: Tensor, space: Values) -> dict[str, Any]:
    """Return metrics of generated rows, display values (N, K), against held-out rows, and save two pictures.

    The baseline of each distance is that of training rows, as many as there are samples or held-out rows. `space` has
    the distances between rows. Writes `columns.png` and `associations.png`.
    """
    val, train = (fetch_for_display(data, part[:MAX_REAL]).cpu() for part in (data.val_indices, data.train_indices))
    samples, baseline = samples.cpu(), train[: len(samples)]
    kinds = data.num_categories
    names = [column.name for column in data.encoders]
    categories = [
        ["False", "True"] if column.type == "boolean" else [*map(str, column.categories)] for column in data.encoders
    ]
    table_plots.marginals(samples, val, data.columns or names, categories).save(folder / "columns.png")
    ours, real, of_baseline = (associations(rows, kinds) for rows in (samples, val, baseline))
    if len(names) > 1:
        table_plots.association_matrices(ours, real, names).save(folder / "associations.png")
    distances = (marginal_distances(rows, val, kinds) for rows in (samples, baseline))
    nearer = closer_to_training(*(space(rows).features for rows in (samples, train, val)))
    return {
        "n": len(samples),
        "num_val": len(val),
        "columns": {
            name: {"distance": distance, "baseline": other}
            for name, distance, other in zip(names, *distances, strict=True)
        },
        "association_error": association_error(ours, real),
        "association_baseline": association_error(of_baseline, real),
        "closer_to_training": nearer._asdict(),
    }
