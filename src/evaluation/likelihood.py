"""Likelihood of validation data: the variational bound and the probability flow."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.likelihood import flow_slope, prior_bits, transition_bits
from src.diffusion.noise import Schedule, Transition, per_sample
from src.diffusion.samplers import predictor
from src.evaluation.reverse_variance import (
    Advance,
    ErrorSums,
    fixed_log_variances,
    measure_errors,
    optimal_log_variances,
    row_log_snr,
    rows_per_sample,
    sample_halves,
    sum_errors,
    transition_probs,
    zero_errors,
)
from src.evaluation.settings import ReverseVariance
from src.rng import StepRng
from src.training.module import DiffusionModule

Load = Callable[[range], tuple[Tensor, Tensor | None]]
"""Positions in the validation set -> samples (N, *data) and their conditions (N, ...), on the module's device."""

SPECTRUM = torch.arange(-20, 21, dtype=torch.float64)  # edges of the log-SNR bins in which the error is shown


class Bound(NamedTuple):
    """The variational bound of N samples in bits/dim, and the sums of each term over the samples that drew it."""

    prior: Tensor  # (N,) KL divergence of x_T from the prior
    total: Tensor  # (N,) bound of each sample
    counts: Tensor  # (T,) number of times each transition was drawn, the decoder's first
    term_sums: Tensor  # (T,) sum of each transition's term
    mse_sums: Tensor  # (T,) sum of the squared error of eps at each transition's noisier level

    @property
    def terms(self) -> Tensor:
        """(T,) mean term of each transition; NaN where none was drawn."""
        return self.term_sums / self.counts

    @property
    def mse(self) -> Tensor:
        """(T,) mean squared error of eps at each transition; NaN where none was drawn."""
        return self.mse_sums / self.counts


def network_passes(schedule: Schedule, num_terms: int | None, variance: ReverseVariance) -> int:
    """Return the number of network calls per sample in `bounds`."""
    passes = schedule.num_steps if num_terms is None else num_terms + 1
    return passes + (1 + rows_per_sample(num_terms) if variance == "optimal" else 0)


def bounds(
    module: DiffusionModule,
    parts: Sequence[range],
    load: Load,
    seed: int,
    num_terms: int | None,
    variance: ReverseVariance,
    advance: Advance = lambda count: None,
    reduce_errors: Callable[[ErrorSums], ErrorSums] = lambda errors: errors,
) -> list[Bound]:
    """Return the bound of the validation samples at each of `parts`, with the chosen reverse variance.

    `optimal` first measures the error of x_0 in each half of the samples, and gives each half the variance from the
    error of the other. No sample affects its own variance, so the result remains a bound. `reduce_errors` sums the
    errors over all processes. `advance` receives the number of samples of each network call.
    """
    schedule, diffusion = module.schedule, module.diffusion
    log_variance = None
    if variance == "optimal":
        errors = zero_errors(diffusion, schedule)
        for part in parts:
            x, cond = load(part)
            errors = sum_errors([errors, measure_errors(module, x, seed, num_terms, part.start, cond, advance)])
        log_variance = optimal_log_variances(reduce_errors(errors), diffusion, schedule)
    elif variance != "trained":
        log_variance = fixed_log_variances(variance, diffusion, schedule)
    results = []
    for part in parts:
        x, cond = load(part)
        results.append(bound(module, x, seed, num_terms, part.start, cond, log_variance, advance))
    return results


@torch.no_grad()
def bound(
    module: DiffusionModule,
    x: Tensor,
    seed: int,
    num_terms: int | None,
    start: int = 0,
    cond: Tensor | None = None,
    log_variance: Tensor | None = None,
    advance: Advance = lambda count: None,
) -> Bound:
    """Return the bound of x (N, *data) over all T transitions, or an estimate from the decoder and `num_terms` others.

    With `cond` (N, ...) it is the bound of the conditional likelihood. `log_variance` (2, T) is the log-variance of
    the reverse step to each row, for each of `sample_halves`; None for that of the diffusion process.

    The estimate draws transitions from `transition_probs`, one from each of `num_terms` equal strata, and divides by
    their probabilities. It always includes the decoder's term, which is far larger than the others.

    The noise of transition t is keyed by (seed, t, position of the sample), independent of the batch; `start` is the
    position of the first sample.

    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 5; Kingma et al. 2021 (arXiv 2107.00630), appendix A.
    """
    schedule, diffusion = module.schedule, module.diffusion
    steps = schedule.num_steps
    prior = prior_bits(schedule.row(steps - 1), x).cpu().double()
    sums, errors, counts = torch.zeros(3, steps, dtype=torch.float64)
    total = prior.clone()
    halves = None if log_variance is None else sample_halves(x)
    probs = None if num_terms is None else transition_probs(schedule)
    for k in range(steps if num_terms is None else num_terms + 1):
        rng = StepRng(seed, k, start, len(x), x.device)
        weight = torch.ones(len(x), dtype=torch.float64)
        rows = torch.full((len(x),), k)
        if probs is None:
            transition = Transition(schedule.row(k), schedule.row(k - 1), steps)
        else:
            assert num_terms is not None
            if k > 0:
                place = (k - 1 + rng.uniform("link").cpu().double()) / num_terms
                rows = 1 + torch.searchsorted(probs.cumsum(0), place, right=True).clamp(max=steps - 2)
                weight = 1 / (num_terms * probs[rows - 1])
            transition = schedule.transition(((rows + 0.5) / steps).to(x), x)
        x_t = diffusion.add_noise(x, transition.t, rng.normal("eps", x.shape[1:]))
        pred = diffusion.interpret(module.denoise(x_t, transition.t, cond), x_t, transition.t)
        chosen = None if log_variance is None else per_sample(log_variance[halves, rows].to(x), x)
        bits = transition_bits(diffusion, pred, x, x_t, transition, chosen).cpu().double()
        # The error of eps is the SNR times the error of x_0.
        mse = (transition.t.snr * (pred.x0 - x).square()).flatten(1).mean(1).cpu().double()
        total += bits * weight
        for table, values in ((sums, bits), (errors, mse), (counts, torch.ones_like(bits))):
            table.index_add_(0, rows, values)
        advance(len(x))
    return Bound(prior, total, counts, sums, errors)


def error_by_log_snr(parts: Sequence[Bound], schedule: Schedule, edges: Tensor) -> Tensor:
    """Return the mean squared error of eps in each log-SNR bin between the `edges` (B,): (B - 1,), NaN if empty."""
    bins = torch.bucketize(row_log_snr(schedule), edges.double()) - 1
    inside = (bins >= 0) & (bins < len(edges) - 1)
    sums, counts = torch.zeros(2, len(edges) - 1, dtype=torch.float64)
    for part in parts:
        sums.index_add_(0, bins[inside], part.mse_sums[inside])
        counts.index_add_(0, bins[inside], part.counts[inside])
    means: Tensor = sums / counts
    return means


def flow_bits(
    module: DiffusionModule, x: Tensor, seed: int, tolerance: float, start: int = 0, cond: Tensor | None = None
) -> Tensor:
    """Return minus the log-likelihood of x (N, *data) by the probability flow: (N,) bits/dim.

    An adaptive Runge-Kutta solver of order 5 integrates from the cleanest level to the noisiest. Data with discrete
    values are dequantized with uniform noise, which bounds their likelihood from below. Noise is keyed by the seed
    and the position of the sample; `start` is the position of the first.

    Source: Song et al. 2021 (arXiv 2011.13456), section 4.3.
    """
    from scipy.integrate import solve_ivp

    schedule, num_values = module.schedule, module.diffusion.num_values
    own = module.diffusion
    # No clipping: its kinks would force the solver into tiny steps.
    diffusion = GaussianDiffusion(own.prediction, own.variance, sigma_data=own.sigma_data)
    predict = predictor(diffusion, partial(module.denoise, cond=cond))
    rng = StepRng(seed, 0, start, len(x), x.device)
    bin_width = 1.0 if num_values is None else 2 / (num_values - 1)
    if num_values is not None:
        uniform = torch.special.ndtr(rng.normal("dequantise", x.shape[1:]))
        x = x + bin_width * (uniform - 0.5)
    probe = torch.sign(rng.normal("probe", x.shape[1:]))
    ends = schedule.at(torch.tensor([max(schedule.first, 1e-3), 1.0], dtype=torch.float64))
    low, high = (math.atan2(t.sigma.item(), t.alpha.item()) for t in ends)
    high = min(high, math.pi / 2 - 1e-4)

    def slope(angle: float, state: Any) -> Any:
        at = torch.tensor(angle, dtype=torch.float64)
        (level,) = schedule.at(schedule.position(at[None]))
        z = torch.as_tensor(state[: x.numel()]).view(x.shape).to(x)
        dz, divergence = flow_slope(predict, z, at, level, probe)
        return torch.cat([dz.flatten(), divergence]).double().cpu().numpy()

    # Ignore the small noise of the first level: z is cos(angle) x there.
    state = torch.cat([(math.cos(low) * x).flatten(), x.new_zeros(len(x))]).double().cpu().numpy()
    solved = solve_ivp(slope, (low, high), state, method="RK45", rtol=tolerance, atol=tolerance)
    end = torch.from_numpy(solved.y[:, -1])
    z, gained = end[: x.numel()].view(x.shape), end[x.numel() :]
    log_prior = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    dims = x[0].numel()
    log_prob = log_prior + gained + dims * (math.log(math.cos(low)) + math.log(bin_width))
    bits: Tensor = -log_prob / (dims * math.log(2))
    return bits
