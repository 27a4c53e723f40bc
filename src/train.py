"""Train a diffusion model: `python -m src.train schedule=cosine data=digits trainer.devices=4`."""

import math
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from src.config.cli import launch
from src.distributed.ranks import handle_signals, rank
from src.errors import UsageError, memory_errors, usage_errors
from src.quoting import command, format_override
from src.runs.resolve import resume_job
from src.training.checkpoints import is_intact, newest_first, read_checkpoint

if TYPE_CHECKING:
    import lightning as L

    from src.runs.build import Run


def train(cfg: DictConfig) -> dict[str, float]:
    """Train as configured, then leave pictures, curves and `metrics.json` in the run folder. Returns the metrics."""
    from src.runs import out_of_memory
    from src.runs.build import build, close, start

    with usage_errors():
        if cfg.resume == "auto" and (metrics := resume_job(cfg)):
            if rank() == 0:
                print(f"{relative(Path(cfg.run_dir))} is finished: skipped")
            return metrics
        run = build(cfg)
        if cfg.optimized_metric not in (None, *(known := [f"val/{name}" for name in run.module.validation])):
            raise ValueError(
                f"optimize={cfg.optimized_metric} is no metric of this run: choose one of {', '.join(known)}"
            )
        if run.trainer.limit_val_batches == 0 and is_optimized():
            raise ValueError(
                f"optimize={cfg.optimized_metric} is not measured with trainer.limit_val_batches=0: leave that out, or give at "
                "least one batch"
            )
        if run.trainer.is_global_zero:  # what is wrong with the data shows here, and not in every process
            run.data.prepare_data()
            run.data.setup()
            run.data.train_sampler(run.trainer)
            run.data.val_sampler(run.trainer)
        if run.resume_from is not None and (metrics := run.finished):
            if rank() == 0:
                print(
                    f"{relative(run.directory)} is finished: all {run.steps} steps are done; raise trainer.max_steps "
                    "to go on"
                )
            return metrics
        start(cfg, run)
        if run.trainer.is_global_zero and not cfg.trainer.get("fast_dev_run"):
            record_data(run)
    print_summary(run)
    from src.errors import DataReadError
    from src.training.callbacks.graceful_shutdown import Interruption, wait_for_children

    interruption = Interruption()
    try:
        with memory_errors(lambda: out_of_memory.while_training(cfg, run)), handle_signals(interruption):
            metrics = fit(cfg, run)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning's answer to what `GracefulShutdown` raises is to exit with 1.
        if isinstance(stop, SystemExit) and stop.code not in (1, None):
            raise
        print_resume_command(run)
        raise SystemExit(128 + (run.stop_signal or interruption.number or signal.SIGINT)) from stop
    except DataReadError as error:
        if error.everywhere and rank() > 0:  # the first process says so
            raise SystemExit(2) from error
        raise UsageError(f"{error}; {resume_hint(run)}") from error
    finally:
        wait_for_children()
        close(run)
    if not math.isfinite(metrics.get("val/loss", 0)):
        precision = str(run.trainer.precision)
        finer = "" if precision in ("32-true", "64-true") else f" or set trainer.precision=32-true (it was {precision})"
        raise UsageError(
            f"training diverged, val/loss is not finite: lower optimizer.lr (it was {cfg.optimizer.lr}){finer}"
        )
    return metrics


def fit(cfg: DictConfig, run: "Run") -> dict[str, float]:
    """Train, save, validate, and leave what there is to look at. Raises UsageError if training was given up."""
    from src.training.pictures import sample_trajectory, save_pictures
    from src.viz import tables

    start = time.perf_counter()
    resume_from = run.resume_from and str(run.resume_from)
    run.trainer.fit(run.module, datamodule=run.data, ckpt_path=resume_from, weights_only=True)
    seconds = time.perf_counter() - start  # of this session
    if run.diagnosis:
        raise UsageError(run.diagnosis)
    run.save()
    steps = run.trainer.global_step
    validates = run.trainer.limit_val_batches > 0
    if validates and (run.module.validated < steps or "val/loss" not in run.trainer.callback_metrics):
        run.trainer.validate(run.module, datamodule=run.data, verbose=False)
    known = run.trainer.callback_metrics.items()
    metrics = {
        **{name: float(x) for name, x in known if name.startswith(("val/", "quality/"))},
        "steps": steps,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in run.module.net.parameters()),
    }
    run.data.sync_read_errors()
    loss = f"val/loss {metrics['val/loss']:.4g}" if "val/loss" in metrics else "not validated"
    if cfg.trainer.get("fast_dev_run"):
        if run.trainer.is_global_zero:
            tried = f"Done: trainer.fast_dev_run tried {count(steps, 'step')}, {loss}"
            print(f"{tried}. No checkpoint and no metrics.json was written.")
        return metrics
    trajectory = sample_trajectory(run.trainer, run.module, run.data, cfg.seed)
    if run.trainer.is_global_zero:
        from src.training.checkpoint_io import retry_until_written, tolerate_full_disk

        with tolerate_full_disk(run.directory / "samples"):
            save_pictures(
                run.directory,
                run.trainer,
                run.data,
                trajectory,
                cfg.neighbors.num_samples,
                cfg.neighbors.num_candidates,
            )
        if run.data.skip_unreadable:
            run.data.read_errors.warn()
            metrics["unreadable_files"] = len(run.data.read_errors.names)
        finished = run.directory / "metrics.json"  # last, since it says that the run is finished
        retry_until_written(lambda: tables.write_json(finished, metrics), finished)
        took = f"{seconds:.0f} s{' since it was resumed' if resume_from else ''}"
        early = " (trainer.max_time is over)" if steps < run.trainer.max_steps and is_time_over(run.trainer) else ""
        print(f"Done: {count(steps, 'step')} in {took}{early}, {loss}. Look at:")
        pictures = [f"samples/{name}" for name in ("final.png", "film.png", "film.gif", "neighbours.png")]
        for name in (*pictures, "curves.png", "loss_by_noise.png", "metrics.json"):
            if (path := run.directory / name).exists():
                print(f"  {relative(path)}")
        if not run.saves:
            print("No checkpoint was saved, as trainer.enable_checkpointing=false asks.")
            return metrics
        sample = command(
            "sample", format_override("run", relative(run.directory)), *([] if run.averages else ["ema=false"])
        )
        print(f"More samples: {sample} n=64")
        if (condition := run.data.condition) and condition.examples:
            asked = condition.examples[0]
            print(
                f"Of what you ask for: {sample} n=16 {format_override('cond', asked if isinstance(asked, str) else [asked])}"
            )
    return metrics


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def is_optimized() -> bool:
    """Whether this is a job of a sweep whose sweeper looks at what comes of it."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return False
    return not HydraConfig.get().sweeper._target_.endswith("BasicSweeper")


def is_time_over(trainer: "L.Trainer") -> bool:
    """Whether `trainer.max_time` has passed, that of a run before it was resumed included."""
    from lightning.pytorch.callbacks import Timer

    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return any((left := timer.time_remaining()) is not None and left <= 0 for timer in timers)


def record_data(run: "Run") -> None:
    """Write down what data the run begins with, unless it has done so."""
    from src.data.split import FINGERPRINT_FILE
    from src.training.checkpoint_io import tolerate_full_disk

    path = run.directory / FINGERPRINT_FILE
    if not path.exists():
        with tolerate_full_disk(path):
            run.directory.mkdir(parents=True, exist_ok=True)
            run.data.write_fingerprint(path)


def print_summary(run: "Run") -> None:
    """One line on what is about to be trained, and where it goes."""
    if run.trainer.is_global_zero:
        net = run.module.net
        count = sum(p.numel() for p in net.parameters())
        devices = run.trainer.num_devices * run.trainer.num_nodes
        print(
            f"Training {type(net).__name__} ({count / 1e6:.2f} M parameters) on {len(run.data.train_indices) or 'the'} "
            f"samples of shape {run.module.shape}, {run.trainer.max_steps} steps of {run.data.batch_size}"
            f"{f', going on from {run.resume_from.name}' if run.resume_from else ''}, "
            f"on {devices} x {run.trainer.strategy.root_device.type}, into {relative(run.directory)}",
            flush=True,
        )


def print_resume_command(run: "Run") -> None:
    """After an interruption: at which step the last checkpoint stands, and the command that goes on from it."""
    if run.trainer.is_global_zero:
        print(f"\nStopped, {resume_hint(run)}")


def resume_hint(run: "Run") -> str:
    """At which step the last checkpoint stands, and the command that goes on from it."""
    saved = next((path for path in newest_first(run.directory) if is_intact(path)), None)
    if saved is None:
        return f"at step {run.trainer.global_step}: nothing was saved yet."
    step = read_checkpoint(saved)["global_step"]
    return f"saved at step {step}. Go on with: {command('train', format_override('resume', relative(run.directory)))}"


def relative(path: Path) -> Path:
    """`path` as seen from here, if it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    launch("train", train)
