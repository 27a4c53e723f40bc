"""Training losses, and their weightings by noise level."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from src.diffusion.gaussian_diffusion import TINY_SNR, GaussianDiffusion, Prediction
from src.diffusion.likelihood import transition_bits
from src.diffusion.noise import NoiseLevel, Schedule, Transition

Denoise = Callable[[Tensor, NoiseLevel], Tensor]
"""(x_t (B, *data), level) -> raw output of the network (B, outputs * C, *rest), with its condition bound."""

Weighting = Callable[[GaussianDiffusion, NoiseLevel], Tensor]
"""(diffusion, level) -> the factor on the squared error of the target, in the shape of the level.

A weighting with an argument `schedule` gets the schedule of the run.
"""

ErrorType = Literal["l2", "l1", "huber"]


def simple(
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    x0: Tensor,
    transition: Transition,
    eps: Tensor,
    *,
    weighting: Weighting,
    type: ErrorType = "l2",
    huber_delta: float = 1.0,
) -> dict[str, Tensor]:
    """Return the simple loss: the mean error of the target, weighted by noise level. A learned variance is not trained.

    Weightings are derived for the squared error and multiply the others unchanged. The terms, each (B,), are "loss",
    to be minimized, and "mse", the squared error of the target.

    Source: Ho et al. 2020, eq. 14.
    """
    out = denoise(diffusion.add_noise(x0, transition.t, eps), transition.t)
    return _simple(diffusion, out, x0, transition, eps, weighting, type, huber_delta)


def vlb(
    diffusion: GaussianDiffusion, denoise: Denoise, x0: Tensor, transition: Transition, eps: Tensor
) -> dict[str, Tensor]:
    """Return the variational bound in bits/dim, estimated from one transition per sample.

    It omits the prior term, which does not depend on the network. Terms as in `simple`, and "vlb", equal to "loss".

    Source: Ho et al. 2020, eq. 5.
    """
    x_t = diffusion.add_noise(x0, transition.t, eps)
    out = denoise(x_t, transition.t)
    pred = diffusion.interpret(out, x_t, transition.t, clipped=False)
    bits = transition.num_transitions * transition_bits(diffusion, pred, x0, x_t, transition)
    return {**_simple(diffusion, out, x0, transition, eps, uniform_weighting), "loss": bits, "vlb": bits}


def hybrid(
    diffusion: GaussianDiffusion,
    denoise: Denoise,
    x0: Tensor,
    transition: Transition,
    eps: Tensor,
    *,
    weighting: Weighting,
    vlb_weight: float = 0.001,
    type: ErrorType = "l2",
    huber_delta: float = 1.0,
) -> dict[str, Tensor]:
    """Return the simple loss plus `vlb_weight` times the bound, whose gradient reaches the variance only.

    The mean in the bound is detached and clipped as in sampling. Terms as in `vlb`.

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 16.
    """
    if diffusion.outputs == 1:
        raise ValueError(f"diffusion.variance={diffusion.variance} must be learned_range or learned with loss=hybrid")
    x_t = diffusion.add_noise(x0, transition.t, eps)
    out = denoise(x_t, transition.t)
    pred = diffusion.interpret(out, x_t, transition.t)
    frozen = Prediction(pred.x0.detach(), pred.eps.detach(), pred.mix)
    bits = transition.num_transitions * transition_bits(diffusion, frozen, x0, x_t, transition)
    terms = _simple(diffusion, out, x0, transition, eps, weighting, type, huber_delta)
    return {**terms, "loss": terms["loss"] + vlb_weight * bits, "vlb": bits}


def uniform_weighting(diffusion: GaussianDiffusion, t: NoiseLevel) -> Tensor:
    """Weight the squared error of the target by 1: L_simple of DDPM if the target is eps."""
    return torch.ones_like(t.alpha)


def snr(diffusion: GaussianDiffusion, t: NoiseLevel) -> Tensor:
    """Weight the squared error of x_0 by SNR, which is that of eps by 1. Source: Ho et al. 2020, eq. 14."""
    return _on_x0(diffusion, t, _snr(t))


def truncated_snr(diffusion: GaussianDiffusion, t: NoiseLevel) -> Tensor:
    """Weight the squared error of x_0 by max(SNR, 1). Source: Salimans & Ho 2022 (arXiv 2202.00512), sec. 4."""
    return _on_x0(diffusion, t, _snr(t).clamp(min=1))


def min_snr(diffusion: GaussianDiffusion, t: NoiseLevel, gamma: float = 5.0) -> Tensor:
    """Weight the squared error of x_0 by min(SNR, gamma), whatever the target; finite even at zero SNR.

    Source: Hang et al. 2023 (Min-SNR-gamma, arXiv 2303.09556).
    """
    if gamma <= 0:
        raise ValueError(f"weighting.gamma={gamma} must be positive; 5 is usual")
    return _on_x0(diffusion, t, _snr(t).clamp(max=gamma))


def p2(diffusion: GaussianDiffusion, t: NoiseLevel, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """Weight the squared error of eps by 1 / (k + SNR)^gamma. Source: Choi et al. 2022 (arXiv 2204.00227), eq. 8."""
    if k <= 0:
        raise ValueError(f"weighting.k={k} must be positive; 1 is usual")
    if gamma < 0:
        raise ValueError(f"weighting.gamma={gamma} must be at least 0; 1 is usual")
    return _on_x0(diffusion, t, _snr(t) / (k + _snr(t)).pow(gamma))


def sigmoid(diffusion: GaussianDiffusion, t: NoiseLevel, schedule: Schedule, bias: float = -1.0) -> Tensor:
    """Weight the squared error of eps by half of -d lambda / dt times a sigmoid of bias - lambda, lambda = log SNR.

    With uniform timesteps (timestep_sampler.warp=null) the loss is the integral of sigmoid(bias - lambda) / 2 over
    lambda for every schedule. Larger images need a lower bias.

    Source: Kingma & Gao 2023 (arXiv 2303.00848), sec. 2; Hoogeboom et al. 2024 (arXiv 2410.19324).
    """
    return schedule.log_snr_rate(t.time) / 2 * sigmoid_plain(diffusion, t, bias)


def sigmoid_plain(diffusion: GaussianDiffusion, t: NoiseLevel, bias: float = -1.0) -> Tensor:
    """Weight the squared error of eps by a sigmoid of bias - log SNR, without the factor -d log SNR / dt.

    On the squared error of x_0 this is 1 / (1 / SNR + 1 / e^bias), a soft minimum of SNR and e^bias.
    """
    return _on_x0(diffusion, t, 1 / (1 / _snr(t) + math.exp(-bias)))


def edm(diffusion: GaussianDiffusion, t: NoiseLevel) -> Tensor:
    """Weight the squared error of x_0 by 1 / c_out^2 with the sigma_data of `diffusion`, which is 1 for prediction edm.

    Source: Karras et al. 2022 (arXiv 2206.00364), tab. 1.
    """
    return _on_x0(diffusion, t, 1 / diffusion.sigma_data**2 + _snr(t))


def _on_x0(diffusion: GaussianDiffusion, t: NoiseLevel, weight: Tensor) -> Tensor:
    """Convert a weight on the squared error of x_0 to one on the squared error of the target."""
    return weight / diffusion.target_gain(t)


def _snr(t: NoiseLevel) -> Tensor:
    return t.snr.clamp(min=TINY_SNR)


def _simple(
    diffusion: GaussianDiffusion,
    out: Tensor,
    x0: Tensor,
    transition: Transition,
    eps: Tensor,
    weighting: Weighting,
    type: ErrorType = "l2",
    huber_delta: float = 1.0,
) -> dict[str, Tensor]:
    if huber_delta <= 0:
        raise ValueError(f"loss.huber_delta={huber_delta} must be positive; 1 is usual")
    out = out.chunk(diffusion.outputs, dim=1)[0]
    target = diffusion.target(x0, transition.t, eps)
    error = mse = F.mse_loss(out, target, reduction="none").flatten(1).mean(1)
    match type:
        case "l1":
            error = F.l1_loss(out, target, reduction="none").flatten(1).mean(1)
        case "huber":
            error = F.huber_loss(out, target, reduction="none", delta=huber_delta).flatten(1).mean(1)
        case _ if type != "l2":
            raise ValueError(f"loss.type={type} must be l2, l1 or huber")
    return {"loss": weighting(diffusion, transition.t).flatten() * error, "mse": mse}
