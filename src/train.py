"""Train a diffusion model or an autoencoder: `python -m src.train schedule=cosine data=digits trainer.devices=4`."""

import math
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from src.config.cli import launch
from src.config.output import relative
from src.config.search_path import search_path_overrides
from src.distributed.ranks import Interruption, handle_signals, rank
from src.errors import UsageError, command, counted, format_override, memory_errors, shell_word, usage_errors
from src.runs.autoencoder import is_autoencoder
from src.runs.resolve import finished_job
from src.training.checkpoints import is_intact, newest_first, read_checkpoint

if TYPE_CHECKING:
    from src.runs.build import Run


def train(cfg: DictConfig) -> dict[str, float]:
    """Train a run, write pictures, curves and `metrics.json` into its folder, and return the metrics.

    Raises UsageError for invalid settings, and for training that diverged or ran out of memory.
    """
    from src.runs.build import build, start_run
    from src.runs.fit import load_data, record_data

    with usage_errors():
        if metrics := finished_job(cfg):
            print_once(f"{relative(Path(cfg.run_dir))} is finished: skipped")
            return metrics
        run = build(cfg)
        load_data(run)
        if run.resume_from is not None and (metrics := run.finished):
            in_time = run.trainer.max_steps < run.config.trainer.max_steps
            print_once(
                f"{relative(run.directory)} is finished: all {run.steps} steps are done; raise "
                f"{'callbacks.time_budget.minutes' if in_time else 'trainer.max_steps'} to continue"
            )
            return metrics
        start_run(run)
        record_data(run)
    print_training_summary(run)
    metrics = fit_or_explain(run)
    print_results(run, metrics)
    if not math.isfinite(metrics.get("val/loss", 0)):
        precision = str(run.trainer.precision)
        finer = "" if precision in ("32-true", "64-true") else f" or set trainer.precision=32-true (it was {precision})"
        raise UsageError(
            f"training diverged, val/loss is not finite: lower optimizer.lr (it was {run.config.optimizer.lr}){finer}"
        )
    return metrics


def fit_or_explain(run: "Run") -> dict[str, float]:
    """Train the run. After a signal, print how to resume and exit with 128 plus its number.

    Raises UsageError with one line if memory runs out or data cannot be read.
    """
    from src.errors import DataReadError
    from src.runs import out_of_memory
    from src.runs.build import close_run
    from src.runs.fit import fit_run
    from src.training.callbacks.graceful_shutdown import GracefulShutdown
    from src.training.lightning_internals import wait_for_children

    interruption = Interruption()
    try:
        with memory_errors(lambda: out_of_memory.training_oom_message(run)), handle_signals(interruption):
            return fit_run(run)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning exits with 1 after the exception of `GracefulShutdown`.
        if isinstance(stop, SystemExit) and stop.code not in (1, None):
            raise
        print_once(f"\nStopped, {resume_hint(run)}")
        signals = [callback.signal for callback in run.callbacks(GracefulShutdown)]
        raise SystemExit(128 + (max(signals, default=0) or interruption.number or signal.SIGINT)) from stop
    except DataReadError as error:
        if error.everywhere and rank() > 0:  # The first process prints the message.
            raise SystemExit(2) from error
        raise UsageError(f"{error}; {resume_hint(run)}") from error
    finally:
        wait_for_children()
        close_run(run)


def print_once(text: str) -> None:
    """Print only on rank 0."""
    if rank() == 0:
        print(text, flush=True)


def print_training_summary(run: "Run") -> None:
    """Print the summary of the data, if the source has one, the network, the steps, the devices and the run folder."""
    from src.training.callbacks.time_budget import TimeBudget

    if summary := getattr(run.data.source, "summary", ""):
        print_once(f"Data: {summary}")
    parameters = sum(p.numel() for p in run.module.net.parameters())
    trained = sum(p.numel() for p in run.module.net.parameters() if p.requires_grad)
    part = f", {trained / 1e6:.3g} M trained" if trained < parameters else ""
    devices = run.trainer.num_devices * run.trainer.num_nodes
    count, epoch = len(run.data.train_indices), len(run.data.training_indices())
    repeated = f" ({epoch} with repeats)" if epoch != count else ""
    steps, resumed = f"{counted(run.trainer.max_steps, 'step')} of {run.data.batch_size}", run.resume_from
    for budget in run.callbacks(TimeBudget):
        if budget.minutes is not None:
            steps = f"{'at most ' if budget.num_steps is None else ''}{steps} in {budget.minutes:g} minutes"
    if run.initial:
        print_once(f"Start: {run.initial}")
    print_once(
        f"Training {type(run.module.net).__name__} ({parameters / 1e6:.2f} M parameters{part}) on "
        f"{counted(count, 'sample') if count else 'the samples'}{repeated} of shape {run.module.shape}, {steps}"
        f"{f', resumed from {resumed.name}' if resumed else ''}, "
        f"on {devices} x {run.trainer.strategy.root_device.type}, into {relative(run.directory)}"
    )


def print_results(run: "Run", metrics: dict[str, float]) -> None:
    """Print the validation loss, the files to look at and the command that samples."""
    from src.runs.fit import is_time_over

    steps = counted(int(metrics["steps"]), "step")
    loss = f"val/loss {metrics['val/loss']:.4g}" if "val/loss" in metrics else "not validated"
    if run.config.trainer.get("fast_dev_run"):
        print_once(f"Done: trainer.fast_dev_run tried {steps}, {loss}. No checkpoint and no metrics.json was written.")
        return
    took = f"{metrics['seconds']:.0f} s{' since it was resumed' if run.resume_from else ''}"
    over = metrics["steps"] < run.trainer.max_steps and is_time_over(run)
    print_once(f"Done: {steps} in {took}{' (trainer.max_time is over)' if over else ''}, {loss}. Look at:")
    pictures = [f"samples/{name}" for name in ("final.png", "trajectory.png", "trajectory.gif", "neighbors.png")]
    for name in (*pictures, "curves.png", "loss_by_noise.png", "metrics.json"):
        if (path := run.directory / name).exists():
            print_once(f"  {relative(path)}")
    if not run.last_checkpoint.exists():
        print_once("No checkpoint was saved: trainer.enable_checkpointing=false")
        return
    if is_autoencoder(run.config):
        print_once(f"PSNR {metrics['val/psnr']:.4g} dB" if "val/psnr" in metrics else "PSNR not measured")
        print_once(f"Train a diffusion model of its latents: {latent_command(run)}")
        return
    folder = format_override("run", relative(run.directory))
    sample = command("sample", *search_path_overrides(), folder)
    print_once(f"More samples: {sample} n=64")
    if (condition := run.data.condition) and condition.examples:
        example = condition.examples[0]
        numbers = [] if isinstance(example, str) else [float(f"{value:.6g}") for value in example]
        cond = format_override("cond", [numbers] if numbers else example)
        print_once(f"Samples of one condition: {sample} n=16 {cond}")


def latent_command(run: "Run") -> str:
    """Return the command that trains a diffusion model of the latents of the same data by a trained autoencoder."""
    words = [*search_path_overrides(), format_override("autoencoder", relative(run.directory))]
    typed = [o for o in HydraConfig.get().overrides.task if o.startswith("data.")] if HydraConfig.initialized() else []
    if HydraConfig.initialized():
        words.append(f"data={HydraConfig.get().runtime.choices['data']}")
    words.extend(map(shell_word, typed))
    if not any(o.startswith("data.image_size=") for o in typed):
        size = run.config.data.image_size
        words.append(format_override("data.image_size", size if isinstance(size, int) else list(size)))
    return command("train", *words)


def resume_hint(run: "Run") -> str:
    """Return the step of the last checkpoint and the command that resumes from it."""
    saved = next((path for path in newest_first(run.directory) if is_intact(path)), None)
    if saved is None:
        return f"at step {run.trainer.global_step}: nothing was saved yet."
    step = read_checkpoint(saved)["global_step"]
    resume = command("train", *search_path_overrides(), format_override("resume", relative(run.directory)))
    return f"saved at step {step}. Resume with: {resume}"


if __name__ == "__main__":
    launch("train", train)
