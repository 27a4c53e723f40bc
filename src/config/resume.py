"""Find the run that `resume=...` names and the overrides that it was started with."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from src.config.output import OUTPUT_OVERRIDE
from src.config.overrides import key_of, last_value
from src.errors import UsageError, first_line
from src.quoting import format_override, quoted

PATH_KEYS = ("data.root", "data.path", "data.source.labels")
"""Settings that name files which are read, never written."""
RESUME_OVERRIDE = re.compile(r"[+\s]*(resume|trust)\s*=")
"""Overrides that say how a run goes on, not what it is."""

CHOICE = re.compile(r"\w*|\[[\w,]*\]")
"""Of files under conf/, by their names."""

NUMBER_OR_SWITCH = re.compile(r"|[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|true|false|null", re.IGNORECASE)


def expand_resume(overrides: list[str]) -> list[str]:
    """`resume=DIR` stands for the overrides of the run in DIR, what else is typed, and DIR as its run folder.

    `resume=auto` is the unfinished run that was started with just what is typed, and nothing if there is none.
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
        hint = newest_run("resume", Path(folder)) or ": give a folder that holds .hydra and checkpoints"
        raise UsageError(f"no run to resume in {Path(folder).resolve()}{hint}")
    before = saved_overrides(Path(folder))
    if last_value(overrides, "trust") != "True":
        check_saved(Path(folder), before)
    named = last_value(overrides, "hydra.run.dir")
    if named is not None and Path(named).resolve() != Path(folder).resolve():
        raise UsageError(
            f"{format_override('hydra.run.dir', named)} is not the folder of the resumed run, {folder}; leave it out"
        )
    now = [o for o in overrides if key_of(o) != "hydra.run.dir"]
    return [*(o for o in before if o not in now), *now, f"hydra.run.dir={_quoted(folder)}"]


def expand_sweep(overrides: list[str]) -> list[str]:
    """Of a sweep, `resume=auto` stands for the folder of the newest one that was started with what is typed.

    Its jobs then look for themselves which of them are finished, begun or still to do (`checkpoints.resume_job`).
    """
    if (folder := last_value(overrides, "resume")) is None:
        return overrides
    if folder != "auto":
        raise UsageError("a sweep goes on by resume=auto, with hydra.sweep.dir=... if it is not the newest of its kind")
    if last_value(overrides, "hydra.sweep.dir") is not None:
        return overrides
    for saved in sorted(Path("outputs/sweeps").glob("*/multirun.yaml"), reverse=True):
        try:
            # Not by OmegaConf, which would look `${...}` up.
            before = yaml.safe_load(saved.read_text())["hydra"]["overrides"]
            typed_overrides = {*before["task"], *before["hydra"]} - {"hydra.mode=MULTIRUN"}
        except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):  # of a sweep that died as it began
            continue
        of_place = "hydra.sweep.dir="
        if {
            o
            for o in typed_overrides
            if not (RESUME_OVERRIDE.match(o) or OUTPUT_OVERRIDE.match(o) or o.startswith(of_place))
        } == {o for o in overrides if not (RESUME_OVERRIDE.match(o) or OUTPUT_OVERRIDE.match(o))}:
            return [*overrides, f"{of_place}{_quoted(str(saved.parent))}"]
    return overrides


def unfinished_run(overrides: Sequence[str]) -> str | None:
    """The folder named by hydra.run.dir, else the newest under outputs/train that had these overrides and no end.

    None if it holds no checkpoint, so that there is nothing to go on from.
    """
    named = last_value(overrides, "hydra.run.dir")
    folders = [Path(named)] if named else sorted(Path("outputs/train").glob("*/"), reverse=True)
    for folder in folders:
        saved = folder / ".hydra" / "overrides.yaml"
        if not (saved.is_file() and any((folder / "checkpoints").glob("*.ckpt"))):
            continue
        typed_overrides = {o for o in overrides if not RESUME_OVERRIDE.match(o)}
        if named or (set(saved_overrides(folder)) == typed_overrides and not (folder / "metrics.json").exists()):
            return str(folder)
    return None


def saved_overrides(folder: Path) -> list[str]:
    """What was typed for the run in `folder`, but for what it resumed and whether that was trusted."""
    path = folder / ".hydra" / "overrides.yaml"
    try:
        lines = yaml.safe_load(path.read_text())  # as it stands: OmegaConf would look up what is in ${...}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read ({first_line(error)}): start a new run") from error
    if isinstance(lines, list) and all(isinstance(line, str) for line in lines):
        lines = [line for line in lines if not RESUME_OVERRIDE.match(line)]
        if all(line.isprintable() for line in lines):
            return lines
    raise UsageError(f"{path} is not the list of overrides that Hydra writes: start a new run")


def check_saved(folder: Path, overrides: Sequence[str]) -> None:
    """Raise UsageError if going on with the run could do more than train in its folder, since it may be a stranger's.

    What is built is held against conf/ when it is known (`runs.build`).
    """
    remedy = f": add trust=true if you started {folder} yourself, else start a new run"
    for line in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([line])
        except HydraException as error:
            raise UsageError(f"{folder} was started with {line!r:.100}, which is no override{remedy}") from error
        key, value = override.key_or_group, line.partition("=")[2]
        if re.match(r"hydra\b|run_dir\b", key) or override.package is not None:
            what = "says how and where to start"
        elif "${" in value:
            what = "would be looked up"
        elif re.match(r"(callbacks|logger)\b", key) and not (NUMBER_OR_SWITCH if "." in key else CHOICE).fullmatch(
            value
        ):
            what = "may say where to write, or to whom"
        elif key not in (*PATH_KEYS, "schedule.betas", "conditioning.encode.model") and re.search(r"[/\\]|\.\.", value):
            what = "may be a path to write to"
        else:
            continue
        raise UsageError(f"{folder} was started with {line!r:.100}, which {what}{remedy}")
    for path in folder.rglob("*"):
        if is_wandb_log(path.relative_to(folder)):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{path} leads out of the run's folder{remedy}")


def is_wandb_log(path: Path) -> bool:
    """Whether a path in a run's folder is W&B's own link to its log in the user's cache.

    W&B makes it at each start, in a new folder, and writes nothing through it.
    """
    return len(path.parts) == 4 and path.match("wandb/*run-*/logs/debug-core.log")


def _quoted(folder: str) -> str:
    return quoted(str(Path(folder).resolve()))


def check_writable(overrides: Sequence[str]) -> None:
    """Make the folder that is named for the run. Raises UsageError if it cannot be made."""
    for name in ("hydra.run.dir", "hydra.sweep.dir"):
        folder = last_value(overrides, name)
        if any(key_of(o) == name and "\\${" in o for o in overrides):
            raise UsageError(f"{name}={folder} holds ${{, which Hydra would look up: choose another folder")
        if folder is not None and "${" not in folder:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"{format_override(name, folder)} cannot be created ({error.strerror}); choose a writable folder"
                ) from error


def check_unused(overrides: Sequence[str], multirun: bool = False) -> None:
    """Raise UsageError if the folder that is named is a run already, or a sweep whose first job is one.

    Hydra would write over what that one was told.
    """
    name, kind = ("hydra.sweep.dir", "sweep") if multirun else ("hydra.run.dir", "run")
    folder = last_value(overrides, name)
    if folder is None or last_value(overrides, "resume") is not None:
        return
    if multirun and last_value(overrides, "hydra.sweep.subdir") is not None:  # its jobs lie elsewhere
        return
    run, how = (Path(folder) / "0", "auto") if multirun else (Path(folder), folder)
    if any((run / "checkpoints").glob("*.ckpt")):
        raise UsageError(
            f"{folder} already holds a {kind}: go on with {format_override('resume', how)}, or choose another folder"
        )


def newest_run(name: str, folder: Path) -> str:
    """Return the end of an error: the newest run in a folder that is none itself, as the setting `name` takes it.

    Empty if there is none, at most two folders down.
    """
    found = [path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/checkpoints/*.ckpt")]
    if not found:
        return ""
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    value = {"ckpt": newest, "runs": [newest.parents[1]]}.get(name, newest.parents[1])
    return f"; the newest run in {folder} is {format_override(name, value)}"


def _nearest(path: Path, name: str, pattern: str) -> str:
    """Return the end of an error: what lies beside `path` and has nearly its name; empty if nothing has."""
    close = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob(pattern)], n=1)
    return f"; did you mean {format_override(name, path.parent / close[0])}?" if close else ""
