"""Training objectives: what is regressed, and how noise levels are weighted against each other."""

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
"""(x_t (B, *data), level) -> the network's raw output (B, outputs * C, *rest), any condition already bound."""

Weighting = Callable[[GaussianDiffusion, NoiseLevel], Tensor]
"""(process, levels) -> the factor on the target's error, in the levels' shape.

One with an argument `schedule` besides is given the run's when it is built.
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
    """The simple loss (Ho et al. 2020, eq. 14): the mean error of the target, weighted by noise level.

    `type` is squared ("l2"), absolute ("l1"), or Huber's with `huber_delta`; weightings are derived for the
    squared error and multiply the others as they stand. Returns per-sample terms, each (B,): "loss" is to be
    minimised, "mse" is the plain squared error of the target. A learned variance is not trained.
    """
    out = denoise(diffusion.add_noise(x0, transition.t, eps), transition.t)
    return _simple(diffusion, out, x0, transition, eps, weighting, type, huber_delta)


def vlb(
    diffusion: GaussianDiffusion, denoise: Denoise, x0: Tensor, transition: Transition, eps: Tensor
) -> dict[str, Tensor]:
    """The variational bound (Ho et al. 2020, eq. 5) in bits/dim, estimated from one of its links.

    Without the prior's term, which no network changes, and without clipping, beyond which outputs would learn nothing.
    Terms as in `simple`, and "vlb", here the same as "loss".
    """
    x_t = diffusion.add_noise(x0, transition.t, eps)
    out = denoise(x_t, transition.t)
    pred = diffusion.interpret(out, x_t, transition.t, clipped=False)
    bits = transition.num_transitions * transition_bits(diffusion, pred, x0, x_t, transition)
    return {**_simple(diffusion, out, x0, transition, eps, uniform), "loss": bits, "vlb": bits}


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
    """simple + `vlb_weight` times the bound, from which only the variance learns (Nichol & Dhariwal 2021, eq. 16).

    The mean, which does not learn from it, is clipped as in sampling, so that the variance is that of what is sampled.
    Terms as in `vlb`. Raises ValueError if the variance is not learned, since then the bound would teach nothing.
    """
    if diffusion.outputs == 1:
        raise ValueError(
            f"loss=hybrid teaches the variance, and diffusion.variance={diffusion.variance} is fixed: "
            "set diffusion.variance=learned_range"
        )
    x_t = diffusion.add_noise(x0, transition.t, eps)
    out = denoise(x_t, transition.t)
    pred = diffusion.interpret(out, x_t, transition.t)
    frozen = Prediction(pred.x0.detach(), pred.eps.detach(), pred.mix)
    bits = transition.num_transitions * transition_bits(diffusion, frozen, x0, x_t, transition)
    terms = _simple(diffusion, out, x0, transition, eps, weighting, type, huber_delta)
    return {**terms, "loss": terms["loss"] + vlb_weight * bits, "vlb": bits}


def uniform(diffusion: GaussianDiffusion, t: NoiseLevel) -> Tensor:
    """1 for the target as it is: DDPM's L_simple when the target is eps."""
    return torch.ones_like(t.alpha)


def snr(diffusion: GaussianDiffusion, t: NoiseLevel) -> Tensor:
    """SNR on the squared error of x_0, which is 1 on that of eps (Ho et al. 2020, eq. 14), in the target's units."""
    return _on_x0(diffusion, t, _snr(t))


def truncated_snr(diffusion: GaussianDiffusion, t: NoiseLevel) -> Tensor:
    """max(SNR, 1) on the squared error of x_0 (Salimans & Ho 2022, sec. 4), in the target's units."""
    return _on_x0(diffusion, t, _snr(t).clamp(min=1))


def min_snr(diffusion: GaussianDiffusion, t: NoiseLevel, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on the squared error of x_0 (Hang et al., 2303.09556, Min-SNR-gamma), in the target's units.

    So one prediction has the same loss whether it is expressed as eps, x0 or v. Finite even at zero SNR.
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be positive, got {gamma}: 5 is usual (weighting.gamma)")
    return _on_x0(diffusion, t, _snr(t).clamp(max=gamma))


def p2(diffusion: GaussianDiffusion, t: NoiseLevel, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """1 / (k + SNR)^gamma on the squared error of eps (Choi et al., 2204.00227, eq. 8), in the target's units."""
    if k <= 0 or gamma < 0:
        raise ValueError(f"needs k > 0 and gamma >= 0, got {k} and {gamma}: 1 and 1 are usual (weighting.k, .gamma)")
    return _on_x0(diffusion, t, _snr(t) / (k + _snr(t)).pow(gamma))


def sigmoid(diffusion: GaussianDiffusion, t: NoiseLevel, schedule: Schedule, bias: float = -1.0) -> Tensor:
    """Weight the squared error of eps by half of -d lambda / dt times a sigmoid of bias - lambda, lambda = log SNR.

    In the target's units. With times drawn uniformly (timestep_sampler.warp=null) the loss is the integral of
    sigmoid(bias - lambda) / 2 over lambda, whatever the schedule. The larger the image, the lower the bias. `schedule`
    is the run's, for the derivative.

    Source: Kingma & Gao 2023 (arXiv 2303.00848), sec. 2; Hoogeboom et al. 2024 (arXiv 2410.19324), where it is
    e^bias sigmoid(lambda - bias) on that of x_0.
    """
    return schedule.log_snr_rate(t.time) / 2 * sigmoid_plain(diffusion, t, bias)


def sigmoid_plain(diffusion: GaussianDiffusion, t: NoiseLevel, bias: float = -1.0) -> Tensor:
    """Weight the squared error of eps by a sigmoid of bias - log SNR, without the factor -d log SNR / dt.

    In the target's units: 1 / (1 / SNR + 1 / e^bias) on the squared error of x_0, a soft minimum of the two. The
    schedule's own density of levels remains part of the weighting.
    """
    return _on_x0(diffusion, t, 1 / (1 / _snr(t) + math.exp(-bias)))


def edm(diffusion: GaussianDiffusion, t: NoiseLevel) -> Tensor:
    """1 / c_out^2 on the squared error of x_0 (Karras et al. 2022, tab. 1), 1 for EDM's own target.

    Knows the data's deviation from the process.
    """
    d = diffusion.sigma_data
    return _on_x0(diffusion, t, 1 / d**2 + _snr(t))


def _on_x0(diffusion: GaussianDiffusion, t: NoiseLevel, weight: Tensor) -> Tensor:
    """A weight on the squared error of x_0 as one on that of the target."""
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
        raise ValueError(f"huber_delta must be positive, got {huber_delta}: 1 is usual (loss.huber_delta)")
    out = out.chunk(diffusion.outputs, dim=1)[0]
    target = diffusion.target(x0, transition.t, eps)
    mse = _mean_over_data(F.mse_loss(out, target, reduction="none"))
    match type:
        case "l2":
            distance = mse
        case "l1":
            distance = _mean_over_data(F.l1_loss(out, target, reduction="none"))
        case "huber":
            distance = _mean_over_data(F.huber_loss(out, target, reduction="none", delta=huber_delta))
        case _:
            raise ValueError(f"unknown error {type!r}: loss.type is l2, l1 or huber")
    return {"loss": weighting(diffusion, transition.t).flatten() * distance, "mse": mse}


def _mean_over_data(x: Tensor) -> Tensor:
    """(B, *data) -> (B,)."""
    return x.flatten(1).mean(1)
