"""What images show, question by question: one network for all, trained on images that are made as it learns."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from src.metrics.cache import Tensors, cached, digest
from src.metrics.classifier import Net
from src.metrics.features import check_images

Made = Callable[[int], tuple[Tensor, Tensor]]
"""The images (B, C, H, W) uint8 of a step, and the answers (B, Q) int64 to each question about them."""
Progress = Callable[[Iterable[int]], Iterable[int]]
"""Passes its argument on, and shows how far it has come."""


class Judge:
    """Answers Q questions about images; to question q there are `counts[q]` answers, by number."""

    def __init__(self, net: Net, counts: Sequence[int]) -> None:
        self.net = net.eval()
        self.counts = list(counts)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) uint8 -> answers (N, Q) int64, on the CPU."""
        device = self.net.head.weight.device
        parts = [self._answers(part.to(device)).cpu() for part in torch.split(check_images(images), 256)]
        return torch.cat(parts)

    def _answers(self, images: Tensor) -> Tensor:
        parts = self.net(images).split(self.counts, dim=1)
        return torch.stack([logits.argmax(1) for logits in parts], dim=1)


def train_judge(
    made: Made,
    counts: Sequence[int],
    steps: int,
    cache: Path,
    progress: Progress,
    lr: float = 2e-3,
    width: int = 32,
    features: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Judge:
    """Train on what is `made` for steps 0..steps - 1, or read what such a training gave from `cache`.

    AdamW with a learning rate that falls linearly to 0. What is made for step 0 stands in the cache for all of it, so
    that a change of what makes it trains another judge. `progress` shows how far it has come. Raises ValueError for no
    steps.
    """
    if steps < 1:
        raise ValueError(f"a judge needs at least 1 step of training, got {steps}: raise alignment.judge_steps")
    images, answers = made(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = Net(images.shape[1], max(images.shape[2:]), sum(counts), width, features)
    key = digest(str(net), repr(list(counts)), steps, lr, seed, images, answers)

    def compute() -> Tensors:
        fit(net.to(device), made, counts, steps, progress, lr)
        return net.state_dict()

    net.load_state_dict(cached(cache, f"judge-{key}", compute))
    return Judge(net.to(device), counts)


def fit(net: Net, made: Made, counts: Sequence[int], steps: int, progress: Progress, lr: float) -> None:
    """Train `net` by the sum over all questions of the cross-entropy."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=steps)
    device = net.head.weight.device
    for step in progress(range(steps)):
        images, answers = (part.to(device) for part in made(step))
        optimizer.zero_grad()
        parts = net(images).split(list(counts), dim=1)
        terms = [F.cross_entropy(logits, answer) for logits, answer in zip(parts, answers.T, strict=True)]
        cast(Tensor, sum(terms)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        falling.step()
