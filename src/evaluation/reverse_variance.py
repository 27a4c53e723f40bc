"""The variance of the reverse steps in the bound: fixed, or optimal given the error on validation data."""

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.diffusion.gaussian_diffusion import TINY_SNR, TINY_VARIANCE, Gaussian, GaussianDiffusion, Prediction
from src.diffusion.likelihood import discretized_gaussian_log_prob, in_bits, optimal_log_variance
from src.diffusion.noise import NoiseLevel, Schedule
from src.rng import StepRng
from src.training.module import DiffusionModule

Advance = Callable[[int], object]  # receives the number of samples of each network call, for a progress bar

MEASURED_ROWS = 32  # rows of the schedule, besides the decoder's, at which the error of x_0 is measured


class ErrorSums(NamedTuple):
    """Sums of errors in each half of the samples. The sums of several batches add up field by field."""

    counts: Tensor  # (2, T) number of measurements at each row
    squares: Tensor  # (2, T) squared error of x_0, averaged over its elements
    decoder: Tensor  # (2, C) decoder term for each of `decoder_log_variances`; C is 0 for continuous data


def sample_halves(x: Tensor) -> Tensor:
    """Return the half, 0 or 1, of each sample of x (N, *data): (N,) int64.

    The half is a hash of the sample, so equal samples are in the same half, and no sample affects its own variance
    through a duplicate in the other half.
    """
    rows = (x.detach().cpu().flatten(1).contiguous() + 0.0).view(torch.uint8).numpy()  # + 0.0: -0 equals 0
    return torch.tensor([hashlib.blake2b(row.data, digest_size=1).digest()[0] & 1 for row in rows])


def transition_probs(schedule: Schedule) -> Tensor:
    """Return the probabilities (T - 1,) with which an estimate of the bound draws transitions other than the decoder.

    Half of the probability is uniform. The other half is proportional to the term of ideal predictions for unit
    Gaussian data, log((1 + SNR_s) / (1 + SNR_t)) / 2 nats: the cleanest transitions can have terms a thousand times
    larger than the others.
    """
    information = row_log_snr(schedule).exp().log1p()
    terms = information[:-1] - information[1:]
    return (terms / terms.sum() + 1 / len(terms)) / 2


def row_log_snr(schedule: Schedule) -> Tensor:
    """Return the log-SNR (T,) of the schedule's rows, clamped to finite values."""
    rows = schedule.at(torch.arange(1, schedule.num_steps + 1, dtype=torch.float64) / schedule.num_steps)
    return torch.stack([row.snr.double().cpu() for row in rows]).clamp(min=TINY_SNR).log()


def rows_per_sample(num_terms: int | None) -> int:
    """Return at how many of the `MEASURED_ROWS` each sample is measured."""
    return MEASURED_ROWS if num_terms is None else min(num_terms, MEASURED_ROWS)


def zero_errors(diffusion: GaussianDiffusion, schedule: Schedule) -> ErrorSums:
    counts, squares = torch.zeros(2, 2, schedule.num_steps, dtype=torch.float64)
    candidates = 0 if diffusion.num_values is None else len(decoder_log_variances(diffusion.num_values))
    return ErrorSums(counts, squares, torch.zeros(2, candidates, dtype=torch.float64))


@torch.no_grad()
def measure_errors(
    module: DiffusionModule,
    x: Tensor,
    seed: int,
    num_terms: int | None,
    start: int = 0,
    cond: Tensor | None = None,
    advance: Advance = lambda count: None,
) -> ErrorSums:
    """Return the errors of x (N, *data) at the decoder's row and at `MEASURED_ROWS` others.

    With `num_terms` each sample is measured at that many of the rows, in turn. The rows are evenly spaced in the
    cumulative `transition_probs`, so some lie at every SNR. The other arguments are those of `bound`.
    """
    schedule, diffusion = module.schedule, module.diffusion
    errors = zero_errors(diffusion, schedule)
    edges = torch.linspace(0, 1, MEASURED_ROWS, dtype=torch.float64)
    measured = 1 + torch.searchsorted(transition_probs(schedule).cumsum(0), edges).clamp(max=schedule.num_steps - 2)
    halves = sample_halves(x)
    turn = start + torch.arange(len(x))
    per_sample = rows_per_sample(num_terms)
    for k in range(1 + per_sample):
        rows = torch.zeros_like(turn)
        if k > 0:
            rows = measured[((k - 1) * MEASURED_ROWS // per_sample + turn) % MEASURED_ROWS]
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
        advance(len(x))
    return errors


def optimal_log_variances(errors: ErrorSums, diffusion: GaussianDiffusion, schedule: Schedule) -> Tensor:
    """Return the optimal log-variances of the reverse steps for each half, from the errors of the other: (2, T).

    Between measured rows the log error is linear in the log-SNR. Data with discrete values use the decoder variance
    with the smallest term instead of the mean square, which rare errors of one bin hardly change. If one half is
    empty, as when all samples are equal, the other uses `fixed_large`.

    Source: Bao et al. 2022 (arXiv 2201.06503), theorem 1.
    """
    log_snr = row_log_snr(schedule)
    rows = [schedule.row(t) for t in range(-1, schedule.num_steps)]
    s, t = (
        NoiseLevel(*(torch.stack(field).double().cpu() for field in zip(*part, strict=True)))
        for part in (rows[:-1], rows[1:])
    )
    result = []
    for counts, squares, decoder in zip(*(field.flip(0) for field in errors), strict=True):
        measured = counts > 0
        if not measured.any():
            result.append(fixed_log_variances("fixed_large", diffusion, schedule)[0])
            continue
        log_mse = (squares[measured] / counts[measured]).clamp(min=TINY_VARIANCE).log()
        log_mse = torch.from_numpy(np.interp(-log_snr, -log_snr[measured], log_mse))
        log_variance = optimal_log_variance(t, s, log_mse.exp())
        if diffusion.num_values is not None:
            log_variance[0] = _parabola_minimum(decoder_log_variances(diffusion.num_values), decoder)
        result.append(log_variance)
    return torch.stack(result)


def fixed_log_variances(
    variance: Literal["fixed_small", "fixed_large"], diffusion: GaussianDiffusion, schedule: Schedule
) -> Tensor:
    """Return the log-variances of a diffusion process with this fixed variance, the same for both halves: (2, T)."""
    fixed = GaussianDiffusion("x0", variance, decoder_scale=diffusion.decoder_scale)
    zero = torch.zeros((), dtype=torch.float64)
    rows = [schedule.row(t) for t in range(-1, schedule.num_steps)]
    steps = [fixed.reverse(Prediction(zero, zero), zero, t, s) for s, t in pairwise(rows)]
    return torch.stack([step.log_variance.double().cpu() for step in steps]).expand(2, -1)


def decoder_log_variances(num_values: int) -> Tensor:
    """Return the candidate decoder log-variances (C,): std from 1/16 of a bin to 2, the range of the data."""
    bin_width = 2 / (num_values - 1)
    low, high = 2 * math.log(bin_width / 16), 2 * math.log(2)
    return torch.linspace(low, high, 1 + math.ceil(2 * (high - low)), dtype=torch.float64)


def sum_errors(parts: Sequence[ErrorSums]) -> ErrorSums:
    return ErrorSums(*(torch.stack(field).sum(0) for field in zip(*parts, strict=True)))


def _parabola_minimum(x: Tensor, values: Tensor) -> Tensor:
    """Return the minimum of a parabola through the least of `values` (N,) at evenly spaced x (N,) and its neighbors."""
    k = values[1:-1].argmin() + 1
    before, here, after = values[k - 1], values[k], values[k + 1]
    bend = (before - 2 * here + after).clamp(min=torch.finfo(values.dtype).tiny)
    return x[k] + (x[1] - x[0]) * ((before - after) / (2 * bend)).clamp(-1, 1)
