"""Timestep samplers: the distribution of noise levels in training.

`timestep_sampler(u, shared_u, position)` returns v (B,) in [0, 1), small for clean data, and importance weights (B,).
Its randomness is uniform in [0, 1): `u` (B,) per sample and `shared_u` () per step. `position` (B,) is the
index of each sample in the global batch divided by its size.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

Warp = Callable[[Tensor], Tensor]
"""v (B,) uniform in [0, 1) -> v (B,) of another distribution, which acts as a weighting of the loss."""


class TimestepSampler(Protocol):
    """Draw noise levels; see the docstring of the module."""

    def __call__(self, u: Tensor, shared_u: Tensor, position: Tensor) -> tuple[Tensor, Tensor]: ...


def uniform(u: Tensor, shared_u: Tensor, position: Tensor, *, warp: Warp | None = None) -> tuple[Tensor, Tensor]:
    """Draw v independently and uniformly, then warp. Source: Ho et al. 2020, alg. 1."""
    return (u if warp is None else warp(u)), torch.ones_like(u)


def stratified(u: Tensor, shared_u: Tensor, position: Tensor, *, warp: Warp | None = None) -> tuple[Tensor, Tensor]:
    """Draw v evenly spaced over the global batch with one shared offset, then warp, to lower the variance of the mean.

    Source: Kingma et al. 2021 (arXiv 2107.00630), app. I.1.
    """
    return uniform((shared_u + position) % 1, shared_u, position, warp=warp)


class ImportanceSampler(nn.Module):
    """Draw v in proportion to the root of the second moment of the loss in each of `num_bins` bins.

    The moments are those of the last `history_per_bin` losses of a bin. v is uniform until every bin has that many, and
    with probability `uniform_prob` afterwards. The weight keeps the mean loss unbiased. Checkpoints hold the losses.

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), sec. 3.3.
    """

    seen: Tensor
    losses: Tensor

    def __init__(self, num_bins: int = 100, history_per_bin: int = 10, uniform_prob: float = 0.01) -> None:
        super().__init__()
        for name, value in (("num_bins", num_bins), ("history_per_bin", history_per_bin)):
            if value < 1:
                raise ValueError(f"timestep_sampler.{name}={value} must be at least 1; 100 bins of 10 losses are usual")
        if not 0 < uniform_prob <= 1:
            raise ValueError(f"timestep_sampler.uniform_prob={uniform_prob} must be in (0, 1]; 0.01 is usual")
        self.num_bins = num_bins
        self.history_per_bin = history_per_bin
        self.uniform_prob = uniform_prob
        self.register_buffer("seen", torch.zeros(num_bins, dtype=torch.long))
        self.register_buffer("losses", torch.zeros(num_bins, history_per_bin))

    def probabilities(self) -> Tensor:
        """Return the probability of each bin, (num_bins,)."""
        losses = self.losses.float()
        # Divide by the maximum first: the square of a large loss overflows.
        moments = (losses / losses.abs().max().clamp(min=1e-30)).square().mean(1).sqrt()
        uniform = torch.full_like(moments, 1 / self.num_bins)
        by_loss = moments / moments.sum().clamp(min=torch.finfo(moments.dtype).tiny)
        # torch.where instead of a branch, which synchronizes with the GPU.
        ready = (self.seen >= self.history_per_bin).all() & (moments.sum() > 0)
        return torch.where(ready, self.uniform_prob * uniform + (1 - self.uniform_prob) * by_loss, uniform)

    def forward(self, u: Tensor, shared_u: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        p = self.probabilities()
        edges = p.cumsum(0)
        edges = edges / edges[-1]
        chosen = torch.searchsorted(edges, u, right=True).clamp(max=self.num_bins - 1)
        start = torch.where(chosen > 0, edges[chosen - 1], 0.0)
        within = ((u - start) / (edges[chosen] - start)).clamp(0, 1 - 2**-24)
        v = ((chosen + within) / self.num_bins).clamp(max=1 - 2**-24)
        return v, 1 / (p[chosen] * self.num_bins)

    @torch.no_grad()
    def update(self, v: Tensor, losses: Tensor) -> None:
        """Store the finite losses (N,) at v (N,) of the global batch, in its order."""
        losses = losses.to(self.losses)  # before isfinite: the conversion may overflow
        # Indexing by a mask synchronizes with the GPU. Instead, skipped losses go to an extra bin and an extra slot.
        bins = torch.where(losses.isfinite(), (v * self.num_bins).long().clamp(max=self.num_bins - 1), self.num_bins)
        chosen, order = bins.sort(stable=True)
        # The index of each loss within its bin; keep the last `history_per_bin`.
        rank = torch.arange(len(chosen), device=chosen.device) - torch.searchsorted(chosen, chosen)
        added = chosen.new_zeros(self.num_bins + 1).scatter_add_(0, chosen, torch.ones_like(chosen))
        kept = (rank >= added[chosen] - self.history_per_bin) & (chosen < self.num_bins)
        seen = torch.cat([self.seen, self.seen[:1]])
        slot = chosen * self.history_per_bin + (seen[chosen] + rank) % self.history_per_bin
        slots = torch.cat([self.losses.flatten(), self.losses[0, :1]])
        slots[torch.where(kept, slot, self.losses.numel())] = losses[order]
        self.losses.copy_(slots[:-1].view_as(self.losses))
        self.seen += added[:-1]


def logit_normal(v: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Warp v such that its logit is normal. Source: Esser et al. 2024 (arXiv 2403.03206), sec. 3.1."""
    _check_std(std)
    logit: Tensor = mean + std * torch.special.ndtri(v)
    return torch.sigmoid(logit).clamp(max=1 - 2**-24)


def log_normal(
    v: Tensor, mean: float = -1.2, std: float = 1.2, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> Tensor:
    """Warp v such that log sigma is normal on the curve `exploding` with the same ends.

    Source: Karras et al. 2022 (arXiv 2206.00364), tab. 1.
    """
    _check_std(std)
    if not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"timestep_sampler.warp.sigma_min={sigma_min} must be positive and less than "
            f"timestep_sampler.warp.sigma_max={sigma_max}; EDM uses 0.002 and 80"
        )
    log_sigma: Tensor = mean + std * torch.special.ndtri(v)
    low, high = math.log(sigma_min), math.log(sigma_max)
    return ((log_sigma - low) / (high - low)).clamp(0, 1 - 2**-24)


def _check_std(std: float) -> None:
    if not std > 0:
        raise ValueError(f"timestep_sampler.warp.std={std} must be positive; 1 is usual")
