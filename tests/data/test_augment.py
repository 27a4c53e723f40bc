"""Augmentations of training images: their distribution, their random numbers, and the labels of EDM's."""

import itertools
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as TF

from src.data.augment import (
    EDM_LABELS,
    ColorJitter,
    EdmAugmentation,
    apply_edm,
    edm_labels,
    horizontal_flip,
    rotate,
    shift_hue,
    vertical_flip,
)
from src.data.batches import fetch_batch
from src.data.fit import bucket_sizes
from src.data.images import ImageDataModule
from src.data.samplers import VALIDATION, BatchIndices, InfiniteBatchSampler
from src.data.sources import InMemory
from src.rng import StepRng, key
from src.runs.sampling import resize_samples
from tests.conftest import compose

CPU = torch.device("cpu")
JITTER = ColorJitter(0.4, 0.5, 0.6, 0.2)
ALL = {
    "flip": horizontal_flip,
    "vertical flip": vertical_flip,
    "rotations": rotate,
    "color": JITTER,
    "edm": lambda x, rng: EdmAugmentation(0.5)(x, rng)[0],
}


def rng(count: int, start: int = 0, step: int = 3, seed: int = 5) -> StepRng:
    return StepRng(seed, step, start, count, CPU)


def noise(*shape: int) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1


def is_share(found: Tensor, expected: float) -> bool:
    """Return whether a share of trues (B,) is within 5 standard deviations of the expected one."""
    return abs(found.double().mean().item() - expected) < 5 * math.sqrt(expected * (1 - expected) / len(found))


def module(images: Tensor, condition=None, captions=None, **settings) -> ImageDataModule:
    """Return a data module of images in memory, in training."""
    size = list(images.shape[-2:])
    data = ImageDataModule(
        lambda root, image_size, channels, prepare=False: InMemory(images, captions=captions),
        None, images.shape[1], size, **settings,
    )  # fmt: skip
    data.condition = condition
    data.trainer = SimpleNamespace(training=True, global_step=3, world_size=1)
    return data


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sizes", [[32, 32], [7, 13, 44]])
def test_parts_change_like_the_global_batch(name, sizes):
    x = noise(64, 3, 8, 8)
    starts = [0, *itertools.accumulate(sizes)]
    parts = [ALL[name](x[a:b], rng(b - a, a)) for a, b in itertools.pairwise(starts)]
    assert_close(torch.cat(parts), ALL[name](x, rng(64)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_steps_and_seeds_change_the_numbers(name):
    x = noise(64, 3, 8, 8)
    first = ALL[name](x, rng(64))
    assert torch.equal(first, ALL[name](x, rng(64)))
    assert not torch.equal(first, ALL[name](x, rng(64, step=4)))
    assert not torch.equal(first, ALL[name](x, rng(64, seed=6)))


def test_flip_keeps_its_bits():
    x = noise(64, 3, 8, 8)
    mirrored = rng(64).uniform("flip") < 0.5
    expected = torch.stack([torch.flip(image, [2]) if m else image for image, m in zip(x, mirrored, strict=True)])
    assert torch.equal(horizontal_flip(x, rng(64)), expected)
    assert torch.equal(module(x, flip=True, seed=5).augment(x, rng(64))[0], expected)


def test_vertical_flips_hit_half_of_the_images():
    x = noise(2000, 1, 4, 6)
    changed = (vertical_flip(x, rng(2000)) == x.flip(2)).flatten(1).all(1)
    assert is_share(changed, 0.5)
    assert torch.equal(vertical_flip(vertical_flip(x, rng(2000)), rng(2000)), x)


def test_rotations_are_uniform_over_four_angles():
    x = noise(2000, 1, 4, 4)
    out = rotate(x, rng(2000))
    shares = [(out == torch.from_numpy(np.rot90(x.numpy(), k, (2, 3)).copy())).flatten(1).all(1) for k in range(4)]
    assert all(is_share(each, 0.25) for each in shares)
    assert (torch.stack(shares).sum(0) == 1).all()


def test_rotations_of_other_shapes_raise():
    with pytest.raises(ValueError, match=r"data\.rotations=true"):
        module(noise(4, 1, 4, 6), rotations=True)


def test_color_jitter_matches_torchvision():
    """Applied image by image with the same factors, in the same order."""
    x = noise(32, 3, 6, 5)
    numbers, expected = rng(32), []
    for k, image in enumerate((x + 1) / 2):
        factors = [numbers.uniform(name)[k].item() for name in ("brightness", "contrast", "saturation", "hue")]
        image = TF.adjust_brightness(image, 0.6 + 0.8 * factors[0])
        image = TF.adjust_contrast(image, 0.5 + factors[1])
        image = TF.adjust_saturation(image, 0.4 + 1.2 * factors[2])
        expected.append(2 * TF.adjust_hue(image, 0.2 * (2 * factors[3] - 1)) - 1)
    assert_close(JITTER(x, numbers), torch.stack(expected), rtol=0, atol=1e-5)


def test_shifted_hue_returns_after_a_turn():
    y, turns = (noise(16, 3, 6, 5) + 1) / 2, torch.linspace(-0.5, 0.5, 16)
    assert_close(shift_hue(shift_hue(y, turns), -turns), y, rtol=0, atol=1e-5)
    assert_close(shift_hue(y[:, :1].expand(-1, 3, -1, -1), turns), y[:, :1].expand(-1, 3, -1, -1))
    third = torch.full((16,), 1 / 3)
    assert_close(shift_hue(y, third), y.roll(1, 1), rtol=0, atol=1e-5)  # red becomes green


def test_color_jitter_keeps_opacity():
    x = noise(8, 4, 6, 5)
    out = JITTER(x, rng(8))
    assert torch.equal(out[:, 3], x[:, 3])
    assert_close(out[:, :3], JITTER(x[:, :3], rng(8)))
    gray = ColorJitter(brightness=0.5, contrast=0.5)
    assert torch.equal(gray(x[:, :2], rng(8))[:, 1], x[:, 1])


@pytest.mark.parametrize(
    ("jitter", "setting"),
    [({"hue": 0.6}, "hue=0.6"), ({"contrast": -1.0}, "contrast=-1.0"), ({"saturation": 0.1}, "saturation=0.1"),
     ({"blur": 1.0}, "blur")],
)  # fmt: skip
def test_invalid_color_jitter_raises(jitter, setting):
    with pytest.raises(ValueError, match=rf"data\.color_jitter\.{setting}"):
        module(noise(4, 1, 4, 4), color_jitter=jitter)


def test_edm_changes_have_their_probabilities():
    a = EdmAugmentation(0.12).draw(rng(8000))
    assert is_share(a[:, 0] == 1, 0.5) and is_share(a[:, 1] == 1, 0.06)
    for k in (2, 3, 4, 6):
        assert is_share(a[:, k] != 0, 0.12)
    assert torch.equal(a[:, 4] != 0, a[:, 5] != 0) and torch.equal(a[:, 6] != 0, a[:, 7] != 0)
    assert is_share((a[:, 1:] == 0).all(1), 0.94 * 0.88**4)
    turns, scales = a[a[:, 3] != 0, 3] / math.pi, a[a[:, 2] != 0, 2]
    assert turns.abs().max() < 1 and is_share(turns.abs() < 0.3, 0.3) and is_share(turns > 0, 0.5)
    assert is_share(scales.abs() < 1, 0.6827)


def test_edm_labels_are_zero_for_unchanged_images():
    x = noise(400, 3, 8, 8)
    out, labels = EdmAugmentation(0.12)(x, rng(400))
    assert labels.shape == (400, EDM_LABELS)
    same = (out == x).flatten(1).all(1)
    assert torch.equal(same, (labels == 0).all(1)) and same.sum() > 50
    only_mirrored = (labels[:, 1:] == 0).all(1) & (labels[:, 0] == 1)
    assert torch.equal(out[only_mirrored], x[only_mirrored].flip(-1))


def parameters(count: int) -> Tensor:
    """Return parameters of `EdmAugmentation` with every change in every image."""
    return EdmAugmentation(1.0).draw(rng(count))


def matrix(a: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the 3x3 matrix of the changes of table 6, one after the other, about the center of the image."""

    def rotation(angle: float) -> np.ndarray:
        c, s = math.cos(angle), math.sin(angle)
        return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])

    stretch = np.diag([2 ** (0.2 * a[5]), 2 ** (-0.2 * a[5]), 1])
    shift = np.array([[1, 0, width * a[6] / 8], [0, 1, height * a[7] / 8], [0, 0, 1]])
    total = np.diag([1 - 2 * a[0], 1 - 2 * a[1], 1])
    total = np.diag([2 ** (0.2 * a[2])] * 2 + [1]) @ total
    total = rotation(-a[3]) @ total
    total = rotation(a[4]) @ stretch @ rotation(-a[4]) @ total
    return shift @ total


def test_edm_warp_is_the_affine_map_of_its_parameters():
    """On a smooth pattern that is known everywhere, evaluated at the inverse of the map."""
    height, width = 40, 56
    right, down = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)

    def pattern(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return 0.4 * np.cos(0.25 * u + 0.4) * np.sin(0.2 * v + 0.3) + 0.01 * u - 0.005 * v

    a = parameters(48)
    out = apply_edm(torch.from_numpy(pattern(right, down)).expand(48, 1, -1, -1), a.double())
    inside = 0
    for image, each in zip(out[:, 0].numpy(), a.double().numpy(), strict=True):
        u, v, _ = np.linalg.inv(matrix(each, width, height)) @ np.stack([right, down, np.ones_like(right)]).reshape(
            3, -1
        )
        known = (np.abs(u) < width / 2 - 4) & (np.abs(v) < height / 2 - 4)
        assert np.abs(image.ravel() - pattern(u, v))[known].max() < 0.02
        inside += known.sum()
    assert inside > 48 * height * width / 4


def test_edm_labels_determine_the_map():
    """Except that stretching and squeezing along opposite directions have one label, as in the paper."""
    a = parameters(32).double()
    a[:, 5].abs_()
    labels = edm_labels(a).numpy()
    for label, each in zip(labels, a.numpy(), strict=True):
        turn, axis = math.atan2(label[4], label[3] + 1), math.atan2(label[6], label[5])
        again = [label[0], label[1], label[2], turn, axis, math.hypot(label[5], label[6]), label[7], label[8]]
        np.testing.assert_allclose(matrix(np.array(again), 32, 24), matrix(each, 32, 24), atol=1e-9)


def test_edm_warp_reflects_at_the_edges():
    """A translation by a half of the width shows the mirror image beyond the edge; constants stay constant."""
    x = torch.linspace(-0.9, 0.9, 32).expand(1, 1, 32, 32)
    a = torch.zeros(1, 8)
    a[0, 6] = 4.0
    out = apply_edm(x, a)
    expected = torch.cat([x[..., :16].flip(-1), x[..., :16]], dim=-1)
    assert_close(out[..., 2:-2], expected[..., 2:-2], rtol=0, atol=0.04)
    constant = torch.full((16, 2, 8, 8), 0.3)
    assert_close(apply_edm(constant, parameters(16)), constant)


def test_data_module_gives_labels_in_training_only():
    x = (127.5 * (noise(64, 3, 8, 8) + 1)).round().to(torch.uint8)
    data = module(x, edm_augment=0.12, seed=5)
    batch = data.on_after_batch_transfer({"x": x, "start": 0, "total": 64}, 0)
    expected, labels = EdmAugmentation(0.12)(data.preprocess(x), rng(64))
    assert torch.equal(batch["x"], expected) and torch.equal(batch["augment"], labels)
    data.trainer.training = False
    batch = data.on_after_batch_transfer({"x": x, "start": 0, "total": 64}, 0)
    assert torch.equal(batch["x"], data.preprocess(x)) and "augment" not in batch
    assert "augment" not in module(x, flip=True).on_after_batch_transfer({"x": x, "start": 0, "total": 64}, 0)


@pytest.mark.parametrize("edm_augment", [-0.1, 1.5])
def test_invalid_edm_augment_raises(edm_augment):
    with pytest.raises(ValueError, match=rf"data\.edm_augment={edm_augment}"):
        module(noise(4, 1, 4, 4), edm_augment=edm_augment)


def ramps(root: Path, sizes: list[tuple[int, int]]) -> None:
    """Write gray images of sizes (W, H) whose value is 100 k + x + y at column x and row y of image k."""
    root.mkdir()
    for k, (width, height) in enumerate(sizes):
        ramp = (100 * k + np.arange(width) + np.arange(height)[:, None]).astype(np.uint8)
        Image.fromarray(ramp).save(root / f"{k}.png")


def open_crops(root: Path, cache: bool, **options):
    from src.data.folder import folder

    cache_dir = str(root.with_name("cache"))
    return folder(str(root), [8, 8], 1, fit="random_crop", cache=cache, cache_dir=cache_dir, **options)


@pytest.mark.parametrize("cache", [True, False])
def test_random_crops_are_parts_of_the_image(tmp_path, cache):
    """Of an image whose shorter side has the wanted size, at every place alike."""
    ramps(tmp_path / "in", [(8, 8), (12, 8), (8, 28)])
    source = open_crops(tmp_path / "in", cache)
    corner = np.arange(8) + np.arange(8)[:, None]
    keys = [key(0, k) for k in range(3000 if cache else 100)]
    starts = []
    for index, count in ((0, 1), (1, 5), (2, 21)):
        crops = source.fetch_training([index] * len(keys), keys)[:, 0].numpy()
        start = crops[:, 0, 0] - 100 * index
        assert (crops == 100 * index + start[:, None, None] + corner).all()
        assert all(is_share(torch.from_numpy(start == k), 1 / count) for k in range(count) if count > 1)
        assert start.max() == count - 1
        starts.append(start)
    assert np.array_equal(source.fetch_training([2] * len(keys), keys)[:, 0, 0, 0], starts[2] + 200)
    assert source.fetch([0, 1, 2])[:, 0, 0, 0].tolist() == [0, 102, 210]  # centered


def test_cached_random_crops_match_decoding(tmp_path):
    """Of images of 16 bits that are resized."""
    (tmp_path / "in").mkdir()
    generator = np.random.default_rng(0)
    for k, (width, height) in enumerate([(31, 17), (16, 40), (9, 9), (8, 11)]):
        pixels = generator.integers(0, 65536, (height, width), dtype=np.uint16)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{k}.png")
    stored = open_crops(tmp_path / "in", True)
    direct = open_crops(tmp_path / "in", False, value_range=[0, 65535])
    assert stored.store is not None and direct.store is None
    keys = [key(1, k) for k in range(4)]
    for a, b in ((s.fetch_training(range(4), keys), s.fetch(range(4))) for s in (stored, direct)):
        assert a.dtype == torch.float32 and a.shape == b.shape == (4, 1, 8, 8)
    assert torch.equal(stored.fetch_training(range(4), keys), direct.fetch_training(range(4), keys))
    assert torch.equal(stored.fetch(range(4)), direct.fetch(range(4)))
    assert torch.equal(open_crops(tmp_path / "in", True).fetch(range(4)), stored.fetch(range(4)))


def test_many_random_crops_are_decoded_in_processes(tmp_path, monkeypatch):
    from src.data import pixel_store

    ramps(tmp_path / "in", [(8 + k, 8) for k in range(20)])
    (tmp_path / "in" / "7.png").write_bytes(b"damaged")
    monkeypatch.setattr(pixel_store, "MIN_PARALLEL", 10)
    monkeypatch.setattr(pixel_store, "CHUNK", 3)
    with pytest.warns(UserWarning, match="cannot be read"):
        source = open_crops(tmp_path / "in", True, skip_unreadable=True)
    assert len(source) == 19
    for row, name in enumerate(source.found.names):
        k = int(name.removesuffix(".png"))
        assert source.fetch([row])[0, 0, 0, 0] == (100 * k + k // 2) % 256


def test_crops_depend_on_step_and_position_only(tmp_path):
    """Parts of a batch, of any size, are cropped like the global batch; validation is centered."""
    ramps(tmp_path / "in", [(60, 8)] * 40)
    source = open_crops(tmp_path / "in", True)

    def batch(start: int, stop: int, step: int, seed: int = 0) -> Tensor:
        return fetch_batch(source, BatchIndices(start, 40, list(range(start, stop)), step), seed, None)[0]

    whole = batch(0, 40, 3)
    assert torch.equal(torch.cat([batch(0, 7, 3), batch(7, 40, 3)]), whole)
    assert not torch.equal(batch(0, 40, 4), whole) and not torch.equal(batch(0, 40, 3, seed=1), whole)
    assert torch.equal(batch(0, 40, VALIDATION), source.fetch(range(40)))


def photos(root: Path, sizes: list[tuple[int, int]]) -> None:
    """Write gray images of sizes (W, H) and of one value, 10 k, each."""
    root.mkdir()
    for k, size in enumerate(sizes):
        Image.new("L", size, 10 * k).save(root / f"{k:02}.png")


def open_buckets(root: Path, **options):
    from src.data.folder import folder

    return folder(str(root), 64, 1, fit="buckets", cache_dir=str(root.with_name("cache")), **options)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (64, 96), (256, 256), (512, 512)])
def test_buckets_have_about_the_area_of_the_size(size):
    sizes, area = bucket_sizes(size), size[0] * size[1]
    assert size in sizes and len({*sizes}) == len(sizes) > 2
    for height, width in sizes:
        assert 0.75 * area < height * width <= area and 0.5 <= height / width <= 2
        assert height % 8 == width % 8 == 0
        assert (width, height) in sizes or (height, width) == size
    assert len(sizes) < 16  # a compiled network has one version for each


def test_images_go_to_the_bucket_of_their_aspect_ratio(tmp_path):
    photos(tmp_path / "in", [(640, 640), (160, 96), (500, 300), (72, 56), (56, 70), (100, 300)])
    source = open_buckets(tmp_path / "in")
    shapes = [(64, 64), (48, 80), (48, 80), (56, 72), (72, 56), (80, 48)]
    for k, shape in enumerate(shapes):
        (image,) = source.fetch_training([k], [0])
        assert image.shape == (1, *shape) and (image == 10 * k).all()
    assert source.buckets[1] == source.buckets[2] and len(source.buckets.unique()) == 5
    assert source.fetch(range(6)).shape == (6, 1, 64, 64)
    with pytest.raises(ValueError, match=r"data\.cache=true"):
        open_buckets(tmp_path / "in", cache=False)


def test_batches_have_one_bucket_and_all_samples_alike():
    """Over many epochs, each sample is as frequent as any other, also those of small buckets."""
    buckets = torch.tensor([0] * 50 + [2] * 27 + [5] * 3)
    indices = torch.arange(100, 180)
    one = InfiniteBatchSampler(indices, 8, 4000, seed=0, buckets=buckets)
    drawn = torch.tensor([one.batch(step) for step in range(4000)])
    assert (buckets[drawn - 100] == buckets[drawn - 100][:, :1]).all()
    counts = torch.bincount(drawn.flatten() - 100, minlength=80).double()
    shares = torch.stack([counts[buckets == k].mean() for k in (0, 2, 5)])
    assert_close(shares, torch.full((3,), 400.0).double(), rtol=0.1, atol=0)
    assert one.batch(17) == InfiniteBatchSampler(indices, 8, 20, seed=0, buckets=buckets).batch(17)
    parts = [InfiniteBatchSampler(indices, 8, 3, 0, 2, rank, 2, buckets=buckets) for rank in (0, 1)]
    micro = [batch for pair in zip(*parts, strict=True) for batch in pair]
    assert [i for batch in micro for i in batch.indices] == [i for step in range(3) for i in one.batch(step)]


@pytest.mark.filterwarnings("ignore")
def test_training_gets_batches_of_one_bucket(tmp_path):
    photos(tmp_path / "in", [(64, 64)] * 12 + [(160, 96)] * 12)
    data = ImageDataModule(
        lambda root, *_, prepare=False: open_buckets(Path(root)), str(tmp_path / "in"), 1, 64, batch_size=4,
        vertical_flip=True, edm_augment=0.5,
    )  # fmt: skip
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=CPU), training=True, global_step=0, max_steps=12, world_size=1,
        accumulate_grad_batches=1, global_rank=0,
    )  # fmt: skip
    data.setup()
    shapes = {tuple(data.on_after_batch_transfer(batch, 0)["x"].shape) for batch in data.train_dataloader()}
    assert shapes == {(4, 1, 64, 64), (4, 1, 48, 80)}
    assert {tuple(batch["x"].shape[1:]) for batch in data.val_dataloader()} == {(1, 64, 64)}
    data.rotations, data.source = True, None
    with pytest.raises(ValueError, match=r"data\.rotations=true"):
        data.setup()


def built(labels: int, *overrides: str):
    """Return a tiny model, from the same random numbers with any number of labels."""
    from src.runs.components import build_condition, build_module

    cfg = compose("train", "run_dir=x", "model.model_channels=8", "model.num_head_channels=8", *overrides)
    torch.manual_seed(0)
    made = build_module(cfg, (1, 8, 8), 17, build_condition(cfg), labels)
    torch.manual_seed(1)
    for name, weight in made.net.named_parameters():
        if weight.ndim > 1 and not weight.any() and "augment" not in name:
            torch.nn.init.normal_(weight, std=0.1)  # else no block uses the time embedding
    return made


@pytest.mark.parametrize("overrides", [[], ["conditioning=class", "conditioning.encode.names=[a,b]"]])
def test_labels_of_zero_give_the_plain_network(overrides):
    plain, labeled = built(0, *overrides), built(EDM_LABELS, *overrides)
    assert set(labeled.state_dict()) - set(plain.state_dict()) == {"net.augment.weight"}
    assert not labeled.net.augment.weight.any()
    torch.nn.init.normal_(labeled.net.augment.weight)
    x, t = noise(4, 1, 8, 8), plain.schedule.level_at(torch.linspace(0.1, 0.9, 4), torch.zeros(4, 1, 8, 8))
    labels = edm_labels(parameters(4))
    with torch.no_grad():
        expected = plain.denoise(x, t)
        assert torch.equal(labeled.denoise(x, t), expected)
        assert torch.equal(labeled.denoise(x, t, augment=torch.zeros(4, EDM_LABELS)), expected)
        assert not torch.equal(labeled.denoise(x, t, augment=labels), expected)
    (*_, drawn), (*_, same) = (m.sample(range(2), seed=0) for m in (plain, labeled))
    assert torch.equal(drawn, same)


def test_networks_draw_images_of_a_bucket():
    made = built(EDM_LABELS)
    images = SimpleNamespace(shape=(1, 8, 8))
    opened = SimpleNamespace(module=made, data=SimpleNamespace(shape=images.shape, displayed=images))
    for image_size, shape in ((None, (1, 8, 8)), (16, (1, 16, 16)), ([8, 16], (1, 8, 16))):
        resize_samples(opened, image_size)
        (*_, drawn) = made.sample(range(2), seed=0)
        assert drawn.shape == (2, *shape) and drawn.isfinite().all()
    for wrong in (0, [8], [8, 0]):
        with pytest.raises(ValueError, match=r"image_size="):
            resize_samples(opened, wrong)
    for trained, image_size, shape in (
        ((2, 8), 5, (2, 5)),
        ((2, 8), [7], (2, 7)),
        ((1, 4, 4, 4), [2, 3, 5], (1, 2, 3, 5)),
    ):
        made.shape = opened.data.shape = images.shape = trained
        resize_samples(opened, image_size)
        assert made.shape == shape
    made.shape = (2,)
    with pytest.raises(ValueError, match=r"image_size=16"):
        resize_samples(opened, 16)


def test_labels_train_their_own_weights():
    labeled = built(EDM_LABELS)
    batch = {"x": noise(8, 1, 8, 8), "start": 0, "total": 8, "augment": edm_labels(parameters(8))}
    labeled.training_step(batch, 0)["loss"].backward()
    assert labeled.net.augment.weight.grad.abs().sum() > 0
    plain = built(0)
    del batch["augment"]
    losses = [m.training_step(batch, 0)["loss"] for m in (plain, labeled)]
    assert torch.equal(*losses)


def test_network_without_labels_is_refused():
    from src.runs.components import build_module

    cfg = compose("train", "run_dir=x", "data.edm_augment=0.12")
    cfg.model = {"_target_": "torch.nn.Identity"}
    with pytest.raises(ValueError, match=r"data\.edm_augment=0\.12"):
        build_module(cfg, (1, 8, 8), 17, None, EDM_LABELS)


def test_captions_with_sides_warn_about_flips():
    x = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    condition = SimpleNamespace(check=lambda source: None)
    texts = [["a dog above a cat"], ["a dog left of a cat"]] * 32

    def start(captions, **settings):
        data = module(x, condition, captions, **settings)
        data.setup("fit")

    with pytest.warns(UserWarning, match=r"data\.flip=true .* 32 of 64 .* 'a dog left of a cat'"):
        start(texts, flip=True)
    with pytest.warns(UserWarning, match=r"data\.vertical_flip=true .* 64 of 64"):
        start(texts, vertical_flip=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(texts)
        start([["a dog above a cat"]] * 64, flip=True)
        start(texts, edm_augment=0.12)
