"""Features of a stream of samples in bounded memory, merged over batches and processes in any order."""

from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

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
    probabilities: Tensor | None  # (M, K) float64

    @classmethod
    def of(cls, batch: Features, start: int, limit: int) -> "Collected":
        """Collect samples number `start`, `start` + 1, ..., and keep the features of at most `limit`."""
        numbers = torch.arange(start, start + len(batch.features), device=batch.features.device)
        return cls(Moments.of(batch.features), numbers, *batch)._first(limit)

    def merge(self, other: "Collected", limit: int) -> "Collected":
        """Merge both; the order matters only for rounding of the moments."""
        rest: list[Any] = [
            None if x is None or y is None else torch.cat([x, y]) for x, y in zip(self[1:], other[1:], strict=True)
        ]
        return Collected(self.moments.merge(other.moments), *rest)._first(limit)

    def to(self, device: torch.device | str) -> "Collected":
        """Move to a device."""
        rest: list[Any] = [None if x is None else x.to(device) for x in self[1:]]
        return Collected(Moments(*(part.to(device) for part in self.moments)), *rest)

    def _first(self, limit: int) -> "Collected":
        order = self.numbers.argsort()[:limit]
        rest: list[Any] = [None if x is None else x[order] for x in self[1:]]
        return Collected(self.moments, *rest)


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
        named = {**result.moments._asdict(), **result._asdict()}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    saved = cached(folder, f"{extractor.name}-{digest(data, extractor.fingerprint, limit)}", compute)
    moments = Moments(*(saved[name] for name in Moments._fields))
    return Collected(moments, saved["numbers"], saved["features"], saved.get("probabilities"))
