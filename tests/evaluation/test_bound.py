"""The variational bound, its estimate, the loss that trains it, and the reverse variance.

Most tests use the ideal denoiser of N(0.3, 0.5^2), for which each term has a closed form.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from src.diffusion import curves, losses, samplers, schedules
from src.diffusion.gaussian_diffusion import GaussianDiffusion
from src.diffusion.noise import ContinuousSchedule, NoiseSchedule, Schedule
from src.diffusion.timestep_samplers import uniform
from src.errors import UsageError
from src.evaluation.callbacks import BitsPerDim
from src.evaluation.likelihood import bounds
from src.evaluation.reverse_variance import sample_halves, transition_probs
from src.training.learned_schedule import module_class
from src.training.module import DiffusionModule, Sampler
from tests.conftest import compose, train_tiny

MEAN, STD = 0.3, 0.5
ENTROPY = math.log2(STD * math.sqrt(2 * math.pi * math.e))  # 1.0471 bits


def schedules_of(steps: int) -> dict[str, Schedule]:
    flows = (curves.rectified_flow, curves.cosine_log_snr, curves.linear_log_snr, curves.exploding)
    continuous = {f"continuous_{curve.__name__}": ContinuousSchedule(curve, steps) for curve in flows}
    if steps < 10:
        return continuous
    tables = {"linear": schedules.linear(steps), "cosine": schedules.cosine(steps)}
    tables["zero_terminal_snr"] = schedules.zero_terminal_snr(schedules.linear(steps))
    return {name: NoiseSchedule(betas) for name, betas in tables.items()} | continuous


class Ideal(nn.Module):
    """E[x_0 | x_t] for x_0 ~ N(MEAN, STD^2)."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if isinstance(self.schedule, NoiseSchedule):
            row = (time.double() * self.schedule.num_steps).round().long() - 1
            alpha, sigma = self.schedule.rows.alpha[row], self.schedule.rows.sigma[row]
        else:
            alpha, sigma = self.schedule.curve(time.double())
        alpha, sigma = alpha[:, None], sigma[:, None]
        share = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return (MEAN + share * (x - alpha * MEAN)).to(x)


def module_of(
    schedule: Schedule,
    variance: str = "fixed_small",
    net: nn.Module | None = None,
    num_values: int | None = None,
    loss_fn=lambda *args: losses.simple(*args, weighting=losses.uniform_weighting),
) -> DiffusionModule:
    diffusion = GaussianDiffusion("x0", variance, decoder_scale=schedule.decoder_scale, num_values=num_values)
    sampler = Sampler(samplers.ddim, 2, "trailing")
    return module_class(schedule)(net or Ideal(schedule), schedule, diffusion, loss_fn, uniform, sampler, shape=(1,))


def data(count: int) -> Tensor:
    return MEAN + STD * torch.randn(count, 1, generator=torch.Generator().manual_seed(0))


def own_bits(x: Tensor) -> Tensor:
    """Return -log2 of the density at x (N, 1), whose sampling error the bound shares."""
    z = (x[:, 0].double() - MEAN) / STD
    return (z.square() / 2 + math.log(STD * math.sqrt(2 * math.pi))) / math.log(2)


def totals(module: DiffusionModule, x: Tensor, num_terms: int | None, variance: str) -> Tensor:
    """Return the bound of each sample, (N,)."""
    (result,) = bounds(module, [range(len(x))], lambda _: (x, None), 0, num_terms, variance)
    return result.total


def exact_terms(schedule: Schedule, variance: str) -> list[float]:
    """Return the expectation of each term in bits, the decoder's first. Source: Kingma et al. 2021, appendix A."""
    terms = []
    for k in range(schedule.num_steps):
        (a_t, s_t, _), (a_s, s_s, _) = ([f.item() for f in schedule.row(row)] for row in (k, k - 1))
        mse = STD**2 * s_t**2 / (a_t**2 * STD**2 + s_t**2)
        if k == 0:
            chosen = mse if variance == "optimal" else schedule.decoder_scale * (s_t / a_t) ** 2
            terms.append((math.log(2 * math.pi * chosen) + mse / chosen) / 2)
            continue
        added = s_t**2 - (a_t / a_s) ** 2 * s_s**2  # of q(x_t | x_s)
        posterior = s_s**2 * added / s_t**2
        error = (a_s * added / s_t**2) ** 2 * mse  # of the posterior's mean
        large = added * (a_s**2 + s_s**2) / (a_t**2 + s_t**2)
        chosen = {"optimal": posterior + error, "fixed_small": posterior, "fixed_large": large}[variance]
        terms.append(((posterior + error) / chosen - 1 - math.log(posterior / chosen)) / 2)
    return [term / math.log(2) for term in terms]


def exact_prior(schedule: Schedule) -> float:
    """Return KL(q(x_T | x_0) || p(x_T)) in bits, averaged over the data."""
    alpha, sigma, _ = (f.item() for f in schedule.row(schedule.num_steps - 1))
    spread = alpha**2 + sigma**2
    square = alpha**2 * (MEAN**2 + STD**2)
    return ((sigma**2 + square) / spread - 1 - math.log(sigma**2 / spread)) / 2 / math.log(2)


def test_optimal_variance_reaches_the_entropy():
    """Both the closed form and the measured bound equal the entropy plus the prior term."""
    x = data(1500)
    long = ContinuousSchedule(curves.rectified_flow, 1000)
    for name, schedule in {**schedules_of(40), "rectified_flow with 1000 steps": long}.items():
        expected = ENTROPY + exact_prior(schedule)
        noisiest = schedule.row(schedule.num_steps - 1)
        # The prior is N(0, alpha^2 + sigma^2), not the marginal distribution of x_T.
        information = math.log1p(STD**2 * noisiest.snr.item()) / 2 / math.log(2)
        formula = sum(exact_terms(schedule, "optimal")) + exact_prior(schedule)
        assert formula == pytest.approx(expected - information, abs=1e-6), name
        for num_terms in (None, 40):
            some = x[:500] if num_terms is None else x  # all terms have less variance
            excess = totals(module_of(schedule), some, num_terms, "optimal") - own_bits(some)
            error = excess.std().item() / math.sqrt(len(some))
            # The measured variance has a sampling error.
            assert excess.mean().item() == pytest.approx(formula - ENTROPY, abs=4 * error + 0.01), (name, num_terms)
            assert error < 0.12


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_bound_and_estimate_equal_the_closed_form(variance):
    """fixed_small has 2.84 bits on rectified_flow and 2.41 on the continuous cosine; the entropy is 1.047."""
    x = data(1000)
    known = {"continuous_rectified_flow": 2.84, "continuous_cosine": 2.41}
    for name, schedule in schedules_of(40).items():
        if name in known:
            schedule = ContinuousSchedule(schedule.curve, 1000)
        expected = sum(exact_terms(schedule, variance)) + exact_prior(schedule)
        if name in known and variance == "fixed_small":
            assert expected == pytest.approx(known[name], abs=0.01)
        for num_terms in (None, 40):
            some = x[:200] if num_terms is None else x  # all terms have less variance
            excess = totals(module_of(schedule), some, num_terms, variance) - own_bits(some)
            error = excess.std().item() / math.sqrt(len(some))
            assert excess.mean().item() == pytest.approx(expected - ENTROPY, abs=4 * error), (name, num_terms)
            assert error < 0.7
    assert totals(module_of(schedule, variance), x[:9], 5, "trained").tolist() == pytest.approx(
        totals(module_of(schedule), x[:9], 5, variance).tolist(), rel=1e-4
    )


def test_transition_probs_are_at_least_half_uniform():
    for schedule in [*schedules_of(40).values(), *schedules_of(2).values()]:
        probs = transition_probs(schedule)
        assert probs.shape == (schedule.num_steps - 1,)
        assert probs.sum().item() == pytest.approx(1, abs=1e-12)
        assert (probs >= 0.5 / len(probs) - 1e-15).all()


def test_bound_of_short_chains_is_finite():
    """Chains of two or three rows, with one term or more than exist."""
    for steps in (2, 3):
        for schedule in schedules_of(steps).values():
            for num_terms in (None, 1, 100):
                for variance in ("optimal", "fixed_small"):
                    assert totals(module_of(schedule), data(4), num_terms, variance).isfinite().all()


def nodes() -> tuple[Tensor, Tensor]:
    """Return x_0 = m +- s and eps = +-1, whose mean is the expectation of any quadratic function."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 2)
    return MEAN + STD * signs[:, :1], signs[:, 1:]


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_vlb_loss_has_the_expectation_of_the_bound(variance):
    """Check vlb at several v within each transition, and hybrid with an untrained variance."""
    x0, eps = nodes()
    steps = 20
    for name, schedule in schedules_of(steps).items():
        expected = sum(exact_terms(schedule, variance))
        for inside in (0.0, 0.37, 0.99):
            v = (torch.arange(steps, dtype=torch.float64) + inside) / steps
            v = (v + 1e-9).repeat_interleave(len(x0))
            transition = schedule.transition(v, v[:, None])
            x, noise = x0.repeat(steps, 1), eps.repeat(steps, 1)
            ideal = Ideal(schedule)
            diffusion = GaussianDiffusion("x0", variance, decoder_scale=schedule.decoder_scale)
            terms = losses.vlb(
                diffusion, lambda x_t, t, ideal=ideal: ideal(x_t, t.time.flatten()), x, transition, noise
            )
            # Tables are float32.
            tolerance = 1e-9 if isinstance(schedule, ContinuousSchedule) else 1e-3
            assert terms["vlb"].mean().item() == pytest.approx(expected, abs=tolerance), (name, inside)
            if variance == "fixed_small":
                learned = GaussianDiffusion("x0", "learned", decoder_scale=schedule.decoder_scale)
                denoise = lambda x_t, t, ideal=ideal: torch.cat([ideal(x_t, t.time.flatten()), 0 * x_t], 1)  # noqa: E731
                terms = losses.hybrid(learned, denoise, x, transition, noise, weighting=losses.uniform_weighting)
                assert terms["vlb"].mean().item() == pytest.approx(expected, abs=tolerance), (name, inside)


def test_simple_trains_at_v_vlb_on_chain():
    """They differ on continuous schedules; in tables both are rows."""
    v = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for schedule in schedules_of(50).values():
        like = torch.zeros(1000, 1)
        at_v = module_of(schedule).transition(v, like).t
        of_chain = module_of(schedule, loss_fn=losses.vlb).transition(v, like)
        rows = (v * 50).long()
        for level, row in ((of_chain.t, rows), (of_chain.s, rows - 1)):
            expected = [schedule.row(k) for k in row.tolist()]
            for field, values in zip(level, zip(*expected, strict=True), strict=True):
                assert_close(field.flatten().double(), torch.stack(values).double(), rtol=1e-4, atol=1e-6)
        if isinstance(schedule, ContinuousSchedule):
            for field, values in zip(at_v, (*schedule.curve(v), v), strict=True):
                assert torch.equal(field.flatten(), values)
        else:
            assert all(torch.equal(a, b) for a, b in zip(at_v, of_chain.t, strict=True))


def test_learned_schedule_has_a_gradient():
    schedule = ContinuousSchedule(curves.Learned(width=8), 50)
    with torch.no_grad():
        schedule.curve.heights.add_(3)  # far from linear, so all parameters have a gradient
    module = module_of(schedule, loss_fn=losses.vlb)
    batch = {"x": data(64), "start": 0, "total": 64}
    module.training_step(batch, 0)["loss"].backward()
    for weight in module.curve_weights:
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().max() > 0


def test_optimal_variance_comes_from_the_other_half():
    """An outlier leaves its half unchanged and raises the bound of the other."""
    schedule = ContinuousSchedule(curves.rectified_flow, 30)
    x = data(20)
    outlier = x.clone()
    halves = sample_halves(x)
    outlier[6] = next(value for k in range(50, 99) if sample_halves(value := torch.tensor([[float(k)]])) == halves[6])
    same = [k for k in range(20) if halves[k] == halves[6] and k != 6]
    assert 4 < len(same) < 15
    for num_terms in (None, 3):
        before, after = (totals(module_of(schedule), each, num_terms, "optimal") for each in (x, outlier))
        assert torch.equal(before[same], after[same])
        assert (after - before)[halves != halves[6]].mean() > 1


def test_equal_samples_share_a_half():
    x = torch.randn(200, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    halves = sample_halves(x)
    assert torch.equal(sample_halves(-torch.zeros(1, 4)), sample_halves(torch.zeros(1, 4)))
    assert torch.equal(sample_halves(torch.cat([x.flip(0), x])), torch.cat([halves.flip(0), halves]))
    assert 70 < halves.sum() < 130


def test_optimal_variance_of_equal_samples_is_fixed_large():
    """Their other half is empty."""
    module, x = module_of(NoiseSchedule(schedules.cosine(10))), data(1).repeat(4, 1)
    assert torch.equal(totals(module, x, None, "optimal"), totals(module, x, None, "fixed_large"))


def test_optimal_variance_is_independent_of_batches():
    schedule = NoiseSchedule(schedules.cosine(30))
    x = data(24)
    one = totals(module_of(schedule), x, 6, "optimal")
    parts = [range(10), range(10, 11), range(11, 24)]
    apart = bounds(module_of(schedule, "fixed_large"), parts, lambda r: (x[r.start : r.stop], None), 0, 6, "optimal")
    assert_close(torch.cat([part.total for part in apart]), one, rtol=1e-5, atol=1e-5)


class Rounding(nn.Module):
    """Predict 4-bit data exactly, but with an error of 0.9 bins for 1 sample in 100."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        wrong = (torch.arange(len(x)) % 200 < 2)[:, None]
        return TRUTH + wrong * (2 / 15) * 0.9


TRUTH = torch.linspace(-1, 1, 16)[torch.arange(400) % 16][:, None]


def test_decoder_variance_tolerates_rare_errors():
    """Compare with a search over standard deviations: the mean square costs twice as many bits."""
    schedule = ContinuousSchedule(curves.rectified_flow, 20)
    module = module_of(schedule, net=Rounding(), num_values=16)
    (result,) = bounds(module, [range(400)], lambda _: (TRUTH, None), 0, None, "optimal")

    def term(std: float) -> float:
        """Return the term of an inner value, whose bin extends half a bin to each side."""

        def cdf(x: float) -> float:
            return math.erfc(-x / std / math.sqrt(2)) / 2

        right, wrong = (math.log2(cdf(0.5 - e) - cdf(-0.5 - e) + 1e-300) for e in (0.0, 0.9))
        return -0.99 * right - 0.01 * wrong

    best = min(term(0.02 * 1.02**k) for k in range(300))
    assert best < 0.5 * term(math.sqrt(0.01) * 0.9)
    # The outermost 2 of 16 values have wider bins.
    assert result.terms[0].item() == pytest.approx(best, abs=0.05)


def test_bound_of_eight_bit_mixture_is_near_entropy():
    """Compare with the entropy of the samples; fixed_small is 0.7 bits above."""
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    edges = torch.cat([torch.tensor([-math.inf]), values[:-1] + 1 / 255, torch.tensor([math.inf])]).double()
    parts = [(0.3, -0.4, 0.1), (0.7, 0.45, 0.2)]
    p = sum(w * torch.special.ndtr((edges - m) / s).diff() for w, m, s in parts)
    index = torch.multinomial(p, 1500, replacement=True, generator=torch.Generator().manual_seed(0))
    schedule = NoiseSchedule(schedules.linear(1000))

    class Posterior(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            row = (time.double() * 1000).round().long() - 1
            alpha, sigma = schedule.rows.alpha[row, None], schedule.rows.sigma[row, None]
            joint = p.log() - ((x - alpha * values) / sigma).square() / 2
            return (joint.softmax(1) @ values)[:, None].to(x)

    x = values[index].float()[:, None]
    module = module_of(schedule, net=Posterior(), num_values=256)
    for variance, above, below in (("optimal", 0.03, 0.01), ("fixed_small", 0.85, -0.6)):
        excess = totals(module, x, 60, variance) + p[index].log() / math.log(2)
        chance = 4 * excess.std().item() / math.sqrt(len(x))
        assert -below - chance < excess.mean().item() < above + chance


# Commands


def test_evaluate_and_compare_accept_reverse_variance(tmp_path_factory, tmp_path):
    """Every choice works for a run with another variance; others are rejected before measuring."""
    from src.compare import compare
    from src.evaluate import evaluate

    run = tmp_path_factory.mktemp("runs") / "run"
    logged = train_tiny(run, "schedule=rectified_flow", "schedule.num_steps=20", "diffusion.variance=fixed_large",
                        "loss=simple", "callbacks.bits_per_dim.num_samples=40",
                        "callbacks.bits_per_dim.reverse_variance=fixed_small")  # fmt: skip
    arguments = [f"run='{run}'", "device=cpu", "quality=false", "num_val=40", f"run_dir='{tmp_path}'"]
    choices = [("optimal", "null"), ("optimal", 4), ("fixed_small", 4), ("fixed_large", 4), ("trained", 4)]
    results = {
        (variance, num_terms): evaluate(
            compose("evaluate", *arguments, f"reverse_variance={variance}", f"num_terms={num_terms}")
        )
        for variance, num_terms in choices
    }
    bits = {key: metrics["bits_per_dim"] for key, metrics in results.items()}
    assert all(metrics["reverse_variance"] == variance for (variance, _), metrics in results.items())
    assert bits["trained", 4] == pytest.approx(bits["fixed_large", 4], rel=1e-4)
    assert logged["val/bits_per_dim"] == pytest.approx(bits["fixed_small", 4], rel=1e-4)
    assert bits["optimal", 4] < min(bits["fixed_small", 4], bits["fixed_large", 4])
    errors = [results["optimal", num_terms]["standard_error"] for num_terms in ("null", 4)]
    assert bits["optimal", "null"] == pytest.approx(bits["optimal", 4], abs=4 * math.hypot(*errors))
    assert all(compose(name).reverse_variance == "optimal" for name in ("evaluate", "compare"))
    assert compose("train").callbacks.bits_per_dim.reverse_variance == "optimal"

    wrong = [
        (["reverse_variance=smal"], "reverse_variance=smal "),
        (["reverse_variance=optimal", "num_val=1"], "reverse_variance=optimal"),
    ]
    for overrides, message in wrong:
        with pytest.raises(UsageError, match=message):
            evaluate(compose("evaluate", *arguments, *overrides))
    with pytest.raises(UsageError, match="reverse_variance=smal "):
        compare(compose("compare", f"runs=['{run}']", "reverse_variance=smal", f"run_dir='{tmp_path}'"))


def test_callback_rejects_invalid_reverse_variance():
    for settings, message in (
        ({"reverse_variance": "smal"}, "callbacks.bits_per_dim.reverse_variance=smal "),
        ({"num_samples": 1}, "callbacks.bits_per_dim.reverse_variance=optimal"),
    ):
        with pytest.raises(ValueError, match=message):
            BitsPerDim(**settings)
