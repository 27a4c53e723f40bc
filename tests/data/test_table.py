"""Rows of a table as samples: types, encodings, covariates, classes, and errors that name the cell."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from src.config.resume import check_saved
from src.sample import sample
from src.train import train
from src.training.checkpoints import exportable_settings, read_checkpoint
from src.viz import distributions, images
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
    assert opened(path).left_out == {"code": "id like 'x0'"}
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
    assert "conditions: 1 number (day)" in data.summary
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

    from src.runs.nodes import instantiate_node
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
        ({"columns": ["code"]}, "line 2: column 'code'"),
        ({"columns": ["code"]}, 'add "data.types={code: category}"'),
        ({"condition_columns": ["code"]}, "line 2: column 'code' is 'x0'"),
        ({"condition_columns": ["height", "weight", "day", "kind"]}, "no column to model among code"),
        ({"types": {"code": "words"}}, "data.types has 'words'"),
        ({"types": {"cod": "text"}}, "data.types: 'cod' is not a column"),
        ({"types": {"code": "number"}}, "line 2: column 'code' is 'x0', not a finite number"),
        ({"types": {"code": "date"}}, "line 2: column 'code' is 'x0', not a date"),
        ({"transforms": {"day": "sqrt"}}, "data.transforms has 'sqrt'"),
        ({"transforms": {"code": "log"}, "types": {"code": "category"}}, "needs numbers"),
        ({"categories": "embedding"}, "data.categories=embedding"),
        ({"missing": "mean"}, "data.missing=mean"),
        ({"decimal": ";"}, "data.decimal=;"),
        ({"separator": "comma "}, "data.separator=comma "),
        ({"encoders": "{}"}, "data.encoders"),
        ({"columns": ["height"], "types": {"height": "integer"}}, "not an integer"),
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
        ("a,b\n1,2\n3,4\n5,x\n7,6\n", "line 4: column 'b' is 'x'"),
        ("a,b\n1,2\n3\n5,6\n", "line 3: 1 cells under 2 names"),
        ("a,a\n1,2\n3,4\n", "several columns named 'a'"),
        ("a,b\n", "has 1 rows"),
        ("", "has 0 rows"),
        ('a,b\n1,"2\n', "is not a CSV file"),
        ("a,b\n1,2\n1,2\n", "a (constant '1'), b (constant '2')"),
        ("a,b\n1,0e-310\n3,4e-310\n5,1e-310\n", "line 2: column 'b' is '0e-310', which has no finite code"),
        ("a,b\n1,1e300\n3,4e300\n5,-2e300\n", "line 2: column 'b' is '1e300', which has no finite code"),
    ],
)
def test_invalid_cells_raise_with_line_and_column(tmp_path, contents, message):
    (tmp_path / "a.csv").write_text(contents)
    assert message in refused(tmp_path / "a.csv")


def test_empty_labels_and_missing_files_raise(tmp_path):
    (tmp_path / "a.csv").write_text("a,k\n1,x\n7,\n3,x\n4,y\n")
    message = refused(tmp_path / "a.csv", label="k")
    assert "line 3: the label 'k' is empty" in message and "data.missing=drop" in message
    assert opened(tmp_path / "a.csv", label="k", missing="drop").source.labels.classes == ["x", "y"]
    assert str(tmp_path / "b.csv") in refused(tmp_path / "b.csv", FileNotFoundError)


def test_a_stored_path_of_a_table_is_accepted(tmp_path):
    """Resuming reads the file, as it reads images from data.root."""
    check_saved(tmp_path, ["data=table", "data.path=/some/where/a.csv", "data.types={day: %d/%m/%Y}"])


def test_stored_categories_are_exported():
    """Although they may look like paths."""
    settings = {"data": {"encoders": '{"categories":["a/b"]}', "path": "/some/where/a.csv"}}
    exported, cleared = exportable_settings(settings)
    assert exported["data"] == {**settings["data"], "path": None} and cleared == ["data.path"]


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
        *("checkpoint_every=100", "sampler.steps=2", "callbacks.samples=null", "neighbors.num_samples=0"),
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
    for node in ("mean", "std", "columns", "encoders"):
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
    assert (np.array(lines, np.float64) == drawn[0]).all()


@pytest.mark.parametrize("features", [1, 2, 6])
def test_tables_of_any_width_are_drawn(features):
    """Two columns as a scatter plot in their units; more as pairs of the first four."""
    units = torch.tensor([1.0, 300.0, 1e-3, 5.0, 7.0, 9.0])[:features]
    x = torch.randn(200, features, generator=torch.Generator().manual_seed(0)) * units + 20 * units
    picture = images.draw_samples(x, real=x + units)
    assert len(set(picture.convert("L").tobytes())) > 20
    assert images.draw_trajectory([x, x]).width > 0
    if features > 1:
        (left, right), (bottom, top) = distributions.axis_limits(x)
        inside = (x[:, 0] > left) & (x[:, 0] < right) & (x[:, 1] > bottom) & (x[:, 1] < top)
        assert inside.float().mean() > 0.98
        assert right - left < 10 * units[0] and top - bottom < 10 * units[1]
    assert images.draw_samples(x, titles=["a"] * 100 + ["b"] * 100).width > 0


def test_points_are_drawn_on_a_centered_square():
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    across, up = distributions.axis_limits(x)
    assert across == up and across[0] == -across[1]
    assert distributions.axis_limits(torch.full((3, 2), torch.nan)) == ((-1, 1), (-1, 1))
    assert distributions.axis_limits(torch.ones(3, 2))[0] == (0, 2)


def test_a_column_far_from_zero_is_drawn():
    """Its spread is below the resolution of float32, and a constant column has no spread at all."""
    far = 1e9 + torch.arange(200, dtype=torch.float64)[:, None] * 1e-3
    for x in (far, torch.full((50, 1), 1e17, dtype=torch.float64), torch.cat([far, far, far], dim=1)):
        assert len(set(images.draw_samples(x, real=x).convert("L").tobytes())) > 5
    (left, right), _ = distributions.axis_limits(far.repeat(1, 2))
    assert left < 1e9 < right < 1e9 + 1


# Mixed tables

COUNT = 120


def mixed() -> pd.DataFrame:
    """Return columns of every type, and every kind that is left out."""
    draw = np.random.default_rng(1)
    start = pd.Timestamp("2020-02-28")
    return pd.DataFrame(
        {
            "id": np.arange(1, COUNT + 1),
            "price": np.exp(draw.normal(3, 1, COUNT)).round(2),
            "offset": (1e6 + draw.normal(size=COUNT)).round(3),
            "rooms": draw.integers(-3, 400, COUNT),
            "city": draw.choice(["K\u00f6ln", "Li\u00e8ge", "a, b; c", "${x}"], COUNT),
            "zip": draw.choice(["02139", "10115", "00501"], COUNT),
            "sold": draw.random(COUNT) < 0.3,
            "day": start + pd.to_timedelta(draw.integers(0, 900, COUNT), unit="D"),
            "seen": start + pd.to_timedelta(draw.integers(0, 10_000, COUNT), unit="s"),
            "note": [f"flat number {k}" for k in range(COUNT)],
            "unit": "m2",
        }
    )


MODELED = ["price", "offset", "rooms", "city", "zip", "sold", "day", "seen"]


def written(path: Path) -> Path:
    frame = mixed()
    match path.name.partition(".")[2]:
        case "csv":
            frame.to_csv(path)  # with pandas' index, which has no name
        case "tsv.gz":
            frame.to_csv(path, sep="\t", index=False, encoding="cp1252")
        case "utf16.csv":
            frame.to_csv(path, sep=";", decimal=",", index=False, encoding="utf-16", date_format="%d.%m.%Y %H:%M:%S")
        case "txt":
            frame.to_csv(path, sep="|", index=False, encoding="utf-8-sig")
        case "parquet":
            frame.to_parquet(path)
        case "xlsx":
            frame.to_excel(path, index=False)
        case "jsonl":
            text = frame.assign(day=frame.day.astype(str), seen=frame.seen.astype(str))
            text.to_json(path, orient="records", lines=True)
    return path


FORMATS = ["a.csv", "a.tsv.gz", "a.utf16.csv", "a.txt", "a.parquet", "a.xlsx", "a.jsonl"]


@pytest.mark.parametrize("categories", ["onehot", "bits"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_row_is_restored_exactly(tmp_path, name, categories):
    """Through float32 samples, stored settings and the file of samples, in types, values and order."""
    path, wanted = written(tmp_path / name), mixed()[MODELED]
    data = opened(path, categories=categories)
    assert [column.name for column in data.encoders] == MODELED
    kinds = ["number", "number", "integer", "category", "category", "boolean", "date", "date"]
    assert [column.type for column in data.encoders] == kinds
    assert data.shape == (5 + {"onehot": 7, "bits": 4}[categories] + 1,)
    assert list(data.left_out) == ["id", "note", "unit"]
    x = data.source.fetch(range(COUNT))
    assert x.dtype == torch.float32
    again = TableDataModule(None, **{**data.inferred, "categories": "onehot"})
    display = again.postprocess(x)
    assert display.dtype == torch.float64 and display.shape == (COUNT, len(MODELED))
    frame = again.to_frame(display)
    again.write_samples(tmp_path / "samples", display)
    sep, decimal = (";", ",") if "utf16" in name else ("\t" if "tsv" in name else "|" if "txt" in name else ",", ".")
    saved = pd.read_csv(tmp_path / "samples.csv", sep=sep, decimal=decimal, dtype={"zip": str})
    for each in (frame, saved):
        assert list(each.columns) == MODELED
        each = each.assign(
            **{
                day: pd.to_datetime(each[day], dayfirst="utf16" in name).astype(wanted[day].dtype)
                for day in ("day", "seen")
            }
        )
        if name != "a.parquet" or each is not frame:
            each = each.assign(sold=each.sold.map(lambda cell: str(cell).lower() == "true"))
        pd.testing.assert_frame_equal(each, wanted, check_dtype=False, check_exact=True)
    if name == "a.parquet":
        for each in (frame, pd.read_parquet(tmp_path / "samples.parquet")):
            pd.testing.assert_frame_equal(each, pd.read_parquet(path)[MODELED], check_exact=True)


def test_parquet_types_are_restored(tmp_path):
    """Narrow and nullable numbers, ordered categories, dates with a time zone, and Python's dates."""
    frame = mixed()
    levels = ["unused", *sorted(frame.city.unique(), reverse=True)]
    wanted = pd.DataFrame(
        {
            "small": (frame.rooms % 100).astype("int8"),
            "nullable": frame.rooms.astype("Int64"),
            "single": frame.price.astype("float32"),
            "ordered": pd.Categorical(frame.city, levels, ordered=True),
            "zoned": frame.seen.dt.tz_localize("Europe/Berlin"),
            "date": frame.day.dt.date,
            "flag": frame.sold.astype("boolean"),
            "huge": 10**18 + frame.rooms,
        }
    )
    wanted.to_parquet(tmp_path / "a.parquet")
    data = opened(tmp_path / "a.parquet")
    restored = data.to_frame(data.postprocess(data.source.fetch(range(COUNT)).double()))
    exact = [name for name in wanted if name != "single"]
    pd.testing.assert_frame_equal(restored[exact], wanted[exact], check_exact=True)
    pd.testing.assert_series_equal(restored.single, wanted.single, rtol=1e-6)


@pytest.mark.parametrize("transform", ["log", "quantile"])
def test_transforms_are_inverted(tmp_path, transform):
    """In float64 exactly up to rounding; the encoded values are standardized."""
    frame = mixed()[["price", "rooms"]].assign(rooms=lambda f: f.rooms.clip(lower=0))
    frame.to_csv(tmp_path / "a.csv", index=False)
    data = opened(tmp_path / "a.csv", transforms={"price": transform, "rooms": transform})
    x = data.source.fetch(range(COUNT)).double()
    assert_close(data.postprocess(x).numpy(), frame.to_numpy(float), rtol=2e-6, atol=0.011)
    assert x.mean(0).abs().max() < 0.3 and (x.std(0) - 1).abs().max() < 0.3
    if transform == "log":
        logs = np.log(frame.price)
        assert_close(x[:, 0].numpy(), ((logs - logs.mean()) / logs.std(ddof=0)).to_numpy(), rtol=0, atol=1e-6)
    frame.assign(rooms=frame.rooms - 5).to_csv(tmp_path / "b.csv", index=False)
    if transform == "log":
        assert "data.transforms of rooms: log" in refused(tmp_path / "b.csv", transforms={"rooms": "log"})


def test_samples_stay_within_the_observed_range(tmp_path):
    path = written(tmp_path / "a.csv")
    data = opened(path)
    x = 100 * torch.randn(500, *data.shape, generator=torch.Generator().manual_seed(0))
    frame, real = data.to_frame(data.postprocess(x)), mixed()
    for name in ("price", "offset", "rooms"):
        assert frame[name].min() == real[name].min() and frame[name].max() == real[name].max()
    assert set(frame.city) <= set(real.city) and frame.rooms.dtype == np.int64
    free = opened(path, clip=False)
    assert free.to_frame(free.postprocess(x)).price.max() > 10 * real.price.max()


def test_bits_without_a_category_take_the_nearest(tmp_path):
    """Three categories have two bits, of which one pattern is free."""
    data = opened(written(tmp_path / "a.csv"), columns=["zip"], categories="bits")
    x = torch.tensor([[1.0, 0.9], [0.9, 1.0], [-1.0, -1.0]])
    assert data.to_frame(data.postprocess(x)).zip.tolist() == ["02139", "10115", "00501"]


def test_samples_that_are_not_finite_become_missing(tmp_path):
    data = opened(written(tmp_path / "a.csv"))
    x = data.source.fetch(range(4))
    x[1] = torch.nan
    frame = data.to_frame(data.postprocess(x))
    assert frame.isna().all(axis=1).tolist() == [False, True, False, False]


def test_the_first_lines_name_every_column(tmp_path):
    data = opened(written(tmp_path / "a.utf16.csv"))
    detected, modeled, left_out = data.summary
    for name in MODELED:
        assert name in modeled
    for name in ("id (counts the rows)", "note (id", "unit (constant 'm2')"):
        assert name in left_out
    for found in ("';'", "decimal comma", "utf-16"):
        assert found in detected


def test_types_are_overridden(tmp_path):
    path = written(tmp_path / "a.csv")
    types = {"rooms": "text", "id": "integer", "zip": "integer", "city": "id", "day": "%Y-%m-%d"}
    data = opened(path, types=types)
    found = {column.name: column.type for column in data.encoders}
    assert found["id"] == found["zip"] == "integer" and found["day"] == "date"
    assert {"rooms", "city"} <= set(data.left_out)
    frame = data.to_frame(data.postprocess(data.source.fetch(range(COUNT))))
    assert frame.zip.tolist() == mixed().zip.astype(int).tolist()


def test_integers_become_categories_on_request(tmp_path):
    frame = mixed().assign(code=np.arange(COUNT) % 11)
    frame[["price", "code"]].to_csv(tmp_path / "a.csv", index=False)
    data = opened(tmp_path / "a.csv", types={"code": "category"})
    assert data.encoders[1].categories == [str(k) for k in range(11)] and data.shape == (12,)
    x = data.source.fetch(range(COUNT))
    assert (x[:, 1:].argmax(1) == torch.arange(COUNT) % 11).all() and set(x[:, 1:].unique().tolist()) == {-1, 1}


def test_missing_cells_are_refused_or_dropped(tmp_path):
    frame = mixed()[MODELED]
    frame.loc[[3, 5], "city"] = None
    frame.loc[[5, 8], "day"] = pd.NaT
    for name in ("a.csv", "a.parquet"):
        frame.to_csv(tmp_path / name, index=False) if name == "a.csv" else frame.to_parquet(tmp_path / name)
        message = refused(tmp_path / name)
        for part in ("line 5" if name == "a.csv" else "row 4", "'city'", "2 of 120", "data.missing=drop"):
            assert part in message
        assert "data.types={city: text}" in message
        data = opened(tmp_path / name, missing="drop")
        assert len(data.source) == COUNT - 3 and "3 of 120 rows" in data.summary[0]
        restored = data.to_frame(data.postprocess(data.source.fetch(range(COUNT - 3))))
        assert restored.city.tolist() == frame.dropna().city.tolist()
    data = opened(tmp_path / "a.csv", types={"city": "text", "day": "text"})
    assert len(data.source) == COUNT


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("sentinel", "others", "hinted"),
    [(-999, [1.5, 4.5, 3.5], True), (9999, [1, 40, 30], True), (-1, [0.5, 0.25, 0.125], True), (-1, [0, 1, 2], False),
     (99, [70, 80, 95], False), (500, [1, 2, 3], False)],
)  # fmt: skip
def test_values_for_missing_cells_are_named_and_left_out(sentinel, others, hinted, ending, tmp_path):
    frame = pd.DataFrame({"a": [*others, sentinel] * 3, "b": range(0, 24, 2)})
    path = tmp_path / f"a.{ending}"
    frame.to_csv(path, index=False) if ending == "csv" else frame.to_parquet(path)
    assert (f"data.na_values=[{sentinel}]" in " ".join(opened(path).summary)) == hinted
    assert "data.missing=drop" in refused(path, na_values=[sentinel])
    data = opened(path, na_values=[sentinel], missing="drop")
    restored = data.to_frame(data.postprocess(data.source.fetch(range(9))))
    assert restored.a.tolist() == pytest.approx(others * 3, rel=1e-6) and "na_values" not in " ".join(data.summary)
    assert restored.b.tolist() == frame.b[frame.a != sentinel].tolist()


def test_numbers_in_text_cells_name_their_type(tmp_path):
    cells = [f"{k / 7:.3f}" for k in range(1, 31)]
    pd.DataFrame({"a": cells, "b": range(0, 60, 2)}).to_parquet(tmp_path / "a.parquet")
    assert "data.types={a: number}" in opened(tmp_path / "a.parquet").left_out["a"]
    data = opened(tmp_path / "a.parquet", types={"a": "number"})
    restored = data.to_frame(data.postprocess(data.source.fetch(range(30)))).a.tolist()
    assert [*map(float, restored)] == [*map(float, cells)]


def test_whole_numbers_beside_missing_cells_stay_integers(tmp_path):
    frame = pd.DataFrame({"x": np.arange(9) % 4, "day": [20200101 + 3 * k for k in range(9)]}, dtype=object)
    frame.loc[2, "x"] = frame.loc[5, "day"] = None
    frame.to_excel(tmp_path / "a.xlsx", index=False)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    for name in ("a.xlsx", "a.jsonl"):
        data = opened(tmp_path / name, missing="drop")
        assert [column.type for column in data.encoders] == ["integer", "date"]
        restored = data.to_frame(data.postprocess(data.source.fetch(range(7))))
        assert restored.values.tolist() == frame.dropna().values.tolist()
        assert all(isinstance(cell, int) for cell in restored.x)


def test_a_category_may_be_named_none(tmp_path):
    """pandas reads None and NA as missing."""
    frame = pd.DataFrame({"x": np.arange(20) % 7, "drink": ["None", "Beer"] * 10, "land": ["NA", "DE"] * 10})
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert opened(tmp_path / "a.csv").left_out == {"land": "constant 'DE' with 10 missing"}
    data = opened(tmp_path / "a.csv", types={"land": "category"})
    frame_again = data.to_frame(data.postprocess(data.source.fetch(range(20))))
    assert frame_again.astype(str).values.tolist() == frame.astype(str).values.tolist()


def test_separators_are_set_by_name(tmp_path):
    (tmp_path / "a.csv").write_text("a,b;c\n1,5;2\n2,5;4\n3,0;9\n")
    data = opened(tmp_path / "a.csv", separator="semicolon", decimal="comma")
    assert data.columns == ["a,b", "c"] and data.encoders[0].low == 1.5
    assert (
        opened(tmp_path / "a.csv", separator="comma", header=True, missing="drop", columns=["a"]).encoders[0].low == 1
    )


def test_unknown_categories_of_a_grown_table_are_refused(tmp_path):
    path = written(tmp_path / "a.csv")
    data = opened(path)
    path.write_text(path.read_text().replace("02139", "99999", 1))
    again = TableDataModule(str(path), batch_size=4, **data.inferred)
    with pytest.raises(ValueError, match="column 'zip' is '99999', unknown to the run"):
        again.setup()


def test_a_headerless_table_is_refused(tmp_path):
    rows = "5.1,3.5,setosa\n4.9,3.1,setosa\n6.3,3.3,virginica\n5.8,2.7,virginica\n"
    (tmp_path / "a.csv").write_text(rows)
    assert "data.header=false" in refused(tmp_path / "a.csv")
    data = opened(tmp_path / "a.csv", header=False)
    assert data.columns == ["c0", "c1", "c2"]
    assert data.to_frame(data.postprocess(data.source.fetch(range(4)))).c0.tolist() == [5.1, 4.9, 6.3, 5.8]
    (tmp_path / "b.csv").write_text("2019,2020\n1,2\n4,4\n3,9\n")
    assert "data.header=true" in refused(tmp_path / "b.csv")
    assert opened(tmp_path / "b.csv", header=True).columns == ["2019", "2020"]


def test_integers_are_encoded_as_before(tmp_path):
    """Tables of numbers keep the bits of their training data: float64 columns, standardized together."""
    path, numbers = table(tmp_path / "a.csv")
    data = opened(path, columns=["height", "weight", "day"])
    values = torch.tensor(numbers.T.tolist(), dtype=torch.float64).T
    wanted = ((values - values.mean(0)) / values.std(0, correction=0)).float()
    assert data.source.fetch(range(ROWS)).equal(wanted)
    typed = {name: data.inferred[name] for name in ("columns", "mean", "std")}
    again = TableDataModule(str(path), **typed)
    again.setup()
    assert again.source.fetch(range(ROWS)).equal(wanted) and again.inferred == data.inferred
    assert json.loads(data.inferred["encoders"])["columns"][2]["type"] == "integer"


def test_a_mixed_table_trains_and_samples(tmp_path):
    """Sampling needs no table: the run stores categories and ranges."""
    path = written(tmp_path / "a.parquet")
    folder = tmp_path / "run"
    train(
        compose(
            "train",
            *("data=table", f"data.path='{path}'", "data.batch_size=8", "data.categories=bits"),
            *("data.transforms={price: log}", "data.types={rooms: integer}"),
            *("model.hidden_size=8", "model.num_res_blocks=1", "trainer.accelerator=cpu", "trainer.max_steps=2"),
            *("validate_every=2", "sampler.steps=2", "callbacks.samples.num_samples=4", "neighbors.num_samples=0"),
            *("callbacks.progress.refresh_rate=0", f"run_dir='{folder}'"),
        )
    )
    path.unlink()
    out = sample(compose("sample", "device=cpu", "n=6", f"run='{folder}'", f"run_dir='{tmp_path / 'out'}'"))
    frame = pd.read_parquet(out / "samples.parquet")
    assert frame.dtypes.astype(str).to_dict() == mixed()[MODELED].dtypes.astype(str).to_dict()
    assert len(pd.read_csv(out / "samples.csv")) == 6 and (out / "grid.png").exists()
    assert frame.rooms.between(mixed().rooms.min(), mixed().rooms.max()).all()


def test_balanced_rows_draw_classes_equally(tmp_path):
    lines = [f"{k / 7},{k % 5},{'rare' if k % 10 == 0 else 'common'}" for k in range(400)]
    (tmp_path / "a.csv").write_text("\n".join(["x,y,kind", *lines]))
    trainer = SimpleNamespace(max_steps=100, global_step=0, accumulate_grad_batches=1, global_rank=0, world_size=1)
    shares = []
    for balance in (False, True):
        data = opened(tmp_path / "a.csv", label="kind", balance_classes=balance, batch_size=20)
        sampler = data.train_sampler(trainer)
        drawn = [index for step in range(100) for index in sampler.batch(step)]
        assert set(drawn) <= set(data.train_indices)
        rare = data.source.labels.classes.index("rare")
        shares.append(float((data.source.labels.targets[drawn] == rare).double().mean()))
    assert abs(shares[0] - 0.1) < 0.04  # 2,000 draws: a standard deviation is 0.011 at one half
    assert abs(shares[1] - 0.5) < 0.05
    unlabeled = opened(tmp_path / "a.csv", balance_classes=True, batch_size=20)
    with pytest.raises(ValueError, match=r"data\.balance_classes"):
        unlabeled.train_sampler(trainer)


def labeled(path: Path, labels: list[str]) -> Path:
    path.write_text("\n".join(["x,group", *(f"{k % 7 + 0.5},{label}" for k, label in enumerate(labels))]))
    return path


def test_classes_and_counts_are_named(tmp_path):
    data = opened(labeled(tmp_path / "a.csv", ["b", "a", "b", "b"] * 5), label="group")
    assert "label group: 2 classes (5 a, 15 b)" in data.summary
    data = opened(labeled(tmp_path / "b.csv", ["0.5", "1.5"] * 10), label="group")  # doses that repeat are classes
    assert data.source.labels.classes == ["0.5", "1.5"]


def test_measured_values_are_refused_as_label(tmp_path):
    path = labeled(tmp_path / "a.csv", [f"{k / 8 + 0.01:.2f}" for k in range(20)])
    message = refused(path, label="group")
    assert "data.label=group" in message and "data.condition_columns=[group]" in message


@pytest.mark.parametrize("word", ["NA", "n/a"])
def test_words_for_missing_labels_are_missing(word, tmp_path):
    path = labeled(tmp_path / "a.csv", ["a", "b", word, "b"] * 5)
    assert "data.missing=drop" in refused(path, label="group")
    assert len(opened(path, label="group", missing="drop").source) == 15
    assert word in opened(path, label="group", types={"group": "category"}).source.labels.classes


@pytest.mark.parametrize("form", ["${}", "{} €", "{}%"])
def test_signs_explain_why_numbers_are_text(form, tmp_path):
    rows = [f"{k % 7},{form.format(k + 0.25)}" for k in range(20)]
    (tmp_path / "a.csv").write_text("\n".join(["x,price", *rows]))
    assert "remove the sign" in opened(tmp_path / "a.csv").left_out["price"]


@pytest.mark.parametrize(("last", "hinted"), [("07/12/2020", True), ("01/13/2020", False)])
def test_dates_of_either_order_are_named(last, hinted, tmp_path):
    rows = [f"{k},0{k + 1}/0{7 - k}/2020" for k in range(7)] + [f"7.5,{last}"]
    (tmp_path / "a.csv").write_text("\n".join(["x,day", *rows]))
    notes = [note for note in opened(tmp_path / "a.csv").notes if "day" in note]
    assert bool(notes) == hinted
    if hinted:
        assert "%m/%d/%Y" in notes[0] and "data.types=" in notes[0] and "%d/%m/%Y" in notes[0]


def test_dates_detected_in_whole_numbers_are_named(tmp_path):
    """Samples have whole numbers in the unit of the file again, within its range."""
    seconds = 1_600_000_000 + 86_400 * np.arange(20) % 700_000
    rows = [f"{k * 7 % 13},{second},{second}" for k, second in enumerate(seconds)]
    (tmp_path / "a.csv").write_text("\n".join(["x,created_at,count", *rows]))
    data = opened(tmp_path / "a.csv")
    (note,) = (note for note in data.notes if "created_at" in note)
    assert "seconds since 1970" in note and "data.types={created_at: integer}" in note
    assert [column.type for column in data.encoders] == ["integer", "date", "integer"]
    data.write_samples(tmp_path / "samples", data.postprocess(data.source.fetch(range(20))))
    saved = pd.read_csv(tmp_path / "samples.csv")
    assert (saved.created_at == seconds).all() and saved.created_at.dtype == np.int64
    integers = opened(tmp_path / "a.csv", types={"created_at": "integer"})
    assert integers.encoders[1].type == "integer" and not integers.notes
    assert "data.types={x: epoch_ms}" in refused(tmp_path / "a.csv", types={"x": "date"})
