"""Schedulers of diffusers with the exact denoiser of Gaussian data."""

import inspect
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from src.diffusion import curves, samplers, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion, Prediction
from src.diffusion.noise import ContinuousSchedule, NoiseSchedule, make_time_grid
from src.interop.diffusers_samplers import CONVENTIONS, _uses_betas, diffusers
from src.rng import SampleNoise
from tests.loops import for_each


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow packages only when tests run, not when they are collected."""
    global EVERY
    global library
    import diffusers as library

    EVERY = [name for name in dir(library) if name.endswith("Scheduler") and _uses_betas(library, name)]


# Data N(MEAN, STD^2).
MEAN, STD = 0.7, 0.5
LINEAR = NoiseSchedule(schedules.linear(1000))
ZERO_TERMINAL = NoiseSchedule(schedules.zero_terminal_snr(schedules.linear(1000)))
# Their steps are for distilled networks, and reduce the variance of the data with others.
DISTILLED = {"LCMScheduler", "TCDScheduler"}
FIRST_ORDER = {
    "DDIMScheduler": samplers.ddim,
    "EulerDiscreteScheduler": samplers.ddim,
    "DDPMScheduler": samplers.ancestral,
    "EulerAncestralDiscreteScheduler": samplers.ancestral,
}


def normal(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded_noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def ideal(x, t):
    """E[x_0 | x_t], by regression of x_0 on x_t."""
    gain = t.alpha * STD**2 / (t.alpha.square() * STD**2 + t.sigma.square())
    x0 = MEAN + gain * (x - t.alpha * MEAN)
    return Prediction(x0, (x - t.alpha * x0) / t.sigma)


def nonlinear(x, t):
    """An arbitrary smooth network."""
    x0 = torch.tanh(x + t.time)
    return Prediction(x0, (x - t.alpha * x0) / t.sigma)


def run(name, x, steps, predict=ideal, schedule=LINEAR, noise=None, diffusion=None):
    grid = make_time_grid(schedule, steps)
    return list(
        diffusers(diffusion or GaussianDiffusion(), predict, x, grid, noise=noise or seeded_noise(1), scheduler=name)
    )


def standardized(shape, seed):
    """Return values with mean 0 and std 1 exactly."""
    x = normal(shape, seed)
    return (x - x.mean()) / x.std()


def test_common_schedulers_are_supported():
    assert {*FIRST_ORDER, "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"} <= {*EVERY}
    assert {"DEISMultistepScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler"} <= {*EVERY}


@for_each("name", lambda: sorted({*EVERY} - DISTILLED))
def test_schedulers_recover_gaussian_data(name):
    """To first order with 100 steps, and to second order where the scheduler has it."""
    *_, out = run(name, standardized((4, 10_000), 0), 100)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert out.std().item() == pytest.approx(STD, abs=0.04)
    if name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"):
        assert out.std().item() == pytest.approx(STD, abs=2e-3)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_order_schedulers_match_our_moments(name):
    """DDIM and Euler equal `ddim`, DDPM and Euler ancestral `ancestral`, with 25 steps."""
    x, grid = standardized((4, 10_000), 0), make_time_grid(LINEAR, 25)
    theirs = run(name, x, 25)
    ours = list(FIRST_ORDER[name](GaussianDiffusion(), ideal, x, grid, noise=seeded_noise(2)))
    tolerance = 1e-4 if FIRST_ORDER[name] is samplers.ddim else 0.02  # different noise
    for a, b in zip(theirs, ours, strict=True):
        assert a.mean().item() == pytest.approx(b.mean().item(), abs=tolerance)
        assert a.std().item() == pytest.approx(b.std().item(), abs=tolerance)


@pytest.mark.parametrize(
    ("name", "sampler", "tolerance"),
    [
        ("DDIMScheduler", samplers.ddim, 1e-10),  # with our float64 tables
        ("EulerDiscreteScheduler", samplers.ddim, 1e-4),  # these compute in float32
        ("HeunDiscreteScheduler", samplers.heun, 1e-4),
        ("DPMSolverMultistepScheduler", samplers.dpmpp_2m, 1e-4),
    ],
)
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 4, 4)], ids=str)
def test_deterministic_schedulers_equal_our_samplers(shape, steps, name, sampler, tolerance):
    """On equal levels, in the same coordinate."""
    x = normal(shape, 3)
    theirs = run(name, x, steps, nonlinear)
    ours = list(sampler(GaussianDiffusion(), nonlinear, x, make_time_grid(LINEAR, steps), noise=torch.zeros_like))
    for a, b in zip(theirs, ours, strict=True):
        assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@for_each("name", lambda: EVERY)
def test_schedulers_predict_from_x_at_its_level(name):
    """The std of x is that of noised data at the level, even in the second halves of steps."""
    seen = []

    def recorded(x, t):
        expected = (t.alpha.item() * STD) ** 2 + t.sigma.item() ** 2
        seen.append((x.std().item() / expected**0.5, t.time.item()))
        return ideal(x, t)

    values = run(name, standardized((4, 2000), 4), 40, recorded)
    assert len(values) == 40
    assert all(value.shape == (4, 2000) for value in values)
    ratios, times = zip(*seen, strict=True)
    if name not in DISTILLED:
        assert all(ratio == pytest.approx(1, abs=0.15) for ratio in ratios)
    assert times[0] == 1
    # KDPM2 ancestral predicts twice at one level, up to rounding.
    assert all(before >= after - 1e-6 for before, after in pairwise(times))


@for_each("name", lambda: sorted({*EVERY} - {"PNDMScheduler"}))
def test_schedulers_are_finite_at_zero_snr(name):
    """And start from pure noise with the correct mean, since they predict x_0."""
    values = run(name, standardized((4, 2000), 5).float(), 20, schedule=ZERO_TERMINAL)
    assert all(value.isfinite().all() for value in values)
    assert values[-1].mean().item() == pytest.approx(MEAN, abs=0.02)
    assert values[-1].dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"]
)
def test_samples_do_not_depend_on_the_batch(name):
    """A sample depends on its seed and index only."""

    def samples(seed, indices):
        noise = SampleNoise(seed, indices, torch.device("cpu"))
        return run(name, noise.draw((2,)), 10, nonlinear, noise=noise)[-1]

    batch = samples(0, range(4))
    assert_close(samples(0, [2, 3]), batch[2:], rtol=1e-6, atol=1e-6)
    assert_close(samples(0, [1]), batch[1:2], rtol=1e-6, atol=1e-6)
    assert (samples(1, range(4)) != batch).all()
    assert len({tuple(row.tolist()) for row in batch}) == 4


def test_diffusion_clips_for_schedulers():
    """The scheduler gets the clipped prediction."""
    diffusion = GaussianDiffusion("x0", clip_x0=0.5)
    predict = samplers.predictor(diffusion, lambda x, t: 3 * torch.tanh(x))
    *_, out = run("DDIMScheduler", normal((5, 2), 6), 10, predict, diffusion=diffusion)
    assert out.abs().max() == 0.5


@for_each("name", lambda: EVERY)
def test_conventions_set_every_differing_default(name):
    """No clipping, spacing or last step is left to the default of a scheduler."""
    known = inspect.signature(getattr(library, name).__init__).parameters
    assert {
        k for k in known if k.startswith(("clip_sample", "thresh", "timestep_sp", "set_alpha", "final_s", "rescale"))
    } <= {
        *CONVENTIONS,
        "clip_sample_range",
    }


def test_continuous_schedule_raises():
    with pytest.raises(ValueError, match=r"sampler=diffusers .*schedule"):
        run("DDIMScheduler", normal((3, 2), 7), 5, schedule=ContinuousSchedule(curves.rectified_flow))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("UniPCScheduler", "sampler.scheduler=UniPCScheduler .*UniPCMultistepScheduler"),
        ("DDIM", "sampler.scheduler=DDIM .*DDIMScheduler"),
        ("FlowMatchEulerDiscreteScheduler", "sampler.scheduler=FlowMatchEulerDiscreteScheduler "),
        ("DDIMInverseScheduler", "sampler.scheduler=DDIMInverseScheduler "),
        ("IPNDMScheduler", "sampler.scheduler=IPNDMScheduler "),
        ("RePaintScheduler", "sampler.scheduler=RePaintScheduler "),
        ("SchedulerMixin", "sampler.scheduler=SchedulerMixin "),
        ("utils", "sampler.scheduler=utils "),
        ("schedulers.DDIMScheduler", "sampler.scheduler=schedulers.DDIMScheduler "),
        ("?", r"sampler.scheduler=\? .*UniPCMultistepScheduler"),
    ],
)
def test_unknown_scheduler_raises(name, message):
    with pytest.raises(ValueError, match=message) as raised:
        run(name, normal((3, 2), 8), 5)
    assert "\n" not in str(raised.value)


def test_scheduler_with_missing_dependencies_raises(monkeypatch):
    absent = type("Absent", (), {"_backends": ["torch", "torchsde"]})
    monkeypatch.setattr(library, "DPMSolverSDEScheduler", absent, raising=False)
    with pytest.raises(ValueError, match=r"sampler.scheduler=DPMSolverSDEScheduler .*torchsde"):
        run("DPMSolverSDEScheduler", normal((3, 2), 9), 5)


def test_eps_scheduler_at_zero_snr_raises():
    with pytest.raises(ValueError, match=r"sampler.scheduler=PNDMScheduler .*zero SNR"):
        run("PNDMScheduler", normal((3, 2), 10), 5, schedule=ZERO_TERMINAL)


def test_missing_diffusers_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    fn = partial(diffusers, scheduler="DDIMScheduler")
    with pytest.raises(ValueError, match="pip install diffusers"):
        next(fn(GaussianDiffusion(), ideal, normal((3, 2), 11), make_time_grid(LINEAR, 5), noise=torch.zeros_like))
