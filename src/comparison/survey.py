"""Find the runs that a comparison covers."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from src.comparison.statistics import Record, data_of, flat, without_repeats
from src.config.resume import newest_run, saved_overrides
from src.errors import UsageError
from src.runs.checkpoints import find_checkpoint
from src.training.checkpoints import read_checkpoint

if TYPE_CHECKING:
    pass


class SurveyedRun(NamedTuple):
    """A run that is to be compared."""

    record: Record
    checkpoint: Path
    settings: dict[str, Any]
    """As the checkpoint has them, nested."""
    folder: Path


def run_folders(named: Sequence[str]) -> list[Path]:
    """The run folders that are named; for a sweep's folder those of its jobs, by number."""
    if not named:
        raise ValueError(
            "name runs to compare: folders under outputs/train, or of a sweep under outputs/sweeps"
            + newest_run("runs", Path("outputs"))
        )
    folders: list[Path] = []
    for name in named:
        if not str(name).strip():
            raise ValueError("runs=[''] names no folder: give folders of runs or of sweeps")
        folder = Path(str(name))
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder.resolve()}: give folders of runs or of sweeps")
        inside = [folder] if is_run(folder) else sorted(filter(is_run, folder.iterdir()), key=_by_number)
        if not inside:
            hint = newest_run("runs", folder) or ": give folders of runs or of sweeps"
            raise ValueError(f"{folder} is no run and holds none{hint}")
        folders += inside
    return list({folder.resolve(): folder for folder in folders}.values())


def is_run(folder: Path) -> bool:
    """Whether a run was started in this folder."""
    return (folder / "checkpoints").is_dir() or (folder / "train.log").is_file()


def _by_number(folder: Path) -> tuple[float, str]:
    return (int(folder.name) if folder.name.isdecimal() else math.inf, folder.name)


def survey(folders: Sequence[Path]) -> tuple[list[SurveyedRun], list[str]]:
    """The runs that can be compared, and a line for each that is left out."""
    found: dict[str, SurveyedRun] = {}
    notes = []
    for folder in folders:
        try:
            metrics = json.loads((folder / "metrics.json").read_text())
        except FileNotFoundError:
            notes.append(f"{folder}: unfinished, it has no metrics.json")
            continue
        except (OSError, ValueError) as error:
            notes.append(f"{folder}: its metrics.json cannot be read ({' '.join(str(error).split())})")
            continue
        if not isinstance(metrics, dict) or metrics.get("val/loss", 0.0) is None:
            notes.append(f"{folder}: training diverged, val/loss is not finite")
            continue
        try:
            checkpoint = find_checkpoint(str(folder), None)
            settings = read_checkpoint(checkpoint)["hyper_parameters"]
        except (OSError, ValueError) as error:
            notes.append(" ".join(str(error).split()))
            continue
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        typed_overrides, choices = asked_for(folder)
        record = Record(
            name=str(folder),
            seed=settings.get("seed", 0),
            settings=flat(settings),
            values={k: v for k, v in numbers.items() if k.startswith("val/")},
            choices=choices,
            typed_overrides=typed_overrides,
            costs={k: v for k, v in numbers.items() if not k.startswith("val/")},
        )
        found[record.name] = SurveyedRun(record, checkpoint, settings, folder)
    kept, repeats = without_repeats([run.record for run in found.values()])
    notes += [f"{old.name}: {new.name} has the same settings and seed, and a seed counts once" for old, new in repeats]
    return [found[record.name] for record in kept], notes


def asked_for(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of what was typed for a run, and the files chosen of the groups of conf/, as far as it says so."""
    try:
        typed_overrides = [line.lstrip("+~").partition("=")[0] for line in saved_overrides(folder)]
        saved = yaml.safe_load((folder / ".hydra" / "hydra.yaml").read_text())
        choices = saved["hydra"]["runtime"]["choices"]
        return typed_overrides, {k: str(v) for k, v in choices.items() if "/" not in k and k not in ("sweep", "logger")}
    except (UsageError, OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return [], {}


def check_data(found: Sequence[SurveyedRun], with_root: bool) -> None:
    """Raise ValueError if the runs are on different data, against which no figures can be compared."""
    first = data_of(found[0].record.settings, with_root)
    for run in found[1:]:
        other = data_of(run.record.settings, with_root)
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"the runs are on different data, whose figures cannot be compared: data.{name} is "
                    f"{first.get(name)} in {found[0].folder} and {other.get(name)} in {run.folder}; compare those apart"
                    + (", or give data.root=... if it is the same data in two places" if name == "root" else "")
                )


def wandb_of(found: Sequence[SurveyedRun]) -> dict[str, Any]:
    """Where the first of the runs that was logged by W&B is. Raises ValueError if none was."""
    for run in found:
        if settings := (run.settings.get("logger") or {}).get("wandb"):
            return dict(settings)
    raise ValueError("wandb=true logs the tables where the runs are, and none of them was logged by W&B: leave it out")
