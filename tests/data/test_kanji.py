"""Kanji: strokes against the SVG files, curves against de Casteljau's algorithm, captions against the text of files."""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from src.data import kanji
from src.data.kanji import (
    POSITIONS,
    bezier_curves,
    combined_parts,
    describe_parts,
    draw,
    flatten,
    part_names,
    radical_names,
    read_character,
    svg_files,
)

SOME = "一口林語国道唄吠"


def read(text: str) -> kanji.Character:
    return read_character(svg_files()[text])


def test_characters_are_ideographs_without_variants():
    files = svg_files()
    assert len(files) == 6413
    assert all(f"{ord(text):05x}.svg" == path.name for text, path in files.items())
    assert {"一", "鬱", "龠"} <= set(files) and not {"あ", "ア", "A", "⺡"} & set(files)


def test_stroke_counts_are_those_of_dictionaries():
    counts = dict(zip(SOME, (1, 3, 8, 14, 8, 12, 10, 7), strict=True))
    assert {text: len(read(text).strokes) for text in SOME} == counts
    for text in SOME:
        assert len(read(text).strokes) == svg_files()[text].read_text().count("<path")


def test_strokes_begin_where_the_file_says():
    for text in SOME:
        starts = re.findall(r' d="M\s*([\d.]+)[,\s]([\d.]+)', svg_files()[text].read_text())
        assert [stroke[0].tolist() for stroke in read(text).strokes] == [[float(x), float(y)] for x, y in starts]


def de_casteljau(points, u):
    while len(points) > 1:
        points = [(1 - u) * a + u * b for a, b in pairwise(points)]
    return points[0]


def test_polylines_lie_on_their_curves():
    curves = np.random.default_rng(0).uniform(0, 109, (1, 4, 2))
    line = flatten(curves, 10)
    for k, point in enumerate(line):
        np.testing.assert_allclose(point, de_casteljau(list(curves[0]), k / 10))


def test_connected_curves_share_one_point():
    curves = bezier_curves("M0,0C1,2,3,4,5,6c1,2,3,4,5,6")
    line = flatten(curves, 4)
    assert line.shape == (9, 2)
    np.testing.assert_allclose(line[[0, 4, 8]], [[0, 0], [5, 6], [10, 12]])


def test_path_commands_equal_absolute_curves():
    absolute = "M10,20C12,24 16,28 20,30C24,32 30,31 33,29"
    for path in (
        "m10,20c2,4,6,8,10,10c4,2,10,1,13-1",
        "M10 20c2 4 6 8 10 10s10 1 13-1",  # reflects (16, 28) to (24, 32)
        "M10,20C12,24,16,28,20,30S30,31,33,29",
        "M10,20c2,4,6,8,10,10 4,2,10,1,13-1",  # a repeated command may be omitted
        "M1e1,20C12,24,16,28,20,30,24,32,30,31,33,29",
    ):
        np.testing.assert_allclose(bezier_curves(path), bezier_curves(absolute), err_msg=path)


def test_smooth_curves_after_lines_start_at_the_point():
    np.testing.assert_allclose(bezier_curves("M0,0L2,2S5,6,8,8")[1], [[2, 2], [2, 2], [5, 6], [8, 8]])


def test_lines_are_straight_and_even():
    points = [[0, 0], [3, 0], [3, 6], [0, 0], [1, 1]]
    for path in ("M0,0L3,0L3,6L0,0L1,1", "M0,0 3,0 3,6 0,0 1,1", "M0,0H3V6ZL1,1", "m0,0h3v6zl1,1"):
        curves = bezier_curves(path)
        np.testing.assert_allclose(curves[:, 0], points[:-1], err_msg=path)
        np.testing.assert_allclose(curves[:, 3], points[1:], err_msg=path)
        middle = flatten(curves, 2)[1::2]
        np.testing.assert_allclose(middle, (curves[:, 0] + curves[:, 3]) / 2, atol=1e-12, err_msg=path)


def test_unknown_commands_are_refused():
    for path in ("M0,0K1", "M0,0Q1,1,2,2", "3,4"):
        with pytest.raises(ValueError, match=r"[Pp]ath"):
            bezier_curves(path)


def test_ink_covers_strokes_and_nothing_else():
    """At 109 pixels a pixel is a unit: ends are black, and no ink is farther from a stroke than half its width."""
    width = 6.0
    for text in "口国":
        strokes = read(text).strokes
        picture = draw(strokes, 109, width)
        points = np.concatenate([flatten(bezier_curves(d), 50) for d in paths_of(text)])
        ends = np.concatenate([[stroke[0], stroke[-1]] for stroke in strokes])
        assert (picture[ends[:, 1].astype(int), ends[:, 0].astype(int)] == 0).all()
        y, x = np.nonzero(picture < 255)
        pixels = np.stack([x + 0.5, y + 0.5], axis=1)
        distance = np.sqrt(((pixels[:, None] - points[None]) ** 2).sum(-1)).min(1)
        assert distance.max() < width / 2 + 1
        low, high = points.min(0) - width / 2, points.max(0) + width / 2
        np.testing.assert_allclose([x.min(), y.min()], low, atol=1)
        np.testing.assert_allclose([x.max() + 1, y.max() + 1], high, atol=1)


def paths_of(text: str) -> list[str]:
    return re.findall(r' d="([^"]+)"', svg_files()[text].read_text())


def test_strokes_darken_by_their_area():
    """A straight stroke with round ends has the area length x width + pi width^2 / 4."""
    line, width = np.array([[20.0, 50.0], [80.0, 70.0]]), 5.0
    area = np.hypot(60, 20) * width + np.pi * width**2 / 4
    for size in (32, 64):
        ink = (255 - draw([line], size, width).astype(float)).sum() / 255 * (109 / size) ** 2
        assert ink == pytest.approx(area, rel=0.08)


def test_radicals_have_the_names_of_unicode():
    names = radical_names()
    assert len(names) == 214
    assert {"口": "mouth", "犬": "dog", "木": "tree", "水": "water", "一": "one"}.items() <= names.items()


def located_groups(text: str) -> list[tuple[str, str]]:
    """Return element and position of the groups one level below the character, by the indentation of the file."""
    lines = svg_files()[text].read_text().splitlines()
    groups = [line for line in lines if line.startswith("\t<g ")]
    return [
        (re.search('kvg:element="([^"]+)"', g)[1], re.search('kvg:position="([^"]+)"', g)[1])  # type: ignore[index]
        for g in groups
    ]


def test_captions_name_the_parts_of_the_file():
    characters = [read(text) for text in "唄吠語"]
    names = part_names(characters)
    assert [describe_parts(each, names) for each in characters] == [
        "mouth left, shell right",
        "mouth left, dog right",
        "speech left, 吾 right",
    ]
    for each in characters:
        parts = located_groups(each.text)
        assert combined_parts(each) == [f"{element} {position}" for element, position in parts]
        expected = [f"{radical_names().get(element, element)} {POSITIONS[position]}" for element, position in parts]
        assert describe_parts(each, names) == ", ".join(expected)


def test_forms_of_a_radical_have_its_name():
    """氵 is water at the left of 海; 灬 and 火 are both fire at the bottom, where the rarer one adds its character."""
    characters = [read(text) for text in "海照点熱災"]
    names = part_names(characters)
    assert names["氵", "left"] == "water"
    assert names["灬", "bottom"] == "fire"
    assert names["火", "bottom"] == "fire 火"


def test_characters_without_located_parts_have_their_own_name():
    names = part_names([read("斥")])
    assert describe_parts(read("一"), names) == "one"
    assert describe_parts(read("年"), names) == "年"
    assert describe_parts(read("斥"), names) == "axe, dot"  # parts without positions
    assert [combined_parts(read(text)) for text in "一年斥"] == [[], [], []]


def few(monkeypatch: pytest.MonkeyPatch, step: int = 5) -> None:
    """Leave every `step`-th character, which draws in a second."""
    some = dict(list(svg_files().items())[::step])
    monkeypatch.setattr(kanji, "svg_files", lambda: some)
    monkeypatch.setattr(kanji, "CANVAS", 64)


def test_source_has_an_image_an_id_and_a_caption_per_character(monkeypatch, tmp_path):
    few(monkeypatch)
    source = kanji.kanji(str(tmp_path), 16, 1, held_out=3)
    assert source.ids is not None and source.captions is not None
    assert len(source) == len(source.ids) == len(source.captions) == len(kanji.svg_files()) - 3
    for i in (0, 100):
        text = chr(int(source.ids[i].removeprefix("U+"), 16))
        np.testing.assert_array_equal(source.fetch([i])[0, 0], draw(read(text).strokes, 16, 4.0))
    held_out = [source.glyphs.ids[i] for i in source.held_out]  # type: ignore[attr-defined]
    assert not set(held_out) & set(source.ids)
    counts = Counter(part for each in source.ids for part in combined_parts(read(chr(int(each[2:], 16)))))
    for each in held_out:
        parts = combined_parts(read(chr(int(each[2:], 16))))
        assert len(parts) == 2 and all(counts[part] >= 3 for part in parts)


def test_values_out_of_range_are_refused():
    for message, values in {
        r"data\.channels=3": (32, 3, 4.0),
        r"data\.image_size=4": (4, 1, 4.0),
        r"data\.image_size=\[32,16\]": ([32, 16], 1, 4.0),
        r"data\.source\.stroke_width=0": (32, 1, 0.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            kanji.kanji(None, *values[:2], stroke_width=values[2])
