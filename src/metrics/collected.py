"""What is kept of a stream of features, which batches and processes fill in any order: memory does not grow with n."""

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
    """Moments of all samples that came by, and features of those with the lowest numbers, in order."""

    moments: Moments
    numbers: Tensor  # (M,) int64, ascending
    features: Tensor  # (M, F) float64
    probabilities: Tensor | None  # (M, K) float64

    @classmethod
    def of(cls, batch: Features, start: int, limit: int) -> "Collected":
        """Of samples number `start`, `start` + 1, ...: at most `limit` are kept, here and after each merge.

        Raises ValueError for features that are not finite, of which no figure could be made.
        """
        if num_corrupted := int((~batch.features.isfinite().all(1)).sum()):
            raise ValueError(
                f"{num_corrupted} of {len(batch.features)} samples from number {start} on have features that are not finite: "
                "look at the samples, or choose another extractor"
            )
        numbers = torch.arange(start, start + len(batch.features))
        return cls(Moments.of(batch.features), numbers, *batch)._first(limit)

    def merge(self, other: "Collected", limit: int) -> "Collected":
        """Of both; but for rounding of the moments the same whatever came first."""
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
        """The same on another device; numbers stay on the CPU."""
        probabilities = None if self.probabilities is None else self.probabilities.to(device)
        moments = Moments(*(part.to(device) for part in self.moments))
        return Collected(moments, self.numbers, self.features.to(device), probabilities)

    def below(self, number: int) -> "Collected":
        """Without the features of samples from `number` on, which no set of `number` samples would keep."""
        return self._first(int((self.numbers < number).sum()), least=0)

    def _first(self, limit: int, least: int = 2) -> "Collected":
        if limit < least:
            raise ValueError(f"at least 2 samples must be kept, got {limit}: 10000 is usual")
        order = self.numbers.argsort()[:limit]
        places = order.to(self.features.device)
        probabilities = None if self.probabilities is None else self.probabilities[places]
        return Collected(self.moments, self.numbers[order], self.features[places], probabilities)


Batches = Iterable[tuple[int, Tensor]]
"""The number of the first image of each batch, and its images (B, C, H, W) uint8."""


def collect(extractor: Extractor, batches: Batches, limit: int) -> Collected:
    """The features of all images, batch by batch, of which `limit` are kept."""
    parts = (Collected.of(extractor(images), start, limit) for start, images in batches)
    return reduce(lambda whole, part: whole.merge(part, limit), parts)


def collect_once(
    folder: Path, data: str, extractor: Extractor, batches: Callable[[], Batches], limit: int
) -> Collected:
    """As `collect`, but read from `folder` if the same was collected before; for real images.

    `data` stands for the images: of many, `digest(*(digest(images) for _, images in batches()))` streams too.
    """

    def compute() -> Tensors:
        whole = collect(extractor, batches(), limit)
        named = {**whole.moments._asdict(), **whole._asdict()}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    key = f"{extractor.name}-{digest(data, extractor.fingerprint, limit)}"
    found = cached(folder, key, compute)
    moments = Moments(*(found[name] for name in Moments._fields))
    return Collected(moments, found["numbers"], found["features"], found.get("probabilities"))
