"""Loggers, and what is shown by those that show more than numbers: pictures, tables, texts and models.

What W&B and TensorBoard show, both are given, under one name and at one step.
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

from src.training.lightning_internals import logged_step

Cell = str | float | int | bool | Image.Image | None


def wandb_id(directory: Path) -> str:
    """The name that W&B knows the run in `directory` by: read there when it goes on, else made up."""
    path = directory / "wandb_id.txt"
    return path.read_text().strip() if path.is_file() else secrets.token_hex(4)


def write_wandb_id(directory: Path, name: str) -> None:
    """Keep the name that W&B knows the run by, once W&B has taken it."""
    path = directory / "wandb_id.txt"
    if not path.is_file():
        partial = path.with_suffix(".partial")
        partial.write_text(f"{name}\n")
        os.replace(partial, path)


def folder_of(logger: Logger, directory: Path) -> Path | None:
    """Return the folder below `directory` in which a logger makes one for each start; None if it writes elsewhere."""
    if not logger.save_dir:
        return None
    folder = Path(logger.save_dir) / ("wandb" if isinstance(logger, WandbLogger) else logger.name or "")
    return folder if folder.resolve().is_relative_to(directory.resolve()) else None


@contextmanager
def rollback_logger_files(folders: Sequence[Path]) -> Iterator[None]:
    """If loggers fail to start within this, or are interrupted, remove what they have written into their folders."""
    new = [folder for folder in folders if not folder.is_dir()]
    before = {path for folder in folders for path in folder.glob("*")}
    links = {path: path.readlink() for path in before if path.is_symlink()}  # W&B's, to its last start
    try:
        yield
    except BaseException:
        if wandb := sys.modules.get("wandb"):
            with suppress(Exception):
                wandb.teardown()  # its own process, which writes there too
        for path in {path for folder in folders for path in folder.glob("*")} - before:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for path, target in links.items():
            if not (path.is_symlink() and path.readlink() == target):
                path.unlink(missing_ok=True)
                path.symlink_to(target)
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
        raise


def show_pictures(trainer: L.Trainer) -> bool:
    """Whether any logger does."""
    return any(isinstance(logger, WandbLogger | TensorBoardLogger) for logger in trainer.loggers)


def log_picture(trainer: L.Trainer, name: str, picture: Image.Image) -> None:
    """Log a picture to every logger that shows pictures, at the step of the metrics of the same validation."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], logged_step(trainer))
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(picture), logged_step(trainer), dataformats="HWC")


def log_values(trainer: L.Trainer, name: str, values: Mapping[str, Any]) -> None:
    """Plain values that describe the run: W&B's configuration under `name`, TensorBoard's text of that name."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.config.update({name: dict(values)}, allow_val_change=True)
        elif isinstance(logger, TensorBoardLogger):
            text = json.dumps(values, indent=2, default=str)
            # Indented text is code in Markdown, and keeps its lines.
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

    values: dict[str, Any] = {}
    for name, key in HPARAMS.items():
        node: Any = settings
        for part in key.split("."):
            node = (node or {}).get(part)
        if node is not None:
            values[name] = node.rpartition(".")[2] if key.endswith("_target_") else node
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for summary in hparams(values, {"val/loss": 0}):  # type: ignore[no-untyped-call]
                logger.experiment.file_writer.add_summary(summary)


def log_table(trainer: L.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """A table whose cells may be pictures. Only W&B has such."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            with kept_in_its_folder(logger.experiment):
                logger.log_metrics({name: wandb_table(columns, rows)}, trainer.global_step)


@contextmanager
def kept_in_its_folder(run: Any) -> Iterator[None]:
    """Have what W&B lays aside to send later, such as a table's pictures, lie in an offline run, not in the home."""
    if not run.offline or "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(Path(run.dir).parent)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def wandb_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Any:
    import wandb

    data = [[wandb.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows]
    return wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)


def log_model(trainer: L.Trainer, path: Path, metadata: Mapping[str, Any]) -> None:
    """A file as W&B's artifact of the run's model, "best" by alias. Of offline runs the file stays where it is."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            artifact = wandb.Artifact(f"model-{logger.experiment.id}", type="model", metadata=dict(metadata))
            artifact.add_file(str(path.resolve()), policy="immutable")  # which copies nothing
            with kept_in_its_folder(logger.experiment):
                logger.experiment.log_artifact(artifact, aliases=["best"])


def log_comparison(
    rows: Sequence[Mapping[str, Cell]],
    project: str,
    group: str,
    directory: Path,
    entity: str | None = None,
    offline: bool = True,
) -> str:
    """Runs of a sweep as one table, `comparison`, of a W&B run of its own in the sweep's group; returns its id.

    Each row maps columns to values; what a row lacks is left empty. Offline the run lies in `directory`/wandb.
    """
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
        with kept_in_its_folder(run):
            run.log({"comparison": wandb_table(columns, [[row.get(name) for name in columns] for row in rows])})
        return str(run.id)


def finish(trainer: L.Trainer) -> None:
    """Have the loggers of a run write what they still hold, and end W&B's run, which else would be the next one's."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.close()
        elif isinstance(logger, WandbLogger):
            import wandb

            wandb.finish()
