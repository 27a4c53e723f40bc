"""Random numbers depend on (seed, purpose, step, position) only, not on processes or micro-batches."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src.rng import BLOCK, SampleNoise, StepRng, key

CPU = torch.device("cpu")


def rng(start: int = 0, count: int = 64, seed: int = 3, step: int = 5) -> StepRng:
    return StepRng(seed, step, start, count, CPU)


def pieces(sizes: list[int]) -> list[tuple[int, int]]:
    """Return (start, count) of consecutive pieces of these sizes."""
    ends = list(itertools.accumulate(sizes))
    return [(end - size, size) for end, size in zip(ends, sizes, strict=True)]


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).all())


@pytest.mark.parametrize(
    "sizes",
    [[32, 32], [7, 13, 44], [1] * 64, [16, 48], [15, 17, 32], [63, 1]],
    ids=["halves", "odd cuts", "one by one", "at a block", "around a block", "all but one"],
)
@pytest.mark.parametrize("shape", [(), (2,), (1, 3, 5)])
def test_micro_batches_draw_the_same_numbers(sizes, shape):
    """The numbers of consecutive pieces are those of the complete batch, bit for bit."""
    whole = rng(0, 64)
    cut = [rng(start, count) for start, count in pieces(sizes)]
    assert same(torch.cat([d.normal("eps", shape) for d in cut]), whole.normal("eps", shape))
    assert same(torch.cat([d.uniform("t") for d in cut]), whole.uniform("t"))


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2), (8, 8)])
def test_ranks_and_accumulation_draw_the_same_numbers(world, accumulate):
    """Each micro-batch of each process draws its part of the global batch."""
    micro = 64 // (world * accumulate)
    whole = rng(0, 64).normal("eps", (3,))
    for part, rank in itertools.product(range(accumulate), range(world)):
        start = (part * world + rank) * micro
        assert same(rng(start, micro).normal("eps", (3,)), whole[start : start + micro])


def test_draws_repeat_without_the_global_generator():
    """A second call returns the same numbers, and torch's global generator does not move."""
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    first = rng().normal("eps", (2,))
    assert same(torch.rand(4), expected)
    torch.manual_seed(1)
    assert same(rng().normal("eps", (2,)), first)


def test_each_part_of_the_key_matters():
    """Another seed, step or purpose changes all numbers, and all positions differ."""
    base = rng().uniform("t")
    others = [rng(seed=4).uniform("t"), rng(step=6).uniform("t"), rng().uniform("eps")]
    others.append(rng(seed=5, step=3).uniform("t"))  # equal sum, swapped
    for other in others:
        assert (other == base).sum() <= 1  # 24 bits: equal numbers are possible, but rare
    vectors = rng(0, 8 * BLOCK).normal("eps", (4,))
    assert len(vectors.unique(dim=0)) == 8 * BLOCK


@pytest.mark.parametrize(("start", "count"), [(0, 1), (5, 3), (32, 32), (1000, 7)])
def test_shared_draws_are_equal_at_all_positions(start, count):
    """One number per step, whatever the part of the batch; it differs by seed, step and purpose."""
    shared = rng(start, count).shared("t")
    assert shared.shape == () and shared.dtype == torch.float32
    assert same(shared, rng().shared("t"))
    others = [rng(seed=4).shared("t"), rng(step=6).shared("t"), rng().shared("eps")]
    assert all(other != shared for other in others)
    assert shared not in rng(0, 1024).uniform("t")


def test_shared_draws_are_uniform_over_steps():
    """Kolmogorov's distance; 2 / sqrt(n) is exceeded by 1 sample in 1500 of a uniform distribution."""
    n = 2000
    v = torch.stack([rng(step=step).shared("t") for step in range(n)]).double().sort().values
    assert v.min() >= 0 and v.max() < 1
    assert (v - (torch.arange(n) + 0.5) / n).abs().max() < 2 / math.sqrt(n)


@pytest.mark.parametrize("count", [1, BLOCK, BLOCK + 1])
def test_draws_have_shape_and_dtype(count):
    """(count, *shape) float32 from any start."""
    d = rng(start=21, count=count)
    assert d.normal("eps", (2, 3)).shape == (count, 2, 3)
    assert d.uniform("t").shape == (count,)
    assert d.normal("eps", ()).dtype == d.uniform("t").dtype == torch.float32


def test_moments_match_the_distributions():
    """Mean, variance, fourth moment and correlation of neighbors, within 5 standard errors."""
    x = torch.cat([rng(0, 1024, step=s).normal("eps", (16,)) for s in range(8)]).double()
    n = x.numel()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.square().mean() - 1) < 5 * math.sqrt(2 / n)  # Var z^2 = 2
    assert abs(x.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)  # Var z^4 = 105 - 9
    assert abs((x[1:] * x[:-1]).mean()) < 5 / math.sqrt(n)
    assert abs((x[BLOCK:] * x[:-BLOCK]).mean()) < 5 / math.sqrt(n)

    u = torch.cat([rng(0, 1024, step=s).uniform("t") for s in range(32)]).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * len(u))
    assert abs(u.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / len(u))  # Var u^2 = 1/5 - 1/9


@pytest.mark.parametrize("indices", [[0, 1, 2, 3], [3, 1], [2], [7, 3, 0, 2, 100], [*range(12, 37)]])
def test_sample_noise_depends_on_the_index_only(indices):
    """Sample k gets the same noise alone or with others, in every draw."""
    together = SampleNoise(9, indices, CPU)
    alone = [SampleNoise(9, [i], CPU) for i in indices]
    for _ in range(3):
        noise = together.draw((2, 5))
        assert noise.shape == (len(indices), 2, 5)
        assert noise.dtype == torch.float32
        assert same(noise, torch.cat([a.draw((2, 5)) for a in alone]))


def test_sample_noise_continues_one_stream():
    """Successive draws come from one generator per (seed, block)."""
    noise = SampleNoise(9, [4, BLOCK + 6], CPU)
    drawn = [noise.draw((32,)) for _ in range(3)]
    for block, place in enumerate((4, 6)):
        generator = torch.Generator().manual_seed(key(9, "sample", block))
        for step in drawn:
            assert same(step[block], torch.randn(BLOCK, 32, generator=generator)[place])
    assert not same(drawn[0], drawn[1])
    assert not same(drawn[0], SampleNoise(10, [4, 6], CPU).draw((32,)))


def test_sample_noise_takes_shape_and_dtype_of_x():
    """With the numbers of draw()."""
    x = torch.zeros(2, 3, 4)
    assert same(SampleNoise(1, [0, 1], CPU)(x), SampleNoise(1, [0, 1], CPU).draw((3, 4)))
    half = SampleNoise(1, [0, 1], CPU)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), SampleNoise(1, [0, 1], CPU).draw((3, 4)), rtol=2**-8, atol=0)


def test_keys_of_similar_parts_differ():
    """Parts do not concatenate, and an integer differs from its text; a key is a valid seed."""
    similar = [("ab", "c"), ("a", "bc"), ("abc",), (1, 23), (12, 3), (123,), ("1", 23), (1, "23"), (-1,), (0,), ()]
    similar += [("a', 'b",), ("a", "b"), (0, 0), (1, 0), (0, 1)]
    keys = [key(*parts) for parts in similar]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)
    assert len({key(seed, "t", step, block) for seed in range(8) for step in range(64) for block in range(8)}) == 4096
    assert key(2, "order", 0) == key(2, "order", 0)


def test_draws_ignore_the_default_dtype():
    """Under `trainer.precision=bf16-true` the default is bfloat16, in which 1 in 400 draws of t would be 1.0."""
    before = rng().normal("eps", (3,)), rng().uniform("t"), rng().shared("t"), SampleNoise(0, [1], CPU).draw((3,))
    torch.set_default_dtype(torch.bfloat16)
    try:
        after = (
            rng().normal("eps", (3,)),
            rng().uniform("t"),
            rng().shared("t"),
            SampleNoise(0, [1], CPU).draw((3,)),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(before, after, strict=True):
        assert y.dtype == torch.float32 and same(x, y)
