"""Image grids, titles, trajectories and GIFs.

Images are uint8 (N, C, H, W), C = 1 or 3. Signals (N, C, L) and volumes (N, 1 or 3, D, H, W) become images by
`as_images`; 0 and 255 are the ends of their range.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from src.viz.distributions import axis_limits, pair_plot, scatter
from src.viz.figures import COLORS, evenly_spaced_indices
from src.viz.fonts import font_for
from src.viz.tables import format_number

CELL, GAP, LABEL_WIDTH, TITLE_HEIGHT = 64, 2, 140, 22
SIGNAL_SIZE = (160, 80)
"""Pixels: the usual side of an image, the space between images, of labels, and of titles; the plot of a signal."""
MAX_GROUPS = 16  # maximum number of titles with a separate block; with more, the blocks are too small to read


def draw_samples(
    samples: Tensor,
    real: Tensor | None = None,
    titles: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Image.Image:
    """Draw images as a grid, points (N, 2) as a scatter plot, (N, 1) as a histogram, other rows as a pair plot.

    Grids of `real` images are to the right of the samples, `real` points under them. Samples with `titles` get one
    block of rows or one plot per title. `columns` names the features of points.
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
        return tile(list(map(add_title, plots, groups)), columns=math.ceil(len(plots) ** 0.5))
    grid = titled_grids([samples[i] for i in groups.values()], list(groups)) if grouped else image_grid(samples)
    if real is None:
        return grid
    return tile([add_title(grid, "samples"), add_title(image_grid(real), "validation data")], gap=24)


def image_grid(images: Tensor, columns: int | None = None, cell: int = CELL) -> Image.Image:
    """Draw images in rows of `columns`; enlarge small ones by an integer factor to about `cell` pixels."""
    from torchvision.utils import make_grid

    images = as_images(images)
    scale = max(1, round(cell / max(images.shape[2:])))
    enlarged = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = make_grid(enlarged, columns or max(1, round(len(images) ** 0.5)), padding=GAP, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).cpu().numpy())


def as_images(samples: Tensor) -> Tensor:
    """Return images (N, C, H, W); of signals (N, C, L) plots, of volumes (N, C, D, H, W) the three central slices."""
    if samples.ndim == 3:
        return torch.stack([plot_signal(sample) for sample in samples.cpu()])
    return central_slices(samples) if samples.ndim == 5 else samples


def plot_signal(signal: Tensor) -> Tensor:
    """Draw a signal (C, L) uint8 as one line per channel: (3, H, W) uint8, with 0 at the bottom and 255 at the top."""
    width, height = (2 * side for side in SIGNAL_SIZE)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width - 1, height - 1), outline="#cccccc", width=2)
    count = signal.shape[1]
    across = [4 + (width - 8) * k / max(count - 1, 1) for k in range(count)]
    for k, channel in enumerate(signal.tolist()):
        points = [(x, 4 + (height - 8) * (1 - value / 255)) for x, value in zip(across, channel, strict=True)]
        draw.line(points if count > 1 else [points[0], (width - 4, points[0][1])], COLORS[k % len(COLORS)], 3)
    return torch.from_numpy(np.array(image.resize(SIGNAL_SIZE, Image.Resampling.LANCZOS))).permute(2, 0, 1)


def central_slices(volumes: Tensor) -> Tensor:
    """Return the slices (H, W), (D, W) and (D, H) through the centers of volumes (N, C, D, H, W), side by side."""
    depth, height, width = volumes.shape[2:]
    slices = [volumes[:, :, depth // 2], volumes[:, :, :, height // 2], volumes[..., width // 2]]
    tallest = max(depth, height)
    scale = max(1, round(CELL / max(depth, height, width)))
    padded = [torch.nn.functional.pad(part, (0, 0, 0, tallest - part.shape[2]), value=255) for part in slices]
    enlarged = [part.repeat_interleave(scale, 2).repeat_interleave(scale, 3) for part in padded]
    line = torch.full_like(enlarged[0][..., :1], 128)
    return torch.cat([enlarged[0], line, enlarged[1], line, enlarged[2]], dim=3)


def titled_grids(groups: Sequence[Tensor], titles: Sequence[str]) -> Image.Image:
    """Draw a grid of images per group under its title, in as many columns as make the picture nearly square."""

    def shape_error(columns: int) -> float:
        rows = sum(-(-len(group) // columns) for group in groups)
        return abs(math.log(columns / (rows + len(groups) * TITLE_HEIGHT / CELL)))

    largest = max(map(len, groups))
    columns = min((-(-largest // rows) for rows in range(1, largest + 1)), key=shape_error)  # rows of equal length
    grids = [add_title(image_grid(group, columns), title) for group, title in zip(groups, titles, strict=True)]
    return tile(grids, columns=1, gap=0)


@cache
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def draw_text(image: Image.Image, position: tuple[float, float], text: str, size: int = 13, anchor: str = "lm") -> None:
    """Write one line of black text into an image; `anchor` is Pillow's."""
    path, text = font_for(text)
    ImageDraw.Draw(image).text(position, text, fill="black", anchor=anchor, font=load_font(path, size))


def text_width(text: str) -> int:
    path, text = font_for(text)
    return math.ceil(load_font(path, 13).getlength(text)) + 12


def extend(image: Image.Image, left: int = 0, top: int = 0, bottom: int = 0, width: int = 0) -> Image.Image:
    canvas = Image.new("RGB", (max(left + image.width, width), top + image.height + bottom), "white")
    canvas.paste(image, (left, top))
    return canvas


def add_title(image: Image.Image, text: str) -> Image.Image:
    canvas = extend(image, top=TITLE_HEIGHT, width=text_width(text))
    draw_text(canvas, (GAP, TITLE_HEIGHT / 2), text)
    return canvas


def tile(images: Sequence[Image.Image], columns: int | None = None, gap: int = 8) -> Image.Image:
    """Place images in rows of `columns` on white, `gap` pixels apart; in one row by default."""
    columns = columns or len(images)
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    width = max(sum(image.width + gap for image in row) for row in rows) - gap
    heights = [max(image.height for image in row) + gap for row in rows]
    canvas = Image.new("RGB", (width, sum(heights) - gap), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for image in row:
            canvas.paste(image, (left, top))
            left += image.width + gap
        top += height
    return canvas


def add_captions(image: Image.Image, texts: Sequence[str], size: int, left: float = 0) -> Image.Image:
    """Write texts below an image, centered on parts of equal width from `left` to its right end."""
    canvas = extend(image, bottom=TITLE_HEIGHT)
    width = (image.width - left) / len(texts)
    for k, text in enumerate(texts):
        draw_text(canvas, (left + (k + 0.5) * width, image.height + TITLE_HEIGHT / 2), text, size, "mm")
    return canvas


def draw_trajectory(frames: Sequence[Tensor], captions: Sequence[str] = ()) -> Image.Image:
    """Draw up to 12 frames with captions: a row per image with a column per frame, or scatter plots in rows."""
    chosen = evenly_spaced_indices(len(frames), 12)
    shown, texts = [frames[i] for i in chosen], [captions[i] for i in chosen] if captions else []
    if shown[0].ndim == 2:
        plots = _scatter_frames(shown, size=2.2)
        return tile(list(map(add_title, plots, texts)) if texts else plots, columns=4)
    strip = image_grid(torch.stack(shown, dim=1).flatten(0, 1), columns=len(shown))
    return add_captions(strip, texts, 11) if texts else strip


def _scatter_frames(frames: Sequence[Tensor], size: float) -> list[Image.Image]:
    """Draw points (N, D) of each frame in the axis limits of the last."""
    limits = axis_limits(frames[-1]) if frames[-1].shape[1] > 1 else None
    return [scatter(frame, limits=limits, size=size) for frame in frames]


def save_gif(frames: Sequence[Tensor], path: Path) -> None:
    """Save an animation of up to 40 frames; it pauses on the last one."""
    chosen = [frames[i] for i in evenly_spaced_indices(len(frames), 40)]
    shown = _scatter_frames(chosen, size=4.0) if chosen[0].ndim == 2 else list(map(image_grid, chosen))
    durations = [60] * (len(shown) - 1) + [2000]
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=durations, loop=0)


def neighbor_rows(samples: Tensor, nearest: Tensor, distances: Tensor, num_candidates: int) -> Image.Image:
    """Draw samples above the training images nearest to them, both (N, C, H, W), in order of distance (N,)."""
    order = distances.argsort()
    rows = labeled_rows([samples[order], nearest[order]], ["samples", "nearest"])
    texts = [format_number(distance, 0.1) for distance in distances[order].tolist()]
    canvas = add_captions(rows, texts, 12, left=LABEL_WIDTH + GAP)
    draw_text(canvas, (6, rows.height + TITLE_HEIGHT / 2), "RMS difference")
    return add_title(canvas, f"Samples and the nearest of {num_candidates:,} training samples")


def labeled_rows(rows: Sequence[Tensor], labels: Sequence[str], cell: int = CELL) -> Image.Image:
    """Draw rows of images, all of one length, each with its label on the left."""
    grid = image_grid(torch.cat(list(rows)), columns=len(rows[0]), cell=cell)
    canvas = extend(grid, left=max(LABEL_WIDTH, *map(text_width, labels)))
    height = (grid.height - GAP) / len(rows)
    for k, label in enumerate(labels):
        draw_text(canvas, (6, GAP + (k + 0.5) * height), label)
    return canvas
