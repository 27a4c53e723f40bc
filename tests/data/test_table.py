"""Rows of a CSV file as samples: standardization, covariates, classes, and errors that name the cell."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from src.config.resume import check_saved
from src.sample import sample
from src.train import train
from src.training.checkpoints import read_checkpoint
from src.viz import charts, images
from tests.conftest import compose


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global TableDataModule
    from src.data.table import TableDataModule


ROWS = 40


def table(path: Path) -> tuple[Path, np.ndarray]:
    """Write columns height, code (texts), weight, day, kind; return the path and height, weight, day."""
    draw = np.random.default_rng(0)
    numbers = np.stack([170 + 10 * draw.normal(size=ROWS), 1e9 + 5 * draw.normal(size=ROWS), np.arange(ROWS) % 7], 1)
    lines = [f"{a!r},x{k},{b!r},{c:g},{k % 3 * 5 + 5}" for k, (a, b, c) in enumerate(numbers.tolist())]
    path.write_text("\n".join([" height , code,weight,day,kind", *lines]))
    return path, numbers


def opened(path: Path, **settings) -> TableDataModule:
    data = TableDataModule(str(path), **{"batch_size": 4, "val_fraction": 0.25, **settings})
    data.setup()
    return data


def refused(path: Path, error_type: type[Exception] = ValueError, **settings) -> str:
    with pytest.raises(error_type) as error:
        opened(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_postprocess_undoes_standardization(tmp_path):
    """Samples have mean 0 and std 1 over the table, in its order, even where numbers are large."""
    path, numbers = table(tmp_path / "a.csv")
    data = opened(path, columns=["weight", "height"])
    assert data.shape == (2,) and data.num_values is None
    x = data.source.fetch(range(ROWS))
    assert x.dtype == torch.float32 and x.shape == (ROWS, 2)
    wanted = numbers[:, [1, 0]]
    assert_close(x.double().numpy(), (wanted - wanted.mean(0)) / wanted.std(0), rtol=0, atol=2e-6)
    assert_close(data.postprocess(x).double().numpy()[:, 1], wanted[:, 1], rtol=1e-6, atol=0)
    assert_close(data.postprocess(x.double()).numpy()[:, 0], wanted[:, 0], rtol=0, atol=1e-5)
    assert_close(data.examples(3), x[data.val_indices[:3]], rtol=0, atol=0)


def test_columns_default_to_unused_numeric_columns(tmp_path):
    path, numbers = table(tmp_path / "a.csv")
    assert opened(path).columns == ["height", "weight", "day", "kind"]
    data = opened(path, condition_columns=["day"], label="kind")
    assert data.columns == ["height", "weight"]
    assert data.source.covariates.names == ["day"]
    assert_close(data.source.covariates.values.numpy(), numbers[:, 2:], rtol=0, atol=0)
    assert data.source.labels.classes == ["5", "10", "15"]  # sorted as numbers
    assert data.source.labels.targets.tolist() == [k % 3 for k in range(ROWS)]
    assert opened(path, label="code").source.labels.targets.tolist() == [
        sorted(f"x{k}" for k in range(ROWS)).index(f"x{k}") for k in range(ROWS)
    ]


def test_inferred_settings_replace_the_file(tmp_path):
    """The file is opened only when its samples are needed."""
    path, _ = table(tmp_path / "a.csv")
    data = opened(path, condition_columns=["day"], label="kind")
    again = TableDataModule(None, condition_columns=["day"], label="kind", batch_size=4, **data.inferred)
    assert again.shape == data.shape
    x = torch.randn(5, 2)
    assert_close(again.postprocess(x), data.postprocess(x), rtol=0, atol=0)
    assert again.inferred == data.inferred
    with pytest.raises(FileNotFoundError, match=r"data\.path"):
        again.setup()


def test_a_run_stores_the_inferred_settings(tmp_path):
    """The network's width follows the table, and the stored settings open without the file."""
    from hydra.utils import instantiate

    from src.runs.components import instantiate_node
    from src.runs.resolve import resolve

    path, numbers = table(tmp_path / "a.csv")
    cfg = compose("train", "data=table", f"data.path='{path}'", "data.condition_columns=[day]", "run_dir=x")
    data = instantiate_node(cfg.data)
    cfg = resolve(cfg, data, None)
    assert cfg.model.features == 3
    assert list(cfg.data.columns) == ["height", "weight", "kind"]
    assert cfg.data.mean[0] == pytest.approx(numbers[:, 0].mean(), rel=1e-12)
    path.unlink()
    assert instantiate(cfg.data).shape == (3,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": ["hight"]}, "data.columns: 'hight' is not a column"),
        ({"columns": ["hight"]}, "height"),
        ({"condition_columns": ["tag"]}, "data.condition_columns: 'tag'"),
        ({"label": "kinds"}, "did you mean kind"),
        (
            {"columns": ["height"], "condition_columns": ["height"]},
            "'height' is in both data.columns and data.condition_columns",
        ),
        ({"columns": ["height", "height"]}, "'height' is in data.columns twice"),
        ({"condition_columns": ["day"], "label": "day"}, "both data.condition_columns and data.label"),
        ({"columns": ["code"]}, "line 2: column 'code' is 'x0'"),
        ({"condition_columns": ["height", "weight", "day", "kind"]}, "no column of numbers among code"),
        (
            {"columns": ["height"], "mean": [1.0, 2.0], "std": [1.0]},
            "data.mean and data.std must have 1 numbers",
        ),
    ],
)
def test_invalid_columns_raise(tmp_path, settings, message):
    assert message in refused(table(tmp_path / "a.csv")[0], **settings)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("a,b\n1,2\n3,\n5,6\n", "line 3: column 'b' is ''"),
        ("a,b\n1,2\n3,nan\n5,6\n", "line 3: column 'b' is 'nan'"),
        ("a,b\n1,2\n\n3,n/a\n5,6\n", "line 4: column 'b' is 'n/a'"),
        ("a,b\n1,2\n3,inf\n5,6\n", "'inf'"),
        ("a,b\n1,2\n3,2.0\n5,2\n", "column 'b' is 2 in all rows"),
        ("a,b\n1,2\n3\n5,6\n", "line 3: 1 cells under 2 names"),
        ("a,a\n1,2\n3,4\n", "several columns named 'a'"),
        ("a,b\n", "has 1 rows"),
        ("", "has 0 rows"),
        ('a,b\n1,"2\n', "is not a CSV file"),
    ],
)
def test_invalid_cells_raise_with_line_and_column(tmp_path, contents, message):
    (tmp_path / "a.csv").write_text(contents)
    assert message in refused(tmp_path / "a.csv")


def test_empty_labels_and_missing_files_raise(tmp_path):
    (tmp_path / "a.csv").write_text("a,k\n1,x\n2,\n3,x\n4,y\n")
    assert "line 3: the label 'k' is empty" in refused(tmp_path / "a.csv", label="k")
    assert str(tmp_path / "b.csv") in refused(tmp_path / "b.csv", FileNotFoundError)


def test_a_stored_path_of_a_table_is_accepted(tmp_path):
    """Resuming reads the file, as it reads images from data.root."""
    check_saved(tmp_path, ["data=table", "data.path=/some/where/a.csv"])


def test_a_resumed_run_keeps_its_mean_and_std(tmp_path):
    """Although the table has grown. Conditions are given by numbers or by lines of a file."""
    path, _ = table(tmp_path / "t.csv")
    folder = tmp_path / "run"
    settings = [
        *("data=table", f"data.path='{path}'", "data.columns=[height,weight,day]", "data.batch_size=8"),
        *(
            "model=mlp",
            "model.hidden_size=8",
            "model.num_res_blocks=1",
            "trainer.accelerator=cpu",
            "validate_every=3",
        ),
        *("checkpoint_every=100", "sampler.steps=2", "callbacks.samples.num_samples=4", "neighbors.num_samples=0"),
        *("callbacks.progress.refresh_rate=0", f"run_dir='{folder}'"),
    ]
    given = [
        *settings[:2],
        "data.columns=[height,weight]",
        "data.condition_columns=[day]",
        "conditioning=continuous",
        *settings[3:],
    ]
    train(compose("train", *given, "trainer.max_steps=3"))
    before = read_checkpoint(folder / "checkpoints" / "last.ckpt")["hyper_parameters"]
    with path.open("a") as file:
        file.write("\n200,x,2e9,6,5\n")
    train(compose("train", *given, "trainer.max_steps=6", f"resume='{folder}'"))
    after = read_checkpoint(folder / "checkpoints" / "last.ckpt")["hyper_parameters"]
    for node in ("mean", "std", "columns"):
        assert before["data"][node] == after["data"][node]
    assert before["conditioning"] == after["conditioning"]
    (tmp_path / "conditions.txt").write_text("3\n6.5\n")
    ask = "device=cpu", "n=4", f"run='{folder}'"
    by_file = sample(compose("sample", *ask, f"cond='{tmp_path / 'conditions.txt'}'", f"run_dir='{tmp_path / 'a'}'"))
    by_number = sample(compose("sample", *ask, "cond=[3,6.5]", f"run_dir='{tmp_path / 'b'}'"))
    drawn = [np.load(each / "samples.npz")["arr_0"] for each in (by_file, by_number)]
    assert (drawn[0] == drawn[1]).all() and np.isfinite(drawn[0]).all()
    assert (by_file / "conditions.txt").read_text().split() == ["3", "3", "6.5", "6.5"]
    head, *lines = csv.reader((by_file / "samples.csv").open(newline=""))
    assert head == ["height", "weight"]
    assert (np.array(lines, np.float32) == drawn[0]).all()


@pytest.mark.parametrize("features", [1, 2, 6])
def test_tables_of_any_width_are_drawn(features):
    """Two columns as a scatter plot in their units; more as pairs of the first four."""
    units = torch.tensor([1.0, 300.0, 1e-3, 5.0, 7.0, 9.0])[:features]
    x = torch.randn(200, features, generator=torch.Generator().manual_seed(0)) * units + 20 * units
    picture = images.draw_samples(x, real=x + units)
    assert len(set(picture.convert("L").tobytes())) > 20
    assert images.draw_trajectory([x, x]).width > 0
    if features > 1:
        (left, right), (bottom, top) = charts.axis_limits(x)
        inside = (x[:, 0] > left) & (x[:, 0] < right) & (x[:, 1] > bottom) & (x[:, 1] < top)
        assert inside.float().mean() > 0.98
        assert right - left < 10 * units[0] and top - bottom < 10 * units[1]
    assert images.draw_samples(x, titles=["a"] * 100 + ["b"] * 100).width > 0


def test_points_are_drawn_on_a_centered_square():
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    across, up = charts.axis_limits(x)
    assert across == up and across[0] == -across[1]
    assert charts.axis_limits(torch.full((3, 2), torch.nan)) == ((-1, 1), (-1, 1))
    assert charts.axis_limits(torch.ones(3, 2))[0] == (0, 2)
