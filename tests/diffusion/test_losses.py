"""Losses and weightings against the formulas of their papers, Bayes' rule and torch.distributions."""

import inspect
import math
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from src.diffusion import curves, losses, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import CLEAN, ContinuousSchedule, NoiseLevel, NoiseSchedule, Transition
from tests.loops import for_each


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow packages only when tests run, not when they are collected."""
    global norm
    from scipy.stats import norm


TARGETS = ["eps", "x0", "v", "edm", "velocity"]
VARIANCES = ["fixed_small", "fixed_large", "learned_range", "learned"]
LEARNED = ["learned_range", "learned"]
SHAPES = [(5, 2), (5, 3, 4, 4)]
SIGMA_DATA = 0.7
STEPS = 100

# The weights of the papers, on the squared error of x_0 or eps, as functions of SNR = alpha^2 / sigma^2.
# k, gamma and bias differ from the defaults.
PAPERS = {
    "snr": (losses.snr, "eps", lambda snr: 1),
    "truncated_snr": (losses.truncated_snr, "x0", lambda snr: max(snr, 1)),
    "min_snr": (losses.min_snr, "x0", lambda snr: min(snr, 5)),
    "min_snr_1": (partial(losses.min_snr, gamma=1.0), "x0", lambda snr: min(snr, 1)),
    "p2": (losses.p2, "eps", lambda snr: 1 / (1 + snr)),
    "p2_bent": (partial(losses.p2, k=2.0, gamma=0.5), "eps", lambda snr: 1 / math.sqrt(2 + snr)),
    "sigmoid_plain": (losses.sigmoid_plain, "eps", lambda snr: 1 / (1 + math.exp(math.log(snr) + 1))),
    "sigmoid_low": (partial(losses.sigmoid_plain, bias=-3.0), "eps", lambda snr: 1 / (1 + math.exp(math.log(snr) + 3))),
    # (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, EDM's sigma being 1 / sqrt(SNR).
    "edm": (losses.edm, "x0", lambda snr: (1 / snr + SIGMA_DATA**2) / (SIGMA_DATA**2 / snr)),
}
WEIGHTINGS = {name: weighting for name, (weighting, _, _) in PAPERS.items()}

TABLES = {
    name: schedule(1000)
    for name, schedule in inspect.getmembers(schedules, inspect.isfunction)
    if not name.startswith("_") and next(iter(inspect.signature(schedule).parameters)) == "num_steps"
} | {
    "custom": schedules.custom([1e-4, *[0.01] * 20, 0.5]),
    "linear_10": schedules.linear(10),
    "cosine_10000": schedules.cosine(10_000),
    "shifted": schedules.snr_shift(schedules.cosine(1000), 0.25),
}
CURVES = {
    "cosine": curves.cosine_log_snr,
    "linear": curves.linear_log_snr,
    "exploding": curves.exploding,
    "rectified_flow": curves.rectified_flow,
}
SCHEDULES = {
    "table_linear": NoiseSchedule(schedules.linear(STEPS)),
    "table_cosine": NoiseSchedule(schedules.cosine(STEPS)),
} | {name: ContinuousSchedule(curve, STEPS) for name, curve in CURVES.items()}

every_shape = for_each("shape", SHAPES)
every_target = pytest.mark.parametrize("prediction", TARGETS)
every_variance = for_each("variance", VARIANCES)
every_learned = for_each("variance", LEARNED)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def normal(shape, seed, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def per_sample_levels(pairs, shape):
    """Return one (alpha, sigma) per sample, to broadcast against the data."""
    alpha, sigma = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    one = [-1, *[1] * (len(shape) - 1)]
    return NoiseLevel(alpha.view(one), sigma.view(one), torch.linspace(0, 1, len(pairs)).double().view(one))


def five_levels(shape):
    """Return levels from nearly clean to nearly noise, with SNRs on both sides of 5."""
    return per_sample_levels([(0.999, math.sqrt(1 - 0.999**2)), (0.8, 0.6), (0.6, 0.8), (0.3, 0.7), (1.0, 3.0)], shape)


def to_clean(t):
    """Return the transition from clean data to t, for losses that use only t."""
    return Transition(t, CLEAN, STEPS)


def five_transitions(schedule, shape):
    """Return the cleanest transition, which ends at clean data, and four others, in float64.

    Not the noisiest, at which rectified flow does not determine x_0.
    """
    rows = [0, 1, STEPS // 3, STEPS // 2, STEPS - 2]
    return Transition(*(stacked([schedule.row(k - back) for k in rows], shape) for back in (0, 1)), STEPS)


def stacked(levels, shape):
    return NoiseLevel(*(torch.stack(field).view(-1, *[1] * (len(shape) - 1)) for field in zip(*levels, strict=True)))


def diffusion_of(prediction, variance="fixed_small", **settings):
    return GaussianDiffusion(prediction, variance, sigma_data=SIGMA_DATA, **settings)


def expressing(prediction, x0_hat, mix=None):
    """Return a network whose output, for target `prediction`, means x0_hat at any x_t; and `mix`, if given."""

    def denoise(x_t, t):
        eps_hat = (x_t - t.alpha * x0_hat) / t.sigma
        # EDM tab. 1: D = c_skip x + c_out F, with x = x_t / alpha and sigma = sigma_t / alpha.
        ratio = t.sigma / t.alpha
        std = (ratio**2 + SIGMA_DATA**2).sqrt()
        c_skip, c_out = SIGMA_DATA**2 / std**2, ratio * SIGMA_DATA / std
        out = {
            "eps": eps_hat,
            "x0": x0_hat,
            "v": t.alpha * eps_hat - t.sigma * x0_hat,
            "edm": (x0_hat - c_skip * x_t / t.alpha) / c_out,
            "velocity": eps_hat - x0_hat,
        }[prediction]
        return out if mix is None else torch.cat([out, mix], 1)

    return denoise


def per_sample_mean(x):
    return torch.stack([sample.mean() for sample in x])


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


# simple


@for_each("error, delta", [("l2", 1.0), ("l1", 1.0), ("huber", 1.0), ("huber", 0.1)])
@every_shape
@every_target
def test_simple_is_the_mean_error_of_the_target(prediction, shape, error, delta):
    """Per sample, against numpy; the network gets x_t = alpha x_0 + sigma eps and the level."""
    x0, eps, t = normal(shape, 0), normal(shape, 1), five_levels(shape)

    def denoise(x_t, level):
        return torch.sin(3 * x_t) + level.time

    terms = losses.simple(
        diffusion_of(prediction),
        denoise,
        x0,
        to_clean(t),
        eps,
        weighting=losses.uniform_weighting,
        type=error,
        huber_delta=delta,
    )
    a, s, u = (field.numpy() for field in t)
    x, e, d = x0.numpy(), eps.numpy(), SIGMA_DATA
    target = {
        "eps": e,
        "x0": x,
        "v": a * e - s * x,
        # EDM eq. 8, (y - c_skip (y + n)) / c_out, with y = x_0 and n = sigma / alpha eps.
        "edm": (x - d**2 / ((s / a) ** 2 + d**2) * (x + s / a * e)) * np.sqrt((s / a) ** 2 + d**2) / (s / a * d),
        "velocity": e - x,
    }[prediction]
    difference = np.sin(3 * (a * x + s * e)) + u - target
    assert_close(terms["loss"].numpy(), error_in_numpy(difference, error, delta), rtol=1e-11, atol=0)
    assert_close(terms["mse"].numpy(), error_in_numpy(difference, "l2", delta), rtol=1e-11, atol=0)


@for_each("error", ["l2", "l1", "huber"])
@every_shape
@every_target
def test_weighting_multiplies_only_the_loss(prediction, shape, error):
    """ "mse" is unweighted."""
    x0, eps, transition = normal(shape, 2), normal(shape, 3), to_clean(five_levels(shape))

    def weighting(diffusion, level):
        return 2 + level.time

    measure = partial(
        losses.simple, diffusion_of(prediction), lambda x_t, _: x_t.tanh(), x0, transition, eps, type=error
    )
    plain, weighted = measure(weighting=losses.uniform_weighting), measure(weighting=weighting)
    factors = torch.tensor([2, 2.25, 2.5, 2.75, 3], dtype=torch.float64)
    assert_close(weighted["loss"], plain["loss"] * factors, rtol=1e-12, atol=0)
    assert_close(weighted["mse"], plain["mse"], rtol=0, atol=0)


@every_shape
@every_learned
@every_target
def test_simple_ignores_a_learned_variance(prediction, variance, shape):
    """The loss is that of the first half of the output, and the second half gets no gradient."""
    x0, eps, transition, half = normal(shape, 4), normal(shape, 5), to_clean(five_levels(shape)), normal(shape, 6)
    alone = losses.simple(diffusion_of(prediction), lambda *_: half, x0, transition, eps, weighting=losses.snr)
    mix = (100 * normal(shape, 7)).requires_grad_()
    both = losses.simple(
        diffusion_of(prediction, variance),
        lambda *_: torch.cat([half, mix], 1),
        x0,
        transition,
        eps,
        weighting=losses.snr,
    )
    assert both.keys() == alone.keys() == {"loss", "mse"}
    assert_close(both, alone, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(both["loss"].sum(), mix)
    assert_close(gradient, torch.zeros_like(mix), rtol=0, atol=0)


@pytest.mark.parametrize("loss_fn", ["simple", "vlb", "hybrid"])
def test_losses_call_the_network_once(loss_fn):
    """At x_t and the noisier end of the transition."""
    shape = (5, 2)
    x0, eps, transition = normal(shape, 8), normal(shape, 9), five_transitions(SCHEDULES["cosine"], shape)
    calls = []

    def denoise(x_t, t):
        calls.append((x_t, t))
        return torch.cat([x_t, x_t], 1)

    settings = {} if loss_fn == "vlb" else {"weighting": losses.uniform_weighting}
    getattr(losses, loss_fn)(diffusion_of("eps", "learned"), denoise, x0, transition, eps, **settings)
    ((x_t, t),) = calls
    assert t is transition.t
    assert_close(x_t, transition.t.alpha * x0 + transition.t.sigma * eps, rtol=1e-15, atol=0)


def test_unknown_loss_type_raises():
    x, transition = normal((5, 2), 10), to_clean(five_levels((5, 2)))
    with pytest.raises(ValueError, match=r"loss.type=l3 "):
        losses.simple(
            GaussianDiffusion(), lambda x_t, t: x_t, x, transition, x, weighting=losses.uniform_weighting, type="l3"
        )


@for_each("delta", [0.0, -1.0])
def test_huber_delta_out_of_range_raises(delta):
    x, transition = normal((5, 2), 10), to_clean(five_levels((5, 2)))
    with pytest.raises(ValueError, match=f"loss.huber_delta={delta} "):
        losses.simple(
            GaussianDiffusion(),
            lambda x_t, t: x_t,
            x,
            transition,
            x,
            weighting=losses.uniform_weighting,
            huber_delta=delta,
        )


# Weightings


@pytest.mark.parametrize("name", PAPERS)
def test_weighting_equals_its_formula(name):
    """On the error that the paper weights."""
    weighting, units, formula = PAPERS[name]
    t = five_levels((5, 2))
    snrs = [(a / s) ** 2 for a, s in zip(t.alpha.flatten().tolist(), t.sigma.flatten().tolist(), strict=True)]
    expected = torch.tensor([formula(snr) for snr in snrs], dtype=torch.float64).view(5, 1)
    assert_close(weighting(diffusion_of(units), t), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("weighting", "formula"),
    [
        # Salimans & Ho 2022, sec. 4.
        (losses.snr, lambda snr: snr / (snr + 1)),
        (losses.truncated_snr, lambda snr: max(snr, 1) / (snr + 1)),
        # Hang et al., 2303.09556, sec. 3.4.
        (losses.min_snr, lambda snr: min(snr, 5) / (snr + 1)),
    ],
    ids=["snr", "truncated_snr", "min_snr"],
)
def test_weighting_on_v_equals_its_formula(weighting, formula):
    """Where alpha^2 + sigma^2 = 1, the squared error of v is SNR + 1 times that of x_0."""
    alphas = [0.01, 0.5, 0.7, 0.8, 0.95, 0.999]
    t = per_sample_levels([(alpha, math.sqrt(1 - alpha**2)) for alpha in alphas], (6, 2))
    expected = [formula(alpha**2 / (1 - alpha**2)) for alpha in alphas]
    weight = weighting(diffusion_of("v"), t).flatten()
    assert_close(weight, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_edm_weight_of_edm_target_is_one():
    """lambda(sigma) c_out(sigma)^2 = 1 (Karras et al. 2022, tab. 1)."""
    weight = losses.edm(diffusion_of("edm"), five_levels((5, 2)))
    assert_close(weight, torch.ones_like(weight), rtol=1e-12, atol=0)


@every_target
def test_uniform_weight_is_one(prediction):
    t = five_levels((5, 2))
    assert_close(losses.uniform_weighting(diffusion_of(prediction), t), torch.ones_like(t.alpha), rtol=0, atol=0)


@every_shape
@every_target
@pytest.mark.parametrize("name", PAPERS)
def test_loss_does_not_depend_on_the_target(name, prediction, shape):
    """It is the weight of the paper times the squared error of x_0 or eps, for every target."""
    weighting, units, formula = PAPERS[name]
    x0, eps, x0_hat, t = normal(shape, 11), normal(shape, 12), normal(shape, 13), five_levels(shape)
    loss = losses.simple(
        diffusion_of(prediction), expressing(prediction, x0_hat), x0, to_clean(t), eps, weighting=weighting
    )["loss"]
    snrs = (t.alpha / t.sigma).square().flatten()
    # alpha (x_0 - x0_hat) = -sigma (eps - eps_hat): the two squared errors differ by the SNR.
    error = per_sample_mean((x0_hat - x0).square()) * (snrs if units == "eps" else 1)
    expected = torch.tensor([formula(snr) for snr in snrs.tolist()], dtype=torch.float64) * error
    assert_close(loss, expected, rtol=1e-9, atol=0)


@for_each("zero_terminal", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_weights_are_finite_at_every_row(name, zero_terminal):
    """In float32, for every target, and positive unless x_0 has no weight."""
    betas = schedules.zero_terminal_snr(TABLES[name]) if zero_terminal else TABLES[name]
    schedule = NoiseSchedule(betas)
    every_row = torch.arange(len(betas))
    t = schedule.level(every_row, every_row)
    assert t.alpha.dtype == torch.float32
    assert (t.alpha[-1] == 0) == zero_terminal
    check_weights(t)


@pytest.mark.parametrize("curve", [*CURVES.values(), curves.Learned()], ids=[*CURVES, "learned"])
def test_weights_are_finite_on_every_curve(curve):
    """In float32, ends included."""
    u = torch.linspace(0, 1, 1001)
    with torch.no_grad():
        check_weights(NoiseLevel(*curve(u), u))


def check_weights(t):
    for prediction in TARGETS:
        for name, weighting in WEIGHTINGS.items():
            weight = weighting(diffusion_of(prediction), t)
            assert weight.dtype == torch.float32
            assert weight.shape == t.alpha.shape
            assert weight.isfinite().all(), (name, prediction)
            assert (weight > 0).all(), (name, prediction)


@pytest.mark.parametrize("prediction", ["x0", "v", "edm", "velocity"])
@pytest.mark.parametrize("name", PAPERS)
def test_loss_is_finite_at_zero_snr(name, prediction):
    """At pure noise the error of x_0 has the limit of the weight: 1, 1 / sigma_data^2 or 0."""
    weighting = WEIGHTINGS[name]
    shape = (2, 3)
    x0, x0_hat = normal(shape, 14), normal(shape, 15)
    t = per_sample_levels([(0.0, 1.0), (0.0, 3.0)], shape)
    # At alpha = 0 each of these targets is a multiple of x_0, plus eps for the velocity.
    out = {"x0": 1, "v": -t.sigma, "edm": 1 / SIGMA_DATA, "velocity": -1}[prediction] * x0_hat
    eps = normal(shape, 16)
    out = out + eps if prediction == "velocity" else out
    loss = losses.simple(diffusion_of(prediction), lambda *_: out, x0, to_clean(t), eps, weighting=weighting)["loss"]
    limit = {"truncated_snr": 1.0, "edm": 1 / SIGMA_DATA**2}.get(name, 0.0)
    # An SNR of 1e-20 replaces 0.
    assert_close(loss, limit * per_sample_mean((x0_hat - x0).square()), rtol=1e-9, atol=1e-18)


@for_each("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_min_snr_is_finite_at_extreme_levels(prediction, dtype):
    """Finite and positive up to SNR = 1e12, where it is gamma over the gain."""
    sigmas = torch.tensor([1e-6, 1e-4, 1e-2], dtype=dtype)
    t = NoiseLevel((1 - sigmas.double() ** 2).sqrt().to(dtype), sigmas, sigmas)
    weight = losses.min_snr(diffusion_of(prediction), t)
    snr = (1 - sigmas.double() ** 2) / sigmas.double() ** 2
    gain = {"x0": torch.ones_like(snr), "eps": snr, "v": snr + 1}[prediction]
    assert weight.dtype == dtype
    assert_close(weight.double(), 5 / gain, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    faint = NoiseLevel(sigmas, torch.ones_like(sigmas), sigmas)
    assert losses.min_snr(diffusion_of(prediction), faint).isfinite().all()


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        (partial(losses.min_snr, gamma=0.0), "weighting.gamma=0.0 "),
        (partial(losses.min_snr, gamma=-5.0), "weighting.gamma=-5.0 "),
        (partial(losses.p2, k=0.0), "weighting.k=0.0 "),
        (partial(losses.p2, gamma=-1.0), "weighting.gamma=-1.0 "),
    ],
)
def test_weighting_parameters_out_of_range_raise(weighting, message):
    with pytest.raises(ValueError, match=message):
        weighting(GaussianDiffusion(), five_levels((5, 2)))


# vlb and hybrid


def on_grid(shape, seed, levels=17):
    """Return data with values from -1 to 1 inclusive in equal steps."""
    index = torch.randint(levels, shape, generator=torch.Generator().manual_seed(seed))
    index.view(-1)[:2] = torch.tensor([0, levels - 1])
    return -1 + 2 * index.double() / (levels - 1)


def bayes(x0, x_t, t, s):
    """Return mean and variance of q(x_s | x_t, x_0) by precisions, and the variance of q(x_t | x_s)."""
    step = t.alpha / s.alpha
    added = t.sigma**2 - step**2 * s.sigma**2
    variance = 1 / (1 / s.sigma**2 + step**2 / added)
    return variance * (s.alpha * x0 / s.sigma**2 + step * x_t / added), variance, added


def reverse_variance(variance, small, large, mix):
    """DDPM sec. 3.2; Nichol & Dhariwal 2021, eq. 15 with v = (mix + 1) / 2."""
    return {
        "fixed_small": small,
        "fixed_large": large,
        "learned_range": torch.exp((mix + 1) / 2 * torch.log(large) + (1 - mix) / 2 * torch.log(small)),
        "learned": small * torch.exp(mix),
    }[variance]


@for_each("shape, num_values", {"points": ((5, 2), None), "images": ((5, 3, 4, 4), 17)})
@every_variance
@every_target
@every_schedule
def test_vlb_is_the_kl_of_a_transition(schedule, prediction, variance, shape, num_values):
    """T times the KL between the posterior and the reverse step by torch.distributions, in bits/dim.

    For the cleanest transition it is scipy's density, or the probability of the bin. Small variances are differences of
    similar sigmas, which costs five of sixteen digits.
    """
    diffusion = diffusion_of(prediction, variance, decoder_scale=0.3, num_values=num_values)
    x0, eps, mix = on_grid(shape, 17), normal(shape, 18), normal(shape, 19).tanh()
    x0_hat = x0 + 0.2 * normal(shape, 20)
    transition = five_transitions(schedule, shape)
    network = expressing(prediction, x0_hat, mix if variance in LEARNED else None)
    terms = losses.vlb(diffusion, network, x0, transition, eps)

    x_t = transition.t.alpha * x0 + transition.t.sigma * eps
    mean, small, added = bayes(x0, x_t, transition.t, transition.s)
    mean_hat, _, _ = bayes(x0_hat, x_t, transition.t, transition.s)
    large = 1 / (
        1 / (transition.s.alpha**2 + transition.s.sigma**2) + (transition.t.alpha / transition.s.alpha) ** 2 / added
    )
    model = reverse_variance(variance, small, large, mix).expand(shape)
    nats = torch.empty(shape, dtype=torch.float64)
    std = small.sqrt().expand(shape)
    nats[1:] = kl_divergence(Normal(mean[1:], std[1:]), Normal(mean_hat[1:], model[1:].sqrt()))
    clean = 0.3 * (transition.t.sigma[0] / transition.t.alpha[0]) ** 2
    # Both fixed variances are that of the decoder; learned_range extends to that for x_0 ~ N(0, 1).
    large = clean if variance == "fixed_large" else 1 / (1 + (transition.t.alpha[0] / transition.t.sigma[0]) ** 2)
    clean_std = reverse_variance(variance, clean, large, mix[0]).sqrt().expand(shape[1:])
    nats[0] = -decoder_in_scipy(x0[0], x0_hat[0], clean_std, num_values)
    expected = STEPS * per_sample_mean(nats) / math.log(2)
    assert_close(terms["loss"], expected, rtol=1e-9, atol=1e-9)
    assert_close(terms["vlb"], terms["loss"], rtol=0, atol=0)
    plain = losses.simple(diffusion, network, x0, transition, eps, weighting=losses.uniform_weighting)
    assert_close(terms["mse"], plain["mse"], rtol=0, atol=0)


def decoder_in_scipy(x, mean, std, num_values):
    x, mean, std = x.numpy(), mean.numpy(), std.numpy()
    if num_values is None:
        return torch.from_numpy(norm.logpdf(x, mean, std))
    half = 1 / (num_values - 1)
    lower = np.where(x == -1, -np.inf, (x - half - mean) / std)
    upper = np.where(x == 1, np.inf, (x + half - mean) / std)
    # Logarithms of the tails, on the side where they are small.
    lower, upper = np.where(lower + upper > 0, [-upper, -lower], [lower, upper])
    return torch.from_numpy(norm.logcdf(upper) + np.log1p(-np.exp(norm.logcdf(lower) - norm.logcdf(upper))))


@for_each("num_values", {"density": None, "bins": 17})
@every_shape
@every_schedule
def test_vlb_of_a_batch_equals_single_samples(schedule, shape, num_values):
    """With and without clean ends."""
    diffusion = diffusion_of("v", "learned_range", decoder_scale=0.3, num_values=num_values)
    x0, eps, mix = on_grid(shape, 21), normal(shape, 22), normal(shape, 23).tanh()
    x0_hat = x0 + 0.2 * normal(shape, 24)
    transition = five_transitions(schedule, shape)
    batch = losses.vlb(diffusion, expressing("v", x0_hat, mix), x0, transition, eps)["loss"]
    for i in range(len(x0)):
        t, s = (NoiseLevel(*(field[i : i + 1] for field in level)) for level in (transition.t, transition.s))
        only = slice(i, i + 1)
        network = expressing("v", x0_hat[only], mix[only])
        alone = losses.vlb(diffusion, network, x0[only], Transition(t, s, STEPS), eps[only])["loss"]
        assert_close(batch[only], alone, rtol=1e-14, atol=0)


@every_shape
@every_variance
@every_target
@every_schedule
def test_gradient_of_the_bound_is_finite(schedule, prediction, variance, shape):
    """In float32 for an untrained network, with the cleanest transitions among others."""
    x0, eps = normal(shape, 25, torch.float32).clamp(-1, 1), normal(shape, 26, torch.float32)
    # eps does not determine x_0 at zero SNR, where rectified flow ends.
    last = 0.9 if prediction == "eps" else 1 - 2**-24
    transition = schedule.transition(torch.tensor([0.0, 0.4 / STEPS, 1.5 / STEPS, 0.5, last]), x0)
    assert (transition.s.sigma == 0).flatten().tolist() == [True, True, False, False, False]
    for levels, clip_x0 in product([None, 256], [None, 1.0]):
        diffusion = diffusion_of(prediction, variance, num_values=levels, clip_x0=clip_x0)
        out = torch.cat([normal(shape, 27, torch.float32)] * diffusion.outputs, 1).requires_grad_()
        loss = losses.vlb(diffusion, lambda *_, out=out: out, x0, transition, eps)["loss"]
        assert loss.isfinite().all()
        (gradient,) = torch.autograd.grad(loss.sum(), out)
        assert gradient.isfinite().all()


@every_variance
@every_target
def test_gradient_on_a_learned_schedule_is_finite(prediction, variance):
    """Even in a batch with clean ends, whose variance 0 has a log without derivative."""
    schedule = ContinuousSchedule(curves.Learned(width=8), STEPS)
    x0, eps = normal((5, 2), 25, torch.float32), normal((5, 2), 26, torch.float32)
    transition = schedule.transition(torch.tensor([0.0, 0.4 / STEPS, 1.5 / STEPS, 0.5, 1 - 2**-24]), x0)
    diffusion = diffusion_of(prediction, variance)
    loss = losses.vlb(diffusion, lambda x_t, _: torch.cat([x_t] * diffusion.outputs, 1), x0, transition, eps)["loss"]
    gradients = torch.autograd.grad(loss.sum(), list(schedule.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@every_learned
@pytest.mark.parametrize("prediction", ["x0", "v", "edm", "velocity"])
def test_bound_is_finite_at_zero_snr(prediction, variance):
    """With finite gradients for every transition of a table that ends in pure noise, except for eps."""
    schedule = NoiseSchedule(schedules.zero_terminal_snr(schedules.cosine(STEPS)))
    shape = (STEPS, 2)
    x0, eps = normal(shape, 28, torch.float32), normal(shape, 29, torch.float32)
    transition = schedule.transition((torch.arange(STEPS) + 0.5) / STEPS, x0)
    assert transition.t.alpha[-1] == 0
    out = normal((STEPS, 4), 30, torch.float32).requires_grad_()
    diffusion = diffusion_of(prediction, variance)
    terms = losses.hybrid(diffusion, lambda *_: out, x0, transition, eps, weighting=losses.min_snr)
    assert all(term.isfinite().all() for term in terms.values())
    (gradient,) = torch.autograd.grad(terms["loss"].sum(), out)
    assert gradient.isfinite().all()


@every_shape
@every_learned
@every_target
@every_schedule
def test_hybrid_bound_trains_only_the_variance(schedule, prediction, variance, shape):
    """The mean gets the gradient of `simple`, the variance `vlb_weight` times that of `vlb` (iDDPM eq. 16)."""
    diffusion = diffusion_of(prediction, variance, decoder_scale=0.3)
    x0, eps, transition = normal(shape, 31), normal(shape, 32), five_transitions(schedule, shape)
    out = torch.cat([normal(shape, 33), normal(shape, 34).tanh()], 1).requires_grad_()

    def terms_and_gradients(loss_fn, **settings):
        terms = loss_fn(diffusion, lambda *_: out, x0, transition, eps, **settings)
        (gradient,) = torch.autograd.grad(terms["loss"].sum(), out)
        return terms, *gradient.chunk(2, 1)

    simple, simple_mean, _ = terms_and_gradients(losses.simple, weighting=losses.min_snr, type="huber")
    vlb, vlb_mean, vlb_mix = terms_and_gradients(losses.vlb)
    hybrid, mean, mix = terms_and_gradients(losses.hybrid, weighting=losses.min_snr, type="huber", vlb_weight=0.01)
    assert (vlb_mean != 0).all()
    assert (vlb_mix != 0).all()
    # The same operations in the same order, except for the factor.
    assert_close(mean, simple_mean, rtol=0, atol=0)
    # Terms of different orders of magnitude cancel.
    assert_close(mix, 0.01 * vlb_mix, rtol=1e-9, atol=1e-15)
    assert_close(hybrid["loss"], simple["loss"] + 0.01 * vlb["loss"], rtol=1e-12, atol=0)
    assert_close(hybrid["vlb"], vlb["loss"], rtol=0, atol=0)
    assert_close(hybrid["mse"], simple["mse"], rtol=0, atol=0)


def test_vlb_has_gradients_beyond_the_clip():
    """The same gradients as without a clip."""
    shape = (5, 2)
    x0, eps, transition = normal(shape, 39), normal(shape, 40), five_transitions(SCHEDULES["table_cosine"], shape)
    gradients = []
    for clip_x0 in (None, 0.1):
        out = normal((5, 4), 41).requires_grad_()
        diffusion = diffusion_of("eps", "learned_range", clip_x0=clip_x0)
        loss = losses.vlb(diffusion, lambda *_, out=out: out, x0, transition, eps)["loss"]
        gradients += torch.autograd.grad(loss.sum(), out)
    assert (gradients[0] != 0).all()
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_hybrid_variance_fits_the_clipped_mean():
    """Its bound is that of the clipped prediction, and the mean has gradients where it is clipped."""
    shape = (5, 2)
    x0, eps, transition = normal(shape, 42), normal(shape, 43), five_transitions(SCHEDULES["table_cosine"], shape)
    out = torch.cat([3 * normal(shape, 44), normal(shape, 45).tanh()], 1).requires_grad_()
    diffusion = diffusion_of("x0", "learned_range", clip_x0=0.1)
    hybrid = losses.hybrid(diffusion, lambda *_: out, x0, transition, eps, weighting=losses.uniform_weighting)
    clipped = torch.cat([out[:, :2].clamp(-0.1, 0.1), out[:, 2:]], 1)
    unclipped = diffusion_of("x0", "learned_range")
    assert_close(
        hybrid["vlb"], losses.vlb(unclipped, lambda *_: clipped, x0, transition, eps)["vlb"], rtol=1e-9, atol=0
    )
    (gradient,) = torch.autograd.grad(hybrid["loss"].sum(), out)
    assert (gradient != 0).all()


def test_default_vlb_weight_is_a_thousandth():
    """As in iDDPM, sec. 3.1."""
    shape = (5, 2)
    x0, eps, transition = normal(shape, 35), normal(shape, 36), five_transitions(SCHEDULES["table_cosine"], shape)
    out = normal((5, 4), 37)
    arguments = diffusion_of("eps", "learned_range"), lambda *_: out, x0, transition, eps
    hybrid = losses.hybrid(*arguments, weighting=losses.uniform_weighting)["loss"]
    simple = losses.simple(*arguments, weighting=losses.uniform_weighting)["loss"]
    assert_close(hybrid, simple + losses.vlb(*arguments)["loss"] / 1000, rtol=1e-12, atol=0)


@for_each("variance", ["fixed_small", "fixed_large"])
def test_hybrid_needs_a_learned_variance(variance):
    x, transition = normal((5, 2), 38), five_transitions(SCHEDULES["table_cosine"], (5, 2))
    with pytest.raises(ValueError, match=f"diffusion.variance={variance} "):
        losses.hybrid(
            diffusion_of("eps", variance), lambda x_t, _: x_t, x, transition, x, weighting=losses.uniform_weighting
        )
