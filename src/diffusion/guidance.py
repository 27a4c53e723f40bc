"""Guidance: samples that show more of what was asked for, by leading away from a network that asks for less."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from src.diffusion.losses import Denoise
from src.diffusion.noise import NoiseLevel

Conditional = Callable[[Tensor, NoiseLevel, Tensor | None], Tensor]
"""(x_t (B, *data), level, conditions (B, ...) or None) -> a network's raw output (B, outputs * C, *rest)."""


class Guidance(NamedTuple):
    """How samples are guided. Scale 1 is the conditional model itself, 0 the reference; above 1 leads away from it."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)
    """Of sigma / alpha, without its lower end, where guidance acts (Kynkäänniemi et al. 2024, arXiv 2404.07724)."""
    rescale: float = 0.0
    """The share in which the output's deviation is brought back to the conditional one's (Lin et al. 2024, arXiv
    2305.08891, sec. 3.4)."""
    model: Conditional | None = None
    """The reference: a weaker model, asked for the same (Karras et al. 2024, arXiv 2406.02507); None for the model
    itself with nothing asked for (Ho & Salimans 2022, arXiv 2207.12598)."""

    def check(self) -> None:
        """Raise ValueError for what is no guidance."""
        low, high = self.interval
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"guidance.scale must be at least 0, got {self.scale}: 1 is no guidance, 2 to 5 are usual")
        if not 0 <= low < high:
            raise ValueError(
                f"guidance.interval must be two rising levels of noise sigma / alpha, got [{low}, {high}]: [0.2, 5] "
                "leaves out the cleanest and the noisiest"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance.rescale must lie in [0, 1], got {self.rescale}: 0.7 is usual, 0 is none")

    def acts(self, t: NoiseLevel) -> bool:
        """Whether a level, a scalar one, lies within the interval."""
        alpha = t.alpha.item()
        ratio = t.sigma.item() / alpha if alpha > 0 else math.inf
        return self.interval[0] < ratio <= self.interval[1]


def guided(
    denoise: Conditional, cond: Tensor | None, null: Tensor | None, guidance: Guidance, channels: int
) -> Denoise:
    """A network guided towards `cond` (B, ...), as one without conditions.

    With reference r and conditional output c it is r + scale (c - r), of the first `channels` channels: what else there
    is, a learned variance, stays c's. Outputs of every prediction target are one affine function of eps at a given x_t,
    so guiding them is guiding eps. `null` (1, ...) asks for nothing; with it and without a `model` the reference
    costs no call of its own but twice the batch. Where scale is 1 or the interval does not reach, c is all that is
    computed; where it is 0, r.
    """
    scale, model = guidance.scale, guidance.model
    nothing = None if cond is None or null is None else null.expand_as(cond)

    def reference(x: Tensor, t: NoiseLevel) -> Tensor:
        return model(x, t, cond) if model else denoise(x, t, nothing)

    def both(x: Tensor, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        if model or cond is None or nothing is None:
            return denoise(x, t, cond), reference(x, t)
        asked, other = denoise(torch.cat([x, x]), t, torch.cat([cond, nothing])).chunk(2)
        return asked, other

    def out(x: Tensor, t: NoiseLevel) -> Tensor:
        if scale == 1 or not guidance.acts(t):
            return denoise(x, t, cond)
        if scale == 0:
            return reference(x, t)
        asked, other = both(x, t)
        mean, ref = asked[:, :channels], other[:, :channels]
        led = ref + scale * (mean - ref)
        if guidance.rescale:
            axes = tuple(range(1, led.ndim))
            ratio = mean.std(axes, keepdim=True) / led.std(axes, keepdim=True).clamp(min=1e-12)
            led = led * (guidance.rescale * ratio + 1 - guidance.rescale)
        return torch.cat([led, asked[:, channels:]], dim=1)

    return out
