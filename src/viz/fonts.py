"""Choose a font that has the characters of a text."""

import os
from functools import cache
from pathlib import Path

PLACEHOLDERS = ("Last Resort High-Efficiency",)
"""Fonts whose glyphs are boxes for blocks of characters."""


def default_font() -> str:
    """Return the file of DejaVu Sans, which comes with matplotlib: Pillow's default font has Latin letters only."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@cache
def font_for(text: str) -> tuple[str, str]:
    """Return the file of a font for one line of text, and the text with the characters that this font has.

    The font is DejaVu Sans, or another installed font if that has more of the characters. Characters without a glyph
    become their code points, such as [U+6C34].
    """
    text = " ".join(text.split())
    best, missing = default_font(), set(map(ord, text)) - _characters(default_font())
    if missing:
        from matplotlib.font_manager import fontManager

        fonts = {font.fname for font in fontManager.ttflist if font.style == "normal" and font.name not in PLACEHOLDERS}
        for path in sorted(filter(os.path.isfile, fonts)):
            if missing and len(rest := set(map(ord, text)) - _characters(path)) < len(missing):
                best, missing = path, rest
    return best, "".join(f"[U+{ord(each):04X}]" if ord(each) in missing else each for each in text)


@cache
def _characters(path: str) -> frozenset[int]:
    """Return the code points of a font."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())
