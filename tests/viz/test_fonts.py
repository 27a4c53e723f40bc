"""Titles with characters that DejaVu Sans lacks."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.font_manager import FontEntry, fontManager
from PIL import Image

from src.viz import distributions
from src.viz.fonts import font_for
from src.viz.images import add_title

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
UNASSIGNED = "\u0378"
SCRIPT_G = "\u210a"  # DejaVu Sans has no glyph for it, STIX has


def darkness(text: str) -> np.ndarray:
    return 255 - np.asarray(add_title(Image.new("RGB", (200, 4), "white"), text), dtype=int)


def test_character_of_no_font_becomes_its_code_point():
    path, text = font_for(f"a {UNASSIGNED}\nb")
    assert (Path(path).name, text) == ("DejaVuSans.ttf", "a [U+0378] b")
    assert (darkness(UNASSIGNED) == darkness("[U+0378]")).all()


def test_text_is_drawn_by_a_font_that_has_it(monkeypatch):
    last_resort = FontEntry(fname=str(FONTS / "LastResortHE-Regular.ttf"), name="Last Resort High-Efficiency")
    stix = FontEntry(fname=str(FONTS / "STIXGeneral.ttf"), name="STIXGeneral")
    gone = FontEntry(fname=str(FONTS / "removed.ttf"), name="Removed")
    monkeypatch.setattr(fontManager, "ttflist", [gone, last_resort, stix])
    font_for.cache_clear()
    path, text = font_for(f"{SCRIPT_G} é {UNASSIGNED}")
    assert (Path(path).name, text) == ("STIXGeneral.ttf", f"{SCRIPT_G} é [U+0378]")
    assert darkness(SCRIPT_G).sum() > 0
    assert Path(font_for("é")[0]).name == "DejaVuSans.ttf"
    font_for.cache_clear()


def drawn_columns(name: str, category: str) -> np.ndarray:
    """Draw a column of numbers and one of categories, with a legend."""
    values = torch.tensor([[0.5, 0.0], [1.5, 1.0]])
    picture = distributions.marginals(values, values, [name, "b"], [[], [category, "other"]], (category, name))
    return np.asarray(picture, dtype=int)


def test_labels_of_charts_have_the_same_characters():
    """Titles, categories on an axis and the legend; dollar signs are not mathematics, which could be invalid."""
    placeholder = drawn_columns("$\\frac [U+0378]$", "[U+0378]")
    assert (drawn_columns(f"$\\frac {UNASSIGNED}$", UNASSIGNED) == placeholder).all()
    assert (drawn_columns("$\\frac [U+0379]$", "[U+0378]") != placeholder).any()


def test_labels_of_charts_use_a_font_that_has_them(monkeypatch):
    stix = FontEntry(fname=str(FONTS / "STIXGeneral.ttf"), name="STIXGeneral")
    box = drawn_columns(f"[U+{ord(SCRIPT_G):04X}]", "a")
    monkeypatch.setattr(fontManager, "ttflist", [stix])
    font_for.cache_clear()
    named = drawn_columns(SCRIPT_G, "a")
    font_for.cache_clear()
    assert named.shape == box.shape and (named != box).any()
    assert (named != drawn_columns(" ", "a")).any()
