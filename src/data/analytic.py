"""Gaussian mixtures in any dimension, whose density, score and ideal denoiser are known at every noise level.

Entropy and probability flow have closed forms for a single Gaussian; for a mixture they are computed numerically in
float64.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from src.data.sources import Labels


class GaussianMixture:
    """A mixture with weights (K,), means (K, D) and standard deviations (K,) or, along each axis, (K, D).

    Calling it with (n, generator) draws (n, D) float32 samples. Everything else is float64.
    """

    def __init__(
        self,
        weights: Sequence[float],
        means: Sequence[Sequence[float]],
        stds: Sequence[float] | Sequence[Sequence[float]],
    ) -> None:
        if not len(weights) == len(means) == len(stds):
            raise ValueError(
                f"weights, means and stds of a mixture must have equal lengths, got {len(weights)}, {len(means)}, "
                f"{len(stds)}; see conf/data/mixture.yaml"
            )
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.means = torch.tensor(means, dtype=torch.float64)
        std = torch.tensor(stds, dtype=torch.float64)
        if min(self.weights.min(), std.min()) <= 0:
            raise ValueError(f"weights={list(weights)} and stds={list(stds)} of a mixture must be positive")
        self.weights /= self.weights.sum()
        self.stds = (std if std.ndim == 2 else std[:, None]).expand_as(self.means)

    def __call__(self, n: int, generator: torch.Generator) -> Tensor:
        return self.draw(n, generator)[0]

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Labels]:
        """Draw (n, D) float32 samples, with their components as classes."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        points = (self.means[component] + self.stds[component] * noise).float()
        return points, Labels(component, [f"component {k + 1}" for k in range(len(self.means))])

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the natural logarithm (N,) of the density at x (N, D)."""
        return self._joint(x).logsumexp(1)

    def score(self, x: Tensor) -> Tensor:
        """Return the gradient (N, D) of `log_prob` at x (N, D)."""
        to_means = (self.means - x.double()[:, None]) / self.stds.square()  # (N, K, D)
        return (self._joint(x).softmax(1)[..., None] * to_means).sum(1)

    def noised(self, alpha: float, sigma: float) -> "GaussianMixture":
        """Return the distribution of alpha x + sigma eps."""
        stds = (alpha**2 * self.stds.square() + sigma**2).sqrt()
        return GaussianMixture(self.weights.tolist(), (alpha * self.means).tolist(), stds.tolist())

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """Return E[x_0 | alpha x_0 + sigma eps = x] (N, D) for x (N, D), the ideal prediction."""
        noised = self.noised(alpha, sigma)
        gain = alpha * self.stds.square() / noised.stds.square()
        means = self.means + gain * (x.double()[:, None] - noised.means)  # (N, K, D)
        return (noised._joint(x).softmax(1)[..., None] * means).sum(1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean (D,) and covariance (D, D)."""
        mean = self.weights @ self.means
        offsets = self.means - mean
        within = torch.diag(self.weights @ self.stds.square())
        return mean, within + (self.weights[:, None] * offsets).T @ offsets

    def entropy(self, n: int = 1_000_000, seed: int = 0) -> float:
        """Return the differential entropy in nats: exact for a single Gaussian, else the mean over n samples."""
        if len(self.weights) == 1:
            return (self.stds.log() + (1 + math.log(2 * math.pi)) / 2).sum().item()
        return -self.log_prob(self(n, torch.Generator().manual_seed(seed))).mean().item()

    def flow(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """Return the clean data (N, D) at the end of the probability flow from x (N, D) at a noise level.

        For a Gaussian, the flow preserves the number of standard deviations from the mean. A mixture uses an adaptive
        solver of order 8 with tolerance 1e-9, in z = x / sqrt(alpha^2 + sigma^2) over the angle atan(sigma / alpha).
        """
        noised = self.noised(alpha, sigma)
        if len(self.weights) == 1:
            return self.means + self.stds / noised.stds * (x.double() - noised.means)
        from scipy.integrate import solve_ivp

        def slope(angle: float, z: Any) -> Any:
            x_t = torch.as_tensor(z).view(x.shape)
            x0 = self.denoise(x_t, math.cos(angle), math.sin(angle))
            eps = (x_t - math.cos(angle) * x0) / math.sin(angle)
            return (math.cos(angle) * eps - math.sin(angle) * x0).flatten().numpy()

        start = (x.double() / math.hypot(alpha, sigma)).flatten().numpy()
        # Below 1e-6 data and noised data differ by less than the solver's error.
        solved = solve_ivp(slope, (math.atan2(sigma, alpha), 1e-6), start, method="DOP853", rtol=1e-9, atol=1e-9)
        return self.denoise(torch.from_numpy(solved.y[:, -1]).view(x.shape), math.cos(1e-6), math.sin(1e-6))

    def _joint(self, x: Tensor) -> Tensor:
        """Return the logarithm (N, K) of weight times density of each component at x (N, D)."""
        distance = ((x.double()[:, None] - self.means) / self.stds).square().sum(2)
        volume = (self.stds.log() + math.log(2 * math.pi) / 2).sum(1)
        return self.weights.log() - volume - distance / 2
