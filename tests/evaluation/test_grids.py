"""Default time grids of continuous schedules, and the shift of their SNR."""

import math
from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.testing import assert_close

from src.config.search_path import CONF
from src.diffusion import curves, schedules
from src.diffusion.noise import ContinuousSchedule, NoiseSchedule, make_time_grid
from src.evaluation.sampler_accuracy import compare_samplers
from src.runs.components import build_sampler, build_schedule
from tests.conftest import compose

CONTINUOUS = ["cosine_continuous", "edm_lognormal", "learned", "linear_continuous", "rectified_flow"]
SAMPLERS = ["ancestral", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "euler_ancestral", "heun"]
U = torch.linspace(0, 1, 41, dtype=torch.float64)


def schedule_of(name, snr_shift=1.0, zero_terminal_snr=False):
    node = OmegaConf.load(CONF / "schedule" / f"{name}.yaml")
    return build_schedule(node.get("schedule", node), snr_shift, zero_terminal_snr)


def sampler_of(name):
    return build_sampler(OmegaConf.load(CONF / "sampler" / f"{name}.yaml"))


def times(schedule, spacing, steps=20):
    return [level.time.item() for level in make_time_grid(schedule, steps, spacing)]


# Default grids.


def test_default_grids_are_near_the_best():
    """With 20 steps on a Gaussian, the error is within 10% of the best spacing."""
    data = instantiate(OmegaConf.load(CONF / "analytic" / "gaussian.yaml"), _convert_="all")
    for name in CONTINUOUS:
        choices = {"": lambda s: s} | {
            spacing: lambda s, spacing=spacing: s._replace(spacing=spacing)
            for spacing in ("trailing", "linspace", "karras", "log_snr")
        }
        samplers = {f"{k} {spacing}": change(sampler_of(k)) for k in SAMPLERS for spacing, change in choices.items()}
        results, _ = compare_samplers(data, schedule_of(name), samplers, [20], 400, 0)
        for k in ("ddim", "dpmpp_2m", "heun"):
            (own,), *others = (results[f"{k} {spacing}"].flow for spacing in choices)
            assert own <= 1.1 * min(error for (error,) in others), (name, k, own, others)


def test_flows_use_equal_time_steps():
    """On rectified_flow, the log-SNR grid has more than twice the error of dpmpp_2m."""
    flow = schedule_of("rectified_flow")
    for name in SAMPLERS:
        assert times(flow, sampler_of(name).spacing) == times(flow, "trailing")
    data = instantiate(OmegaConf.load(CONF / "analytic" / "mixture.yaml"), _convert_="all")
    own = sampler_of("dpmpp_2m")
    samplers = {"own": own, "log_snr": own._replace(spacing="log_snr")}
    results, _ = compare_samplers(data, flow, samplers, [20], 200, 0)
    assert results["own"].flow[0] < results["log_snr"].flow[0] / 2


def test_default_grids_by_schedule_type():
    cosine, table = schedule_of("cosine_continuous"), schedule_of("cosine")
    for name, on_curve, on_table in (
        ("ancestral", "trailing", "trailing"),
        ("ddim", "trailing", "trailing"),
        ("dpmpp_2m", "trailing", "log_snr"),
        ("dpmpp_2m_sde", "trailing", "log_snr"),
        ("euler_ancestral", "trailing", "karras"),
        ("heun", "karras", "karras"),
    ):
        spacing = sampler_of(name).spacing
        assert times(cosine, spacing) == times(cosine, on_curve)
        assert times(table, spacing) == times(table, on_table)


def test_typed_spacing_overrides_defaults():
    """It overrides the spacing of the sampler and of the data, which applies to tables only."""
    for typed in ("karras", "leading"):
        cfg = compose(
            "train",
            "schedule=rectified_flow",
            "sampler=dpmpp_2m",
            "data=mixture",
            f"sampler.spacing={typed}",
            "run_dir=x",
        )
        assert build_sampler(cfg.sampler).spacing == typed
    cfg = compose("train", "data=mixture", "run_dir=x")
    spacing = build_sampler(cfg.sampler).spacing
    assert times(schedule_of("cosine"), spacing) == times(schedule_of("cosine"), "karras")
    assert times(schedule_of("rectified_flow"), spacing) == times(schedule_of("rectified_flow"), "trailing")


# The shift of the SNR.


def test_shift_of_flows_equals_sd3():
    """Esser et al. 2024, eq. 23: t_m = sqrt(m/n) t_n / (1 + (sqrt(m/n) - 1) t_n) for m pixels instead of n."""
    start = 1e-4
    for size, larger in ((64, 64), (64, 128), (64, 256), (256, 64)):
        root = larger / size
        levels = schedule_of("rectified_flow", snr_shift=size / larger).at(U)
        for u, level in zip(U.tolist(), levels, strict=True):
            t = start + (1 - start) * u
            expected = root * t / (1 + (root - 1) * t)
            assert level.sigma.item() == pytest.approx(expected, rel=1e-12)
            assert level.alpha.item() == pytest.approx(1 - expected, rel=1e-9, abs=1e-15)
            assert level.time.item() == u
        assert levels[-1].alpha == 0


def test_shift_multiplies_the_snr_everywhere():
    """The factor is squared, the norm of the curve is kept, and float32 works too."""
    norms = {
        "cosine_continuous": torch.hypot,
        "linear_continuous": torch.hypot,
        "edm_lognormal": lambda alpha, sigma: alpha,
        "rectified_flow": torch.add,
    }
    for name, norm in norms.items():
        for factor in (0.125, 0.5, 3.0):
            for u, rtol in ((U[:-1], 1e-11), (U[:-1].float(), 1e-4)):
                alpha, sigma = schedule_of(name).curve(u)
                shifted = schedule_of(name, snr_shift=factor).curve(u)
                assert shifted[0].dtype == u.dtype
                assert_close(shifted[0] / shifted[1], factor * alpha / sigma, rtol=rtol, atol=0)
                assert_close(norm(*shifted), torch.ones_like(u), rtol=0, atol=1e-6 if rtol > 1e-6 else 1e-14)


def test_shift_of_curves_equals_that_of_tables():
    """A shifted table with the curve's alpha_bar has the noise levels of the shifted curve."""
    for curve in (partial(curves.cosine_log_snr, max_log_snr=30.0), partial(curves.linear_log_snr, max_log_snr=30.0)):
        betas = schedules.from_alpha_bar(lambda u, curve=curve: curve(u)[0].square(), 100, max_beta=0.99999)
        for factor in (0.25, 2.0):
            table = NoiseSchedule(schedules.snr_shift(betas, factor))
            schedule = ContinuousSchedule(curves.shifted(curve, factor), 100)
            for t in (50, 80, 99):  # at smaller t the table lacks the curve's noise at 0
                ours, theirs = schedule.row(t), table.row(t)
                assert ours.alpha.item() == pytest.approx(theirs.alpha.item(), rel=1e-8)
                assert ours.sigma.item() == pytest.approx(theirs.sigma.item(), rel=1e-6)


def test_shifts_multiply_and_scale_the_first_level():
    twice = curves.shifted(curves.shifted(curves.exploding, 0.5), 0.25)
    assert_close(twice(U), curves.shifted(curves.exploding, 0.125)(U), rtol=1e-14, atol=0)
    grid = make_time_grid(schedule_of("edm_lognormal", snr_shift=0.5), 5, "trailing")
    assert grid[0].ratio.item() == pytest.approx(160)


def test_invalid_shifts_are_rejected():
    for name, factor, setting in (
        ("learned", 0.5, "schedule.curve.max_log_snr"),
        ("cosine_continuous", 0.0, "snr_shift"),
        ("cosine_continuous", -2.0, "snr_shift"),
        ("rectified_flow", math.inf, "snr_shift"),
    ):
        with pytest.raises(ValueError, match=setting) as error:
            schedule_of(name, snr_shift=factor)
        assert f"{factor:g}" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"snr_shift=0\.5"):
        curves.shifted(lambda u: (1 - u / 2, u.square() + 0.1), 0.5)


def test_zero_terminal_snr_of_curves():
    """Flows already have it; other curves need another end."""
    assert schedule_of("rectified_flow", zero_terminal_snr=True).row(999).alpha == 0
    for name in ("cosine_continuous", "edm_lognormal", "learned", "linear_continuous"):
        with pytest.raises(ValueError, match=r"zero_terminal_snr=true.*schedule\.curve"):
            schedule_of(name, zero_terminal_snr=True)
