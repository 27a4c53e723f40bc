"""Heun's churn against algorithm 2 of EDM (Karras et al. 2022, arXiv 2206.00364) in plain floats."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from src.diffusion import curves, samplers, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion, Prediction
from src.diffusion.noise import ContinuousSchedule, NoiseSchedule, make_time_grid

SCHEDULES = {
    "edm": ContinuousSchedule(curves.exploding),
    "linear table": NoiseSchedule(schedules.linear(1000)),
    "cosine": ContinuousSchedule(curves.cosine_log_snr),
    "vdm": ContinuousSchedule(curves.linear_log_snr),
    "learned": ContinuousSchedule(curves.Learned()),
}
SETTINGS = [
    {"s_churn": 3.0},
    {"s_churn": 40.0, "s_noise": 1.003},
    {"s_churn": 1e3},
    {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},
]
START, NOISES = 0.6, [0.3, -1.2, 0.8, 0.1, -0.4, 1.7, -0.9, 0.5]


def denoise(z, sigma):
    """An arbitrary D(z; sigma)."""
    return math.tanh(z / math.hypot(1, sigma) + 0.3 * math.sin(3 * sigma))


def algorithm_2(sigmas, s_churn, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """Return the result of algorithm 2 and the noise levels of its first predictions; sigmas end with 0."""
    steps, noises, seen = len(sigmas) - 1, iter(NOISES), []
    x = sigmas[0] * START
    for t, t_next in pairwise(sigmas):
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0.0
        t_hat = t + gamma * t
        seen.append(t_hat)
        if gamma > 0:
            x += math.sqrt(t_hat**2 - t**2) * s_noise * next(noises)
        d = (x - denoise(x, t_hat)) / t_hat
        x_next = x + (t_next - t_hat) * d
        if t_next != 0:
            d_next = (x_next - denoise(x_next, t_next)) / t_next
            x_next = x + (t_next - t_hat) * (d + d_next) / 2
        x = x_next
    return x, seen


def heun(grid, settings):
    """Return the result of the sampler from the same start, and the levels of the first prediction of each step."""
    calls, noises = [], iter(NOISES)

    def predict(x, t):
        calls.append(t)
        x0 = torch.full_like(x, denoise((x / t.alpha).item(), t.ratio.item()))
        return Prediction(x0, (x - t.alpha * x0) / t.sigma)

    x = (grid[0].sigma * START).reshape(1, 1)
    sampler = partial(samplers.heun, **settings)
    *_, out = sampler(GaussianDiffusion(), predict, x, grid, noise=lambda x: torch.full_like(x, next(noises)))
    return out.item(), calls[::2]


@pytest.mark.parametrize("name", SCHEDULES)
def test_heun_with_churn_equals_algorithm_2(name):
    """Even where churn raises the first level above the noisiest one, by up to sqrt(2)."""
    for spacing in ("karras", "trailing", "linspace"):
        grid = make_time_grid(SCHEDULES[name], 8, spacing)
        for settings in SETTINGS:
            expected, sigmas = algorithm_2([level.ratio.item() for level in grid], **settings)
            out, levels = heun(grid, settings)
            rel = 1e-4 if name == "learned" else 1e-9  # log-SNR in float32
            assert [level.ratio.item() for level in levels] == pytest.approx(sigmas, rel=rel)
            if name != "learned":
                assert out == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_churn_above_sigma_max_equals_algorithm_2():
    """Clamping the level to sigma = 80 would add 0.088."""
    grid = make_time_grid(SCHEDULES["edm"], 8, "karras")
    assert grid[0].sigma.item() == pytest.approx(80)
    out, levels = heun(grid, {"s_churn": 40.0})
    assert levels[0].sigma.item() == pytest.approx(80 * math.sqrt(2), rel=1e-9) and levels[0].alpha == 1
    assert out == pytest.approx(algorithm_2([level.ratio.item() for level in grid], 40.0)[0], abs=1e-9)


def test_time_beyond_the_noisiest_level():
    """The time of EDM's curve is linear in log sigma beyond its end; that of a table stays 1."""
    (edm, table) = (SCHEDULES[name].at_ratio for name in ("edm", "linear table"))
    for ratio in (80.0, 100.0, 113.1):
        level = edm(torch.tensor(ratio, dtype=torch.float64))
        expected = math.log(ratio / 0.002) / math.log(80 / 0.002)
        assert level.time.item() == pytest.approx(expected, rel=1e-7) and level.alpha == 1
    level = table(torch.tensor(1e3, dtype=torch.float64))
    assert (level.time, level.ratio.item()) == (1, pytest.approx(1e3)) and level.norm.item() == pytest.approx(1)
    assert level.ratio > SCHEDULES["linear table"].row(999).ratio


def test_undefined_curve_stops_at_its_end():
    """alpha = sqrt(0.999 - 0.9 u) is NaN beyond u = 1.11; the level there is the last finite one."""
    schedule = ContinuousSchedule(lambda u: ((0.999 - u * 0.9).sqrt(), 0.05 + 0.9 * u))
    level = schedule.at_ratio(torch.tensor(1e9, dtype=torch.float64))
    assert all(field.isfinite() for field in level) and level.time.item() == pytest.approx(0.999 / 0.9, abs=1e-9)


def test_churn_skips_pure_noise():
    """An infinite sigma / alpha cannot increase: the step is that of DDIM."""
    for schedule in (
        ContinuousSchedule(curves.rectified_flow),
        NoiseSchedule(schedules.zero_terminal_snr(schedules.constant(10_000))),
    ):
        grid = make_time_grid(schedule, 6)
        drawn = []

        def noise(x, drawn=drawn):
            drawn.append(x)
            return torch.ones_like(x)

        def predict(x, t):
            return Prediction(torch.tanh(x), (x - t.alpha * torch.tanh(x)) / t.sigma)

        x = torch.tensor([[0.4]], dtype=torch.float64)
        first, *_, last = samplers.heun(GaussianDiffusion(), predict, x, grid, s_churn=40.0, noise=noise)
        (ddim, *_) = samplers.ddim(GaussianDiffusion(), predict, x, grid, noise=noise)
        assert torch.equal(first, ddim) and last.isfinite().all()
        assert len(drawn) == sum(level.alpha > 1e-6 for level in grid[:-1])
