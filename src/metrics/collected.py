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
    probabilities: Tensor | None  # (M, K) float64

    @classmethod
    def of(cls, batch: Features, start: int, limit: int) -> "Collected":
        """Collect samples number `start`, `start` + 1, ..., and keep the features of at most `limit`.

        Raises ValueError for features that are not finite.
        """
        if num_corrupted := int((~batch.features.isfinite().all(1)).sum()):
            raise ValueError(
                f"{num_corrupted} of {len(batch.features)} samples from number {start} have features that are not "
                "finite: inspect the samples, or choose other features=..."
            )
        numbers = torch.arange(start, start + len(batch.features))
        return cls(Moments.of(batch.features), numbers, *batch)._first(limit)

    def merge(self, other: "Collected", limit: int) -> "Collected":
        """Merge both; the order matters only for rounding of the moments."""
        probabilities = None
        if self.probabilities is not None and other.probabilities is not None:
            probabilities = torch.cat([self.probabilities, other.probabilities])
        return Collected(
            self.moments.merge(other.moments),
            torch.cat([self.numbers, other.numbers]),
            torch.cat([self.features, other.features]),
            probabilities,
        )._first(limit)

    def to(self, device: torch.device | str) -> "Collected":
        """Move to a device; numbers stay on the CPU."""
        probabilities = None if self.probabilities is None else self.probabilities.to(device)
        moments = Moments(*(part.to(device) for part in self.moments))
        return Collected(moments, self.numbers, self.features.to(device), probabilities)

    def below(self, number: int) -> "Collected":
        """Drop the features of samples from `number` on, which a merge with this limit would drop."""
        return self._first(int((self.numbers < number).sum()), least=0)

    def _first(self, limit: int, least: int = 2) -> "Collected":
        if limit < least:
            raise ValueError(f"max_features={limit} must be at least 2: 10000 is usual")
        order = self.numbers.argsort()[:limit]
        places = order.to(self.features.device)
        probabilities = None if self.probabilities is None else self.probabilities[places]
        return Collected(self.moments, self.numbers[order], self.features[places], probabilities)


Batches = Iterable[tuple[int, Tensor]]
"""The number of the first image in each batch, and its images (B, C, H, W) uint8."""


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

    key = f"{extractor.name}-{digest(data, extractor.fingerprint, limit)}"
    saved = cached(folder, key, compute)
    moments = Moments(*(saved[name] for name in Moments._fields))
    return Collected(moments, saved["numbers"], saved["features"], saved.get("probabilities"))
