"""Features of a stream of samples in bounded memory, merged over batches and processes in any order."""

from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src.cache import Tensors, cached, digest
from src.metrics.features import Extractor, Features
from src.metrics.frechet import Moments


class Collected(NamedTuple):
    """Moments of all samples, and the features of those with the lowest indices, in order."""

    moments: Moments
    numbers: Tensor  # (M,) int64, ascending
    features: Tensor  # (M, F) float64
    probabilities: Tensor  # (M, K) float64; K = 0 without classes

    @classmethod
    def of(cls, batch: Features, start: int, limit: int) -> "Collected":
        """Collect samples number `start`, `start` + 1, ..., and keep the features of at most `limit`."""
        numbers = torch.arange(start, start + len(batch.features), device=batch.features.device)
        probabilities = batch.features[:, :0] if batch.probabilities is None else batch.probabilities
        return cls(Moments.of(batch.features), numbers, batch.features, probabilities)._first(limit)

    def merge(self, other: "Collected", limit: int) -> "Collected":
        """Merge both; the order matters only for rounding of the moments."""
        rest = (torch.cat(pair) for pair in zip(self[1:], other[1:], strict=True))
        return Collected(self.moments.merge(other.moments), *rest)._first(limit)

    def to(self, device: torch.device | str) -> "Collected":
        return Collected(Moments(*(x.to(device) for x in self.moments)), *(x.to(device) for x in self[1:]))

    def _first(self, limit: int) -> "Collected":
        order = self.numbers.argsort()[:limit]
        return Collected(self.moments, *(x[order] for x in self[1:]))


Batches = Iterable[tuple[int, Tensor]]  # the number of the first image in each batch, and its images (B, C, H, W) uint8


def collect(extractor: Extractor, batches: Batches, limit: int) -> Collected:
    """Collect the features of all images, and keep at most `limit`."""
    parts = (Collected.of(extractor(images), start, limit) for start, images in batches)
    return reduce(lambda merged, part: merged.merge(part, limit), parts)


def collect_once(
    folder: Path, data: str, extractor: Extractor, batches: Callable[[], Batches], limit: int
) -> Collected:
    """Collect the features of real images, or read them from `folder`. `data` is a digest of the images."""

    def compute() -> Tensors:
        result = collect(extractor, batches(), limit)
        return {**result.moments._asdict(), **dict(zip(result._fields[1:], result[1:], strict=True))}

    saved = cached(folder, f"features-{extractor.name}-{digest(data, extractor.fingerprint, limit)}", compute)
    moments = Moments(*(saved[name] for name in Moments._fields))
    return Collected(moments, saved["numbers"], saved["features"], saved["probabilities"])
