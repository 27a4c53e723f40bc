"""Averages of the weights whose length is chosen after training.

The average of length s after t steps weights the weights after step u by a power of u: the profile
(gamma + 1) u^gamma / t^(gamma + 1), integrated over (u - 1, u]. Its standard deviation is s t. Snapshots of two such
averages at some steps contain averages of other lengths: between two snapshots, a sum of their two powers approximates
any other power.

Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), sec. 3 and appendix C.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from src.errors import one_line

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]

LONGEST = 12**-0.5
"""Length of the mean of all weights, gamma = 0."""

MAX_ERROR = 0.05
"""Largest `Reconstruction.error` that is accepted."""

MAX_BINS = 4096
"""Number of equal bins between two snapshots that replace the steps, if these are more."""

SNAPSHOT = re.compile(r"step_(\d{8,10})\.safetensors")
"""Name of the file of a snapshot, with its step."""


def exponent(length: float) -> float:
    """Return gamma of a length: the largest root of (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = length^2.

    Raises ValueError for a length outside (0, 0.2886], where gamma >= 0.
    """
    if isinstance(length, bool) or not 0 < length <= LONGEST:
        raise ValueError(f"{length} must be a length in (0, 0.2886]: 0.1 is usual, 0.2886 averages all steps equally")
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return max(0.0, float(roots.real.max()))


def decay(gamma: float, step: int) -> float:
    """Return the factor of the average in its update after `step` >= 1 steps."""
    return float((1 - 1 / step) ** (gamma + 1))


def profile(gamma: float, edges: Array, end: float) -> Array:
    """Return the integrals between the n + 1 `edges` of the profile at step `end`: (n,), with the sum 1 on [0, end]."""
    low, high = edges[:-1], edges[1:]
    with np.errstate(divide="ignore"):  # of an edge at 0
        share = -np.expm1((gamma + 1) * np.log1p((low - high) / high))
    return np.asarray((high / end) ** (gamma + 1) * share)


class Reconstruction(NamedTuple):
    """A linear combination of snapshots."""

    coefficients: Array
    """(snapshots, lengths); the sum is 1."""
    error: float
    """Total variation distance of the profile from the requested one: an averaged weight is off by at most this
    fraction of the range of that weight during training."""


def reconstruct(steps: Sequence[int], lengths: Sequence[float], length: float) -> Reconstruction:
    """Return the combination whose profile has the least squared distance to that of `length` at the last step.

    `steps` are those of the snapshots, ascending; each has the averages of all `lengths`. On an interval between two
    snapshots, the difference of their sums contains the weights of the interval only. So the least squares of all
    snapshots (algorithm 3 of the paper) are one small problem for each interval, which stays well conditioned.
    """
    gamma, powers = exponent(length), np.array([exponent(each) for each in lengths])
    coefficients = np.zeros((len(steps), len(lengths)))
    wanted, found = [], []
    for k, (start, stop) in enumerate(zip([0, *steps], steps, strict=False)):
        edges = np.linspace(start, stop, min(stop - start, MAX_BINS) + 1)
        share = (stop / steps[-1]) ** (gamma + 1)  # of the steps until `stop` in the requested average
        target = share * profile(gamma, edges, stop)
        basis = np.stack([profile(power, edges, stop) for power in powers], 1)
        solution = np.linalg.lstsq(basis, target, rcond=None)[0]
        coefficients[k] += solution
        if k:
            coefficients[k - 1] -= solution * (start / stop) ** (powers + 1)
        wanted.append(target)
        found.append(basis @ solution)
    total = coefficients.sum()
    distance = np.abs(np.concatenate(wanted) - np.concatenate(found) / total).sum() / 2
    return Reconstruction(coefficients / total, float(distance))


def lengths_within(steps: Sequence[int], lengths: Sequence[float]) -> list[float]:
    """Return the multiples of 0.005, and the tracked lengths, that `reconstruct` reaches within `MAX_ERROR`."""
    candidates = sorted({*np.arange(2, 58).round() * 0.005, *lengths})
    return [float(each) for each in candidates if reconstruct(steps, lengths, each).error <= MAX_ERROR]
