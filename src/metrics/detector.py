"""Which objects images show, and where: a small network that is trained on images which are made as it learns."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.cache import Tensors, cached, digest
from src.metrics.features import check_images

SIDE, CELLS = 32, 16
"""Pixels of an image as the network sees it, and cells in which it looks for the middles of objects."""
APART = 2
"""Cells around an object's middle, to each side, in which no other object has its own."""
SURE = 0.4
"""Of an object from here on; in training its middle has 1, the nearest cell's middle at least 0.78."""
WARMUP = 50
"""Steps over which the learning rate rises."""
Progress = Callable[[Iterable[int]], Iterable[int]]
"""Passes its argument on, and shows how far it has come."""


class Pictures(NamedTuple):
    """B images with what they show; each question has its answers by number."""

    images: Tensor
    """(B, 3, H, W) uint8."""
    middles: Tensor
    """(B, K, 2): x and y of up to K objects, in shares of the side, y downwards; NaN for none."""
    looks: Tensor
    """(B, K, Q) int64: the answers to Q questions about each object."""
    ground: Tensor
    """(B,) int64: the answer to one question about all of the image."""


class Seen(NamedTuple):
    """What the judge sees in one image."""

    middles: list[tuple[float, float]]
    """x and y of each object, in shares of the side, y downwards."""
    looks: list[tuple[int, ...]]
    """The answers about each object."""
    ground: int


class Net(nn.Module):
    """uint8 images (N, 3, H, W) -> for each of `CELLS` x `CELLS` cells the logits of an object and of its looks.

    Whatever their size, images are seen at 32x32.
    """

    def __init__(self, looks: Sequence[int], grounds: int, width: int = 16) -> None:
        super().__init__()
        self.looks = list(looks)
        layers: list[nn.Module] = []
        # To 32, 16, 8 and 8 pixels a side: a cell of the last sees 20 pixels.
        for before, after, size, stride in ((0, 1, 3, 1), (1, 2, 4, 2), (2, 4, 4, 2), (4, 4, 3, 1)):
            convolution = nn.Conv2d(before * width or 3, after * width, size, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after * width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.objects = nn.Sequential(nn.Conv2d(4 * width, 4 * (1 + sum(looks)), 1), nn.PixelShuffle(2))
        self.ground = nn.Conv2d(4 * width, grounds, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Logits of an object (N, G, G), of each question's answers (N, A, G, G), and of the ground (N, A)."""
        x = images.float() / 127.5 - 1
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        hidden = self.body(x)
        there, *looks = self.objects(hidden).split([1, *self.looks], dim=1)
        return there.squeeze(1), looks, self.ground(hidden).mean((2, 3))


class Detector:
    """Says of images which objects they show, and where."""

    def __init__(self, net: Net) -> None:
        self.net = net.eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Seen]:
        """Of images (N, 3, H, W) uint8."""
        device = self.net.ground.weight.device
        return [seen for part in torch.split(check_images(images), 256) for seen in self._seen(part.to(device))]

    def _seen(self, images: Tensor) -> list[Seen]:
        there, looks, ground = self.net(images)
        highest = F.max_pool2d(there, 2 * APART + 1, stride=1, padding=APART)
        found = ((there == highest) & (there.sigmoid() > SURE)).nonzero()  # (M, 3): image, row, column
        numbers, rows, columns = found.unbind(1)
        answers = torch.stack([logits[numbers, :, rows, columns].argmax(1) for logits in looks], dim=1)
        result = [Seen([], [], number) for number in ground.argmax(1).tolist()]
        for (number, row, column), answer in zip(found.tolist(), answers.tolist(), strict=True):
            result[number].middles.append(((column + 0.5) / CELLS, (row + 0.5) / CELLS))
            result[number].looks.append(tuple(answer))
        return result


def train_detector(
    made: Callable[[int], Pictures],
    looks: Sequence[int],
    grounds: int,
    steps: int,
    cache: Path,
    progress: Progress,
    lr: float = 6e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Detector:
    """Train on what is `made` for steps 0..steps - 1, or read what such a training gave from `cache`.

    `looks` is how many answers there are to each question about objects, `grounds` to that about the whole. AdamW with
    a learning rate that rises, and then falls linearly to 0. What is made for step 0 stands in the cache's key for all
    of it, so that a change of what makes it trains another judge. `progress` shows how far it has come. Raises
    ValueError for no steps.
    """
    if steps < 1:
        raise ValueError(f"a judge needs at least 1 step of training, got {steps}: raise alignment.detector_steps")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = Net(looks, grounds)
    key = digest(str(net), steps, lr, seed, *made(0))

    def compute() -> Tensors:
        fit(net.to(device), made, steps, progress, lr)
        return net.state_dict()

    net.load_state_dict(cached(cache, f"judge-{key}", compute))
    return Detector(net.to(device))


def fit(net: Net, made: Callable[[int], Pictures], steps: int, progress: Progress, lr: float) -> None:
    """Train `net` by cross-entropy: of the cells that have an object, of its looks there, and of the ground."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 - step / steps))
    device = net.ground.weight.device
    for step in progress(range(steps)):
        pictures = Pictures(*(part.to(device) for part in made(step)))
        optimizer.zero_grad()
        loss_of(net, pictures).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rate.step()


def loss_of(net: Net, pictures: Pictures) -> Tensor:
    """() the sum of all cross-entropies: of where objects are, of their looks, and of the background.

    A cell at a distance of d cells from the middle of an object has it by exp(-d^2 / 2), whose own entropy is large: at
    full weight it drowns what is to be learned of shapes.
    """
    there, looks, ground = net(pictures.images)
    cells = (torch.arange(CELLS, device=there.device) + 0.5) / CELLS
    x, y = (cells - pictures.middles[..., axis, None] for axis in (0, 1))  # (B, K, G)
    far = CELLS**2 * (x[:, :, None, :].square() + y[:, :, :, None].square())  # (B, K, G, G)
    near, which = torch.exp(-far / 2).nan_to_num(0).max(1)  # (B, G, G): of the nearest object
    objects = pictures.middles[..., 0].isfinite().sum()
    loss = F.binary_cross_entropy_with_logits(there, near, reduction="sum") / (20 * objects)
    loss = loss + F.cross_entropy(ground, pictures.ground)
    image, row, column = (near > SURE).nonzero(as_tuple=True)
    answers = pictures.looks[image, which[image, row, column]]
    for logits, answer in zip(looks, answers.T, strict=True):
        loss = loss + F.cross_entropy(logits[image, :, row, column], answer)
    return loss
