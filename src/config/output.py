"""Defer the output of a command until everything is built.

Hydra writes `.hydra/` and opens the job's log before it calls the task. A command that the task rejects would
therefore have changed the run that it should resume. `defer_output` makes Hydra write neither, and `start_output`
writes both.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from src.distributed.ranks import rank, record_missing_dirs
from src.errors import UsageError, first_line

OUTPUT_OVERRIDE = re.compile(r"[+~]*hydra[./](output_subdir|job_logging)\b")
"""Overrides that control Hydra's files in the output folder."""
NO_OUTPUT = ("hydra.output_subdir=null", "hydra/job_logging=none")
"""Overrides that disable Hydra's output."""


class DeferredOutput(NamedTuple):
    """The output that Hydra's settings request. Launchers send it to their workers."""

    output_subdir: str | None
    job_logging: dict[str, Any]
    """With interpolations unresolved."""
    overrides: list[str]
    """The typed overrides of these settings."""


class PendingOutput(NamedTuple):
    """The output of the running job, until `start_output` writes it."""

    subdir: str | None
    texts: dict[str, str]
    """Contents of the files in `subdir`, by name."""
    job_logging: DictConfig
    verbose: Any
    lines: MemoryHandler
    """The log so far."""


_pending: PendingOutput | None = None


def defer_output(cfg: DictConfig, overrides: Sequence[str], multirun: bool) -> tuple[list[str], DeferredOutput, Path]:
    """Return overrides with which Hydra writes no output, the output that it would write, and the output folder.

    `cfg` is the composed configuration with Hydra's node. Records which of the output folder and its parents are
    missing. Raises UsageError if the name of the folder cannot be resolved.
    """
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)  # the folder's name may contain `${hydra:...}`
    try:
        folder = str(cfg.hydra.sweep.dir if multirun else cfg.hydra.run.dir)
    except OmegaConfBaseException as error:
        setting = "hydra.sweep.dir" if multirun else "hydra.run.dir"
        raise UsageError(f"{setting} cannot be resolved ({first_line(error)}); name a folder") from error
    finally:
        HydraConfig.instance().cfg = before
    record_missing_dirs(Path(folder))
    job_logging = OmegaConf.to_container(cfg.hydra.job_logging, resolve=False)
    assert isinstance(job_logging, dict)
    own = [o for o in overrides if OUTPUT_OVERRIDE.match(o)]
    kept = [o for o in overrides if not OUTPUT_OVERRIDE.match(o)]
    deferred = DeferredOutput(cfg.hydra.output_subdir, {str(key): value for key, value in job_logging.items()}, own)
    return [*kept, *NO_OUTPUT], deferred, Path(folder)


def store_output(deferred: DeferredOutput, cfg: DictConfig) -> None:
    """Restore Hydra's output settings, log only to the console, and store the rest for `start_output`."""
    global _pending
    settings: Any = HydraConfig.get()
    with read_write(settings), open_dict(settings):
        settings.output_subdir = deferred.output_subdir
        settings.job_logging = deferred.job_logging
        settings.overrides.hydra = [
            *(o for o in settings.overrides.hydra if o not in NO_OUTPUT),
            *deferred.overrides,
        ]
    job_logging: Any = OmegaConf.create(OmegaConf.to_container(settings.job_logging, resolve=True))
    configure_log(without_files(job_logging), settings.verbose)
    if rank() > 0:  # the first process writes for all
        return
    lines = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    logging.getLogger().addHandler(lines)
    texts = {
        "config.yaml": OmegaConf.to_yaml(cfg),  # the task may change it later
        "hydra.yaml": OmegaConf.to_yaml(HydraConfig.instance().cfg),
        "overrides.yaml": OmegaConf.to_yaml(settings.overrides.task),
    }
    _pending = PendingOutput(deferred.output_subdir, texts, job_logging, settings.verbose, lines)


def without_files(job_logging: DictConfig) -> DictConfig:
    """Return a logging configuration without the handlers that write files."""
    plain: Any = OmegaConf.to_container(job_logging)
    files = {name for name, handler in (plain.get("handlers") or {}).items() if "filename" in handler}
    for node in (plain.get("root"), *(plain.get("loggers") or {}).values()):
        if node and node.get("handlers"):
            node["handlers"] = [name for name in node["handlers"] if name not in files]
    plain["handlers"] = {name: h for name, h in (plain.get("handlers") or {}).items() if name not in files}
    made: DictConfig = OmegaConf.create(plain)
    return made


def start_output(folder: Path) -> Path:
    """Create the output folder of a command, write `.hydra/` and open the log. Does nothing in other processes."""
    global _pending
    if rank() > 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if _pending is None:
        return folder
    pending, _pending = _pending, None
    if pending.subdir is not None:
        write_texts(folder / pending.subdir, pending.texts)
    logging.getLogger().removeHandler(pending.lines)
    configure_log(pending.job_logging, pending.verbose)
    files = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
    for line in pending.lines.buffer:
        for handler in files:
            handler.handle(line)
    return folder


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files by name and replace the old ones once all are on disk. Leaves no files if that fails."""
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    partials = {folder / f".{name}.partial": folder / name for name in texts}
    try:
        for partial, path in partials.items():
            partial.write_text(texts[path.name], encoding="utf-8")
        for partial, path in partials.items():
            os.replace(partial, path)
    except BaseException:
        if existed:
            for partial in partials:
                partial.unlink(missing_ok=True)
        else:
            shutil.rmtree(folder)
        raise


def discard_output() -> None:
    """Discard the output of a rejected job."""
    global _pending
    _pending = None
    close_log()


def close_log() -> None:
    """Close the job's log file if one is open."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, logging.FileHandler | MemoryHandler)]:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def preserve_sweep(sweep: Path, subdir: str | None) -> Iterator[None]:
    """Run a sweep in the folder `sweep`; restore the folder's own files if no job started.

    Hydra writes `multirun.yaml` before the first job, so the file of an earlier start is moved away first.
    """
    if rank() > 0:
        yield
        return
    file, aside = sweep / "multirun.yaml", sweep / ".multirun.yaml.before"
    if existed := file.is_file():
        os.replace(file, aside)
    jobs = _start_times(sweep, subdir)
    try:
        yield
    finally:
        started = _start_times(sweep, subdir) != jobs
        if existed and started and file.is_file():
            aside.unlink()
        elif existed:
            os.replace(aside, file)
        elif not started and sweep.is_dir() and all(path.is_file() for path in sweep.iterdir()):
            for path in [file, *sweep.glob(".worker_*")]:
                path.unlink(missing_ok=True)


def _start_times(sweep: Path, subdir: str | None) -> dict[Path, int]:
    """Return when each job of a sweep last started."""
    files = sweep.rglob(f"{subdir or '.hydra'}/overrides.yaml")
    return {path: path.stat().st_mtime_ns for path in files}


def relative(path: Path) -> Path:
    """Return `path` relative to the folder in which the command was typed, if it is below it."""
    here = Path(HydraConfig.get().runtime.cwd) if HydraConfig.initialized() else Path.cwd()
    return path.absolute().relative_to(here) if path.absolute().is_relative_to(here) else path.absolute()
