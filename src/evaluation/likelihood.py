"""Likelihood of held-out data: the variational bound and the probability flow."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from src.diffusion.gaussian_diffusion import TINY_SNR, TINY_VARIANCE, Gaussian, GaussianDiffusion, Prediction
from src.diffusion.likelihood import (
    discretized_gaussian_log_prob,
    flow_slope,
    in_bits,
    optimal_log_variance,
    prior_bits,
    transition_bits,
)
from src.diffusion.noise import NoiseLevel, Schedule, Transition, per_sample
from src.diffusion.samplers import predictor
from src.rng import StepRng
from src.training.module import DiffusionModule

Progress = Callable[[Iterable[int]], Iterable[int]]
"""Passes its argument on, and shows how far it has come."""

ReverseVariance = Literal["optimal", "fixed_small", "fixed_large", "trained"]
"""Of the reverse steps in the bound; `trained` is the process's own."""

Load = Callable[[range], tuple[Tensor, Tensor | None]]
"""Places among held-out data -> the samples there (N, *data) and their conditions (N, ...), on the module's device."""


MEASURED_ROWS = 32
"""Rows besides the decoder's at which the error of x_0 is measured for `optimal`."""

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
    def terms(self) -> Tensor:
        """(T,) the mean of each link's term; NaN where none was drawn."""
        return self.link_sums / self.counts

    @property
    def mse(self) -> Tensor:
        """(T,) the mean squared error of eps, likewise."""
        return self.mse_sums / self.counts


class Errors(NamedTuple):
    """What is measured for the optimal variance, in each half of the samples: those at even and at odd places.

    Sums, so that the errors of several batches add up field by field.
    """

    counts: Tensor
    """(2, T) how often each row was measured."""
    squares: Tensor
    """(2, T) of the squared error of x_0, averaged over its elements."""
    decoder: Tensor
    """(2, C) of the decoder's term with each of `decoder_log_variances`; C is 0 for continuous data."""


def check_reverse_variance(variance: str, setting: str) -> None:
    """Raise ValueError if `variance` is not a `ReverseVariance`, naming the setting that has it."""
    if variance not in get_args(ReverseVariance):
        raise ValueError(f"{setting}={variance} must be one of {', '.join(get_args(ReverseVariance))}")


def check_halves(variance: str, count: int, setting: str) -> None:
    """Raise ValueError if `count` held-out samples are too few for this reverse variance, naming its setting."""
    if variance == "optimal" and count < 2:
        raise ValueError(
            f"{setting}=optimal needs at least 2 held-out samples, got {count}; take more, or set {setting}=fixed_large"
        )


def network_passes(schedule: Schedule, num_terms: int | None, variance: ReverseVariance) -> int:
    """How often `bounds` calls the network for each sample."""
    passes = schedule.num_steps if num_terms is None else num_terms + 1
    return passes + (1 + _rows_each(num_terms) if variance == "optimal" else 0)


def bounds(
    module: DiffusionModule,
    parts: Sequence[range],
    load: Load,
    seed: int,
    num_terms: int | None,
    variance: ReverseVariance,
    show: Callable[[range, Iterable[int]], Iterable[int]] = lambda part, passes: passes,
    together: Callable[[Errors], Errors] = lambda errors: errors,
) -> list[Bound]:
    """The bound of the held-out samples at each of `parts`, as `bound` computes it, with a reverse variance of choice.

    `optimal` measures the error of x_0 first, in each half of the samples, and gives each half the variance from the
    other's error: so no sample has a part in its own variance, and the bound stays one. `together` adds up the errors
    of all processes. `show` passes on the network's calls for a part, as `Progress` does; twice for `optimal`.
    """
    schedule, diffusion = module.schedule, module.diffusion
    log_variance = None
    if variance == "optimal":
        errors = _no_errors(diffusion, schedule)
        for part in parts:
            x, cond = load(part)
            measured = measure_errors(module, x, seed, num_terms, partial(show, part), part.start, cond)
            errors = Errors(*(a + b for a, b in zip(errors, measured, strict=True)))
        log_variance = optimal_log_variances(together(errors), diffusion, schedule)
    elif variance != "trained":
        log_variance = fixed_log_variances(variance, diffusion, schedule)
    found = []
    for part in parts:
        x, cond = load(part)
        found.append(bound(module, x, seed, num_terms, partial(show, part), part.start, cond, log_variance))
    return found


@torch.no_grad()
def bound(
    module: DiffusionModule,
    x: Tensor,
    seed: int,
    num_terms: int | None,
    progress: Progress,
    start: int = 0,
    cond: Tensor | None = None,
    log_variance: Tensor | None = None,
) -> Bound:
    """The bound of x (N, *data), over all T links, or estimated for each sample from the decoder's and `num_terms` others.

    With `cond` (N, ...) it is that of the data given these conditions. `log_variance` (2, T) is that of the reverse
    step to each row, for samples at even and at odd places; None for the process's own.

    Both are the bound of one chain, the rows of the schedule: the estimate draws links by `link_shares`, one from each
    of so many equal parts, and divides by their shares. The decoder's term, far larger than the others and of another
    kind, would be most of an estimate's error.

    The noise of link t belongs to (seed, t, the sample's place), the first being `start`, whatever the batch.
    """
    schedule, diffusion = module.schedule, module.diffusion
    steps = schedule.num_steps
    prior = prior_bits(schedule.row(steps - 1), x).cpu().double()
    sums, errors, counts = torch.zeros(3, steps, dtype=torch.float64)
    total = prior.clone()
    halves = _halves(start, len(x))
    shares = None if num_terms is None else link_shares(schedule)
    for k in progress(range(steps if num_terms is None else num_terms + 1)):
        rng = StepRng(seed, k, start, len(x), x.device)
        weight = torch.ones(len(x), dtype=torch.float64)
        rows = torch.full((len(x),), k)
        if shares is None:
            transition = Transition(schedule.row(k), schedule.row(k - 1), steps)
        else:
            assert num_terms is not None
            if k == 0:
                rows = torch.zeros_like(rows)
            else:
                place = (k - 1 + rng.uniform("link").cpu().double()) / num_terms
                rows = 1 + torch.searchsorted(shares.cumsum(0), place, right=True).clamp(max=steps - 2)
                weight = 1 / (num_terms * shares[rows - 1])
            transition = schedule.transition(((rows + 0.5) / steps).to(x), x)
        x_t = diffusion.add_noise(x, transition.t, rng.normal("eps", x.shape[1:]))
        pred = diffusion.interpret(module.denoise(x_t, transition.t, cond), x_t, transition.t)
        chosen = None if log_variance is None else per_sample(log_variance[halves, rows].to(x), x)
        bits = transition_bits(diffusion, pred, x, x_t, transition, chosen).cpu().double()
        # The error of eps is SNR times that of x_0.
        mse = (transition.t.snr * (pred.x0 - x).square()).flatten(1).mean(1).cpu().double()
        total += bits * weight
        for table, values in ((sums, bits), (errors, mse), (counts, torch.ones_like(bits))):
            table.index_add_(0, rows, values)
    return Bound(prior, total, counts, sums, errors)


def link_shares(schedule: Schedule) -> Tensor:
    """(T - 1,) the probabilities with which an estimate draws the links other than the decoder's.

    Half of each is even, half the link's term for ideal predictions of unit Gaussian data, log((1 + SNR_s) / (1 +
    SNR_t)) / 2 in nats: the terms of the cleanest links may be a thousand times those of the others.
    """
    information = _log_snr(schedule).exp().log1p()
    terms = information[:-1] - information[1:]
    return (terms / terms.sum() + 1 / len(terms)) / 2


@torch.no_grad()
def measure_errors(
    module: DiffusionModule,
    x: Tensor,
    seed: int,
    num_terms: int | None,
    progress: Progress,
    start: int = 0,
    cond: Tensor | None = None,
) -> Errors:
    """The errors of x (N, *data) at the decoder's row and at `MEASURED_ROWS` others, or by turns at `num_terms` of these.

    They are even in the `link_shares`, so that some lie at every SNR. Other arguments as in `bound`.
    """
    schedule, diffusion = module.schedule, module.diffusion
    errors = _no_errors(diffusion, schedule)
    edges = torch.linspace(0, 1, MEASURED_ROWS, dtype=torch.float64)
    measured = 1 + torch.searchsorted(link_shares(schedule).cumsum(0), edges).clamp(max=schedule.num_steps - 2)
    halves = _halves(start, len(x))
    turn = (start + torch.arange(len(x))) // 2  # the same for both halves
    each = _rows_each(num_terms)
    for k in progress(range(1 + each)):
        rows = torch.zeros_like(turn)
        if k > 0:
            rows = measured[((k - 1) * MEASURED_ROWS // each + turn) % MEASURED_ROWS]
        transition = schedule.transition(((rows + 0.5) / schedule.num_steps).to(x), x)
        noise = StepRng(seed, k, start, len(x), x.device).normal("measured", x.shape[1:])
        x_t = diffusion.add_noise(x, transition.t, noise)
        x0 = diffusion.interpret(module.denoise(x_t, transition.t, cond), x_t, transition.t).x0
        squares = (x0 - x).square().flatten(1).mean(1).cpu().double()
        errors.counts.index_put_((halves, rows), torch.ones_like(squares), accumulate=True)
        errors.squares.index_put_((halves, rows), squares, accumulate=True)
        if k == 0 and diffusion.num_values is not None:
            for c, log_variance in enumerate(decoder_log_variances(diffusion.num_values)):
                q = Gaussian(x0, log_variance.to(x))
                bits = in_bits(-discretized_gaussian_log_prob(x, q, diffusion.num_values)).cpu().double()
                errors.decoder[:, c].index_add_(0, halves, bits)
    return errors


def optimal_log_variances(errors: Errors, diffusion: GaussianDiffusion, schedule: Schedule) -> Tensor:
    """(2, T) the log-variances of the reverse steps that are best by what was measured in the other half.

    Between the rows that were measured the logarithm of the error is straight in the log-SNR. The decoder of data with
    levels has the variance with the least term, since an error that is rare, but off by a bin, hardly adds to the mean
    square.
    """
    log_snr = _log_snr(schedule)
    rows = [schedule.row(t) for t in range(-1, schedule.num_steps)]
    s, t = (
        NoiseLevel(*(torch.stack(field).double().cpu() for field in zip(*part, strict=True)))
        for part in (rows[:-1], rows[1:])
    )
    found = []
    for counts, squares, decoder in zip(*(field.flip(0) for field in errors), strict=True):
        seen = counts > 0
        log_mse = (squares[seen] / counts[seen]).clamp(min=TINY_VARIANCE).log()
        log_variance = optimal_log_variance(t, s, _interpolate(-log_snr, -log_snr[seen], log_mse).exp())
        if diffusion.num_values is not None:
            log_variance[0] = _least(decoder_log_variances(diffusion.num_values), decoder)
        found.append(log_variance)
    return torch.stack(found)


def fixed_log_variances(
    variance: Literal["fixed_small", "fixed_large"], diffusion: GaussianDiffusion, schedule: Schedule
) -> Tensor:
    """(2, T) those of the process if it had this variance, twice the same."""
    fixed = GaussianDiffusion("x0", variance, decoder_scale=diffusion.decoder_scale)
    zero = torch.zeros((), dtype=torch.float64)
    levels = [schedule.row(t) for t in range(-1, schedule.num_steps)]
    steps = [fixed.reverse(Prediction(zero, zero), zero, t, s) for s, t in pairwise(levels)]
    return torch.stack([step.log_variance.double().cpu() for step in steps]).expand(2, -1)


def decoder_log_variances(levels: int) -> Tensor:
    """(C,) those that are tried for the decoder: deviations from 1/16 of a bin to 2, the range of the data."""
    bin_width = 2 / (levels - 1)
    low, high = 2 * math.log(bin_width / 16), 2 * math.log(2)
    return torch.linspace(low, high, 1 + math.ceil(2 * (high - low)), dtype=torch.float64)


def _interpolate(x: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Straight between `values` (K,) at `known` (K,), which rise, and constant beyond them, at x (N,)."""
    if len(known) == 1:
        return values.expand_as(x)
    above = torch.searchsorted(known, x).clamp(1, len(known) - 1)
    share = ((x - known[above - 1]) / (known[above] - known[above - 1])).clamp(0, 1)
    return torch.lerp(values[above - 1], values[above], share)


def _least(x: Tensor, values: Tensor) -> Tensor:
    """Where a parabola through the least of `values` (N,) at even x (N,) and its neighbours has its least."""
    k = values[1:-1].argmin() + 1
    before, here, after = values[k - 1], values[k], values[k + 1]
    bend = (before - 2 * here + after).clamp(min=torch.finfo(values.dtype).tiny)
    return x[k] + (x[1] - x[0]) * ((before - after) / (2 * bend)).clamp(-1, 1)


def _log_snr(schedule: Schedule) -> Tensor:
    """(T,) of the rows, finite."""
    rows = schedule.at(torch.arange(1, schedule.num_steps + 1, dtype=torch.float64) / schedule.num_steps)
    return torch.stack([row.snr.double().cpu() for row in rows]).clamp(min=TINY_SNR).log()


def _halves(start: int, count: int) -> Tensor:
    """(count,) 0 for samples at even places, 1 at odd ones, the first place being `start`."""
    return (start + torch.arange(count)) % 2


def _rows_each(num_terms: int | None) -> int:
    """How many of the `MEASURED_ROWS` each sample is measured at."""
    return MEASURED_ROWS if num_terms is None else min(num_terms, MEASURED_ROWS)


def _no_errors(diffusion: GaussianDiffusion, schedule: Schedule) -> Errors:
    counts, squares = torch.zeros(2, 2, schedule.num_steps, dtype=torch.float64)
    tried = 0 if diffusion.num_values is None else len(decoder_log_variances(diffusion.num_values))
    return Errors(counts, squares, torch.zeros(2, tried, dtype=torch.float64))


def error_by_log_snr(parts: Sequence[Bound], schedule: Schedule, edges: Tensor) -> Tensor:
    """(B - 1,) the mean squared error of eps in each bin of log-SNR between the `edges` (B,); NaN where none fell."""
    places = torch.bucketize(_log_snr(schedule), edges.double()) - 1
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

    schedule, levels = module.schedule, module.diffusion.num_values
    own = module.diffusion
    # Without clipping, whose kinks the solver would have to step around.
    diffusion = GaussianDiffusion(own.prediction, own.variance, sigma_data=own.sigma_data)
    predict = predictor(diffusion, partial(module.denoise, cond=cond))
    rng = StepRng(seed, 0, start, len(x), x.device)
    bin_width = 1.0 if levels is None else 2 / (levels - 1)
    if levels is not None:
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
