"""Batch samplers of training and validation."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from src.rng import key

if TYPE_CHECKING:
    pass


VALIDATION = -1
"""The step that validation's draws belong to: always the same, so that equal weights give equal figures."""


class BatchIndices(NamedTuple):
    """What a sampler asks of a dataset: the samples `indices`, the first at position `start` of `total` of a step."""

    start: int
    total: int
    indices: list[int]
    step: int = VALIDATION


class InfiniteBatchSampler(Sampler[BatchIndices]):
    """The batches of a whole run: step k takes samples k B .. (k + 1) B - 1 of one shuffled epoch after another.

    A pure function of (seed, step), cut first into `accumulate` micro-batches and these over `world` processes,
    so that neither changes what the optimizer sees. `first_step` is where a resumed run goes on. With `repeat` the
    first so many batches of the data come again and again.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        num_steps: int,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        first_step: int = 0,
        repeat: int = 0,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"trainer.accumulate_grad_batches must be at least 1, got {accumulate}")
        if batch_size > len(indices):
            raise ValueError(
                f"data.batch_size {batch_size} is larger than the training data ({len(indices)} samples): lower it"
            )
        if batch_size % (accumulate * world):
            raise ValueError(
                f"data.batch_size {batch_size} is the global batch, and does not split over {world} processes with "
                f"{accumulate} accumulated batches each: make it a multiple of {accumulate * world}"
            )
        self.indices = torch.as_tensor(indices)
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.accumulate = accumulate
        self.rank = rank
        self.world = world
        self.first_step = first_step
        self.repeat = repeat

    def __len__(self) -> int:
        """The batches of the whole run, also when it was resumed: Lightning counts on from where it stopped."""
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[BatchIndices]:
        micro = self.batch_size // (self.accumulate * self.world)
        for step in range(self.first_step, self.num_steps):
            batch = self.batch(step)
            for part in range(self.accumulate):
                start = (part * self.world + self.rank) * micro
                yield BatchIndices(start, self.batch_size, batch[start : start + micro], step)

    def batch(self, step: int) -> list[int]:
        """The dataset indices of the global batch of `step`."""
        step = step % self.repeat if self.repeat else step
        epoch, offset = divmod(step * self.batch_size, len(self.indices))
        taken = self._epoch(epoch)[offset : offset + self.batch_size]
        if len(taken) < self.batch_size:
            taken = torch.cat([taken, self._epoch(epoch + 1)[: self.batch_size - len(taken)]])
        return taken.tolist()

    @lru_cache(maxsize=2)  # noqa: B019 - one stream lives as long as its run
    def _epoch(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(key(self.seed, "order", epoch))
        return self.indices[torch.randperm(len(self.indices), generator=generator)]


class EvalBatchSampler(Sampler[BatchIndices]):
    """All `indices` once and in order, in batches of `batch_size` to twice that, dealt out over `world`.

    Every process has as many batches as every other, of which sharded weights are gathered together. `limit` is a
    number of them, or a share: the samples in these alone count as the validation set.
    """

    def __init__(
        self, indices: Sequence[int], batch_size: int, rank: int = 0, world: int = 1, limit: int | float = 1.0
    ) -> None:
        self.indices = list(indices)
        self.rounds = max(1, len(self.indices) // (world * batch_size))
        count = self.rounds * world
        edges = [k * len(self.indices) // count for k in range(count + 1)]
        kept = min(limit, self.rounds) if isinstance(limit, int) else int(limit * self.rounds)
        if kept == 0 < limit:
            raise ValueError(
                f"trainer.limit_val_batches={limit} (or trainer.overfit_batches) leaves none of {self.rounds} "
                f"validation batches: use at least {math.ceil(100 / self.rounds) / 100}, or a whole number"
            )
        self.total = edges[kept * world]
        self.spans = list(pairwise(edges))[rank : kept * world : world]

    def __len__(self) -> int:
        """The batches without a limit, of which Lightning takes the same share."""
        return self.rounds

    def __iter__(self) -> Iterator[BatchIndices]:
        for start, stop in self.spans:
            yield BatchIndices(start, self.total, self.indices[start:stop])
