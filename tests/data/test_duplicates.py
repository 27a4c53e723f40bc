"""Duplicates among images."""

import numpy as np
import torch

from src.data.duplicates import Duplicates, across_split, find_duplicates


def duplicates_of(images: torch.Tensor) -> Duplicates:
    return find_duplicates(lambda indices: images[list(indices)], len(images))


def test_copies_and_similar_images_are_found():
    """Also brighter and noisy copies, and with three channels; independent images are not."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=generator).float()
    images = torch.nn.functional.interpolate(images[..., :4, :4], (16, 16), mode="bilinear")
    images[7], images[21] = images[3], images[3]
    images[30] = 0.8 * images[12] + 20
    images[35] = (images[2] + torch.randn(3, 16, 16, generator=generator)).clamp(0, 255)
    found = duplicates_of(images.round().to(torch.uint8))
    assert found.exact == [[3, 7, 21]]
    assert sorted(found.near) == [(2, 35), (12, 30)]
    is_val = np.zeros(40, bool)
    is_val[[7, 12, 5]] = True
    assert across_split(found, is_val) == 2  # 7 equals 3, and 12 resembles 30


def test_copies_of_similar_images_count_as_similar():
    """Also where the first of the copies is on the same side of the split."""
    found = Duplicates(exact=[[0, 5], [2, 6]], near=[(0, 7), (2, 3)], compared=8)
    for val, count in (([0, 7], 2), ([5, 7], 2), ([2, 6], 2), ([2, 3, 6], 0), ([2], 1)):
        assert across_split(found, np.isin(np.arange(8), val)) == count, val


def test_images_of_one_color_are_not_similar():
    """Their thumbnails have no direction; equal ones are exact duplicates."""
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 8, 8).contiguous()
    assert duplicates_of(images).near == []
    assert duplicates_of(torch.cat([images, images[:1]])).exact == [[0, 4]]


def test_large_datasets_are_compared_in_part():
    images = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert find_duplicates(lambda k: images[list(k)], 50, max_compared=10).compared == 10
