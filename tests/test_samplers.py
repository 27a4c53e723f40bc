"""Samplers against each other, against diffusers, and on Gaussian data, for which the ideal denoiser is known."""

import math
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.testing import assert_close

from src.diffusion import samplers, schedules
from src.diffusion.noise import NoiseSchedule
from src.diffusion.process import GaussianDiffusion, Prediction

PREDICTIONS = ["eps", "x0", "v"]
SPACINGS = ["trailing", "leading", "linspace", "karras"]
SHAPES = [(3, 2), (2, 3, 4, 4)]
NAMES_IN_DIFFUSERS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SAMPLERS = {
    "ancestral": samplers.ancestral,
    "ddim": samplers.ddim,
    "ddim_half": partial(samplers.ddim, eta=0.5),
    "ddim_one": partial(samplers.ddim, eta=1.0),
}
BETAS = {
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "zero_terminal": lambda num_steps: schedules.zero_terminal_snr(schedules.linear(num_steps)),
}
# Data N(MEAN, STD^2), narrower than the noise.
MEAN, STD = 0.7, 0.5

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_spacing = pytest.mark.parametrize("spacing", SPACINGS)
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


@cache
def schedule(name="linear", num_steps=1000):
    return NoiseSchedule(BETAS[name](num_steps), dtype=torch.float64)


def normal(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded_noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def nonlinear(x, t):
    """An arbitrary smooth network that depends on the level by its time."""
    return torch.sin(2 * x + t.time) + 0.3 * torch.cos(5 * t.time)


def ideal(x, t):
    """The Gaussian's own denoiser E[x_0 | x_t], by regression of x_0 on x_t."""
    gain = t.alpha * STD**2 / (t.alpha.square() * STD**2 + t.sigma.square())
    x0 = MEAN + gain * (x - t.alpha * MEAN)
    return Prediction(x0, (x - t.alpha * x0) / t.sigma)


def moments(sampler, process, grid, mean, variance):
    """Mean and variance after each step of a sampler that is affine in x and in its noises, exactly.

    Sample 0 starts at 0 and sample 1 at 1, both without noise; sample 2 + k starts at 0 and gets 1 as k-th noise.
    """
    draws = len(grid) - 1
    x = torch.zeros(2 + draws, 1, dtype=torch.float64)
    x[1] = 1
    unit = iter(torch.eye(2 + draws, dtype=torch.float64)[2:, :, None])
    for out in sampler(process, ideal, x, grid, noise=lambda _: next(unit)):
        offset, slope, noises = out[0].item(), (out[1] - out[0]).item(), out[2:] - out[0]
        yield offset + slope * mean, slope**2 * variance + noises.square().sum().item()


def affine_recursion(name, variance_kind, grid, mean, variance):
    """The same in scalars: x_s = (a x_t + b) + noise, by Bayes' rule (ancestral) or DDIM eq. 12 and 16."""
    levels = [(level.alpha.item(), level.sigma.item()) for level in grid]
    eta = {"ancestral": None, "ddim": 0.0, "ddim_half": 0.5, "ddim_one": 1.0}[name]
    for (alpha, sigma), (alpha_s, sigma_s) in pairwise(levels):
        k = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x0_slope, x0_offset = k, (1 - k * alpha) * MEAN
        if sigma_s == 0:
            slope, offset, noise = x0_slope, x0_offset, 0.0
        elif eta is None:
            scale = alpha / alpha_s
            link = sigma**2 - scale**2 * sigma_s**2
            precision = scale**2 / link + 1 / sigma_s**2
            slope = (scale / link + alpha_s / sigma_s**2 * x0_slope) / precision
            offset = alpha_s / sigma_s**2 * x0_offset / precision
            noise = 1 / precision if variance_kind == "fixed_small" else link
        else:
            noise = (eta * sigma_s / sigma) ** 2 * (1 - (alpha / alpha_s) ** 2)
            direction = math.sqrt(sigma_s**2 - noise)
            slope = alpha_s * x0_slope + direction * (1 - alpha * x0_slope) / sigma
            offset = alpha_s * x0_offset - direction * alpha * x0_offset / sigma
        mean, variance = slope * mean + offset, slope**2 * variance + noise
        yield mean, variance


def marginal(level):
    """Mean and variance of x_t for the Gaussian data."""
    return level.alpha.item() * MEAN, (level.alpha.item() * STD) ** 2 + level.sigma.item() ** 2


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@every_spacing
@every_prediction
def test_ancestral_is_ddim_with_eta_one(prediction, spacing, steps, clip):
    """The same noises give the same values all along, for any strides, clipped or not."""
    for name in ["linear", "cosine"] if prediction == "eps" else BETAS:
        process = GaussianDiffusion(prediction, clip=clip)
        predict = samplers.predictor(process, nonlinear)
        grid, x = schedule(name).grid(steps, spacing), normal((3, 2), 0)
        ours = samplers.ancestral(process, predict, x, grid, noise=seeded_noise(1))
        other = samplers.ddim(process, predict, x, grid, eta=1.0, noise=seeded_noise(1))
        for a, b in zip(ours, other, strict=True):
            assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@every_shape
@every_prediction
def test_ddim_equals_diffusers(prediction, shape, steps, eta):
    """Every value of a trailing grid at divisors of T, the library on float64 tables.

    For eps the first x_0 is divided by alpha = 6e-3, and the arbitrary network may stretch a difference further.
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
    process = GaussianDiffusion(prediction)
    x, theirs = normal(shape, 2), seeded_noise(3)
    grid = levels.grid(steps, "trailing")
    ours = samplers.ddim(process, samplers.predictor(process, nonlinear), x, grid, eta=eta, noise=seeded_noise(3))
    for row, value in zip(scheduler.timesteps.tolist(), ours, strict=True):
        t = levels.level(torch.tensor([row]), x)
        noise = theirs(x) if eta > 0 else None
        x = scheduler.step(nonlinear(x, t), row, x, eta=eta, variance_noise=noise).prev_sample
        assert_close(value, x, rtol=1e-8, atol=1e-8)


@every_shape
@every_prediction
def test_ancestral_equals_diffusers(prediction, shape):
    """All T = 50 steps with the same generator, the library on float64 tables; it draws no last noise either."""
    levels = schedule(num_steps=50)
    scheduler = DDPMScheduler(
        50, prediction_type=NAMES_IN_DIFFUSERS[prediction], variance_type="fixed_small", clip_sample=False
    )
    scheduler.alphas_cumprod = torch.cumprod(1 - schedules.linear(50), 0)
    process = GaussianDiffusion(prediction)
    x, generator = normal(shape, 4), torch.Generator().manual_seed(5)
    ours = samplers.ancestral(
        process, samplers.predictor(process, nonlinear), x, levels.grid(50), noise=seeded_noise(5)
    )
    for row, value in zip(range(49, -1, -1), ours, strict=True):
        t = levels.level(torch.tensor([row]), x)
        x = scheduler.step(nonlinear(x, t), row, x, generator=generator).prev_sample
        assert_close(value, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 1.0), (-1.3, 2.0)])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("variance_kind", ["fixed_small", "fixed_large"])
@every_spacing
@every_sampler
def test_gaussian_moments_follow_the_scalar_recursion(name, spacing, variance_kind, steps, mean, variance):
    """Mean and standard deviation after each step, from any start, with the ideal denoiser."""
    process = GaussianDiffusion(variance=variance_kind)
    for betas in ("linear", "cosine"):
        grid = schedule(betas).grid(steps, spacing)
        ours = moments(SAMPLERS[name], process, grid, mean, variance)
        scalars = affine_recursion(name, variance_kind, grid, mean, variance)
        for (our_mean, our_variance), (scalar_mean, scalar_variance) in zip(ours, scalars, strict=True):
            assert our_mean == pytest.approx(scalar_mean, rel=1e-10, abs=1e-10)
            assert math.sqrt(our_variance) == pytest.approx(math.sqrt(scalar_variance), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("variance_kind", ["fixed_small", "fixed_large"])
@every_sampler
def test_gaussian_data_come_out(name, variance_kind):
    """From the marginal of the first level, the discretisation is all that is left, and it is of first order.

    10 times the steps leave about a tenth of the error; at 1000 it is below 1 % of the data's spread.
    """
    process = GaussianDiffusion(variance=variance_kind)

    def errors(steps):
        grid = schedule().grid(steps)
        *_, (mean, variance) = moments(SAMPLERS[name], process, grid, *marginal(grid[0]))
        return abs(mean - MEAN), abs(math.sqrt(variance) - STD)

    for few, many in zip(errors(100), errors(1000), strict=True):
        assert many < 0.01 * STD
        assert many < few / 5 + 1e-9


@every_shape
def test_ddim_is_the_flow_of_gaussian_data(shape):
    """Many steps with eta = 0 carry each x_t to the x_0 at the same number of standard deviations."""
    process, grid = GaussianDiffusion(), schedule().grid(1000)
    mean, variance = marginal(grid[0])
    x = normal(shape, 6)
    *_, out = samplers.ddim(process, ideal, x, grid, noise=torch.randn_like)
    assert_close(out, MEAN + STD * (x - mean) / math.sqrt(variance), rtol=0, atol=0.01)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@every_shape
@every_sampler
def test_a_value_for_every_step(name, shape, steps):
    """Exactly `steps` values of the data's shape; the start is left alone; the last is the predicted x_0."""
    process = GaussianDiffusion("v")
    predict = samplers.predictor(process, nonlinear)
    grid, x = schedule().grid(steps), normal(shape, 7)
    start = x.clone()
    values = [x, *SAMPLERS[name](process, predict, x, grid, noise=seeded_noise(8))]
    assert len(values) == steps + 1
    assert all(value.shape == shape and value.dtype == torch.float64 for value in values)
    assert torch.equal(x, start)
    assert_close(values[-1], predict(values[-2], grid[-2]).x0, rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 7])
@every_sampler
def test_noise_is_drawn_for_all_but_the_last_step(name, steps):
    """None at all without eta; the same noises give the same sample."""
    process, grid, x = GaussianDiffusion("x0"), schedule().grid(steps), normal((3, 2), 9)
    calls = []

    def counting(like):
        calls.append(like.shape)
        return torch.ones_like(like)

    first, second = (
        list(SAMPLERS[name](process, samplers.predictor(process, nonlinear), x, grid, noise=counting)) for _ in "12"
    )
    assert calls == [(3, 2)] * (0 if name == "ddim" else 2 * (steps - 1))
    assert_close(first, second, rtol=0, atol=0)


@every_shape
@every_prediction
def test_predictor_gives_the_output_its_meaning(prediction, shape):
    """The network is called once, on x and its level; target(x_0, eps) is its output."""
    process, x, t = GaussianDiffusion(prediction), normal(shape, 10), schedule().grid(7)[2]
    calls = []

    def denoise(*arguments):
        calls.append(arguments)
        return nonlinear(*arguments)

    pred = samplers.predictor(process, denoise)(x, t)
    assert calls == [(x, t)]
    assert_close(process.target(pred.x0, t, pred.eps), nonlinear(x, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_out_of_range(eta):
    """The error names the value, the range and the option."""
    with pytest.raises(ValueError, match=rf"eta must lie in \[0, 1\], got {eta}.*sampler.eta"):
        next(
            samplers.ddim(
                GaussianDiffusion(), ideal, normal((3, 2), 11), schedule().grid(7), eta=eta, noise=seeded_noise(0)
            )
        )
