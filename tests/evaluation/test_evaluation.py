"""The bound, the flow likelihood and the comparison of samplers, on data with a known solution."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from src.diffusion import curves, losses, samplers, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import ContinuousSchedule, NoiseSchedule, Schedule
from src.diffusion.timestep_samplers import uniform
from tests.conftest import compose, train_tiny


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global DATA
    global GaussianMixture, bound, compare_samplers, flow_bits, moments_distance, DiffusionModule, Sampler
    from src.data.analytic import GaussianMixture
    from src.evaluation.likelihood import bound, flow_bits
    from src.evaluation.sampler_accuracy import compare_samplers, moments_distance
    from src.training.module import DiffusionModule, Sampler

    DATA = GaussianMixture([1], [[0.3, -0.2]], [[0.9, 0.4]])


class Ideal(nn.Module):
    """Predict E[x_0 | x_t] of the data at the noise level of the given time."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if isinstance(self.schedule, NoiseSchedule):
            times, index = time.double().unique(return_inverse=True)
            alpha, sigma = (torch.stack(field)[index] for field in list(zip(*self.schedule.at(times), strict=True))[:2])
        else:
            alpha, sigma = self.schedule.curve(time.double())
        alpha, sigma = alpha[:, None], sigma[:, None]
        variance = alpha**2 * DATA.stds[0].square() + sigma**2
        share = alpha * DATA.stds[0].square() / variance
        return (DATA.means[0] + share * (x - alpha * DATA.means[0])).to(x)


def ideal_module(schedule: Schedule) -> DiffusionModule:
    diffusion = GaussianDiffusion("x0", "fixed_large", decoder_scale=schedule.decoder_scale)
    simple = losses.simple
    fn = Sampler(samplers.ddim, 2, "trailing")
    loss_fn = lambda *args: simple(*args, weighting=losses.uniform_weighting)  # noqa: E731
    return DiffusionModule(Ideal(schedule), schedule, diffusion, loss_fn, uniform, fn, shape=(2,))


def entropy_bits() -> float:
    return DATA.entropy() / (2 * math.log(2))


def cosine(steps: int = 1000) -> NoiseSchedule:
    return NoiseSchedule(schedules.cosine(steps))


CURVES = {
    "cosine": curves.cosine_log_snr,
    "exploding": curves.exploding,
    "rectified_flow": lambda u: curves.rectified_flow(u, 1e-3),
}
SCHEDULES = {"table": cosine, **{k: functools.partial(ContinuousSchedule, c, 1000) for k, c in CURVES.items()}}
every_schedule = pytest.mark.parametrize("make_schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


@every_schedule
def test_bound_of_ideal_network_is_near_entropy(make_schedule):
    """fixed_large is close to the optimal variance of small steps; the decoder's variance adds a known excess.

    It is (r - 1 - log r) / 2 nats, where r is the ratio of the correct variance to the decoder's.
    """
    x = DATA(2000, torch.Generator().manual_seed(0))
    schedule = make_schedule()
    result = bound(ideal_module(schedule), x, seed=0, num_terms=None)
    own = -DATA.log_prob(x) / (2 * math.log(2))
    excess = (result.total - own).mean().item()
    ratio = 1 / schedule.decoder_scale
    chance = (result.total - own).std().item() / math.sqrt(len(x))
    assert excess == pytest.approx((ratio - 1 - math.log(ratio)) / 2 / math.log(2), abs=0.02 + 4 * chance)
    assert chance < 0.05
    assert_close(result.total.mean(), result.terms.sum() + result.prior.mean(), rtol=1e-9, atol=0)
    assert 0 <= result.prior.mean() < 1e-4


def test_estimated_bound_matches_all_terms():
    x = DATA(4000, torch.Generator().manual_seed(1))
    module = ideal_module(cosine(100))
    exact, estimate = (bound(module, x, seed=0, num_terms=n) for n in (None, 25))
    error = estimate.total.std().item() / math.sqrt(len(x))
    assert estimate.total.mean().item() == pytest.approx(exact.total.mean().item(), abs=5 * error)
    assert error < 0.2


def test_bound_depends_on_seed_not_batch():
    x = DATA(8, torch.Generator().manual_seed(2))
    module = ideal_module(cosine(20))
    first, again, other = (bound(module, x, s, None).total for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rest = bound(module, x[5:], 0, None, start=5).total
    assert_close(rest, first[5:], rtol=1e-5, atol=1e-6)


def test_flow_likelihood_equals_the_density():
    """Hutchinson's estimate is exact for a diagonal Jacobian."""
    x = DATA(20, torch.Generator().manual_seed(3))
    bits = flow_bits(ideal_module(cosine()), x, seed=0, tolerance=1e-5)
    exact = -DATA.log_prob(x) / (2 * math.log(2))
    # The network is float32, and the first level's noise has a variance of 4e-5.
    assert_close(bits, exact, rtol=0, atol=2e-3)


def test_moments_distance_equals_wasserstein_distance():
    """For equal axes it is the distance of the means and standard deviations."""
    data = GaussianMixture([1], [[1.0, 0.0]], [[2.0, 3.0]])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 3.5])
    assert moments_distance(x, data) == pytest.approx(math.sqrt(1 + 1 + 0.25), abs=0.02)


def test_sampler_errors_decrease_with_steps():
    schedule = NoiseSchedule(schedules.cosine(1000))
    chosen = {
        "ddim": Sampler(samplers.ddim, 0, "log_snr"),
        "heun": Sampler(samplers.heun, 0, "log_snr"),
        "ancestral": Sampler(samplers.ancestral, 0, "log_snr"),
    }
    results, chance = compare_samplers(DATA, schedule, chosen, [20, 80], 500, 0)
    assert results["ddim"].evaluations == [20, 80]
    assert results["heun"].evaluations == [39, 159]
    assert results["ddim"].flow[0] / results["ddim"].flow[1] == pytest.approx(4, rel=0.3)
    assert results["heun"].flow[0] / results["heun"].flow[1] > 10
    assert results["ancestral"].flow == []
    assert 0 < chance < 0.2
    assert all(error < 0.5 for r in results.values() for error in r.moments)


def test_evaluate_reports_the_likelihood(tmp_path, monkeypatch):
    """The terms add up, and the bound is independent of the batch size."""
    from src.evaluate import evaluate

    train_tiny(tmp_path / "run", "schedule.num_steps=20", "loss=hybrid", "trainer.max_steps=3")
    run = f"run='{tmp_path / 'run'}'"
    arguments = [run, "device=cpu", "quality=false"]
    metrics = evaluate(compose("evaluate", *arguments, "num_val=40", f"run_dir='{tmp_path / 'a'}'"))
    assert metrics["num_val"] == 40 and metrics["num_terms"] == 20
    parts = metrics["prior"] + metrics["decoder"] + metrics["divergences"]
    assert metrics["bits_per_dim"] == pytest.approx(parts, rel=1e-6)
    assert metrics["standard_error"] > 0
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["bits_per_dim"] == metrics["bits_per_dim"]
    assert (tmp_path / "a" / "bound.png").stat().st_size > 1000
    in_batches = [evaluate(compose("evaluate", *arguments, "num_val=5", "num_terms=7", f"batch_size={size}",
                                   f"run_dir='{tmp_path / str(size)}'")) for size in (2, 5)]  # fmt: skip
    assert in_batches[0]["bits_per_dim"] == pytest.approx(in_batches[1]["bits_per_dim"], rel=1e-5)
    with_flow = evaluate(
        compose(
            "evaluate", *arguments, "num_val=8", "num_terms=5", "ode=true", "ode_tolerance=1e-2",
            f"run_dir='{tmp_path / 'b'}'",
        )
    )  # fmt: skip
    assert np.isfinite(with_flow["flow_bits_per_dim"])


def test_evaluate_compares_samplers(tmp_path, capsys):
    from src.evaluate import evaluate

    small = ["analytic_steps=[4,8]", "analytic_samples=20", f"run_dir='{tmp_path}'"]
    metrics = evaluate(compose("evaluate", "analytic=gaussian", *small))
    assert {"ddim", "dpmpp_2m", "heun", "ancestral"} <= set(metrics["samplers"])
    assert "8 steps" in capsys.readouterr().out
    assert (tmp_path / "samplers.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "run=FOLDER"),
        (["run=nowhere"], "no run folder"),
        (["analytic=gaussian", "analytic_schedule=cosin"], "analytic_schedule=cosin .*cosine"),
        (["analytic=gaussian", "analytic_schedule=custom"], "analytic_schedule=custom "),
        (["analytic=gaussian", "analytic_steps=[1]"], "analytic_steps="),
    ],
)
def test_invalid_settings_are_rejected(overrides, message, tmp_path):
    from src.errors import UsageError
    from src.evaluate import evaluate

    with pytest.raises(UsageError, match=message):
        evaluate(compose("evaluate", *overrides, f"run_dir='{tmp_path}'"))
