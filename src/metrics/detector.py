"""A small network that detects objects and their attributes, trained on images that are rendered on the fly.

The heat map and its peaks follow CenterNet. Source: Zhou et al. 2019 (arXiv 1904.07850).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from src.cache import Tensors, cached, digest

SIDE, CELLS = 32, 16  # side of the network's input in pixels, and of its grid of cells
NEIGHBORHOOD = 2  # cells to each side of an object's center that hold no other center
THRESHOLD = 0.4
"""Smallest score of an object. The training target is 1 at its center, and at least 0.78 in the nearest cell."""
LR, SEED = 6e-3, 0
WARMUP = 50  # steps over which the learning rate rises


class LabeledImages(NamedTuple):
    """B images with the objects that they show; attributes are class indices."""

    images: Tensor  # (B, 3, H, W) uint8
    centers: Tensor  # (B, K, 2): x and y of up to K objects, as fractions of the side, y downward; NaN for absent ones
    attributes: Tensor  # (B, K, Q) int64: Q attributes of each object
    background: Tensor  # (B,) int64: the attribute of the background


class Detections(NamedTuple):
    """The objects detected in one image."""

    centers: list[tuple[float, float]]  # x and y of each object, as fractions of the side, y downward
    attributes: list[tuple[int, ...]]  # attributes of each object
    background: int


class DetectorNet(nn.Module):
    """uint8 images (N, 3, H, W) -> logits of an object and its attributes in `CELLS` x `CELLS` cells.

    Images of any size are resized to 32x32.
    """

    def __init__(self, attributes: Sequence[int], backgrounds: int, width: int = 16) -> None:
        super().__init__()
        self.attributes = list(attributes)
        layers: list[nn.Module] = []
        # Sides of 32, 16, 8 and 8: a cell of the last has a receptive field of 20 pixels.
        for before, after, size, stride in ((0, 1, 3, 1), (1, 2, 4, 2), (2, 4, 4, 2), (4, 4, 3, 1)):
            convolution = nn.Conv2d(before * width or 3, after * width, size, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after * width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.objects = nn.Sequential(nn.Conv2d(4 * width, 4 * (1 + sum(attributes)), 1), nn.PixelShuffle(2))
        self.background = nn.Conv2d(4 * width, backgrounds, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the logits of an object (N, G, G), of each attribute (N, A, G, G), and of the background (N, A)."""
        x = images.float() / 127.5 - 1
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        hidden = self.body(x)
        heatmap, *attributes = self.objects(hidden).split([1, *self.attributes], dim=1)
        return heatmap.squeeze(1), attributes, self.background(hidden).mean((2, 3))

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[Detections]:
        """Detect objects in images (N, 3, H, W) uint8."""
        result: list[Detections] = []
        for part in torch.split(images, 256):
            heatmap, attributes, background = self(part.to(self.background.weight.device))
            highest = F.max_pool2d(heatmap, 2 * NEIGHBORHOOD + 1, stride=1, padding=NEIGHBORHOOD)
            peaks = ((heatmap == highest) & (heatmap.sigmoid() > THRESHOLD)).nonzero()  # (M, 3): image, row, column
            numbers, rows, columns = peaks.unbind(1)
            classes = torch.stack([logits[numbers, :, rows, columns].argmax(1) for logits in attributes], dim=1)
            detections = [Detections([], [], k) for k in background.argmax(1).tolist()]
            for (number, row, column), each in zip(peaks.tolist(), classes.tolist(), strict=True):
                detections[number].centers.append(((column + 0.5) / CELLS, (row + 0.5) / CELLS))
                detections[number].attributes.append(tuple(each))
            result += detections
        return result


def train_detector(
    render_batch: Callable[[int], LabeledImages],
    attributes: Sequence[int],
    backgrounds: int,
    steps: int,
    cache: Path,
    device: torch.device | str = "cpu",
) -> Callable[[Tensor], list[Detections]]:
    """Train a detector on `render_batch(step)` for steps 0..steps - 1, or read it from `cache`.

    `attributes` and `backgrounds` are numbers of classes. The first batch is part of the cache key, so a change of the
    renderer trains another detector. Returns a function of images (N, 3, H, W) uint8.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        net = DetectorNet(attributes, backgrounds)
    key = digest(str(net), steps, LR, SEED, *render_batch(0))

    def compute() -> Tensors:
        fit_detector(net.to(device), render_batch, steps)
        return net.state_dict()

    net.load_state_dict(cached(cache, f"detector-{key}", compute))
    return net.to(device).eval().detect


def fit_detector(net: DetectorNet, render_batch: Callable[[int], LabeledImages], steps: int) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 - step / steps))
    device = net.background.weight.device
    for step in tqdm(range(steps), desc="Detector"):
        batch = LabeledImages(*(part.to(device) for part in render_batch(step)))
        optimizer.zero_grad()
        detection_loss(net, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rate.step()


def detection_loss(net: DetectorNet, batch: LabeledImages) -> Tensor:
    """Return the sum () of the cross-entropies of the heat map, of the attributes, and of the background.

    The target of a cell at a distance of d cells from a center is exp(-d^2 / 2). At full weight these soft targets
    would dominate the gradient of the attributes.
    """
    heatmap, attributes, background = net(batch.images)
    cells = (torch.arange(CELLS, device=heatmap.device) + 0.5) / CELLS
    x, y = (cells - batch.centers[..., axis, None] for axis in (0, 1))  # (B, K, G)
    squared = CELLS**2 * (x[:, :, None, :].square() + y[:, :, :, None].square())  # (B, K, G, G)
    target, nearest = torch.exp(-squared / 2).nan_to_num(0).max(1)  # (B, G, G): of the nearest object
    objects = batch.centers[..., 0].isfinite().sum()
    loss = F.binary_cross_entropy_with_logits(heatmap, target, reduction="sum") / (20 * objects)
    loss = loss + F.cross_entropy(background, batch.background)
    image, row, column = (target > THRESHOLD).nonzero(as_tuple=True)
    classes = batch.attributes[image, nearest[image, row, column]]
    for logits, column_classes in zip(attributes, classes.T, strict=True):
        loss = loss + F.cross_entropy(logits[image, :, row, column], column_classes)
    return loss
