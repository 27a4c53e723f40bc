"""Latents as data: the cache, draws from the posterior, scaling, decoding and refused settings."""

import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from src.data.arrays import ArrayDataModule, Arrays
from src.data.images import ImageDataModule, digits
from src.data.latent_source import CachedLatents
from src.data.latents import LatentDataModule
from src.errors import UsageError
from src.models.autoencoder import KLAutoencoder


class Counting(KLAutoencoder):
    """Counts the images that it encodes."""

    encoded = 0

    def encode(self, x):
        self.encoded += len(x)
        return super().encode(x)


class Deterministic(Counting):
    def encode(self, x):
        mean, std = super().encode(x)
        return mean, torch.zeros_like(std)


def autoencoder(kind=Counting, seed=0, channels=1, size=8):
    torch.manual_seed(seed)
    return kind(channels, size, latent_channels=2, model_channels=4, channel_mult=(1, 1), num_res_blocks=1).eval()


def few_digits(*args, **kwargs):
    source = digits(*args, **kwargs)
    source.samples, source.labels = source.samples[:40], source.labels._replace(targets=source.labels.targets[:40])
    return source


def latents(folder, net=None, settings=None, fingerprint="a", flip=False, images=None, **arguments):
    base = {"num_values": 17, "batch_size": 4, "val_fraction": 0.2, "flip": flip}
    images = ImageDataModule(few_digits, None, 1, 8, **base, **images or {})
    net = net or autoencoder()
    return LatentDataModule(
        images, net, fingerprint, settings or {}, cache_dir=str(folder), device=torch.device("cpu"), **arguments
    )


def prepared(*args, **kwargs):
    data = latents(*args, **kwargs)
    data.prepare_data()
    data.setup()
    data.measure()
    return data


def posterior(data, indices):
    """Return mean and standard deviation of images of the source, by one call of the network."""
    with torch.no_grad():
        return data.autoencoder.encode(data.images.preprocess(data.images.source.fetch(indices)))


def test_cached_latents_are_those_of_the_images(tmp_path):
    data = prepared(tmp_path)
    mean, std = posterior(data, [0, 7, 39])
    assert_close(data.source.read([0, 7, 39], [0, 0, 0]), torch.stack([mean, std], 1), rtol=0, atol=1e-6)
    assert data.shape == mean.shape[1:] == (2, 4, 4) and data.num_values is None


def test_scaling_standardizes_training_latents(tmp_path):
    data = prepared(tmp_path)
    mean, std = posterior(data, data.train_indices)
    variance = mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))
    assert_close(torch.tensor(data.shift), mean.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert_close(torch.tensor(data.scale), 1 / variance.sqrt(), rtol=1e-4, atol=1e-5)
    drawn = [
        data.source.fetch_training(data.train_indices, [100 * k + i for i in data.train_indices]) for k in range(50)
    ]
    x = data.preprocess(torch.cat(drawn))
    assert_close(x.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=0.02)
    assert_close(x.std((0, 2, 3)), torch.ones(2), rtol=0, atol=0.02)


def test_training_draws_anew_and_validation_does_not(tmp_path):
    source = prepared(tmp_path).source
    assert torch.equal(source.fetch([3, 5]), torch.cat([source.fetch([3]), source.fetch([5])]))
    first, second, again = (source.fetch_training([3, 5], keys) for keys in ([8, 9], [10, 11], [8, 9]))
    assert torch.equal(first, again) and not torch.isclose(first, second).any()


def test_half_of_the_training_images_are_mirrored(tmp_path):
    data = prepared(tmp_path, autoencoder(Deterministic), flip=True)
    images = data.images.preprocess(data.images.source.fetch([0, 1]))
    images[1] = images[1].flip(-1)
    with torch.no_grad():
        expected = data.autoencoder.encode(images)[0]
    assert_close(data.source.fetch_training([0, 1], [2, 3]), expected, rtol=0, atol=1e-6)


def loaders_of(data, steps):
    """Return the loaders of training, in `steps` steps, and of validation; their batches are as on the device."""
    device = {"strategy": SimpleNamespace(root_device=torch.device("cpu")), "global_rank": 0, "world_size": 1}
    counts = {"max_steps": steps, "global_step": 0, "accumulate_grad_batches": 1}
    data.trainer = SimpleNamespace(training=True, **device, **counts)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        yield (data.on_after_batch_transfer(batch, 0) for batch in loader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_have_the_images_of_their_latents(tmp_path, num_workers):
    images = {"num_workers": num_workers}
    data = prepared(tmp_path, autoencoder(Deterministic), flip=True, images=images, image_steps=range(3))
    train, val = loaders_of(data, steps=4)
    *aligned, last = train
    assert not any("images" in batch for batch in (last, *val))
    originals, mirrored = data.images.preprocess(data.images.source.samples), 0
    for batch in aligned:
        with torch.no_grad():
            expected = data.preprocess(data.autoencoder.encode(batch["images"])[0])
        assert_close(batch["x"], expected, rtol=0, atol=1e-5)
        mirrored += sum(not (image == originals).flatten(1).all(1).any() for image in batch["images"])
    assert 0 < mirrored < 12


def test_deterministic_autoencoder_stores_no_std(tmp_path):
    data = prepared(tmp_path, autoencoder(Deterministic), dtype="float16")
    (file,) = tmp_path.glob("*/latents.npy")
    assert file.stat().st_size < 40 * 32 * 2 + 200
    assert_close(data.source.fetch([4]), posterior(data, [4])[0], rtol=1e-3, atol=1e-3)


def test_cache_is_encoded_once_per_autoencoder(tmp_path):
    net = autoencoder()
    first = prepared(tmp_path, net)
    assert net.encoded == 40 + 1  # the first image shows the size of the file
    second = prepared(tmp_path, net, settings={"batch_size": 9})
    assert net.encoded == 41 and torch.equal(first.source.fetch([1]), second.source.fetch([1]))
    prepared(tmp_path, net, fingerprint="b")
    prepared(tmp_path, net, settings={"source": {"fit": "crop"}})
    assert net.encoded == 3 * 41


def test_value_range_changes_the_latents(tmp_path):
    net = autoencoder()
    for settings in ({}, {"value_range": [0, 20]}):
        data = latents(tmp_path, net, settings, images=settings)
        data.prepare_data()
        data.setup()
        assert_close(data.source.read([3], [0])[:, 0], posterior(data, [3])[0], rtol=0, atol=1e-6)


def test_changed_array_is_encoded_again(tmp_path):
    path, net = tmp_path / "x.npy", autoencoder()
    for k in range(2):
        np.save(path, np.random.default_rng(k).random((40, 1, 8, 8), np.float32))
        os.utime(path, (k, k))
        images = ArrayDataModule(Arrays(), str(path), 1, 8, value_range=[0, 1])
        data = LatentDataModule(images, net, "a", {"root": str(path)}, cache_dir=str(tmp_path / "cache"))
        data.prepare_data()
        data.setup()
        assert_close(data.source.read([3], [0])[:, 0], posterior(data, [3])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [0, 60, 1000])
def test_incomplete_cache_is_encoded_again(tmp_path, length):
    expected = prepared(tmp_path).source.fetch([5])
    (file,) = tmp_path.glob("*/latents.npy")
    file.write_bytes(file.read_bytes()[:length])
    assert torch.equal(prepared(tmp_path).source.fetch([5]), expected)


def test_without_a_cache_only_fetched_images_are_encoded(tmp_path):
    expected = prepared(tmp_path / "cached").source.fetch([2, 30])
    net = autoencoder()
    data = latents(tmp_path / "empty", net, is_cached=False, scale=1.0, shift=0.0)
    data.prepare_data()
    data.setup()
    assert_close(data.source.fetch([2, 30]), expected, rtol=0, atol=1e-6)
    assert net.encoded == 2 and not [*tmp_path.glob("empty/*")]


def test_cached_latents_are_pickled_as_a_path(tmp_path):
    read = prepared(tmp_path).source.read
    assert isinstance(read, CachedLatents) and len(pickle.dumps(read)) < 500
    assert torch.equal(pickle.loads(pickle.dumps(read))([1], [0]), read([1], [0]))


def test_samples_are_decoded_in_parts(tmp_path):
    data = prepared(tmp_path, num_at_once=3)
    z = data.source.fetch([*range(8)])
    with torch.no_grad():
        expected = data.images.postprocess(data.autoencoder.decode(z))
    shown = data.postprocess(data.preprocess(z))
    assert shown.shape == (8, 1, 8, 8) and shown.dtype == torch.uint8
    assert (shown.int() - expected.int()).abs().max() <= 16  # one of 17 values
    assert torch.equal(data.displayed_examples(3), data.images.displayed_examples(3))


@pytest.mark.parametrize(
    ("is_cached", "setting"), [(True, r"type autoencoder\.batch_size=4"), (False, "type batch_size=4")]
)
def test_lack_of_memory_names_the_setting_of_the_command(tmp_path, is_cached, setting):
    class Large(KLAutoencoder):
        def decode(self, z):
            raise torch.OutOfMemoryError

    data = latents(tmp_path, autoencoder(Large), is_cached=is_cached, scale=1.0, shift=0.0)
    with pytest.raises(UsageError, match=setting):
        data.decode(torch.zeros(1, 2, 4, 4))


def test_split_is_that_of_the_images(tmp_path):
    data = prepared(tmp_path)
    plain = data.images
    assert data.train_indices == plain.train_indices and data.val_indices == plain.val_indices
    assert data.source.labels is plain.source.labels and list(data.source.stamps()) == list(plain.source.stamps())


@pytest.mark.parametrize(
    ("arguments", "settings", "named"),
    [
        ({"vertical_flip": True}, {}, "data.vertical_flip"),
        ({"rotations": True}, {}, "data.rotations"),
        ({"edm_augment": 0.1}, {"edm_augment": 0.1}, "data.edm_augment=0.1"),
        ({"color_jitter": {"brightness": 0.1}}, {}, "data.color_jitter.brightness=0"),
        ({}, {"source": {"fit": "random_crop"}}, "data.source.fit=random_crop"),
        ({}, {"source": {"fit": "buckets"}}, "data.source.fit=buckets"),
        ({"channels": 3}, {}, "data.channels=3"),
        ({"image_size": 9}, {}, "data.image_size=8"),
        ({"image_size": [9, 12]}, {}, r"data.image_size=\[8,12\]"),
    ],
)
def test_images_without_latents_are_refused(arguments, settings, named):
    images = ImageDataModule(**{"source": digits, "root": None, "channels": 1, "image_size": 8, **arguments})
    with pytest.raises(ValueError, match=named):
        LatentDataModule(images, autoencoder(), "a", settings)


@pytest.mark.parametrize(
    ("name", "value"), [("scale", [1.0]), ("shift", [0.0] * 3), ("scale", [1.0, 0.0]), ("scale", "large")]
)
def test_scaling_needs_one_number_per_channel(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"autoencoder.{name}"):
        latents(tmp_path, **{name: value})
