"""Image grids, titles, film strips and GIFs. Images are uint8 (N, C, H, W), C = 1 or 3."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from src.viz.charts import axis_limits, evenly_spaced_indices, pair_plot, scatter
from src.viz.tables import format_number

GAP = 2
"""Pixels between images."""
LABEL_WIDTH = 140
MAX_GROUPS = 16
"""Maximum number of titles with a separate row; with more, the rows are too small to read."""


def draw_samples(
    samples: Tensor,
    real: Tensor | None = None,
    titles: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Image.Image:
    """Draw images as a grid, points (N, 2) as a scatter plot, (N, 1) as a histogram, others as a pair plot.

    Grids of `real` images are to the right of the samples, `real` points under them. Samples with `titles` get
    one row or plot per title. `columns` names the features of points.
    """
    groups: dict[str, list[int]] = {}
    for k, title in enumerate(titles or ()):
        groups.setdefault(title, []).append(k)
    grouped = 0 < len(groups) <= MAX_GROUPS
    if samples.ndim == 2:
        if not grouped:
            return (pair_plot if samples.shape[1] > 2 else scatter)(samples, real, columns=columns)
        both = samples if real is None else torch.cat([samples, real])
        limits = axis_limits(both) if both.shape[1] > 1 else None
        plots = [scatter(samples[indices], real, limits, columns=columns) for indices in groups.values()]
        return side_by_side(list(map(add_title, plots, groups)), gap=8)
    picture = titled_rows([samples[i] for i in groups.values()], list(groups)) if grouped else image_grid(samples)
    if real is None:
        return picture
    pair = [add_title(picture, "samples"), add_title(image_grid(real), "validation data")]
    return side_by_side(pair, gap=max(8, picture.height // 24))


def image_grid(images: Tensor, columns: int | None = None, cell: int = 64) -> Image.Image:
    """Draw images in rows of `columns`; enlarge small ones by an integer factor to about `cell` pixels."""
    count, channels, height, width = images.shape
    columns = columns or max(1, round(count**0.5))
    rows = -(-count // columns)
    scale = max(1, round(cell / max(height, width)))
    canvas = np.full((rows * (height * scale + GAP) + GAP, columns * (width * scale + GAP) + GAP, 3), 255, np.uint8)
    pixels = images.expand(-1, 3, -1, -1) if channels == 1 else images
    enlarged = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).cpu().numpy()
    for k, image in enumerate(enlarged):
        top = GAP + k // columns * (height * scale + GAP)
        left = GAP + k % columns * (width * scale + GAP)
        canvas[top : top + height * scale, left : left + width * scale] = image
    return Image.fromarray(canvas)


def titled_rows(groups: Sequence[Tensor], titles: Sequence[str]) -> Image.Image:
    """Draw one row per group of images, with its title above it."""
    columns = max(map(len, groups))
    rows = [image_grid(group, columns=columns) for group in groups]
    font = text_font(12)
    width = max(*(row.width for row in rows), *(math.ceil(font.getlength(title)) + 2 * GAP for title in titles))
    canvas = Image.new("RGB", (width, sum(row.height + 18 for row in rows)), "white")
    top = 0
    for row, title in zip(rows, titles, strict=True):
        draw_text(canvas, (GAP, top + 9), title, 12)
        canvas.paste(row, (0, top + 18))
        top += row.height + 18
    return canvas


@cache
def text_font(size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which comes with matplotlib: Pillow's default font has Latin letters only."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def draw_text(picture: Image.Image, position: tuple[float, float], text: str, size: int, anchor: str = "lm") -> None:
    """Write one line of black text into a picture; `anchor` is Pillow's."""
    ImageDraw.Draw(picture).text(position, text, fill="black", anchor=anchor, font=text_font(size))


def add_title(picture: Image.Image, text: str) -> Image.Image:
    """Return the picture with a line of text above it."""
    canvas = Image.new(
        "RGB", (max(picture.width, math.ceil(text_font(13).getlength(text)) + 2 * GAP), picture.height + 22), "white"
    )
    canvas.paste(picture, (0, 22))
    draw_text(canvas, (GAP, 11), text, 13)
    return canvas


def side_by_side(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    """Join pictures in one row on white, `gap` pixels apart."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + gap
    return canvas


def film_strip(frames: Sequence[Tensor], captions: Sequence[str] = (), count: int = 12) -> Image.Image:
    """Draw up to `count` frames from left to right, each images or points (N, D), with captions under them."""
    chosen = evenly_spaced_indices(len(frames), count)
    shown = [frames[i] for i in chosen]
    if shown[0].ndim == 2:
        limits = axis_limits(shown[-1]) if shown[-1].shape[1] > 1 else None
        strip = side_by_side([scatter(frame, limits=limits, size=2.0) for frame in shown], gap=0)
    else:
        strip = image_grid(torch.stack(shown, dim=1).flatten(0, 1), columns=len(shown))  # a row per sample
    if not captions:
        return strip
    canvas = Image.new("RGB", (strip.width, strip.height + 20), "white")
    canvas.paste(strip, (0, 0))
    for k, i in enumerate(chosen):
        draw_text(canvas, ((k + 0.5) * strip.width / len(chosen), strip.height + 9), captions[i], 11, "mm")
    return canvas


def save_gif(frames: Sequence[Tensor], path: Path, count: int = 40) -> None:
    """Save an animation of up to `count` frames; it pauses on the last one."""
    chosen = [frames[i] for i in evenly_spaced_indices(len(frames), count)]
    if chosen[0].ndim == 2:
        limits = axis_limits(chosen[-1]) if chosen[-1].shape[1] > 1 else None
        pictures = [scatter(frame, limits=limits, size=4.0) for frame in chosen]
    else:
        pictures = [image_grid(frame) for frame in chosen]
    durations = [60] * (len(pictures) - 1) + [2000]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def neighbor_rows(samples: Tensor, nearest: Tensor, distances: Tensor, num_candidates: int) -> Image.Image:
    """Draw samples above the training images nearest to them, both (N, C, H, W), in order of distance (N,)."""
    order = distances.argsort()
    rows = labeled_rows([samples[order], nearest[order]], ["samples", "nearest"])
    title = f"Samples and the nearest of {num_candidates:,} training images"
    picture = add_title(rows, title)
    canvas = Image.new("RGB", (picture.width, picture.height + 22), "white")
    canvas.paste(picture, (0, 0))
    draw_text(canvas, (6, picture.height + 11), "RMS difference", 13)
    width = (rows.width - LABEL_WIDTH - GAP) / len(order)
    for k, distance in enumerate(distances[order].tolist()):
        position = (LABEL_WIDTH + GAP + (k + 0.5) * width, picture.height + 11)
        draw_text(canvas, position, format_number(distance, 0.1), 12, "mm")
    return canvas


def labeled_rows(rows: Sequence[Tensor], labels: Sequence[str]) -> Image.Image:
    """Draw rows of images, all of one length, each with its label on the left."""
    grid = image_grid(torch.cat(list(rows)), columns=len(rows[0]))
    width = max(LABEL_WIDTH, *(math.ceil(text_font(13).getlength(label)) + 12 for label in labels))
    canvas = Image.new("RGB", (grid.width + width, grid.height), "white")
    canvas.paste(grid, (width, 0))
    height = (grid.height - GAP) / len(rows)
    for k, label in enumerate(labels):
        draw_text(canvas, (6, GAP + (k + 0.5) * height), label, 13)
    return canvas
