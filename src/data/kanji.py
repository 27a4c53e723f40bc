"""Japanese characters as strokes, with captions that name their parts, from the package kanjivg.

KanjiVG is by Ulrich Apel, under CC BY-SA 3.0 (https://kanjivg.tagaini.net). Each character is an SVG file of 109x109
units: a tree of parts with positions, whose leaves are the strokes in the order of writing.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import torch
from fontTools.pens.recordingPen import RecordingPen
from fontTools.svgLib.path import parse_path
from PIL import Image, ImageDraw

from src.data.glyphs import Glyphs, GlyphSource, load_glyphs, package_files, square_size
from src.data.sources import Source

UNITS = 109
"""Width and height of a character in the coordinates of its SVG file."""
CURVE_PIECES = 8
"""Straight pieces that a Bézier curve is drawn as; none is longer than a pixel of 32x32 in most characters."""
CANVAS = 256
"""Minimum number of pixels per side that characters are drawn at before they are reduced."""
DRAWING = "1"
"""Changes with the code that draws characters or names their parts, so that no stored picture is out of date."""
MIN_OTHERS = 3
"""In how many others a part of a held-out character occurs, so that the split leaves some in training."""

SVG, KVG = "{http://www.w3.org/2000/svg}", "{http://kanjivg.tagaini.net}"
FILE = re.compile(r"([0-9a-f]{5})\.svg")  # variants have a suffix, such as -Kaisho
IDEOGRAPHS = range(0x4E00, 0xA000)

POSITIONS = {
    "left": "left",
    "right": "right",
    "top": "top",
    "bottom": "bottom",
    "middle": "middle",
    "kamae": "around",
    "kamaec": "inside",
    "tare": "upper left",
    "tarec": "lower right",
    "nyo": "lower left",
    "nyoc": "upper right",
}
"""English for the positions of KanjiVG, whose suffix "c" means the part that the other one surrounds."""

Points = npt.NDArray[np.float64]


class Part(NamedTuple):
    """A part of a character: a character, what it is a form of, and its position, a key of `POSITIONS` (or None)."""

    element: str
    original: str | None
    position: str | None


class Character(NamedTuple):
    """A character, its strokes as polylines (P, 2) in SVG units, x to the right and y down, and its parts.

    `parts` are empty if they do not make up the whole character.
    """

    text: str
    strokes: list[Points]
    parts: list[Part]


def kanji(
    root: str | None,
    image_size: int | Sequence[int],
    channels: int,
    prepare: bool = False,
    *,
    stroke_width: float = 4.0,
    held_out: int = 300,
) -> Source:
    """Open all 6,413 characters, black on white. Drawing takes seconds, so the folder `root` keeps the pictures.

    Args:
        stroke_width: in units of 1/109 of the image size; KanjiVG has 3.
        held_out: the number of characters that are in neither training nor validation: each consists of exactly two
            parts that occur in the same position in others.

    Raises ValueError for a missing package and values out of range.
    """
    if channels != 1:
        raise ValueError(f"data.channels={channels} must be 1 for data=kanji")
    size = square_size(image_size, 8, "kanji")
    if not 0 < stroke_width <= UNITS / 4:
        raise ValueError(f"data.source.stroke_width={stroke_width} must be in (0, {UNITS / 4:g}]; the default is 4")
    release, _ = package_files("kanjivg", "kanji")
    key = ("kanji", DRAWING, release, size, stroke_width)
    return GlyphSource(load_glyphs(root, key, lambda: draw_characters(size, stroke_width)), held_out, MIN_OTHERS)


def draw_characters(image_size: int, stroke_width: float) -> Glyphs:
    """Draw and caption every character."""
    characters = [read_character(path) for path in svg_files().values()]
    names = part_names(characters)
    images = [draw(character.strokes, image_size, stroke_width) for character in characters]
    return Glyphs(
        torch.from_numpy(np.stack(images))[:, None],
        [f"U+{ord(character.text):04X}" for character in characters],
        [describe_parts(character, names) for character in characters],
        [combined_parts(character) for character in characters],
    )


@cache
def svg_files() -> Mapping[str, Path]:
    """Return the SVG file of each CJK unified ideograph, without stylistic variants, in code-point order."""
    found = {}
    for file in package_files("kanjivg", "kanji")[1]:
        if (match := FILE.fullmatch(file.name)) and int(match[1], 16) in IDEOGRAPHS:
            found[chr(int(match[1], 16))] = Path(str(file.locate()))
    return dict(sorted(found.items()))


def read_character(path: Path) -> Character:
    """Read the strokes and the parts of a character from its SVG file."""
    whole = ElementTree.parse(path).find(f"{SVG}g/{SVG}g")
    assert whole is not None, f"{path} has no strokes"
    curves = [bezier_curves(stroke.attrib["d"]) for stroke in whole.iter(f"{SVG}path")]
    text = chr(int(path.stem, 16))
    groups = whole.findall(f"{SVG}g")
    parts = [
        Part(element, group.get(f"{KVG}original"), group.get(f"{KVG}position"))
        for group in groups
        if (element := group.get(f"{KVG}element"))
    ]
    complete = len(parts) == len(groups) >= 2 and whole.find(f"{SVG}path") is None
    return Character(text, [flatten(each) for each in curves], parts if complete else [])


# Strokes


def bezier_curves(path: str) -> Points:
    """Return the cubic Bézier curves (N, 4, 2) of the `d` attribute of an SVG path: start, two control points, end.

    A straight line has its control points at thirds of its length. Raises ValueError for an invalid path, and for
    quadratic curves.
    """
    pen = RecordingPen()
    parse_path(path, pen)
    curves, start = [], np.zeros(2)
    for command, points in pen.value:
        if command == "qCurveTo":
            raise ValueError(f"unknown command of a quadratic curve in the path {path!r:.60}")
        end = np.array(points[-1] if points else start)
        if command == "lineTo":
            curves.append([start, start + (end - start) / 3, end - (end - start) / 3, end])
        elif command == "curveTo":
            curves.append([start, *points])
        start = end
    return np.array(curves).reshape(-1, 4, 2)


def flatten(curves: Points, pieces: int = CURVE_PIECES) -> Points:
    """Return connected cubic Bézier curves (N, 4, 2) as a polyline (N * pieces + 1, 2) of points on them."""
    u = np.linspace(0, 1, pieces + 1)[:, None]
    weights = np.concatenate([(1 - u) ** 3, 3 * u * (1 - u) ** 2, 3 * u**2 * (1 - u), u**3], axis=1)
    points = np.einsum("uk,nkd->nud", weights, curves)
    return np.concatenate([points[:1, 0], points[:, 1:].reshape(-1, 2)])


def draw(strokes: Sequence[Points], image_size: int, stroke_width: float) -> npt.NDArray[np.uint8]:
    """Return the strokes (S, S), black on white, with round ends and joins, averaged from a larger picture."""
    factor = max(4, -(-CANVAS // image_size))
    side = image_size * factor
    scale = side / UNITS
    width, radius = round(stroke_width * scale), stroke_width * scale / 2
    picture = Image.new("L", (side, side), 255)
    pen = ImageDraw.Draw(picture)
    for stroke in strokes:
        points = [(x, y) for x, y in (stroke * scale).tolist()]
        pen.line(points, fill=0, width=width)
        for x, y in points:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)
    return np.asarray(picture.reduce(factor))


# Captions


@cache
def radical_names() -> Mapping[str, str]:
    """Return the English name of each of the 214 Kangxi radicals, such as "mouth", by its character."""
    radicals = map(chr, range(0x2F00, 0x2FD6))
    return {unicodedata.normalize("NFKC", r): unicodedata.name(r)[len("KANGXI RADICAL ") :].lower() for r in radicals}


def part_names(characters: Sequence[Character]) -> Mapping[tuple[str, str | None], str]:
    """Return the name of each part in each position (element, position).

    A radical and a form of it have its English name. Where several of them share a position, the most frequent one
    keeps the name and the others append their character ("water left", but "water 水 left"). Every other part is named
    by its character.
    """
    radicals = radical_names()
    originals = {part.element: part.original for each in characters for part in each.parts if part.original}
    counts = Counter((part.element, part.position) for each in characters for part in each.parts)
    names: dict[tuple[str, str | None], str] = {}
    taken = set()
    for element, position in sorted(counts, key=lambda key: (-counts[key], key[0])):
        name = radicals.get(element) or radicals.get(originals.get(element, ""), element)
        names[element, position] = f"{name} {element}" if (name, position) in taken else name
        taken.add((name, position))
    return names


def describe_parts(character: Character, names: Mapping[tuple[str, str | None], str]) -> str:
    """Return the parts with their positions, such as "mouth left, dog right"; else the name of the character."""
    if not character.parts:
        return radical_names().get(character.text, character.text)
    placed = ((names[part.element, part.position], POSITIONS.get(part.position or "")) for part in character.parts)
    return ", ".join(f"{name} {place}" if place else name for name, place in placed)


def combined_parts(character: Character) -> list[str]:
    """Return the parts, with positions, of a character that consists of exactly two parts in known positions."""
    if len(character.parts) != 2 or any(part.position not in POSITIONS for part in character.parts):
        return []
    return [f"{part.element} {part.position}" for part in character.parts]
