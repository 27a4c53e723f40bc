"""Every sampler on every schedule: 10 to 10,000 rows, and up to three times as many steps."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from src.diffusion import curves, samplers, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion, Prediction, snr_ratio
from src.diffusion.noise import CLEAN, ContinuousSchedule, NoiseLevel, NoiseSchedule, make_time_grid

SPACINGS = ["trailing", "leading", "linspace", "karras", "log_snr"]
SAMPLERS = {
    "ancestral": samplers.ancestral,
    "ddim": samplers.ddim,
    "ddim_half": partial(samplers.ddim, eta=0.5),
    "euler_ancestral": partial(samplers.ddim, eta=1.0),
    "dpmpp_2m": samplers.dpmpp_2m,
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde,
    "heun": samplers.heun,
    "heun_churn": partial(samplers.heun, s_churn=10.0),
}
TABLES = {
    name: getattr(schedules, name)
    for name in ("constant", "cosine", "exponential", "inverse", "laplace", "linear", "quadratic", "sigmoid_geodiff")
} | {
    "sigmoid_jabri": schedules.sigmoid_jabri,
    "scaled_linear": partial(schedules.quadratic, beta_start=0.00085, beta_end=0.012),
    "custom": lambda num_steps: schedules.custom([0.02] * num_steps),
    # alpha_bar ends at 1e-3011, which underflows float64.
    "underflowing": partial(schedules.constant, beta=0.5),
}
CURVES = {
    "cosine": curves.cosine_log_snr,
    "linear": curves.linear_log_snr,
    "exploding": curves.exploding,
    "rectified_flow": curves.rectified_flow,
    "learned": curves.Learned(),
}
MEAN, STD = 0.3, 0.5


def tables(num_steps):
    """Return every table unchanged, with zero terminal SNR, and shifted down and up."""
    for name, make in TABLES.items():
        betas = make(num_steps)
        yield name, betas
        if name == "underflowing":
            continue
        yield f"{name} zero", schedules.zero_terminal_snr(betas)
        yield f"{name} shifted", schedules.snr_shift(betas, 0.25)
        yield f"{name} shifted up and zero", schedules.zero_terminal_snr(schedules.snr_shift(betas, 4.0))


def continuous():
    for name, curve in CURVES.items():
        yield name, ContinuousSchedule(curve)
        if name != "learned":
            yield f"{name} shifted", ContinuousSchedule(curves.shifted(curve, 0.25))


def ideal(x, t):
    """Return the denoiser of N(MEAN, STD^2), by regression of x_0 on x_t."""
    gain = t.alpha * STD**2 / (t.alpha.square() * STD**2 + t.sigma.square())
    x0 = MEAN + gain * (x - t.alpha * MEAN)
    return Prediction(x0, (x - t.alpha * x0) / t.sigma)


def fn(name, grid, x):
    diffusion = GaussianDiffusion("x0", variance="fixed_large")
    *_, out = SAMPLERS[name](diffusion, ideal, x, grid, noise=torch.ones_like)
    return out


def check_finite(label, grid):
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[-1.0, 0.7]], dtype=dtype)
        for name in SAMPLERS:
            out = fn(name, grid, x)
            assert out.isfinite().all() and out.dtype == dtype, (label, len(grid) - 1, name, dtype, out)
            # Heun's method diverges with few steps from far above sigma / alpha = 80.
            # Inversion ends at noise of the scale of the time grid.
            if not name.startswith("heun"):
                assert out.abs().max() < 40 * max(1, grid[0].norm), (label, len(grid) - 1, name, dtype, out)


def test_every_sampler_is_finite_on_every_table():
    """With few steps and every spacing; alpha_bar falls below 1e-33 for T = 4,000 and 10,000."""
    for num_steps, names in ((10, None), (4000, ("constant",)), (10_000, None)):
        for name, betas in tables(num_steps):
            if names is not None and not name.startswith(names):
                continue
            schedule = NoiseSchedule(betas)
            for k, spacing in enumerate(SPACINGS):
                for steps in (1, 2, 5) if name.startswith(("constant", "sigmoid_geodiff")) else (1 + k % 2 * 2,):
                    check_finite(f"{name} {num_steps} {spacing}", make_time_grid(schedule, steps, spacing))


def test_every_sampler_is_finite_on_every_curve():
    for k, (name, schedule) in enumerate(continuous()):
        for spacing in SPACINGS[k % 2 :: 2]:
            for steps in (1, 4):
                check_finite(f"{name} {spacing}", make_time_grid(schedule, steps, spacing))


def test_every_sampler_is_finite_with_more_steps_than_rows():
    for name in ("constant", "cosine"):
        for betas in (TABLES[name](20), schedules.zero_terminal_snr(TABLES[name](20))):
            for spacing in ("trailing", "leading", "karras"):
                check_finite(f"{name} 20", make_time_grid(NoiseSchedule(betas), 60, spacing))


def test_time_grids_of_thousands_of_steps_descend():
    """30,000 steps on tables that end near pure noise: every SNR ratio is in [0, 1]."""
    for name, betas, spacing in (
        ("constant", TABLES["constant"](10_000), "leading"),
        ("constant zero", schedules.zero_terminal_snr(TABLES["constant"](10_000)), "trailing"),
        ("underflowing", TABLES["underflowing"](10_000), "linspace"),
    ):
        levels = make_time_grid(NoiseSchedule(betas), 30_000, spacing)[:-1]
        alpha, sigma, time = (torch.stack(field) for field in zip(*levels, strict=True))
        t, s = NoiseLevel(alpha[:-1], sigma[:-1], time[:-1]), NoiseLevel(alpha[1:], sigma[1:], time[1:])
        ratio = snr_ratio(t, s)
        assert ratio.isfinite().all() and ratio.min() >= 0 and ratio.max() <= 1, name
        assert (alpha.diff() >= 0).all() and (sigma.diff() <= 1e-15).all() and (time.diff() < 0).all(), name
        assert name == "underflowing" or (alpha.diff() > 0).all(), name


def limit(grid):
    """Return mean and std after the last step, from N(MEAN, STD^2) noised to grid[-2].

    That step replaces x by E[x_0 | x], whose std is STD^2 / sqrt(STD^2 + r^2), r = sigma / alpha there.
    """
    return MEAN, STD**2 / math.hypot(STD, grid[-2].ratio.item())


@pytest.mark.parametrize(("name", "tolerance"), [("ddim", 0.02), ("dpmpp_2m", 1e-3), ("heun", 2e-3)])
def test_many_steps_recover_the_data(name, tolerance):
    """From -1 and 1 in pure noise, the flow ends one standard deviation below and above the mean."""
    for label, betas in (
        ("constant", TABLES["constant"](4000)),
        ("constant zero", schedules.zero_terminal_snr(TABLES["constant"](4000))),
        ("sigmoid_geodiff", TABLES["sigmoid_geodiff"](10_000)),
    ):
        grid = make_time_grid(NoiseSchedule(betas), 1000)
        out = fn(name, grid, torch.tensor([[-1.0, 1.0]], dtype=torch.float64))
        mean, std = limit(grid)
        assert out.tolist()[0] == pytest.approx([mean - std, mean + std], abs=tolerance), label


@pytest.mark.parametrize("name", ["ancestral", "euler_ancestral", "dpmpp_2m_sde"])
def test_many_stochastic_steps_recover_the_data(name):
    """Exact moments: sample 0 starts at 0, sample 1 at 1, and sample 2 + k gets the k-th noise."""
    schedule, steps = NoiseSchedule(schedules.zero_terminal_snr(TABLES["sigmoid_geodiff"](10_000))), 500
    x = torch.zeros(steps + 2, 1, dtype=torch.float64)
    x[1] = 1
    unit = iter(torch.eye(steps + 2, dtype=torch.float64)[2:, :, None])
    grid = make_time_grid(schedule, steps)
    *_, out = SAMPLERS[name](GaussianDiffusion("x0"), ideal, x, grid, noise=lambda _: next(unit))
    effects = out[1:] - out[0]
    mean, std = limit(grid)
    assert out[0].item() == pytest.approx(mean, abs=0.01)
    assert effects.square().sum().sqrt().item() == pytest.approx(std, abs=0.02)


def test_rows_are_levels_at_their_positions():
    """Bit by bit, down to an alpha of 1e-44 and to 0 at zero SNR."""
    for num_steps in (10, 49, 1000, 10_000):
        for name, betas in tables(num_steps):
            schedule = NoiseSchedule(betas)
            rows = [*range(-1, 9), num_steps // 2, num_steps - 2, num_steps - 1]
            u = torch.tensor([(t + 1) / num_steps for t in rows], dtype=torch.float64)
            for t, level in zip(rows, schedule.at(u), strict=True):
                row = schedule.row(t)
                assert (level.alpha, level.sigma) == (row.alpha, row.sigma), (name, num_steps, t)
            if "zero" in name:
                (last,) = schedule.at(torch.ones(1, dtype=torch.float64))
                assert last.alpha == 0 and last.sigma == 1
            if num_steps % 10 == 0:
                trailing = make_time_grid(schedule, 10)[:-1]
                rows = [schedule.row(t) for t in range(num_steps - 1, -1, -(num_steps // 10))]
                assert [level.alpha for level in trailing] == [row.alpha for row in rows]


def test_levels_between_rows_are_accurate():
    """Linear in the angle, which is linear in alpha near pure noise; in plain floats."""
    schedule = NoiseSchedule(schedules.zero_terminal_snr(TABLES["constant"](10_000)))
    for t in (100, 5000, 9000, 9997, 9998):
        a, b = schedule.row(t), schedule.row(t + 1)
        (level,) = schedule.at(torch.tensor([(t + 1.25) / 10_000], dtype=torch.float64))
        rest = [math.atan2(r.alpha.item(), r.sigma.item()) for r in (a, b)]
        assert level.alpha.item() == pytest.approx(math.sin(0.75 * rest[0] + 0.25 * rest[1]), rel=1e-8)
        assert math.hypot(level.alpha, level.sigma) == pytest.approx(1, rel=1e-12)


def test_ends_of_flows_are_pure_noise():
    for start in (1e-5, 1e-4, 0.003, 0.1, 0.3, 0.7):
        alpha, sigma = curves.rectified_flow(torch.tensor([0.0, 1.0], dtype=torch.float64), start)
        assert alpha[1] == 0 and sigma.tolist() == pytest.approx([start, 1], rel=1e-15)
        for factor in (0.25, 3.0):
            alpha, sigma = curves.shifted(partial(curves.rectified_flow, start=start), factor)(torch.ones(1).double())
            assert (alpha.item(), sigma.item()) == (0, 1)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "heun_churn"])
def test_steps_between_equal_levels_are_identities(name):
    """Repeated levels, pure noise and clean data included, do not change the result."""
    x = torch.tensor([[-1.0, 0.2, 0.7]], dtype=torch.float64)
    for schedule in (
        NoiseSchedule(schedules.linear(1000)),
        NoiseSchedule(schedules.zero_terminal_snr(schedules.constant(10_000))),
        ContinuousSchedule(curves.rectified_flow),
        ContinuousSchedule(curves.exploding),
    ):
        grid = make_time_grid(schedule, 5)
        doubled = type(grid)([level for level in grid[:-1] for _ in range(2)] + [CLEAN], schedule)
        for variance in ("fixed_small", "fixed_large"):
            diffusion = GaussianDiffusion("x0", variance=variance)
            once = list(SAMPLERS[name](diffusion, ideal, x, grid, noise=torch.ones_like))
            twice = list(SAMPLERS[name](diffusion, ideal, x, doubled, noise=torch.ones_like))
            # A repeated level draws noise with std 0 (1e-18, the lower limit of a log-variance).
            assert_close(twice[-1], once[-1], rtol=1e-9, atol=1e-9)
            for before, after, (t, s) in zip([x, *twice], twice, pairwise(doubled), strict=False):
                if t is s:
                    assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_learned_variances_are_finite_between_equal_levels():
    diffusion = GaussianDiffusion("x0", variance="learned_range")
    t = NoiseSchedule(schedules.linear(1000)).row(500)
    x = torch.zeros(1, 2, dtype=torch.float64)
    mean, log_variance = diffusion.reverse(Prediction(x + 1, x, x + 0.5), x, t, t)
    assert torch.equal(mean, x) and log_variance.isfinite().all() and log_variance.max() < -60
