"""Averages of the weights whose length is chosen after training.

The average of length s after t steps weights the weights after step u by a power of u: the profile
(gamma + 1) u^gamma / t^(gamma + 1), integrated over (u - 1, u]. Its standard deviation is s t. Snapshots of two such
averages at some steps contain averages of other lengths: between two snapshots, a sum of their two powers approximates
any other power.

Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), sec. 3 and appendix C.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from src.errors import counted, format_override, literal, sentence

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]

LONGEST = 12**-0.5
"""Length of the mean of all weights, gamma = 0."""

MAX_ERROR = 0.05
"""Largest `Reconstruction.error` that is accepted."""

MAX_BINS = 4096
"""Number of equal bins between two snapshots that replace the steps, if these are more."""

STRIDE_BITS = 14
"""Number of bits of the first step from which on not every step updates the averages, see `stride`."""

FOLDER = "averages"
"""Folder of the snapshots in a run folder."""


def exponent(length: float) -> float:
    """Return gamma of a length: the largest root of (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = length^2.

    Raises ValueError for a length outside (0, 0.2886], where gamma >= 0.
    """
    if isinstance(length, bool) or not isinstance(length, int | float) or not 0 < length <= LONGEST:
        raise ValueError(f"{length} must be a length in (0, 0.2886]: 0.1 is usual, 0.2886 averages all steps equally")
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return max(0.0, float(roots.real.max()))


def stride(step: int) -> int:
    """Return the number of steps between updates after `step` steps: 1 until step 16,383, then 2, 4, 8, ...

    In float32 the updates after very many steps would be smaller than the rounding error of the average. At least 8192
    updates remain, and each counts for all steps since the one before.
    """
    return 1 << max(0, step.bit_length() - STRIDE_BITS)


def last_update(step: int) -> int:
    """Return the step of the last update after `step` steps."""
    return step - step % stride(step)


def decay(gamma: float, step: int) -> float:
    """Return the factor of the average in its update at `step`: ((step - 1) / step)^(gamma + 1), if stride is 1."""
    return float((last_update(step - 1) / step) ** (gamma + 1))


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
    """Total variation distance of the profile from the requested one: each averaged weight is off by at most this
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


def describe_lengths(steps: Sequence[int], lengths: Sequence[float]) -> str:
    """Return the range of lengths around the tracked ones that `reconstruct` reaches within `MAX_ERROR`, in words."""
    reached = {k: reconstruct(steps, lengths, k / 200).error <= MAX_ERROR for k in range(2, 58)}  # 0.01 to 0.285
    low, high = (round(200 * each) for each in (min(lengths), max(lengths)))
    if not all(reached.get(k, True) for k in range(low, high + 1)):
        return "or train with more snapshots (callbacks.power_ema.max_snapshots)"
    while reached.get(low - 1):
        low -= 1
    while reached.get(high + 1):
        high += 1
    return f"or any from {low / 200:g} to {high / 200:g}"


class TrackedAverages(NamedTuple):
    """The averages of a checkpoint, and the snapshots of its run until then."""

    lengths: Sequence[float]
    steps: Sequence[int]
    """Of the snapshots, ascending, and of the checkpoint."""
    files: Sequence[Path]
    """Of the snapshots."""
    last: Sequence[Mapping[str, "Tensor"]]
    """For each length, the averages of the checkpoint by the name of the weight."""

    def reconstruct(self, length: float, setting: str, typed: Sequence[float] | None = None) -> Reconstruction:
        """Return the reconstruction of a length. Its cost does not depend on the size of the network.

        Raises ValueError, with the name of the `setting` and the list `typed` that has the length, if it is not close.
        """
        start = f"{setting}=" if typed is None else f"{format_override(setting, typed)}: "
        try:
            result = reconstruct(self.steps, self.lengths, length)
        except ValueError as error:
            raise ValueError(f"{start}{error}") from error
        if result.error > MAX_ERROR:
            raise ValueError(
                f"{start}{length} cannot be reconstructed from {counted(len(self.steps), 'snapshot')} of the "
                f"lengths {literal(self.lengths)}; choose one of these, {describe_lengths(self.steps, self.lengths)}"
            )
        return result

    def combine(self, coefficients: Array) -> dict[str, "Tensor"]:
        """Return the linear combination of all snapshots, summed in float64 and rounded to float32."""
        import torch

        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self.last[0].items()}
        for row, parts in zip(coefficients, self._snapshots(), strict=True):
            for name, value in parts:
                for factor, part in zip(row, value, strict=True):
                    total[name].add_(part, alpha=float(factor))
        return {name: value.float() for name, value in total.items()}

    def _snapshots(self) -> "Iterator[Iterator[tuple[str, list[Tensor]]]]":
        """Yield for each step an iterator of the names of the weights and their averages of each length."""
        from safetensors import safe_open

        for path in self.files:
            with safe_open(path, "pt") as file:
                yield (
                    (name, [file.get_tensor(tensor_name(k, name)) for k in range(len(self.lengths))])
                    for name in self.last[0]
                )
        yield ((name, [part[name] for part in self.last]) for name in self.last[0])


def tracked_averages(checkpoint: Mapping[str, Any], path: Path, override: str) -> TrackedAverages:
    """Return the averages of the checkpoint at `path`. Raises ValueError, with the `override`, without any."""
    saved = checkpoint.get("power_ema")
    if not saved or not saved["steps"]:
        raise ValueError(
            f"{override} needs averages of callbacks.power_ema, and {path} has none; train with "
            f"{format_override('callbacks.power_ema.lengths', [0.05, 0.1])}"
        )
    end = last_update(int(saved["steps"]))
    earlier = [(step, file) for step, file in snapshots(averages_folder(path)) if step < end]
    kept = [(step, file) for step, file in earlier if _is_complete(file, saved["averages"])]
    steps, files = [*(step for step, _ in kept), end], [file for _, file in kept]
    return TrackedAverages(saved["lengths"], steps, files, saved["averages"])


def with_average(checkpoint: Mapping[str, Any], path: Path, length: float) -> dict[str, Any]:
    """Return the checkpoint at `path` with the average of this length as its only weights, like an exported model.

    Raises ValueError, with the setting `ema`, if it cannot be reconstructed.
    """
    tracked = tracked_averages(checkpoint, path, format_override("ema", length))
    return averaged_checkpoint(checkpoint, tracked, tracked.reconstruct(length, "ema"))


def averaged_checkpoint(
    checkpoint: Mapping[str, Any], tracked: TrackedAverages, result: Reconstruction
) -> dict[str, Any]:
    """Return a checkpoint with a reconstructed average as its only weights."""
    weights = checkpoint["state_dict"] | tracked.combine(result.coefficients)
    return {**checkpoint, "state_dict": weights, "averaged": True}


def averages_folder(checkpoint: Path) -> Path:
    """Return the folder of the snapshots of a checkpoint's run."""
    return (checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent) / FOLDER


def snapshots(folder: Path) -> list[tuple[int, Path]]:
    """Return the steps and files of the snapshots in a folder, sorted by step."""
    matches = [(re.fullmatch(r"step_(\d{8,10})\.safetensors", path.name), path) for path in folder.glob("step_*")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def snapshot_file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.safetensors"


def tensor_name(index: int, name: str) -> str:
    """Return the name in the file of a snapshot of a weight's average with the length number `index`."""
    return f"{index}.{name}"


def _is_complete(path: Path, averages: Sequence[Mapping[str, "Tensor"]]) -> bool:
    """Return whether a snapshot has all averages, in the shapes of the checkpoint; warn if not."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:  # checks the size of the file
            for k, part in enumerate(averages):
                for name, value in part.items():
                    if tuple(file.get_slice(tensor_name(k, name)).get_shape()) != tuple(value.shape):
                        raise ValueError(f"{name} has another shape")
    except Exception as error:  # untrusted bytes can raise anything
        warnings.warn(f"{path} is not used: it is corrupted or of another run ({sentence(error)})", stacklevel=2)
        return False
    return True
