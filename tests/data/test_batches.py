"""Batches: global batches do not depend on processes, each epoch has every sample once, splits are disjoint."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from src.rng import StepRng
from tests.data.test_split import is_validation


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global NumbersModule
    global BatchDataset, BatchIndices, BaseDataModule, InfiniteBatchSampler, EvalBatchSampler, normalize, to_uint8
    from src.data.batches import BatchDataset
    from src.data.module import BaseDataModule
    from src.data.samplers import BatchIndices, EvalBatchSampler, InfiniteBatchSampler
    from src.data.sources import normalize, to_uint8

    class NumbersModule(BaseDataModule):
        """A data module of `num` numbers. Preprocessing adds 1, augmentation negates."""

        def __init__(self, num=40, batch_size=8, val_fraction=0.25, split_seed=0, seed=0):
            super().__init__(lambda: Numbers(num), (1,), batch_size, val_fraction, split_seed, seed, num_workers=0)
            self.seen = []

        def preprocess(self, x):
            return x + 1

        def augment(self, x, rng):
            self.seen.append(rng)
            return -x, None


NUM = 23


class Numbers:
    """Samples 0, ..., num - 1, each a vector that holds its index."""

    labels = covariates = captions = ids = None

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def fetch(self, indices) -> Tensor:
        return torch.as_tensor(list(indices), dtype=torch.float32)[:, None]

    def stamps(self) -> None:
        return None


def stub(**settings):
    """Return the attributes of a Trainer that the data module reads."""
    defaults = {"max_steps": 5, "global_step": 0, "accumulate_grad_batches": 1, "global_rank": 0, "world_size": 1}
    defaults["strategy"] = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(**{**defaults, "training": True, **settings})


def sampler(**settings) -> InfiniteBatchSampler:
    return InfiniteBatchSampler(
        **{"indices": range(100, 100 + NUM), "batch_size": 8, "num_steps": 7, "seed": 3, **settings}
    )


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_and_accumulation_share_the_same_global_batches(world, accumulate):
    """In each step, the indices of all ranks and parts, by position, form batch(k)."""
    whole = sampler()
    ranks = [list(sampler(rank=r, world=world, accumulate=accumulate)) for r in range(world)]
    assert [len(places) for places in ranks] == [7 * accumulate] * world
    assert {p.total for places in ranks for p in places} == {8}  # the size of the global batch
    for step in range(7):
        mine = [p for places in ranks for p in places[step * accumulate : (step + 1) * accumulate]]
        mine.sort(key=lambda p: p.start)
        assert [p.start for p in mine] == list(range(0, 8, 8 // (world * accumulate)))
        assert list(itertools.chain.from_iterable(p.indices for p in mine)) == whole.batch(step)
        together = [p.start for part in range(accumulate) for p in (r[step * accumulate + part] for r in ranks)]
        assert together == sorted(together)  # ranks process contiguous parts at the same time


@pytest.mark.parametrize(("num", "batch_size"), [(23, 8), (24, 8), (23, 23), (9, 6), (5, 1)])
def test_every_sample_appears_equally_often(num, batch_size):
    """`num` steps are batch_size epochs, with each sample once per epoch."""
    s = sampler(indices=range(num), batch_size=batch_size, num_steps=num)
    taken = [i for places in s for i in places.indices]
    assert Counter(taken) == dict.fromkeys(range(num), batch_size)
    epochs = [tuple(taken[e * num : (e + 1) * num]) for e in range(batch_size)]
    assert all(sorted(epoch) == list(range(num)) for epoch in epochs)
    assert len(set(epochs)) == batch_size  # in different orders


@pytest.mark.parametrize("first_step", [0, 1, 3, 6, 7])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_sampler_yields_the_remaining_batches(first_step, accumulate):
    everything = list(sampler(accumulate=accumulate, world=2, rank=1))
    resumed = list(sampler(accumulate=accumulate, world=2, rank=1, first_step=first_step))
    assert resumed == everything[first_step * accumulate :]


def test_order_depends_on_the_seed_only():
    """The same seed gives the same batches in any order of calls; another seed gives others."""
    one, again, other = sampler(), sampler(), sampler(seed=4)
    batches = [one.batch(k) for k in range(7)]
    assert [again.batch(k) for k in reversed(range(7))] == batches[::-1]
    assert [other.batch(k) for k in range(7)] != batches
    assert list(one) == list(one)
    assert one.batch(0) != list(range(100, 108))


def test_batches_contain_the_given_indices_only():
    chosen = [3, 9, 4, 77, 50]
    s = sampler(indices=chosen, batch_size=5, num_steps=4)
    assert all(sorted(p.indices) == sorted(chosen) for p in s)


def test_a_batch_larger_than_the_data_raises():
    with pytest.raises(ValueError, match=r"data\.batch_size=24 must be at most 23"):
        sampler(batch_size=24)
    assert sorted(sampler(batch_size=23).batch(0)) == list(range(100, 123))


@pytest.mark.parametrize(("world", "accumulate"), [(3, 1), (1, 3), (4, 4), (16, 1)])
def test_an_indivisible_batch_raises(world, accumulate):
    """The message names the processes, the accumulation and the multiple."""
    message = rf"data\.batch_size=8 .*multiple of {world * accumulate} \({world} processes with {accumulate} "
    with pytest.raises(ValueError, match=message):
        sampler(world=world, accumulate=accumulate)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 23, 30])
def test_validation_covers_each_sample_once(world, batch_size):
    """Over all ranks, at the index's position in the list, with equally many batches per rank."""
    indices = torch.randperm(NUM, generator=torch.Generator().manual_seed(0)).tolist()
    found, lengths = {}, set()
    for rank in range(world):
        s = EvalBatchSampler(indices, batch_size, rank, world)
        places = list(s)
        assert len(places) == len(s)
        lengths.add(len(s))
        for start, total, part, _ in places:
            assert total == NUM
            assert min(batch_size, NUM // world) <= len(part) <= 2 * batch_size
            for offset, index in enumerate(part):
                assert start + offset not in found
                found[start + offset] = index
    assert [found[i] for i in range(NUM)] == indices
    assert len(lengths) == 1


def test_the_dataset_returns_batches():
    batch = BatchDataset(Numbers(9))[BatchIndices(4, 20, [2, 8, 5])]
    assert (batch["start"], batch["total"]) == (4, 20)
    assert batch["x"].flatten().tolist() == [2, 8, 5]


@pytest.mark.parametrize("num_values", [2, 17, 256])
def test_pixel_values_round_trip(num_values):
    """Integers map to evenly spaced values in [-1, 1] and back to the nearest of 0, ..., 255."""
    integers = torch.arange(num_values, dtype=torch.uint8)
    signed = normalize(integers, (0, num_values - 1))
    assert signed.dtype == torch.float32
    assert_close(signed.double().numpy(), np.linspace(-1, 1, num_values), rtol=0, atol=2e-7)  # one rounding
    assert signed[0] == -1
    assert signed[-1] == 1

    expected = [round(255 * i / (num_values - 1)) for i in range(num_values)]
    shown = to_uint8(signed, num_values)
    assert shown.dtype == torch.uint8
    assert shown.tolist() == expected
    nudged = signed + (torch.arange(num_values) % 2 - 0.5) * 1.8 / (num_values - 1)  # 0.9 of the way to a neighbor
    assert to_uint8(nudged, num_values).tolist() == expected


def test_values_outside_the_range_are_clipped():
    assert to_uint8(torch.tensor([-3.0, -1.001, 1.001, 50.0])).tolist() == [0, 0, 255, 255]
    assert to_uint8(torch.tensor([-3.0, 3.0]), num_values=17).tolist() == [0, 255]
    assert to_uint8(torch.tensor([0.0, 1.0], dtype=torch.bfloat16)).tolist() == [128, 255]  # 127.5 to even


@pytest.mark.parametrize("num", [40, 41, 97])
def test_split_is_disjoint_and_complete(num):
    """Validation and training samples are disjoint, complete, and assigned by hash."""
    data = NumbersModule(num, val_fraction=0.25)
    data.setup()
    assert sorted(data.val_indices + data.train_indices) == list(range(num))
    assert sorted(data.val_indices) == [k for k in range(num) if is_validation(str(k), 0.25)]


def test_split_depends_on_the_split_seed_only():
    """The run's seed does not change the split."""

    def validation(**seeds):
        data = NumbersModule(**seeds)
        data.setup()
        return data.val_indices

    assert validation(seed=1) == validation(seed=2) == validation(seed=2, split_seed=0)
    assert sorted(validation(split_seed=1)) != sorted(validation(split_seed=0))


def test_setup_opens_the_source_once():
    """Lightning calls it for each stage."""
    data = NumbersModule()
    data.setup("fit")
    source, validation = data.source, list(data.val_indices)
    data.setup("validate")
    assert data.source is source
    assert data.val_indices == validation


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"val_fraction": 0.0}, {"val_fraction": 1.0}])
def test_invalid_settings_raise(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"data\.{name}={value} must be"):
        NumbersModule(**wrong)


def test_too_few_samples_raise():
    with pytest.raises(ValueError, match=r"data\.val_fraction=0\.25"):
        NumbersModule(num=1).setup()
    data = NumbersModule(num=40, batch_size=40)
    data.setup()
    count = len(data.train_indices)
    with pytest.raises(ValueError, match=rf"data\.batch_size=40 must be at most {count}"):
        data.train_sampler(stub())


def test_loaders_need_a_trainer_and_setup():
    with pytest.raises(RuntimeError, match="need a Trainer"):
        NumbersModule().train_dataloader()
    data = NumbersModule()
    data.trainer = stub()
    with pytest.raises((RuntimeError, ValueError)):
        data.train_dataloader()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loaders_follow_the_trainer(accumulate):
    """On two processes, training loaders start at global_step, and validation loaders cover all samples."""
    trained, validated = {}, {}
    for rank in range(2):
        data = NumbersModule(seed=5)
        data.setup()
        data.trainer = stub(global_rank=rank, world_size=2, accumulate_grad_batches=accumulate, global_step=2)
        for i, batch in enumerate(data.train_dataloader()):
            step = 2 + i // accumulate
            assert batch["total"] == 8
            trained.setdefault(step, {})[batch["start"]] = batch["x"].flatten().int().tolist()
        for batch in data.val_dataloader():
            assert batch["total"] == len(data.val_indices)
            validated.update({batch["start"] + j: int(v) for j, v in enumerate(batch["x"])})
    alone = InfiniteBatchSampler(data.train_indices, 8, 5, seed=5)
    assert sorted(trained) == [2, 3, 4]
    for step, parts in trained.items():
        assert [v for start in sorted(parts) for v in parts[start]] == alone.batch(step)
    assert [validated[i] for i in range(len(validated))] == data.val_indices


def test_only_training_batches_are_augmented():
    """Augmentation gets random numbers keyed by seed, step and position."""
    data = NumbersModule(seed=6)
    data.setup()
    batch = {"x": torch.ones(4, 1), "start": 12, "total": 16}
    data.trainer = stub(training=False)
    assert data.on_after_batch_transfer(batch, 0)["x"].unique().tolist() == [2]
    assert data.seen == []
    data.trainer = stub(global_step=9)
    out = data.on_after_batch_transfer(batch, 0)
    assert out["x"].unique().tolist() == [-2]
    assert (out["start"], out["total"]) == (12, 16)
    assert data.seen == [StepRng(6, 9, 12, 4, batch["x"].device)]


def test_examples_are_preprocessed_validation_samples():
    """Without a Trainer, and at most all of them."""
    data = NumbersModule()
    assert (data.examples(3).flatten() - 1).tolist() == data.val_indices[:3]
    assert len(data.examples(1000)) == len(data.val_indices)


def test_every_process_gets_a_validation_batch():
    """Even with as many processes as samples; no sample occurs twice."""
    data = NumbersModule(num=40, val_fraction=0.2)
    data.setup()
    most = len(data.val_indices)
    assert 3 < most < 12
    for world in (1, 2, 3, most):
        sizes, seen = [], []
        for rank in range(world):
            data.trainer = stub(world_size=world, global_rank=rank)
            batches = list(data.val_dataloader())
            sizes.append(len(batches))
            seen += [x.item() for batch in batches for x in batch["x"].flatten()]
        assert min(sizes) >= 1
        assert sorted(seen) == sorted(float(i) for i in data.val_indices)
    data.trainer = stub(world_size=most + 1)
    with pytest.raises(ValueError, match=f"{most + 1} processes need"):
        data.train_dataloader()


@pytest.mark.parametrize(("rank", "exists", "prepared"), [(0, True, 1), (0, False, 1), (1, True, 0), (1, False, 1)])
def test_the_first_process_prepares_the_data(monkeypatch, rank, exists, prepared):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    data, calls = NumbersModule(), []
    opening = data.open_source

    def open_source():
        if not exists and not calls:
            raise FileNotFoundError("not prepared yet")
        return opening()

    data.open_source = open_source
    monkeypatch.setattr(data, "prepare_data", lambda: calls.append(1))
    data.prepare_once_per_node()
    assert len(calls) == prepared
    assert data.source is not None


def test_balanced_sampling_draws_classes_equally():
    """With 90 samples of one class and 10 of another; batches stay a function of the step."""
    classes = torch.tensor([0] * 90 + [1] * 10)
    sampler = InfiniteBatchSampler(range(100, 200), 50, 100, seed=0, classes=classes)
    drawn = torch.tensor([index for step in range(100) for index in sampler.batch(step)])
    share = (drawn >= 190).double().mean().item()
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(5000)
    counts = torch.bincount(drawn - 100, minlength=100)
    assert counts.min() > 0 and set(drawn.tolist()) == set(range(100, 200))
    again = InfiniteBatchSampler(range(100, 200), 50, 100, seed=0, classes=classes, first_step=7)
    assert again.batch(7) == sampler.batch(7) != sampler.batch(8)
