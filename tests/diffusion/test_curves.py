"""Continuous-time schedules against formulas for their log-SNR in plain floats."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from src.diffusion import curves
from src.diffusion.noise import CLEAN, ContinuousSchedule, make_time_grid
from tests.loops import for_each

U = [0.0, 1e-6, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0]


def floats(values):
    return torch.tensor(values, dtype=torch.float64)


def log_snr(curve, u):
    alpha, sigma = curve(floats(u) if isinstance(u, list) else u)
    return 2 * (alpha.log() - sigma.log())


def learned(seed, **settings):
    """A learned curve far from its initialization: weights of any sign, slopes of any size."""
    curve = curves.Learned(**settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight, size in ((curve.line, 2), (curve.heights, 3), (curve.centers, 1), (curve.slopes, 20)):
            weight.copy_(size * torch.randn(weight.shape, generator=generator))
    return curve


CURVES = {
    "cosine": curves.cosine_log_snr,
    "cosine_narrow": partial(curves.cosine_log_snr, max_log_snr=3.0, min_log_snr=-7.0),
    "linear": curves.linear_log_snr,
    "linear_narrow": partial(curves.linear_log_snr, max_log_snr=13.3, min_log_snr=-5.0),
    "exploding": curves.exploding,
    "exploding_narrow": partial(curves.exploding, sigma_min=0.02, sigma_max=3.0),
    "rectified_flow": curves.rectified_flow,
    "rectified_flow_late": partial(curves.rectified_flow, start=0.01),
    "learned": curves.Learned(),
    "learned_random": learned(0),
}
every_curve = pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES.keys())
preserving = pytest.mark.parametrize("name", ["cosine", "cosine_narrow", "linear", "linear_narrow", "learned_random"])
every_end = for_each("high, low", [(15.0, -15.0), (13.3, -5.0), (2.0, 1.0), (-1.0, -4.0)])


@every_end
def test_linear_log_snr_is_linear(high, low):
    """lambda = high + (low - high) u; the sigmoids keep it to 1e-12."""
    expected = [high + (low - high) * u for u in U]
    assert_close(log_snr(partial(curves.linear_log_snr, max_log_snr=high, min_log_snr=low), U), floats(expected))


@every_end
def test_cosine_log_snr_equals_hoogeboom_et_al(high, low):
    """lambda = -2 log tan(a u + b), b = atan(e^(-high/2)), a + b = atan(e^(-low/2)) (2301.11093, app. A)."""
    b = math.atan(math.exp(-high / 2))
    a = math.atan(math.exp(-low / 2)) - b
    expected = [-2 * math.log(math.tan(a * u + b)) for u in U]
    assert_close(log_snr(partial(curves.cosine_log_snr, max_log_snr=high, min_log_snr=low), U), floats(expected))


def test_cosine_without_ends_is_the_quarter_circle():
    """With distant ends, alpha = cos(pi u / 2) and sigma = sin(pi u / 2)."""
    alpha, sigma = curves.cosine_log_snr(floats(U), 60.0, -60.0)
    angle = math.pi / 2 * floats(U)
    assert_close(alpha, angle.cos(), rtol=0, atol=1e-12)
    assert_close(sigma, angle.sin(), rtol=0, atol=1e-12)


@preserving
def test_variance_is_preserved(name):
    alpha, sigma = CURVES[name](floats(U))
    assert_close(alpha.square() + sigma.square(), torch.ones(len(U), dtype=torch.float64), rtol=1e-14, atol=0)


@for_each("low, high", [(0.002, 80.0), (0.01, 50.0), (1.0, 1.5)])
def test_exploding_sigma_is_geometric(low, high):
    """alpha = 1; equal strides of u multiply sigma by equal factors."""
    alpha, sigma = curves.exploding(torch.linspace(0, 1, 41, dtype=torch.float64), low, high)
    assert (alpha == 1).all()
    expected = [low]
    for _ in range(40):
        expected.append(expected[-1] * (high / low) ** (1 / 40))
    assert_close(sigma, floats(expected), rtol=1e-12, atol=0)


@for_each("start", [1e-4, 0.02, 0.5])
@for_each("dtype", [torch.float32, torch.float64])
def test_rectified_flow_is_linear(dtype, start):
    """alpha + sigma = 1 with sigma linear from `start` to exactly 1: the noisiest level is pure noise."""
    u = torch.linspace(0, 1, 17, dtype=dtype)
    alpha, sigma = curves.rectified_flow(u, start)
    eps = torch.finfo(dtype).eps
    assert_close(alpha + sigma, torch.ones_like(u), rtol=0, atol=eps)
    assert_close(sigma.double(), floats([start + (1 - start) * i / 16 for i in range(17)]), rtol=2 * eps, atol=0)
    assert alpha[-1] == 0 and sigma[-1] == 1
    assert alpha.min() >= 0


@every_curve
def test_noise_increases_strictly(curve):
    """So does sigma / alpha, and the angle by which `position` searches."""
    with torch.no_grad():
        alpha, sigma = curve(torch.linspace(0, 1, 2001, dtype=torch.float64))
    assert (torch.atan2(sigma, alpha).diff() > 0).all()
    assert sigma[0] > 0 and alpha.min() >= 0


@every_curve
def test_curves_keep_shape_and_dtype(curve):
    """float32 results equal those in float64 up to the rounding of log-SNRs up to 15, or of 1."""
    u = torch.rand(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, rounded = curve(u), curve(u.float())
    for a, b in zip(exact, rounded, strict=True):
        assert a.shape == b.shape == u.shape
        assert a.dtype == torch.float64 and b.dtype == torch.float32
        assert_close(b.double(), a, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        (scalar, _), (first, _) = curve(u[1, 2, 0]), curve(u[1])
    assert scalar.shape == () and first.shape == (4, 2)


@for_each("seed", range(8))
@for_each("high, low", [(10.0, -10.0), (13.3, -5.0)])
def test_learned_is_monotone_and_keeps_its_ends(high, low, seed):
    """For any parameters: strictly in float64, and up to 1e-6 of the range in float32."""
    curve = learned(seed, max_log_snr=high, min_log_snr=low, width=32)
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    with torch.no_grad():
        rounded, exact = log_snr(curve, u), log_snr(curve.double(), u)
    assert (exact.diff() < 0).all()
    assert (rounded.diff() <= 1e-6 * (high - low)).all()
    for values, share in ((exact, 1e-12), (rounded, 1e-5)):
        assert values[0].item() == pytest.approx(high, abs=share * (high - low))
        assert values[-1].item() == pytest.approx(low, abs=share * (high - low))


def test_learned_is_nearly_linear_at_initialization():
    """Within a tenth of its range of the straight line."""
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    with torch.no_grad():
        values = log_snr(curves.Learned(10.0, -10.0), u)
    assert_close(values, 10 - 20 * u, rtol=0, atol=2.0)


@for_each("seed", [1, 2])
def test_learned_is_differentiable(seed):
    """The gradient of every parameter and of u equals finite differences in float64."""
    curve = learned(seed, width=6).double()
    u = floats([0.1, 0.45, 0.8]).requires_grad_()
    parameters = list(curve.parameters())

    def sigmas(u, *_):
        return curve(u)[1]

    assert torch.autograd.gradcheck(sigmas, (u, *parameters))
    gradients = torch.autograd.grad(curve(u)[1].sum(), parameters)
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


def test_learned_is_accurate_with_low_precision_weights():
    """With weights in bfloat16, no two of 1000 levels coincide or swap."""
    curve = curves.Learned().bfloat16()
    with torch.no_grad():
        values = log_snr(curve, torch.linspace(0, 1, 1001))
    assert (values.diff() < 0).all()
    assert_close(values[[0, -1]], torch.tensor([10.0, -10.0]), rtol=1e-4, atol=0)


def test_learned_training_keeps_its_ends():
    """No parameter changes the ends."""
    curve = learned(3, width=6).double()
    for u in (0.0, 1.0):
        alpha, _ = curve(floats([u]))
        for gradient in torch.autograd.grad(alpha.sum(), list(curve.parameters())):
            assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def angles(levels):
    """Return atan(sigma / alpha) of the levels, which is finite for pure noise too."""
    return torch.stack([torch.atan2(level.sigma, level.alpha) for level in levels])


@every_curve
def test_position_inverts_at(curve):
    """Even where a learned curve is nearly flat or computes in float32."""
    schedule = ContinuousSchedule(curve, 100)
    noisiest, cleanest = angles(schedule.at(floats([1.0, 0.0])))
    wanted = cleanest + (noisiest - cleanest) * torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    assert_close(angles(schedule.at(schedule.position(wanted))), wanted, rtol=1e-5, atol=0)


@for_each("num_steps", [2, 10, 1000])
@every_curve
def test_transitions_have_width_one_over_num_steps(curve, num_steps):
    """t and s lie at (k + 1) / n and k / n around v, with clean data for k = 0; `level_at` lies at v."""
    v = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    schedule = ContinuousSchedule(curve, num_steps)
    t, s, num_transitions = schedule.transition(v, torch.zeros(2000, 1, 1))
    assert num_transitions == num_steps
    assert all(field.shape == (2000, 1, 1) and field.dtype == torch.float64 for field in (*t, *s))
    k = (v * num_steps).floor()
    clean = k == 0
    at = schedule.level_at(v, torch.zeros(2000, 1, 1))
    for level, position in ((t, (k + 1) / num_steps), (s, k / num_steps), (at, v)):
        kept = ~clean if level is s else slice(None)
        for field, expected in zip(level, (*curve(position[kept]), position[kept]), strict=True):
            assert_close(field.flatten()[kept], expected, rtol=1e-14, atol=0)
    assert all((field.flatten()[clean] == value).all() for field, value in zip(s, CLEAN, strict=True))
    assert (torch.atan2(s.sigma, s.alpha) < torch.atan2(t.sigma, t.alpha)).all()


@for_each("steps", [1, 2, 30])
@for_each("spacing", ["trailing", "leading", "linspace", "karras", "log_snr"])
@every_curve
def test_time_grids_descend_to_clean_data(curve, spacing, steps):
    """Finite and strictly cleaner at each step, from the noisiest level if the spacing includes it."""
    schedule = ContinuousSchedule(curve)
    grid = make_time_grid(schedule, steps, spacing)
    (noisiest,) = schedule.at(floats([1.0]))
    assert len(grid) == steps + 1 and grid[-1] == CLEAN
    assert all(field.isfinite() for level in grid for field in level)
    assert (angles(grid).diff() < 0).all()
    assert angles(grid)[0] <= angles([noisiest])[0]
    if spacing in ("trailing", "linspace"):
        assert grid[0] == noisiest
    elif spacing != "leading":
        # rtol: the rounding of a position; a learned curve computes its log-SNR in float32.
        assert grid[0].ratio.item() == pytest.approx(min(noisiest.ratio.item(), 80), rel=1e-4)


@pytest.mark.parametrize(
    "curve", [curves.cosine_log_snr, curves.linear_log_snr, lambda u, *ends: curves.Learned(*ends)(u)]
)
@for_each("high, low", [(1.0, 1.0), (-5.0, 5.0), (math.nan, 0.0)])
def test_log_snr_ends_in_wrong_order_raise(curve, high, low):
    with pytest.raises(ValueError, match=f"schedule.curve.max_log_snr={high} .*min_log_snr={low}") as error:
        curve(floats([0.5]), high, low)
    assert "\n" not in str(error.value)


@for_each("low, high", [(0.0, 80.0), (-1.0, 80.0), (2.0, 2.0), (80.0, 0.002)])
def test_exploding_sigmas_out_of_range_raise(low, high):
    with pytest.raises(ValueError, match=f"schedule.curve.sigma_min={low} .*sigma_max={high}") as error:
        curves.exploding(floats([0.5]), low, high)
    assert "\n" not in str(error.value)


@for_each("start", [0.0, -0.1, 1.0])
def test_rectified_flow_start_out_of_range_raises(start):
    with pytest.raises(ValueError, match=f"schedule.curve.start={start} ") as error:
        curves.rectified_flow(floats([0.5]), start)
    assert "\n" not in str(error.value)
