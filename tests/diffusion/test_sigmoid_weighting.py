"""weighting=sigmoid with its factor -d lambda / dt (arXiv 2303.00848, 2410.19324), by closed forms."""

import math
from functools import partial

import pytest
import torch

from src.diffusion import curves, losses, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import ContinuousSchedule, NoiseLevel, NoiseSchedule
from src.runs.components import build_module
from tests.conftest import compose

BIAS = -1.0


def logistic(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


def cosine(u):
    """Return lambda = -2 log tan(angle) and -d lambda / du = 4 angle' / sin(2 angle)."""
    low, high = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
    angle = low + (high - low) * u
    return -2 * math.log(math.tan(angle)), 4 * (high - low) / math.sin(2 * angle)


def flow(u):
    sigma = 1e-4 + (1 - 1e-4) * u
    return 2 * math.log((1 - sigma) / sigma), 2 * (1 - 1e-4) / (sigma * (1 - sigma))


# log-SNR and its rate of fall, by hand.
CURVES = {
    "cosine": (curves.cosine_log_snr, cosine),
    "linear": (curves.linear_log_snr, lambda u: (10 - 20 * u, 20.0)),
    "exploding": (
        curves.exploding,
        lambda u: (-2 * (math.log(0.002) + u * math.log(40_000)), 2 * math.log(40_000)),
    ),
    "rectified_flow": (curves.rectified_flow, flow),
}


def levels(schedule, times, dtype=torch.float64):
    u = torch.tensor(times, dtype=dtype)
    return NoiseLevel(*schedule.curve(u), u)


def test_weight_on_the_error_of_eps():
    """Kingma & Gao: 1/2 (-d lambda / dt) sigmoid(b - lambda), in float64 and float32."""
    times = [0.01, 0.2, 0.5, 0.77, 0.99]
    for curve, by_hand in CURVES.values():
        schedule = ContinuousSchedule(curve)
        for bias in (BIAS, 2.0):
            expected = [rate / 2 * logistic(bias - log_snr) for log_snr, rate in map(by_hand, times)]
            for dtype, rel in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
                t = levels(schedule, times, dtype)
                weight = losses.sigmoid(GaussianDiffusion("eps"), t, schedule, bias)
                assert weight.dtype == dtype and weight.tolist() == pytest.approx(expected, rel=rel)


def test_weight_on_the_error_of_x0():
    """Hoogeboom et al.: -1/2 d lambda / dt e^b sigmoid(lambda - b)."""
    times = [0.05, 0.4, 0.8]
    for curve, by_hand in CURVES.values():
        schedule = ContinuousSchedule(curve)
        t = levels(schedule, times)
        expected = [rate / 2 * math.exp(BIAS) * logistic(log_snr - BIAS) for log_snr, rate in map(by_hand, times)]
        assert losses.sigmoid(GaussianDiffusion("x0"), t, schedule).tolist() == pytest.approx(expected, rel=1e-9)
        for prediction in ("v", "edm", "velocity"):
            diffusion = GaussianDiffusion(prediction)
            x_t, out = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1e-3
            zero = torch.zeros_like(x_t)
            x0 = [diffusion.interpret(zero + o, x_t, t).x0 for o in (0.0, out)]
            ratio = (out / (x0[1] - x0[0])).square()[0]
            weight = losses.sigmoid(diffusion, t, schedule) * ratio
            assert weight.tolist() == pytest.approx(expected, rel=1e-6)


def test_integral_does_not_depend_on_the_schedule():
    """The mean over uniform times is the integral of sigmoid(b - lambda) / 2 over lambda."""
    times = [(k + 0.5) / 4000 for k in range(4000)]
    bent = partial(curves.shifted(curves.linear_log_snr, 0.5))
    for curve, low, high in (
        (curves.linear_log_snr, -10, 10),
        (partial(curves.cosine_log_snr, max_log_snr=10.0, min_log_snr=-10.0), -10, 10),
        (curves.exploding, -2 * math.log(80), -2 * math.log(0.002)),
        (bent, -10 - 2 * math.log(2), 10 - 2 * math.log(2)),
    ):
        schedule = ContinuousSchedule(curve)
        weights = losses.sigmoid(GaussianDiffusion("eps"), levels(schedule, times), schedule)
        expected = (softplus(BIAS - low) - softplus(BIAS - high)) / 2
        assert weights.mean().item() == pytest.approx(expected, rel=2e-3)


def test_table_rate_is_a_central_difference():
    """One-sided at the ends; at zero SNR the last finite one."""
    for zero in (False, True):
        betas = schedules.linear(50)
        schedule = NoiseSchedule(schedules.zero_terminal_snr(betas) if zero else betas)
        log_snr = [2 * (math.log(a) - math.log(s)) for a, s, _ in map(schedule.row, range(50 - zero))]
        last = len(log_snr) - 1
        expected = {
            0: 50 * (log_snr[0] - log_snr[1]),
            1: 25 * (log_snr[0] - log_snr[2]),
            30: 25 * (log_snr[29] - log_snr[31]),
            last: 50 * (log_snr[last - 1] - log_snr[last]),
            49: 50 * (log_snr[last - 1] - log_snr[last]),
        }
        t = schedule.level(torch.tensor(list(expected)), torch.zeros(5))
        assert schedule.log_snr_rate(t.time).tolist() == pytest.approx(list(expected.values()), rel=1e-6)
        weight = losses.sigmoid(GaussianDiffusion("v"), t, schedule)
        assert weight.isfinite().all() and (weight >= 0).all()


def test_integral_holds_for_tables():
    """The rows of the linear table are close enough for a sum."""
    schedule = NoiseSchedule(schedules.linear(1000))
    t = schedule.level(torch.arange(1000), torch.zeros(1000))
    mean = losses.sigmoid(GaussianDiffusion("eps"), t, schedule).mean().item()
    low, high = (schedule.row(k).snr.log().item() for k in (999, 0))
    assert mean == pytest.approx((softplus(BIAS - low) - softplus(BIAS - high)) / 2, rel=0.01)


def test_sigmoid_plain_omits_the_rate():
    schedule = ContinuousSchedule(curves.cosine_log_snr)
    t = levels(schedule, [0.1, 0.5, 0.9])
    plain = losses.sigmoid_plain(GaussianDiffusion("eps"), t)
    assert plain.tolist() == pytest.approx([logistic(BIAS - cosine(u)[0]) for u in (0.1, 0.5, 0.9)], rel=1e-9)


def test_weightings_are_finite_at_the_last_row():
    """With loss=hybrid too; on a flow its SNR is 0."""
    diffusion = GaussianDiffusion("v")
    names = ("uniform_weighting", "snr", "truncated_snr", "min_snr", "p2", "edm", "sigmoid_plain")
    for curve, _ in CURVES.values():
        for num_steps in (10, 1000):
            schedule = ContinuousSchedule(curve, num_steps)
            t = schedule.transition(torch.tensor([1 - 2**-24]), torch.zeros(1, 1)).t
            assert t.time.item() == 1
            weights = [getattr(losses, name)(diffusion, t) for name in names]
            assert torch.cat([*weights, losses.sigmoid(diffusion, t, schedule)]).isfinite().all()


@pytest.mark.parametrize("schedule", ["cosine", "cosine_continuous", "rectified_flow", "edm_lognormal"])
def test_sigmoid_weighting_trains_from_its_yaml(schedule):
    """The weighting gets the shifted schedule of the run, and works in inference mode."""
    changes = [
        "weighting=sigmoid",
        f"schedule={schedule}",
        "snr_shift=0.5",
        "model.model_channels=8",
        "model.num_res_blocks=1",
    ]
    cfg = compose("train", *changes, "model.num_head_channels=8", "run_dir=x")
    module = build_module(cfg, (1, 8, 8), num_values=17)
    batch = {"x": torch.zeros(4, 1, 8, 8), "start": 0, "total": 4}
    out = module.training_step(batch, 0)
    out["loss"].backward()
    loss = out["terms"]["loss"].tolist()
    assert all(map(math.isfinite, loss))
    with torch.inference_mode():
        assert module.training_step(batch, 0)["terms"]["loss"].tolist() == pytest.approx(loss, rel=1e-4)
    transition = module.schedule.transition(torch.tensor([0.3]), torch.zeros(1, 1))
    weight = losses.sigmoid(module.diffusion, transition.t, module.schedule)
    (bound,) = (module.loss_fn.keywords["weighting"](module.diffusion, transition.t),)
    assert torch.equal(weight, bound)
