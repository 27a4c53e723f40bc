"""Log pictures, tables, text and models to the loggers that support them.

W&B and TensorBoard receive the same names and steps.
"""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from src.training.checkpoints import walk_settings
from src.training.lightning_internals import logged_step

Cell = str | float | int | bool | Image.Image | None


def wandb_id(directory: Path) -> str:
    """Return the W&B id of the run in `directory`: the saved one of a resumed run, else a new one."""
    path = directory / "wandb_id.txt"
    return path.read_text().strip() if path.is_file() else secrets.token_hex(4)


def write_wandb_id(directory: Path, name: str) -> None:
    """Save the W&B id for a resumed run."""
    (directory / "wandb_id.txt").write_text(f"{name}\n")


def folder_of(logger: Logger, directory: Path) -> Path | None:
    """Return the folder below `directory` where a logger creates one per start; None if it is elsewhere."""
    if not logger.save_dir:
        return None
    folder = Path(logger.save_dir) / ("wandb" if isinstance(logger, WandbLogger) else logger.name or "")
    return folder if folder.resolve().is_relative_to(directory.resolve()) else None


@contextmanager
def rollback_logger_files(folders: Sequence[Path]) -> Iterator[None]:
    """Remove files that loggers wrote if their start fails or is interrupted."""
    before = {path for folder in folders if folder.is_dir() for path in (folder, *folder.iterdir())}
    try:
        yield
    except BaseException:
        if wandb := sys.modules.get("wandb"):
            with suppress(Exception):
                wandb.teardown()  # its service process writes there too
        for path in {path for folder in folders for path in (folder, *folder.glob("*"))} - before:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


def show_pictures(trainer: L.Trainer) -> bool:
    """Return whether any logger shows pictures."""
    return any(isinstance(logger, WandbLogger | TensorBoardLogger) for logger in trainer.loggers)


def log_picture(trainer: L.Trainer, name: str, picture: Image.Image) -> None:
    """Log a picture to every logger that shows pictures, at the step of the metrics of the same validation."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], logged_step(trainer))
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(picture), logged_step(trainer), dataformats="HWC")


def log_values(trainer: L.Trainer, name: str, values: Mapping[str, Any]) -> None:
    """Log values that describe the run, to W&B's configuration and TensorBoard's texts under `name`."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.config.update({name: dict(values)}, allow_val_change=True)
        elif isinstance(logger, TensorBoardLogger):
            text = json.dumps(values, indent=2, default=str)
            # Markdown keeps the line breaks of indented text.
            logger.experiment.add_text(name, "\t" + text.replace("\n", "\n\t"), trainer.global_step)


HPARAMS = {
    "lr": "optimizer.lr",
    "batch_size": "data.batch_size",
    "schedule": "schedule._target_",
    "model": "model._target_",
    "loss": "loss._target_",
    "prediction": "diffusion.prediction",
    "max_steps": "trainer.max_steps",
    "seed": "seed",
}
"""Columns of TensorBoard's HPARAMS tab and their settings."""


def log_hparams(trainer: L.Trainer, settings: Mapping[str, Any]) -> None:
    """Fill TensorBoard's HPARAMS tab with the main settings and `val/loss`, which it reads from the curve."""
    from torch.utils.tensorboard.summary import hparams

    flat = dict(walk_settings(settings))
    values = {name: flat[key] for name, key in HPARAMS.items() if flat.get(key) is not None}
    values = {name: x.rpartition(".")[2] if HPARAMS[name].endswith("_target_") else x for name, x in values.items()}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for summary in hparams(values, {"val/loss": 0}):  # type: ignore[no-untyped-call]
                logger.experiment.file_writer.add_summary(summary)


def log_table(trainer: L.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Log a table whose cells may be pictures, to W&B only."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            with staged_in_run_folder(logger.experiment):
                logger.log_metrics({name: wandb_table(columns, rows)}, trainer.global_step)


@contextmanager
def staged_in_run_folder(run: Any) -> Iterator[None]:
    """Make an offline W&B run stage its files in its own folder instead of the home folder."""
    if not run.offline or "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(Path(run.dir).parent)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def wandb_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Any:
    """Return a `wandb.Table`."""
    import wandb

    data = [[wandb.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows]
    return wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)


def log_model(trainer: L.Trainer, path: Path, metadata: Mapping[str, Any]) -> None:
    """Log a file to W&B as the run's model artifact with alias "best"; it stays in place for offline runs."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            artifact = wandb.Artifact(f"model-{logger.experiment.id}", type="model", metadata=dict(metadata))
            artifact.add_file(str(path.resolve()), policy="immutable")  # does not copy
            with staged_in_run_folder(logger.experiment):
                logger.experiment.log_artifact(artifact, aliases=["best"])


def log_comparison(
    rows: Sequence[Mapping[str, Cell]],
    project: str,
    group: str,
    directory: Path,
    entity: str | None = None,
    offline: bool = True,
) -> str:
    """Log the runs of a sweep as table `comparison` of a new W&B run in the sweep's group; return its id."""
    import wandb

    columns = list(dict.fromkeys(name for row in rows for name in row))
    with wandb.init(
        project=project,
        entity=entity,
        group=group,
        job_type="comparison",
        name=f"{group} compared",
        dir=directory,
        mode="offline" if offline else "online",
        reinit="create_new",
    ) as run:
        with staged_in_run_folder(run):
            run.log({"comparison": wandb_table(columns, [[row.get(name) for name in columns] for row in rows])})
        return str(run.id)


def finish_loggers(trainer: L.Trainer) -> None:
    """Flush the loggers and finish W&B's run, which would otherwise continue into the next one of this process."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.close()
        elif isinstance(logger, WandbLogger):
            import wandb

            wandb.finish()
