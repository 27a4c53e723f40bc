"""Training objectives: what is regressed, and how noise levels are weighted against each other."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from src.diffusion.likelihood import link_bits
from src.diffusion.noise import Level, Link, Schedule
from src.diffusion.process import TINY_SNR, GaussianDiffusion, Prediction

Denoise = Callable[[Tensor, Level], Tensor]
"""(x_t (B, *data), level) -> the network's raw output (B, outputs * C, *rest), any condition already bound."""

Weighting = Callable[[GaussianDiffusion, Level], Tensor]
"""(process, levels) -> the factor on the target's error, in the levels' shape.

One with an argument `schedule` besides is given the run's when it is built.
"""

Error = Literal["l2", "l1", "huber"]


def simple(
    process: GaussianDiffusion,
    denoise: Denoise,
    x0: Tensor,
    link: Link,
    eps: Tensor,
    *,
    weighting: Weighting,
    error: Error = "l2",
    huber_delta: float = 1.0,
) -> dict[str, Tensor]:
    """The simple loss (Ho et al. 2020, eq. 14): the mean error of the target, weighted by noise level.

    `error` is squared ("l2"), absolute ("l1"), or Huber's with `huber_delta`; weightings are derived for the
    squared error and multiply the others as they stand. Returns per-sample terms, each (B,): "loss" is to be
    minimised, "mse" is the plain squared error of the target. A learned variance is not trained.
    """
    out = denoise(process.add_noise(x0, link.t, eps), link.t)
    return _simple(process, out, x0, link, eps, weighting, error, huber_delta)


def vlb(process: GaussianDiffusion, denoise: Denoise, x0: Tensor, link: Link, eps: Tensor) -> dict[str, Tensor]:
    """The variational bound (Ho et al. 2020, eq. 5) in bits/dim, estimated from one of its links.

    Without the prior's term, which no network changes, and without clipping, beyond which outputs would learn nothing.
    Terms as in `simple`, and "vlb", here the same as "loss".
    """
    x_t = process.add_noise(x0, link.t, eps)
    out = denoise(x_t, link.t)
    pred = process.interpret(out, x_t, link.t, clipped=False)
    bits = link.links * link_bits(process, pred, x0, x_t, link)
    return {**_simple(process, out, x0, link, eps, uniform), "loss": bits, "vlb": bits}


def hybrid(
    process: GaussianDiffusion,
    denoise: Denoise,
    x0: Tensor,
    link: Link,
    eps: Tensor,
    *,
    weighting: Weighting,
    vlb_weight: float = 0.001,
    error: Error = "l2",
    huber_delta: float = 1.0,
) -> dict[str, Tensor]:
    """simple + `vlb_weight` times the bound, from which only the variance learns (Nichol & Dhariwal 2021, eq. 16).

    The mean, which does not learn from it, is clipped as in sampling, so that the variance is that of what is sampled.
    Terms as in `vlb`. Raises ValueError if the variance is not learned, since then the bound would teach nothing.
    """
    if process.outputs == 1:
        raise ValueError(
            f"objective=hybrid teaches the variance, and process.variance={process.variance} is fixed: "
            "set process.variance=learned_range"
        )
    x_t = process.add_noise(x0, link.t, eps)
    out = denoise(x_t, link.t)
    pred = process.interpret(out, x_t, link.t)
    frozen = Prediction(pred.x0.detach(), pred.eps.detach(), pred.mix)
    bits = link.links * link_bits(process, frozen, x0, x_t, link)
    terms = _simple(process, out, x0, link, eps, weighting, error, huber_delta)
    return {**terms, "loss": terms["loss"] + vlb_weight * bits, "vlb": bits}


def uniform(process: GaussianDiffusion, t: Level) -> Tensor:
    """1 for the target as it is: DDPM's L_simple when the target is eps."""
    return torch.ones_like(t.alpha)


def snr(process: GaussianDiffusion, t: Level) -> Tensor:
    """SNR on the squared error of x_0, which is 1 on that of eps (Ho et al. 2020, eq. 14), in the target's units."""
    return _on_x0(process, t, _snr(t))


def truncated_snr(process: GaussianDiffusion, t: Level) -> Tensor:
    """max(SNR, 1) on the squared error of x_0 (Salimans & Ho 2022, sec. 4), in the target's units."""
    return _on_x0(process, t, _snr(t).clamp(min=1))


def min_snr(process: GaussianDiffusion, t: Level, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on the squared error of x_0 (Hang et al., 2303.09556, Min-SNR-gamma), in the target's units.

    So one prediction has the same loss whether it is expressed as eps, x0 or v. Finite even at zero SNR.
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be positive, got {gamma}: 5 is usual (weighting.gamma)")
    return _on_x0(process, t, _snr(t).clamp(max=gamma))


def p2(process: GaussianDiffusion, t: Level, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """1 / (k + SNR)^gamma on the squared error of eps (Choi et al., 2204.00227, eq. 8), in the target's units."""
    if k <= 0 or gamma < 0:
        raise ValueError(f"needs k > 0 and gamma >= 0, got {k} and {gamma}: 1 and 1 are usual (weighting.k, .gamma)")
    return _on_x0(process, t, _snr(t) / (k + _snr(t)).pow(gamma))


def sigmoid(process: GaussianDiffusion, t: Level, schedule: Schedule, bias: float = -1.0) -> Tensor:
    """Weight the squared error of eps by half of -d lambda / dt times a sigmoid of bias - lambda, lambda = log SNR.

    In the target's units. With times drawn uniformly (timesteps.warp=null) the loss is the integral of
    sigmoid(bias - lambda) / 2 over lambda, whatever the schedule. The larger the image, the lower the bias. `schedule`
    is the run's, for the derivative.

    Source: Kingma & Gao 2023 (arXiv 2303.00848), sec. 2; Hoogeboom et al. 2024 (arXiv 2410.19324), where it is
    e^bias sigmoid(lambda - bias) on that of x_0.
    """
    return schedule.log_snr_rate(t.time) / 2 * sigmoid_plain(process, t, bias)


def sigmoid_plain(process: GaussianDiffusion, t: Level, bias: float = -1.0) -> Tensor:
    """Weight the squared error of eps by a sigmoid of bias - log SNR, without the factor -d log SNR / dt.

    In the target's units: 1 / (1 / SNR + 1 / e^bias) on the squared error of x_0, a soft minimum of the two. The
    schedule's own density of levels remains part of the weighting.
    """
    return _on_x0(process, t, 1 / (1 / _snr(t) + math.exp(-bias)))


def edm(process: GaussianDiffusion, t: Level) -> Tensor:
    """1 / c_out^2 on the squared error of x_0 (Karras et al. 2022, tab. 1), 1 for EDM's own target.

    Knows the data's deviation from the process.
    """
    d = process.sigma_data
    return _on_x0(process, t, 1 / d**2 + _snr(t))


def _on_x0(process: GaussianDiffusion, t: Level, weight: Tensor) -> Tensor:
    """A weight on the squared error of x_0 as one on that of the target."""
    return weight / process.target_gain(t)


def _snr(t: Level) -> Tensor:
    return t.snr.clamp(min=TINY_SNR)


def _simple(
    process: GaussianDiffusion,
    out: Tensor,
    x0: Tensor,
    link: Link,
    eps: Tensor,
    weighting: Weighting,
    error: Error = "l2",
    huber_delta: float = 1.0,
) -> dict[str, Tensor]:
    if huber_delta <= 0:
        raise ValueError(f"huber_delta must be positive, got {huber_delta}: 1 is usual (objective.huber_delta)")
    out = out.chunk(process.outputs, dim=1)[0]
    target = process.target(x0, link.t, eps)
    mse = _mean_over_data(F.mse_loss(out, target, reduction="none"))
    match error:
        case "l2":
            distance = mse
        case "l1":
            distance = _mean_over_data(F.l1_loss(out, target, reduction="none"))
        case "huber":
            distance = _mean_over_data(F.huber_loss(out, target, reduction="none", delta=huber_delta))
        case _:
            raise ValueError(f"unknown error {error!r}: objective.error is l2, l1 or huber")
    return {"loss": weighting(process, link.t).flatten() * distance, "mse": mse}


def _mean_over_data(x: Tensor) -> Tensor:
    """(B, *data) -> (B,)."""
    return x.flatten(1).mean(1)
