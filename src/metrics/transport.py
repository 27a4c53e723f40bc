"""The sliced Wasserstein distance: the cost of moving one set of points onto another, seen from many directions."""

import torch
from torch import Tensor

from src.metrics.confidence import Statistic


def sliced_wasserstein(x: Tensor, y: Tensor, seed: int, directions: int = 128) -> Statistic:
    """The sliced 2-Wasserstein distance of samples x (N, F) to y (M, F), in the unit of the data.

    The root of the mean over random directions of the squared distance along each (Bonneel et al. 2015), which
    is exact for any N and M: in one dimension the quantiles are matched.
    """
    if min(len(x), len(y)) < 1 or x.shape[1:] != y.shape[1:] or directions < 1:
        raise ValueError(
            "needs two sets (N, F) of samples with the same F and at least one direction, got "
            f"{tuple(x.shape)}, {tuple(y.shape)} and {directions}"
        )
    generator = torch.Generator().manual_seed(seed)
    across = torch.randn(x.shape[1], directions, generator=generator, dtype=torch.float64).to(x.device)
    across /= across.norm(dim=0)
    seen, order = (x.double() @ across).T.sort(dim=1)  # (directions, N)
    target = (y.double() @ across).T.sort(dim=1).values
    ours, theirs, share = matched_quantiles(len(x), len(y), x.device)

    def distance(counts: Tensor) -> Tensor:
        taken = seen.flatten().repeat_interleave(counts.long()[order].flatten()).view_as(seen)
        return ((taken[:, ours] - target[:, theirs]).square() @ share).mean().sqrt()

    return Statistic(len(x), lambda counts: torch.stack([distance(row.to(x.device)) for row in counts]))


def matched_quantiles(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Which of n and of m sorted numbers are matched, and the share (float64) of the mass that each match carries."""
    ends = torch.cat([torch.arange(1, n + 1, device=device) * m, torch.arange(1, m + 1, device=device) * n])
    edges = ends.unique()  # type: ignore[no-untyped-call]
    widths = edges.diff(prepend=edges.new_zeros(1))  # in units of 1 / (n m)
    return (edges - 1) // m, (edges - 1) // n, widths.double() / (n * m)
