"""Guidance against its formulas, diffusers' rescaling, and every sampler."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from src.diffusion import samplers, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.guidance import Guidance, guided
from src.diffusion.noise import NoiseSchedule, make_time_grid

SCHEDULE = NoiseSchedule(schedules.cosine(1000))
NULL = torch.tensor([9])


class Network:
    """A function of x and the condition that counts its calls and samples."""

    def __init__(self, outputs: int = 1, factor: float = 1.0) -> None:
        self.outputs = outputs
        self.factor = factor
        self.calls = 0
        self.batches = 0

    def __call__(self, x, t, cond):
        self.calls += len(x)
        self.batches += 1
        bias = 0.3 * cond.to(x).view(-1, *[1] * (x.ndim - 1)) - 1
        return self.factor * torch.cat([torch.tanh((k + 1) * x + bias) for k in range(self.outputs)], dim=1)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def level(ratio):
    """Return the level of the schedule where sigma / alpha equals `ratio`."""
    return SCHEDULE.at(SCHEDULE.position(torch.tensor([math.atan(ratio)], dtype=torch.float64)))[0]


X, COND = normal(3, 2, 4, 4), torch.tensor([0, 2, 5])
T = level(1.0)


def test_scale_one_calls_the_conditional_model_once():
    network = Network()
    out = guided(network, COND, NULL, Guidance(1.0, rescale=0.5), 2)(X, T)
    assert network.calls == len(X)
    assert torch.equal(out, Network()(X, T, COND))


def test_scale_zero_calls_the_unconditional_model_once():
    network = Network()
    out = guided(network, COND, NULL, Guidance(0.0), 2)(X, T)
    assert network.calls == len(X)
    assert torch.equal(out, Network()(X, T, NULL.expand(3)))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "edm", "velocity"])
def test_guiding_any_target_equals_guiding_eps(prediction):
    """Ho & Salimans 2022, eq. 6 with 1 + w = scale."""
    diffusion, network = GaussianDiffusion(prediction), Network()
    out = guided(network, COND, NULL, Guidance(3.0), 2)(X, T)
    conditional, unconditional = (diffusion.interpret(network(X, T, c), X, T) for c in (COND, NULL.expand(3)))
    got = diffusion.interpret(out, X, T)
    assert_close(got.eps, 3 * conditional.eps - 2 * unconditional.eps, rtol=1e-9, atol=1e-9)
    assert_close(got.x0, 3 * conditional.x0 - 2 * unconditional.x0, rtol=1e-9, atol=1e-9)


def test_guidance_uses_one_doubled_batch():
    network = Network()
    guided(network, COND, NULL, Guidance(2.0), 2)(X, T)
    assert (network.batches, network.calls) == (1, 2 * len(X))


def test_guidance_keeps_the_conditional_variance():
    network = Network(outputs=2)
    out = guided(network, COND, NULL, Guidance(4.0), 2)(X, T)
    assert torch.equal(out[:, 2:], network(X, T, COND)[:, 2:])
    assert not torch.equal(out[:, :2], network(X, T, COND)[:, :2])


@pytest.mark.parametrize(("ratio", "acts"), [(0.1, False), (0.5, False), (0.6, True), (2.0, True), (2.1, False)])
def test_guidance_acts_only_within_its_interval(ratio, acts):
    """Elsewhere it is the conditional model in one call."""
    network = Network()
    t = level(ratio)
    ratio_there = (t.sigma / t.alpha).item()
    assert ratio_there == pytest.approx(ratio, rel=1e-6)
    interval = (0.5000001, 2.0000001)  # but for the rounding of the schedule
    out = guided(network, COND, NULL, Guidance(3.0, interval), 2)(X, t)
    assert network.calls == len(X) * (2 if acts else 1)
    assert torch.equal(out, Network()(X, t, COND)) is not acts


def test_unbounded_interval_includes_pure_noise():
    t = T._replace(alpha=torch.zeros((), dtype=torch.float64))
    assert Guidance(2.0).acts(t)
    assert not Guidance(2.0, (0.1, 50.0)).acts(t)


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_guidance_rescale_equals_diffusers(share):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    network = Network()
    conditional, unconditional = network(X, T, COND), network(X, T, NULL.expand(3))
    expected = rescale_noise_cfg(unconditional + 5 * (conditional - unconditional), conditional, guidance_rescale=share)
    assert_close(guided(network, COND, NULL, Guidance(5.0, rescale=share), 2)(X, T), expected)


def test_autoguidance_uses_the_same_condition():
    """Karras et al. 2024 (arXiv 2406.02507), eq. 2, with and without conditions."""
    network, weak = Network(), Network(factor=0.5)
    out = guided(network, COND, NULL, Guidance(2.5, model=weak), 2)(X, T)
    assert_close(out, 0.5 * network(X, T, COND) + 2.5 * 0.5 * network(X, T, COND))
    assert (weak.calls, weak.batches) == (len(X), 1)

    def bare(x, t, cond):
        assert cond is None
        return torch.tanh(x)

    def weaker(x, t, cond):
        return bare(x, t, cond) / 3

    assert_close(guided(bare, None, None, Guidance(2.0, model=weaker), 2)(X, T), (2 - 1 / 3) * torch.tanh(X))


SAMPLERS = {
    "ancestral": samplers.ancestral,
    "ddim": samplers.ddim,
    "dpmpp_2m": samplers.dpmpp_2m,
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde,
    "heun": partial(samplers.heun, s_churn=2.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.0),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_samplers_apply_guidance_at_every_step(name, prediction):
    diffusion, network, grid = GaussianDiffusion(prediction), Network(), make_time_grid(SCHEDULE, 6, "trailing")

    def combined(x, t):
        conditional, unconditional = network(x, t, COND), network(x, t, NULL.expand(3))
        return unconditional + 2 * (conditional - unconditional)

    ends = []
    for denoise in (guided(network, COND, NULL, Guidance(2.0), 2), combined):
        generator = torch.Generator().manual_seed(1)

        def noise(x, generator=generator):
            return torch.randn(x.shape, generator=generator, dtype=x.dtype)

        *_, end = SAMPLERS[name](diffusion, samplers.predictor(diffusion, denoise), X, grid, noise=noise)
        ends.append(end)
    assert_close(*ends, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        (Guidance(-1.0), "guidance.scale=-1"),
        (Guidance(math.nan), "guidance.scale=nan "),
        (Guidance(2.0, (3.0, 1.0)), r"guidance.interval=\[3.0,1.0\] "),
        (Guidance(2.0, rescale=1.5), "guidance.rescale=1.5 "),
    ],
)
def test_guidance_out_of_range_raises(guidance, message):
    with pytest.raises(ValueError, match=message):
        guidance.check()
