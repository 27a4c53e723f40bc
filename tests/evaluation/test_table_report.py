"""The report on generated rows of a table."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from src.viz.tables import markdown


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global TableDataModule, table_report
    from src.data.table import TableDataModule
    from src.evaluation.reports import table_report


def opened(path: Path) -> "TableDataModule":
    draw = np.random.default_rng(0)
    x = draw.normal(size=300)
    frame = pd.DataFrame({"x": x, "y": x + draw.normal(size=300), "sign": np.where(x > 0, "plus", "minus"), "b": x > 1})
    frame.to_csv(path / "a.csv", index=False)
    data = TableDataModule(str(path / "a.csv"), val_fraction=0.3)
    data.setup()
    return data


def test_copies_have_the_distances_of_training_data(tmp_path):
    data = opened(tmp_path)
    copies = data.postprocess(data.source.fetch(data.train_indices[: len(data.val_indices)]))
    report = table_report(tmp_path, data, copies)
    assert report["closer_to_training"]["value"] == 1  # as many training rows as held-out ones are compared
    assert list(report["columns"]) == ["x", "y", "sign", "b"]
    assert all(each["distance"] == each["baseline"] for each in report["columns"].values())
    assert report["association_error"] == report["association_baseline"] < 0.2
    for name in ("columns.png", "associations.png"):
        assert (tmp_path / name).stat().st_size > 1000
    table = markdown({"table": report})
    assert "| sign |" in table and f"{report['num_val']} held-out rows" in table


def test_shuffled_columns_have_wrong_associations_only(tmp_path):
    data = opened(tmp_path)
    rows = data.postprocess(data.source.fetch(data.train_indices))
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.stack([column[torch.randperm(len(rows), generator=generator)] for column in rows.T], dim=1)
    report = table_report(tmp_path, data, shuffled)
    assert all(each["distance"] == each["baseline"] for each in report["columns"].values())
    assert report["association_error"] > 3 * report["association_baseline"]
