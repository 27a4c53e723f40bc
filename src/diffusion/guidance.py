"""Classifier-free guidance and autoguidance: extrapolate from a reference output to the conditional one."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from src.diffusion.losses import Denoise
from src.diffusion.noise import NoiseLevel

Conditional = Callable[[Tensor, NoiseLevel, Tensor | None], Tensor]
"""(x_t (B, *data), level, conditions (B, ...) or None) -> raw output of the network (B, outputs * C, *rest)."""


class Guidance(NamedTuple):
    """Settings of guidance: reference + scale * (conditional - reference), so scale 1 disables guidance."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)
    """Range (low, high] of sigma / alpha in which guidance acts (Kynkäänniemi et al. 2024, arXiv 2404.07724)."""
    rescale: float = 0.0
    """Fraction of the guided output that is rescaled to the standard deviation of the conditional one (Lin et al. 2023,
    arXiv 2305.08891, sec. 3.4)."""
    model: Conditional | None = None
    """The reference: a weaker model with the same condition (autoguidance, Karras et al. 2024, arXiv 2406.02507), or
    None for the model without a condition (classifier-free guidance, Ho & Salimans 2022, arXiv 2207.12598)."""

    def check(self) -> None:
        """Raise ValueError if a setting is out of range."""
        low, high = self.interval
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"guidance.scale={self.scale} must be at least 0; 1 disables guidance, 2 to 5 are usual")
        if not 0 <= low < high:
            raise ValueError(f"guidance.interval=[{low},{high}] must be increasing values of sigma / alpha, as [0.2,5]")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance.rescale={self.rescale} must be in [0, 1]; 0.7 is usual, 0 has no effect")

    def acts(self, t: NoiseLevel) -> bool:
        """Return whether the scalar level t is in the interval."""
        alpha = t.alpha.item()
        ratio = t.sigma.item() / alpha if alpha > 0 else math.inf
        return self.interval[0] < ratio <= self.interval[1]


def guided(
    denoise: Conditional, cond: Tensor | None, null: Tensor | None, guidance: Guidance, channels: int
) -> Denoise:
    """Return the denoiser guided toward `cond` (B, ...).

    With reference r and conditional output c, it returns r + scale (c - r) for the first `channels` channels and c for
    the rest, a learned variance. Every prediction target is affine in eps at fixed x_t, so guiding it is equivalent to
    guiding eps. `null` (1, ...) is the empty condition; without a `model`, one call with a doubled batch computes both.
    """
    scale, model = guidance.scale, guidance.model
    null_cond = None if cond is None or null is None else null.expand_as(cond)

    def reference(x: Tensor, t: NoiseLevel) -> Tensor:
        return model(x, t, cond) if model else denoise(x, t, null_cond)

    def both(x: Tensor, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        if model or cond is None or null_cond is None:
            return denoise(x, t, cond), reference(x, t)
        cond_out, ref_out = denoise(torch.cat([x, x]), t, torch.cat([cond, null_cond])).chunk(2)
        return cond_out, ref_out

    def out(x: Tensor, t: NoiseLevel) -> Tensor:
        if scale == 1 or not guidance.acts(t):
            return denoise(x, t, cond)
        if scale == 0:
            return reference(x, t)
        cond_out, ref_out = both(x, t)
        mean, ref = cond_out[:, :channels], ref_out[:, :channels]
        guided_mean = ref + scale * (mean - ref)
        if guidance.rescale:
            axes = tuple(range(1, guided_mean.ndim))
            ratio = mean.std(axes, keepdim=True) / guided_mean.std(axes, keepdim=True).clamp(min=1e-12)
            guided_mean = guided_mean * (guidance.rescale * ratio + 1 - guidance.rescale)
        return torch.cat([guided_mean, cond_out[:, channels:]], dim=1)

    return out
