"""Samplers: generators with one signature that step through a time grid from noise to data.

`sampler(diffusion, predict, x, time_grid, *, ..., noise)` starts at x (B, *data) of level time_grid[0] and yields x at
time_grid[1], time_grid[2], ..., clean data. The only source of randomness is `noise(x)`, which returns fresh standard
normal values like x. Formulas hold for any alpha and sigma; in the variance-exploding coordinate x / alpha with noise
level sigma / alpha they are those of the papers.
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

Noise = Callable[[Tensor], Tensor]  # x (B, *data) -> standard normal values like x

# Levels with an alpha below this are pure noise: division by alpha is unstable.
TINY_ALPHA = 1e-6


def ancestral(
    diffusion: GaussianDiffusion, predict: Predict, x: Tensor, time_grid: TimeGrid, *, noise: Noise
) -> Iterator[Tensor]:
    """Sample the reverse process x_s ~ p(x_s | x_t) step by step, for any strides. Source: Ho et al. 2020, alg. 2."""
    for t, s in pairwise(time_grid):
        mean, log_variance = diffusion.reverse(predict(x, t), x, t, s)
        # The last step, to clean data, returns the mean.
        x = mean if s is time_grid[-1] else mean + torch.exp(log_variance / 2) * noise(x)
        yield x


def ddim(
    diffusion: GaussianDiffusion, predict: Predict, x: Tensor, time_grid: TimeGrid, *, eta: float = 0.0, noise: Noise
) -> Iterator[Tensor]:
    """Sample with DDIM: deterministic for eta = 0, ancestral sampling for eta = 1.

    In the coordinate x / alpha it is Euler's method for the probability flow, for eta > 0 k-diffusion's ancestral one.

    Source: Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"sampler.eta={eta} must be in [0, 1]; 0 is deterministic, 1 is ancestral sampling")
    for t, s in pairwise(time_grid):
        pred = predict(x, t)
        if eta == 0 or s is time_grid[-1]:
            x = s.alpha * pred.x0 + s.sigma * pred.eps
        else:
            variance = eta**2 * s.sigma.square() * (1 - snr_ratio(t, s))
            direction = (s.sigma.square() - variance).sqrt() * pred.eps
            x = s.alpha * pred.x0 + direction + variance.sqrt() * noise(x)
        yield x


def dpmpp_2m(
    diffusion: GaussianDiffusion, predict: Predict, x: Tensor, time_grid: TimeGrid, *, noise: Noise
) -> Iterator[Tensor]:
    """Sample with DPM-Solver++(2M), of second order from the last two predictions of x_0.

    The first step, a step from pure noise and the last step are of first order, which is DDIM.

    Source: Lu et al. 2022 (arXiv 2211.01095), alg. 2.
    """
    return _dpmpp(predict, x, time_grid, 0.0, noise)


def dpmpp_2m_sde(
    diffusion: GaussianDiffusion, predict: Predict, x: Tensor, time_grid: TimeGrid, *, eta: float = 1.0, noise: Noise
) -> Iterator[Tensor]:
    """Sample with DPM-Solver++(2M) for the reverse SDE, in its midpoint form.

    `eta` scales the noise: 0 gives `dpmpp_2m`; 1 gives `ancestral` in steps of first order.

    Source: Lu et al. 2022 (arXiv 2211.01095), app. B.
    """
    if eta < 0:
        raise ValueError(f"sampler.eta={eta} must be at least 0; 1 is usual, 0 adds no noise")
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
    """Sample with Heun's method and EDM's churn: two predictions per step, one for the last step.

    Churn multiplies sigma / alpha by 1 + min(s_churn / steps, sqrt(2) - 1) at the start of steps in [s_tmin, s_tmax],
    with noise of standard deviation `s_noise`. A step from pure noise, alpha <= 1e-6, is a DDIM step without churn.

    Source: Karras et al. 2022 (arXiv 2206.00364), alg. 2.
    """
    for name, value in (("s_churn", s_churn), ("s_noise", s_noise)):
        if value < 0:
            raise ValueError(f"sampler.{name}={value} must be at least 0; s_churn=0 and s_noise=1 are usual")
    gamma = min(s_churn / (len(time_grid) - 1), 2**0.5 - 1)
    for t, s in pairwise(time_grid):
        from_noise = t.alpha <= TINY_ALPHA
        if gamma > 0 and s_tmin <= t.ratio <= s_tmax and not from_noise:
            # Increase the noise temporarily.
            hat = time_grid.schedule.at_ratio(t.ratio * (1 + gamma))
            added = (hat.ratio.square() - t.ratio.square()).clamp(min=0).sqrt() * s_noise
            x, t = hat.alpha * (x / t.alpha + added * noise(x)), hat
        # Euler step.
        pred = predict(x, t)
        x_next = s.alpha * pred.x0 + s.sigma * pred.eps
        if s is not time_grid[-1] and not from_noise:
            # Second-order correction; d(x / alpha) / d(sigma / alpha) = eps.
            correction = (predict(x_next, s).eps - pred.eps) / 2
            x_next = x_next + s.alpha * (s.ratio - t.ratio) * correction
        x = x_next
        yield x


def predictor(diffusion: GaussianDiffusion, denoise: Denoise) -> Predict:
    """Return the function (x_t, level) -> Prediction of the raw network `denoise`."""
    return lambda x, t: diffusion.interpret(denoise(x, t), x, t)


def _dpmpp(predict: Predict, x: Tensor, time_grid: TimeGrid, eta: float, noise: Noise) -> Iterator[Tensor]:
    """Step x <- (sigma_s / sigma_t) e^(-eta h) x + alpha_s (1 - e^(-(1 + eta) h)) D + noise.

    h is the step in log(alpha / sigma); D is x_0 extrapolated to the middle of the step from the last two predictions.
    """
    previous: tuple[Tensor, Tensor] | None = None
    for t, s in pairwise(time_grid):
        pred = predict(x, t)
        decay = snr_ratio(t, s).sqrt()  # e^-h
        h = -decay.log()
        d = pred.x0
        if previous is not None and s is not time_grid[-1]:
            d = d + h / (2 * previous[1]) * (pred.x0 - previous[0])
        x_next = s.sigma / t.sigma * decay**eta * x + s.alpha * (1 - decay ** (1 + eta)) * d
        if eta > 0 and s is not time_grid[-1]:
            x_next = x_next + s.sigma * (1 - decay ** (2 * eta)).sqrt() * noise(x)
        if 0 < h < math.inf:  # else t is pure noise, or t and s are equal
            previous = pred.x0, h
        x = x_next
        yield x
