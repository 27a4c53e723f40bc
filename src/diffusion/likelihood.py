"""Likelihood: divergences between Gaussians, decoders, and the variational bound in bits per dimension.

L = L_prior + sum_t L_t + L_decoder (Ho et al. 2020, eq. 5), each in nats per element of the data until `in_bits`
turns it into bits and averages over the elements.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from src.diffusion.gaussian_diffusion import TINY_VARIANCE, Gaussian, GaussianDiffusion, Prediction, snr_ratio
from src.diffusion.noise import NoiseLevel, Transition

Predict = Callable[[Tensor, NoiseLevel], Prediction]
"""(x_t (B, *data), level) -> what the network's output there means."""


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) between diagonal Gaussians, element by element, in nats."""
    difference = p.log_variance - q.log_variance
    return 0.5 * (torch.exp(difference) - 1 - difference + (p.mean - q.mean).square() * torch.exp(-q.log_variance))


def discrete_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) between distributions (N,), neither need be normalised, in nats. Infinite where q lacks what p has."""
    p, q = p / p.sum(), q / q.sum()
    terms: Tensor = torch.special.xlogy(p, p / q)
    return terms.nan_to_num(nan=0.0, posinf=math.inf).sum()


def gaussian_log_prob(x: Tensor, q: Gaussian) -> Tensor:
    """The log-density of x under q, element by element, in nats."""
    distance = (x - q.mean).square() * torch.exp(-q.log_variance)
    return -0.5 * (math.log(2 * math.pi) + q.log_variance + distance)


def discretized_gaussian_log_prob(x: Tensor, q: Gaussian, num_values: int) -> Tensor:
    """The log-probability under q of the bin that x lies in, element by element, in nats (Ho et al. 2020, eq. 13).

    x has `num_values` values evenly over [-1, 1], each in the middle of a bin; the outermost bins are open. By the exact
    normal distribution, in logarithms, so that no tail underflows.
    """
    half = 1 / (num_values - 1)
    std = torch.exp(0.5 * q.log_variance)
    lower, upper = (x - half - q.mean) / std, (x + half - q.mean) / std
    # Reflected, so that both ends lie where the logarithm keeps its digits: in the lower tail.
    reflected = lower + upper > 0
    lower, upper = torch.where(reflected, -upper, lower), torch.where(reflected, -lower, upper)
    log_upper, log_lower = log_ndtr(upper), log_ndtr(lower)
    inner = log_upper + torch.log(-torch.expm1((log_lower - log_upper).clamp(max=-1e-12)))
    first, last = x < -1 + half, x > 1 - half
    # The open side of an outer bin is the whole tail.
    below = log_ndtr((x + half - q.mean) / std)
    above = log_ndtr(-(x - half - q.mean) / std)
    return torch.where(first, below, torch.where(last, above, inner))


def log_ndtr(x: Tensor) -> Tensor:
    """The logarithm of the standard normal distribution function, with a gradient that keeps its digits in the tail.

    That of torch.special.log_ndtr is exp(-x^2 / 2 - log_ndtr(x)), in float32 noise below x = -1000 and then infinite.
    """
    # Not by clamp, which has no gradient at 0.
    tail, rest = torch.where(x < 0, x, 0.0), torch.where(x < 0, 0.0, x)
    below: Tensor = torch.log(torch.special.erfcx(-tail / math.sqrt(2)) / 2) - tail.square() / 2
    return torch.where(x < 0, below, torch.special.log_ndtr(rest))


def decoder_log_prob(diffusion: GaussianDiffusion, x0: Tensor, q: Gaussian) -> Tensor:
    """log p(x_0 | x_1), element by element, in nats: of a bin if the data have levels, else a density."""
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
    """One link's term of the bound, (B,) in bits/dim: KL(q(x_s | x_t, x_0) || p(x_s | x_t)), or the decoder's.

    `log_variance`, broadcastable to x0 (B, *data), replaces that of the process's reverse step.
    """
    truth, model = (
        diffusion.posterior(x0, x_t, transition.t, transition.s),
        diffusion.reverse(pred, x_t, transition.t, transition.s),
    )
    if log_variance is not None:
        model = Gaussian(model.mean, log_variance)
    # Both, since to look which it is a GPU would wait for all that is queued.
    return in_bits(
        torch.where(transition.s.sigma == 0, -decoder_log_prob(diffusion, x0, model), gaussian_kl(truth, model))
    )


def optimal_log_variance(t: NoiseLevel, s: NoiseLevel, mse: Tensor) -> Tensor:
    """The logarithm of the reverse step's best isotropic variance, in the shape of `mse`, which is that of x_0.

    The posterior's variance, plus the squared coefficient of x_0 in its mean times the mean squared error of the
    predicted x_0 at t. For clean s, whose posterior has no variance, that error alone.

    Source: Bao et al. 2022 (Analytic-DPM, 2201.06503), theorem 1, corrected for a predictor that is not ideal as in
    Bao et al. 2022 (2206.07309).
    """
    left = 1 - snr_ratio(t, s)
    variance = s.sigma.square() * left + (s.alpha * left).square() * mse
    return variance.clamp(min=TINY_VARIANCE).log()


def prior_bits(t: NoiseLevel, x0: Tensor) -> Tensor:
    """KL(q(x_t | x_0) || p(x_t)), (B,) in bits/dim, at the chain's noisiest level.

    p(x_t) = N(0, alpha^2 + sigma^2), which is N(0, 1) for tables.
    """
    p = Gaussian(torch.zeros_like(x0), t.norm.square().log())
    return in_bits(gaussian_kl(Gaussian(t.alpha * x0, t.sigma.square().log()), p))


def in_bits(nats: Tensor) -> Tensor:
    """Nats per element (B, *data) as bits/dim (B,)."""
    return nats.flatten(1).mean(1) / math.log(2)


def flow_slope(predict: Predict, z: Tensor, angle: Tensor, level: NoiseLevel, probe: Tensor) -> tuple[Tensor, Tensor]:
    """The probability flow at z = x / sqrt(alpha^2 + sigma^2) (B, *data), and its divergence (B,).

    With tan(angle) = sigma / alpha, z = cos(angle) x_0 + sin(angle) eps whatever the schedule, and the flow is
    dz/dangle = -sin(angle) x_0 + cos(angle) eps at the prediction (Song et al. 2021, 2011.13456, eq. 13 in these
    coordinates). The divergence is Hutchinson's estimate with `probe` like z, of unit variance (ib., app. D.2).
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        pred = predict(level.norm * z, level)
        slope = angle.cos() * pred.eps - angle.sin() * pred.x0
        (along,) = torch.autograd.grad(slope, z, probe)
    return slope.detach(), (along * probe).flatten(1).sum(1)
