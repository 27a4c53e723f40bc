"""Timestep samplers: their distributions, and the weights that keep the mean loss unbiased."""

import math
from collections import deque
from functools import partial
from statistics import NormalDist

import pytest
import torch
from torch.testing import assert_close

from src.diffusion import curves
from src.diffusion.timestep_samplers import ImportanceSampler, log_normal, logit_normal, stratified, uniform
from src.rng import StepRng
from tests.loops import for_each


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow packages only when tests run, not when they are collected."""
    global batch_positions
    from src.training.module import batch_positions


CPU = torch.device("cpu")
NONE = torch.tensor(0.0)
LAST = 1 - 2**-24  # the largest float32 below 1
SEEDS = range(6)
CUTS = ["halves", "at blocks", "one by one", "odd cuts"]


def lattice(count):
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def random(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def draw(timestep_sampler, total, sizes, step=0):
    """Return v and weights of a global batch of `total`, drawn in consecutive pieces of these sizes."""
    parts, start = [], 0
    for size in sizes:
        rng = StepRng(3, step, start, size, CPU)
        position = batch_positions({"x": torch.zeros(size, 2), "start": start, "total": total})
        parts.append(timestep_sampler(rng.uniform("t"), rng.shared("t"), position))
        start += size
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def seen_by(importance, seed, count):
    """Feed `count` losses at random v, and return the last losses of each bin, tracked in plain Python."""
    v = random(count, seed)
    losses = torch.exp(3 * torch.randn(count, generator=torch.Generator().manual_seed(seed + 100)))
    importance.update(v, losses)
    last = [deque(maxlen=importance.history_per_bin) for _ in range(importance.num_bins)]
    for position, loss in zip(v.tolist(), losses.tolist(), strict=True):
        last[int(position * importance.num_bins)].append(loss)
    return v, losses, last


def deviation_from_uniform(v):
    """Return Kolmogorov's distance of the sample v (N,) from the uniform distribution."""
    v, n = v.double().sort().values, len(v)
    above = torch.arange(1, n + 1) / n - v
    return max(above.max().item(), (1 / n - above).max().item())


def sqrt_warp(position):
    return position.sqrt()


SAMPLERS = {
    "uniform": uniform,
    "uniform_warped": partial(uniform, warp=logit_normal),
    "stratified": stratified,
    "stratified_warped": partial(stratified, warp=log_normal),
    "importance": ImportanceSampler(num_bins=10, history_per_bin=2),
    "importance_ready": ImportanceSampler(num_bins=10, history_per_bin=2),
}
seen_by(SAMPLERS["importance_ready"], 0, 400)
every_one = pytest.mark.parametrize("timestep_sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


@every_one
@for_each("sizes", dict(zip(CUTS, [[32, 32], [16] * 4, [1] * 64, [5, 40, 19]], strict=True)))
def test_microbatches_use_the_same_levels(timestep_sampler, sizes):
    """For any number of processes and accumulation steps, up to the last bit."""
    batches = [draw(timestep_sampler, 64, [64], step) for step in range(3)]
    for step, whole in enumerate(batches):
        for a, b in zip(whole, draw(timestep_sampler, 64, sizes, step), strict=True):
            assert_close(a, b, rtol=2**-22, atol=0)
    assert not torch.equal(batches[0][0], batches[1][0])


@every_one
def test_positions_are_accurate_in_low_default_precision(timestep_sampler):
    """bfloat16 has only 384 numbers in [1/8, 1)."""
    before = draw(timestep_sampler, 1000, [1000])
    torch.set_default_dtype(torch.bfloat16)
    try:
        after = draw(timestep_sampler, 1000, [1000])
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(before, after, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


@every_one
def test_v_is_below_one_for_extreme_draws(timestep_sampler):
    """From the smallest and the largest random number."""
    extremes = torch.tensor([0.0, 2**-24, 0.5, LAST])
    for shared in extremes:
        v, weight = timestep_sampler(extremes, shared, torch.tensor([0.0, 0.25, 0.5, 0.75]))
        assert v.shape == weight.shape == (4,)
        assert v.min() >= 0 and v.max() < 1
        assert weight.isfinite().all() and weight.min() > 0


def test_uniform_returns_u():
    v, weight = uniform(random(100), NONE, random(100, 1))
    assert torch.equal(v, random(100)) and (weight == 1).all()


@for_each("total", [1, 7, 64, 1000])
@for_each("step", [0, 1, 2])
def test_stratified_is_evenly_spaced(total, step):
    """Sorted, the i-th of B is i / B plus a shared offset below 1 / B."""
    v, weight = draw(stratified, total, [total], step)
    offset = v.double().sort().values - torch.arange(total) / total
    assert_close(offset, offset[:1].expand(total), rtol=0, atol=2e-7)  # rounding of positions and sums
    assert -2e-7 < offset[0] < 1 / total
    assert (weight == 1).all()


@for_each("position", [0, 1, 6, 9])
def test_each_position_of_a_stratified_batch_is_uniform(position):
    """Over the steps. 1 in 1500 samples of a uniform distribution exceeds 2 / sqrt(n)."""
    v = torch.stack([draw(stratified, 10, [10], step)[0][position] for step in range(800)])
    assert deviation_from_uniform(v) < 2 / math.sqrt(len(v))


def test_stratified_means_have_less_variance():
    """For a linear function, the std of the mean is 1 / (B sqrt 12) instead of 1 / sqrt(12 B)."""
    means = {
        timestep_sampler: torch.stack(
            [draw(timestep_sampler, 64, [64], step)[0].double().mean() for step in range(400)]
        )
        for timestep_sampler in (uniform, stratified)
    }
    # The relative error of a sample std is about 1 / sqrt(2 n) = 3.5%.
    assert means[uniform].std().item() == pytest.approx(1 / math.sqrt(12 * 64), rel=0.15)
    assert means[stratified].std().item() == pytest.approx(1 / math.sqrt(12) / 64, rel=0.15)


@pytest.mark.parametrize("timestep_sampler", [uniform, stratified])
def test_warp_is_applied_last(timestep_sampler):
    """The weight stays 1."""
    arguments = random(64), torch.tensor(0.3), torch.arange(64) / 64
    v, weight = timestep_sampler(*arguments, warp=sqrt_warp)
    assert torch.equal(v, timestep_sampler(*arguments)[0].sqrt())
    assert (weight == 1).all()


@for_each("mean, std", [(0.0, 1.0), (0.5, 0.6), (-1.0, 2.0)])
def test_logit_normal_quantiles(mean, std):
    """The quantiles of logit(v) are those of the normal distribution."""
    v = logit_normal(lattice(999), mean, std)
    expected = torch.tensor([NormalDist(mean, std).inv_cdf(p) for p in lattice(999).tolist()]).double()
    assert_close(torch.logit(v), expected, rtol=1e-5, atol=1e-6)


@for_each("low, high", [(0.002, 80.0), (1e-5, 1e4)])
@for_each("mean, std", [(-1.2, 1.2), (-0.4, 1.0), (0.0, 2.0)])
def test_log_normal_quantiles(mean, std, low, high):
    """On `exploding` with the same ends, those of log sigma are normal, clamped to the ends.

    The clamp to 1 - 2^-24 keeps 1e-6 of the length of the curve of up to 21.
    """
    _, sigma = curves.exploding(log_normal(lattice(999), mean, std, low, high), low, high)
    normal = [NormalDist(mean, std).inv_cdf(p) for p in lattice(999).tolist()]
    expected = [min(max(value, math.log(low)), math.log(high)) for value in normal]
    assert_close(sigma.log(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)


def test_log_normal_moments():
    """With EDM's settings, where the ends cut off 1 in 10^5."""
    _, sigma = curves.exploding(log_normal(lattice(100_000)))
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=1e-3)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=1e-3)


@pytest.mark.parametrize("warp", [log_normal, logit_normal])
@for_each("std", [0.0, -1.0, math.nan])
def test_warp_std_out_of_range_raises(warp, std):
    with pytest.raises(ValueError, match=f"timestep_sampler.warp.std={std} ") as error:
        warp(lattice(4), std=std)
    assert "\n" not in str(error.value)


@for_each("low, high", [(0.0, 80.0), (-1.0, 80.0), (2.0, 2.0), (80.0, 0.002), (math.nan, 80.0)])
def test_log_normal_sigmas_out_of_range_raise(low, high):
    """The same rule as for `exploding`."""
    with pytest.raises(ValueError, match=f"timestep_sampler.warp.sigma_min={low} .*sigma_max={high}") as error:
        log_normal(lattice(4), sigma_min=low, sigma_max=high)
    assert "\n" not in str(error.value)


@for_each("seed", SEEDS)
@for_each("num_bins, history_per_bin, uniform_prob", [(10, 4, 0.01), (7, 1, 0.2), (1, 3, 0.5), (5, 6, 1.0)])
def test_probabilities_follow_the_second_moments(num_bins, history_per_bin, uniform_prob, seed):
    """p = uniform_prob / num_bins + (1 - uniform_prob) rms / sum of rms, in plain floats."""
    importance = ImportanceSampler(num_bins, history_per_bin, uniform_prob)
    for fed in range(3):  # overwrites the history of each bin several times
        _, _, last = seen_by(importance, seed + 10 * fed, 40 * num_bins * history_per_bin)
    roots = [math.sqrt(sum(loss**2 for loss in losses) / history_per_bin) for losses in last]
    expected = [uniform_prob / num_bins + (1 - uniform_prob) * root / sum(roots) for root in roots]
    assert all(len(losses) == history_per_bin for losses in last)
    assert_close(importance.probabilities(), torch.tensor(expected), rtol=1e-5, atol=0)


def test_importance_is_uniform_until_histories_are_full():
    """If one loss of one bin is missing, v is u and the weight is 1."""
    importance = ImportanceSampler(num_bins=4, history_per_bin=3)
    num_bins = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 0, 0, 1])
    importance.update((num_bins + 0.5) / 4, torch.arange(1.0, 15))
    v, weight = importance(random(100), NONE, NONE)
    assert_close(v, random(100), rtol=0, atol=2**-23)
    assert_close(weight, torch.ones(100), rtol=1e-6, atol=0)
    importance.update(torch.tensor([0.99]), torch.tensor([9.0]))
    assert importance.probabilities().diff().abs().max() > 0.01


def test_zero_losses_keep_importance_uniform():
    importance = ImportanceSampler(num_bins=4, history_per_bin=1)
    importance.update(lattice(4), torch.zeros(4))
    assert_close(importance.probabilities(), torch.full((4,), 0.25))


@for_each("seed", SEEDS)
def test_importance_draws_bins_with_their_probabilities(seed):
    """With weight 1 / (p num_bins), uniformly within a bin.

    A float32 v may round up to an edge.
    """
    importance = ImportanceSampler(num_bins=10, history_per_bin=3, uniform_prob=0.05)
    seen_by(importance, seed, 500)
    p = importance.probabilities()
    count = 200_000
    v, weight = importance(lattice(count), NONE, NONE)
    chosen = (v * 10).long()
    assert_close(torch.bincount(chosen, minlength=10) / count, p, rtol=0, atol=3 / count)
    assert (weight != 1 / (p[chosen] * 10)).sum() < 20
    for b in range(10):
        inside = v[chosen == b].double() * 10 - b
        assert deviation_from_uniform(inside) < 3 / len(inside) + 1e-5


@pytest.mark.parametrize(
    "f", [torch.ones_like, torch.square, lambda v: torch.sin(9 * v), lambda v: (v > 0.87).double()]
)
@for_each("seed", SEEDS)
def test_importance_is_unbiased(f, seed):
    """The weighted mean of any function of v is its integral."""
    importance = ImportanceSampler(num_bins=8, history_per_bin=3, uniform_prob=0.1)
    seen_by(importance, seed, 400)
    v, weight = importance(lattice(100_000), NONE, NONE)
    assert weight.max() <= 10 * (1 + 1e-6) and weight.min() < 0.9
    mean = (weight.double() * f(v.double())).mean()
    assert_close(mean, f(lattice(100_000)).mean(), rtol=0, atol=1e-3)


def test_importance_lowers_the_variance():
    """If the loss depends on the bin only, weight times loss is nearly constant."""
    importance = ImportanceSampler(num_bins=10, history_per_bin=1, uniform_prob=0.01)
    losses = torch.logspace(-1, 2, 10)
    importance.update(lattice(10).float(), losses)
    v, weight = importance(random(10_000), NONE, NONE)
    loss = losses[(v * 10).long()]
    assert (weight * loss).mean().item() == pytest.approx(losses.mean().item(), rel=0.02)
    assert (weight * loss).std() < 0.2 * losses.std()


@for_each("sizes", {"halves": [150, 150], "one by one": [1] * 300, "odd cuts": [7, 200, 3, 90]})
def test_update_depends_only_on_the_order(sizes):
    """One update with many losses equals many updates with one."""
    whole, cut = ImportanceSampler(num_bins=6, history_per_bin=4), ImportanceSampler(num_bins=6, history_per_bin=4)
    v, losses, _ = seen_by(whole, 1, 300)
    for part_v, part_losses in zip(v.split(sizes), losses.split(sizes), strict=True):
        cut.update(part_v, part_losses)
    assert torch.equal(whole.seen, cut.seen)
    assert torch.equal(whole.losses, cut.losses)


def test_history_keeps_the_last_losses():
    importance = ImportanceSampler(num_bins=2, history_per_bin=3)
    importance.update(torch.full((8,), 0.75), torch.arange(8.0))
    assert sorted(importance.losses[1].tolist()) == [5, 6, 7]
    assert importance.losses[0].tolist() == [0, 0, 0]
    assert importance.seen.tolist() == [0, 8]
    importance.update(torch.tensor([0.6, 0.2]), torch.tensor([10.0, 20.0]))
    assert sorted(importance.losses[1].tolist()) == [6, 7, 10]
    assert importance.losses[0].tolist() == [20, 0, 0]


def test_non_finite_losses_are_ignored():
    importance = ImportanceSampler(num_bins=2, history_per_bin=2)
    importance.update(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, math.nan, math.inf, 2.0]))
    assert importance.seen.tolist() == [2, 0]
    assert sorted(importance.losses[0].tolist()) == [1, 2]
    importance.update(torch.tensor([0.9]), torch.tensor([math.nan]))
    importance.update(torch.zeros(0), torch.zeros(0))
    assert importance.seen.tolist() == [2, 0]


def test_v_near_one_is_in_the_last_bin():
    """In float32, the largest v times 100 bins may round to 100."""
    importance = ImportanceSampler(num_bins=100, history_per_bin=1)
    importance.update(torch.tensor([LAST, 0.0]), torch.tensor([3.0, 5.0]))
    assert importance.losses[99, 0] == 3 and importance.losses[0, 0] == 5


def test_state_dict_holds_the_history():
    """A resumed run draws and updates as without the interruption."""
    before, after = ImportanceSampler(num_bins=5, history_per_bin=3), ImportanceSampler(num_bins=5, history_per_bin=3)
    seen_by(before, 2, 100)
    after.load_state_dict(before.state_dict())
    for _ in range(2):
        for a, b in zip(*(importance(random(50), NONE, NONE) for importance in (before, after)), strict=True):
            assert torch.equal(a, b)
        for importance in (before, after):
            seen_by(importance, 3, 20)
    assert not list(before.parameters())


def test_update_detaches_losses():
    importance = ImportanceSampler(num_bins=2, history_per_bin=1)
    importance.update(lattice(2), torch.ones(2, requires_grad=True))
    assert not importance.losses.requires_grad


@for_each("wrong", [{"num_bins": 0}, {"history_per_bin": 0}, {"uniform_prob": 0.0}, {"uniform_prob": 1.5}])
def test_importance_settings_out_of_range_raise(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"timestep_sampler.{name}={value} ") as error:
        ImportanceSampler(**wrong)
    assert "\n" not in str(error.value)


@for_each("dtype", [torch.float32, torch.float16])
def test_importance_handles_huge_losses(dtype):
    """Losses whose square overflows, or which the buffer cannot hold: probabilities are finite."""
    importance = ImportanceSampler(num_bins=4, history_per_bin=2).to(dtype)
    v = torch.tensor([0.1, 0.3, 0.6, 0.9]).repeat(2)
    importance.update(v, torch.tensor([1e20, 1.0, 1.0, 1.0]).repeat(2))
    importance.update(v, torch.tensor([1e4, 1.0, 1.0, 1.0]).repeat(2))
    p = importance.probabilities()
    assert p.isfinite().all()
    assert p.sum().item() == pytest.approx(1, abs=1e-3)
