"""Render printed digits, 28x28 grayscale, in many fonts, slants and weights, as an MNIST substitute without a download.

The fonts come with matplotlib; the images depend on a fixed seed.
"""

import math
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from src.data.sources import InMemory, Labels, Source

COUNT = 10_000
FACES = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "cmr10", "cmss10", "cmtt10")
STYLES = ("", "-Bold", "-Oblique", "-Italic", "-BoldOblique", "-BoldItalic", "Bol", "Italic", "BolIta")


def glyphs(root: str | None, image_size: int, channels: int, prepare: bool = False) -> Source:
    """Return 10,000 labeled images for `data.source`, random in size, angle, slant, position and weight."""
    if (image_size, channels) != (28, 1):
        raise ValueError(
            f"data.image_size={image_size} data.channels={channels} must be 28 and 1 for glyphs; "
            "set data.image_size=28 data.channels=1"
        )
    generator = np.random.default_rng(0)
    digits = torch.arange(COUNT) % 10
    images = np.stack([_render_digit(int(digit), generator) for digit in digits])
    return InMemory(torch.from_numpy(images)[:, None], Labels(digits, [str(k) for k in range(10)]))


def _render_digit(digit: int, generator: np.random.Generator) -> np.ndarray:
    """Render at four times the size, rotate and shear about the center, dilate, and downsample."""
    paths = _fonts()
    font = ImageFont.truetype(paths[generator.integers(len(paths))], int(generator.uniform(72, 100)))
    image = Image.new("L", (112, 112))
    ImageDraw.Draw(image).text((56, 56), str(digit), fill=255, font=font, anchor="mm")
    angle, slant = math.radians(generator.normal(0, 8)), generator.normal(0, 0.15)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]) @ [[1, slant], [0, 1]]
    shift = [56, 56] - turn @ (56 + generator.normal(0, 5, 2))
    placed = image.transform(
        (112, 112), Image.Transform.AFFINE, np.c_[turn, shift].flatten(), Image.Resampling.BILINEAR
    )
    placed = placed.filter(ImageFilter.MaxFilter(int(generator.choice([1, 3, 5]))))
    return np.asarray(placed.resize((28, 28), Image.Resampling.BOX))


@cache
def _fonts() -> list[Path]:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = [path for face in FACES for style in STYLES if (path := folder / f"{face}{style}.ttf").is_file()]
    if not found:
        raise FileNotFoundError(f"no {', '.join(FACES)} in {folder}; reinstall matplotlib, which contains these fonts")
    return found
