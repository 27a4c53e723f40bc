"""Out-of-memory messages: the memory needed, the memory available, and the settings to change."""

from typing import TYPE_CHECKING

from src.errors import command, format_override
from src.runs.autoencoder import is_autoencoder
from src.runs.components import meta_network

if TYPE_CHECKING:
    import torch

    from src.runs.build import Run


def step_memory(run: "Run") -> int:
    """Return an estimate of the bytes of a training step of a diffusion model on each device, without running one."""
    from lightning.pytorch.strategies import DDPStrategy

    from src.distributed.sharding import FullyShardedStrategy
    from src.training.memory import count_averages, estimate
    from src.training.module import DiffusionModule

    trainer, module = run.trainer, run.module
    assert isinstance(module, DiffusionModule)
    return estimate(
        meta_network(run.config, module.diffusion.outputs),
        module.shape,
        run.data.microbatch_size(trainer),
        trainer.strategy.root_device,
        str(trainer.precision),
        module.make_optimizer,
        count_averages(trainer.callbacks),  # type: ignore[attr-defined]
        trainer.world_size if isinstance(trainer.strategy, FullyShardedStrategy) else 1,
        isinstance(trainer.strategy, DDPStrategy),
        module.null,
    )


def training_oom_message(run: "Run") -> str:
    """Return one line for training that ran out of memory."""
    from src.distributed.sharding import FullyShardedStrategy
    from src.training.memory import gib

    trainer, micro = run.trainer, run.data.microbatch_size(run.trainer)
    try:
        needs = "" if is_autoencoder(run.config) else f"; a training step needs about {gib(step_memory(run))} GiB"
    except (RuntimeError, MemoryError):
        # Under a memory limit, even the threads of the backward pass may fail to start.
        needs = "; a training step needs more than is left to estimate it with"
    saved = run.last_checkpoint.exists()
    remedies = {
        "data.microbatch_size=auto": micro > 1 and not saved and not isinstance(trainer.strategy, FullyShardedStrategy),
        "model.gradient_checkpointing=true": run.config.model.get("gradient_checkpointing") is False,
        "trainer.precision=bf16-mixed": str(trainer.precision) in ("32-true", "64-true"),
    }
    settings = [setting for setting, helps in remedies.items() if helps]
    advice = ", then ".join(settings) or "a smaller model, or shard it with trainer=fsdp"
    resume = command("train", format_override("resume", run.directory), *settings)
    return (
        f"out of memory at data.microbatch_size {micro} (samples per device and forward pass) on "
        f"{describe_device(trainer.strategy.root_device)}{needs}: set {advice}"
        f"{f'; saved: resume with {resume}' if saved else ''}"
    )


def sampling_oom_message(batch_size: int, device: "torch.device") -> str:
    """Return one line for sampling or evaluation that ran out of memory."""
    advice = f"set batch_size={batch_size // 2} or less" if batch_size > 1 else "use another device"
    return f"out of memory at batch_size {batch_size} on {describe_device(device)}: {advice}"


def describe_device(device: "torch.device") -> str:
    """Return the name of a device and its memory."""
    from src.training.memory import device_memory, gib

    size = device_memory(device)
    return f"{device}, which has {gib(size)} GiB" if size else str(device)
