"""The output folder of a command: nothing is written into it before everything is built.

Hydra writes `.hydra/` and opens the job's log before it calls the task, so a command that the task refuses would
already have changed a run that it was to resume. Here Hydra is told to write neither, and `begin` writes both once
nothing can be refused any more.
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

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import configure_log
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from src.config.overrides import CONF, _one_value
from src.distributed.ranks import rank, record_missing_dirs
from src.errors import UsageError, first_line

OUTPUT_OVERRIDE = re.compile(r"[+~]*hydra[./](output_subdir|job_logging)\b")
"""Overrides that say what Hydra writes into the output folder."""
NO_OUTPUT = ("hydra.output_subdir=null", "hydra/job_logging=none")
"""With these it writes nothing."""


class Record(NamedTuple):
    """What Hydra would have written, by its own settings. Launchers send it to their workers."""

    output_subdir: str | None
    job_logging: dict[str, Any]
    """Interpolations as they stand."""
    typed_overrides: list[str]


class Pending(NamedTuple):
    """The record of the job that runs, until `begin` writes it."""

    subdir: str | None
    texts: dict[str, str]
    """Contents of the files in `subdir`, by name."""
    job_logging: DictConfig
    verbose: Any
    lines: MemoryHandler
    """What has been logged so far."""


_pending: Pending | None = None
_written: list[Path] = []
"""What `begin` wrote into a folder that held nothing before."""


def defer_output(config_name: str, overrides: Sequence[str], multirun: bool) -> tuple[list[str], Record, Path]:
    """Return overrides with which Hydra writes nothing into the output folder, what it would have written, and where.

    Remembers which of the output folder and its parents do not exist yet. Raises UsageError if the folder's name
    cannot be resolved.
    """
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        first = [_one_value(o) for o in OverridesParser.create().parse_overrides(list(overrides))]
        cfg = hydra.compose(config_name, first, return_hydra_config=True)
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)  # `${hydra:...}` may be part of the folder's name
    try:
        folder = str(cfg.hydra.sweep.dir if multirun else cfg.hydra.run.dir)
    except OmegaConfBaseException as error:
        setting = "hydra.sweep.dir" if multirun else "hydra.run.dir"
        raise UsageError(f"{setting} cannot be resolved ({first_line(error)}): name a folder") from error
    finally:
        HydraConfig.instance().cfg = before
    record_missing_dirs(Path(folder))
    job_logging = OmegaConf.to_container(cfg.hydra.job_logging, resolve=False)
    assert isinstance(job_logging, dict)
    typed_overrides = [o for o in overrides if OUTPUT_OVERRIDE.match(o)]
    kept = [o for o in overrides if not OUTPUT_OVERRIDE.match(o)]
    record = Record(cfg.hydra.output_subdir, {str(key): value for key, value in job_logging.items()}, typed_overrides)
    return [*kept, *NO_OUTPUT], record, Path(folder)


def store_output(record: Record, cfg: DictConfig) -> None:
    """Give Hydra's settings back what `defer_output` took, log to the console alone, and keep the rest for `begin`."""
    global _pending
    settings: Any = HydraConfig.get()
    with read_write(settings), open_dict(settings):
        settings.output_subdir = record.output_subdir
        settings.job_logging = record.job_logging
        settings.overrides.hydra = [
            *(o for o in settings.overrides.hydra if o not in NO_OUTPUT),
            *record.typed_overrides,
        ]
    job_logging: Any = OmegaConf.create(OmegaConf.to_container(settings.job_logging, resolve=True))
    configure_log(without_files(job_logging), settings.verbose)
    lines = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    logging.getLogger().addHandler(lines)
    texts = {
        "config.yaml": OmegaConf.to_yaml(cfg),  # as it stands before the task adds to it
        "hydra.yaml": OmegaConf.to_yaml(HydraConfig.instance().cfg),
        "overrides.yaml": OmegaConf.to_yaml(settings.overrides.task),
    }
    _pending = Pending(record.output_subdir, texts, job_logging, settings.verbose, lines)


def without_files(job_logging: DictConfig) -> DictConfig:
    """A logging configuration without the handlers that write files."""
    plain: Any = OmegaConf.to_container(job_logging)
    files = {name for name, handler in (plain.get("handlers") or {}).items() if "filename" in handler}
    for node in (plain.get("root"), *(plain.get("loggers") or {}).values()):
        if node and node.get("handlers"):
            node["handlers"] = [name for name in node["handlers"] if name not in files]
    plain["handlers"] = {name: h for name, h in (plain.get("handlers") or {}).items() if name not in files}
    made: DictConfig = OmegaConf.create(plain)
    return made


def begin(folder: Path) -> Path:
    """Make the output folder of a command, in which from here on it works: write `.hydra/` and open the log.

    Called by the first process alone, or by all, of which the others do nothing. Each file is replaced at once.
    """
    global _pending
    if rank() > 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if _pending is None:
        return folder
    pending, _pending = _pending, None
    new = not any(path.name not in (".lock", "wandb", "wandb_id.txt") for path in folder.iterdir())
    if pending.subdir is not None:
        write_texts(folder / pending.subdir, pending.texts)
    logging.getLogger().removeHandler(pending.lines)
    configure_log(pending.job_logging, pending.verbose)
    files = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
    for line in pending.lines.buffer:
        for handler in files:
            handler.handle(line)
    if new:
        _written.extend(folder.iterdir())
    return folder


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files by name, each replaced at once, after all of them are on the disk. None is left if that fails."""
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
    """Forget the record of a job that was refused; what `begin` wrote goes, if nothing else was written."""
    global _pending
    _pending = None
    folders = {path.parent for path in _written}
    if all({*folder.iterdir()} <= {*_written, folder / ".lock"} for folder in folders if folder.is_dir()):
        close_log()
        for path in [*_written, *(folder / ".lock" for folder in folders)]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    _written.clear()


def close_log() -> None:
    """Close the job's log file, if one is open."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, logging.FileHandler | MemoryHandler)]:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def sweep_kept(sweep: Path, subdir: str | None) -> Iterator[None]:
    """Within this a sweep runs in the folder `sweep`. Take its own files back if none of its jobs began.

    Hydra writes `multirun.yaml` before the first job, so that of an earlier start is put aside.
    """
    if rank() > 0:
        yield
        return
    file, aside = sweep / "multirun.yaml", sweep / ".multirun.yaml.before"
    if found := file.is_file():
        os.replace(file, aside)
    jobs = _jobs(sweep, subdir)
    try:
        yield
    finally:
        began = _jobs(sweep, subdir) != jobs
        if found and began and file.is_file():
            aside.unlink()
        elif found:
            os.replace(aside, file)
        elif not began and sweep.is_dir() and all(path.is_file() for path in sweep.iterdir()):
            for path in [file, *sweep.glob(".worker_*")]:
                path.unlink(missing_ok=True)


def _jobs(sweep: Path, subdir: str | None) -> dict[Path, int]:
    """When each job of a sweep was last started."""
    found = sweep.rglob(f"{subdir or '.hydra'}/overrides.yaml")
    return {path: path.stat().st_mtime_ns for path in found}
