"""Distributions of points in the plane, learned within a minute.

Each is a callable (n, generator) -> (n, 2) float32, centered, with a standard deviation of 0.5 to 1.6 on each axis.
Distributions with several components return labels too. `src.data.analytic` has one with a known density.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from src.data.analytic import GaussianMixture
from src.data.module import BaseDataModule, Coupling
from src.data.sources import InMemory, Labels, Source
from src.rng import key

Distribution = Callable[[int, torch.Generator], Tensor | tuple[Tensor, Labels]]


class PointsDataModule(BaseDataModule):
    """`num_samples` points (N, 2) drawn once from the distribution `source`, keyed by the split's seed."""

    def __init__(
        self,
        source: Distribution,
        num_samples: int = 20_000,
        batch_size: int = 512,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        microbatch_size: int | Literal["auto"] | None = None,
        coupling: Coupling = "independent",
    ) -> None:
        super().__init__(self._draw, (2,), batch_size, val_fraction, split_seed, seed, num_workers, microbatch_size)
        if num_samples < 2:
            raise ValueError(f"data.num_samples={num_samples} must be at least 2; the default is 20000")
        self.distribution = source
        self.coupling = coupling
        self.num_samples = num_samples

    def _draw(self) -> Source:
        generator = torch.Generator().manual_seed(key(self.split_seed, "points"))
        # A call of a mixture returns points without labels, which its other callers need.
        draw = self.distribution.draw if isinstance(self.distribution, GaussianMixture) else self.distribution
        drawn = draw(self.num_samples, generator)
        return InMemory(*drawn) if isinstance(drawn, tuple) else InMemory(drawn)


def moons(n: int, generator: torch.Generator, noise: float = 0.05) -> tuple[Tensor, Labels]:
    """Draw from two interleaved half circles (scikit-learn's make_moons), centered, then scaled by 1.5.

    `noise` is the standard deviation before scaling. The half circles are the classes.
    """
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    points = torch.stack([x - 0.5, y - 0.25], dim=1) + noise * torch.randn(n, 2, generator=generator)
    return 1.5 * points, Labels((~upper).long(), ["upper", "lower"])


def swiss_roll(n: int, generator: torch.Generator, noise: float = 0.05) -> Tensor:
    """Draw from a spiral of 1.5 turns: angle and radius uniform in [1.5 pi, 4.5 pi], divided by 7.5, then centered."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    center = torch.tensor([2.0, 2 / (3 * math.pi)]) / 7.5  # mean of (r cos r, r sin r) over r
    points = torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 7.5 - center
    return points + noise * torch.randn(n, 2, generator=generator)


def rings(n: int, generator: torch.Generator, count: int = 3, noise: float = 0.03) -> tuple[Tensor, Labels]:
    """Draw from `count` concentric circles of equal weight, the classes; the outermost has radius 2."""
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    ring = torch.randint(1, count + 1, (n,), generator=generator)
    points = (2 * ring / count)[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    classes = ["inner", "middle", "outer"] if count == 3 else [f"ring {k + 1}" for k in range(count)]
    return points + noise * torch.randn(n, 2, generator=generator), Labels(ring - 1, classes)


def checkerboard(n: int, generator: torch.Generator, cells: int = 4) -> Tensor:
    """Draw uniformly from the dark squares of a `cells` x `cells` board over [-2, 2]^2; `cells` is even."""
    if cells < 2 or cells % 2:
        raise ValueError(f"data.source.cells={cells} must be an even number of at least 2, such as 4")
    row = torch.randint(cells, (n,), generator=generator)
    column = 2 * torch.randint(cells // 2, (n,), generator=generator) + row % 2
    corner = torch.stack([column, row], dim=1)
    return 4 * (corner + torch.rand(n, 2, generator=generator)) / cells - 2
