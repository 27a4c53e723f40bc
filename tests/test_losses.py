"""Losses against numpy, min-SNR across predictions, timesteps by counting."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from src.diffusion import losses
from src.diffusion.noise import Level
from src.diffusion.process import GaussianDiffusion

PREDICTIONS = ["eps", "x0", "v"]
SHAPES = [(5, 2), (5, 3, 4, 4)]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def normal(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def per_sample_levels(pairs, shape):
    """One (alpha, sigma) for each sample, to broadcast against the data."""
    alpha, sigma = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    one = [-1, *[1] * (len(shape) - 1)]
    return Level(alpha.view(one), sigma.view(one), torch.linspace(0, 1, len(pairs)).double().view(one))


def five_levels(shape):
    """From nearly clean to nearly noise, on and off the circle alpha^2 + sigma^2 = 1; SNR on both sides of 5."""
    return per_sample_levels([(0.999, math.sqrt(1 - 0.999**2)), (0.8, 0.6), (0.6, 0.8), (0.3, 0.7), (1.0, 3.0)], shape)


def expressing(prediction, x0_hat):
    """A network whose output, in the units of `prediction`, means x0_hat whatever x_t is."""

    def denoise(x_t, t):
        eps_hat = (x_t - t.alpha * x0_hat) / t.sigma
        return {"eps": eps_hat, "x0": x0_hat, "v": t.alpha * eps_hat - t.sigma * x0_hat}[prediction]

    return denoise


def min_snr_loss(prediction, x0_hat, x0, t, eps, gamma=5.0):
    def weighting(process, level):
        return losses.min_snr(process, level, gamma)

    process = GaussianDiffusion(prediction)
    return losses.simple(process, expressing(prediction, x0_hat), x0, t, eps, weighting=weighting)["loss"]


def error_in_numpy(difference, error, delta):
    match error:
        case "l2":
            values = difference**2
        case "l1":
            values = np.abs(difference)
        case "huber":
            size = np.abs(difference)
            values = np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))
    return np.array([sample.mean() for sample in values])


@pytest.mark.parametrize(("error", "delta"), [("l2", 1.0), ("l1", 1.0), ("huber", 1.0), ("huber", 0.1)])
@every_shape
@every_prediction
def test_simple_is_the_mean_error_of_the_target(prediction, shape, error, delta):
    """Per sample, against numpy; the network sees x_t = alpha x_0 + sigma eps and the level."""
    process = GaussianDiffusion(prediction)
    x0, eps, t = normal(shape, 0), normal(shape, 1), five_levels(shape)

    def denoise(x_t, level):
        return torch.sin(3 * x_t) + level.time

    terms = losses.simple(process, denoise, x0, t, eps, weighting=losses.uniform, error=error, huber_delta=delta)
    a, s, u = (field.numpy() for field in t)
    x, e = x0.numpy(), eps.numpy()
    target = {"eps": e, "x0": x, "v": a * e - s * x}[prediction]
    difference = np.sin(3 * (a * x + s * e)) + u - target
    assert_close(terms["loss"].numpy(), error_in_numpy(difference, error, delta), rtol=1e-12, atol=0)
    assert_close(terms["mse"].numpy(), error_in_numpy(difference, "l2", delta), rtol=1e-12, atol=0)


@pytest.mark.parametrize("error", ["l2", "l1", "huber"])
@every_shape
@every_prediction
def test_weighting_multiplies_the_loss_alone(prediction, shape, error):
    """Each sample's loss times its own weight; "mse" stays unweighted."""
    process = GaussianDiffusion(prediction)
    x0, eps, t = normal(shape, 2), normal(shape, 3), five_levels(shape)

    def denoise(x_t, level):
        return x_t.tanh()

    def weighting(process, level):
        return 2 + level.time

    plain = losses.simple(process, denoise, x0, t, eps, weighting=losses.uniform, error=error)
    weighted = losses.simple(process, denoise, x0, t, eps, weighting=weighting, error=error)
    factors = torch.tensor([2, 2.25, 2.5, 2.75, 3], dtype=torch.float64)
    assert_close(weighted["loss"], plain["loss"] * factors, rtol=1e-12, atol=0)
    assert_close(weighted["mse"], plain["mse"], rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [0.5, 5.0, 1000.0])
@every_shape
@every_prediction
def test_min_snr_is_the_same_under_every_prediction(prediction, shape, gamma):
    """min(SNR, gamma) times the squared error of x_0, in whichever units the network speaks."""
    x0, eps, x0_hat, t = normal(shape, 4), normal(shape, 5), normal(shape, 6), five_levels(shape)
    snr = (t.alpha / t.sigma).flatten() ** 2
    expected = snr.clamp(max=gamma) * torch.stack([sample.square().mean() for sample in x0_hat - x0])
    assert_close(min_snr_loss(prediction, x0_hat, x0, t, eps, gamma), expected, rtol=1e-9, atol=0)


@every_prediction
def test_min_snr_at_zero_snr(prediction):
    """At pure noise x_0 has weight 0 however it is expressed; the weights themselves are finite (1 for eps)."""
    shape = (2, 3)
    t = per_sample_levels([(0.0, 1.0), (0.0, 3.0)], shape)
    weight = losses.min_snr(GaussianDiffusion(prediction), t)
    assert_close(weight, torch.full_like(weight, 1.0 if prediction == "eps" else 0.0), rtol=0, atol=0)
    loss = min_snr_loss(prediction, normal(shape, 7), normal(shape, 8), t, normal(shape, 9))
    assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_prediction
def test_min_snr_at_extreme_levels(prediction, dtype):
    """Finite and positive up to SNR = 1e12; there it is gamma over the gain (1, SNR, or SNR + 2 + 1 / SNR)."""
    sigmas = torch.tensor([1e-6, 1e-4, 1e-2], dtype=dtype)
    t = Level((1 - sigmas.double() ** 2).sqrt().to(dtype), sigmas, sigmas)
    weight = losses.min_snr(GaussianDiffusion(prediction), t)
    snr = (1 - sigmas.double() ** 2) / sigmas.double() ** 2
    gain = {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[prediction]
    assert weight.dtype == dtype
    assert_close(weight.double(), 5 / gain, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    faint = Level(sigmas, torch.ones_like(sigmas), sigmas)
    assert losses.min_snr(GaussianDiffusion(prediction), faint).isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, -5.0])
@every_prediction
def test_gamma_must_be_positive(prediction, gamma):
    """The error names the value, a usual one and the option."""
    with pytest.raises(ValueError, match=f"gamma must be positive, got {gamma}: 5 is usual .weighting.gamma"):
        losses.min_snr(GaussianDiffusion(prediction), five_levels((5, 2)), gamma)


def test_unknown_error():
    """The error names the value, the choices and the option."""
    x = normal((5, 2), 10)
    with pytest.raises(ValueError, match=r"unknown error 'l3': objective.error is l2, l1 or huber"):
        losses.simple(
            GaussianDiffusion(), lambda x_t, t: x_t, x, five_levels((5, 2)), x, weighting=losses.uniform, error="l3"
        )


@pytest.mark.parametrize("num_steps", [10, 11, 1000, 10_000])
def test_timesteps_hit_every_index(num_steps):
    """The middles of T equal parts of [0, 1) give each index once, in order."""
    u = (torch.arange(num_steps, dtype=torch.float64) + 0.5) / num_steps
    t = losses.uniform_timesteps(u, num_steps)
    assert t.dtype == torch.int64
    assert t.tolist() == list(range(num_steps))
    assert losses.uniform_timesteps(u.float(), num_steps).tolist() == list(range(num_steps))


@pytest.mark.parametrize("num_steps", [10, 11, 1000, 10_000])
def test_timesteps_stay_in_range(num_steps):
    """The ends of [0, 1) in float32, 0 and 1 - 2^-24, are the first and the last index."""
    t = losses.uniform_timesteps(torch.tensor([0.0, 1 - 2.0**-24]), num_steps)
    assert t.tolist() == [0, num_steps - 1]


@pytest.mark.parametrize("num_steps", [10, 1000])
def test_timesteps_are_uniform(num_steps):
    """Chi-square of 200 000 draws: mean T - 1, standard deviation sqrt(2 (T - 1)); 4 of these on a fixed seed."""
    draws = 200_000
    u = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(losses.uniform_timesteps(u, num_steps), minlength=num_steps).double()
    expected = draws / num_steps
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - (num_steps - 1)) < 4 * math.sqrt(2 * (num_steps - 1))
