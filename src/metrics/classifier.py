"""Features without a download: a small classifier, trained once on the labels of the data."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.cache import Tensors, cached, digest
from src.metrics.features import Features

BATCH_SIZE, LR, SEED = 64, 2e-3, 0
"""Settings of the training: AdamW with linear decay to 0."""


class Classifier:
    """Extract a classifier's last hidden layer (N, F) and probabilities (N, K); `accuracy` is on validation images."""

    name = "classifier"

    def __init__(self, net: "ClassifierNet", accuracy: float, fingerprint: str) -> None:
        self.net = net.eval()
        self.accuracy = accuracy
        self.fingerprint = fingerprint

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        hidden = self.net.hidden(images)
        return Features(hidden.double(), self.net.head(hidden).double().softmax(1))


class ClassifierNet(nn.Module):
    """uint8 images (N, C, H, W) of side `size` -> logits (N, K): convolutions down to 4x4, one hidden layer."""

    def __init__(self, channels: int, size: int, classes: int, width: int = 32, features: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        while size > 4:
            layers += [nn.Conv2d(width, min(2 * width, 128), 3, stride=2, padding=1), nn.ReLU()]
            size, width = (size + 1) // 2, min(2 * width, 128)
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.hidden_layer = nn.Linear(16 * width, features)
        self.head = nn.Linear(features, classes)

    def hidden(self, images: Tensor) -> Tensor:
        return F.relu(self.hidden_layer(self.body(images.float() / 127.5 - 1)))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(images))
        return logits


def train_classifier(
    images: Tensor,
    labels: Tensor,
    val: tuple[Tensor, Tensor],
    cache: Path,
    epochs: int = 20,
    device: torch.device | str = "cpu",
) -> Classifier:
    """Train a classifier on images (N, C, H, W) uint8 with labels (N,) in 0..K-1, or read it from `cache`.

    `val` holds the images and labels for `accuracy`.
    Raises ValueError for labels that do not match the images, or for a single class.
    """
    classes = int(labels.max()) + 1 if len(labels) else 0
    if len(labels) != len(images) or classes < 2 or labels.min() < 0:
        raise ValueError(f"features=classifier needs labels of at least 2 classes, got {classes}: use features=pixels")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        net = ClassifierNet(images.shape[1], max(images.shape[2:]), classes)
    fingerprint = digest(str(net), epochs, BATCH_SIZE, LR, SEED, images, labels, *val)

    def compute() -> Tensors:
        fit_classifier(net.to(device), images.to(device), labels.to(device), epochs)
        with torch.no_grad():
            guesses = torch.cat([net(part.to(device)).argmax(1) for part in torch.split(val[0], 1024)])
        return {**net.state_dict(), "accuracy": (guesses.cpu() == val[1].cpu()).double().mean()}

    weights = cached(cache, f"classifier-{fingerprint}", compute)
    accuracy = weights.pop("accuracy").item()
    net.load_state_dict(weights)
    return Classifier(net.to(device), accuracy, fingerprint)


def fit_classifier(net: ClassifierNet, images: Tensor, labels: Tensor, epochs: int) -> None:
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    steps = epochs * -(-len(images) // BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=steps)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(images), generator=generator).to(images.device), BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
