"""Suggest settings for a dataset of images, and measure what a training step costs."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from src.data.decode import Decoded

SIZES = (8, 16, 32, 64, 128, 256)


class Found(NamedTuple):
    """What the files of a dataset have in common.

    `channels` is their number, opacity included; `alpha` tells whether the last one must be kept, and `gray` whether
    color files hold gray images. `side` is the median length of the shorter side in pixels.
    """

    channels: int
    alpha: bool
    gray: bool
    side: int

    @property
    def suggested_channels(self) -> int:
        """Return `data.channels`: with opacity if it is used, and 1 for color files of gray images."""
        if self.alpha:
            return self.channels
        return 1 if self.gray or self.channels == 2 else 3 if self.channels == 4 else self.channels

    def suggested_size(self, on_gpu: bool) -> int:
        """Return `data.image_size`: at most 32 on a CPU and 256 on a GPU, and not larger than the files."""
        return max([size for size in SIZES if size <= min(self.side, 256 if on_gpu else 32)], default=SIZES[0])


def look(decoded: Sequence[Decoded]) -> Found:
    """Return what decoded images have in common."""
    ((channels, alpha), _), *_ = Counter((each.pixels.shape[-1], each.alpha) for each in decoded).most_common()
    used = any(each.alpha and np.ptp(each.pixels[..., -1]) > 0 for each in decoded)
    colors = [each.pixels[..., :3].astype(np.float64) for each in decoded if each.is_rgb]
    gray = channels - alpha == 3 and bool(colors) and all(np.ptp(each, axis=-1).max() == 0 for each in colors)
    bands = channels in (2, 4) and not alpha  # the last band of such files is not opacity
    return Found(channels, used or bands, gray, int(np.median([min(each.size) for each in decoded])))


def suggest(found: Found, num_train: int, on_gpu: bool) -> list[str]:
    """Return overrides of `src.train` for a number of training images. These are rules of thumb."""
    size = found.suggested_size(on_gpu)
    recipe = f"experiment=folder_{64 if size == 64 else 256}" if on_gpu and size >= 64 else None
    small = "model=unet_small" if on_gpu else "model=unet_patched" if size >= 32 else "model=unet_tiny"
    batch = 64
    while batch > 4 and batch > num_train // 4:
        batch //= 2
    return [
        recipe or small,
        f"data.image_size={size}",
        f"data.channels={found.suggested_channels}",
        f"data.batch_size={batch}",
        *([f"snr_shift={64 / size:g}"] if size > 64 else []),
        *(["model.dropout=0.2"] if num_train < 1000 else []),
    ]


def suggest_steps(num_train: int, on_gpu: bool, seconds: float = 0.0) -> int:
    """Return `trainer.max_steps`: about 100 epochs within limits; on a CPU at most an hour of steps of `seconds`."""
    steps = min(200_000 if on_gpu else 10_000, max(2000, 100 * num_train // 64))
    if seconds and not on_gpu:
        steps = min(steps, max(500, int(3600 / seconds)))
    return int(round(steps, -2))


def expectation(num_train: int) -> str:
    """Return what a number of training images usually leads to."""
    if num_train < 100:
        return (
            "fewer than 100 images: expect copies of them (look at neighbors.png); add images, flips "
            "(data.flip=true) or start from a trained model"
        )
    if num_train < 1000:
        return (
            "fewer than 1,000 images: expect near copies (look at neighbors.png); more images help most, then flips "
            "(data.flip=true), dropout and fewer steps"
        )
    if num_train < 10_000:
        return "some thousand images: expect good samples of a narrow subject, and copies of rare kinds"
    return "enough images for varied samples; quality grows with the network and the number of steps"


class StepCost(NamedTuple):
    """Seconds of a training step, and the bytes that the device or the process needed at most."""

    seconds: float
    memory: int


def measure_step(overrides: Sequence[str], run_dir: str, count: int) -> StepCost:
    """Train `count` steps with these overrides of `src.train`, without writing, and return the cost of one.

    The first two steps, which are slower, do not count. Raises ValueError for settings that do not work.
    """
    import resource

    import hydra
    import lightning as L
    import torch

    from src.runs.build import build
    from src.runs.fit import load_data

    quiet = ["callbacks=none", "logger=none", "trainer.enable_checkpointing=false", "trainer.limit_val_batches=0"]
    cfg = hydra.compose("train", [*overrides, *quiet, f"trainer.max_steps={count + 2}", f"run_dir='{run_dir}'"])
    run = build(cfg)
    load_data(run)
    times: list[float] = []

    class Clock(L.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            if run.trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    run.trainer.callbacks.append(Clock())  # type: ignore[attr-defined]
    run.trainer.fit(run.module, run.data)
    steps = run.trainer.accumulate_grad_batches
    seconds = float(np.median(np.diff(times[2 * steps - 1 :]))) * steps
    on_gpu = run.trainer.strategy.root_device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return StepCost(seconds, peak)
