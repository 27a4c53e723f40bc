"""Train a run and write its results into the run folder."""

import time
import warnings
from typing import TYPE_CHECKING

from src.errors import UsageError

if TYPE_CHECKING:
    from src.runs.build import Run


def load_data(run: "Run") -> None:
    """Load the data in the first process, so that an error appears once, before training."""
    if run.trainer.is_global_zero:
        run.data.prepare_data()
        run.data.setup()
        run.data.train_sampler(run.trainer)
        run.data.val_sampler(run.trainer)


def record_data(run: "Run") -> None:
    """Write the record of the data at the start of a run, unless the run has one."""
    from src.data.split import FINGERPRINT_FILE
    from src.training.checkpoint_io import tolerate_full_disk

    path = run.directory / FINGERPRINT_FILE
    if run.trainer.is_global_zero and not run.config.trainer.get("fast_dev_run") and not path.exists():
        with tolerate_full_disk(path):
            run.directory.mkdir(parents=True, exist_ok=True)
            run.data.write_fingerprint(path)
            if unreadable := getattr(run.data.source, "unreadable", {}):
                lines = [f"{file}: {reason}\n" for file, reason in unreadable.items()]
                path.with_name("unreadable.txt").write_text("".join(lines), "utf-8", "backslashreplace")


def fit_run(run: "Run") -> dict[str, float]:
    """Train, save the last checkpoint, validate it and write the results; return the metrics.

    Raises UsageError if the guard against non-finite steps gave up.
    """
    from src.training.callbacks.nan_guard import NonFiniteGuard
    from src.training.callbacks.wandb_artifact import WandbArtifact
    from src.training.lightning_internals import save_best

    start, trainer = time.perf_counter(), run.trainer
    resume_from = run.resume_from and str(run.resume_from)
    trainer.fit(run.module, datamodule=run.data, ckpt_path=resume_from, weights_only=True)
    seconds = time.perf_counter() - start
    if diagnosis := "".join(guard.diagnosis for guard in run.callbacks(NonFiniteGuard)):
        raise UsageError(diagnosis)
    save_last_checkpoint(run)
    is_validated = run.module.validated == trainer.global_step and "val/loss" in trainer.callback_metrics
    if trainer.limit_val_batches > 0 and not is_validated:
        trainer.validate(run.module, datamodule=run.data, verbose=False)
        if save_best(trainer):
            save_last_checkpoint(run)  # knows the best loss, which a resumed run compares with
    for artifact in run.callbacks(WandbArtifact):
        artifact.upload(trainer)
    logged = trainer.callback_metrics.items()
    metrics = {
        **{name: float(x) for name, x in logged if name.startswith(("val/", "quality/"))},
        "steps": trainer.global_step,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in run.module.net.parameters()),
    }
    run.data.sync_read_errors()
    if not run.config.trainer.get("fast_dev_run"):
        _write_results(run, metrics)
    return metrics


def save_last_checkpoint(run: "Run") -> None:
    """Save the last checkpoint. On a full disk, warn and retry until there is space."""
    strategy = run.trainer.strategy
    while True:
        run.trainer.save_checkpoint(run.last_checkpoint)
        if not strategy.broadcast(getattr(strategy.checkpoint_io, "failed", False)):
            return
        if run.trainer.is_global_zero:
            warnings.warn(
                f"training has finished and is waiting for disk space at {run.directory}: free some, or stop it; the "
                "last intact checkpoint is kept",
                stacklevel=2,
            )
        time.sleep(10)


def _write_results(run: "Run", metrics: dict[str, float]) -> None:
    """Write pictures, and then `metrics.json`, which marks the run as finished."""
    from src.training.autoencoder import AutoencoderModule
    from src.training.checkpoint_io import retry_until_written, tolerate_full_disk
    from src.training.module import DiffusionModule
    from src.training.pictures import sample_trajectory, save_pictures, save_reconstructions
    from src.viz import tables

    trainer, module, data = run.trainer, run.module, run.data
    trajectory = None
    if isinstance(module, DiffusionModule):
        trajectory = sample_trajectory(trainer, module, data, run.config.seed)
    if not trainer.is_global_zero:
        return
    neighbors = run.config.get("neighbors") or {}
    num_samples, num_candidates = (neighbors.get(name, 0) for name in ("num_samples", "num_candidates"))
    with tolerate_full_disk(run.directory / "samples"):
        if trajectory is not None:
            save_pictures(run.directory, trainer, data, trajectory, num_samples, num_candidates)
        if isinstance(module, AutoencoderModule):
            save_reconstructions(run.directory, trainer, module, data)
    if run.data.skip_unreadable:
        run.data.read_errors.warn()
        metrics["unreadable_files"] = len(run.data.read_errors.names)
    path = run.directory / "metrics.json"
    retry_until_written(lambda: tables.write_json(path, metrics), path)


def is_time_over(run: "Run") -> bool:
    """Return whether `trainer.max_time` has passed, including the time before the run was resumed."""
    from lightning.pytorch.callbacks import Timer

    return any((left := timer.time_remaining()) is not None and left <= 0 for timer in run.callbacks(Timer))
