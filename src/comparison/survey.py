"""Find the runs to compare."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from src.comparison.grouping import RunRecord, data_of, with_shared_paths, without_repeats
from src.config.resume import newest_run, saved_overrides
from src.errors import UsageError, format_override
from src.runs.autoencoder import is_autoencoder
from src.runs.checkpoints import find_checkpoint, flatten_settings, has_averages
from src.runs.latents import has_autoencoder
from src.training.checkpoints import read_checkpoint


class SurveyedRun(NamedTuple):
    """A finished run with an intact checkpoint."""

    record: RunRecord
    checkpoint: Path
    settings: dict[str, Any]  # nested settings from the checkpoint
    folder: Path
    averaged: bool  # whether the checkpoint has averaged weights


def run_folders(paths: Sequence[str]) -> list[Path]:
    """Return the run folders at these paths; for a sweep's folder those of its jobs, by number.

    Raises ValueError or FileNotFoundError for a path without runs.
    """
    if not paths or not all(str(path).strip() for path in paths):
        raise ValueError(
            f"{format_override('runs', list(paths or ()))} must name folders of runs under outputs/train, or of a "
            "sweep under outputs/sweeps" + newest_run("runs", Path("outputs"))
        )
    folders: list[Path] = []
    for folder in map(Path, paths):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder.resolve()}: name folders of runs or sweeps")
        inside = [folder]
        if not is_run(folder):
            inside = sorted(
                filter(is_run, folder.iterdir()), key=lambda job: (job.name.isdecimal() and int(job.name), job.name)
            )
        if not inside:
            hint = newest_run("runs", folder) or ": name folders of runs or sweeps"
            raise ValueError(f"no run in {folder}{hint}")
        folders += inside
    return list({folder.resolve(): folder for folder in folders}.values())


def is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir() or (folder / "train.log").is_file()


def survey(folders: Sequence[Path]) -> tuple[list[SurveyedRun], list[str]]:
    """Return the runs that can be compared, and a line for each skipped one."""
    runs: dict[str, SurveyedRun] = {}
    notes = []
    for folder in folders:
        if not (folder / "metrics.json").is_file():
            notes.append(f"{folder}: unfinished, without metrics.json")
            continue
        try:
            metrics = json.loads((folder / "metrics.json").read_text())
            if metrics.get("val/loss", 0.0) is None:
                raise ValueError("training diverged, val/loss is not finite")
            checkpoint = find_checkpoint(str(folder), None)
            contents = read_checkpoint(checkpoint)
            settings, averaged = contents["hyper_parameters"], has_averages(contents)
            if is_autoencoder(settings):
                raise ValueError("an autoencoder, which draws no samples")
            del contents  # the weights
        except (OSError, ValueError) as error:
            notes.append(f"{folder}: {' '.join(str(error).split())}")
            continue
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        typed_overrides, choices = saved_choices(folder)
        record = RunRecord(
            name=str(folder),
            seed=settings.get("seed", 0),
            settings=flatten_settings(settings),
            values={k: v for k, v in numbers.items() if k.startswith("val/")},
            choices=choices,
            typed_overrides=typed_overrides,
            costs={k: v for k, v in numbers.items() if not k.startswith("val/")},
        )
        runs[record.name] = SurveyedRun(record, checkpoint, settings, folder, averaged)
    kept, repeats = without_repeats(with_shared_paths([run.record for run in runs.values()]))
    notes += [f"{old.name}: same settings and seed as {new.name}" for old, new in repeats]
    return [runs[record.name]._replace(record=record) for record in kept], notes


def saved_choices(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names of a run's overrides, and the chosen file of each config group; empty if not saved."""
    try:
        typed_overrides = [line.lstrip("+~").partition("=")[0] for line in saved_overrides(folder)]
        saved = yaml.safe_load((folder / ".hydra" / "hydra.yaml").read_text())
        choices = saved["hydra"]["runtime"]["choices"]
        return typed_overrides, {k: str(v) for k, v in choices.items() if "/" not in k and k not in ("sweep", "logger")}
    except (UsageError, OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return [], {}


def check_same_data(runs: Sequence[SurveyedRun], with_root: bool) -> None:
    """Raise ValueError if the runs were trained on different data, since their metrics are not comparable."""
    first = data_of(runs[0].record.settings, with_root)
    for run in runs[1:]:
        other = data_of(run.record.settings, with_root)
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"data.{name} must be equal in all runs, but is {first.get(name)} in {runs[0].folder} and "
                    f"{other.get(name)} in {run.folder}: compare them separately"
                    + (", or add data.root=FOLDER if both places hold the same data" if name == "root" else "")
                )


def check_autoencoder(runs: Sequence[SurveyedRun], autoencoder: str | None) -> None:
    """Raise ValueError if `autoencoder` names one and no run has latents."""
    if autoencoder is not None and not any(has_autoencoder(run.settings) for run in runs):
        raise ValueError(f"{format_override('autoencoder', autoencoder)} needs a run in latents; leave it out")


def find_wandb(runs: Sequence[SurveyedRun]) -> dict[str, Any]:
    """Return the W&B settings of the first run that was logged there. Raises ValueError if none was."""
    for run in runs:
        if settings := (run.settings.get("logger") or {}).get("wandb"):
            return dict(settings)
    raise ValueError("wandb=true needs a run that was trained with logger=wandb; leave it out")
