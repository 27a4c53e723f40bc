"""What a trained model is worth: the bound and the flow's likelihood of data, and samplers against exact answers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.data.analytic import GaussianMixture
from src.diffusion.likelihood import flow_slope, link_bits, prior_bits
from src.diffusion.noise import Level, Link, Schedule, make_grid
from src.diffusion.process import GaussianDiffusion, Prediction
from src.diffusion.samplers import predictor
from src.draws import Draws
from src.module import DiffusionModule, Sampler

Progress = Callable[[Iterable[int]], Iterable[int]]
"""Passes its argument on, and shows how far it has come."""
SPECTRUM = torch.arange(-20, 21, dtype=torch.float64)
"""Edges of the bins of log-SNR over which an error is shown."""


class Bound(NamedTuple):
    """The variational bound of N samples in bits/dim, and sums of its terms over the samples that drew each link."""

    prior: Tensor
    """(N,) what the noisiest level still tells of the data."""
    total: Tensor
    """(N,) the bound of each sample."""
    counts: Tensor
    """(T,) how often each link was drawn, the decoder's first."""
    link_sums: Tensor
    """(T,) of each link's term."""
    mse_sums: Tensor
    """(T,) of the squared error of eps at each link's noisier level."""

    @property
    def links(self) -> Tensor:
        """(T,) the mean of each link's term; NaN where none was drawn."""
        return self.link_sums / self.counts

    @property
    def mse(self) -> Tensor:
        """(T,) the mean squared error of eps, likewise."""
        return self.mse_sums / self.counts


@torch.no_grad()
def bound(
    module: DiffusionModule,
    x: Tensor,
    seed: int,
    links: int | None,
    progress: Progress,
    start: int = 0,
    cond: Tensor | None = None,
) -> Bound:
    """The bound of x (N, *data), over all T links, or estimated for each sample from the decoder's and `links` others.

    With `cond` (N, ...) it is that of the data given these conditions.

    These are drawn one from each of so many equal parts of the chain. The decoder's term, far larger than the others
    and of another kind, would be most of an estimate's error.

    The noise of link t belongs to (seed, t, the sample's place), the first being `start`, whatever the batch. In
    continuous time the estimate's chains end anywhere on the last stride, and the prior's term is taken there.
    """
    schedule, process = module.schedule, module.process
    steps = schedule.num_steps
    if links is None:
        end = schedule.row(steps - 1)
    else:
        last = Draws(seed, links + 1, start, len(x), x.device).uniform("link")
        end = schedule.link(((steps - 1 + last) / steps).clamp(max=1 - 2**-24), x).t
    prior = prior_bits(end, x).cpu().double()
    sums, errors, counts = torch.zeros(3, steps, dtype=torch.float64)
    total = prior.clone()
    for k in progress(range(steps if links is None else links + 1)):
        weight = 1.0 if links is None or k == 0 else (steps - 1) / links
        draws = Draws(seed, k, start, len(x), x.device)
        if links is None:
            rows = torch.full((len(x),), k)
            link = Link(schedule.row(k), schedule.row(k - 1), steps)
        else:
            place = draws.uniform("link")
            if k > 0:
                place = 1 + (k - 1 + place) * weight
            v = (place / steps).clamp(max=1 - 2**-24)  # below 1 also after rounding
            rows = (v * steps).long().cpu()
            link = schedule.link(v, x)
        x_t = process.add_noise(x, link.t, draws.normal("eps", x.shape[1:]))
        pred = process.interpret(module.denoise(x_t, link.t, cond), x_t, link.t)
        bits = link_bits(process, pred, x, x_t, link).cpu().double()
        # The error of eps is SNR times that of x_0.
        mse = (link.t.snr * (pred.x0 - x).square()).flatten(1).mean(1).cpu().double()
        total += bits * weight
        for table, values in ((sums, bits), (errors, mse), (counts, torch.ones_like(bits))):
            table.index_add_(0, rows, values)
    return Bound(prior, total, counts, sums, errors)


def error_by_log_snr(parts: Sequence[Bound], schedule: Schedule, edges: Tensor) -> Tensor:
    """(B - 1,) the mean squared error of eps in each bin of log-SNR between the `edges` (B,); NaN where none fell."""
    rows = torch.stack([schedule.row(t).snr.double().cpu() for t in range(schedule.num_steps)]).log()
    places = torch.bucketize(rows, edges.to(rows)) - 1
    inside = (places >= 0) & (places < len(edges) - 1)
    sums, counts = torch.zeros(2, len(edges) - 1, dtype=torch.float64)
    for part in parts:
        sums.index_add_(0, places[inside], part.mse_sums[inside])
        counts.index_add_(0, places[inside], part.counts[inside])
    means: Tensor = sums / counts
    return means


def flow_bits(
    module: DiffusionModule, x: Tensor, seed: int, tolerance: float, start: int = 0, cond: Tensor | None = None
) -> Tensor:
    """Minus the log-likelihood of x (N, *data) by the probability flow, (N,) in bits/dim (Song et al. 2021, sec. 4.3).

    Data with levels are dequantised by uniform noise, which bounds their likelihood from below. From the cleanest
    level to the noisiest by an adaptive Runge-Kutta solver of order 5. Noise belongs to the seed and the sample's
    place, the first being `start`.
    """
    from scipy.integrate import solve_ivp

    schedule, levels = module.schedule, module.process.levels
    own = module.process
    # Without clipping, whose kinks the solver would have to step around.
    process = GaussianDiffusion(own.prediction, own.variance, sigma_data=own.sigma_data)
    predict = predictor(process, partial(module.denoise, cond=cond))
    draws = Draws(seed, 0, start, len(x), x.device)
    bin_width = 1.0 if levels is None else 2 / (levels - 1)
    if levels is not None:
        uniform = torch.special.ndtr(draws.normal("dequantise", x.shape[1:]))
        x = x + bin_width * (uniform - 0.5)
    probe = torch.sign(draws.normal("probe", x.shape[1:]))
    ends = schedule.at(torch.tensor([max(schedule.first, 1e-3), 1.0], dtype=torch.float64))
    low, high = (math.atan2(t.sigma.item(), t.alpha.item()) for t in ends)
    high = min(high, math.pi / 2 - 1e-4)

    def slope(angle: float, state: Any) -> Any:
        at = torch.tensor(angle, dtype=torch.float64)
        (level,) = schedule.at(schedule.position(at[None]))
        z = torch.as_tensor(state[: x.numel()]).view(x.shape).to(x)
        dz, divergence = flow_slope(predict, z, at, level, probe)
        return torch.cat([dz.flatten(), divergence]).double().cpu().numpy()

    # What little noise the first level has is not added: its z is cos(angle) x.
    state = torch.cat([(math.cos(low) * x).flatten(), x.new_zeros(len(x))]).double().cpu().numpy()
    solved = solve_ivp(slope, (low, high), state, method="RK45", rtol=tolerance, atol=tolerance)
    end = torch.from_numpy(solved.y[:, -1])
    z, gained = end[: x.numel()].view(x.shape), end[x.numel() :]
    log_prior = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    dims = x[0].numel()
    log_prob = log_prior + gained + dims * (math.log(math.cos(low)) + math.log(bin_width))
    bits: Tensor = -log_prob / (dims * math.log(2))
    return bits


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
        grid = make_grid(schedule, n, samplers[name].spacing)
        x = grid[0].norm * unit
        if (start := grid[0].time.item()) not in flows:
            flows[start] = data.flow(x, grid[0].alpha.item(), grid[0].sigma.item())
        ideal = IdealPredictor(data)
        fresh = FreshNoise(_generator(seed + 1))
        *_, out = samplers[name].walk(GaussianDiffusion("x0"), ideal, x, grid, noise=fresh)
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

    def __call__(self, x: Tensor, t: Level) -> Prediction:
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
