"""Measure how fast an image folder is read, against torchvision's ImageFolder with a DataLoader.

    python -m benchmarks.images FOLDER --size 32 --workers 2 --rounds 3

Both read every image of the folder once per epoch in random order, resize and crop to `size`, and yield float batches.
The rounds alternate. Ours decodes in the first epoch, into a cache that each round empties.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from src.data.batches import BatchDataset, BatchLoader
from src.data.folder import folder
from src.data.samplers import InfiniteBatchSampler
from src.data.sources import normalize


def peer(root: Path, size: int, batch: int, workers: int) -> Iterator[Tensor]:
    """Yield an epoch of batches as torchvision's tutorials load them."""
    steps = [v2.ToImage(), v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)]
    transform = v2.Compose([*steps, v2.Normalize([0.5] * 3, [0.5] * 3)])
    loader = DataLoader(ImageFolder(str(root), transform), batch, shuffle=True, num_workers=workers, drop_last=True)
    for x, _ in loader:
        yield x


def ours(root: Path, size: int, batch: int, workers: int, cache: Path, epoch: int) -> Iterator[Tensor]:
    """Yield an epoch of batches as a run loads them, on the CPU."""
    source = folder(str(root), size, 3, cache_dir=str(cache))
    steps = len(source) // batch
    sampler = InfiniteBatchSampler(range(len(source)), batch, (epoch + 1) * steps, seed=0, first_step=epoch * steps)
    for x in BatchLoader(BatchDataset(source), sampler=sampler, batch_size=None, num_workers=workers):
        yield normalize(x["x"])


def seconds(epoch: Iterator[Tensor]) -> float:
    start = time.perf_counter()
    total = sum(float(x[0, 0, 0, 0]) for x in epoch)
    assert total == total
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"ImageFolder": [], "first epoch": [], "later epoch": [], "later, no workers": []}
    for _ in range(args.rounds):
        cache = Path(tempfile.mkdtemp(prefix="pixels-"))
        common = (args.folder, args.size, args.batch)
        times["ImageFolder"].append(seconds(peer(*common, args.workers)))
        times["first epoch"].append(seconds(ours(*common, args.workers, cache, 0)))
        times["later epoch"].append(seconds(ours(*common, args.workers, cache, 1)))
        times["later, no workers"].append(seconds(ours(*common, 0, cache, 2)))
        shutil.rmtree(cache)
        print({name: round(values[-1], 2) for name, values in times.items()}, flush=True)
    base = times["ImageFolder"]
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(base, values, strict=True))
        print(f"{name:20} {statistics.median(values):8.2f} s   {ratio:6.1f} times as fast as ImageFolder")


if __name__ == "__main__":
    main()
