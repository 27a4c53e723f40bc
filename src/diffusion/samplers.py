"""Samplers: generators with one signature that walk a time_grid of levels from noise to data.

`sampler(process, predict, x, time_grid, *, ..., noise)` starts at x (B, *data) of level time_grid[0] and yields x at
time_grid[1], time_grid[2], ... up to clean data. Nothing here draws random numbers of its own: `noise(x)` gives fresh
standard normal values like x. Formulas are written for any alpha and sigma; in the variance-exploding coordinate
x / alpha with noise level sigma / alpha they are those of the papers.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from src.diffusion.gaussian_diffusion import GaussianDiffusion, snr_ratio
from src.diffusion.likelihood import Predict
from src.diffusion.losses import Denoise
from src.diffusion.noise import TimeGrid

Noise = Callable[[Tensor], Tensor]


def ancestral(
    diffusion: GaussianDiffusion, predict: Predict, x: Tensor, time_grid: TimeGrid, *, noise: Noise
) -> Iterator[Tensor]:
    """Sample the reverse chain x_s ~ p(x_s | x_t) link by link (Ho et al. 2020, alg. 2), for any strides."""
    for t, s in pairwise(time_grid):
        mean, log_variance = diffusion.reverse(predict(x, t), x, t, s)
        # The last link ends at clean data: its mean is the sample.
        x = mean if s is time_grid[-1] else mean + torch.exp(log_variance / 2) * noise(x)
        yield x


def ddim(
    diffusion: GaussianDiffusion,
    predict: Predict,
    x: Tensor,
    time_grid: TimeGrid,
    *,
    eta: float = 0.0,
    noise: Noise,
) -> Iterator[Tensor]:
    """DDIM (Song et al. 2021, eq. 12 and 16): deterministic for eta = 0, ancestral sampling for eta = 1.

    In the coordinate x / alpha it is Euler's method for the probability flow, and for eta > 0 the ancestral Euler
    method of k-diffusion, whose sigma_up is eta times the posterior's deviation. Raises ValueError for eta outside
    [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}: 0 is deterministic, 1 ancestral (sampler.eta)")
    for t, s in pairwise(time_grid):
        pred = predict(x, t)
        if eta == 0 or s is time_grid[-1]:
            x = s.alpha * pred.x0 + s.sigma * pred.eps
        else:
            variance = eta**2 * s.sigma.square() * (1 - snr_ratio(t, s))
            direction = (s.sigma.square() - variance).sqrt() * pred.eps
            x = s.alpha * pred.x0 + direction + variance.sqrt() * noise(x)
        yield x


def ddim_inversion(
    diffusion: GaussianDiffusion, predict: Predict, x: Tensor, time_grid: TimeGrid, *, noise: Noise
) -> Iterator[Tensor]:
    """DDIM walked from data to noise (Song et al. 2021, sec. 4.3): x is data; yields x at time_grid[-2], ..., time_grid[0].

    The noise that data stand for, from which `ddim` with eta = 0 leads back to them, the better the more steps. The
    noise of the first step is predicted as at time_grid[-2], since clean data hold none.
    """
    for s, t in pairwise(reversed(time_grid)):
        is_first = s is time_grid[-1]
        pred = predict(x, t if is_first else s)
        x = t.alpha * (x if is_first else pred.x0) + t.sigma * pred.eps
        yield x


def dpmpp_2m(
    diffusion: GaussianDiffusion, predict: Predict, x: Tensor, time_grid: TimeGrid, *, noise: Noise
) -> Iterator[Tensor]:
    """DPM-Solver++(2M): second order from the last two predictions of x_0 (Lu et al., 2211.01095, alg. 2).

    The first step, the one from pure noise and the last one, to clean data, are of first order, which is DDIM.
    """
    return _dpmpp(predict, x, time_grid, 0.0, noise)


def dpmpp_2m_sde(
    diffusion: GaussianDiffusion,
    predict: Predict,
    x: Tensor,
    time_grid: TimeGrid,
    *,
    eta: float = 1.0,
    noise: Noise,
) -> Iterator[Tensor]:
    """DPM-Solver++(2M) for the reverse stochastic equation (Lu et al., 2211.01095, app. B; midpoint form).

    `eta` is the share of its noise: 0 gives `dpmpp_2m`, and 1 in steps of first order `ancestral`.
    """
    if eta < 0:
        raise ValueError(f"eta must not be negative, got {eta}: 1 is usual, 0 adds no noise (sampler.eta)")
    return _dpmpp(predict, x, time_grid, eta, noise)


def heun(
    diffusion: GaussianDiffusion,
    predict: Predict,
    x: Tensor,
    time_grid: TimeGrid,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    noise: Noise,
) -> Iterator[Tensor]:
    """Heun's method with EDM's churn (Karras et al. 2022, alg. 2): two predictions a step, one for the last.

    `s_churn` spreads over the steps whose sigma / alpha lies in [churn_min, churn_max], adding noise of deviation
    `s_noise`, also beyond the noisiest level of the schedule (`Schedule.at_ratio` says at which time the network is
    called there). A step from pure noise, where alpha is at most 1e-6, is DDIM's and gets no churn.
    """
    if s_churn < 0 or s_noise < 0:
        raise ValueError(f"churn and churn_noise must not be negative, got {s_churn} and {s_noise}: 0 and 1 are usual")
    raised = min(s_churn / (len(time_grid) - 1), 2**0.5 - 1)
    for t, s in pairwise(time_grid):
        from_noise = t.alpha <= TINY_ALPHA
        if raised > 0 and s_tmin <= t.ratio <= s_tmax and not from_noise:
            # Raise the noise a little.
            hat = time_grid.at_ratio(t.ratio * (1 + raised))
            added = (hat.ratio.square() - t.ratio.square()).clamp(min=0).sqrt() * s_noise
            x, t = hat.alpha * (x / t.alpha + added * noise(x)), hat
        # Euler step.
        pred = predict(x, t)
        ahead = s.alpha * pred.x0 + s.sigma * pred.eps
        if s is not time_grid[-1] and not from_noise:
            # Second-order correction: the slope of x / alpha is eps.
            change = (predict(ahead, s).eps - pred.eps) / 2
            ahead = ahead + s.alpha * (s.ratio - t.ratio) * change
        x = ahead
        yield x


# Below this alpha a level is pure noise, and nothing can be divided by it.
TINY_ALPHA = 1e-6


def predictor(diffusion: GaussianDiffusion, denoise: Denoise) -> Predict:
    """`denoise` followed by its meaning: (x_t, level) -> Prediction."""
    return lambda x, t: diffusion.interpret(denoise(x, t), x, t)


def _dpmpp(predict: Predict, x: Tensor, time_grid: TimeGrid, eta: float, noise: Noise) -> Iterator[Tensor]:
    """With h the step in log(alpha / sigma), x <- (sigma_s / sigma_t) e^(-eta h) x + alpha_s (1 - e^(-(1 + eta) h)) D.

    D is x_0 as predicted, extrapolated to the middle of the step from the last two predictions.
    """
    before: tuple[Tensor, Tensor] | None = None
    for t, s in pairwise(time_grid):
        pred = predict(x, t)
        decay = snr_ratio(t, s).sqrt()  # e^-h
        h = -decay.log()
        data = pred.x0
        if before is not None and s is not time_grid[-1]:
            data = data + h / (2 * before[1]) * (pred.x0 - before[0])
        x_next = s.sigma / t.sigma * decay**eta * x + s.alpha * (1 - decay ** (1 + eta)) * data
        if eta > 0 and s is not time_grid[-1]:
            x_next = x_next + s.sigma * (1 - decay ** (2 * eta)).sqrt() * noise(x)
        if 0 < h < math.inf:  # else it came from pure noise, or t and s are the same level
            before = pred.x0, h
        x = x_next
        yield x
