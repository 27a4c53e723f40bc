"""Compare samplers with the exact solution for a known distribution."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from src.data.analytic import GaussianMixture
from src.diffusion.gaussian_diffusion import GaussianDiffusion, Prediction
from src.diffusion.noise import NoiseLevel, Schedule, make_time_grid
from src.evaluation.likelihood import Progress
from src.training.module import Sampler


class SamplerErrors(NamedTuple):
    """Errors of one sampler, an entry for each number of steps."""

    evaluations: list[int]
    """Of the network, per sample."""
    flow: list[float]
    """Root mean square distance to where the exact flow leads; empty if the sampler adds noise."""
    moments: list[float]
    """2-Wasserstein distance between Gaussians of the samples' and of the data's mean and covariance."""


def compare_samplers(
    data: GaussianMixture,
    schedule: Schedule,
    samplers: Mapping[str, Sampler],
    steps: Sequence[int],
    count: int,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, SamplerErrors], float]:
    """Every sampler with the ideal denoiser in place of the network, on `count` samples from the same noise.

    All in float64. Also returns the moments' distance of the exact flow's own samples, which is chance's share.
    """
    unit = torch.randn(count, data.means.shape[1], generator=_generator(seed), dtype=torch.float64)
    flows: dict[float, Tensor] = {}
    results = {name: SamplerErrors([], [], []) for name in samplers}
    jobs = [(name, n) for name in samplers for n in steps]
    for job in progress(range(len(jobs))):
        name, n = jobs[job]
        grid = make_time_grid(schedule, n, samplers[name].spacing)
        x = grid[0].norm * unit
        if (start := grid[0].time.item()) not in flows:
            flows[start] = data.flow(x, grid[0].alpha.item(), grid[0].sigma.item())
        ideal = IdealPredictor(data)
        fresh = FreshNoise(_generator(seed + 1))
        *_, out = samplers[name].fn(GaussianDiffusion("x0"), ideal, x, grid, noise=fresh)
        results[name].evaluations.append(ideal.calls)
        if fresh.calls == 0:
            results[name].flow.append((out - flows[start]).square().sum(1).mean().sqrt().item())
        results[name].moments.append(moments_distance(out, data))
    return results, moments_distance(next(iter(flows.values())), data)


class IdealPredictor:
    """The exact E[x_0 | x_t] of a mixture where a network's prediction would be; counts how often it is asked."""

    def __init__(self, data: GaussianMixture) -> None:
        self.data = data
        self.calls = 0

    def __call__(self, x: Tensor, t: NoiseLevel) -> Prediction:
        self.calls += 1
        x0 = self.data.denoise(x, t.alpha.item(), t.sigma.item())
        return Prediction(x0, (x - t.alpha * x0) / t.sigma)


class FreshNoise:
    """Noise for samplers, from one generator; counts how often it is asked."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


def moments_distance(x: Tensor, data: GaussianMixture) -> float:
    """How far mean and covariance of x (N, D) are from the data's: the 2-Wasserstein distance between Gaussians."""
    mean, covariance = data.moments()
    root = _square_root(covariance)
    middle = _square_root(root @ torch.cov(x.T) @ root)
    squared = (x.mean(0) - mean).square().sum() + (torch.cov(x.T) + covariance - 2 * middle).trace()
    return squared.clamp(min=0).sqrt().item()


def _square_root(matrix: Tensor) -> Tensor:
    """Of a symmetric positive matrix (D, D)."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
