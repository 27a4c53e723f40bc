"""Data about which everything is known: mixtures of Gaussians in any dimension.

Noising keeps a mixture a mixture, so density, score and ideal denoiser are closed formulas at every level of noise.
For a single Gaussian the entropy and the probability flow are, too; for several they are computed as exactly as
doubles allow.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from src.data.sources import Labels


class GaussianMixture:
    """Weights (K,), means (K, D) and deviations, (K,) or along each axis (K, D); one component is a Gaussian.

    Called as (n, generator) it gives (n, D) float32 samples, which makes it a distribution of points. All else is
    float64.
    """

    def __init__(
        self,
        weights: Sequence[float],
        means: Sequence[Sequence[float]],
        stds: Sequence[float] | Sequence[Sequence[float]],
    ) -> None:
        if not len(weights) == len(means) == len(stds):
            raise ValueError(
                f"a mixture needs one weight, mean and deviation each, got {len(weights)}, {len(means)}, "
                f"{len(stds)}: see conf/data/mixture.yaml"
            )
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.means = torch.tensor(means, dtype=torch.float64)
        spread = torch.tensor(stds, dtype=torch.float64)
        if min(self.weights.min(), spread.min()) <= 0:
            raise ValueError(f"weights and deviations must be positive, got {list(weights)} and {list(stds)}")
        self.weights /= self.weights.sum()
        self.stds = (spread if spread.ndim == 2 else spread[:, None]).expand_as(self.means)

    def __call__(self, n: int, generator: torch.Generator) -> Tensor:
        return self.draw(n, generator)[0]

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Labels]:
        """(n, D) float32 samples, and the component that each is of."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        points = (self.means[component] + self.stds[component] * noise).float()
        return points, Labels(component, [f"component {k + 1}" for k in range(len(self.means))])

    def log_prob(self, x: Tensor) -> Tensor:
        """Natural logarithm of the density at x (N, D), as (N,)."""
        return self._joint(x).logsumexp(1)

    def score(self, x: Tensor) -> Tensor:
        """The gradient of `log_prob` at x (N, D), as (N, D)."""
        pull = (self.means - x.double()[:, None]) / self.stds.square()  # (N, K, D)
        return (self._joint(x).softmax(1)[..., None] * pull).sum(1)

    def noised(self, alpha: float, sigma: float) -> "GaussianMixture":
        """The distribution of alpha x + sigma eps."""
        stds = (alpha**2 * self.stds.square() + sigma**2).sqrt()
        return GaussianMixture(self.weights.tolist(), (alpha * self.means).tolist(), stds.tolist())

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | alpha x_0 + sigma eps = x] for x (N, D), the best that any network can predict, as (N, D)."""
        there = self.noised(alpha, sigma)
        share = alpha * self.stds.square() / there.stds.square()
        means = self.means + share * (x.double()[:, None] - there.means)  # (N, K, D)
        return (there._joint(x).softmax(1)[..., None] * means).sum(1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D)."""
        mean = self.weights @ self.means
        apart = self.means - mean
        within = torch.diag(self.weights @ self.stds.square())
        return mean, within + (self.weights[:, None] * apart).T @ apart

    def entropy(self, n: int = 1_000_000, seed: int = 0) -> float:
        """Nats of the distribution: exact for a single Gaussian, else the mean over n samples."""
        if len(self.weights) == 1:
            return (self.stds.log() + (1 + math.log(2 * math.pi)) / 2).sum().item()
        return -self.log_prob(self(n, torch.Generator().manual_seed(seed))).mean().item()

    def flow(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """Where the probability flow leads x (N, D) from a level of noise to clean data, as (N, D).

        For a Gaussian, to the same number of deviations from the mean; for a mixture by an adaptive solver of order
        8 to 1e-9, in z = x / sqrt(alpha^2 + sigma^2) over the angle atan(sigma / alpha) (`likelihood.flow_slope`).
        """
        there = self.noised(alpha, sigma)
        if len(self.weights) == 1:
            return self.means + self.stds / there.stds * (x.double() - there.means)
        from scipy.integrate import solve_ivp

        def slope(angle: float, z: Any) -> Any:
            x_t = torch.as_tensor(z).view(x.shape)
            x0 = self.denoise(x_t, math.cos(angle), math.sin(angle))
            eps = (x_t - math.cos(angle) * x0) / math.sin(angle)
            return (math.cos(angle) * eps - math.sin(angle) * x0).flatten().numpy()

        start = (x.double() / math.hypot(alpha, sigma)).flatten().numpy()
        # Below the last angle data and noised data differ by less than the solver's error.
        solved = solve_ivp(slope, (math.atan2(sigma, alpha), 1e-6), start, method="DOP853", rtol=1e-9, atol=1e-9)
        return self.denoise(torch.from_numpy(solved.y[:, -1]).view(x.shape), math.cos(1e-6), math.sin(1e-6))

    def _joint(self, x: Tensor) -> Tensor:
        """log of weight times density of each component at x (N, D): (N, K)."""
        distance = ((x.double()[:, None] - self.means) / self.stds).square().sum(2)
        volume = (self.stds.log() + math.log(2 * math.pi) / 2).sum(1)
        return self.weights.log() - volume - distance / 2
