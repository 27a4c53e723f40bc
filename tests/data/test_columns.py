"""Types of columns, detected from cells, and the codes of categories."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global Cells, Column, from_json, infer_column, is_named_like_time, parse_column, read_table, to_json, type_override
    from src.data.column_types import parse_column, type_override
    from src.data.columns import Cells, Column, from_json, infer_column, to_json
    from src.data.dates import is_named_like_time
    from src.data.table_files import read_table


def column_of(path: Path, cells: list[str], **settings: object) -> "Cells":
    """Return the parsed cells of a CSV file with one column besides `x`."""
    lines = [f"{k % 3}\t{cell}" for k, cell in enumerate(cells)]
    (path / "a.tsv").write_text("\n".join(["x\tvalue", *lines]), encoding="utf-8")
    return parse_column(read_table(path / "a.tsv", "data.path"), "value", **settings)


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1.5", "2", "3e2"], "number"),
        (["1,5", "2", "-3,25"], "number"),
        (["4", "-2", "+3"], "integer"),
        (["1.0", "2.0", "9.0"], "number"),
        (["1,234,567", "2,345"], "integer"),
        (["1.234.567", "2.345"], "integer"),
        (["1e5", "2e5"], "number"),
        (["02139", "10115"] * 3, "category"),
        (["a", "b", "a", "b"], "category"),
        (["True", "False", "True"], "boolean"),
        (["yes", "no", "no"], "boolean"),
        (["0", "1", "1"], "integer"),
        (["2020-01-05", "2021-12-31"], "date"),
        (["05.01.2020", "31.12.2021"], "date"),
        (["3/14/2020", "12/1/2020"], "date"),
        (["2020-01-05T10:00:00Z", "2021-12-31T23:59:59Z"], "date"),
        (["5 Jan 2020", "31 Dec 2021"], "date"),
        (["05-Jan-20", "31-Dec-21"], "date"),
        (["20200131", "20200201", "20211231"], "date"),
        (["20200131", "20200232", "20211231"], "integer"),
        (["a", "b", "c"], None),
        (["one two", "three four", "one two", "five"], None),
        (["7", "7", "7"], None),
        (["", "", ""], None),
        (["1", "2", "3", "4"], None),
    ],
)
def test_types_are_detected(tmp_path, cells, kind):
    assert column_of(tmp_path, cells).type == kind


def test_columns_named_like_ids_are_left_out(tmp_path):
    """If all their integers differ."""
    for name, left_out in (("customer_id", True), ("userId", True), ("ID", True), ("paid", False), ("grid", False)):
        (tmp_path / "a.csv").write_text(f"x,{name}\n1,17\n2,4\n1,99\n")
        assert (parse_column(read_table(tmp_path / "a.csv", "data.path"), name).type is None) == left_out, name


def test_a_named_column_is_never_an_id(tmp_path):
    assert column_of(tmp_path, ["1", "2", "3"], used=True).type == "integer"


def test_other_cells_among_numbers_are_invalid_or_missing(tmp_path):
    cells = column_of(tmp_path, ["1", "x", "2", "n/a", "inf", "5", "9"])
    assert cells.type == "integer"
    assert np.flatnonzero(cells.invalid).tolist() == [1, 4] and np.flatnonzero(cells.missing).tolist() == [3]


def test_large_integers_with_separators_are_exact(tmp_path):
    cells = ["9,007,199,254,740,993", "-1,234,567"]
    assert column_of(tmp_path, cells).values.tolist() == [2**53 + 1, -1234567]


def test_decimals_are_those_of_the_cells(tmp_path):
    for texts, decimals in (
        (["1.50", "2.25"], 2),
        (["3.0", "4.0"], 0),
        (["1e-3", "2.5"], 3),
        (["1.25E1", "2E5"], 1),
        (["1e-9", "2"], None),
        (["1.123456789"] * 2 + ["2"], None),
    ):
        assert column_of(tmp_path, texts).details["decimals"] == decimals


def test_dates_are_counted_in_their_coarsest_unit(tmp_path):
    cells = column_of(tmp_path, ["1970-01-03 00:00", "1970-01-05 12:00"])
    assert cells.details["unit"] == "h" and cells.values.tolist() == [48, 108]
    column = infer_column("t", cells, "standardize", "onehot")
    assert column.label == "t (hours since 1970-01-03T00)"
    assert column.restore(np.array([0.0, 1.0])).tolist() == ["1970-01-03 00:00", "1970-01-03 01:00"]


@pytest.mark.parametrize(
    "cells",
    [
        ["3/1/2020", "12/25/2020", "1/30/2021"],
        ["05.03.2020 7:00", "31.12.2020 12:05", "01.01.2021 0:30"],
        ["Mar 1, 2020", "Dec 25, 2020"],
        ["1.3.20 9:05", "12.11.20 10:00"],
        ["20200131", "20200201", "20211231"],
        ["1199-03-01", "2020-02-29", "9999-12-31"],
    ],
)
def test_dates_return_as_they_were_written(tmp_path, cells):
    """Also where they are read a second time, in the unit that the run stores."""
    column = infer_column("value", column_of(tmp_path, cells), "standardize", "onehot")
    again = column_of(tmp_path, cells, known=column)
    assert column.restore(column.display(again.values)).tolist() == cells


def test_dates_of_different_offsets_return_in_utc(tmp_path):
    zones = ("28T12:00:00+01:00", "29T12:00:00+02:00", "29T23:30:00-0330", "31T00:00:00Z")
    cells = [f"2020-03-{text}" for text in zones]
    column = infer_column("value", column_of(tmp_path, cells), "standardize", "onehot")
    wanted = [f"2020-03-{text}:00+00:00" for text in ("28T11:00", "29T10:00", "30T03:00", "31T00:00")]
    for texts in (cells, wanted):  # the data of the run, and its samples
        again = column_of(tmp_path, texts, known=column)
        assert column.restore(column.display(again.values)).tolist() == wanted


def test_whole_numbers_in_typed_files_are_dates(tmp_path):
    """If all are dates without separators; their type stays."""
    frame = pd.DataFrame({"x": [1.5, 2.0, 0.5], "day": np.array([20200131, 20211231, 20200201], np.int32)})
    frame.to_parquet(tmp_path / "a.parquet")
    cells = parse_column(read_table(tmp_path / "a.parquet", "data.path"), "day")
    assert cells.type == "date" and np.diff(cells.values).tolist() == [700, -699]
    restored = infer_column("day", cells, "standardize", "onehot").restore(np.array([0.0, 700.0, 1.0]))
    assert restored.dtype == np.int32 and restored.tolist() == frame.day.tolist()


DAYS = ["2020-01-31", "2021-03-01", "2023-12-24"]


def epochs(unit: str) -> list[int]:
    """Return `DAYS` as whole numbers of a unit since 1970."""
    return [int((pd.Timestamp(day) - pd.Timestamp(0)) / pd.Timedelta(1, unit)) for day in DAYS]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_epochs_are_dates_and_return_in_their_unit(tmp_path, unit, suffix):
    frame = pd.DataFrame({"x": [1.5, 2.0, 0.5], "createdAt": epochs(unit), "code": epochs(unit)})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        frame.to_parquet(path)
    elif suffix == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True)
    table = read_table(path, "data.path")
    for given in (None, "date", f"epoch_{unit}"):
        cells = parse_column(table, "createdAt", given)
        assert cells.type == "date" and cells.values.astype("datetime64[D]").astype(str).tolist() == DAYS
        column = infer_column("createdAt", cells, "standardize", "onehot")
        assert column.unit == "D" and f"epoch_{unit}" in column.summary
        (column,), _ = from_json(to_json([column]))
        again = parse_column(table, "createdAt", known=column)
        restored = column.restore(column.display(again.values))
        assert restored.tolist() == epochs(unit) and all(isinstance(cell, int) for cell in restored.tolist())
        assert suffix != "parquet" or restored.dtype == np.int64
    assert parse_column(table, "code").type == "integer"  # not named like a time


@pytest.mark.parametrize(
    ("name", "is_time"),
    [("created_at", True), ("eventTime", True), ("Date (UTC)", True), ("TIMESTAMP", True), ("ts", True),
     ("lattice", False), ("datum", False), ("rating", False), ("id", False)],
)  # fmt: skip
def test_names_of_times_are_recognized(name, is_time):
    assert is_named_like_time(name) == is_time


@pytest.mark.parametrize("numbers", [[7, 8, 900], [1_600_000_000, 1_600_000_001_000, 5], [0, 1_600_000_000, 4]])
def test_other_whole_numbers_are_not_dates(numbers, tmp_path):
    """They have no unit that fits all; the type `date` refuses them, and one with a unit takes them."""
    (tmp_path / "a.csv").write_text("\n".join(["x,time", *(f"{k % 2},{number}" for k, number in enumerate(numbers))]))
    table = read_table(tmp_path / "a.csv", "data.path")
    assert parse_column(table, "time").type == "integer"
    assert parse_column(table, "time", "date").invalid.all()
    assert parse_column(table, "time", "epoch_ms").values.tolist() == numbers


def test_wrong_units_of_dates_are_refused(tmp_path):
    """A unit is wrong if the years are far from today, and those of another unit are not."""
    for numbers, right, wrong in (
        ([1_600_000_000_000, 1_700_000_000_000], "epoch_ms", "epoch_s"),
        ([1_600_000_000, 1_700_000_000], "epoch_s", "epoch_ms"),
    ):
        (tmp_path / "a.csv").write_text("\n".join(["x,time", *(f"{k},{number}" for k, number in enumerate(numbers))]))
        table = read_table(tmp_path / "a.csv", "data.path")
        assert parse_column(table, "time", right).type == "date"
        with pytest.raises(ValueError, match=rf"data\.types=.*{wrong}.*{right}"):
            parse_column(table, "time", wrong)


def test_invalid_epochs_are_marked(tmp_path):
    (tmp_path / "a.csv").write_text("x,time\n1,1600000000\n2,soon\n3,-\n1,5.5\n")
    cells = parse_column(read_table(tmp_path / "a.csv", "data.path"), "time", "epoch_s")
    assert cells.invalid.tolist() == [False, True, False, True]
    assert cells.missing.tolist() == [False, False, True, False]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_compact_dates_take_the_type_date(tmp_path, suffix):
    frame = pd.DataFrame({"x": [1.5, 2.0, 0.5], "day": [20200131, 20211231, 20200201]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    cells = parse_column(read_table(tmp_path / f"a.{suffix}", "data.path"), "day", "date")
    assert cells.details["format"] == "%Y%m%d" and np.diff(cells.values).tolist() == [700, -699]


def test_a_type_that_no_cell_has_is_invalid(tmp_path):
    """Instead of another type without a word."""
    frame = pd.DataFrame({"x": [1, 2, 4], "day": pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-04"])})
    frame.to_parquet(tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet", "data.path")
    for name, given in (("x", "date"), ("x", "%d.%m.%Y"), ("x", "boolean"), ("day", "number"), ("day", "integer")):
        cells = parse_column(table, name, given)
        assert cells.type == ("date" if "%" in given else given) and cells.invalid.all(), (name, given)


def test_lists_in_cells_are_left_out(tmp_path):
    frame = pd.DataFrame({"x": [1.5, 2.0, 0.5], "tags": [["a"], [], ["b", "c"]]})
    frame.to_parquet(tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet", "data.path")
    assert "ndarray" in parse_column(table, "tags").why and len(table.row_texts()) == 3
    assert parse_column(table, "tags", "category").invalid.all()


def test_restored_numbers_have_no_negative_zero():
    column = Column("x", decimals=1, low=-1.0, high=1.0)
    restored = column.decode(np.array([[-1e-9], [-0.5]]))
    assert restored.tolist() == [0.0, -0.5] and not np.signbit(restored[0])


def test_integers_beyond_64_bits_are_restored(tmp_path):
    texts = [str(10**25 + k * k) for k in range(4)]
    column = infer_column("value", column_of(tmp_path, texts), "standardize", "onehot")
    assert column.restore(np.array([0.0, 9.0])).tolist() == [10**25, 10**25 + 9]


@pytest.mark.parametrize("code", ["onehot", "bits"])
@pytest.mark.parametrize("count", [2, 3, 8, 9])
def test_codes_of_categories_are_distinct_signs(code, count):
    book = Column("c", "category", code=code, categories=list(range(count))).codebook
    assert book.shape == (count, count if code == "onehot" else int(np.ceil(np.log2(count))))
    assert len({tuple(row) for row in book.tolist()}) == count and set(book.ravel().tolist()) == {-1, 1}
    if code == "bits":
        assert ((book > 0) @ (2 ** np.arange(book.shape[1]))).tolist() == list(range(count))


def test_quantile_scores_are_normal_and_monotone():
    values = np.exp(np.random.default_rng(0).normal(size=2000))
    cells = Cells("number", values, np.zeros(2000, bool), np.zeros(2000, bool))
    column = infer_column("x", cells, "quantile", "onehot")
    scores = column.encode(values)[:, 0]
    assert abs(scores.mean()) < 0.01 and abs(scores.std() - 1) < 0.02
    assert (np.diff(scores[values.argsort()]) >= 0).all() and len(column.knots[0]) <= 256
    np.testing.assert_allclose(column.decode(scores[:, None]), values, rtol=1e-12)
    assert column.decode(np.array([[9.0], [-9.0]])).tolist() == [values.max(), values.min()]


def test_columns_are_stored_as_text_without_interpolation():
    columns = [Column("a ${x}\n", "category", categories=["${oc.env:HOME}", 3, "\x00"]), Column("b", low=0.1)]
    text = to_json(columns, separator=";")
    assert "${" not in text and text.isprintable() and text.isascii()
    assert from_json(text) == (columns, {"separator": ";"})


def test_an_override_of_a_type_is_one_word_for_hydra():
    import shlex

    from hydra.core.override_parser.overrides_parser import OverridesParser

    for name in ("zip", "zip code", "a (b), c: d", "Größe"):
        (word,) = shlex.split(type_override(name, "category"))
        value = OverridesParser.create().parse_override(word).value()
        assert value in ({name: "category"}, [f"{name}=category"])


def test_categories_of_pandas_keep_their_order(tmp_path):
    levels = ["low", "mid", "high", "unused"]
    frame = pd.DataFrame({"x": [1.0, 2.0, 4.0], "c": pd.Categorical(["high", "low", "mid"], levels, ordered=True)})
    frame.to_parquet(tmp_path / "a.parquet")
    cells = parse_column(read_table(tmp_path / "a.parquet", "data.path"), "c")
    assert cells.details["categories"] == levels[:3]
    restored = infer_column("c", cells, "standardize", "bits").restore(np.array([2.0, 0.0]))
    assert restored.dtype == frame.c.dtype and restored.tolist() == ["high", "low"]
