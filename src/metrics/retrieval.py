"""Which picture of a set an image shows: the rank of the right one by the distance of blurred pixels."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

BLUR = 0.03  # standard deviation of the blur, relative to the image: about a pixel of 32
SHIFT = 0.0625  # maximum shift of an image in each direction, relative to the image: two pixels of 32
TIE = 1e-6  # difference of the mean squared distance per value below which two references are equally near: rounding
CHUNK = 64  # images that are compared at once


def target_ranks(images: Tensor, references: Tensor, targets: Tensor) -> Tensor:
    """Return the rank of its target among the references (M, C, H, W), for each image (N, C, H, W); `targets` (N,).

    0 means that the target is the nearest. The distance is that of blurred pixels, at the shift of the image by up to
    `SHIFT` that makes it smallest. Returns (N,) int64.
    """
    blurred = _blur(references).flatten(1)
    squares = blurred.square().sum(1)
    ranks = []
    for part, wanted in zip(torch.split(images, CHUNK), torch.split(targets, CHUNK), strict=True):
        best = torch.full((len(part), len(references)), math.inf)
        for shifted in _shifts(_blur(part)):
            flat = shifted.flatten(1)
            best = torch.minimum(best, squares + flat.square().sum(1, keepdim=True) - 2 * flat @ blurred.T)
        own = best.gather(1, wanted[:, None])
        ranks.append((best < own - TIE * blurred.shape[1]).sum(1))
    return torch.cat(ranks)


def _blur(images: Tensor) -> Tensor:
    """Return images (N, C, H, W) as float32 in [0, 1], blurred by a Gaussian; the border repeats the edge."""
    from torchvision.transforms.functional import gaussian_blur

    std = BLUR * images.shape[-1]
    radius = max(1, math.ceil(3 * std))
    padded = F.pad(images.float() / 255, (radius,) * 4, mode="replicate")
    blurred: Tensor = gaussian_blur(padded, 2 * radius + 1, std)
    return blurred[..., radius:-radius, radius:-radius]


def _shifts(images: Tensor) -> list[Tensor]:
    """Return the images (N, C, H, W) at every shift of whole pixels; the border repeats the edge."""
    height, width = images.shape[-2:]
    limit = max(1, round(SHIFT * width))
    padded = F.pad(images, (limit,) * 4, mode="replicate")
    steps = range(2 * limit + 1)
    return [padded[..., y : y + height, x : x + width] for y in steps for x in steps]
