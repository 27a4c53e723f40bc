"""The sliced Wasserstein distance."""

import torch
from torch import Tensor

from src.metrics.confidence import Statistic


def sliced_wasserstein(x: Tensor, y: Tensor, seed: int, directions: int = 128) -> Statistic:
    """Return the sliced 2-Wasserstein distance of samples x (N, F) to y (M, F), in units of the data.

    It is the root mean square over random directions of the distance along each, which is exact for any N and M.

    Source: Bonneel et al. 2015.
    """
    generator = torch.Generator().manual_seed(seed)
    projections = torch.randn(x.shape[1], directions, generator=generator, dtype=torch.float64).to(x.device)
    projections /= projections.norm(dim=0)
    projected, order = (x.double() @ projections).T.sort(dim=1)  # (directions, N)
    target = (y.double() @ projections).T.sort(dim=1).values
    ours, theirs, share = matched_quantiles(len(x), len(y), x.device)

    def distance(counts: Tensor) -> Tensor:
        taken = projected.flatten().repeat_interleave(counts.long()[order].flatten()).view_as(projected)
        return ((taken[:, ours] - target[:, theirs]).square() @ share).mean().sqrt()

    return Statistic(len(x), lambda counts: torch.stack([distance(row.to(x.device)) for row in counts]))


def matched_quantiles(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matched indices of n and of m sorted values, and the mass (float64) of each match."""
    ends = torch.cat([torch.arange(1, n + 1, device=device) * m, torch.arange(1, m + 1, device=device) * n])
    edges = ends.unique()  # type: ignore[no-untyped-call]
    widths = edges.diff(prepend=edges.new_zeros(1))  # in units of 1 / (n m)
    return (edges - 1) // m, (edges - 1) // n, widths.double() / (n * m)
