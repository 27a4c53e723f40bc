"""Estimate memory and find the largest microbatch that fits."""

import copy
import ctypes
import gc
import logging
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.data.module import BaseDataModule
from src.errors import is_out_of_memory
from src.training.module import DiffusionModule

log = logging.getLogger(__name__)


DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}


class Estimate(NamedTuple):
    """Bytes on one device at the peak of a step; `activations` are all that comes and goes within it."""

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
    optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None,
    average: bool = True,
    shards: int = 1,
    buckets: bool = False,
    null: Tensor | None = None,
) -> Estimate:
    """What `net` needs for `microbatch_size` samples of `shape`, from one pass on tensors without contents.

    `precision` is one of Lightning's. Without an optimizer it is a forward pass alone, as for sampling. Gradients
    count as alive throughout, as they are from one step to the next; `buckets` are DDP's copy of them, and of
    `shards` of the weights (FSDP) one lies here. A network that takes conditions is given some like `null` (1, ...).
    What libraries allocate for themselves is not in it, and a compiled network is taken for what it was.
    """
    bits, _, mode = precision.partition("-")
    hollow = copy.deepcopy(net).to("meta")
    if mode == "true":
        hollow.to(DTYPES[bits])
    activations = _peak(
        hollow, shape, microbatch_size, device, DTYPES[bits] if mode == "mixed" else None, bool(optimizer), null
    )
    weights = sum(_size(p) for p in hollow.parameters()) // shards
    if optimizer is None:
        return Estimate(weights, 0, 0, 0, activations)
    average_size = 4 * sum(p.numel() for p in hollow.parameters()) // shards if average else 0
    moments = round(weights * _moments(optimizer))
    return Estimate(weights, weights * (2 if buckets else 1), moments, average_size, activations)


def _peak(
    net: nn.Module,
    shape: Sequence[int],
    batch: int,
    device: torch.device,
    autocast: torch.dtype | None,
    train: bool,
    null: Tensor | None,
) -> int:
    """The most bytes that are alive at once in a pass through a `net` without contents, its weights' aside."""
    with FakeTensorMode(), torch.set_grad_enabled(train):
        net._apply(  # type: ignore[no-untyped-call]
            lambda p: torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=device)
        )
        for p in net.parameters() if train else ():
            p.grad = torch.empty_like(p)
        last = torch.channels_last if len(shape) == 3 else torch.contiguous_format
        x = torch.empty(batch, *shape, device=device, memory_format=last)
        time = torch.empty(batch, device=device)
        cond = () if null is None else (torch.empty(batch, *null.shape[1:], device=device, dtype=null.dtype),)
        lasting = [*net.parameters(), *(p.grad for p in net.parameters() if p.grad is not None), *net.buffers()]
        with _Live(lasting) as live:
            with torch.autocast(device.type, autocast) if autocast else nullcontext():
                out = net(x, time, *cond)
            if train:
                out.float().square().mean().backward()
    peak: int = live.peak
    return peak + _size(x)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations make, from when they are made until nothing refers to them."""

    def __init__(self, lasting: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in lasting)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return made

    def _freed(self, size: int) -> None:
        self.alive -= size


def _moments(make: Callable[[list[dict[str, Any]]], Optimizer]) -> float:
    """Bytes of an optimizer's state for each byte of weights: told by a step of it on a small weight."""
    weight = nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.zeros_like(weight)
    optimizer = make([{"params": [weight]}])
    optimizer.step()
    state = [v for v in optimizer.state[weight].values() if isinstance(v, Tensor) and v.ndim]  # not the count of steps
    return sum(map(_size, state)) / _size(weight)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def gib(size: float) -> str:
    """Bytes in GiB, to three significant digits."""
    return f"{size / 2**30:.3g}"


def device_memory(device: torch.device) -> int | None:
    """The bytes that a device has, on a CPU those that this process may have; None if it does not tell."""
    if device.type in ("cuda", "xpu"):
        total: int = torch.get_device_module(device).mem_get_info(device)[1]
        return total
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    import resource

    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), resource.getrlimit(resource.RLIMIT_AS)[0]]
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (limit := group.read_text().strip()).isdecimal():
        limits.append(int(limit))
    return min(limit for limit in limits if limit > 0)  # -1 is no limit


def keep_freed_memory(device: torch.device) -> None:
    """Have glibc keep what is freed on a CPU: given back, each step faults it in again.

    That is 2 to 4% of a step, or a third of a forward pass with Winograd's convolutions, which need much for a moment.
    """
    if device.type == "cpu":
        trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
        # Older ones take no more than 32 MiB, and each call ends their own adapting.
        if _c_library_call("mallopt", mmap_threshold, 2**30) or _c_library_call("mallopt", mmap_threshold, 2**25):
            _c_library_call("mallopt", trim_threshold, 2**31 - 1)


def _c_library_call(name: str, *arguments: int) -> int:
    """A call to Linux's C library if it has a function of this name (glibc has what is asked of it here), or 0."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), name):
        answer: int = getattr(library, name)(*arguments)
        return answer
    return 0


def divisors(n: int) -> list[int]:
    """Of n >= 1, the largest first."""
    return [d for d in range(n, 0, -1) if n % d == 0]


def accumulate(trainer: L.Trainer, batches: int) -> None:
    """Have the optimizer step after so many batches, and validation come after as many steps as before."""
    if isinstance(trainer.val_check_interval, int):  # else it is a share of the run
        trainer.val_check_interval = trainer.val_check_interval // trainer.accumulate_grad_batches * batches
    trainer.accumulate_grad_batches = batches


class MicrobatchFinder(L.Callback):
    """Finds the largest micro-batch with which a training step fits on every process's device, and accumulates it.

    Only here, after the strategy's set-up and before its loaders, do processes know of each other.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, DiffusionModule) and isinstance(data, BaseDataModule)
        share = data.batch_size // trainer.world_size
        device = trainer.strategy.root_device
        reserve = _reserve(device)
        found = next((n for n in divisors(share) if fits(pl_module, trainer, n)), 0)
        del reserve
        keep_freed_memory(device)  # only now: what a trial was given must go back
        found = int(trainer.strategy.all_gather(torch.tensor(found, device=device)).min())
        if not found:
            raise torch.OutOfMemoryError(f"no memory for a training step with one sample on {device}")
        accumulate(trainer, share // found)
        pl_module.hparams["trainer"]["accumulate_grad_batches"] = share // found  # which a resumed run keeps
        if trainer.is_global_zero:
            log.info(f"data.microbatch_size=auto: {found} samples fit, {share // found} times a step on each process")


def fits(module: DiffusionModule, trainer: L.Trainer, microbatch_size: int) -> bool:
    """Whether two training steps on a copy of the module fit on this process's device: the first makes the moments.

    Beside the copy lies what the average and DDP's buckets need.
    """
    device = trainer.strategy.root_device
    try:
        _step_twice(module, trainer, microbatch_size, device)
        fit = True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fit = False
    gc.collect()  # modules refer to themselves
    if device.type == "cpu":
        _c_library_call("malloc_trim", 0)  # else the next trial, a smaller one, finds no room where this one failed
    else:
        torch.get_device_module(device).empty_cache()
    return fit


def _reserve(device: torch.device) -> object:
    """Room for what libraries take for themselves: 3% of a device of its own memory, 64 MiB on a CPU."""
    if device.type != "cpu":
        return torch.empty((device_memory(device) or 0) * 3 // 100, dtype=torch.uint8, device=device)
    try:
        return mmap.mmap(-1, 2**26)  # where compiled kernels go
    except OSError as error:
        raise MemoryError(str(error)) from error


def _step_twice(module: DiffusionModule, trainer: L.Trainer, microbatch_size: int, device: torch.device) -> None:
    precision = trainer.precision_plugin
    trial = copy.deepcopy(module, {id(trainer): trainer}).to(device).train()
    precision.convert_module(trial)
    trial._find_weights()
    trial.compiled_training = None  # each size that is tried would take a minute to compile
    copies = 2 if trainer.world_size > 1 else 1
    beside = [torch.empty_like(p, dtype=torch.float32) for p in trial.parameters() for _ in range(copies)]
    optimizer, _ = trial.prepare_optimizer(1)
    x = torch.zeros(microbatch_size, *trial.shape, device=device)
    for _ in range(2):
        with precision.train_step_context():
            _, terms = trial._train_terms({"x": x, "start": 0, "total": microbatch_size}, 0)
        terms["loss"].mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()  # gradients stay, as they do from one step to the next
    del beside
