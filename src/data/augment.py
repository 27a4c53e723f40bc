"""Random augmentation of training images on the device, keyed by step and position in the global batch.

Each augmentation takes x (B, C, H, W) in [-1, 1] and the random numbers of the step.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from src.rng import StepRng

EDM_LABELS = 9
"""The number of labels of `EdmAugmentation`."""

EDM_SCALE = 2**0.2
EDM_TRANSLATION = 1 / 8


def horizontal_flip(x: Tensor, rng: StepRng) -> Tensor:
    """Mirror half of the images left to right."""
    return _where(rng.uniform("flip") < 0.5, x.flip(-1), x)


def vertical_flip(x: Tensor, rng: StepRng) -> Tensor:
    """Mirror half of the images top to bottom."""
    return _where(rng.uniform("vertical_flip") < 0.5, x.flip(-2), x)


def rotate(x: Tensor, rng: StepRng) -> Tensor:
    """Rotate square images counterclockwise by 0, 90, 180 or 270 degrees, each with probability 1/4."""
    quarters = (4 * rng.uniform("rotation")).long()
    out = x
    for k in (1, 2, 3):
        out = _where(quarters == k, x.rot90(k, (-2, -1)), out)
    return out


class ColorJitter(NamedTuple):
    """Change brightness, contrast, saturation and hue, in this order, by random factors per image.

    The strengths are those of `torchvision.transforms.v2.ColorJitter`: a factor is uniform in [max(0, 1 - strength),
    1 + strength], and the hue shift, in turns of the color circle, in [-strength, strength]. Alpha is unchanged.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    @classmethod
    def of(cls, settings: Mapping[str, float], channels: int) -> "ColorJitter":
        """Return the augmentation with these strengths, by name.

        Raises ValueError for an unknown name, a strength out of range, or a strength that needs RGB images.
        """
        for name, strength in settings.items():
            if name not in cls._fields:
                raise ValueError(f"data.color_jitter.{name} must be one of {', '.join(cls._fields)}")
            setting, most = f"data.color_jitter.{name}={strength}", 0.5 if name == "hue" else math.inf
            if not 0 <= strength <= most:
                raise ValueError(f"{setting} must be " + (f"in [0, {most}]" if name == "hue" else "at least 0"))
            if strength and name in ("saturation", "hue") and channels not in (3, 4):
                raise ValueError(f"{setting} needs RGB images, and data.channels={channels}; leave it out")
        return cls(**settings)

    def __call__(self, x: Tensor, rng: StepRng) -> Tensor:
        colors = {2: 1, 4: 3}.get(x.shape[1], x.shape[1])
        y = (x[:, :colors] + 1) / 2
        if self.brightness:
            y = (y * _factor(self.brightness, "brightness", rng)).clamp(0, 1)
        if self.contrast:
            y = _blend(y, _gray(y).mean((1, 2, 3), keepdim=True), _factor(self.contrast, "contrast", rng))
        if self.saturation:
            y = _blend(y, _gray(y), _factor(self.saturation, "saturation", rng))
        if self.hue:
            y = shift_hue(y, self.hue * (2 * rng.uniform("hue") - 1))
        return torch.cat([2 * y - 1, x[:, colors:]], dim=1)


def shift_hue(y: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of RGB images y (B, 3, H, W) in [0, 1] by `turns` (B,) of the color circle.

    Source: Smith 1978, Color gamut transform pairs (HSV).
    """
    value, low = y.amax(1, keepdim=True), y.amin(1, keepdim=True)
    chroma = value - low
    red, green, blue = (y / torch.where(chroma > 0, chroma, 1))[:, :, None].unbind(1)
    sector = torch.where(
        y[:, :1] == value,
        green - blue,  # in sixths of the circle
        torch.where(y[:, 1:2] == value, blue - red + 2, red - green + 4),
    )
    offsets = torch.tensor([5.0, 3.0, 1.0], device=y.device, dtype=y.dtype).view(1, 3, 1, 1)
    k = (offsets + sector + 6 * turns.to(y).view(-1, 1, 1, 1)) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


class EdmAugmentation(NamedTuple):
    """Warp images at random and return augmentation labels, which condition the network so that warps do not leak.

    Labels of 0 mean an image without augmentation, which is what sampling requests. Half of the images are mirrored
    left to right. Each other transform has probability `prob`: a top-to-bottom flip (of half of these), isotropic
    scaling, rotation, anisotropic scaling and translation, in this order.

    Flips are exact, and images with flips only keep their values. All other transforms form one affine map: the image
    is upsampled by 2 with bicubic interpolation, sampled bilinearly with reflection padding, and downsampled by an
    antialiased bicubic filter.

    Source: Karras et al. 2022 (arXiv 2206.00364), app. F.2, table 6. 0.12 is their `prob` for CIFAR-10, 0.15 for faces.
    """

    prob: float

    def __call__(self, x: Tensor, rng: StepRng) -> tuple[Tensor, Tensor]:
        """Return the images and their labels (B, EDM_LABELS)."""
        a = self.draw(rng)
        return apply_edm(x, a), edm_labels(a)

    def draw(self, rng: StepRng) -> Tensor:
        """Draw the parameters a_0 to a_7 of each image, (B, 8); 0 means no effect."""

        def gated(name: str, values: Tensor) -> Tensor:
            return _where(rng.uniform(f"edm {name}") < self.prob, values, torch.zeros_like(values))

        def coin(name: str) -> Tensor:
            return (rng.uniform(name) < 0.5).float()[:, None]

        def angle(name: str) -> Tensor:
            return (math.pi * (2 * rng.uniform(name) - 1))[:, None]

        normal = rng.normal("edm", (4,))
        parts = [
            coin("edm x"),
            gated("flip", coin("edm y")),
            gated("scale", normal[:, :1]),
            gated("rotation", angle("edm angle")),
            gated("anisotropy", torch.cat([angle("edm axis"), normal[:, 1:2]], dim=1)),
            gated("translation", normal[:, 2:]),
        ]
        return torch.cat(parts, dim=1)


def edm_labels(a: Tensor) -> Tensor:
    """Return the augmentation labels (B, EDM_LABELS) of parameters a (B, 8); 0 for an unchanged image."""
    x_flip, y_flip, scale, turn, axis, stretch, right, down = a.unbind(1)
    warps = turn.cos() - 1, turn.sin(), stretch * axis.cos(), stretch * axis.sin()
    return torch.stack([x_flip, y_flip, scale, *warps, right, down], dim=1)


def apply_edm(x: Tensor, a: Tensor) -> Tensor:
    """Transform images x (B, C, H, W) by the parameters a (B, 8) of `EdmAugmentation`."""
    x = _where(a[:, 0] > 0, x.flip(-1), x)
    x = _where(a[:, 1] > 0, x.flip(-2), x)
    changed = (a[:, 2:] != 0).any(1)
    if x.device.type != "cpu":  # indexing by a mask would wait for the device
        return _where(changed, warp(x, *edm_inverse(a, x.shape[-1], x.shape[-2])), x)
    if changed.any():
        x[changed] = warp(x[changed], *edm_inverse(a[changed], x.shape[-1], x.shape[-2]))
    return x


def edm_inverse(a: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Return the linear part (B, 2, 2) and the offset (B, 2) of the inverse map, from the warped to the original image.

    Positions are (right, down) of the center, in pixels. Flips are not included.
    """
    scale, turn, axis, stretch = a[:, 2:6].unbind(1)
    extent = torch.tensor([width, height], device=a.device, dtype=a.dtype)
    k, c, s = EDM_SCALE**-stretch, axis.cos(), axis.sin()
    along, across, mixed = k * c * c + s * s / k, k * s * s + c * c / k, (k - 1 / k) * c * s
    unstretch = torch.stack([along, mixed, mixed, across], dim=1).view(-1, 2, 2)
    # The rotation by -a_3 and its inverse.
    unturn = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=1).view(-1, 2, 2)
    linear = _times(unturn * (EDM_SCALE**-scale)[:, None, None], unstretch)
    shift = EDM_TRANSLATION * extent * a[:, 6:]
    return linear, -_times(linear, shift[:, :, None])[:, :, 0]


def warp(x: Tensor, linear: Tensor, offset: Tensor) -> Tensor:
    """Resample images x (B, C, H, W): the result at position p is x at linear p + offset.

    Positions are (right, down) of the center, in pixels.
    """
    height, width = x.shape[-2:]
    right = torch.linspace(0.25 - width / 2, width / 2 - 0.25, 2 * width, device=x.device, dtype=x.dtype)
    down = torch.linspace(0.25 - height / 2, height / 2 - 0.25, 2 * height, device=x.device, dtype=x.dtype)
    # Products of single numbers, since matrix products may have low precision on a GPU.
    place = [
        linear[:, k, 0, None, None] * right + linear[:, k, 1, None, None] * down[:, None] + offset[:, k, None, None]
        for k in (0, 1)
    ]
    grid = torch.stack([place[0] * (2 / width), place[1] * (2 / height)], dim=-1)
    # Upsampling needs no antialiasing, but this code path of torch is three times as fast.
    large = F.interpolate(x, (2 * height, 2 * width), mode="bicubic", align_corners=False, antialias=True)
    moved = F.grid_sample(large, grid, "bilinear", "reflection", align_corners=False)
    small = F.interpolate(moved, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return small.clamp(-1, 1)


def _where(condition: Tensor, changed: Tensor, x: Tensor) -> Tensor:
    """Return `changed` where the condition (B,) holds, else x (B, ...)."""
    return torch.where(condition.view(-1, *[1] * (x.ndim - 1)), changed, x)


def _factor(strength: float, name: str, rng: StepRng) -> Tensor:
    low = max(0.0, 1 - strength)
    return (low + (1 + strength - low) * rng.uniform(name)).view(-1, 1, 1, 1)


def _blend(y: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * y + (1 - factor) * other).clamp(0, 1)


def _gray(y: Tensor) -> Tensor:
    """Return the luma (B, 1, H, W) of RGB images, or the channel mean of others."""
    return TF.rgb_to_grayscale(y) if y.shape[1] == 3 else y.mean(1, keepdim=True)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix products of a (B, m, n) and b (B, n, k), in the precision of the tensors."""
    return (a[:, :, :, None] * b[:, None]).sum(2)
