"""Estimate memory and find the largest microbatch that fits."""

import copy
import ctypes
import gc
import logging
import mmap
import sys
from collections.abc import Sequence
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn

from src.data.module import BaseDataModule
from src.errors import is_out_of_memory
from src.training.base import TrainingModule
from src.training.callbacks.ema import EMA
from src.training.callbacks.power_ema import PowerEMA
from src.training.optim import MakeOptimizer, trial_state

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}


def estimate(
    net: nn.Module,
    shape: Sequence[int],
    microbatch_size: int,
    device: torch.device,
    precision: str,
    optimizer: MakeOptimizer | None,
    averages: int = 1,
    shards: int = 1,
    buckets: bool = False,
    null: Tensor | None = None,
) -> int:
    """Estimate the peak bytes of a step on one device by torch's tracker, from one pass with fake tensors.

    `net` is on the meta device and gets `microbatch_size` samples of `shape`, and conditions like `null` (1, ...).
    `precision` is one of Lightning's. Without an optimizer the pass is forward only, as in sampling. `averages` is the
    number of averages of the weights, `buckets` adds DDP's copy of the gradients, and `shards` divides the weights
    (FSDP). Allocations of libraries are not included, and a compiled network counts as uncompiled.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    bits, _, mode = precision.partition("-")
    if mode == "true":
        net.to(DTYPES[bits])
    with FakeTensorMode(), torch.set_grad_enabled(optimizer is not None), MemTracker() as tracker:
        net._apply(  # type: ignore[no-untyped-call]
            lambda p: torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=device)
        )
        for p in net.parameters() if optimizer else ():
            p.grad = torch.empty_like(p)  # gradients live from step to step
        tracker.track_external(net)
        memory_format = torch.channels_last if len(shape) == 3 else torch.contiguous_format
        x = torch.empty(microbatch_size, *shape, device=device, memory_format=memory_format)
        cond = () if null is None else (torch.empty(microbatch_size, *null.shape[1:], device=device, dtype=null.dtype),)
        with torch.autocast(device.type, DTYPES[bits], enabled=mode == "mixed"):
            out = net(x, torch.empty(microbatch_size, device=device), *cond)
        if optimizer is not None:
            out.float().square().mean().backward()
    peak: int = tracker.get_tracker_snapshot("peak")[x.device]["Total"]
    if optimizer is None:
        return peak
    weights, size = sum(p.nbytes for p in net.parameters()), sum(p.numel() for p in net.parameters())
    state = [v for v in trial_state(optimizer, 64).values() if isinstance(v, Tensor) and v.ndim]  # no step counts
    moments = weights * sum(v.nbytes for v in state) // (4 * 64**2)
    lasting = (3 if buckets else 2) * weights + moments + 4 * size * averages
    return peak - 2 * weights + lasting // shards


def count_averages(callbacks: Sequence[L.Callback]) -> int:
    """Return the number of float32 averages of the weights that callbacks keep."""
    return sum(len(c.lengths or ()) if isinstance(c, PowerEMA) else isinstance(c, EMA) for c in callbacks)


def gib(size: float) -> str:
    """Format bytes as GiB with three significant digits."""
    return f"{size / 2**30:.3g}"


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU; None for a CPU."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if device.type == "cpu":
        return None
    total: int = torch.get_device_module(device).mem_get_info(device)[1]
    return total


def divisors(n: int) -> list[int]:
    """Return the divisors of n >= 1, largest first."""
    return [d for d in range(n, 0, -1) if n % d == 0]


class MicrobatchFinder(L.Callback):
    """Find the largest microbatch whose training step fits on every device, and set the accumulation.

    It runs in `setup`: after the processes are connected, before the data loaders exist.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, TrainingModule) and isinstance(data, BaseDataModule)
        share = data.batch_size // trainer.world_size
        device = trainer.strategy.root_device
        reserve = _reserve(device)
        size = next((n for n in divisors(share) if fits_in_memory(pl_module, trainer, n)), 0)
        del reserve
        size = int(trainer.strategy.all_gather(torch.tensor(size, device=device)).min())
        if not size:
            raise torch.OutOfMemoryError(f"no memory for a training step with one sample on {device}")
        batches = share // size
        if isinstance(trainer.val_check_interval, int):  # in batches; a float is a fraction of the run
            trainer.val_check_interval = trainer.val_check_interval // trainer.accumulate_grad_batches * batches
        trainer.accumulate_grad_batches = batches
        pl_module.hparams["trainer"]["accumulate_grad_batches"] = batches  # a resumed run keeps it
        if trainer.is_global_zero:
            log.info(f"data.microbatch_size=auto: {size} samples fit, accumulating {batches} batches per step")


def fits_in_memory(module: TrainingModule, trainer: L.Trainer, microbatch_size: int) -> bool:
    """Return whether two training steps on a copy of the module fit on this process's device.

    The first step creates the optimizer's moments.
    """
    device = trainer.strategy.root_device
    try:
        _step_twice(module, trainer, microbatch_size, device)
        fit = True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fit = False
    gc.collect()  # modules are in reference cycles
    if device.type == "cpu":
        _call_libc("malloc_trim", 0)  # Otherwise freed memory leaves no room for the next, smaller trial.
    else:
        torch.get_device_module(device).empty_cache()
    return fit


def keep_freed_memory(device: torch.device) -> None:
    """Make glibc keep memory that a CPU computation frees, which saves 6 to 18% of a training step of `unet_tiny`."""
    if device.type == "cpu":
        trim_threshold, mmap_threshold = -1, -3  # constants of malloc.h
        # Older versions allow at most 32 MiB. Each call ends glibc's own adaptation.
        if _call_libc("mallopt", mmap_threshold, 2**30) or _call_libc("mallopt", mmap_threshold, 2**25):
            _call_libc("mallopt", trim_threshold, 2**31 - 1)


def _call_libc(name: str, *arguments: int) -> int:
    """Call a function of Linux's C library; return 0 if it does not exist."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), name):
        result: int = getattr(library, name)(*arguments)
        return result
    return 0


def _reserve(device: torch.device) -> object:
    """Reserve memory for libraries: 3% of a GPU's memory, 64 MiB on a CPU for compiled kernels."""
    if device.type != "cpu":
        return torch.empty((device_memory(device) or 0) * 3 // 100, dtype=torch.uint8, device=device)
    try:
        return mmap.mmap(-1, 2**26)
    except OSError as error:
        raise MemoryError(str(error)) from error


def _step_twice(module: TrainingModule, trainer: L.Trainer, microbatch_size: int, device: torch.device) -> None:
    precision = trainer.precision_plugin
    trial = copy.deepcopy(module, {id(trainer): trainer}).to(device).train()
    precision.convert_module(trial)
    trial.find_weights()
    trial.compiled_training = None  # compiling takes a minute per size
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    copies = count_averages(callbacks) + (1 if trainer.world_size > 1 else 0)
    reserved = [torch.empty_like(p, dtype=torch.float32) for p in trial.parameters() for _ in range(copies)]
    optimizer, _ = trial.prepare_optimizer(1)
    batch: Any = {"x": torch.zeros(microbatch_size, *trial.shape, device=device), "start": 0, "total": microbatch_size}
    if (null := getattr(trial, "null", None)) is not None:
        batch["cond"] = null.expand(microbatch_size, *null.shape[1:])
    if (shape := getattr(trial, "image_shape", None)) is not None:
        batch["images"] = torch.zeros(microbatch_size, *shape, device=device)
    for _ in range(2):
        with precision.train_step_context():
            loss = cast(Any, trial.training_step(batch, 0))["loss"]
        loss.backward()
        optimizer.step()  # keeps the gradients, which live from step to step
    del reserved
