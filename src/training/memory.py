"""Estimate memory and find the largest microbatch that fits."""

import copy
import ctypes
import gc
import logging
import mmap
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.data.module import BaseDataModule
from src.errors import is_out_of_memory
from src.training.module import DiffusionModule
from src.training.optim import MakeOptimizer, trial_state

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}


class Estimate(NamedTuple):
    """Bytes on one device at the peak of a step; `activations` includes all temporary tensors."""

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib(n)}" for name, n in self._asdict().items() if n)
        return f"{gib(sum(self))} GiB ({parts})"


def estimate(
    net: nn.Module,
    shape: Sequence[int],
    microbatch_size: int,
    device: torch.device,
    precision: str,
    optimizer: MakeOptimizer | None,
    average: bool = True,
    shards: int = 1,
    buckets: bool = False,
    null: Tensor | None = None,
) -> Estimate:
    """Estimate the memory of `net` for `microbatch_size` samples of `shape`, from one pass with fake tensors.

    `precision` is one of Lightning's. Without an optimizer the pass is forward only, as in sampling. Gradients count
    throughout, as they live from step to step; `buckets` adds DDP's copy of them, and `shards` divides the weights
    (FSDP). A conditional network receives conditions like `null` (1, ...). Allocations of libraries are not included,
    and a compiled network counts as uncompiled.
    """
    bits, _, mode = precision.partition("-")
    meta_net = copy.deepcopy(net).to("meta")
    if mode == "true":
        meta_net.to(DTYPES[bits])
    autocast = DTYPES[bits] if mode == "mixed" else None
    activations = _peak_activations(meta_net, shape, microbatch_size, device, autocast, bool(optimizer), null)
    weights = sum(p.nbytes for p in meta_net.parameters()) // shards
    if optimizer is None:
        return Estimate(weights, 0, 0, 0, activations)
    average_bytes = 4 * sum(p.numel() for p in meta_net.parameters()) // shards if average else 0
    state = [v for v in trial_state(optimizer, 64).values() if isinstance(v, Tensor) and v.ndim]  # no step counts
    moments = weights * sum(v.nbytes for v in state) // (4 * 64**2)
    return Estimate(weights, weights * (2 if buckets else 1), moments, average_bytes, activations)


def _peak_activations(
    net: nn.Module,
    shape: Sequence[int],
    batch: int,
    device: torch.device,
    autocast: torch.dtype | None,
    train: bool,
    null: Tensor | None,
) -> int:
    """Return the peak bytes of one pass through a network on the meta device, without its weights and gradients."""
    with FakeTensorMode(), torch.set_grad_enabled(train):
        net._apply(  # type: ignore[no-untyped-call]
            lambda p: torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=device)
        )
        for p in net.parameters() if train else ():
            p.grad = torch.empty_like(p)
        memory_format = torch.channels_last if len(shape) == 3 else torch.contiguous_format
        x = torch.empty(batch, *shape, device=device, memory_format=memory_format)
        time = torch.empty(batch, device=device)
        cond = () if null is None else (torch.empty(batch, *null.shape[1:], device=device, dtype=null.dtype),)
        persistent = [*net.parameters(), *(p.grad for p in net.parameters() if p.grad is not None), *net.buffers()]
        with _StorageTracker(persistent) as tracker:
            with torch.autocast(device.type, autocast) if autocast else nullcontext():
                out = net(x, time, *cond)
            if train:
                out.float().square().mean().backward()
    peak: int = tracker.peak
    return peak + x.nbytes


class _StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of storages from their creation until their last reference is gone."""

    def __init__(self, persistent: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in persistent)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self._release, storage.nbytes())
        return out

    def _release(self, size: int) -> None:
        self.current -= size


def gib(size: float) -> str:
    """Format bytes as GiB with three significant digits."""
    return f"{size / 2**30:.3g}"


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of a device, on a CPU the limit of this process; None if unknown."""
    if device.type in ("cuda", "xpu"):
        total: int = torch.get_device_module(device).mem_get_info(device)[1]
        return total
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    import resource

    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), resource.getrlimit(resource.RLIMIT_AS)[0]]
    cgroup = Path("/sys/fs/cgroup/memory.max")
    if cgroup.is_file() and (limit := cgroup.read_text().strip()).isdecimal():
        limits.append(int(limit))
    return min(limit for limit in limits if limit > 0)  # -1 means unlimited


def divisors(n: int) -> list[int]:
    """Return the divisors of n >= 1, largest first."""
    return [d for d in range(n, 0, -1) if n % d == 0]


def set_accumulation(trainer: L.Trainer, batches: int) -> None:
    """Accumulate this many batches per step, and keep the number of steps between validations."""
    if isinstance(trainer.val_check_interval, int):  # a float is a fraction of the run
        trainer.val_check_interval = trainer.val_check_interval // trainer.accumulate_grad_batches * batches
    trainer.accumulate_grad_batches = batches


class MicrobatchFinder(L.Callback):
    """Find the largest microbatch whose training step fits on every device, and set the accumulation.

    It runs in `setup`: after the processes are connected, before the data loaders exist.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, DiffusionModule) and isinstance(data, BaseDataModule)
        share = data.batch_size // trainer.world_size
        device = trainer.strategy.root_device
        reserve = _reserve(device)
        size = next((n for n in divisors(share) if fits_in_memory(pl_module, trainer, n)), 0)
        del reserve
        size = int(trainer.strategy.all_gather(torch.tensor(size, device=device)).min())
        if not size:
            raise torch.OutOfMemoryError(f"no memory for a training step with one sample on {device}")
        set_accumulation(trainer, share // size)
        pl_module.hparams["trainer"]["accumulate_grad_batches"] = share // size  # a resumed run keeps it
        if trainer.is_global_zero:
            log.info(f"data.microbatch_size=auto: {size} samples fit, accumulating {share // size} batches per step")


def fits_in_memory(module: DiffusionModule, trainer: L.Trainer, microbatch_size: int) -> bool:
    """Return whether two training steps on a copy of the module fit on this process's device.

    The first step creates the optimizer's moments. The copy reserves memory for the EMA and DDP's buckets.
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
    """Make glibc keep memory that a CPU computation frees; otherwise each step faults it in again.

    Keeping it saves 6 to 18% of a training step of `unet_tiny` and 9 to 18% of a forward pass.
    """
    if device.type == "cpu":
        trim_threshold, mmap_threshold = -1, -3  # constants of malloc.h
        # Older versions allow at most 32 MiB. Each call ends glibc's own adaptation.
        if _call_libc("mallopt", mmap_threshold, 2**30) or _call_libc("mallopt", mmap_threshold, 2**25):
            _call_libc("mallopt", trim_threshold, 2**31 - 1)


def _call_libc(name: str, *arguments: int) -> int:
    """Call a function of Linux's C library and return its result; return 0 if it does not exist."""
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


def _step_twice(module: DiffusionModule, trainer: L.Trainer, microbatch_size: int, device: torch.device) -> None:
    precision = trainer.precision_plugin
    trial = copy.deepcopy(module, {id(trainer): trainer}).to(device).train()
    precision.convert_module(trial)
    trial.find_weights()
    trial.compiled_training = None  # compiling takes a minute per size
    copies = 2 if trainer.world_size > 1 else 1
    reserved = [torch.empty_like(p, dtype=torch.float32) for p in trial.parameters() for _ in range(copies)]
    optimizer, _ = trial.prepare_optimizer(1)
    batch: Any = {"x": torch.zeros(microbatch_size, *trial.shape, device=device), "start": 0, "total": microbatch_size}
    if trial.null is not None:
        batch["cond"] = trial.null.expand(microbatch_size, *trial.null.shape[1:])
    for _ in range(2):
        with precision.train_step_context():
            loss = trial.training_step(batch, 0)["loss"]
        loss.backward()
        optimizer.step()  # keeps the gradients, which live from step to step
    del reserved
