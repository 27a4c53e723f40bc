"""Batch samplers of training and validation."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from src.rng import key

VALIDATION = -1
"""The step that keys random numbers in validation: a constant, so that equal weights give equal losses."""


class BatchIndices(NamedTuple):
    """The samples `indices` of one batch; the first has position `start` among the `total` of the step."""

    start: int
    total: int
    indices: list[int]
    step: int = VALIDATION


class InfiniteBatchSampler(Sampler[BatchIndices]):
    """Training batches: step k takes samples k B, ..., (k + 1) B - 1 of a sequence of shuffled epochs.

    The global batch is a pure function of (seed, step). It is split into `accumulate` micro-batches, and each of these
    over `world` processes, so that neither changes the batch of the optimizer. A resumed run starts at `first_step`. A
    positive `repeat` cycles through that many batches. With `classes`, the class of each of `indices`, each
    sample of an epoch is a random one of a random class.

    With `buckets`, an integer for the shape of each of `indices`, all samples of a global batch have one shape. An
    epoch has as many batches of each as its share of the samples, rounded at random, so that all samples are equally
    frequent.
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
        classes: Tensor | None = None,
        buckets: Tensor | None = None,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"trainer.accumulate_grad_batches={accumulate} must be at least 1")
        if batch_size > len(indices):
            raise ValueError(
                f"data.batch_size={batch_size} must be at most {len(indices)}, the number of training samples; lower it"
            )
        if batch_size % (accumulate * world):
            raise ValueError(
                f"data.batch_size={batch_size} is the global batch and must be a multiple of {accumulate * world} "
                f"({world} processes with {accumulate} accumulated batches each); change it"
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
        if classes is not None and buckets is not None:
            raise ValueError("data.balance_classes=true excludes data.source.fit=buckets; leave one out")
        self.buckets = [] if buckets is None else [self.indices[buckets == k] for k in sorted(set(buckets.tolist()))]
        full_batches = -(-len(self.indices) // batch_size) * batch_size
        self.epoch_length = full_batches if self.buckets else len(self.indices)
        self.members = [] if classes is None else [self.indices[classes == k] for k in set(classes.tolist())]

    def __len__(self) -> int:
        """Return the number of batches of the run, including those before `first_step`, which Lightning counts too."""
        return self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[BatchIndices]:
        micro = self.batch_size // (self.accumulate * self.world)
        for step in range(self.first_step, self.num_steps):
            batch = self.batch(step)
            for part in range(self.accumulate):
                start = (part * self.world + self.rank) * micro
                yield BatchIndices(start, self.batch_size, batch[start : start + micro], step)

    def batch(self, step: int) -> list[int]:
        """Return the dataset indices of the global batch of `step`."""
        step = step % self.repeat if self.repeat else step
        epoch, offset = divmod(step * self.batch_size, self.epoch_length)
        taken = self._epoch(epoch)[offset : offset + self.batch_size]
        if len(taken) < self.batch_size:
            taken = torch.cat([taken, self._epoch(epoch + 1)[: self.batch_size - len(taken)]])
        return taken.tolist()

    @lru_cache(maxsize=2)  # noqa: B019 - the sampler lives as long as its run
    def _epoch(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(key(self.seed, "order", epoch))
        if self.members:
            count = torch.tensor([len(each) for each in self.members])
            chosen = torch.randint(len(count), (len(self.indices),), generator=generator)
            within = (torch.rand(len(chosen), generator=generator, dtype=torch.float64) * count[chosen]).long()
            return torch.cat(self.members)[(count.cumsum(0) - count)[chosen] + within]
        if self.buckets:
            return self._bucketed_epoch(generator)
        return self.indices[torch.randperm(len(self.indices), generator=generator)]

    def _bucketed_epoch(self, generator: torch.Generator) -> Tensor:
        """Return batches of one bucket each, in random order and one after the other."""
        steps = self.epoch_length // self.batch_size
        # Evenly spaced points with a random offset hit each share of [0, 1) in proportion.
        points = (torch.arange(steps) + torch.rand((), generator=generator, dtype=torch.float64)) / steps
        ends = torch.tensor([len(each) for each in self.buckets], dtype=torch.float64).cumsum(0) / len(self.indices)
        chosen = torch.searchsorted(ends, points, right=True).clamp(max=len(ends) - 1)
        batches = torch.empty(steps, self.batch_size, dtype=torch.int64)
        for bucket, members in enumerate(self.buckets):
            count = int((chosen == bucket).sum()) * self.batch_size
            passes = range(-(-count // len(members)))
            drawn = [members[torch.randperm(len(members), generator=generator)] for _ in passes]
            if drawn:
                batches[chosen == bucket] = torch.cat(drawn)[:count].view(-1, self.batch_size)
        return batches[torch.randperm(steps, generator=generator)].flatten()


class EvalBatchSampler(Sampler[BatchIndices]):
    """Validation batches: all `indices` once and in order, in batches of `batch_size` to twice that, over `world`.

    All processes have the same number of batches, since they gather sharded weights together. `limit` is the number
    or fraction of these batches to use.
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
                f"validation batches; use at least {math.ceil(100 / self.rounds) / 100}, or an integer"
            )
        self.total = edges[kept * world]
        self.spans = list(pairwise(edges))[rank : kept * world : world]

    def __len__(self) -> int:
        """Return the number of batches before the limit, since Lightning applies the same limit to it."""
        return self.rounds

    def __iter__(self) -> Iterator[BatchIndices]:
        for start, stop in self.spans:
            yield BatchIndices(start, self.total, self.indices[start:stop])
