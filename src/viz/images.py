"""Image grids, labels, films and GIFs."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from src.viz.charts import GAP, MOST_ROWS, evenly, extent_of, pairs, scatter

if TYPE_CHECKING:
    pass


def draw(
    samples: Tensor,
    real: Tensor | None = None,
    titles: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Image.Image:
    """Samples as a person wants to see them: images uint8 (N, C, H, W) as a grid, points (N, 2) as a scatter plot.

    Of one number each there is a histogram, of three or more `pairs`, of which the first four are shown. With `real`
    data of the same kind, they stand to the right of the grid, or lie under the points. Of samples that were asked to
    be what their `titles` say, each thing has a row, or a plot of the first two numbers, of its own. `columns` are the
    names of numbers.
    """
    groups: dict[str, list[int]] = {}
    for k, title in enumerate(titles or ()):
        groups.setdefault(title, []).append(k)
    apart = 0 < len(groups) <= MOST_ROWS
    if samples.ndim == 2:
        if not apart:
            return (pairs if samples.shape[1] > 2 else scatter)(samples, real, columns=columns)
        both = samples if real is None else torch.cat([samples, real])
        extent = extent_of(both) if both.shape[1] > 1 else None
        panels = [scatter(samples[places], real, extent, columns=columns) for places in groups.values()]
        return side_by_side(list(map(captioned, panels, groups)), gap=8)
    picture = rows([samples[places] for places in groups.values()], list(groups)) if apart else grid(samples)
    if real is None:
        return picture
    pair = [captioned(picture, "drawn"), captioned(grid(real), "real, held out")]
    return side_by_side(pair, gap=max(8, picture.height // 24))


def grid(images: Tensor, columns: int | None = None, cell: int = 64) -> Image.Image:
    """uint8 images (N, C, H, W), C = 1 or 3, in rows; tiny ones are enlarged by a whole factor to about `cell`."""
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


def rows(groups: Sequence[Tensor], titles: Sequence[str]) -> Image.Image:
    """A row for each group of uint8 images (N, C, H, W), with its title over it."""
    columns = max(map(len, groups))
    strips = [grid(group, columns=columns) for group in groups]
    font = letters(12)
    width = max(*(strip.width for strip in strips), *(math.ceil(font.getlength(title)) + 2 * GAP for title in titles))
    canvas = Image.new("RGB", (width, sum(strip.height + 18 for strip in strips)), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    for strip, title in zip(strips, titles, strict=True):
        pen.text((GAP, top + 9), title, fill="black", anchor="lm", font=font)
        canvas.paste(strip, (0, top + 18))
        top += strip.height + 18
    return canvas


@cache
def letters(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own: Pillow's has no letters but those of English."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """The picture with a line of text over it."""
    canvas = Image.new("RGB", (picture.width, picture.height + 22), "white")
    canvas.paste(picture, (0, 22))
    ImageDraw.Draw(canvas).text((GAP, 11), text, fill="black", anchor="lm", font=letters(13))
    return canvas


def side_by_side(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures in one row on white, `gap` pixels apart."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + gap
    return canvas


def film_strip(frames: Sequence[Tensor], count: int = 12) -> Image.Image:
    """Up to `count` of the frames, each uint8 (N, C, H, W) or points (N, 2), left to right: a row per sample."""
    chosen = [frames[i] for i in evenly(len(frames), count)]
    if chosen[0].ndim == 2:
        extent = extent_of(chosen[-1]) if chosen[-1].shape[1] > 1 else None
        return side_by_side([scatter(frame, extent=extent, size=2.0) for frame in chosen], gap=0)
    strip = torch.stack(chosen, dim=1)  # (N, frames, C, H, W)
    return grid(strip.flatten(0, 1), columns=len(chosen))


def save_gif(frames: Sequence[Tensor], path: Path, count: int = 40) -> None:
    """An animation of up to `count` of the frames that rests on the last one."""
    chosen = [frames[i] for i in evenly(len(frames), count)]
    if chosen[0].ndim == 2:
        extent = extent_of(chosen[-1]) if chosen[-1].shape[1] > 1 else None
        pictures = [scatter(frame, extent=extent, size=4.0) for frame in chosen]
    else:
        pictures = [grid(frame) for frame in chosen]
    durations = [60] * (len(pictures) - 1) + [2000]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def neighbors(samples: Tensor, nearest: Tensor, distances: Tensor, among: int) -> Image.Image:
    """Samples over the training samples nearest to them, both uint8 (N, C, H, W), by their distance (N,)."""
    order = distances.argsort()
    picture = labelled_rows([samples[order], nearest[order]], ["drawn", "nearest"])
    canvas = Image.new("RGB", (picture.width, picture.height + 46), "white")
    canvas.paste(picture, (0, 24))
    pen = ImageDraw.Draw(canvas)
    title = f"Drawn samples and the nearest of {among:,} training samples, the nearest first"
    pen.text((6, 12), title, fill="black", anchor="lm", font=letters(13))
    pen.text((6, picture.height + 35), "RMS difference", fill="black", anchor="lm", font=letters(13))
    width = (picture.width - 140 - GAP) / len(order)
    for k, distance in enumerate(distances[order].tolist()):
        place = (140 + GAP + (k + 0.5) * width, picture.height + 35)
        pen.text(place, f"{distance:.2f}", fill="black", anchor="mm", font=letters(12))
    return canvas


def labelled_rows(rows: Sequence[Tensor], labels: Sequence[str]) -> Image.Image:
    """Rows of uint8 images (N, C, H, W), each with its name on the left."""
    strip = grid(torch.cat(list(rows)), columns=len(rows[0]))
    canvas = Image.new("RGB", (strip.width + 140, strip.height), "white")
    canvas.paste(strip, (140, 0))
    pen = ImageDraw.Draw(canvas)
    height = (strip.height - GAP) / len(rows)
    for k, label in enumerate(labels):
        pen.text((6, GAP + (k + 0.5) * height), label, fill="black", anchor="lm", font=letters(13))
    return canvas
