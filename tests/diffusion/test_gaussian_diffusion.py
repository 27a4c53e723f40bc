"""The diffusion process between any two levels: Bayes' rule, DDPM in plain floats, and diffusers' reverse step."""

import math
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from src.diffusion import curves, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion, Prediction, snr_ratio
from src.diffusion.noise import ContinuousSchedule, NoiseLevel, NoiseSchedule
from tests.conftest import exact_level
from tests.loops import for_each


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow packages only when tests run, not when they are collected."""
    global DDPMScheduler
    from diffusers import DDPMScheduler


PREDICTIONS = ["eps", "x0", "v", "edm", "velocity"]
VARIANCES = ["fixed_small", "fixed_large"]
SHAPES = [(3, 2), (3, 4, 5), (3, 2, 4, 4)]
NAMES_IN_DIFFUSERS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}

every_shape = for_each("shape", SHAPES)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_variance = for_each("variance", VARIANCES)


def normal(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def level(alpha, sigma):
    return NoiseLevel(*torch.tensor([alpha, sigma, 0.5], dtype=torch.float64))


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

every_level = for_each("t", LEVELS)
every_pair = for_each("t, s", PAIRS)


@cache
def table():
    return schedules.linear(1000), NoiseSchedule(schedules.linear(1000))


def step(x_s, s, t, eps):
    """Draw x_t ~ q(x_t | x_s)."""
    return t.alpha / s.alpha * x_s + t.sigma * (1 - snr_ratio(t, s)).sqrt() * eps


def variance_by_step(s, t):
    """Return the variance that the transition s -> t adds: what `step` makes of unit noise at x_s = 0."""
    return step(torch.zeros_like(t.alpha), s, t, torch.ones_like(t.alpha)).square()


@every_level
@every_shape
@every_prediction
def test_interpret_inverts_target(prediction, shape, t):
    """Division by alpha or sigma of at least 2e-3 keeps 12 digits."""
    diffusion = GaussianDiffusion(prediction)
    x0, eps = normal(shape, 0), normal(shape, 1)
    pred = diffusion.interpret(diffusion.target(x0, t, eps), diffusion.add_noise(x0, t, eps), t)
    assert_close(pred.x0, x0, rtol=0, atol=1e-11)
    assert_close(pred.eps, eps, rtol=0, atol=1e-11)


@every_level
@every_shape
@every_prediction
def test_target_inverts_interpret(prediction, shape, t):
    """For any network output, which also reproduces x_t."""
    diffusion = GaussianDiffusion(prediction)
    out, x_t = normal(shape, 2), normal(shape, 3)
    pred = diffusion.interpret(out, x_t, t)
    assert_close(diffusion.target(pred.x0, t, pred.eps), out, rtol=1e-10, atol=1e-10)
    assert_close(t.alpha * pred.x0 + t.sigma * pred.eps, x_t, rtol=1e-10, atol=1e-10)


@every_level
@every_prediction
def test_targets_equal_their_definitions(prediction, t):
    """In plain floats: eps, x_0, alpha eps - sigma x_0, EDM's F, eps - x_0."""
    diffusion = GaussianDiffusion(prediction)
    alpha, sigma = t.alpha.item(), t.sigma.item()
    # EDM's preconditioning (tab. 1) for x / alpha with noise kappa = sigma / alpha; sigma_data = 0.5.
    kappa, noised = sigma / alpha, 0.5 + sigma / alpha * -1.25
    c_skip, c_out = 0.25 / (kappa**2 + 0.25), kappa * 0.5 / math.sqrt(kappa**2 + 0.25)
    expected = {
        "eps": -1.25,
        "x0": 0.5,
        "v": alpha * -1.25 - sigma * 0.5,
        "edm": (0.5 - c_skip * noised) / c_out,
        "velocity": -1.25 - 0.5,
    }[prediction]
    x0, eps = (torch.tensor([[value]], dtype=torch.float64) for value in (0.5, -1.25))
    assert diffusion.target(x0, t, eps).item() == pytest.approx(expected, rel=1e-9)
    assert diffusion.add_noise(x0, t, eps).item() == pytest.approx(alpha * 0.5 - sigma * 1.25, rel=1e-14)


@for_each("sigma_data", [0.5, 2.0])
@for_each("sigma", [0.002, 0.5, 1.0, 80.0])
@every_shape
def test_edm_output_is_preconditioned(shape, sigma, sigma_data):
    """At alpha = 1, D(x) = c_skip x + c_out F(c_in x) with the coefficients of Karras et al. 2022, tab. 1."""
    diffusion = GaussianDiffusion("edm", sigma_data=sigma_data)
    x_t, out, t = normal(shape, 36), normal(shape, 37), level(1.0, sigma)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / math.sqrt(sigma_data**2 + sigma**2)
    c_in = 1 / math.sqrt(sigma**2 + sigma_data**2)
    pred = diffusion.interpret(out, x_t, t)
    assert_close(pred.x0, c_skip * x_t + c_out * out, rtol=1e-12, atol=1e-12)
    assert_close(diffusion.target(pred.x0, t, pred.eps), out, rtol=1e-10, atol=1e-10)
    assert_close(diffusion.scale_input(x_t, t), c_in * x_t, rtol=1e-12, atol=0)
    assert diffusion.target_gain(t).item() == pytest.approx(1 / c_out**2, rel=1e-12)


@every_shape
@every_prediction
def test_each_sample_uses_its_noise_level(prediction, shape):
    """A batch with levels (B, 1, ..., 1) equals its samples with scalar levels."""
    diffusion = GaussianDiffusion(prediction)
    levels = [TABLE[1], FLOW[2], EDM[0]]
    together = NoiseLevel(
        *(torch.stack(field).view(-1, *[1] * (len(shape) - 1)) for field in zip(*levels, strict=True))
    )
    x0, eps, out = normal(shape, 38), normal(shape, 39), normal(shape, 40)
    target, pred, gain = (
        diffusion.target(x0, together, eps),
        diffusion.interpret(out, x0, together),
        diffusion.target_gain(together),
    )
    assert gain.shape == together.alpha.shape
    for i, t in enumerate(levels):
        alone = diffusion.interpret(out[i : i + 1], x0[i : i + 1], t)
        assert_close(target[i], diffusion.target(x0[i], t, eps[i]), rtol=1e-12, atol=1e-14)
        assert_close(pred.x0[i], alone.x0[0], rtol=1e-12, atol=1e-14)
        assert_close(pred.eps[i], alone.eps[0], rtol=1e-12, atol=1e-14)
        assert_close(gain[i].squeeze(), diffusion.target_gain(t), rtol=1e-12, atol=0)


@for_each("clip_x0", [0.5, 1.0])
@every_level
@every_shape
@every_prediction
def test_clipping_keeps_x_t(prediction, shape, t, clip_x0):
    """x_0 inside of the bound is unchanged, and x_t = alpha x_0 + sigma eps holds everywhere."""
    out, x_t = normal(shape, 4), normal(shape, 5)
    free = GaussianDiffusion(prediction).interpret(out, x_t, t)
    pred = GaussianDiffusion(prediction, clip_x0=clip_x0).interpret(out, x_t, t)
    assert pred.x0.abs().max() <= clip_x0
    inside = free.x0.abs() <= clip_x0
    assert_close(pred.x0[inside], free.x0[inside], rtol=0, atol=0)
    assert ((pred.x0.abs() == clip_x0) | inside).all()
    assert_close(t.alpha * pred.x0 + t.sigma * pred.eps, x_t, rtol=0, atol=1e-12)


@every_level
@every_prediction
def test_target_gain_is_the_ratio_of_squared_errors(prediction, t):
    """Of two x_0 at one x_t."""
    diffusion = GaussianDiffusion(prediction)
    x_t, x0s = normal((3, 2), 6), (normal((3, 2), 7), normal((3, 2), 8))
    first, second = (diffusion.target(x0, t, (x_t - t.alpha * x0) / t.sigma) for x0 in x0s)
    ratio = (first - second).square().sum() / (x0s[0] - x0s[1]).square().sum()
    assert_close(diffusion.target_gain(t), ratio, rtol=1e-9, atol=0)


@every_level
@every_prediction
def test_target_gain_is_the_squared_derivative(prediction, t):
    """d target / d x_0 by autograd at a fixed x_t."""
    diffusion = GaussianDiffusion(prediction, sigma_data=0.8)
    x_t = torch.tensor(0.3, dtype=torch.float64)
    x0 = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(diffusion.target(x0, t, (x_t - t.alpha * x0) / t.sigma), x0)
    assert_close(diffusion.target_gain(t), slope.square(), rtol=1e-9, atol=0)


@for_each("dtype", [torch.float32, torch.float64])
@every_prediction
def test_posterior_from_pure_noise_is_the_forward_marginal(prediction, dtype):
    """At alpha = 0 every target but eps determines x_0, and the posterior is q(x_s | x_0)."""
    diffusion = GaussianDiffusion(prediction)
    noise = NoiseLevel(*torch.tensor([0.0, 1.0, 1.0], dtype=dtype))
    s = NoiseLevel(*torch.tensor([0.6, 0.8, 0.5], dtype=dtype))
    x0, eps = normal((3, 2), 41).to(dtype), normal((3, 2), 42).to(dtype)
    gain = diffusion.target_gain(noise)
    assert gain.isfinite() and gain > 0
    x_t = diffusion.add_noise(x0, noise, eps)
    assert_close(x_t, eps, rtol=0, atol=0)
    assert diffusion.target(x0, noise, eps).isfinite().all()
    if prediction != "eps":
        pred = diffusion.interpret(diffusion.target(x0, noise, eps), x_t, noise)
        assert_close(pred.x0, x0, rtol=1e-5, atol=1e-6)
        assert_close(pred.eps, eps, rtol=1e-5, atol=1e-6)
    mean, log_variance = diffusion.posterior(x0, x_t, noise, s)
    assert_close(mean, 0.6 * x0, rtol=1e-6, atol=1e-7)
    assert log_variance.item() == pytest.approx(math.log(0.64), rel=1e-5)


@every_pair
@every_shape
def test_posterior_is_bayes_rule(shape, t, s):
    """The product of q(x_t | x_s), as a function of x_s, and q(x_s | x_0), by precisions."""
    x0, x_t = normal(shape, 9), normal(shape, 10)
    scale = t.alpha / s.alpha
    transition = t.sigma.square() - scale.square() * s.sigma.square()
    precision = scale.square() / transition + 1 / s.sigma.square()
    mean = (scale * x_t / transition + s.alpha * x0 / s.sigma.square()) / precision
    posterior = GaussianDiffusion().posterior(x0, x_t, t, s)
    assert posterior.mean.shape == shape
    assert_close(posterior.mean, mean, rtol=0, atol=1e-10)
    assert_close(posterior.log_variance, -precision.log(), rtol=0, atol=1e-10)


@for_each("row", [1, 2, 10, 500, 999])
@every_shape
def test_posterior_of_neighbors_is_ddpm_eq_6_and_7(shape, row):
    """With coefficients from the betas in plain floats."""
    betas, levels = table()
    x0, x_t = normal(shape, 11), normal(shape, 12)
    rows = [row, 1000 - row, 3]
    t, s = (exact_level(levels, torch.tensor([i - shift for i in rows]), x0) for shift in (0, 1))
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


@for_each("row", [0, 1, 7, 999])
@every_shape
@every_variance
def test_reverse_step_to_clean_data(variance, shape, row):
    """The mean is x_0; the variance scales as (sigma / alpha)^2 from that of the posterior at t = 1."""
    _, levels = table()
    diffusion = GaussianDiffusion(variance=variance, decoder_scale=levels.decoder_scale)
    x0, x_t = normal(shape, 13), normal(shape, 14)
    t, clean = (exact_level(levels, torch.full((3,), index), x0) for index in (row, -1))
    one, first = (exact_level(levels, torch.full((3,), index), x0) for index in (1, 0))
    expected = diffusion.posterior(x0, x_t, one, first).log_variance + (first.snr / t.snr).log()
    for gaussian in (diffusion.posterior(x0, x_t, t, clean), diffusion.reverse(Prediction(x0, x_t), x_t, t, clean)):
        assert_close(gaussian.mean, x0, rtol=0, atol=0)
        assert_close(gaussian.log_variance, expected, rtol=0, atol=1e-9)


@for_each("row", [1, 2, 10, 500, 999])
@every_variance
def test_reverse_variances_of_neighbors(variance, row):
    """fixed_large is log beta_t and fixed_small log beta_tilde_t; the mean is that of the posterior."""
    betas, levels = table()
    diffusion = GaussianDiffusion(variance=variance)
    x_t, pred = normal((3, 2), 15), Prediction(normal((3, 2), 16), normal((3, 2), 17))
    t, s = (exact_level(levels, torch.full((3,), index), x_t) for index in (row, row - 1))
    mean, log_variance = diffusion.reverse(pred, x_t, t, s)
    bar_s = math.prod(1 - b for b in betas[:row].tolist())
    beta = betas[row].item()
    ratio = (1 - bar_s) / (1 - bar_s * (1 - beta)) if variance == "fixed_small" else 1
    assert_close(log_variance, torch.full((3, 1), math.log(ratio * beta), dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(mean, diffusion.posterior(pred.x0, x_t, t, s).mean, rtol=0, atol=0)


@for_each("row", [0, 1, 10, 999])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_learned_range_is_iddpm_eq_15(prediction, row):
    """log variance = f log beta + (1 - f) log beta_tilde with f = (mix + 1) / 2, in plain floats.

    At t = 0, beta_tilde is replaced by its value at t = 1.
    """
    betas, levels = table()
    diffusion = GaussianDiffusion(prediction, "learned_range", decoder_scale=levels.decoder_scale)
    assert diffusion.outputs == 2
    x_t, out, mix = normal((3, 2), 28), normal((3, 2), 29), normal((3, 2), 30)
    t, s = levels.row(row), levels.row(row - 1)
    pred = diffusion.interpret(torch.cat([out, mix], dim=1), x_t, t)
    plain = GaussianDiffusion(prediction).interpret(out, x_t, t)
    assert_close(pred.x0, plain.x0, rtol=0, atol=0)
    mean, log_variance = diffusion.reverse(pred, x_t, t, s)
    at = max(row, 1)
    bar_s = math.prod(1 - b for b in betas[:at].tolist())
    tilde = (1 - bar_s) / (1 - bar_s * (1 - betas[at].item())) * betas[at].item()
    fraction = (mix + 1) / 2
    expected = fraction * math.log(betas[row].item()) + (1 - fraction) * math.log(tilde)
    assert_close(log_variance, expected, rtol=0, atol=1e-9)
    assert_close(mean, diffusion.posterior(pred.x0, x_t, t, s).mean, rtol=0, atol=0)


@every_pair
def test_learned_range_ends_at_the_fixed_variances(t, s):
    """mix = -1 is fixed_small; mix = 1 is the variance of x_s given x_t for x_0 ~ N(0, 1)."""
    x_t, x0 = normal((3, 2), 43), normal((3, 2), 44)
    diffusion = GaussianDiffusion(variance="learned_range")
    low, high = (diffusion.reverse(Prediction(x0, x_t, m * torch.ones_like(x0)), x_t, t, s) for m in (-1, 1))
    small = GaussianDiffusion().posterior(x0, x_t, t, s)
    added = t.sigma.item() ** 2 - (t.alpha / s.alpha).item() ** 2 * s.sigma.item() ** 2
    large = 1 / (1 / (s.alpha.item() ** 2 + s.sigma.item() ** 2) + (t.alpha / s.alpha).item() ** 2 / added)
    assert_close(low.log_variance, small.log_variance.expand(3, 2), rtol=0, atol=1e-12)
    assert_close(high.log_variance, torch.full((3, 2), math.log(large), dtype=torch.float64), rtol=0, atol=1e-10)
    assert_close(low.mean, small.mean, rtol=0, atol=0)
    assert_close(high.mean, small.mean, rtol=0, atol=0)


@for_each("variance", [*VARIANCES, "learned_range", "learned"])
@every_shape
def test_learned_variance_doubles_the_outputs(shape, variance):
    """The channels of the target come first, then those of mix."""
    diffusion = GaussianDiffusion("x0", variance)
    parts = [normal(shape, 45 + i) for i in range(diffusion.outputs)]
    pred = diffusion.interpret(torch.cat(parts, dim=1), normal(shape, 47), TABLE[1])
    assert_close(pred.x0, parts[0], rtol=0, atol=0)
    if variance in VARIANCES:
        assert diffusion.outputs == 1 and pred.mix is None
    else:
        assert diffusion.outputs == 2
        assert_close(pred.mix, parts[1], rtol=0, atol=0)


@for_each("variance", ["learned_range", "learned"])
def test_learned_variances_have_finite_gradients_at_clean_data(variance):
    """In float32, with one sample whose s is clean; no gradient of mix is 0."""
    _, levels = table()
    diffusion = GaussianDiffusion("eps", variance, decoder_scale=levels.decoder_scale)
    x_t = normal((3, 2), 48).float()
    t, s = (levels.level(torch.tensor([0, 1, 999]) - shift, x_t) for shift in (0, 1))
    out = normal((3, 4), 49).float().requires_grad_()
    mean, log_variance = diffusion.reverse(diffusion.interpret(out, x_t, t), x_t, t, s)
    (gradient,) = torch.autograd.grad((mean.square() + log_variance.square()).sum(), out)
    assert gradient.isfinite().all()
    assert (gradient[:, 2:] != 0).all()


@every_prediction
def test_learned_schedule_has_finite_gradients_at_clean_data(prediction):
    """In float32, through every formula, with one sample whose s is clean."""
    curve = curves.Learned(width=8)
    x0, eps, out = (normal((3, 2), 50 + i).float() for i in range(3))
    t, s, _ = ContinuousSchedule(curve, 100).transition(torch.tensor([0.004, 0.3, 0.95]), x0)
    assert s.sigma[0] == 0
    diffusion = GaussianDiffusion(prediction, "fixed_large")
    x_t = diffusion.add_noise(x0, t, eps)
    pred = diffusion.interpret(out, diffusion.scale_input(x_t, t), t)
    terms = (*diffusion.posterior(x0, x_t, t, s), *diffusion.reverse(pred, x_t, t, s), diffusion.target(x0, t, eps))
    gradients = torch.autograd.grad(sum(term.sum() for term in (*terms, diffusion.target_gain(t))), curve.parameters())
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


@every_pair
def test_learned_variance_scales_the_posterior_variance(t, s):
    """log variance = log fixed_small + mix."""
    diffusion = GaussianDiffusion(variance="learned")
    x_t, mix = normal((3, 2), 31), normal((3, 2), 32)
    pred = diffusion.interpret(torch.cat([normal((3, 2), 33), mix], dim=1), x_t, t)
    small = GaussianDiffusion().reverse(Prediction(pred.x0, pred.eps), x_t, t, s).log_variance
    assert_close(diffusion.reverse(pred, x_t, t, s).log_variance, small + mix, rtol=0, atol=1e-12)


@every_level
def test_scaled_input_has_unit_variance(t):
    """EDM's c_in; other predictions use x_t unchanged."""
    diffusion = GaussianDiffusion("edm", sigma_data=0.7)
    variance = (t.alpha * 0.7) ** 2 + t.sigma**2
    x_t = normal((3, 2), 34)
    assert_close(diffusion.scale_input(x_t, t), x_t / variance.sqrt(), rtol=1e-12, atol=0)
    assert diffusion.scale_input(x_t, t).shape == x_t.shape
    assert GaussianDiffusion("v").scale_input(x_t, t) is x_t


@for_each("quantile", [0.5, 0.9])
def test_dynamic_threshold_scales_down_large_samples(quantile):
    """Imagen: clamp at the quantile of |x_0| if it exceeds the bound, then divide by it."""
    x0 = normal((3, 4, 5), 35) * torch.tensor([0.1, 1.0, 4.0], dtype=torch.float64)[:, None, None]
    t = level(0.8, 0.6)
    pred = GaussianDiffusion("x0", clip_x0=1.0, dynamic_threshold=quantile).interpret(x0, x0, t)
    for sample, clipped in zip(x0.numpy(), pred.x0.numpy(), strict=True):
        bound = max(np.quantile(np.abs(sample), quantile), 1.0)
        np.testing.assert_allclose(clipped, np.clip(sample, -bound, bound) / bound, rtol=1e-12)
    assert_close(t.alpha * pred.x0 + t.sigma * pred.eps, x0, rtol=0, atol=1e-12)


@every_pair
def test_fixed_large_is_the_variance_for_unit_gaussian_data(t, s):
    """Var(x_s | x_t) if x_0 ~ N(0, 1), by precisions.

    Where alpha^2 + sigma^2 = 1 it is Var(x_t | x_s) = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2.
    """
    x_t, pred = normal((3, 2), 18), Prediction(normal((3, 2), 19), normal((3, 2), 20))
    log_variance = GaussianDiffusion(variance="fixed_large").reverse(pred, x_t, t, s).log_variance
    added = t.sigma.square() - (t.alpha / s.alpha).square() * s.sigma.square()
    prior = s.alpha.square() + s.sigma.square()
    expected = 1 / (1 / prior + (t.alpha / s.alpha).square() / added)
    assert_close(log_variance, expected.log(), rtol=0, atol=1e-10)
    if math.isclose(prior, 1) and math.isclose(t.alpha.square() + t.sigma.square(), 1):
        assert_close(log_variance, added.log(), rtol=0, atol=1e-9)


@for_each("levels", {"table": TABLE, "flow": FLOW, "edm": EDM})
@every_shape
def test_forward_steps_compose(shape, levels):
    """s -> t -> w equals s -> w: means multiply, variances add; from clean data it is `add_noise`."""
    diffusion = GaussianDiffusion()
    x, eps, zero = normal(shape, 21), normal(shape, 22), torch.zeros(shape, dtype=torch.float64)
    for w, t, s in combinations([*levels, CLEAN], 3):
        mean = step(step(x, s, t, zero), t, w, zero)
        assert_close(mean, step(x, s, w, zero), rtol=1e-12, atol=1e-14)
        variance = (w.alpha / t.alpha).square() * variance_by_step(s, t) + variance_by_step(t, w)
        assert_close(variance, variance_by_step(s, w), rtol=1e-10, atol=0)
    for t in levels:
        assert_close(step(x, CLEAN, t, eps), diffusion.add_noise(x, t, eps), rtol=1e-14, atol=1e-14)


@for_each("row", [0, 1, 500, 999])
def test_step_between_neighbors_is_ddpm_eq_2(row):
    """sqrt(1 - beta) x + sqrt(beta) eps, including the step from clean data."""
    betas, levels = table()
    x, eps = normal((3, 2), 23), normal((3, 2), 24)
    s, t = (exact_level(levels, torch.full((3,), index), x) for index in (row - 1, row))
    beta = betas[row].item()
    expected = math.sqrt(1 - beta) * x + math.sqrt(beta) * eps
    assert_close(step(x, s, t, eps), expected, rtol=0, atol=1e-10)


@every_pair
def test_snr_ratio_of_pure_noise_and_clean_data(t, s):
    """SNR_t / SNR_s, by division."""
    assert_close(snr_ratio(t, s), (t.alpha / t.sigma) ** 2 / (s.alpha / s.sigma) ** 2, rtol=1e-12, atol=0)
    assert 0 <= snr_ratio(t, s) < 1


@for_each("row", [0, 1, 2, 50, 500, 999])
@every_shape
@pytest.mark.parametrize("prediction", NAMES_IN_DIFFUSERS)
def test_reverse_step_equals_diffusers(prediction, shape, row):
    """With equal outputs and noise. 1 - alpha_bar cancels 4 of 16 digits in diffusers at t = 0."""
    betas, levels = table()
    scheduler = DDPMScheduler(
        1000, prediction_type=NAMES_IN_DIFFUSERS[prediction], variance_type="fixed_small", clip_sample=False
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    out, x_t = normal(shape, 25), normal(shape, 26)
    expected = scheduler.step(out, row, x_t, generator=torch.Generator().manual_seed(27)).prev_sample

    diffusion = GaussianDiffusion(prediction)
    t, s = (exact_level(levels, torch.full((3,), index), x_t) for index in (row, row - 1))
    mean, log_variance = diffusion.reverse(diffusion.interpret(out, x_t, t), x_t, t, s)
    noise = normal(shape, 27) if row > 0 else torch.zeros_like(mean)
    assert_close(mean + torch.exp(log_variance / 2) * noise, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": "epsilon"}, "diffusion.prediction=epsilon "),
        ({"variance": "small"}, "diffusion.variance=small "),
        ({"dynamic_threshold": 0.99}, "diffusion.dynamic_threshold=0.99 .*clip_x0"),
        ({"dynamic_threshold": 1.5, "clip_x0": 1.0}, "diffusion.dynamic_threshold=1.5 "),
        ({"sigma_data": 0.0}, "diffusion.sigma_data=0.0 "),
        ({"clip_x0": 0.0}, "diffusion.clip_x0=0.0 "),
        ({"clip_x0": -1.0}, "diffusion.clip_x0=-1.0 "),
    ],
)
def test_arguments_out_of_range_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(**arguments)
