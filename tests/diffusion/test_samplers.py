"""Samplers against the formulas of papers, against diffusers, and on data with a known denoiser."""

import math
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from src.diffusion import curves, samplers, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion, Prediction
from src.diffusion.noise import ContinuousSchedule, NoiseSchedule, make_time_grid
from tests.loops import for_each


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow packages only when tests run, not when they are collected."""
    global MIXTURE
    global DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, GaussianMixture
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler

    from src.data.analytic import GaussianMixture

    MIXTURE = GaussianMixture([3, 1, 2], [[0, 0], [1.5, -0.5], [-1, 1]], [0.3, 0.5, 0.8])


PREDICTIONS = ["eps", "x0", "v"]
SPACINGS = ["trailing", "leading", "linspace", "karras", "log_snr"]
SHAPES = [(3, 2), (2, 3, 4, 4)]
NAMES_IN_DIFFUSERS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
CHURN = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.007}
SAMPLERS = {
    "ancestral": samplers.ancestral,
    "ddim": samplers.ddim,
    "ddim_half": partial(samplers.ddim, eta=0.5),
    "ddim_one": partial(samplers.ddim, eta=1.0),
    "dpmpp_2m": samplers.dpmpp_2m,
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde,
    "dpmpp_2m_sde_half": partial(samplers.dpmpp_2m_sde, eta=0.5),
    "heun": samplers.heun,
    "heun_churn": partial(samplers.heun, **CHURN),
}
DETERMINISTIC = {"ddim", "dpmpp_2m", "heun"}
SCHEDULES = {
    "linear": lambda: NoiseSchedule(schedules.linear(1000)),
    "linear_50": lambda: NoiseSchedule(schedules.linear(50)),
    "cosine": lambda: NoiseSchedule(schedules.cosine(1000)),
    "zero_terminal": lambda: NoiseSchedule(schedules.zero_terminal_snr(schedules.linear(1000))),
    "rectified_flow": lambda: ContinuousSchedule(curves.rectified_flow),
    "exploding": lambda: ContinuousSchedule(curves.exploding),
}
# Data N(MEAN, STD^2), narrower than the noise.
MEAN, STD = 0.7, 0.5

every_shape = for_each("shape", SHAPES)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_spacing = for_each("spacing", SPACINGS)
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


@cache
def schedule(name="linear"):
    return SCHEDULES[name]()


def normal(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded_noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def nonlinear(x, t):
    """An arbitrary smooth network that depends on the time."""
    return torch.sin(2 * x + t.time) + 0.3 * torch.cos(5 * t.time)


def ideal(x, t):
    """Return E[x_0 | x_t] of the Gaussian, by regression of x_0 on x_t."""
    gain = t.alpha * STD**2 / (t.alpha.square() * STD**2 + t.sigma.square())
    x0 = MEAN + gain * (x - t.alpha * MEAN)
    return Prediction(x0, (x - t.alpha * x0) / t.sigma)


def ideal_for_mixture(x, t):
    """Return E[x_0 | x_t] of the mixture, which is not linear in x."""
    x0 = MIXTURE.denoise(x, t.alpha.item(), t.sigma.item())
    return Prediction(x0, (x - t.alpha * x0) / t.sigma)


def run(sampler, predict, x, grid, noise=torch.zeros_like, diffusion=None):
    return list(sampler(diffusion or GaussianDiffusion(), predict, x, grid, noise=noise))


def marginal(level):
    """Return mean and variance of x_t for the Gaussian data."""
    return level.alpha.item() * MEAN, (level.alpha.item() * STD) ** 2 + level.sigma.item() ** 2


def flow(x, t, s):
    """Return the end of the probability flow of the Gaussian data, which keeps (x - mean) / std."""
    (mean_t, variance_t), (mean_s, variance_s) = marginal(t), marginal(s)
    return mean_s + math.sqrt(variance_s / variance_t) * (x - mean_t)


# On Gaussian data every sampler is affine in x and its noise.


def moments(sampler, diffusion, grid, mean, variance):
    """Return the exact mean and variance after each step of a sampler that is affine in x and its noise.

    Sample 0 starts at 0 and sample 1 at 1, both without noise; sample 2 + k starts at 0 with 1 as the k-th noise.
    """
    rng = len(grid) - 1
    x = torch.zeros(2 + rng, 1, dtype=torch.float64)
    x[1] = 1
    unit = iter(torch.eye(2 + rng, dtype=torch.float64)[2:, :, None])
    for out in sampler(diffusion, ideal, x, grid, noise=lambda _: next(unit)):
        offset, slope, noises = out[0].item(), (out[1] - out[0]).item(), out[2:] - out[0]
        yield offset + slope * mean, slope**2 * variance + noises.square().sum().item()


def affine_step(name, variance_kind, ratio_t, ratio_s, before, highest, steps):
    """Return one step in the coordinate z = x / alpha, r = sigma / alpha, in plain floats.

    It maps (z, D), with D the last prediction of x_0, to (z', D'), as matrix, offset and factor of the noise.
    `before` is the previous ratio.
    """

    def denoiser(ratio):
        gain = STD**2 / (STD**2 + ratio**2)
        return gain, (1 - gain) * MEAN

    gain, offset = denoiser(ratio_t)
    predicted = np.array([gain, 0.0]), offset
    last = ratio_s == 0
    if name == "ancestral":
        # Bayes' rule: z ~ N(z_s, ratio_t^2 - ratio_s^2), z_s ~ N(D, ratio_s^2).
        share = (ratio_s / ratio_t) ** 2
        small = ratio_s**2 * (1 - share)
        row, b = np.array([share, 0]) + (1 - share) * predicted[0], (1 - share) * predicted[1]
        large = 1 / (1 / (1 + ratio_s**2) + 1 / (ratio_t**2 - ratio_s**2))  # if x_0 ~ N(0, 1)
        noise = 0.0 if last else math.sqrt(small if variance_kind == "fixed_small" else large)
    elif name.startswith("ddim"):
        eta = {"ddim": 0.0, "ddim_half": 0.5, "ddim_one": 1.0}[name]
        # k-diffusion's get_ancestral_step.
        up = eta * ratio_s * math.sqrt(ratio_t**2 - ratio_s**2) / ratio_t
        down = math.sqrt(ratio_s**2 - up**2)
        row = np.array([1.0, 0]) * (down / ratio_t) + (1 - down / ratio_t) * predicted[0]
        b, noise = (1 - down / ratio_t) * predicted[1], up
    elif name.startswith("dpmpp"):
        eta = {"dpmpp_2m": 0.0, "dpmpp_2m_sde": 1.0, "dpmpp_2m_sde_half": 0.5}[name]
        shrink = (ratio_s / ratio_t) ** (1 + eta)
        extra = 0.0 if last or before is None else math.log(ratio_t / ratio_s) / math.log(before / ratio_t) / 2
        mixed = (1 + extra) * predicted[0] - extra * np.array([0, 1.0]), (1 + extra) * predicted[1]
        row, b = np.array([shrink, 0]) + (1 - shrink) * mixed[0], (1 - shrink) * mixed[1]
        noise = ratio_s * math.sqrt(1 - (ratio_s / ratio_t) ** (2 * eta)) if eta else 0.0
    else:
        hat, added = ratio_t, 0.0
        if name == "heun_churn" and CHURN["s_tmin"] <= ratio_t <= CHURN["s_tmax"]:
            hat = min(ratio_t * (1 + min(CHURN["s_churn"] / steps, math.sqrt(2) - 1)), highest)
            added = CHURN["s_noise"] * math.sqrt(hat**2 - ratio_t**2)
        gain, offset = denoiser(hat)
        slope, constant = (1 - gain) / hat, -offset / hat
        step = ratio_s - hat
        if last:
            a, b = 1 + step * slope, step * constant
        else:
            gain_s, offset_s = denoiser(ratio_s)
            slope_s, constant_s = (1 - gain_s) / ratio_s, -offset_s / ratio_s
            a = 1 + step / 2 * (slope + slope_s * (1 + step * slope))
            b = step / 2 * (constant + slope_s * step * constant + constant_s)
        row, noise = np.array([a, 0.0]), a * added
    return np.array([row, predicted[0]]), np.array([b, predicted[1]]), noise


def affine_recursion(name, variance_kind, grid, mean, variance):
    """Return mean and variance of x after each step, by propagating those of (z, D)."""
    levels = [(level.alpha.item(), level.sigma.item() / level.alpha.item()) for level in grid]
    (highest,) = grid.schedule.at(torch.ones(1, dtype=torch.float64))
    alpha = levels[0][0]
    mu, cov, before = np.array([mean / alpha, 0]), np.diag([variance / alpha**2, 0]), None
    for (_, ratio_t), (alpha_s, ratio_s) in pairwise(levels):
        matrix, offset, noise = affine_step(
            name, variance_kind, ratio_t, ratio_s, before, highest.ratio.item(), len(grid) - 1
        )
        mu, cov = matrix @ mu + offset, matrix @ cov @ matrix.T + np.diag([noise**2, 0])
        before = ratio_t
        yield alpha_s * mu[0], alpha_s**2 * cov[0, 0]


@for_each("steps", [1, 2, 7, 50])
@for_each("spacing", ["trailing", "karras", "log_snr"])
@every_sampler
def test_gaussian_moments_follow_the_affine_recursion(name, spacing, steps):
    """With the ideal denoiser, to 1e-10."""
    for variance_kind in ["fixed_small", "fixed_large"] if name == "ancestral" else ["fixed_small"]:
        diffusion = GaussianDiffusion(variance=variance_kind)
        for levels in ("linear", "cosine", "exploding"):
            grid = make_time_grid(schedule(levels), steps, spacing)
            start = (-1.3, 2.0) if spacing == "karras" else marginal(grid[0])
            ours = moments(SAMPLERS[name], diffusion, grid, *start)
            scalars = affine_recursion(name, variance_kind, grid, *start)
            for (our_mean, our_variance), (scalar_mean, scalar_variance) in zip(ours, scalars, strict=True):
                assert our_mean == pytest.approx(scalar_mean, rel=1e-10, abs=1e-10)
                assert math.sqrt(our_variance) == pytest.approx(math.sqrt(scalar_variance), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2), ("heun", 2)])
@pytest.mark.parametrize("levels", ["cosine", "linear", "rectified_flow"])
def test_samplers_have_their_order_of_convergence(levels, name, order):
    """The distance to the exact flow at the cleanest level, as a power of the step in log-SNR."""

    def error(steps):
        grid = make_time_grid(schedule(levels), steps, "log_snr")
        x = normal((100, 2), 1) * grid[0].norm
        out = run(SAMPLERS[name], ideal, x, grid)[-2]
        return (out - flow(x, grid[0], grid[-2])).square().mean().sqrt().item()

    assert math.log(error(40) / error(160)) / math.log(4) == pytest.approx(order, abs=0.15)


@every_sampler
def test_samplers_recover_gaussian_data(name):
    """Only the discretization error remains: 8 times the steps leave a fifth.

    Churn must add unit noise for that; EDM's 1.007 corrects networks.
    """
    sampler = partial(SAMPLERS[name], s_noise=1.0) if name == "heun_churn" else SAMPLERS[name]

    def errors(steps):
        grid = make_time_grid(schedule(), steps, "log_snr")
        *_, (mean, variance) = moments(sampler, GaussianDiffusion(), grid, *marginal(grid[0]))
        return abs(mean - MEAN), abs(math.sqrt(variance) - STD)

    for few, many in zip(errors(50), errors(400), strict=True):
        assert many < 0.02 * STD
        assert many < few / 5 + 1e-4


# In the coordinates of the papers.


def exploding(grid):
    """Return sigma / alpha of the time grid as plain floats, and the prediction of x_0 in that coordinate."""
    return [level.sigma.item() / level.alpha.item() for level in grid]


def denoise(z, ratio):
    """An arbitrary smooth D(z; sigma)."""
    return torch.tanh(z / math.sqrt(1 + ratio**2) + 0.3 * math.sin(3 * ratio))


def predict_by_denoise(x, t):
    x0 = denoise(x / t.alpha, (t.sigma / t.alpha).item())
    return Prediction(x0, (x - t.alpha * x0) / t.sigma)


def compare(sampler, formula, levels, spacing="karras", steps=12):
    """Compare every value of the sampler, as z = x / alpha, with that of a published loop over sigmas."""
    grid = make_time_grid(schedule(levels), steps, spacing)
    x = normal((5, 2), 2) * grid[0].norm
    ours = run(sampler, predict_by_denoise, x, grid, noise=seeded_noise(3))
    theirs = formula(x / grid[0].alpha, exploding(grid), seeded_noise(3))
    for out, z, level in zip(ours, theirs, grid[1:], strict=True):
        assert_close(out / level.alpha, z, rtol=1e-9, atol=1e-9)


every_coordinate = pytest.mark.parametrize("levels", ["linear", "cosine", "rectified_flow", "exploding"])


@every_coordinate
def test_dpmpp_2m_equals_k_diffusion(levels):
    """sample_dpmpp_2m."""

    def formula(z, sigmas, _):
        old = None
        for i in range(len(sigmas) - 1):
            denoised = denoise(z, sigmas[i])
            if sigmas[i + 1] == 0:
                z = denoised
            else:
                t, t_next = -math.log(sigmas[i]), -math.log(sigmas[i + 1])
                h, both = t_next - t, denoised
                if old is not None:
                    r = (t + math.log(sigmas[i - 1])) / h
                    both = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
                z = math.exp(-t_next) / math.exp(-t) * z - math.expm1(-h) * both
            old = denoised
            yield z

    compare(samplers.dpmpp_2m, formula, levels)


@for_each("eta", [0.0, 0.4, 1.0])
@every_coordinate
def test_dpmpp_2m_sde_equals_k_diffusion(levels, eta):
    """sample_dpmpp_2m_sde with solver_type midpoint."""

    def formula(z, sigmas, noise):
        old = h_last = None
        for sigma, sigma_next in pairwise(sigmas):
            denoised = denoise(z, sigma)
            if sigma_next == 0:
                z, h = denoised, None
            else:
                h = math.log(sigma) - math.log(sigma_next)
                eta_h = eta * h
                z = sigma_next / sigma * math.exp(-eta_h) * z - math.expm1(-h - eta_h) * denoised
                if old is not None:
                    z = z - 0.5 * math.expm1(-h - eta_h) * (h / h_last) * (denoised - old)
                if eta:
                    z = z + noise(z) * sigma_next * math.sqrt(-math.expm1(-2 * eta_h))
            old, h_last = denoised, h
            yield z

    compare(partial(samplers.dpmpp_2m_sde, eta=eta), formula, levels)


@for_each("eta", [0.3, 1.0])
@every_coordinate
def test_euler_ancestral_equals_k_diffusion(levels, eta):
    """sample_euler_ancestral with the sigma_up and sigma_down of get_ancestral_step is DDIM."""

    def formula(z, sigmas, noise):
        for sigma, sigma_next in pairwise(sigmas):
            up = min(sigma_next, eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
            down = (sigma_next**2 - up**2) ** 0.5
            z = z + (z - denoise(z, sigma)) / sigma * (down - sigma)
            if sigma_next > 0:
                z = z + noise(z) * up
            yield z

    compare(partial(samplers.ddim, eta=eta), formula, levels)


@for_each("settings", {"plain": {}, "s_churn": CHURN, "most": {"s_churn": 100.0, "s_tmax": 50.0}})
@every_coordinate
def test_heun_equals_edm_algorithm_2(levels, settings):
    """Karras et al. 2022, alg. 2, gamma = min(S_churn / N, sqrt(2) - 1) within [S_min, S_max]."""

    def formula(z, sigmas, noise):
        steps = len(sigmas) - 1
        for sigma, sigma_next in pairwise(sigmas):
            gamma = 0.0
            if settings and settings.get("s_tmin", 0) <= sigma <= settings["s_tmax"]:
                gamma = min(settings["s_churn"] / steps, math.sqrt(2) - 1)
            hat = sigma + gamma * sigma
            if gamma > 0:
                z = z + math.sqrt(hat**2 - sigma**2) * settings.get("s_noise", 1) * noise(z)
            d = (z - denoise(z, hat)) / hat
            ahead = z + (sigma_next - hat) * d
            if sigma_next != 0:
                d_ahead = (ahead - denoise(ahead, sigma_next)) / sigma_next
                ahead = z + (sigma_next - hat) * (d / 2 + d_ahead / 2)
            z = ahead
            yield z

    compare(partial(samplers.heun, **settings), formula, levels)


def test_churn_acts_only_within_its_range():
    """Predictions are at (1 + gamma) sigma within [S_tmin, S_tmax], else at the levels of the time grid."""
    grid = make_time_grid(schedule("exploding"), 20, "karras")
    for s_churn, gamma in ((2.0, 0.1), (1e3, math.sqrt(2) - 1)):
        seen = []

        def predict(x, t, seen=seen):
            seen.append(t.ratio.item())
            return predict_by_denoise(x, t)

        run(partial(samplers.heun, s_churn=s_churn, s_tmin=0.1, s_tmax=20.0), predict, normal((3, 2), 4), grid)
        expected = [r * (1 + gamma) if 0.1 <= r <= 20 else r for r in exploding(grid)[:-1]]
        # Every step except the last also predicts at its end.
        assert seen[::2] == pytest.approx(expected, rel=1e-9)


# Against each other, for any data.


@for_each("clip_x0", [None, 1.0])
@for_each("steps", [1, 2, 7, 50])
@every_spacing
@every_prediction
def test_ddim_with_eta_one_equals_ancestral(prediction, spacing, steps, clip_x0):
    """Equal noise gives equal values, for any strides, clipped or not."""
    for name in ["linear", "cosine", "rectified_flow"] + ["zero_terminal"] * (prediction != "eps"):
        if name == "rectified_flow" and prediction == "eps" and spacing in ("trailing", "linspace"):
            continue  # from pure noise
        diffusion = GaussianDiffusion(prediction, clip_x0=clip_x0)
        predict = samplers.predictor(diffusion, nonlinear)
        grid, x = make_time_grid(schedule(name), steps, spacing), normal((3, 2), 0)
        ours = run(samplers.ancestral, predict, x, grid, seeded_noise(1), diffusion)
        other = run(partial(samplers.ddim, eta=1.0), predict, x, grid, seeded_noise(1))
        assert_close(ours, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "limit"), [("dpmpp_2m", "ddim"), ("dpmpp_2m_sde", "ancestral")])
def test_first_two_dpmpp_steps_are_first_order(name, limit):
    """The first has no previous prediction; at the last, log-SNR is infinite."""
    grid, x = make_time_grid(schedule("cosine"), 2), normal((3, 2), 6)
    ours, theirs = (run(SAMPLERS[n], predict_by_denoise, x, grid, seeded_noise(7)) for n in (name, limit))
    assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@for_each("steps", [1, 2, 7])
@every_shape
@every_sampler
def test_samplers_yield_one_value_per_step(name, shape, steps):
    """In the shape of the data; x is not modified, and the last value is a predicted x_0."""
    diffusion = GaussianDiffusion("v")
    predictions = []

    def predict(x, t):
        predictions.append(samplers.predictor(diffusion, nonlinear)(x, t))
        return predictions[-1]

    grid, x = make_time_grid(schedule(), steps), normal(shape, 7)
    start = x.clone()
    values = run(SAMPLERS[name], predict, x, grid, seeded_noise(8), diffusion)
    assert len(values) == steps
    assert all(value.shape == shape and value.dtype == torch.float64 for value in values)
    assert torch.equal(x, start)
    assert_close(values[-1], predictions[-1].x0, rtol=1e-12, atol=1e-12)


@every_shape
@every_sampler
def test_samplers_keep_float32(name, shape):
    """The float64 levels do not promote the data."""
    x = normal(shape, 9).float()
    for levels in ("cosine", "rectified_flow"):
        values = run(
            SAMPLERS[name], predict_by_denoise, x, make_time_grid(schedule(levels), 5, "karras"), seeded_noise(1)
        )
        assert {value.dtype for value in values} == {torch.float32}


@for_each("s_tmax", [50.0, math.inf])
@pytest.mark.parametrize("levels", ["zero_terminal", "rectified_flow"])
@every_sampler
def test_first_step_from_pure_noise_is_finite(name, levels, s_tmax):
    """At alpha = 0, where sigma / alpha is infinite."""
    sampler = partial(SAMPLERS[name], s_tmax=s_tmax) if name == "heun_churn" else SAMPLERS[name]
    for steps in (1, 2, 9):
        grid = make_time_grid(schedule(levels), steps)
        assert grid[0].alpha < 1e-16
        for dtype in (torch.float32, torch.float64):
            diffusion = GaussianDiffusion("v")
            values = run(
                sampler, samplers.predictor(diffusion, nonlinear), normal((3, 2), 10).to(dtype), grid, seeded_noise(2)
            )
            assert all(value.isfinite().all() and value.abs().max() < 30 for value in values)


@for_each("steps", [1, 2, 7])
@every_sampler
def test_last_step_draws_no_noise(name, steps):
    """Deterministic samplers draw none; churn draws only in its range; equal noise gives equal samples."""
    diffusion, grid, x = GaussianDiffusion("x0"), make_time_grid(schedule(), steps), normal((3, 2), 9)
    calls = []

    def counting(like):
        calls.append(like.shape)
        return torch.ones_like(like)

    predict = samplers.predictor(diffusion, nonlinear)
    first, second = (run(SAMPLERS[name], predict, x, grid, counting, diffusion) for _ in "12")
    churned = sum(CHURN["s_tmin"] <= r <= CHURN["s_tmax"] for r in exploding(grid)[:-1])
    rng = 0 if name in DETERMINISTIC else churned if name == "heun_churn" else steps - 1
    assert calls == [(3, 2)] * (2 * rng)
    assert_close(first, second, rtol=0, atol=0)


@every_shape
@every_prediction
def test_predictor_interprets_the_network_output(prediction, shape):
    """One call, at x and its level."""
    diffusion, x, t = GaussianDiffusion(prediction), normal(shape, 10), make_time_grid(schedule(), 7)[2]
    calls = []

    def network(*arguments):
        calls.append(arguments)
        return nonlinear(*arguments)

    pred = samplers.predictor(diffusion, network)(x, t)
    assert calls == [(x, t)]
    assert_close(diffusion.target(pred.x0, t, pred.eps), nonlinear(x, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        *((partial(samplers.ddim, eta=e), f"sampler.eta={e} ") for e in (-0.1, 1.1)),
        (partial(samplers.ddim, eta=math.nan), "sampler.eta=nan "),
        (partial(samplers.dpmpp_2m_sde, eta=-1.0), "sampler.eta=-1.0 "),
        (partial(samplers.heun, s_churn=-1.0), "sampler.s_churn=-1.0 "),
    ],
)
def test_sampler_settings_out_of_range_raise(sampler, message):
    with pytest.raises(ValueError, match=message):
        run(sampler, ideal, normal((3, 2), 11), make_time_grid(schedule(), 7))


# Against diffusers, where its convention is standard.


def row(levels, t):
    return levels.row(int(t))


@for_each("eta", [0.0, 0.5])
@for_each("steps", [1, 2, 10, 50])
@every_shape
@every_prediction
def test_ddim_equals_diffusers(prediction, shape, steps, eta):
    """At divisors of T with trailing spacing, on float64 tables.

    For eps, the first x_0 is divided by alpha = 6e-3, and the arbitrary network may amplify a difference.
    """
    levels = schedule()
    scheduler = DDIMScheduler(
        1000,
        prediction_type=NAMES_IN_DIFFUSERS[prediction],
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - schedules.linear(1000), 0)
    scheduler.set_timesteps(steps)
    diffusion = GaussianDiffusion(prediction)
    x, theirs = normal(shape, 2), seeded_noise(3)
    predict = samplers.predictor(diffusion, nonlinear)
    ours = run(partial(samplers.ddim, eta=eta), predict, x, make_time_grid(levels, steps), seeded_noise(3))
    for t, value in zip(scheduler.timesteps.tolist(), ours, strict=True):
        noise = theirs(x) if eta > 0 else None
        x = scheduler.step(nonlinear(x, row(levels, t)), t, x, eta=eta, variance_noise=noise).prev_sample
        assert_close(value, x, rtol=1e-8, atol=1e-8)


@every_shape
@every_prediction
def test_ancestral_equals_diffusers(prediction, shape):
    """All T = 50 steps with the same generator on float64 tables."""
    levels = schedule("linear_50")
    scheduler = DDPMScheduler(
        50, prediction_type=NAMES_IN_DIFFUSERS[prediction], variance_type="fixed_small", clip_sample=False
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - schedules.linear(50), 0)
    diffusion = GaussianDiffusion(prediction)
    x, generator = normal(shape, 4), torch.Generator().manual_seed(5)
    predict = samplers.predictor(diffusion, nonlinear)
    ours = run(samplers.ancestral, predict, x, make_time_grid(levels, 50), seeded_noise(5), diffusion)
    for t, value in zip(range(49, -1, -1), ours, strict=True):
        x = scheduler.step(nonlinear(x, row(levels, t)), t, x, generator=generator).prev_sample
        assert_close(value, x, rtol=1e-8, atol=1e-8)


def at_rows(levels, steps):
    """Check that the timesteps of the scheduler are the rows of our trailing time grid, for steps that divide T."""
    grid = make_time_grid(levels, steps)
    return grid, [round(level.time.item() * 1000) - 1 for level in grid[:-1]]


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@for_each("steps", [2, 10, 50])
@every_prediction
def test_dpmpp_2m_equals_diffusers(prediction, steps, algorithm):
    """On equal levels; the sigmas of diffusers are float32."""
    levels = schedule()
    scheduler = DPMSolverMultistepScheduler(
        1000,
        prediction_type=NAMES_IN_DIFFUSERS[prediction],
        algorithm_type=algorithm,
        solver_order=2,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        lower_order_final=steps < 3,
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - schedules.linear(1000), 0)
    scheduler.set_timesteps(steps)
    grid, rows = at_rows(levels, steps)
    assert scheduler.timesteps.tolist() == rows
    diffusion, x, theirs = GaussianDiffusion(prediction), normal((3, 2), 12), seeded_noise(13)
    sampler = samplers.dpmpp_2m if algorithm == "dpmsolver++" else samplers.dpmpp_2m_sde
    # diffusers does not add noise in the last step either.
    ours = run(sampler, samplers.predictor(diffusion, nonlinear), x, grid, seeded_noise(13))
    for t, value in zip(rows, ours, strict=True):
        noise = theirs(x) if algorithm.startswith("sde") else None
        x = scheduler.step(nonlinear(x, row(levels, t)), t, x, variance_noise=noise).prev_sample.double()
        assert_close(value, x, rtol=1e-4, atol=1e-4)


@for_each("steps", [1, 2, 10, 50])
def test_heun_equals_diffusers(steps):
    """In the coordinate x / alpha of diffusers, whose values alternate with Euler's."""
    levels = schedule()
    scheduler = HeunDiscreteScheduler(1000, prediction_type="sample", timestep_spacing="trailing")
    scheduler.alphas_cumprod = torch.cumprod(1 - schedules.linear(1000), 0)
    scheduler.set_timesteps(steps)
    grid, _ = at_rows(levels, steps)
    z = normal((3, 2), 14) / grid[0].alpha
    ours = run(samplers.heun, samplers.predictor(GaussianDiffusion("x0"), nonlinear), z * grid[0].alpha, grid)
    theirs = []
    for t in scheduler.timesteps:
        level = row(levels, t)
        z = scheduler.step(nonlinear(z * level.alpha, level), t, z).prev_sample
        theirs.append(z)
    for value, z, level in zip(ours, theirs[1::2] + theirs[-1:], grid[1:], strict=True):
        assert_close(value, z * level.alpha, rtol=1e-4, atol=1e-4)


# Against conventions of diffusers that are not standard.


def test_clipped_prediction_reproduces_x_t():
    """Derive eps from the clipped x_0.

    DDIM's eq. 12 decomposes x_t into a predicted x_0 and a direction to x_t, with alpha x_0 + sigma eps = x_t. The raw
    eps with the clipped x_0, the default of diffusers, belongs to another x_t.
    """
    levels, x = schedule(), 3 * normal((4, 2), 15)
    diffusion = GaussianDiffusion("eps", clip_x0=1.0)
    grid = make_time_grid(levels, 10)
    t = grid[4]
    pred = samplers.predictor(diffusion, nonlinear)(x, t)
    assert pred.x0.abs().max() == 1
    assert_close(t.alpha * pred.x0 + t.sigma * pred.eps, x, rtol=1e-12, atol=1e-12)

    scheduler = DDIMScheduler(1000, clip_sample=True, timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.alphas_cumprod = torch.cumprod(1 - schedules.linear(1000), 0)
    scheduler.set_timesteps(10)
    out, time = nonlinear(x, t), int(scheduler.timesteps[4])
    (ours,) = run(samplers.ddim, samplers.predictor(diffusion, nonlinear), x, grid[4:6])
    standard = scheduler.step(out, time, x, use_clipped_model_output=True).prev_sample
    default = scheduler.step(out, time, x).prev_sample
    assert_close(ours, standard, rtol=1e-8, atol=1e-8)
    s, clipped = grid[5], (pred.eps - out).abs() > 1e-6
    assert_close(default - ours, s.sigma * (out - pred.eps), rtol=1e-6, atol=1e-8)
    assert (default - ours)[clipped].abs().min() > 1e-6


def test_leading_spacing_skips_pure_noise():
    """Samplers start from pure noise, so the first level must be the noisiest (arXiv 2305.08891, sec. 3.3).

    The default spacing of diffusers starts 10 of 1000 steps at row 900, where x_t contains signal. With zero terminal
    SNR, the exact denoiser then has a wrong mean, and a correct one with `trailing`.
    """
    scheduler = DDIMScheduler(1000)
    assert scheduler.config.timestep_spacing == "leading"
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.max() == 900

    def mean(spacing):
        grid = make_time_grid(schedule("zero_terminal"), 10, spacing)
        *_, (mean, _) = moments(samplers.ddim, GaussianDiffusion(), grid, 0.0, 1.0)
        return mean

    assert mean("trailing") == pytest.approx(MEAN, abs=1e-6)
    assert abs(mean("leading") - MEAN) > 1e-3


@pytest.mark.parametrize("kind", ["learned", "fixed_large_log"])
def test_learned_variances_are_logarithms(kind):
    """Nichol & Dhariwal 2021, sec. 3.1: the network learns the log-variance.

    diffusers takes its square root as if it were the variance, which is NaN for negative log-variances.
    """
    scheduler = DDPMScheduler(1000, variance_type=kind, prediction_type="sample", clip_sample=False)
    x, mix = normal((3, 2), 16), -normal((3, 2), 17).abs()
    out = torch.cat([x, mix], 1) if kind == "learned" else x
    assert scheduler.step(out, 500, x).prev_sample.isnan().all()

    diffusion = GaussianDiffusion("x0", variance="learned" if kind == "learned" else "fixed_large")
    t, s = schedule().row(500), schedule().row(499)
    _, log_variance = diffusion.reverse(diffusion.interpret(out, x, t), x, t, s)
    bounds = (1 - (t.alpha / s.alpha) ** 2).log()  # log beta
    posterior = bounds + 2 * (s.sigma / t.sigma).log()
    expected = posterior + mix if kind == "learned" else bounds
    assert_close(log_variance, expected.expand_as(log_variance), rtol=1e-8, atol=1e-8)


@for_each("channels", [1, 3])
def test_learned_variance_is_the_second_half_of_the_channels(channels):
    """Nichol & Dhariwal 2021, sec. 3.1: 2 C channels.

    DPM-Solver++ of diffusers keeps the first 3 channels for any C.
    """
    scheduler = DPMSolverMultistepScheduler(1000, variance_type="learned_range", timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    x, out = normal((2, channels, 4, 4), 18), normal((2, 2 * channels, 4, 4), 19)
    theirs = scheduler.step(out, scheduler.timesteps[0], x).prev_sample
    diffusion = GaussianDiffusion("eps", variance="learned_range")
    grid = make_time_grid(schedule(), 10)
    ours = run(samplers.dpmpp_2m, samplers.predictor(diffusion, lambda x, _: out), x, grid)[0]
    assert ours.shape == x.shape
    if channels == 3:
        assert_close(ours, theirs.double(), rtol=1e-4, atol=1e-4)
    else:
        assert theirs.shape == (2, 2, 4, 4)
