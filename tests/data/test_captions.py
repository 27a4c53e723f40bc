"""Image folders with captions in text files or a metadata file, and errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from tests.conftest import compose


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global Source, captioned
    from src.data.captions import captioned
    from src.data.sources import Source


NAMES = ["b.png", "dogs/a.jpg", "cats/c.png"]
IN_ORDER = sorted(NAMES, key=Path)


def images(path: Path, *names: str) -> Path:
    for k, name in enumerate(names or NAMES):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * k, dtype=np.uint8)).save(path / name)
    return path


def opened(path: Path) -> Source:
    return captioned(str(path), 8, 3, prepare=True)


def by_name(path: Path) -> dict[str, list[str]]:
    captions = opened(path).captions
    assert captions is not None
    return dict(zip(IN_ORDER, map(list, captions), strict=True))


def refused(path: Path) -> str:
    """Return the error, one line, for images with invalid captions."""
    with pytest.raises(ValueError) as error:
        opened(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_each_line_of_a_text_is_a_caption(tmp_path):
    """Lines are stripped; empty lines, a byte order mark and Windows line ends are ignored."""
    images(tmp_path)
    (tmp_path / "b.txt").write_bytes("\ufeffa café\r\n\r\n  two  words \r\n".encode())
    (tmp_path / "dogs" / "a.txt").write_text("犬 on a sofa", encoding="utf-8")
    (tmp_path / "cats" / "c.txt").write_text("one\n\n\ntwo\n")
    (tmp_path / "notes.txt").write_text("without an image")
    assert by_name(tmp_path) == {
        "b.png": ["a café", "two  words"],
        "dogs/a.jpg": ["犬 on a sofa"],
        "cats/c.png": ["one", "two"],
    }


def test_captions_belong_to_their_images(tmp_path):
    """Image and caption share an index; images in subfolders have classes too."""
    images(tmp_path, "x/a.png", "y/b.png")
    for name in ("x/a", "y/b"):
        (tmp_path / f"{name}.txt").write_text(name)
    source = opened(tmp_path)
    assert source.captions == [["x/a"], ["y/b"]] and "2 captions from text files" in source.summary
    assert source.fetch([1]).unique().tolist() == [20]
    assert source.fetch([0]).unique().tolist() == [0]
    assert source.labels is not None and source.labels.classes == ["x", "y"]


@pytest.mark.parametrize(
    ("encoding", "text"), [("gbk", "红色的汽车"), ("shift_jis", "水曜日の猫"), ("koi8-r", "кошка")]
)
def test_texts_in_other_encodings_are_refused(tmp_path, encoding, text):
    """Decoded as Western text they would be wrong letters."""
    images(tmp_path, "a.png", "b.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(text.encode(encoding))
    assert "a.txt" in refused(tmp_path) and "UTF-8" in refused(tmp_path)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes("« Où êtes-vous, Zoë ? » ÉÉÉÉ…”—“\rtwo".encode("cp1252"))
    assert opened(tmp_path).captions == [["« Où êtes-vous, Zoë ? » ÉÉÉÉ…”—“", "two"]] * 2


@pytest.mark.parametrize("text", [{"en": "cat"}, [{"text": "cat"}]])
def test_objects_are_no_captions(tmp_path, text):
    images(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}))
    assert "line 1" in refused(tmp_path) and "data.source.caption_column" in refused(tmp_path)


@pytest.mark.parametrize("column", ["text", "caption", "captions"])
def test_rows_of_a_csv_file_are_captions(tmp_path, column):
    """Rows in any order, several per image, quoted commas, and other columns ignored."""
    images(tmp_path)
    rows = ["c.png,no", 'b.png,"one, two"', "dogs/a.jpg,woof", "./cats/../cats/c.png,meow", "b.png,three"]
    lines = [f"{name},{rest},extra" for name, rest in (row.split(",", 1) for row in rows[1:])]
    (tmp_path / "metadata.csv").write_text("\n".join([f"file_name,{column},license", *lines, "cats/c.png,purr,x", ""]))
    (tmp_path / "b.txt").write_text("not this one")
    assert by_name(tmp_path) == {"b.png": ["one, two", "three"], "dogs/a.jpg": ["woof"], "cats/c.png": ["meow", "purr"]}


def test_json_lines_hold_one_or_several_captions(tmp_path):
    images(tmp_path)
    entries = [
        {"file_name": "b.png", "text": "one"},
        {"file_name": "dogs/a.jpg", "captions": ["woof", " bark "], "license": 3},
        {"file_name": "cats/c.png", "caption": "meow"},
        {"file_name": "cats/c.png", "caption": "purr"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, entries)) + "\n")
    assert by_name(tmp_path) == {"b.png": ["one"], "dogs/a.jpg": ["woof", "bark"], "cats/c.png": ["meow", "purr"]}


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_captions_come_from_a_named_table_and_columns(tmp_path, ending):
    """In any encoding and with any separator; a cell of JSON or Parquet may hold several."""
    images(tmp_path)
    rows = pd.DataFrame({"path": IN_ORDER, "label": ["x", "y", "z"], "description": ["é", "two, three", "four"]})
    path = tmp_path / f"words.{ending}"
    lists = rows.assign(description=[[text, text.upper()] for text in rows.description])
    match ending:
        case "csv":
            rows.to_csv(path, index=False, sep=";", encoding="utf-16")
        case "tsv":
            rows.to_csv(path, index=False, sep="\t", encoding="cp1252")
        case "parquet":
            lists.to_parquet(path)
        case _:
            lists.to_json(path, orient="records", lines=ending == "jsonl")
    source = captioned(str(tmp_path), 8, 3, captions=path.name, file_column="path", caption_column="description")
    wanted = rows if ending in ("csv", "tsv") else lists
    assert source.captions == [text if isinstance(text, list) else [text] for text in wanted.description]
    assert f"{sum(map(len, source.captions))} captions from words.{ending}" in source.summary


def test_missing_captions_name_the_supported_files(tmp_path):
    message = refused(images(tmp_path))
    for part in (str(tmp_path), "metadata.csv", "metadata.jsonl", "b.txt", "data=folder"):
        assert part in message


def test_images_without_caption_are_named(tmp_path):
    images(tmp_path, *(f"{k}.png" for k in range(9)))
    (tmp_path / "3.txt").write_text("one")
    assert "8 of 9 images" in refused(tmp_path) and "(0.png, 1.png, 2.png, 4.png, 5.png and 3 more)" in refused(
        tmp_path
    )
    (tmp_path / "metadata.csv").write_text("file_name,text\n8.png,one\n")
    assert "metadata.csv has no caption for 8 of 9 images" in refused(tmp_path)


def test_image_of_another_root_without_caption_is_named(tmp_path):
    for root, captioned_file in (("a", "0.png"), ("b", "1.png")):
        images(tmp_path / root, "0.png", "1.png")
        (tmp_path / root / captioned_file).with_suffix(".txt").write_text("one")
    with pytest.raises(ValueError, match=r"2 of 4 images .*\(1\.png, \.\./b/0\.png\)"):
        captioned([str(tmp_path / "a"), str(tmp_path / "b")], 8, 3)


def test_rows_without_image_are_named(tmp_path):
    """Including files that are not images or lie outside of the root."""
    images(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one\nb.png,two\nmetadata.csv,three\n../a.png,four\n")
    message = refused(tmp_path)
    assert "3 files" in message and "(b.png, metadata.csv, ../a.png)" in message


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.txt", " \n\n", "1 empty caption (a.txt)"),
        ("a.txt", b"\xff\xfe\x00", "is not text in utf-16"),
        ("metadata.csv", "file_name,text\na.png,\n", "metadata.csv, line 2: the caption is empty"),
        ("metadata.csv", "file_name,text\n", "has 1 rows"),
        ("metadata.csv", "path,text\na.png,x\n", "one column named file_name or .* found path, text"),
        ("metadata.csv", "file_name,words\na.png,x\n", "one column named text or caption or captions"),
        ("metadata.csv", "file_name,text,caption\na.png,x,y\n", "one column named text or caption or captions"),
        ("metadata.csv", "file_name,text\na.png,one, two\n", "line 2: 3 cells under 2 names"),
        ("metadata.csv", "file_name,text\n,one\n", "line 2: the file name is empty"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "x"}\n\n{"file_name"\n',
            "metadata.jsonl, line 3 is not JSON",
        ),
        ("metadata.jsonl", '{"file_name": "a.png"}', "one column named text or caption or captions, found file_name"),
        ("metadata.jsonl", '["a.png", "x"]', "line 1 is not a JSON object"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": []}', "line 1: the caption is empty"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": null}', "line 1: the caption is empty"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": ["x", " "]}', "line 1: the caption is empty"),
        ("metadata.jsonl", "", "has no rows"),
    ],
)
def test_invalid_captions_raise_with_their_line(tmp_path, name, contents, message):
    images(tmp_path, "a.png")
    (tmp_path / name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    error = refused(tmp_path)
    assert all(part in error for part in message.split(".* "))


def test_two_metadata_files_raise(tmp_path):
    images(tmp_path, "a.png")
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("")
    assert "has both metadata.csv and metadata.jsonl" in refused(tmp_path)


def test_the_config_does_not_flip(tmp_path):
    images(tmp_path, *(f"{k}.png" for k in range(10)))
    for k in range(10):
        (tmp_path / f"{k}.txt").write_text(f"number {k}")
    data = instantiate(compose("train", "data=captions", f"data.root='{tmp_path}'", "data.val_fraction=0.2").data)
    data.prepare_data()
    data.setup()
    assert data.source.captions[7] == ["number 7"]
    assert not data.flip
    x = data.examples(2)
    assert x.shape == (2, 3, 64, 64) and x.dtype == torch.float32
