"""Likelihood against scipy, and the variational bound where its exact value is known."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from src.diffusion import curves, losses, schedules
from src.diffusion.gaussian_diffusion import Gaussian, GaussianDiffusion, Prediction
from src.diffusion.likelihood import (
    decoder_log_prob,
    discretized_gaussian_log_prob,
    flow_slope,
    gaussian_kl,
    gaussian_log_prob,
    log_ndtr,
    prior_bits,
    transition_bits,
)
from src.diffusion.noise import ContinuousSchedule, NoiseLevel, NoiseSchedule, Transition
from tests.loops import for_each


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow packages only when tests run, not when they are collected."""
    global quad, binom, norm
    from scipy.integrate import quad
    from scipy.stats import binom, norm


TARGETS = ["eps", "x0", "v", "edm", "velocity"]
SHAPES = [(3, 2), (3, 2, 4, 4)]
STEPS = 50
# 100 worms by the number of their teeth, 0 to 10.
WORMS = [2, 3, 5, 14, 16, 15, 12, 8, 10, 8, 7]

TABLES = {
    "linear": NoiseSchedule(schedules.linear(STEPS)),
    "linear_1000": NoiseSchedule(schedules.linear(1000)),
    "cosine": NoiseSchedule(schedules.cosine(STEPS)),
}
ZERO_TERMINAL = NoiseSchedule(schedules.zero_terminal_snr(schedules.linear(STEPS)))
CURVES = {
    f"continuous_{curve.__name__}": ContinuousSchedule(curve, STEPS)
    for curve in (curves.cosine_log_snr, curves.linear_log_snr, curves.exploding, curves.rectified_flow)
}
# eps does not determine x_0 at zero SNR, where rectified flow ends too.
CHAINS = {
    f"{name}-{target}": (schedule, target)
    for name, schedule in {**TABLES, **CURVES, "zero_terminal": ZERO_TERMINAL}.items()
    for target in TARGETS
    if not (name in ("zero_terminal", "continuous_rectified_flow") and target == "eps")
}

every_shape = for_each("shape", SHAPES)
every_num_values = for_each("num_values", [2, 17, 256])


def normal(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scalar(x):
    return torch.tensor(x, dtype=torch.float64)


def gaussian(mean, std):
    return Gaussian(scalar(mean), scalar(std).log() * 2)


# Divergences and densities


@for_each("q", [(0.0, 1.0), (0.5, 0.3), (-2.0, 4.0)])
@for_each("p", [(0.0, 1.0), (0.7, 0.25), (-1.0, 2.0)])
def test_gaussian_kl_equals_its_integral(p, q):
    """The integrand p log(p / q) is below 1e-28 beyond 12 standard deviations of p."""
    (mean, std), (other_mean, other_deviation) = p, q

    def integrand(x):
        return norm.pdf(x, mean, std) * (norm.logpdf(x, mean, std) - norm.logpdf(x, other_mean, other_deviation))

    integral, _ = quad(integrand, mean - 12 * std, mean + 12 * std, epsabs=1e-12, epsrel=1e-12, limit=200)
    assert_close(gaussian_kl(gaussian(*p), gaussian(*q)), scalar(integral), rtol=1e-9, atol=1e-12)


@every_shape
def test_gaussian_kl_is_elementwise(shape):
    """Against torch.distributions, also with a broadcast log-variance."""
    p = Gaussian(normal(shape, 0), normal(shape, 1))
    q = Gaussian(normal(shape, 2), scalar(0.3))
    expected = kl_divergence(Normal(p.mean, (p.log_variance / 2).exp()), Normal(q.mean, math.exp(0.15)))
    assert_close(gaussian_kl(p, q), expected, rtol=1e-10, atol=0)
    assert (gaussian_kl(p, q) > 0).all()
    assert_close(gaussian_kl(p, p), torch.zeros(shape, dtype=torch.float64), rtol=0, atol=0)


@for_each("mean, std", [(0.0, 1.0), (-3.0, 0.01), (2.0, 50.0)])
def test_gaussian_log_prob_integrates_to_one(mean, std):
    q = gaussian(mean, std)
    total, _ = quad(lambda x: math.exp(gaussian_log_prob(scalar(x), q)), mean - 12 * std, mean + 12 * std, epsrel=1e-10)
    assert abs(total - 1) < 1e-9


# The decoder


def values(num_values):
    return torch.linspace(-1, 1, num_values, dtype=torch.float64)


MEANS = [-30.0, -1.5, -1.0, -0.99, -0.3, 0.0, 1 / 255, 0.5, 1.0, 1.001, 3.0]
DEVIATIONS = [1e-3, 1e-2, 0.1, 0.5, 1.0, 20.0]


def bins_by_scipy(x, mean, std, num_values):
    """Return differences of tails, on the side where they are small."""
    half = 1 / (num_values - 1)
    lower = np.where(np.isclose(x, -1), -np.inf, (x - half - mean) / std)
    upper = np.where(np.isclose(x, 1), np.inf, (x + half - mean) / std)
    return np.where(lower + upper > 0, norm.sf(lower) - norm.sf(upper), norm.cdf(upper) - norm.cdf(lower))


@for_each("dtype", [torch.float64, torch.float32])
@for_each("std", DEVIATIONS)
@every_num_values
def test_bin_probabilities_sum_to_one(num_values, std, dtype):
    """For means inside of, outside of and at the edges of [-1, 1]."""
    means = torch.tensor(MEANS, dtype=dtype)[:, None]
    q = Gaussian(means, torch.tensor(std, dtype=dtype).log() * 2)
    total = discretized_gaussian_log_prob(values(num_values).to(dtype), q, num_values).exp().sum(1)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert_close(total, torch.ones_like(total), rtol=0, atol=tolerance)


@for_each("std", DEVIATIONS)
@for_each("mean", MEANS)
@every_num_values
def test_bins_are_differences_of_the_normal_cdf(num_values, mean, std):
    """Against scipy, where its probabilities do not underflow."""
    x = values(num_values)
    ours = discretized_gaussian_log_prob(x, gaussian(mean, std), num_values).numpy()
    theirs = bins_by_scipy(x.numpy(), mean, std, num_values)
    seen = theirs > 1e-290
    assert seen.any() or abs(mean) > 1
    np.testing.assert_allclose(ours[seen], np.log(theirs[seen]), rtol=1e-9, atol=1e-11)
    assert (ours[~seen] < math.log(1e-289)).all()


@every_num_values
def test_outer_bins_extend_to_infinity(num_values):
    """-1 and 1 have all the mass beyond them."""
    half = 1 / (num_values - 1)
    first, last = values(num_values)[[0, -1]]
    for mean, std in [(-5.0, 1.0), (5.0, 0.1), (0.3, 2.0)]:
        q = gaussian(mean, std)
        below, above = (discretized_gaussian_log_prob(x, q, num_values) for x in (first, last))
        assert_close(below, scalar(norm.logcdf(-1 + half, mean, std)), rtol=1e-10, atol=1e-14)
        assert_close(above, scalar(norm.logsf(1 - half, mean, std)), rtol=1e-10, atol=1e-14)


@for_each("dtype", [torch.float64, torch.float32])
@for_each("distance", [0.0, 5.0, 40.0, 1000.0, 40_000.0])
@every_num_values
def test_far_tails_are_finite(num_values, distance, dtype):
    """Finite with finite gradients, which pull the mean toward the data."""
    for std in (1e-4, 1e-2, 1.0):
        for side in (-1, 1):
            x = values(num_values).to(dtype)
            mean = (x + side * distance * std).requires_grad_()
            log_variance = torch.full_like(x, 2 * math.log(std)).requires_grad_()
            log_prob = discretized_gaussian_log_prob(x, Gaussian(mean, log_variance), num_values)
            assert log_prob.isfinite().all()
            assert (log_prob <= 0).all()
            pull, widen = torch.autograd.grad(log_prob.sum(), (mean, log_variance))
            assert pull.isfinite().all()
            assert widen.isfinite().all()
            if distance >= 5 and distance * std > 4 / (num_values - 1):
                # Beyond the edge of an inner bin, smaller distances and larger variances are more likely.
                assert (side * pull[1:-1] < 0).all()
                assert (widen[1:-1] > 0).all()
                # log p decreases with the square of the distance to the edge, up to a small term at 5 std;
                # float32 rounds the edge by 1e-7.
                edge = distance * std - 1 / (num_values - 1)
                assert_close(
                    -side * pull[1:-1].double(),
                    torch.full_like(x, edge / std**2).double()[1:-1],
                    rtol=0.1,
                    atol=0,
                )


@for_each("dtype", [torch.float64, torch.float32])
def test_log_ndtr_gradient_is_accurate(dtype):
    """Against Mills' ratio as a continued fraction, to 1e6 standard deviations."""
    x = torch.cat([-torch.logspace(6, -2, 200), torch.linspace(0, 12, 50)]).to(dtype).requires_grad_()
    log_prob = log_ndtr(x)
    (slope,) = torch.autograd.grad(log_prob.sum(), x)
    at = x.detach().double()
    # In float32 the rounding of the exponent x^2 / 2, at most 72 on the right, is a relative error.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(log_prob.double(), torch.from_numpy(norm.logcdf(at.numpy())), rtol=tolerance, atol=0)
    far = at < -5
    fraction = -at[far]
    for k in range(60, 0, -1):  # density / tail = x + 1 / (x + 2 / (x + 3 / ...))
        fraction = -at[far] + k / fraction
    assert_close(slope[far].double(), fraction, rtol=tolerance, atol=0)
    near = at[~far].numpy()
    assert_close(slope[~far].double(), torch.from_numpy(norm.pdf(near) / norm.cdf(near)), rtol=tolerance, atol=0)


@every_shape
def test_decoder_depends_on_num_values(shape):
    """A bin for discrete data, else a density."""
    x = normal(shape, 3).sign()
    q = Gaussian(0.8 * x, scalar(-3.0))
    bins = discretized_gaussian_log_prob(x, q, 17)
    assert_close(decoder_log_prob(GaussianDiffusion(num_values=17), x, q), bins, rtol=0, atol=0)
    density = torch.from_numpy(norm.logpdf(x.numpy(), q.mean.numpy(), math.exp(-1.5)))
    assert_close(decoder_log_prob(GaussianDiffusion(), x, q), density, rtol=1e-12, atol=0)


# The bound


@pytest.mark.parametrize("schedule", [*TABLES.values(), *CURVES.values()], ids=[*TABLES, *CURVES])
@every_shape
def test_prior_is_the_kl_at_the_noisiest_level(shape, schedule):
    """Between N(alpha x_0, sigma^2) and N(0, alpha^2 + sigma^2)."""
    x0 = normal(shape, 4)
    alpha, sigma, _ = schedule.row(schedule.num_steps - 1)
    spread = 1.0 if schedule in TABLES.values() else math.hypot(alpha, sigma)
    nats = kl_divergence(Normal(alpha * x0, sigma), Normal(torch.zeros_like(x0), spread))
    expected = torch.stack([sample.mean() for sample in nats]) / math.log(2)
    # Terms of order 1 cancel.
    assert_close(prior_bits(schedule.row(schedule.num_steps - 1), x0), expected, rtol=1e-9, atol=1e-15)


@every_shape
def test_prior_is_zero_at_zero_snr(shape):
    noisiest = ZERO_TERMINAL.row(ZERO_TERMINAL.num_steps - 1)
    assert_close(prior_bits(noisiest, normal(shape, 5)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)


class GaussianData:
    """N(m, s^2 I) in D dimensions and all of its T transitions, in float64.

    Batches are (T, D, N). The N points have x_0 = m +- s and eps = +-1 in every combination of signs: their mean is the
    expectation of any quadratic function (Gauss-Hermite with two nodes), and all terms of the bound are quadratic.
    """

    def __init__(self, m, s, schedule):
        self.m, self.s = scalar(m)[:, None], s
        rows = [schedule.row(k) for k in range(-1, schedule.num_steps)]
        clean_to_noise = NoiseLevel(*(torch.stack(field).view(-1, 1, 1) for field in zip(*rows, strict=True)))
        t, s_ = (NoiseLevel(*(field[part] for field in clean_to_noise)) for part in (slice(1, None), slice(-1)))
        self.transition = Transition(t, s_, schedule.num_steps)
        signs = torch.cartesian_prod(*[scalar([-1.0, 1.0])] * (2 * len(m))).T
        self.x0, self.eps = self.m + s * signs[: len(m)], signs[len(m) :]
        self.x_t = t.alpha * self.x0 + t.sigma * self.eps

    def entropy(self):
        """Return nats per dimension."""
        return 0.5 * math.log(2 * math.pi * math.e * self.s**2)

    def variance(self, t):
        """Return the variance of x_t."""
        return t.alpha**2 * self.s**2 + t.sigma**2

    def reverse_variance(self):
        """Return the variance of q(x_s | x_t), (T, 1, 1): V_s V_{t|s} / V_t, by Bayes' rule."""
        t, s, _ = self.transition
        added = t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2
        return self.variance(s) * added / self.variance(t)

    def ideal_output(self, diffusion, mix=None):
        """Return the output of the ideal network: the target at E[x_0 | x_t] and E[eps | x_t]."""
        t = self.transition.t
        centered = (self.x_t - t.alpha * self.m) / self.variance(t)
        mean = diffusion.target(self.m + t.alpha * self.s**2 * centered, t, t.sigma * centered)
        return mean if mix is None else torch.cat([mean, mix.expand(mean.shape)], 1)

    def optimal(self, target, decoder_scale=1.0):
        """Return the process and the output for which p(x_s | x_t) is q(x_s | x_t)."""
        diffusion = GaussianDiffusion(target, "learned", decoder_scale=decoder_scale)
        fixed = GaussianDiffusion(target, "fixed_small", decoder_scale=decoder_scale)
        mix = self.reverse_variance().log() - self.small(fixed)
        return diffusion, self.ideal_output(diffusion, mix)

    def small(self, diffusion):
        """Return the log-variance of fixed_small, (T, 1, 1)."""
        return diffusion.reverse(
            Prediction(self.x_t, self.x_t), self.x_t, self.transition.t, self.transition.s
        ).log_variance

    def terms(self, diffusion, out):
        """Return the term of each transition, (T,) in nats per dimension."""
        pred = diffusion.interpret(out, self.x_t, self.transition.t)
        return transition_bits(diffusion, pred, self.x0.expand_as(self.x_t), self.x_t, self.transition) * math.log(2)


DATA = {"1d": ([0.4], 0.5), "3d": ([0.4, -1.0, 2.0], 1.7)}
every_data = for_each("m, s", DATA)


@every_data
@pytest.mark.parametrize(("schedule", "target"), CHAINS.values(), ids=CHAINS.keys())
def test_bound_is_exact_on_gaussian_data(schedule, target, m, s):
    """With the optimal reverse step it is the entropy + KL(q(x_T)

    p(x_T)), for any T, since then
    p(x_0 ... x_T) = q(x_0 ... x_T) p(x_T) / q(x_T).
    """
    data = GaussianData(m, s, schedule)
    terms = data.terms(*data.optimal(target))
    noisiest = schedule.row(schedule.num_steps - 1)
    prior = prior_bits(noisiest, data.x0.T).mean() * math.log(2)
    mean, variance = noisiest.alpha * data.m, data.variance(noisiest)
    spread = noisiest.alpha**2 + noisiest.sigma**2
    gap = 0.5 * (variance / spread + mean**2 / spread - 1 - (variance / spread).log()).mean()
    assert_close(terms.sum() + prior, data.entropy() + gap, rtol=0, atol=1e-6)


@every_data
@pytest.mark.parametrize("schedule", TABLES.values(), ids=TABLES.keys())
def test_bound_is_exact_for_each_transition(schedule, m, s):
    """Each term is I(x_0; x_s) - I(x_0; x_t), with I(x_0; x_t) = log(V_t / sigma_t^2) / 2.

    That of the decoder is H(x_0 | x_1).
    """
    data = GaussianData(m, s, schedule)
    terms = data.terms(*data.optimal("v"))
    information = 0.5 * (data.variance(data.transition.t) / data.transition.t.sigma**2).log().flatten()
    assert_close(terms[1:], information[:-1] - information[1:], rtol=0, atol=1e-9)
    assert_close(terms[0], data.entropy() - information[0], rtol=0, atol=1e-9)


@every_data
@for_each("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(("schedule", "target"), CHAINS.values(), ids=CHAINS.keys())
def test_suboptimal_variance_costs_its_kl(schedule, target, variance, m, s):
    """Variance v instead of the optimal w increases a term by (w / v - 1 - log(w / v)) / 2."""
    data = GaussianData(m, s, schedule)
    best = data.terms(*data.optimal(target, decoder_scale=0.3))
    diffusion = GaussianDiffusion(target, variance, decoder_scale=0.3)
    terms = data.terms(diffusion, data.ideal_output(diffusion))
    t, cleaner, _ = data.transition
    added = (t.sigma**2 - (t.alpha / cleaner.alpha) ** 2 * cleaner.sigma**2)[1:]
    small = 1 / (1 / cleaner.sigma[1:] ** 2 + (t.alpha / cleaner.alpha)[1:] ** 2 / added)
    # The variance of x_s given x_t for data of unit variance.
    prior = cleaner.alpha[1:] ** 2 + cleaner.sigma[1:] ** 2
    large = 1 / (1 / prior + (t.alpha / cleaner.alpha)[1:] ** 2 / added)
    decoder = 0.3 * (t.sigma[0] / t.alpha[0]) ** 2
    chosen = torch.cat([decoder.flatten(), (small if variance == "fixed_small" else large).flatten()])
    ratio = data.reverse_variance().flatten() / chosen
    excess = 0.5 * (ratio - 1 - ratio.log())
    # The ratio of the decoder may be large.
    assert_close(terms - best, excess, rtol=1e-7, atol=1e-9)
    assert (terms - best > -1e-12).all()
    assert terms.sum() > best.sum() + 1e-3


@pytest.mark.parametrize("schedule", [*TABLES.values(), *CURVES.values()], ids=[*TABLES, *CURVES])
def test_fixed_variances_bracket_the_optimal_one(schedule):
    """fixed_small is optimal for data that are one point, fixed_large for N(0, I) (DDPM sec. 3.2)."""
    for s, variance in ((1e-8, "fixed_small"), (1.0, "fixed_large")):
        data = GaussianData([0.0], s, schedule)
        diffusion = GaussianDiffusion("v", variance)
        fixed = data.terms(diffusion, data.ideal_output(diffusion))
        assert_close(fixed[1:], data.terms(*data.optimal("v"))[1:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", [*TABLES.values(), *CURVES.values()], ids=[*TABLES, *CURVES])
def test_decoder_gap_of_points_is_small(schedule):
    """At most 0.15 nats with the ideal mean: half a factor of 2 in variance, the convention of tables."""
    data = GaussianData([0.4], 1.7, schedule)
    diffusion = GaussianDiffusion("v", "fixed_small", decoder_scale=schedule.decoder_scale)
    excess = (data.terms(diffusion, data.ideal_output(diffusion)) - data.terms(*data.optimal("v")))[0]
    scale = schedule.decoder_scale
    assert excess.item() == pytest.approx(0.5 * (1 / scale - 1 + math.log(scale)), abs=2e-2)
    assert -1e-9 < excess < 0.15


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_vlb_loss_is_an_unbiased_bound(name):
    """The mean of `vlb` over transitions drawn as in training, in float32, is the sum of the exact terms."""
    schedule = TABLES[name]
    data = GaussianData([0.4], 0.5, schedule)
    diffusion, out = data.optimal("v")
    exact = data.terms(diffusion, out).sum() / math.log(2)
    x0, eps = data.x0.expand_as(data.x_t).float(), data.eps.expand_as(data.x_t).float()
    transition = schedule.transition((torch.arange(STEPS) + 0.5) / STEPS, x0)
    bits = losses.vlb(diffusion, lambda *_: out.float(), x0, transition, eps)["vlb"].mean()
    # float32 rounding of terms that sum to about 1; the first has variance 1e-4.
    assert_close(bits.double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("target", ["eps", "x0"])
@pytest.mark.parametrize("schedule", TABLES.values(), ids=TABLES.keys())
def test_transitions_of_a_batch_are_independent(schedule, target):
    """Values and gradients, even of wrong predictions."""
    diffusion = GaussianDiffusion(target, "fixed_small", num_values=256)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(256, (STEPS, 3, 4, 4), generator=generator) / 127.5 - 1
    eps, wrong = torch.randn(2, STEPS, 3, 4, 4, generator=generator)
    transition = schedule.transition((torch.arange(STEPS) + 0.5) / STEPS, x0)
    x_t = diffusion.add_noise(x0, transition.t, eps)

    def bits(part):
        t, s = (NoiseLevel(*(field[part] for field in level)) for level in transition[:2])
        out = wrong[part].clone().requires_grad_()
        pred = diffusion.interpret(out, x_t[part], t)
        values = transition_bits(diffusion, pred, x0[part], x_t[part], Transition(t, s, STEPS))
        return values.detach(), torch.autograd.grad(values.sum(), out)[0]

    together = bits(slice(None))
    alone = zip(*(bits(slice(k, k + 1)) for k in range(STEPS)), strict=True)
    for whole, parts in zip(together, alone, strict=True):
        assert whole.isfinite().all()
        assert_close(whole, torch.cat(parts), rtol=1e-5, atol=0)


# The flow


@every_data
@pytest.mark.parametrize("schedule", [TABLES["linear"], *CURVES.values()], ids=["linear", *CURVES])
def test_flow_of_gaussian_data_is_exact(schedule, m, s):
    """z = cos(angle) m + sqrt(V) n for a constant n, V = cos^2 s^2 + sin^2.

    The Jacobian is a multiple of the identity, for which a probe of signs gives the exact trace.
    """
    data_mean = scalar(m)
    for u in (0.02, 0.3, 0.9):
        (level,) = schedule.at(scalar([u]))
        angle = torch.atan2(level.sigma, level.alpha)
        variance = angle.cos() ** 2 * s**2 + angle.sin() ** 2
        rise = angle.sin() * angle.cos() * (1 - s**2) / variance  # V' / 2V

        def predict(x, t):
            noised = t.alpha**2 * s**2 + t.sigma**2
            centered = (x - t.alpha * data_mean) / noised
            return Prediction(data_mean + t.alpha * s**2 * centered, t.sigma * centered)

        z, probe = normal((4, len(m)), 6), normal((4, len(m)), 7).sign()
        slope, divergence = flow_slope(predict, z, angle, level, probe)
        expected = -angle.sin() * data_mean + rise * (z - angle.cos() * data_mean)
        assert_close(slope, expected, rtol=1e-9, atol=1e-12)
        assert_close(divergence, (len(m) * rise).expand(4), rtol=1e-9, atol=1e-12)
        assert not slope.requires_grad
