"""Batches, and the dataset and loader that produce them."""

import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src.data.conditions import Condition
from src.data.read_errors import read_error_hint
from src.data.samplers import VALIDATION, BatchIndices
from src.data.sources import Source
from src.errors import DataReadError
from src.rng import key

MAX_REPLACEMENTS = 10
"""Maximum number of replacements for a sample that cannot be read."""


class Batch(TypedDict):
    """Samples x (B, *data); the first has position `start` among the `total` of the global batch or validation set.

    `cond` (B, ...) are their conditions, if the network takes any, and `augment` (B, K) the labels of their
    augmentation, if the data module has labels. `images` (B, C, H, W) are the images of latents, mirrored alike, in the
    training steps `image_steps` of the source. Before a batch reaches the device it may carry two
    more keys: `skipped`, the errors of replaced samples by name, and `failure`, the error of a batch without samples.
    """

    x: Tensor
    start: int
    total: int
    cond: NotRequired[Tensor]
    augment: NotRequired[Tensor]
    images: NotRequired[Tensor]
    skipped: NotRequired[dict[str, str]]
    failure: NotRequired[str]


@dataclass(eq=False)
class BatchDataset(Dataset[Batch]):
    """A source as a dataset of batches, indexed by `BatchIndices`.

    Samples in `replacements` replace those that cannot be read. A batch reports failures instead of raising,
    since all processes must learn of them.
    """

    source: Source
    condition: Condition | None = None
    seed: int = 0
    replacements: Sequence[int] | None = None

    def __getitem__(self, wanted: BatchIndices) -> Batch:
        batch: Batch = {"x": torch.empty(0), "start": wanted.start, "total": wanted.total}
        try:
            batch["x"], indices, skipped = fetch_batch(self.source, wanted, self.seed, self.replacements)
            if skipped:
                batch["skipped"] = skipped
            if wanted.step in getattr(self.source, "image_steps", ()):
                source: Any = self.source
                batch["images"] = source.fetch_images(indices, _training_keys(wanted, self.seed, len(indices)))
            if self.condition is not None:
                batch["cond"] = self._encode(self.condition, wanted, indices)
        except DataReadError as error:
            batch["failure"] = f"{error}; {read_error_hint(self.replacements is not None)}"
        return batch

    def _encode(self, condition: Condition, wanted: BatchIndices, indices: Sequence[int]) -> Tensor:
        """Return the conditions of the samples (B, ...). Raises DataReadError if they can no longer be encoded."""
        values = [
            # The choice among several captions is keyed by step and position, as all random numbers are.
            condition.of_sample(self.source, index, key(self.seed, "caption", wanted.step, wanted.start + k))
            for k, index in enumerate(indices)
        ]
        try:
            return condition(values)
        except (OSError, ValueError) as error:  # for example, the encoder's cache and files were deleted
            raise DataReadError(f"conditions cannot be encoded ({' '.join(str(error).split())})") from error


def fetch_batch(
    source: Source, wanted: BatchIndices, seed: int, replacements: Sequence[int] | None
) -> tuple[Tensor, list[int], dict[str, str]]:
    """Return samples (B, *data), their indices, and the errors of unreadable samples by name.

    A sample that cannot be read is replaced by one of `replacements`, keyed by (seed, step, position). Raises
    DataReadError without `replacements`, or if `MAX_REPLACEMENTS` of them cannot be read either.
    """
    indices = list(wanted.indices)
    try:
        return _fetch(source, indices, wanted, seed), indices, {}
    except DataReadError:
        if not replacements:
            raise
    skipped: dict[str, str] = {}
    samples = []
    for k, first in enumerate(indices):
        position = wanted.start + k
        others = (
            replacements[key(seed, "spare", wanted.step, position, attempt) % len(replacements)]
            for attempt in range(MAX_REPLACEMENTS)
        )
        for index in chain([first], others):
            try:
                samples.append(_fetch(source, [index], wanted._replace(start=position), seed))
                indices[k] = index
                break
            except DataReadError as error:
                skipped[error.name] = str(error)
                last = error
        else:
            raise DataReadError(f"{last}, nor can {MAX_REPLACEMENTS} other samples", last.name)
    return torch.cat(samples), indices, skipped


def _fetch(source: Source, indices: Sequence[int], wanted: BatchIndices, seed: int) -> Tensor:
    """Return samples (B, *data), those of training if the source has others for it."""
    fetch_training = getattr(source, "fetch_training", None)
    if fetch_training is None or wanted.step == VALIDATION:
        return source.fetch(indices)
    samples: Tensor = fetch_training(indices, _training_keys(wanted, seed, len(indices)))
    return samples


def _training_keys(wanted: BatchIndices, seed: int, count: int) -> list[int]:
    """Return the random bits of the first samples of a batch, keyed by (seed, step, position)."""
    return [key(seed, "fetch", wanted.step, wanted.start + k) for k in range(count)]


class BatchLoader(DataLoader[Batch]):
    """A DataLoader that ends with a batch with a `failure` when one of its workers dies.

    Torch raises an error as soon as a worker dies, possibly in the middle of an optimizer step.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if in_main_thread and hasattr(signal, "SIGCHLD") else None
        batches = super().__iter__()
        if before is not None:
            signal.signal(signal.SIGCHLD, before)  # torch then checks its workers only when a batch is late
        return self._until_worker_dies(batches)

    def _until_worker_dies(self, batches: Any) -> Iterator[Batch]:
        try:
            yield from batches
        except (RuntimeError, OSError, EOFError) as error:
            workers = getattr(batches, "_workers", [])
            for worker in workers:  # its connection breaks shortly before a worker is dead
                worker.join(timeout=1)
            if all(worker.is_alive() for worker in workers):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            failure = (
                f"data.num_workers={self.num_workers}: a process that loads data died ({reason}), often for lack of "
                "memory; lower data.num_workers"
            )
            yield {"x": torch.empty(0), "start": 0, "total": 0, "failure": failure}
