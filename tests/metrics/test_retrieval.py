"""Ranks of the right reference against a loop over references and shifts with scipy's Gaussian filter."""

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, shift

from src.metrics.retrieval import BLUR, SHIFT, target_ranks


def pictures(count: int, channels: int = 1, size: int = 16) -> torch.Tensor:
    """Return images of random blocks, uint8."""
    generator = torch.Generator().manual_seed(channels)
    blocks = torch.randint(0, 256, (count, channels, size // 4, size // 4), generator=generator)
    return blocks.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)


def blurred(images: torch.Tensor) -> np.ndarray:
    std = BLUR * images.shape[-1]
    x = images.numpy().astype(float) / 255
    radius = max(1, int(np.ceil(3 * std)))
    return gaussian_filter(x, (0, 0, std, std), mode="nearest", radius=(0, 0, radius, radius))


def slow_ranks(images: torch.Tensor, references: torch.Tensor, targets: list[int]) -> list[int]:
    limit = max(1, round(SHIFT * images.shape[-1]))
    steps = range(-limit, limit + 1)
    known = blurred(references)
    ranks = []
    for image, target in zip(blurred(images), targets, strict=True):
        moved = [shift(image, (0, y, x), order=0, mode="nearest") for y in steps for x in steps]
        distances = [min(((each - other) ** 2).sum() for each in moved) for other in known]
        ranks.append(sum(d < distances[target] - 1e-9 for d in distances))
    return ranks


def test_ranks_equal_a_loop_over_shifts():
    for channels in (1, 3):
        references = pictures(12, channels)
        generator = torch.Generator().manual_seed(7)
        noise = 90 * torch.randn(6, channels, 16, 16, generator=generator)
        images = (references[:6] + noise).clamp(0, 255).to(torch.uint8)
        targets = [3, 1, 4, 0, 5, 2]
        expected = slow_ranks(images, references, targets)
        assert len(set(expected)) > 2
        assert target_ranks(images, references, torch.tensor(targets)).tolist() == expected


def test_a_picture_is_nearest_to_itself():
    references = pictures(100)
    targets = torch.arange(100)
    assert target_ranks(references, references, targets).tolist() == [0] * 100
    assert target_ranks(references.roll(1, 3), references, targets).eq(0).float().mean() > 0.95


def test_equal_references_share_a_rank():
    references = pictures(5)
    references = torch.cat([references, references])
    assert target_ranks(references, references, torch.arange(10)).tolist() == [0] * 10


def test_unrelated_pictures_rank_at_random():
    references = pictures(200)
    images = pictures(100, 3)[:, :1]
    ranks = target_ranks(images, references, torch.arange(100)).float()
    assert 60 < ranks.mean() < 140
