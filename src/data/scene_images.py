"""Draw scenes of colored shapes as images: random sizes, places and colors within the meaning of their words."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from src.data.scenes import ATTRIBUTES, Scene

COLORS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 220),
    "yellow": (240, 215, 50),
    "magenta": (215, 60, 205),
    "cyan": (50, 205, 225),
    "black": (16, 16, 16),
    "gray": (128, 128, 128),
    "white": (239, 239, 239),
}
"""RGB of objects and backgrounds, before jitter."""

COLOR_JITTER = 12
"""Maximum change of each channel of an object's color, and of all channels of the background together."""

RADII = {"small": (0.09, 0.11), "large": (0.145, 0.17)}
"""Radius range of the circle with the object's area, relative to the image size. Small and large do not overlap."""

PLACES = {
    "center": (0.5, 0.5),
    "top left": (0.27, 0.27),
    "top right": (0.73, 0.27),
    "bottom left": (0.27, 0.73),
    "bottom right": (0.73, 0.73),
}
"""Center (x, y) of a single object, y downwards, before a jitter of at most `PLACE_JITTER`."""

PLACE_JITTER = 0.04
GAP, MARGIN = 0.03, 0.01  # minimum distance between two objects, and to the border
SHIFT, OFFSET = 0.15, 0.03  # jitter of two objects perpendicular to their relation: joint, individual

SQUARE = math.sqrt(math.pi) / 2  # half the side of a square with the area of the unit circle
TRIANGLE = math.sqrt(4 * math.pi / (3 * math.sqrt(3)))  # circumradius of such an equilateral triangle
CROSS = math.sqrt(9 * math.pi / 20)  # half the length of such a cross, with arms a third as wide
HALF_SIZES = {
    "circle": (1.0, 1.0),
    "square": (SQUARE, SQUARE),
    "triangle": (TRIANGLE * math.sqrt(3) / 2, TRIANGLE * 3 / 4),
    "cross": (CROSS, CROSS),
}
"""Half the width and height of each shape with the area of the unit circle."""


class Placed(NamedTuple):
    """N scenes with random sizes, places and colors. Lengths are relative to the image size; y points down."""

    shape: Tensor
    """(N, 2) int64 in the order of `ATTRIBUTES`; -1 if there is no second object, whose other values are undefined."""
    center: Tensor
    """(N, 2, 2): x and y of the center of each object's bounding box."""
    radius: Tensor
    """(N, 2): radius of the circle with each object's area."""
    half: Tensor
    """(N, 2, 2): half the width and height of each object."""
    color: Tensor
    """(N, 2, 3): RGB of each object in [0, 255]."""
    background: Tensor
    """(N, 3): RGB in [0, 255]."""


def place(scenes: Sequence[Scene], seeds: Sequence[int]) -> Placed:
    """Draw sizes, places and colors of N scenes, each with its own seed.

    Jitter leaves attributes unambiguous: sizes, positions and colors do not overlap, objects do not touch, and the
    offset along their relation exceeds the one perpendicular to it.
    """
    if len(seeds) != len(scenes):
        raise ValueError(f"place needs one seed per scene, got {len(seeds)} for {len(scenes)} scenes")
    generator = torch.Generator()
    draws = [torch.rand(17, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds]
    uniform = torch.stack(draws)
    signed = 2 * uniform - 1
    objects = [
        (*scene.objects, scene.objects[0])[:2] for scene in scenes
    ]  # (N, 2), the second unused if there is only one
    two = torch.tensor([len(scene.objects) == 2 for scene in scenes])[:, None]

    def lookup(table: Mapping[str, Sequence[float]], attribute: str) -> Tensor:
        return torch.tensor(
            [[table[getattr(each, attribute)] for each in pair] for pair in objects], dtype=torch.float64
        )

    low, high = lookup(RADII, "size").unbind(-1)
    radius = low + (high - low) * uniform[:, 0:2]
    half = radius[..., None] * lookup(HALF_SIZES, "shape")
    color = lookup(COLORS, "color") + COLOR_JITTER * signed[:, 2:8].view(-1, 2, 3)
    background = torch.tensor([COLORS[scene.background] for scene in scenes]) + COLOR_JITTER * signed[:, 8:9]
    alone = torch.tensor([PLACES[scene.objects[0].position or "center"] for scene in scenes], dtype=torch.float64)
    alone = (alone + PLACE_JITTER * signed[:, 9:11])[:, None].expand(-1, 2, -1)
    center = torch.where(two[..., None], _side_by_side(scenes, half, uniform[:, 11:]), alone)
    shape = torch.tensor([[ATTRIBUTES["shape"].index(each.shape) for each in pair] for pair in objects])
    shape[:, 1:].masked_fill_(~two, -1)
    return Placed(shape, center, radius, half, color.clamp(0, 255), background.clamp(0, 255))


def _side_by_side(scenes: Sequence[Scene], half: Tensor, uniform: Tensor) -> Tensor:
    """Return centers (N, 2, 2) of two objects, of half sizes (N, 2, 2), that satisfy their relation.

    `uniform` (N, 6) are random numbers. The space that objects, gap and margins leave is distributed uniformly before,
    between and after them.
    """
    vertical = torch.tensor([scene.relation in ("above", "below") for scene in scenes]).long()
    before = torch.tensor([scene.relation in ("right of", "below") for scene in scenes]).long()[:, None]
    order = torch.cat([before, 1 - before], dim=1)  # (N, 2): the object nearer to the left or top, and the other
    lengths = half.gather(2, vertical[:, None, None].expand(-1, 2, 1)).squeeze(2).gather(1, order)
    free = 1 - 2 * MARGIN - GAP - 2 * lengths.sum(1)
    cuts = uniform[:, 0:2].sort(dim=1).values * free[:, None]
    nearer = MARGIN + cuts[:, 0] + lengths[:, 0]
    farther = 1 - MARGIN - (free - cuts[:, 1]) - lengths[:, 1]
    along = torch.stack([nearer, farther], dim=1).gather(1, order)  # order is its own inverse
    across = 0.5 + SHIFT * (2 * uniform[:, 2:3] - 1) + OFFSET * (2 * uniform[:, 3:5] - 1)
    centers = torch.stack([along, across], dim=2)
    return torch.where(vertical[:, None, None].bool(), centers.flip(2), centers)


def render(scenes: Sequence[Scene], image_size: int, seeds: Sequence[int]) -> Tensor:
    """Return antialiased images (N, 3, S, S) uint8 of N scenes, each placed with its own seed."""
    return paint(place(scenes, seeds), image_size)


def paint(placed: Placed, image_size: int) -> Tensor:
    """Return images (N, 3, S, S) uint8 that blend colors by the part of a pixel that the object covers."""
    pixels = (torch.arange(image_size) + 0.5) / image_size
    coverage = torch.zeros(*placed.shape.shape, image_size, image_size)  # (N, 2, S, S)
    for number, name in enumerate(ATTRIBUTES["shape"]):
        which = (placed.shape == number).nonzero(as_tuple=True)
        x, y = (pixels - placed.center.float()[which][:, axis, None] for axis in (0, 1))
        distance = DISTANCES[name](x[:, None, :], y[:, :, None], placed.radius.float()[which][:, None, None])
        coverage[which] = (0.5 - image_size * distance).clamp(0, 1)
    image = placed.background.float()[:, :, None, None]
    for k in (0, 1):
        image = torch.lerp(image, placed.color.float()[:, k, :, None, None], coverage[:, k, None])
    return (image + 0.5).to(torch.uint8)


# Signed distances to the outline, negative inside, of shapes with the area of a circle of radius r, centered by their
# bounding box at x = y = 0 (y downwards). Outside of corners they are less than the distance, which changes no edge.


def circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.hypot(x, y) - r


def square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - SQUARE * r


def triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Equilateral, on its base. The center of its box is a quarter of the circumradius above the centroid."""
    y = y - TRIANGLE / 4 * r
    return torch.maximum(y, math.sqrt(3) / 2 * x.abs() - y / 2) - TRIANGLE / 2 * r


def cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """A plus sign."""
    x, y, length = x.abs(), y.abs(), CROSS * r
    return torch.minimum(torch.maximum(x - length, y - length / 3), torch.maximum(x - length / 3, y - length))


DISTANCES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "cross": cross,
}
