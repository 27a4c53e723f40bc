"""The Gaussian diffusion process between any two noise levels: forward, posterior, reverse.

With r = SNR_t / SNR_s <= 1 for a level t noisier than s, everything about the pair follows from alpha, sigma
and r (Kingma et al. 2021, App. A, rewritten): q(x_t | x_s) has mean (alpha_t / alpha_s) x_s and variance
sigma_t^2 (1 - r); q(x_s | x_t, x_0) has mean sqrt(r) (sigma_s / sigma_t) x_t + alpha_s (1 - r) x_0 and variance
sigma_s^2 (1 - r). Clean data (sigma_s = 0, r = 0) and pure noise (alpha_t = 0, r = 0) need no special case.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from src.diffusion.noise import NoiseLevel

Target = Literal["eps", "x0", "v", "edm", "velocity"]
Variance = Literal["fixed_small", "fixed_large", "learned_range", "learned"]

# Below this an SNR counts as zero; weights relative to it stay finite in float32.
TINY_SNR = 1e-20
# Below this a variance counts as zero.
TINY_VARIANCE = 1e-36


class Prediction(NamedTuple):
    """What a network's output means: the clean data and the noise that it saw in x_t, each (B, *data).

    `mix` (B, *data) is what it says of the reverse step's variance, if that is learned.
    """

    x0: Tensor
    eps: Tensor
    mix: Tensor | None = None


class Gaussian(NamedTuple):
    """A diagonal Gaussian: mean (B, *data), log-variance broadcastable to it."""

    mean: Tensor
    log_variance: Tensor


class GaussianDiffusion(nn.Module):
    """Formulas over data (B, *data) of any rank; t and s are `NoiseLevel`s, s the cleaner one.

    `prediction` is what the network puts out: eps, x0, v, EDM's preconditioned output for data of deviation
    `sigma_data`, or the flow's velocity. `variance` is that of the reverse step. `clip_x0` bounds the predicted |x_0|
    (None: no bound); with `dynamic_threshold`, a quantile in (0, 1), only to scale down what exceeds it (Saharia et al.
    2022, Imagen, sec. 2.3). Where s is clean data, and the posterior's variance 0, the reverse step's is the
    schedule's `decoder_scale` times (sigma_t / alpha_t)^2. `num_values` is the number of values that the data can take,
    evenly over [-1, 1]; None if they are continuous.
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
            raise ValueError(f"unknown prediction {prediction!r}: diffusion.prediction is one of {get_args(Target)}")
        if variance not in get_args(Variance):
            raise ValueError(f"unknown variance {variance!r}: diffusion.variance is one of {get_args(Variance)}")
        if clip_x0 is not None and clip_x0 <= 0:
            raise ValueError(f"clip must be positive, got {clip_x0}: 1.0 for images in [-1, 1], null for no bound")
        if dynamic_threshold is not None and (clip_x0 is None or not 0 < dynamic_threshold < 1):
            raise ValueError(
                f"dynamic_clip is a quantile in (0, 1) and needs clip, got {dynamic_threshold} and clip {clip_x0}: "
                "diffusion.clip_x0=1.0 diffusion.dynamic_threshold=0.995 is usual"
            )
        if sigma_data <= 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}: 0.5 for images (diffusion.sigma_data)")
        self.prediction: Target = prediction
        self.variance: Variance = variance
        self.clip_x0 = clip_x0
        self.dynamic_threshold = dynamic_threshold
        self.sigma_data = sigma_data
        self.decoder_scale = decoder_scale
        self.num_values = num_values
        self.outputs = 2 if variance in ("learned_range", "learned") else 1
        """How many numbers the network gives for each of the data's."""

    def step(self, x_s: Tensor, s: NoiseLevel, t: NoiseLevel, eps: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_s): one link of the chain (DDPM eq. 2), or a longer one. (B, *data)."""
        return t.alpha / s.alpha * x_s + t.sigma * (1 - snr_ratio(t, s)).sqrt() * eps

    def add_noise(self, x0: Tensor, t: NoiseLevel, eps: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0), the whole chain at once (DDPM eq. 4). (B, *data)."""
        return t.alpha * x0 + t.sigma * eps

    def scale_input(self, x_t: Tensor, t: NoiseLevel) -> Tensor:
        """x_t as the network wants it: of unit variance for EDM's preconditioning (tab. 1, c_in), else as it is."""
        return x_t / self._deviation(t) if self.prediction == "edm" else x_t

    def target(self, x0: Tensor, t: NoiseLevel, eps: Tensor) -> Tensor:
        """What the network should put out for x_t = alpha x_0 + sigma eps. (B, *data)."""
        match self.prediction:
            case "eps":
                return eps
            case "x0":
                return x0
            case "v":  # Salimans & Ho 2022, App. D
                return t.alpha * eps - t.sigma * x0
            case "edm":  # Karras et al. 2022, eq. 8, for any alpha
                d = self.sigma_data
                return (t.sigma / d * x0 - t.alpha * d * eps) / self._deviation(t)
            case "velocity":  # Liu et al. 2022, eq. 1, from data to noise
                return eps - x0

    def interpret(self, out: Tensor, x_t: Tensor, t: NoiseLevel, *, clipped: bool = True) -> Prediction:
        """The inverse of `target`: the network's output (B, outputs * C, *rest) at x_t as x_0, eps and mix.

        If x_0 is clipped, eps is derived again from it, so that x_t = alpha x_0 + sigma eps still holds. `vlb`
        asks for it not `clipped`, since what is beyond the bound would learn nothing.
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
                d, std = self.sigma_data, self._deviation(t)
                x0 = (t.alpha * d**2 / std * x_t + t.sigma * d * out) / std
                eps = (t.sigma / std * x_t - t.alpha * d * out) / std
            case "velocity":
                x0, eps = (x_t - t.sigma * out) / (t.alpha + t.sigma), (x_t + t.alpha * out) / (t.alpha + t.sigma)
        if clipped and self.clip_x0 is not None:
            x0 = self._clipped(x0, self.clip_x0)
            eps = (x_t - t.alpha * x0) / t.sigma
        return Prediction(x0, eps, mix)

    def target_gain(self, t: NoiseLevel) -> Tensor:
        """|d target / d x_0|^2 at fixed x_t: squared error of the target = gain * squared error of x_0.

        In the level's shape, and positive also at zero SNR.
        """
        match self.prediction:
            case "eps":
                return t.snr.clamp(min=TINY_SNR)
            case "x0":
                return torch.ones_like(t.alpha)
            case "v":
                return ((t.alpha.square() + t.sigma.square()) / t.sigma).square()
            case "edm":  # 1 / c_out^2
                return (self._deviation(t) / (t.sigma * self.sigma_data)).square()
            case "velocity":
                return ((t.alpha + t.sigma) / t.sigma).square()

    def posterior(self, x0: Tensor, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> Gaussian:
        """q(x_s | x_t, x_0) for s cleaner than t (Kingma et al. 2021, App. A; DDPM eq. 6-7 for neighbours).

        For clean s the variance is 0, and what is given is the logarithm of the decoder's.
        """
        root = _root_snr_ratio(t, s)
        r = root.square()
        mean = root * (s.sigma / t.sigma) * x_t + s.alpha * (1 - r) * x0
        return Gaussian(mean, self._log_variance(s.sigma.square() * (1 - r), t, s))

    def reverse(self, pred: Prediction, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> Gaussian:
        """p(x_s | x_t), the model's reverse step: the posterior at the predicted x_0, with the chosen variance.

        fixed_small and fixed_large are the optimal ones for data that are a point and a unit Gaussian (DDPM sec. 3.2):
        the posterior's own variance, and q(x_t | x_s)'s, brought from the scale of t to that of s (beta_t for
        neighbours in a table). learned_range interpolates their logarithms (Nichol & Dhariwal 2021, eq. 15), mix in
        [-1, 1] from the first to the second, which for clean s nearly coincide in continuous time; learned is the
        first times exp(mix), free of bounds, and meaningful for any stride.
        """
        mean, small = self.posterior(pred.x0, x_t, t, s)
        large = (t.sigma * s.norm / t.norm).square() * (1 - snr_ratio(t, s))
        match self.variance:
            case "fixed_small":
                return Gaussian(mean, small)
            case "fixed_large":
                return Gaussian(mean, self._log_variance(large, t, s))
        assert pred.mix is not None
        if self.variance == "learned":
            return Gaussian(mean, small + pred.mix)
        return Gaussian(mean, small + (pred.mix + 1) / 2 * (large.clamp(min=TINY_VARIANCE).log() - small))

    def _deviation(self, t: NoiseLevel) -> Tensor:
        """The deviation of x_t for data of deviation `sigma_data`."""
        return torch.hypot(t.alpha * self.sigma_data, t.sigma)

    def _clipped(self, x0: Tensor, clip_x0: float) -> Tensor:
        if self.dynamic_threshold is None:
            return x0.clamp(-clip_x0, clip_x0)
        largest = torch.quantile(x0.abs().flatten(1), self.dynamic_threshold, dim=1).clamp(min=clip_x0)
        largest = largest.view(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-largest, largest) * (clip_x0 / largest)

    def _log_variance(self, variance: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
        variance = torch.where(s.sigma > 0, variance, self.decoder_scale * t.ratio.square())
        # Clamped, since the derivative of log 0 would be NaN also where it is not chosen.
        return variance.clamp(min=TINY_VARIANCE).log()


def snr_ratio(t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """r = SNR_t / SNR_s in [0, 1], for t noisier than s; 0 if s is clean data or t pure noise."""
    return _root_snr_ratio(t, s).square().clamp(max=1)


def _root_snr_ratio(t: NoiseLevel, s: NoiseLevel) -> Tensor:
    # Two levels of pure noise are the same.
    return torch.where(s.alpha > 0, t.alpha * s.sigma / (s.alpha * t.sigma), 1.0)
