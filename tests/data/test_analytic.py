"""Gaussian mixtures: density, score, ideal denoiser and flow at every noise level."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.loops import for_each


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global PLANE, LINE, GAUSSIAN
    global quad, trapezoid, kstest, multivariate_normal, norm, GaussianMixture
    from scipy.integrate import quad, trapezoid
    from scipy.stats import kstest, multivariate_normal, norm

    from src.data.analytic import GaussianMixture

    PLANE = GaussianMixture([3, 1, 2], [[0, 0], [1.5, -0.5], [-1, 1]], [[0.3, 0.5], [0.5, 0.5], [0.8, 0.2]])
    LINE = GaussianMixture([1, 3], [[-1], [0.7]], [0.2, 0.5])
    GAUSSIAN = GaussianMixture([2], [[0.3, -0.2, 1.0]], [[0.9, 0.2, 0.5]])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def density(mixture: GaussianMixture, x: np.ndarray) -> np.ndarray:
    """Return the mixture's density at x (N, D), from scipy."""
    terms = zip(mixture.weights.tolist(), mixture.means.numpy(), mixture.stds.numpy(), strict=True)
    return sum(w * multivariate_normal(m, np.diag(s**2)).pdf(x) for w, m, s in terms)


def test_density_is_the_weighted_sum_of_gaussians():
    """log_prob against scipy's normal densities, weighted and summed."""
    x = 2 * torch.randn(200, 2, generator=seeded(), dtype=torch.float64)
    assert_close(PLANE.log_prob(x).numpy(), np.log(density(PLANE, x.numpy())), rtol=1e-10, atol=1e-10)


def test_mixture_density_integrates_to_one():
    """By the trapezoid rule, which is accurate for smooth densities that vanish at the ends."""
    axis = torch.linspace(-6, 6, 301, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).view(-1, 2)
    total = PLANE.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(1, abs=1e-6)


@for_each("mixture", lambda: {"plane": PLANE, "line": LINE, "noised": PLANE.noised(0.4, 0.9)})
def test_score_is_the_gradient_of_log_prob(mixture):
    x = 2 * torch.randn(100, mixture.means.shape[1], generator=seeded(), dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    assert_close(mixture.score(x.detach()), gradient, rtol=1e-9, atol=1e-9)


def test_far_points_have_finite_density_and_score():
    """Logarithms stay finite where densities underflow; the component with the largest std dominates."""
    far = torch.tensor([[1000.0, 0.0]], dtype=torch.float64)
    assert PLANE.log_prob(far).isfinite().all()
    widest = (-1 - 1000) / 0.8**2  # fewest standard deviations away
    assert PLANE.score(far)[0, 0] == pytest.approx(widest, rel=1e-9)


def test_mixture_samples_have_its_mean_and_covariance():
    """Mean sum w m; covariance sum w (s^2 I + m m^T) - mean mean^T; within 5 standard errors of n draws."""
    n = 40_000
    w, m, s = (t.numpy() for t in (PLANE.weights, PLANE.means, PLANE.stds))
    mean = w @ m
    covariance = sum(w[k] * (np.diag(s[k] ** 2) + np.outer(m[k], m[k])) for k in range(3)) - np.outer(mean, mean)
    x = PLANE(n, seeded())
    assert x.dtype == torch.float32
    found = x.double().numpy()
    assert (np.abs(found.mean(0) - mean) < 5 * np.sqrt(np.diag(covariance) / n)).all()
    centered = found - mean
    products = centered[:, :, None] * centered[:, None]
    assert (np.abs(products.mean(0) - covariance) < 5 * products.std(0) / math.sqrt(n)).all()


def test_mixture_samples_follow_its_density():
    """Samples against the numerically integrated density."""
    axis = np.linspace(-5, 5, 4001)
    cumulative = np.cumsum(density(LINE, axis[:, None])) * (axis[1] - axis[0])
    x = LINE(4000, seeded()).double().numpy()[:, 0]
    assert kstest(x, lambda q: np.interp(q, axis, cumulative)).pvalue > 1e-3


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.0), (0.9, 0.3), (0.3, 0.95), (0.0, 1.0), (1.0, 5.0)])
def test_noised_mixture_is_the_convolution(alpha, sigma):
    """p_t(y) = integral of p(x) N(y; alpha x, sigma^2) dx, by the trapezoid rule; alpha^2 + sigma^2 need not be 1."""
    y = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
    expected = density(LINE, y.numpy())
    if sigma > 0:
        x = np.linspace(-6, 6, 6001)
        kernel = np.exp(-((y.numpy() - alpha * x) ** 2) / (2 * sigma**2)) / math.sqrt(2 * math.pi * sigma**2)
        expected = trapezoid(kernel * density(LINE, x[:, None]), x, axis=1)
    assert_close(LINE.noised(alpha, sigma).log_prob(y).exp().numpy(), expected, rtol=1e-7, atol=1e-10)


def test_noised_samples_are_noised_data():
    """alpha x + sigma eps of samples x has the noised mixture's mean and covariance, within 5 standard errors."""
    n, alpha, sigma = 40_000, 0.6, 0.8
    x_t = alpha * PLANE(n, seeded()).double() + sigma * torch.randn(n, 2, generator=seeded(1), dtype=torch.float64)
    other = PLANE.noised(alpha, sigma)(n, seeded(2)).double()
    spread = torch.cat([x_t, other]).std(0)
    assert ((x_t.mean(0) - other.mean(0)).abs() < 5 * spread * math.sqrt(2 / n)).all()
    products = [a[:, 0] * a[:, 1] for a in (x_t, other)]
    assert abs(products[0].mean() - products[1].mean()) < 5 * math.sqrt(sum(float(p.var()) for p in products) / n)
    squares = [a.square() for a in (x_t, other)]
    error = ((squares[0].var(0) + squares[1].var(0)) / n).sqrt()
    assert ((squares[0].mean(0) - squares[1].mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize(("alpha", "sigma"), [(0.99, 0.1), (0.6, 0.8), (0.1, 0.99), (1.0, 3.0)])
def test_tweedie_gives_the_posterior_mean(alpha, sigma):
    """(y + sigma^2 score) / alpha is E[x | y], integrated over x by the trapezoid rule."""
    y = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    x = np.linspace(-6, 6, 12_001)
    weight = np.exp(-((y.numpy() - alpha * x) ** 2) / (2 * sigma**2)) * density(LINE, x[:, None])
    expected = trapezoid(x * weight, x, axis=1) / trapezoid(weight, x, axis=1)
    tweedie = (y + sigma**2 * LINE.noised(alpha, sigma).score(y)) / alpha
    assert_close(tweedie[:, 0].numpy(), expected, rtol=1e-6, atol=1e-8)
    assert_close(LINE.denoise(y, alpha, sigma)[:, 0].numpy(), expected, rtol=1e-6, atol=1e-8)


def test_weights_are_normalized():
    """Scaling all weights changes nothing."""
    x = torch.randn(9, 1, generator=seeded())
    scaled = GaussianMixture([10, 30], LINE.means.tolist(), LINE.stds.tolist())
    assert_close(scaled.log_prob(x), LINE.log_prob(x))
    assert float(LINE.weights.sum()) == pytest.approx(1)


def test_denoising_pure_noise_gives_the_mean():
    """At alpha = 0 the ideal denoiser returns the mean, at sigma = 0 its input."""
    x = torch.randn(5, 2, generator=seeded(), dtype=torch.float64)
    assert_close(PLANE.denoise(x, 0.0, 1.0), (PLANE.weights @ PLANE.means).expand(5, 2))
    assert_close(PLANE.denoise(x, 1.0, 0.0), x)


def test_moments_are_those_of_many_samples():
    mean, covariance = PLANE.moments()
    x = PLANE(200_000, seeded()).double()
    assert_close(mean, x.mean(0), rtol=0, atol=0.01)
    assert_close(covariance, torch.cov(x.T), rtol=0, atol=0.01)


def test_entropy_is_exact_or_estimated():
    """Against the numerically integrated entropy."""
    axes = zip(GAUSSIAN.means[0].tolist(), GAUSSIAN.stds[0].tolist(), strict=True)
    assert GAUSSIAN.entropy() == pytest.approx(sum(norm(m, s).entropy() for m, s in axes), rel=1e-12)

    def integrand(x: float) -> float:
        p = density(LINE, np.array([[x]])).item()
        return -p * math.log(p)

    exact, _ = quad(integrand, -4, 5, points=[-1, 0.7], limit=200)
    # The standard deviation of -log p over a million samples is below 1.
    assert LINE.entropy() == pytest.approx(exact, abs=0.005)


@for_each("distribution", lambda: {"gaussian": GAUSSIAN, "plane": PLANE, "line": LINE})
def test_flow_preserves_the_distribution(distribution):
    x = distribution(50, seeded()).double()
    assert_close(distribution.flow(x, 1.0, 1e-4), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.6, 0.8), (0.02, math.sqrt(1 - 0.02**2)), (1.0, 7.0), (0.3, 0.7)])
def test_flow_on_a_line_preserves_order(alpha, sigma):
    """In one dimension the flow is the monotone map between the two distributions: equal quantiles."""
    q = np.linspace(0.02, 0.98, 25)

    def quantiles(mixture: GaussianMixture) -> torch.Tensor:
        x = np.linspace(-60, 60, 600_001)
        parts = zip(mixture.weights.tolist(), mixture.means[:, 0].tolist(), mixture.stds[:, 0].tolist(), strict=True)
        return torch.from_numpy(np.interp(q, sum(w * norm(m, s).cdf(x) for w, m, s in parts), x))[:, None]

    # The quantiles are interpolated on a grid of 2e-4; rare between the two components, where the density is small.
    assert_close(LINE.flow(quantiles(LINE.noised(alpha, sigma)), alpha, sigma), quantiles(LINE), rtol=0, atol=1e-5)


def test_flow_of_a_gaussian_agrees_with_the_solver():
    """Two equal components are one Gaussian, but use the solver."""
    twice = GaussianMixture([1, 1], GAUSSIAN.means.tolist() * 2, GAUSSIAN.stds.tolist() * 2)
    x = torch.randn(6, 3, generator=seeded(), dtype=torch.float64)
    assert_close(twice.flow(x, 0.2, 0.9), GAUSSIAN.flow(x, 0.2, 0.9), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [[0, 0], [1, 1]], [1, 1]), "equal lengths, got 1, 2, 2"),
        (([1, 1], [[0, 0], [1, 1]], [1]), "equal lengths, got 2, 2, 1"),
        (([1, 0], [[0, 0], [1, 1]], [1, 1]), "must be positive"),
        (([1, 1], [[0, 0], [1, 1]], [1, -0.5]), "must be positive"),
    ],
)
def test_invalid_mixtures_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)
