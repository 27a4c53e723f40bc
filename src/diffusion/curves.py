"""Continuous-time schedules: curves from u in [0, 1] to (alpha, sigma), nearly clean at 0 and noise at 1.

Each maps u of any shape and dtype to two tensors like it. A curve defined by its log-SNR lambda has
alpha^2 = sigmoid(lambda) and sigma^2 = sigmoid(-lambda), with lambda in [min_log_snr, max_log_snr] (Kingma et al. 2021,
arXiv 2107.00630).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.diffusion.noise import Curve


def cosine_log_snr(u: Tensor, max_log_snr: float = 15.0, min_log_snr: float = -15.0) -> tuple[Tensor, Tensor]:
    """Return the cosine schedule lambda = -2 log tan(a u + b), with a and b such that lambda has the given ends.

    Source: Hoogeboom et al. 2023 (arXiv 2301.11093), app. A.
    """
    _check_ends(max_log_snr, min_log_snr)
    low, high = math.atan(math.exp(-max_log_snr / 2)), math.atan(math.exp(-min_log_snr / 2))
    angle = low + (high - low) * u
    return angle.cos(), angle.sin()


def linear_log_snr(u: Tensor, max_log_snr: float = 10.0, min_log_snr: float = -10.0) -> tuple[Tensor, Tensor]:
    """Return the schedule with lambda linear in u: every octave of noise takes the same time."""
    _check_ends(max_log_snr, min_log_snr)
    return variance_preserving(max_log_snr + (min_log_snr - max_log_snr) * u)


def exploding(u: Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0) -> tuple[Tensor, Tensor]:
    """Return the variance-exploding schedule: alpha = 1, log sigma linear in u.

    Source: Karras et al. 2022 (arXiv 2206.00364), tab. 1 for the ends.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"schedule.curve.sigma_min={sigma_min} must be positive and below schedule.curve.sigma_max={sigma_max}; "
            "EDM uses 0.002 and 80"
        )
    sigma = torch.exp(math.log(sigma_min) + u * math.log(sigma_max / sigma_min))
    return torch.ones_like(u), sigma


def rectified_flow(u: Tensor, start: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Return alpha = 1 - u, sigma = u, with u rescaled to [start, 1] to keep 1 / sigma finite.

    Source: Liu et al. 2022 (arXiv 2209.03003); Lipman et al. 2022 (arXiv 2210.02747).
    """
    if not 0 < start < 1:
        raise ValueError(f"schedule.curve.start={start} must be in (0, 1); 1e-4 is usual")
    return (1 - start) * (1 - u), start + (1 - start) * u


def shifted(curve: Curve, factor: float) -> Curve:
    """Multiply alpha / sigma by `factor` at every u, and so the SNR by factor^2.

    Rescale such that the invariant of the curve still equals 1: alpha^2 + sigma^2, alpha + sigma, or alpha. For
    `rectified_flow` this is the timestep shift of Stable Diffusion 3, t sqrt(m / n) / (1 + (sqrt(m / n) - 1) t) with
    sqrt(m / n) = 1 / factor.

    Source: Hoogeboom et al. 2023 (arXiv 2301.11093); Esser et al. 2024 (arXiv 2403.03206), eq. 23.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"snr_shift={factor} must be positive; 64 / image size is usual, 1 has no effect")
    if isinstance(curve, nn.Module):
        raise ValueError(
            f"snr_shift={factor:g} does not apply to a learned schedule; "
            "add 2 log(snr_shift) to schedule.curve.max_log_snr and schedule.curve.min_log_snr"
        )
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    norm = next((n for n in (torch.hypot, torch.add, _alpha) if torch.allclose(n(*curve(u)), torch.ones_like(u))), None)
    if norm is None:
        raise ValueError(
            f"snr_shift={factor:g} needs a schedule.curve with alpha^2 + sigma^2, alpha + sigma or alpha equal to 1; "
            "set snr_shift=1 and shift the curve itself"
        )
    return partial(_shift, curve=curve, factor=factor, norm=norm)


def _shift(u: Tensor, curve: Curve, factor: float, norm: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    alpha, sigma = curve(u)
    alpha = factor * alpha
    scale = norm(alpha, sigma)
    return alpha / scale, sigma / scale


def _alpha(alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha


class Learned(nn.Module):
    """A learned schedule: lambda decreases from `max_log_snr` to `min_log_snr` along a monotone network.

    The network is a linear term plus `width` sigmoids, all with positive weights, rescaled to keep the ends. It is
    nearly linear at initialization.

    Source: Kingma et al. 2021 (arXiv 2107.00630), app. H.
    """

    def __init__(self, max_log_snr: float = 10.0, min_log_snr: float = -10.0, width: int = 256) -> None:
        super().__init__()
        _check_ends(max_log_snr, min_log_snr)
        self.max_log_snr, self.min_log_snr = max_log_snr, min_log_snr
        # softplus(-7), about 0.001, weighs each sigmoid; softplus(log(e - 1)) = 1 weighs the linear term.
        self.line = nn.Parameter(torch.tensor(math.log(math.e - 1)))
        self.heights = nn.Parameter(torch.full((width,), -7.0))
        self.centers = nn.Parameter(torch.linspace(0, 1, width))
        self.slopes = nn.Parameter(torch.full((width,), 10.0))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        # At least float32, whatever the dtype of the weights, since neighboring levels differ by little.
        x = u.to(self.line.device, torch.promote_types(self.line.dtype, torch.float32))
        start, stop = self._rise(x.new_zeros(())), self._rise(x.new_ones(()))
        fraction = (self._rise(x) - start) / (stop - start)
        log_snr = self.max_log_snr + (self.min_log_snr - self.max_log_snr) * fraction
        return variance_preserving(log_snr.to(u))

    def _rise(self, x: Tensor) -> Tensor:
        steps = torch.sigmoid(F.softplus(self.slopes) * (x[..., None] - self.centers))
        return F.softplus(self.line) * x + (F.softplus(self.heights) * steps).sum(-1)


def variance_preserving(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (alpha, sigma) with alpha^2 + sigma^2 = 1 and the given log-SNR."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def _check_ends(max_log_snr: float, min_log_snr: float) -> None:
    if not max_log_snr > min_log_snr:
        raise ValueError(
            f"schedule.curve.max_log_snr={max_log_snr} must exceed schedule.curve.min_log_snr={min_log_snr}"
        )
