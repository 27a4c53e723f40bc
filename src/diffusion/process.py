"""The Gaussian diffusion process between any two noise levels: forward, posterior, reverse.

With r = SNR_t / SNR_s <= 1 for a level t noisier than s, everything about the pair follows from alpha, sigma
and r (Kingma et al. 2021, App. A, rewritten): q(x_t | x_s) has mean (alpha_t / alpha_s) x_s and variance
sigma_t^2 (1 - r); q(x_s | x_t, x_0) has mean sqrt(r) (sigma_s / sigma_t) x_t + alpha_s (1 - r) x_0 and variance
sigma_s^2 (1 - r). Clean data (sigma_s = 0, r = 0) and pure noise (alpha_t = 0, r = 0) need no special case.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from src.diffusion.noise import Level

Target = Literal["eps", "x0", "v"]
Variance = Literal["fixed_small", "fixed_large"]


class Prediction(NamedTuple):
    """What a network's output means: the clean data and the noise that it saw in x_t, each (B, *data)."""

    x0: Tensor
    eps: Tensor


class Gaussian(NamedTuple):
    """A diagonal Gaussian: mean (B, *data), log-variance broadcastable to it."""

    mean: Tensor
    log_variance: Tensor


class GaussianDiffusion(nn.Module):
    """Formulas over data (B, *data) of any rank; t and s are `Level`s, s the cleaner one.

    `prediction` is what the network puts out, `variance` that of the reverse step, `clip` bounds the predicted
    |x_0| (None: no bound). `decoder_log_variance` stands in for log 0 where s is clean data: pass
    `NoiseSchedule.decoder_log_variance`, the posterior's value at t = 1.
    """

    def __init__(
        self,
        prediction: Target = "eps",
        variance: Variance = "fixed_small",
        clip: float | None = None,
        decoder_log_variance: float = -20.0,
    ) -> None:
        super().__init__()
        if prediction not in get_args(Target):
            raise ValueError(f"unknown prediction {prediction!r}: process.prediction is one of {get_args(Target)}")
        if variance not in get_args(Variance):
            raise ValueError(f"unknown variance {variance!r}: process.variance is one of {get_args(Variance)}")
        if clip is not None and clip <= 0:
            raise ValueError(f"clip must be positive, got {clip}: 1.0 for images in [-1, 1], null for no bound")
        self.prediction: Target = prediction
        self.variance: Variance = variance
        self.clip = clip
        self.decoder_log_variance = decoder_log_variance

    def step(self, x_s: Tensor, s: Level, t: Level, eps: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_s): one link of the chain (DDPM eq. 2), or a longer one. (B, *data)."""
        return t.alpha / s.alpha * x_s + t.sigma * (1 - snr_ratio(t, s)).sqrt() * eps

    def add_noise(self, x0: Tensor, t: Level, eps: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0), the whole chain at once (DDPM eq. 4). (B, *data)."""
        return t.alpha * x0 + t.sigma * eps

    def target(self, x0: Tensor, t: Level, eps: Tensor) -> Tensor:
        """What the network should put out for x_t = alpha x_0 + sigma eps. (B, *data)."""
        match self.prediction:
            case "eps":
                return eps
            case "x0":
                return x0
            case "v":  # Salimans & Ho 2022, App. D
                return t.alpha * eps - t.sigma * x0

    def interpret(self, out: Tensor, x_t: Tensor, t: Level) -> Prediction:
        """The inverse of `target`: the network's output (B, *data) at x_t as x_0 and eps.

        If x_0 is clipped, eps is derived again from it, so that x_t = alpha x_0 + sigma eps still holds.
        """
        match self.prediction:
            case "eps":
                x0, eps = (x_t - t.sigma * out) / t.alpha, out
            case "x0":
                x0, eps = out, (x_t - t.alpha * out) / t.sigma
            case "v":  # invert the rotation-and-scaling [[alpha, sigma], [-sigma, alpha]]
                norm = t.alpha.square() + t.sigma.square()
                x0, eps = (t.alpha * x_t - t.sigma * out) / norm, (t.sigma * x_t + t.alpha * out) / norm
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
            eps = (x_t - t.alpha * x0) / t.sigma
        return Prediction(x0, eps)

    def target_gain(self, t: Level) -> Tensor:
        """|d target / d x_0|^2 at fixed x_t: squared error of the target = gain * squared error of x_0.

        In the level's shape: 1 for x0, SNR for eps, (alpha^2 + sigma^2)^2 / sigma^2 for v.
        """
        match self.prediction:
            case "eps":
                return t.snr
            case "x0":
                return torch.ones_like(t.alpha)
            case "v":
                return ((t.alpha.square() + t.sigma.square()) / t.sigma).square()

    def posterior(self, x0: Tensor, x_t: Tensor, t: Level, s: Level) -> Gaussian:
        """q(x_s | x_t, x_0) for s cleaner than t (Kingma et al. 2021, App. A; DDPM eq. 6-7 for neighbours).

        For clean s the variance is 0, and its logarithm is replaced by `decoder_log_variance`.
        """
        r = snr_ratio(t, s)
        mean = r.sqrt() * (s.sigma / t.sigma) * x_t + s.alpha * (1 - r) * x0
        return Gaussian(mean, self._log_variance(s.sigma.square() * (1 - r), s))

    def reverse(self, pred: Prediction, x_t: Tensor, t: Level, s: Level) -> Gaussian:
        """p(x_s | x_t), the model's reverse step: the posterior at the predicted x_0, with the chosen variance.

        fixed_small is the posterior's own variance, fixed_large that of q(x_t | x_s) (beta_t for neighbours):
        the optimal ones for data that are a point and a unit Gaussian (DDPM sec. 3.2).
        """
        mean, log_variance = self.posterior(pred.x0, x_t, t, s)
        match self.variance:
            case "fixed_small":
                return Gaussian(mean, log_variance)
            case "fixed_large":
                return Gaussian(mean, self._log_variance(t.sigma.square() * (1 - snr_ratio(t, s)), s))

    def _log_variance(self, variance: Tensor, s: Level) -> Tensor:
        return torch.where(s.sigma > 0, variance.log(), self.decoder_log_variance)


def snr_ratio(t: Level, s: Level) -> Tensor:
    """r = SNR_t / SNR_s in [0, 1], for t noisier than s; 0 if s is clean data or t pure noise."""
    return (t.alpha * s.sigma / (s.alpha * t.sigma)).square()
