"""Which noise levels training sees: v in [0, 1), small for clean, and the weight that makes up for the choice.

`timesteps(own, shared, place)` gives (v, weight), each (B,), from uniform draws: `own` (B,) one a sample, `shared` ()
one a step, and `place` (B,), the samples' places in the global batch divided by its size.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

Warp = Callable[[Tensor], Tensor]
"""v (B,) uniform in [0, 1) -> v (B,) of another distribution, which then is part of the objective's weighting."""


class TimestepSampler(Protocol):
    """Draws levels; see the module's docstring."""

    def __call__(self, own: Tensor, shared: Tensor, place: Tensor) -> tuple[Tensor, Tensor]: ...


def uniform(own: Tensor, shared: Tensor, place: Tensor, *, warp: Warp | None = None) -> tuple[Tensor, Tensor]:
    """Independent and uniform (Ho et al. 2020, alg. 1), or warped."""
    return (own if warp is None else warp(own)), torch.ones_like(own)


def stratified(own: Tensor, shared: Tensor, place: Tensor, *, warp: Warp | None = None) -> tuple[Tensor, Tensor]:
    """Evenly spaced over the global batch, all shifted by one draw (Kingma et al. 2021, VDM, app. I.1).

    Each v by itself is uniform, and their mean over the batch has far less variance.
    """
    return uniform((shared + place) % 1, shared, place, warp=warp)


class ImportanceSampler(nn.Module):
    """v in proportion to the root of the loss's second moment in each of `num_bins` (Nichol & Dhariwal 2021, sec. 3.3).

    The moments are those of the last `history_per_bin` losses of a bin; until each bin has that many, and for a share
    `uniform_prob` of the draws ever after, v is uniform. The weight keeps the mean of the loss unbiased. What was seen is
    in the checkpoint.
    """

    seen: Tensor
    losses: Tensor

    def __init__(self, num_bins: int = 100, history_per_bin: int = 10, uniform_prob: float = 0.01) -> None:
        super().__init__()
        if num_bins < 1 or history_per_bin < 1 or not 0 < uniform_prob <= 1:
            raise ValueError(
                f"needs bins >= 1, history >= 1 and floor in (0, 1], got {num_bins}, {history_per_bin}, {uniform_prob}: 100, 10 and 0.01 "
                "are usual (timesteps)"
            )
        self.num_bins = num_bins
        self.history_per_bin = history_per_bin
        self.uniform_prob = uniform_prob
        self.register_buffer("seen", torch.zeros(num_bins, dtype=torch.long))
        self.register_buffer("losses", torch.zeros(num_bins, history_per_bin))

    def probabilities(self) -> Tensor:
        """That of each bin, (bins,)."""
        losses = self.losses.float()
        # Relative to the largest, since the square of a large loss would overflow.
        moments = (losses / losses.abs().max().clamp(min=1e-30)).square().mean(1).sqrt()
        uniform = torch.full_like(moments, 1 / self.num_bins)
        by_loss = moments / moments.sum().clamp(min=torch.finfo(moments.dtype).tiny)
        # No branch: that would wait for the device.
        ready = (self.seen >= self.history_per_bin).all() & (moments.sum() > 0)
        return torch.where(ready, self.uniform_prob * uniform + (1 - self.uniform_prob) * by_loss, uniform)

    def forward(self, own: Tensor, shared: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        p = self.probabilities()
        edges = p.cumsum(0)
        edges = edges / edges[-1]
        chosen = torch.searchsorted(edges, own, right=True).clamp(max=self.num_bins - 1)
        start = torch.where(chosen > 0, edges[chosen - 1], 0.0)
        within = ((own - start) / (edges[chosen] - start)).clamp(0, 1 - 2**-24)
        v = ((chosen + within) / self.num_bins).clamp(max=1 - 2**-24)
        return v, 1 / (p[chosen] * self.num_bins)

    @torch.no_grad()
    def update(self, v: Tensor, losses: Tensor) -> None:
        """Remember the losses (N,) at v (N,), of the whole global batch and in its order, all finite ones."""
        losses = losses.to(self.losses)  # in whose precision they must be finite
        # Nothing is chosen by a mask, for which the device would have to be waited for: what is left out goes to a bin,
        # and to a slot, after the last.
        num_bins = torch.where(
            losses.isfinite(), (v * self.num_bins).long().clamp(max=self.num_bins - 1), self.num_bins
        )
        chosen, order = num_bins.sort(stable=True)
        # The number of each among those of its bin; of more than fit, the last ones stay.
        number = torch.arange(len(chosen), device=chosen.device) - torch.searchsorted(chosen, chosen)
        added = chosen.new_zeros(self.num_bins + 1).scatter_add_(0, chosen, torch.ones_like(chosen))
        kept = (number >= added[chosen] - self.history_per_bin) & (chosen < self.num_bins)
        seen = torch.cat([self.seen, self.seen[:1]])
        slot = chosen * self.history_per_bin + (seen[chosen] + number) % self.history_per_bin
        slots = torch.cat([self.losses.flatten(), self.losses[0, :1]])
        slots[torch.where(kept, slot, self.losses.numel())] = losses[order]
        self.losses.copy_(slots[:-1].view_as(self.losses))
        self.seen += added[:-1]


def logit_normal(v: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """The logit of v is normal: most steps in the middle (Esser et al., 2403.03206, sec. 3.1)."""
    _check_std(std)
    logit: Tensor = mean + std * torch.special.ndtri(v)
    return torch.sigmoid(logit).clamp(max=1 - 2**-24)


def log_normal(
    v: Tensor, mean: float = -1.2, std: float = 1.2, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> Tensor:
    """log sigma is normal on the curve `exploding` with the same ends (Karras et al. 2022, EDM, tab. 1)."""
    _check_std(std)
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}: take the ends of the "
            "curve, EDM has 0.002 and 80 (timestep_sampler.warp)"
        )
    log_sigma: Tensor = mean + std * torch.special.ndtri(v)
    low, high = math.log(sigma_min), math.log(sigma_max)
    return ((log_sigma - low) / (high - low)).clamp(0, 1 - 2**-24)


def _check_std(std: float) -> None:
    if not std > 0:
        raise ValueError(f"deviation must be positive, got {std}: 1 is usual (timestep_sampler.warp.std)")
