"""Tables in every format, encoding and separator, and errors that name the line."""

import bz2
import gzip
import json
import lzma
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global Table, find_decimal, find_separator, read_pairs, read_table, to_number
    from src.data.table_files import Table, read_pairs, read_table
    from src.data.table_text import find_decimal, find_separator, to_number


def read(path: Path, contents: str | bytes, **settings: object) -> "Table":
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return read_table(path, "data.path", **settings)


def refused(path: Path, contents: str | bytes, **settings: object) -> str:
    with pytest.raises(ValueError) as error:
        read(path, contents, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_detected(tmp_path, separator):
    """Although quoted cells and texts contain other separators."""
    rows = [["name", "value"], ["a; b", '"x, y"'], ["c|d", "2"], ["e", "3"]]
    text = "\n".join(separator.join(f'"{c}"' if separator in c and '"' not in c else c for c in row) for row in rows)
    table = read(tmp_path / "a.csv", text)
    assert table.separator == separator and table.column("name") == ["a; b", "c|d", "e"]
    assert table.column("value") == ["x, y", "2", "3"] and list(table.lines) == [2, 3, 4]


def test_columns_of_spaces_are_read(tmp_path):
    table = read(tmp_path / "a.txt", " x   y\n 1.0  2\n10.5  -3\n")
    assert table.names == ["x", "y"] and table.column("x") == ["1.0", "10.5"]
    assert find_separator("a long name\nwith two words\n") == ","


def test_a_separator_declared_by_excel_is_used(tmp_path):
    table = read(tmp_path / "a.csv", "sep=;\r\na;b\r\n1,5;2\r\n")
    assert table.column("a") == ["1,5"] and table.decimal == "," and list(table.lines) == [3]


def test_the_decimal_sign_is_that_of_most_fractions():
    assert find_decimal(["1,5", "2,25", "x"]) == ","
    assert find_decimal(["1.5", "2.25", "1,234"]) == "."
    assert find_decimal(["1.234,5", "7"]) == ","
    assert find_decimal(["1,234", "12,345,678", "0.5"]) == "."
    assert find_decimal(["a,b", "1", "2"]) == "."
    assert find_decimal(["1.000", "2.137", "0,637"]) == ","  # no group of thousands begins with 0
    assert find_decimal(["1.234", "0.637", "1,234"]) == "."
    assert [find_decimal(["1,234", "5,678"], separator) for separator in ";,"] == [",", "."]


def test_quoted_cells_may_have_a_decimal_comma(tmp_path):
    table = read(tmp_path / "a.csv", 'x,y\n"0,637",1\n"1,250",2\n"12,500",3\n')
    assert table.decimal == "," and [to_number(cell, ",") for cell in table.column("x")] == [0.637, 1.25, 12.5]
    table = read(tmp_path / "b.csv", 'x,y\n"1,637",0.5\n"1,250",2.5\n')
    assert table.decimal == "." and [to_number(cell) for cell in table.column("x")] == [1637, 1250]


def test_numbers_have_either_decimal_sign_and_thousands():
    for cell, decimal, value in (
        ("1,234.5", ".", 1234.5),
        ("1.234,5", ",", 1234.5),
        ("-0,25", ",", -0.25),
        ("1e-3", ".", 0.001),
        ("1,5", ".", None),
        ("0,637", ".", None),
        ("0.637", ",", None),
        ("1.5", ",", None),
        ("1_000", ".", None),
        ("12.5.2020", ",", None),
        ("1'234.5", ".", 1234.5),
        ("1\u00a0234", ",", 1234),
        ("12 345,6", ",", 12345.6),
        ("555 123 456", ".", None),
    ):
        assert to_number(cell, decimal) == value, cell


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "latin-1"])
def test_the_encoding_is_detected(tmp_path, encoding):
    table = read(tmp_path / "a.csv", "Größe,Stück\nklein,é\ngroß,ü\n".encode(encoding))
    assert table.names == ["Größe", "Stück"] and table.column("Stück") == ["é", "ü"]
    assert any("encoding" in note for note in table.notes) == (not encoding.startswith("utf-8"))


def test_an_encoding_can_be_set(tmp_path):
    contents = "имя,x\nкит,1\n".encode("koi8-r")
    assert read(tmp_path / "a.csv", contents, encoding="koi8-r").names == ["имя", "x"]
    assert "data.encoding=koi" in refused(tmp_path / "a.csv", contents, encoding="koi")
    assert "is not text in utf-8" in refused(tmp_path / "a.csv", contents, encoding="utf-8")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files_are_read(tmp_path, compress):
    assert read(tmp_path / "a.csv.gz", compress(b"a,b\n1,2\n")).column("b") == ["2"]
    assert "cannot be decompressed" in refused(tmp_path / "a.csv.gz", compress(b"a,b\n1,2\n" * 9)[:-12])


def test_an_index_without_a_name_is_left_out(tmp_path):
    """Also of shuffled rows, and an empty column after a separator at the end of lines."""
    for head, cells in (("", "0 1 2"), ("Unnamed: 0", "7 3 5"), ("", "1 2 3")):
        rows = "\n".join(f"{cell},{k}.5," for k, cell in enumerate(cells.split()))
        table = read(tmp_path / "a.csv", f"{head},x,\n{rows}\n", header=None)
        assert table.names == ["x"] and "index" in table.notes[-1]
    assert read(tmp_path / "a.csv", ",x\na,1\nb,2\n").names == ["Unnamed: 0", "x"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("5.1,3.5\n4.9,3.0\n", "line 1 has the number 5.1"),
        ("\n5.1,setosa\n4.9,setosa\n", "line 2 has the number 5.1"),
        ("1,2\n3,4\n", "line 1 has the number 1"),
        ("Paris,x\nParis,y\nRome,x\n", "line 1 has 'Paris', 'x'"),
    ],
)
def test_a_first_row_of_data_is_refused(tmp_path, contents, message):
    error = refused(tmp_path / "a.csv", contents, header=None)
    assert message in error and "data.header=false" in error
    assert read(tmp_path / "a.csv", contents, header=False).names == ["c0", "c1"]
    assert read(tmp_path / "a.csv", contents, header=True).names != ["c0", "c1"]


def test_names_of_years_and_of_categories_are_a_header(tmp_path):
    assert read(tmp_path / "a.csv", "a,b\na,1\nb,2\n", header=None).names == ["a", "b"]
    assert read(tmp_path / "a.csv", "country,2019,2020\nA,1,2\nB,3,4\n", header=None).names[1:] == ["2019", "2020"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("a;b\n1;2\n3\n", "line 3: 1 cells under 2 names"),
        ("a,a\n1,2\n", "several columns named 'a'"),
        ("a,b\n", "has 1 rows"),
        ("", "has 0 rows"),
        ('a,b\n1,"2\n', "is not a CSV file"),
        ('a,b\n1,"x \\"y\\""\n', "line 2"),
        ("# by x\na,b\n1,2\n", "remove the lines above the header"),
        (b"\x89PNG\x00\x00\x01", "null bytes"),
        ("% iris\n@RELATION iris\n@ATTRIBUTE a NUMERIC\n@DATA\n1\n", "ARFF"),
    ],
)
def test_damaged_text_files_raise(tmp_path, contents, message):
    assert message in refused(tmp_path / "a.csv", contents)


def frame() -> pd.DataFrame:
    return pd.DataFrame({"n": [1, 2, 3], "x": [0.5, 1.5, 2.5], "s": ["a", "02", "c"], "b": [True, False, True]})


def test_typed_files_keep_their_types(tmp_path):
    frame().to_parquet(tmp_path / "a.parquet")
    frame().to_excel(tmp_path / "a.xlsx", index=False)
    frame().to_json(tmp_path / "a.json", orient="records")
    frame().to_json(tmp_path / "b.json")
    frame().to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    (tmp_path / "c.json").write_text(json.dumps({"data": frame().to_dict("records"), "version": 1}))
    frame().to_json(tmp_path / "d.json", orient="split")
    for name in ("a.parquet", "a.xlsx", "a.json", "b.json", "a.jsonl", "c.json", "d.json"):
        table = read_table(tmp_path / name, "data.path", header=None)
        assert not table.is_text and table.frame.to_dict("list") == frame().to_dict("list"), name
        assert table.column("n") == ["1", "2", "3"] and table.frame.n.dtype == np.int64


def test_integers_beside_missing_cells_of_parquet_stay_integers(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"n": pyarrow.array([2**60 + 1, None]), "x": pyarrow.array([0.5, None])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    read = read_table(tmp_path / "a.parquet", "data.path", header=None)
    assert read.column("n") == [str(2**60 + 1), ""] and read.frame.x.dtype == np.float64


def test_the_index_of_a_parquet_file_is_a_column(tmp_path):
    frame().set_index("s").to_parquet(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet", "data.path").names == ["s", "n", "x", "b"]
    frame().iloc[[2, 0]].to_parquet(tmp_path / "b.parquet")
    assert read_table(tmp_path / "b.parquet", "data.path").names == ["n", "x", "s", "b"]


def test_a_zip_file_that_is_not_a_workbook_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.csv", "a\n1\n")
    assert "unpack it" in refused(tmp_path / "a.zip", (tmp_path / "a.zip").read_bytes())


def test_ambiguous_points_are_reported(tmp_path):
    """With a semicolon as the separator, 1.234 is a whole number in many countries."""
    rows = "".join(f"{k}.234;{k % 3}\n" for k in range(1, 6))
    assert any("data.decimal=comma" in note for note in read(tmp_path / "a.csv", "a;b\n" + rows).notes)
    assert not any("data.decimal" in note for note in read(tmp_path / "a.csv", "a;b\n0.5;1\n" + rows).notes)


def test_sheets_are_chosen_by_name(tmp_path):
    with pd.ExcelWriter(tmp_path / "a.xlsx") as book:
        frame().to_excel(book, sheet_name="first", index=False, startrow=2)
        frame()[["s"]].to_excel(book, sheet_name="second", index=False)
    first = read_table(tmp_path / "a.xlsx", "data.path")
    assert first.names == ["n", "x", "s", "b"] and first.place(0).endswith("row 4") and "of 2" in first.notes[0]
    assert read_table(tmp_path / "a.xlsx", "data.path", sheet="second").names == ["s"]
    with pytest.raises(ValueError, match=r"data\.sheet=secnd"):
        read_table(tmp_path / "a.xlsx", "data.path", sheet="secnd")


def test_first_sheet_with_cells_is_read(tmp_path):
    with pd.ExcelWriter(tmp_path / "a.xlsx") as book:
        pd.DataFrame().to_excel(book, sheet_name="cover", index=False)
        frame().to_excel(book, sheet_name="data", index=False)
    table = read_table(tmp_path / "a.xlsx", "data.path")
    assert table.names == ["n", "x", "s", "b"] and "'data'" in table.notes[0]


@pytest.mark.parametrize(("name", "package"), [("a.xlsx", "openpyxl"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    frame().to_excel(tmp_path / name) if name == "a.xlsx" else frame().to_parquet(tmp_path / name)

    def fail(*args: object, **kwargs: object) -> None:
        raise ImportError(f"Missing optional dependency '{package}'")

    if name == "a.xlsx":
        monkeypatch.setattr(pd, "ExcelFile", fail)
    else:
        monkeypatch.setitem(sys.modules, "pyarrow", None)  # which an import refuses
    with pytest.raises(ValueError, match=f"pip install {package}"):
        read_table(tmp_path / name, "data.path")


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a"\n', "line 3 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("a.jsonl", "", "has no rows"),
        ("a.json", "[1, 2]", "is not a table in JSON"),
        ("a.json", "[{", "is not a table in JSON"),
        ("a.parquet", b"PAR1 not", "cannot be read"),
        ("a.xlsx", b"PK\x03\x04 not", "cannot be read"),
    ],
)
def test_damaged_typed_files_raise(tmp_path, name, contents, message):
    assert message in refused(tmp_path / name, contents)


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_pairs_of_file_and_text_come_from_any_table(tmp_path, ending):
    rows = pd.DataFrame({"image": ["a.png", "b.png"], "breed": ["Pug, old", "7"], "extra": [1, 2]})
    path = tmp_path / f"labels.{ending}"
    match ending:
        case "csv":
            rows.to_csv(path, index=False, sep=";", encoding="utf-16")
        case "tsv":
            rows.to_csv(path, index=False, sep="\t", encoding="cp1252")
        case "parquet":
            rows.to_parquet(path)
        case _:
            rows.to_json(path, orient="records", lines=ending == "jsonl")
    pairs = list(read_pairs(path, "data.source.labels", "label", ("image",), ("breed",)))
    assert pairs == [("a.png", "Pug, old"), ("b.png", "7")]
    with pytest.raises(ValueError, match=r"data\.source\.label_column"):
        list(read_pairs(path, "data.source.labels", "label", ("image",), ("label",)))
