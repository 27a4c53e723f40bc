"""Metrics of features, each compared with a second implementation."""

import math
from functools import reduce

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from src.metrics import kernels, neighbors
from src.metrics.confidence import mean_of, median_of, metric_name
from src.metrics.frechet import Moments, frechet, frechet_distance, frechet_linear
from src.metrics.kernels import energy_distance, kid, mmd
from src.metrics.neighbors import manifolds, nearest_neighbors


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global sqrtm, linear_sum_assignment, scipy_energy, NearestNeighbors, maximum_mean_discrepancy, poly_mmd
    global inception_score, total_variation, memorization_metrics, sliced_wasserstein
    from scipy.linalg import sqrtm
    from scipy.optimize import linear_sum_assignment
    from scipy.stats import energy_distance as scipy_energy
    from sklearn.neighbors import NearestNeighbors
    from torchmetrics.image.kid import maximum_mean_discrepancy, poly_mmd

    from src.metrics.measure import inception_score, memorization_metrics, sliced_wasserstein, total_variation


def normal(n: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Return (n, width) correlated normal features."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(width, dtype=torch.float64) + 0.3 * torch.randn(width, width, generator=generator).double()
    return shift + scale * torch.randn(n, width, generator=generator, dtype=torch.float64) @ mixing


X, Y = normal(300, 6, 0), normal(250, 6, 1, scale=1.3, shift=0.4)

STATISTICS = {
    "frechet": lambda x, y: frechet(x, Moments.of(y)),
    "frechet_linear": lambda x, y: frechet_linear(x, Moments.of(y)),
    "kid": kid,
    "mmd": mmd,
    "energy": energy_distance,
    "sliced": lambda x, y: sliced_wasserstein(x, y, seed=0, directions=8),
    "coverage": lambda x, y: manifolds(x, y).coverage,
    "recall": lambda x, y: manifolds(x, y).recall,
    "mean": lambda x, y: mean_of(x[:, 0]),
    "median": lambda x, y: median_of(x[:, 0]),
    "score": lambda x, y: inception_score(x.softmax(1), splits=1),
    "variation": lambda x, y: total_variation(x.argmax(1), y.argmax(1).bincount(minlength=x.shape[1])),
}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(neighbors, "CHUNK", 1000)


@pytest.mark.parametrize(("n", "expected"), [(10_000, "fid_10k"), (1797, "fid_1797"), (1000, "fid_1k"), (0, "fid_0")])
def test_metric_name_ends_with_sample_count(n, expected):
    assert metric_name("fid", n) == expected


# Moments and the Fréchet distance


def test_merged_moments_equal_numpy():
    """Compute at once, stream in batches, and merge three parts in another order."""
    x = (1e3 + X).numpy()
    batches = [Moments.of(part) for part in torch.from_numpy(x).split(37)]
    first, second, third = (Moments.of(part) for part in torch.from_numpy(x).split([5, 200, 95]))
    for moments in (Moments.of(torch.from_numpy(x)), reduce(Moments.merge, batches), third.merge(first).merge(second)):
        assert moments.number == len(x)
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-10)
        np.testing.assert_allclose(moments.covariance, np.cov(x.T), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "width"), [(300, 6), (40, 64)])  # singular covariances
def test_frechet_distance_equals_scipy(n, width):
    x, y = normal(n, width, 0), normal(n - 5, width, 1, scale=1.2, shift=0.1)
    c1, c2 = np.cov(x.numpy().T), np.cov(y.numpy().T)
    if n < width:  # scipy's root of a singular product is inaccurate
        cross = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real.sum()
    else:
        cross = np.trace(sqrtm(c1 @ c2).real)
    expected = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(c1) + np.trace(c2) - 2 * cross
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-6)
    assert frechet(x, Moments.of(y)).value == pytest.approx(expected, rel=1e-6)
    assert frechet_linear(x, Moments.of(y)).value == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_equal_and_shifted_sets():
    assert frechet_distance(Moments.of(X), Moments.of(X)) < 1e-12
    assert frechet_distance(Moments.of(X + 2), Moments.of(X)) == pytest.approx(4 * 6, rel=1e-12)


@pytest.mark.parametrize("width", [6, 40])
def test_linear_frechet_has_the_exact_slope(width):
    """Compare finite differences in one count; 40 features of 30 samples have a singular covariance."""
    x, y = normal(30, width, 0), Moments.of(normal(400, width, 1, shift=0.5))
    step = 1e-5
    more = torch.ones(4, 30, dtype=torch.float64) + step * torch.eye(30, dtype=torch.float64)[:4]
    less = 2 - more
    exact, linear = frechet(x, y), frechet_linear(x, y)
    # The exact covariance divides by n - 1, the influence function by n.
    assert_close(linear.of(more) - linear.of(less), exact.of(more) - exact.of(less), rtol=0.1, atol=0.1 * step)


# Kernels


def test_kid_equals_a_loop_and_torchmetrics(small_chunks):
    def k(a, b):
        return (float(a @ b) / 6 + 1) ** 3

    x, y = X[:40], Y[:30]
    among_x = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (40 * 39)
    among_y = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (30 * 29)
    across = sum(k(a, b) for a in x for b in y) / (40 * 30)
    assert kid(x, y).value == pytest.approx(among_x + among_y - 2 * across, rel=1e-12)
    same = slice(0, 250)  # torchmetrics needs equal numbers
    z = [kernels.cubic(a, b) for a, b in ((X[same], X[same]), (X[same], Y), (Y, Y))]
    assert kid(X[same], Y).value == pytest.approx(maximum_mean_discrepancy(*z).item(), rel=1e-10)
    assert kid(X[same], Y).value == pytest.approx(poly_mmd(X[same], Y).item(), rel=1e-10)


def test_mmd_equals_a_loop(small_chunks):
    x, y = X[:30], Y[:20]
    apart = sorted(math.dist(a, b) for i, a in enumerate(y) for b in y[:i])
    width = apart[(len(apart) - 1) // 2]

    def k(a, b):
        return math.exp(-(math.dist(a, b) ** 2) / (2 * width**2))

    among_x = np.mean([k(a, b) for i, a in enumerate(x) for b in x[:i]])
    among_y = np.mean([k(a, b) for i, a in enumerate(y) for b in y[:i]])
    across = np.mean([k(a, b) for a in x for b in y])
    assert mmd(x, y).value == pytest.approx(among_x + among_y - 2 * across, rel=1e-10)


def test_energy_distance_equals_scipy_in_one_dimension(small_chunks):
    x, y = X[:, :1], Y[:, :1]
    assert energy_distance(x, y).value == pytest.approx(scipy_energy(x[:, 0], y[:, 0]) ** 2, rel=1e-9)
    assert energy_distance(x, x).value == pytest.approx(0, abs=1e-12)


def test_energy_distance_equals_the_double_sum():
    def mean(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=2).mean()

    x, y = X.numpy(), Y.numpy()
    assert energy_distance(X, Y).value == pytest.approx(2 * mean(x, y) - mean(x, x) - mean(y, y), rel=1e-10)


# Transport


@pytest.mark.parametrize(("n", "m"), [(30, 30), (30, 20), (1, 7), (24, 25)])
def test_sliced_wasserstein_equals_the_optimal_assignment(n, m):
    """Repeat each point to equal numbers in one dimension, then solve the assignment."""
    x, y = X[:n, :1], Y[:m, :1]
    many = math.lcm(n, m)
    cost = (x.repeat(many // n, 1) - y.repeat(many // m, 1).T).square().numpy()
    expected = math.sqrt(cost[linear_sum_assignment(cost)].mean())
    assert sliced_wasserstein(x, y, seed=0).value == pytest.approx(expected, rel=1e-10)


def test_sliced_wasserstein_of_a_shift():
    """A shift s in D dimensions has the mean square |s|^2 / D along a random direction."""
    shift = torch.tensor([3.0, 0, 0, 4, 0, 0], dtype=torch.float64)
    assert sliced_wasserstein(X + shift, X, seed=0, directions=4000).value == pytest.approx(5 / 6**0.5, rel=0.05)
    assert sliced_wasserstein(X, X, seed=0).value == 0


# Neighbors


def test_manifold_metrics_equal_brute_force(small_chunks):
    k = 5
    real, fake = Y.numpy(), (0.8 * X + 0.3).numpy()

    def balls(z):
        return NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(z).kneighbors(z)[0][:, k]

    apart = np.linalg.norm(fake[:, None] - real[None], axis=2)
    inside = apart <= balls(real)
    found = manifolds(torch.from_numpy(fake), torch.from_numpy(real), k)
    exactly = pytest.approx
    reached = apart <= balls(fake)[:, None]
    assert found.precision.value == exactly(inside.any(1).mean(), abs=1e-12)
    assert found.density.value == exactly(inside.sum(1).mean() / k, abs=1e-12)
    assert found.coverage.value == exactly(inside.any(0).mean(), abs=1e-12)
    assert found.recall.value == exactly(reached.any(0).mean(), abs=1e-12)
    without = torch.ones(1, 300, dtype=torch.float64)
    for i in range(0, 300, 10):
        without.fill_(1)[0, i] = 0
        assert found.coverage.of(without).item() == exactly(np.delete(inside, i, 0).any(0).mean(), abs=1e-12)
        assert found.recall.of(without).item() == exactly(np.delete(reached, i, 0).any(0).mean(), abs=1e-12)
    assert 0.1 < found.recall.value < 0.9  # not degenerate


def test_nearest_neighbors_equal_scikit_learn(small_chunks):
    expected, which = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(Y).kneighbors(X)
    found, indices = nearest_neighbors(X, Y)
    np.testing.assert_allclose(found, expected[:, 0], rtol=1e-10)
    np.testing.assert_array_equal(indices, which[:, 0])


def test_copies_far_from_the_origin_have_distance_zero():
    far = X.float() + 1e4
    assert nearest_neighbors(far[:50], far)[0].eq(0).all()


def test_partial_samples_have_precision_without_coverage():
    real = normal(400, 2, 3)
    half = real[real[:, 0] > 0][::2] + 1e-3
    found = manifolds(half, real)
    assert found.precision.value == 1
    assert found.recall.value < 0.6
    assert found.coverage.value < 0.6


# Classes


def test_inception_score_equals_numpy():
    p = X.softmax(1)
    p[0] = torch.tensor([1.0, 0, 0, 0, 0, 0])
    scores = []
    for part in np.split(p.numpy(), 10):
        marginal = part.mean(0)
        divergence = np.where(part > 0, part * np.log(np.where(part > 0, part, 1) / marginal), 0).sum(1)
        scores.append(np.exp(divergence.mean()))
    assert inception_score(p, splits=10).value == pytest.approx(np.mean(scores), rel=1e-12)


def test_inception_score_range():
    assert inception_score(torch.eye(10).repeat(5, 1), splits=5).value == pytest.approx(10)
    assert inception_score(torch.full((50, 10), 0.1)).value == pytest.approx(1)


def test_total_variation_equals_a_worked_example():
    labels, reference = torch.tensor([0, 0, 1, 3]), torch.tensor([10, 10, 10, 10])
    assert total_variation(labels, reference).value == pytest.approx(0.25)


# Bootstrap


@pytest.mark.parametrize("metric", [m for m in STATISTICS if m not in ("frechet_linear", "coverage", "recall")])
def test_counts_equal_repeated_samples(metric):
    """They differ only in the pairs of a sample with itself."""
    drawn = torch.randint(len(X), (2, len(X)), generator=torch.Generator().manual_seed(0))
    counts = torch.stack([row.bincount(minlength=len(X)) for row in drawn]).double()
    got = STATISTICS[metric](X, Y).of(counts)
    for value, row in zip(got, counts, strict=True):
        repeated = X.repeat_interleave(row.long(), dim=0)
        expected = STATISTICS[metric](repeated, Y).value
        if metric in ("kid", "mmd"):  # unbiased: pairs of a sample with its repetitions are excluded
            assert abs(value - expected) < 0.2 * abs(expected) + 0.2
            pairs = torch.outer(row, row).fill_diagonal_(0)
            kernel = (
                kernels.cubic if metric == "kid" else lambda a, b: kernels.gaussian(a, b, kernels.median_distance(Y))
            )
            among = (kernel(X, X) * pairs).sum() / pairs.sum()
            among_y = kernel(Y, Y).fill_diagonal_(0).sum() / (250 * 249)
            expected = (among + among_y - 2 * kernel(repeated, Y).mean()).item()
        assert value.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("metric", STATISTICS)
def test_bootstrap_is_seeded_and_contains_the_value(metric):
    statistic = STATISTICS[metric](X, Y)
    result = statistic.bootstrap(seed=3, replicates=50)
    assert result == statistic.bootstrap(seed=3, replicates=50)
    assert result != statistic.bootstrap(seed=4, replicates=50)
    assert result.low <= result.value <= result.high
    assert result.value == pytest.approx(statistic.value, rel=1e-12)


def test_interval_of_a_mean_matches_its_standard_error():
    x = normal(2000, 1, 0)[:, 0]
    value, low, high = mean_of(x).bootstrap(seed=0, replicates=2000)
    error = 1.96 * x.std().item() / math.sqrt(len(x))
    assert high - value == pytest.approx(error, rel=0.1)
    assert value - low == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("metric", ["frechet", "frechet_linear", "energy", "kid", "sliced", "coverage", "recall"])
def test_intervals_have_nominal_coverage(metric):
    """90% of 200 intervals contain the expectation for 50 samples, within four standard errors."""
    reference = normal(400, 2, 100, shift=0.7)
    generator = torch.Generator().manual_seed(5)
    sets = [torch.randn(50, 2, generator=generator, dtype=torch.float64) for _ in range(200)]
    statistics = [STATISTICS[metric](x, reference) for x in sets]
    truth = np.mean([statistic.value for statistic in statistics])
    intervals = [statistic.bootstrap(seed, replicates=40, confidence=0.9) for seed, statistic in enumerate(statistics)]
    covered = np.mean([each.low <= truth <= each.high for each in intervals])
    assert covered > 0.9 - 4 * math.sqrt(0.9 * 0.1 / 200)
    assert covered < 0.9 + 4 * math.sqrt(0.9 * 0.1 / 200) or metric in ("coverage", "recall")  # too wide by design


def test_linear_interval_approximates_resampling():
    x, y = normal(400, 8, 0, shift=0.3), Moments.of(normal(1000, 8, 1))
    exact, linear = frechet(x, y).bootstrap(seed=0), frechet_linear(x, y).bootstrap(seed=0)
    assert linear.value == pytest.approx(exact.value, rel=1e-12)
    assert linear.high - linear.low == pytest.approx(exact.high - exact.low, rel=0.15)


# Memorization


def test_memorization_is_relative_to_new_data():
    """New data have ratio 1 and 5% copies; copies have 0 and 100%; a mixture is in between."""
    pool = torch.randn(1800, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    train, val, new = pool.split(600)

    def memorization(samples):
        distances, of_val = (nearest_neighbors(x, train).distances for x in (samples, val))
        return [metric.value for metric in memorization_metrics("pixels", distances, of_val, seed=0).values()]

    ratio, copies = memorization(new)
    assert ratio == pytest.approx(1, abs=0.1) and copies == pytest.approx(0.05, abs=0.03)
    assert memorization(val)[1] == pytest.approx(0.05, abs=1 / 600)
    assert memorization(train[[5, 7, 7]]) == [0, 1]
    assert memorization(torch.cat([new[:300], train[:300]]))[1] == pytest.approx(0.5 + copies / 2, abs=0.03)


def test_copies_among_validation_data_raise():
    with pytest.raises(ValueError, match="remove duplicates"):
        memorization_metrics("pixels", torch.ones(5), torch.zeros(5), seed=0)
