"""Schedules against diffusers, and against their definitions folded in plain floats."""

import math

import pytest
import torch
from torch.testing import assert_close

from src.diffusion import schedules
from tests.loops import for_each


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow packages only when tests run, not when they are collected."""
    global DDPMScheduler, betas_for_alpha_bar, rescale_zero_terminal_snr
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, betas_for_alpha_bar, rescale_zero_terminal_snr


SCHEDULES = {
    "linear": schedules.linear,
    "quadratic": schedules.quadratic,
    "cosine": schedules.cosine,
    "sigmoid_jabri": schedules.sigmoid_jabri,
    "sigmoid_geodiff": schedules.sigmoid_geodiff,
    "constant": schedules.constant,
    "inverse": schedules.inverse,
    "exponential": schedules.exponential,
    "laplace": schedules.laplace,
}
LENGTHS = [10, 11, 100, 1000, 4000, 10_000]
ENDS = [(1e-4, 0.02), (0.00085, 0.012)]

every_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES.keys())


def floats(values):
    return torch.tensor(values, dtype=torch.float64)


def diffusers_betas(name, start=1e-4, end=0.02):
    return DDPMScheduler(1000, beta_start=start, beta_end=end, beta_schedule=name).betas


def alpha_bars(betas):
    """Return prod (1 - beta), folded in plain floats."""
    products, product = [], 1.0
    for beta in betas.tolist():
        product *= 1 - beta
        products.append(product)
    return products


def log_snrs(betas):
    """Return log(alpha_bar / (1 - alpha_bar)), with the variance folded as a sum to keep its digits."""
    values, log_signal, noise = [], 0.0, 0.0
    for beta in betas.tolist():
        log_signal, noise = log_signal + math.log1p(-beta), noise * (1 - beta) + beta
        values.append(log_signal - math.log(noise))
    return floats(values)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *((lambda e=ends: schedules.linear(1000, *e), lambda e=ends: diffusers_betas("linear", *e)) for ends in ENDS),
        *(
            (lambda e=ends: schedules.quadratic(1000, *e), lambda e=ends: diffusers_betas("scaled_linear", *e))
            for ends in ENDS
        ),
        (lambda: schedules.cosine(1000), lambda: diffusers_betas("squaredcos_cap_v2")),
        (lambda: schedules.sigmoid_geodiff(1000), lambda: diffusers_betas("sigmoid")),
        (lambda: schedules.laplace(1000), lambda: diffusers_betas("laplace")),
        (lambda: schedules.exponential(1000), lambda: betas_for_alpha_bar(1000, alpha_transform_type="exp")),
    ],
    ids=["linear", "linear_ldm", "quadratic", "scaled_linear", "cosine", "sigmoid_geodiff", "laplace", "exponential"],
)
def test_betas_equal_diffusers(ours, theirs):
    """diffusers computes in float32, which rounds to 6e-8."""
    assert_close(ours().float(), theirs(), rtol=1e-6, atol=0)


@every_schedule
def test_zero_terminal_snr_equals_diffusers(make):
    """In float64. A difference of similar alpha_bar loses up to 1e-13 of a beta of 1e-4."""
    betas = make(1000)
    assert_close(schedules.zero_terminal_snr(betas), rescale_zero_terminal_snr(betas.clone()), rtol=1e-9, atol=0)


@for_each("num_steps", LENGTHS)
@every_schedule
def test_betas_are_float64_inside_zero_and_one(make, num_steps):
    """For any number of steps."""
    betas = make(num_steps)
    assert betas.shape == (num_steps,)
    assert betas.dtype == torch.float64
    assert betas.min() > 0 and betas.max() < 1


@for_each("num_steps", LENGTHS)
def test_linear_ends_scale_with_one_over_t(num_steps):
    """beta is linear between the ends times 1000 / T, capped at max_beta."""
    start, end = 1e-4 * 1000 / num_steps, 0.02 * 1000 / num_steps
    expected = [min(start + (end - start) * t / (num_steps - 1), 0.999) for t in range(num_steps)]
    assert_close(schedules.linear(num_steps), floats(expected), rtol=1e-12, atol=0)


@for_each("num_steps", [20, 100, 4000, 10_000])
def test_linear_terminal_noise_does_not_depend_on_t(num_steps):
    """The last alpha_bar is at most that of T = 1000, 4e-5; without scaling it is 0.36 for T = 100."""
    assert alpha_bars(schedules.linear(num_steps))[-1] < 1e-4


@for_each("num_steps", [10, 100, 1000])
def test_quadratic_ends_do_not_depend_on_t(num_steps):
    """sqrt(beta) is linear between the roots of the ends."""
    low, high = math.sqrt(1e-4), math.sqrt(0.02)
    expected = [(low + (high - low) * t / (num_steps - 1)) ** 2 for t in range(num_steps)]
    assert_close(schedules.quadratic(num_steps), floats(expected), rtol=1e-12, atol=0)


@for_each("num_steps", [10, 100, 1000])
def test_constant_decays_as_a_power(num_steps):
    """alpha_bar_t = (1 - beta)^t, up to T roundings."""
    expected = [0.98 ** (t + 1) for t in range(num_steps)]
    assert_close(floats(alpha_bars(schedules.constant(num_steps, 0.02))), floats(expected), rtol=1e-12, atol=0)


@for_each("num_steps", LENGTHS)
def test_inverse_alpha_bar_is_linear(num_steps):
    """alpha_bar_t = 1 - t / T, except for the capped last step."""
    betas = schedules.inverse(num_steps)
    expected = [1 - (t + 1) / num_steps for t in range(num_steps - 1)]
    assert_close(floats(alpha_bars(betas[:-1])), floats(expected), rtol=1e-9, atol=0)
    assert betas[-1] == 0.999


@for_each("rate", [5.0, 12.0])
@for_each("num_steps", LENGTHS)
def test_exponential_has_equal_betas(num_steps, rate):
    """alpha_bar = exp(-rate u) decreases by equal factors."""
    expected = -math.expm1(-rate / num_steps)
    betas = schedules.exponential(num_steps, rate)
    assert_close(betas, torch.full_like(betas, expected), rtol=1e-11, atol=0)


@for_each("tau", [0.3, 1.0, 1.1])
@for_each("start, end", [(-3.0, 3.0), (0.0, 3.0)])
def test_sigmoid_jabri_is_algorithm_1(start, end, tau):
    """The folded alpha_bar is gamma(u) of the paper, up to the cap on the last step."""

    def gamma(u):
        first, last = sigmoid(start / tau), sigmoid(end / tau)
        return (last - sigmoid((u * (end - start) + start) / tau)) / (last - first)

    betas = schedules.sigmoid_jabri(500, start, end, tau)
    expected = [gamma((t + 1) / 500) for t in range(499)]
    assert_close(floats(alpha_bars(betas[:-1])), floats(expected), rtol=1e-9, atol=0)
    assert betas[-1] == 0.999


@for_each("mu, scale", [(0.0, 0.5), (0.0, 1.0), (0.7, 0.5)])
def test_laplace_log_snr_is_laplace_distributed(mu, scale):
    """With power = 1, the log-SNR at step t of T is exceeded with probability t / T.

    alpha_bar is relative to that at u = 0, just below 1; atol is the 1e-6 inside the log.
    """
    num_steps = 1000
    at_clean = sigmoid(mu - scale * math.log(1e-6))
    for t, alpha_bar in enumerate(alpha_bars(schedules.laplace(num_steps, mu, scale, power=1.0)[:-1]), 1):
        alpha_bar *= at_clean
        std = (math.log(alpha_bar / (1 - alpha_bar)) - mu) / scale
        exceeded = 1 - math.exp(std) / 2 if std < 0 else math.exp(-std) / 2
        assert exceeded == pytest.approx(t / num_steps, abs=1.1e-6)


def test_custom_returns_its_betas():
    """In float64."""
    betas = [0.01 * (t + 1) for t in range(12)]
    assert schedules.custom(betas).tolist() == betas
    assert schedules.custom(betas).dtype == torch.float64


@for_each("factor", [0.25, 0.5, 2.0, 8.0])
@for_each("num_steps", [10, 1000])
@every_schedule
def test_snr_shift_moves_log_snr(make, num_steps, factor):
    """By 2 log(factor) at every step. Betas of 1e-6 have 10 digits left after 1 - ratio."""
    betas = make(num_steps)
    assert_close(
        log_snrs(schedules.snr_shift(betas, factor)), log_snrs(betas) + 2 * math.log(factor), rtol=0, atol=1e-8
    )


@every_schedule
def test_snr_shift_of_one_is_the_identity(make):
    """Up to the rounding of 1 - ratio."""
    betas = make(1000)
    assert_close(schedules.snr_shift(betas, 1.0), betas, rtol=1e-9, atol=1e-14)


@every_schedule
def test_snr_shifts_compose_by_multiplication(make):
    """By 2 and then by 1/8 is by 1/4."""
    betas = make(1000)
    twice = schedules.snr_shift(schedules.snr_shift(betas, 2.0), 0.125)
    assert_close(twice, schedules.snr_shift(betas, 0.25), rtol=1e-8, atol=0)


@for_each("factor", [1.0, 0.5, 2.0])
@for_each("num_steps", [10, 100, 1000])
@every_schedule
def test_zero_terminal_snr_ends_at_zero(make, num_steps, factor):
    """The last beta is exactly 1, and the first is unchanged, even after an SNR shift."""
    before = schedules.snr_shift(make(num_steps), factor)
    betas = schedules.zero_terminal_snr(before)
    assert betas.shape == before.shape
    assert betas.dtype == torch.float64
    assert betas[-1] == 1
    assert alpha_bars(betas)[-1] == 0
    assert betas.min() > 0 and betas[:-1].max() < 1
    assert_close(betas[0], before[0], rtol=1e-9, atol=0)


@for_each("num_steps", [10, 1000])
def test_zero_terminal_snr_is_algorithm_1(num_steps):
    """sqrt(alpha_bar) is shifted to end at 0 and scaled to keep its first value."""
    old = [math.sqrt(a) for a in alpha_bars(schedules.linear(num_steps))]
    new = [math.sqrt(a) for a in alpha_bars(schedules.zero_terminal_snr(schedules.linear(num_steps)))]
    expected = [(a - old[-1]) * old[0] / (old[0] - old[-1]) for a in old]
    assert_close(floats(new), floats(expected), rtol=1e-10, atol=1e-15)


@for_each("num_steps", [-1, 0, 1, 9, 10_001])
@every_schedule
def test_num_steps_out_of_range_raises(make, num_steps):
    with pytest.raises(ValueError, match=f"schedule.num_steps={num_steps} "):
        make(num_steps)


def test_custom_with_too_few_betas_raises():
    with pytest.raises(ValueError, match=r"schedule.betas"):
        schedules.custom([0.1] * 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.linear(1000, 1e-4, -0.02), "-0.02"),
        (lambda: schedules.linear(1000, 0.0, 0.02), r"\[0, 0.02\]"),
        (lambda: schedules.linear(10, max_beta=1.5), "1.5"),
        (lambda: schedules.quadratic(1000, -0.1, 0.02), "schedule.beta_start=-0.1 "),
        (lambda: schedules.quadratic(1000, 1e-4, 2.0), r", 2\]"),
        (lambda: schedules.cosine(1000, max_beta=1.0), "schedule.max_beta=1.0 "),
        (lambda: schedules.sigmoid_geodiff(1000, 1e-4, 1.5), r", 1\.49"),
        (lambda: schedules.constant(1000, 0.0), r"\[0, 0\]"),
        (lambda: schedules.constant(1000, 1.0), r"\[1, 1\]"),
        (lambda: schedules.constant(1000, float("nan")), "nan"),
        (lambda: schedules.inverse(1000, max_beta=1.0), r", 1\]"),
        (lambda: schedules.exponential(1000, 0.0), r"\[0, 0\]"),
        (lambda: schedules.exponential(1000, -1.0), "-0.001"),
        (lambda: schedules.laplace(1000, scale=0.0), "schedule.scale=0.0 "),
        (lambda: schedules.laplace(1000, power=-1.0), "schedule.power=-1.0 "),
        (lambda: schedules.sigmoid_jabri(1000, start=3.0, end=-3.0), "schedule.start=3.0 .*schedule.end=-3.0"),
        (lambda: schedules.sigmoid_jabri(1000, tau=0.0), "schedule.tau=0.0 "),
        (lambda: schedules.sigmoid_jabri(1000, tau=0.004), "schedule"),
        (lambda: schedules.custom([0.1] * 9 + [1.0]), "schedule.betas"),
        (lambda: schedules.custom([0.1] * 9 + [float("nan")]), "nan"),
        (lambda: schedules.snr_shift(schedules.linear(1000), 0.0), "snr_shift=0.0 "),
        (lambda: schedules.snr_shift(schedules.linear(1000), -2.0), "snr_shift=-2.0 "),
    ],
)
def test_schedule_arguments_out_of_range_raise(call, message):
    """So do arguments that lead to betas outside of (0, 1)."""
    with pytest.raises(ValueError, match=message):
        call()
