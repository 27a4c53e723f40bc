"""The Gaussian diffusion process between any two noise levels: forward, posterior and reverse distributions.

For a level t noisier than s, let r = SNR_t / SNR_s <= 1. Then

    q(x_t | x_s)      has mean (alpha_t / alpha_s) x_s                              and variance sigma_t^2 (1 - r),
    q(x_s | x_t, x_0) has mean sqrt(r) (sigma_s / sigma_t) x_t + alpha_s (1 - r) x_0 and variance sigma_s^2 (1 - r).

Clean data (sigma_s = 0, r = 0) and pure noise (alpha_t = 0, r = 0) need no special case.

Source: Kingma et al. 2021 (arXiv 2107.00630), app. A, rewritten.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from src.diffusion.noise import NoiseLevel, per_sample

Target = Literal["eps", "x0", "v", "edm", "velocity"]
Variance = Literal["fixed_small", "fixed_large", "learned_range", "learned"]

# SNRs below this count as zero; weights that divide by it are finite in float32.
TINY_SNR = 1e-20
# Variances below this count as zero.
TINY_VARIANCE = 1e-36


class Prediction(NamedTuple):
    """The predicted clean data and noise, each (B, *data), with x_t = alpha x0 + sigma eps.

    `mix` (B, *data) is the output for the variance of the reverse step, or None if the variance is fixed.
    """

    x0: Tensor
    eps: Tensor
    mix: Tensor | None = None


class Gaussian(NamedTuple):
    """A diagonal Gaussian: mean (B, *data), log-variance broadcastable to it."""

    mean: Tensor
    log_variance: Tensor


class GaussianDiffusion(nn.Module):
    """Formulas for data (B, *data) of any rank between a `NoiseLevel` t and a cleaner one s.

    - `prediction`: the target of the network: eps, x0, v, edm (the preconditioned output of EDM for data with standard
      deviation `sigma_data`) or velocity (of the flow).
    - `variance`: the variance of the reverse step, see `reverse`.
    - `clip_x0`: bound on the predicted |x_0|, or None. With `dynamic_threshold`, a quantile in (0, 1), samples that
      exceed it are scaled down instead of clamped (Saharia et al. 2022, arXiv 2205.11487, sec. 2.3).
    - `decoder_scale`: variance of the last reverse step, to clean data, in units of (sigma_t / alpha_t)^2. The schedule
      defines it.
    - `num_values`: number of values of the data, evenly spaced over [-1, 1], or None for continuous data.
    """

    def __init__(
        self,
        prediction: Target = "eps",
        variance: Variance = "fixed_small",
        clip_x0: float | None = None,
        dynamic_threshold: float | None = None,
        sigma_data: float = 0.5,
        decoder_scale: float = 1.0,
        num_values: int | None = None,
    ) -> None:
        super().__init__()
        if prediction not in get_args(Target):
            raise ValueError(f"diffusion.prediction={prediction} must be one of {', '.join(get_args(Target))}")
        if variance not in get_args(Variance):
            raise ValueError(f"diffusion.variance={variance} must be one of {', '.join(get_args(Variance))}")
        if clip_x0 is not None and clip_x0 <= 0:
            raise ValueError(f"diffusion.clip_x0={clip_x0} must be positive; 1.0 is usual, null sets no bound")
        if dynamic_threshold is not None and (clip_x0 is None or not 0 < dynamic_threshold < 1):
            raise ValueError(
                f"diffusion.dynamic_threshold={dynamic_threshold} must be a quantile in (0, 1) and needs "
                f"diffusion.clip_x0, got {clip_x0}; diffusion.clip_x0=1.0 diffusion.dynamic_threshold=0.995 is usual"
            )
        if sigma_data <= 0:
            raise ValueError(f"diffusion.sigma_data={sigma_data} must be positive; 0.5 is usual for images")
        self.prediction: Target = prediction
        self.variance: Variance = variance
        self.clip_x0 = clip_x0
        self.dynamic_threshold = dynamic_threshold
        self.sigma_data = sigma_data
        self.decoder_scale = decoder_scale
        self.num_values = num_values
        self.outputs = 2 if variance in ("learned_range", "learned") else 1
        """Output channels of the network per data channel: 2 if the variance is learned, else 1."""

    def add_noise(self, x0: Tensor, t: NoiseLevel, eps: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0), (B, *data). Source: Ho et al. 2020, eq. 4."""
        return t.alpha * x0 + t.sigma * eps

    def scale_input(self, x_t: Tensor, t: NoiseLevel) -> Tensor:
        """Return the network input for x_t: c_in x_t for prediction edm, which has unit variance, else x_t.

        Source: Karras et al. 2022, tab. 1.
        """
        return x_t / self._std(t) if self.prediction == "edm" else x_t

    def target(self, x0: Tensor, t: NoiseLevel, eps: Tensor) -> Tensor:
        """Return the regression target of the network at x_t = alpha x_0 + sigma eps, (B, *data)."""
        match self.prediction:
            case "eps":
                return eps
            case "x0":
                return x0
            case "v":  # Salimans & Ho 2022 (arXiv 2202.00512), app. D
                return t.alpha * eps - t.sigma * x0
            case "edm":  # Karras et al. 2022, eq. 8, for any alpha
                d = self.sigma_data
                return (t.sigma / d * x0 - t.alpha * d * eps) / self._std(t)
            case "velocity":  # Liu et al. 2022 (arXiv 2209.03003), eq. 1, from data to noise
                return eps - x0

    def interpret(self, out: Tensor, x_t: Tensor, t: NoiseLevel, *, clipped: bool = True) -> Prediction:
        """Convert the network output at x_t, (B, outputs * C, *rest), to x_0, eps and mix: the inverse of `target`.

        If x_0 is clipped, eps is derived from the clipped value, so that x_t = alpha x_0 + sigma eps holds. `vlb` uses
        clipped=False, since clipped values have no gradient.
        """
        mix = None
        if self.outputs == 2:
            out, mix = out.chunk(2, dim=1)
        match self.prediction:
            case "eps":
                x0, eps = (x_t - t.sigma * out) / t.alpha, out
            case "x0":
                x0, eps = out, (x_t - t.alpha * out) / t.sigma
            case "v":  # invert the rotation-and-scaling [[alpha, sigma], [-sigma, alpha]]
                norm = t.alpha.square() + t.sigma.square()
                x0, eps = (t.alpha * x_t - t.sigma * out) / norm, (t.sigma * x_t + t.alpha * out) / norm
            case "edm":
                d, std = self.sigma_data, self._std(t)
                x0 = (t.alpha * d**2 / std * x_t + t.sigma * d * out) / std
                eps = (t.sigma / std * x_t - t.alpha * d * out) / std
            case "velocity":
                x0, eps = (x_t - t.sigma * out) / (t.alpha + t.sigma), (x_t + t.alpha * out) / (t.alpha + t.sigma)
        if clipped and self.clip_x0 is not None:
            x0 = self._clip(x0, self.clip_x0)
            eps = (x_t - t.alpha * x0) / t.sigma
        return Prediction(x0, eps, mix)

    def target_gain(self, t: NoiseLevel) -> Tensor:
        """Return |d target / d x_0|^2 at fixed x_t, in the shape of the level and positive even at zero SNR.

        The squared error of the target is this factor times the squared error of x_0.
        """
        match self.prediction:
            case "eps":
                return t.snr.clamp(min=TINY_SNR)
            case "x0":
                return torch.ones_like(t.alpha)
            case "v":
                return ((t.alpha.square() + t.sigma.square()) / t.sigma).square()
            case "edm":  # 1 / c_out^2
                return (self._std(t) / (t.sigma * self.sigma_data)).square()
            case "velocity":
                return ((t.alpha + t.sigma) / t.sigma).square()

    def posterior(self, x0: Tensor, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> Gaussian:
        """Return q(x_s | x_t, x_0) for s cleaner than t. For clean s, return the variance of the decoder instead of 0.

        Source: Kingma et al. 2021 (arXiv 2107.00630), app. A; for neighbors Ho et al. 2020, eq. 6-7.
        """
        sqrt_r = _sqrt_snr_ratio(t, s)
        r = sqrt_r.square()
        mean = sqrt_r * (s.sigma / t.sigma) * x_t + s.alpha * (1 - r) * x0
        return Gaussian(mean, self._log_variance(s.sigma.square() * (1 - r), t, s))

    def reverse(self, pred: Prediction, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> Gaussian:
        """Return p(x_s | x_t), the reverse step: the posterior at the predicted x_0 with the variance `variance`.

        - fixed_small: the variance of the posterior, optimal for a single data point.
        - fixed_large: the variance of q(x_t | x_s), rescaled from t to s (beta_t for neighbors), optimal for data from
          a unit Gaussian.
        - learned_range: interpolates between their logarithms, from the first at mix = -1 to the second at mix = 1.
        - learned: fixed_small times exp(mix), unbounded and valid for any stride.

        Source: Ho et al. 2020, sec. 3.2; Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 15.
        """
        mean, log_small = self.posterior(pred.x0, x_t, t, s)
        large = (t.sigma * s.norm / t.norm).square() * (1 - snr_ratio(t, s))
        match self.variance:
            case "fixed_small":
                return Gaussian(mean, log_small)
            case "fixed_large":
                return Gaussian(mean, self._log_variance(large, t, s))
        assert pred.mix is not None
        if self.variance == "learned":
            return Gaussian(mean, log_small + pred.mix)
        return Gaussian(mean, log_small + (pred.mix + 1) / 2 * (large.clamp(min=TINY_VARIANCE).log() - log_small))

    def _std(self, t: NoiseLevel) -> Tensor:
        """Return the standard deviation of x_t for data with standard deviation `sigma_data`."""
        return torch.hypot(t.alpha * self.sigma_data, t.sigma)

    def _clip(self, x0: Tensor, clip_x0: float) -> Tensor:
        if self.dynamic_threshold is None:
            return x0.clamp(-clip_x0, clip_x0)
        largest = torch.quantile(x0.abs().flatten(1), self.dynamic_threshold, dim=1)
        limit = per_sample(largest.clamp(min=clip_x0), x0)
        return x0.clamp(-limit, limit) * (clip_x0 / limit)

    def _log_variance(self, variance: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
        variance = torch.where(s.sigma > 0, variance, self.decoder_scale * t.ratio.square())
        # Without the clamp, the gradient of log 0 is NaN even where torch.where does not select it.
        return variance.clamp(min=TINY_VARIANCE).log()


def snr_ratio(t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """Return r = SNR_t / SNR_s in [0, 1] for t noisier than s; 0 if s is clean data or t is pure noise."""
    return _sqrt_snr_ratio(t, s).square().clamp(max=1)


def _sqrt_snr_ratio(t: NoiseLevel, s: NoiseLevel) -> Tensor:
    # Two levels of pure noise are equal: r = 1.
    return torch.where(s.alpha > 0, t.alpha * s.sigma / (s.alpha * t.sigma), 1.0)
