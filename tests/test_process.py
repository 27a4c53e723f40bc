"""The process between any two levels: Bayes' rule, DDPM's equations in plain floats, and diffusers' reverse step."""

import math
from functools import cache
from itertools import combinations

import pytest
import torch
from diffusers import DDPMScheduler
from torch.testing import assert_close

from src.diffusion import schedules
from src.diffusion.noise import Level, NoiseSchedule
from src.diffusion.process import GaussianDiffusion, Prediction, snr_ratio

PREDICTIONS = ["eps", "x0", "v"]
VARIANCES = ["fixed_small", "fixed_large"]
SHAPES = [(3, 2), (3, 4, 5), (3, 2, 4, 4)]
NAMES_IN_DIFFUSERS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_variance = pytest.mark.parametrize("variance", VARIANCES)


def normal(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def level(alpha, sigma):
    return Level(*torch.tensor([alpha, sigma, 0.5], dtype=torch.float64))


# Levels of a table, of a flow (alpha + sigma = 1), and of EDM (alpha = 1): each list noisiest first.
TABLE = [level(math.cos(angle), math.sin(angle)) for angle in (1.56, 1.2, 0.7, 0.1, 0.01)]
FLOW = [level(1 - u, u) for u in (0.99, 0.6, 0.5, 0.02)]
EDM = [level(1.0, sigma) for sigma in (80.0, 3.0, 1.0, 0.002)]
CLEAN = level(1.0, 0.0)
LEVELS = {
    f"{name}{i}": t for name, levels in (("table", TABLE), ("flow", FLOW), ("edm", EDM)) for i, t in enumerate(levels)
}
PAIRS = {
    f"{name}{i}-{j}": (levels[i], levels[j])
    for name, levels in (("table", TABLE), ("flow", FLOW), ("edm", EDM))
    for i, j in combinations(range(len(levels)), 2)
} | {
    "noise-flow": (level(0.0, 1.0), FLOW[0]),
    "edm-flow": (EDM[0], FLOW[1]),
    "noise-table": (level(0.0, 1.0), TABLE[2]),
}

every_level = pytest.mark.parametrize("t", LEVELS.values(), ids=LEVELS.keys())
every_pair = pytest.mark.parametrize(("t", "s"), PAIRS.values(), ids=PAIRS.keys())


@cache
def table():
    return schedules.linear(1000), NoiseSchedule(schedules.linear(1000), dtype=torch.float64)


def variance_by_step(process, s, t):
    """Variance that the link s -> t adds: what `step` makes of unit noise on nothing."""
    return process.step(torch.zeros_like(t.alpha), s, t, torch.ones_like(t.alpha)).square()


@every_level
@every_shape
@every_prediction
def test_interpret_inverts_target(prediction, shape, t):
    """x_0 and eps come back from the target at x_t; dividing by alpha or sigma of 2e-3 or more keeps 12 digits."""
    process = GaussianDiffusion(prediction)
    x0, eps = normal(shape, 0), normal(shape, 1)
    pred = process.interpret(process.target(x0, t, eps), process.add_noise(x0, t, eps), t)
    assert_close(pred.x0, x0, rtol=0, atol=1e-11)
    assert_close(pred.eps, eps, rtol=0, atol=1e-11)


@every_level
@every_shape
@every_prediction
def test_target_inverts_interpret(prediction, shape, t):
    """An arbitrary network output is the target of the x_0 and eps that it means, and these two make up x_t."""
    process = GaussianDiffusion(prediction)
    out, x_t = normal(shape, 2), normal(shape, 3)
    pred = process.interpret(out, x_t, t)
    assert_close(process.target(pred.x0, t, pred.eps), out, rtol=1e-10, atol=1e-10)
    assert_close(t.alpha * pred.x0 + t.sigma * pred.eps, x_t, rtol=1e-10, atol=1e-10)


@every_level
@every_prediction
def test_v_and_its_relatives_are_defined_as_stated(prediction, t):
    """Targets in plain floats: eps, x_0, alpha eps - sigma x_0."""
    process = GaussianDiffusion(prediction)
    alpha, sigma = t.alpha.item(), t.sigma.item()
    expected = {"eps": -1.25, "x0": 0.5, "v": alpha * -1.25 - sigma * 0.5}[prediction]
    x0, eps = (torch.tensor([[value]], dtype=torch.float64) for value in (0.5, -1.25))
    assert process.target(x0, t, eps).item() == pytest.approx(expected, rel=1e-14)
    assert process.add_noise(x0, t, eps).item() == pytest.approx(alpha * 0.5 - sigma * 1.25, rel=1e-14)


@pytest.mark.parametrize("clip", [0.5, 1.0])
@every_level
@every_shape
@every_prediction
def test_clipping_keeps_x_t(prediction, shape, t, clip):
    """x_0 is bounded; where it was inside it is unchanged; x_t = alpha x_0 + sigma eps holds everywhere."""
    out, x_t = normal(shape, 4), normal(shape, 5)
    free = GaussianDiffusion(prediction).interpret(out, x_t, t)
    pred = GaussianDiffusion(prediction, clip=clip).interpret(out, x_t, t)
    assert pred.x0.abs().max() <= clip
    inside = free.x0.abs() <= clip
    assert_close(pred.x0[inside], free.x0[inside], rtol=0, atol=0)
    assert ((pred.x0.abs() == clip) | inside).all()
    assert_close(t.alpha * pred.x0 + t.sigma * pred.eps, x_t, rtol=0, atol=1e-12)


@every_level
@every_prediction
def test_target_gain_is_the_ratio_of_squared_errors(prediction, t):
    """Two x_0 at one x_t: the squared distance of their targets over that of themselves."""
    process = GaussianDiffusion(prediction)
    x_t, x0s = normal((3, 2), 6), (normal((3, 2), 7), normal((3, 2), 8))
    first, second = (process.target(x0, t, (x_t - t.alpha * x0) / t.sigma) for x0 in x0s)
    ratio = (first - second).square().sum() / (x0s[0] - x0s[1]).square().sum()
    assert_close(process.target_gain(t), ratio, rtol=1e-9, atol=0)


@every_pair
@every_shape
def test_posterior_is_bayes_rule(shape, t, s):
    """The product of q(x_t | x_s), as a function of x_s, and q(x_s | x_0), in precisions."""
    x0, x_t = normal(shape, 9), normal(shape, 10)
    scale = t.alpha / s.alpha
    link = t.sigma.square() - scale.square() * s.sigma.square()
    precision = scale.square() / link + 1 / s.sigma.square()
    mean = (scale * x_t / link + s.alpha * x0 / s.sigma.square()) / precision
    posterior = GaussianDiffusion().posterior(x0, x_t, t, s)
    assert posterior.mean.shape == shape
    assert_close(posterior.mean, mean, rtol=0, atol=1e-10)
    assert_close(posterior.log_variance, -precision.log(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("row", [1, 2, 10, 500, 999])
@every_shape
def test_posterior_of_neighbours_is_ddpm_eq_6_and_7(shape, row):
    """Per-sample levels of a table, with coefficients in plain floats from the betas."""
    betas, levels = table()
    x0, x_t = normal(shape, 11), normal(shape, 12)
    rows = [row, 1000 - row, 3]
    t, s = (levels.level(torch.tensor([i - shift for i in rows]), x0) for shift in (0, 1))
    mean, log_variance = GaussianDiffusion().posterior(x0, x_t, t, s)
    for i, index in enumerate(rows):
        beta = betas[index].item()
        bar_s = math.prod(1 - b for b in betas[:index].tolist())
        bar_t = bar_s * (1 - beta)
        expected = (
            math.sqrt(bar_s) * beta / (1 - bar_t) * x0[i] + math.sqrt(1 - beta) * (1 - bar_s) / (1 - bar_t) * x_t[i]
        )
        assert_close(mean[i], expected, rtol=0, atol=1e-10)
        assert log_variance[i].item() == pytest.approx(math.log((1 - bar_s) / (1 - bar_t) * beta), abs=1e-9)


@pytest.mark.parametrize("row", [0, 1, 7, 999])
@every_shape
@every_variance
def test_reverse_step_to_clean_data(variance, shape, row):
    """For s clean the mean is x_0 itself; the log-variance is the posterior's at t = 1, whichever is chosen."""
    _, levels = table()
    process = GaussianDiffusion(variance=variance, decoder_log_variance=levels.decoder_log_variance)
    x0, x_t = normal(shape, 13), normal(shape, 14)
    t, clean = (levels.level(torch.full((3,), index), x0) for index in (row, -1))
    at_one = process.posterior(x0, x_t, *(levels.level(torch.full((3,), index), x0) for index in (1, 0)))
    for gaussian in (process.posterior(x0, x_t, t, clean), process.reverse(Prediction(x0, x_t), x_t, t, clean)):
        assert_close(gaussian.mean, x0, rtol=0, atol=0)
        assert_close(gaussian.log_variance, at_one.log_variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize("row", [1, 2, 10, 500, 999])
@every_variance
def test_reverse_variances_of_neighbours(variance, row):
    """fixed_large is log beta_t, fixed_small log beta_tilde_t; the mean is the posterior's at the predicted x_0."""
    betas, levels = table()
    process = GaussianDiffusion(variance=variance)
    x_t, pred = normal((3, 2), 15), Prediction(normal((3, 2), 16), normal((3, 2), 17))
    t, s = (levels.level(torch.full((3,), index), x_t) for index in (row, row - 1))
    mean, log_variance = process.reverse(pred, x_t, t, s)
    bar_s = math.prod(1 - b for b in betas[:row].tolist())
    beta = betas[row].item()
    ratio = (1 - bar_s) / (1 - bar_s * (1 - beta)) if variance == "fixed_small" else 1
    assert_close(log_variance, torch.full((3, 1), math.log(ratio * beta), dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(mean, process.posterior(pred.x0, x_t, t, s).mean, rtol=0, atol=0)


@every_pair
def test_fixed_large_is_the_variance_of_the_link(t, s):
    """Between any levels fixed_large is Var(x_t | x_s) = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2."""
    x_t, pred = normal((3, 2), 18), Prediction(normal((3, 2), 19), normal((3, 2), 20))
    log_variance = GaussianDiffusion(variance="fixed_large").reverse(pred, x_t, t, s).log_variance
    expected = t.sigma.square() - (t.alpha / s.alpha).square() * s.sigma.square()
    assert_close(log_variance, expected.log(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("levels", [TABLE, FLOW, EDM], ids=["table", "flow", "edm"])
@every_shape
def test_steps_compose(shape, levels):
    """s -> t -> w is s -> w: means multiply, variances add; from clean data it is add_noise."""
    process = GaussianDiffusion()
    x, eps, zero = normal(shape, 21), normal(shape, 22), torch.zeros(shape, dtype=torch.float64)
    for w, t, s in combinations([*levels, CLEAN], 3):
        mean = process.step(process.step(x, s, t, zero), t, w, zero)
        assert_close(mean, process.step(x, s, w, zero), rtol=1e-12, atol=1e-14)
        variance = (w.alpha / t.alpha).square() * variance_by_step(process, s, t) + variance_by_step(process, t, w)
        assert_close(variance, variance_by_step(process, s, w), rtol=1e-10, atol=0)
    for t in levels:
        assert_close(process.step(x, CLEAN, t, eps), process.add_noise(x, t, eps), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("row", [0, 1, 500, 999])
def test_step_between_neighbours_is_ddpm_eq_2(row):
    """sqrt(1 - beta) x + sqrt(beta) eps, also from clean data (row 0)."""
    betas, levels = table()
    x, eps = normal((3, 2), 23), normal((3, 2), 24)
    s, t = (levels.level(torch.full((3,), index), x) for index in (row - 1, row))
    beta = betas[row].item()
    expected = math.sqrt(1 - beta) * x + math.sqrt(beta) * eps
    assert_close(GaussianDiffusion().step(x, s, t, eps), expected, rtol=0, atol=1e-10)


@every_pair
def test_snr_ratio(t, s):
    """SNR_t / SNR_s, by division."""
    assert_close(snr_ratio(t, s), (t.alpha / t.sigma) ** 2 / (s.alpha / s.sigma) ** 2, rtol=1e-12, atol=0)
    assert 0 <= snr_ratio(t, s) < 1


@pytest.mark.parametrize("row", [0, 1, 2, 50, 500, 999])
@every_shape
@every_prediction
def test_reverse_step_equals_diffusers(prediction, shape, row):
    """One ancestral step of the same network output with the same noise; the library on float64 tables.

    It takes 1 - alpha_bar plainly, which at t = 0 costs 4 of 16 digits.
    """
    betas, levels = table()
    scheduler = DDPMScheduler(
        1000, prediction_type=NAMES_IN_DIFFUSERS[prediction], variance_type="fixed_small", clip_sample=False
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    out, x_t = normal(shape, 25), normal(shape, 26)
    expected = scheduler.step(out, row, x_t, generator=torch.Generator().manual_seed(27)).prev_sample

    process = GaussianDiffusion(prediction)
    t, s = (levels.level(torch.full((3,), index), x_t) for index in (row, row - 1))
    mean, log_variance = process.reverse(process.interpret(out, x_t, t), x_t, t, s)
    noise = normal(shape, 27) if row > 0 else torch.zeros_like(mean)
    assert_close(mean + torch.exp(log_variance / 2) * noise, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": "epsilon"}, "unknown prediction 'epsilon'.*process.prediction.*eps"),
        ({"variance": "learned"}, "unknown variance 'learned'.*process.variance.*fixed_small"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"clip": -1.0}, "clip must be positive, got -1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    """The error names the value and the choices."""
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(**arguments)
