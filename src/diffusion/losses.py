"""Training objectives: what is regressed, and how noise levels are weighted against each other."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from src.diffusion.noise import Level
from src.diffusion.process import GaussianDiffusion

Denoise = Callable[[Tensor, Level], Tensor]
"""(x_t (B, *data), level) -> the network's raw output (B, *data), any condition already bound."""

Weighting = Callable[[GaussianDiffusion, Level], Tensor]
"""(process, levels) -> the factor on the target's error, in the levels' shape."""

Error = Literal["l2", "l1", "huber"]


def simple(
    process: GaussianDiffusion,
    denoise: Denoise,
    x0: Tensor,
    t: Level,
    eps: Tensor,
    *,
    weighting: Weighting,
    error: Error = "l2",
    huber_delta: float = 1.0,
) -> dict[str, Tensor]:
    """The simple loss (Ho et al. 2020, eq. 14): the mean error of the target, weighted by noise level.

    `error` is squared ("l2"), absolute ("l1"), or Huber's with `huber_delta`; weightings are derived for the
    squared error and multiply the others as they stand. Returns per-sample terms, each (B,): "loss" is to be
    minimised, "mse" is the plain squared error of the target.
    """
    if huber_delta <= 0:
        raise ValueError(f"huber_delta must be positive, got {huber_delta}: 1 is usual (objective.huber_delta)")
    out = denoise(process.add_noise(x0, t, eps), t)
    target = process.target(x0, t, eps)
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
    return {"loss": weighting(process, t).flatten() * distance, "mse": mse}


def uniform(process: GaussianDiffusion, t: Level) -> Tensor:
    """1 for the target as it is: DDPM's L_simple when the target is eps."""
    return torch.ones_like(t.alpha)


def min_snr(process: GaussianDiffusion, t: Level, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) on the squared error of x_0 (Hang et al., 2303.09556, Min-SNR-gamma), in the target's units.

    So one prediction has the same loss whether it is expressed as eps, x0 or v. Finite even at zero SNR.
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be positive, got {gamma}: 5 is usual (weighting.gamma)")
    gain = process.target_gain(t)
    # min(SNR, gamma) / gain; SNR / gain is 1 for eps, also at zero SNR, where it reads 0 / 0.
    signal = torch.ones_like(gain) if process.prediction == "eps" else t.snr / gain
    return torch.minimum(signal, gamma / gain)


def uniform_timesteps(u: Tensor, num_steps: int) -> Tensor:
    """u (B,) uniform in [0, 1) -> indices t (B,) uniform over {0..T-1}."""
    return (u * num_steps).long()


def _mean_over_data(x: Tensor) -> Tensor:
    """(B, *data) -> (B,)."""
    return x.flatten(1).mean(1)
