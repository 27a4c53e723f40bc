"""Compare samplers with the exact solution for a known distribution."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from src.data.analytic import GaussianMixture
from src.diffusion.gaussian_diffusion import GaussianDiffusion, Prediction
from src.diffusion.noise import NoiseLevel, Schedule, make_time_grid
from src.metrics.frechet import Moments, frechet_distance
from src.training.module import Sampler


class SamplerErrors(NamedTuple):
    """Errors of one sampler, one entry per number of steps."""

    evaluations: list[int]  # network calls per sample
    flow: list[float]  # root mean square distance from the exact endpoint of the flow; empty for a stochastic sampler
    moments: list[float]  # `moments_distance` of the samples


def compare_samplers(
    data: GaussianMixture,
    schedule: Schedule,
    samplers: Mapping[str, Sampler],
    steps: Sequence[int],
    count: int,
    seed: int,
) -> tuple[dict[str, SamplerErrors], float]:
    """Return the errors of every sampler with the ideal denoiser, on `count` samples from the same noise, in float64.

    The second value is the `moments_distance` of the exact flow's samples: the sampling error of a perfect sampler.
    """
    generator = torch.Generator().manual_seed(seed)
    unit = torch.randn(count, data.means.shape[1], generator=generator, dtype=torch.float64)
    flows: dict[float, Tensor] = {}
    results = {name: SamplerErrors([], [], []) for name in samplers}
    for name, n in tqdm([(name, n) for name in samplers for n in steps], desc="Samplers"):
        grid = make_time_grid(schedule, n, samplers[name].spacing)
        x = grid[0].norm * unit
        if (start := grid[0].time.item()) not in flows:
            flows[start] = data.flow(x, grid[0].alpha.item(), grid[0].sigma.item())
        ideal = IdealPredictor(data)
        noise = CountingNoise(torch.Generator().manual_seed(seed + 1))
        *_, out = samplers[name].fn(GaussianDiffusion("x0"), ideal, x, grid, noise=noise)
        results[name].evaluations.append(ideal.calls)
        if noise.calls == 0:
            results[name].flow.append((out - flows[start]).square().sum(1).mean().sqrt().item())
        results[name].moments.append(moments_distance(out, data))
    return results, moments_distance(next(iter(flows.values())), data)


@dataclass
class IdealPredictor:
    """Predict the exact E[x_0 | x_t] of a mixture in place of a network, and count the calls."""

    data: GaussianMixture
    calls: int = 0

    def __call__(self, x: Tensor, t: NoiseLevel) -> Prediction:
        self.calls += 1
        x0 = self.data.denoise(x, t.alpha.item(), t.sigma.item())
        return Prediction(x0, (x - t.alpha * x0) / t.sigma)


@dataclass
class CountingNoise:
    """Draw noise for samplers from one generator, and count the calls."""

    generator: torch.Generator
    calls: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


def moments_distance(x: Tensor, data: GaussianMixture) -> float:
    """Return the 2-Wasserstein distance between the Gaussians with the moments of x (N, D) and of the data.

    Source: Dowson and Landau 1982.
    """
    mean, covariance = data.moments()
    exact = Moments(torch.tensor(2.0).to(mean), mean, covariance)  # for n = 2 the scatter equals the covariance
    return math.sqrt(frechet_distance(Moments.of(x), exact))
