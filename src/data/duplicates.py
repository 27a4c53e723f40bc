"""Find duplicates among images, signals and volumes."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

THUMBNAILS = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}
"""Sizes of the thumbnails that near duplicates are found by, by the number of dimensions."""
BLOCK = 2048
"""Images that are in memory at a time."""


class Duplicates(NamedTuple):
    """Groups of equal images, and pairs of similar ones, as indices.

    `compared` is the number of images among which similar ones were searched.
    """

    exact: list[list[int]]
    near: list[tuple[int, int]]
    compared: int


def find_duplicates(
    fetch: Callable[[Sequence[int]], Tensor], count: int, similarity: float = 0.995, max_compared: int = 20_000
) -> Duplicates:
    """Find equal and similar images among `count`; `fetch` returns some of them (N, C, *size) by their indices.

    Two images are similar if the correlation of their gray thumbnails of 64 pixels is at least `similarity`. Of more
    than `max_compared` images, evenly spaced ones are compared.
    """
    groups: dict[bytes, list[int]] = {}
    for start in range(0, count, BLOCK):
        for k, image in enumerate(fetch(range(start, min(start + BLOCK, count))), start):
            groups.setdefault(hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest(), []).append(k)
    exact = [group for group in groups.values() if len(group) > 1]
    firsts = np.array(sorted(group[0] for group in groups.values()))
    if len(firsts) > max_compared:
        firsts = firsts[np.linspace(0, len(firsts) - 1, max_compared).round().astype(int)]
    blocks = np.array_split(firsts, -(-len(firsts) // BLOCK))
    thumbnails = torch.cat([_thumbnails(fetch(block.tolist())) for block in blocks])
    near = []
    for start in range(0, len(firsts), BLOCK):
        likeness = thumbnails[start : start + BLOCK] @ thumbnails.T
        first, second = np.nonzero(likeness.numpy() >= similarity)
        near += [(int(firsts[start + i]), int(firsts[k])) for i, k in zip(first, second, strict=True) if start + i < k]
    return Duplicates(exact, near, len(firsts))


def _thumbnails(images: Tensor) -> Tensor:
    """Return gray thumbnails (N, 64) with mean 0 and norm 1; 0 for images of one color."""
    gray = images.float().mean(1, keepdim=True)
    small = F.interpolate(gray, THUMBNAILS[gray.ndim - 2], mode="area").flatten(1)
    centered = small - small.mean(1, keepdim=True)
    norm = centered.norm(dim=1, keepdim=True)
    return torch.where(norm > 1e-3, centered / norm.clamp(min=1e-12), 0.0)


def across_split(duplicates: Duplicates, is_val: npt.NDArray[np.bool_]) -> int:
    """Return how many validation images are equal or similar to a training image; `is_val` (N,) marks validation."""
    groups = {group[0]: group for group in duplicates.exact}
    alike = [*groups.values()]
    alike += [[*groups.get(first, [first]), *groups.get(second, [second])] for first, second in duplicates.near]
    return len({k for group in alike if not all(is_val[group]) for k in group if is_val[k]})
