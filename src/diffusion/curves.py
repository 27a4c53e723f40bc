"""Schedules in continuous time: curves u in [0, 1] -> (alpha, sigma), nearly clean at 0 and noise at 1.

Each takes u of any shape and precision and gives two tensors like it. What is given by its log-SNR lambda has
alpha^2 = sigmoid(lambda) and sigma^2 = sigmoid(-lambda); the ends of lambda bound it (Kingma et al. 2021, VDM).
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.diffusion.noise import Curve


def cosine(u: Tensor, max_log_snr: float = 15.0, min_log_snr: float = -15.0) -> tuple[Tensor, Tensor]:
    """lambda = -2 log tan(a u + b), a quarter circle cut to the given ends (Hoogeboom et al., 2301.11093, app. A)."""
    _check_ends(max_log_snr, min_log_snr)
    low, high = math.atan(math.exp(-max_log_snr / 2)), math.atan(math.exp(-min_log_snr / 2))
    angle = low + (high - low) * u
    return angle.cos(), angle.sin()


def linear(u: Tensor, max_log_snr: float = 10.0, min_log_snr: float = -10.0) -> tuple[Tensor, Tensor]:
    """lambda linear in u: every octave of noise gets the same time."""
    _check_ends(max_log_snr, min_log_snr)
    return variance_preserving(max_log_snr + (min_log_snr - max_log_snr) * u)


def exploding(u: Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0) -> tuple[Tensor, Tensor]:
    """alpha = 1, sigma rising geometrically (Karras et al. 2022, EDM; the ends of tab. 1)."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}: EDM has 0.002 and 80")
    sigma = torch.exp(math.log(sigma_min) + u * math.log(sigma_max / sigma_min))
    return torch.ones_like(u), sigma


def rectified_flow(u: Tensor, start: float = 1e-4) -> tuple[Tensor, Tensor]:
    """alpha = 1 - u, sigma = u, straight from data to noise (Liu et al., 2209.03003; Lipman et al., 2210.02747).

    Begins at sigma = `start`, where the targets that divide by sigma are still finite.
    """
    if not 0 < start < 1:
        raise ValueError(f"start must lie in (0, 1), got {start}: 1e-4 is usual (schedule.curve.start)")
    return (1 - start) * (1 - u), start + (1 - start) * u


def shifted(curve: Curve, factor: float) -> Curve:
    """Multiply alpha / sigma by `factor` everywhere, the SNR by factor^2 (Hoogeboom et al., 2301.11093).

    What the curve keeps at 1 stays at 1: alpha^2 + sigma^2, alpha + sigma, or alpha. For `rectified_flow` it is SD3's
    shift of time, t sqrt(m / n) / (1 + (sqrt(m / n) - 1) t) with sqrt(m / n) = 1 / factor (Esser et al., 2403.03206,
    eq. 23). Raises ValueError for a curve that keeps none of these, and for a learned one.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"snr_shift must be positive, got {factor}: 64 / image size is usual, 1 changes nothing")
    if isinstance(curve, nn.Module):
        raise ValueError(
            f"snr_shift={factor:g} moves a curve that stays as it is, and this one learns its shape between its ends: "
            "add 2 log(snr_shift) to schedule.curve.max_log_snr and schedule.curve.min_log_snr"
        )
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    norm = next((n for n in (torch.hypot, torch.add, _alpha) if torch.allclose(n(*curve(u)), torch.ones_like(u))), None)
    if norm is None:
        raise ValueError(
            f"snr_shift={factor:g} needs a curve on which alpha^2 + sigma^2, alpha + sigma or alpha is 1: "
            "set snr_shift=1 and shift schedule.curve itself"
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
    """lambda falls from `max_log_snr` to `min_log_snr` along a monotone network (VDM, 2107.00630, app. H).

    The network is a linear term plus a layer of `width` sigmoids, all with positive weights, scaled so that the ends
    stay where they are. It starts out nearly linear; see `DiffusionModule` for how it is trained.
    """

    def __init__(self, max_log_snr: float = 10.0, min_log_snr: float = -10.0, width: int = 256) -> None:
        super().__init__()
        _check_ends(max_log_snr, min_log_snr)
        self.max_log_snr, self.min_log_snr = max_log_snr, min_log_snr
        # softplus(-7) is about 0.001 a sigmoid; the line weighs 1.
        self.line = nn.Parameter(torch.tensor(math.log(math.e - 1)))
        self.heights = nn.Parameter(torch.full((width,), -7.0))
        self.centers = nn.Parameter(torch.linspace(0, 1, width))
        self.slopes = nn.Parameter(torch.full((width,), 10.0))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        # At least float32, in whatever precision the weights are: neighbouring levels differ by little.
        x = u.to(self.line.device, torch.promote_types(self.line.dtype, torch.float32))
        start, stop = self._rise(x.new_zeros(())), self._rise(x.new_ones(()))
        fraction = (self._rise(x) - start) / (stop - start)
        log_snr = self.max_log_snr + (self.min_log_snr - self.max_log_snr) * fraction
        return variance_preserving(log_snr.to(u))

    def _rise(self, x: Tensor) -> Tensor:
        """A rising function of x (...)."""
        steps = torch.sigmoid(F.softplus(self.slopes) * (x[..., None] - self.centers))
        return F.softplus(self.line) * x + (F.softplus(self.heights) * steps).sum(-1)


def variance_preserving(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) with alpha^2 + sigma^2 = 1 at these log-SNRs."""
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def _check_ends(max_log_snr: float, min_log_snr: float) -> None:
    if not max_log_snr > min_log_snr:
        raise ValueError(
            f"needs max_log_snr > min_log_snr, got {max_log_snr} and {min_log_snr}: 15 and -15 are usual "
            "(schedule.curve)"
        )
