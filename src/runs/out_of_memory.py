"""What to say where the memory was not enough: what is needed, what there is, and what to set."""

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from src.quoting import command, format_override
from src.runs.components import meta_network

if TYPE_CHECKING:
    import torch

    from src.runs.build import Run
    from src.runs.open import OpenedRun
    from src.training.memory import Estimate


def step_memory(cfg: DictConfig, run: "Run") -> "Estimate":
    """What a training step needs on each device, told without running one."""
    from lightning.pytorch.strategies import DDPStrategy

    from src.distributed.sharding import FullyShardedStrategy
    from src.training.callbacks.ema import EMA
    from src.training.memory import estimate

    trainer = run.trainer
    return estimate(
        meta_network(cfg, run.module.diffusion.outputs),
        run.module.shape,
        run.data.microbatch_size(trainer),
        trainer.strategy.root_device,
        str(trainer.precision),
        run.module.make_optimizer,
        any(isinstance(callback, EMA) for callback in trainer.callbacks),  # type: ignore[attr-defined]
        trainer.world_size if isinstance(trainer.strategy, FullyShardedStrategy) else 1,
        isinstance(trainer.strategy, DDPStrategy),
        run.module.null,
    )


def while_training(cfg: DictConfig, run: "Run") -> str:
    """One line for a training that ran out of memory: what it needs, what there is, and what to set."""
    from src.distributed.sharding import FullyShardedStrategy

    trainer, micro = run.trainer, run.data.microbatch_size(run.trainer)
    try:
        needs = f"about {step_memory(cfg, run)}"
    except (RuntimeError, MemoryError):  # a process under a limit may not even start the backward pass's threads
        needs = "more than is left to estimate it with"
    saved = run.last_checkpoint.exists()
    remedies = {
        "data.microbatch_size=auto": micro > 1 and not saved and not isinstance(trainer.strategy, FullyShardedStrategy),
        "model.gradient_checkpointing=true": cfg.model.get("checkpointing") is False,
        "trainer.precision=bf16-mixed": str(trainer.precision) in ("32-true", "64-true"),
    }
    settings = [setting for setting, helps in remedies.items() if helps]
    advice = ", then ".join(settings) if settings else "a smaller model, or one dealt out by trainer=fsdp"
    line = command("train", format_override("resume", run.directory), *settings)
    again = f"; saved: go on with {line}" if saved else ""
    return (
        f"out of memory at data.microbatch_size {micro} (samples per device and forward pass) on "
        f"{having(trainer.strategy.root_device)}; a training step needs {needs}: set {advice}{again}"
    )


def at_batch_size(opened: "OpenedRun", batch_size: int, device: "torch.device") -> str:
    """One line for sampling or evaluation that ran out of memory."""
    from src.training.memory import estimate

    net = meta_network(opened.config, opened.module.diffusion.outputs)
    together = batch_size if opened.module.null is None else 2 * batch_size  # guided, each is asked for nothing as well
    needs = estimate(net, opened.module.shape, together, device, "32-true", None, null=opened.module.null)
    advice = f"set batch_size={batch_size // 2} or less" if batch_size > 1 else "use another device"
    return (
        f"out of memory at batch_size {batch_size} on {having(device)}; a pass through the network needs about "
        f"{needs}: {advice}"
    )


def having(device: "torch.device") -> str:
    """A device and the memory that it has."""
    from src.training.memory import device_memory, gib

    size = device_memory(device)
    return f"{device}, which has {gib(size)} GiB" if size else str(device)
