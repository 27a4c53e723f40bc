"""Find the run that `resume=...` names and the overrides that started it."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from hydra.errors import HydraException

from src.config.output import OUTPUT_OVERRIDE
from src.config.overrides import check_overrides
from src.config.search_path import CONF
from src.config.words import key_of, last_value, parsed
from src.data import PATH_KEYS
from src.errors import UsageError, first_line, format_override, near_matches, quoted, shell_word

NAME_KEYS = (
    *(f"data.{name}" for name in ("columns", "condition_columns", "label", "types", "transforms")),
    *(f"data.source.{name}_column" for name in ("file", "image", "label", "caption")),
    *(f"data.source.{name}" for name in ("class_pattern", "condition_columns", "channel_pattern", "channel_names")),
    *("data.source.image_key", "data.source.label_key", "data.source.caption_key"),
)
"""Settings with names of columns, formats of dates and patterns, which may look like paths."""
CACHE_KEYS = ("data.cache_dir", "autoencoder.cache_dir")
"""Folders to write to, which a resumed run takes from its own command line only."""
RESUME_OVERRIDE = re.compile(r"[+\s]*(resume|trust)\s*=")
"""Overrides that select a run without describing it."""

CHOICE = re.compile(r"\w*|\[[\w,]*\]")
"""Names of options under conf/."""

NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?"

NUMBER_OR_SWITCH = re.compile(rf"|{NUMBER}|\[{NUMBER}(, *{NUMBER})*\]|true|false|null", re.IGNORECASE)

WANDB_LOG = re.compile(r"wandb/[^/]*run-[^/]*/logs/debug-core\.log")
"""The link that W&B creates in a run's folder, at each start, to its log in the user's cache."""


def expand_resume(overrides: list[str]) -> list[str]:
    """Replace `resume=DIR` by the overrides of the run in DIR, then the typed ones, and DIR as the run folder.

    `resume=auto` selects the unfinished run that the same overrides started, or starts a new run if there is none.
    """
    folder = last_value(overrides, "resume")
    if folder is None:
        return overrides
    if folder == "auto":
        overrides = [o for o in overrides if key_of(o) != "resume"]
        if (folder := unfinished_run(overrides)) is None:
            return overrides
        overrides = [*overrides, f"resume={_quoted(folder)}"]
    if not (Path(folder) / ".hydra" / "overrides.yaml").is_file():
        inside = next((each for each in Path(folder).parents if (each / ".hydra" / "overrides.yaml").is_file()), None)
        hint = f"; type {format_override('resume', inside)}" if inside else newest_run("resume", Path(folder))
        if folder in ("True", "last", "latest"):  # of other libraries
            hint = "; type resume=auto"
        hint = hint or "; name a folder with .hydra and checkpoints"
        raise UsageError(f"{format_override('resume', Path(folder).resolve())} has no run to resume{hint}")
    before = saved_overrides(Path(folder))
    if last_value(overrides, "trust") != "True":
        before = [o for o in before if key_of(o) not in CACHE_KEYS]
        check_saved(Path(folder), before)
    named = last_value(overrides, "hydra.run.dir")
    if named is not None and Path(named).resolve() != Path(folder).resolve():
        raise UsageError(
            f"{format_override('hydra.run.dir', named)} is not the folder of the resumed run, {folder}; leave it out"
        )
    now = [o for o in overrides if key_of(o) != "hydra.run.dir"]
    return [*(o for o in before if o not in now), *now, f"hydra.run.dir={_quoted(folder)}"]


def explain_resume(
    error: UsageError, command: str, typed: Sequence[str], expanded: Sequence[str], added: Sequence[str]
) -> UsageError:
    """Return the error of `expanded` overrides, which `expand_resume` made of the `typed` ones, in terms of `typed`."""
    folder = last_value(expanded, "resume")
    if folder in (None, "auto") or command != "train":
        return error
    saved = Path(str(folder))
    own = [o for o in typed if key_of(o) not in ("resume", "trust", "hydra.run.dir")]
    if alone := _refusal(command, own, added):
        return alone
    if _refusal(command, saved_overrides(saved), added) is None:
        why, repeats = str(error).partition(";")[0], format_override("resume", saved)
        return UsageError(f"{' '.join(own)} does not fit the settings that {repeats} repeats ({why}); leave it out")
    if missing := [folder for folder in _recorded_folders(saved) if f"file://{folder}" not in added]:
        return UsageError(f"{error}; the run was started with --config-dir {shell_word(missing[0])}: add it")
    return error


def _refusal(command: str, overrides: Sequence[str], added: Sequence[str]) -> UsageError | None:
    """Return the error of overrides that `check_overrides` refuses."""
    try:
        check_overrides(command, overrides, added=added)
    except UsageError as error:
        return error
    return None


def _recorded_folders(run: Path) -> list[str]:
    """Return the user's config folders that Hydra recorded for a run."""
    try:
        sources = yaml.safe_load((run / ".hydra" / "hydra.yaml").read_text())["hydra"]["runtime"]["config_sources"]
        folders = [str(source["path"]) for source in sources if source["schema"] == "file"]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):  # written by hand
        return []
    return [folder for folder in folders if Path(folder) != CONF and folder.isprintable()]


def expand_sweep(overrides: list[str]) -> list[str]:
    """Replace `resume=auto` of a sweep by the folder of the newest sweep that the same overrides started.

    Each job then finds out whether it is finished, started or new (`runs.resolve.finished_job`).
    """
    if swept := next((each for each in overrides if key_of(each) == "resume" and "," in each), None):
        raise UsageError(f"{swept} must be one run, whose settings it then has; resume each by a command of its own")
    if (folder := last_value(overrides, "resume")) is None:
        return overrides
    if folder != "auto":
        raise UsageError(
            f"{format_override('resume', folder)} must be auto for a sweep; select one with hydra.sweep.dir=FOLDER"
        )
    if last_value(overrides, "hydra.sweep.dir") is not None:
        return overrides
    for saved in sorted(Path("outputs/sweeps").glob("*/multirun.yaml"), reverse=True):
        try:
            # plain YAML: OmegaConf would resolve `${...}`.
            before = yaml.safe_load(saved.read_text())["hydra"]["overrides"]
            typed_overrides = {*before["task"], *before["hydra"]}
        except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):  # a sweep killed while it started
            continue
        if _describing(typed_overrides) == _describing(overrides):
            return [*overrides, f"hydra.sweep.dir={_quoted(str(saved.parent))}"]
    return overrides


def _describing(overrides: Iterable[str]) -> set[str]:
    """Return the overrides that neither select a run or sweep nor say where it writes."""
    where = re.compile(rf"{RESUME_OVERRIDE.pattern}|{OUTPUT_OVERRIDE.pattern}|hydra\.sweep\.dir=|hydra\.mode=")
    return {override for override in overrides if not where.match(override)}


def unfinished_run(overrides: Sequence[str]) -> str | None:
    """Return the folder in hydra.run.dir, or the newest unfinished run under outputs/train with the same overrides.

    Returns None if it holds no checkpoint.
    """
    named = last_value(overrides, "hydra.run.dir")
    folders = [Path(named)] if named else sorted(Path("outputs/train").glob("*/"), reverse=True)
    for folder in folders:
        saved = folder / ".hydra" / "overrides.yaml"
        if not (saved.is_file() and any((folder / "checkpoints").glob("*.ckpt"))):
            continue
        same = _describing(saved_overrides(folder)) == _describing(overrides)
        if named or (same and not (folder / "metrics.json").exists()):
            return str(folder)
    return None


def saved_overrides(folder: Path) -> list[str]:
    """Return the overrides of the run in `folder`, without `resume` and `trust`."""
    path = folder / ".hydra" / "overrides.yaml"
    try:
        lines = yaml.safe_load(path.read_text())  # plain YAML: OmegaConf would resolve `${...}`
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read ({first_line(error)}); start a new run") from error
    if isinstance(lines, list) and all(isinstance(line, str) for line in lines):
        lines = [line for line in lines if not RESUME_OVERRIDE.match(line)]
        if all(line.isprintable() for line in lines):
            return lines
    raise UsageError(f"{path} must be a list of overrides, as Hydra writes it; start a new run")


def check_saved(folder: Path, overrides: Sequence[str]) -> None:
    """Raise UsageError for saved overrides that could do more than train in the run folder; the files are untrusted.

    `runs.build` checks the targets that they build.
    """
    remedy = f"; add trust=true if you started {folder} yourself, or start a new run"
    for line in overrides:
        try:
            override = parsed(line)
        except HydraException as error:
            raise UsageError(f"{folder} contains {line!r:.100}, which is not an override{remedy}") from error
        key, value = override.key_or_group, line.partition("=")[2]
        if re.match(r"hydra\b|run_dir\b", key) or override.package is not None:
            what = "sets where or how a run starts"
        elif "${" in value:
            what = "OmegaConf would resolve"
        elif re.match(r"(callbacks|logger)\b", key) and not (NUMBER_OR_SWITCH if "." in key else CHOICE).fullmatch(
            value
        ):
            what = "may set where a run writes or logs"
        elif key not in (*PATH_KEYS, *NAME_KEYS, "schedule.betas", "conditioning.encode.model") and re.search(
            r"[/\\]|\.\.", value
        ):
            what = "may be a path to write to"
        else:
            continue
        raise UsageError(f"{folder} contains {line!r:.100}, which {what}{remedy}")
    for path in folder.rglob("*"):
        if WANDB_LOG.fullmatch(path.relative_to(folder).as_posix()):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{path} links out of the run's folder{remedy}")


def _quoted(folder: str) -> str:
    return quoted(str(Path(folder).resolve()))


def check_writable(overrides: Sequence[str]) -> None:
    """Create the typed output folder. Raises UsageError if that fails."""
    for name in ("hydra.run.dir", "hydra.sweep.dir"):
        folder = last_value(overrides, name)
        if folder is not None and "${" not in folder:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"{format_override(name, folder)} cannot be created ({error.strerror}); choose a writable folder"
                ) from error


def check_unused(overrides: Sequence[str], multirun: bool = False) -> None:
    """Raise UsageError if the typed folder holds a run or a sweep, whose files Hydra would overwrite."""
    name, kind = ("hydra.sweep.dir", "sweep") if multirun else ("hydra.run.dir", "run")
    folder = last_value(overrides, name)
    own_names = multirun and last_value(overrides, "hydra.sweep.subdir") is not None  # of the folders of its jobs
    if folder is None or last_value(overrides, "resume") is not None or own_names:
        return
    run, how = (Path(folder) / "0", "auto") if multirun else (Path(folder), folder)
    if any((run / "checkpoints").glob("*.ckpt")):
        raise UsageError(
            f"{format_override(name, folder)} already holds a {kind}; continue it with "
            f"{format_override('resume', how)}, or choose another folder"
        )


def newest_run(name: str, folder: Path) -> str:
    """Return the end of an error: the newest run at most two folders below `folder`, as an override; perhaps empty."""
    found = [path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/checkpoints/*.ckpt")]
    if not found:
        return ""
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    value = {"ckpt": newest, "runs": [newest.parents[1]]}.get(name, newest.parents[1])
    return f"; the newest run in {folder} is {format_override(name, value)}"


def path_hint(path: Path, name: str, pattern: str) -> str:
    """Return the end of an error: the file next to `path` with the most similar name; empty if there is none."""
    close = near_matches(path.name, [each.name for each in path.parent.glob(pattern)])
    return f"; did you mean {format_override(name, path.parent / close[0])}?" if close else ""
