"""Likelihood: divergences between Gaussians, decoders, and the variational bound in bits/dim.

L = L_prior + sum_t L_t + L_decoder (Ho et al. 2020, eq. 5). Terms are in nats per element until `in_bits` averages over
the elements and converts to bits.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from src.diffusion.gaussian_diffusion import TINY_VARIANCE, Gaussian, GaussianDiffusion, Prediction, snr_ratio
from src.diffusion.noise import NoiseLevel, Transition

Predict = Callable[[Tensor, NoiseLevel], Prediction]  # (x_t (B, *data), level) -> the prediction of the network


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """Return the elementwise KL(p || q) between diagonal Gaussians in nats."""
    difference = p.log_variance - q.log_variance
    return 0.5 * (torch.exp(difference) - 1 - difference + (p.mean - q.mean).square() * torch.exp(-q.log_variance))


def gaussian_log_prob(x: Tensor, q: Gaussian) -> Tensor:
    """Return the elementwise log-density of x under q in nats."""
    distance = (x - q.mean).square() * torch.exp(-q.log_variance)
    return -0.5 * (math.log(2 * math.pi) + q.log_variance + distance)


def discretized_gaussian_log_prob(x: Tensor, q: Gaussian, num_values: int) -> Tensor:
    """Return the elementwise log-probability under q of the bin around x in nats.

    x takes `num_values` values, evenly spaced over [-1, 1], each in the middle of a bin; the first and last bins extend
    to infinity.

    Source: Ho et al. 2020, eq. 13.
    """
    half = 1 / (num_values - 1)
    std = torch.exp(0.5 * q.log_variance)
    lower, upper = (x - half - q.mean) / std, (x + half - q.mean) / std
    # Reflect both ends into the lower tail, where the logarithm is accurate.
    reflected = lower + upper > 0
    lower, upper = torch.where(reflected, -upper, lower), torch.where(reflected, -lower, upper)
    log_upper, log_lower = log_ndtr(upper), log_ndtr(lower)
    inner = log_upper + torch.log(-torch.expm1((log_lower - log_upper).clamp(max=-1e-12)))
    first, last = x < -1 + half, x > 1 - half
    below = log_ndtr((x + half - q.mean) / std)
    above = log_ndtr(-(x - half - q.mean) / std)
    return torch.where(first, below, torch.where(last, above, inner))


def log_ndtr(x: Tensor) -> Tensor:
    """Return the log of the standard normal distribution function, with an accurate gradient in the lower tail.

    The gradient of torch.special.log_ndtr, exp(-x^2 / 2 - log_ndtr(x)), is noise in float32 below x = -1000.
    """
    # torch.where instead of clamp, which has no gradient at 0.
    tail, rest = torch.where(x < 0, x, 0.0), torch.where(x < 0, 0.0, x)
    below: Tensor = torch.log(torch.special.erfcx(-tail / math.sqrt(2)) / 2) - tail.square() / 2
    return torch.where(x < 0, below, torch.special.log_ndtr(rest))


def decoder_log_prob(diffusion: GaussianDiffusion, x0: Tensor, q: Gaussian) -> Tensor:
    """Return the elementwise log p(x_0 | x_1) in nats: of a bin for discrete data, a density for continuous data."""
    if diffusion.num_values is None:
        return gaussian_log_prob(x0, q)
    return discretized_gaussian_log_prob(x0, q, diffusion.num_values)


def transition_bits(
    diffusion: GaussianDiffusion,
    pred: Prediction,
    x0: Tensor,
    x_t: Tensor,
    transition: Transition,
    log_variance: Tensor | None = None,
) -> Tensor:
    """Return the term of the bound for one transition, (B,) in bits/dim.

    It is KL(q(x_s | x_t, x_0) || p(x_s | x_t)), or -log p(x_0 | x_t) if s is clean data. `log_variance`, broadcastable
    to x0 (B, *data), replaces the variance of the reverse step.
    """
    t, s, _ = transition
    posterior, model = diffusion.posterior(x0, x_t, t, s), diffusion.reverse(pred, x_t, t, s)
    if log_variance is not None:
        model = Gaussian(model.mean, log_variance)
    # Compute both: a branch on a tensor synchronizes with the GPU.
    return in_bits(torch.where(s.sigma == 0, -decoder_log_prob(diffusion, x0, model), gaussian_kl(posterior, model)))


def optimal_log_variance(t: NoiseLevel, s: NoiseLevel, mse: Tensor) -> Tensor:
    """Return the log of the optimal isotropic variance of the reverse step, in the shape of `mse`.

    It is the variance of the posterior plus mse times the squared coefficient of x_0 in its mean, where `mse` is the
    mean squared error of the predicted x_0 at t. For clean s it is `mse`.

    Source: Bao et al. 2022 (Analytic-DPM, arXiv 2201.06503), theorem 1, with the correction for an imperfect predictor
    of Bao et al. 2022 (arXiv 2206.07309).
    """
    one_minus_r = 1 - snr_ratio(t, s)
    variance = s.sigma.square() * one_minus_r + (s.alpha * one_minus_r).square() * mse
    return variance.clamp(min=TINY_VARIANCE).log()


def prior_bits(t: NoiseLevel, x0: Tensor) -> Tensor:
    """Return the prior term of the bound at the noisiest level t, KL(q(x_t | x_0) || p(x_t)), (B,) in bits/dim.

    p(x_t) = N(0, alpha^2 + sigma^2), which is N(0, 1) for variance-preserving schedules.
    """
    p = Gaussian(torch.zeros_like(x0), t.norm.square().log())
    return in_bits(gaussian_kl(Gaussian(t.alpha * x0, t.sigma.square().log()), p))


def in_bits(nats: Tensor) -> Tensor:
    """Convert nats per element (B, *data) to bits/dim (B,)."""
    return nats.flatten(1).mean(1) / math.log(2)


def flow_slope(predict: Predict, z: Tensor, angle: Tensor, level: NoiseLevel, probe: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability flow at z = x / sqrt(alpha^2 + sigma^2), (B, *data), and its divergence, (B,).

    With tan(angle) = sigma / alpha, every schedule has z = cos(angle) x_0 + sin(angle) eps, and the flow is
    dz/dangle = -sin(angle) x_0 + cos(angle) eps at the prediction. The divergence is Hutchinson's estimate
    with `probe`, random values like z of unit variance.

    Source: Song et al. 2021 (arXiv 2011.13456), eq. 13 in these coordinates, and app. D.2.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        pred = predict(level.norm * z, level)
        velocity = angle.cos() * pred.eps - angle.sin() * pred.x0
        (probe_jacobian,) = torch.autograd.grad(velocity, z, probe)
    return velocity.detach(), (probe_jacobian * probe).flatten(1).sum(1)
