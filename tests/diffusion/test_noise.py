"""Noise levels: tables against single steps folded in plain floats, and time grids against diffusers."""

import math
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from src.diffusion import curves, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import CLEAN, ContinuousSchedule, NoiseSchedule, make_time_grid, terminal_alpha_bar
from tests.conftest import exact_level
from tests.loops import for_each


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow packages only when tests run, not when they are collected."""
    global DDIMScheduler
    from diffusers import DDIMScheduler


SCHEDULES = {
    "linear": schedules.linear,
    "quadratic": schedules.quadratic,
    "scaled_linear": partial(schedules.quadratic, beta_start=0.00085, beta_end=0.012),
    "cosine": schedules.cosine,
    "sigmoid_jabri": schedules.sigmoid_jabri,
    "sigmoid_geodiff": schedules.sigmoid_geodiff,
    "constant": schedules.constant,
    "inverse": schedules.inverse,
    "exponential": schedules.exponential,
    "laplace": schedules.laplace,
    "zero_terminal": lambda num_steps: schedules.zero_terminal_snr(schedules.linear(num_steps)),
    "shifted_zero_terminal": lambda num_steps: schedules.zero_terminal_snr(
        schedules.snr_shift(schedules.cosine(num_steps), 0.5)
    ),
}
CURVES = {
    "cosine": curves.cosine_log_snr,
    "linear": curves.linear_log_snr,
    "linear_vdm": partial(curves.linear_log_snr, max_log_snr=13.3, min_log_snr=-5.0),
    "exploding": curves.exploding,
    "rectified_flow": curves.rectified_flow,
    "learned": curves.Learned(),
}
SPACINGS = ["trailing", "leading", "linspace", "karras", "log_snr"]
STEPS = [1, 2, 7, 50, 999, 1000, 1500]
SHAPES = [(4,), (4, 2), (4, 3, 5), (4, 3, 8, 8)]

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_curve = pytest.mark.parametrize("name", CURVES)
every_spacing = for_each("spacing", SPACINGS)


@cache
def schedule(name, num_steps=1000):
    return NoiseSchedule(SCHEDULES[name](num_steps))


@cache
def continuous(name, num_steps=1000):
    return ContinuousSchedule(CURVES[name], num_steps)


def on_curve(name, u):
    """Return (alpha, sigma) at the float u by the curve."""
    with torch.no_grad():
        alpha, sigma = CURVES[name](torch.tensor(u, dtype=torch.float64))
    return alpha.item(), sigma.item()


def rounding(name):
    """Return the tolerance for levels of a curve: a learned one computes log-SNRs up to 10 in float32."""
    return 1e-5 if name == "learned" else 1e-14


def fold(betas):
    """Return mean and variance of x_t for x_0 = 1 by single steps x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) eps."""
    means, variances, mean, variance = [], [], 1.0, 0.0
    for beta in betas.tolist():
        mean, variance = mean * math.sqrt(1 - beta), variance * (1 - beta) + beta
        means.append(mean)
        variances.append(variance)
    return torch.tensor(means, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)


def columns(grid):
    return (torch.stack(values) for values in zip(*grid, strict=True))


def rows_of(grid, num_steps):
    """Return row indices, noisiest first, without clean data."""
    return [level.time.item() * num_steps - 1 for level in grid[:-1]]


def diffusers_timesteps(steps, spacing):
    scheduler = DDIMScheduler(1000, timestep_spacing=spacing, steps_offset=0)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


@for_each("num_steps", [10, 1000])
@every_schedule
def test_tables_equal_folded_single_steps(name, num_steps):
    """To the rounding of T products, or of float32, at both ends."""
    levels = schedule(name, num_steps)
    mean, variance = fold(SCHEDULES[name](num_steps))
    for (alpha, sigma, time), rtol in ((levels.rows, 1e-11), ((levels.alpha, levels.sigma, levels.time), 1.2e-7)):
        assert_close(alpha[:-1].double(), mean, rtol=rtol, atol=0)
        assert_close(sigma[:-1].double(), variance.sqrt(), rtol=rtol, atol=0)
        assert_close(time[:-1].double() * num_steps, torch.arange(1.0, num_steps + 1).double(), rtol=rtol, atol=0)
    assert_close(terminal_alpha_bar(levels), mean[-1].item() ** 2, rtol=2e-11, atol=0)


@every_schedule
def test_index_minus_one_is_clean_data(name):
    """A table has T + 1 rows."""
    levels = schedule(name)
    clean = levels.level(torch.tensor([-1]), torch.zeros(1, 2))
    assert [field.tolist() for field in clean] == [[[1.0]], [[0.0]], [[0.0]]]
    assert levels.row(-1) == CLEAN
    assert all(len(table) == 1001 and table.dtype == torch.float32 for table in levels.buffers())
    assert all(len(table) == 1001 and table.dtype == torch.float64 for table in levels.rows)


@every_schedule
def test_rows_equal_levels_at_their_positions(name):
    """Row t is the level at (t + 1) / T, and `position` inverts it."""
    levels = schedule(name)
    for t in (0, 1, 17, 500, 998, 999):
        row = levels.row(t)
        (there,) = levels.at(torch.tensor([(t + 1) / 1000], dtype=torch.float64))
        for a, b in zip(row, there, strict=True):
            assert a.dtype == b.dtype == torch.float64 and a.shape == b.shape == ()
            assert_close(a, b, rtol=1e-9, atol=1e-15)
        angle = torch.atan2(row.sigma, row.alpha)[None]
        assert levels.position(angle).item() == pytest.approx((t + 1) / 1000, abs=1e-9)


@every_schedule
def test_transitions_are_equally_likely_and_join_neighbors(name):
    """s is the row below t, and clean data for the first transition."""
    levels = schedule(name)
    v = (torch.arange(4000) + 0.5) / 4000
    t, s, num_transitions = levels.transition(v, torch.zeros(4000, 2))
    assert num_transitions == 1000
    rows = torch.arange(1000).repeat_interleave(4)
    for field, table in zip(t, (levels.alpha, levels.sigma, levels.time), strict=True):
        assert torch.equal(field[:, 0], table[rows])
    for field, table in zip(s, (levels.alpha, levels.sigma, levels.time), strict=True):
        assert torch.equal(field[:, 0], table[rows - 1])


@for_each("shape", SHAPES)
def test_level_broadcasts_against_data_of_any_rank(shape):
    """Indices (B,) return (B, 1, ..., 1): row t_i scales sample i."""
    levels = schedule("linear")
    t = torch.tensor([999, 0, -1, 500])
    data = torch.ones(shape)
    level = levels.level(t, data)
    for field, table in zip(level, (levels.alpha, levels.sigma, levels.time), strict=True):
        assert field.shape == (4, *[1] * (len(shape) - 1))
        product = data * field
        assert product.shape == shape
        for i, row in enumerate(t.tolist()):
            assert (product[i] == table[row]).all()


@every_schedule
def test_snr_is_the_ratio_of_folded_powers(name):
    """SNR = mean^2 / variance of the folded steps, infinite for clean data."""
    levels = schedule(name)
    mean, variance = fold(SCHEDULES[name](1000))
    snr = exact_level(levels, torch.arange(-1, 1000), torch.zeros(1001)).snr
    assert_close(snr[1:], mean.square() / variance, rtol=1e-11, atol=0)
    assert snr[0] == math.inf


def test_tables_are_not_persistent():
    """A state_dict holds weights only; tables are no parameters either."""
    levels = NoiseSchedule(schedules.linear(10))
    assert not levels.state_dict()
    assert not list(levels.parameters())
    assert list(nn.ModuleDict({"net": nn.Linear(1, 1), "levels": levels}).state_dict()) == ["net.weight", "net.bias"]


@for_each("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_keep_float32(dtype):
    """Neither `.to(dtype)` of the schedule nor of its parent rounds the tables."""
    levels = NoiseSchedule(schedules.linear(100))
    before = [table.clone() for table in levels.buffers()]
    around = nn.ModuleDict({"net": nn.Linear(1, 1), "levels": levels}).to(dtype)
    assert around["net"].weight.dtype == dtype
    levels.to(dtype)
    levels.half()
    assert all(
        torch.equal(old, new) and new.dtype == torch.float32 for old, new in zip(before, levels.buffers(), strict=True)
    )


@for_each("dtype", [None, torch.bfloat16])
def test_device_changes_move_the_tables(dtype):
    """Alone or together with a change of dtype."""
    levels = NoiseSchedule(schedules.linear(100)).to("meta", dtype)
    assert all(table.is_meta and table.dtype == torch.float32 for table in levels.buffers())


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.1, float("nan")])
def test_betas_out_of_range_raise(bad):
    """A beta of exactly 1 is pure noise and allowed."""
    betas = schedules.linear(10)
    betas[5] = bad
    with pytest.raises(ValueError, match="betas"):
        NoiseSchedule(betas)


@every_schedule
def test_decoder_scale_is_the_posterior_variance_at_two(name):
    """beta_tilde = beta_2 (1 - alpha_bar_1) / (1 - alpha_bar_2), in plain floats and by the process."""
    betas, levels = SCHEDULES[name](1000), schedule(name)
    _, variance = fold(betas[:2])
    expected = (betas[1] * variance[0] / variance[1]).item()
    assert levels.decoder_scale * levels.row(0).ratio.item() ** 2 == pytest.approx(expected, rel=1e-9)
    x = torch.zeros(1, 2, dtype=torch.float64)
    t, s = levels.row(1), levels.row(0)
    diffusion = GaussianDiffusion(decoder_scale=levels.decoder_scale)
    decoder, posterior = diffusion.posterior(x, x, s, CLEAN), diffusion.posterior(x, x, t, s)
    assert decoder.log_variance.item() == pytest.approx(posterior.log_variance.item(), abs=1e-9)


@for_each("steps", STEPS)
@every_spacing
@every_schedule
def test_time_grid_descends_from_noise_to_clean_data(name, spacing, steps):
    """steps + 1 finite scalar levels with strictly decreasing time, clean data last."""
    levels = schedule(name)
    grid = make_time_grid(levels, steps, spacing)
    assert len(grid) == steps + 1
    assert all(field.shape == () and field.dtype == torch.float64 for level in grid for field in level)
    alpha, sigma, time = columns(grid)
    snr = alpha.square() / sigma.square()
    assert alpha.isfinite().all() and sigma.isfinite().all() and snr[:-1].isfinite().all()
    assert (time.diff() < 0).all()
    assert (snr.diff() > 0).all()
    assert [field.item() for field in grid[-1]] == [1.0, 0.0, 0.0]
    assert time[0] <= 1
    assert alpha.min() >= 0
    assert alpha[0] >= levels.rows.alpha[-2] * (1 - 1e-9)  # a rounding
    assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha), rtol=1e-12, atol=0)


@for_each("steps", [1, 2, 8, 50, 250, 1000])
@for_each("spacing", ["trailing", "leading"])
@every_schedule
def test_steps_that_divide_t_use_rows(name, spacing, steps):
    """The rows that diffusers visits; rtol is the rounding of an angle over the smallest alpha."""
    levels = schedule(name)
    rows = diffusers_timesteps(steps, spacing)
    alpha, sigma, time = columns(make_time_grid(levels, steps, spacing))
    for field, table in zip((alpha, sigma, time), levels.rows, strict=True):
        assert_close(field[:-1], table[rows], rtol=1e-9, atol=1e-15)


@for_each("steps", [2, 4, 10, 28, 38, 112, 334, 1000])
def test_linspace_time_grid_equals_diffusers(steps):
    """If steps - 1 divides T - 1."""
    expected = diffusers_timesteps(steps, "linspace")
    assert rows_of(make_time_grid(schedule("linear"), steps, "linspace"), 1000) == pytest.approx(expected, abs=1e-9)


@for_each("num_steps", [10, 100, 1000])
@for_each("steps", [3, 7, 30, 999, 1500])
def test_trailing_and_leading_strides_are_equal(num_steps, steps):
    """trailing: from T - 1 to clean data; linspace: from T - 1 to 0; leading: T / steps down to 0."""
    levels = schedule("cosine", num_steps)
    trailing = [*rows_of(make_time_grid(levels, steps, "trailing"), num_steps), -1]
    linspace = rows_of(make_time_grid(levels, steps, "linspace"), num_steps)
    leading = rows_of(make_time_grid(levels, steps, "leading"), num_steps) if steps <= num_steps else [0]
    assert trailing[0] == linspace[0] == num_steps - 1
    assert linspace[-1] == pytest.approx(0, abs=1e-9)
    assert leading[-1] == pytest.approx(0, abs=1e-9)
    for rows, stride in (
        (trailing, num_steps / steps),
        (linspace, (num_steps - 1) / (steps - 1)),
        (leading, num_steps / steps),
    ):
        assert [a - b for a, b in pairwise(rows)] == pytest.approx([stride] * (len(rows) - 1), abs=1e-9)


@for_each("steps", [1, 7, 50])
def test_trailing_starts_at_the_noisiest_row(steps):
    """So does linspace, even with one step."""
    levels = schedule("linear")
    for spacing in ("trailing", "linspace"):
        assert_close(make_time_grid(levels, steps, spacing)[0].alpha, levels.rows.alpha[-2], rtol=1e-9, atol=0)


@for_each("steps", [2, 7, 50, 999])
@every_schedule
def test_karras_is_uniform_in_the_seventh_root(name, steps):
    """(sigma / alpha)^(1/7) is linear from min(80, noisiest row) to row 0 (EDM eq. 5)."""
    levels = schedule(name)
    alpha, sigma, _ = columns(make_time_grid(levels, steps, "karras"))
    ratio = (sigma / alpha)[:-1]
    high = min(levels.rows.sigma[-2] / levels.rows.alpha[-2] if levels.rows.alpha[-2] > 0 else math.inf, 80.0)
    low = levels.rows.sigma[0] / levels.rows.alpha[0]
    expected = [(high ** (1 / 7) + i / (steps - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(steps)]
    assert_close(ratio, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


@for_each("steps", [2, 7, 50, 999])
@every_schedule
def test_log_snr_spacing_is_uniform_in_log_snr(name, steps):
    """From sigma / alpha = 80, or the noisiest row, to row 0."""
    levels = schedule(name)
    alpha, sigma, _ = columns(make_time_grid(levels, steps, "log_snr"))
    first, last = (alpha / sigma)[0].item(), (alpha / sigma)[-2].item()
    assert first == pytest.approx(max(1 / 80, (levels.rows.alpha[-2] / levels.rows.sigma[-2]).item()), rel=1e-9)
    assert last == pytest.approx((levels.rows.alpha[0] / levels.rows.sigma[0]).item(), rel=1e-9)
    strides = (alpha / sigma)[:-1].log().diff().tolist()
    assert strides == pytest.approx([math.log(last / first) / (steps - 1)] * (steps - 1))


@for_each("spacing", SPACINGS)
def test_levels_between_rows_are_interpolated(spacing):
    """Linearly in the angle atan(sigma / alpha)."""
    levels = schedule("cosine", 100)
    angles = [math.atan2(s, a) for a, s in zip(levels.rows.alpha.tolist(), levels.rows.sigma.tolist(), strict=True)]
    grid = make_time_grid(levels, 37, spacing)
    for level, row in zip(grid[:-1], rows_of(grid, 100), strict=True):
        below = min(math.floor(row), 98)  # -1 is clean data
        expected = angles[below] + (row - below) * (angles[below + 1] - angles[below])
        assert math.atan2(level.sigma, level.alpha) == pytest.approx(expected, abs=1e-12)


@for_each("spacing", ["quadratic", "Trailing", ""])
def test_unknown_spacing_raises(spacing):
    with pytest.raises(ValueError, match=f"sampler.spacing={spacing} "):
        make_time_grid(schedule("linear"), 10, spacing)


@for_each("steps", [0, -3])
@every_spacing
def test_sampler_steps_below_one_raise(spacing, steps):
    with pytest.raises(ValueError, match=f"sampler.steps={steps} "):
        make_time_grid(schedule("linear"), steps, spacing)


@every_schedule
def test_at_inverts_position_on_tables(name):
    """From clean data to the noisiest row; angles below 1e-2 keep 1e-16 of pi / 2."""
    levels = schedule(name)
    u = torch.cat([torch.rand(200, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0.0, 1.0])])
    angles = torch.stack([torch.atan2(level.sigma, level.alpha) for level in levels.at(u)])
    assert_close(levels.position(angles), u, rtol=0, atol=1e-9)


@every_curve
def test_at_inverts_position_on_curves(name):
    """In float64; a learned curve computes in float32."""
    levels = continuous(name)
    u = torch.cat([torch.rand(200, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0.0, 1.0])])
    angles = torch.stack([torch.atan2(level.sigma, level.alpha) for level in levels.at(u)])
    assert_close(levels.position(angles), u, rtol=0, atol=1e-5 if name == "learned" else 1e-12)


@every_curve
def test_continuous_levels_equal_the_curve(name):
    """at() and row() return float64 scalars with time u, and clean data at -1."""
    levels = continuous(name)
    assert levels.row(-1) == CLEAN
    for t in (0, 1, 500, 999):
        u = (t + 1) / 1000
        (there,) = levels.at(torch.tensor([u], dtype=torch.float64))
        for level in (levels.row(t), there):
            assert all(f.shape == () and f.dtype == torch.float64 and not f.requires_grad for f in level)
            assert [f.item() for f in level] == pytest.approx([*on_curve(name, u), u], rel=rounding(name))


@for_each("shape", SHAPES)
@for_each("num_steps", [2, 10, 1000])
@every_curve
def test_continuous_transitions_join_multiples_of_one_over_t(name, num_steps, shape):
    """With clean data for the first one; in float32, for data of any rank."""
    v = torch.tensor([0.0, 0.3 / num_steps, 1.5 / num_steps, 1 - 2**-24])
    t, s, num_transitions = continuous(name, num_steps).transition(v, torch.zeros(shape))
    assert num_transitions == num_steps
    assert all(f.shape == (4, *[1] * (len(shape) - 1)) and f.dtype == torch.float32 for level in (t, s) for f in level)
    for i, k in enumerate([0, 0, 1, num_steps - 1]):
        # rtol and atol: float32's rounding of log-SNRs up to 15, and of an angle.
        position, below = (k + 1) / num_steps, k / num_steps
        assert [f[i].item() for f in t] == pytest.approx([*on_curve(name, position), position], rel=1e-5, abs=1e-6)
        expected = [*on_curve(name, below), below] if k > 0 else [1.0, 0.0, 0.0]
        assert [f[i].item() for f in s] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        if k == 0:
            assert [f[i].item() for f in s] == expected


@every_curve
def test_last_continuous_transition_ends_at_clean_data(name):
    """Every s is cleaner than its t, even in float32."""
    t, s, _ = continuous(name).transition(
        torch.rand(5000, generator=torch.Generator().manual_seed(0)), torch.zeros(5000)
    )
    assert (s.snr > t.snr).all()
    assert (s.time < t.time).all()


@for_each("steps", [1, 2, 7, 100])
@every_spacing
@every_curve
def test_time_grid_of_a_curve(name, spacing, steps):
    """steps + 1 levels from the noisiest to clean data, with strictly increasing SNR."""
    levels = continuous(name)
    grid = make_time_grid(levels, steps, spacing)
    assert len(grid) == steps + 1
    assert grid.schedule is levels
    alpha, sigma, time = columns(grid)
    assert alpha.dtype == sigma.dtype == time.dtype == torch.float64
    assert alpha.isfinite().all() and sigma.isfinite().all()
    assert (torch.atan2(sigma, alpha).diff() < 0).all()
    assert [field.item() for field in grid[-1]] == [1.0, 0.0, 0.0]
    for level in grid[:-1]:
        expected = on_curve(name, level.time.item())
        assert [level.alpha.item(), level.sigma.item()] == pytest.approx(expected, rel=rounding(name))

    time = time[:-1]
    fraction = [i / max(steps - 1, 1) for i in range(steps)]
    match spacing:
        case "trailing":
            assert time.tolist() == pytest.approx([1 - i / steps for i in range(steps)], abs=1e-15)
        case "leading":
            assert time.tolist() == pytest.approx([(steps - 1 - i) / steps for i in range(steps)], abs=1e-15)
        case "linspace":
            assert time.tolist() == pytest.approx([1 - f for f in fraction], abs=1e-15)
        case _:
            noisy, clean = on_curve(name, 1.0), on_curve(name, 0.0)
            high = min(noisy[1] / noisy[0] if noisy[0] > 0 else math.inf, 80.0)
            low = clean[1] / clean[0]
            roots = [(1 - f) * high ** (1 / 7) + f * low ** (1 / 7) for f in fraction]
            logs = [(1 - f) * math.log(high) + f * math.log(low) for f in fraction]
            expected = [root**7 for root in roots] if spacing == "karras" else [math.exp(log) for log in logs]
            # The rounding of a position changes pure noise by more; a learned curve computes in float32.
            rtol = 1e-4 if name == "learned" else 1e-9
            assert (sigma / alpha)[:-1].tolist() == pytest.approx(expected, rel=rtol)


@for_each("ratio", [0.02, 0.7, 1.0, 40.0])
@pytest.mark.parametrize(
    "levels",
    [*map(schedule, ("linear", "zero_terminal")), *map(continuous, ("cosine", "exploding", "rectified_flow"))],
    ids=["linear", "zero_terminal", "cosine", "exploding", "rectified_flow"],
)
def test_at_ratio_inverts_ratio(levels, ratio):
    """On tables and curves, for scalars of any dtype."""
    for dtype, rtol in ((torch.float32, 1e-7), (torch.float64, 1e-9)):
        level = levels.at_ratio(torch.tensor(ratio, dtype=dtype).double())
        assert level.ratio.item() == pytest.approx(ratio, rel=rtol)
        assert level.norm.item() == pytest.approx(math.sqrt(level.alpha**2 + level.sigma**2), rel=1e-14)


@pytest.mark.parametrize("name", ["cosine", "linear", "linear_vdm"])
def test_table_of_a_curve_equals_the_curve(name):
    """The rows are the levels at (t + 1) / T, relative to that at 0, where tables are clean.

    Betas of 1e-6 keep 10 digits, as does their sum in sigma^2. Between rows the table equals the curve up to
    interpolation and the noise at 0 of up to e^-5.
    """
    betas = schedules.from_alpha_bar(lambda u: CURVES[name](u)[0].square(), 1000, max_beta=0.99999)
    table, curve = NoiseSchedule(betas), continuous(name)
    clean = curve.at(torch.zeros(1, dtype=torch.float64))[0].alpha.item()
    for t in (0, 1, 10, 500, 998, 999):
        alpha = on_curve(name, (t + 1) / 1000)[0] / clean
        assert table.row(t).alpha.item() == pytest.approx(alpha, rel=1e-9)
        assert table.row(t).sigma.item() == pytest.approx(math.sqrt(1 - alpha**2), rel=1e-6)
    noise = on_curve(name, 0.0)[1] ** 2
    u = torch.linspace(0.2, 1, 77, dtype=torch.float64)
    for a, b in zip(table.at(u), curve.at(u), strict=True):
        angle, expected = torch.atan2(a.sigma, a.alpha).item(), torch.atan2(b.sigma, b.alpha).item()
        # cos(angle) = cos(expected) / cos(angle at 0); the curvature within a transition is of second order in 1 / T.
        assert angle == pytest.approx(expected, abs=2e-5 + noise / math.tan(expected))
    positions = torch.linspace(0.2, 1.3, 50, dtype=torch.float64)
    assert_close(table.position(positions), curve.position(positions), rtol=0, atol=1e-3)


@pytest.mark.parametrize("levels", [schedule("zero_terminal"), continuous("rectified_flow")], ids=["table", "flow"])
def test_zero_terminal_snr_is_finite(levels):
    """alpha = 0 and sigma = 1 exactly at the last row; time grids and transitions are finite."""
    last = levels.row(levels.num_steps - 1)
    assert (last.alpha, last.sigma, last.time) == (0, 1, 1)
    assert last.snr == 0 and last.ratio == math.inf and last.norm == 1
    assert terminal_alpha_bar(levels) == 0
    assert math.isfinite(levels.decoder_scale)
    for spacing in SPACINGS:
        for level in make_time_grid(levels, 10, spacing):
            assert all(field.isfinite() for field in level)
    t, s, _ = levels.transition(torch.tensor([0.0, 0.5, 1 - 2**-24]), torch.zeros(3))
    assert all(field.isfinite().all() for field in (*t, *s))
    assert levels.position(torch.tensor([math.pi / 2], dtype=torch.float64)).item() == pytest.approx(1, abs=1e-9)


@every_curve
def test_terminal_alpha_bar(name):
    """alpha^2 / (alpha^2 + sigma^2), even where the sum is not 1."""
    alpha, sigma = on_curve(name, 1.0)
    expected = alpha**2 / (alpha**2 + sigma**2)
    assert terminal_alpha_bar(continuous(name)) == pytest.approx(expected, rel=1e-12)


@every_curve
def test_decoder_scale_of_curves_is_one(name):
    """The variance of x_0 given x_t is sigma^2 / alpha^2 wherever the last transition starts."""
    x = torch.zeros(1, 2, dtype=torch.float64)
    diffusion = GaussianDiffusion(decoder_scale=continuous(name).decoder_scale)
    for u in (0.0, 0.004, 0.01):
        alpha, sigma = on_curve(name, u)
        (t,) = continuous(name).at(torch.tensor([u], dtype=torch.float64))
        decoder = diffusion.posterior(x, x, t, CLEAN)
        assert decoder.log_variance.item() == pytest.approx(2 * math.log(sigma / alpha), abs=1e-9)


@for_each("num_steps", [1, 0, -5])
def test_too_few_transitions_raise(num_steps):
    with pytest.raises(ValueError, match=f"schedule.num_steps={num_steps} "):
        ContinuousSchedule(curves.cosine_log_snr, num_steps)
