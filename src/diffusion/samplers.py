"""Samplers: generators with one signature that walk a grid of levels from noise to data.

`sampler(process, predict, x, grid, *, ..., noise)` starts at x (B, *data) of level grid[0] and yields x at
grid[1], grid[2], ... up to clean data. Nothing here draws random numbers of its own: `noise(x)` gives fresh
standard normal values like x.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from src.diffusion.losses import Denoise
from src.diffusion.noise import Level
from src.diffusion.process import GaussianDiffusion, Prediction, snr_ratio

Predict = Callable[[Tensor, Level], Prediction]
Noise = Callable[[Tensor], Tensor]


def ancestral(
    process: GaussianDiffusion, predict: Predict, x: Tensor, grid: Sequence[Level], *, noise: Noise
) -> Iterator[Tensor]:
    """Sample the reverse chain x_s ~ p(x_s | x_t) link by link (Ho et al. 2020, alg. 2), for any strides."""
    for t, s in pairwise(grid):
        mean, log_variance = process.reverse(predict(x, t), x, t, s)
        # The last link ends at clean data: its mean is the sample.
        x = mean if s is grid[-1] else mean + torch.exp(log_variance / 2) * noise(x)
        yield x


def ddim(
    process: GaussianDiffusion,
    predict: Predict,
    x: Tensor,
    grid: Sequence[Level],
    *,
    eta: float = 0.0,
    noise: Noise,
) -> Iterator[Tensor]:
    """DDIM (Song et al. 2021, eq. 12 and 16): deterministic for eta = 0, ancestral sampling for eta = 1.

    Raises ValueError for eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}: 0 is deterministic, 1 ancestral (sampler.eta)")
    for t, s in pairwise(grid):
        pred = predict(x, t)
        if eta == 0 or s is grid[-1]:
            x = s.alpha * pred.x0 + s.sigma * pred.eps
        else:
            variance = eta**2 * s.sigma.square() * (1 - snr_ratio(t, s))
            direction = (s.sigma.square() - variance).sqrt() * pred.eps
            x = s.alpha * pred.x0 + direction + variance.sqrt() * noise(x)
        yield x


def predictor(process: GaussianDiffusion, denoise: Denoise) -> Predict:
    """`denoise` followed by its meaning: (x_t, level) -> Prediction."""
    return lambda x, t: process.interpret(denoise(x, t), x, t)
