"""Suggest settings for a dataset, and measure the cost of a training step."""

import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig

from src.data.decode import decode
from src.data.decoded import Decoded
from src.errors import format_override

NUM_PROBED = 200
"""Number of files to decode unchanged, to find their channels and sizes."""
SIZES = (8, 16, 32, 64, 128, 256)


class FileStats(NamedTuple):
    """Statistics of the files of a dataset.

    `channels` is the most frequent number of channels, alpha included. `alpha` means that the last channel must be
    kept, `gray` that color files hold gray images. `side` is the median length of the shorter side in pixels.
    """

    channels: int
    alpha: bool
    gray: bool
    side: int

    @property
    def suggested_channels(self) -> int:
        """Return `data.channels`: with alpha if it is used, and 1 for gray images in color files."""
        if self.alpha:
            return self.channels
        return 1 if self.gray or self.channels == 2 else 3 if self.channels == 4 else self.channels

    def suggested_size(self, on_gpu: bool) -> int:
        """Return `data.image_size`: at most 32 on a CPU and 256 on a GPU, and not larger than the files."""
        return max([size for size in SIZES if size <= min(self.side, 256 if on_gpu else 32)], default=SIZES[0])


def file_stats(decoded: Sequence[Decoded]) -> FileStats:
    """Return statistics of decoded images."""
    ((channels, alpha), _), *_ = Counter((each.pixels.shape[-1], each.alpha) for each in decoded).most_common()
    used = any(each.alpha and np.ptp(each.pixels[..., -1]) > 0 for each in decoded)
    colors = [each.pixels[..., :3].astype(np.float64) for each in decoded if each.is_rgb]
    gray = channels - alpha == 3 and bool(colors) and all(np.ptp(each, axis=-1).max() == 0 for each in colors)
    bands = channels in (2, 4) and not alpha  # the last band of such files is not alpha
    return FileStats(channels, used or bands, gray, int(np.median([min(each.size) for each in decoded])))


def probe(data: DictConfig, on_gpu: bool) -> dict[str, int]:
    """Return settings that suit evenly spaced files, decoded unchanged. Raises ValueError if none can be read."""
    from src.data.folder import find

    root = data.root if isinstance(data.root, str) else list(data.root)
    source = data.source
    settings = {
        name: source.get(name) for name in ("pages", "channel_pattern", "channel_names", "masks") if name in source
    }
    files = find(root, data.get("val_root"), **settings)
    decode_image = getattr(files, "decode", None)  # for files that do not hold exactly one image
    decoded: list[Any] = []
    for k in range(0, len(files), -(-len(files) // NUM_PROBED)):
        try:
            if decode_image is not None:
                decoded.append(decode_image(k, source.pages))
            else:
                with files.open(k) as stream:
                    decoded.append(decode(stream))
        except Exception:  # decoders raise almost anything; reading all files reports the reason
            continue
    if not decoded:
        raise ValueError(f"{format_override('data.root', root)} has no image that can be read; set another folder")
    stats = file_stats(decoded)
    return {"data.channels": stats.suggested_channels, "data.image_size": stats.suggested_size(on_gpu)}


def suggest(size: Sequence[int], num_train: int, on_gpu: bool, from_files: bool = True) -> list[str]:
    """Return overrides of `src.train` by rules of thumb, for images (H, W), signals (L,) and volumes; () is for rows.

    `from_files` tells that the data are a folder of images, for which there are recipes.
    """
    longest = max(size, default=0)
    batch = 64 if size else 512
    while batch > 4 and batch > num_train // 4:
        batch //= 2
    batch = max(1, min(batch, num_train))
    if not size:
        return [f"data.batch_size={batch}"]
    recipe = f"experiment=folder_{64 if longest == 64 else 256}" if from_files and on_gpu and longest >= 64 else None
    small = "model=unet_small" if on_gpu else "model=unet_patched" if longest >= 32 else "model=unet_tiny"
    return [
        recipe or small,
        # The attention of these networks is at feature maps that they do not have at these sizes.
        *(["model.attention_resolutions=[8]"] if longest == (8 if on_gpu else 16) else []),
        f"data.batch_size={batch}",
        *([f"snr_shift={64 / longest:g}"] if len(size) == 2 and longest > 64 else []),
        *(["model.dropout=0.2"] if num_train < 1000 else []),
    ]


def suggest_steps(num_train: int, on_gpu: bool, seconds: float = 0.0) -> int:
    """Return `trainer.max_steps`: about 100 epochs within limits; on a CPU at most an hour of steps of `seconds`."""
    steps = min(200_000 if on_gpu else 10_000, max(2000, 100 * num_train // 64))
    if seconds and not on_gpu:
        steps = min(steps, max(500, int(3600 / seconds)))
    return int(round(steps, -2))


def expectation(num_train: int, flipped: bool) -> str:
    """Return the usual outcome of training on a number of images, and advice; `flipped` if they are flipped already."""
    flips = "" if flipped else "flips (data.flip=true)"
    if num_train < 100:
        return (
            "fewer than 100 images: expect copies of them (look at neighbors.png); add images"
            f"{flips and f', {flips}'} or start from a trained model"
        )
    if num_train < 1000:
        return (
            "fewer than 1,000 images: expect near copies (look at neighbors.png); more images help most, then "
            f"{flips and f'{flips}, '}dropout and fewer steps"
        )
    if num_train < 10_000:
        return "a few thousand images: expect good samples of a narrow subject, and copies of rare images"
    return "enough images for varied samples; quality grows with the network and the number of steps"


def measure_step(overrides: Sequence[str], run_dir: str, count: int) -> tuple[float, int]:
    """Train `count` timed steps with these overrides of `src.train`, without saving; return the cost of one step.

    It consists of seconds, and the peak memory of the device or the process in bytes. The first two steps are slower
    and not counted. With `count` 0 it only calls the network for one sample. Raises ValueError for invalid settings.
    """
    import resource

    import hydra
    import lightning as L
    import torch

    from src.runs.build import build
    from src.runs.fit import load_data
    from src.runs.trainer import quiet_libraries
    from src.training.module import DiffusionModule

    quiet_libraries()
    quiet = ["callbacks=none", "logger=none", "trainer.enable_checkpointing=false", "trainer.limit_val_batches=0"]
    cfg = hydra.compose("train", [*overrides, *quiet, f"trainer.max_steps={count + 2}", f"run_dir='{run_dir}'"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"trainer\.limit_val_batches=0 ")  # set here, not by the user
        run = build(cfg)
    if count == 0:
        module = run.module.eval()
        assert isinstance(module, DiffusionModule)  # src.doctor has no task
        with torch.no_grad():
            module.denoise(torch.zeros(1, *module.shape), module.schedule.row(0))
        return 0.0, 0
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
    if run.trainer.strategy.root_device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
